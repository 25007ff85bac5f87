// W v for up to 8 vectors at once, memory bound: the rows of W are the tensor cores' A operand, read once and straight
// from memory to registers, 16 bytes a thread; the vectors are B, float16 in shared memory, in one or two parts.
//
// A product of a row may take its k in any order if both sides agree: lane l reads 8 consecutive k of rows l / 4 and
// l / 4 + 8, and calls the first four the first k16 step and the rest the second.
#pragma once
#include "call.cuh"

namespace gemv {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int MAX_VECTORS = 8;
constexpr int STEP = 32;         // k of a warp at a time

// Halves between vectors: half a bank cycle apart, so that two vectors a 16-byte read touches do not collide.
__device__ __host__ __forceinline__ constexpr int vector_stride(int k_size) { return (k_size + 63) / 64 * 64 + 32; }

// sums[n * MAX_VECTORS + m] = sum_k w[n, k] vector m[k], for the block's 16 RowTiles rows: thread n * MAX_VECTORS + m may
// read it without a barrier. Shared float sums [WARPS, 16 RowTiles, MAX_VECTORS].
// The first loads of W do not wait for the kernel before. Then `request` starts copies to shared memory and `prepare`
// makes of them the vectors, shared [Parts, num_vectors, vector_stride(k_size)], zero up to a multiple of STEP. Loads of Unroll steps a warp
// are under way at a time.
template <int RowTiles, int Parts, int Unroll, typename Request, typename Prepare>
__device__ __forceinline__ void multiply(const __half* w, int num_rows, int k_size, const __half* vectors,
                                         int num_vectors, float* sums, Request request, Prepare prepare) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = lane / 4, quad = lane % 4;
    const int steps = (k_size + STEP - 1) / STEP;
    const int stride = vector_stride(k_size);
    const __half* const mine = w + static_cast<long long>(row) * k_size + quad * 8;
    uint4 next[Unroll][2 * RowTiles];

    auto load = [&](int first) {
#pragma unroll
        for (int u = 0; u < Unroll; ++u) {
            const int k = (first + u * WARPS) * STEP;
#pragma unroll
            for (int i = 0; i < 2 * RowTiles; ++i) {
                next[u][i] = make_uint4(0, 0, 0, 0);
                if (k + quad * 8 < k_size && row + 8 * i < num_rows)
                    next[u][i] = __ldcs(reinterpret_cast<const uint4*>(mine + 8 * i * k_size + k));
            }
        }
    };

    load(warp);
    wait_for_previous_kernel();
    request();
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    prepare();
    __syncthreads();
    float total[RowTiles][4] = {};
#pragma unroll 1
    for (int first = warp; first < steps; first += Unroll * WARPS) {
        uint4 now[Unroll][2 * RowTiles];
#pragma unroll
        for (int u = 0; u < Unroll; ++u)
#pragma unroll
            for (int i = 0; i < 2 * RowTiles; ++i) now[u][i] = next[u][i];
        if (first + Unroll * WARPS < steps) load(first + Unroll * WARPS);
#pragma unroll
        for (int u = 0; u < Unroll; ++u) {
            const int step = first + u * WARPS;
            if (step >= steps) break;
#pragma unroll
            for (int p = Parts - 1; p >= 0; --p) {
                uint4 b = make_uint4(0, 0, 0, 0);
                if (row < num_vectors)
                    b = *reinterpret_cast<const uint4*>(vectors + (p * num_vectors + row) * stride + step * STEP + quad * 8);
#pragma unroll
                for (int t = 0; t < RowTiles; ++t) {
                    const uint4 low = now[u][2 * t], high = now[u][2 * t + 1];
                    const unsigned first_half[4] = {low.x, high.x, low.y, high.y};
                    const unsigned second_half[4] = {low.z, high.z, low.w, high.w};
                    multiply_add(total[t], first_half, b.x, b.y);
                    multiply_add(total[t], second_half, b.z, b.w);
                }
            }
        }
    }

    // Add the warps' shares, always in the same order.
#pragma unroll
    for (int t = 0; t < RowTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            sums[((warp * RowTiles + t) * 16 + row + e / 2 * 8) * MAX_VECTORS + 2 * quad + e % 2] = total[t][e];
    __syncthreads();
    constexpr int SIZE = RowTiles * 16 * MAX_VECTORS;
    if (threadIdx.x < SIZE) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += sums[i * SIZE + threadIdx.x];
        sums[threadIdx.x] = sum;
    }
}

}  // namespace gemv
