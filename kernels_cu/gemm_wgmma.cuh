// The tile of a matrix product x W^T that both projections are made of, on Hopper: float16 in, float32 sums.
//
// Two threads copy tiles of x and W through a ring of GEMM_STAGES (-D) buffers, two warpgroups have 64 rows each and all
// BLOCK_N (-D) columns; of every 32, a thread has 8 that follow each other: sum 4 j + 2 half + e is column
// column_of<8>(j, quad, e). Copies for the next tile begin before this one is stored. CLUSTER (-D) blocks with rows below each
// other share W: each copies a part of its rows to all, so that L2 is read less often.
#pragma once
#include "call.cuh"
#include "wgmma.cuh"

namespace gemm {

constexpr int CONSUMERS = 2;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int BLOCK_K = TILE_COLUMNS;
constexpr int STAGES = GEMM_STAGES;
constexpr int BOX_ROWS = BLOCK_N / CLUSTER < 128 ? BLOCK_N / CLUSTER : 128;  // of W, in one copy
constexpr int A_TILE = BLOCK_M * BLOCK_K, B_TILE = BLOCK_N * BLOCK_K, STAGE = A_TILE + B_TILE;  // halves
constexpr int CLUSTER_ROWS = BLOCK_M * CLUSTER;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

using Sums = float[BLOCK_N / 2];  // of a thread

__device__ __forceinline__ int rank() { return CLUSTER == 1 ? 0 : rank_in_cluster(); }

struct Ring {
    Barrier full[STAGES], empty[STAGES];

    // One thread does this; a begin() must follow.
    __device__ __forceinline__ void init() {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], CLUSTER * CONSUMERS * 4);
        }
        barriers_initialised();
    }
};

// Wait for all threads that share a ring, after init.
__device__ __forceinline__ void begin() {
    if constexpr (CLUSTER == 1) __syncthreads();
    else cluster_meet();
}

struct Cursor {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// A thread that copies: one has all of W, one all of x, as neither alone would keep up with the products.
struct Producer {
    Ring& ring;
    __half* smem;
    int first_k = 0;  // column of x and W where this block's k begin
    Cursor at = {};

    __device__ __forceinline__ void wait() const { barrier_wait(&ring.empty[at.stage], at.parity ^ 1); }

    // This block's part of a step's tile of W, rows first_n on and columns k on.
    __device__ __forceinline__ void copy_step(const TensorMap* w, int first_n, int k) const {
        const int first = rank() * (BLOCK_N / CLUSTER);
        barrier_expect(&ring.full[at.stage], STAGE * 2);
#pragma unroll
        for (int n = first; n < first + BLOCK_N / CLUSTER; n += BOX_ROWS) {
            __half* const tile = smem + at.stage * STAGE + A_TILE + n * BLOCK_K;
            if constexpr (CLUSTER == 1) load_quads(tile, w, &ring.full[at.stage], first_k + k, first_n + n);
            else load_quads_to((1 << CLUSTER) - 1, tile, w, &ring.full[at.stage], first_k + k, first_n + n);
        }
    }

    // What one tile of the result takes: rows first_n on of W [., k_size], over and over; of the first `begun` steps they are
    // under way.
    __device__ __forceinline__ void copy_weights(const TensorMap* w, int first_n, int k_size, int steps, int begun) {
#pragma unroll 1
        for (int step = 0, k = 0; step < steps; ++step) {
            if (step >= begun) {
                wait();
                copy_step(w, first_n, k);
            }
            at.advance();
            k += BLOCK_K;
            if (k == k_size) k = 0;
        }
    }

    // Begin with that of the first tile, which does not depend on kernels before, in the first `room` buffers; return for how
    // many steps. Afterwards `at` must go back to the beginning.
    __device__ __forceinline__ int begin_weights(const TensorMap* w, int first_n, int k_size, int steps, int room) {
        const int begun = min(room, steps);
#pragma unroll 1
        for (int step = 0; step < begun; ++step, at.advance()) copy_step(w, first_n, step * BLOCK_K % k_size);
        return begun;
    }

    // Wait until all buffers are empty: nobody arrives here any more, and the block may end. Ends of all threads of a cluster
    // together would cost each a wait for its stores.
    __device__ __forceinline__ void drain() {
        for (int i = 0; i < STAGES; ++i, at.advance()) wait();
    }

    // Rows first_m on of x, columns k on.
    __device__ __forceinline__ void copy_rows(const TensorMap* x, int first_m, int k, int steps) {
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            wait();
            load_tile(smem + at.stage * STAGE, x, &ring.full[at.stage], first_k + k + step * BLOCK_K, first_m);
            at.advance();
        }
    }
};

// A warpgroup that multiplies.
struct Consumer {
    Ring& ring;
    Cursor at;
    int first_row;            // of a tile
    unsigned long long a, b;  // operands in the first buffer
    unsigned empty;           // where a lane arrives when its warp has read that: at the blocks that copy to it
    bool arrives;

    __device__ __forceinline__ Consumer(Ring& ring, const __half* smem) : ring(ring) {
        first_row = (uniform(threadIdx.x / WARPGROUP) - 1) * 64;
        a = operand(shared_address(smem) + first_row * BLOCK_K * 2);
        b = operand(shared_address(smem) + A_TILE * 2);
        const int other = threadIdx.x % 32;
        arrives = other < CLUSTER;
        empty = CLUSTER == 1 ? 0 : address_in(arrives ? other : 0, &ring.empty[0]);
    }

    __device__ __forceinline__ void wait() const { barrier_wait(&ring.full[at.stage], at.parity); }

