// Root-mean-square norm of each row (Zhang and Sennrich 2019, arXiv:1910.07467).
//   y[r, i] = x[r, i] / sqrt(mean_i(x[r, i]^2) + eps) * weight[i]     float32 inside, rounded once, at the store
//
// Grid (num_rows), block (32 * WARPS), static shared memory 4 * WARPS bytes.
// -D: STORAGE type of x, WEIGHT type of weight, OUTPUT type of y (float, __half, __nv_bfloat16), HIDDEN_SIZE, WARPS.
// Memory bound: one read of x, one write of y; the row stays in registers between the two passes over it.
#include "reduce.cuh"
#include "storage.cuh"

static_assert(HIDDEN_SIZE % VECTOR == 0, "rows are read 8 elements at a time");

constexpr int THREADS = 32 * WARPS;
constexpr int NUM_VECTORS = HIDDEN_SIZE / VECTOR;
constexpr int PER_THREAD = (NUM_VECTORS + THREADS - 1) / THREADS;

// The 1: left to itself ptxas spills 12 bytes to reach 32 registers (float16, H 4096, sm_80).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
rms_norm(const STORAGE* __restrict__ x,      // [num_rows, H]
         const WEIGHT* __restrict__ weight,  // [H]
         OUTPUT* __restrict__ y,             // [num_rows, H], not x
         float eps)                          // rms_norm_eps, in units of x^2
{
    const long long row_start = static_cast<long long>(blockIdx.x) * HIDDEN_SIZE;
    float values[PER_THREAD][VECTOR];
    float sum_squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const int vector_idx = threadIdx.x + i * THREADS;
        if (vector_idx >= NUM_VECTORS) break;
        load8(x + row_start + vector_idx * VECTOR, values[i]);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum_squares += values[i][j] * values[i][j];
    }
    // IEEE division and square root: once a row they cost nothing, and rsqrtf is only good to 2 ulp.
    const float rstd = 1.0f / sqrtf(block_sum<WARPS>(sum_squares) / HIDDEN_SIZE + eps);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const int vector_idx = threadIdx.x + i * THREADS;
        if (vector_idx >= NUM_VECTORS) break;
        float scale[VECTOR];
        load8(weight + vector_idx * VECTOR, scale);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[i][j] *= rstd * scale[j];
        store8(y + row_start + vector_idx * VECTOR, values[i]);
    }
}
