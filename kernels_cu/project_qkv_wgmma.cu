// project_qkv.cu on Hopper's own units (gemm_wgmma.cuh): the same results, but for the order of sums. x comes normalised
// (normalise_rows.cu), or as it is (FOLDED: Wqkv has the norm's weight in it, row_notes.cuh the rest).
//
// Grid: any number of clusters. Warps prepare cached keys, every so-many-th piece of them; then each cluster has every so-many-th
// tile of the product. Tiles of keys come first: with k_proj they take half as long again, for products of what rounding x left
// over, in 8 bits (PARTS 1); with PARTS 2 every tile has both parts of x in 16.
// Block 384 threads, shared memory GEMM_STAGES x (128 + BLOCK_N) x 64 halves, finish_heads.cuh's tables, with FOLDED notes::BYTES.
// -D: those of call.cuh, HEAD_DIM 128, BLOCK_N (128 or 256), GEMM_STAGES, CLUSTER, FLOAT32_ANGLES, FOLDED (STORAGE __half, PARTS 1).
// Tensor-core bound; one read of x and Wqkv from memory, tiles re-read from L2.
#include "finish_heads.cuh"
#include "gemm_wgmma.cuh"
#include "prepare_past.cuh"

#if PARTS == 1 && !defined(FOLDED)
#define MAY_HAVE_REST 1
#else
#define MAY_HAVE_REST 0
#endif

struct Maps {
    TensorMap hidden;    // [B S, both parts of H]; x [B S, H] if FOLDED
    TensorMap qkv_proj;  // [(Hq + 2 Hkv) 128, H]; folded_proj likewise
#if MAY_HAVE_REST
    TensorMap k_proj;  // [Hkv 128, H / 2], pairs of E4M3
#endif
};

constexpr int PAST_ROWS_A_WARP = 8;
constexpr int NO_WRAP = 1 << 30;  // of columns of W
constexpr int TABLES_BARRIER = 1;

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(gemm::THREADS, 1)
project_qkv_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ gemm::Ring ring;
    __shared__ gemm::RowTiles row_tiles;
    Tables& tables = *reinterpret_cast<Tables*>(smem + gemm::STAGES * gemm::STAGE);
    const int num_rows = call.batch * call.seq;
    const int all_m_tiles = (num_rows + gemm::CLUSTER_ROWS - 1) / gemm::CLUSTER_ROWS;
    const bool is_ragged = call.num_tokens != nullptr && all_m_tiles <= gemm::RowTiles::MOST;
    int m_tiles = all_m_tiles;
    const int past_items = call.past_tiles * (PAST_ROWS / PAST_ROWS_A_WARP) * call.batch * call.num_kv_heads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32;

    // Columns of tiles: first those with keys, which may need both parts of x.
    const int n_tiles = (call.num_q_heads + 2 * call.num_kv_heads + HEADS_A_TILE - 1) / HEADS_A_TILE;
    const int first_key_tile = call.num_q_heads / HEADS_A_TILE;
    const int key_tiles = (call.num_q_heads + call.num_kv_heads + HEADS_A_TILE - 1) / HEADS_A_TILE - first_key_tile;
    auto tile_place = [&](int tile) {
        const int others = tile - m_tiles * key_tiles;
        gemm::Place place = gemm::place_of(others < 0 ? tile : others, m_tiles, others < 0 ? key_tiles : n_tiles - key_tiles,
                                           is_ragged ? row_tiles.order : nullptr);
        // Others: half of those of queries, those of values, the other half. Values are stored soonest, and with few tiles
        // they go to the clusters that had keys.
        const int half = first_key_tile / 2, values = n_tiles - key_tiles - first_key_tile;
        if (others < 0) place.n += first_key_tile;
        else if (place.n >= half) place.n += place.n < half + values ? first_key_tile + key_tiles - half : -values;
        return place;
    };
    const int steps = call.hidden_size / gemm::BLOCK_K * PARTS;
    // Before them in tiles with keys, of the second part of x as E4M3, two to a column. Other rows of W lie outside of the map.
    const bool has_rest = MAY_HAVE_REST && call.k_proj != nullptr;
    auto rest_steps_of = [&](int tile) { return has_rest && tile < m_tiles * key_tiles ? (steps + 1) / 2 : 0; };
