// Attention of one new token a sequence, or a few: the keys are shared out among blocks, cached K is normalised and rotated
// as it is read, and the block that comes to a head last adds up what the others find.
//   k' = rope(rms_norm(k) w_k);   s = q' k'^T score_scale;   attention = sum_t 2^(s_t - max s) v_t / sum_t 2^(s_t - max s)
// The new tokens' k and v are rounded to the storage dtype, appended to the cache and attended to like the rest, by those
// of them that come no earlier.
//
// Every block takes an equal run of all tiles of 16 keys (shares.cuh, alike.cuh). Where a run crosses from one head to the next the
// block sums up each on its own. Warps take the tiles in turns, each with a ring of its own and no barrier before the
// head's end.
//
// Everything but the new tokens is in the cache when this kernel begins (decode_project.cu sees to that), so it looks up
// its run and copies its first tile before it waits for q, k and v.
//
// Rotations only matter relative to each other: the query is rotated by its distance from a tile's first key, and the keys
// by 0, 1, ... 15: angles that are the same for every tile and every call, so they come as a table, with k_norm. A tile
// whose positions have gaps and span more takes a pass for every 16 positions. TOGETHER: so many times as many of all, see shares.cuh.
//
// Grid: a block a multiprocessor; block 32 WARPS threads. Shared memory: Shared in decode_shared.cuh. -D: those of call.cuh,
// HEAD_TILES (1 or 2), WARPS, WINDOW, FLOAT32_ANGLES, SEVERAL, BATCH_INVARIANT, HALVES, TOGETHER (shares.cuh), SLOW_FROM,
// HALF_TURNS (decode_scores.cuh), LEAVES_PARTS (to decode_combine.cu). Memory bound: one read of K and V. Next come the instructions of a tile
// (decode_tile.cuh).
#include "decode_sums.cuh"
#include "decode_tile.cuh"

// A thread of decode_project.cu has 88: both kernels fit a multiprocessor, and this one begins before that ends.
// More than 8 warps are 3 to a quarter of a multiprocessor, which has registers for 168 of each of their threads.
constexpr bool SHORT_OF_REGISTERS = OVERLAPPING && (WARPS > 8 || (HEAD_DIM <= 128 && HEAD_TILES == 1 && IS_ONE && !BY_PIECES));
#ifdef LEAVES_PARTS
constexpr int MOST_REGISTERS = OVERLAPPING ? 232 : 255;  // and a block of decode_combine.cu has room
#else
constexpr int MOST_REGISTERS = SHORT_OF_REGISTERS ? 168 : 255;
#endif

#ifdef LEAVES_PARTS
constexpr bool ADDS_PARTS = false;
#else
constexpr bool ADDS_PARTS = true;
#endif

