// RMSNorm of all rows, ahead of project_qkv_few_wgmma.cu and project_qkv_wgmma.cu; describes rows for the kernels that follow.
//   hidden = x / rms(x) * w_in          [B S, H] float16, each row followed by what rounding left over, H REST
//
// Grid: a block to each row of x. Block: a thread to every VECTORS vectors of 8 elements, rounded up to whole warps, and one warp more.
// -D: those of call.cuh, REST (__half or E4M3), VECTORS.
// Bound by latency; the next kernel's weights are on their way meanwhile.
#include "normalise_row.cuh"
#include "wgmma.cuh"

constexpr int MOST_WARPS = 32;

extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS)
normalise_rows(const __grid_constant__ Call call)
{
    __shared__ float of_warps[MOST_WARPS];
    const int m = blockIdx.x, threads = blockDim.x - 32, warps = threads / 32, lane = threadIdx.x % 32, size = call.hidden_size;
    let_next_kernel_begin();
    if (threadIdx.x >= threads) {  // beside the others: one load after the other, behind everybody's weights
        wait_for_previous_kernel();
        if (lane == 0) describe_row(call, m, sequence(call, m / call.seq));
        return;
    }
    const auto place = [&](int v) { return (v * threads + static_cast<int>(threadIdx.x)) * VECTOR; };
    float scales[VECTORS][VECTOR], values[VECTORS][VECTOR];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) load8(call.input_norm + min(place(v), size - VECTOR), scales[v]);
    wait_for_previous_kernel();
    const STORAGE* const x = call.x + static_cast<long long>(m) * size;
    uint4 raw[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
        raw[v] = place(v) < size ? __ldcg(reinterpret_cast<const uint4*>(x + place(v))) : make_uint4(0, 0, 0, 0);
    float sum_squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        load8(reinterpret_cast<const STORAGE*>(&raw[v]), values[v]);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum_squares += values[v][j] * values[v][j];
    }
    sum_squares = warp_sum(sum_squares);
    if (lane == 0) of_warps[threadIdx.x / 32] = sum_squares;
    named_wait(1, threads);
    const float rstd = rstd_of(call, warp_sum(lane < warps ? of_warps[lane] : 0.0f));
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
        if (place(v) < size) store_normalised<REST>(call, m, place(v), values[v], scales[v], rstd);
}
