// x W^T for some tokens on Hopper's own units, memory bound: float16 in, float32 sums. A cluster, of a size that the launch
// says, has BLOCK_N (-D) rows of W; each of its blocks has a part of their k, and they add up through shared memory.
//
// A warpgroup multiplies 64 tokens, which are rows of its products, TOKEN_TILES (-D) do so at once; more tokens are left to other
// clusters. Two threads copy tiles of W and of tokens through a ring each. That of W takes what shared memory the launch leaves, and
// is full before the kernel ahead has ended. A tile of tokens has no more rows than there are, rounded up to 8: the others of a
// product are whatever lies behind them, and so are their sums. A token's sums depend on how many others there are only in how the
// launch cuts k. FOLDED: tokens are rows of x as they are, whose squares are added up on their way. -D: BLOCK_N, TOKEN_TILES, FOLDED,
// those of call.cuh.
#pragma once
#include "call.cuh"
#include "reduce.cuh"
#include "storage.cuh"
#include "wgmma.cuh"

namespace few {

constexpr int MOST_X_STAGES = 16, MOST_W_STAGES = 20;
constexpr int X_BYTES = 48 << 10;    // of the ring of tokens, at most
constexpr int UNDER_WAY = 64 << 10;  // bytes of W: more would only stand in the way of tokens
constexpr int BLOCK_K = TILE_COLUMNS;
constexpr int CONSUMERS = WARPGROUP * TOKEN_TILES;  // threads
#ifdef FOLDED
constexpr bool IS_FOLDED = true;
#else
constexpr bool IS_FOLDED = false;
#endif
constexpr int THREADS = CONSUMERS + (IS_FOLDED ? 96 : 64);  // the last warp of three describes rows
constexpr int MOST_TOKENS = 64 * TOKEN_TILES;  // of a cluster
constexpr int W_TILE = BLOCK_N * BLOCK_K;  // halves
constexpr int MOST_SPLITS = 4;             // blocks of a cluster
constexpr int GROUPS = BLOCK_N / 8;        // of 8 rows of W: four sums of a thread

using Sums = float[4 * GROUPS];  // of a thread

// One of the two rings, of as many stages or fewer.
template <int MOST>
struct Ring {
    Barrier full[MOST], empty[MOST];

    __device__ __forceinline__ void init(int stages) {
#pragma unroll 1
        for (int i = 0; i < stages; ++i) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], CONSUMERS / 32);
        }
    }

    struct Cursor {
        int stages, stage = 0, parity = 0;

        __device__ __forceinline__ void advance() {
            if (++stage == stages) stage = 0, parity ^= 1;
        }
    };

    // Where there is room, copy the map's box at (column, row) there.
    __device__ __forceinline__ void copy(Cursor& at, __half* tiles, int tile_size, const TensorMap* map, int column, int row) {
        barrier_wait(&empty[at.stage], at.parity ^ 1);
        barrier_expect(&full[at.stage], tile_size * 2);
        load_tile(tiles + at.stage * tile_size, map, &full[at.stage], column, row);
        at.advance();
    }
};

using WRing = Ring<MOST_W_STAGES>;
using XRing = Ring<MOST_X_STAGES>;

// What a block multiplies, and how it divides its shared memory: tiles of tokens, then as many of W as fit.
struct Place {
    int first_n;                     // row of W
    int first_token, num_tokens;
    int split, splits;               // its place in the cluster, and how many that has
    int first_chunk, chunks;         // of k
    int x_tile, x_stages, w_stages;  // halves, tiles

    __device__ __forceinline__ Place(int k_size, int all_tokens) {
        splits = blocks_of_cluster(), split = rank_in_cluster();
        const int cluster = blockIdx.x / splits, token_tiles = (all_tokens + MOST_TOKENS - 1) / MOST_TOKENS;
        first_n = cluster / token_tiles * BLOCK_N;
        first_token = cluster % token_tiles * MOST_TOKENS;
        num_tokens = min(all_tokens - first_token, MOST_TOKENS);
        const int all = (k_size + BLOCK_K - 1) / BLOCK_K, share = (all + splits - 1) / splits;
        first_chunk = split * share;
        chunks = max(min(share, all - first_chunk), 0);
        x_tile = (min(all_tokens, MOST_TOKENS) + 7) / 8 * 8 * BLOCK_K;
        x_stages = min(min(X_BYTES / 2 / x_tile, MOST_X_STAGES), 2 * share);
        w_stages = min((dynamic_shared_bytes() / 2 - x_stages * x_tile) / W_TILE, MOST_W_STAGES);
    }