extern "C" __global__ void __maxnreg__(MOST_REGISTERS)
attend_decode(const __grid_constant__ Call call)
{
    extern __shared__ __align__(512) char smem[];  // sizeof(Shared), rows at multiples of their length; see launch_decode.py
    Shared& shared = *reinterpret_cast<Shared*>(smem);
    __shared__ bool is_last;  // of the blocks that have a part in the head; or alone in it
    __shared__ int arrived;   // blocks at the head before this one; the keeper's, kept here since registers are short
    __shared__ int3 runs;  // of a head: the first block, or piece, that has a part in it, how many have, and which of them this one is
    // What is not needed within a head, since registers are short: where the first warp entered it, and how all is shared out.
    __shared__ Cursor here;
    __shared__ Shares kept_shares;

    // The next kernel begins when all blocks have said so. Half of them say when, and the others, of which some find room only when the
    // projection has ended, do not hold it up.
    const bool says_when = blockIdx.x < (gridDim.x + 1) / 2;
    if (!says_when) let_next_kernel_begin();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
    const bool is_keeper = threadIdx.x == WARPS / 2 * 32;  // of accounts; most often other warps have queries and new tokens
    const int group = call.group, queries = IS_ONE ? group : group * call.seq;  // of a KV head and sequence
    const int past = __ldcg(call.lengths + min(lane, call.batch - 1));  // on its way while tables are asked for
    __syncwarp();  // or the compiler asks for tables first
    copy_tables(call, shared);
    Shares shares;
    Cursor at;
    bool is_there;
    const int own_past = work_out_here(past);
    const auto is_alike = [&]() { return !__any_sync(0xffffffffu, own_past != __shfl_sync(0xffffffffu, own_past, 0)); };
    if (IS_ONE && !BY_PIECES && call.alike_runs > 0 && (call.batch == 1 || is_alike())) {
        is_there = enter(call, find_alike_run(call, own_past, IS_WINDOWED), own_past, shares, at);
    } else {
        const int heads_a_sequence = call.num_kv_heads * ((queries + ROWS - 1) / ROWS);
        const int runs_at_most = most_runs(call, heads_a_sequence);
        const SequenceTiles mine = sequence_tiles(call, lane, own_past);
        shares = share_out(call, heads_a_sequence, runs_at_most, mine);
        is_there = find(call, shares, mine, blockIdx.x, at);
    }
    const bool is_short = !BY_PIECES && shares.size <= WARPS;  // all of its keys and values are asked for at once
    if (is_short && says_when) let_next_kernel_begin();
    if (!is_there) {
        wait_for_previous_kernel();  // the next kernel takes the end of this one for the end of that one, too
        copies_wait<0>();
        return;
    }

#ifdef TOGETHER
    if (shares.size > WARPS) copy_more_turns(call, shared);
#endif
    const auto copy = [&](const Cursor& to, int stage, bool is_v) { copy_tile(call, shared, to, stage, is_v); };
    int new_at = -1;  // position of the sequence's last new token
    const auto append = [&](const Cursor& to, int stage) { append_new(call, shared, to, stage, at, new_at); };

    // The first tile of the ring. More of them would be in the way of the last stores of the kernel before this one, which
    // stand in line behind copies of the same multiprocessor, and new tokens come from there.
    Cursor own_first = at;
    const bool has_own = find_tile(call, shares, own_first);
#pragma unroll 1
    for (int is_v = 0; is_v < 2; ++is_v) {
        if (has_own) copy(own_first, 0, is_v);
        copies_commit();
    }
    const bool counts_on = call.positions == nullptr;
    if (!counts_on || at.past > 0)
        new_at = __ldcg(counts_on ? positions_of(call, at.b) + at.past - 1 : call.positions + at.b * call.seq + at.count - 1);
    const auto find_runs = [&](const Cursor& to) {
        if (!is_keeper) return;
        const Shares shares = kept_shares;
        runs.x = BY_PIECES ? to.begin : quotient(to.begin, shares.size);
        runs.y = BY_PIECES ? to.width : quotient(to.begin + to.width - shares.crossing - 1, shares.size) - runs.x + 1;
        runs.z = BY_PIECES || shares.in_turns ? to.piece : static_cast<int>(blockIdx.x) - runs.x;
    };
    Quads weight;
    Queries own_queries;
    load_q_norm(call, weight);
    // A new token in a warp's first tile is asked for along with q; the others of the block do not wait for it.
    constexpr bool ASKS_EARLY = IS_ONE && 2 * PIECES <= 32;
    const bool has_new = ASKS_EARLY && has_own && has_new_tokens(own_first) && lane < 2 * PIECES;
    const float* const new_source = has_new ? new_piece(call, own_first.b, 0, own_first.kv_head_idx, lane) : nullptr;
    float new_values[VECTOR];
    if (is_keeper) kept_shares = shares;
    wait_for_previous_kernel();
    // Blocks count themselves when they come to a head, ahead of any wait for others in it and in the one before. So whoever
    // is last waits only for blocks that are under way, in this head or an earlier one. All go through heads in one order, and no
    // circle of waits can be. The answer takes a while.
    const auto arrivals_at = [&](const Cursor& to) { return call.counters + to.b * kept_shares.heads + to.head; };
    const auto arrive = [&](const Cursor& to) { return ADDS_PARTS && is_keeper ? atomicAdd(arrivals_at(to), 1) : 0; };
    int before = arrive(at);
    if (has_new) load8(new_source, new_values);
    load_queries_ahead(call, at, group, own_queries);
    // The rest, while those are on their way: the projection has often ended before this kernel comes to its wait.
    if (threadIdx.x == 0) here = at;
    find_runs(at);
    if (counts_on) new_at += at.count;
    Cursor ahead = own_first;  // up to STAGES tiles further on than `at`
    if (has_own) go_on(ahead);
    bool more = has_own && find_tile(call, shares, ahead);
    if (more) copy(ahead, 1, false);
    copies_commit();
    normalise_queries(call, shared, at, group, weight, own_queries);
    if (has_new) {  // ahead of the barrier: most often others have queries to normalise
        const int position = own_first.b == at.b ? new_at : new_position(call, own_first.b, own_first.past, 0);
        store_new(call, shared, own_first, 0, own_first.past, own_first.kv_head_idx, position, lane, new_values);
    }
    if (is_keeper) arrived = before;
    copies_wait<3>();  // for all but tiles
    if (!is_short && says_when) let_next_kernel_begin();  // its weights would stand in the way of what has been waited for until now
    __syncthreads();
    if (!ASKS_EARLY && has_own) append(own_first, 0);

    int stage = 0;
    bool is_k_ahead = true;  // the k of the next tile has been asked for
    while (true) {
        const int rows = min(ROWS, queries - at.first_row);

        Sums sums;
        begin_sums(call, at, group, new_at, sums);
        const bool has_tiles = at.slot < at.end;
#pragma unroll 1
        while (at.slot < at.end) {
            if (more) {
#pragma unroll 1
                for (int is_v = is_k_ahead; is_v < 2; ++is_v) {
                    copy(ahead, stage ^ 1, is_v);
                    copies_commit();
                }
                append(ahead, stage ^ 1), go_on(ahead);
                more = find_tile(call, kept_shares, ahead);
            } else {
                if (!is_k_ahead) copies_commit();
                copies_commit();
            }
            is_k_ahead = false;
            copies_wait<3>();  // k of this tile; v and the next tile's k and v may be on their way
            __syncwarp();
            attend_tile(
                call, shared, at, stage, new_at, group, rows, sums,
                [&]() {
                    // The last tile makes room for what the warp found.
                    if (is_k_ahead || at.slot + step_from(at) >= at.end) return;
                    if (more) copy(ahead, stage, false);
                    copies_commit();
                    is_k_ahead = true;
                },
                [&]() {
                    if (is_k_ahead) {
                        copies_wait<3>();
                    } else {
                        copies_wait<2>();
                    }
                });
            __syncwarp();  // all lanes have read the tile
            at.slot += step_from(at);
            stage ^= 1;
        }

        // What the warps found, where their last tiles were; then what the block found.
        float4* const mine = reinterpret_cast<float4*>(&shared.ring[warp][stage ^ 1]);
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t) {
            if (has_tiles && 8 * t + 2 * quad < rows) {
#pragma unroll
                for (int j = 0; j < DIM_BLOCKS; ++j) {
                    const float(&out)[4] = sums.out[t][j];
                    mine[sum_index(8 * t + 2 * quad, j, lane / 4)] = make_float4(out[0], out[2], out[1], out[3]);
                }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int lanes = LEAST_LANES; lanes < 32; lanes *= 2) sums.sum[t][e] += __shfl_xor_sync(0xffffffffu, sums.sum[t][e], lanes);
                // The sign says where the sums are: in the first tile of the ring or the second.
                if (lane < 4)
                    shared.found[warp][8 * t + 2 * quad + e] = make_float2(
                        sums.nothing_seen[IS_ONE ? 0 : t][IS_ONE ? 0 : e] ? MINUS_INFINITY : sums.shift[t][e],
                        stage == 0 ? -sums.sum[t][e] : sums.sum[t][e]);
            }
        }
        // What the next head begins with is on its way while warps wait for each other.
        at = here;  // but for the place of this warp
        Cursor next = at;
        const bool goes_on = at.left > 0 && next_head(call, kept_shares, next);
        if (goes_on) {
            if (PARTS == 1) load_q_norm(call, weight);
            load_queries_ahead(call, next, group, own_queries);
            new_at = new_position(call, next.b, next.past, next.count - 1);
        }
        if (is_keeper && ADDS_PARTS) {
            is_last = arrived == runs.y - 1;
            if (is_last) *arrivals_at(at) = 0;
        } else if (is_keeper) {
            is_last = runs.y == 1;
            if (runs.z == 0) call.runs[at.b * kept_shares.heads + at.head] = make_int2(runs.x, runs.y);
        }
        if (goes_on) before = arrive(next);
        __syncthreads();
        const int first_run = runs.x, num_runs = runs.y, own_run = runs.z, head_idx = at.b * kept_shares.heads + at.head;
        const auto attention_at = [&](int r) {  // of row r
            const int query = at.first_row + r, token = IS_ONE ? 0 : query / group;
            const long long m = IS_ONE ? at.b : static_cast<long long>(at.b) * call.seq + token;
            const int q_head_idx = at.kv_head_idx * group + query - token * group;
            return attention_of(call, m, q_head_idx);
        };
        const int part_size = min(ROWS, queries) * (HEAD_DIM / 2);
        uint4* const parts = call.parts + static_cast<long long>(first_run + head_idx) * part_size;
        // A warp takes 64 dims of a row, or of two where there are many.
        constexpr int CHUNKS = (HEAD_DIM + 63) / 64, AT_ONCE = HEAD_TILES;
