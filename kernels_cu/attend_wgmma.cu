// attend_prefill.cu on Hopper's own units: tensor copies fill a ring, two warpgroups multiply (Shah et al. 2024,
// arXiv:2407.08608).
//   s = q' k'^T score_scale;   p = 2^(s - max s);   attention = p v / sum p          sums in float32, operands float16
// With PARTS 2 the scores are q_high k_high + q_high k_low + q_low k_high: float16's range, twice its precision.
//
// Weights are relative to a score that was its row's largest once, and must not grow too large for float16. So a step looks for a
// larger score first. Where norm weights are so small that no weight is more than float32 holds (OPTIMISTIC), steps without masks do
// not: the sum of their weights, which is needed anyway, tells afterwards.
//
// Grid: any number of clusters of CLUSTER blocks, a block a multiprocessor; attend_feed.cuh says which tiles each has.
// Block 384 threads: a warpgroup that copies, two that have 64 query rows each. While the products of one step run, each has
// the softmax of the next to do; while a tile ends, q, k and v of the next are on their way.
// With SPLIT_KEYS, where all would wait for the few tiles with most keys, they are 64 queries. Both warpgroups have all of those, and
// every other step each; in the end each sends the other what it has of one row in two, and stores the other row.
// Shared memory: 2 x q [PARTS], then STAGES x (k [PARTS], v), each of two tiles of 64 columns (wgmma.cuh); with SPLIT_KEYS what
// warpgroups send.
// -D: those of call.cuh, HEAD_DIM 128, CLUSTER, WINDOW (if there is one), SPLIT_KEYS (PARTS 1, CLUSTER 1), OPTIMISTIC. Tensor-core bound.
#include "attend_feed.cuh"

constexpr int SCORES = BLOCK_N / 2;  // of a thread: two rows of a quad's columns
#ifdef OPTIMISTIC
static_assert(PARTS == 1 && STRIDE == 1, "with SPLIT_KEYS a warpgroup's rows may come to such steps before they have seen a key");
constexpr bool LOOKS_AFTER = true;
#else
constexpr bool LOOKS_AFTER = false;
#endif
constexpr float MOST_OF_SUM = 1 << 15;  // of a thread's weights of a step: then each of them is a float16
constexpr int BITS_OF_SUM = 5;       // what larger sums are lowered to
constexpr int WHO_HELPS = 1;         // hardware barrier
using Row = float[32];               // of a thread: its dims of one row of attention
constexpr int SENT = 32 / 4 + 1;     // float4 of a thread: those, the row's `top` and the sum of its weights