    __device__ __forceinline__ int column(int chunk) const { return (first_chunk + chunk) * BLOCK_K; }
};

struct Rings {
    WRing w;
    XRing x;

    // All threads of a block.
    __device__ __forceinline__ void init(const Place& at) {
        if (threadIdx.x == 0) {
            w.init(at.w_stages), x.init(at.x_stages);
            barriers_initialised();
        }
        __syncthreads();
    }
};

// All of W, one thread of a block. Needs nothing that kernels before write.
__device__ __forceinline__ void copy_weights(const Place& at, Rings& rings, __half* smem, const TensorMap* w) {
    constexpr int MOST = (UNDER_WAY / 2 + W_TILE - 1) / W_TILE;
    WRing::Cursor to = {at.w_stages}, landed = to;
    const int most = min(MOST, at.w_stages);
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        if (i >= most) {
            barrier_wait(&rings.w.full[landed.stage], landed.parity);
            landed.advance();
        }
        rings.w.copy(to, smem + at.x_stages * at.x_tile, W_TILE, w, at.column(i), at.first_n);
    }
}

// All of the tokens, in `parts` parts, `part` columns apart, the last of them first; one thread of a block.
__device__ __forceinline__ void copy_tokens(const Place& at, Rings& rings, __half* smem, const TensorMap* x, int parts, int part) {
    XRing::Cursor to = {at.x_stages};
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i)
#pragma unroll 1
        for (int p = parts - 1; p >= 0; --p)
            rings.x.copy(to, smem, at.x_tile, x, p * part + at.column(i), at.first_token);
}

// Squares of a warpgroup's tokens, of this block's part of k: a thread has eighths of a tile's rows. In a swizzled row pieces of 16
// bytes are mixed up, which is the same to them.
struct Squares {
    static constexpr int AT_ONCE = WARPGROUP / 8, ROWS = 64 / AT_ONCE;  // rows of a warpgroup, of a thread
    float sums[ROWS] = {};

    // `vectors`: of this thread, in its first row of a tile of `rows`.
    __device__ __forceinline__ void add(const __half* vectors, int rows) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (i > 0 && i * AT_ONCE >= rows) break;
            const uint4 raw = *reinterpret_cast<const uint4*>(vectors + i * AT_ONCE * BLOCK_K);
            float values[VECTOR];
            load8(reinterpret_cast<const __half*>(&raw), values);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sums[i] += values[j] * values[j];
        }
    }

    // To where others of the cluster find them, each row's.
    __device__ __forceinline__ void store(float* squares) {
        const int thread = threadIdx.x % WARPGROUP;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int lanes = 1; lanes < 8; lanes *= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], lanes);
            if (thread % 8 == 0) squares[thread / 8 + i * AT_ONCE] = sums[i];
        }
    }
};

// The sums of this block's part of k, a warpgroup's.
__device__ __forceinline__ void multiply(const Place& at, Rings& rings, const __half* smem, int parts, Sums& sums, Squares& squares) {
    const int tile = uniform(threadIdx.x / WARPGROUP);
    const unsigned long long w = operand(shared_address(smem + at.x_stages * at.x_tile));
    const unsigned long long x = operand(shared_address(smem + tile * 64 * BLOCK_K));
    WRing::Cursor w_at = {at.w_stages}, w_before = w_at;
    XRing::Cursor x_at = {at.x_stages}, x_before = x_at;
    const __half* const vectors = smem + tile * 64 * BLOCK_K + threadIdx.x % WARPGROUP * VECTOR;
    const int rows = at.x_tile / BLOCK_K - tile * 64;
    const bool arrives = threadIdx.x % 32 == 0;
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; ++i) sums[i] = 0.0f;
    int part = 0;  // of the chunk
    const int steps = at.chunks * parts;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        if (part == 0) barrier_wait(&rings.w.full[w_at.stage], w_at.parity);
        barrier_wait(&rings.x.full[x_at.stage], x_at.parity);
        const unsigned long long x_tile = x + x_at.stage * (at.x_tile * 2 / 16), w_tile = w + w_at.stage * (W_TILE * 2 / 16);
        products_begin();
