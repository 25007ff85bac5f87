// project_qkv.cu on Hopper's own units (gemm_wgmma.cuh), after normalise_rows.cu: the same results, but for the order of sums.
//
// Grid: any number of clusters. Warps prepare cached keys, every so-many-th piece of them; then each cluster has every so-many-th
// tile of the product. Tiles of keys come first: they take half as long again, for products of what rounding x left over, in 8
// bits (PARTS 1); with PARTS 2 every tile has both parts of x in 16.
// Block 384 threads, shared memory GEMM_STAGES x (128 + BLOCK_N) x 64 halves.
// -D: those of call.cuh, HEAD_DIM 128, BLOCK_N (128 or 256), GEMM_STAGES, CLUSTER, FLOAT32_ANGLES.
// Tensor-core bound; one read of x and Wqkv from memory, tiles re-read from L2.
#include "gemm_wgmma.cuh"

using gemm::VEC;
#include "project.cuh"

static_assert(HEAD_DIM == 128 && BLOCK_N % HEAD_DIM == 0, "a tile holds whole heads");

struct Maps {
    TensorMap hidden;    // [B S, both parts of H]
    TensorMap qkv_proj;  // [(Hq + 2 Hkv) 128, H]
#if PARTS == 1
    TensorMap k_proj;  // [Hkv 128, H / 2], pairs of E4M3
#endif
};

constexpr int PAST_ROWS_A_WARP = 8;
constexpr int NO_WRAP = 1 << 30;  // of columns of W

// One head, and half 0 or 1 of a thread's sums of it.
template <int Head, int Half>
__device__ __forceinline__ void take_sums(const gemm::Sums& sums, float scale, Values& values) {
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) values[j][e] = sums[Head * HEAD_DIM / 2 + 4 * j + 2 * Half + e] * scale;
}

constexpr int HEADS_A_TILE = BLOCK_N / HEAD_DIM;

// What becomes of a thread's sums, rows m and m + 8 of each head. One loop: unrolled, it would not fit the instruction cache.
__device__ __forceinline__ void finish_sums(const Call& call, const gemm::Sums& sums, int m, const int2 (&rows)[2], int first_head) {
    float2 turns[HALF_BLOCKS][2];  // cosine and sine, the same for both heads
#pragma unroll 1
    for (int piece = 0; piece < 2 * HEADS_A_TILE; ++piece) {
        const int half = piece / HEADS_A_TILE, head = piece % HEADS_A_TILE, head_idx = first_head + head;
        const int2 row = half ? rows[1] : rows[0];
        if (head == 0) {
#pragma unroll
            for (int j = 0; j < HALF_BLOCKS; ++j) {
                const uint4 frequency = *reinterpret_cast<const uint4*>(call.frequency + dim_of(j, 0));
                rotation(row.y, make_uint2(frequency.x, frequency.y), turns[j][0].x, turns[j][0].y);
                rotation(row.y, make_uint2(frequency.z, frequency.w), turns[j][1].x, turns[j][1].y);
            }
        }
        if (head_idx >= call.num_q_heads + 2 * call.num_kv_heads) continue;
        Values values;
        if (head == 0 && half == 0) take_sums<0, 0>(sums, call.qkv_unscale, values);
        else if (head == 0) take_sums<0, 1>(sums, call.qkv_unscale, values);
        else if (half == 0) take_sums<HEADS_A_TILE - 1, 0>(sums, call.qkv_unscale, values);
        else take_sums<HEADS_A_TILE - 1, 1>(sums, call.qkv_unscale, values);
        if (call.qkv_bias != nullptr) {
#pragma unroll
            for (int j = 0; j < 2 * HALF_BLOCKS; ++j) {
                const float2 bias = *reinterpret_cast<const float2*>(call.qkv_bias + head_idx * HEAD_DIM + dim_of(j, 0));
                values[j][0] += bias.x, values[j][1] += bias.y;
            }
        }
        finish_head(call, m + 8 * half, row, head_idx, values, [&](int j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) rotate(values[j][e], values[j + HALF_BLOCKS][e], turns[j][e].x, turns[j][e].y);
        });
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(gemm::THREADS, 1)
project_qkv_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ gemm::Ring ring;
    __shared__ gemm::RowTiles row_tiles;
    const int num_rows = call.batch * call.seq;
    const int all_m_tiles = (num_rows + gemm::CLUSTER_ROWS - 1) / gemm::CLUSTER_ROWS;
    const bool is_ragged = call.num_tokens != nullptr && all_m_tiles <= gemm::RowTiles::MOST;
    int m_tiles = all_m_tiles;
    const int past_items = call.past_tiles * (PAST_ROWS / PAST_ROWS_A_WARP) * call.batch * call.num_kv_heads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32;

    // Columns of tiles: first those with keys, which need both parts of x.
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
    auto rest_steps_of = [&](int tile) { return PARTS == 1 && tile < m_tiles * key_tiles ? (steps + 1) / 2 : 0; };
#if PARTS == 1
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
#if PARTS == 1
        begun = producer.begin_weights(&maps.k_proj, key_row(first_n), NO_WRAP, rest_steps, gemm::STAGES);
#endif
        begun += producer.begin_weights(&maps.qkv_proj, first_n, call.hidden_size, steps, gemm::STAGES - begun);
        producer.at = {};
    }
    if (threadIdx.x == 0) prefetch(&maps.hidden);
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
#if PARTS == 1
                producer.copy_weights(&maps.k_proj, key_row(first_n), NO_WRAP, rest_steps, begun);
#endif
                producer.copy_weights(&maps.qkv_proj, first_n, call.hidden_size, steps, max(begun - rest_steps, 0));
            }
        } else if (producer_warp == 1 && elected()) {
            for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
                const int first_m = tile_place(tile).m * gemm::BLOCK_M;
                producer.copy_rows(&maps.hidden, first_m, call.hidden_size, rest_steps_of(tile));
                producer.copy_rows(&maps.hidden, first_m, 0, steps);
            }
        }
        __syncwarp();
    } else {
        take_registers<gemm::CONSUMER_REGISTERS>();
        gemm::Consumer consumer(ring, smem);
        for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
            const gemm::Place place = tile_place(tile);
            const int m = place.m * gemm::BLOCK_M + consumer.first_row + warp * 16 + lane / 4;
            gemm::Sums sums;
            int2 rows[2];
            consumer.multiply<PARTS == 2, PARTS == 1>(rest_steps_of(tile), call.rest_unscale, steps, sums, [&] {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    rows[half] = m + 8 * half < num_rows ? __ldcg(call.rows + m + 8 * half) : make_int2(PADDING, 0);
            });
            finish_sums(call, sums, m, rows, place.n * HEADS_A_TILE);
        }
    }
    gemm::end();
}
