// The tile of a matrix product x W^T that both projections are made of: float16 in, float32 sums.
//
// 4 warps, one above the other: each has WarpM rows and all BlockN columns, so that a head's columns and with them its
// norm and its rotated pairs stay in one warp. K advances by BLOCK_K through GEMM_STAGES (-D) buffers filled by cp.async.
#pragma once
#include "mma.cuh"

namespace gemm {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK_K = 64;
constexpr int CHUNKS = BLOCK_K / 8;  // 16-byte pieces of a row of a tile
constexpr int STAGES = GEMM_STAGES;
constexpr int PROMOTE_K = 32;
constexpr int ROWS_A_PASS = THREADS / CHUNKS;  // rows that one round of copies fills

// The place of a 16-byte piece in a row of W's tile, so that the rows column_of picks for one ldmatrix lie in different
// banks. It depends on the row within its 4 VEC alone; x's tile is read row by row, which is VEC 2.
template <int Vec>
__device__ __forceinline__ int swizzle(int row, int chunk) {
    return chunk ^ (((row / Vec & 3) << 1) | (row & 1));
}

template <int I, int J>
__device__ __forceinline__ void clear(float (&sums)[I][J][4]) {
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
}

// sums[i][j] = tile of a [a_rows, parts * k_size] times b [b_rows, k_size]^T, where column p * k_size + k of a meets
// column k of b; rows of a are a_stride apart. Rows past a_rows and b_rows count as zero. A block-wide barrier must precede a second use of smem.
// Tensor cores cut off what does not fit a float32 sum. With Exact the sums of PROMOTE_K products are added up outside
// them, rounded to nearest: eight times closer, for twice the registers.
template <int WarpM, int BlockN, int Vec, bool Exact = false>
__device__ __forceinline__ void multiply(const __half* a, int a_rows, int a_stride, const __half* b, int b_rows, int k_size,
                                         int parts, __half* smem, float (&sums)[WarpM / 16][BlockN / 8][4]) {
    constexpr int BlockM = WARPS * WarpM;
    constexpr int STAGE = (BlockM + BlockN) * BLOCK_K;
    static_assert(BlockM % ROWS_A_PASS == 0 && BlockN % ROWS_A_PASS == 0, "copies fill whole passes");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int copy_row = threadIdx.x / CHUNKS, copy_chunk = threadIdx.x % CHUNKS;
    const int steps = parts * ((k_size + BLOCK_K - 1) / BLOCK_K);

    // Where this thread copies to, for even and odd rounds, and what it reads: addresses in the loop are these plus
    // constants. A step of 16 in k is an exclusive or with 16 in a row of pieces that are mixed up by exclusive ors.
    __half* const a_target = smem + copy_row * BLOCK_K + swizzle<2>(copy_row, copy_chunk) * 8;
    __half* const b_target = smem + BlockM * BLOCK_K + copy_row * BLOCK_K;
    const int b_even = swizzle<Vec>(copy_row, copy_chunk) * 8, b_odd = swizzle<Vec>(copy_row + ROWS_A_PASS, copy_chunk) * 8;
    const int a_row = warp * WarpM + lane % 16, b_row = column_of<Vec>(lane / 16, lane % 8 / 2, lane % 2);
    const int a_source = a_row * BLOCK_K + swizzle<2>(a_row, lane / 16) * 8;
    const int b_source = BlockM * BLOCK_K + b_row * BLOCK_K + swizzle<Vec>(b_row, lane / 8 % 2) * 8;
    const __half* a_column = a + static_cast<long long>(copy_row) * a_stride + copy_chunk * 8;
    const __half* b_column = b + static_cast<long long>(copy_row) * k_size + copy_chunk * 8;

    // The next step to load: k within its part, and its buffer.
    int load_k = 0, load_stage = 0, left = steps;
    auto load = [&]() {
        if (left > 0) {
            const bool inside = load_k + copy_chunk * 8 < k_size;
#pragma unroll
            for (int i = 0; i < BlockM / ROWS_A_PASS; ++i)
                copy16_async(a_target + load_stage + i * ROWS_A_PASS * BLOCK_K, a_column + i * ROWS_A_PASS * a_stride,
                             inside && copy_row + i * ROWS_A_PASS < a_rows);
#pragma unroll
            for (int i = 0; i < BlockN / ROWS_A_PASS; ++i)
                copy16_async(b_target + load_stage + i * ROWS_A_PASS * BLOCK_K + (i % 2 == 0 ? b_even : b_odd),
                             b_column + i * ROWS_A_PASS * k_size, inside && copy_row + i * ROWS_A_PASS < b_rows);
            --left;
            load_k += BLOCK_K;
            a_column += BLOCK_K;
            b_column += BLOCK_K;
            if (load_k >= k_size) {  // the next part of a, and b from the start
                a_column -= load_k - k_size;
                b_column -= load_k;
                load_k = 0;
            }
            load_stage = load_stage == (STAGES - 1) * STAGE ? 0 : load_stage + STAGE;
        }
        copies_commit();
    };

    clear(sums);
    float part_sums[Exact ? WarpM / 16 : 1][Exact ? BlockN / 8 : 1][4];
    for (int step = 0; step < STAGES - 1; ++step) load();
    int stage_start = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        load();
        const __half* stage = smem + stage_start;
        stage_start = stage_start == (STAGES - 1) * STAGE ? 0 : stage_start + STAGE;
#pragma unroll
        for (int k = 0; k < BLOCK_K / 16; ++k) {
            if constexpr (Exact) {
                if (k * 16 % PROMOTE_K == 0) clear(part_sums);
            }
            unsigned a_frag[WarpM / 16][4];
#pragma unroll
            for (int i = 0; i < WarpM / 16; ++i) {
                load_matrices(a_frag[i], stage + (a_source ^ 16 * k) + i * 16 * BLOCK_K);
            }
#pragma unroll
            for (int j = 0; j < BlockN / 8; j += 2) {
                unsigned b_frag[4];
                load_matrices(b_frag, stage + (b_source ^ 16 * k) + column_of<Vec>(j, 0, 0) * BLOCK_K);
#pragma unroll
                for (int i = 0; i < WarpM / 16; ++i) {
                    if constexpr (Exact) {
                        multiply_add(part_sums[i][j], a_frag[i], b_frag[0], b_frag[1]);
                        multiply_add(part_sums[i][j + 1], a_frag[i], b_frag[2], b_frag[3]);
                    } else {
                        multiply_add(sums[i][j], a_frag[i], b_frag[0], b_frag[1]);
                        multiply_add(sums[i][j + 1], a_frag[i], b_frag[2], b_frag[3]);
                    }
                }
            }
            if constexpr (Exact) {
                if ((k + 1) * 16 % PROMOTE_K == 0) {
#pragma unroll
                    for (int i = 0; i < WarpM / 16; ++i)
#pragma unroll
                        for (int j = 0; j < BlockN / 8; ++j)
#pragma unroll
                            for (int e = 0; e < 4; ++e) sums[i][j][e] += part_sums[i][j][e];
                }
            }
        }
    }
    copies_wait<0>();
}

}  // namespace gemm
