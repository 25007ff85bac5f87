// RMSNorm, QKV projection, per-head Q/K RMSNorm, RoPE and the cache append, in one launch.
//   hidden = x / rms(x) * w_in                         float16, or high and low halves (PARTS 2; for k of bfloat16)
//   q, k, v = split(hidden Wqkv^T + bias)
//   cache <- k, v                                      before norm and RoPE, in the storage dtype
//   q', k' = rope(rms_norm(q) w_q), rope(rms_norm(k) w_k)    from the k that was cached; float16 scratch
// Cached keys of earlier tokens are normalised and rotated into scratch as well (chunked prefill).
//
// Grid: any number of blocks; each takes work in order from a counter until none is left: first all rows to normalise,
// then tiles of cached keys, then tiles of the product, which wait for their rows. What a tile waits for was taken by a
// block that is running, so the launch ends however few blocks fit the GPU. Block 128 threads, shared memory
// GEMM_STAGES x (4 WARP_M + BLOCK_N) x 64 halves. -D: those of call.cuh, WARP_M (rows of a warp: 16 or 32), BLOCK_N (columns: whole
// heads); RAW: write q, k, v as they are to call.qkv and nothing else (decode); COLLECT; FLOAT32_ANGLES.
// Tensor-core bound; one read of x and Wqkv from memory, tiles re-read from L2.
#include "call.cuh"
#include "gemm.cuh"
#include "reduce.cuh"
#include "rope.cuh"
#include "storage.cuh"

static_assert(BLOCK_N % HEAD_DIM == 0, "a tile holds whole heads");

// Parts of the hidden states: what k is off by changes, now and then, how it rounds, which in bfloat16 is a large step.
constexpr int HIDDEN_PARTS = 2;
constexpr int BLOCK_M = gemm::WARPS * WARP_M;
constexpr int HEADS_A_TILE = BLOCK_N / HEAD_DIM;
constexpr int VEC = HEAD_DIM % 64 == 0 ? 8 : HEAD_DIM % 32 == 0 ? 4 : 2;  // consecutive dims of a thread
constexpr int HALF_BLOCKS = HEAD_DIM / 16;  // 8-column blocks of half a head: block j is rotated with j + HALF_BLOCKS
constexpr int NORM_ROWS = gemm::WARPS;      // rows of one piece of work: latency counts, so one a warp
constexpr int PAST_ROWS = 64;
constexpr int GROUP_M = 16;                 // tiles of rows that share tiles of W while they are in L2

// counters: next work, blocks that are done, then for each tile of rows how many pieces of it are normalised.
enum { NEXT, DONE, READY };

__device__ __forceinline__ void normalise_row(const Call& call, int m) {
    if (m >= call.batch * call.seq) return;
    const int lane = threadIdx.x % 32;
    const int num_vectors = call.hidden_size / VECTOR;
    const long long row_start = static_cast<long long>(m) * call.hidden_size;
    int slot = 0;
    if (lane == 0) slot = describe_row(call, m);
    float sum_squares = 0.0f;
#pragma unroll 4
    for (int v = lane; v < num_vectors; v += 32) {
        float values[VECTOR];
        load8(call.x + row_start + v * VECTOR, values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum_squares += values[j] * values[j];
    }
    const float rstd = 1.0f / sqrtf(warp_sum(sum_squares) / call.hidden_size + call.eps);
    const bool valid = __shfl_sync(0xffffffffu, slot, 0) >= 0;
#pragma unroll 4
    for (int v = lane; v < num_vectors; v += 32) {
        float values[VECTOR], scale[VECTOR];
        load8(call.x + row_start + v * VECTOR, values);
        load8(call.input_norm + v * VECTOR, scale);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[j] = valid ? values[j] * rstd * scale[j] : 0.0f;
#ifdef COLLECT
        if (valid) {
            float natural[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) natural[j] = values[j] * call.hidden_unscale;
            store8(call.stage_input_norm + row_start + v * VECTOR, natural);
        }
#endif
        __half* target = call.hidden + HIDDEN_PARTS * row_start + v * VECTOR;
        store8(target, values);
        if (HIDDEN_PARTS == 2) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) values[j] -= __half2float(__float2half_rn(values[j]));
            store8(target + call.hidden_size, values);
        }
    }
}

