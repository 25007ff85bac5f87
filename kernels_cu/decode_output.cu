// Output projection, bias and residual for up to 8 tokens; counts them in the cache.
//   y = attention Wo^T + bias + residual          float32 sums, one rounding; 0 in padding rows
//
// Grid (pieces of rows of Wo, blocks with nothing to do, and one that counts the tokens), block 256 threads. -D: those of
// call.cuh, TILES, STEPS (gemv.cuh) or, for one token, UNIT (gemv_lines.cuh). Memory bound: one read of Wo, most of it before
// the kernel ahead has ended.
#include "call.cuh"
#include "gemv_lines.cuh"
#include "storage.cuh"

#ifdef UNIT
using W = gemv::Lines<UNIT, 1>;
using Memory = W::Memory;
#else
// As many steps as there are registers for, of W and of the vectors; fewer where W is asked for again and again.
constexpr int UNROLL = TILES == 1 ? (STEPS > 0 ? 8 : 6) : TILES == 2 ? 4 : 2;
constexpr int AT_ONCE = TILES == 1 ? 8 : TILES == 2 && STEPS == 0 ? 2 : 4;
using W = gemv::Rows<TILES, UNROLL, STEPS>;
using Memory = gemv::WarpMemory<TILES>[gemv::WARPS];
#endif

extern "C" __global__ void __maxnreg__(gemv::MOST_REGISTERS)
decode_output(const __grid_constant__ Call call)
{
    gemv::take_all_registers();
    let_next_kernel_begin();
    __shared__ __align__(16) Memory memory;
    if (blockIdx.x == gridDim.x - 1) {
        const int b = threadIdx.x;
        Sequence s = {};
        if (b < call.batch) s = sequence(call, b);
        wait_for_previous_kernel();
        if (b < call.batch) advance_length(call, b, s);
        return;
    }
    const int k_size = call.num_q_heads * HEAD_DIM, rows = W::rows_of_block(call.hidden_size), first = blockIdx.x * rows;
    if (first >= call.hidden_size) {
        wait_for_previous_kernel();
        return;
    }
#ifndef UNIT
    const int m = threadIdx.x % 32 / 4;
    const __half* const vector = call.attention + static_cast<long long>(m) * k_size + gemv::first_k(threadIdx.x / 32);
#endif
    W w(call.o_proj + static_cast<long long>(first) * k_size, call.hidden_size - first, rows, k_size, memory);
    const int b = W::VECTORS > 1 ? threadIdx.x / rows : 0;
    const int n = first + (W::VECTORS > 1 ? threadIdx.x % rows : threadIdx.x);
    const bool mine = threadIdx.x < rows * W::VECTORS && b < call.batch * call.seq && n < call.hidden_size;
    const long long at = static_cast<long long>(b) * call.hidden_size + n;
    // attend_decode lets this kernel begin when the call before has ended, but perhaps not decode_project, which describes rows.
    float addend = 0.0f;
    if (mine) {
        if (call.o_bias != nullptr) addend = call.o_bias[n];
        if (call.residual != nullptr) addend += static_cast<float>(__ldcg(call.residual + at));
    }
    wait_for_previous_kernel();
    const int slot = mine ? __ldcg(&call.rows[b].x) : 0;
#ifdef UNIT
    __shared__ uint4 vector[W::K_SIZE / VECTOR];
    __shared__ __align__(16) W::Sums sums;
#pragma unroll
    for (int some = 0; some < W::K_SIZE / VECTOR; some += gemv::THREADS) {
        const int i = some + threadIdx.x;
        if (i < W::K_SIZE / VECTOR) vector[i] = __ldcg(reinterpret_cast<const uint4*>(call.attention) + i);
    }
    __syncthreads();
    w.multiply(sums, [&](int ahead, uint4 (&parts)[1]) { parts[0] = vector[(W::first_k() + ahead) / VECTOR]; });
#else
    const Memory& sums = memory;
    w.multiply<1, AT_ONCE>([&](int k, int ahead, uint4 (&parts)[1]) {
        parts[0] = make_uint4(0, 0, 0, 0);
        if (m < call.batch * call.seq && k < k_size) parts[0] = *reinterpret_cast<const uint4*>(vector + ahead);
    });
#endif
    __syncthreads();
    if (mine) {
        const float value = W::sum(sums, threadIdx.x) * call.o_unscale + addend;
        call.y[at] = static_cast<STORAGE>(slot >= 0 ? value : slot == FAULT ? __int_as_float(0x7fffffff) : 0.0f);
    }
}
