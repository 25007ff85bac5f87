// Enough of CUDA to run the kernels of this package on a CPU, for tests on machines without a GPU.
//
// Every thread of a block is a coroutine; clusters, of one block or of several, run one after the other. What a warp
// does together (shuffles, votes, matrix loads and products) waits until all its lanes have come to it, and it is an
// error if they come to different things. Which warp runs when is random, from a seed. Asynchronous copies land when
// they are waited for, or at once, at random too: a read too early finds what was there before. Every access by a
// matrix load or a copy to shared memory is checked against the block's dynamic shared memory. emulated_gpu.py turns
// inline PTX into calls of ptx_... below, and __shared__ variables into references to the block's own.
//
// Blocks of a cluster run at the same time. Now and then one of them is held back until the others can go no further. A
// copy to several blocks lands in each of them on its own. It is an error if a block is copied or stored to, or a barrier
// of it arrived at, once it has ended.
//
// Of Hopper's units: a tensor copy lands between any two turns of threads and then counts on its barrier; a product of
// a warpgroup reads its operands when it is issued, when it is committed or when it is waited for, and its sums are NaN
// until then. One warp's wait for products stands for its warpgroup, but brings no warps together. Not seen: a missing
// fence between stores and what reads them asynchronously.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <random>
#include <unordered_map>
#include <vector>

namespace emulator {

constexpr int LANES = 32, STACK_BYTES = 1 << 17, MOST_SHARED = 232448;
constexpr int GROUP_WARPS = 4, GROUP_LANES = GROUP_WARPS * LANES;
constexpr int IDLE_ROUNDS = 1000;  // in a row, in which threads only look and sleep, until none is thought to go on
constexpr int NAMED_BARRIERS = 16;
constexpr int RANK_BITS = 24;  // of a shared address, below its block's rank
constexpr int MOST_VARIABLES = 48 << 10, MOST_BLOCKS = 8;  // bytes of __shared__ variables; of a cluster
constexpr unsigned STATIC_START = 1u << 23;  // addresses of __shared__ variables; far from the dynamic memory's
enum State { READY, AT_WARP, AT_WARPGROUP, AT_BLOCK, AT_CLUSTER, AT_NAMED, AT_BARRIER, DONE };

struct Block;

struct Copy {
    char* to;
    const char* from;
    int bytes, valid, group;
};

struct Thread {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it goes on
    std::vector<char> stack;
    Block* block;
    uint3 index;
    int lane, warp;
    State state;
    bool has_begun, is_idle;  // is_idle: gave its turn away only because it has to wait
    unsigned barrier, parity;  // AT_BARRIER: what it waits for
    std::vector<Copy> copies;
    int group;
};

struct Warp {
    int waiting, alive;
    const char* what;
    void* arguments[LANES];
    int commits;  // groups of products
    bool has_fence;
};

// An mbarrier. `place` in shared memory holds its mark, so that what is stored there by mistake shows.
struct BarrierState {
    unsigned long long* place;
    int count, pending, bytes;
    unsigned phase;
};

struct NamedBarrier {
    int threads, arrived;
    unsigned warps, turn;
};

// What a tensor map holds here; emulated_gpu.py writes it.
struct Map {
    long long address, columns, rows, pitch, box_columns, box_rows, by_quads;
};

struct TensorCopy {
    Block* block;  // whose memory and barrier it is to
    char* to;
    Map map;  // of no rows: 16 bytes that a thread stores to another block
    unsigned barrier;
    int column, row;
    Thread* by;
    unsigned turns;  // of threads, that it takes once it is looked at: about so many
    float stored[4];
};

// Sums of a warpgroup that products under way add to, lane by lane.
struct Sums {
    std::vector<float*> places;
    std::vector<float> values;
    int products;
};

enum Moment { AT_ISSUE, AT_COMMIT, AT_WAIT };

struct Product {
    std::list<Sums>::iterator sums;
    std::function<void(float*)> run;
    int group;
    Moment moment;  // at which it runs, once those before it have; one for a group
};

struct Warpgroup {
    int waiting;
    unsigned turn;
    const char* what;
    void* arguments[GROUP_LANES];
    std::list<Sums> sums;
    std::deque<Product> products;
    int number = -1;  // of the group that is being issued
    Moment moment;
};

struct Block {
    int rank, alive, waiting;  // in its cluster; threads that have not ended, those at __syncthreads
    uint3 index;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
    std::unordered_map<unsigned, BarrierState> barriers;  // by address
    NamedBarrier named_barriers[NAMED_BARRIERS];
    alignas(1024) char memory[MOST_SHARED];  // dynamic shared memory
    alignas(1024) char between[1024];        // the end of the one is not the beginning of the other
    alignas(1024) char variables[MOST_VARIABLES];
};

inline Block blocks[MOST_BLOCKS];  // of the cluster
inline int num_blocks, cluster_waiting;
inline Block* block;  // whose turn it is: current's, or whose barrier counts
inline Thread* current;
inline std::vector<TensorCopy> tensor_copies;  // under way
inline std::unordered_map<const void*, int> places;  // of the launch's __shared__ variables
inline int places_end;
inline jmp_buf scheduler;
inline bool is_in_thread;
inline int shared_bytes, shared_start;
inline dim3 block_size, grid_size;
inline std::mt19937 random_bits;
inline std::function<void()> kernel;

inline char failure[200];  // why the launch was given up, or empty

// _setjmp, not swapcontext, which asks the kernel for the mask of signals each time.
__attribute__((noinline)) inline void yield() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Thread& t) {
    current = &t, block = t.block;
    is_in_thread = true;
    if (!_setjmp(scheduler)) {
        if (t.has_begun) _longjmp(t.place, 1);
        t.has_begun = true;
        setcontext(&t.context);
    }
    is_in_thread = false;
}

// Give the launch up. A thread that says so is not run any more, nor is any other.
inline void fail(const char* what) {
    std::snprintf(failure, sizeof failure, "%s; block %u, thread %u", what, current->block->index.x, current->index.x);
    if (is_in_thread) yield();
}

