// RMSNorm and QKV projection for up to 8 tokens.
//   qkv = (x / rms(x) * w_in) Wqkv^T + bias          float32 [B, (Hq + 2 Hkv) D]; the norms of heads follow on reading
//
// Grid (pieces of ROWS rows of Wqkv), block 256 threads; every block normalises every token for itself while its share of W is
// on the way. Shared memory: B x 2 x gemv::vector_stride(H) halves: high and low parts, so nothing is lost to rounding.
// -D: those of call.cuh. Memory bound: one read of Wqkv.
#include "call.cuh"
#include "gemv.cuh"
#include "reduce.cuh"
#include "storage.cuh"

constexpr int ROW_TILES = 2;
constexpr int ROWS = 16 * ROW_TILES;  // of a block

extern "C" __global__ void __launch_bounds__(gemv::THREADS)
decode_project(const __grid_constant__ Call call)
{
    extern __shared__ __align__(16) __half vectors[];
    let_next_kernel_begin();
    __shared__ float sums[gemv::WARPS * ROWS * gemv::MAX_VECTORS];
    const int total_rows = (call.num_q_heads + 2 * call.num_kv_heads) * HEAD_DIM;
    const int first = blockIdx.x * ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int stride = gemv::vector_stride(call.hidden_size);
    __half* const low_parts = vectors + call.batch * stride;  // x lies there until its low parts take its place

    auto request = [&]() {
        if (blockIdx.x == 0 && threadIdx.x < call.batch) describe_row(call, threadIdx.x);
        const int pieces = call.hidden_size / VECTOR;
        for (int i = threadIdx.x; i < call.batch * pieces; i += gemv::THREADS)
            copy16_async(low_parts + i / pieces * stride + i % pieces * VECTOR,
                         call.x + static_cast<long long>(i) * VECTOR, true);
    };
    auto prepare = [&]() {
        if (warp >= call.batch) return;
        __half* const low = low_parts + warp * stride;
        const STORAGE* x = reinterpret_cast<const STORAGE*>(low);
        float sum_squares = 0.0f;
#pragma unroll 4
        for (int k = lane * VECTOR; k < call.hidden_size; k += 32 * VECTOR) {
            float values[VECTOR];
            load8(x + k, values);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum_squares += values[j] * values[j];
        }
        const float rstd = 1.0f / sqrtf(warp_sum(sum_squares) / call.hidden_size + call.eps);
#pragma unroll 4
        for (int k = lane * VECTOR; k < stride; k += 32 * VECTOR) {
            float values[VECTOR] = {}, scale[VECTOR];
            if (k < call.hidden_size) {
                load8(x + k, values);
                load8(call.input_norm + k, scale);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) values[j] *= rstd * scale[j];
            }
            store8(vectors + warp * stride + k, values);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) values[j] -= __half2float(__float2half_rn(values[j]));
            store8(low + k, values);
        }
    };
    gemv::multiply<ROW_TILES, 2, 4>(call.qkv_proj + static_cast<long long>(first) * call.hidden_size,
                                        total_rows - first, call.hidden_size, vectors, call.batch, sums, request, prepare);
    const int n = first + threadIdx.x / gemv::MAX_VECTORS, m = threadIdx.x % gemv::MAX_VECTORS;
    if (threadIdx.x < ROWS * gemv::MAX_VECTORS && n < total_rows && m < call.batch)
        call.qkv[static_cast<long long>(m) * total_rows + n] =
            sums[threadIdx.x] * call.qkv_unscale + (call.qkv_bias != nullptr ? call.qkv_bias[n] : 0.0f);
}
