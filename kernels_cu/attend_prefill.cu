// Attention of S new tokens over all cached ones: online softmax (Dao et al. 2022, arXiv:2205.14135), causal, grouped.
//   s = q' k'^T score_scale;   p = 2^(s - max s);   attention = p v / sum p          sums in float32, operands float16
// With PARTS 2 the scores are q_high k_high + q_high k_low + q_low k_high: float16's range, twice its precision.
//
// Grid (tiles of queries x Hq x B), longest first; block 32 WARPS threads, WARP_M query rows of one head to each warp.
// Shared memory: q [PARTS, BLOCK_M], then STAGES x (k [PARTS, BLOCK_N], v [BLOCK_N]) rows of HEAD_DIM + 8 halves.
// -D: those of call.cuh, WARPS, WARP_M (16 or 32), BLOCK_N (keys of a step), WINDOW (if there is one), COLLECT.
// Tensor-core bound; k and v of a head are re-read from L2 by every tile of queries.
#include "call.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK_M = WARPS * WARP_M;
constexpr int STAGES = 2;
constexpr int STRIDE = HEAD_DIM + 8;  // an odd number of 16-byte pieces: ldmatrix meets no bank twice
constexpr int M_FRAGS = WARP_M / 16;
constexpr int N_BLOCKS = BLOCK_N / 8;
constexpr int D_BLOCKS = HEAD_DIM / 8;
constexpr int STAGE_ROWS = (PARTS + 1) * BLOCK_N;

