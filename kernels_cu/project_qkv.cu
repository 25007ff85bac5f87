// RMSNorm, QKV projection, per-head Q/K RMSNorm, RoPE and the cache append, in one launch.
//   hidden = x / rms(x) * w_in                         float16, high and low halves (the low for k, or PARTS 2)
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
#include "gemm.cuh"

constexpr int VEC = HEAD_DIM % 64 == 0 ? 8 : HEAD_DIM % 32 == 0 ? 4 : 2;  // consecutive dims of a thread
#include "prepare_past.cuh"
#include "project.cuh"

static_assert(BLOCK_N % HEAD_DIM == 0, "a tile holds whole heads");

constexpr int BLOCK_M = gemm::WARPS * WARP_M;
constexpr int HEADS_A_TILE = BLOCK_N / HEAD_DIM;
constexpr int NORM_ROWS = gemm::WARPS;      // rows of one piece of work: latency counts, so one a warp
constexpr int GROUP_M = 16;                 // tiles of rows that share tiles of W while they are in L2

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

    const Sequence of_first = sequence(call, 0);
    while (true) {
        if (threadIdx.x == 0) taken = atomicAdd(&call.counters[NEXT], 1);
        __syncthreads();
        int item = taken;
        __syncthreads();
        if (item < norm_items) {
            const int m = item * NORM_ROWS + warp;
            if (m < num_rows) normalise_row(call, of_first, m);
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) atomicAdd(&call.counters[READY + item * NORM_ROWS / BLOCK_M], 1);
            continue;
        }
        item -= norm_items;
#ifndef RAW
        if (item < past_items) {
            prepare_past(call, item, PAST_ROWS, warp, gemm::WARPS);
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
                    finish_head(call, m, row, head_idx, values, [&](int j) {
                        const uint4 frequency = *reinterpret_cast<const uint4*>(call.frequency + dim_of(j, 0));
                        rotate(values[j][0], values[j + HALF_BLOCKS][0], row.y, make_uint2(frequency.x, frequency.y));
                        rotate(values[j][1], values[j + HALF_BLOCKS][1], row.y, make_uint2(frequency.z, frequency.w));
                    });
#endif
                }
            }
        }
    }

    if (threadIdx.x == 0) leave_counters(call, m_tiles);
}
