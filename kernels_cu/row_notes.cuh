// What products of x as it is and of a Wqkv that has the input norm's weight in it are multiplied with: a row's 1 / rms(x).
//
// It is wanted after the first tiles only. Until then two warps of each block, which have nothing else to do, find it for an equal
// share of all rows and note it for every block, with what describe_row says. A note carries the number of the call, so nobody
// depends on others: a warp that finds none for long works it out by itself, to the same bits.
#pragma once
#include "call.cuh"
#include "reduce.cuh"
#include "storage.cuh"

namespace notes {

constexpr int WARPS = 2;
// A warp reads ROWS rows at a time, LANES lanes each: fewer shuffles for a sum, and four sums at a time.
constexpr int LANES = 8, ROWS = 32 / LANES;
constexpr int PIECES = 4, SLICE = PIECES * LANES * VECTOR, SLICES = 8;  // a lane's of a slice; columns of it; of a warp's buffer
constexpr int SLICE_SIZE = ROWS * SLICE, BYTES = WARPS * SLICES * SLICE_SIZE * 2;

__device__ __forceinline__ void write(Note* to, const Note& note) {
    store_word(to, make_uint4(__float_as_uint(note.factor), note.slot, note.position, note.number));
}

__device__ __forceinline__ Note read(const Note* from) {
    const uint4 word = load_word(from);
    return {__uint_as_float(word.x), static_cast<int>(word.y), static_cast<int>(word.z), word.w};
}

// What notes of this call carry.
__device__ __forceinline__ unsigned number_of(const Call& call) { return __ldcg(&call.notes->number) + 1; }
__device__ __forceinline__ Note* of_row(const Call& call, int m) { return call.notes + 1 + m; }

// Of what a lane has of a row, and then of all its lanes.
__device__ __forceinline__ void add_squares(const STORAGE* x, float (&sums)[4]) {
    float values[VECTOR];
    load8(x, values);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sums[i % 4] = fmaf(values[i], values[i], sums[i % 4]);
}

// To what a row's products are multiplied with, in the units of call.qkv_scale.
__device__ __forceinline__ float factor_of(const Call& call, const float (&sums)[4]) {
    float sum = sums[0] + sums[1] + (sums[2] + sums[3]);
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return rsqrtf(__fdividef(sum, call.hidden_size) + call.eps) * call.folded_rescale;
}

// This block's share of all notes, by its WARPS warps together, in the order in which tiles of TILE_ROWS rows are multiplied:
// their own or `order`, of which those after the first m_tiles are padding alone. `buffer`: BYTES.
template <int TILE_ROWS>
__device__ __forceinline__ void write_all(const Call& call, const short* order, int m_tiles, int all_m_tiles, STORAGE* buffer,
                                          int warp) {
    const int size = call.hidden_size, slices = (size + SLICE - 1) / SLICE, num_rows = call.batch * call.seq;
    const int lane = threadIdx.x % 32, first = blockIdx.x * WARPS + warp, stride = gridDim.x * WARPS;
    const int count = order == nullptr ? num_rows : m_tiles * TILE_ROWS;
    auto row_of = [&](int i) {
        const int row = first + i * stride;
        const int m = order == nullptr ? row : order[min(row / TILE_ROWS, all_m_tiles - 1)] * TILE_ROWS + row % TILE_ROWS;
        return min(m, num_rows - 1);  // the last one several times, if need be
    };
    const int groups = (count - first + ROWS * stride - 1) / (ROWS * stride);
    buffer += warp * (SLICES * SLICE_SIZE) + lane * VECTOR;  // of which each lane reads what it has copied
    int next_group = 0, next_slice = 0, next_place = 0;      // of what is fetched next
    auto fetch = [&]() {
        if (next_group < groups) {
            const STORAGE* const x = call.x + static_cast<long long>(row_of(next_group * ROWS + lane / LANES)) * size;
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                const int k = next_slice * SLICE + (i * LANES + lane % LANES) * VECTOR;
                copy16_async(buffer + next_place * SLICE_SIZE + i * 32 * VECTOR, x + (k < size ? k : 0), k < size);
            }
            if (++next_slice == slices) next_slice = 0, ++next_group;
            if (++next_place == SLICES) next_place = 0;
        }
        copies_commit();
    };
#pragma unroll 1
    for (int i = 0; i < SLICES - 1; ++i) fetch();
    const unsigned number = number_of(call);
    const int end = order == nullptr ? num_rows : all_m_tiles * TILE_ROWS;
    int group = 0, place = 0;
#pragma unroll 1
    for (int i = 0; first + i * stride < end; i += 32) {
        const int m = row_of(i + lane);
        const int2 described = describe_row(call, m, sequence(call, m / call.seq));
#pragma unroll 1
        for (int part = 0; part < LANES && group < groups; ++part, ++group) {
            float sums[4] = {};
#pragma unroll 1
            for (int slice = 0; slice < slices; ++slice) {
                fetch();
                copies_wait<SLICES - 1>();
#pragma unroll
                for (int j = 0; j < PIECES; ++j) add_squares(buffer + place * SLICE_SIZE + j * 32 * VECTOR, sums);
                if (++place == SLICES) place = 0;
            }
            const int describer = part * ROWS + lane / LANES;
            const Note note = {factor_of(call, sums), __shfl_sync(0xffffffffu, described.x, describer),
                               __shfl_sync(0xffffffffu, described.y, describer), number};
            if (lane % LANES == 0) write(of_row(call, row_of(group * ROWS + lane / LANES)), note);
        }
    }
    copies_wait<0>();
}

// The note of row m, as its writer would have it, by a whole warp.
__device__ __forceinline__ Note work_out(const Call& call, int m) {
    const STORAGE* const x = call.x + static_cast<long long>(m) * call.hidden_size;
    float sums[4] = {};
#pragma unroll 1
    for (int k = threadIdx.x % LANES * VECTOR; k < call.hidden_size; k += LANES * VECTOR) {
        const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(x + k));
        add_squares(reinterpret_cast<const STORAGE*>(&raw), sums);
    }
    const int2 place = place_of_row(call, m, sequence(call, m / call.seq));
    return {factor_of(call, sums), place.x, place.y, 0};
}

}  // namespace notes
