// The thread of attend_wgmma.cu that copies: which tiles a block has, and their queries, keys and values on their way to it.
//
// Tiles are 128 queries of a head, longest first, of as many heads together as have their keys in L2. A cluster of CLUSTER blocks has
// the same tile of as many heads that share keys: each block copies a part of every step's to all, so that L2 is read less often,
// which takes power that products want. A cluster begins with the tile of its number and takes the next from a counter, when this
// one's last keys but one are copied: to take it earlier would be to give it to a cluster that may still have much to do. Its first
// block does that and tells the others.
#pragma once
#include "call.cuh"
#include "wgmma.cuh"

static_assert(HEAD_DIM == 128, "a row of q, k and v is two tiles");

#ifdef SPLIT_KEYS
constexpr int STRIDE = 2;  // from a warpgroup's step to its next
#else
constexpr int STRIDE = 1;
#endif
constexpr int CONSUMERS = 2;
constexpr int BLOCK_M = 64 * CONSUMERS / STRIDE;
constexpr int BLOCK_N = PARTS == 1 && STRIDE == 1 ? 128 : 64;
constexpr int STAGES = 2 * STRIDE;
constexpr int Q_TILE = BLOCK_M * TILE_COLUMNS, KV_TILE = BLOCK_N * TILE_COLUMNS;  // halves
constexpr int Q = 2 * PARTS * Q_TILE, STAGE = 2 * (PARTS + 1) * KV_TILE;
constexpr int Q_BYTES = PARTS * 2 * Q_TILE * 2, K_BYTES = PARTS * 2 * KV_TILE * 2, V_BYTES = 2 * KV_TILE * 2;
constexpr int PART = BLOCK_N / CLUSTER;  // rows of keys and values that a block copies to all of its cluster
static_assert(STRIDE == 1 || CLUSTER == 1, "SPLIT_KEYS is for few tiles");

// Of step i: the buffer, and the parity of its phases. Of unsigned numbers, or they would take a dozen instructions a step.
__device__ __forceinline__ int stage_of(unsigned i) { return i % STAGES; }
__device__ __forceinline__ int parity_of(unsigned i) { return i / STAGES % 2; }

struct Maps {
    TensorMap q;  // [PARTS B S, Hq 128]
    TensorMap k;  // [PARTS B Hkv scratch_capacity, 128]
    TensorMap v;  // [B Hkv capacity or scratch_capacity, 128]
};

struct Barriers {
    Barrier q_full[2], q_empty[2], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    Barrier told[2];                               // which tile comes, by the cluster's first block
    Barrier sent[CONSUMERS], received[CONSUMERS];  // with SPLIT_KEYS: what each warpgroup sends

    // One thread does this.
    __device__ __forceinline__ void init() {
        for (int i = 0; i < 2; ++i) {
            barrier_init(&q_full[i], 1);
            barrier_init(&q_empty[i], CLUSTER * CONSUMERS * 4);
            barrier_init(&told[i], 1);
        }
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&k_full[i], 1);
            barrier_init(&v_full[i], 1);
            barrier_init(&k_empty[i], CLUSTER * CONSUMERS / STRIDE * 4);
            barrier_init(&v_empty[i], CLUSTER * CONSUMERS / STRIDE * 4);
        }
        for (int i = 0; STRIDE > 1 && i < CONSUMERS; ++i) {
            barrier_init(&sent[i], WARPGROUP);
            barrier_init(&received[i], WARPGROUP);
        }
        barriers_initialised();
    }
};

// What the copying thread tells of a tile, along with its q.
struct alignas(16) Tile {
    int first_place;  // of its queries, in the cache
    int num_keys;     // that any of its rows sees; 0: there are no more tiles
    int first_row;    // of x
    int q_head;

    __device__ __forceinline__ int key_tiles() const { return (num_keys + BLOCK_N - 1) / BLOCK_N; }

