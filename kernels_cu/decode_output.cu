// Output projection, bias and residual for up to 8 tokens; counts them in the cache.
//   y = attention Wo^T + bias + residual          float32 sums, one rounding; 0 in padding rows
//
// Grid (pieces of 8 TILES rows of Wo, blocks with nothing to do, and one that counts the tokens), block 256 threads. -D: those of
// call.cuh, TILES. Memory bound: one read of Wo, most of it before the kernel ahead has ended.
#include "call.cuh"
#include "gemv.cuh"

constexpr int ROWS = gemv::TILE * TILES;  // of a block
using Memory = gemv::WarpMemory<TILES>;
// As many steps as there are registers for, of W and of the vectors; the latter divides UNROLL + LATER.
constexpr int UNROLL = TILES == 1 ? 6 : TILES == 2 ? 4 : 2, AT_ONCE = TILES == 1 ? 8 : TILES == 2 ? 3 : 4;
constexpr int MOST_REGISTERS = 88;  // it waits beside attend_decode.cu, which has 168

extern "C" __global__ void __maxnreg__(MOST_REGISTERS)
decode_output(const __grid_constant__ Call call)
{
    let_next_kernel_begin();
    __shared__ __align__(16) Memory memory[gemv::WARPS];
    if (blockIdx.x == gridDim.x - 1) {
        const int b = threadIdx.x;
        Sequence s = {};
        if (b < call.batch) s = sequence(call, b);
        wait_for_previous_kernel();
        if (b < call.batch) advance_length(call, b, s);
        return;
    }
    const int k_size = call.num_q_heads * HEAD_DIM, first = blockIdx.x * ROWS;
    if (first >= call.hidden_size) {
        wait_for_previous_kernel();
        return;
    }
    const int m = threadIdx.x % 32 / 4;
    const __half* const vector = call.attention + static_cast<long long>(m) * k_size;

    gemv::Rows<TILES, UNROLL> w(call.o_proj + static_cast<long long>(first) * k_size, call.hidden_size - first, k_size,
                                memory);
    wait_for_previous_kernel();
    const int b = threadIdx.x / ROWS, n = first + threadIdx.x % ROWS;
    const bool mine = threadIdx.x < ROWS * gemv::MAX_VECTORS && b < call.batch * call.seq && n < call.hidden_size;
    const long long at = static_cast<long long>(b) * call.hidden_size + n;
    // Added up after the product, or that would stand in line behind their loads.
    float bias = 0.0f;
    STORAGE residual = static_cast<STORAGE>(0.0f);
    int slot = 0;
    if (mine) {
        slot = call.rows[b].x;
        if (call.o_bias != nullptr) bias = call.o_bias[n];
        if (call.residual != nullptr) residual = call.residual[at];
    }
    w.multiply<1, AT_ONCE>([&](int k, uint4 (&parts)[1]) {
        parts[0] = make_uint4(0, 0, 0, 0);
        if (m < call.batch * call.seq && k < k_size) parts[0] = *reinterpret_cast<const uint4*>(vector + k);
    });
    __syncthreads();
    if (mine) {
        const float value = gemv::sum_of_warps(memory, threadIdx.x) * call.o_unscale + (bias + static_cast<float>(residual));
        call.y[at] = static_cast<STORAGE>(slot >= 0 ? value : slot == FAULT ? __int_as_float(0x7fffffff) : 0.0f);
    }
}
