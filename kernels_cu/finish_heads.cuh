// What becomes of the sums that project_qkv_wgmma has of whole heads: bias, caches, norms, rotation.
//
// Tensor cores have nothing to do meanwhile. So queries, keys and values have code of their own, but in a loop over heads and
// halves, as instructions that run once come slowly; and what all rows share is in shared memory, as a load behind everybody's
// tiles of x and W takes a microsecond.
#pragma once
#include "gemm_wgmma.cuh"
#include "rope.cuh"
#include "row_notes.cuh"
#include "storage.cuh"

#ifdef FOLDED
constexpr bool HAS_NOTES = true;
#else
constexpr bool HAS_NOTES = false;
#endif

constexpr int HEADS_A_TILE = BLOCK_N / HEAD_DIM;
constexpr int VECTORS = HEAD_DIM / (4 * VECTOR);  // of a thread: every fourth of a head's; two rotate with the other two
constexpr int PAIRED = VECTORS / 2;
static_assert(HEAD_DIM == 128 && BLOCK_N % HEAD_DIM == 0, "a tile holds whole heads");

// What all rows share: norms' weights and frequencies, in shared memory behind the ring.
struct Tables {
    float norms[2][HEAD_DIM];  // of queries, of keys
    unsigned long long frequency[HEAD_DIM / 2];
    float2 step[HEAD_DIM / 2];  // cosine and sine of the angles over STEP positions

    // A share of it, by each of some threads; then copies_commit(), copies_wait<0>() and a barrier between them.
    __device__ __forceinline__ void fetch(const Call& call, int thread) {
        constexpr int SIZE = sizeof(frequency), PIECES = SIZE / 16;
        static_assert(sizeof(norms) == 2 * SIZE && sizeof(step) == SIZE, "each of the four takes as many threads");
        if (thread >= 4 * PIECES) return;
        const void* const from[] = {call.q_norm, call.k_norm, call.frequency};
        const int which = thread / PIECES;
        const char* const source = static_cast<const char*>(which == 0 ? from[0] : which == 1 ? from[1] : from[2]);
        const int piece = which < 2 ? thread % PIECES : thread - 2 * PIECES;  // steps stand behind frequencies
        copy16_async(reinterpret_cast<char*>(this) + thread * 16, source + piece * 16, true);
    }
};

// A thread's rows of a tile, m and m + 8.
struct Rows {
    int m[2];
    int2 place[2];       // what call.rows says of them
    float factor[2];     // of their products
    unsigned number[2];  // of the call that their notes are of

    __device__ __forceinline__ void load(const Call& call, int first) {
        const int num_rows = call.batch * call.seq;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            m[half] = first + 8 * half;
            if constexpr (HAS_NOTES) {
                const Note note = notes::read(notes::of_row(call, min(m[half], num_rows - 1)));
                place[half] = make_int2(note.slot, note.position), factor[half] = note.factor;
                number[half] = note.number;
            } else {
                place[half] = m[half] < num_rows ? __ldcg(call.rows + m[half]) : make_int2(PADDING, 0);
                factor[half] = 1.0f;
            }
        }
    }

    // Wait a little for what had not been noted when they were loaded, then work it out, row after row: the blocks that
    // should have may not run before this one ends. All lanes of a warp do this.
    __device__ __forceinline__ void complete(const Call& call, unsigned wanted) {
        constexpr int PATIENCE = 32;
        const int num_rows = call.batch * call.seq;
        auto lacks = [&](int half) { return m[half] < num_rows && number[half] != wanted; };
        unsigned lacking;
#pragma unroll 1
        for (int i = 0; (lacking = __ballot_sync(0xffffffffu, lacks(0) || lacks(1))) != 0; ++i) {
            if (i < PATIENCE) {
                load(call, m[0]);
                continue;
            }
            const int row = __shfl_sync(0xffffffffu, lacks(0) ? m[0] : m[1], __ffs(lacking) - 1);
            const Note note = notes::work_out(call, row);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (m[half] == row)
                    place[half] = make_int2(note.slot, note.position), factor[half] = note.factor, number[half] = wanted;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (m[half] >= num_rows) place[half].x = PADDING;
    }
};

constexpr int STEP = 8;  // positions from a thread's first row to its second, where they follow one another
#ifdef FLOAT32_ANGLES
constexpr bool MAY_STEP = false;
#else
constexpr bool MAY_STEP = PARTS == 1;
#endif

