// What a block of attend_decode.cu has in shared memory, and where in it things lie.
// -D: those of shares.cuh, FLOAT32_ANGLES, SLOW_FROM, HALF_TURNS (decode_scores.cuh).
#pragma once
#include "shares.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int STAGES = 2;             // tiles of a warp's ring
constexpr int STRIDE = HEAD_DIM + 8;  // of q': an odd number of 16-byte pieces, so that ldmatrix meets no bank twice
constexpr bool SWIZZLED = HEAD_DIM % 64 == 0;
constexpr int KV_STRIDE = SWIZZLED ? HEAD_DIM : STRIDE;
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes, of a row
constexpr int PAIRS = HEAD_DIM / 2;
constexpr int TURNED = MOST_TOGETHER * TILE;  // keys that queries are rotated for at a time, at most
constexpr int HALF_BLOCKS = HEAD_DIM / 16;    // of 8 dims, of a half of a head
#ifdef SLOW_FROM
constexpr int FAST_BLOCKS = SLOW_FROM;  // whose keys are turned; those of the others are left as they are
#else
constexpr int FAST_BLOCKS = HALF_BLOCKS;
#endif
constexpr int FAST_PAIRS = 8 * FAST_BLOCKS;
#if defined(SLOW_FROM) || defined(HALF_TURNS)
#define HAS_SECOND  // from a block on queries are there twice, with k_norm: for what is multiplied by cosines, and by sines
#endif
#ifdef HALF_TURNS
constexpr int SECOND_FROM = 0;
#else
constexpr int SECOND_FROM = FAST_BLOCKS;
#endif
constexpr int SECOND_BLOCKS = HALF_BLOCKS - SECOND_FROM, SECOND_PAIRS = 8 * SECOND_BLOCKS;
constexpr int Q_ROWS = IN_HALVES ? 4 : ROWS;
constexpr int SECOND_STRIDE = 16 * SECOND_BLOCKS + 8;  // as STRIDE
// Of call.turns and call.half_turns, and of as much of them as is needed: two keys next to each other meet no bank twice.
constexpr int ALL_TURNS_STRIDE = PAIRS / 2 | 4, TURN_STRIDE = FAST_PAIRS / 2 | 4;
constexpr int ALL_TURNS_ROW = (HALF_BLOCKS + 1) / 2 * 4, TURN_ROW = (FAST_BLOCKS + 1) / 2 * 4;

struct alignas(16) Tile {
    STORAGE k[TILE * KV_STRIDE], v[TILE * KV_STRIDE];
};

// Where 16 bytes of a row of k or v lie in a tile: padded rows, or no room lost and pieces mixed up within their row.
__device__ __forceinline__ int place_of(int row, int piece) {
    return row * KV_STRIDE + (SWIZZLED ? piece ^ (row & 7) : piece) * 8;
}

// The same 16 bytes of an address, `piece` more of them on in its row, where place_of comes down to an exclusive or.
constexpr bool IS_XOR = HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256;

__device__ __forceinline__ unsigned further_address(unsigned address, int piece) { return address ^ piece * 16; }

struct alignas(16) Shared {
    Tile ring[WARPS][STAGES];
#ifdef FLOAT32_ANGLES
    float k_norm[HEAD_DIM];
#elif defined(HALF_TURNS)
    uint4 turn[TURNED * TURN_ROW];             // call.half_turns; of the first tile where one is taken at a time
#elif defined(TOGETHER)
    float4 turn[(1 + TURNED) * TURN_STRIDE];   // call.turns; of the first tile where one is taken at a time
#else
    float4 turn[TILE * FAST_PAIRS];            // call.k_turns
#endif
    __half q[WARPS][PARTS][Q_ROWS * STRIDE];   // q' for a warp's tile
#ifdef HAS_SECOND
    float4 second[SECOND_PAIRS];               // call.second_turns
    __half q_second[WARPS][Q_ROWS * SECOND_STRIDE];
#endif
    float q_norm[ROWS * HEAD_DIM];             // normalised queries, not rotated
    uint2 frequency[PAIRS];                    // of call.frequency, as much as is needed
    int positions[WARPS][STAGES][TILE];        // of the keys in the ring, but for new tokens
    float2 found[WARPS][ROWS];                 // of a warp's tiles: what scores are relative to; sum of weights, signed
};

// Where the factors of (offset, pair) lie in call.k_turns, w_low cos, w_high sin, w_high cos, w_low sin: two keys next to
// each other take a thread's two pairs in opposite order, so that reads of eight lanes meet no bank twice. Here there are fast pairs only.
__device__ __forceinline__ int turn_index(int offset, int pair) { return offset * FAST_PAIRS + (pair ^ (offset & 1)); }

constexpr int DIM_BLOCKS = HEAD_DIM / 16;

// Where sums of rows r and r + 1, r even, and of dims 16 j + i and 8 more lie among a warp's sums, in units of 16 bytes. Sums take
// the place of the tile that the warp is done with. Eight lanes that store next to each other meet no bank twice.
__device__ __forceinline__ int sum_index(int r, int j, int i) {
    return (r / 2 * DIM_BLOCKS + j) * 8 + (i ^ r % 8);
}
