// What one call of the layer hands to its kernels, by value; launch.py holds the same layout.
//
// Letters as in docs/design.md: B sequences of S new tokens each, H hidden_size, Hq and Hkv heads, D head_dim.
// -D: STORAGE (__half or __nv_bfloat16), HEAD_DIM, PARTS (1: q' and k' rounded to float16; 2: high and low halves).
#pragma once
#include "mma.cuh"

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head_dim must be a multiple of 16, at most 256");

// What all blocks of project_qkv_wgmma must know of a row of x (row_notes.cuh); the first note has the number of the last call.
struct alignas(16) Note {
    float factor;
    int slot, position;  // as in Call's rows
    unsigned number;     // of the call
};

struct Call {
    // The caller's.
    const STORAGE* x;         // [B, S, H]
    const STORAGE* residual;  // [B, S, H] or null; may be x, may be y
    STORAGE* y;               // [B, S, H]
    const int* positions;     // [B, S], or null: counting on from the cache
    const int* num_tokens;    // [B], or null: S each
    // Weights. Powers of two that keep everything within float16 are in them already and come out in the epilogues.
    const __half* qkv_proj;               // [(Hq + 2 Hkv) D, H]
    const __half* folded_proj;            // the same times the input norm's weight, or null
    const __half* o_proj;                 // [H, Hq D]
    const unsigned char* k_proj;          // [Hkv D, H], E4M3: those of K times a power of two; null where nothing needs it
    const float* input_norm;              // [H]
    const float* q_norm;                  // [D], times the attention factor of RoPE
    const float* k_norm;                  // [D], likewise
    const float* qkv_bias;                // [(Hq + 2 Hkv) D] or null
    const float* o_bias;                  // [H] or null
    const unsigned long long* frequency;  // [D / 2], see rope.cuh; behind them [D / 2] float2, see finish_heads.cuh
    const float4* k_turns;                // [16, D / 2], see attend_decode.cu; null where angles are those of float32
    const float4* turns;                  // [1 + 64, ALL_TURNS_STRIDE], see decode_shared.cuh; likewise
    const uint4* half_turns;              // [64, ALL_TURNS_ROW], see decode_shared.cuh; likewise
    const float4* second_turns;           // [D / 2], see decode_queries.cuh; likewise
    // The cache.
    STORAGE* k_cache;       // [B, Hkv, capacity, D], before norm and RoPE
    STORAGE* v_cache;       // [B, Hkv, capacity, D]
    int* lengths;           // [B], tokens before this call; the last kernel advances them
    int* cached_positions;  // [B, capacity rounded up to POSITION_ALIGNMENT], see positions_of
    int* fault;             // [1], set if a replayed graph runs past the cache or the model's positions
    // Scratch, shared by the layers of a stream.
    int2* rows;         // [B S], x: place in the cache, or PADDING, or FAULT; y: position
    Note* notes;        // [1 + B S] or null, zero when made
    __half* hidden;     // [B S, 2 parts, H]; the second may be E4M3, and a row so much shorter
    __half* q;          // [PARTS, B S, Hq, D]
    __half* k;          // [PARTS, B, Hkv, scratch_capacity, D]
    __half* v;          // [B, Hkv, scratch_capacity, D], where storage is not float16
    __half* attention;  // [B S, Hq D]
    float* qkv;         // [B, (Hq + 2 Hkv) D], decode only
    float* partial;     // of project_*_few.cu, decode only
    uint4* parts;       // of attend_decode.cu, decode only; zero between kernels, unless decode_combine.cu adds them up
    int2* runs;         // of each head, for decode_combine.cu: the first that has a part in it, how many have; zero when made
    int* counters;      // zero between kernels
    // Stages to collect (-D COLLECT), float32, laid out as in reference.py.
    float* stage_input_norm;
    float* stage_q;
    float* stage_k;
    float* stage_v;
    float* stage_q_norm;
    float* stage_k_norm;
    float* stage_q_rope;
    float* stage_k_rope;
    float* stage_row_max;
    float* stage_lse;
    float* stage_attention;
    float* stage_output;
    int batch;
    int seq;
    int hidden_size;
    int num_q_heads;
    int num_kv_heads;
    int capacity;
    int scratch_capacity;
    int past_tiles;    // PAST_ROWS-row tiles of the longest cached sequence
    int heads_together;  // KV heads that attend_wgmma goes through before it comes to others
    int group;         // Hq / Hkv
    int alike_runs, alike_least;  // see AlikeRun in alike.cuh, or 0
    int max_position;  // positions are below this
    int window;        // largest difference of positions a query sees, plus one
    float eps;         // rms_norm_eps, in units of x^2
    float qkv_scale, qkv_unscale;  // of products, to and from float16's range
    float folded_rescale;          // of those of folded_proj, to qkv_scale
    float o_unscale;
    float rest_unscale;  // of products of E4M3
    float score_scale;  // from q' k'^T to base-2 logarithms of weights
    float v_scale;      // on v and attention in float16
    float hidden_unscale, q_norm_unscale, q_rope_unscale, k_norm_unscale, k_rope_unscale;  // for stages
};

// A kernel may begin before the one ahead of it in the stream has ended. Until this returns it must neither read what
// that one writes nor write anything: only weights and tables are there already. In a decode call attend_decode knows more: the
// kernel ahead of it lets it begin after its own wait. So decode_output, which attend_decode lets begin, knows of the calls before.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ == 900
constexpr bool OVERLAPPING = true;  // what a kernel leaves of a multiprocessor counts
#else
constexpr bool OVERLAPPING = false;
#endif

