// The arithmetic of one tile of keys in attend_decode.cu: k' from cached keys, scores, weights of a softmax whose largest score is
// not known yet, and sums of weighted values.
//
// It is the instructions that make k' that count, so scores are k' q'^T and sums v^T p^T: keys and dims are the rows of products,
// queries, of which there are few, the columns. Even squares of keys are products: the diagonal of k k^T.
//
// HALVES: up to four queries are columns twice. Of a key's scores the ones in columns 0 to 3 count, or those in columns 4 to 7, and each
// lane has those of one key.
// -D: those of shares.cuh, FLOAT32_ANGLES.
#pragma once
#include "decode_ring.cuh"
#include "decode_scores.cuh"

constexpr int LEAST_LANES = IN_HALVES ? 2 : 4;  // lanes this far apart, and twice, four times, ... as far, have the same heads

// What a warp has found of a head. Of heads 8 t + 2 (l % 4) + {0, 1}, of lane l; HALVES: shift and sum of head 2 (l % 2) + {0, 1}.
struct Sums {
    float out[HEAD_TILES][DIM_BLOCKS][4];  // weighted v: [.][16 dims], dims l / 4 and 8 more
    float shift[HEAD_TILES][2];            // what scores are taken relative to
    float sum[HEAD_TILES][2];              // of this lane's weights
    int base;                              // TOGETHER: the position that queries are rotated for
    // Whether no key was seen yet: one new token sees all that are; of several, and by window, each its own.
    bool nothing_seen[IS_ONE ? 1 : HEAD_TILES][IS_ONE ? 1 : 2];
    int seen_from[IS_ONE ? 1 : HEAD_TILES][IS_ONE ? 1 : 2];
};

// The new token of query 8 t + 2 (l % 4) + e: worked out where it is needed, which is seldom, since registers are short.
__device__ __forceinline__ int token_of(const Cursor& at, int group, int t, int e) {
    return IS_ONE ? 0 : min((work_out_here(at.first_row) + 8 * t + 2 * (threadIdx.x % 4) + e) / group, at.count - 1);
}

// Nothing yet. `new_at`: position of the last new token.
__device__ __forceinline__ void begin_sums(const Call& call, const Cursor& at, int group, int new_at, Sums& sums) {
#pragma unroll
    for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
        for (int j = 0; j < DIM_BLOCKS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums.out[t][j][e] = 0.0f;
#pragma unroll
    for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) sums.shift[t][e] = sums.sum[t][e] = 0.0f;
    if (MOST_TOGETHER > 1) sums.base = -TURNED;  // of no position
#pragma unroll
    for (int t = 0; t < (IS_ONE ? 1 : HEAD_TILES); ++t)
#pragma unroll
        for (int e = 0; e < (IS_ONE ? 1 : 2); ++e) {
            sums.nothing_seen[t][e] = true;
#ifdef WINDOW
            const int position = IS_ONE ? new_at : new_position(call, at.b, at.past, token_of(at, group, t, e));
            sums.seen_from[t][e] = position - call.window + 1;
#else
            sums.seen_from[t][e] = 0;
#endif
        }
}

// Add what tile `stage` of this warp's ring gives, whose keys are there. `rows`: queries of the head. `ask_for_keys` is called once
// the keys have been read and their place is free, `wait_for_values` where values are needed. All lanes of a warp together.
template <class AskForKeys, class WaitForValues>
__device__ __forceinline__ void attend_tile(const Call& call, Shared& shared, const Cursor& at, int stage, int new_at, int group,
                                            int rows, Sums& sums, AskForKeys ask_for_keys, WaitForValues wait_for_values) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
    auto& out = sums.out;
    auto& shift = sums.shift;
    auto& sum = sums.sum;
    auto& nothing_seen = sums.nothing_seen;
    auto& seen_from = sums.seen_from;
    const STORAGE* const k_smem = shared.ring[warp][stage].k;
    const STORAGE* const v_smem = shared.ring[warp][stage].v;
    const int last = min(TILE - 1, at.past + at.count - 1 - at.slot);  // key
    const int own_slot = at.slot + lane % TILE;
    int own_position = shared.positions[warp][stage][lane % TILE];
    if (IS_ONE && own_slot >= at.past) own_position = new_at;
    if (!IS_ONE && own_slot >= at.past && own_slot < at.past + at.count)
        own_position = new_position(call, at.b, at.past, own_slot - at.past);
    const int first_position = __shfl_sync(0xffffffffu, own_position, 0);
    const int last_position = __shfl_sync(0xffffffffu, own_position, last);

    const int key_row = lane / 16 * 8 + lane % 8, k_half = lane / 8 % 2;
    const unsigned k_address = shared_address(k_smem + place_of(key_row, k_half * HALF_BLOCKS));
    Keys k_raw;
    float squares[2][2][4] = {};  // k k^T of [keys 0 to 7, 8 to 15][lower, upper half], of which the diagonal counts
