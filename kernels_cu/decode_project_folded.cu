// RMSNorm and QKV projection for up to 8 tokens, by a Wqkv that has the input norm's weight in it.
//   qkv = (x Wqkv^T) / rms(x) + bias          float32 [B S, (Hq + 2 Hkv) D]; the norms of heads follow on reading
//
// x is multiplied as it is, as soon as it is there. What a token's products are divided by is wanted after them only: of lines its
// squares are added up beside them, elsewhere tokens are another tile of W, and their products with themselves on its diagonal.
//
// Grid and block as in decode_project.cu. Shared memory: x, half [H] where UNIT, [B S, stride_of(H)] where STEPS is 0. -D: those of
// call.cuh (STORAGE __half), TILES, STEPS (gemv.cuh) or, for one token, UNIT (gemv_lines.cuh), MANY (more tokens than
// decode_project.cu holds). Memory bound: one read of Wqkv, most of it before the kernel ahead has ended.
#include "call.cuh"
#include "gemv_lines.cuh"
#include "alike.cuh"
#include "reduce.cuh"
#include "storage.cuh"

#ifdef UNIT
constexpr bool IS_DIRECT = false;
using W = gemv::Lines<UNIT, 1>;
using Memory = W::Memory;
#else
constexpr int UNROLL = TILES == 5 ? 1 : TILES == 4 ? 2 : 3;  // steps of W under way to registers
constexpr bool IS_DIRECT = STEPS > 0;                        // x goes from memory to registers, all of a warp's elements at once
constexpr int AT_ONCE = IS_DIRECT ? STEPS : 1;
using W = gemv::Rows<TILES, UNROLL, STEPS>;
using Memory = gemv::WarpMemory<TILES>[gemv::WARPS];

// Elements between tokens, as in decode_project.cu.
__device__ __forceinline__ int stride_of(int hidden_size) { return (hidden_size + 63) / 64 * 64 + 32; }
#endif

#ifdef MANY
constexpr bool IS_MANY = true;
#else
constexpr bool IS_MANY = false;
#endif
// 80: then one block fits a multiprocessor beside two of decode_output, and W comes sooner.
constexpr int MOST_REGISTERS = IS_DIRECT && !IS_MANY ? 80 : gemv::MOST_REGISTERS;

extern "C" __global__ void __maxnreg__(MOST_REGISTERS)
decode_project_folded(const __grid_constant__ Call call)
{
    if (IS_MANY) gemv::take_all_registers();
    extern __shared__ __align__(16) __half x_smem[];
    __shared__ __align__(16) Memory memory;
    __shared__ float squares[W::VECTORS][gemv::WARPS];
    const int num_tokens = call.batch * call.seq, size = call.hidden_size;
    const int total_rows = (call.num_q_heads + 2 * call.num_kv_heads) * HEAD_DIM;
    const int rows = W::rows_of_block(total_rows), first = blockIdx.x * rows;
    if (gemv::has_no_rows(call, first, total_rows)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    W w(call.folded_proj + static_cast<long long>(first) * size, total_rows - first, rows, size, memory);
    if (W::HAS_ALL && threadIdx.x == 0) prefetch_alike_run(call);
    wait_for_previous_kernel();
    // Not before: attend_decode reads lengths and cached keys at once, so all calls before this one must have ended.
    let_next_kernel_begin();
#ifdef UNIT
    constexpr int PIECES = (W::K_SIZE / VECTOR + gemv::THREADS - 1) / gemv::THREADS;  // of x, a thread's
    __shared__ __align__(16) W::Sums sums;
    uint4 pieces[PIECES], * const vector = reinterpret_cast<uint4*>(x_smem);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int place = i * gemv::THREADS + threadIdx.x;
        pieces[i] = place < W::K_SIZE / VECTOR ? __ldcg(reinterpret_cast<const uint4*>(call.x) + place) : make_uint4(0, 0, 0, 0);
        if (place < W::K_SIZE / VECTOR) vector[place] = pieces[i];
    }
    __syncthreads();
    float sum_squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        float values[VECTOR];
        load8(reinterpret_cast<const __half*>(&pieces[i]), values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum_squares += values[j] * values[j];
    }
    sum_squares = warp_sum(sum_squares);
    if (lane == 0) squares[0][warp] = sum_squares;
    w.multiply(sums, [&](int ahead, uint4 (&parts)[1]) { parts[0] = vector[(W::first_k() + ahead) / VECTOR]; });
#else
    const Memory& sums = memory;
    const int m = lane / 4, stride = IS_DIRECT ? size : stride_of(size);
    const __half* const mine = (IS_DIRECT ? call.x : x_smem) + static_cast<long long>(m) * stride + gemv::first_k(warp);
    if (!IS_DIRECT) {
        const int vectors = size / VECTOR;
#pragma unroll 1
        for (int i = threadIdx.x; i < num_tokens * vectors; i += gemv::THREADS) {
            const int token = i / vectors, k = (i - token * vectors) * VECTOR;
            copy16_async(x_smem + token * stride + k, call.x + static_cast<long long>(token) * size + k, true);
        }
        copies_commit();
        copies_wait<0>();
        __syncthreads();
    }
    float squared[4] = {};
    w.multiply<1, AT_ONCE>(
        [&](int k, int ahead, uint4 (&parts)[1]) {
            parts[0] = make_uint4(0, 0, 0, 0);
            if (m >= num_tokens || k >= size) return;
            const uint4* const source = reinterpret_cast<const uint4*>(mine + ahead);
            parts[0] = IS_DIRECT ? __ldcg(source) : *source;
        },
        [&](const uint4& vector) {
            const unsigned first_half[4] = {vector.x, 0, vector.y, 0}, second_half[4] = {vector.z, 0, vector.w, 0};
            multiply_add(squared, first_half, vector.x, vector.y);
            multiply_add(squared, second_half, vector.z, vector.w);
        });
    if (lane % 4 == m / 2) squares[m][warp] = m % 2 ? squared[1] : squared[0];
#endif
    __syncthreads();
#pragma unroll
    for (int some = 0; some < W::MOST_ROWS * W::VECTORS; some += gemv::THREADS) {
        const int i = some + threadIdx.x, b = W::VECTORS > 1 ? i / rows : 0, n = first + (W::VECTORS > 1 ? i % rows : i);
        if (i >= rows * W::VECTORS || b >= num_tokens || n >= total_rows) continue;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < gemv::WARPS; ++j) sum += squares[b][j];
        const float factor = rsqrtf(__fdividef(sum, size) + call.eps) * call.folded_rescale * call.qkv_unscale;
        call.qkv[static_cast<long long>(b) * total_rows + n] =
            W::sum(sums, i) * factor + (call.qkv_bias != nullptr ? call.qkv_bias[n] : 0.0f);
    }
}