// Once every block has said so, the next kernel's blocks may take what room there is. Kernels that say so before their own
// wait, as most do, must not stand right before attend_decode, which reads lengths and keys before its wait.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A value the compiler takes to be unknown until here, so that it is not worked out later.
__device__ __forceinline__ int work_out_here(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Add one and return what was there before. What the block wrote ahead of a barrier, others see who count later.
__device__ __forceinline__ int count_in_order(int* counter) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// 128 bits that other blocks may look at meanwhile: they see all of them or none (PTX ISA: ld, st, .b128).
__device__ __forceinline__ void store_word(void* to, const uint4& word) {
    auto half = [](unsigned low, unsigned high) { return low | static_cast<unsigned long long>(high) << 32; };
    asm volatile("{\n\t.reg .b128 word;\n\tmov.b128 word, {%1, %2};\n\tst.relaxed.gpu.global.b128 [%0], word;\n\t}" ::"l"(to),
                 "l"(half(word.x, word.y)), "l"(half(word.z, word.w))
                 : "memory");
}

__device__ __forceinline__ uint4 load_word(const void* from) {
    unsigned long long low, high;
    asm volatile("{\n\t.reg .b128 word;\n\tld.relaxed.gpu.global.b128 word, [%2];\n\tmov.b128 {%0, %1}, word;\n\t}"
                 : "=l"(low), "=l"(high) : "l"(from) : "memory");
    return make_uint4(low, low >> 32, high, high >> 32);
}

constexpr int PADDING = -1;  // a row past its sequence's num_tokens
constexpr int FAULT = -2;    // a token of a sequence that does not fit

__device__ constexpr bool is_float16(__half*) { return true; }
__device__ constexpr bool is_float16(__nv_bfloat16*) { return false; }
constexpr bool STORED_AS_FLOAT16 = is_float16(static_cast<STORAGE*>(nullptr));

constexpr int POSITION_ALIGNMENT = 16;  // ints: decode_ring.cuh copies as many at a time

// Positions of the cached keys of sequence b.
__device__ __forceinline__ int* positions_of(const Call& call, int b) {
    const int stride = (call.capacity + POSITION_ALIGNMENT - 1) / POSITION_ALIGNMENT * POSITION_ALIGNMENT;
    return call.cached_positions + static_cast<long long>(b) * stride;
}

struct Sequence {
    int past;   // tokens in the cache before this call
    int count;  // new tokens
    int next;   // the position that counting on from the cache gives the first of them
    bool fault;
};

// The position of new token t of sequence b.
__device__ __forceinline__ int new_position(const Call& call, int b, int past, int t) {
    if (call.positions != nullptr) return __ldcg(call.positions + b * call.seq + t);
    return t + (past > 0 ? __ldcg(positions_of(call, b) + past - 1) + 1 : 0);
}

__device__ __forceinline__ int new_position(const Call& call, int b, const Sequence& s, int t) {
    return call.positions != nullptr ? __ldcg(call.positions + b * call.seq + t) : s.next + t;
}

// The host checks every call, but not the replays of a graph: what does not fit is left out whole. Loads go past L1, which
// may hold what a kernel before the last one read.
__device__ __forceinline__ Sequence sequence(const Call& call, int b) {
    Sequence s;
    s.past = __ldcg(call.lengths + b);
    s.count = call.num_tokens != nullptr ? __ldcg(call.num_tokens + b) : call.seq;
    s.next = call.positions == nullptr ? new_position(call, b, s.past, 0) : 0;
    s.fault = s.past + s.count > call.capacity ||
              (s.count > 0 && new_position(call, b, s, s.count - 1) >= call.max_position);
    if (s.fault) s.count = 0;
    return s;
}

// What call.rows should say of row m of x, which is of sequence s.
__device__ __forceinline__ int2 place_of_row(const Call& call, int m, const Sequence& s) {
    const int b = m / call.seq, t = m % call.seq;
    if (t < s.count) return make_int2(s.past + t, new_position(call, b, s, t));
    const bool is_token = call.num_tokens == nullptr || t < __ldcg(call.num_tokens + b);
    return make_int2(s.fault && is_token ? FAULT : PADDING, 0);
}

// Say so, for the kernels that follow, and note the row's position in the cache; return it as well.
__device__ __forceinline__ int2 describe_row(const Call& call, int m, const Sequence& s) {
    const int2 place = place_of_row(call, m, s);
    if (place.x >= 0) positions_of(call, m / call.seq)[place.x] = place.y;
    return call.rows[m] = place;
}

// Count the new tokens; one block of the last kernel of a call does this, when nobody reads the lengths any more. `s`: what
// sequence() says of it, before the kernel's wait where attend_decode comes ahead of it: that one has seen the calls before end.
__device__ __forceinline__ void advance_length(const Call& call, int b, const Sequence& s) {
    if (s.fault) *call.fault = 1;
    call.lengths[b] = s.past + s.count;
    if (b == 0 && call.notes != nullptr) atomicAdd(&call.notes->number, 1u);  // nobody waits for the answer
}

__device__ __forceinline__ void advance_length(const Call& call, int b) { advance_length(call, b, sequence(call, b)); }

__device__ __forceinline__ void advance_lengths(const Call& call) {
    for (int b = threadIdx.x; b < call.batch; b += blockDim.x) advance_length(call, b);
}
