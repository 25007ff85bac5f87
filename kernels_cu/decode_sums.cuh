// How attend_decode.cu adds up what warps found of a head, and what blocks did: always in the same order.
//
// Weights are powers of two relative to a score that was the largest of those a warp, or a block, saw: `largest`. What warps
// found is where their last tiles were (sum_index); what a block found is a part, [ROWS, D] of float and then of each row
// `largest` and the sum of weights.
#pragma once
#include "decode_shared.cuh"

constexpr int PART = ROWS * (HEAD_DIM + 2);  // floats

__device__ __forceinline__ float2* found_of_part(float* part) { return reinterpret_cast<float2*>(part + ROWS * HEAD_DIM); }

struct Found {
    float2 value;  // sums of weighted v, of two dims
    float largest, sum;
};

// Row r, dims d and d + 1, of what all warps found. All lanes of a warp together, and of the same row.
__device__ __forceinline__ Found sum_of_warps(const Shared& shared, int r, int d) {
    constexpr int SPAN = WARPS <= 8 ? 8 : 16;  // lane w % SPAN works out the weight of what warp w found
    const int lane = threadIdx.x % 32, w_of_lane = lane % SPAN;
    const float2 found = w_of_lane < WARPS ? shared.found[w_of_lane][r] : make_float2(MINUS_INFINITY, 0.0f);
    Found all = {make_float2(0.0f, 0.0f), found.x, 0.0f};
#pragma unroll
    for (int lanes = 1; lanes < SPAN; lanes *= 2)
        all.largest = fmaxf(all.largest, __shfl_xor_sync(0xffffffffu, all.largest, lanes));
    // Where no key was seen, or all were NaN, there are no weighted v.
    const float own_weight = found.x == MINUS_INFINITY ? 0.0f : exp2f(found.x - all.largest);
    all.sum = found.x == MINUS_INFINITY ? found.y : own_weight * fabsf(found.y);
#pragma unroll
    for (int lanes = SPAN / 2; lanes > 0; lanes /= 2) all.sum += __shfl_xor_sync(0xffffffffu, all.sum, lanes);
    const unsigned second_tiles = __ballot_sync(0xffffffffu, found.y < 0.0f);
    const float* const sums = reinterpret_cast<const float*>(shared.ring) + sum_index(r, d);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        const float weight = __shfl_sync(0xffffffffu, own_weight, w);
        const int place = (w * STAGES + (second_tiles >> w & 1)) * static_cast<int>(sizeof(Tile) / 4);
        float2 found_v = make_float2(0.0f, 0.0f);
        if (weight != 0.0f) found_v = *reinterpret_cast<const float2*>(sums + place);  // or keys are on their way there
        all.value.x += weight * found_v.x, all.value.y += weight * found_v.y;
    }
    return all;
}

// Elements i and i + 1 of [ROWS, D] of all parts of a head.
__device__ __forceinline__ Found sum_of_runs(float* parts, int num_runs, int i) {
    constexpr int AT_ONCE = 8;
    const float2* const values_of = reinterpret_cast<const float2*>(parts + i);
    const float2* const found_of = found_of_part(parts) + i / HEAD_DIM;
    Found all = {make_float2(0.0f, 0.0f), MINUS_INFINITY, 0.0f};
#pragma unroll 1
    for (int run = 0; run < num_runs; run += AT_ONCE) {
        float2 values[AT_ONCE], found[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            values[u] = make_float2(0.0f, 0.0f), found[u] = make_float2(MINUS_INFINITY, 0.0f);
            if (run + u < num_runs) {
                values[u] = __ldcg(values_of + (run + u) * (PART / 2));
                found[u] = __ldcg(found_of + (run + u) * (PART / 2));
            }
        }
        float most = all.largest;
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) most = fmaxf(most, found[u].x);
        // No key is in the window yet: -inf - -inf would be NaN.
        const float base = most == MINUS_INFINITY ? 0.0f : most, shrink = exp2f(all.largest - base);
        all.largest = most, all.value.x *= shrink, all.value.y *= shrink, all.sum *= shrink;
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            const float weight = exp2f(found[u].x - base);
            all.value.x += weight * values[u].x, all.value.y += weight * values[u].y;
            all.sum += weight * found[u].y;
        }
    }
    return all;
}
