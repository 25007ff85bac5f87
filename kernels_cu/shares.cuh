// How attend_decode.cu shares out cached keys among its blocks, and how a warp finds its way through them.
//
// Work is counted in tiles of 16 keys of one "head": one sequence, one KV head and up to 8 HEAD_TILES of its queries, the
// query heads of its first new token, then those of the second, and so on.
// All tiles of all heads stand in one row, sequence after sequence, head after head, and every block takes an equal run of
// it. Where heads are of equal lengths and there are no more of them than blocks, runs do not cross from one to the next; where
// lengths differ, a head counts as some tiles more, for the time it takes to get from one to the next.
// A block's warps take its tiles in turns; some neighbours at a time, where rotating the queries takes long (TOGETHER) and it comes
// out even: one rotation serves all of them. Everything follows from the lengths on the device.
//
// BATCH_INVARIANT: a head is cut into pieces that follow from its own length alone, at most MOST_PIECES of them, each summed
// up on its own. Places, widths and shares count pieces then, not tiles.
// -D: those of call.cuh, HEAD_TILES, WARPS, WINDOW, SEVERAL (more than one new token a sequence), BATCH_INVARIANT, HALVES, TOGETHER.
#pragma once
#include "alike.cuh"

constexpr int ROWS = 8 * HEAD_TILES;  // queries of a head, at most
constexpr int ALONE = 2 * WARPS;             // tiles that one block does sooner than several that have to meet
constexpr int CROSSING = 32;  // tiles that others do while a block goes from one head to the next

#ifdef SEVERAL
constexpr bool IS_ONE = false;
#else
constexpr bool IS_ONE = true;
#endif

#ifdef WINDOW
constexpr bool IS_WINDOWED = true;
#else
constexpr bool IS_WINDOWED = false;
#endif

// HALVES: a head has at most 4 queries, which are columns of products twice (decode_tile.cuh).
#ifdef HALVES
constexpr bool IN_HALVES = true;
#else
constexpr bool IN_HALVES = false;
#endif

// TOGETHER: a power of two; neighbouring tiles that a warp takes at a time, at most.
#ifdef TOGETHER
constexpr int MOST_TOGETHER = TOGETHER;
#else
constexpr int MOST_TOGETHER = 1;
#endif

#ifdef BATCH_INVARIANT
constexpr bool BY_PIECES = true;
#else
constexpr bool BY_PIECES = false;
#endif
constexpr int LEAST_PIECE = 16, MOST_PIECES = 16;  // tiles, pieces of a head

// What is counted here is not negative, which the compiler does not know.
__device__ __forceinline__ int quotient(unsigned dividend, unsigned divisor) { return dividend / divisor; }

// Tiles of a piece of a head with so many, and how many pieces that makes.
__device__ __forceinline__ int piece_size(int tiles) { return max(LEAST_PIECE, (tiles + MOST_PIECES - 1) / MOST_PIECES); }

__device__ __forceinline__ int pieces_of(int tiles) {
    const int size = piece_size(tiles);
    return (tiles + size - 1) / size;
}

// One sequence's part in the row of all tiles.
struct SequenceTiles {
    int past;        // tokens in the cache; the new ones come after them
    int count;       // of those
    int first_tile;  // before it no key is in the window
    int tiles;       // of each of its heads; 0 if it has no new token
};

// `past`: of its tokens, those in the cache.
__device__ __forceinline__ SequenceTiles sequence_tiles(const Call& call, int b, int past) {
    SequenceTiles s = {0, 1, 0, 0};
    if (b >= call.batch) return s;
    s.past = past;
    const int count = call.num_tokens != nullptr ? __ldcg(call.num_tokens + b) : IS_ONE ? 1 : call.seq;
    if (!IS_ONE) s.count = count;
    s.first_tile = first_tile(call, s.past, IS_WINDOWED);
    // New tokens at positions past the model's get their tiles; `store_new` leaves them out and the last kernel says NaN.
    s.tiles = count > 0 && s.past + s.count <= call.capacity ? end_tile(s.past, s.count) - s.first_tile : 0;
    return s;
}

