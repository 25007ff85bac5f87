// Sums over a warp and over a block, in a fixed order: the same input gives the same bits.
#pragma once

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Every thread of a block of 32 * NUM_WARPS gets the sum. Called once per kernel: the shared array is not reused.
template <int NUM_WARPS>
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float partial[NUM_WARPS];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < NUM_WARPS; ++i) total += partial[i];
    return total;
}