#if MAY_HAVE_REST
    auto key_row = [&](int n) { return n - call.num_q_heads * HEAD_DIM; };
#endif
    const int first_tile = blockIdx.x / CLUSTER, tiles_a_round = gridDim.x / CLUSTER;

    const int producer_warp = uniform(threadIdx.x / 32);

    if (threadIdx.x == 0) ring.init();
    let_next_kernel_begin();
    gemm::begin();
    gemm::Producer producer = {ring, smem};
    int begun = 0;
    if (producer_warp == 0 && !is_ragged && first_tile < m_tiles * n_tiles && elected()) {
        const int first_n = tile_place(first_tile).n * BLOCK_N, rest_steps = rest_steps_of(first_tile);
#if MAY_HAVE_REST
        begun = producer.begin_weights(&maps.k_proj, key_row(first_n), NO_WRAP, rest_steps, gemm::STAGES);
#endif
        begun += producer.begin_weights(&maps.qkv_proj, first_n, call.hidden_size, steps, gemm::STAGES - begun);
        producer.at = {};
    }
    if (threadIdx.x == 0) prefetch(&maps.hidden);
    if (threadIdx.x >= WARPGROUP) {
        tables.fetch(call, threadIdx.x - WARPGROUP);
        copies_commit();
    }
    wait_for_previous_kernel();

    if (is_ragged) {
        if (producer_warp == 1) row_tiles.find(call, all_m_tiles);
        __syncthreads();
        m_tiles = row_tiles.count;
    }
    const int num_warps = static_cast<int>(gridDim.x) * (gemm::THREADS / 32);
    for (int item = producer_warp * gridDim.x + blockIdx.x; item < past_items; item += num_warps)
        prepare_past(call, item, PAST_ROWS_A_WARP, 0, 1);

    if (producer_warp < WARPGROUP / 32) {
        give_registers<gemm::PRODUCER_REGISTERS>();
        if (producer_warp == 0 && elected()) {
            for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round, begun = 0) {
                const int first_n = tile_place(tile).n * BLOCK_N, rest_steps = rest_steps_of(tile);
#if MAY_HAVE_REST
                producer.copy_weights(&maps.k_proj, key_row(first_n), NO_WRAP, rest_steps, begun);
#endif
                producer.copy_weights(&maps.qkv_proj, first_n, call.hidden_size, steps, max(begun - rest_steps, 0));
            }
            producer.drain();
        } else if (producer_warp == 1 && elected()) {
            for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
                const int first_m = tile_place(tile).m * gemm::BLOCK_M;
                producer.copy_rows(&maps.hidden, first_m, call.hidden_size, rest_steps_of(tile));
                producer.copy_rows(&maps.hidden, first_m, 0, steps);
            }
        } else if (HAS_NOTES && producer_warp >= 2) {
            notes::write_all<gemm::CLUSTER_ROWS>(call, is_ragged ? row_tiles.order : nullptr, m_tiles, all_m_tiles,
                                                 reinterpret_cast<STORAGE*>(&tables + 1), producer_warp - 2);
        }
    } else {
        take_registers<gemm::CONSUMER_REGISTERS>();
        gemm::Consumer consumer(ring, smem);
        copies_wait<0>();
        named_wait(TABLES_BARRIER, gemm::CONSUMERS * WARPGROUP);
        const unsigned number = HAS_NOTES ? notes::number_of(call) : 0;
        for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
            const gemm::Place place = tile_place(tile);
            const int m = place.m * gemm::BLOCK_M + consumer.first_row + warp * 16 + lane / 4;
            gemm::Sums sums;
            Rows rows;
            consumer.multiply<PARTS == 2, MAY_HAVE_REST>(rest_steps_of(tile), call.rest_unscale, steps, sums,
                                                      [&] { rows.load(call, m); });
            if constexpr (HAS_NOTES) rows.complete(call, number);
            finish_tile(call, tables, sums, rows, place.n * HEADS_A_TILE);
        }
    }
}
