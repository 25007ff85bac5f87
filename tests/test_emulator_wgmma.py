"""Hopper's barriers, tensor copies, warpgroup products and clusters as the emulator has them (cuda_emulator.h)."""

from __future__ import annotations

import re

import emulated_gpu
import ml_dtypes
import numpy as np
import pytest

import cupy_attn as ca
from cupy_attn import kernels

pytestmark = pytest.mark.skipif(emulated_gpu.compiler() is None, reason="there is no g++")

K_SIZE = 384  # six turns of a ring of two buffers
N128, N64, REGISTERS, BYTES, SWIZZLE, CONVERT, MISUSE = range(7)
RIGHT, NO_EMPTY, NO_FULL, EARLY_RELEASE, NO_RELEASE, NO_WAIT = range(6)

# call.seq: what to do; call.window: what to do wrong. One warpgroup copies, another multiplies: a [64, K] and b [N, K],
# or b [K, 128] where a is in registers.
KERNEL = """
#include "call.cuh"
#include "storage.cuh"
#include "wgmma.cuh"

struct Maps {
    TensorMap a, b;
};
enum { N128, N64, REGISTERS, BYTES, SWIZZLE, CONVERT, MISUSE };
enum { RIGHT, NO_EMPTY, NO_FULL, EARLY_RELEASE, NO_RELEASE, NO_WAIT };
constexpr int STAGES = 2, A_TILE = 64 * 64, STAGE = A_TILE + 128 * 64;

template <int Kind, int N>
__device__ void multiply_all(const Call& call, const Maps& maps, __half* smem, Barrier* full, Barrier* empty) {
    const int steps = call.hidden_size / 64, wrong = call.window;
    if (threadIdx.x < WARPGROUP) {
        give_registers<24>();
        if (threadIdx.x) return;
        for (int step = 0; step < steps; ++step) {
            const int i = step % STAGES;
            __half* const b = smem + i * STAGE + A_TILE;
            if (wrong != NO_EMPTY) barrier_wait(&empty[i], step / STAGES % 2 ^ 1);
            barrier_expect(&full[i], (Kind == REGISTERS ? 0 : A_TILE * 2) + N * 64 * 2);
            if (Kind != REGISTERS) load_tile(smem + i * STAGE, &maps.a, &full[i], step * 64, 0);
            if (Kind != REGISTERS) load_tile(b, &maps.b, &full[i], step * 64, 0);
            for (int n = 0; Kind == REGISTERS && n < 2; ++n)
                load_tile(b + n * 64 * 64, &maps.b, &full[i], n * 64, step * 64);
        }
        return;
    }
    take_registers<240>();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4, column = lane % 4 * 2;
    float sums[N / 2];
    for (float& sum : sums) sum = Kind == REGISTERS ? 0.0f : 1000.0f;  // which the first product forgets
    for (int step = 0; step < steps; ++step) {
        const int i = step % STAGES;
        const unsigned address = shared_address(smem + i * STAGE);
        if (wrong != NO_FULL) barrier_wait(&full[i], step / STAGES % 2);
        products_begin();
        for (int k = 0; k < 4; ++k) {
            if constexpr (Kind == REGISTERS) {
                unsigned a[4];
                for (int f = 0; f < 4; ++f)
                    a[f] = *reinterpret_cast<const unsigned*>(call.hidden + (row + f % 2 * 8) * call.hidden_size +
                                                              step * 64 + k * 16 + column + f / 2 * 8);
                multiply_transposed(sums, a, operand(address + (A_TILE + k * 16 * 64) * 2, 64 * 128));
            } else if constexpr (Kind == BYTES) {
                multiply_e4m3(sums, operand(address + k * 32), operand(address + A_TILE * 2 + k * 32), step + k > 0);
            } else {
                multiply(sums, operand(address + k * 32), operand(address + A_TILE * 2 + k * 32), step + k > 0);
            }
        }
        products_commit();
        products_wait<1>();
        const int done = wrong == EARLY_RELEASE ? step : step - 1;
        if (lane == 0 && done >= 0 && wrong != NO_RELEASE) barrier_arrive(&empty[done % STAGES]);
    }
    if (wrong != NO_WAIT) products_wait<0>();
    settled(sums);
    for (int i = 0; i < N / 2; ++i) call.partial[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = sums[i];
    products_wait<0>();
}

__device__ void misuse(const Call& call, const Maps& maps, __half* smem, Barrier* full) {
    __shared__ Barrier fresh;
    const bool first = threadIdx.x == 0;
    const int wrong = call.window, group = threadIdx.x / WARPGROUP;
    if (first && wrong == 0) barrier_wait(&fresh, 1);
    if (first && wrong == 1) barrier_init(full, 1);
    if (first && wrong == 2) barrier_expect(full, 64), barrier_arrive(full);
    if (first && wrong == 3) *full = 0, barrier_arrive(full);
    if (first && wrong == 4) barrier_expect(full, 64);
    if (first && wrong == 5) load_tile(smem, &maps.a, full, 0, 0), barrier_expect(full, 64), barrier_wait(full, 0);
    if (first && wrong == 6) load_tile(smem + 64, &maps.a, full, 0, 0);
    if (first && wrong == 7) load_tile(smem + STAGES * STAGE - 512, &maps.a, full, 0, 0);
    if (first && wrong == 8) barrier_wait(full, 0);
    if (threadIdx.x < 96 && wrong == 9) named_wait(1, 128);
    if (wrong == 10) named_wait(1 + threadIdx.x / 16 % 2, 64);
    for (int i = 0; i < 2 && threadIdx.x < 32 && wrong == 11; ++i)
        asm volatile("bar.arrive %0, %1;" ::"r"(1), "r"(96) : "memory");
    if (threadIdx.x < 32 && wrong == 12) give_registers<24>();
    float sums[32] = {};
    const unsigned address = shared_address(smem);
    if (wrong == 13) multiply(sums, operand(address), operand(address), false);
    products_begin();
    if (group == 0 && wrong == 12) multiply(sums, operand(address), operand(address), false);
    if (wrong == 14) multiply(sums, operand(address + threadIdx.x % 2 * 32), operand(address), false);
    if (wrong == 15) multiply(sums, operand(address), operand(address + 128), false);
    if (wrong == 16) multiply(sums, operand(address), operand(address + STAGES * STAGE * 2 - 4096), false);
    if (wrong == 17) multiply(sums, operand(address), operand(address), false);
    products_commit();
    if (wrong != 17) products_wait<0>();
    while (wrong == 18 && *const_cast<volatile int*>(call.counters) == 0) __nanosleep(50);
}

extern "C" __global__ void trial(const __grid_constant__ Call call, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) __half smem[];
    __shared__ Barrier full[STAGES], empty[STAGES];
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], 4);
        barriers_initialised();
    }
    __syncthreads();
    if (call.seq == N128) multiply_all<N128, 128>(call, maps, smem, full, empty);
    if (call.seq == N64) multiply_all<N64, 64>(call, maps, smem, full, empty);
    if (call.seq == REGISTERS) multiply_all<REGISTERS, 128>(call, maps, smem, full, empty);
    if (call.seq == BYTES) multiply_all<BYTES, 128>(call, maps, smem, full, empty);
    if (call.seq == MISUSE) misuse(call, maps, smem, full);
    if (call.seq == CONVERT) {
        for (int i = threadIdx.x; i < 64 * call.hidden_size / 16; i += blockDim.x) {
            float values[8];
            load8(reinterpret_cast<const float*>(call.hidden) + 8 * i, values);
            store8(reinterpret_cast<E4M3*>(call.partial) + 8 * i, values);
        }
    }
    if (call.seq == SWIZZLE) {
        if (threadIdx.x == 0) {
            barrier_expect(full, A_TILE * 2);
            load_tile(smem, &maps.a, full, call.capacity, call.window);
        }
        barrier_wait(full, 0);
        for (int i = threadIdx.x; i < A_TILE / 2; i += blockDim.x)
            call.partial[i] = reinterpret_cast<const float*>(smem)[i];
    }
}
"""


