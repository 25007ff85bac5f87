// Hopper's asynchronous units by hand: barriers in shared memory, tensor copies (TMA), products of a warpgroup
// (PTX ISA: mbarrier, cp.async.bulk.tensor, wgmma; sm_90a).
//
// A tile in shared memory is what one tensor copy writes: rows of 64 halves, 128 bytes, whose 16-byte pieces are swizzled
// (piece ^= row % 8); it begins at a multiple of 1024 bytes. Wider tiles are several of these, one after the other.
//
// Sums of m64nNk16, in lane l of warp w of the warpgroup: d[4 j + e] is row 16 w + l / 4 + 8 (e / 2), column
// 8 j + 2 (l % 4) + e % 2. As the A operand of a next product, d[8 t] to d[8 t + 7] packed in pairs are its 16 columns.
#pragma once
#include "cluster.cuh"

constexpr int WARPGROUP = 128;
constexpr int TILE_COLUMNS = 64;  // halves in a row of a tile

struct alignas(64) TensorMap {  // CUtensorMap
    char bytes[128];
};

// Barriers: of a number of arrivals and of bytes that copies bring. Phases alternate; one waits for the end of a phase by its
// parity, and a fresh barrier counts as having ended a phase of parity 1.

using Barrier = unsigned long long;

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Once all are initialised, before the __syncthreads that lets others use them.
__device__ __forceinline__ void barriers_initialised() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and let the phase last until so many bytes have been copied as well.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
    unsigned done;
    do {
        asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    } while (!done);
}

// Barrier number `id` of the hardware, of so many threads.
__device__ __forceinline__ void named_wait(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Let tensor copies and products see what this thread stored to shared memory, once a barrier has followed.
__device__ __forceinline__ void shared_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map)); }

// Copy the map's box at (column, row) to a tile; what lies outside the tensor becomes zero. One thread does this.
__device__ __forceinline__ void load_tile(void* tile, const TensorMap* map, Barrier* barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
                     shared_address(tile)),
                 "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
                 : "memory");
}

// As load_tile, of a map whose rows come in another order (tensor_maps.py): row 8 j + 2 q + e of every 32 in the tile is row
// 8 q + 2 j + e of the tensor's. Then 32 columns of a product give a thread 8 that follow each other: column_of<8>.
__device__ __forceinline__ void load_quads(void* tile, const TensorMap* map, Barrier* barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %5, %5, %5, %4}], [%2];" ::"r"(
            shared_address(tile)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row / 32), "r"(0)
        : "memory");
}

// Clusters (cluster.cuh).

// Arrive at a barrier of another block. Reads of shared memory by products that were waited
// for are over then; to order more than that (.release.cluster) would cost a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive_at(unsigned address) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

// As load_tile, to the same place in every block of `mask`, and each one's barrier counts the bytes.
__device__ __forceinline__ void load_tile_to(unsigned short mask, void* tile, const TensorMap* map, Barrier* barrier, int column,
                                             int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
        "[%2], %5;" ::"r"(shared_address(tile)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(mask)
        : "memory");
}

// The same with the rows of load_quads.
__device__ __forceinline__ void load_quads_to(unsigned short mask, void* tile, const TensorMap* map, Barrier* barrier, int column,
                                              int row) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %6, %6, %6, %4}], [%2], %5;" ::"r"(shared_address(tile)), "l"(map), "r"(shared_address(barrier)), "r"(column),
        "r"(row / 32), "h"(mask), "r"(0)
        : "memory");
}

// A value that all lanes of a warp have: told so, ptxas keeps it, and what is computed from it, where copies and products want
// their operands. A warpgroup alone has no time to move them there.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Whether this is the one lane that a warp, all of whose lanes are here, lets copy. ptxas knows then that it is alone, and needs
// no loop over lanes around every copy.
__device__ __forceinline__ bool elected() {
    unsigned is_it;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(is_it));
    return is_it;
}

// Registers: take them from the producer's warpgroup and give them to the others.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Operands in shared memory. Along k, the next 16 columns of rows are 32 bytes on; of a transposed operand, whose rows
// are k, 16 rows on. Columns beyond the first 64 of a transposed operand lie `group` bytes on.
__device__ __forceinline__ unsigned long long operand(unsigned address, unsigned group = 16) {
    return static_cast<unsigned long long>((address & 0x3ffff) >> 4) | static_cast<unsigned long long>(group >> 4) << 16 |
           static_cast<unsigned long long>(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING committed groups are under way. Sums of ended groups may be read once `settled`.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int N>
__device__ __forceinline__ void settled(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define SUMS_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64                                                                                                        \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
             "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_72 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_80 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_96 NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_112 NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_128                                                                                                          \
    NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
             "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "  \
             "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "      \
             "%125, %126, %127"

// d += a b^T, or = where `add` is false: a [64, 16] and b [N, 16], both in shared memory, N 256, 224, 192, 160, 144, 128, 96, 64 or 48.
__device__ __forceinline__ void multiply(float (&d)[128], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %130, 0;\n\twgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" NAMES_128
                 "}, %128, %129, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_32(d, 64), SUMS_32(d, 96)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\twgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NAMES_64
                 "}, %64, %65, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_32(d, 0), SUMS_32(d, 32) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply(float (&d)[32], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\twgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" NAMES_32
                 "}, %32, %33, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_32(d, 0) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply(float (&d)[48], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %50, 0;\n\twgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {" NAMES_48
                 "}, %48, %49, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_32(d, 0), SUMS_16(d, 32) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply(float (&d)[80], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %82, 0;\n\twgmma.mma_async.sync.aligned.m64n160k16.f32.f16.f16 {" NAMES_80
                 "}, %80, %81, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_16(d, 64) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply(float (&d)[96], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %98, 0;\n\twgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {" NAMES_96
                 "}, %96, %97, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_32(d, 64) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply(float (&d)[24], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %26, 0;\n\twgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {" NAMES_24
                 "}, %24, %25, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_16(d, 0), SUMS_8(d, 16) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply(float (&d)[72], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %74, 0;\n\twgmma.mma_async.sync.aligned.m64n144k16.f32.f16.f16 {" NAMES_72
                 "}, %72, %73, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_8(d, 64) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply(float (&d)[112], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %114, 0;\n\twgmma.mma_async.sync.aligned.m64n224k16.f32.f16.f16 {" NAMES_112
                 "}, %112, %113, p, 1, 1, 0, 0;\n\t}"
                 : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_32(d, 64), SUMS_16(d, 96) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// The same of E4M3, [64, 32] and [N, 32].
__device__ __forceinline__ void multiply_e4m3(float (&d)[128], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %130, 0;\n\twgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {" NAMES_128
                 "}, %128, %129, p, 1, 1;\n\t}"
                 : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_32(d, 64), SUMS_32(d, 96)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply_e4m3(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\twgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NAMES_64
                 "}, %64, %65, p, 1, 1;\n\t}"
                 : SUMS_32(d, 0), SUMS_32(d, 32) : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// d += a b: a [64, 16] in registers, b [16, 128] in shared memory, transposed for the product.
__device__ __forceinline__ void multiply_transposed(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NAMES_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : SUMS_32(d, 0), SUMS_32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