#ifndef RAW
// Normalise and rotate PAST_ROWS cached keys of one KV head into scratch, a warp to a row; widen v where needed.
__device__ __forceinline__ void prepare_past(const Call& call, int item) {
    const int heads = call.batch * call.num_kv_heads;
    const int first = item / heads * PAST_ROWS, kv_head_idx = item % heads % call.num_kv_heads;
    const int b = item % heads / call.num_kv_heads;
    const int past = min(call.lengths[b], call.capacity), lane = threadIdx.x % 32;
    const long long cache_head = (static_cast<long long>(b) * call.num_kv_heads + kv_head_idx) * call.capacity;
    const long long scratch_head = (static_cast<long long>(b) * call.num_kv_heads + kv_head_idx) * call.scratch_capacity;
    const long long part = static_cast<long long>(call.batch) * call.num_kv_heads * call.scratch_capacity * HEAD_DIM;
    constexpr int PAIRS = (HEAD_DIM / 2 + 63) / 64;  // pairs of dims a lane has, two at a time
    for (int i = threadIdx.x / 32; i < PAST_ROWS; i += gemm::WARPS) {
        const int slot = first + i;
        if (slot >= past) return;
        const STORAGE* key = call.k_cache + (cache_head + slot) * HEAD_DIM;
        __half* target = call.k + (scratch_head + slot) * HEAD_DIM;
        const int position = call.cached_positions[static_cast<long long>(b) * call.capacity + slot];
        float2 low[PAIRS], high[PAIRS];
        float sum_squares = 0.0f;
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const int d = 2 * lane + 64 * p;
            low[p] = high[p] = make_float2(0.0f, 0.0f);
            if (d < HEAD_DIM / 2) {
                low[p] = unpack(*reinterpret_cast<const unsigned*>(key + d), STORAGE());
                high[p] = unpack(*reinterpret_cast<const unsigned*>(key + d + HEAD_DIM / 2), STORAGE());
            }
            sum_squares += low[p].x * low[p].x + low[p].y * low[p].y + high[p].x * high[p].x + high[p].y * high[p].y;
        }
        const float rstd = rsqrtf(warp_sum(sum_squares) / HEAD_DIM + call.eps);
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const int d = 2 * lane + 64 * p;
            if (d >= HEAD_DIM / 2) continue;
            const float2 w_low = *reinterpret_cast<const float2*>(call.k_norm + d);
            const float2 w_high = *reinterpret_cast<const float2*>(call.k_norm + d + HEAD_DIM / 2);
            const uint4 frequency = *reinterpret_cast<const uint4*>(call.frequency + d);
            float2 a = make_float2(low[p].x * rstd * w_low.x, low[p].y * rstd * w_low.y);
            float2 c = make_float2(high[p].x * rstd * w_high.x, high[p].y * rstd * w_high.y);
            rotate(a.x, c.x, position, make_uint2(frequency.x, frequency.y));
            rotate(a.y, c.y, position, make_uint2(frequency.z, frequency.w));
            const unsigned a_high = pack(a.x, a.y), c_high = pack(c.x, c.y);
            *reinterpret_cast<unsigned*>(target + d) = a_high;
            *reinterpret_cast<unsigned*>(target + d + HEAD_DIM / 2) = c_high;
            if (PARTS == 2) {
                *reinterpret_cast<unsigned*>(target + part + d) = pack_rest(a.x, a.y, a_high);
                *reinterpret_cast<unsigned*>(target + part + d + HEAD_DIM / 2) = pack_rest(c.x, c.y, c_high);
            }
        }
        if (!STORED_AS_FLOAT16) {
            for (int d = 2 * lane; d < HEAD_DIM; d += 64) {
                const float2 v = unpack(*reinterpret_cast<const unsigned*>(call.v_cache + (cache_head + slot) * HEAD_DIM + d),
                                        STORAGE());
                *reinterpret_cast<unsigned*>(call.v + (scratch_head + slot) * HEAD_DIM + d) =
                    pack(v.x * call.v_scale, v.y * call.v_scale);
            }
        }
    }
}
#endif

// Store VEC consecutive values as 16-bit pairs.
template <typename T>
__device__ __forceinline__ void store_pairs(T* target, const unsigned (&pairs)[VEC / 2]) {
    if constexpr (VEC == 8) {
        *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else if constexpr (VEC == 4) {
        *reinterpret_cast<uint2*>(target) = make_uint2(pairs[0], pairs[1]);
    } else {
        *reinterpret_cast<unsigned*>(target) = pairs[0];
    }
}

using Values = float[2 * HALF_BLOCKS][2];  // a thread's dims of one head: [8-column block][element]

__device__ __forceinline__ int dim_of(int block, int element) {
    return gemm::column_of<VEC>(block, threadIdx.x % 4, element);
}

// Store a head's values as T; with `rest`, what rounding to T left over.
template <typename T>
__device__ __forceinline__ void store_head(T* head, const Values& values, bool rest = false) {
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; j += VEC / 2) {
        unsigned pairs[VEC / 2];
#pragma unroll
        for (int i = 0; i < VEC / 2; ++i) {
            pairs[i] = pack(values[j + i][0], values[j + i][1], T());
            if (rest) pairs[i] = pack_rest(values[j + i][0], values[j + i][1], pairs[i], T());
        }
        store_pairs(head + dim_of(j, 0), pairs);
    }
}

