// W v for some tokens, 8 GROUPS to a tile, memory bound: rows of W go straight from memory to registers and are the tensor
// cores' A operand, tokens come through shared memory and are B. k is split between blocks as well, of which the last adds up.
//
// A product of a row may take its k in any order if both sides agree: lane l reads 8 consecutive k of rows l / 4 and
// l / 4 + 8 of W and of token l / 4, and calls the first four of them the first k16 step and the rest the second.
// A token's sums do not depend on how many others there are. -D: those of call.cuh, GROUPS (2, 4 or 8).
#pragma once
#include "call.cuh"

namespace few {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 16 * WARPS;  // of W, of a tile
constexpr int TOKENS = 8 * GROUPS;
constexpr int STEP = 32, STEPS = 2, CHUNK = STEP * STEPS;  // k of one load, of one copy
constexpr int STAGES = 4;  // copies of tokens
constexpr int AHEAD = 3;   // chunks of W under way
constexpr int PIECES = CHUNK / 8;  // of 16 bytes, of a token's chunk

using Sums = float[GROUPS][4];  // rows l / 4 and 8 more of a warp's 16, tokens 8 g + 2 (l % 4) + {0, 1}

// Where a piece of a token lies in a chunk: reads of 16 bytes by 8 lanes, two tokens, meet no bank twice.
__device__ __forceinline__ int place_of(int token, int piece) { return token * CHUNK + (piece ^ (token & 1) * 4) * 8; }

// What a block multiplies: ROWS rows of W, one of `splits` parts of their k, TOKENS tokens.
struct Place {
    int first_row, split, splits, first_token;
    int tile;  // of sums
};

// Of `blocks`, which are a multiple of all tiles: that is how many parts k has.
__device__ __forceinline__ Place place_of_block(int block, int blocks, int num_rows, int num_tokens) {
    const int token_tiles = (num_tokens + TOKENS - 1) / TOKENS, row_tiles = (num_rows + ROWS - 1) / ROWS;
    const int splits = blocks / (row_tiles * token_tiles), tile = block / splits;
    return {tile / token_tiles * ROWS, block % splits, splits, tile % token_tiles * TOKENS, tile};
}

// What a block has of W.
struct Weights {
    const __half* mine;  // of this thread's first row
    int rows_left;       // from that row on
    int k_size, first_k, end_k;
    uint4 loaded[AHEAD][STEPS][2];

    // Needs nothing that the kernel before this one writes.
    __device__ __forceinline__ Weights(const Place& place, const __half* w, int num_rows, int k_size) : k_size(k_size) {
        const int chunks = (k_size + CHUNK - 1) / CHUNK, share = (chunks + place.splits - 1) / place.splits;
        first_k = place.split * share * CHUNK;
        end_k = min(first_k + share * CHUNK, k_size);
        const int row = place.first_row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        mine = w + static_cast<long long>(row) * k_size;
        rows_left = num_rows - row;
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) load(loaded[u], u);
    }

    __device__ __forceinline__ int num_chunks() const { return end_k > first_k ? (end_k - first_k + CHUNK - 1) / CHUNK : 0; }

