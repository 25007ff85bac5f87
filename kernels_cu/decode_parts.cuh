// What a block of attend_decode.cu found of a head, a part: [rows, D / 2] words of 128 bits, Found. Those of a head stand one behind
// the other, in the order of its blocks, and are added up in it.
//
// Weights are powers of two relative to a score that was the largest of those a warp, or a block, saw: `largest`.
#pragma once
#include "call.cuh"

constexpr unsigned NO_KEY = 0xff800000u, IS_THERE = 0x80000000u;  // -inf; what stands for 0 as the last quarter of a word

struct Found {
    float2 value;  // sums of weighted v, of dims 16 j + i and 8 more
    float largest, sum;

    // Words of some parts.
    template <int PARTS_AT_ONCE>
    __device__ __forceinline__ void add(const uint4 (&words)[PARTS_AT_ONCE]) {
        float most = largest;
#pragma unroll
        for (int u = 0; u < PARTS_AT_ONCE; ++u) most = fmaxf(most, __uint_as_float(words[u].z));
        // No key is in the window yet: -inf - -inf would be NaN.
        const float base = most == MINUS_INFINITY ? 0.0f : most, shrink = power_of_two(largest - base);
        largest = most, value.x *= shrink, value.y *= shrink, sum *= shrink;
#pragma unroll
        for (int u = 0; u < PARTS_AT_ONCE; ++u) {
            const float weight = power_of_two(__uint_as_float(words[u].z) - base);
            value.x += weight * __uint_as_float(words[u].x), value.y += weight * __uint_as_float(words[u].y);
            sum += weight * __uint_as_float(words[u].w);
        }
    }
};

__device__ __forceinline__ Found nothing() { return {make_float2(0.0f, 0.0f), MINUS_INFINITY, 0.0f}; }

// As a word whose last quarter is not 0, which says that it is there: -0 stands for 0.
__device__ __forceinline__ uint4 word_of(const Found& found) {
    return make_uint4(__float_as_uint(found.value.x), __float_as_uint(found.value.y), __float_as_uint(found.largest),
                      found.sum == 0.0f ? IS_THERE : __float_as_uint(found.sum));
}

// Of a head's query and token: where its attention goes.
__device__ __forceinline__ __half* attention_of(const Call& call, long long token, int q_head_idx) {
    return call.attention + (token * call.num_q_heads + q_head_idx) * HEAD_DIM;
}

// Attention of dims 16 j + i and 8 more, once all of it has been found.
__device__ __forceinline__ void store_attention(const Call& call, __half* attention, const Found& found, int j, int i) {
    attention += 16 * j + i;
    const float scale = __fdividef(call.v_scale, found.sum);
    attention[0] = __float2half_rn(found.value.x * scale);
    attention[8] = __float2half_rn(found.value.y * scale);
}
