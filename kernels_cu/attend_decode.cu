// Attention of one new token a sequence: the keys are shared out among blocks, cached K is normalised and rotated as it
// is read, and the block that finishes last for a head adds up the shares.
//   k' = rope(rms_norm(k) w_k);   s = q' k'^T score_scale;   attention = sum_t 2^(s_t - max s) v_t / sum_t 2^(s_t - max s)
// The new token's k and v are rounded to the storage dtype, appended to the cache and attended to like the rest.
//
// A piece of work is one sequence, one KV head, up to 8 HEAD_TILES of its query heads, and a run of key tiles. How many
// tiles a run has follows from the lengths on the device, so one launch serves a growing cache. Shares are added in the
// order of the runs: the same bits every time.
//
// Rotations only matter relative to each other: within a tile whose keys lie at consecutive positions p, p + 1, ... the
// query is rotated by its distance from p, once, and the keys by 0, 1, ...: angles that are the same for every tile and
// lie in a table. Keys with gaps between them have their angles computed one by one.
//
// Grid: as many blocks as fit the GPU; runs are as long as gives each of them one piece. Block 32 WARPS threads, each warp
// 16 keys of a tile. Shared memory: see Shared below. -D: those of call.cuh, HEAD_TILES (1 or 2), WARPS, STAGES, BLOCKS
// (of a multiprocessor), WINDOW, FLOAT32_ANGLES. Memory bound: one read of K and V. Next come the instructions that make
// k', so scores are q k^T but the sums are v^T p^T, with query heads in columns: of those there are few, and no padding.
#include "call.cuh"
#include "reduce.cuh"
#include "rope.cuh"
#include "storage.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 8 * HEAD_TILES;  // query heads of a piece
constexpr int TILE = 16 * WARPS;      // keys
constexpr int STRIDE = HEAD_DIM + 8;   // of q': an odd number of 16-byte pieces, so that ldmatrix meets no bank twice
constexpr bool SWIZZLED = HEAD_DIM % 64 == 0;
constexpr int KV_STRIDE = SWIZZLED ? HEAD_DIM : STRIDE;
constexpr int D_BLOCKS = HEAD_DIM / 8;
constexpr int HALF_BLOCKS = HEAD_DIM / 16;
constexpr int SHARE = ROWS * (HEAD_DIM + 2);  // floats: weighted v, maxima, sums
constexpr int WARP_SHARE = ROWS * (HEAD_DIM + 4) + 2 * ROWS;
constexpr int MAX_RUNS = 128;

struct Tile {
    STORAGE k[TILE * KV_STRIDE], v[TILE * KV_STRIDE];
};

// Where 16 bytes of a row of k or v lie in a tile: padded rows, or no room lost and pieces mixed up within their row.
__device__ __forceinline__ int place_of(int row, int piece) {
    return row * KV_STRIDE + (SWIZZLED ? piece ^ (row & 7) : piece) * 8;
}

struct alignas(16) Shared {
    union {
        Tile ring[STAGES];
        float shares[WARPS * WARP_SHARE];   // of the warps, once all tiles are done
        float weights[ROWS * MAX_RUNS];     // of the runs, in the block that adds them up
    };
    __half q[2][PARTS][ROWS * STRIDE];      // q' for this tile and the next
    float2 turn[TILE * HEAD_DIM / 2];       // cosine and sine of key offset times frequency
    uint2 frequency[HEAD_DIM / 2];
    float k_norm[HEAD_DIM];
    float q_norm[ROWS * HEAD_DIM];          // normalised queries, not rotated
    int positions[STAGES + 1][TILE];        // they come a tile ahead of the keys, for the queries' sake
};

struct Piece {
    int b, kv_head_idx, first_row;  // first_row: of the group's query heads
    int run, num_runs;
    int first_tile, end_tile;
    int past;  // tokens in the cache; the new one comes after them
};

__device__ __forceinline__ int tiles_of(const Call& call, int b) {
    const int past = b < call.batch ? call.rows[b].x : PADDING;
    return past >= 0 ? (past + TILE) / TILE : 0;
}

