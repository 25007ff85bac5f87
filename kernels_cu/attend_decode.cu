// Attention of one new token a sequence, or a few: the keys are shared out among blocks, cached K is normalised and rotated
// as it is read, and the block that finishes last for a head adds up what the others found.
//   k' = rope(rms_norm(k) w_k);   s = q' k'^T score_scale;   attention = sum_t 2^(s_t - max s) v_t / sum_t 2^(s_t - max s)
// The new tokens' k and v are rounded to the storage dtype, appended to the cache and attended to like the rest, by those
// of them that come no earlier.
//
// Every block takes an equal run of all tiles of 16 keys (shares.cuh). Where a run crosses from one head to the next the
// block sums up each on its own. Warps take the tiles in turns, each with a ring of its own and no barrier before the
// head's end.
//
// Everything but the new tokens is in the cache when this kernel begins (decode_project.cu sees to that), so it looks up
// its run and copies its first tile before it waits for q, k and v.
//
// Rotations only matter relative to each other: the query is rotated by its distance from a tile's first key, and the keys
// by 0, 1, ... 15: angles that are the same for every tile and every call, so they come as a table, k_norm in them. A tile
// whose positions have gaps and span more takes a pass for every 16 positions.
//
// Grid: a block a multiprocessor; block 32 WARPS threads. Shared memory: Shared in decode_shared.cuh. -D: those of call.cuh,
// HEAD_TILES (1 or 2), WARPS, WINDOW, FLOAT32_ANGLES, SEVERAL, BATCH_INVARIANT (shares.cuh). Memory bound: one read of K and
// V. Next come the instructions that make k', so scores are k' q'^T and sums v^T p^T: keys and dims are the rows of
// products, queries, of which there are few, the columns. Even squares of keys are products: the diagonal of k k^T.
#include "decode_queries.cuh"
#include "decode_sums.cuh"

// A thread of decode_project.cu has 88: both kernels fit a multiprocessor, and this one begins before that ends.
// More than 8 warps are 3 to a quarter of a multiprocessor, which has registers for 168 of each of their threads.
constexpr bool SHORT_OF_REGISTERS = OVERLAPPING && (WARPS > 8 || (HEAD_DIM <= 128 && HEAD_TILES == 1 && IS_ONE));
constexpr int MOST_REGISTERS = SHORT_OF_REGISTERS ? 168 : 255;
constexpr int D_BLOCKS = HEAD_DIM / 8;

// Where angles come from the table, keys are rotated as they were cached and the norm goes to their scores. The table is so much
// smaller than float16 allows for normalised keys; those whose reciprocal norm is not between these are first brought near one.
#ifdef FLOAT32_ANGLES
constexpr bool NORMALISES_SCORES = false;
#else
constexpr bool NORMALISES_SCORES = true;
#endif
constexpr float TURN_UNSCALE = 8.0f, LEAST_RSTD = 0.07f, MOST_RSTD = PARTS == 2 ? 16.0f : 2048.0f;

