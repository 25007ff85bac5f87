// A warp's ring of tiles in attend_decode.cu: copies of cached keys and values to shared memory, those of new tokens among them.
// -D: those of shares.cuh, FLOAT32_ANGLES, SLOW_FROM, HALF_TURNS (decode_scores.cuh).
#pragma once
#include "decode_queries.cuh"
#include "storage.cuh"

template <int Bytes>
__device__ __forceinline__ void copy_table(void* target, const void* source) {
#pragma unroll  // a loop would take longer than lengths do, which are on their way
    for (int first = 0; first < Bytes; first += THREADS * 16) {
        const int i = first + threadIdx.x * 16;
        if (i < Bytes) copy16_async(static_cast<char*>(target) + i, static_cast<const char*>(source) + i, true);
    }
}

// The beginnings of rows that stand STRIDE apart, one behind the other; SWAPS: of odd ones every two fours in opposite order.
template <int ROWS, int SIZE, int STRIDE, bool SWAPS = false, typename T>
__device__ __forceinline__ void copy_rows(T* target, const T* source) {
    static_assert(sizeof(T) == 16 && (!SWAPS || SIZE % 8 == 0), "pieces of 16 bytes, eight of which are two fours");
#pragma unroll
    for (int first = 0; first < ROWS * SIZE; first += THREADS) {
        const int i = first + threadIdx.x;
        const int swapped = SWAPS && i / SIZE % 2 ? i ^ 4 : i;
        if (i < ROWS * SIZE) copy16_async(target + swapped, source + i / SIZE * STRIDE + i % SIZE, true);
    }
}

// Ask for what does not depend on tokens, ahead of keys: behind them it would stand in line. All threads of a block together.
__device__ __forceinline__ void copy_tables(const Call& call, Shared& shared) {
    const auto copy = [](auto& target, const void* source) { copy_table<sizeof(target)>(&target, source); };
#ifdef FLOAT32_ANGLES
    copy(shared.k_norm, call.k_norm);
#elif defined(HALF_TURNS)
    copy_rows<TILE, TURN_ROW, ALL_TURNS_ROW, TURN_ROW % 8 == 0>(shared.turn, call.half_turns);
#elif defined(TOGETHER)
    copy_rows<1 + TILE, TURN_STRIDE, ALL_TURNS_STRIDE>(shared.turn, call.turns);
#else
    copy_rows<TILE, FAST_PAIRS, PAIRS>(shared.turn, call.k_turns);
#endif
#ifdef HAS_SECOND
    copy(shared.second, call.second_turns + 8 * SECOND_FROM);
#endif
    copy(shared.frequency, call.frequency);
    copies_commit();
}

// And for what all but the first of some tiles take.
#ifdef TOGETHER
__device__ __forceinline__ void copy_more_turns(const Call& call, Shared& shared) {
#ifdef HALF_TURNS
    copy_rows<TURNED - TILE, TURN_ROW, ALL_TURNS_ROW, TURN_ROW % 8 == 0>(shared.turn + TILE * TURN_ROW,
                                                                         call.half_turns + TILE * ALL_TURNS_ROW);
#else
    constexpr int FIRST = 1 + TILE;
    copy_rows<TURNED - TILE, TURN_STRIDE, ALL_TURNS_STRIDE>(shared.turn + FIRST * TURN_STRIDE, call.turns + FIRST * ALL_TURNS_STRIDE);
#endif
    copies_commit();
}
#endif