#pragma unroll
        for (int i = 0; i < BLOCK_K / 16; ++i) ::multiply(sums, x_tile + i * 2, w_tile + i * 2, true);
        products_commit();
        if (IS_FOLDED) squares.add(vectors + x_at.stage * at.x_tile, rows);
        products_wait<1>();
        if (step > 0 && arrives) {  // the step before is done
            barrier_arrive(&rings.x.empty[x_before.stage]);
            if (part == 0) barrier_arrive(&rings.w.empty[w_before.stage]);
        }
        x_before = x_at, w_before = w_at;
        x_at.advance();
        if (++part == parts) part = 0, w_at.advance();
    }
    products_wait<0>();
    settled(sums);
}

// The same on the precise path, tokens in two parts: tensor cores cut off what does not fit a float32 sum, so sums are short and
// added up outside them, one while the other is multiplied.
__device__ __forceinline__ void multiply_exactly(const Place& at, Rings& rings, const __half* smem, Sums& sums) {
    constexpr int PER_TILE = 2, SHORT = BLOCK_K / 16 / PER_TILE, COUNT = 2 * PER_TILE;  // sums of a tile, products of one
    const int tile = uniform(threadIdx.x / WARPGROUP);
    const unsigned long long w = operand(shared_address(smem + at.x_stages * at.x_tile));
    const unsigned long long x = operand(shared_address(smem + tile * 64 * BLOCK_K));
    WRing::Cursor w_at = {at.w_stages};
    XRing::Cursor x_at = {at.x_stages};
    const bool arrives = threadIdx.x % 32 == 0;
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; ++i) sums[i] = 0.0f;
    auto add = [&](Sums& found) {
        settled(found);
#pragma unroll
        for (int i = 0; i < 4 * GROUPS; ++i) sums[i] += found[i];
    };
#pragma unroll 1
    for (int chunk = 0; chunk < at.chunks; ++chunk) {
        Sums found[2];
        int x_stages[2];
        barrier_wait(&rings.w.full[w_at.stage], w_at.parity);
        const unsigned long long w_tile = w + w_at.stage * (W_TILE * 2 / 16);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (i % PER_TILE == 0) {
                barrier_wait(&rings.x.full[x_at.stage], x_at.parity);
                x_stages[i / PER_TILE] = x_at.stage;
                x_at.advance();
            }
            const unsigned long long x_tile = x + x_stages[i / PER_TILE] * (at.x_tile * 2 / 16);
            products_begin();
#pragma unroll
            for (int j = 0; j < SHORT; ++j) {
                const int k = 2 * (i % PER_TILE * SHORT + j);
                ::multiply(found[i % 2], x_tile + k, w_tile + k, j > 0);
            }
            products_commit();
            if (i == 0) continue;
            products_wait<1>();
            add(found[(i + 1) % 2]);
        }
        products_wait<0>();
        add(found[(COUNT + 1) % 2]);
        if (arrives) {
            barrier_arrive(&rings.x.empty[x_stages[0]]), barrier_arrive(&rings.x.empty[x_stages[1]]);
            barrier_arrive(&rings.w.empty[w_at.stage]);
        }
        w_at.advance();
    }
}

// What threads that copy do in the end: others read this block's sums, unless it is alone. (Then a cluster's barrier would be
// __syncthreads, which all threads would have to come to at the same place.)
__device__ __forceinline__ void stand_by(const Place& at) {
    __syncwarp();
    if (at.splits == 1) return;
    cluster_sync();
    cluster_meet();
}

