// RMSNorm and QKV projection for up to 8 tokens.
//   qkv = (x / rms(x) * w_in) Wqkv^T + bias          float32 [B S, (Hq + 2 Hkv) D]; the norms of heads follow on reading
//
// Grid (pieces of ROWS rows of Wqkv, blocks with nothing to do, and one that describes the rows of x), block 256 threads; every block
// normalises every token for itself. Hidden states are high and low halves, so nothing is lost to rounding. Shared memory:
// w_in, float [H rounded up to 32], x, STORAGE [B S, stride_of(H)], and as much again for low halves where NORMALISE_ONCE.
// -D: those of call.cuh, TILES, NORMALISE_ONCE (a token is normalised once by all warps, and not by each as it multiplies).
// Memory bound: one read of Wqkv, most of it before the kernel ahead has ended.
#include "call.cuh"
#include "gemv.cuh"
#include "reduce.cuh"
#include "storage.cuh"

constexpr int ROWS = gemv::TILE * TILES;  // of a block
using Memory = gemv::WarpMemory<TILES>;
constexpr int UNROLL = TILES == 5 ? 1 : TILES == 4 ? 2 : 3;  // steps of W under way to registers

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
    if (first >= total_rows) {
        wait_for_previous_kernel();
        return;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = lane / 4;

    gemv::Rows<TILES, UNROLL> w(call.qkv_proj + static_cast<long long>(first) * size, total_rows - first, size,
                                memory);
    for (int i = threadIdx.x * 4; i < size; i += gemv::THREADS * 4) copy16_async(input_norm + i, call.input_norm + i, true);
    wait_for_previous_kernel();
    // Not before: attend_decode reads lengths and cached keys at once, so all calls before this one must have ended.
    let_next_kernel_begin();
    // As many warps to a token as there are; each lane adds up the squares of what it has copied.
    static_assert(gemv::WARPS == 8 && gemv::MAX_VECTORS == 8, "warps to tokens");
    const int shift = num_tokens > 4 ? 0 : num_tokens > 2 ? 1 : num_tokens > 1 ? 2 : 3;
    const int sharing = 1 << shift, token = warp >> shift, part = warp & (sharing - 1);
    STORAGE* const x_mine = x_smem + token * stride;
    const int first_mine = token < num_tokens ? (part * 32 + lane) * VECTOR : size, step_mine = sharing * 32 * VECTOR;
#pragma unroll 1  // kernels this short spend their time on fetching instructions
    for (int k = first_mine; k < size; k += step_mine)
        copy16_async(x_mine + k, call.x + static_cast<long long>(token) * size + k, true);
    copies_commit();
    copies_wait<0>();
    float sum_squares = 0.0f;
#pragma unroll 1
    for (int k = first_mine; k < size; k += step_mine) {
        float values[VECTOR];
        load8(x_mine + k, values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum_squares += values[j] * values[j];
    }
    sum_squares = warp_sum(sum_squares);
    if (lane == 0) squares[token][part] = sum_squares;
    __syncthreads();
    const auto rstd_of = [&](int token) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < gemv::WARPS; ++i) sum += i < sharing ? squares[token][i] : 0.0f;
        return rsqrtf(sum / size + call.eps);
    };
    const auto normalise = [&](const STORAGE* x, int k, float rstd, uint4 (&parts)[2]) {  // elements k to k + 7 of a token
        float values[VECTOR], scale[VECTOR];
        load8(x + k, values);
        load8(input_norm + k, scale);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[j] *= rstd * scale[j];
        unsigned high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            high[j] = pack(values[2 * j], values[2 * j + 1]);
            low[j] = pack_rest(values[2 * j], values[2 * j + 1], high[j]);
        }
        parts[0] = make_uint4(high[0], high[1], high[2], high[3]);
        parts[1] = make_uint4(low[0], low[1], low[2], low[3]);
    };
#ifdef NORMALISE_ONCE
    // High halves take the place of x, low ones follow.
    const float rstd = rstd_of(token);
#pragma unroll 1
    for (int k = first_mine; k < size; k += step_mine) {
        uint4 parts[2];
        normalise(x_mine, k, rstd, parts);
        *reinterpret_cast<uint4*>(x_mine + k) = parts[0];
        *reinterpret_cast<uint4*>(x_mine + num_tokens * stride + k) = parts[1];
    }
    __syncthreads();
#else
    const float rstd = rstd_of(m);
#endif
    w.multiply<2, 1>([&](int k, uint4 (&parts)[2]) {
        parts[0] = parts[1] = make_uint4(0, 0, 0, 0);
        if (m >= num_tokens || k >= size) return;
#ifdef NORMALISE_ONCE
        parts[0] = *reinterpret_cast<const uint4*>(x_smem + m * stride + k);
        parts[1] = *reinterpret_cast<const uint4*>(x_smem + m * stride + k + num_tokens * stride);
#else
        normalise(x_smem + m * stride, k, rstd, parts);
#endif
    });
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * gemv::MAX_VECTORS; i += gemv::THREADS) {
        const int b = i / ROWS, n = first + i % ROWS;
        if (b < num_tokens && n < total_rows)
            call.qkv[static_cast<long long>(b) * total_rows + n] =
                gemv::sum_of_warps(memory, i) * call.qkv_unscale + (call.qkv_bias != nullptr ? call.qkv_bias[n] : 0.0f);
    }
}
