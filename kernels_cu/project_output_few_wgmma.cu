// Output projection, bias and residual of some tokens on Hopper's own units (gemm_few_wgmma.cuh); counts them in the cache.
//   y = attention Wo^T + bias + residual          float32 sums, one rounding; 0 in padding rows
//
// Grid: a cluster to every BLOCK_N rows of Wo and 64 TOKEN_TILES tokens. Block 128 TOKEN_TILES + 64 threads, shared memory up to 48
// KB for tokens and tiles of BLOCK_N x 64 halves. -D: those of gemm_few_wgmma.cuh. Memory bound: one read of Wo, some of it before
// the kernel ahead has ended.
#include "gemm_few_wgmma.cuh"

struct Maps {
    TensorMap attention;  // [B S, Hq D]
    TensorMap o_proj;     // [H, Hq D]
};

extern "C" __global__ void __launch_bounds__(few::THREADS, 1)
project_output_few_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ few::Rings rings;
    const int size = call.hidden_size, num_tokens = call.batch * call.seq;
    const few::Place at(call.num_q_heads * HEAD_DIM, num_tokens);
    const int producer = uniform(threadIdx.x / 32) - few::CONSUMERS / 32;  // 0 copies W, 1 tokens

    let_next_kernel_begin();
    rings.init(at);
    if (producer >= 0) {
        if (producer == 0) {
            if (elected()) few::copy_weights(at, rings, smem, &maps.o_proj);
        } else {
            wait_for_previous_kernel();
            if (elected()) few::copy_tokens(at, rings, smem, &maps.attention, 1, 0);
        }
        few::stand_by(at);
        return;
    }
    wait_for_previous_kernel();
    if (blockIdx.x == 0)
        for (int b = threadIdx.x; b < call.batch; b += few::CONSUMERS) advance_length(call, b);
    struct More {
        float2 value;  // bias and residual
        int slot;
    };
    few::product(
        at, rings, smem, 1,
        [&](int n, int m) {
            const int row = min(m, num_tokens - 1);
            n = min(n, size - 2);
            More more = {make_float2(0.0f, 0.0f), __ldcg(&call.rows[row].x)};
            if (call.residual != nullptr) {
                const STORAGE* const residual = call.residual + static_cast<long long>(row) * size + n;
                more.value = unpack(__ldcg(reinterpret_cast<const unsigned*>(residual)), STORAGE());
            }
            if (call.o_bias != nullptr) more.value.x += call.o_bias[n], more.value.y += call.o_bias[n + 1];
            return more;
        },
        [](float) { return 1.0f; },
        [&](int n, int m, const More& more, float2 sum) {
            if (n >= size || m >= num_tokens) return;
            const float missing = more.slot == FAULT ? __int_as_float(0x7fffffff) : 0.0f;
            const float2 value =
                make_float2(fmaf(sum.x, call.o_unscale, more.value.x), fmaf(sum.y, call.o_unscale, more.value.y));
            *reinterpret_cast<unsigned*>(call.y + static_cast<long long>(m) * size + n) =
                more.slot >= 0 ? pack(value.x, value.y, STORAGE()) : pack(missing, missing, STORAGE());
        });
}
