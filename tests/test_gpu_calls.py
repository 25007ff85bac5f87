"""Calls of the kernels: the same bits every time, nothing read or written that is not the call's, every length."""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import gpu_helpers
import numpy as np
import pytest
from conftest import make_config, make_hidden
from gpu_helpers import (
    HALVES,
    NAN_BITS,
    bits,
    build_ahead,
    exact,
    filled_cache,
    held,
    kernels_of,
    make_layer,
    same_bits,
)

import cupy_attn as ca
from cupy_attn import cuda, launch, wgmma
from cupy_attn.arrays import to_numpy
from cupy_attn.bench import MODELS, model_config
from cupy_attn.launcher import Launcher
from cupy_attn.workspace import workspace_of

pytestmark = pytest.mark.gpu

# What is looked for here are wrong rows; test_gpu_accuracy.py is about the last digit.
check = functools.partial(gpu_helpers.check, most=4.0)

CONFIG = make_config(hidden_size=320, num_attention_heads=6, num_key_value_heads=2, head_dim=128,
                     max_position_embeddings=1 << 15)  # fmt: skip
ODD = make_config(hidden_size=136, num_attention_heads=20, num_key_value_heads=1, head_dim=80, attention_bias=True)
WINDOW = make_config(hidden_size=320, num_attention_heads=6, num_key_value_heads=2, head_dim=128,
                     use_sliding_window=True, sliding_window=50, max_window_layers=0)  # fmt: skip
# Of the normal path with and without products of what rounding hidden states leaves over, and of the precise one.
PATHS = [("float16", 1.5), ("bfloat16", 6.0), ("float16", 96.5), ("bfloat16", 96.5)]
LENGTHS_OF_12 = [0, 1, 63, 64, 65, 300, 2, 128, 700, 17, 33, 5]

CALLS = {  # tokens already cached, new rows of x, how many of those are tokens (None: all)
    "prefill": ([0, 0], 150, None),
    "prefill of unequal lengths": ([0, 0, 0], 70, [70, 0, 33]),
    "chunk": ([200, 37], 70, None),
    "chunk of unequal lengths": ([200, 64, 130, 1], 40, [40, 1, 0, 39]),
    "short chunk after many": ([2100], 3, None),
    "first step": ([0], 1, None),
    "step after one": ([1], 1, None),
    "step after thousands": ([3000], 1, None),
    "step of unequal lengths": ([5, 700, 2999], 1, None),
    "step that some sit out": ([5, 700, 64, 0], 1, [1, 0, 1, 1]),
    "step of 12": (LENGTHS_OF_12, 1, None),
    "step of 12 that some sit out": (LENGTHS_OF_12, 1, [1, 0] * 6),
    "chunk of 12": (LENGTHS_OF_12, 9, None),
    "speculative step": ([5, 700, 2999], 4, None),
    "speculative step of 12": (LENGTHS_OF_12, 5, [5, 0, 1, 2, 3, 4] * 2),
    "step of 70": ((LENGTHS_OF_12 * 6)[:70], 1, None),
    "step of 264": (LENGTHS_OF_12 * 22, 1, None),
}


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    calls = {(len(past), seq) for past, seq, _ in CALLS.values()} | {(2, MOST), (2, 129), (2, 2)}
    pairs = []
    for config in (CONFIG, ODD, WINDOW):
        kinds = [(config, dtype, k_norm_max > 20) for dtype, k_norm_max in PATHS]
        pairs += kernels_of(kinds, calls, windowed=config is WINDOW)
    build_ahead(pairs)


@functools.cache
def layer_of(config: ca.AttentionConfig, dtype: str, k_norm_max: float) -> ca.Attention:
    return make_layer(config, dtype, k_norm_max=k_norm_max)


def make_call(layer: ca.Attention, what: str):
    """Return a cache that holds what the call finds, x on the GPU NaN as padding, and how many tokens."""
    import cupy

    past, seq, counts = CALLS[what]
    x = make_hidden(layer.config, len(past), seq, dtype=layer.dtype)
    for b, count in enumerate(counts or []):
        x[b, count:] = np.nan
    return filled_cache(layer, past, max(past) + seq + 5), cupy.asarray(x), counts


# Right, and the same every time.


