// QKV projection of some tokens on Hopper's own units (gemm_few_wgmma.cuh), after normalise_rows.cu.
//   qkv = hidden Wqkv^T + bias          float32 [B S, (Hq + 2 Hkv) D]; the norms of heads follow on reading
// FOLDED: of x as it is, without that kernel ahead; describes rows for those that follow.
//   qkv = x (Wqkv w_in)^T / rms(x) + bias
//
// Grid: a cluster to every BLOCK_N rows of Wqkv and 64 TOKEN_TILES tokens. Block 128 TOKEN_TILES + 64 threads, 32 more with FOLDED, shared
// memory up to 48 KB for tokens, and tiles of BLOCK_N x 64 halves. k, and on the precise path all, is multiplied by hidden states in high
// and low halves. -D: those of gemm_few_wgmma.cuh. Memory bound: one read of Wqkv, some of it before the kernels ahead have ended.
#include "gemm_few_wgmma.cuh"

struct Maps {
    TensorMap hidden;    // [B S, 2 H]; FOLDED: x, [B S, H]
    TensorMap qkv_proj;  // [(Hq + 2 Hkv) D, H]; FOLDED: the same times the input norm's weight
};

extern "C" __global__ void __launch_bounds__(few::THREADS, 1)
project_qkv_few_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ few::Rings rings;
    const int size = call.hidden_size, num_tokens = call.batch * call.seq;
    const int first_key = call.num_q_heads * HEAD_DIM, end_keys = first_key + call.num_kv_heads * HEAD_DIM;
    const int total_rows = end_keys + call.num_kv_heads * HEAD_DIM;
    const few::Place at(size, num_tokens);
    const bool has_keys = at.first_n + BLOCK_N > first_key && at.first_n < end_keys;
    const int parts = PARTS == 2 || (has_keys && !few::IS_FOLDED) ? 2 : 1;
    const int producer = uniform(threadIdx.x / 32) - few::CONSUMERS / 32;  // 0 copies W, 1 tokens; 2 describes rows

    rings.init(at);
    if (producer >= 0) {
        if (producer == 0) {
            if (elected()) few::copy_weights(at, rings, smem, &maps.qkv_proj);
        } else if (producer == 2) {
            wait_for_previous_kernel();
            for (int m = blockIdx.x * 32 + threadIdx.x % 32; m < num_tokens; m += gridDim.x * 32)
                describe_row(call, m, sequence(call, m / call.seq));
        } else {
            wait_for_previous_kernel();
            // Not before: attend_decode reads lengths and cached keys at once, so all calls before this one must have ended.
            let_next_kernel_begin();
            if (elected()) few::copy_tokens(at, rings, smem, &maps.hidden, parts, size);
        }
        few::stand_by(at);
        return;
    }
    few::product(
        at, rings, smem, parts,
        [&](int n, int) {
            float2 bias = make_float2(0.0f, 0.0f);
            if (call.qkv_bias != nullptr && n < total_rows) bias = *reinterpret_cast<const float2*>(call.qkv_bias + n);
            return bias;
        },
        [&](float squares) { return rsqrtf(__fdividef(squares, size) + call.eps) * call.folded_rescale; },
        [&](int n, int m, float2 bias, float2 sum) {
            if (n >= total_rows || m >= num_tokens) return;
            const float2 value =
                make_float2(fmaf(sum.x, call.qkv_unscale, bias.x), fmaf(sum.y, call.qkv_unscale, bias.y));
            *reinterpret_cast<float2*>(call.qkv + static_cast<long long>(m) * total_rows + n) = value;
        });
}
