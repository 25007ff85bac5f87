// project_qkv.cu on Hopper's own units (gemm_wgmma.cuh): the same results, but for the order of sums.
//
// Grid: any number of clusters. Warps take rows to normalise, then cached keys, from a counter until none is left; then each
// cluster has every so-many-th tile of the product, and waits for their rows. What a tile waits for was taken by a warp
// that is running, so the launch ends however few blocks fit the GPU. Tiles of keys come first: they may take twice as long.
// Block 384 threads, shared memory GEMM_STAGES x (128 + BLOCK_N) x 64 halves.
// -D: those of call.cuh, HEAD_DIM 128, BLOCK_N (128 or 256), GEMM_STAGES, CLUSTER, FLOAT32_ANGLES.
// Tensor-core bound; one read of x and Wqkv from memory, tiles re-read from L2.
#include "gemm_wgmma.cuh"

constexpr int VEC = 2;  // consecutive dims of a thread
#include "project.cuh"

static_assert(HEAD_DIM == 128, "a head is one product's columns");

struct Maps {
    TensorMap hidden;    // [B S, HIDDEN_PARTS H]
    TensorMap qkv_proj;  // [(Hq + 2 Hkv) 128, H]
};

constexpr int HEADS_A_TILE = BLOCK_N / HEAD_DIM;
constexpr int PAST_ROWS_A_WARP = 8;

// Normalise rows first to first + Rows, and write down cosines and sines of their positions, once for all heads. A lane
// has two frequencies.
template <int Rows>
__device__ __forceinline__ void prepare_rows(const Call& call, int first, uint4 frequency) {
    const int lane = threadIdx.x % 32, count = min(Rows, call.batch * call.seq - first);
    const int positions = normalise_rows<Rows>(call, first);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        const int position = __shfl_sync(0xffffffffu, positions, r);
        float4 two;
        rotation(position, make_uint2(frequency.x, frequency.y), two.x, two.y);
        rotation(position, make_uint2(frequency.z, frequency.w), two.z, two.w);
        if (r < count)
            *reinterpret_cast<float4*>(call.rotations + static_cast<long long>(first + r) * (HEAD_DIM / 2) + 2 * lane) = two;
    }
    global_to_async();
    __syncwarp();
    if (lane == 0) add_release(&call.counters[READY + first / gemm::BLOCK_M], count);
}

// What the epilogue needs of row m: its description, and a lane's cosines and sines.
struct Row {
    int2 described;
    float4 turns[HALF_BLOCKS];

    __device__ __forceinline__ void load(const Call& call, int m) {
        const bool inside = m < call.batch * call.seq;
        described = inside ? __ldcg(call.rows + m) : make_int2(PADDING, 0);
        const float2* table = call.rotations + static_cast<long long>(m) * (HEAD_DIM / 2);
#pragma unroll
        for (int j = 0; j < HALF_BLOCKS; ++j)
            turns[j] = inside ? __ldcg(reinterpret_cast<const float4*>(table + dim_of(j, 0))) : make_float4(0, 0, 0, 0);
    }
};