// Start copying ROWS rows of HEAD_DIM halves; rows from `valid_rows` on become zero: no NaN must meet a weight of zero.
template <int ROWS>
__device__ __forceinline__ void load_rows(__half* shared, const __half* global, long long stride, int valid_rows) {
    constexpr int PIECES = HEAD_DIM / 8;
    constexpr int PASS = THREADS / PIECES;
    if constexpr (THREADS % PIECES == 0 && ROWS % PASS == 0) {  // evenly spaced rows: constants instead of addresses
        const int row = threadIdx.x / PIECES, column = threadIdx.x % PIECES * 8;
        shared += row * STRIDE + column;
        global += row * stride + column;
#pragma unroll
        for (int i = 0; i < ROWS; i += PASS)
            copy16_async(shared + i * STRIDE, global + i * stride, row + i < valid_rows);
    } else {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
            const int row = i / PIECES, column = i % PIECES * 8;
            copy16_async(shared + row * STRIDE + column, global + row * stride + column, row < valid_rows);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS <= 128 ? 2 : 1)
attend_prefill(const __grid_constant__ Call call)
{
    extern __shared__ __align__(128) __half smem[];
    __half* const q_smem = smem;
    __half* const ring = smem + PARTS * BLOCK_M * STRIDE;

    const int heads = call.batch * call.num_q_heads;
    const int m_tile = (gridDim.x - 1 - blockIdx.x) / heads, b = blockIdx.x % heads / call.num_q_heads;
    const int q_head_idx = blockIdx.x % call.num_q_heads;
    const int kv_head_idx = q_head_idx / (call.num_q_heads / call.num_kv_heads);
    const Sequence s = sequence(call, b);
    const int first_q = m_tile * BLOCK_M;
    if (first_q >= s.count) return;
    const int num_keys = s.past + min(s.count, first_q + BLOCK_M);  // that any row of this tile sees
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;

    const long long q_row_stride = static_cast<long long>(call.num_q_heads) * HEAD_DIM;
    const long long q_part = static_cast<long long>(call.batch) * call.seq * q_row_stride;
    const __half* q = call.q + (static_cast<long long>(b) * call.seq + first_q) * q_row_stride + q_head_idx * HEAD_DIM;
    const long long kv_head = static_cast<long long>(b) * call.num_kv_heads + kv_head_idx;
    const long long k_part = static_cast<long long>(call.batch) * call.num_kv_heads * call.scratch_capacity * HEAD_DIM;
    const __half* k = call.k + kv_head * call.scratch_capacity * HEAD_DIM;
    const __half* v = STORED_AS_FLOAT16 ? reinterpret_cast<const __half*>(call.v_cache) + kv_head * call.capacity * HEAD_DIM
                                      : call.v + kv_head * call.scratch_capacity * HEAD_DIM;

    auto load_step = [&](int step) {
        __half* stage = ring + (step % STAGES) * STAGE_ROWS * STRIDE;
        const long long first = static_cast<long long>(step) * BLOCK_N * HEAD_DIM;
        const int valid = num_keys - step * BLOCK_N;
#pragma unroll
        for (int p = 0; p < PARTS; ++p)
            load_rows<BLOCK_N>(stage + p * BLOCK_N * STRIDE, k + p * k_part + first, HEAD_DIM, valid);
        load_rows<BLOCK_N>(stage + PARTS * BLOCK_N * STRIDE, v + first, HEAD_DIM, valid);
    };

    // Keys from the right, so that only the first steps meet the diagonal.
    const int last_step = (num_keys - 1) / BLOCK_N;
    int first_step = 0;
#ifdef WINDOW  // positions grow by one a key at least, so no key further left is near enough
    first_step = max(0, s.past + first_q - call.window + 1) / BLOCK_N;
    const int* key_positions = positions_of(call, b);
#endif
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
        load_rows<BLOCK_M>(q_smem + p * BLOCK_M * STRIDE, q + p * q_part, q_row_stride, s.count - first_q);
    load_step(last_step);
    copies_commit();

    float out[M_FRAGS][D_BLOCKS][4];
    float row_max[M_FRAGS][2], row_sum[M_FRAGS][2];
#pragma unroll
    for (int i = 0; i < M_FRAGS; ++i) {
#pragma unroll
        for (int j = 0; j < D_BLOCKS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[i][j][e] = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            row_max[i][half] = MINUS_INFINITY;
            row_sum[i][half] = 0.0f;
        }
    }
    const int first_place = s.past + first_q + warp * WARP_M;  // in the cache, of this warp's first row
    auto place = [&](int i, int half) { return first_place + i * 16 + half * 8 + lane / 4; };

#pragma unroll 1
    for (int step = last_step; step >= first_step; --step) {
        copies_wait<0>();
        __syncthreads();
        if (step > first_step) load_step(step - 1);
        copies_commit();
        const __half* k_smem = ring + (step % STAGES) * STAGE_ROWS * STRIDE;
        const __half* v_smem = k_smem + PARTS * BLOCK_N * STRIDE;
        if (first_place + WARP_M <= step * BLOCK_N) continue;  // every key comes after every row of this warp

        float scores[M_FRAGS][N_BLOCKS][4];
#pragma unroll
        for (int i = 0; i < M_FRAGS; ++i)
#pragma unroll
            for (int j = 0; j < N_BLOCKS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) scores[i][j][e] = 0.0f;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d) {
            unsigned q_frag[PARTS][M_FRAGS][4];
#pragma unroll
            for (int p = 0; p < PARTS; ++p)
#pragma unroll
                for (int i = 0; i < M_FRAGS; ++i) {
                    const int row = p * BLOCK_M + warp * WARP_M + i * 16 + lane % 16;
                    load_matrices(q_frag[p][i], q_smem + row * STRIDE + d * 16 + lane / 16 * 8);
                }
#pragma unroll
            for (int j = 0; j < N_BLOCKS; j += 2) {
                const int row = j * 8 + lane / 16 * 8 + lane % 8;
                unsigned k_frag[PARTS][4];
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
                    load_matrices(k_frag[p], k_smem + (p * BLOCK_N + row) * STRIDE + d * 16 + lane / 8 % 2 * 8);
#pragma unroll
                for (int i = 0; i < M_FRAGS; ++i) {
                    if (PARTS == 2) {  // the small products first
                        multiply_add(scores[i][j], q_frag[PARTS - 1][i], k_frag[0][0], k_frag[0][1]);
                        multiply_add(scores[i][j + 1], q_frag[PARTS - 1][i], k_frag[0][2], k_frag[0][3]);
                        multiply_add(scores[i][j], q_frag[0][i], k_frag[PARTS - 1][0], k_frag[PARTS - 1][1]);
                        multiply_add(scores[i][j + 1], q_frag[0][i], k_frag[PARTS - 1][2], k_frag[PARTS - 1][3]);
                    }
                    multiply_add(scores[i][j], q_frag[0][i], k_frag[0][0], k_frag[0][1]);
                    multiply_add(scores[i][j + 1], q_frag[0][i], k_frag[0][2], k_frag[0][3]);
                }
            }
        }

        bool masked = (step + 1) * BLOCK_N > first_place + 1;
#ifdef WINDOW
        masked = true;
#endif
        if (masked) {
#pragma unroll
            for (int i = 0; i < M_FRAGS; ++i)
#pragma unroll
                for (int j = 0; j < N_BLOCKS; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int key = step * BLOCK_N + j * 8 + 2 * quad + e % 2;
                        bool hidden = key > place(i, e / 2);
#ifdef WINDOW
                        hidden = hidden || place(i, e / 2) >= num_keys ||
                                 key_positions[place(i, e / 2)] - key_positions[key] >= call.window;
#endif
                        if (hidden) scores[i][j][e] = MINUS_INFINITY;
                    }
        }

#pragma unroll
        for (int i = 0; i < M_FRAGS; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float largest = row_max[i][half];
#pragma unroll
                for (int j = 0; j < N_BLOCKS; ++j)
                    largest = fmaxf(largest, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
                largest = quad_max(largest);
                // A row that has seen no key yet: -inf - -inf would be NaN.
                const float shift = largest == MINUS_INFINITY ? 0.0f : largest * call.score_scale;
                const float shrink = power_of_two(row_max[i][half] * call.score_scale - shift);
                row_max[i][half] = largest;
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < N_BLOCKS; ++j)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        scores[i][j][e] = power_of_two(fmaf(scores[i][j][e], call.score_scale, -shift));
                        sum += scores[i][j][e];
                    }
                row_sum[i][half] = row_sum[i][half] * shrink + sum;
#pragma unroll
                for (int j = 0; j < D_BLOCKS; ++j) out[i][j][2 * half] *= shrink, out[i][j][2 * half + 1] *= shrink;
            }

#pragma unroll
        for (int n = 0; n < BLOCK_N / 16; ++n) {
            unsigned p_frag[M_FRAGS][4];
#pragma unroll
            for (int i = 0; i < M_FRAGS; ++i)
#pragma unroll
                for (int f = 0; f < 4; ++f)
                    p_frag[i][f] = pack(scores[i][2 * n + f / 2][f % 2 * 2], scores[i][2 * n + f / 2][f % 2 * 2 + 1]);
#pragma unroll
            for (int j = 0; j < D_BLOCKS; j += 2) {
                unsigned v_frag[4];
                load_matrices_transposed(v_frag, v_smem + (n * 16 + lane % 16) * STRIDE + j * 8 + lane / 16 * 8);
#pragma unroll
                for (int i = 0; i < M_FRAGS; ++i) {
                    multiply_add(out[i][j], p_frag[i], v_frag[0], v_frag[1]);
                    multiply_add(out[i][j + 1], p_frag[i], v_frag[2], v_frag[3]);
                }
            }
        }
    }
    copies_wait<0>();

    const int count = sequence(call, b).count;  // read again: a register less in the loop
#pragma unroll
    for (int i = 0; i < M_FRAGS; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(row_sum[i][half]);
            const int t = first_q + warp * WARP_M + i * 16 + half * 8 + lane / 4;
            if (t >= count) continue;
            const float scale = 1.0f / sum;
            const long long row = (static_cast<long long>(b) * call.seq + t) * q_row_stride + q_head_idx * HEAD_DIM;
#pragma unroll
            for (int j = 0; j < D_BLOCKS; ++j) {
                const float low = out[i][j][2 * half] * scale, high = out[i][j][2 * half + 1] * scale;
                *reinterpret_cast<unsigned*>(call.attention + row + j * 8 + 2 * quad) = pack(low, high);
#ifdef COLLECT
                *reinterpret_cast<float2*>(call.stage_attention + row + j * 8 + 2 * quad) =
                    make_float2(low / call.v_scale, high / call.v_scale);
#endif
            }
#ifdef COLLECT
            if (quad == 0) {
                const long long at = (static_cast<long long>(b) * call.num_q_heads + q_head_idx) * call.seq + t;
                const float largest = row_max[i][half] * call.score_scale * 0.693147181f;
                call.stage_row_max[at] = largest;
                call.stage_lse[at] = largest + logf(sum);
            }
#endif
        }
}
