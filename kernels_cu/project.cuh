// What project_qkv does with rows of x and with heads that are multiplied. Before it: VEC.
#pragma once
#include "call.cuh"
#include "reduce.cuh"
#include "rope.cuh"
#include "storage.cuh"

// Parts of the hidden states: what k is off by changes, now and then, how it rounds, which in bfloat16 is a large step.
constexpr int HIDDEN_PARTS = 2;
constexpr int HALF_BLOCKS = HEAD_DIM / 16;  // 8-column blocks of half a head: block j is rotated with j + HALF_BLOCKS

// counters: next work, blocks that are done, then for each tile of rows how many pieces of it are normalised.
enum { NEXT, DONE, READY };

// One thread of each block, when the block is done: the last leaves the counters as it found them, for the next launch or replay.
__device__ __forceinline__ void leave_counters(const Call& call, int tiles) {
    __threadfence();
    if (atomicAdd(&call.counters[DONE], 1) == static_cast<int>(gridDim.x) - 1) {
        call.counters[NEXT] = call.counters[DONE] = 0;
        for (int i = 0; i < tiles; ++i) call.counters[READY + i] = 0;
    }
}

// Let the compiler forget what these were unpacked to: it would keep that, for want of registers in memory.
__device__ __forceinline__ void keep_packed(uint4& raw) {
    asm volatile("" : "+r"(raw.x));
    asm volatile("" : "+r"(raw.y));
    asm volatile("" : "+r"(raw.z));
    asm volatile("" : "+r"(raw.w));
}

// Describe and normalise row m of x, in one warp, which holds 32 HELD vectors of it; the rest of a wider one is read twice.
// of_first: sequence 0, which most calls have no other than. A row of padding may become anything: nothing that comes of it is stored.
__device__ __forceinline__ void normalise_row(const Call& call, const Sequence& of_first, int m) {
    constexpr int HELD = 4, AT_ONCE = 2;  // AT_ONCE: those whose norm's weight registers hold
    const int lane = threadIdx.x % 32, num_vectors = call.hidden_size / VECTOR;
    const long long row_start = static_cast<long long>(m) * call.hidden_size;
    auto load = [&](int v) { return __ldcg(reinterpret_cast<const uint4*>(call.x + row_start + v * VECTOR)); };
    uint4 held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = lane + 32 * i < num_vectors ? load(lane + 32 * i) : make_uint4(0, 0, 0, 0);
    // Ahead of stores that might be to it for all the compiler knows.
    float scale[AT_ONCE][VECTOR];
    auto load_scale = [&](int v, float (&one)[VECTOR]) {
        const float4* from = reinterpret_cast<const float4*>(call.input_norm + v * VECTOR);
        const float4 pieces[2] = {__ldg(from), __ldg(from + 1)};
        load8(reinterpret_cast<const float*>(pieces), one);
    };
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) load_scale(min(lane + 32 * j, num_vectors - 1), scale[j]);
    [[maybe_unused]] int2 own_row = make_int2(PADDING, 0);
    if (lane == 0) {
        const int b = m / call.seq;
        own_row = describe_row(call, m, b == 0 ? of_first : sequence(call, b));
    }
#ifdef COLLECT
    const bool valid = __shfl_sync(0xffffffffu, own_row.x, 0) >= 0;
#endif
    float sum_squares = 0.0f;
    auto add_squares = [&](const uint4& raw) {
        float values[VECTOR];
        load8(reinterpret_cast<const STORAGE*>(&raw), values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum_squares += values[j] * values[j];
    };
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        add_squares(held[i]);
        keep_packed(held[i]);
    }
#pragma unroll 1
    for (int v = lane + 32 * HELD; v < num_vectors; v += 32) add_squares(load(v));
    const float rstd = 1.0f / sqrtf(warp_sum(sum_squares) / call.hidden_size + call.eps);
    auto normalise = [&](int v, const uint4& raw, const float (&scale)[VECTOR]) {
        float values[VECTOR];
        load8(reinterpret_cast<const STORAGE*>(&raw), values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[j] = values[j] * rstd * scale[j];
#ifdef COLLECT
        if (valid) {
            float natural[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) natural[j] = values[j] * call.hidden_unscale;
            store8(call.stage_input_norm + row_start + v * VECTOR, natural);
        }
#endif
        __half* const target = call.hidden + HIDDEN_PARTS * row_start + v * VECTOR;
        store8(target, values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[j] -= __half2float(__float2half_rn(values[j]));
        store8(target + call.hidden_size, values);
    };
    // A loop, as instructions that run once or twice come late; the weight of later vectors is loaded as registers are free.
#pragma unroll 1
    for (int some = 0; some < HELD; some += AT_ONCE) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int v = lane + 32 * (some + j);
            if (v < num_vectors) normalise(v, held[j], scale[j]);
            load_scale(min(v + 32 * AT_ONCE, num_vectors - 1), scale[j]);
        }
#pragma unroll
        for (int j = AT_ONCE; j < HELD; ++j) held[j - AT_ONCE] = held[j];
    }
#pragma unroll 1
    for (int v = lane + 32 * HELD; v < num_vectors; v += 32) {
        float rest_scale[VECTOR];
        load_scale(v, rest_scale);
        normalise(v, load(v), rest_scale);
    }
}