def compiled(folder, source):
    """Return a kernel of the name trial."""
    for header in kernels.SOURCES.glob("*.cuh"):
        (folder / header.name).write_bytes(header.read_bytes())
    (folder / "trial.cu").write_text(source)
    macros = (("HEAD_DIM", "16"), ("PARTS", "1"), ("STORAGE", "__half"), ("CLUSTER", "2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SOURCES", folder)
        emulated_gpu.kernel.cache_clear()
        kernel = emulated_gpu.kernel("trial", macros)
        emulated_gpu.kernel.cache_clear()
    return kernel


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """The kernel above: a function of arrays a and b, their boxes' rows, size of the result, and fields of the call."""
    kernel = compiled(tmp_path_factory.mktemp("kernels"), KERNEL)

    def run(a, b, rows_a, rows_b, size, seed=0, **fields):
        call, out, counters = np.zeros(1, ca.cuda.CALL), np.full(size, np.nan, np.float32), np.zeros(1, np.int32)
        call["partial"], call["hidden"], call["hidden_size"] = out.ctypes.data, a.ctypes.data, a.shape[1]
        call["counters"] = counters.ctypes.data
        for name, value in fields.items():
            call[name] = value
        maps = [emulated_gpu.encode_tensor_map(m.ctypes.data, m.shape[1], m.shape[0], m.strides[0], 64, rows)
                for m, rows in ((a, rows_a), (b, rows_b))]  # fmt: skip
        kernel(1, 256, 49152, seed, call, np.concatenate(maps))
        return out

    return run


def operands(kind):
    rng = np.random.default_rng(kind)
    n = 64 if kind == N64 else 128
    a, b = rng.standard_normal((64, K_SIZE)).astype(np.float16), rng.standard_normal((n, K_SIZE)).astype(np.float16)
    if kind == BYTES:  # two to a column
        wide = [rng.standard_normal((rows, 2 * K_SIZE)).astype(ml_dtypes.float8_e4m3fn) for rows in (64, n)]
        a, b = (one.view(np.float16) for one in wide)
        return a, b, wide[0].astype(np.float64) @ wide[1].astype(np.float64).T
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    return a, np.ascontiguousarray(b.T) if kind == REGISTERS else b, exact


def product(trial, kind, wrong, seed):
    """Return whether the result is right."""
    a, b, exact = operands(kind)
    y = trial(a, b, 64, 128 if kind in (N128, BYTES) else 64, exact.size, seed, seq=kind, window=wrong)
    return np.allclose(y.reshape(exact.shape), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [N128, N64, REGISTERS, BYTES])
def test_products_of_a_ring_of_copies(trial, kind):
    assert all(product(trial, kind, RIGHT, seed) for seed in range(6))


def test_floats_of_8_bits(trial):
    """Of every size, ties and what is too large, which becomes the largest, among them."""
    values = np.random.default_rng(4).standard_normal((64, 64)).astype(np.float32)
    values *= np.float32(2) ** np.arange(-12, 4).repeat(4)
    finite = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:127]
    values[0], values[1, :62] = finite[:64], finite[64:126]
    values[2], values[3] = -(finite[:64] + finite[1:65]) / 2, (finite[62:126] + finite[63:127]) / 2
    values[4, :4] = 448, 449, -1e9, np.inf
    bits = trial(values.view(np.float16), values.view(np.float16), 64, 64, 64 * 64 // 4, seq=CONVERT).view(np.uint8)
    wanted = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(bits.reshape(64, 64), wanted)


@pytest.mark.parametrize("wrong", [NO_EMPTY, NO_FULL, EARLY_RELEASE, NO_WAIT])
def test_a_missing_wait_shows(trial, wrong):
    """As a wrong result, or as what a barrier makes of it."""
    shown = 0
    for seed in range(10):
        try:
            shown += not product(trial, REGISTERS if seed % 2 else N64, wrong, seed)
        except AssertionError:
            shown += 1
    assert shown >= 5


def test_a_buffer_that_is_never_released_ends_the_launch(trial):
    with pytest.raises(AssertionError, match="every thread waits, this one for the end of a phase of parity"):
        product(trial, N64, NO_RELEASE, 0)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (-5, 0), (40, 64), (3, -8), (70, 0), (-70, 200)])
