// project_output.cu on Hopper's own units (gemm_wgmma.cuh): the same results, but for the order of sums.
//
// Grid: any number of clusters, each has every so-many-th tile. Block 384 threads, shared memory GEMM_STAGES x (128 +
// BLOCK_N) x 64 halves. -D: those of call.cuh, BLOCK_N (64, 128 or 256), GEMM_STAGES, CLUSTER. Tensor-core bound.
#include "gemm_wgmma.cuh"

struct Maps {
    TensorMap attention;  // [B S, Hq D]
    TensorMap o_proj;     // [H, Hq D]
};

constexpr int VECTORS = BLOCK_N / 32;  // of 8 columns, in one row of a thread

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

// Half 0 or 1 of what a thread's sums are: row m, which call.rows says `slot` of.
template <int Half>
__device__ __forceinline__ void store_sums(const Call& call, const gemm::Sums& sums, const uint4 (&residual)[VECTORS], int m,
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
            const int sum = 4 * (4 * v + i) + 2 * Half;
            value.x = fmaf(sums[sum], call.o_unscale, bias.x) + value.x;
            value.y = fmaf(sums[sum + 1], call.o_unscale, bias.y) + value.y;
            pairs[i] = slot >= 0 ? pack(value.x, value.y, STORAGE()) : pack(missing, missing, STORAGE());
        }
        *reinterpret_cast<uint4*>(row + n) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(gemm::THREADS, 1)
project_output_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ gemm::Ring ring;
    __shared__ gemm::RowTiles row_tiles;
    const int num_rows = call.batch * call.seq, k_size = call.num_q_heads * HEAD_DIM;
    const int all_m_tiles = (num_rows + gemm::CLUSTER_ROWS - 1) / gemm::CLUSTER_ROWS;
    const bool is_ragged = call.num_tokens != nullptr && all_m_tiles <= gemm::RowTiles::MOST;
    int m_tiles = all_m_tiles;
    const int n_tiles = (call.hidden_size + BLOCK_N - 1) / BLOCK_N;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32, steps = k_size / gemm::BLOCK_K;
    const int first_tile = blockIdx.x / CLUSTER, tiles_a_round = gridDim.x / CLUSTER;

    const int producer_warp = uniform(threadIdx.x / 32);

    if (threadIdx.x == 0) ring.init();
    let_next_kernel_begin();
    gemm::begin();
    gemm::Producer producer = {ring, smem};
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
        for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
            const gemm::Place place = place_of(tile);
            const int m = place.m * gemm::BLOCK_M + consumer.first_row + warp * 16 + lane / 4;
            const int first_n = place.n * BLOCK_N;
            gemm::Sums sums;
            uint4 residual[2][VECTORS] = {};
            int slots[2];
            consumer.multiply<false, false>(0, 0.0f, steps, sums, [&] {
#pragma unroll
                for (int half = 0; half < 2; ++half) slots[half] = __ldcg(&call.rows[min(m + 8 * half, num_rows - 1)].x);
                if (call.residual == nullptr) return;
#pragma unroll
                for (int half = 0; half < 2; ++half) load_residual(call, m + 8 * half, first_n, residual[half]);
            });
            store_sums<0>(call, sums, residual[0], m, slots[0], first_n);
            store_sums<1>(call, sums, residual[1], m + 8, slots[1], first_n);
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