// A value the compiler takes to be unknown until here.
__device__ __forceinline__ int work_out_here(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Ask for what does not depend on tokens, ahead of keys: behind them it would stand in line.
__device__ __forceinline__ void copy_tables(const Call& call, Shared& shared) {
    const auto copy = [](void* target, const void* source, int bytes) {
#pragma unroll 1
        for (int i = threadIdx.x * 16; i < bytes; i += THREADS * 16)
            copy16_async(static_cast<char*>(target) + i, static_cast<const char*>(source) + i, true);
    };
#ifdef FLOAT32_ANGLES
    copy(shared.k_norm, call.k_norm, sizeof(shared.k_norm));
#else
    copy(shared.turn, call.k_turns, sizeof(shared.turn));
#endif
    copy(shared.frequency, call.frequency, sizeof(shared.frequency));
    copies_commit();
}

extern "C" __global__ void __maxnreg__(MOST_REGISTERS)
attend_decode(const __grid_constant__ Call call)
{
    extern __shared__ __align__(512) char smem[];  // sizeof(Shared), rows at multiples of their length; see launch.py
    Shared& shared = *reinterpret_cast<Shared*>(smem);
    __shared__ bool is_last;
    __shared__ int2 runs;  // of a head: the first block, or piece, that has a part in it, and how many have
    // What is not needed within a head, since registers are short: where the first warp entered it, and how all is shared out.
    __shared__ Cursor here;
    __shared__ Shares kept_shares;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
    const int group = call.num_q_heads / call.num_kv_heads;
    const int queries = IS_ONE ? group : group * call.seq;  // of a KV head and sequence
    const int heads_a_sequence = call.num_kv_heads * ((queries + ROWS - 1) / ROWS);
    const SequenceTiles mine = sequence_tiles(call, lane);
    const Shares shares = share_out(call, heads_a_sequence, mine);
    Cursor at;
    if (!find(call, shares, mine, blockIdx.x * shares.size, at)) {
        wait_for_previous_kernel();  // the next kernel takes the end of this one for the end of that one, too
        return;
    }
    copy_tables(call, shared);

    // Copying: `ahead` is up to STAGES tiles before the one in use. Positions come with k: a load to registers under way
    // would be waited for with whatever shares its scoreboard.
    const unsigned long long policy = read_once();
    const auto copy = [&](const Cursor& to, int stage, bool is_v) {
        if (!is_v && lane < TILE / 4)
            copy16_async(&shared.positions[warp][stage][4 * lane], positions_of(call, to.b) + to.slot + 4 * lane, true);
        STORAGE* const target = is_v ? shared.ring[warp][stage].v : shared.ring[warp][stage].k;
        const STORAGE* const source = is_v ? call.v_cache + (to.k - call.k_cache) : to.k;
        if (32 % PIECES == 0 && to.slot + TILE <= to.past) {  // a whole tile
            constexpr int ROWS_AT_ONCE = 32 / PIECES > 0 ? 32 / PIECES : 1;
            const unsigned first = shared_address(target + place_of(lane / PIECES, lane % PIECES));
#pragma unroll
            for (int row = 0; row < TILE; row += ROWS_AT_ONCE) {
                unsigned place = first + row * KV_STRIDE * 2;
                if (SWIZZLED) {
                    static_assert(!SWIZZLED || 32 % PIECES != 0 || IS_XOR, "rows and pieces are bits of an address");
                    place = further_address(first, row & 7) + row * KV_STRIDE * 2;
                }
                copy16_async(place, source + row * HEAD_DIM, true, policy);
            }
        } else {
#pragma unroll 1
            for (int i = lane; i < TILE * PIECES; i += 32) {
                const int row = i / PIECES, piece = i % PIECES, slot = to.slot + row;
                if (slot < to.past || slot >= to.past + to.count)  // others are new
                    copy16_async(target + place_of(row, piece), source + (i - lane) * 8, slot < to.past);
            }
        }
    };
    const auto has_new_tokens = [](const Cursor& to) { return to.past - to.slot < TILE; };
    int new_at = -1;  // position of the sequence's last new token
    // Append the new tokens that belong to the tile to the cache and to the tile.
    const auto append = [&](const Cursor& to, int stage) {
        if (!has_new_tokens(to)) return;
        // Few tiles come this far: no part of it is to be worked out ahead of that.
        const int past = work_out_here(to.past), kv_head_idx = work_out_here(to.kv_head_idx);
        const int position = to.b == at.b ? new_at : new_position(call, to.b, past, to.count - 1);
        const int end = IS_ONE ? past + 1 : min(past + to.count, to.slot + TILE);
#pragma unroll 1
        for (int slot = IS_ONE ? past : max(past, to.slot); slot < end; ++slot) {
#pragma unroll 1
            for (int i = lane; i < 2 * PIECES; i += 32) {
                const bool is_v = i >= PIECES;
                const int d = (is_v ? i - PIECES : i) * VECTOR;
                float values[VECTOR];
                load8(qkv_of(call, to.b, slot - past) +
                          (call.num_q_heads + (is_v ? call.num_kv_heads : 0) + kv_head_idx) * HEAD_DIM + d, values);
                STORAGE* const target = is_v ? shared.ring[warp][stage].v : shared.ring[warp][stage].k;
                store8(target + place_of(slot - to.slot, d / VECTOR), values);
                STORAGE* const cached = is_v ? call.v_cache : call.k_cache;
                const long long row = (static_cast<long long>(to.b) * call.num_kv_heads + kv_head_idx) * call.capacity + slot;
                // One block of a group appends, and none what the last kernel calls a fault.
                if (to.first_row == 0 && position < call.max_position) store8(cached + row * HEAD_DIM + d, values);
            }
            if (IS_ONE) break;
        }
    };
    const auto find_tile = [&](Cursor& to, const Shares& shares) {  // this warp's next, be it of another head
        bool is_there = true;
        while (is_there && to.slot >= to.end) is_there = next_head(call, shares, to);
        return is_there;
    };

    // Its load is waited for by nothing before that of q.
    const bool counts_on = call.positions == nullptr;
    if (!counts_on || at.past > 0)
        new_at = __ldcg(counts_on ? positions_of(call, at.b) + at.past - 1 : call.positions + at.b * call.seq + at.count - 1);

    // The first tile of the ring. More of them would be in the way of the last stores of the kernel before this one, which
    // stand in line behind copies of the same multiprocessor, and new tokens come from there.
    Cursor own_first = at;
    const bool has_own = find_tile(own_first, shares);
#pragma unroll 1
    for (int is_v = 0; is_v < 2; ++is_v) {
        if (has_own) copy(own_first, 0, is_v);
        copies_commit();
    }
    Cursor ahead = own_first;
    if (has_own) go_on(ahead);
    bool more = has_own && find_tile(ahead, shares);
    if (threadIdx.x == 0) kept_shares = shares, here = at;
    const auto find_runs = [&](const Cursor& to) {
        if (threadIdx.x > 0) return;
        const Shares shares = kept_shares;
        runs.x = BY_PIECES ? to.begin : to.begin / shares.size;
        runs.y = BY_PIECES ? to.width : (to.begin + to.width - shares.crossing - 1) / shares.size - runs.x + 1;
    };
    find_runs(at);
    clear_queries(shared);
    Quads weight, own_query;
    load_q_norm(call, weight);
    wait_for_previous_kernel();
    load_query(call, at, group, warp, own_query);  // ahead of a new token's k and v
    if (counts_on) new_at += at.count;
    if (has_own) append(own_first, 0);
    if (more) copy(ahead, 1, false);
    copies_commit();

    normalise_queries(call, shared, at, group, weight, own_query);
    copies_wait<3>();  // for all but tiles
    let_next_kernel_begin();  // its weights would stand in the way of what has been waited for until now
    __syncthreads();

    int stage = 0;
    bool is_k_ahead = true;  // the k of the next tile has been asked for
    while (true) {
        const int rows = min(ROWS, queries - at.first_row);

        float out[HEAD_TILES][D_BLOCKS / 2][4];  // [.][16 dims]: dims l / 4 and 8 more, heads 2 (l % 4) + {0, 1}
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
            for (int j = 0; j < D_BLOCKS / 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[t][j][e] = 0.0f;
        // Of heads 8 t + 2 (l % 4) + {0, 1}: what scores are taken relative to, and the sum of this lane's weights.
        float shift[HEAD_TILES][2] = {}, sum[HEAD_TILES][2] = {};
        // Whether no key was seen yet: one new token sees all that are; of several, and by window, each its own.
        bool nothing_seen[IS_ONE ? 1 : HEAD_TILES][IS_ONE ? 1 : 2];
        int seen_from[IS_ONE ? 1 : HEAD_TILES][IS_ONE ? 1 : 2];
        const auto token_of = [&](int t, int e) {  // worked out where it is needed, which is seldom: registers are short
            return IS_ONE ? 0 : min((work_out_here(at.first_row) + 8 * t + 2 * quad + e) / group, at.count - 1);
        };
#pragma unroll
        for (int t = 0; t < (IS_ONE ? 1 : HEAD_TILES); ++t)
#pragma unroll
            for (int e = 0; e < (IS_ONE ? 1 : 2); ++e) {
                nothing_seen[t][e] = true;
#ifdef WINDOW
                seen_from[t][e] = (IS_ONE ? new_at : new_position(call, at.b, at.past, token_of(t, e))) - call.window + 1;
#else
                seen_from[t][e] = 0;
#endif
            }

        const bool has_tiles = at.slot < at.end;
#pragma unroll 1
        while (at.slot < at.end) {
#pragma unroll 1
            for (int is_v = is_k_ahead; is_v < 2; ++is_v) {
                if (more) copy(ahead, stage ^ 1, is_v);
                copies_commit();
            }
            is_k_ahead = false;
            if (more) append(ahead, stage ^ 1), go_on(ahead);
            more = more && find_tile(ahead, kept_shares);
            copies_wait<3>();  // k of this tile; v and the next tile's k and v may be on their way
            __syncwarp();
            const STORAGE* const k_smem = shared.ring[warp][stage].k;
            const STORAGE* const v_smem = shared.ring[warp][stage].v;
            const int last = min(TILE - 1, at.past + at.count - 1 - at.slot);  // key
            const int own_slot = at.slot + lane % TILE;
            int own_position = shared.positions[warp][stage][lane % TILE];
            if (IS_ONE && own_slot >= at.past) own_position = new_at;
            if (!IS_ONE && own_slot >= at.past && own_slot < at.past + at.count)
                own_position = new_position(call, at.b, at.past, own_slot - at.past);
            const int first_position = __shfl_sync(0xffffffffu, own_position, 0);
            const int last_position = __shfl_sync(0xffffffffu, own_position, last);

            // 16 keys: [step][2 n + half] has dims 2 (l % 4) + {0, 1} of a block of that half, of key 8 n + l / 4.
            const int key_row = lane / 16 * 8 + lane % 8, k_half = lane / 8 % 2;
            const unsigned k_address = shared_address(k_smem + place_of(key_row, k_half * HALF_BLOCKS));
            unsigned k_raw[HALF_BLOCKS][4];
            float squares[2][2][4] = {};  // k k^T of [keys 0 to 7, 8 to 15][lower, upper half], of which the diagonal counts
#pragma unroll
            for (int j = 0; j < HALF_BLOCKS; ++j)
                load_matrices(k_raw[j], IS_XOR ? further_address(k_address, j)
                                               : shared_address(k_smem + place_of(key_row, j + k_half * HALF_BLOCKS)));
#pragma unroll
            for (int j = 0; j < HALF_BLOCKS; ++j)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        multiply_add_8(squares[n][half], k_raw[j][2 * n], k_raw[j][2 * n + 1], k_raw[j][2 * n + half],
                                       STORAGE());
            float rstd[2];
            int offsets[2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const bool odd = lane / 4 % 2;
                const float own = (odd ? squares[n][0][1] : squares[n][0][0]) + (odd ? squares[n][1][3] : squares[n][1][2]);
                rstd[n] = __shfl_sync(0xffffffffu, own, lane & 28 | lane / 8);
                rstd[n] = rsqrtf(rstd[n] * (1.0f / HEAD_DIM) + call.eps);
                offsets[n] = __shfl_sync(0xffffffffu, own_position, n * 8 + lane / 4);
            }
            float score_scale[2] = {call.score_scale, call.score_scale};
            if (NORMALISES_SCORES) {
                const auto is_far = [&](int n) { return !(rstd[n] > LEAST_RSTD && rstd[n] <= MOST_RSTD); };
                if (__any_sync(0xffffffffu, is_far(0) || is_far(1))) {
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        const float power = fminf(__uint_as_float(__float_as_uint(rstd[n]) & 0x7f800000u), 32768.0f);
                        const unsigned pair = pack(power, power, STORAGE());
                        rstd[n] = __fdividef(rstd[n], power);
#pragma unroll
                        for (int j = 0; j < HALF_BLOCKS; ++j)
#pragma unroll
                            for (int half = 0; half < 2; ++half)
                                k_raw[j][2 * n + half] = multiply_pairs(k_raw[j][2 * n + half], pair, STORAGE());
                    }
                }
                score_scale[0] *= rstd[0] * TURN_UNSCALE, score_scale[1] *= rstd[1] * TURN_UNSCALE;
            }
            const bool has_new = has_new_tokens(at);
            const auto is_hidden = [&](int n, int t, int e) {
                const int key = n * 8 + lane / 4;
                if (IS_ONE) return key > last || offsets[n] < seen_from[0][0];
                return (has_new && at.slot + key > at.past + token_of(t, e)) || offsets[n] < seen_from[t][e];
            };

            // The table spans TILE positions: keys further apart than that take several passes.
#ifndef FLOAT32_ANGLES
            const bool gaps = last_position - first_position >= TILE;
            for (int base = first_position;;) {
#else
            {
                constexpr int base = 0;
                constexpr bool gaps = false;
#endif
#ifdef FLOAT32_ANGLES
                rotate_queries(shared, rows, IS_ONE ? new_at : 0);
#else
                rotate_queries(shared, rows, new_at - base);
#endif
                __syncwarp();
                if (at.slot + WARPS * TILE < at.end && !is_k_ahead) {  // the last tile makes room for what the warp found
                    if (more) copy(ahead, stage, false);
                    copies_commit();
                    is_k_ahead = true;
                }

                float scores[HEAD_TILES][4] = {};  // keys l / 4 and 8 more, heads 2 (l % 4) + {0, 1}
#ifndef FLOAT32_ANGLES
                const float4* turns[2][2];
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd)
                        turns[n][odd] = shared.turn + turn_index((offsets[n] - base) & (TILE - 1), quad * 2 + odd);
#endif
                const auto turn_of = [&](int n, int j, int odd) {
#ifdef FLOAT32_ANGLES
                    const int pair = j * 8 + quad * 2 + odd;
                    float cosine, sine;
                    rotation(offsets[n], shared.frequency[pair], cosine, sine);
                    const float low = shared.k_norm[pair], high = shared.k_norm[pair + PAIRS];
                    return make_float4(low * cosine, high * sine, high * cosine, low * sine);
#else
                    return turns[n][odd][j * 8];
#endif
                };
                unsigned q_frag[HEAD_TILES][PARTS][4];
#pragma unroll
                for (int j = 0; j < HALF_BLOCKS; ++j) {
                    if (j % 2 == 0) {
#pragma unroll
                        for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
                            for (int p = 0; p < PARTS; ++p) load_queries(q_frag[t][p], shared.q[warp][p], t, j);
                    }
                    unsigned k_frag[4], k_rest[4];
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        const float4 even = turn_of(n, j, 0), odd = turn_of(n, j, 1);
                        // Or bfloat16 would be widened before the loop over passes, to more floats than there are registers.
                        float2 a = unpack(work_out_here(k_raw[j][2 * n]), STORAGE());
                        float2 c = unpack(work_out_here(k_raw[j][2 * n + 1]), STORAGE());
                        if (!NORMALISES_SCORES) a.x *= rstd[n], a.y *= rstd[n], c.x *= rstd[n], c.y *= rstd[n];
                        const float2 low = make_float2(a.x * even.x - c.x * even.y, a.y * odd.x - c.y * odd.y);
                        const float2 high = make_float2(c.x * even.z + a.x * even.w, c.y * odd.z + a.y * odd.w);
                        k_frag[n] = pack(low.x, low.y);
                        k_frag[n + 2] = pack(high.x, high.y);
                        if (PARTS == 2) {
                            k_rest[n] = pack_rest(low.x, low.y, k_frag[n]);
                            k_rest[n + 2] = pack_rest(high.x, high.y, k_frag[n + 2]);
                        }
                    }
#pragma unroll
                    for (int t = 0; t < HEAD_TILES; ++t) {
                        const unsigned(&q)[PARTS][4] = q_frag[t];
                        const int two = j % 2 * 2;
                        if constexpr (PARTS == 2) {  // the small products first
                            multiply_add(scores[t], k_frag, q[1][two], q[1][two + 1]);
                            multiply_add(scores[t], k_rest, q[0][two], q[0][two + 1]);
                        }
                        multiply_add(scores[t], k_frag, q[0][two], q[0][two + 1]);
                    }
                }
#pragma unroll
                for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        scores[t][e] *= score_scale[e / 2];
                        if (is_hidden(e / 2, IS_ONE ? 0 : t, IS_ONE ? 0 : e % 2) ||
                            (gaps && static_cast<unsigned>(offsets[e / 2] - base) >= TILE))
                            scores[t][e] = MINUS_INFINITY;
                    }

                // Weights are relative to a score that was the largest once; it is raised when that is MOST too small.
                float weights[HEAD_TILES][4];
                const auto weigh = [&]() {
                    float most = MINUS_INFINITY;
#pragma unroll
                    for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            weights[t][e] = scores[t][e] - shift[t][e % 2];
                            // Rows past the last have what was left of another head.
                            if (!BY_PIECES || 8 * t + 2 * quad + e % 2 < rows) most = fmaxf(most, weights[t][e]);
                        }
                    return most;
                };
                bool raise = weigh() > MOST;
#pragma unroll
                for (int t = 0; t < (IS_ONE ? 1 : HEAD_TILES); ++t)
#pragma unroll
                    for (int e = 0; e < (IS_ONE ? 1 : 2); ++e) raise = raise || nothing_seen[t][e];
                if (__any_sync(0xffffffffu, raise)) {
                    bool seen = false;
#pragma unroll
                    for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float most = fmaxf(weights[t][e], weights[t][e + 2]);
#pragma unroll
                            for (int lanes = 4; lanes < 32; lanes *= 2)
                                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes));
                            const float before = shift[t][e];
                            bool& nothing = nothing_seen[IS_ONE ? 0 : t][IS_ONE ? 0 : e];
                            if (most > MINUS_INFINITY && (nothing || most > 0.0f)) shift[t][e] += most;
                            seen = seen || most > MINUS_INFINITY;
                            const float shrink = nothing ? 0.0f : exp2f(before - shift[t][e]);
                            sum[t][e] *= shrink;
                            if (!IS_ONE) nothing = nothing && !(most > MINUS_INFINITY);
                            if (IS_ONE && nothing) continue;
#pragma unroll
                            for (int j = 0; j < D_BLOCKS / 2; ++j) out[t][j][e] *= shrink, out[t][j][e + 2] *= shrink;
                        }
                    if (IS_ONE) nothing_seen[0][0] = nothing_seen[0][0] && !__any_sync(0xffffffffu, seen);
                    weigh();
                }

                // Weights of 8 keys and 8 heads as B fragments. bfloat16 has too few bits for them: what rounding leaves is
                // a second product.
                unsigned p_frag[HEAD_TILES][2], p_rest[HEAD_TILES][2];