def test_a_tile_is_swizzled_and_zero_outside_of_the_tensor(trial, row, column):
    whole = np.random.default_rng(1).standard_normal((70, 112)).astype(np.float16)
    a = whole[:, :104]  # a row's pitch is not its length
    tile = trial(a, a, 64, 64, 64 * 32, seq=SWIZZLE, window=row, capacity=column).view(np.float16).reshape(64, 8, 8)
    padded = np.zeros((400, 600), np.float16)
    padded[100:170, 100:204] = a
    wanted = padded[100 + row : 164 + row, 100 + column : 164 + column].reshape(64, 8, 8)
    r, piece = np.arange(64)[:, None], np.arange(8)
    np.testing.assert_array_equal(tile[r, piece ^ r % 8], wanted)


MISUSES = (
    "a barrier that is not initialised",
    "a barrier is initialised twice",
    "more arrivals at a barrier than it counts",
    "a barrier that was overwritten",
    "the block ended where a barrier expects more bytes",
    "more bytes were copied than a barrier expects",
    "a tile that does not begin at a multiple of 1024 bytes",
    "an address outside the block's shared memory",
    "every thread waits, this one for the end of a phase of parity 0",
    "every thread waits",
    "lanes of a warp are at different named barriers",
    "a warp comes to a named barrier a second time",
    "a warp is at|a lane is at (setmaxnreg|wgmma)|every thread waits",
    "a product without a wgmma.fence before it",
    "lanes of a warpgroup have different descriptors",
    "an operand whose rows do not begin at a multiple of 1024 bytes",
    "an address outside the block's shared memory",
    "a thread ended before its products|every thread waits",
    "every thread waits or sleeps",
)


