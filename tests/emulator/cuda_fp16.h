// The vector and 16-bit types of CUDA that the kernels use, in plain C++.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __restrict__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __grid_constant__

struct alignas(8) int2 { int x, y; };
struct int3 { int x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint32_t bits_of(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

struct __half {
    uint16_t bits;
    __half() = default;
    explicit __half(float f) {
        const uint16_t sign = bits_of(f) >> 16 & 0x8000;
        const float a = std::fabs(f);
        if (std::isnan(a)) {
            bits = 0x7fff;
        } else if (a >= 65520.0f) {
            bits = sign | 0x7c00;
        } else {
            int exponent = a == 0.0f ? -14 : std::ilogb(a);
            if (exponent < -14) exponent = -14;
            const int steps = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - exponent)));  // of 2^(exponent - 10)
            bits = sign | static_cast<uint16_t>(((exponent + 14) << 10) + steps);  // carries into the exponent
        }
    }
    operator float() const {
        const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const float sign = bits & 0x8000 ? -1.0f : 1.0f;
        if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
        return sign * std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
    }
};
struct alignas(4) __half2 { __half x, y; };
inline __half __float2half_rn(float f) { return __half(f); }
inline float __half2float(__half h) { return h; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) {
    return {__half(float(a.x) * float(b.x)), __half(float(a.y) * float(b.y))};
}

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float f) {
        const uint32_t u = bits_of(f);
        bits = std::isnan(f) ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    operator float() const { return float_of(static_cast<uint32_t>(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {__nv_bfloat16(float(a.x) * float(b.x)), __nv_bfloat16(float(a.y) * float(b.y))};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {h.x, h.y}; }