#pragma unroll
                for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        const float low = exp2f(weights[t][2 * n]), high = exp2f(weights[t][2 * n + 1]);
                        sum[t][0] += low, sum[t][1] += high;
                        const unsigned rounded = pack(low, high, STORAGE());
                        p_frag[t][n] = transpose(rounded);
                        p_rest[t][n] = transpose(pack_rest(low, high, rounded, STORAGE()));
                    }
                if (is_k_ahead) {
                    copies_wait<3>();
                } else {
                    copies_wait<2>();
                }
                __syncwarp();
                const unsigned v_address = shared_address(v_smem + place_of(lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
                for (int j = 0; j < D_BLOCKS / 2; ++j) {
                    unsigned v_frag[4];  // 16 dims x 16 keys
                    load_matrices_transposed(v_frag, IS_XOR ? further_address(v_address, 2 * j) :
                        shared_address(v_smem + place_of(lane / 16 * 8 + lane % 8, 2 * j + lane / 8 % 2)));
#pragma unroll
                    for (int t = 0; t < HEAD_TILES; ++t) {
                        if (!STORED_AS_FLOAT16) multiply_add(out[t][j], v_frag, p_rest[t][0], p_rest[t][1], STORAGE());
                        multiply_add(out[t][j], v_frag, p_frag[t][0], p_frag[t][1], STORAGE());
                    }
                }
#ifndef FLOAT32_ANGLES
                if (!gaps) break;
                const unsigned beyond = __ballot_sync(0xffffffffu, lane <= last && own_position - base >= TILE);
                if (!beyond) break;
                base = __shfl_sync(0xffffffffu, own_position, __ffs(beyond) - 1);
#endif
            }
            __syncwarp();  // all lanes have read the tile
            at.slot += WARPS * TILE;
            stage ^= 1;
        }

        // What the warps found, where their last tiles were; then what the block found.
        float* const mine = reinterpret_cast<float*>(&shared.ring[warp][stage ^ 1]);
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t) {
            if (has_tiles) {
#pragma unroll
                for (int i = 0; i < D_BLOCKS; ++i) {  // sum_index, its last bits worked out first
                    const int d = SWIZZLED ? i / 4 * 32 + (i % 4 * 8 ^ quad * 8) : i * 8;
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        mine[(8 * t + 2 * quad + e) * SUM_STRIDE + d + lane / 4] = out[t][i / 2][i % 2 * 2 + e];
                }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) sum[t][e] += __shfl_xor_sync(0xffffffffu, sum[t][e], lanes);
                // The sign says where the sums are: in the first tile of the ring or the second.
                if (lane < 4)
                    shared.found[warp][8 * t + 2 * quad + e] = make_float2(
                        nothing_seen[IS_ONE ? 0 : t][IS_ONE ? 0 : e] ? MINUS_INFINITY : shift[t][e],
                        stage == 0 ? -sum[t][e] : sum[t][e]);
            }
        }
        // What the next head begins with is on its way while warps wait for each other.
        at = here;  // but for the place of this warp
        Cursor next = at;
        const bool goes_on = at.left > 0 && next_head(call, kept_shares, next);
        if (goes_on) {
            if (PARTS == 1) load_q_norm(call, weight);
            load_query(call, next, group, warp, own_query);
            new_at = new_position(call, next.b, next.past, next.count - 1);
        }
        __syncthreads();
        const int first_run = runs.x, num_runs = runs.y, head_idx = at.b * kept_shares.heads + at.head;
        const auto attention_of = [&](int i) {  // of element i of the queries, one after the other
            const int query = at.first_row + i / HEAD_DIM, token = IS_ONE ? 0 : query / group;
            const long long m = IS_ONE ? at.b : static_cast<long long>(at.b) * call.seq + token;
            const int head_idx = at.kv_head_idx * group + query - token * group;
            return call.attention + (m * call.num_q_heads + head_idx) * HEAD_DIM + i % HEAD_DIM;
        };
        const auto write_attention = [&](int i, const Found& found) {  // of elements i and i + 1
            const float x = found.value.x / found.sum, y = found.value.y / found.sum;
            *reinterpret_cast<unsigned*>(attention_of(i)) = pack(x * call.v_scale, y * call.v_scale);
        };
        float* const parts = call.partial + static_cast<long long>(first_run + head_idx) * PART;
        const int own_run = BY_PIECES ? at.piece : static_cast<int>(blockIdx.x) - first_run;
        float* const own_part = parts + static_cast<long long>(own_run) * PART;
        // A warp takes 64 dims of a row.
        constexpr int CHUNKS = (HEAD_DIM + 63) / 64;