@pytest.mark.parametrize(("number", "says"), list(enumerate(MISUSES)))
def test_what_a_kernel_must_not_do_fails_the_launch(trial, number, says):
    a, b, _ = operands(N64)
    with pytest.raises(AssertionError, match=says):
        trial(a, b, 64, 64, 1, seq=MISUSE, window=number)


(
    OWN_ARRIVALS, NO_ARRIVAL, NO_FIRST_SYNC, NO_LAST_SYNC, NO_EXPECTATION, NO_SUCH_BLOCK, NO_SUCH_RANK, EARLY_END,
) = range(1, 9)  # fmt: skip

# Each block of a cluster copies half of a's rows to both and adds up every row: 64 columns a step, times its number.
CLUSTER_KERNEL = """
#include "call.cuh"
#include "reduce.cuh"
#include "wgmma.cuh"

struct Maps {
    TensorMap a;
};
// With a __shared__ array of its own.
__device__ float block_sum(float value) {
    __shared__ float partial[4];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    return partial[0] + partial[1] + partial[2] + partial[3];
}

enum { RIGHT, OWN_ARRIVALS, NO_ARRIVAL, NO_FIRST_SYNC, NO_LAST_SYNC, NO_EXPECTATION, NO_SUCH_BLOCK, NO_SUCH_RANK,
       EARLY_END };
constexpr int STAGES = 2, TILE = 64 * 64, BOTH = 3;

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) trial(const __grid_constant__ Call call,
                                                                const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) __half smem[];
    __shared__ Barrier full[STAGES], empty[STAGES];
    __shared__ __align__(16) Barrier* mine;
    const int rank = rank_in_cluster(), wrong = call.window, steps = call.hidden_size / 64;
    if (threadIdx.x == 0) {
        mine = full;
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], (wrong == OWN_ARRIVALS ? 1 : CLUSTER) * 2);
        }
        barriers_initialised();
    }
    const float blocks = block_sum(blockIdx.x);
    if (wrong == NO_FIRST_SYNC) __syncthreads();
    else cluster_sync();
    if (wrong == EARLY_END && rank == 1) return;
    if (threadIdx.x == 64) {
        for (int step = 0; step < steps; ++step) {
            const int i = step % STAGES, count = wrong == NO_EXPECTATION && step == steps - 1 ? 1 : CLUSTER;
            barrier_wait(&empty[i], step / STAGES % 2 ^ 1);
            barrier_expect(&mine[i], count * 32 * 64 * 2);
            load_quads_to(wrong == NO_SUCH_BLOCK ? 4 : BOTH, smem + i * TILE + rank * 32 * 64, &maps.a, &full[i],
                          step * 64, rank * 32);
        }
    } else if (threadIdx.x < 64) {
        const int row = threadIdx.x, lane = threadIdx.x % 32;
        float sum = 0.0f;
        for (int step = 0; step < steps; ++step) {
            const int i = step % STAGES;
            barrier_wait(&full[i], step / STAGES % 2);
            for (int k = 0; k < 64; ++k) sum += (step + 1) * __half2float(smem[i * TILE + row * 64 + k]);
            __syncwarp();
            if (lane < CLUSTER && (lane == rank || (wrong != OWN_ARRIVALS && (wrong != NO_ARRIVAL || step != 1))))
                barrier_arrive_at(address_in(wrong == NO_SUCH_RANK ? lane + 1 : lane, &empty[i]));
        }
        call.partial[blockIdx.x * 64 + row] = sum + blocks;
    }
    if (wrong != NO_LAST_SYNC) cluster_sync();
}
"""


