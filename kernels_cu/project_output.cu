// Output projection, bias and residual.
//   y = attention Wo^T + bias + residual          float32 sums, one rounding; 0 in padding rows
//
// Grid (tiles of rows x tiles of columns), block 128 threads, shared memory GEMM_STAGES x (4 WARP_M + BLOCK_N) x 64 halves.
// -D: those of call.cuh, WARP_M (16 or 32), BLOCK_N (64 or 128), COLLECT. Tensor-core bound.
#include "call.cuh"
#include "gemm.cuh"
#include "storage.cuh"

constexpr int BLOCK_M = gemm::WARPS * WARP_M;
constexpr int VEC = 8;
constexpr int GROUP_M = 16;  // tiles of rows that share tiles of W while they are in L2

extern "C" __global__ void __launch_bounds__(gemm::THREADS, 2)
project_output(const __grid_constant__ Call call)
{
    extern __shared__ __align__(128) __half smem[];
    const int num_rows = call.batch * call.seq, k_size = call.num_q_heads * HEAD_DIM;
    const int m_tiles = (num_rows + BLOCK_M - 1) / BLOCK_M, n_tiles = (call.hidden_size + BLOCK_N - 1) / BLOCK_N;
    const int group = blockIdx.x / (GROUP_M * n_tiles), in_group = blockIdx.x % (GROUP_M * n_tiles);
    const int group_rows = min(GROUP_M, m_tiles - group * GROUP_M);
    const int first_m = (group * GROUP_M + in_group % group_rows) * BLOCK_M;
    const int first_n = in_group / group_rows * BLOCK_N;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (blockIdx.x == 0) advance_lengths(call);

    float sums[WARP_M / 16][BLOCK_N / 8][4];
    gemm::multiply<WARP_M, BLOCK_N, VEC>(call.attention + static_cast<long long>(first_m) * k_size, num_rows - first_m, k_size,
                                         call.o_proj + static_cast<long long>(first_n) * k_size,
                                         call.hidden_size - first_n, k_size, 1, smem, sums);
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int m = first_m + warp * WARP_M + i * 16 + half * 8 + lane / 4;
            if (m >= num_rows) continue;
            const int slot = call.rows[m].x;
            const float missing = slot == FAULT ? __int_as_float(0x7fffffff) : 0.0f;
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; j += 4) {
                const int n = first_n + column_of<VEC>(j, lane % 4, 0);
                if (n >= call.hidden_size) continue;
                const long long at = static_cast<long long>(m) * call.hidden_size + n;
                float values[VECTOR], more[VECTOR];
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) values[e] = sums[i][j + e / 2][2 * half + e % 2] * call.o_unscale;
                if (call.o_bias != nullptr) {
                    load8(call.o_bias + n, more);
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) values[e] += more[e];
                }
#ifdef COLLECT
                if (slot >= 0) store8(call.stage_output + at, values);
#endif
                if (call.residual != nullptr) {
                    load8(call.residual + at, more);
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) values[e] += more[e];
                }
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) values[e] = slot >= 0 ? values[e] : missing;
                store8(call.y + at, values);
            }
        }
}