__device__ __forceinline__ void collect_head(float* head, const Values& values, float scale) {
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; ++j)
        *reinterpret_cast<float2*>(head + dim_of(j, 0)) = make_float2(values[j][0] * scale, values[j][1] * scale);
}

#ifndef RAW
// What becomes of one head of one row: all four lanes of a quad are here together.
__device__ __forceinline__ void finish_head(const Call& call, int m, int2 row, int head_idx, Values& values) {
    const int b = m / call.seq;
    const bool is_query = head_idx < call.num_q_heads;
    const bool is_key = !is_query && head_idx < call.num_q_heads + call.num_kv_heads;
    const int kv_head_idx = (head_idx - call.num_q_heads) % call.num_kv_heads;
    const long long sequence_head = static_cast<long long>(b) * call.num_kv_heads + kv_head_idx;
    const long long cached = (sequence_head * call.capacity + row.x) * HEAD_DIM;
    const long long scratch = (sequence_head * call.scratch_capacity + row.x) * HEAD_DIM;
    const bool valid = row.x >= 0;

    if (!is_query) {
        if (valid) store_head((is_key ? call.k_cache : call.v_cache) + cached, values);
#pragma unroll
        for (int j = 0; j < 2 * HALF_BLOCKS; ++j)  // go on from what was cached
#pragma unroll
            for (int e = 0; e < 2; ++e) values[j][e] = static_cast<float>(static_cast<STORAGE>(values[j][e]));
    }
#ifdef COLLECT
    const long long kv_row = (static_cast<long long>(m) * call.num_kv_heads + kv_head_idx) * HEAD_DIM;
    const long long q_row = (static_cast<long long>(m) * call.num_q_heads + head_idx) * HEAD_DIM;
    if (valid) {
        if (is_query) collect_head(call.stage_q + q_row, values, 1.0f);
        else collect_head((is_key ? call.stage_k : call.stage_v) + kv_row, values, 1.0f);
    }
#endif
    if (!is_query && !is_key) {
        if (!STORED_AS_FLOAT16 && valid) {
#pragma unroll
            for (int j = 0; j < 2 * HALF_BLOCKS; ++j) values[j][0] *= call.v_scale, values[j][1] *= call.v_scale;
            store_head(call.v + scratch, values);
        }
        return;
    }

    float sum_squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; ++j) sum_squares += values[j][0] * values[j][0] + values[j][1] * values[j][1];
    const float rstd = rsqrtf(quad_sum(sum_squares) / HEAD_DIM + call.eps);
    const float* weight = is_query ? call.q_norm : call.k_norm;
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; ++j) {
        const float2 w = *reinterpret_cast<const float2*>(weight + dim_of(j, 0));
        values[j][0] *= rstd * w.x;
        values[j][1] *= rstd * w.y;
    }
#ifdef COLLECT
    if (valid) {
        if (is_query) collect_head(call.stage_q_norm + q_row, values, call.q_norm_unscale);
        else collect_head(call.stage_k_norm + kv_row, values, call.k_norm_unscale);
    }
#endif
#pragma unroll
    for (int j = 0; j < HALF_BLOCKS; ++j) {
        const uint4 frequency = *reinterpret_cast<const uint4*>(call.frequency + dim_of(j, 0));
        rotate(values[j][0], values[j + HALF_BLOCKS][0], row.y, make_uint2(frequency.x, frequency.y));
        rotate(values[j][1], values[j + HALF_BLOCKS][1], row.y, make_uint2(frequency.z, frequency.w));
    }
    if (!valid) return;
#ifdef COLLECT
    if (is_query) collect_head(call.stage_q_rope + q_row, values, call.q_rope_unscale);
    else collect_head(call.stage_k_rope + kv_row, values, call.k_rope_unscale);
#endif
    const long long q_part = static_cast<long long>(call.batch) * call.seq * call.num_q_heads * HEAD_DIM;
    const long long k_part = static_cast<long long>(call.batch) * call.num_kv_heads * call.scratch_capacity * HEAD_DIM;
    __half* target = is_query ? call.q + (static_cast<long long>(m) * call.num_q_heads + head_idx) * HEAD_DIM
                              : call.k + scratch;
    store_head(target, values);
    if (PARTS == 2) store_head(target + (is_query ? q_part : k_part), values, true);
}
#endif

