// The storage types and their 16-byte (float: 32-byte) loads and stores, always to and from float32 registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A float of 8 bits, 4 of them the exponent's (Micikevicius et al. 2022, arXiv:2209.05433), for what rounding to half leaves.
struct E4M3 {
    unsigned char bits;
};
constexpr float E4M3_SCALE = 32.0f;  // what halves below 2^15 leave is at most 8; the largest E4M3 is 448

constexpr int VECTOR = 8;  // elements of one load or store

// Convert 8 contiguous elements; `p` must be 16-byte aligned.
__device__ __forceinline__ void load8(const __half* p, float (&out)[VECTOR]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const __half2* pairs = reinterpret_cast<const __half2*>(&raw);
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) {
        const float2 f = __half22float2(pairs[i]);
        out[2 * i] = f.x;
        out[2 * i + 1] = f.y;
    }
}

__device__ __forceinline__ void load8(const __nv_bfloat16* p, float (&out)[VECTOR]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&raw);
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) {
        const float2 f = __bfloat1622float2(pairs[i]);
        out[2 * i] = f.x;
        out[2 * i + 1] = f.y;
    }
}

__device__ __forceinline__ void load8(const float* p, float (&out)[VECTOR]) {
    const float4 low = reinterpret_cast<const float4*>(p)[0];
    const float4 high = reinterpret_cast<const float4*>(p)[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

// From compute capability 8.9 on.
__device__ __forceinline__ void store8(E4M3* p, const float (&in)[VECTOR]) {
    unsigned short pairs[VECTOR / 2];
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i)
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pairs[i]) : "f"(in[2 * i + 1]), "f"(in[2 * i]));
    *reinterpret_cast<uint2*>(p) = make_uint2(pairs[0] | static_cast<unsigned>(pairs[1]) << 16,
                                              pairs[2] | static_cast<unsigned>(pairs[3]) << 16);
}

// Round 8 values to nearest even and store them; `p` must be 16-byte aligned.
__device__ __forceinline__ void store8(__half* p, const float (&in)[VECTOR]) {
    uint4 raw;
    __half2* pairs = reinterpret_cast<__half2*>(&raw);
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) pairs[i] = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
    *reinterpret_cast<uint4*>(p) = raw;
}

__device__ __forceinline__ void store8(__nv_bfloat16* p, const float (&in)[VECTOR]) {
    uint4 raw;
    __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&raw);
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) pairs[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    *reinterpret_cast<uint4*>(p) = raw;
}

__device__ __forceinline__ void store8(float* p, const float (&in)[VECTOR]) {
    reinterpret_cast<float4*>(p)[0] = make_float4(in[0], in[1], in[2], in[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(in[4], in[5], in[6], in[7]);
}