// A warp finds piece `item`: sequence after sequence, in each head after head, in each run after run. False if there are
// fewer. Runs are `shortest_run` tiles long, or longer where a sequence would have too many.
__device__ __forceinline__ bool find_piece(const Call& call, Piece& piece, int item, int shortest_run, int row_tiles) {
    const int lane = threadIdx.x % 32;
    for (int first = 0; first < call.batch; first += 32) {
        const int tiles = tiles_of(call, first + lane);
        const int tiles_a_run = max(shortest_run, (tiles + MAX_RUNS - 1) / MAX_RUNS);
        const int num_runs = (tiles + tiles_a_run - 1) / tiles_a_run;
        const int here = num_runs * call.num_kv_heads * row_tiles;
        int end = here;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int before = __shfl_up_sync(0xffffffffu, end, offset);
            if (lane >= offset) end += before;
        }
        if (item < end && item >= end - here) {
            const int in_sequence = item - (end - here);
            piece.b = first + lane;
            piece.run = in_sequence % num_runs;
            piece.num_runs = num_runs;
            piece.kv_head_idx = in_sequence / num_runs % call.num_kv_heads;
            piece.first_row = in_sequence / num_runs / call.num_kv_heads * ROWS;
            piece.first_tile = piece.run * tiles_a_run;
            piece.end_tile = min(piece.first_tile + tiles_a_run, tiles);
            piece.past = call.rows[piece.b].x;
        }
        const int all = __shfl_sync(0xffffffffu, end, 31);
        if (item < all) return true;
        item -= all;
    }
    return false;
}

// Where the cosine and sine of (offset, pair) lie: keys next to each other in different halves of the banks.
__device__ __forceinline__ int turn_index(int offset, int pair) {
    return offset * (HEAD_DIM / 2) + (HEAD_DIM % 32 == 0 ? pair ^ (offset & 1) * 8 : pair);
}

