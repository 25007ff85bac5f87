// project_output.cu on Hopper's own units (gemm_wgmma.cuh): the same results, but for the order of sums.
//
// Grid: any number of clusters, each has every so-many-th tile. Block 384 threads, shared memory GEMM_STAGES x (128 +
// BLOCK_N) x 64 halves. -D: those of call.cuh, BLOCK_N (64, 128 or 256), GEMM_STAGES, CLUSTER. Tensor-core bound.
#include "call.cuh"
#include "gemm_wgmma.cuh"

struct Maps {
    TensorMap attention;  // [B S, Hq D]
    TensorMap o_proj;     // [H, Hq D]
};

constexpr int VECTORS = BLOCK_N / 32;  // of 8 columns, in one row of a lane

// A lane's residual in row m: columns first_n + 32 i + 8 (lane % 4) to 7 more. All are read before any y is written, or each
// read would wait for the write before it, which may be to the same place.
__device__ __forceinline__ void load_residual(const Call& call, int m, int first_n, uint4 (&residual)[VECTORS]) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int n = first_n + 32 * i + 8 * (threadIdx.x % 4);
        const bool inside = call.residual != nullptr && m < call.batch * call.seq && n < call.hidden_size;
        residual[i] = make_uint4(0, 0, 0, 0);
        if (inside)
            residual[i] = __ldcg(reinterpret_cast<const uint4*>(call.residual + static_cast<long long>(m) * call.hidden_size + n));
    }
}

// Half 0 or 1 of what a thread's sums are: row m, which call.rows says `slot` of.
template <int Half>
__device__ __forceinline__ void store_sums(const Call& call, const gemm::Sums& sums, const uint4 (&residual)[VECTORS], int m,
                                           int slot, int first_n) {
    const int quad = threadIdx.x % 4;
    const float missing = slot == FAULT ? __int_as_float(0x7fffffff) : 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        unsigned pairs[4] = {residual[v].x, residual[v].y, residual[v].z, residual[v].w};
        transpose_quad(pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int block = 4 * v + i, column = first_n + 8 * block + 2 * quad;
            float2 value = unpack(pairs[i], STORAGE()), bias = make_float2(0.0f, 0.0f);
            if (call.o_bias != nullptr && column < call.hidden_size)
                bias = *reinterpret_cast<const float2*>(call.o_bias + column);
            value.x = fmaf(sums[4 * block + 2 * Half], call.o_unscale, bias.x) + value.x;
            value.y = fmaf(sums[4 * block + 2 * Half + 1], call.o_unscale, bias.y) + value.y;
            pairs[i] = slot >= 0 ? pack(value.x, value.y, STORAGE()) : pack(missing, missing, STORAGE());
        }
        transpose_quad(pairs);
        const int n = first_n + 32 * v + 8 * quad;
        if (m < call.batch * call.seq && n < call.hidden_size)
            *reinterpret_cast<uint4*>(call.y + static_cast<long long>(m) * call.hidden_size + n) =
                make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(gemm::THREADS, 1)
project_output_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ gemm::Ring ring;
    const int num_rows = call.batch * call.seq, k_size = call.num_q_heads * HEAD_DIM;
    const int m_tiles = (num_rows + gemm::CLUSTER_M - 1) / gemm::CLUSTER_M;
    const int n_tiles = (call.hidden_size + BLOCK_N - 1) / BLOCK_N;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32, group = threadIdx.x / WARPGROUP - 1;
    const int first_tile = blockIdx.x / CLUSTER, tiles_a_round = gridDim.x / CLUSTER;
    gemm::Cursor at;

    if (threadIdx.x == 0) ring.init();
    let_next_kernel_begin();
    gemm::synchronise();
    int begun = 0;
    if (threadIdx.x == 0 && first_tile < m_tiles * n_tiles)
        begun = gemm::begin_weights(ring, smem, &maps.o_proj, gemm::place_of(first_tile, m_tiles, n_tiles).n * BLOCK_N, k_size, 1);
    if (threadIdx.x == 0) prefetch(&maps.attention);
    wait_for_previous_kernel();
    if (group < 0) {
        give_registers<gemm::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
                const gemm::Place place = gemm::place_of(tile, m_tiles, n_tiles);
                gemm::copy(ring, at, smem, &maps.attention, &maps.o_proj, place.m * gemm::CLUSTER_M + gemm::rank() * gemm::BLOCK_M,
                           place.n * BLOCK_N, k_size, 1, begun);
                begun = 0;
            }
        } else if (blockIdx.x == 0 && threadIdx.x >= 32) {
            for (int b = threadIdx.x - 32; b < call.batch; b += WARPGROUP - 32) advance_length(call, b);
        }
        __syncwarp();
    } else {
        take_registers<gemm::CONSUMER_REGISTERS>();
        for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
            const gemm::Place place = gemm::place_of(tile, m_tiles, n_tiles);
            const int m = place.m * gemm::CLUSTER_M + gemm::rank() * gemm::BLOCK_M + group * 64 + warp * 16 + lane / 4;
            const int first_n = place.n * BLOCK_N;
            gemm::Sums sums;
            uint4 residual[2][VECTORS];
            int slots[2] = {PADDING, PADDING};
            gemm::multiply<false>(ring, at, smem, k_size / gemm::BLOCK_K, sums, [&] {
                if (m < num_rows) slots[0] = __ldcg(&call.rows[m].x);
                if (m + 8 < num_rows) slots[1] = __ldcg(&call.rows[m + 8].x);
                load_residual(call, m, first_n, residual[0]);
                load_residual(call, m + 8, first_n, residual[1]);
            });
            store_sums<0>(call, sums, residual[0], m, slots[0], first_n);
            store_sums<1>(call, sums, residual[1], m + 8, slots[1], first_n);
        }
    }
    gemm::synchronise();
}
