// The queries of attend_decode.cu: normalised once a head, rotated anew for every tile of keys, and as operands of products.
//
// A head's rows are the query heads of a sequence's first new token, then those of the second, and so on.
// -D: those of shares.cuh, FLOAT32_ANGLES, SLOW_FROM, HALF_TURNS (decode_scores.cuh).
#pragma once
#include "decode_shared.cuh"
#include "reduce.cuh"
#include "rope.cuh"
#include "storage.cuh"

// q, k and v of a new token.
__device__ __forceinline__ const float* qkv_of(const Call& call, int b, int token) {
    const int m = IS_ONE ? b : b * call.seq + token;
    return call.qkv + static_cast<long long>(m) * (call.num_q_heads + 2 * call.num_kv_heads) * HEAD_DIM;
}

// Four dims of every 128, which is what a lane has of a row.
using Quads = float4[(HEAD_DIM + 127) / 128];

// The norm's weight. Behind keys under way a load takes a microsecond, so it is asked for before q can be.
__device__ __forceinline__ void load_q_norm(const Call& call, Quads& weight) {
#pragma unroll
    for (int i = 0; i < (HEAD_DIM + 127) / 128; ++i) {
        const int d = 4 * (threadIdx.x % 32) + 128 * i;
        weight[i] = d < HEAD_DIM ? *reinterpret_cast<const float4*>(call.q_norm + d) : make_float4(0, 0, 0, 0);
    }
}

// A warp's rows of a head's queries, as many as are asked for ahead of time: waited for one after the other they take a microsecond each.
constexpr int QUERIES_AHEAD = HEAD_TILES == 2 && IS_ONE && WARPS < ROWS ? 2 : 1;
using Queries = Quads[QUERIES_AHEAD];

// Row r of a head's queries, zeros past the last.
__device__ __forceinline__ void load_query(const Call& call, const Cursor& to, int group, int r, Quads& values) {
    const int rows = min(ROWS, (IS_ONE ? group : group * to.count) - to.first_row);  // less those of padding
    const int query = to.first_row + r, token = IS_ONE ? 0 : query / group;
    const float* const q = qkv_of(call, to.b, token) + (to.kv_head_idx * group + query - token * group) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < (HEAD_DIM + 127) / 128; ++i) {
        const int d = 4 * (threadIdx.x % 32) + 128 * i;
        values[i] = r < rows && d < HEAD_DIM ? *reinterpret_cast<const float4*>(q + d) : make_float4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void load_queries_ahead(const Call& call, const Cursor& to, int group, Queries& rows) {
#pragma unroll
    for (int i = 0; i < QUERIES_AHEAD; ++i) load_query(call, to, group, threadIdx.x / 32 + i * WARPS, rows[i]);
}

// Normalise the queries of a head, a warp to a row, the first of which it has loaded; and rotate those of earlier tokens as if
// they stood where the last does, distances being positive; or, where angles must be those of transformers, each to its own
// place.
__device__ __forceinline__ void normalise_queries(const Call& call, Shared& shared, const Cursor& to, int group,
                                                  const Quads& weight, Queries& own) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int r = warp; r < ROWS; r += WARPS) {
        const int token = IS_ONE ? 0 : (to.first_row + r) / group;
        if (r >= warp + QUERIES_AHEAD * WARPS) load_query(call, to, group, r, own[0]);
        const Quads& values = own[0];
        float sum_squares = 0.0f;
#pragma unroll
        for (const float4& v : values) sum_squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        const float rstd = rsqrtf(warp_sum(sum_squares) * (1.0f / HEAD_DIM) + call.eps);
#pragma unroll
        for (int i = 0; i < (HEAD_DIM + 127) / 128; ++i) {
            const int d = 4 * lane + 128 * i;
            if (d >= HEAD_DIM) break;
            const float4 v = values[i], w = weight[i];
            *reinterpret_cast<float4*>(shared.q_norm + r * HEAD_DIM + d) =
                make_float4(v.x * rstd * w.x, v.y * rstd * w.y, v.z * rstd * w.z, v.w * rstd * w.w);
        }
#pragma unroll
        for (int next = 1; next < QUERIES_AHEAD; ++next)
#pragma unroll
            for (int i = 0; i < (HEAD_DIM + 127) / 128; ++i) own[next - 1][i] = own[next][i];
        if (!IS_ONE && token < to.count) {
            __syncwarp();
            const int position = new_position(call, to.b, to.past, token);
            float* const low = shared.q_norm + r * HEAD_DIM;
#pragma unroll 1
            for (int pair = lane; pair < PAIRS; pair += 32) {
                const uint2 frequency = reinterpret_cast<const uint2*>(call.frequency)[pair];
                float cosine, sine;
#ifdef FLOAT32_ANGLES
                rotation(position, frequency, cosine, sine);
#else
                rotation(new_position(call, to.b, to.past, to.count - 1) - position, frequency, cosine, sine);
                sine = -sine;
#endif
                rotate(low[pair], low[pair + PAIRS], cosine, sine);
            }
        }
    }
}