// A step: whether some keys are hidden from some rows, and whether it looks for a larger score first.
template <bool Masked, bool LooksFirst>
struct Step {
    static constexpr bool MASKED = Masked, LOOKS_FIRST = LooksFirst;
};

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(WARPGROUP* (1 + CONSUMERS), 1)
attend_wgmma(const __grid_constant__ Call call, const __grid_constant__ Maps maps)
{
    extern __shared__ __align__(1024) __half smem[];
    __shared__ Barriers barriers;
    __shared__ Tile tiles[2];
    __half* const ring = smem + 2 * Q;

    if (threadIdx.x == 0) {
        barriers.init();
        prefetch(&maps.q), prefetch(&maps.k), prefetch(&maps.v);
    }
    let_next_kernel_begin();
    if constexpr (CLUSTER == 1) __syncthreads();
    else cluster_meet();

    if (threadIdx.x < WARPGROUP) {
        give_registers<56>();
        if (uniform(threadIdx.x / 32) != 0 || !elected()) return;
        Feed feed(call, maps, barriers, tiles, smem);
        wait_for_previous_kernel();
        feed.run();
        return;
    }
    wait_for_previous_kernel();
    take_registers<224>();

    const int group = uniform(threadIdx.x / WARPGROUP) - 1, warp = threadIdx.x % WARPGROUP / 32;
    const int lane = threadIdx.x % 32, quad = lane % 4;
    const int row_group = STRIDE == 1 ? group : 0;
    const int row = row_group * 64 + warp * 16 + lane / 4;  // of the tile; the other: 8 on
    // Operands in the first of the buffers.
    const unsigned long long queries = operand(shared_address(smem + row_group * 64 * TILE_COLUMNS));
    const unsigned long long keys = operand(shared_address(ring));
    const unsigned long long values = operand(shared_address(ring + 2 * PARTS * KV_TILE), KV_TILE * 2);
    // Of the tile at hand. Step i has keys (last - i) * BLOCK_N on.
    unsigned long long q_operand;
    int first_place, last;

#ifdef WINDOW
    const int* key_positions;
    int num_keys, positions[2], last_position;
    // Whether some row is too far from some key of a step; then it is so in all steps to come.
    auto leaves_window = [&](int i) {
        return last_position - __ldcg(key_positions + (last - i) * BLOCK_N) >= call.window;
    };
#endif
    // Of a row: the score its weights are relative to, as a base-2 logarithm, or minus infinity before it has seen a key; their sum;
    // what is subtracted from scores.
    float scores[SCORES], out[64], top[2], row_sum[2], shift[2], shrink[2];
    bool shrinks = false;

    auto start_scores = [&](int i) {
        barrier_wait(&barriers.k_full[stage_of(i)], parity_of(i));
        products_begin();
#pragma unroll
        for (int pair = 0; pair < (PARTS == 1 ? 1 : 3); ++pair) {
            const unsigned long long q = q_operand + pair / 2 * 2 * Q_TILE * 2 / 16;
            const unsigned long long k = keys + (stage_of(i) * STAGE + pair % 2 * 2 * KV_TILE) * 2 / 16;
#pragma unroll
            for (int c = 0; c < HEAD_DIM / 16; ++c)
                multiply(scores, q + (c / 4 * Q_TILE * 2 + c % 4 * 32) / 16, k + (c / 4 * KV_TILE * 2 + c % 4 * 32) / 16,
                         pair + c > 0);
        }
        products_commit();
    };
    // From scores to weights, relative to a score that is raised when a weight would be above 2^MOST or a sum above MOST_OF_SUM; and by
    // how much what was added up before counts less then.
    auto softmax = [&](int i, auto step) {
        constexpr bool LOOKS_FIRST = decltype(step)::LOOKS_FIRST;
        if (decltype(step)::MASKED) {
            const int first_key = (last - i) * BLOCK_N + 2 * quad;
#pragma unroll
            for (int j = 0; j < SCORES; ++j) {
                const int key = first_key + j / 4 * 8 + j % 2;
                bool hidden = key > first_place + j % 4 / 2 * 8;
#ifdef WINDOW
                hidden = hidden || positions[j % 4 / 2] - __ldcg(key_positions + min(key, num_keys - 1)) >= call.window;
#endif
                if (hidden) scores[j] = MINUS_INFINITY;
            }
        }
        if (LOOKS_FIRST) {
            float largest[2] = {MINUS_INFINITY, MINUS_INFINITY};
#pragma unroll
            for (int j = 0; j < SCORES; j += 2)
                largest[j / 2 % 2] = fmaxf(largest[j / 2 % 2], fmaxf(scores[j], scores[j + 1]));
            // A row that has seen no key and sees none now, NaN, is not above.
            auto is_above = [&](int half) { return largest[half] * call.score_scale - top[half] > MOST; };
            shrinks = __any_sync(0xffffffffu, is_above(0) || is_above(1));
            if (shrinks) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    largest[half] = quad_max(largest[half]);
                    shrink[half] = 1.0f;
                    if (!is_above(half)) continue;  // whatever other rows do, which may be of another sequence
                    shift[half] = largest[half] * call.score_scale;
                    shrink[half] = power_of_two(top[half] - shift[half]);
                    row_sum[half] *= shrink[half];
                    top[half] = shift[half];
                }
            }
        }
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 2 * half; j < SCORES; j += 4) {
                scores[j] = power_of_two(fmaf(scores[j], call.score_scale, -shift[half]));
                scores[j + 1] = power_of_two(fmaf(scores[j + 1], call.score_scale, -shift[half]));
                sums[half] += scores[j] + scores[j + 1];
            }
        }
        if (!LOOKS_FIRST) {
            shrinks = __any_sync(0xffffffffu, sums[0] > MOST_OF_SUM || sums[1] > MOST_OF_SUM);
            if (shrinks) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float most = quad_max(sums[half]);
                    shrink[half] = 1.0f;
                    if (!(most > MOST_OF_SUM)) continue;
                    const int bits = (__float_as_uint(most) >> 23) - 127 - BITS_OF_SUM;
                    shrink[half] = __int_as_float(127 - bits << 23);
                    top[half] += bits, shift[half] += bits;
                    sums[half] *= shrink[half], row_sum[half] *= shrink[half];
#pragma unroll
                    for (int j = 2 * half; j < SCORES; j += 4) scores[j] *= shrink[half], scores[j + 1] *= shrink[half];
                }
            }
        }
        row_sum[0] += sums[0], row_sum[1] += sums[1];
    };
    unsigned weights[SCORES / 8][4];
    auto round_weights = [&]() {
#pragma unroll
        for (int t = 0; t < SCORES / 8; ++t)
#pragma unroll
            for (int f = 0; f < 4; ++f) weights[t][f] = pack(scores[8 * t + 2 * f], scores[8 * t + 2 * f + 1]);
    };
    auto start_sums = [&](int i) {
        if (shrinks) {
#pragma unroll
            for (int j = 0; j < 64; ++j) out[j] *= shrink[j % 4 / 2];
        }
        barrier_wait(&barriers.v_full[stage_of(i)], parity_of(i));
        products_begin();
        const unsigned long long v = values + stage_of(i) * STAGE * 2 / 16;
#pragma unroll
        for (int t = 0; t < BLOCK_N / 16; ++t) multiply_transposed(out, weights[t], v + t * 16 * TILE_COLUMNS * 2 / 16);
        products_commit();
    };
    // At all blocks that copy here.
    const unsigned there = CLUSTER == 1 ? 0 : address_in(lane < CLUSTER ? lane : 0, &barriers);
    auto release = [&](Barrier* barrier) {
        if (lane >= CLUSTER) return;
        if constexpr (CLUSTER == 1) barrier_arrive(barrier);
        else barrier_arrive_at(there + static_cast<unsigned>(reinterpret_cast<char*>(barrier) - reinterpret_cast<char*>(&barriers)));
    };
    // What step i - STAGES took of v, once its products are done, if it is of this tile. What the last steps took goes at its end.
    int first_step = 0;
    auto release_before = [&](int i) {
        if (i >= first_step + STAGES) release(&barriers.v_empty[stage_of(i)]);
    };

    // A step's products begin while those of the step before run. The wait for them stands at the top of the next
    // round: ptxas moves it up to any place it finds, and only the jump back stops it.
    auto round = [&](int i, auto step) {
        products_wait<0>();
        settled(out);
        release_before(i);
        round_weights();
        start_scores(i);
        start_sums(i - STRIDE);
        products_wait<1>();
        settled(scores);
        release(&barriers.k_empty[stage_of(i)]);
        softmax(i, step);
    };
    static_assert(STAGES == 2 * STRIDE, "round i finds the products of step i - STAGES done");

    int i = STRIDE == 1 ? 0 : group;  // this warpgroup's next step
    int begin = 0, end;               // of all