// Store VEC consecutive values as 16-bit pairs.
template <typename T>
__device__ __forceinline__ void store_pairs(T* target, const unsigned (&pairs)[4]) {
    if constexpr (VEC == 8) {
        *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else if constexpr (VEC == 4) {
        *reinterpret_cast<uint2*>(target) = make_uint2(pairs[0], pairs[1]);
    } else {
        *reinterpret_cast<unsigned*>(target) = pairs[0];
    }
}

using Values = float[2 * HALF_BLOCKS][2];  // a thread's dims of one head: [8-column block][element]

__device__ __forceinline__ int dim_of(int block, int element) {
    return column_of<VEC>(block, threadIdx.x % 4, element);
}

// Store a head's values as T, if they are valid; with `rest`, what rounding to T left over.
template <typename T>
__device__ __forceinline__ void store_head(T* head, const Values& values, bool valid, bool rest = false) {
    if (!valid) return;
    constexpr int PAIRS = VEC / 2;
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; j += PAIRS) {
        unsigned pairs[4];
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            pairs[i] = pack(values[j + i][0], values[j + i][1], T());
            if (rest) pairs[i] = pack_rest(values[j + i][0], values[j + i][1], pairs[i], T());
        }
        store_pairs(head + dim_of(j, 0), pairs);
    }
}

__device__ __forceinline__ void collect_head(float* head, const Values& values, float scale) {
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; ++j)
        *reinterpret_cast<float2*>(head + dim_of(j, 0)) = make_float2(values[j][0] * scale, values[j][1] * scale);
}

#ifndef RAW
// What becomes of one head of one row: all lanes of a warp are here together.
// `rotate_block(j)` rotates the pairs of blocks j and j + HALF_BLOCKS.
template <typename RotateBlock>
__device__ __forceinline__ void finish_head(const Call& call, int m, int2 row, int head_idx, Values& values,
                                            RotateBlock rotate_block) {
    const int b = call.batch == 1 ? 0 : m / call.seq;
    const bool is_query = head_idx < call.num_q_heads;
    const bool is_key = !is_query && head_idx < call.num_q_heads + call.num_kv_heads;
    const int kv_head_idx = (head_idx - call.num_q_heads) % call.num_kv_heads;
    const long long sequence_head = static_cast<long long>(b) * call.num_kv_heads + kv_head_idx;
    const long long cached = (sequence_head * call.capacity + row.x) * HEAD_DIM;
    const long long scratch = (sequence_head * call.scratch_capacity + row.x) * HEAD_DIM;
    const bool valid = row.x >= 0;

    if (!is_query) {
        store_head((is_key ? call.k_cache : call.v_cache) + cached, values, valid);
#pragma unroll
        for (int j = 0; j < 2 * HALF_BLOCKS; ++j)  // go on from what was cached
#pragma unroll
            for (int e = 0; e < 2; ++e) values[j][e] = static_cast<float>(static_cast<STORAGE>(values[j][e]));
    }
#ifdef COLLECT
    const long long kv_row = (static_cast<long long>(m) * call.num_kv_heads + kv_head_idx) * HEAD_DIM;
    const long long q_row = (static_cast<long long>(m) * call.num_q_heads + head_idx) * HEAD_DIM;
    if (valid) {
        if (is_query) collect_head(call.stage_q + q_row, values, 1.0f);
        else collect_head((is_key ? call.stage_k : call.stage_v) + kv_row, values, 1.0f);
    }
#endif
    if (!is_query && !is_key) {
        if (!STORED_AS_FLOAT16) {
#pragma unroll
            for (int j = 0; j < 2 * HALF_BLOCKS; ++j) values[j][0] *= call.v_scale, values[j][1] *= call.v_scale;
            store_head(call.v + scratch, values, valid);
        }
        return;
    }

    float sum_squares[4] = {};  // chains: one of all would keep a lone warp waiting
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) sum_squares[j % 2 * 2 + e] = fmaf(values[j][e], values[j][e], sum_squares[j % 2 * 2 + e]);
    const float sum = sum_squares[0] + sum_squares[1] + (sum_squares[2] + sum_squares[3]);
    const float rstd = rsqrtf(quad_sum(sum) / HEAD_DIM + call.eps);
    const float* weight = is_query ? call.q_norm : call.k_norm;
#pragma unroll
    for (int j = 0; j < 2 * HALF_BLOCKS; ++j) {
        const float2 w = *reinterpret_cast<const float2*>(weight + dim_of(j, 0));
        values[j][0] *= rstd * w.x;
        values[j][1] *= rstd * w.y;
    }
#ifdef COLLECT
    if (valid) {
        if (is_query) collect_head(call.stage_q_norm + q_row, values, call.q_norm_unscale);
        else collect_head(call.stage_k_norm + kv_row, values, call.k_norm_unscale);
    }
#endif
#pragma unroll
    for (int j = 0; j < HALF_BLOCKS; ++j) rotate_block(j);
#ifdef COLLECT
    if (valid) {
        if (is_query) collect_head(call.stage_q_rope + q_row, values, call.q_rope_unscale);
        else collect_head(call.stage_k_rope + kv_row, values, call.k_rope_unscale);
    }
#endif
    const long long q_part = static_cast<long long>(call.batch) * call.seq * call.num_q_heads * HEAD_DIM;
    const long long k_part = static_cast<long long>(call.batch) * call.num_kv_heads * call.scratch_capacity * HEAD_DIM;
    __half* target = is_query ? call.q + (static_cast<long long>(m) * call.num_q_heads + head_idx) * HEAD_DIM
                              : call.k + scratch;
    store_head(target, values, valid);
    if (PARTS == 2) store_head(target + (is_query ? q_part : k_part), values, valid, true);
}
#endif
