// RMSNorm and QKV projection for up to 8 tokens.
//   qkv = (x / rms(x) * w_in) Wqkv^T + bias          float32 [B S, (Hq + 2 Hkv) D]; the norms of heads follow on reading
//
// Grid (pieces of rows of Wqkv, blocks with nothing to do, and one that describes the rows of x), block 256 threads; every
// block normalises every token for itself. Hidden states are high and low halves, so nothing is lost to rounding. Shared memory:
// w_in, float [H rounded up to 32]; x, STORAGE [B S, stride_of(H)], or, where HELD, its halves, 16 bytes [B S, parts_stride_of(H)].
// -D: those of call.cuh, TILES, STEPS (gemv.cuh) or, for one token, UNIT (gemv_lines.cuh), HELD (0: a token is normalised by
// each warp as it multiplies; otherwise once, and a thread has one vector of 8 elements of it, or, if that is 2, more). Memory
// bound: one read of Wqkv, most of it before the kernel ahead has ended.
#include "call.cuh"
#include "gemv_lines.cuh"
#include "alike.cuh"
#include "reduce.cuh"
#include "storage.cuh"

#ifdef UNIT
using W = gemv::Lines<UNIT, 2>;
using Memory = W::Memory;
static_assert(sizeof(W::Sums) <= W::K_SIZE * sizeof(float), "room for sums where w_in was");
#else
constexpr int UNROLL = TILES == 5 ? 1 : TILES == 4 ? 2 : 3;  // steps of W under way to registers
using W = gemv::Rows<TILES, UNROLL, STEPS>;
using Memory = gemv::WarpMemory<TILES>[gemv::WARPS];
#endif

constexpr bool IS_HELD = HELD > 0;
constexpr bool IN_REGISTERS = HELD == 1;  // until it can be normalised; more vectors are in their places in shared memory
// Vectors of halves, from those of 8 elements to the next 8's; of lines all first halves come before all second ones.
constexpr int APART = W::VECTORS == 1 ? 1 : 2;
constexpr int HELD_AT_ONCE = IN_REGISTERS ? 1 : 2;  // on their way

// Elements between vectors: half a bank cycle apart, so that two vectors a 16-byte read touches do not collide.
__device__ __forceinline__ int stride_of(int hidden_size) { return (hidden_size + 63) / 64 * 64 + 32; }

// The same for their halves, of which 8 elements take 32 bytes: one fills the gaps that another leaves.
__device__ __forceinline__ int parts_stride_of(int hidden_size) { return (hidden_size + 31) / 32 * 8 + 1; }