// 16 dims of the query heads as an A fragment; with one tile of heads its other eight rows are zero.
__device__ __forceinline__ void load_queries(unsigned (&frag)[4], const __half* q, int step) {
    const int lane = threadIdx.x % 32;
    const __half* row = q + step * 16;
    if (HEAD_TILES == 2) {
        load_matrices(frag, row + lane % 16 * STRIDE + lane / 16 * 8);
    } else {
        load_two_matrices(frag[0], frag[2], row + lane % 8 * STRIDE + lane / 8 % 2 * 8);
        frag[1] = frag[3] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attend_decode(const __grid_constant__ Call call)
{
    extern __shared__ __align__(128) char smem[];  // sizeof(Shared); launch.py counts the same
    Shared& shared = *reinterpret_cast<Shared*>(smem);
    __shared__ Piece piece;  // not in registers: the loop over tiles needs those
    __shared__ bool flag;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
    const int group = call.num_q_heads / call.num_kv_heads;
    const int row_tiles = (group + ROWS - 1) / ROWS;

    let_next_kernel_begin();
                for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) shared.k_norm[d] = call.k_norm[d];
                constexpr int PAIRS = HEAD_DIM / 2, LANES = THREADS / PAIRS > 0 ? THREADS / PAIRS : 1;
                for (int i = threadIdx.x; i < PAIRS * LANES; i += THREADS) {
                    const int pair = i % PAIRS;
                    const uint2 frequency = reinterpret_cast<const uint2*>(call.frequency)[pair];
                    shared.frequency[pair] = frequency;
#pragma unroll 4
                    for (int offset = i / PAIRS; offset < TILE; offset += LANES) {
                        float2 turn;
                        rotation(offset, frequency, turn.x, turn.y);
                        shared.turn[turn_index(offset, pair)] = turn;
                    }
                }
    wait_for_previous_kernel();

    // The shortest runs that still give every block at most one piece, up to rounding.
    int shortest_run = 1;
    if (warp == 0) {
        int tiles = 0;
        for (int b = lane; b < call.batch; b += 32) tiles += tiles_of(call, b);
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) tiles += __shfl_xor_sync(0xffffffffu, tiles, offset);
        const long long all_tiles = static_cast<long long>(tiles) * call.num_kv_heads * row_tiles;
        shortest_run = static_cast<int>(max(1ll, (all_tiles + gridDim.x - 1) / gridDim.x));
    }

    for (int item = blockIdx.x;; item += gridDim.x) {
        __syncthreads();  // nobody reads shared memory for the piece before any more
        if (warp == 0) {
            const bool found = find_piece(call, piece, item, shortest_run, row_tiles);
            if (lane == 0) flag = found;
        }
        __syncthreads();
        if (!flag) return;
        const int past = piece.past, end_tile = piece.end_tile, rows = min(ROWS, group - piece.first_row);
        const int new_at = call.rows[piece.b].y;  // position of the new token
        const long long head = (static_cast<long long>(piece.b) * call.num_kv_heads + piece.kv_head_idx) * call.capacity;
        const int* positions = call.cached_positions + static_cast<long long>(piece.b) * call.capacity;
        const float* qkv =
            call.qkv + static_cast<long long>(piece.b) * (call.num_q_heads + 2 * call.num_kv_heads) * HEAD_DIM;

        auto load_positions = [&](int tile) {
            const int slot = tile * TILE + threadIdx.x;
            if (tile < end_tile && threadIdx.x < TILE)
                copy4_async(&shared.positions[tile % (STAGES + 1)][threadIdx.x], positions + slot, slot <= past);
        };
        auto load_tile = [&](int tile) {
            if (tile < end_tile) {
                constexpr int PIECES = HEAD_DIM / 8, PASS = THREADS / PIECES;
                Tile& target = shared.ring[tile % STAGES];
                const long long first = (head + static_cast<long long>(tile) * TILE) * HEAD_DIM;
                if (THREADS % PIECES == 0 && (tile + 1) * TILE <= past) {  // whole tiles, and constants as addresses
                    const int row = threadIdx.x / PIECES, piece_idx = threadIdx.x % PIECES;
                    const STORAGE* k = call.k_cache + first + row * HEAD_DIM + piece_idx * 8;
                    const STORAGE* v = call.v_cache + first + row * HEAD_DIM + piece_idx * 8;
#pragma unroll
                    for (int i = 0; i < TILE; i += PASS)
                        copy16_async(target.k + place_of(row + i, piece_idx), k + i * HEAD_DIM, true);
#pragma unroll
                    for (int i = 0; i < TILE; i += PASS)
                        copy16_async(target.v + place_of(row + i, piece_idx), v + i * HEAD_DIM, true);
                } else {
#pragma unroll 1
                    for (int i = threadIdx.x; i < 2 * TILE * PIECES; i += THREADS) {
                        const int row = i / PIECES % TILE, column = i % PIECES * 8, slot = tile * TILE + row;
                        const bool is_v = i >= TILE * PIECES;
                        STORAGE* cached = (is_v ? call.v_cache : call.k_cache) + first + row * HEAD_DIM + column;
                        STORAGE* place = (is_v ? target.v : target.k) + place_of(row, column / 8);
                        if (slot != past) {
                            copy16_async(place, cached, slot < past);
                        } else {
                            const int source_head = call.num_q_heads + (is_v ? call.num_kv_heads : 0) + piece.kv_head_idx;
                            float values[VECTOR];
                            load8(qkv + source_head * HEAD_DIM + column, values);
                            store8(place, values);
                            if (piece.first_row == 0) store8(cached, values);
                        }
                    }
                }
            }
            load_positions(tile + 1);
            copies_commit();
        };
        load_positions(piece.first_tile);
        for (int i = 0; i < STAGES - 1; ++i) load_tile(piece.first_tile + i);

        // Normalise the queries, a warp to a head.
        for (int r = warp; r < ROWS; r += WARPS) {
            const float* q = qkv + (piece.kv_head_idx * group + piece.first_row + r) * HEAD_DIM;
            float sum_squares = 0.0f;
            if (r < rows)
                for (int d = lane; d < HEAD_DIM; d += 32) sum_squares += q[d] * q[d];
            const float rstd = rsqrtf(warp_sum(sum_squares) / HEAD_DIM + call.eps);
            for (int d = lane; d < HEAD_DIM; d += 32)
                shared.q_norm[r * HEAD_DIM + d] = r < rows ? q[d] * rstd * call.q_norm[d] : 0.0f;
        }

        // Rotate the queries for a tile whose first key is at `position`.
        auto rotate_queries = [&](int tile, int position) {
            __half* target = shared.q[tile % 2][0];
            for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 2; i += THREADS) {
                const int r = i / (HEAD_DIM / 2), d = i % (HEAD_DIM / 2);
                if (r >= rows && tile > piece.first_tile + 1) break;  // zero since the first two tiles
                float a = shared.q_norm[r * HEAD_DIM + d], c = shared.q_norm[r * HEAD_DIM + d + HEAD_DIM / 2];
#ifdef FLOAT32_ANGLES
                rotate(a, c, new_at, shared.frequency[d]);
#else
                rotate(a, c, new_at - position, shared.frequency[d]);
#endif
                __half* place = target + r * STRIDE + d;
                place[0] = __float2half_rn(a);
                place[HEAD_DIM / 2] = __float2half_rn(c);
                if (PARTS == 2) {
                    place[ROWS * STRIDE] = __float2half_rn(a - __half2float(place[0]));
                    place[ROWS * STRIDE + HEAD_DIM / 2] = __float2half_rn(c - __half2float(place[HEAD_DIM / 2]));
                }
            }
        };
        __syncthreads();
        rotate_queries(piece.first_tile, positions[piece.first_tile * TILE]);

        float out[HEAD_TILES][D_BLOCKS / 2][4];  // [.][16 dims]: dims l / 4 and 8 more, heads 2 (l % 4) + {0, 1}
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
            for (int j = 0; j < D_BLOCKS / 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[t][j][e] = 0.0f;
        float row_max[HEAD_TILES], row_sum[HEAD_TILES];  // of head l / 4
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t) row_max[t] = MINUS_INFINITY, row_sum[t] = 0.0f;

#pragma unroll 1
        for (int tile = piece.first_tile; tile < end_tile; ++tile) {
            copies_wait<STAGES - 2>();
            __syncthreads();
            load_tile(tile + STAGES - 1);
            if (tile + 1 < end_tile) rotate_queries(tile + 1, shared.positions[(tile + 1) % (STAGES + 1)][0]);
            const int first_slot = tile * TILE + warp * 16;
            if (first_slot > past) continue;  // none of this warp's keys exists
            const STORAGE* k_smem = shared.ring[tile % STAGES].k + warp * 16 * KV_STRIDE;
            const STORAGE* v_smem = shared.ring[tile % STAGES].v + warp * 16 * KV_STRIDE;
            const __half* q_smem = shared.q[tile % 2][0];
            const int* tile_positions = shared.positions[tile % (STAGES + 1)];
            const int* key_positions = tile_positions + warp * 16;
#ifdef FLOAT32_ANGLES
            const int base = 0;
            const bool in_table = false;
#else
            const int base = tile_positions[0], last = min(TILE - 1, past - tile * TILE);
            const bool in_table = tile_positions[last] - base == last;
#endif

            // 16 keys as B fragments, 8 at a time: of an 8-dim block lane l has dims 2 (l % 4) + {0, 1} of key l / 4.
            float scores[2][4] = {};
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                unsigned k_frag[D_BLOCKS], k_rest[PARTS == 2 ? D_BLOCKS : 1];
#pragma unroll
                for (int j = 0; j < D_BLOCKS; j += 4) {
                    unsigned four[4];  // a head_dim of 16, 48, ... ends with two blocks that do not exist: read, not used
                    load_matrices(four, k_smem + place_of(n * 8 + lane % 8, (j + lane / 8) % D_BLOCKS));
#pragma unroll
                    for (int i = 0; i < 4 && j + i < D_BLOCKS; ++i) k_frag[j + i] = four[i];
                }
                float sum_squares = 0.0f;
#pragma unroll
                for (int j = 0; j < D_BLOCKS; ++j) {
                    const float2 k = unpack(k_frag[j], STORAGE());
                    sum_squares = fmaf(k.x, k.x, fmaf(k.y, k.y, sum_squares));
                }
                const float rstd = rsqrtf(quad_sum(sum_squares) * (1.0f / HEAD_DIM) + call.eps);
                const int offset = warp * 16 + n * 8 + lane / 4;
                auto transform = [&](auto turns_of) {
#pragma unroll
                    for (int j = 0; j < HALF_BLOCKS; ++j) {
                        const int d = j * 8 + quad * 2;
                        const float2 w_low = *reinterpret_cast<const float2*>(shared.k_norm + d);
                        const float2 w_high = *reinterpret_cast<const float2*>(shared.k_norm + d + HEAD_DIM / 2);
                        const float4 turns = turns_of(d);
                        float2 a = unpack(k_frag[j], STORAGE()), c = unpack(k_frag[j + HALF_BLOCKS], STORAGE());
                        a.x *= rstd * w_low.x, a.y *= rstd * w_low.y;
                        c.x *= rstd * w_high.x, c.y *= rstd * w_high.y;
                        const float2 low = make_float2(a.x * turns.x - c.x * turns.y, a.y * turns.z - c.y * turns.w);
                        const float2 high = make_float2(c.x * turns.x + a.x * turns.y, c.y * turns.z + a.y * turns.w);
                        k_frag[j] = pack(low.x, low.y);
                        k_frag[j + HALF_BLOCKS] = pack(high.x, high.y);
                        if (PARTS == 2) {
                            k_rest[j] = pack_rest(low.x, low.y, k_frag[j]);
                            k_rest[j + HALF_BLOCKS] = pack_rest(high.x, high.y, k_frag[j + HALF_BLOCKS]);
                        }
                    }
                };
                if (in_table) {
                    transform([&](int d) {
                        return *reinterpret_cast<const float4*>(shared.turn + turn_index(offset, d));
                    });
                } else {
                    const int distance = key_positions[n * 8 + lane / 4] - base;
                    transform([&](int d) {
                        const uint4 frequency = *reinterpret_cast<const uint4*>(shared.frequency + d);
                        float4 turns;
                        rotation(distance, make_uint2(frequency.x, frequency.y), turns.x, turns.y);
                        rotation(distance, make_uint2(frequency.z, frequency.w), turns.z, turns.w);
                        return turns;
                    });
                }
#pragma unroll
                for (int d = 0; d < HEAD_DIM / 16; ++d) {
                    unsigned q_frag[4];
                    if (PARTS == 2) {  // the small products first
                        load_queries(q_frag, q_smem + ROWS * STRIDE, d);
                        multiply_add(scores[n], q_frag, k_frag[2 * d], k_frag[2 * d + 1]);
                    }
                    load_queries(q_frag, q_smem, d);
                    if constexpr (PARTS == 2) multiply_add(scores[n], q_frag, k_rest[2 * d], k_rest[2 * d + 1]);
                    multiply_add(scores[n], q_frag, k_frag[2 * d], k_frag[2 * d + 1]);
                }
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int key = n * 8 + 2 * quad + e;
                    bool hidden = first_slot + key > past;
#ifdef WINDOW
                    hidden = hidden || new_at - key_positions[key] >= call.window;
#endif
                    if (hidden) scores[n][e] = scores[n][e + 2] = MINUS_INFINITY;
                }
            }

            // bfloat16 has too few bits for the weights: what rounding leaves over is a second product.
            unsigned p_frag[HEAD_TILES][2], p_rest[HEAD_TILES][2];
