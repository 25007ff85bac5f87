// Where the one token of a lone sequence finds its keys, when a head may have several runs of them: attend_decode.cu needs no
// search then (shares.cuh).
#pragma once
#include "call.cuh"

constexpr int TILE = 16;  // keys

// The quotient of what is not negative, in half the time, for a dividend below 2^21: the half keeps it clear of whole numbers by more
// than rounding takes. So heads have up to 2^20 tiles, 16 million keys.
__device__ __forceinline__ int small_quotient(int dividend, int divisor) {
    return static_cast<int>(__fdividef(dividend + 0.5f, divisor));
}

// First tile past those of a sequence with `past` tokens in the cache and `count` new ones.
__device__ __forceinline__ int end_tile(int past, int count) { return (past + count - 1) / TILE + 1; }

// First tile in the window of a token that comes after `past`: positions rise at least as fast as places.
__device__ __forceinline__ int first_tile(const Call& call, int past, bool is_windowed) {
    return is_windowed ? max(0, past - call.window + 1) / TILE : 0;
}

// First runs of all heads come before second ones. A head has call.lone_runs of them at most; no more than one of up to
// 2 call.lone_least tiles, which one block does sooner than several that have to meet, and otherwise no shorter ones than lone_least.
struct LoneRun {
    int head, run;          // of the head's runs, this block's
    int first_tile, tiles;  // of the head
    int first, size;        // of this run, from the head's first tile; tiles of every run

    __device__ __forceinline__ bool is_there(const Call& call) const { return run < call.lone_runs && first < tiles; }
};

__device__ __forceinline__ LoneRun find_lone_run(const Call& call, int past, bool is_windowed) {
    LoneRun at;
    at.run = small_quotient(blockIdx.x, call.num_kv_heads), at.head = blockIdx.x - at.run * call.num_kv_heads;
    at.first_tile = first_tile(call, past, is_windowed);
    at.tiles = past < call.capacity ? end_tile(past, 1) - at.first_tile : 0;
    const int even = small_quotient(at.tiles + call.lone_runs - 1, call.lone_runs);
    at.size = at.tiles <= 2 * call.lone_least ? max(1, at.tiles) : max(call.lone_least, even);
    at.first = at.run * at.size;
    return at;
}
