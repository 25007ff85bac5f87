// project_output.cu on Hopper's own units (gemm_wgmma.cuh): the same results, but for the order of sums.
//
// Grid: any number of clusters, each has every so-many-th tile. Block 384 threads, shared memory GEMM_STAGES x (128 +
// BLOCK_N) x 64 halves. -D: those of call.cuh, BLOCK_N (64, 128 or 256), GEMM_STAGES, CLUSTER. Tensor-core bound.
// With SPLITS 2 (then CLUSTER is 1), where tiles are so few that half of the GPU would have none, two blocks have half of k each;
// each sends the other what it has of one row in two, and stores the other row. Shared memory: BLOCK_N / 4 KB more for that.
#include "gemm_wgmma.cuh"

#ifndef SPLITS
#define SPLITS 1
#endif

struct Maps {
    TensorMap attention;  // [B S, Hq D]
    TensorMap o_proj;     // [H, Hq D]
};

constexpr int VECTORS = BLOCK_N / 32;  // of 8 columns, in one row of a thread
constexpr int COLUMNS = 8 * VECTORS;
constexpr int ROWS = 2 / SPLITS;  // of a thread, that this block stores
constexpr int MULTIPLYING = gemm::CONSUMERS * WARPGROUP;  // threads
static_assert(SPLITS == 1 || (SPLITS == 2 && CLUSTER == 1), "blocks of a cluster share W, or a tile");

// A thread's residual in row m: columns first_n + 32 v + 8 quad to 7 more. All are read before any y is written, or each read
// would wait for the write before it, which may be to the same place. What lies outside is read elsewhere, not left out: loads
// that depend on conditions are not under way together.
__device__ __forceinline__ void load_residual(const Call& call, int m, int first_n, uint4 (&residual)[VECTORS]) {
    const STORAGE* row = call.residual + static_cast<long long>(min(m, call.batch * call.seq - 1)) * call.hidden_size;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int n = min(first_n + 32 * v + 8 * (static_cast<int>(threadIdx.x) % 4), call.hidden_size - 8);
        residual[v] = __ldcg(reinterpret_cast<const uint4*>(row + n));
    }
}

// Half 0 or 1 of what a thread's sums are: of row m or m + 8.
template <int Half>
__device__ __forceinline__ void take_row(const gemm::Sums& sums, float (&row)[COLUMNS]) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) row[i] = sums[i / 2 * 4 + 2 * Half + i % 2];
}

// A thread's sums of row m, which call.rows says `slot` of.
__device__ __forceinline__ void store_row(const Call& call, const float (&sums)[COLUMNS], const uint4 (&residual)[VECTORS], int m,
                                          int slot, int first_n) {
    const float missing = slot == FAULT ? __int_as_float(0x7fffffff) : 0.0f;
    STORAGE* row = call.y + static_cast<long long>(m) * call.hidden_size;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        unsigned pairs[4] = {residual[v].x, residual[v].y, residual[v].z, residual[v].w};
        const int n = first_n + 32 * v + 8 * (threadIdx.x % 4);
        if (m >= call.batch * call.seq || n >= call.hidden_size) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 value = unpack(pairs[i], STORAGE()), bias = make_float2(0.0f, 0.0f);
            if (call.o_bias != nullptr) bias = *reinterpret_cast<const float2*>(call.o_bias + n + 2 * i);
            value.x = fmaf(sums[8 * v + 2 * i], call.o_unscale, bias.x) + value.x;
            value.y = fmaf(sums[8 * v + 2 * i + 1], call.o_unscale, bias.y) + value.y;
            pairs[i] = slot >= 0 ? pack(value.x, value.y, STORAGE()) : pack(missing, missing, STORAGE());
        }
        *reinterpret_cast<uint4*>(row + n) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// Between two blocks that split k: where sums of the other arrive.
struct Exchange {
    Barrier full, empty;

    __device__ __forceinline__ void init() {
        barrier_init(&full, 1);
        barrier_init(&empty, MULTIPLYING / 32);
    }
};

// Send the other block its rows of tile number `tile`, and add to `kept` what it sends. All threads that multiply do this. Neither
// block can end before the other has what it waits for.
__device__ __forceinline__ void exchange_sums(Exchange& exchange, float4* received, int other, int tile, bool is_last,
                                              const float (&sent)[COLUMNS], float (&kept)[COLUMNS]) {
    constexpr int PIECES = COLUMNS / 4, BYTES = PIECES * MULTIPLYING * 16;
    const int thread = threadIdx.x - WARPGROUP;
    received += thread;
    const unsigned to = address_in(other, received), barrier = address_in(other, &exchange.full);
    if (thread == 0) barrier_expect(&exchange.full, BYTES);
    if (tile > 0) barrier_wait(&exchange.empty, (tile - 1) % 2);
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
        store_to(to + i * MULTIPLYING * 16, make_float4(sent[4 * i], sent[4 * i + 1], sent[4 * i + 2], sent[4 * i + 3]), barrier);
    barrier_wait(&exchange.full, tile % 2);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const float4 more = received[i * MULTIPLYING];
        kept[4 * i] += more.x, kept[4 * i + 1] += more.y, kept[4 * i + 2] += more.z, kept[4 * i + 3] += more.w;
    }
    __syncwarp();
    if (!is_last && thread % 32 == 0) barrier_arrive_at(address_in(other, &exchange.empty));
}