    __device__ __forceinline__ void release(int stage) const {
        if (!arrives) return;
        if constexpr (CLUSTER == 1) barrier_arrive(&ring.empty[stage]);
        else barrier_arrive_at(empty + stage * static_cast<int>(sizeof(Barrier)));
    }

    // Products of columns 16 First to 16 (First + Count) of one buffer, or of as many bytes of E4M3.
    template <int First, int Count, bool OfE4M3 = false, typename S>
    __device__ __forceinline__ void start_products(S& sums, bool add) const {
        const unsigned stage = at.stage * (STAGE * 2 / 16);
        products_begin();
#pragma unroll
        for (int i = First; i < First + Count; ++i) {
            if constexpr (OfE4M3) multiply_e4m3(sums, a + stage + i * 2, b + stage + i * 2, add || i > First);
            else ::multiply(sums, a + stage + i * 2, b + stage + i * 2, add || i > First);
        }
        products_commit();
    }

    // The sums of its rows over so many buffers; before them, with HasRest, over `rest_steps` of E4M3, times rest_unscale.
    // Tensor cores cut off what does not fit a float32 sum. With Exact the sums of 32 products are added up outside them,
    // rounded to nearest: eight times closer, for three times the registers.
    // `meanwhile` is done a few steps before the end, or after it with Exact, to load what comes after; a buffer of x has been
    // waited for by then.
    template <bool Exact, bool HasRest, typename Meanwhile>
    __device__ __forceinline__ void multiply(int rest_steps, float rest_unscale, int steps, Sums& sums, Meanwhile meanwhile) {
        if constexpr (Exact) {
            Sums parts[2];  // one is multiplied while the other is added
            auto add_up = [&](Sums& part) {
                settled(part);
#pragma unroll
                for (int i = 0; i < BLOCK_N / 2; ++i) sums[i] += part[i];
            };
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; ++i) sums[i] = 0.0f;
#pragma unroll 1
            for (int step = 0; step < steps; step += 2) {  // there are as many of either half of x
                wait();
                start_products<0, 2>(parts[0], false);
                start_products<2, 2>(parts[1], false);
                products_wait<1>();
                add_up(parts[0]);
                const int first = at.stage;
                at.advance();
                wait();
                start_products<0, 2>(parts[0], false);
                products_wait<1>();
                release(first);
                add_up(parts[1]);
                start_products<2, 2>(parts[1], false);
                products_wait<1>();
                add_up(parts[0]);
                products_wait<0>();
                release(at.stage);
                at.advance();
                add_up(parts[1]);
            }
            meanwhile();
        } else {
            int before = 0;
            auto started = [&](int step) {
                products_wait<1>();
                if (step > 0) release(before);
                before = at.stage;
                at.advance();
            };
            auto end = [&]() {
                products_wait<0>();
                settled(sums);
                release(before);
            };
            if constexpr (HasRest) {
                if (rest_steps > 0) {
#pragma unroll 1
                    for (int step = 0; step < rest_steps; ++step) {
                        wait();
                        start_products<0, 4, HasRest>(sums, step > 0);
                        started(step);
                    }
                    end();
#pragma unroll
                    for (int i = 0; i < BLOCK_N / 2; ++i) sums[i] *= rest_unscale;
                }
            }
            auto take = [&](int step) {
                wait();
                start_products<0, 4>(sums, step + rest_steps > 0);
                started(step);
            };
            const int last = max(steps - 4, 1);
#pragma unroll 1
            for (int step = 0; step < last; ++step) take(step);
            meanwhile();
#pragma unroll 1
            for (int step = last; step < steps; ++step) take(step);
            end();
        }
    }
};

// The rows of tiles that a cluster has, and which of them are not padding alone. Shared memory.
struct RowTiles {
    static constexpr int MOST = 400;  // what is static must fit 1 KB: wgmma.py
    int count;  // of those that are not, which come first in `order`, the others last
    short order[MOST];

    static __device__ __forceinline__ bool is_padding(const Call& call, int first) {
        const int end = min(first + CLUSTER_ROWS, call.batch * call.seq);
        for (int b = first / call.seq; b * call.seq < end; ++b)
            if (max(first - b * call.seq, 0) < __ldcg(call.num_tokens + b)) return false;
        return true;
    }

    // One warp does this, once kernels before have ended.
    __device__ __forceinline__ void find(const Call& call, int num_tiles) {
        const int lane = threadIdx.x % 32;
        int used = 0;
        for (int first = 0; first < num_tiles; first += 32) {
            const int tile = first + lane;
            const unsigned in_use = __ballot_sync(0xffffffffu, tile < num_tiles && !is_padding(call, tile * CLUSTER_ROWS));
            const int before = __popc(in_use & ((1u << lane) - 1));
            if (tile < num_tiles)
                order[in_use >> lane & 1 ? used + before : num_tiles - 1 - (first - used + lane - before)] =
                    static_cast<short>(tile);
            used += __popc(in_use);
        }
        if (lane == 0) count = used;
    }
};

// Tiles of the result in an order in which GROUP rows of tiles share tiles of W while they are in L2.
struct Place {
    int m, n;  // in tiles of a block
};

// `order`: of rows of tiles, if it is not their own.
__device__ __forceinline__ Place place_of(int tile, int m_tiles, int n_tiles, const short* order) {
    constexpr int GROUP = 16 / CLUSTER;
    const int group = tile / (GROUP * n_tiles), in_group = tile % (GROUP * n_tiles);
    const int rows = min(GROUP, m_tiles - group * GROUP), m = group * GROUP + in_group % rows;
    return {(order == nullptr ? m : order[m]) * CLUSTER + rank(), in_group / rows};
}

}  // namespace gemm