extern "C" __global__ void __maxnreg__(gemv::MOST_REGISTERS)
decode_project(const __grid_constant__ Call call)
{
    // Of a few tokens more blocks may share a multiprocessor that attend_decode has left, and W comes sooner.
    if (!IS_HELD) gemv::take_all_registers();
    extern __shared__ __align__(16) float input_norm[];
    __shared__ __align__(16) Memory memory;
    __shared__ __align__(16) float squares[gemv::MAX_VECTORS][gemv::WARPS];
    const int num_tokens = call.batch * call.seq;
    const int size = call.hidden_size, stride = stride_of(size);
    STORAGE* const x_smem = reinterpret_cast<STORAGE*>(input_norm + (size + 31) / 32 * 32);
    uint4* const x_parts = reinterpret_cast<uint4*>(x_smem);
    const int total_rows = (call.num_q_heads + 2 * call.num_kv_heads) * HEAD_DIM;
    const int rows = W::rows_of_block(total_rows), first = blockIdx.x * rows;
    if (gemv::has_no_rows(call, first, total_rows)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = lane / 4;

    W w(call.qkv_proj + static_cast<long long>(first) * size, total_rows - first, rows, size, memory);
#pragma unroll 1  // kernels this short spend their time on fetching instructions
    for (int i = threadIdx.x * 4; i < size; i += gemv::THREADS * 4) copy16_async(input_norm + i, call.input_norm + i, true);
    copies_commit();
    // As many warps to a token as there are.
    static_assert(gemv::WARPS == 8 && gemv::MAX_VECTORS == 8, "warps to tokens");
    const int shift = num_tokens > 4 ? 0 : num_tokens > 2 ? 1 : num_tokens > 1 ? 2 : 3;
    const int sharing = 1 << shift, token = warp >> shift, part = warp & (sharing - 1);
    const int first_mine = token < num_tokens ? (part * 32 + lane) * VECTOR : size, step_mine = sharing * 32 * VECTOR;
    const STORAGE* const x = call.x + static_cast<long long>(token) * size;
    if (W::HAS_ALL && threadIdx.x == 0) prefetch_alike_run(call);
    wait_for_previous_kernel();
    // Not before: attend_decode reads lengths and cached keys at once, so all calls before this one must have ended.
    let_next_kernel_begin();
    // Each lane adds up the squares of what it has loaded or copied.
    uint4 held[HELD_AT_ONCE] = {};
    const auto place = [&](int k) { return x_parts + token * parts_stride_of(size) + k / VECTOR * APART; };
    const int second = W::VECTORS == 1 ? size / VECTOR : 1;  // from the first vector of 8 elements' halves
    float sum_squares = 0.0f;
    const auto add_squares = [&](const STORAGE* vector) {
        float values[VECTOR];
        load8(vector, values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum_squares += values[j] * values[j];
    };
    const auto hold = [&](int first_k) {
#pragma unroll
        for (int i = 0; i < HELD_AT_ONCE; ++i) {
            const int k = first_k + i * step_mine;
            held[i] = k < size ? __ldcg(reinterpret_cast<const uint4*>(x + k)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < HELD_AT_ONCE; ++i) add_squares(reinterpret_cast<const STORAGE*>(&held[i]));
    };
    if (IS_HELD) {
        if (IN_REGISTERS) {
            hold(first_mine);
        } else {
#pragma unroll 1
            for (int k = first_mine; k < size; k += HELD_AT_ONCE * step_mine) {
                hold(k);
#pragma unroll
                for (int i = 0; i < HELD_AT_ONCE; ++i)
                    if (k + i * step_mine < size) *place(k + i * step_mine) = held[i];
            }
        }
        copies_wait<0>();  // for the norm's weight
    } else {
        STORAGE* const x_mine = x_smem + token * stride;
#pragma unroll 1
        for (int k = first_mine; k < size; k += step_mine) copy16_async(x_mine + k, x + k, true);
        copies_commit();
        copies_wait<0>();
#pragma unroll 1
        for (int k = first_mine; k < size; k += step_mine) add_squares(x_mine + k);
    }
    sum_squares = warp_sum(sum_squares);
    if (lane == 0) squares[token][part] = sum_squares;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < gemv::WARPS; ++i) sum += i < sharing ? squares[IS_HELD ? token : m][i] : 0.0f;
    const float rstd = rsqrtf(__fdividef(sum, size) + call.eps);
    const auto normalise = [&](const STORAGE* vector, const float* weight, uint4 (&parts)[2]) {
        float values[VECTOR], scale[VECTOR];
        load8(vector, values);
        load8(weight, scale);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[j] *= rstd * scale[j];
        unsigned high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            high[j] = pack(values[2 * j], values[2 * j + 1]);
            low[j] = pack_rest(values[2 * j], values[2 * j + 1], high[j]);
        }
        parts[0] = make_uint4(high[0], low[0], high[1], low[1]);
        parts[1] = make_uint4(high[2], low[2], high[3], low[3]);
    };
    if (IS_HELD) {
        const auto normalise_held = [&](int k, const uint4& raw) {
            if (k >= size) return;
            uint4 parts[2];
            normalise(reinterpret_cast<const STORAGE*>(&raw), input_norm + k, parts);
            place(k)[0] = parts[0], place(k)[second] = parts[1];
        };
        if (IN_REGISTERS) {
            normalise_held(first_mine, held[0]);
        } else {
#pragma unroll 1
            for (int k = first_mine; k < size; k += step_mine) normalise_held(k, *place(k));
        }
        __syncthreads();
    }
#ifdef UNIT
    W::Sums& sums = *reinterpret_cast<W::Sums*>(input_norm);  // which is read no more
    w.multiply(sums, [&](int ahead, uint4 (&parts)[2]) {
        const uint4* const source = x_parts + (W::first_k() + ahead) / VECTOR;
        parts[0] = source[0], parts[1] = source[W::K_SIZE / VECTOR];
    });
#else
    const Memory& sums = memory;
    const uint4* const parts_mine = x_parts + m * parts_stride_of(size) + gemv::first_k(warp) / VECTOR * 2;
    w.multiply<2, 1>([&](int k, int ahead, uint4 (&parts)[2]) {
        parts[0] = parts[1] = make_uint4(0, 0, 0, 0);
        if (m >= num_tokens || k >= size) return;
        if (IS_HELD) {
            const uint4* const source = parts_mine + ahead / VECTOR * 2;
            parts[0] = source[0], parts[1] = source[1];
        } else {
            normalise(x_smem + m * stride + k, input_norm + k, parts);
        }
    });
#endif
    __syncthreads();
#pragma unroll
    for (int some = 0; some < W::MOST_ROWS * W::VECTORS; some += gemv::THREADS) {
        const int i = some + threadIdx.x, b = W::VECTORS > 1 ? i / rows : 0, n = first + (W::VECTORS > 1 ? i % rows : i);
        if (i < rows * W::VECTORS && b < num_tokens && n < total_rows)
            call.qkv[static_cast<long long>(b) * total_rows + n] =
                W::sum(sums, i) * call.qkv_unscale + (call.qkv_bias != nullptr ? call.qkv_bias[n] : 0.0f);
    }
}