#pragma unroll
    for (int j = 0; j < HALF_BLOCKS; ++j)
        load_matrices(k_raw[j], IS_XOR ? further_address(k_address, j)
                                       : shared_address(k_smem + place_of(key_row, j + k_half * HALF_BLOCKS)));
#pragma unroll
    for (int j = 0; j < HALF_BLOCKS; ++j)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                multiply_add_8(squares[n][half], k_raw[j][2 * n], k_raw[j][2 * n + 1], k_raw[j][2 * n + half],
                               STORAGE());
    float rstd[2];
    int offsets[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const bool odd = lane / 4 % 2;
        const float own = (odd ? squares[n][0][1] : squares[n][0][0]) + (odd ? squares[n][1][3] : squares[n][1][2]);
        rstd[n] = __shfl_sync(0xffffffffu, own, lane & 28 | lane / 8);
        rstd[n] = rsqrtf(rstd[n] * (1.0f / HEAD_DIM) + call.eps);
        offsets[n] = __shfl_sync(0xffffffffu, own_position, n * 8 + lane / 4);
    }
    float score_scale[2] = {call.score_scale, call.score_scale};
    if (NORMALISES_SCORES) {
        const auto is_far = [&](int n) { return !(rstd[n] > LEAST_RSTD && rstd[n] <= MOST_RSTD); };
        if (__any_sync(0xffffffffu, is_far(0) || is_far(1))) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float power = fminf(__uint_as_float(__float_as_uint(rstd[n]) & 0x7f800000u), 32768.0f);
                const unsigned pair = pack(power, power, STORAGE());
                rstd[n] = __fdividef(rstd[n], power);
#pragma unroll
                for (int j = 0; j < HALF_BLOCKS; ++j)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        k_raw[j][2 * n + half] = multiply_pairs(k_raw[j][2 * n + half], pair, STORAGE());
            }
        }
        score_scale[0] *= rstd[0] * TURN_UNSCALE, score_scale[1] *= rstd[1] * TURN_UNSCALE;
    }
    const bool has_new = has_new_tokens(at);
    const auto is_hidden = [&](int n, int t, int e) {
        const int key = n * 8 + lane / 4, position = n == 0 ? offsets[0] : offsets[1];
        if (IS_ONE) return key > last || position < seen_from[0][0];
        return (has_new && at.slot + key > at.past + token_of(at, group, t, e)) || position < seen_from[t][e];
    };

    // The table spans `turned` positions: keys further apart than that take several passes.