__device__ __forceinline__ SequenceTiles sequence_tiles(const Call& call, int b) {
    return sequence_tiles(call, b, b < call.batch ? __ldcg(call.lengths + b) : 0);
}

// How the row of all tiles is cut: into runs of `size` tiles. With `whole_runs`, every head is taken to have the tiles of as many,
// so that runs do not cross heads; its last run is then short. Otherwise it is taken to have `crossing` more than it has.
struct Shares {
    int heads;  // of a sequence
    int size;
    int whole_runs;  // or 0; all heads have as many tiles
    int crossing;
    bool in_turns;   // runs are in the order of AlikeRun

    __device__ __forceinline__ int width(int tiles) const {
        if (BY_PIECES) return pieces_of(tiles);
        return whole_runs > 0 ? whole_runs * size : tiles > 0 ? tiles + crossing : 0;
    }
};

// Runs of a head where there are no more heads than blocks, at most; otherwise 0.
__device__ __forceinline__ int most_runs(const Call& call, int heads_a_sequence) {
    return work_out_here(quotient(gridDim.x, call.batch * heads_a_sequence));
}

// `mine` is that of sequence l, in both functions: they begin with it and look up the others.
__device__ __forceinline__ Shares share_out(const Call& call, int heads_a_sequence, int runs_at_most,
                                            const SequenceTiles& mine) {
    const int lane = threadIdx.x % 32, blocks = gridDim.x, heads = call.batch * heads_a_sequence;
    int total = 0, sequences = 0, most = 0, least = 0x7fffffff;
    if (call.batch == 1) {
        most = least = __shfl_sync(0xffffffffu, mine.tiles, 0);
        total = BY_PIECES ? pieces_of(most) : most;
    } else {
#pragma unroll 1  // code that is skipped is fetched all the same
        for (int first = 0; first < call.batch; first += 32) {
            const int tiles = first == 0 ? mine.tiles : sequence_tiles(call, first + lane).tiles;
            total += BY_PIECES ? pieces_of(tiles) : tiles;
            sequences += tiles > 0;
            most = max(most, tiles);
            if (first + lane < call.batch) least = min(least, tiles);
        }
        total = __reduce_add_sync(0xffffffffu, total);
        most = __reduce_max_sync(0xffffffffu, most);
        least = __reduce_min_sync(0xffffffffu, least);
    }
    if (!BY_PIECES && most == least && runs_at_most > 0) {
        if (most <= ALONE) return {heads_a_sequence, max(1, most), most > 0, 0};
        const int runs = min(runs_at_most, (most + WARPS - 1) / WARPS);
        const int size = max(1, small_quotient(most + runs - 1, runs));
        return {heads_a_sequence, size, small_quotient(most + size - 1, size), 0};
    }
    const int even = max(1, quotient(total * heads_a_sequence + blocks - 1, blocks));
    if (BY_PIECES) return {heads_a_sequence, even, 0, 0};
    if (most != least) {
        const int crossing = min(CROSSING, even / 2);  // it takes longer where long runs keep memory busy
        total += crossing * __reduce_add_sync(0xffffffffu, sequences);
        return {heads_a_sequence, max(quotient(total * heads_a_sequence + blocks - 1, blocks), WARPS), 0, crossing};
    }
    const int whole_heads = quotient(heads + blocks - 1, blocks) * most;  // an uneven end may cost less than crossing heads
    return {heads_a_sequence, whole_heads <= even + even / 64 ? whole_heads : even, 0, 0};
}

// A place in a block's run: the next tile of this warp, and the head it belongs to.
struct Cursor {
    int b, head;                 // head: of the sequence's
    int kv_head_idx, first_row;  // and what that is: KV head and first of its queries
    int past, count;             // as in SequenceTiles
    int width;                   // tiles a head of this sequence is taken to have
    int begin;                   // place of the head's first tile in the row of all tiles
    int piece, tiles;            // BATCH_INVARIANT: of the head, and all tiles of that; where runs are in turns: which of the head's
    int slot, end;               // of the tile's first key in the cache; of the end of this block's run in the head
    int left;                    // tiles of this block's run, after this head
    int together;                // so many of its tiles are taken at a time
    const STORAGE* k;            // what this lane copies first of a whole tile
};

