// Scores of a tile of keys in attend_decode.cu.
//
// A key's pair of dims (a, c) with weights w is turned in float32 and rounded, q' being the queries' (q, r):
//   k' = (w_a a cos - w_c c sin, w_c c cos + w_a a sin);   s = sum of k' . (q, r)
// SLOW_FROM: from this block of eight pairs on a whole turn of the table is a 64th of a radian at most. There cos is one and sin the angle,
// the frequency f times so many positions, to less than float16 tells apart, and keys are multiplied as they are, their weights on the queries:
//   s = sum of (a, c) . (w_a q, w_c r) + positions (a, c) . (w_a f r, -w_c f q)
// That is twice the products and nothing else, and the queries are all that is rounded.
// HALF_TURNS: the other pairs are multiplied by cosines and by sines in float16, for a third of the instructions and one rounding more:
//   s = sum of (a cos, c cos) . (w_a q, w_c r) + (a sin, c sin) . (w_a r, -w_c q)
// -D: those of shares.cuh, FLOAT32_ANGLES, SLOW_FROM, HALF_TURNS.
#pragma once
#include "decode_queries.cuh"

// Where angles come from the table, keys are rotated as they were cached and the norm goes to their scores. The table is so much
// smaller than float16 allows for normalised keys; those whose reciprocal norm is not between these are first brought near one.
#ifdef FLOAT32_ANGLES
constexpr bool NORMALISES_SCORES = false;
#else
constexpr bool NORMALISES_SCORES = true;
#endif
constexpr float TURN_UNSCALE = 8.0f, LEAST_RSTD = 0.07f, MOST_RSTD = PARTS == 2 ? 16.0f : 2048.0f;
// Queries that have k_norm on them are so much smaller again, and what sines of next to nothing are multiplied by so much larger.
constexpr float SECOND_UNSCALE = 1024.0f, SINE_UNSCALE = 1.0f / 64.0f;

// Two values of a key as float16, which has room for them. Here, or all would be converted ahead of the loop over passes.
__device__ __forceinline__ unsigned as_float16(unsigned pair) {
    if (STORED_AS_FLOAT16) return pair;
    const float2 values = unpack(work_out_here(pair), STORAGE());
    return pack(values.x, values.y);
}

using Keys = unsigned[HALF_BLOCKS][4];  // [step][2 n + half]: dims 2 (l % 4) + {0, 1} of a block of that half, of key 8 n + l / 4
using Scores = float[HEAD_TILES][4];    // of keys l / 4 and 8 more, heads 8 t + 2 (l % 4) + {0, 1}

// The queries of two steps as B fragments, the second ones from block SECOND_FROM on.
struct QueryFragments {
    const Shared& shared;
    int rows;
    unsigned first[HEAD_TILES][PARTS][4], second[HEAD_TILES][4];

    // Those of step j, if they have not come with the step before it; `begins`: there was none.
    __device__ __forceinline__ void load(int j, bool begins) {
        const int warp = threadIdx.x / 32;
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t) {
#pragma unroll
            for (int p = 0; p < PARTS; ++p)
                if (j % 2 == 0 || begins) load_queries<HALF_BLOCKS>(first[t][p], shared.q[warp][p], STRIDE, rows, t, j / 2 * 2);
#ifdef HAS_SECOND
            const int k = j - SECOND_FROM;
            if (k >= 0 && (k % 2 == 0 || begins))
                load_queries<SECOND_BLOCKS>(second[t], shared.q_second[warp], SECOND_STRIDE, rows, t, k / 2 * 2);
#endif
        }
    }

    __device__ __forceinline__ void add_first(Scores& scores, const unsigned (&keys)[4], int t, int part, int j) const {
        multiply_add(scores[t], keys, first[t][part][j % 2 * 2], first[t][part][j % 2 * 2 + 1]);
    }

    __device__ __forceinline__ void add_second(Scores& scores, const unsigned (&keys)[4], int t, int j) const {
        const int two = (j - SECOND_FROM) % 2 * 2;
        multiply_add(scores[t], keys, second[t][two], second[t][two + 1]);
    }
};

#ifdef SLOW_FROM
// Scores of slow pairs, SECOND_UNSCALE times too small.
__device__ __forceinline__ void multiply_slow(const Keys& keys, const int (&positions)[2], int base, QueryFragments& queries, Scores& scores) {
    Scores of_sines = {};
#pragma unroll
    for (int j = FAST_BLOCKS; j < HALF_BLOCKS; ++j) {
        queries.load(j, j == FAST_BLOCKS);
        unsigned k_frag[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) k_frag[i] = as_float16(keys[j][i % 2 * 2 + i / 2]);
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t) queries.add_first(scores, k_frag, t, 0, j), queries.add_second(of_sines, k_frag, t, j);
    }
#pragma unroll
    for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[t][e] += static_cast<float>(positions[e / 2] - base) * SINE_UNSCALE * of_sines[t][e];
}
#endif

#ifdef HALF_TURNS
// Scores of fast pairs, SECOND_UNSCALE times too small.
__device__ __forceinline__ void multiply_fast(const Keys& keys, const int (&positions)[2], int base, const float (&)[2],
                                              QueryFragments& queries, Scores& scores) {
    const int quad = threadIdx.x % 4;
    const uint4* turns[2][2];  // of a key: every other 16 bytes of its row, from the first or the second on
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int offset = (positions[n] - base) & (TURNED - 1), odd = TURN_ROW % 8 == 0 ? offset % 2 * 4 : 0;
        const uint4* const row = queries.shared.turn + offset * TURN_ROW + quad;
        turns[n][0] = row + odd, turns[n][1] = row + (odd ^ 4);
    }
    uint4 turn[2];