inline void wake(State state) {
    for (Thread& t : block->threads)
        if (t.state == state) t.state = READY;
}

inline void leave_warp(Warp& warp) {
    warp.waiting = 0;
    for (Thread& t : block->threads)
        if (&block->warps[t.warp] == &warp && t.state == AT_WARP) t.state = READY;
}

// Wait until every lane is here; the last one runs `act` for all, on what each brought.
template <typename Act>
void together(const char* what, void* arguments, Act act) {
    Warp& warp = block->warps[current->warp];
    if (warp.waiting && std::strcmp(warp.what, what)) {
        char apart[100];
        std::snprintf(apart, sizeof apart, "a lane is at %s, others of its warp at %s", what, warp.what);
        fail(apart);
    }
    if (block_size.x % LANES || warp.alive != LANES) fail("not all lanes of a warp are there");
    warp.what = what;
    warp.arguments[current->lane] = arguments;
    if (++warp.waiting == LANES) {
        act(warp.arguments);
        leave_warp(warp);
        current->state = READY;
        return;
    }
    current->state = AT_WARP;
    yield();
}

// The same of a warpgroup.
template <typename Act>
void all_together(const char* what, void* arguments, Act act) {
    const int number = current->warp / GROUP_WARPS;
    if ((number + 1) * GROUP_LANES > static_cast<int>(block_size.x)) fail("not all lanes of a warpgroup are there");
    for (int w = 0; w < GROUP_WARPS; ++w)
        if (block->warps[number * GROUP_WARPS + w].alive != LANES) fail("not all lanes of a warpgroup are there");
    Warpgroup& group = block->warpgroups[number];
    const unsigned turn = group.turn;
    group.arguments[current->index.x % GROUP_LANES] = arguments;
    together(what, nullptr, [&](void**) {
        if (group.waiting && std::strcmp(group.what, what)) {
            char apart[100];
            std::snprintf(apart, sizeof apart, "a warp is at %s, others of its warpgroup at %s", what, group.what);
            fail(apart);
        }
        group.what = what;
        if (++group.waiting < GROUP_WARPS) return;
        act(group.arguments);
        group.waiting = 0, ++group.turn;
        wake(AT_WARPGROUP);
    });
    while (group.turn == turn) {
        current->state = AT_WARPGROUP;
        yield();
    }
}

inline void land(const Copy& copy) {
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid);
}

inline void entry() {
    kernel();
    for (const Copy& copy : current->copies) land(copy);  // they end with their thread
    current->state = DONE;
    --block->warps[current->warp].alive;
    --block->alive;
    const Warpgroup& group = block->warpgroups[current->warp / GROUP_WARPS];
    if (block->warps[current->warp].waiting || group.waiting) fail("a lane ended where others wait");
    if (!group.products.empty()) fail("a thread ended before its products");
    yield();
}

inline char* shared(unsigned address, int bytes) {
    const bool is_static = address >= STATIC_START;
    const int offset = static_cast<int>(address) - (is_static ? static_cast<int>(STATIC_START) : shared_start);
    if (offset < 0 || offset + bytes > (is_static ? places_end : shared_bytes))
        fail("an address outside the block's shared memory");
    if (offset % bytes) fail("a misaligned address");
    return (is_static ? block->variables : block->memory) + offset;
}

// The block's own of a __shared__ variable, at the same place in all blocks. Whoever names it first takes the place.
template <typename T>
T& variable(const void* name, size_t alignment) {
    const auto [found, is_new] = places.try_emplace(name, 0);
    if (is_new) {
        alignment = std::max(alignment, alignof(T));
        found->second = static_cast<int>((places_end + alignment - 1) / alignment * alignment);
        places_end = found->second + static_cast<int>(sizeof(T));
        if (places_end > MOST_VARIABLES) fail("more __shared__ variables than a block can have");
    }
    return *reinterpret_cast<T*>(block->variables + found->second);
}

// Barriers of shared memory.

inline unsigned long long mark_of(unsigned address) { return 0x9e3779b97f4a7c15ull ^ address; }

inline BarrierState* barrier_at(unsigned address) {
    const auto found = block->barriers.find(address);
    if (found == block->barriers.end()) return fail("a barrier that is not initialised"), nullptr;
    if (*found->second.place != mark_of(address)) return fail("a barrier that was overwritten"), nullptr;
    return &found->second;
}

inline void end_phase_if_done(unsigned address, BarrierState& barrier) {
    if (barrier.pending) return;
    if (barrier.bytes < 0) return fail("more bytes were copied than a barrier expects");
    if (barrier.bytes) return;
    barrier.pending = barrier.count, ++barrier.phase;
    for (Thread& t : block->threads)
        if (t.state == AT_BARRIER && t.barrier == address) t.state = READY;
}

// Look at any one of the tensor copies that are under way, and let it end if it may or must.
inline void land_tensor_copy(bool must) {
    std::swap(tensor_copies[random_bits() % tensor_copies.size()], tensor_copies.back());
    const TensorCopy copy = tensor_copies.back();
    if (!must && random_bits() % copy.turns) return;
    tensor_copies.pop_back();
    const Map& map = copy.map;
    const long long first = std::max(0, -copy.column), end = std::min(map.box_columns, map.columns - copy.column);
    for (int r = 0; r < map.box_rows; ++r) {
        const long long row = copy.row + (map.by_quads ? r / 32 * 32 + r / 2 % 4 * 8 + r / 8 % 4 * 2 + r % 2 : r);
        char line[128] = {};
        if (row >= 0 && row < map.rows && first < end)
            std::memcpy(line + 2 * first,
                        reinterpret_cast<const char*>(map.address) + row * map.pitch + 2 * (copy.column + first),
                        2 * (end - first));
        for (int piece = 0; piece < 8; ++piece)
            std::memcpy(copy.to + r * 128 + (piece ^ r % 8) * 16, line + piece * 16, 16);
    }
    current = copy.by, block = copy.block;  // to blame; to count
    BarrierState* barrier = barrier_at(copy.barrier);
    if (barrier == nullptr) return;
    if (!map.box_rows) std::memcpy(copy.to, copy.stored, sizeof copy.stored);
    barrier->bytes -= map.box_rows ? static_cast<int>(map.box_rows) * 128 : static_cast<int>(sizeof copy.stored);
    end_phase_if_done(copy.barrier, *barrier);
}