#pragma unroll 1
        for (int chunk = warp; chunk < rows * CHUNKS; chunk += AT_ONCE * WARPS) {
            int r[AT_ONCE], j[AT_ONCE], word[AT_ONCE];
            bool is_there[AT_ONCE];
            Found found[AT_ONCE];
            const int i = lane % 8;
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                r[n] = (chunk + n * WARPS) / CHUNKS, j[n] = (chunk + n * WARPS) % CHUNKS * 4 + lane / 8;
                word[n] = r[n] * PAIRS + j[n] * 8 + i;
                is_there[n] = (n == 0 || r[n] < rows) && j[n] < DIM_BLOCKS;
                if (is_there[n]) found[n] = sum_of_warps(shared, r[n], j[n], i);
            }
            if (!is_last) {
#pragma unroll
                for (int n = 0; n < AT_ONCE; ++n)
                    if (is_there[n]) store_word(parts + static_cast<long long>(own_run) * part_size + word[n], word_of(found[n]));
                continue;
            }
            if (ADDS_PARTS && work_out_here(num_runs) > 1)  // here: not two loops
                add_parts(found, part_size, num_runs, own_run, [&](int n) { return parts + word[n]; },
                          [&](int n) { return is_there[n]; });
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                if (is_there[n]) store_attention(call, attention_at(r[n]), found[n], j[n], i);
            }
        }
        if (!goes_on) return;
        if (is_keeper) arrived = before;
        if (PARTS == 2) load_q_norm(call, weight);  // registers are shorter there
        normalise_queries(call, shared, next, group, weight, own_queries);
        if (threadIdx.x == 0) here = next;
        __syncthreads();
        at = next;
        find_runs(at);
    }
}