using Head = float[VECTORS][VECTOR];     // what a thread has of one row
using Turns = float[PAIRED][VECTOR][2];  // cosine and sine of its pairs of dims

__device__ __forceinline__ int dim_of(int vector) { return 4 * VECTOR * vector + threadIdx.x % 4 * VECTOR; }

template <int H, int Half>
__device__ __forceinline__ void take_sums(const gemm::Sums& sums, Head& head) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) head[v][i] = sums[H * HEAD_DIM / 2 + 2 * VECTOR * v + i / 2 * 4 + 2 * Half + i % 2];
    asm volatile("");  // or what is taken would be selected from all that could be
}

// By hand: written as an assignment it becomes four stores of one pair each, where that saves moving registers.
template <typename T>
__device__ __forceinline__ void store_vector(T* target, const uint4& pairs, bool valid) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %5, 0;\n\t@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n\t}" ::"l"(target),
                 "r"(pairs.x), "r"(pairs.y), "r"(pairs.z), "r"(pairs.w), "r"(static_cast<int>(valid)));
}

// Round a vector to four pairs; and what that leaves over.
template <typename T>
__device__ __forceinline__ uint4 pack8(const float (&values)[VECTOR], T type) {
    return make_uint4(pack(values[0], values[1], type), pack(values[2], values[3], type), pack(values[4], values[5], type),
                      pack(values[6], values[7], type));
}

__device__ __forceinline__ uint4 pack8_rest(const float (&values)[VECTOR], const uint4& rounded) {
    return make_uint4(pack_rest(values[0], values[1], rounded.x), pack_rest(values[2], values[3], rounded.y),
                      pack_rest(values[4], values[5], rounded.z), pack_rest(values[6], values[7], rounded.w));
}

// Store a head of keys or values to its row of the cache, and go on from what is there.
__device__ __forceinline__ void store_to_cache(Head& head, float scale, STORAGE* row, bool valid) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) head[v][i] *= scale;
        const uint4 rounded = pack8(head[v], STORAGE());
        store_vector(row + dim_of(v), rounded, valid);
        load8(reinterpret_cast<const STORAGE*>(&rounded), head[v]);
    }
}

// Normalise and rotate a head and store it as float16, on the precise path what that leaves over as well, `part` further on.
__device__ __forceinline__ void store_rotated(Head& head, const Turns& turns, const float* norm, float eps, __half* row,
                                              long long part, bool valid) {
    float squares[4] = {};  // chains: one of all would keep a lone warp waiting
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) squares[i % 4] = fmaf(head[v][i], head[v][i], squares[i % 4]);
    const float rstd = rsqrtf(quad_sum(squares[0] + squares[1] + (squares[2] + squares[3])) / HEAD_DIM + eps);
#pragma unroll
    for (int v = 0; v < PAIRED; ++v) {
        float(&low)[VECTOR] = head[v], (&high)[VECTOR] = head[v + PAIRED], low_norm[VECTOR], high_norm[VECTOR];
        load8(norm + dim_of(v), low_norm);
        load8(norm + dim_of(v + PAIRED), high_norm);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            low[i] *= low_norm[i], high[i] *= high_norm[i];
            rotate(low[i], high[i], turns[v][i][0] * rstd, turns[v][i][1] * rstd);
        }
        const uint4 low_pairs = pack8(low, __half()), high_pairs = pack8(high, __half());
        store_vector(row + dim_of(v), low_pairs, valid);
        store_vector(row + dim_of(v + PAIRED), high_pairs, valid);
        if constexpr (PARTS == 2) {
            store_vector(row + part + dim_of(v), pack8_rest(low, low_pairs), valid);
            store_vector(row + part + dim_of(v + PAIRED), pack8_rest(high, high_pairs), valid);
        }
    }
}

