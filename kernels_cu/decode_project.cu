// RMSNorm and QKV projection for up to 8 tokens.
//   qkv = (x / rms(x) * w_in) Wqkv^T + bias          float32 [B S, (Hq + 2 Hkv) D]; the norms of heads follow on reading
//
// Grid (pieces of ROWS rows of Wqkv, and one block that describes the rows of x), block 256 threads; every block
// normalises every token for itself. Hidden states are high and low halves, so nothing is lost to rounding. Shared memory:
// w_in, float [H rounded up to 32], and x, STORAGE [B S, stride_of(H)]. -D: those of call.cuh, TILES. Memory bound: one read of
// Wqkv, most of it before the kernel ahead has ended.
#include "call.cuh"
#include "gemv.cuh"
#include "reduce.cuh"
#include "storage.cuh"

constexpr int ROWS = gemv::TILE * TILES;  // of a block
using Memory = gemv::WarpMemory<TILES>;
constexpr int UNROLL = TILES == 4 ? 2 : 3;

// Elements between vectors: half a bank cycle apart, so that two vectors a 16-byte read touches do not collide.
__device__ __forceinline__ int stride_of(int hidden_size) { return (hidden_size + 63) / 64 * 64 + 32; }

// attend_decode.cu has 168 and begins beside this kernel: together they fill a multiprocessor's registers.
constexpr int MOST_REGISTERS = 88;

extern "C" __global__ void __maxnreg__(MOST_REGISTERS)
decode_project(const __grid_constant__ Call call)
{
    extern __shared__ __align__(16) float input_norm[];
    __shared__ __align__(16) Memory memory[gemv::WARPS];
    __shared__ __align__(16) float squares[gemv::MAX_VECTORS][gemv::WARPS];
    const int num_tokens = call.batch * call.seq;
    const int size = call.hidden_size, stride = stride_of(size);
    STORAGE* const x_smem = reinterpret_cast<STORAGE*>(input_norm + (size + 31) / 32 * 32);
    const int total_rows = (call.num_q_heads + 2 * call.num_kv_heads) * HEAD_DIM;
    const int first = blockIdx.x * ROWS;
    if (blockIdx.x == gridDim.x - 1) {
        wait_for_previous_kernel();
        let_next_kernel_begin();
        if (threadIdx.x < num_tokens) describe_row(call, threadIdx.x, sequence(call, threadIdx.x / call.seq));
        return;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = lane / 4;

    gemv::Rows<TILES, UNROLL> w(call.qkv_proj + static_cast<long long>(first) * size, total_rows - first, size,
                                memory);
    for (int i = threadIdx.x * 4; i < size; i += gemv::THREADS * 4) copy16_async(input_norm + i, call.input_norm + i, true);
    wait_for_previous_kernel();
    // Not before: attend_decode reads lengths and cached keys at once, so all calls before this one must have ended.
    let_next_kernel_begin();
    // A warp copies 32 pieces of a token at a time, so that each lane can add up the squares of what it has copied.
    const int pieces = size / VECTOR, chunks = (pieces + 31) / 32;
    const auto every_piece = [&](auto&& take) {
        int b = 0;
#pragma unroll 1  // kernels this short spend their time on fetching instructions
        for (int chunk = warp;; chunk += gemv::WARPS) {
            for (; chunk >= chunks; chunk -= chunks) ++b;
            if (b >= num_tokens) break;
            const int i = chunk * 32 + lane;
            take(b, i < pieces, i * VECTOR);
        }
    };
    every_piece([&](int b, bool is_in, int k) {
        if (is_in) copy16_async(x_smem + b * stride + k, call.x + static_cast<long long>(b) * size + k, true);
    });
    copies_commit();
    if (lane < gemv::MAX_VECTORS) squares[lane][warp] = 0.0f;
    copies_wait<0>();
    __syncwarp();
    every_piece([&](int b, bool is_in, int k) {
        float values[VECTOR] = {}, sum = 0.0f;
        if (is_in) load8(x_smem + b * stride + k, values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum += values[j] * values[j];
        sum = warp_sum(sum);
        if (lane == 0) squares[b][warp] += sum;
    });
    __syncthreads();
    float sum_squares = 0.0f;
#pragma unroll
    for (int i = 0; i < gemv::WARPS; ++i) sum_squares += squares[m][i];
    const float rstd = rsqrtf(sum_squares / size + call.eps);

    w.multiply<2, 1>([&](int k, uint4 (&parts)[2]) {
        float values[VECTOR] = {}, scale[VECTOR];
        if (m < num_tokens && k < size) {
            load8(x_smem + m * stride + k, values);
            load8(input_norm + k, scale);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) values[j] *= rstd * scale[j];
        }
        unsigned high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            high[j] = pack(values[2 * j], values[2 * j + 1]);
            low[j] = pack_rest(values[2 * j], values[2 * j + 1], high[j]);
        }
        parts[0] = make_uint4(high[0], high[1], high[2], high[3]);
        parts[1] = make_uint4(low[0], low[1], low[2], low[3]);
    });
    __syncthreads();
    const int b = threadIdx.x / ROWS, n = first + threadIdx.x % ROWS;
    static_assert(ROWS * gemv::MAX_VECTORS <= gemv::THREADS, "a thread to a sum");
    if (b < num_tokens && n < total_rows)
        call.qkv[static_cast<long long>(b) * total_rows + n] =
            gemv::sum_of_warps(memory, threadIdx.x) * call.qkv_unscale +
            (call.qkv_bias != nullptr ? call.qkv_bias[n] : 0.0f);
}