// One head, and half 0 or 1 of a thread's sums of it, which is row m.
template <int Head, int Half>
__device__ __forceinline__ void finish_sums(const Call& call, const gemm::Sums& sums, int m, const Row& row, int head_idx) {
    if (head_idx >= call.num_q_heads + 2 * call.num_kv_heads) return;
    Values values;
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) values[j][e] = sums[Head * HEAD_DIM / 2 + 4 * j + 2 * Half + e] * call.qkv_unscale;
    if (call.qkv_bias != nullptr) {
#pragma unroll
        for (int j = 0; j < 2 * HALF_BLOCKS; ++j) {
            const float2 bias = *reinterpret_cast<const float2*>(call.qkv_bias + head_idx * HEAD_DIM + dim_of(j, 0));
            values[j][0] += bias.x, values[j][1] += bias.y;
        }
    }
    finish_head(call, m, row.described, head_idx, values, [&](int j) {
        rotate(values[j][0], values[j + HALF_BLOCKS][0], row.turns[j].x, row.turns[j].y);
        rotate(values[j][1], values[j + HALF_BLOCKS][1], row.turns[j].z, row.turns[j].w);
    });
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(gemm::THREADS, 1)
project_qkv_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ gemm::Ring ring;
    const int num_rows = call.batch * call.seq;
    const int m_tiles = (num_rows + gemm::CLUSTER_M - 1) / gemm::CLUSTER_M;
    const int past_items = call.past_tiles * (PAST_ROWS / PAST_ROWS_A_WARP) * call.batch * call.num_kv_heads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32, group = threadIdx.x / WARPGROUP - 1;
    gemm::Cursor at;

    // Columns of tiles: first those with keys, which need both parts of x.
    const int n_tiles = (call.num_q_heads + 2 * call.num_kv_heads + HEADS_A_TILE - 1) / HEADS_A_TILE;
    const int first_key_tile = call.num_q_heads / HEADS_A_TILE;
    const int key_tiles = (call.num_q_heads + call.num_kv_heads + HEADS_A_TILE - 1) / HEADS_A_TILE - first_key_tile;
    auto tile_place = [&](int tile) {
        const int others = tile - m_tiles * key_tiles;
        gemm::Place place = gemm::place_of(others < 0 ? tile : others, m_tiles, others < 0 ? key_tiles : n_tiles - key_tiles);
        if (others < 0) place.n += first_key_tile;
        else if (place.n >= first_key_tile) place.n += key_tiles;
        return place;
    };
    auto parts_of = [&](int tile) { return PARTS == 2 || tile < m_tiles * key_tiles ? HIDDEN_PARTS : 1; };
    const int first_tile = blockIdx.x / CLUSTER, tiles_a_round = gridDim.x / CLUSTER;

    if (threadIdx.x == 0) ring.init();
    let_next_kernel_begin();
    gemm::synchronise();
    int begun = 0;
    if (threadIdx.x == 0 && first_tile < m_tiles * n_tiles)
        begun = gemm::begin_weights(ring, smem, &maps.qkv_proj, tile_place(first_tile).n * BLOCK_N, call.hidden_size,
                                    parts_of(first_tile));
    if (threadIdx.x == 0) prefetch(&maps.hidden);
    wait_for_previous_kernel();

    // Where there are several rows to a warp, each takes some at once, to wait for them together.
    const int num_warps = static_cast<int>(gridDim.x) * (gemm::THREADS / 32);
    const int rows_a_warp = num_rows <= num_warps ? 1 : num_rows <= 2 * num_warps ? 2 : 4;
    const int row_items = (num_rows + rows_a_warp - 1) / rows_a_warp;
    const uint4 frequency = *reinterpret_cast<const uint4*>(call.frequency + 2 * lane);
    while (true) {
        int item = 0;
        if (lane == 0) item = atomicAdd(&call.counters[NEXT], 1);
        item = __shfl_sync(0xffffffffu, item, 0);
        if (item < row_items) {
            if (rows_a_warp == 1) prepare_rows<1>(call, item, frequency);
            else if (rows_a_warp == 2) prepare_rows<2>(call, 2 * item, frequency);
            else prepare_rows<4>(call, 4 * item, frequency);
        } else if (item < row_items + past_items) {
            prepare_past(call, item - row_items, PAST_ROWS_A_WARP, 0, 1);
        } else {
            break;
        }
    }

    if (group < 0) {
        give_registers<gemm::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
                const gemm::Place place = tile_place(tile);
                const int m_tile = place.m * CLUSTER + gemm::rank(), first_m = m_tile * gemm::BLOCK_M;
                const int wanted = min(gemm::BLOCK_M, num_rows - first_m);
                while (wanted > 0 && load_acquire(call.counters + READY + m_tile) < wanted) __nanosleep(50);
                global_to_async();
                gemm::copy(ring, at, smem, &maps.hidden, &maps.qkv_proj, first_m, place.n * BLOCK_N, call.hidden_size,
                           parts_of(tile), begun);
                begun = 0;
            }
        }
        __syncwarp();
    } else {
        take_registers<gemm::CONSUMER_REGISTERS>();
        for (int tile = first_tile; tile < m_tiles * n_tiles; tile += tiles_a_round) {
            const gemm::Place place = tile_place(tile);
            const int m = (place.m * CLUSTER + gemm::rank()) * gemm::BLOCK_M + group * 64 + warp * 16 + lane / 4;
            const int first_head = place.n * HEADS_A_TILE;
            gemm::Sums sums;
            Row row;  // loaded before it is needed: nothing else hides how long that takes
            gemm::multiply<PARTS == 2>(ring, at, smem, call.hidden_size / gemm::BLOCK_K * parts_of(tile), sums,
                                       [&] { row.load(call, m); });
            finish_sums<0, 0>(call, sums, m, row, first_head);
            if constexpr (HEADS_A_TILE == 2) finish_sums<1, 0>(call, sums, m, row, first_head + 1);
            row.load(call, m + 8);
            finish_sums<0, 1>(call, sums, m + 8, row, first_head);
            if constexpr (HEADS_A_TILE == 2) finish_sums<1, 1>(call, sums, m + 8, row, first_head + 1);
        }
    }
    gemm::synchronise();

    if (threadIdx.x == 0) leave_counters(call, m_tiles * CLUSTER);
}