extern "C" __global__ void __launch_bounds__(gemm::THREADS, 2)
project_qkv(const __grid_constant__ Call call)
{
    extern __shared__ __align__(128) __half smem[];
    __shared__ int taken;
    const int num_rows = call.batch * call.seq;
    const int num_heads = call.num_q_heads + 2 * call.num_kv_heads;
    const int m_tiles = (num_rows + BLOCK_M - 1) / BLOCK_M, n_tiles = (num_heads + HEADS_A_TILE - 1) / HEADS_A_TILE;
    const int norm_items = (num_rows + NORM_ROWS - 1) / NORM_ROWS;
    const int past_items = call.past_tiles * call.batch * call.num_kv_heads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    while (true) {
        if (threadIdx.x == 0) taken = atomicAdd(&call.counters[NEXT], 1);
        __syncthreads();
        int item = taken;
        __syncthreads();
        if (item < norm_items) {
            normalise_row(call, item * NORM_ROWS + warp);
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) atomicAdd(&call.counters[READY + item * NORM_ROWS / BLOCK_M], 1);
            continue;
        }
        item -= norm_items;
#ifndef RAW
        if (item < past_items) {
            prepare_past(call, item);
            continue;
        }
        item -= past_items;
#endif
        if (item >= m_tiles * n_tiles) break;

        const int group = item / (GROUP_M * n_tiles), in_group = item % (GROUP_M * n_tiles);
        const int group_rows = min(GROUP_M, m_tiles - group * GROUP_M);
        const int m_tile = group * GROUP_M + in_group % group_rows, n_tile = in_group / group_rows;
        const int first_m = m_tile * BLOCK_M, first_head = n_tile * HEADS_A_TILE;
        const int tile_rows = min(BLOCK_M, num_rows - first_m);
        if (threadIdx.x == 0) {
            const int wanted = (tile_rows + NORM_ROWS - 1) / NORM_ROWS;
            volatile int* ready = call.counters + READY + m_tile;
            while (*ready < wanted) __nanosleep(100);
            __threadfence();
        }
        __syncthreads();

        const bool has_keys = first_head + HEADS_A_TILE > call.num_q_heads &&
                              first_head < call.num_q_heads + call.num_kv_heads;
        float sums[WARP_M / 16][BLOCK_N / 8][4];
        gemm::multiply<WARP_M, BLOCK_N, VEC, PARTS == 2>(
            call.hidden + static_cast<long long>(first_m) * HIDDEN_PARTS * call.hidden_size, tile_rows,
            HIDDEN_PARTS * call.hidden_size,
            call.qkv_proj + static_cast<long long>(first_head) * HEAD_DIM * call.hidden_size,
            (num_heads - first_head) * HEAD_DIM, call.hidden_size, PARTS == 2 || has_keys ? HIDDEN_PARTS : 1, smem, sums);

#pragma unroll
        for (int i = 0; i < WARP_M / 16; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int m = first_m + warp * WARP_M + i * 16 + half * 8 + lane / 4;
                const int2 row = m < num_rows ? __ldcg(call.rows + m) : make_int2(PADDING, 0);
#pragma unroll
                for (int h = 0; h < HEADS_A_TILE; ++h) {
                    const int head_idx = first_head + h;
                    if (head_idx >= num_heads) break;
                    Values values;
#pragma unroll
                    for (int j = 0; j < 2 * HALF_BLOCKS; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            values[j][e] = sums[i][h * 2 * HALF_BLOCKS + j][2 * half + e] * call.qkv_unscale;
                    if (call.qkv_bias != nullptr) {
#pragma unroll
                        for (int j = 0; j < 2 * HALF_BLOCKS; ++j) {
                            const float* bias = call.qkv_bias + head_idx * HEAD_DIM + dim_of(j, 0);
                            values[j][0] += bias[0];
                            values[j][1] += bias[1];
                        }
                    }
#ifdef RAW
                    if (row.x >= 0)
                        collect_head(call.qkv + (static_cast<long long>(m) * num_heads + head_idx) * HEAD_DIM, values, 1.0f);
#else
                    finish_head(call, m, row, head_idx, values);
#endif
                }
            }
        }
    }

    // The last block leaves the counters as it found them, for the next launch or replay.
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(&call.counters[DONE], 1) == static_cast<int>(gridDim.x) - 1) {
            call.counters[NEXT] = call.counters[DONE] = 0;
            for (int i = 0; i < m_tiles; ++i) call.counters[READY + i] = 0;
        }
    }
}
