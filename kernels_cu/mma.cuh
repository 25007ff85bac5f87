// Tensor-core products of 16 x 8 x 16 tiles and the loads that feed them (PTX ISA: mma, ldmatrix, cp.async; sm_80).
//
// Fragments of one m16n8k16 product, in lane l of a warp:
//   A  rows l / 4 and l / 4 + 8,  k 2 (l % 4) + {0, 1} and 8 more:  {row, row + 8} x {k, k + 8}, rows first
//   B  column l / 4,              k 2 (l % 4) + {0, 1} and 8 more
//   C  rows l / 4 and l / 4 + 8,  columns 2 (l % 4) + {0, 1}:       c[0], c[1] of the first row, c[2], c[3] of the second
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MINUS_INFINITY __int_as_float(static_cast<int>(0xff800000u))
constexpr float MOST = 8.0f;  // base-2 logarithm of the largest weight of a softmax: in float16 there is room for 15

// 2^x in one instruction. exp2f takes three more, for results below 2^-126, which are 0 here.
__device__ __forceinline__ float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ int dynamic_shared_bytes() {
    int bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

// Copy 16 bytes to shared memory past L1, or write 16 zero bytes and read nothing: then `global` may point anywhere.
__device__ __forceinline__ void copy16_async(unsigned shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool valid) {
    copy16_async(shared_address(shared), global, valid);
}

// A policy for what is read once: it makes way in L2 for instructions and whatever else is read again.
__device__ __forceinline__ unsigned long long read_once() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// As above, with a policy of L2.
__device__ __forceinline__ void copy16_async(unsigned shared, const void* global, bool valid, unsigned long long policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
                 "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most PENDING of the committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the shared_address of row r of matrix i.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) { load_matrices(r, shared_address(row)); }

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    load_matrices_transposed(r, shared_address(row));
}

// The transpose of an 8 x 8 matrix of 16-bit elements; lane l has and gets elements 2 (l % 4) + {0, 1} of row l / 4.
__device__ __forceinline__ unsigned transpose(unsigned pair) {
    unsigned out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                             __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add(c, a, b0, b1, __half());
}

// A product of 16 x 8 x 8: k only 2 (l % 4) + {0, 1}, and one register where there were two.
__device__ __forceinline__ void multiply_add_8(float (&c)[4], unsigned a0, unsigned a1, unsigned b, __half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

__device__ __forceinline__ void multiply_add_8(float (&c)[4], unsigned a0, unsigned a1, unsigned b, __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

// Where the sums of W's rows lie. Vec consecutive rows of W (dims of a head) end up in one thread: column slot
// 2 q + e of 8-column block j is row 4 Vec (j / (Vec / 2)) + Vec q + 2 (j % (Vec / 2)) + e.
template <int Vec>
__device__ __forceinline__ constexpr int column_of(int block, int quad, int element) {
    return 4 * Vec * (block / (Vec / 2)) + Vec * quad + 2 * (block % (Vec / 2)) + element;
}

// Two floats to a pair of 16-bit values in one register, rounded to nearest even; `low` is the first of the two.
__device__ __forceinline__ unsigned pack(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

__device__ __forceinline__ unsigned pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

__device__ __forceinline__ unsigned pack(float low, float high) { return pack(low, high, __half()); }

__device__ __forceinline__ float2 unpack(unsigned pair, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ float2 unpack(unsigned pair, __nv_bfloat16) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// Products of two pairs.
__device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b, __half) {
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&product);
}

__device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b, __nv_bfloat16) {
    const __nv_bfloat162 product = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const unsigned*>(&product);
}

// What rounding a pair to 16 bits left over, itself rounded: x = high + low to twice the bits.
template <typename T>
__device__ __forceinline__ unsigned pack_rest(float low, float high, unsigned rounded, T type) {
    const float2 taken = unpack(rounded, type);
    return pack(low - taken.x, high - taken.y, type);
}

__device__ __forceinline__ unsigned pack_rest(float low, float high, unsigned rounded) {
    return pack_rest(low, high, rounded, __half());
}

// Sum and maximum over the four lanes that hold one row of C.
__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Transpose what the four lanes of a quad hold: r[i] of lane q becomes r[q] of lane i. Pairs of columns 8 i + 2 q become
// 8 columns in a row, for a store of 16 bytes.
__device__ __forceinline__ void transpose_quad(unsigned (&r)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const unsigned got = __shfl_xor_sync(0xffffffffu, odd ? r[i] : r[i + 1], 1);
        if (odd) r[i] = got;
        else r[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned got = __shfl_xor_sync(0xffffffffu, upper ? r[i] : r[i + 2], 2);
        if (upper) r[i] = got;
        else r[i + 2] = got;
    }
}