__device__ __forceinline__ void go_to(const Call& call, Cursor& at, int slot) {
    at.slot = slot;
    at.k = call.k_cache + ((static_cast<long long>(at.b) * call.num_kv_heads + at.kv_head_idx) * call.capacity + slot) *
                              HEAD_DIM + threadIdx.x % 32 * 8;
}

// From a warp's tile to its next, in keys.
__device__ __forceinline__ int step_from(const Cursor& at) {
    if (MOST_TOGETHER == 1) return WARPS * TILE;
    const int last = (at.together - 1) * TILE;  // of its tiles
    return (at.slot & last) == last ? WARPS * at.together * TILE - last : TILE;
}

__device__ __forceinline__ void go_on(Cursor& at) {
    const int step = step_from(at);
    at.slot += step;
    at.k += step * HEAD_DIM;
}

// A warp's first tile of those from `tile` on. What is taken at a time begins at a multiple of as many.
__device__ __forceinline__ int first_of_warp(const Cursor& at, int tile) {
    const int warp = threadIdx.x / 32;
    return MOST_TOGETHER == 1 ? tile + warp : max((tile & -at.together) + at.together * warp, tile);
}

// How many tiles of `first` to `end` of a head warps take at a time: not so many that one of them has more to do then than rotations
// saved make up for, an eighth of a tile for each.
__device__ __forceinline__ int tiles_together(int first, int end) {
    if (MOST_TOGETHER == 1 || end - first <= WARPS) return 1;
    const auto quotient_up = [](int dividend, unsigned divisor) { return static_cast<int>((dividend + divisor - 1) / divisor); };
    const int rounds = quotient_up(end - first, WARPS);
#pragma unroll
    for (int together = MOST_TOGETHER; together > 1; together /= 2) {
        const int tiles = end - (first & -together), groups = quotient_up(tiles, together);
        // The last of them, which may be short, is all of a round, or in one with others.
        const int last = (groups - 1) % WARPS == 0 ? tiles - (groups - 1) * together : together;
        if ((quotient_up(groups, WARPS) - 1) * together + last <= rounds + rounds / 8) return together;
    }
    return 1;
}

__device__ __forceinline__ void enter_head(const Call& call, Cursor& at, int first_tile, int tiles, int from) {
    if (BY_PIECES) {
        const int size = piece_size(tiles);
        at.piece = from, at.tiles = tiles, at.left -= 1;
        at.end = (first_tile + min((from + 1) * size, tiles)) * TILE;
        go_to(call, at, (first_tile + from * size + static_cast<int>(threadIdx.x / 32)) * TILE);
        return;
    }
    const int here = min(at.left, at.width - from);
    at.left -= here;
    const int first = first_tile + from, end = first_tile + min(from + here, tiles);
    at.end = end * TILE, at.together = tiles_together(first, end);
    go_to(call, at, first_of_warp(at, first) * TILE);
}

// Go on to the next head, or piece, of the run; false if the run ends.
__device__ __forceinline__ bool next_head(const Call& call, const Shares& shares, Cursor& at) {
    if (BY_PIECES && at.left > 0 && at.piece + 1 < at.width) {
        enter_head(call, at, end_tile(at.past, at.count) - at.tiles, at.tiles, at.piece + 1);
        return true;
    }
    if (at.left <= 0) return false;
    at.begin += at.width;
    int tiles = BY_PIECES ? at.tiles : at.width - shares.crossing;  // true ones, where runs cross heads
    if (++at.kv_head_idx == call.num_kv_heads) at.kv_head_idx = 0, at.first_row += ROWS;
    if (++at.head == shares.heads) {
        at.head = at.first_row = tiles = 0;
        while (at.left > 0 && tiles == 0) {
            if (++at.b >= call.batch) {
                at.left = 0;
            } else {
                const SequenceTiles s = sequence_tiles(call, at.b);
                at.past = s.past, at.count = s.count, tiles = s.tiles;
                at.width = shares.width(tiles);
            }
        }
    }
    if (at.left <= 0) return false;
    enter_head(call, at, end_tile(at.past, at.count) - tiles, tiles, 0);
    return true;
}