// Products of a warpgroup.

inline void run_product(Warpgroup& group) {
    const Product product = std::move(group.products.front());
    group.products.pop_front();
    Sums& sums = *product.sums;
    product.run(sums.values.data());
    if (--sums.products) return;
    for (size_t i = 0; i < sums.places.size(); ++i) *sums.places[i] = sums.values[i];
    group.sums.erase(product.sums);
}

inline void run_products(Warpgroup& group, Moment moment) {
    while (!group.products.empty() && group.products.front().moment <= moment) run_product(group);
}

inline void end_block(Block& ended) {
    block = &ended, current = &block->threads[0];
    for (const TensorCopy& copy : tensor_copies)
        if (copy.block == block) return fail("the block ended before a tensor copy");
    for (const auto& [address, barrier] : block->barriers) {
        if (barrier.bytes > 0) return fail("the block ended where a barrier expects more bytes");
        if (barrier.bytes < 0) return fail("the block ended where more bytes were copied than a barrier expects");
    }
    for (const NamedBarrier& barrier : block->named_barriers)
        if (barrier.arrived) return fail("the block ended with arrivals at a named barrier");
}

// Nobody got anywhere in a round: let a copy land, or let those at a barrier look again, or give up.
inline void go_on_from_idle_round(int idle_rounds) {
    if (!tensor_copies.empty()) return land_tensor_copy(true);
    bool is_any_ready = false, is_any_at_barrier = false;
    for (int b = 0; b < num_blocks; ++b)
        for (Thread& t : blocks[b].threads) {
            is_any_ready |= t.state == READY;
            if (t.state != AT_BARRIER) continue;
            is_any_at_barrier = true;
            current = &t;
            t.state = READY;
        }
    if ((is_any_ready || is_any_at_barrier) && idle_rounds < IDLE_ROUNDS) return;
    char why[100] = "every thread waits or sleeps";
    if (is_any_at_barrier) {
        std::snprintf(why, sizeof why, "every thread waits, this one for the end of a phase of parity %u of a barrier",
                      current->parity);
    } else if (!is_any_ready) {
        std::strcpy(why, "every thread waits");
    }
    fail(why);
}

// Nobody got anywhere in a round without the block that is held back: let a copy land, or that block go on.
inline void go_on_without_held(Block*& held) {
    if (!tensor_copies.empty() && random_bits() % 4) return land_tensor_copy(true);
    held = nullptr;
}

inline void begin_block(int rank, unsigned index) {
    const int count = block_size.x;
    block = &blocks[rank];
    block->rank = rank, block->index = {index, 0, 0};
    std::memset(block->memory, 0xff, MOST_SHARED);  // NaN
    std::memset(block->variables, 0xff, MOST_VARIABLES);
    block->threads.resize(count);
    block->warps.assign((count + LANES - 1) / LANES, Warp{0, LANES, "", {}, 0, false});
    block->warpgroups.assign((block->warps.size() + GROUP_WARPS - 1) / GROUP_WARPS, Warpgroup());
    block->barriers.clear();
    std::fill(block->named_barriers, block->named_barriers + NAMED_BARRIERS, NamedBarrier());
    block->waiting = 0, block->alive = count;
    for (int i = 0; i < count; ++i) {
        Thread& t = block->threads[i];
        t.stack.resize(STACK_BYTES);
        t.block = block, t.index = {static_cast<unsigned>(i), 0, 0};
        t.lane = i % LANES, t.warp = i / LANES, t.state = READY, t.group = 0, t.has_begun = false;
        t.copies.clear();
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link = nullptr;
        makecontext(&t.context, entry, 0);
    }
}

inline int threads_alive() {
    int alive = 0;
    for (int b = 0; b < num_blocks; ++b) alive += blocks[b].alive;
    return alive;
}

// Let go on who waits for all threads of the block, or of the cluster, where all have come; return whether any does.
inline bool end_waits() {
    bool is_any = false;
    for (int b = 0; b < num_blocks; ++b) {
        block = &blocks[b];
        if (!block->alive || block->waiting != block->alive) continue;
        block->waiting = 0, is_any = true;
        wake(AT_BLOCK);
    }
    if (!cluster_waiting || cluster_waiting != threads_alive()) return is_any;
    cluster_waiting = 0;
    for (int b = 0; b < num_blocks; ++b) {
        block = &blocks[b];
        wake(AT_CLUSTER);
    }
    return true;
}

inline void run_cluster(unsigned first) {
    tensor_copies.clear();
    cluster_waiting = 0;
    for (int b = 0; b < num_blocks; ++b) begin_block(b, first + b);
    const int warps = static_cast<int>(blocks[0].warps.size());
    std::vector<int> order(num_blocks * warps);
    for (size_t w = 0; w < order.size(); ++w) order[w] = static_cast<int>(w);
    int idle_rounds = 0;
    Block* held = nullptr;  // gets no turns
    constexpr unsigned ODDS[] = {4, 16, 64, 1u << 31};
    const unsigned odds = num_blocks > 1 ? ODDS[random_bits() % 4] : 0;
    if (odds && random_bits() % 2) held = &blocks[random_bits() % num_blocks];
    while (threads_alive()) {
        std::shuffle(order.begin(), order.end(), random_bits);
        if (!idle_rounds++ && odds && held == nullptr && random_bits() % odds == 0)
            held = &blocks[random_bits() % num_blocks];
        for (int w : order) {
            Block& its = blocks[w / warps];
            if (&its == held) continue;
            for (int lane = 0; lane < LANES && w % warps * LANES + lane < static_cast<int>(block_size.x); ++lane) {
                Thread& t = its.threads[w % warps * LANES + lane];
                if (t.state != READY) continue;
                t.is_idle = false;
                resume(t);
                if (!t.is_idle) idle_rounds = 0;
                if (!*failure && !tensor_copies.empty()) land_tensor_copy(false);
                if (!*failure && !its.alive) end_block(its);
                if (*failure) return;
            }
        }
        if (end_waits()) {
            idle_rounds = 0;
        } else if (held != nullptr && idle_rounds) {
            go_on_without_held(held);
        } else if (threads_alive() && idle_rounds) {
            go_on_from_idle_round(idle_rounds);
        }
        if (*failure) return;
    }
}

