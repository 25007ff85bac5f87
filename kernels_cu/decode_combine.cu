// What blocks of attend_decode.cu found of each head, added up. That kernel does so itself, but where heads have more than 8 queries it
// takes the last of a head's blocks so long that the next weights find room late.
//   attention = sum of parts / their sum of weights
//
// Grid: a block a multiprocessor, block 128 threads, beside one of attend_decode.cu. -D: those of call.cuh, HEAD_TILES. Bound by latency.
#include "decode_parts.cuh"

constexpr int ROWS = 8 * HEAD_TILES, PAIRS = HEAD_DIM / 2, THREADS = 128, MOST_REGISTERS = 48;

extern "C" __global__ void __maxnreg__(MOST_REGISTERS)
decode_combine(const __grid_constant__ Call call)
{
    constexpr int AT_ONCE = 4;  // parts
    let_next_kernel_begin();
    const int group = call.group, queries = group * call.seq, rows = min(ROWS, queries), part_size = rows * PAIRS;
    const int heads = call.num_kv_heads * ((queries + ROWS - 1) / ROWS), words = call.batch * heads * part_size;
    wait_for_previous_kernel();
#pragma unroll 1
    for (int at = blockIdx.x * THREADS + threadIdx.x; at < words; at += gridDim.x * THREADS) {
        const int head_idx = at / part_size, word = at - head_idx * part_size;
        const int b = head_idx / heads, head = head_idx - b * heads, tile = head / call.num_kv_heads;
        const int r = word / PAIRS, i = word % PAIRS, query = tile * ROWS + r, token = query / group;
        if (query >= queries) continue;
        const long long m = static_cast<long long>(b) * call.seq + token;
        const int2 runs = __ldcg(call.runs + head_idx);  // first one, and how many
        // Of a sequence without room for its tokens nobody has found anything, nor said how many did.
        if (__ldcg(&call.rows[m].x) < 0 || runs.y < 2) continue;
        const uint4* const parts = call.parts + static_cast<long long>(runs.x + head_idx) * part_size + word;
        Found all = nothing();
#pragma unroll 1
        for (int first = 0; first < runs.y; first += AT_ONCE) {
            uint4 found[AT_ONCE];
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u)
                found[u] = first + u < runs.y ? __ldcg(parts + (first + u) * part_size) : make_uint4(0, 0, NO_KEY, 0);
            all.add(found);
        }
        const int q_head_idx = (head - tile * call.num_kv_heads) * group + query - token * group;
        store_attention(call, attention_of(call, m, q_head_idx), all, i / 8, i % 8);
    }
}
