// W v for up to 8 vectors at once, memory bound: rows of W go straight from memory to registers, 16 bytes a thread, and
// are the tensor cores' B operand; the vectors are A.
//
// A product of a row may take its k in any order if both sides agree: lane l reads 8 consecutive k of row l / 4 of W and
// of vector l / 4, and calls the first four of them the first k16 step and the rest the second.
#pragma once
#include "call.cuh"

namespace gemv {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int MAX_VECTORS = 8;
constexpr int TILE = 8;   // rows of W
constexpr int STEP = 32;  // k of a warp at a time; its next steps lie WARPS steps further

// attend_decode.cu has 168 and begins beside these kernels: together they fill a multiprocessor's registers.
constexpr int MOST_REGISTERS = 88;

// Have that many, whatever the compiler needs: with fewer three of these kernels' blocks fit a multiprocessor, where attend_decode
// has room beside one only, and a layer takes longer (docs/decode-notes.md, version 26).
__device__ __forceinline__ void take_all_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(MOST_REGISTERS));
#endif
}

// Whether this block of decode_project*.cu has no rows of W, of which it would have those from `first` on. The last one describes the
// tokens' rows for the kernels that follow.
__device__ __forceinline__ bool has_no_rows(const Call& call, int first, int total_rows) {
    const bool describes = blockIdx.x == gridDim.x - 1;
    if (!describes && first < total_rows) return false;
    wait_for_previous_kernel();
    if (describes) {
        let_next_kernel_begin();
        if (threadIdx.x < call.batch * call.seq) describe_row(call, threadIdx.x, sequence(call, threadIdx.x / call.seq));
    }
    return true;
}

// Loads of a thread that are asked for before some have come. Of a block's 32 KB under way at once a tile of attention beside it takes
// 0.8 us longer, of 16 KB it does not (docs/decode-notes.md, version 32).
constexpr int AT_A_TIME = 4;

// Wait for a load to registers: who looks at it does.
__device__ __forceinline__ void wait_for(const uint4& loaded) {
    if (loaded.x == 0x7fc1deadu) __nanosleep(20);  // of no consequence
}

// The k at which this thread's 8 elements of a step begin.
__device__ __forceinline__ int first_k(int step) { return step * STEP + threadIdx.x % 4 * 8; }

// Steps of W on their way to shared memory, since registers are short; as many as let two blocks fit there.
template <int Tiles>
constexpr int LATER = Tiles > 4 ? 1 : Tiles == 2 ? 4 : 2;

// What a warp has there: steps, as each lane copies its part of them; at last its sums, [MAX_VECTORS, 8 Tiles].
template <int Tiles>
struct alignas(16) WarpMemory {
    union {
        uint4 steps[LATER<Tiles>][Tiles][32];
        float sums[MAX_VECTORS * TILE * Tiles];
    };
};

// One block's Tiles x 8 rows of W. Of a warp's steps, Unroll are under way to registers and the LATER next ones to shared
// memory at a time. Steps: of a warp, if all can be under way at once, otherwise 0: then there is no code to ask for more, which
// takes time even where it is skipped.
template <int Tiles, int Unroll, int Steps>
struct Rows {
    static constexpr int DEPTH = Unroll + LATER<Tiles>;
    static constexpr bool HAS_ALL = Steps > 0;
    static constexpr int ROUND = HAS_ALL ? Steps : DEPTH;
    static_assert(ROUND <= DEPTH, "steps under way");
    static constexpr int VECTORS = MAX_VECTORS, MOST_ROWS = TILE * Tiles;
    const __half* mine;  // of this thread's row of the first tile
    int rows_left, k_size;
    WarpMemory<Tiles>& own;
    uint4 loaded[Unroll][Tiles];

    __device__ __forceinline__ static int rows_of_block(int) { return TILE * Tiles; }

    // Needs nothing that the kernel before this one writes. `memory`: of the block's warps.
    __device__ __forceinline__ Rows(const __half* w, int num_rows, int, int k_size, WarpMemory<Tiles>* memory)
        : k_size(k_size), own(memory[threadIdx.x / 32]) {
        const int row = threadIdx.x % 32 / 4;
        mine = w + static_cast<long long>(row) * k_size;
        rows_left = num_rows - row;
        const auto is_time = [](int step) { return (step + 1) % max(AT_A_TIME / Tiles, 1) == 0 && step + 1 < ROUND; };
#pragma unroll
        for (int u = 0; u < min(Unroll, ROUND); ++u) {
            load(loaded[u], first_k(threadIdx.x / 32 + u * WARPS));
            if (is_time(u)) wait_for(loaded[u][Tiles - 1]);
        }
#pragma unroll
        for (int u = 0; u < LATER<Tiles>; ++u) {
            if (Unroll + u < ROUND) copy<true>(own.steps[u], first_k(threadIdx.x / 32 + (Unroll + u) * WARPS));
            else copies_commit();  // of nothing: groups are counted
            if (is_time(Unroll + u)) copies_wait<0>();
        }
    }