@pytest.mark.parametrize(("dtype", "k_norm_max"), PATHS)
@pytest.mark.parametrize("config", [CONFIG, ODD, WINDOW], ids=["D 128", "D 80", "window"])
@pytest.mark.parametrize("what", CALLS)
def test_each_sequence_is_right_whatever_else_is_in_the_batch(what, config, dtype, k_norm_max):
    layer = layer_of(config, dtype, k_norm_max)
    cache, x, counts = make_call(layer, what)
    past, before = CALLS[what][0], [held(cache, b) for b in range(cache.batch)]
    y = to_numpy(layer(x, cache, num_tokens=counts))
    new = [x.shape[1]] * len(past) if counts is None else counts
    assert cache.lengths.tolist() == [have + n for have, n in zip(past, new, strict=True)]
    x = to_numpy(x)
    for b, n in enumerate(new):
        assert not y[b, n:].any()  # padding: zero, not NaN
        if n:
            check(y[b : b + 1, :n], exact(layer, x[b : b + 1, :n], past=before[b]), dtype)


@pytest.mark.parametrize(("dtype", "k_norm_max"), PATHS)
@pytest.mark.parametrize("what", CALLS)
def test_the_same_bits_ten_times(what, dtype, k_norm_max):
    layer = layer_of(CONFIG, dtype, k_norm_max)
    cache, x, counts = make_call(layer, what)
    past, results = CALLS[what][0], []
    for _ in range(10):
        cache.assume(past)
        y = layer(x, cache, num_tokens=counts, residual=x)
        results.append(tuple(to_numpy(bits(a)).tobytes() for a in (y, cache.k_heads, cache.v_heads)))
    assert len(set(results)) == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_chunks_one_after_the_other_give_the_same_bits_ten_times(dtype):
    layer = layer_of(CONFIG, dtype, 96.5)
    x = make_hidden(CONFIG, 2, 200, dtype=dtype)
    results = set()
    for _ in range(10):
        cache = layer.new_cache(2, 200)
        parts = [
            layer(x[:, start:stop], cache) for start, stop in ((0, 90), (90, 91), (91, 150), (150, 151), (151, 200))
        ]
        results.add(np.concatenate(parts, 1).tobytes())
    assert len(results) == 1


# Poison: scratch, output, the cache past its end, positions there.