#ifndef FLOAT32_ANGLES
    int base = first_position;
    const int turned = MOST_TOGETHER > 1 && at.together > 1 ? TURNED : TILE;  // positions that the table has
    const bool is_rotated = MOST_TOGETHER > 1 && last_position - sums.base < turned;  // since a tile before
    if (is_rotated) base = sums.base;
    const bool gaps = last_position - base >= turned;
    while (true) {
#else
    {
        constexpr int base = 0, turned = TILE;
        constexpr bool gaps = false;
#endif
#ifdef FLOAT32_ANGLES
        rotate_queries(shared, rows, IS_ONE ? new_at : 0);
#else
        if (!is_rotated) rotate_queries(shared, rows, new_at - base);
        if (MOST_TOGETHER > 1) sums.base = base;
#endif
        __syncwarp();
        ask_for_keys();

        Scores scores;
        multiply_keys(shared, k_raw, offsets, base, rows, rstd, scores);
        // This lane's own: of keys l / 4 and 8 more, heads 8 t + 2 (l % 4) + {0, 1}; or of one of those keys, heads 2 (l % 2) + {0, 1}.
        constexpr int OWN = IN_HALVES ? 2 : 4;
        float own[HEAD_TILES][OWN];
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
            for (int e = 0; e < OWN; ++e) {
                const int n = IN_HALVES ? quad / 2 : e / 2;
                own[t][e] = (n == 0 ? scores[t][e % 2] * score_scale[0] : scores[t][e % 2 + 2] * score_scale[1]);
                const int position = n == 0 ? offsets[0] : offsets[1];
                if (is_hidden(n, IS_ONE ? 0 : t, IS_ONE ? 0 : e % 2) ||
                    (gaps && static_cast<unsigned>(position - base) >= turned))
                    own[t][e] = MINUS_INFINITY;
            }

        // Weights are relative to a score that was the largest once; it is raised when that is MOST too small.
        float weights[HEAD_TILES][OWN];
        const auto weigh = [&]() {
            float most = MINUS_INFINITY;
#pragma unroll
            for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
                for (int e = 0; e < OWN; ++e) {
                    weights[t][e] = own[t][e] - shift[t][e % 2];
                    most = fmaxf(most, weights[t][e]);
                }
            return most;
        };
        bool raise = weigh() > MOST;
#pragma unroll
        for (int t = 0; t < (IS_ONE ? 1 : HEAD_TILES); ++t)
#pragma unroll
            for (int e = 0; e < (IS_ONE ? 1 : 2); ++e) raise = raise || nothing_seen[t][e];
        if (__any_sync(0xffffffffu, raise)) {
            bool seen = false;
#pragma unroll
            for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float most = fmaxf(weights[t][e], weights[t][(e + 2) % OWN]);
#pragma unroll
                    for (int lanes = LEAST_LANES; lanes < 32; lanes *= 2)
                        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes));
                    const float before = shift[t][e];
                    bool& nothing = nothing_seen[IS_ONE ? 0 : t][IS_ONE ? 0 : e];
                    if (most > MINUS_INFINITY && (nothing || most > 0.0f)) shift[t][e] += most;
                    seen = seen || most > MINUS_INFINITY;
                    const float shrink = nothing ? 0.0f : power_of_two(before - shift[t][e]);
                    sum[t][e] *= shrink;
                    if (!IS_ONE) nothing = nothing && !(most > MINUS_INFINITY);
                    if (IS_ONE && nothing) continue;
#pragma unroll
                    for (int j = 0; j < DIM_BLOCKS; ++j) out[t][j][e] *= shrink, out[t][j][e + 2] *= shrink;
                }
            if (IS_ONE) nothing_seen[0][0] = nothing_seen[0][0] && !__any_sync(0xffffffffu, seen);
            weigh();
        }

        // Weights of 8 keys and 8 heads as B fragments. bfloat16 has too few bits for them: what rounding leaves is
        // a second product.
        unsigned p_frag[HEAD_TILES][2], p_rest[HEAD_TILES][2];
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
            for (int n = 0; n < OWN / 2; ++n) {
                const float low = power_of_two(weights[t][2 * n]), high = power_of_two(weights[t][2 * n + 1]);
                sum[t][0] += low, sum[t][1] += high;
                const unsigned rounded = pack(low, high, STORAGE());
                p_frag[t][n] = transpose(rounded);
                p_rest[t][n] = transpose(pack_rest(low, high, rounded, STORAGE()));
            }
        // Rows 4 to 7 of what was transposed are heads 0 to 3 of the other keys; heads 4 to 7 get anything.
        if (IN_HALVES) {
            p_frag[0][1] = __shfl_xor_sync(0xffffffffu, p_frag[0][0], 16);
            if (!STORED_AS_FLOAT16) p_rest[0][1] = __shfl_xor_sync(0xffffffffu, p_rest[0][0], 16);
        }
        wait_for_values();
        __syncwarp();
        const unsigned v_address = shared_address(v_smem + place_of(lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
        for (int j = 0; j < DIM_BLOCKS; ++j) {
            unsigned v_frag[4];  // 16 dims x 16 keys
            load_matrices_transposed(v_frag, IS_XOR ? further_address(v_address, 2 * j) :
                shared_address(v_smem + place_of(lane / 16 * 8 + lane % 8, 2 * j + lane / 8 % 2)));
#pragma unroll
            for (int t = 0; t < HEAD_TILES; ++t) {
                if (!STORED_AS_FLOAT16) multiply_add(out[t][j], v_frag, p_rest[t][0], p_rest[t][1], STORAGE());
                multiply_add(out[t][j], v_frag, p_frag[t][0], p_frag[t][1], STORAGE());
            }
        }
#ifndef FLOAT32_ANGLES
        if (!gaps) break;
        const unsigned beyond = __ballot_sync(0xffffffffu, lane <= last && own_position - base >= turned);
        if (!beyond) break;
        base = __shfl_sync(0xffffffffu, own_position, __ffs(beyond) - 1);
#endif
    }
}
