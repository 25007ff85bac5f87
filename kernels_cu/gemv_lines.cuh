// W v for one vector, memory bound: a warp reads 512 bytes of a row at a time, and a block rows as they follow each other in
// memory. Pieces of 64 bytes of eight rows each (gemv.cuh) come at four fifths of that rate (docs/decode-notes.md, version 28).
//
// A row is two units, each Unit steps of 256 elements; the block's warps take units in turns. Tensor cores multiply them all the
// same: in a step lane l has elements 8 l to 8 l + 7, of v as of W, and lanes 4 j to 4 j + 3 pass for row j of A and column j of B.
// Of the product its diagonal is what is wanted, and the rest is of no use.
#pragma once
#include "gemv.cuh"

namespace gemv {

constexpr int LINE = 256;  // elements of a step
constexpr int LINES_AT_A_TIME = 6;  // as AT_A_TIME, of those to registers

// One block's rows of W, of 2 Unit LINE elements: as many as other blocks have, a multiple of 4, or what is left. Of a warp's units
// AT_ONCE are under way at a time, LATER of their steps to shared memory and the others to registers. Parts: of v.
template <int Unit, int Parts>
struct Lines {
    static constexpr int VECTORS = 1, MOST_ROWS = 64;
    static constexpr bool HAS_ALL = false;
    // As many as there are registers for.
    static constexpr int AT_ONCE = Unit > 8 ? 1 : Unit > 5 ? 2 : Unit > 4 || Parts == 1 ? 3 : 4;
    static constexpr int DEPTH = Unit * AT_ONCE, LATER = DEPTH > 15 && Parts == 1 ? 7 : 6, SOONER = DEPTH - LATER;
    static constexpr int K_SIZE = 2 * Unit * LINE, NEXT = WARPS * Unit * LINE;  // elements from one unit of a warp to the next
    static_assert(Unit >= 4 && Unit <= 16, "steps to registers");

    using Memory = uint4[WARPS][LATER][32];  // steps, as each lane copies its part of them
    using Sums = float[2 * MOST_ROWS][8];    // of units, by columns of B

    uint4 (&own)[LATER][32];
    const __half* next;     // this lane's elements of the unit that is asked for next
    int units, units_left;  // of the block, and from that one on
    uint4 loaded[SOONER] = {};

    __device__ __forceinline__ static int rows_of_block(int num_rows) {
        const int blocks = gridDim.x - 1;
        return ((num_rows + blocks - 1) / blocks + 3) / 4 * 4;
    }

    // Needs nothing that the kernel before this one writes.
    __device__ __forceinline__ Lines(const __half* w, int rows_left, int rows, int, Memory& memory)
        : own(memory[threadIdx.x / 32]) {
        const int warp = threadIdx.x / 32;
        next = w + warp * (Unit * LINE) + threadIdx.x % 32 * 8;
        units = 2 * min(rows_left, rows), units_left = units - warp;
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            ask(i);
            if (i < SOONER && (i + 1) % LINES_AT_A_TIME == 0) wait_for(loaded[min(i, SOONER - 1)]);
        }
        advance();
    }

    // The k of this thread's first element of a step.
    __device__ __forceinline__ static int first_k() { return threadIdx.x / 32 % 2 * (Unit * LINE) + threadIdx.x % 32 * 8; }

    // For step i / AT_ONCE of unit i % AT_ONCE of the next ones.
    __device__ __forceinline__ void ask(int i) {
        const int unit = i % AT_ONCE;
        const bool valid = unit * WARPS < units_left;
        const __half* const source = next + unit * NEXT + i / AT_ONCE * LINE;
        if (i < SOONER) {
            if (valid) loaded[min(i, SOONER - 1)] = __ldcs(reinterpret_cast<const uint4*>(source));
        } else {
            if (valid) copy16_async(shared_address(&own[max(i - SOONER, 0)][threadIdx.x % 32]), source, true, read_once());
            copies_commit();  // of nothing, too: groups are counted
        }
    }

    __device__ __forceinline__ void advance() { next += AT_ONCE * NEXT, units_left -= AT_ONCE * WARPS; }

    // Leave the sums of units in `sums`. `fetch(ahead, parts)` gives this thread's elements of v, `ahead` of first_k(): as they
    // are, or, as two parts, pairs of high and pairs of low halves in turns.
    template <typename Fetch>
    __device__ __forceinline__ void multiply(Sums& sums, Fetch fetch) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane / 4;
        // High parts are rows 0 to 7 of A, low parts rows 8 to 15. Of one part pairs are rows 0 to 7 and 8 to 15 in turns, and
        // with W's elements for the ones the others' sums are of no use: so there are two.
        constexpr int KINDS = 3 - Parts;
#pragma unroll 1
        for (int unit = warp; unit < units; unit += AT_ONCE * WARPS) {
            float total[AT_ONCE][KINDS][4] = {};
            uint4 parts[Parts];
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const int u = i % AT_ONCE;
                if (u == 0) fetch(i / AT_ONCE * LINE, parts);
                if (i >= SOONER) copies_wait<LATER - 1>();  // each lane reads what it has copied
                const uint4 w = i < SOONER ? loaded[min(i, SOONER - 1)] : own[max(i - SOONER, 0)][lane];
                const uint4 a = parts[0], b = parts[Parts - 1];
                const unsigned first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
                multiply_add(total[u][0], first, w.x, Parts == 1 ? w.z : w.y);
                multiply_add(total[u][KINDS - 1], second, Parts == 1 ? w.y : w.z, w.w);
                ask(i);
            }
            advance();
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u) {
                const float(&high)[4] = total[u][0], (&low)[4] = total[u][KINDS - 1];
                const int place = unit + u * WARPS;
                const float sum = column % 2 == 0 ? high[0] + low[2] : high[1] + low[3];
                if (column / 2 == lane % 4 && place < units) sums[place][column] = sum;
            }
        }
    }

    // The sum of row `i`, always in the same order.
    __device__ __forceinline__ static float sum(const Sums& sums, int i) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float4 some = reinterpret_cast<const float4*>(sums[2 * i])[j];
            sum += some.x + some.y + (some.z + some.w);
        }
        return sum;
    }
};

}  // namespace gemv