#pragma unroll 1
        for (int chunk = warp; chunk < rows * CHUNKS; chunk += WARPS) {
            const int r = chunk / CHUNKS, d = chunk % CHUNKS * 64 + 2 * lane, i = r * HEAD_DIM + d;
            const Found found = sum_of_warps(shared, r, min(d, HEAD_DIM - 2));
            if (d >= HEAD_DIM) continue;
            if (work_out_here(num_runs) == 1) {  // here: not two loops
                write_attention(i, found);
            } else {
                *reinterpret_cast<float2*>(own_part + i) = found.value;
                if (d == 0) found_of_part(own_part)[r] = make_float2(found.largest, found.sum);
            }
        }
        if (goes_on) {
            if (PARTS == 2) load_q_norm(call, weight);  // registers are shorter there
            normalise_queries(call, shared, next, group, weight, own_query);
            if (threadIdx.x == 0) here = next;
        }
        __syncthreads();
        if (num_runs > 1) {
            if (threadIdx.x == 0) {
                is_last = count_in_order(call.counters + head_idx) == num_runs - 1;
                if (is_last) call.counters[head_idx] = 0;
            }
            __syncthreads();
            if (is_last)
                for (int i = 2 * threadIdx.x; i < rows * HEAD_DIM; i += 2 * THREADS)
                    write_attention(i, sum_of_runs(parts, num_runs, i));
        }
        if (!goes_on) return;
        at = next;
        find_runs(at);
    }
}