@pytest.fixture(scope="module")
def cluster_trial(tmp_path_factory):
    """The kernel above on two clusters: a function of a seed and what to do wrong; whether the result is right."""
    kernel = compiled(tmp_path_factory.mktemp("kernels"), CLUSTER_KERNEL)
    a = np.random.default_rng(0).integers(-8, 8, (64, K_SIZE)).astype(np.float16)
    steps = np.arange(K_SIZE) // 64 + 1
    order = np.arange(64).reshape(2, 4, 4, 2).swapaxes(1, 2).ravel()  # of rows [.., q, j, e] as [.., j, q, e]
    exact = a[order].astype(np.float32) @ steps + 128 * np.arange(4)[:, None]

    def run(wrong, seed=0, grid=4):
        call, out = np.zeros(1, ca.cuda.CALL), np.full(exact.shape, np.nan, np.float32)
        call["partial"], call["hidden_size"], call["window"] = out.ctypes.data, K_SIZE, wrong
        rows = emulated_gpu.encode_tensor_map(a.ctypes.data, K_SIZE, 64, 2 * K_SIZE, 64, 32, by_quads=True)
        kernel(grid, 128, 16384, seed, call, rows)
        return np.array_equal(out, exact)

    return run


def test_a_cluster_shares_what_its_blocks_copy(cluster_trial):
    assert all(cluster_trial(RIGHT, seed) for seed in range(40))


# What is wrong, of how many launches at least it shows, and how.
CLUSTER_MISUSES = (
    (OWN_ARRIVALS, 20, "a wrong result|more bytes were copied than a barrier expects|the block ended"),
    (NO_ARRIVAL, 40, "every thread waits, this one for the end of a phase of parity"),
    (NO_FIRST_SYNC, 10, "a barrier that is not initialised"),
    (NO_LAST_SYNC, 10, "an arrival at a barrier of a block that has ended"),
    (NO_EXPECTATION, 40, "more bytes were copied than a barrier expects|the block ended before a tensor copy"),
    (NO_SUCH_BLOCK, 40, "a copy to blocks that are not of the cluster"),
    (NO_SUCH_RANK, 40, "an address in a block that is not of the cluster"),
    (EARLY_END, 40, "a copy to a block that has ended|the block ended (before a tensor|where more bytes were) cop"),
)


@pytest.mark.parametrize(("wrong", "least", "says"), CLUSTER_MISUSES)
def test_what_blocks_of_a_cluster_must_not_do_shows(cluster_trial, wrong, least, says):
    shown = []
    for seed in range(40):
        try:
            if not cluster_trial(wrong, seed):
                shown.append("a wrong result")
        except AssertionError as error:
            shown.append(str(error))
    assert len(shown) >= least
    assert all(re.search(says, one) for one in shown)


def test_a_grid_is_of_whole_clusters(cluster_trial):
    with pytest.raises(AssertionError, match="a grid that is not of whole clusters"):
        cluster_trial(RIGHT, grid=3)


def test_what_is_no_tensor_map():
    for wrong in ((8, 64, 64, 128, 64, 64), (16, 64, 64, 120, 64, 64), (16, 0, 64, 128, 64, 64),
                  (16, 64, 64, 128, 32, 64), (16, 64, 64, 128, 64, 257)):  # fmt: skip
        with pytest.raises(ValueError, match=r"a (tensor|box)"):
            emulated_gpu.encode_tensor_map(*wrong)
    for rows, box_rows in ((72, 32), (64, 48)):
        with pytest.raises(ValueError, match="not of whole 32"):
            emulated_gpu.encode_tensor_map(16, 64, rows, 128, 64, box_rows, by_quads=True)