    __device__ __forceinline__ void load(uint4 (&step)[Tiles], int k) {
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
            step[t] = make_uint4(0, 0, 0, 0);
            if (k < k_size && t * TILE < rows_left)
                step[t] = __ldcs(reinterpret_cast<const uint4*>(mine + t * TILE * k_size + k));
        }
    }

    // First: with the hint that W is read once. Within the loop of large weights its registers cost more than it gives.
    template <bool First>
    __device__ __forceinline__ void copy(uint4 (&step)[Tiles][32], int k) {
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
            const unsigned target = shared_address(&step[t][threadIdx.x % 32]);
            const __half* const source = mine + t * TILE * k_size + k;
            const bool valid = k < k_size && t * TILE < rows_left;
            if (First) copy16_async(target, source, valid, read_once());
            else copy16_async(target, source, valid);
        }
        copies_commit();
    }

    // Leave each warp's sums, vector m times row n of W, in its memory. `fetch(k, ahead, parts)` gives this thread's elements k to
    // k + 7, `ahead` of its first, of vector l / 4, float16, zero where there are none: as they are, or, as 2 Parts, pairs of high
    // and pairs of low halves in turns. It is asked for AtOnce steps at a time. Then `also` has them, the first of their parts.
    template <int Parts, int AtOnce, typename Fetch, typename Also>
    __device__ __forceinline__ void multiply(Fetch fetch, Also also) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int steps = (k_size + STEP - 1) / STEP;
        // With one part two tiles of W are the 16 rows of A, and the vectors B: half as many products.
        constexpr bool W_FIRST = Parts == 1 && Tiles > 1;
        // Products wait for the one before them, or for those of other tiles.
        constexpr int SUMS = W_FIRST ? (Tiles + 1) / 2 : Tiles, CHAINS = Tiles == 1 ? (HAS_ALL ? 4 : 2) : W_FIRST && HAS_ALL ? 2 : 1;
        float total[SUMS][CHAINS][4] = {};
#pragma unroll 1
        for (int first = warp; HAS_ALL || first < steps; first += DEPTH * WARPS) {
            const bool more = !HAS_ALL && first + DEPTH * WARPS < steps;
#pragma unroll
            for (int some = 0; some < ROUND; some += AtOnce) {
                uint4 vector[AtOnce][Parts];
#pragma unroll
                for (int u = 0; u < min(AtOnce, ROUND - some); ++u) {
                    const int ahead = (HAS_ALL ? some + u : first / WARPS + some + u) * (WARPS * STEP);
                    fetch(first_k(warp) + ahead, ahead, vector[u]);
                }
#pragma unroll
                for (int u = 0; u < min(AtOnce, ROUND - some); ++u) {
                    const int step = some + u, next_k = first_k(first + (DEPTH + step) * WARPS);
                    uint4 w[Tiles];
                    if (step >= Unroll) copies_wait<LATER<Tiles> - 1>();  // each lane reads what it has copied
#pragma unroll
                    for (int t = 0; t < Tiles; ++t)
                        w[t] = step < Unroll ? loaded[step % Unroll][t] : own.steps[max(step - Unroll, 0)][t][lane];
                    const uint4 a = vector[u][0], b = vector[u][Parts - 1];
                    if constexpr (W_FIRST) {
#pragma unroll
                        for (int t = 0; t < Tiles; t += 2) {
                            const uint4 c = w[t], d = t + 1 < Tiles ? w[min(t + 1, Tiles - 1)] : make_uint4(0, 0, 0, 0);
                            const unsigned rows[2][4] = {{c.x, d.x, c.y, d.y}, {c.z, d.z, c.w, d.w}};
                            multiply_add(total[t / 2][0], rows[0], a.x, a.y);
                            multiply_add(total[t / 2][CHAINS - 1], rows[1], a.z, a.w);
                        }
                    } else {
                        // High parts are rows 0 to 7 of A, low parts rows 8 to 15. One part is A as it is, too, which spares moves: its
                        // pairs are rows 0 to 7 and 8 to 15 in turns, and with W's elements for the ones the others' sums are of no use.
                        const unsigned rows[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
                        for (int t = 0; t < Tiles; ++t) {
                            const int chain = 2 * step % CHAINS;
                            multiply_add(total[t][chain], rows[0], w[t].x, Parts == 1 ? w[t].z : w[t].y);
                            multiply_add(total[t][(chain + 1) % CHAINS], rows[1], Parts == 1 ? w[t].y : w[t].z, w[t].w);
                        }
                    }
                    also(a);
                    if (step < Unroll) {
                        if (more) load(loaded[step % Unroll], next_k);
                    } else if (more) {
                        copy<false>(own.steps[max(step - Unroll, 0)], next_k);
                    } else {
                        copies_commit();
                    }
                }
            }
            if (HAS_ALL) break;
        }
        __syncwarp();  // sums lie where steps were
        const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int t = 0; t < SUMS; ++t) {
            if constexpr (W_FIRST) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int n = (2 * t + e / 2) * TILE + row;
                    float sum = total[t][0][e];
                    if (CHAINS > 1) sum += total[t][CHAINS - 1][e];
                    if (n < TILE * Tiles) own.sums[(column + e % 2) * (TILE * Tiles) + n] = sum;
                }
            } else {
                float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
                for (int c = 0; c < CHAINS; ++c) {
                    const bool is_second = Parts == 1 && c % 2 == 1;
                    sum.x += total[t][c][is_second ? 2 : 0], sum.y += total[t][c][is_second ? 3 : 1];
                    if (Parts == 2) sum.x += total[t][c][2], sum.y += total[t][c][3];
                }
                *reinterpret_cast<float2*>(own.sums + row * (TILE * Tiles) + t * TILE + column) = sum;
            }
        }
    }

    template <int Parts, int AtOnce, typename Fetch>
    __device__ __forceinline__ void multiply(Fetch fetch) {
        multiply<Parts, AtOnce>(fetch, [](const uint4&) {});
    }

    // Sum `i`, over the warps and always in the same order, of sums that `multiply` left: vector i / (8 Tiles), row of W
    // i % (8 Tiles).
    __device__ __forceinline__ static float sum(const WarpMemory<Tiles>* memory, int i) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += memory[w].sums[i];
        return sum;
    }
};

}  // namespace gemv
