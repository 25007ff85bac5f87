// Output projection, bias and residual for up to 8 tokens; counts them in the cache.
//   y = attention Wo^T + bias + residual          float32 sums, one rounding; 0 in padding rows
//
// Grid (pieces of ROWS rows of Wo), block 256 threads. Shared memory: B x gemv::vector_stride(Hq D) halves.
// -D: those of call.cuh. Memory bound: one read of Wo.
#include "call.cuh"
#include "gemv.cuh"

constexpr int ROW_TILES = 1;
constexpr int ROWS = 16 * ROW_TILES;  // of a block

extern "C" __global__ void __launch_bounds__(gemv::THREADS)
decode_output(const __grid_constant__ Call call)
{
    extern __shared__ __align__(16) __half vectors[];
    let_next_kernel_begin();
    __shared__ float sums[gemv::WARPS * ROWS * gemv::MAX_VECTORS];
    const int k_size = call.num_q_heads * HEAD_DIM, first = blockIdx.x * ROWS;
    const int stride = gemv::vector_stride(k_size);

    auto request = [&]() {  // past the end of a vector: zeros
        if (blockIdx.x == 0) advance_lengths(call);
        const int pieces = (k_size + gemv::STEP - 1) / gemv::STEP * gemv::STEP / 8;
        for (int i = threadIdx.x; i < call.batch * pieces; i += gemv::THREADS) {
            const int m = i / pieces, k = i % pieces * 8;
            copy16_async(vectors + m * stride + k, call.attention + static_cast<long long>(m) * k_size + k, k < k_size);
        }
    };
    gemv::multiply<ROW_TILES, 1, 8>(call.o_proj + static_cast<long long>(first) * k_size, call.hidden_size - first,
                                        k_size, vectors, call.batch, sums, request, [] {});
    const int n = first + threadIdx.x / gemv::MAX_VECTORS, m = threadIdx.x % gemv::MAX_VECTORS;
    if (threadIdx.x >= ROWS * gemv::MAX_VECTORS || n >= call.hidden_size || m >= call.batch) return;
    const long long at = static_cast<long long>(m) * call.hidden_size + n;
    const int slot = call.rows[m].x;
    float value = sums[threadIdx.x] * call.o_unscale;
    if (call.o_bias != nullptr) value += call.o_bias[n];
    if (call.residual != nullptr) value += static_cast<float>(call.residual[at]);
    call.y[at] = static_cast<STORAGE>(slot >= 0 ? value : slot == FAULT ? __int_as_float(0x7fffffff) : 0.0f);
}