// Rotate the queries for a tile whose first key is `distance` behind them. HAS_SECOND: times k_norm, and beside it what a key's sines are
// multiplied by.
__device__ __forceinline__ void rotate_queries(Shared& shared, int rows, int distance) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __half* const target = shared.q[warp][0];
#pragma unroll
    for (int i = 0; i < (PAIRS / 2 + 31) / 32; ++i) {
        const int d = 2 * (lane + 32 * i);
        if (d >= PAIRS) break;
        const uint4 frequency = *reinterpret_cast<const uint4*>(shared.frequency + d);
        float2 cosine, sine;
        rotation(distance, make_uint2(frequency.x, frequency.y), cosine.x, sine.x);
        rotation(distance, make_uint2(frequency.z, frequency.w), cosine.y, sine.y);
#ifdef HAS_SECOND
        const bool has_second = d >= 8 * SECOND_FROM;
        float4 weight = make_float4(1.0f, 1.0f, 1.0f, 1.0f), of_sines = weight;  // both lower dims, both upper
        if (has_second) {
            weight = shared.second[d - 8 * SECOND_FROM], of_sines = shared.second[d - 8 * SECOND_FROM + 1];
            if (d < FAST_PAIRS) of_sines = make_float4(weight.x, weight.y, -weight.z, -weight.w);
        }
#endif
        constexpr int AT_ONCE = HEAD_TILES == 2 ? 4 : 2;  // rows that are read before the first of them is stored
#pragma unroll 1
        for (int first = 0; first < rows; first += AT_ONCE) {
            float2 a[AT_ONCE], c[AT_ONCE];
#pragma unroll
            for (int r = 0; r < AT_ONCE; ++r) {
                a[r] = *reinterpret_cast<const float2*>(shared.q_norm + (first + r) * HEAD_DIM + d);
                c[r] = *reinterpret_cast<const float2*>(shared.q_norm + (first + r) * HEAD_DIM + d + PAIRS);
            }
#pragma unroll
            for (int r = 0; r < AT_ONCE; ++r) {
                float2 low = make_float2(a[r].x * cosine.x - c[r].x * sine.x, a[r].y * cosine.y - c[r].y * sine.y);
                float2 high = make_float2(c[r].x * cosine.x + a[r].x * sine.x, c[r].y * cosine.y + a[r].y * sine.y);
#ifdef HAS_SECOND
                if (has_second) {
                    unsigned* const place = reinterpret_cast<unsigned*>(
                        shared.q_second[warp] + (first + r) * SECOND_STRIDE + d - 8 * SECOND_FROM);
                    place[0] = pack(high.x * of_sines.x, high.y * of_sines.y);
                    place[SECOND_PAIRS / 2] = pack(low.x * of_sines.z, low.y * of_sines.w);
                }
                low.x *= weight.x, low.y *= weight.y, high.x *= weight.z, high.y *= weight.w;
#endif
                const unsigned low_pair = pack(low.x, low.y), high_pair = pack(high.x, high.y);
                unsigned* const place = reinterpret_cast<unsigned*>(target + (first + r) * STRIDE + d);
                place[0] = low_pair, place[PAIRS / 2] = high_pair;
                if (PARTS == 2) {
                    place[Q_ROWS * STRIDE / 2] = pack_rest(low.x, low.y, low_pair);
                    place[Q_ROWS * STRIDE / 2 + PAIRS / 2] = pack_rest(high.x, high.y, high_pair);
                }
            }
        }
    }
}

// Step j of a score takes 8 dims of the lower half of a head and the 8 they are rotated with: block j and block j + BLOCKS of rows that
// stand `stride` apart. Query heads 8 t to 8 t + 7 as the B fragments of steps j and j + 1; where there are fewer the last one again,
// since scores must be numbers. HALVES: heads 0 to 3 twice.
template <int BLOCKS>
__device__ __forceinline__ void load_queries(unsigned (&frag)[4], const __half* q, int stride, int rows, int t, int j) {
    const int lane = threadIdx.x % 32;
    const int block = min(j + lane / 16, BLOCKS - 1) + lane / 8 % 2 * BLOCKS;  // an odd last step: read, not used
    const int row = min(IN_HALVES ? lane % 4 : 8 * t + lane % 8, rows - 1);
    load_matrices(frag, q + row * stride + block * 8);
}