// Enter a place in the row of all tiles, `from` tiles into a head of sequence s, whose heads begin at `sequence_begin`; false if
// there is none.
__device__ __forceinline__ bool enter(const Call& call, const Shares& shares, int b, const SequenceTiles& s, int width,
                                      int sequence_begin, int head, int from, Cursor& at) {
    at.b = b, at.past = s.past, at.count = s.count, at.width = width;
    at.head = head;
    const bool is_split = shares.heads > call.num_kv_heads;  // KV heads have more queries than ROWS
    const int before = is_split ? quotient(at.head, call.num_kv_heads) : 0;
    at.first_row = before * ROWS;
    at.kv_head_idx = at.head - before * call.num_kv_heads;
    at.begin = sequence_begin + at.head * width;
    at.left = shares.size;
    enter_head(call, at, s.first_tile, s.tiles, from);
    return BY_PIECES || from < s.tiles || next_head(call, shares, at);
}

// Enter a run where sequences are alike; false if there is none.
__device__ __forceinline__ bool enter(const Call& call, const AlikeRun& run, int past, Shares& shares, Cursor& at) {
    shares = {call.num_kv_heads, run.size, 0, 0, true};
    at.b = run.b, at.past = past, at.count = 1, at.width = run.tiles;
    at.head = at.kv_head_idx = run.head, at.first_row = 0;
    at.begin = (run.b * call.num_kv_heads + run.head) * call.alike_runs * run.size, at.piece = run.run, at.left = 0;
    const int first = run.first_tile + run.first, end = run.first_tile + min(run.first + run.size, run.tiles);
    at.end = end * TILE, at.together = tiles_together(first, end);
    go_to(call, at, first_of_warp(at, first) * TILE);
    return run.is_there(call);
}

// What lane `source` has of a sequence.
__device__ __forceinline__ SequenceTiles of_lane(const SequenceTiles& s, int source) {
    const auto from = [&](int value) { return __shfl_sync(0xffffffffu, value, source); };
    return {from(s.past), IS_ONE ? 1 : from(s.count), from(s.first_tile), from(s.tiles)};
}

// Find where a block's run begins; false if it has none. All lanes of a warp together.
__device__ __forceinline__ bool find(const Call& call, const Shares& shares, const SequenceTiles& mine, int block, Cursor& at) {
    const int lane = threadIdx.x % 32;
    if (shares.whole_runs > 0 && call.batch <= 32) {  // nothing has to be looked for
        // Of the head, among those of all sequences.
        const int place = shares.whole_runs == 1 ? block : small_quotient(block, shares.whole_runs);
        const int b = call.batch > 1 ? small_quotient(place, shares.heads) : 0;
        if (place >= call.batch * shares.heads) return false;
        const int width = shares.whole_runs * shares.size;
        return enter(call, shares, b, of_lane(mine, b), width, b * shares.heads * width, place - b * shares.heads,
                     (block - place * shares.whole_runs) * shares.size, at);
    }
    const int place = block * shares.size;
    int begin = 0;
#pragma unroll 1
    for (int first = 0; first < call.batch; first += 32) {
        const SequenceTiles s = first == 0 ? mine : sequence_tiles(call, first + lane);
        const int width = shares.width(s.tiles), here = width * shares.heads;
        int end = here;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int before = __shfl_up_sync(0xffffffffu, end, offset);
            if (lane >= offset) end += before;
        }
        const unsigned beyond = __ballot_sync(0xffffffffu, begin + end > place);
        if (beyond) {
            const int source = __ffs(beyond) - 1;
            const int its_width = __shfl_sync(0xffffffffu, width, source);
            const int its_begin = begin + __shfl_sync(0xffffffffu, end - here, source);
            const int head = quotient(place - its_begin, its_width);
            return enter(call, shares, first + source, of_lane(s, source), its_width, its_begin, head,
                         place - its_begin - head * its_width, at);
        }
        begin += __shfl_sync(0xffffffffu, end, 31);
    }
    return false;
}