// Launch on every cluster, in order; return why it was given up, or nothing.
inline const char* launch(unsigned grid, unsigned block_threads, int cluster, int smem_bytes, unsigned seed,
                          std::function<void()> function) {
    if (cluster < 1 || cluster > MOST_BLOCKS || grid % cluster) return "a grid that is not of whole clusters";
    kernel = std::move(function);
    grid_size = dim3(grid), block_size = dim3(block_threads), num_blocks = cluster, shared_bytes = smem_bytes;
    random_bits.seed(seed);
    *failure = 0;
    places.clear();
    places_end = 0;
    for (unsigned i = 0; i < grid && !*failure; i += cluster) run_cluster(i);
    return failure;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() {
    ++emulator::block->waiting;
    emulator::current->state = emulator::AT_BLOCK;
    emulator::yield();
}

inline void __syncwarp(unsigned = ~0u) {
    emulator::together("__syncwarp", nullptr, [](void**) {});
}

inline void __nanosleep(unsigned) {
    emulator::current->is_idle = true;
    emulator::yield();
}
inline void __threadfence() {}

struct ShuffleArguments {
    unsigned value, source, result;
};

template <typename T>
T shuffle(const char* what, T value, unsigned source) {
    static_assert(sizeof(T) == 4, "32 bits");
    ShuffleArguments mine = {};
    std::memcpy(&mine.value, &value, 4);
    mine.source = source;
    emulator::together(what, &mine, [](void** all) {
        for (int i = 0; i < emulator::LANES; ++i) {
            auto* a = static_cast<ShuffleArguments*>(all[i]);
            a->result = static_cast<ShuffleArguments*>(all[a->source % emulator::LANES])->value;
        }
    });
    T result;
    std::memcpy(&result, &mine.result, 4);
    return result;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return shuffle("__shfl_sync", value, lane); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shuffle("__shfl_xor_sync", value, emulator::current->lane ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int offset) {
    const int lane = emulator::current->lane;
    return shuffle("__shfl_up_sync", value, lane >= offset ? lane - offset : lane);
}

template <typename Combine>
int reduce(const char* what, int value, Combine combine) {
    int mine[2] = {value, 0};
    emulator::together(what, mine, [&](void** all) {
        int total = static_cast<int*>(all[0])[0];
        for (int i = 1; i < emulator::LANES; ++i) total = combine(total, static_cast<int*>(all[i])[0]);
        for (int i = 0; i < emulator::LANES; ++i) static_cast<int*>(all[i])[1] = total;
    });
    return mine[1];
}

inline int __reduce_add_sync(unsigned, int v) { return reduce("__reduce_add_sync", v, [](int a, int b) { return a + b; }); }
inline int __reduce_max_sync(unsigned, int v) { return reduce("__reduce_max_sync", v, [](int a, int b) { return a > b ? a : b; }); }
inline int __reduce_min_sync(unsigned, int v) { return reduce("__reduce_min_sync", v, [](int a, int b) { return a < b ? a : b; }); }
inline unsigned __ballot_sync(unsigned, int predicate) {
    return reduce("__ballot_sync", predicate ? 1 << emulator::current->lane : 0, [](int a, int b) { return a | b; });
}
inline int __any_sync(unsigned, int predicate) {
    return reduce("__any_sync", predicate != 0, [](int a, int b) { return a | b; });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <typename T>
T atomicAdd(T* place, T value) {
    const T before = *place;
    *place += value;
    return before;
}
template <typename T>
T __ldcg(const T* p) { return *p; }
template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
void __stcg(T* p, T value) { *p = value; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __int_as_float(int bits) { return float_of(static_cast<uint32_t>(bits)); }
inline float __uint_as_float(unsigned bits) { return float_of(bits); }

// The same of all blocks, for what lies at the same place in them.
inline size_t __cvta_generic_to_shared(const void* p) {
    using namespace emulator;
    const auto* byte = static_cast<const char*>(p);
    if (byte >= block->memory && byte <= block->memory + MOST_SHARED) return byte - block->memory + shared_start;
    if (byte >= block->variables && byte < block->variables + places_end) return byte - block->variables + STATIC_START;
    fail("a pointer that is not to the block's shared memory");
    return 0;
}

// A float of 8 bits: sign, 4 of exponent, 3 of mantissa; no infinity, and NaN where all others are set.
namespace emulator {

struct E4m3 {
    unsigned char bits;

    operator float() const {
        const int exponent = bits >> 3 & 15, mantissa = bits & 7;
        const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
        return (bits & 0x7f) == 0x7f ? NAN : bits >> 7 ? -size : size;
    }
};

// The nearest, ties to even; what is too large becomes the largest.
inline unsigned char e4m3(float value) {
    if (std::isnan(value)) return 0x7f;
    const float size = std::min(std::fabs(value), 448.0f);
    unsigned char best = 0;
    for (unsigned char bits = 1; bits < 0x7f; ++bits) {
        const float nearer = std::fabs(E4m3{best} - size) - std::fabs(E4m3{bits} - size);
        if (nearer > 0 || (nearer == 0 && bits % 2 == 0)) best = bits;
    }
    return best | (std::signbit(value) ? 0x80 : 0);
}

}  // namespace emulator

// Inline PTX, by its first word.

inline void ptx_griddepcontrol() {}
inline void ptx_prefetch(const void*) {}
inline void ptx_prefetch(const void* from, int bytes) {
    using namespace emulator;
    if (reinterpret_cast<std::size_t>(from) % 16 != 0 || bytes <= 0 || bytes % 16 != 0)
        fail("a prefetch is not of whole pieces of 16 bytes");
    // Read, so that what is far from any array is found.
    volatile const char* const first = static_cast<const char*>(from);
    static_cast<void>(first[0]), static_cast<void>(first[bytes - 1]);
}
inline void ptx_nothing() {}
inline void ptx_nothing(int&) {}
inline void ptx_nothing(float&) {}
inline void ptx_nothing(unsigned&) {}
inline void ptx_fence() {}
inline void ptx_to_e4m3(unsigned short& pair, float high, float low) {
    pair = static_cast<unsigned short>(emulator::e4m3(high) << 8 | emulator::e4m3(low));
}
inline void ptx_power_of_two(float& result, float x) {
    result = std::exp2(x);
    if (result < std::numeric_limits<float>::min()) result = 0.0f;
}
inline void ptx_atom(int& before, int* place) { before = atomicAdd(place, 1); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32); }
inline void ptx_store_four(void* to, unsigned a, unsigned b, unsigned c, unsigned d, int valid) {
    if (valid) *static_cast<uint4*>(to) = make_uint4(a, b, c, d);
}
inline void ptx_store_128(void* to, unsigned long long low, unsigned long long high) {
    static_cast<unsigned long long*>(to)[0] = low, static_cast<unsigned long long*>(to)[1] = high;
}
inline void ptx_load_128(unsigned long long& low, unsigned long long& high, const void* from) {
    low = static_cast<const unsigned long long*>(from)[0], high = static_cast<const unsigned long long*>(from)[1];
}
inline void ptx_policy(unsigned long long& policy) { policy = 1; }
inline void ptx_cp_async(unsigned to, const void* from, int bytes, int valid, unsigned long long = 0) {
    using namespace emulator;
    Copy copy = {shared(to, bytes), static_cast<const char*>(from), bytes, valid, current->group};
    if (random_bits() % 4 == 0) {
        land(copy);
    } else {
        current->copies.push_back(copy);
    }
}
inline void ptx_cp_commit() { ++emulator::current->group; }
inline void ptx_cp_wait(int pending) {
    emulator::Thread& t = *emulator::current;
    std::vector<emulator::Copy> left;
    for (const emulator::Copy& copy : t.copies) {
        if (copy.group < t.group - pending) {
            emulator::land(copy);
        } else {
            left.push_back(copy);
        }
    }
    t.copies = left;
}

struct MatrixArguments {
    unsigned address, *r[4];
};

inline void load_matrices_of(const char* what, int count, bool transposed, unsigned& r0, unsigned& r1, unsigned& r2,
                             unsigned& r3, unsigned address) {
    MatrixArguments mine = {address, {&r0, &r1, &r2, &r3}};
    emulator::together(what, &mine, [=](void** all) {
        for (int m = 0; m < count; ++m) {
            unsigned short elements[8][8];
            for (int row = 0; row < 8; ++row)
                std::memcpy(elements[row],
                            emulator::shared(static_cast<MatrixArguments*>(all[8 * m + row])->address, 16), 16);
            for (int lane = 0; lane < 32; ++lane) {
                const int row = lane / 4, column = lane % 4 * 2;
                const unsigned low = transposed ? elements[column][row] : elements[row][column];
                const unsigned high = transposed ? elements[column + 1][row] : elements[row][column + 1];
                *static_cast<MatrixArguments*>(all[lane])->r[m] = low | high << 16;
            }
        }
    });
}
inline void ptx_ldmatrix(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, unsigned address) {
    load_matrices_of("ldmatrix", 4, false, r0, r1, r2, r3, address);
}
inline void ptx_ldmatrix_two(unsigned& r0, unsigned& r1, unsigned address) {
    load_matrices_of("ldmatrix of two", 2, false, r0, r1, r0, r1, address);
}
inline void ptx_ldmatrix_trans(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, unsigned address) {
    load_matrices_of("ldmatrix.trans", 4, true, r0, r1, r2, r3, address);
}

inline void ptx_movmatrix(unsigned& out, unsigned in) {
    unsigned mine[2] = {in, 0};
    emulator::together("movmatrix", mine, [](void** all) {
        unsigned short elements[8][8];
        for (int lane = 0; lane < 32; ++lane) {
            const unsigned pair = static_cast<unsigned*>(all[lane])[0];
            elements[lane / 4][lane % 4 * 2] = static_cast<unsigned short>(pair);
            elements[lane / 4][lane % 4 * 2 + 1] = static_cast<unsigned short>(pair >> 16);
        }
        for (int lane = 0; lane < 32; ++lane)
            static_cast<unsigned*>(all[lane])[1] =
                elements[lane % 4 * 2][lane / 4] | static_cast<unsigned>(elements[lane % 4 * 2 + 1][lane / 4]) << 16;
    });
    out = mine[1];
}

template <typename T>
float element(unsigned pair, int i) {
    const unsigned short bits = static_cast<unsigned short>(i ? pair >> 16 : pair);
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
}

struct ProductArguments {
    float* c[4];
    unsigned a[4], b[2];
};

// m16n8k16, or m16n8k8 with a[0], a[1] and b[0] alone.
template <typename T, int K>
void product(const char* what, ProductArguments mine) {
    emulator::together(what, &mine, [](void** all) {
        float a[16][K], b[8][K];
        for (int lane = 0; lane < 32; ++lane) {
            const auto* p = static_cast<ProductArguments*>(all[lane]);
            for (int e = 0; e < 2; ++e)
                for (int half = 0; half < K / 8; ++half) {
                    const int k = lane % 4 * 2 + e + 8 * half;
                    a[lane / 4][k] = element<T>(p->a[2 * half], e);
                    a[lane / 4 + 8][k] = element<T>(p->a[2 * half + 1], e);
                    b[lane / 4][k] = element<T>(p->b[half], e);
                }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto* p = static_cast<ProductArguments*>(all[lane]);
            for (int e = 0; e < 4; ++e) {
                double sum = *p->c[e];
                for (int k = 0; k < K; ++k)
                    sum += static_cast<double>(a[lane / 4 + e / 2 * 8][k]) * b[lane % 4 * 2 + e % 2][k];
                *p->c[e] = static_cast<float>(sum);
            }
        }
    });
}

#define PTX_MMA_16(NAME, TYPE)                                                                                     \
    inline void NAME(float& c0, float& c1, float& c2, float& c3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, \
                     unsigned b0, unsigned b1) {                                                                   \
        product<TYPE, 16>(#NAME, {{&c0, &c1, &c2, &c3}, {a0, a1, a2, a3}, {b0, b1}});                                \
    }
#define PTX_MMA_8(NAME, TYPE)                                                                               \
    inline void NAME(float& c0, float& c1, float& c2, float& c3, unsigned a0, unsigned a1, unsigned b) { \
        product<TYPE, 8>(#NAME, {{&c0, &c1, &c2, &c3}, {a0, a1, 0, 0}, {b, 0}});                            \
    }
PTX_MMA_16(ptx_mma_k16_f16, __half)
PTX_MMA_16(ptx_mma_k16_bf16, __nv_bfloat16)
PTX_MMA_8(ptx_mma_k8_f16, __half)
PTX_MMA_8(ptx_mma_k8_bf16, __nv_bfloat16)

// Barriers of shared memory (mbarrier).

inline void ptx_barrier_init(unsigned address, int count) {
    using namespace emulator;
    if (address % 8) fail("a misaligned address");
    if (count < 1) fail("a barrier of no arrivals");
    if (block->barriers.count(address)) fail("a barrier is initialised twice");
    char* place = shared(address, 8);
    BarrierState barrier = {reinterpret_cast<unsigned long long*>(place), count, count, 0, 0};
    *barrier.place = mark_of(address);
    block->barriers[address] = barrier;
}

inline void ptx_barrier_expect(unsigned address, int bytes) {
    using namespace emulator;
    BarrierState& barrier = *barrier_at(address);
    if (!barrier.pending) fail("more arrivals at a barrier than it counts");
    if (bytes < 0) fail("a barrier expects fewer than no bytes");
    --barrier.pending, barrier.bytes += bytes;
    end_phase_if_done(address, barrier);
}

inline void ptx_barrier_arrive(unsigned address) { ptx_barrier_expect(address, 0); }

inline void ptx_elect(unsigned& is_it) {
    emulator::together("elect.sync", nullptr, [](void**) {});
    is_it = emulator::current->lane == 0;
}

// Addresses in other blocks.
inline void ptx_address_in(unsigned& there, unsigned here, int rank) {
    using namespace emulator;
    if (rank < 0 || rank >= num_blocks) fail("an address in a block that is not of the cluster");
    there = here | static_cast<unsigned>(rank) << RANK_BITS;
}

// Bytes of any block's, and what is there.
inline const float* place_there(unsigned there, int bytes) {
    using namespace emulator;
    const int rank = there >> RANK_BITS;
    if (rank >= num_blocks) fail("a load from a block that is not of the cluster");
    if (!blocks[rank].alive) fail("a load from a block that has ended");
    block = &blocks[rank];
    const auto* place = reinterpret_cast<const float*>(shared(there & ((1u << RANK_BITS) - 1), bytes));
    block = current->block;
    return place;
}

inline void ptx_load_there(float& a, float& b, float& c, float& d, unsigned there) {
    const float* place = place_there(there, 16);
    a = place[0], b = place[1], c = place[2], d = place[3];
}

inline void ptx_load_float_there(float& a, unsigned there) { a = *place_there(there, 4); }

// Into any block, where a barrier counts the bytes; it lands as a tensor copy does.
inline void ptx_store_there(unsigned there, float a, float b, float c, float d, unsigned barrier) {
    using namespace emulator;
    const int rank = there >> RANK_BITS;
    if (rank >= num_blocks) fail("a store to a block that is not of the cluster");
    if (static_cast<int>(barrier >> RANK_BITS) != rank) fail("a store that counts on the barrier of another block");
    if (!blocks[rank].alive) fail("a store to a block that has ended");
    constexpr unsigned TURNS[] = {1, 16};
    constexpr unsigned WITHIN = (1u << RANK_BITS) - 1;
    TensorCopy copy = {&blocks[rank], nullptr, {}, barrier & WITHIN, 0, 0, current, TURNS[random_bits() % 2], {a, b, c, d}};
    copy.to = copy.block->memory + (shared(there & WITHIN, 16) - block->memory);
    tensor_copies.push_back(copy);
}

// The same of a barrier in any block.
inline void ptx_barrier_arrive_at(unsigned there) {
    using namespace emulator;
    const int rank = there >> RANK_BITS;
    const unsigned address = there & ((1u << RANK_BITS) - 1);
    if (rank >= num_blocks) fail("an arrival at a block that is not of the cluster");
    if (!blocks[rank].alive) fail("an arrival at a barrier of a block that has ended");
    block = &blocks[rank];
    ptx_barrier_arrive(address);
    block = current->block;
}

inline void ptx_barrier_try_wait(unsigned& done, unsigned address, unsigned parity) {
    using namespace emulator;
    if (parity > 1) fail("a parity that is neither 0 nor 1");
    done = barrier_at(address)->phase % 2 != parity;
    if (done) return;
    current->barrier = address, current->parity = parity;
    current->is_idle = true, current->state = AT_BARRIER;
    yield();
}

// Named barriers: warps come to them whole.

inline void named_barrier(const char* what, int id, int count, bool waits) {
    using namespace emulator;
    if (id < 1 || id >= NAMED_BARRIERS) fail("a named barrier that is not 1 to 15");  // 0 is __syncthreads'
    if (count < LANES || count % LANES) fail("a named barrier of parts of warps");
    NamedBarrier& barrier = block->named_barriers[id];
    struct Arguments {
        int id, count;
        unsigned turn;
    } arguments = {id, count, 0};
    together(what, &arguments, [&](void** all) {
        for (int i = 0; i < LANES; ++i) {
            auto* a = static_cast<Arguments*>(all[i]);
            if (a->id != id || a->count != count) fail("lanes of a warp are at different named barriers");
            a->turn = barrier.turn;
        }
        if (barrier.arrived && barrier.threads != count) fail("a named barrier is said to be of different threads");
        if (barrier.warps >> current->warp & 1) fail("a warp comes to a named barrier a second time");
        barrier.threads = count, barrier.arrived += LANES, barrier.warps |= 1u << current->warp;
        if (barrier.arrived < count) return;
        barrier.arrived = 0, barrier.warps = 0, ++barrier.turn;
        wake(AT_NAMED);
    });
    while (waits && barrier.turn == arguments.turn) {
        current->state = AT_NAMED;
        yield();
    }
}

inline void ptx_bar_sync(int id, int count) { named_barrier("bar.sync", id, count, true); }
inline void ptx_bar_arrive(int id, int count) { named_barrier("bar.arrive", id, count, false); }

inline void tensor_copy_to(int rank, unsigned to, const void* map, unsigned barrier, int column, int row, bool by_quads) {
    using namespace emulator;
    if (!blocks[rank].alive) fail("a copy to a block that has ended");
    constexpr unsigned TURNS[] = {1, 64, 4096, 4096};
    TensorCopy copy = {&blocks[rank], nullptr, {}, barrier, column, row, current, TURNS[random_bits() % 4], {}};
    std::memcpy(&copy.map, map, sizeof copy.map);
    if (copy.map.by_quads != by_quads) fail("a tensor map of another number of dimensions");
    if (copy.map.box_columns != 64 || copy.map.box_rows < 1 || copy.map.box_rows > 256) fail("not a tensor map");
    if (to % 1024) fail("a tile that does not begin at a multiple of 1024 bytes");
    copy.to = copy.block->memory + (shared(to, 128) - block->memory);
    shared(to + static_cast<unsigned>(copy.map.box_rows - 1) * 128, 128);
    tensor_copies.push_back(copy);
}

inline void ptx_tensor_copy(unsigned to, const void* map, unsigned barrier, int column, int row, bool by_quads = false) {
    using namespace emulator;
    if (reinterpret_cast<uintptr_t>(map) % 64) fail("a misaligned tensor map");
    barrier_at(barrier);
    tensor_copy_to(block->rank, to, map, barrier, column, row, by_quads);
}

// Of five dimensions: rows come in the order of column_of<8>, 32 by 32.
inline void ptx_quads_copy(unsigned to, const void* map, unsigned barrier, int column, int rows_32, int zero) {
    if (zero) emulator::fail("a copy that begins within 32 rows");
    ptx_tensor_copy(to, map, barrier, column, 32 * rows_32, true);
}

// Either to the same place in every block of the mask; another's barrier is looked for once the copy lands.
inline void ptx_tensor_copy_to_blocks(unsigned to, const void* map, unsigned barrier, int column, int row, unsigned mask,
                                      bool by_quads = false) {
    using namespace emulator;
    if (reinterpret_cast<uintptr_t>(map) % 64) fail("a misaligned tensor map");
    if (!mask || mask >> num_blocks) fail("a copy to blocks that are not of the cluster");
    for (int rank = 0; rank < num_blocks; ++rank)
        if (mask >> rank & 1) tensor_copy_to(rank, to, map, barrier, column, row, by_quads);
}

inline void ptx_quads_copy_to_blocks(unsigned to, const void* map, unsigned barrier, int column, int rows_32, unsigned mask,
                                     int zero) {
    if (zero) emulator::fail("a copy that begins within 32 rows");
    ptx_tensor_copy_to_blocks(to, map, barrier, column, 32 * rows_32, mask, true);
}

// Clusters: warps come to their barrier whole, and all of all blocks.

inline void ptx_cluster_rank(int& rank) { rank = emulator::block->rank; }
inline void ptx_dynamic_shared(int& bytes) { bytes = emulator::shared_bytes; }
inline void ptx_cluster_size(int& blocks) { blocks = emulator::num_blocks; }

inline void ptx_cluster_sync() {
    using namespace emulator;
    together("barrier.cluster", nullptr, [](void**) {});
    ++cluster_waiting;
    current->state = AT_CLUSTER;
    yield();
}

// Products of a warpgroup (wgmma).

inline void ptx_setmaxnreg(int count) {
    if (count < 24 || count > 256 || count % 8) emulator::fail("setmaxnreg of a wrong number of registers");
    emulator::all_together("setmaxnreg", nullptr, [](void**) {});
}

inline void ptx_products_fence() {
    using namespace emulator;
    together("wgmma.fence", nullptr, [](void**) { block->warps[current->warp].has_fence = true; });
}

inline void ptx_products_commit() {
    using namespace emulator;
    together("wgmma.commit_group", nullptr, [](void**) {
        ++block->warps[current->warp].commits;
        run_products(block->warpgroups[current->warp / GROUP_WARPS], AT_COMMIT);
    });
}

inline void ptx_products_wait(int pending) {
    using namespace emulator;
    together("wgmma.wait_group", nullptr, [=](void**) {
        Warpgroup& group = block->warpgroups[current->warp / GROUP_WARPS];
        while (!group.products.empty() && group.products.front().group < block->warps[current->warp].commits - pending)
            run_product(group);
    });
}

// Elements of 16 columns, of which 8-bit ones are twice as many.
template <typename T>
constexpr int columns_of = 32 / sizeof(T);

template <typename T>
const float* floats_of_bits() {
    static const std::vector<float> floats = [] {
        std::vector<float> all(1 << 8 * sizeof(T));
        for (unsigned bits = 0; bits < all.size(); ++bits) all[bits] = element<T>(bits, 0);
        return all;
    }();
    return floats.data();
}

// Read an operand [ROWS, 16], or 32 of 8 bits, of a descriptor; transposed, its rows are contiguous in shared memory.
template <typename T, int ROWS, bool TRANSPOSED>
void read_operand(unsigned long long descriptor, float (&operand)[columns_of<T>][ROWS]) {
    constexpr int EACH = 16 / sizeof(T);
    static_assert(!TRANSPOSED || EACH == 8, "only 16-bit operands can be transposed");
    const auto field = [=](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3fff) << 4; };
    const unsigned start = field(0), leading = field(16), stride = field(32);
    const float* floats = floats_of_bits<T>();
    for (int piece = 0; piece < 2 * ROWS; ++piece) {  // 16 bytes
        const int row = TRANSPOSED ? piece % (ROWS / 8) * 8 : piece / 2;
        const int k = TRANSPOSED ? piece / (ROWS / 8) : piece % 2 * EACH;
        unsigned address = TRANSPOSED ? start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                                      : start + row / 8 * stride + row % 8 * 128 + k * static_cast<int>(sizeof(T));
        address ^= address >> 3 & 0x70;
        std::conditional_t<sizeof(T) == 1, unsigned char, unsigned short> bits[EACH];
        std::memcpy(bits, emulator::shared(address, 16), 16);
        for (int e = 0; e < EACH; ++e) operand[TRANSPOSED ? k : k + e][TRANSPOSED ? row + e : row] = floats[bits[e]];
    }
}

inline void check_descriptor(unsigned long long descriptor) {
    constexpr unsigned long long FIELDS = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32;
    if ((descriptor & ~FIELDS) != 1ull << 62) emulator::fail("a descriptor of another kind than 128-byte swizzle");
    if (descriptor & 0x38) emulator::fail("an operand whose rows do not begin at a multiple of 1024 bytes");
}

template <int N>
struct ProductOperands {
    float* sums[N / 2];
    bool adds;
    unsigned long long a, b;
    unsigned registers[4];
};

// m64nNk16, or k32 of 8 bits. A is [64, 16], in shared memory or in registers.
template <typename T, int N, bool IN_REGISTERS, bool A_TRANSPOSED, bool B_TRANSPOSED>
void warpgroup_product(const char* what, ProductOperands<N> mine) {
    using namespace emulator;
    all_together(what, &mine, [=](void** all) {
        constexpr int EACH = N / 2;
        const auto operands = [=](int i) { return static_cast<ProductOperands<N>*>(all[i]); };
        Warpgroup& group = block->warpgroups[current->warp / GROUP_WARPS];
        const int first_warp = current->warp / GROUP_WARPS * GROUP_WARPS;
        for (int i = 0; i < GROUP_LANES; ++i) {
            const ProductOperands<N>& other = *operands(i);
            if (other.a != mine.a || other.b != mine.b) fail("lanes of a warpgroup have different descriptors");
            if (other.adds != mine.adds) fail("lanes of a warpgroup differ in whether a product adds");
        }
        for (int w = first_warp; w < first_warp + GROUP_WARPS; ++w) {
            const Warp& warp = block->warps[w];
            if (warp.commits != block->warps[first_warp].commits) fail("warps have committed different groups");
            if (!warp.has_fence) fail("a product without a wgmma.fence before it");
        }
        if (!IN_REGISTERS) check_descriptor(mine.a);
        check_descriptor(mine.b);

        // Registers are read now.
        std::vector<float> registers(IN_REGISTERS ? 16 * 64 : 0);
        if (IN_REGISTERS) {
            for (int i = 0; i < GROUP_LANES; ++i)
                for (int pair = 0; pair < 4; ++pair)
                    for (int e = 0; e < 2; ++e) {
                        const int row = i / LANES * 16 + i % LANES / 4 + pair % 2 * 8, k = i % 4 * 2 + e + pair / 2 * 8;
                        registers[k * 64 + row] = element<T>(operands(i)->registers[pair], e);
                    }
        }
        const bool adds = mine.adds;
        const unsigned long long a_place = mine.a, b_place = mine.b;
        const auto run = [=](float* sums) __attribute__((optimize("O3"))) {
            constexpr int K = columns_of<T>;
            static float a[K][64], b[K][N];
            if (IN_REGISTERS) {
                std::memcpy(a, registers.data(), registers.size() * sizeof(float));
            } else {
                read_operand<T, 64, A_TRANSPOSED>(a_place, a);
            }
            read_operand<T, N, B_TRANSPOSED>(b_place, b);
            for (int row = 0; row < 64; ++row) {
                double total[N] = {};
                for (int k = 0; k < K; ++k)
                    for (int n = 0; n < N; ++n) total[n] += static_cast<double>(a[k][row]) * b[k][n];
                for (int n = 0; n < N; ++n) {
                    const int lane = row / 16 * LANES + row % 8 * 4 + n % 8 / 2;
                    float& sum = sums[lane * EACH + n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
                    sum = static_cast<float>(adds ? sum + total[n] : total[n]);
                }
            }
        };

        std::vector<float*> places;
        for (int i = 0; i < GROUP_LANES; ++i)
            places.insert(places.end(), operands(i)->sums, operands(i)->sums + EACH);
        const auto is_same = [&](const Sums& sums) { return sums.places == places; };
        auto sums = std::find_if(group.sums.begin(), group.sums.end(), is_same);
        if (sums == group.sums.end()) {
            sums = group.sums.insert(sums, {places, {}, 0});
            for (float* place : places) {
                sums->values.push_back(*place);
                *place = NAN;
            }
        }
        ++sums->products;
        const int number = block->warps[first_warp].commits;
        if (group.number != number) {
            constexpr Moment MOMENTS[] = {AT_ISSUE, AT_COMMIT, AT_WAIT, AT_WAIT};
            group.number = number, group.moment = MOMENTS[random_bits() % 4];
        }
        group.products.push_back({sums, run, number, group.moment});
        run_products(group, AT_ISSUE);
    });
}

template <typename T, int N, bool A_TRANSPOSED, bool B_TRANSPOSED>
void ptx_product(const char* what, ProductOperands<N> sums, bool adds, unsigned long long a, unsigned long long b) {
    sums.adds = adds, sums.a = a, sums.b = b;
    warpgroup_product<T, N, false, A_TRANSPOSED, B_TRANSPOSED>(what, sums);
}

template <typename T, int N, bool B_TRANSPOSED>
void ptx_product_of_registers(const char* what, ProductOperands<N> sums, bool adds, unsigned a0, unsigned a1,
                              unsigned a2, unsigned a3, unsigned long long b) {
    const unsigned registers[4] = {a0, a1, a2, a3};
    sums.adds = adds, sums.b = b;
    std::copy(registers, registers + 4, sums.registers);
    warpgroup_product<T, N, true, false, B_TRANSPOSED>(what, sums);
}