PRODUCT = """#define PAIR(x, i) "+f"(x[i]), "+f"(x[i + 1])
asm volatile("{\\n\\t.reg .pred p;\\n\\tsetp.ne.b32 p, %%6, 0;\\n\\t"
             "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
             "{%%0, %%1, %%2, %%3}, %s;\\n\\t}" : PAIR(d, 0), PAIR(d, 2) : "l"(a), "l"(b), "r"(int(add)));"""


def test_only_products_whose_operands_are_in_order_translate():
    call = emulated_gpu.translate(PRODUCT % "%4, %5, p, 1, 1, 0, 0")
    assert "ptx_product<__nv_bfloat16, 8, false, false>(" in call
    assert "&(d[2 + 1])}}, int(add), a, b)" in call
    for rest in ("%5, %4, p, 1, 1, 0, 0", "%4, %5, p, 1, -1, 0, 0", "%4, %5, q, 1, 1, 0, 0", "%4, %5, p, 1, 1, 0"):
        with pytest.raises(ValueError, match="does not know"):
            emulated_gpu.translate(PRODUCT % rest)
    with pytest.raises(ValueError, match="cannot read"):
        emulated_gpu.translate('asm("bar.sync %0, %1;" :: PAIR(d));')


NOT_WAITED, ANOTHER_BARRIER, TOO_FEW = range(1, 4)

# Each thread of two blocks sends its number to the other block.
STORE_KERNEL = """
#include "call.cuh"
#include "wgmma.cuh"

enum { RIGHT, NOT_WAITED, ANOTHER_BARRIER, TOO_FEW };

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) trial(const __grid_constant__ Call call) {
    extern __shared__ __align__(1024) float smem[];
    __shared__ Barrier full;
    const int other = rank_in_cluster() ^ 1, wrong = call.window, mine = 4 * threadIdx.x;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1);
        barriers_initialised();
        barrier_expect(&full, (wrong == TOO_FEW ? 63 : 64) * 16);
    }
    cluster_sync();
    const float number = 64.0f * blockIdx.x + threadIdx.x;
    store_to(address_in(other, smem + mine), make_float4(number, 2 * number, 3 * number, 4 * number),
             address_in(wrong == ANOTHER_BARRIER ? other ^ 1 : other, &full));
    if (wrong != NOT_WAITED) barrier_wait(&full, 0);
    for (int i = 0; i < 4; ++i) call.partial[256 * blockIdx.x + mine + i] = smem[mine + i];
    cluster_sync();
}
"""


@pytest.fixture(scope="module")
def store_trial(tmp_path_factory):
    """The kernel above on two clusters: a function of a seed and what to do wrong; whether the result is right."""
    kernel = compiled(tmp_path_factory.mktemp("kernels"), STORE_KERNEL)
    sent = np.arange(256, dtype=np.float32).reshape(2, 2, 64, 1) * np.arange(1, 5, dtype=np.float32)

    def run(wrong, seed=0):
        call, out = np.zeros(1, ca.cuda.CALL), np.full(sent.shape, np.nan, np.float32)
        call["partial"], call["window"] = out.ctypes.data, wrong
        kernel(4, 64, 1024, seed, call)
        return np.array_equal(out, sent[:, ::-1])

    return run


def test_blocks_of_a_cluster_store_to_each_other(store_trial):
    assert all(store_trial(RIGHT, seed) for seed in range(20))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (NOT_WAITED, "a wrong result|the block ended"),
        (ANOTHER_BARRIER, "a store that counts on the barrier of another block"),
        (TOO_FEW, "more bytes were copied than a barrier expects|the block ended"),
    ],
)
def test_stores_to_other_blocks_that_are_wrong_show(store_trial, wrong, says):
    for seed in range(20):
        try:
            shown = "right" if store_trial(wrong, seed) else "a wrong result"
        except AssertionError as error:
            shown = str(error)
        assert re.search(says, shown)
