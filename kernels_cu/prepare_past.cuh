// What project_qkv and project_qkv_wgmma do with keys and values that a chunk of a prompt finds in the cache.
#pragma once
#include "call.cuh"
#include "reduce.cuh"
#include "rope.cuh"
#include "storage.cuh"

constexpr int PAST_ROWS = 64;  // of cached keys, in call.past_tiles

// Normalise and rotate cached keys of head item % (B Hkv) into scratch, a warp to a row, from row
// item / (B Hkv) * rows on: every `step`-th of them, from the `first`-th. Widen v where needed.
__device__ __forceinline__ void prepare_past(const Call& call, int item, int rows, int first, int step) {
    const int heads = call.batch * call.num_kv_heads;
    const int first_slot = item / heads * rows, head = item % heads, b = head / call.num_kv_heads;
    const int past = min(__ldcg(call.lengths + b), call.capacity), lane = threadIdx.x % 32;
    const long long cache_head = static_cast<long long>(head) * call.capacity;
    const long long scratch_head = static_cast<long long>(head) * call.scratch_capacity;
    const long long part = static_cast<long long>(call.batch) * call.num_kv_heads * call.scratch_capacity * HEAD_DIM;
    constexpr int PAIRS = (HEAD_DIM / 2 + 63) / 64;  // pairs of dims a lane has, two at a time
    constexpr int AT_ONCE = 4;                       // rows, to wait for them together
    const int count = min(rows, past - first_slot);
#pragma unroll 1
    for (int i = first; i < count; i += AT_ONCE * step) {
        int position[AT_ONCE];
        unsigned raw[AT_ONCE][PAIRS][2];
#pragma unroll
        for (int r = 0; r < AT_ONCE; ++r) {
            const int slot = first_slot + min(i + r * step, count - 1);
            position[r] = __ldcg(positions_of(call, b) + slot);
#pragma unroll
            for (int p = 0; p < PAIRS; ++p) {
                const int d = min(2 * lane + 64 * p, HEAD_DIM / 2 - 2);
                const STORAGE* key = call.k_cache + (cache_head + slot) * HEAD_DIM + d;
                raw[r][p][0] = __ldcg(reinterpret_cast<const unsigned*>(key));
                raw[r][p][1] = __ldcg(reinterpret_cast<const unsigned*>(key + HEAD_DIM / 2));
            }
        }
#pragma unroll 1
        for (int slot = first_slot + i; slot < first_slot + min(i + AT_ONCE * step, count); slot += step) {
            __half* target = call.k + (scratch_head + slot) * HEAD_DIM;
            float2 low[PAIRS], high[PAIRS];
            float sum_squares = 0.0f;
#pragma unroll
            for (int p = 0; p < PAIRS; ++p) {
                low[p] = unpack(raw[0][p][0], STORAGE());
                high[p] = unpack(raw[0][p][1], STORAGE());
                if (2 * lane + 64 * p < HEAD_DIM / 2)
                    sum_squares += low[p].x * low[p].x + low[p].y * low[p].y + high[p].x * high[p].x + high[p].y * high[p].y;
            }
            const float rstd = rsqrtf(warp_sum(sum_squares) / HEAD_DIM + call.eps);
#pragma unroll
            for (int p = 0; p < PAIRS; ++p) {
                const int d = 2 * lane + 64 * p;
                if (d >= HEAD_DIM / 2) continue;
                const float2 w_low = *reinterpret_cast<const float2*>(call.k_norm + d);
                const float2 w_high = *reinterpret_cast<const float2*>(call.k_norm + d + HEAD_DIM / 2);
                const uint4 frequency = *reinterpret_cast<const uint4*>(call.frequency + d);
                float2 a = make_float2(low[p].x * rstd * w_low.x, low[p].y * rstd * w_low.y);
                float2 c = make_float2(high[p].x * rstd * w_high.x, high[p].y * rstd * w_high.y);
                rotate(a.x, c.x, position[0], make_uint2(frequency.x, frequency.y));
                rotate(a.y, c.y, position[0], make_uint2(frequency.z, frequency.w));
                const unsigned a_high = pack(a.x, a.y), c_high = pack(c.x, c.y);
                *reinterpret_cast<unsigned*>(target + d) = a_high;
                *reinterpret_cast<unsigned*>(target + d + HEAD_DIM / 2) = c_high;
                if (PARTS == 2) {
                    *reinterpret_cast<unsigned*>(target + part + d) = pack_rest(a.x, a.y, a_high);
                    *reinterpret_cast<unsigned*>(target + part + d + HEAD_DIM / 2) = pack_rest(c.x, c.y, c_high);
                }
            }
#pragma unroll
            for (int next = 1; next < AT_ONCE; ++next) {
                position[next - 1] = position[next];
#pragma unroll
                for (int p = 0; p < PAIRS; ++p) raw[next - 1][p][0] = raw[next][p][0], raw[next - 1][p][1] = raw[next][p][1];
            }
        }
    }
    if constexpr (!STORED_AS_FLOAT16) {
#pragma unroll 1
        for (int i = first; i < count; i += AT_ONCE * step) {
            unsigned raw[AT_ONCE][PAIRS * 2];
            auto each = [&](auto what) {
#pragma unroll
                for (int r = 0; r < AT_ONCE; ++r)
#pragma unroll
                    for (int p = 0; p < PAIRS * 2; ++p)
                        if (i + r * step < count && 2 * lane + 64 * p < HEAD_DIM)
                            what(raw[r][p], static_cast<long long>(first_slot + i + r * step) * HEAD_DIM + 2 * lane + 64 * p);
            };
            each([&](unsigned& pair, long long at) {
                pair = __ldcg(reinterpret_cast<const unsigned*>(call.v_cache + cache_head * HEAD_DIM + at));
            });
            each([&](unsigned& pair, long long at) {
                const float2 v = unpack(pair, STORAGE());
                *reinterpret_cast<unsigned*>(call.v + scratch_head * HEAD_DIM + at) = pack(v.x * call.v_scale, v.y * call.v_scale);
            });
        }
    }
}
