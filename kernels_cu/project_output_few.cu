// Output projection, bias and residual for more tokens than decode_output.cu takes, but not many; counts them in the cache.
//   y = attention Wo^T + bias + residual          float32 sums, one rounding; 0 in padding rows
//
// Grid (tiles of 64 rows of Wo and 8 GROUPS tokens, each several blocks), block 128 threads. Shared memory: STAGES x 8
// GROUPS x 64 halves.
// -D: those of call.cuh, GROUPS. Memory bound: one read of Wo, some of it before the kernel ahead has ended.
#include "gemm_few.cuh"

extern "C" __global__ void __launch_bounds__(few::THREADS, 3)
project_output_few(const __grid_constant__ Call call)
{
    extern __shared__ __align__(128) __half smem[];
    const int k_size = call.num_q_heads * HEAD_DIM, num_tokens = call.batch * call.seq;
    let_next_kernel_begin();
    const few::Place place = few::place_of_block(blockIdx.x, gridDim.x, call.hidden_size, num_tokens);
    few::Weights w(place, call.o_proj, call.hidden_size, k_size);
    wait_for_previous_kernel();
    if (blockIdx.x == 0) advance_lengths(call);

    few::Sums sums;
    w.multiply(call.attention + static_cast<long long>(place.first_token) * k_size, k_size, num_tokens - place.first_token, 1,
               0, smem, sums);
    if (!few::add_up(place, sums, call.partial, call.counters)) return;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int n = few::row_of(place, e);
        if (n >= call.hidden_size) continue;
        const float bias = call.o_bias != nullptr ? call.o_bias[n] : 0.0f;
        float more[GROUPS];
        int slots[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {  // all of it is asked for before the first is needed
            const int m = few::token_of(place, g, e);
            const long long at = static_cast<long long>(m) * call.hidden_size + n;
            slots[g] = m < num_tokens ? call.rows[m].x : PADDING;
            more[g] = m < num_tokens && call.residual != nullptr ? bias + static_cast<float>(call.residual[at]) : bias;
        }
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int m = few::token_of(place, g, e);
            if (m >= num_tokens) continue;
            const float value = sums[g][e] * call.o_unscale + more[g];
            call.y[static_cast<long long>(m) * call.hidden_size + n] = static_cast<STORAGE>(
                slots[g] >= 0 ? value : slots[g] == FAULT ? __int_as_float(0x7fffffff) : 0.0f);
        }
    }
}