#pragma unroll
            for (int t = 0; t < HEAD_TILES; ++t) {
                float largest = row_max[t];
#pragma unroll
                for (int n = 0; n < 2; ++n) largest = fmaxf(largest, fmaxf(scores[n][2 * t], scores[n][2 * t + 1]));
                largest = quad_max(largest);
                // A warp that has seen no key yet: -inf - -inf would be NaN.
                const float shift = largest == MINUS_INFINITY ? 0.0f : largest * call.score_scale;
                const float shrink = exp2f(row_max[t] * call.score_scale - shift);
                row_max[t] = largest;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const float low = exp2f(fmaf(scores[n][2 * t], call.score_scale, -shift));
                    const float high = exp2f(fmaf(scores[n][2 * t + 1], call.score_scale, -shift));
                    sum += low + high;
                    p_frag[t][n] = pack(low, high, STORAGE());
                    p_rest[t][n] = pack_rest(low, high, p_frag[t][n], STORAGE());
                }
                row_sum[t] = row_sum[t] * shrink + sum;
                if (__any_sync(0xffffffffu, shrink != 1.0f)) {  // few tiles raise a maximum
                    const float even = __shfl_sync(0xffffffffu, shrink, 8 * quad);
                    const float odd = __shfl_sync(0xffffffffu, shrink, 8 * quad + 4);
#pragma unroll
                    for (int j = 0; j < D_BLOCKS / 2; ++j) {
                        out[t][j][0] *= even, out[t][j][2] *= even;
                        out[t][j][1] *= odd, out[t][j][3] *= odd;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < D_BLOCKS / 2; ++j) {
                unsigned v_frag[4];  // 16 dims x 16 keys
                load_matrices_transposed(v_frag, v_smem + place_of(lane / 16 * 8 + lane % 8, 2 * j + lane / 8 % 2));
#pragma unroll
                for (int t = 0; t < HEAD_TILES; ++t) {
                    if (!STORED_AS_FLOAT16) multiply_add(out[t][j], v_frag, p_rest[t][0], p_rest[t][1], STORAGE());
                    multiply_add(out[t][j], v_frag, p_frag[t][0], p_frag[t][1], STORAGE());
                }
            }
        }
        copies_wait<0>();
        __syncthreads();  // the ring becomes the warps' shares

        {
            float* mine = shared.shares + warp * WARP_SHARE;
#pragma unroll
            for (int t = 0; t < HEAD_TILES; ++t) {
#pragma unroll
                for (int j = 0; j < D_BLOCKS / 2; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        mine[(8 * t + 2 * quad + e % 2) * (HEAD_DIM + 4) + 16 * j + lane / 4 + e / 2 * 8] = out[t][j][e];
                const float sum = quad_sum(row_sum[t]);
                if (quad == 0) {
                    mine[ROWS * (HEAD_DIM + 4) + 8 * t + lane / 4] = row_max[t];
                    mine[ROWS * (HEAD_DIM + 4) + ROWS + 8 * t + lane / 4] = sum;
                }
            }
        }
        __syncthreads();
        const int num_runs = piece.num_runs;
        __half* attention = call.attention + (static_cast<long long>(piece.b) * call.num_q_heads +
                                              piece.kv_head_idx * group + piece.first_row) * HEAD_DIM;
        float* const own_share = call.partial + static_cast<long long>(item) * SHARE;
        for (int i = threadIdx.x; i < rows * HEAD_DIM; i += THREADS) {
            const int r = i / HEAD_DIM, d = i % HEAD_DIM;
            const float* last_part = shared.shares + ROWS * (HEAD_DIM + 4) + r;
            float largest = MINUS_INFINITY;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, last_part[w * WARP_SHARE]);
            const float shift = largest == MINUS_INFINITY ? 0.0f : largest * call.score_scale;
            float value = 0.0f, sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float weight = exp2f(last_part[w * WARP_SHARE] * call.score_scale - shift);
                value += weight * shared.shares[w * WARP_SHARE + r * (HEAD_DIM + 4) + d];
                sum += weight * last_part[w * WARP_SHARE + ROWS];
            }
            if (num_runs == 1) {
                attention[i] = __float2half_rn(value / sum * call.v_scale);
            } else {
                own_share[i] = value;
                if (d == 0) {
                    own_share[ROWS * HEAD_DIM + r] = largest;
                    own_share[ROWS * HEAD_DIM + ROWS + r] = sum;
                }
            }
        }
        if (num_runs == 1) continue;

        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            int* arrived = call.counters + (piece.b * row_tiles + piece.first_row / ROWS) * call.num_kv_heads +
                           piece.kv_head_idx;
            flag = atomicAdd(arrived, 1) == num_runs - 1;
            if (flag) *arrived = 0;
            __threadfence();
        }
        __syncthreads();
        if (!flag) continue;

        // The weight of each run, a warp to a head; then the sums.
        const float* const shares = own_share - static_cast<long long>(piece.run) * SHARE;
        for (int r = warp; r < rows; r += WARPS) {
            float* weights = shared.weights + r * MAX_RUNS;
            const float* maxima = shares + ROWS * HEAD_DIM + r;
            float largest = MINUS_INFINITY, sum = 0.0f;
            for (int run = lane; run < num_runs; run += 32) {
                weights[run] = __ldcg(maxima + run * SHARE);
                largest = fmaxf(largest, weights[run]);
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
            for (int run = lane; run < num_runs; run += 32) {
                weights[run] = exp2f((weights[run] - largest) * call.score_scale);
                sum += weights[run] * __ldcg(maxima + run * SHARE + ROWS);
            }
            const float scale = call.v_scale / warp_sum(sum);
            for (int run = lane; run < num_runs; run += 32) weights[run] *= scale;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rows * HEAD_DIM; i += THREADS) {
            const float* weights = shared.weights + i / HEAD_DIM * MAX_RUNS;
            float value = 0.0f;
#pragma unroll 8
            for (int run = 0; run < num_runs; ++run) value += weights[run] * __ldcg(shares + run * SHARE + i);
            attention[i] = __float2half_rn(value);
        }
    }
}