// Ask for the keys of a tile, and their positions, or for its values. Positions come with k: a load to registers under way would be
// waited for with whatever shares its scoreboard.
__device__ __forceinline__ void copy_tile(const Call& call, Shared& shared, const Cursor& to, int stage, bool is_v) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (!is_v && lane < TILE / 4)
        copy16_async(&shared.positions[warp][stage][4 * lane], positions_of(call, to.b) + to.slot + 4 * lane, true);
    STORAGE* const target = is_v ? shared.ring[warp][stage].v : shared.ring[warp][stage].k;
    const STORAGE* const source = is_v ? call.v_cache + (to.k - call.k_cache) : to.k;
    if (32 % PIECES == 0) {
        constexpr int ROWS_AT_ONCE = 32 / PIECES > 0 ? 32 / PIECES : 1;
        const unsigned first = shared_address(target + place_of(lane / PIECES, lane % PIECES));
        const auto place = [&](int row) {
            static_assert(!SWIZZLED || 32 % PIECES != 0 || IS_XOR, "rows and pieces are bits of an address");
            return (SWIZZLED ? further_address(first, row & 7) : first) + row * KV_STRIDE * 2;
        };
        if (to.slot + TILE <= to.past) {  // a whole tile
            const unsigned long long policy = read_once();
#pragma unroll
            for (int row = 0; row < TILE; row += ROWS_AT_ONCE) copy16_async(place(row), source + row * HEAD_DIM, true, policy);
        } else {
            const int past = work_out_here(to.past) - to.slot - lane / PIECES, end = past + to.count;  // others are new
#pragma unroll  // as a loop it took the warp with the new token a microsecond, for which the others wait
            for (int row = 0; row < TILE; row += ROWS_AT_ONCE)
                if (row < past || row >= end) copy16_async(place(row), source + row * HEAD_DIM, row < past);
        }
    } else {
#pragma unroll 1
        for (int i = lane; i < TILE * PIECES; i += 32) {
            const int row = i / PIECES, piece = i % PIECES, slot = to.slot + row;
            if (slot < to.past || slot >= to.past + to.count)  // others are new
                copy16_async(target + place_of(row, piece), source + (i - lane) * 8, slot < to.past);
        }
    }
}

__device__ __forceinline__ bool has_new_tokens(const Cursor& to) { return to.past - to.slot < TILE; }

// Eight elements of a new token: piece i of its k, or piece i - PIECES of its v.
__device__ __forceinline__ const float* new_piece(const Call& call, int b, int token, int kv_head_idx, int i) {
    const int head = call.num_q_heads + kv_head_idx + (i >= PIECES ? call.num_kv_heads : 0);
    return qkv_of(call, b, token) + head * HEAD_DIM + i % PIECES * VECTOR;
}

// Store them in the tile they belong to and in the cache. `position`: of the sequence's last new token.
__device__ __forceinline__ void store_new(const Call& call, Shared& shared, const Cursor& to, int stage, int slot,
                                          int kv_head_idx, int position, int i, const float (&values)[VECTOR]) {
    const int warp = threadIdx.x / 32, piece = i % PIECES;
    const bool is_v = i >= PIECES;
    STORAGE* const target = is_v ? shared.ring[warp][stage].v : shared.ring[warp][stage].k;
    store8(target + place_of(slot - to.slot, piece), values);
    STORAGE* const cached = is_v ? call.v_cache : call.k_cache;
    const long long row = (static_cast<long long>(to.b) * call.num_kv_heads + kv_head_idx) * call.capacity + slot;
    // One block of a group appends, and none what the last kernel calls a fault.
    if (to.first_row == 0 && position < call.max_position) store8(cached + row * HEAD_DIM + piece * VECTOR, values);
}

// Append the new tokens that belong to a tile to the cache and to the tile. `at`, `new_at`: the head in use, and the position of the
// last new token of its sequence.
__device__ __forceinline__ void append_new(const Call& call, Shared& shared, const Cursor& to, int stage, const Cursor& at,
                                           int new_at) {
    if (!has_new_tokens(to)) return;
    const int lane = threadIdx.x % 32;
    // Few tiles come this far: no part of it is to be worked out ahead of that.
    const int past = work_out_here(to.past), kv_head_idx = work_out_here(to.kv_head_idx);
    const int position = to.b == at.b ? new_at : new_position(call, to.b, past, to.count - 1);
    const int end = IS_ONE ? past + 1 : min(past + to.count, to.slot + TILE);
#pragma unroll 1
    for (int slot = IS_ONE ? past : max(past, to.slot); slot < end; ++slot) {
#pragma unroll 1
        for (int i = lane; i < 2 * PIECES; i += 32) {
            float values[VECTOR];
            load8(new_piece(call, to.b, slot - past, kv_head_idx, i), values);
            store_new(call, shared, to, stage, slot, kv_head_idx, position, i, values);
        }
        if (IS_ONE) break;
    }
}

// This warp's next tile, be it of another head; false if there is none.
__device__ __forceinline__ bool find_tile(const Call& call, const Shares& shares, Cursor& to) {
    bool is_there = true;
    while (is_there && to.slot >= to.end) is_there = next_head(call, shares, to);
    return is_there;
}
