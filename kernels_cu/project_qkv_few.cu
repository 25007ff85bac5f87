// RMSNorm and QKV projection for more tokens than decode_project.cu takes, but not many.
//   qkv = (x / rms(x) * w_in) Wqkv^T + bias          float32 [B S, (Hq + 2 Hkv) D]; the norms of heads follow on reading
//
// Grid (a block to normalise each row of x; then tiles of 64 rows of Wqkv and 8 GROUPS
// tokens, each several blocks), block 128 threads. The latter wait for the former, which come first: blocks begin in the
// order of their index. k, and on the precise path all, is multiplied by hidden states in high and low halves. Shared
// memory: STAGES x 2 x 8 GROUPS x 64 halves, and not less than H floats and H STORAGE. -D: those of gemm_few.cuh. Memory
// bound: one read of Wqkv, some of it before the kernel ahead has ended.
#include "gemm_few.cuh"
#include "normalise_row.cuh"

enum { DONE, READY, SPLIT };  // counters: blocks that have seen that all rows are ready, rows that are, tiles
static_assert(few::THREADS == ROW_THREADS, "a block normalises a row");

extern "C" __global__ void __launch_bounds__(few::THREADS, 3)
project_qkv_few(const __grid_constant__ Call call)
{
    extern __shared__ __align__(128) char smem[];
    const int size = call.hidden_size, num_tokens = call.batch * call.seq;
    const int total_rows = (call.num_q_heads + 2 * call.num_kv_heads) * HEAD_DIM;
    const int num_blocks = gridDim.x - num_tokens;
    if (blockIdx.x < num_tokens) {
        begin_row(call, smem);
        wait_for_previous_kernel();
        let_next_kernel_begin();
        fetch_row(call, blockIdx.x, smem);
        if (threadIdx.x == 0) describe_row(call, blockIdx.x, sequence(call, blockIdx.x / call.seq));
        normalise_row(call, blockIdx.x, smem);
        __syncthreads();
        if (threadIdx.x == 0) count_in_order(&call.counters[READY]);
        return;
    }
    const few::Place place = few::place_of_block(blockIdx.x - num_tokens, num_blocks, total_rows, num_tokens);
    few::Weights w(place, call.qkv_proj, total_rows, size);
    wait_for_previous_kernel();
    // Not before: attend_decode reads lengths and cached keys at once, so all calls before this one must have ended.
    let_next_kernel_begin();
    int before = 0;
    if (threadIdx.x == 0) {
        volatile int* ready = call.counters + READY;
        while (*ready < num_tokens) __nanosleep(20);
        __threadfence();
        before = atomicAdd(&call.counters[DONE], 1);  // the answer is not needed before the end
    }
    __syncthreads();

    const int first_key = call.num_q_heads * HEAD_DIM, end_keys = first_key + call.num_kv_heads * HEAD_DIM;
    const bool has_keys = place.first_row + few::ROWS > first_key && place.first_row < end_keys;
    few::Sums sums;
    const long long stride = static_cast<long long>(HIDDEN_PARTS) * size;
    w.multiply(call.hidden + place.first_token * stride, stride, num_tokens - place.first_token,
               PARTS == 2 || has_keys ? HIDDEN_PARTS : 1, size, reinterpret_cast<__half*>(smem), sums);
    few::add_up(
        place, sums, call.partial, call.counters + SPLIT,
        [&](int) {
            const int n = few::row_of(place, 0);
            float2 bias = make_float2(0.0f, 0.0f);
            if (call.qkv_bias != nullptr && n < total_rows) bias.x = call.qkv_bias[n];
            if (call.qkv_bias != nullptr && n + 8 < total_rows) bias.y = call.qkv_bias[n + 8];
            return bias;
        },
        [&](int g, const float(&sum)[4], float2 bias) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int n = few::row_of(place, e), m = few::token_of(place, g, e);
                if (n < total_rows && m < num_tokens)
                    call.qkv[static_cast<long long>(m) * total_rows + n] = sum[e] * call.qkv_unscale + (e < 2 ? bias.x : bias.y);
            }
        });
    if (threadIdx.x == 0 && before == num_blocks - 1)  // all have seen that rows are ready
        call.counters[DONE] = call.counters[READY] = 0;
}
