// RMSNorm of a row of x by a block, for products that follow: hidden states, and what rounding them left over.
//
// Few instructions: they come from memory, behind everybody's weights. Shared memory: H floats and H STORAGE.
#pragma once
#include "call.cuh"
#include "reduce.cuh"
#include "storage.cuh"

constexpr int HIDDEN_PARTS = 2;  // as in project.cuh
constexpr int ROW_THREADS = 128;

// What needs nothing of kernels before: the norm's weights on their way to shared memory.
__device__ __forceinline__ void begin_row(const Call& call, char* smem) {
    float* const scale = reinterpret_cast<float*>(smem);
    for (int i = threadIdx.x * 4; i < call.hidden_size; i += ROW_THREADS * 4)
        copy16_async(scale + i, call.input_norm + i, true);
}

// And what needs them to have ended: row m of x.
__device__ __forceinline__ void fetch_row(const Call& call, int m, char* smem) {
    STORAGE* const x = reinterpret_cast<STORAGE*>(smem + call.hidden_size * sizeof(float));
    for (int i = threadIdx.x * VECTOR; i < call.hidden_size; i += ROW_THREADS * VECTOR)
        copy16_async(x + i, call.x + static_cast<long long>(m) * call.hidden_size + i, true);
    copies_commit();
}

// 1 / rms of a row, by the sum of its squares.
__device__ __forceinline__ float rstd_of(const Call& call, float sum_squares) {
    return rsqrtf(__fdividef(sum_squares, call.hidden_size) + call.eps);
}

// Normalise and store elements k to k + 7 of row m. Rest: the type of what rounding left over, which stands behind the row.
template <typename Rest>
__device__ __forceinline__ void store_normalised(const Call& call, int m, int k, float (&values)[VECTOR],
                                                 const float (&scales)[VECTOR], float rstd) {
    constexpr int BYTES = sizeof(__half) + sizeof(Rest);
    constexpr float REST_SCALE = sizeof(Rest) == sizeof(E4M3) ? E4M3_SCALE : 1.0f;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) values[j] *= rstd * scales[j];
    __half* const target =
        reinterpret_cast<__half*>(reinterpret_cast<char*>(call.hidden) + static_cast<long long>(m) * BYTES * call.hidden_size);
    store8(target + k, values);
    if (sizeof(Rest) == sizeof(E4M3) && call.k_proj == nullptr) return;  // nobody multiplies it
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) values[j] = (values[j] - __half2float(__float2half_rn(values[j]))) * REST_SCALE;
    store8(reinterpret_cast<Rest*>(target + call.hidden_size) + k, values);
}

// Normalise a row once it is there, ROW_THREADS together.
__device__ __forceinline__ void normalise_row(const Call& call, int m, const char* smem) {
    constexpr int WARPS = ROW_THREADS / 32;
    __shared__ float of_warps[WARPS];
    const int size = call.hidden_size;
    const float* const scale = reinterpret_cast<const float*>(smem);
    const STORAGE* const x = reinterpret_cast<const STORAGE*>(smem + size * sizeof(float));
    copies_wait<0>();
    float sum_squares = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x * VECTOR; i < size; i += ROW_THREADS * VECTOR) {  // each thread reads what it has copied
        float values[VECTOR];
        load8(x + i, values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum_squares += values[j] * values[j];
    }
    sum_squares = warp_sum(sum_squares);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum_squares;
    __syncthreads();
    sum_squares = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum_squares += of_warps[i];
    const float rstd = rstd_of(call, sum_squares);
#pragma unroll 1
    for (int i = threadIdx.x * VECTOR; i < size; i += ROW_THREADS * VECTOR) {
        float values[VECTOR], scales[VECTOR];
        load8(x + i, values);
        load8(scale + i, scales);
        store_normalised<__half>(call, m, i, values, scales, rstd);
    }
}
