// The tile of a matrix product x W^T that both projections are made of, on Hopper: float16 in, float32 sums.
//
// One thread copies tiles of x and W through a ring of GEMM_STAGES (-D) buffers, two warpgroups have 64 rows each and all
// BLOCK_N (-D) columns. Copies for the next tile begin before this one is stored. CLUSTER (-D) blocks with rows below each
// other share W: each copies a part of its rows to all, so that L2 is read less often.
#pragma once
#include "wgmma.cuh"

namespace gemm {

constexpr int CONSUMERS = 2;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int BLOCK_K = TILE_COLUMNS;
constexpr int STAGES = GEMM_STAGES;
constexpr int BOX_ROWS = BLOCK_N / CLUSTER < 128 ? BLOCK_N / CLUSTER : 128;  // of W, in one copy
constexpr int A_TILE = BLOCK_M * BLOCK_K, B_TILE = BLOCK_N * BLOCK_K, STAGE = A_TILE + B_TILE;  // halves
constexpr int CLUSTER_M = BLOCK_M * CLUSTER;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

using Sums = float[BLOCK_N / 2];  // of a thread

struct Ring {
    Barrier full[STAGES], empty[STAGES];

    // One thread does this; a synchronise() must follow.
    __device__ __forceinline__ void init() {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], CLUSTER * CONSUMERS * 4);
        }
        barriers_initialised();
    }

    // A warp has read a buffer: whoever copies to it may do so again.
    __device__ __forceinline__ void release(int stage) {
        if constexpr (CLUSTER == 1) {
            if (threadIdx.x % 32 == 0) barrier_arrive(&empty[stage]);
        } else {
            if (threadIdx.x % 32 < CLUSTER) barrier_arrive_at(&empty[stage], threadIdx.x % 32);
        }
    }
};

// Wait for all threads that share a ring: after init, and before a block may end.
__device__ __forceinline__ void synchronise() {
    if constexpr (CLUSTER == 1) __syncthreads();
    else cluster_sync();
}

__device__ __forceinline__ int rank() { return CLUSTER == 1 ? 0 : rank_in_cluster(); }

struct Cursor {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Copy a step's tile of W, rows first_n on and columns k on, to this block or to the cluster: a part of it each.
__device__ __forceinline__ void copy_weights(Ring& ring, int stage, __half* smem, const TensorMap* b, int first_n, int k) {
    const int first = rank() * (BLOCK_N / CLUSTER);
    barrier_expect(&ring.full[stage], STAGE * 2);
#pragma unroll
    for (int n = first; n < first + BLOCK_N / CLUSTER; n += BOX_ROWS) {
        __half* const tile = smem + stage * STAGE + A_TILE + n * BLOCK_K;
        if constexpr (CLUSTER == 1) load_tile(tile, b, &ring.full[stage], k, first_n + n);
        else load_tile_to((1 << CLUSTER) - 1, tile, b, &ring.full[stage], k, first_n + n);
    }
}

// Copy what one tile of the result takes: rows first_m on of a [rows, parts * k_size] and rows first_n on of b [., k_size].
// Of the first `begun` steps the weights are under way.
__device__ __forceinline__ void copy(Ring& ring, Cursor& at, __half* smem, const TensorMap* a, const TensorMap* b,
                                     int first_m, int first_n, int k_size, int parts, int begun) {
#pragma unroll 1
    for (int column = 0, k = 0; column < parts * k_size; column += BLOCK_K) {
        if (column >= begun * BLOCK_K) {
            barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
            copy_weights(ring, at.stage, smem, b, first_n, k);
        }
        load_tile(smem + at.stage * STAGE, a, &ring.full[at.stage], column, first_m);
        at.advance();
        k += BLOCK_K;
        if (k == k_size) k = 0;
    }
}

// Begin copying weights for the first tile, which do not depend on kernels before; return for how many steps.
__device__ __forceinline__ int begin_weights(Ring& ring, __half* smem, const TensorMap* b, int first_n, int k_size, int parts) {
    const int steps = min(STAGES, parts * k_size / BLOCK_K);
    for (int i = 0; i < steps; ++i) copy_weights(ring, i, smem, b, first_n, i * BLOCK_K % k_size);
    return steps;
}

// Products of columns 16 First to 16 (First + Count) of one buffer.
template <int First, int Count>
__device__ __forceinline__ void start_products(const __half* stage, Sums& sums, bool add) {
    const unsigned address = shared_address(stage);
    const unsigned long long a = operand(address + (threadIdx.x / WARPGROUP - 1) * 64 * BLOCK_K * 2);
    const unsigned long long b = operand(address + A_TILE * 2);
    products_begin();
#pragma unroll
    for (int i = First; i < First + Count; ++i) ::multiply(sums, a + i * 2, b + i * 2, add || i > First);
    products_commit();
}

// The sums of a warpgroup's rows over so many buffers. Tensor cores cut off what does not fit a float32 sum. With Exact
// the sums of 32 products are added up outside them, rounded to nearest: eight times closer, for twice the registers.
// `meanwhile` is done once the last buffer is full, while the products before are under way.
template <bool Exact, typename Meanwhile>
__device__ __forceinline__ void multiply(Ring& ring, Cursor& at, const __half* smem, int steps, Sums& sums,
                                         Meanwhile meanwhile) {
    if constexpr (Exact) {
        Sums part;
        auto add_up = [&]() {
            products_wait<0>();
            settled(part);
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; ++i) sums[i] += part[i];
        };
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) sums[i] = 0.0f;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            barrier_wait(&ring.full[at.stage], at.parity);
            start_products<0, 2>(smem + at.stage * STAGE, part, false);
            add_up();
            start_products<2, 2>(smem + at.stage * STAGE, part, false);
            add_up();
            ring.release(at.stage);
            at.advance();
        }
        meanwhile();
    } else {
        int before = 0;
        auto take = [&](int step) {
            barrier_wait(&ring.full[at.stage], at.parity);
            start_products<0, 4>(smem + at.stage * STAGE, sums, step > 0);
            products_wait<1>();
            if (step > 0) ring.release(before);
            before = at.stage;
            at.advance();
        };
#pragma unroll 1
        for (int step = 0; step < steps - 1; ++step) take(step);
        barrier_wait(&ring.full[at.stage], at.parity);  // whoever copied has waited for the rows of x, be it for one step
        meanwhile();
        take(steps - 1);
        products_wait<0>();
        settled(sums);
        ring.release(before);
    }
}

// Tiles of the result in an order in which GROUP rows of tiles share tiles of W while they are in L2.
struct Place {
    int m, n;  // in tiles
};

__device__ __forceinline__ Place place_of(int tile, int m_tiles, int n_tiles) {
    constexpr int GROUP = 16 / CLUSTER;
    const int group = tile / (GROUP * n_tiles), in_group = tile % (GROUP * n_tiles);
    const int rows = min(GROUP, m_tiles - group * GROUP);
    return {group * GROUP + in_group % rows, in_group / rows};
}

}  // namespace gemm