// One row of a head, number `number` of queries, keys and values.
__device__ __forceinline__ void finish_head(const Call& call, const Tables& tables, Head& head, const Turns& turns, int m, int slot,
                                            float factor, int number) {
    const bool valid = slot >= 0;
    if (number < call.num_q_heads) {
        __half* const row = call.q + (static_cast<long long>(m) * call.num_q_heads + number) * HEAD_DIM;
        const long long part = static_cast<long long>(call.batch) * call.seq * call.num_q_heads * HEAD_DIM;
        const float scale = __fdividef(call.qkv_scale, factor), eps = call.eps * scale * scale;  // in units of the sums as they are
        store_rotated(head, turns, tables.norms[0], eps, row, part, valid);
        return;
    }
    const bool is_key = number < call.num_q_heads + call.num_kv_heads;
    const int kv_head = number - call.num_q_heads - (is_key ? 0 : call.num_kv_heads);
    const long long of_all = static_cast<long long>(call.batch == 1 ? 0 : m / call.seq) * call.num_kv_heads + kv_head;
    const long long scratch = (of_all * call.scratch_capacity + slot) * HEAD_DIM;
    STORAGE* const cached = (is_key ? call.k_cache : call.v_cache) + (of_all * call.capacity + slot) * HEAD_DIM;
    store_to_cache(head, call.qkv_unscale * factor, cached, valid);
    if (is_key) {
        const long long part = static_cast<long long>(call.batch) * call.num_kv_heads * call.scratch_capacity * HEAD_DIM;
        store_rotated(head, turns, tables.norms[1], call.eps, call.k + scratch, part, valid);
    } else if (!STORED_AS_FLOAT16) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) head[v][i] *= call.v_scale;
            store_vector(call.v + scratch + dim_of(v), pack8(head[v], __half()), valid);
        }
    }
}

// All of a thread's sums, of heads first_head on.
__device__ __forceinline__ void finish_tile(const Call& call, const Tables& tables, const gemm::Sums& sums, const Rows& rows,
                                            int first_head) {
    const int num_rotated = call.num_q_heads + call.num_kv_heads, num_heads = num_rotated + call.num_kv_heads;
    // Angles of a position with bit STEP are always those of the one STEP before, turned: bits follow from the position alone. Most
    // rows are such a pair. Then the second needs no sines and cosines of its own, which the GPU has few units for. On the precise
    // path errors of both would add up to too much.
    const bool is_pair = MAY_STEP && !__any_sync(0xffffffffu, rows.place[1].y != rows.place[0].y + STEP || (rows.place[0].y & STEP));
    Turns turns;  // the same for both heads
#pragma unroll 1
    for (int piece = 0; piece < 2 * HEADS_A_TILE; ++piece) {
        const int half = piece / HEADS_A_TILE, number = first_head + piece % HEADS_A_TILE;
        const int2 place = half ? rows.place[1] : rows.place[0];
        const float factor = half ? rows.factor[1] : rows.factor[0];
        if (number >= num_heads) continue;
        if (piece % HEADS_A_TILE == 0 && number < num_rotated) {
            const int steps = MAY_STEP ? place.y & STEP : 0;
            if (half == 0 || !is_pair) {
#pragma unroll
                for (int v = 0; v < PAIRED; ++v)
#pragma unroll
                    for (int i = 0; i < VECTOR; i += 2) {
                        const uint4 two = *reinterpret_cast<const uint4*>(tables.frequency + dim_of(v) + i);
                        rotation(place.y - steps, make_uint2(two.x, two.y), turns[v][i][0], turns[v][i][1]);
                        rotation(place.y - steps, make_uint2(two.z, two.w), turns[v][i + 1][0], turns[v][i + 1][1]);
                    }
            }
            if (steps) {
#pragma unroll
                for (int v = 0; v < PAIRED; ++v)
#pragma unroll
                    for (int i = 0; i < VECTOR; i += 2) {
                        const float4 two = *reinterpret_cast<const float4*>(tables.step + dim_of(v) + i);
                        rotate(turns[v][i][0], turns[v][i][1], two.x, two.y);
                        rotate(turns[v][i + 1][0], turns[v][i + 1][1], two.z, two.w);
                    }
            }
        }
        Head head;
        if (half == 0) {
            if (number == first_head) take_sums<0, 0>(sums, head);
            else take_sums<HEADS_A_TILE - 1, 0>(sums, head);
        } else {
            if (number == first_head) take_sums<0, 1>(sums, head);
            else take_sums<HEADS_A_TILE - 1, 1>(sums, head);
        }
        if (call.qkv_bias != nullptr) {
            const float scale = __fdividef(call.qkv_scale, factor);
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                float bias[VECTOR];
                load8(call.qkv_bias + number * HEAD_DIM + dim_of(v), bias);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) head[v][i] = fmaf(bias[i], scale, head[v][i]);
            }
        }
        finish_head(call, tables, head, turns, half ? rows.m[1] : rows.m[0], place.x, factor, number);
    }
}