    // Steps go from the right: only the first meet the diagonal.
    __device__ __forceinline__ int steps(const Call& call) const {
#ifdef WINDOW  // positions grow by one a key at least, so no key further left is near enough
        return key_tiles() - max(0, first_place - call.window + 1) / BLOCK_N;
#else
        return key_tiles();
#endif
    }
};

// Tiles in their order: sections of heads one after the other, in each those with most keys first. A unit is the heads of a cluster.
struct Order {
    int m_tiles, units, section, group;  // group: query heads of a KV head

    __device__ __forceinline__ explicit Order(const Call& call) {
        m_tiles = (call.seq + BLOCK_M - 1) / BLOCK_M;
        units = call.batch * call.num_q_heads / CLUSTER;
        group = call.num_q_heads / call.num_kv_heads;
        section = call.heads_together * group / CLUSTER;
    }

    __device__ __forceinline__ int tiles() const { return m_tiles * units; }

    struct Place {
        int first_q, b, q_head, kv_head;  // KV heads of all sequences
    };

    // A thread alone takes a third of a microsecond for five divisions: few of them, and ahead of waits.
    __device__ __forceinline__ Place place(const Call& call, int t) const {
        const int first_unit = section < units ? t / (section * m_tiles) * section : 0;
        const int together = max(min(section, units - first_unit), 1);  // there may be no tile t
        const int in_section = t - first_unit * m_tiles, m = in_section / together;
        const int head = (first_unit + in_section - m * together) * CLUSTER;
        const int b = call.batch == 1 ? 0 : head / call.num_q_heads;
        return {work_out_here((m_tiles - 1 - m) * BLOCK_M), work_out_here(b), work_out_here(head - b * call.num_q_heads),
                work_out_here(head / group)};
    }
};

struct Feed {
    const Call& call;
    const Maps& maps;
    Barriers& barriers;
    Tile (&tiles)[2];
    __half* smem;
    int rank, clusters;
    Order order;
    int t;            // number of the tile that comes next
    Order::Place at;  // where it is
    int known = -1;   // the sequence that was looked up last, and what was found
    Sequence s = {};

    // Needs nothing that the kernel before this one writes.
    __device__ __forceinline__ Feed(const Call& call, const Maps& maps, Barriers& barriers, Tile (&tiles)[2], __half* smem)
        : call(call), maps(maps), barriers(barriers), tiles(tiles), smem(smem), order(call) {
        rank = CLUSTER == 1 ? 0 : rank_in_cluster(), clusters = gridDim.x / CLUSTER;
        t = blockIdx.x / CLUSTER, at = order.place(call, t);
    }

    __device__ __forceinline__ int take() const { return clusters + atomicAdd(call.counters, 1); }

    // Number t, or the next that has queries.
    __device__ __forceinline__ Tile find() {
#pragma unroll 1
        while (t < order.tiles()) {
            if (at.b != known) s = sequence(call, at.b), known = at.b;
            if (at.first_q < s.count)
                return {s.past + at.first_q, s.past + min(s.count, at.first_q + BLOCK_M), at.b * call.seq + at.first_q,
                        at.q_head};
            t = take(), at = order.place(call, t);
        }
        return {};
    }

    // Let the block know its n-th tile, and copy its queries. The cluster's first block lets the others know.
    __device__ __forceinline__ Tile begin_tile(int n) {
        Barrier* const q_full = &barriers.q_full[n % 2];
        Tile tile;
        if (rank == 0) tile = find();
        barrier_wait(&barriers.q_empty[n % 2], n / 2 % 2 ^ 1);
        if (rank == 0) {
            for (int other = 1; other < CLUSTER; ++other) {
                const float4 told = make_float4(__int_as_float(tile.first_place), __int_as_float(tile.num_keys),
                                                __int_as_float(tile.first_row), __int_as_float(tile.q_head + other));
                store_to(address_in(other, &tiles[n % 2]), told, address_in(other, &barriers.told[n % 2]));
            }
            tiles[n % 2] = tile;
        } else {
            barrier_expect(&barriers.told[n % 2], sizeof(Tile));
            barrier_wait(&barriers.told[n % 2], n / 2 % 2);
            tile = tiles[n % 2];
        }
        if (tile.num_keys == 0) {
            barrier_arrive(q_full);
            return tile;
        }
        barrier_expect(q_full, Q_BYTES);
        for (int j = 0; j < 2 * PARTS; ++j)
            load_tile(smem + n % 2 * Q + j * Q_TILE, &maps.q, q_full, tile.q_head * HEAD_DIM + j % 2 * TILE_COLUMNS,
                      j / 2 * call.batch * call.seq + tile.first_row);
        return tile;
    }