    __device__ __forceinline__ void load(uint4 (&chunk)[STEPS][2], int index) const {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int k = first_k + index * CHUNK + s * STEP + threadIdx.x % 4 * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                chunk[s][half] = make_uint4(0, 0, 0, 0);
                if (k < end_k && 8 * half < rows_left)
                    chunk[s][half] =
                        __ldcs(reinterpret_cast<const uint4*>(mine + static_cast<long long>(8 * half) * k_size + k));
            }
        }
    }

    // Products with num_tokens tokens, `stride` elements apart, in `parts` parts that lie `part` elements apart.
    // smem: STAGES x parts x TOKENS x CHUNK halves.
    __device__ __forceinline__ void multiply(const __half* tokens, long long stride, int num_tokens, int parts, int part,
                                             __half* smem, Sums& sums) {
        const int chunks = num_chunks(), lane = threadIdx.x % 32;
        const int stage_size = parts * TOKENS * CHUNK;
        // A thread copies the same piece of every so-many-th token.
        constexpr int AT_ONCE = THREADS / PIECES;
        static_assert(TOKENS % AT_ONCE == 0 && AT_ONCE % 2 == 0, "places of a thread's pieces are the same in every token");
        const int piece = threadIdx.x % PIECES, first_token = threadIdx.x / PIECES, place = place_of(first_token, piece);
        tokens += first_token * stride + first_k + piece * 8;
        auto copy = [&](int chunk) {
            if (chunk < chunks) {
                const bool is_inside = first_k + chunk * CHUNK + piece * 8 < end_k;
#pragma unroll 1
                for (int p = 0; p < parts; ++p) {
                    const unsigned target = shared_address(smem + chunk % STAGES * stage_size + p * TOKENS * CHUNK + place);
                    const __half* source = tokens + chunk * CHUNK + p * part;
#pragma unroll 1
                    for (int i = 0; i < TOKENS; i += AT_ONCE, source += AT_ONCE * stride)
                        copy16_async(target + i * CHUNK * 2, source, is_inside && first_token + i < num_tokens);
                }
            }
            copies_commit();
        };
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[g][e] = 0.0f;
#pragma unroll 1
        for (int chunk = 0; chunk < STAGES - 1; ++chunk) copy(chunk);
#pragma unroll 1
        for (int first = 0; first < chunks; first += AHEAD)
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                const int chunk = first + u;
                if (chunk >= chunks) break;
                copies_wait<STAGES - 2>();
                __syncthreads();  // this chunk is there for all, and all are done with the one before
                copy(chunk + STAGES - 1);
                const __half* const here = smem + chunk % STAGES * stage_size;
                Sums part_sums;
                Sums& to = PARTS == 2 ? part_sums : sums;
                if (PARTS == 2) {  // tensor cores cut off what does not fit a float32 sum: short sums, added up outside them
#pragma unroll
                    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
                        for (int e = 0; e < 4; ++e) part_sums[g][e] = 0.0f;
                }
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    const uint4 top = loaded[u][s][0], low = loaded[u][s][1];
                    const unsigned first_half[4] = {top.x, low.x, top.y, low.y};
                    const unsigned second_half[4] = {top.z, low.z, top.w, low.w};
#pragma unroll 1
                    for (int p = parts - 1; p >= 0; --p) {  // the small products first
                        const __half* const piece = here + p * TOKENS * CHUNK + place_of(lane / 4, s * 4 + lane % 4);
#pragma unroll
                        for (int g = 0; g < GROUPS; ++g) {
                            const uint4 v = *reinterpret_cast<const uint4*>(piece + g * 8 * CHUNK);
                            multiply_add(to[g], first_half, v.x, v.y);
                            multiply_add(to[g], second_half, v.z, v.w);
                        }
                    }
                }
                if (PARTS == 2) {
#pragma unroll
                    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
                        for (int e = 0; e < 4; ++e) sums[g][e] += part_sums[g][e];
                }
                load(loaded[u], chunk + AHEAD);
            }
    }
};

// Add up what the blocks of a tile found, in their order, and call finish(g, sums, prepare(g)) for every group, in the block that
// is last. What `prepare` loads is needed late. `counters`: one for each tile, zero, and left so. All threads together.
template <typename Prepare, typename Finish>
__device__ __forceinline__ void add_up(const Place& at, Sums& sums, float* partial, int* counters, Prepare prepare,
                                       Finish finish) {
    using More = decltype(prepare(0));
    if (at.splits > 1) {
        __shared__ bool is_last;
        float4* const of_tile =
            reinterpret_cast<float4*>(partial) + static_cast<long long>(at.tile) * at.splits * GROUPS * THREADS;
        auto place = [&](int split, int g) { return of_tile + (split * GROUPS + g) * THREADS + threadIdx.x; };
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
            __stcg(place(at.split, g), make_float4(sums[g][0], sums[g][1], sums[g][2], sums[g][3]));
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = count_in_order(counters + at.tile) == at.splits - 1;
            if (is_last) counters[at.tile] = 0;
        }
        __syncthreads();
        if (!is_last) return;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[g][e] = 0.0f;
        constexpr int AT_ONCE = 16 / GROUPS;  // blocks whose sums are under way
#pragma unroll 1
        for (int first = 0; first < at.splits; first += AT_ONCE) {
            float4 found[AT_ONCE][GROUPS];
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g)
                    found[u][g] = first + u < at.splits ? __ldcg(place(first + u, g)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    sums[g][0] += found[u][g].x, sums[g][1] += found[u][g].y;
                    sums[g][2] += found[u][g].z, sums[g][3] += found[u][g].w;
                }
        }
    }
    More more[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) more[g] = prepare(g);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) finish(g, sums[g], more[g]);
}

// Row of W and token of sum e of group g.
__device__ __forceinline__ int row_of(const Place& at, int e) {
    return at.first_row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
}

__device__ __forceinline__ int token_of(const Place& at, int g, int e) {
    return at.first_token + 8 * g + threadIdx.x % 4 * 2 + e % 2;
}

}  // namespace few