extern "C" __global__ void __cluster_dims__(CLUSTER * SPLITS, 1, 1) __launch_bounds__(gemm::THREADS, 1)
project_output_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ gemm::Ring ring;
    __shared__ gemm::RowTiles row_tiles;
    __shared__ Exchange exchange;
    const int num_rows = call.batch * call.seq, k_size = call.num_q_heads * HEAD_DIM / SPLITS;
    const int split = SPLITS == 1 ? 0 : rank_in_cluster();
    const int all_m_tiles = (num_rows + gemm::CLUSTER_ROWS - 1) / gemm::CLUSTER_ROWS;
    const bool is_ragged = call.num_tokens != nullptr && all_m_tiles <= gemm::RowTiles::MOST;
    int m_tiles = all_m_tiles;
    const int n_tiles = (call.hidden_size + BLOCK_N - 1) / BLOCK_N;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32, steps = k_size / gemm::BLOCK_K;
    const int first_tile = blockIdx.x / (CLUSTER * SPLITS), tiles_a_round = gridDim.x / (CLUSTER * SPLITS);

    const int producer_warp = uniform(threadIdx.x / 32);

    if (threadIdx.x == 0) {
        if constexpr (SPLITS > 1) exchange.init();
        ring.init();
    }
    let_next_kernel_begin();
    if constexpr (SPLITS > 1) cluster_meet();
    else gemm::begin();
    gemm::Producer producer = {ring, smem, split * k_size};
    int begun = 0;
    const short* const order = is_ragged ? row_tiles.order : nullptr;
    auto place_of = [&](int tile) { return gemm::place_of(tile, m_tiles, n_tiles, order); };
    if (producer_warp == 0 && !is_ragged && first_tile < m_tiles * n_tiles && elected()) {
        begun = producer.begin_weights(&maps.o_proj, place_of(first_tile).n * BLOCK_N, k_size, steps, gemm::STAGES);
        producer.at = {};
    }
    if (threadIdx.x == 0) prefetch(&maps.attention);
    wait_for_previous_kernel();
    if (is_ragged) {
        if (producer_warp == 0) row_tiles.find(call, all_m_tiles);
        __syncthreads();
        m_tiles = row_tiles.count;
    }
    if (producer_warp < WARPGROUP / 32) {
        give_registers<gemm::PRODUCER_REGISTERS>();
        if (producer_warp == 0 && elected()) {
            for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round, begun = 0)
                producer.copy_weights(&maps.o_proj, place_of(tile).n * BLOCK_N, k_size, steps, begun);
            producer.drain();
        } else if (producer_warp == 1 && elected()) {
            for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round)
                producer.copy_rows(&maps.attention, place_of(tile).m * gemm::BLOCK_M, 0, steps);
        } else if (producer_warp == 2 && blockIdx.x == 0) {
            for (int b = lane; b < call.batch; b += 32) advance_length(call, b);
        }
    } else {
        take_registers<gemm::CONSUMER_REGISTERS>();
        gemm::Consumer consumer(ring, smem);
        int number = 0;  // of tiles done
        for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
            const gemm::Place place = place_of(tile);
            const int first_m = place.m * gemm::BLOCK_M + consumer.first_row + warp * 16 + lane / 4 + split * 8;
            const int first_n = place.n * BLOCK_N;
            gemm::Sums sums;
            uint4 residual[ROWS][VECTORS] = {};
            int slots[ROWS];
            consumer.multiply<false, false>(0, 0.0f, steps, sums, [&] {
#pragma unroll
                for (int i = 0; i < ROWS; ++i) slots[i] = __ldcg(&call.rows[min(first_m + 8 * i, num_rows - 1)].x);
                if (call.residual == nullptr) return;
#pragma unroll
                for (int i = 0; i < ROWS; ++i) load_residual(call, first_m + 8 * i, first_n, residual[i]);
            });
            float rows[2][COLUMNS];
            take_row<0>(sums, rows[0]), take_row<1>(sums, rows[1]);
            if constexpr (SPLITS > 1) {
                if (split == 1) {
#pragma unroll
                    for (int i = 0; i < COLUMNS; ++i) {
                        const float kept = rows[1][i];
                        rows[1][i] = rows[0][i], rows[0][i] = kept;
                    }
                }
                exchange_sums(exchange, reinterpret_cast<float4*>(smem + gemm::STAGES * gemm::STAGE), split ^ 1, number++,
                              tile + tiles_a_round >= m_tiles * n_tiles, rows[1], rows[0]);
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) store_row(call, rows[i], residual[i], first_m + 8 * i, slots[i], first_n);
        }
        // Rows of tiles that are padding alone: zeros, eight columns to a thread.
        const int pieces = call.hidden_size / 8;
        for (int i = m_tiles + first_tile; i < all_m_tiles; i += tiles_a_round) {
            const int first_m = row_tiles.order[i] * gemm::CLUSTER_ROWS + gemm::rank() * gemm::BLOCK_M;
            const int rows = min(gemm::BLOCK_M, num_rows - first_m);
            uint4* const y = reinterpret_cast<uint4*>(call.y + static_cast<long long>(first_m) * call.hidden_size);
            for (int piece = threadIdx.x - WARPGROUP; piece < rows * pieces; piece += gemm::CONSUMERS * WARPGROUP)
                y[piece] = make_uint4(0, 0, 0, 0);
        }
    }
}