    // This block's part of BLOCK_N rows of a matrix, 128 columns to two tiles.
    __device__ __forceinline__ void copy(__half* to, const TensorMap* map, Barrier* barrier, int row) const {
        for (int j = 0; j < 2; ++j) {
            if constexpr (CLUSTER == 1) load_tile(to + j * KV_TILE, map, barrier, j * TILE_COLUMNS, row);
            else load_tile_to((1 << CLUSTER) - 1, to + j * KV_TILE + rank * PART * TILE_COLUMNS, map, barrier, j * TILE_COLUMNS,
                              row + rank * PART);
        }
    }

    // All tiles. Steps i of the ring and tiles n count on through the block.
    __device__ __forceinline__ void run() {
        const int v_rows = STORED_AS_FLOAT16 ? call.capacity : call.scratch_capacity;
        // In the first block the next tile begins ahead of this one's last values, which wait for a buffer all the same. Its number is
        // asked for a step before, if the tile is no shorter than 3; what follows that waits for the answer.
        int i = 0, n = 0, taken = t;
        int end = 0, take_at = -1, begin_at = 0, kv_head = 0, first_key = 0;
#pragma unroll 1
        while (true) {
            Tile next;
#pragma unroll 1
            for (;; ++i, first_key -= BLOCK_N) {
                const int stage = stage_of(i), parity = parity_of(i) ^ 1;
                __half* const k = smem + 2 * Q + stage * STAGE;
                if (i < end) {
                    barrier_wait(&barriers.k_empty[stage], parity);
                    barrier_expect(&barriers.k_full[stage], K_BYTES);
                    for (int part = 0; part < PARTS; ++part)
                        copy(k + part * 2 * KV_TILE, &maps.k, &barriers.k_full[stage],
                             (part * call.batch * call.num_kv_heads + kv_head) * call.scratch_capacity + first_key);
                }
                if (i == take_at) taken = take();
                if (i == begin_at) {
                    if (taken != t) t = taken, at = order.place(call, t);
                    next = begin_tile(n);
                }
                if (i == end) break;
                barrier_wait(&barriers.v_empty[stage], parity);
                barrier_expect(&barriers.v_full[stage], V_BYTES);
                copy(k + PARTS * 2 * KV_TILE, &maps.v, &barriers.v_full[stage], kv_head * v_rows + first_key);
            }
            if (next.num_keys == 0) break;
            ++n;
            const int steps = next.steps(call);
            end = i + steps;
            if (rank == 0) take_at = end - (steps > 2 ? 2 : 1);
            begin_at = rank == 0 ? end - 1 : end;
            kv_head = rank == 0 ? at.kv_head
                                : next.first_row / call.seq * call.num_kv_heads + next.q_head / order.group;
            first_key = (next.key_tiles() - 1) * BLOCK_N;
        }
        // A number was taken after each tile. Whoever has the last of them leaves the counter as it was.
        if (rank == 0 && t == clusters + order.tiles() - 1) *call.counters = 0;
        if (CLUSTER == 1) return;
        // Until all buffers are empty: then no other block arrives here any more, and this one may end.
        barrier_wait(&barriers.q_empty[(n + 1) % 2], (n + 1) / 2 % 2 ^ 1);
        for (const int last = i + STAGES; i < last; ++i) {
            barrier_wait(&barriers.k_empty[stage_of(i)], parity_of(i) ^ 1);
            barrier_wait(&barriers.v_empty[stage_of(i)], parity_of(i) ^ 1);
        }
    }
};
