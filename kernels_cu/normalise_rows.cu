// RMSNorm of all rows, ahead of project_qkv_few_wgmma.cu and project_qkv_wgmma.cu; describes rows for the kernels that follow.
//   hidden = x / rms(x) * w_in          [B S, H] float16, each row followed by what rounding left over, H REST
//
// Grid: a block to each row of x. Block 160 threads, shared memory H floats and H STORAGE. -D: those of call.cuh, REST (__half or
// E4M3).
// Bound by latency; the next kernel's weights are on their way meanwhile.
#include "normalise_row.cuh"

extern "C" __global__ void __launch_bounds__(ROW_THREADS + 32)
normalise_rows(const __grid_constant__ Call call)
{
    extern __shared__ __align__(128) char smem[];
    const int m = blockIdx.x;
    let_next_kernel_begin();
    if (threadIdx.x >= ROW_THREADS) {  // beside the others: one load after the other, behind everybody's weights
        wait_for_previous_kernel();
        if (threadIdx.x == ROW_THREADS) describe_row(call, m, sequence(call, m / call.seq));
        return;
    }
    begin_row(call, smem);
    wait_for_previous_kernel();
    fetch_row(call, m, smem);
    normalise_row<REST>(call, m, smem);
}
