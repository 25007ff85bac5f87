// Enough of CUDA to run the kernels of this package on a CPU, for tests on machines without a GPU.
//
// Every thread of a block is a coroutine; blocks run one after the other. What a warp does together (shuffles, votes,
// matrix loads and products) waits until all its lanes have come to it, and it is an error if they come to different
// things. Which warp runs when is random, from a seed. Asynchronous copies land when they are waited for, or at once,
// at random too: a read too early finds what was there before. Every access by a matrix load or a copy to shared memory
// is checked against the block's dynamic shared memory. emulated_gpu.py turns inline PTX into calls of ptx_... below.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

namespace emulator {

constexpr int LANES = 32, STACK_BYTES = 1 << 17, MOST_SHARED = 232448;
enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Copy {
    char* to;
    const char* from;
    int bytes, valid, group;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    uint3 index;
    int lane, warp;
    State state;
    std::vector<Copy> copies;
    int group;
};

struct Warp {
    int waiting, alive;
    const char* what;
    void* arguments[LANES];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Thread* current;
inline ucontext_t scheduler;
inline bool is_in_thread;
inline int block_waiting, block_alive, shared_bytes, shared_start;
inline uint3 block_index;
inline dim3 block_size, grid_size;
inline std::mt19937 random_bits;
inline std::function<void()> kernel;
alignas(1024) inline char shared_memory[MOST_SHARED];

inline char failure[200];  // why the launch was given up, or empty

// Give the launch up. A thread that says so is not run any more, nor is any other.
inline void fail(const char* what) {
    std::snprintf(failure, sizeof failure, "%s; block %u, thread %u", what, block_index.x, current->index.x);
    if (is_in_thread) swapcontext(&current->context, &scheduler);
}

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void leave_warp(Warp& warp) {
    warp.waiting = 0;
    for (Thread& t : threads)
        if (&warps[t.warp] == &warp && t.state == AT_WARP) t.state = READY;
}

// Wait until every lane is here; the last one runs `act` for all, on what each brought.
template <typename Act>
void together(const char* what, void* arguments, Act act) {
    Warp& warp = warps[current->warp];
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

inline void land(const Copy& copy) {
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid);
}

inline void entry() {
    kernel();
    for (const Copy& copy : current->copies) land(copy);  // they end with their thread
    current->state = DONE;
    --warps[current->warp].alive;
    --block_alive;
    if (warps[current->warp].waiting) fail("a lane ended where others wait");
    swapcontext(&current->context, &scheduler);
}

inline void run_block() {
    const int count = block_size.x;
    threads.resize(count);
    warps.assign((count + LANES - 1) / LANES, Warp{0, LANES, "", {}});
    block_waiting = 0, block_alive = count;
    for (int i = 0; i < count; ++i) {
        Thread& t = threads[i];
        t.stack.resize(STACK_BYTES);
        t.index = {static_cast<unsigned>(i), 0, 0};
        t.lane = i % LANES, t.warp = i / LANES, t.state = READY, t.group = 0;
        t.copies.clear();
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link = nullptr;
        makecontext(&t.context, entry, 0);
    }
    std::vector<int> order(warps.size());
    for (size_t w = 0; w < order.size(); ++w) order[w] = static_cast<int>(w);
    while (block_alive) {
        std::shuffle(order.begin(), order.end(), random_bits);
        bool any = false;
        for (int w : order) {
            for (int lane = 0; lane < LANES && w * LANES + lane < count; ++lane) {
                Thread& t = threads[w * LANES + lane];
                if (t.state != READY) continue;
                any = true;
                current = &t;
                is_in_thread = true;
                swapcontext(&scheduler, &t.context);
                is_in_thread = false;
                if (*failure) return;
            }
        }
        if (block_alive && block_waiting == block_alive) {
            block_waiting = 0;
            for (Thread& t : threads)
                if (t.state == AT_BLOCK) t.state = READY;
        } else if (!any) {
            return fail("every thread waits");
        }
    }
}

inline char* shared(unsigned address, int bytes) {
    const int offset = static_cast<int>(address) - shared_start;
    if (offset < 0 || offset + bytes > shared_bytes) fail("an address outside the block's shared memory");
    if (offset % bytes) fail("a misaligned address");
    return shared_memory + offset;
}

// Launch on every block, in order; return why it was given up, or nothing.
inline const char* launch(unsigned grid, unsigned block, int smem_bytes, unsigned seed, std::function<void()> function) {
    kernel = std::move(function);
    grid_size = dim3(grid), block_size = dim3(block), shared_bytes = smem_bytes;
    random_bits.seed(seed);
    *failure = 0;
    for (unsigned i = 0; i < grid && !*failure; ++i) {
        block_index = {i, 0, 0};
        std::memset(shared_memory, 0xff, MOST_SHARED);  // NaN
        run_block();
    }
    return failure;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() {
    ++emulator::block_waiting;
    emulator::current->state = emulator::AT_BLOCK;
    emulator::yield();
}

inline void __syncwarp(unsigned = ~0u) {
    emulator::together("__syncwarp", nullptr, [](void**) {});
}

inline void __nanosleep(unsigned) { emulator::yield(); }
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

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int atomicAdd(int* place, int value) {
    const int before = *place;
    *place += value;
    return before;
}
template <typename T>
T __ldcg(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __int_as_float(int bits) { return float_of(static_cast<uint32_t>(bits)); }
inline float __uint_as_float(unsigned bits) { return float_of(bits); }

inline size_t __cvta_generic_to_shared(const void* p) {
    return static_cast<const char*>(p) - emulator::shared_memory + emulator::shared_start;
}

// Inline PTX, by its first word.

inline void ptx_griddepcontrol() {}
inline void ptx_prefetch(const void*) {}
inline void ptx_nothing(int&) {}
inline void ptx_mad(unsigned& d, unsigned a, unsigned b) {
    d = static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32) + 256;
}
inline void ptx_atom(int& before, int* place) { before = atomicAdd(place, 1); }

inline void ptx_cp_async(unsigned to, const void* from, int bytes, int valid) {
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
    std::memcpy(&value, &bits, 2);
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
