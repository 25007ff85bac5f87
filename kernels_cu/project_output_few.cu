// Output projection, bias and residual for more tokens than decode_output.cu takes, but not many; counts them in the cache.
//   y = attention Wo^T + bias + residual          float32 sums, one rounding; 0 in padding rows
//
// Grid (tiles of 64 rows of Wo and 8 GROUPS tokens, each several blocks), block 128 threads. Shared memory: STAGES x 8
// GROUPS x 64 halves. -D: those of gemm_few.cuh. Memory bound: one read of Wo, some of it before the kernel ahead has ended.
#include "gemm_few.cuh"

#if __CUDA_ARCH__ >= 1000
constexpr int BLOCKS = GROUPS == 8 ? 2 : 3;  // of a multiprocessor: where three would spill
#else
constexpr int BLOCKS = 3;
#endif

extern "C" __global__ void __launch_bounds__(few::THREADS, BLOCKS)
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
    struct More {
        float value[4];
        int slot[2];
    };
    few::add_up(
        place, sums, call.partial, call.counters,
        [&](int g) {
            More more;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int n = few::row_of(place, e), m = few::token_of(place, g, e);
                const bool is_in = n < call.hidden_size && m < num_tokens;
                if (e < 2) more.slot[e] = m < num_tokens ? call.rows[m].x : PADDING;
                more.value[e] = is_in && call.o_bias != nullptr ? call.o_bias[n] : 0.0f;
                if (is_in && call.residual != nullptr)
                    more.value[e] += static_cast<float>(call.residual[static_cast<long long>(m) * call.hidden_size + n]);
            }
            return more;
        },
        [&](int g, const float(&sum)[4], const More& more) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int n = few::row_of(place, e), m = few::token_of(place, g, e), slot = more.slot[e % 2];
                if (n >= call.hidden_size || m >= num_tokens) continue;
                const float value = sum[e] * call.o_unscale + more.value[e];
                call.y[static_cast<long long>(m) * call.hidden_size + n] =
                    static_cast<STORAGE>(slot >= 0 ? value : slot == FAULT ? __int_as_float(0x7fffffff) : 0.0f);
            }
        });
}
