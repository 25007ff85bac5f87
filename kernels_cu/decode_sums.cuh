// How attend_decode.cu adds up what warps found of a head, and what blocks did: always in the same order.
//
// What warps found is where their last tiles were (sum_index), what blocks did are parts (decode_parts.cuh).
#pragma once
#include "decode_parts.cuh"
#include "decode_shared.cuh"

// Row r, dims 16 j + i and 8 more, of what all warps found. Every lane looks at all of them: what goes from lane to lane takes
// longer than to work it out.
__device__ __forceinline__ Found sum_of_warps(const Shared& shared, int r, int j, int i) {
    float2 found[WARPS];
    Found all = nothing();
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        found[w] = shared.found[w][r];
        all.largest = fmaxf(all.largest, found[w].x);
    }
    const float base = all.largest == MINUS_INFINITY ? 0.0f : all.largest;
    const float* const sums = reinterpret_cast<const float*>(shared.ring) + 4 * sum_index(r & ~1, j, i) + r % 2 * 2;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        // Where no key was seen, or all were NaN, there are no weighted v, and keys may be on their way to their place.
        const float weight = power_of_two(found[w].x - base);
        all.sum += found[w].x == MINUS_INFINITY ? found[w].y : weight * fabsf(found[w].y);
        const int place = (w * STAGES + (found[w].y < 0.0f)) * static_cast<int>(sizeof(Tile) / 4);
        float2 found_v = make_float2(0.0f, 0.0f);
        if (weight != 0.0f) found_v = *reinterpret_cast<const float2*>(sums + place);
        all.value.x += weight * found_v.x, all.value.y += weight * found_v.y;
    }
    return all;
}

// Some words of a head, WORDS at once: of all parts, `stride` words apart, added up in their order; part `own` is what `all` has of
// them. The first part's word n is at word(n), if is_needed(n). Waits for what has not been written yet, and leaves zeros.
template <int WORDS, typename Word, typename IsNeeded>
__device__ __forceinline__ void add_parts(Found (&all)[WORDS], int stride, int num_parts, int own, Word word, IsNeeded is_needed) {
    constexpr int AT_ONCE = 8 / WORDS;  // parts: as many loads are under way
    Found found[WORDS];
#pragma unroll
    for (int n = 0; n < WORDS; ++n) found[n] = all[n], all[n] = nothing();
#pragma unroll 1
    for (int first = 0; first < num_parts; first += AT_ONCE) {
        uint4 words[WORDS][AT_ONCE];
        const auto at = [&](int n, int u) { return word(n) + (first + u) * stride; };
        const auto is_there = [&](int n, int u) { return first + u < num_parts && is_needed(n); };
#pragma unroll
        for (int n = 0; n < WORDS; ++n)
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u) {
                words[n][u] = make_uint4(0, 0, NO_KEY, is_there(n, u) ? 0 : IS_THERE);
                if (first + u == own) words[n][u] = word_of(found[n]);
            }
        bool is_missing = true;
#pragma unroll 1
        while (is_missing) {
            is_missing = false;
#pragma unroll
            for (int n = 0; n < WORDS; ++n)
#pragma unroll
                for (int u = 0; u < AT_ONCE; ++u)  // all that are missing at once
                    if (words[n][u].w == 0) words[n][u] = load_word(at(n, u));
#pragma unroll
            for (int n = 0; n < WORDS; ++n)
#pragma unroll
                for (int u = 0; u < AT_ONCE; ++u) is_missing = is_missing || words[n][u].w == 0;
        }
#pragma unroll
        for (int n = 0; n < WORDS; ++n)
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u)
                if (is_there(n, u) && first + u != own) *at(n, u) = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int n = 0; n < WORDS; ++n) all[n].add(words[n]);
    }
}
