// Where one token each of sequences alike in length, or of one, finds its keys where there are no more heads than blocks:
// attend_decode.cu needs no search then (shares.cuh), and decode_project*.cu, which come ahead of it, know what it asks for first.
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

// First runs of all heads come before second ones. A head has call.alike_runs of them at most; no more than one of up to
// 2 call.alike_least tiles, which one block does sooner than several that have to meet, and otherwise no shorter ones than alike_least.
struct AlikeRun {
    int b, head, run;       // sequence, its head, and which of that one's runs this block has
    int first_tile, tiles;  // of the head
    int first, size;        // of this run, from the head's first tile; tiles of every run

    __device__ __forceinline__ bool is_there(const Call& call) const { return run < call.alike_runs && first < tiles; }
};

__device__ __forceinline__ AlikeRun find_alike_run(const Call& call, int past, bool is_windowed) {
    AlikeRun at;
    at.run = small_quotient(blockIdx.x, call.batch * call.num_kv_heads);
    const int place = blockIdx.x - at.run * call.batch * call.num_kv_heads;
    at.b = call.batch > 1 ? small_quotient(place, call.num_kv_heads) : 0, at.head = place - at.b * call.num_kv_heads;
    at.first_tile = first_tile(call, past, is_windowed);
    at.tiles = past < call.capacity ? end_tile(past, 1) - at.first_tile : 0;
    const int even = small_quotient(at.tiles + call.alike_runs - 1, call.alike_runs);
    at.size = at.tiles <= 2 * call.alike_least ? max(1, at.tiles) : max(call.alike_least, even);
    at.first = at.run * at.size;
    return at;
}

constexpr int AHEAD = 64;  // keys of a run; more of them would be in the way of what the layer waits for (docs/decode-tried.md)

// Ask for the first keys and values of this block's run as far as L2, since memory has nothing else to do while the layer before ends. One
// thread alone. It may come ahead of a kernel's wait: a length that is about to change, or one that differs from the first
// sequence's, makes what it asks for useless, not wrong.
__device__ __forceinline__ void prefetch_alike_run(const Call& call) {
#if __CUDA_ARCH__ >= 900
    if (call.alike_runs == 0) return;
    const int past = __ldcg(call.lengths);
    const AlikeRun run = find_alike_run(call, past, call.window > 0);
    const int slot = (run.first_tile + run.first) * TILE, keys = min(min(run.size * TILE, AHEAD), past - slot);
    if (!run.is_there(call) || keys <= 0) return;
    const long long place =
        ((static_cast<long long>(run.b) * call.num_kv_heads + run.head) * call.capacity + slot) * HEAD_DIM;
    const STORAGE* const both[2] = {call.k_cache + place, call.v_cache + place};
    for (const STORAGE* const from : both)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from),
                     "r"(keys * HEAD_DIM * static_cast<int>(sizeof(STORAGE)))
                     : "memory");
#endif
}