#pragma unroll
    for (int j = 0; j < FAST_BLOCKS; ++j) {
        queries.load(j, j == 0);
        unsigned by_cosines[4], by_sines[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            if (j % 2 == 0) turn[n] = turns[n][j / 2 % 2][j / 4 * 8];
            const unsigned cosines = j % 2 == 0 ? turn[n].x : turn[n].z, sines = j % 2 == 0 ? turn[n].y : turn[n].w;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned pair = as_float16(keys[j][2 * n + half]);
                by_cosines[n + 2 * half] = multiply_pairs(pair, cosines, __half());
                by_sines[n + 2 * half] = multiply_pairs(pair, sines, __half());
            }
        }
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t) queries.add_first(scores, by_cosines, t, 0, j), queries.add_second(scores, by_sines, t, j);
    }
}
#else
// Scores of fast pairs; `rstd`: of the keys, which scores have yet to be multiplied by if NORMALISES_SCORES.
__device__ __forceinline__ void multiply_fast(const Keys& keys, const int (&positions)[2], int base, const float (&rstd)[2],
                                              QueryFragments& queries, Scores& scores) {
    const Shared& shared = queries.shared;
    const int quad = threadIdx.x % 4;
#ifndef FLOAT32_ANGLES
    constexpr int PLACES = MOST_TOGETHER == 1 ? 2 : 1;
    const float4* turns[2][PLACES];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int offset = (positions[n] - base) & (TURNED - 1);
#pragma unroll
        for (int odd = 0; odd < PLACES; ++odd)
            turns[n][odd] = shared.turn + (PLACES == 1 ? (1 + offset) * TURN_STRIDE + quad : turn_index(offset, quad * 2 + odd));
    }
#endif
    // Rotate two dims of the lower half of key l / 4, or 8 more, and two of the upper, `low` and `high`; with their weights.
    const auto rotate_key = [&](int n, int j, float2& low, float2& high) {
        float2 a = low, c = high;
#ifdef TOGETHER
        const float4 weight = shared.turn[j * 4 + quad], turn = turns[n][0][j * 4];
        a.x *= weight.x, a.y *= weight.y, c.x *= weight.z, c.y *= weight.w;
        const float4 even = make_float4(turn.x, turn.y, turn.x, turn.y), odd = make_float4(turn.z, turn.w, turn.z, turn.w);
#elif defined(FLOAT32_ANGLES)
        const auto turn_of = [&](int pair) {
            float cosine, sine;
            rotation(positions[n], shared.frequency[pair], cosine, sine);
            const float low = shared.k_norm[pair], high = shared.k_norm[pair + PAIRS];
            return make_float4(low * cosine, high * sine, high * cosine, low * sine);
        };
        const float4 even = turn_of(j * 8 + quad * 2), odd = turn_of(j * 8 + quad * 2 + 1);
#else
        const float4 even = turns[n][0][j * 8], odd = turns[n][1][j * 8];
#endif
        low = make_float2(a.x * even.x - c.x * even.y, a.y * odd.x - c.y * odd.y);
        high = make_float2(c.x * even.z + a.x * even.w, c.y * odd.z + a.y * odd.w);
    };
#pragma unroll
    for (int j = 0; j < FAST_BLOCKS; ++j) {
        queries.load(j, j == 0);
        unsigned k_frag[4], k_rest[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            // Or bfloat16 would be widened before the loop over passes, to more floats than there are registers.
            float2 low = unpack(work_out_here(keys[j][2 * n]), STORAGE());
            float2 high = unpack(work_out_here(keys[j][2 * n + 1]), STORAGE());
            if (!NORMALISES_SCORES) low.x *= rstd[n], low.y *= rstd[n], high.x *= rstd[n], high.y *= rstd[n];
            rotate_key(n, j, low, high);
            k_frag[n] = pack(low.x, low.y);
            k_frag[n + 2] = pack(high.x, high.y);
            if (PARTS == 2) {
                k_rest[n] = pack_rest(low.x, low.y, k_frag[n]);
                k_rest[n + 2] = pack_rest(high.x, high.y, k_frag[n + 2]);
            }
        }
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t) {
            if constexpr (PARTS == 2) {  // the small products first
                queries.add_first(scores, k_frag, t, 1, j);
                queries.add_first(scores, k_rest, t, 0, j);
            }
            queries.add_first(scores, k_frag, t, 0, j);
        }
    }
}
#endif

// Scores of keys that stand at `positions`, and of queries rotated for position `base`. `rstd`: of the keys, which scores have yet to be
// multiplied by if NORMALISES_SCORES.
__device__ __forceinline__ void multiply_keys(const Shared& shared, const Keys& keys, const int (&positions)[2], int base, int rows,
                                              const float (&rstd)[2], Scores& scores) {
    QueryFragments queries = {shared, rows};
    const auto unscale = [&]() {
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[t][e] *= SECOND_UNSCALE;
    };
#pragma unroll
    for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[t][e] = 0.0f;
#ifdef SLOW_FROM
    multiply_slow(keys, positions, base, queries, scores);  // first, as fewer registers are taken then
    if (SECOND_FROM > 0) unscale();
#endif
    multiply_fast(keys, positions, base, rstd, queries, scores);
    if (SECOND_FROM == 0) unscale();
}