// What the others do: multiply, add up what the blocks of the cluster found and call finish(n, m, more, sums) for rows n and n + 1
// of W and token m; `prepare(n, m)` loads early what that needs. FOLDED: sums are multiplied by factor_of(the token's squares) first. Warps
// exchange the sums of 8 rows of W and 16 tokens, an item, shared out among all of the cluster. Few instructions in what runs once: they
// come from memory, behind everybody's weights.
template <typename Prepare, typename FactorOf, typename Finish>
__device__ __forceinline__ void product(const Place& at, Rings& rings, __half* smem, int parts, Prepare prepare, FactorOf factor_of,
                                        Finish finish) {
    constexpr int WARPS = CONSUMERS / 32, AT_ONCE = 2;
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, step = WARPS * at.splits;
    const int used = min((at.num_tokens + 15) / 16, WARPS), shift = (used > 1) + (used > 2) + (used > 4);  // warps with tokens
    const int items = GROUPS << shift;
    const int m = at.first_token + lane / 4, n = at.first_n + lane % 4 * 2;
    auto n_of = [&](int item) { return n + (item >> shift) * 8; };
    auto m_of = [&](int item) { return m + (item & ((1 << shift) - 1)) * 16; };
    decltype(prepare(0, 0)) more[AT_ONCE][2];
    auto prepare_from = [&](int first) {
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                more[u][half] = prepare(n_of(first + u * step), m_of(first + u * step) + 8 * half);
    };
    int first = at.split * WARPS + warp;
    prepare_from(first);
    Sums sums;
    Squares squares;
    __shared__ float squares_found[IS_FOLDED ? MOST_TOKENS : 1];
    if constexpr (PARTS == 2)
        multiply_exactly(at, rings, smem, sums);
    else
        multiply(at, rings, smem, parts, sums, squares);
    if (IS_FOLDED) squares.store(squares_found + threadIdx.x / WARPGROUP * 64);

    float4* const own = reinterpret_cast<float4*>(smem) + lane;
    unsigned found_at[MOST_SPLITS];
#pragma unroll
    for (int other = 0; other < MOST_SPLITS; ++other) found_at[other] = address_in(min(other, at.splits - 1), own);
    named_wait(1, CONSUMERS);  // nobody reads tiles any more
    if (warp < used)
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
            own[((g << shift) + warp) * 32] = make_float4(sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]);
    if (at.splits > 1) cluster_sync();
    else named_wait(1, CONSUMERS);
    // Of this thread's two tokens, which are the same in all of its items.
    static_assert(WARPS % 4 == 0, "from item to item of a warp tokens are the same");
    float factors[2] = {1.0f, 1.0f};
    if (IS_FOLDED) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* const own_squares = squares_found + min(m_of(first) - at.first_token + 8 * half, MOST_TOKENS - 1);
            float total = 0.0f;
#pragma unroll
            for (int other = 0; other < MOST_SPLITS; ++other) {
                const float part = load_float_from(address_in(min(other, at.splits - 1), own_squares));
                if (other < at.splits) total += part;
            }
            factors[half] = factor_of(total);
        }
    }
#pragma unroll 1
    for (; first < items; first += AT_ONCE * step) {
        float4 found[AT_ONCE][MOST_SPLITS];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
#pragma unroll
            for (int other = 0; other < MOST_SPLITS; ++other)  // the last block's again, but not added
                found[u][other] = load_from(found_at[other] + min(first + u * step, items - 1) * 512);
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            const int item = first + u * step;
            if (item >= items) break;
            float4 total = found[u][0];
#pragma unroll
            for (int other = 1; other < MOST_SPLITS; ++other) {
                if (other >= at.splits) break;
                total.x += found[u][other].x, total.y += found[u][other].y;
                total.z += found[u][other].z, total.w += found[u][other].w;
            }
            finish(n_of(item), m_of(item), more[u][0], make_float2(total.x * factors[0], total.y * factors[0]));
            finish(n_of(item), m_of(item) + 8, more[u][1], make_float2(total.z * factors[1], total.w * factors[1]));
        }
        prepare_from(first + AT_ONCE * step);
    }
    if (at.splits > 1) cluster_meet();  // nobody reads this block's sums any more
}

}  // namespace few