#pragma unroll 1
    for (int n = 0;; ++n, begin = end) {
        barrier_wait(&barriers.q_full[n % 2], n / 2 % 2);
        Tile tile = {};
        if (lane == 0) tile = tiles[n % 2];  // the lane that will say that q, and with it this, may go
        tile = {uniform(tile.first_place), uniform(tile.num_keys), uniform(tile.first_row), uniform(tile.q_head)};
        if (tile.num_keys == 0) return;
        const int key_tiles = tile.key_tiles();
        end = begin + tile.steps(call);
        // Of steps with a key that some row precedes. Once they are done, each row has seen itself.
        const int diagonal = min(end, begin + key_tiles - tile.first_place / BLOCK_N);
        last = begin + key_tiles - 1;
        first_place = tile.first_place + row;
        q_operand = queries + n % 2 * Q * 2 / 16;
#ifdef WINDOW
        num_keys = tile.num_keys;
        key_positions = positions_of(call, tile.first_row / call.seq);
        positions[0] = __ldcg(key_positions + min(first_place, num_keys - 1));
        positions[1] = __ldcg(key_positions + min(first_place + 8, num_keys - 1));
        last_position = __ldcg(key_positions + num_keys - 1);
#endif
        top[0] = top[1] = MINUS_INFINITY;
        row_sum[0] = row_sum[1] = shift[0] = shift[1] = 0.0f;
#pragma unroll
        for (int j = 0; j < 64; ++j) out[j] = 0.0f;

        if (STRIDE == 1 || i < end) {
            first_step = i;
            start_scores(i);
            products_wait<0>();
            settled(scores);
            release(&barriers.k_empty[stage_of(i)]);
            softmax(i, Step<true, true>());

            // What lies past the last key may be NaN, which a weight of zero does not help against.
            const int valid = tile.num_keys - (key_tiles - 1) * BLOCK_N;
            if (valid < BLOCK_N && (STRIDE == 1 || i == begin)) {
                constexpr int HELPERS = CONSUMERS / STRIDE * WARPGROUP;
                __half* const v = ring + stage_of(i) * STAGE + 2 * PARTS * KV_TILE;
                barrier_wait(&barriers.v_full[stage_of(i)], parity_of(i));
                for (int j = threadIdx.x % WARPGROUP + row_group * WARPGROUP; j < (BLOCK_N - valid) * 16; j += HELPERS)
                    reinterpret_cast<uint4*>(v + j % 2 * KV_TILE)[(valid + j / 16) * 8 + j / 2 % 8] = make_uint4(0, 0, 0, 0);
                shared_to_async();
                named_wait(WHO_HELPS, HELPERS);
            }

            i += STRIDE;
#pragma unroll 1
            for (; i < diagonal; i += STRIDE) round(i, Step<true, true>());
#ifdef WINDOW
#pragma unroll 1
            for (; i < end && !leaves_window(i); i += STRIDE) round(i, Step<false, !LOOKS_AFTER>());
#pragma unroll 1
            for (; i < end; i += STRIDE) round(i, Step<true, true>());
#else
#pragma unroll 1
            for (; i < end; i += STRIDE) round(i, Step<false, !LOOKS_AFTER>());
#endif
            release(&barriers.q_empty[n % 2]);
            products_wait<0>();
            settled(out);
            release_before(i);
            round_weights();
            start_sums(i - STRIDE);
            products_wait<0>();
            settled(out);
            release(&barriers.v_empty[stage_of(i - STRIDE)]);
        } else {
            release(&barriers.q_empty[n % 2]);
        }

        // A row's sums, as its total leaves them; of the row 8 on with half 1.
        auto store = [&](int half, const Row& sums, float total) {
            const int r = row + half * 8;
            const float scale = 1.0f / total;
            __half* const target =
                call.attention + (static_cast<long long>(tile.first_row + r) * call.num_q_heads + tile.q_head) * HEAD_DIM;
#pragma unroll
            for (int j = 0; j < 16; j += 4) {
                unsigned pairs[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) pairs[e] = pack(sums[2 * (j + e)] * scale, sums[2 * (j + e) + 1] * scale);
                transpose_quad(pairs);
                if (r < tile.num_keys - tile.first_place)
                    *reinterpret_cast<uint4*>(target + 8 * (j + quad)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        };
        const float totals[2] = {quad_sum(row_sum[0]), quad_sum(row_sum[1])};
        Row rows[2];
#pragma unroll
        for (int j = 0; j < 64; ++j) rows[j % 4 / 2][j / 4 * 2 + j % 2] = out[j];
#ifdef SPLIT_KEYS
        // This warpgroup's row; what it has of the other's goes there.
        Row kept, sent;
#pragma unroll
        for (int j = 0; j < 32; ++j) kept[j] = group ? rows[1][j] : rows[0][j], sent[j] = group ? rows[0][j] : rows[1][j];
        float4* const mail = reinterpret_cast<float4*>(ring + STAGES * STAGE) + threadIdx.x % WARPGROUP;
        float4* const to = mail + group * SENT * WARPGROUP;
        const float4* const from = mail + (1 - group) * SENT * WARPGROUP;
        if (n > 0) barrier_wait(&barriers.received[group], (n - 1) % 2);
#pragma unroll
        for (int j = 0; j < 32; j += 4)
            to[j / 4 * WARPGROUP] = make_float4(sent[j], sent[j + 1], sent[j + 2], sent[j + 3]);
        to[(SENT - 1) * WARPGROUP] =
            make_float4(group ? top[0] : top[1], group ? totals[0] : totals[1], 0.0f, 0.0f);
        barrier_arrive(&barriers.sent[group]);
        barrier_wait(&barriers.sent[1 - group], n % 2);
        const float4 other = from[(SENT - 1) * WARPGROUP];
        // One of the two may have seen no key, but not both: a row sees its own.
        const float own = group ? top[1] : top[0], largest = fmaxf(own, other.x);
        const float own_share = power_of_two(own - largest), share = power_of_two(other.x - largest);
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
            const float4 more = from[j / 4 * WARPGROUP];
            kept[j] = fmaf(more.x, share, kept[j] * own_share), kept[j + 1] = fmaf(more.y, share, kept[j + 1] * own_share);
            kept[j + 2] = fmaf(more.z, share, kept[j + 2] * own_share), kept[j + 3] = fmaf(more.w, share, kept[j + 3] * own_share);
        }
        barrier_arrive(&barriers.received[1 - group]);
        store(group, kept, fmaf(other.y, share, (group ? totals[1] : totals[0]) * own_share));
#else
        store(0, rows[0], totals[0]), store(1, rows[1], totals[1]);
#endif
    }
}