@pytest.mark.parametrize("config", [CONFIG, ODD, WINDOW], ids=["D 128", "D 80", "window"])
@pytest.mark.parametrize(("dtype", "k_norm_max"), PATHS)
@pytest.mark.parametrize("what", CALLS)
def test_what_memory_held_before_does_not_matter_and_no_other_row_is_written(what, dtype, k_norm_max, config):
    import cupy

    layer = layer_of(config, dtype, k_norm_max)
    cache, x, counts = make_call(layer, what)
    want = layer(x, cache, num_tokens=counts)
    want_k, want_v = cache.k_heads.copy(), cache.v_heads.copy()

    past, seq, _ = CALLS[what]
    cache, x, counts = make_call(layer, what)  # with NaN past every length
    before = [a.copy() for a in (cache.k_heads, cache.v_heads)]
    for b, have in enumerate(past):
        cache.device_positions[b, have:] = 1 << 30
    workspace_of(cupy.cuda.Device().id, cupy.cuda.get_current_stream().ptr).poison()
    out = cupy.empty_like(x)
    bits(out).fill(NAN_BITS)
    x_before = x.copy()
    layer(x, cache, num_tokens=counts, out=out)
    assert same_bits(out, want)
    assert same_bits(x, x_before)
    new = [seq] * len(past) if counts is None else counts
    for now, then, whole in zip((cache.k_heads, cache.v_heads), before, (want_k, want_v), strict=True):
        for b, (have, n) in enumerate(zip(past, new, strict=True)):
            assert same_bits(now[b, :, :have], then[b, :, :have])
            assert same_bits(now[b, :, have + n :], then[b, :, have + n :])
            assert same_bits(now[b, :, have : have + n], whole[b, :, have : have + n])
            assert np.isfinite(to_numpy(now[b, :, have : have + n]).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_no_byte_around_the_output_is_written(dtype):
    import cupy

    layer = layer_of(CONFIG, dtype, 96.5)
    for batch, seq in ((1, 1), (3, 1), (12, 1), (1, 33), (2, 70)):
        x = cupy.asarray(make_hidden(CONFIG, batch, seq, dtype=dtype))
        guarded = cupy.empty((batch * seq + 2, CONFIG.hidden_size), layer.dtype)
        bits(guarded).fill(NAN_BITS)
        out = guarded[1:-1].reshape(x.shape)
        assert layer(x, layer.new_cache(batch, seq), out=out) is out
        assert same_bits(out, layer(x, layer.new_cache(batch, seq)))
        assert (to_numpy(bits(guarded))[[0, -1]] == NAN_BITS).all()


# Every length.

EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
MOST = 257 + 129


@functools.cache
def long_enough(config: ca.AttentionConfig, dtype: str, k_norm_max: float):
    """Return a layer, x, the reference's output, and a cache filled with all of x by one call."""
    layer = layer_of(config, dtype, k_norm_max)
    x = make_hidden(config, 2, MOST, dtype=dtype)
    cache = layer.new_cache(2, MOST)
    y = layer(x, cache)
    expected = exact(layer, x)
    check(y, expected, dtype)
    return layer, x, expected, cache


@pytest.mark.parametrize("config", [CONFIG, ODD, WINDOW], ids=["D 128", "D 80", "window"])
@pytest.mark.parametrize(("dtype", "k_norm_max"), PATHS)
@pytest.mark.parametrize("edge", EDGES)
def test_lengths_around_the_edges_of_tiles(edge, dtype, k_norm_max, config):
    layer, x, expected, cache = long_enough(config, dtype, k_norm_max)
    check(layer(x[:1, :edge]), expected[:1, :edge], dtype)
    check(layer(x[:, :edge], layer.new_cache(2, edge)), expected[:, :edge], dtype)
    for new in (1, 2, 17, 64, 129):  # a step or a chunk after that many cached tokens
        cache.assume(edge)
        check(layer(x[:, edge : edge + new], cache), expected[:, edge : edge + new], dtype)
        assert cache.lengths.tolist() == [edge + new] * 2


# Positions.


@pytest.mark.parametrize("config", [CONFIG, WINDOW], ids=["plain", "window"])
@pytest.mark.parametrize(("dtype", "k_norm_max"), PATHS)
def test_positions_with_gaps_in_the_cache_and_in_the_call(dtype, k_norm_max, config):
    layer, rng = layer_of(config, dtype, k_norm_max), np.random.default_rng(6)
    tokens = [90, 41, 66]
    positions = np.stack([np.sort(rng.permutation(400)[:90]) for _ in tokens])
    cache = layer.new_cache(3, 200)

    def go_on(x, positions, counts) -> None:
        before, start = [held(cache, b) for b in range(3)], cache.next_positions()
        y = to_numpy(layer(x, cache, positions=positions, num_tokens=counts))
        for b, count in enumerate(counts):
            if count:
                new = start[b] + np.arange(count) if positions is None else positions[b, :count]
                expected = exact(layer, x[b : b + 1, :count], past=before[b], positions=new)
                check(y[b : b + 1, :count], expected, dtype)
                assert cache.positions[b, : cache.lengths[b]].tolist() == [*before[b][2][0], *new]

    def hidden(seq: int, seed: int) -> np.ndarray:
        return make_hidden(config, 3, seq, seed=seed, dtype=dtype)

    go_on(hidden(90, 1), positions, tokens)
    go_on(hidden(1, 2), np.array([[420], [500], [401]]), [1, 1, 1])  # far from the last
    go_on(hidden(1, 3), None, [1, 0, 1])  # counting on
    go_on(hidden(20, 4), np.array([range(600, 640, 2)] * 3), [20, 0, 7])
    go_on(hidden(1, 5), None, [1, 1, 1])
    go_on(hidden(20, 6), None, [3, 20, 0])


@pytest.mark.parametrize("dtype", HALVES)
def test_positions_up_to_a_million(dtype):
    config = make_config(hidden_size=264, num_attention_heads=6, num_key_value_heads=2, head_dim=128,
                         max_position_embeddings=1_000_000)  # fmt: skip
    layer = make_layer(config, dtype)
    positions = np.array([0, 1, 7, 1000, 65_535, 65_536, 131_072, 262_143, 500_000, *range(999_940, 999_996)])
    x = make_hidden(config, 1, len(positions) + 4, dtype=dtype)
    every = np.concatenate([positions, range(999_996, 1_000_000)])
    expected = exact(layer, x, positions=every)
    cache = layer.new_cache(1, 80)
    check(layer(x[:, : len(positions)], cache, positions=positions), expected[:, : len(positions)], dtype)
    parts = [layer(x[:, i : i + 1], cache) for i in range(len(positions), len(every))]
    check(np.concatenate(parts, 1), expected[:, len(positions) :], dtype)
    with pytest.raises(ca.InputError, match="position 1000000"):
        layer(x[:, :1], cache)


@pytest.mark.parametrize("dtype", HALVES)
def test_dynamic_rope_leaves_the_kernels_past_its_length_and_comes_back(dtype):
    config = make_config(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    layer = make_layer(config, dtype)
    x = make_hidden(config, 2, 80, dtype=dtype)
    cache = layer.new_cache(2, 80)
    for start, stop in ((0, 60), (60, 61), (61, 64), (64, 65), (65, 79), (79, 80)):
        past = [np.concatenate(parts) for parts in zip(*(held(cache, b) for b in range(2)), strict=True)]
        check(layer(x[:, start:stop], cache), exact(layer, x[:, start:stop], past=tuple(past)), dtype)
    assert cache.device_lengths.get().tolist() == cache.lengths.tolist() == [80, 80]
    assert same_bits(cache.device_positions, cache.positions.astype(np.int32))
    cache.truncate(50)
    past = [np.concatenate(parts) for parts in zip(*(held(cache, b) for b in range(2)), strict=True)]
    check(layer(x[:, :1], cache), exact(layer, x[:, :1], past=tuple(past)), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_angles_that_transformers_computes_can_be_asked_for(dtype):
    layer = make_layer(CONFIG, dtype, angles="float32")
    positions = np.arange(32_000, 32_060)
    x = make_hidden(CONFIG, 1, 60, dtype=dtype)
    expected = exact(layer, x, positions=positions, angles="float32")
    cache = layer.new_cache(1, 60)
    check(layer(x[:, :50], cache, positions=positions[:50]), expected[:, :50], dtype)
    check(np.concatenate([layer(x[:, i : i + 1], cache) for i in range(50, 60)], 1), expected[:, 50:], dtype)


def test_the_gpu_holds_all_clusters_of_a_few_tokens_projections():
    """Or the last of them begin when others end; wgmma.py counts on what an H200 and an H100 hold."""
    gpu, seen = cuda.limits(0), 0
    if not gpu.wgmma:
        pytest.skip("not a Hopper GPU")
    for model in MODELS:
        config = model_config(model)
        shape = launch.Shape("float16", config.head_dim, precise=False, windowed=False, float32_angles=False)
        for one in wgmma.decode(config, shape, gpu, 64, 1):
            if one.splits > 1:
                assert Launcher(one)._most_clusters() >= one.grid // one.splits, one
                seen += 1
    assert seen


# Streams.


@pytest.mark.parametrize(("batch", "k_norm_max"), [(3, 96.5), (12, 1.5)])
@pytest.mark.parametrize("dtype", HALVES)
def test_two_layers_interleaved_on_two_streams_are_what_they_are_alone(dtype, batch, k_norm_max):
    import cupy

    layers = [layer_of(CONFIG, dtype, k_norm_max), layer_of(ODD, dtype, 1.5)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in layers]
    inputs = [cupy.asarray(make_hidden(layer.config, batch, 80, dtype=dtype)) for layer in layers]
    sizes = [(0, 30), *((i, i + 1) for i in range(30, 78)), (78, 80)]

    def caches() -> list:
        made = [layer.new_cache(batch, 80) for layer in layers]
        cupy.cuda.Device().synchronize()
        return made

    alone = []
    for layer, stream, x, cache in zip(layers, streams, inputs, caches(), strict=True):
        with stream:
            alone.append([layer(x[:, start:stop], cache) for start, stop in sizes])
            stream.synchronize()
    together: list[list] = [[], []]
    held_caches = caches()
    for start, stop in sizes:  # 50 rounds
        for i in (0, 1):
            with streams[i]:
                together[i].append(layers[i](inputs[i][:, start:stop], held_caches[i]))
    cupy.cuda.Device().synchronize()
    assert all(same_bits(a, b) for mine, theirs in zip(alone, together, strict=True)
               for a, b in zip(mine, theirs, strict=True))  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
def test_one_layer_on_two_streams_in_turn(dtype):
    import cupy

    layer = layer_of(CONFIG, dtype, 96.5)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    x = cupy.asarray(make_hidden(CONFIG, 2, 60, dtype=dtype))
    want_cache = layer.new_cache(2, 60)
    want = [layer(x[:, start:stop], want_cache) for start, stop in ((0, 40), *((i, i + 1) for i in range(40, 60)))]
    shared, own = layer.new_cache(2, 60), [layer.new_cache(2, 60) for _ in streams]
    cupy.cuda.Device().synchronize()
    got: list[list] = [[], [], []]
    for turn, (start, stop) in enumerate([(0, 40), *((i, i + 1) for i in range(40, 60))]):
        for i in (0, 1):  # a cache for each stream: nothing need wait
            with streams[i]:
                got[i].append(layer(x[:, start:stop], own[i]))
        with streams[turn % 2]:  # one cache: each waits for the other
            got[2].append(layer(x[:, start:stop], shared))
            streams[1 - turn % 2].wait_event(streams[turn % 2].record())
    cupy.cuda.Device().synchronize()
    for outputs in got:
        assert all(same_bits(a, b) for a, b in zip(outputs, want, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_calls_that_are_queued_are_what_they_are_one_by_one(dtype):
    """Kernels begin before the ones ahead of them have ended; what they read early must not be old."""
    import cupy

    layer = layer_of(CONFIG, dtype, 96.5)
    sizes = [64, 130, 1, 1, 150, 3, 1, 64, 1, 130]
    x = cupy.asarray(make_hidden(CONFIG, 1, sum(sizes), dtype=dtype))
    stops = np.cumsum(sizes)

    def outputs(*, wait: bool) -> list:
        caches = [layer.new_cache(1, sum(sizes)) for _ in range(2)]
        found = []
        for start, stop in zip(stops - sizes, stops, strict=True):
            for cache in caches:
                found.append(layer(x[:, start:stop], cache))
                if wait:
                    cupy.cuda.get_current_stream().synchronize()
        return found

    want = outputs(wait=True)
    for _ in range(3):
        assert all(same_bits(a, b) for a, b in zip(outputs(wait=False), want, strict=True))


@pytest.mark.parametrize(("dtype", "k_norm_max"), PATHS)
def test_portable_kernels_where_others_would_be_taken(dtype, k_norm_max):
    layer = make_layer(CONFIG, dtype, k_norm_max=k_norm_max)
    backend = layer._backend
    backend._limits = dataclasses.replace(backend._limits, wgmma=False)
    x, cache = make_hidden(CONFIG, 2, 300, dtype=dtype), layer.new_cache(2, 300)
    expected = exact(layer, x)
    for start, stop in ((0, 150), (150, 300)):
        check(layer(x[:, start:stop], cache), expected[:, start:stop], dtype)
    assert not any(one.name.endswith("_wgmma") for launches in backend._launches.values() for one in launches)


def test_another_thread_calls_with_fewer_tokens():
    """It has no context of its own yet, and memory comes from CuPy's pool."""
    layer = layer_of(CONFIG, "float16", 96.5)
    x = make_hidden(CONFIG, 1, 512, dtype="float16")
    layer(x)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(layer, x[:, :200]).result()
    assert same_bits(got, layer(x[:, :200]))


def test_calls_of_many_sizes_share_a_kernel():
    """Eight tokens of 2,048 need more shared memory than one: what the one leaves behind must do for the eight."""
    wide = make_config(hidden_size=2048, num_attention_heads=6, num_key_value_heads=2, head_dim=128)
    layers = [make_layer(wide), layer_of(CONFIG, "float16", 96.5)]
    inputs = [make_hidden(layer.config, 8, 40, dtype="float16") for layer in layers]
    calls = [(layer, x[:batch, :seq]) for layer, x in zip(layers, inputs, strict=True)
             for batch, seq in ((8, 1), (1, 1), (8, 40), (1, 1), (3, 1))]  # fmt: skip
    first = [layer(x) for layer, x in calls]
    for order in (range(len(calls)), reversed(range(len(calls)))):
        for i in order:
            layer, x = calls[i]
            assert same_bits(layer(x), first[i])


def test_a_second_call_of_a_shape_allocates_nothing():
    import cupy

    class Count(cupy.cuda.MemoryHook):
        name, allocations = "count", 0

        def malloc_preprocess(self, **_):
            self.allocations += 1

    layer = layer_of(CONFIG, "float16", 96.5)
    for batch, seq in ((1, 1), (12, 1), (2, 40)):
        x = cupy.asarray(make_hidden(CONFIG, batch, seq, dtype="float16"))
        cache, out = layer.new_cache(batch, 3 * seq), cupy.empty_like(x)
        layer(x, cache, out=out)
        layer(x, cache, out=out)
        with Count() as count:
            layer(x, cache, out=out, residual=x)
        assert count.allocations == 0


def test_layers_made_and_called_on_another_gpu():
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    x = make_hidden(CONFIG, 2, 40, dtype="float16")
    results = []
    for device in range(2):
        with cupy.cuda.Device(device):
            layer = make_layer(CONFIG)
            cache = layer.new_cache(2, 41)
            results += [(layer(x, cache), layer(x[:, :1], cache))]
            assert cache.k_heads.device.id == device
        with cupy.cuda.Device(1 - device), pytest.raises(ca.InputError, match=f"on GPU {device} and GPU {1 - device}"):
            layer(x[:, :1], cache)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
