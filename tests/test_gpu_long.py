"""Long contexts and large caches: 131,072 tokens, and caches of more elements than 31 bits count."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights
from gpu_helpers import HALVES, bits, build_ahead, check, exact, kernels_of, last_rows, make_layer, normal

import cupy_attn as ca
from cupy_attn import kernels
from cupy_attn.arrays import to_numpy

gpu = pytest.mark.gpu

TOKENS = 131_072
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
         "max_position_embeddings": 1 << 18}  # fmt: skip
LONG = make_config(**SHAPE)
WINDOW = make_config(**SHAPE, use_sliding_window=True, sliding_window=1000, max_window_layers=0)
WIDE = make_config(num_key_value_heads=8, num_attention_heads=16, head_dim=128, max_position_embeddings=1 << 20,
                   use_sliding_window=True, sliding_window=200, max_window_layers=0)  # fmt: skip
WIDE_CAPACITY = 800_000


@pytest.fixture(scope="module")
def _kernels():
    paths = [(dtype, precise) for dtype in HALVES for precise in (False, True)]
    calls = [(1, 1), (1, 100), (3, 1)]
    for config in (LONG, WINDOW):
        kinds = [(config, dtype, precise) for dtype, precise in paths]
        build_ahead(kernels_of(kinds, calls, windowed=config is WINDOW))


@pytest.mark.parametrize("window", [False, True])
def test_the_oracle_of_long_contexts_is_the_reference(window):
    """``gpu_helpers.last_rows`` against ``reference.forward``, with gaps between the positions."""
    changes = {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 0} if window else {}
    config = make_config(num_attention_heads=6, attention_bias=True, **changes)
    layer = ca.Attention(config, make_weights(config, dtype="float16"), "float16", "cpu")
    k, v = (normal((70, 2, 32), "float16", seed=seed) for seed in (1, 2))
    positions = np.cumsum(np.random.default_rng(3).integers(1, 4, 75))
    x = make_hidden(config, 1, 5, dtype="float16")
    past = k[None], v[None], positions[None, :70]
    expected = exact(layer, x, past=past, positions=positions[70:])
    assert np.allclose(last_rows(layer, x[0], k, v, positions), expected[0], rtol=1e-9, atol=1e-9)
    if window:
        near = last_rows(layer, x[0], k, v, positions, first_position=int(positions[70]) - 29)
        assert np.allclose(near, expected[0], rtol=1e-9, atol=1e-9)


@gpu
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("k_norm_max", [1.5, 96.5])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("config", [LONG, WINDOW], ids=["all", "window"])
def test_a_step_and_a_chunk_after_131072_tokens(config, dtype, k_norm_max):
    import cupy

    layer = make_layer(config, dtype, k_norm_max=k_norm_max)
    k, v = (normal((TOKENS, 1, 128), dtype, seed=seed) for seed in (1, 2))
    cache = layer.new_cache(1, TOKENS)
    cache.k[0], cache.v[0] = cupy.asarray(k), cupy.asarray(v)
    x = make_hidden(config, 1, 100, dtype=dtype)
    for new in (1, 100):
        past = TOKENS - new
        cache.assume(past)
        y = to_numpy(layer(x[:, :new], cache))
        first = 0 if layer.sliding_window is None else past - layer.sliding_window
        expected = last_rows(layer, x[0, :new], k[:past], v[:past], np.arange(TOKENS), first_position=first)
        check(y[0], expected, dtype, most=2.0)
        cache.k[0, past:], cache.v[0, past:] = cupy.asarray(k[past:]), cupy.asarray(v[past:])


@gpu
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", HALVES)
def test_steps_at_uneven_positions_after_many_tokens(dtype):
    """Positions up to 262,143 with gaps: tiles whose keys follow one another and tiles whose keys do not."""
    layer = make_layer(LONG, dtype)
    count = 20_000
    rng = np.random.default_rng(4)
    steps = np.where(rng.random(count + 2) < 0.01, rng.integers(2, 900, count + 2), 1)
    positions = np.cumsum(steps)
    assert positions[-1] < LONG.max_position
    k, v = (normal((count, 1, 128), dtype, seed=seed) for seed in (1, 2))
    cache = layer.new_cache(1, count + 2)
    state = {"k": k[None], "v": v[None], "positions": positions[None, :count], "lengths": np.array([count])}
    cache.restore(state)
    x = make_hidden(LONG, 1, 2, dtype=dtype)
    for i in (0, 1):
        y = to_numpy(layer(x[:, i : i + 1], cache, positions=positions[count + i : count + i + 1]))
        expected = last_rows(layer, x[0, : i + 1], k, v, positions[: count + i + 1])
        check(y[0], expected[-1:], dtype, most=2.0)
    assert (to_numpy(cache.device_positions)[0] == positions).all()
    assert (cache.positions[0] == positions).all()


@gpu
@pytest.mark.parametrize("k_norm_max", [1.5, 96.5])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "new"), [((16, 1), 1), ((32, 2), 1), ((4, 2), 6)])
def test_many_queries_of_many_keys(dtype, heads, new, k_norm_max):
    """decode_combine adds up what some blocks found, or one did all; and lengths differ or not."""
    config = make_config(**SHAPE | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]})
    layer, capacity = make_layer(config, dtype, k_norm_max=k_norm_max), 5000
    k, v = (normal((2, capacity, heads[1], 128), dtype, seed=seed) for seed in (1, 2))
    x = make_hidden(config, 2, new, dtype=dtype)
    for lengths in ([4100], [4990], [100], [3000, 3000], [4097, 17], [200, 250]):
        batch = len(lengths)
        state = {"k": k[:batch], "v": v[:batch], "lengths": np.array(lengths),
                 "positions": np.tile(np.arange(capacity), (batch, 1))}  # fmt: skip
        cache = layer.new_cache(batch, capacity)
        results = []
        for _ in range(2):
            cache.restore(state)
            results.append(to_numpy(layer(x[:batch], cache)))
        assert results[0].tobytes() == results[1].tobytes()
        for b, n in enumerate(lengths):
            check(results[0][b], last_rows(layer, x[b], k[b, :n], v[b, :n], np.arange(n + new)), dtype, most=2.0)
    assert all(launches[-2].name == "decode_combine" for launches in layer._backend._launches.values())


@gpu
@pytest.mark.usefixtures("_kernels")
def test_a_cache_of_more_than_2_to_the_31_elements():
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    if cupy.cuda.runtime.memGetInfo()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    layer = make_layer(WIDE)
    lengths = [3, 70, WIDE_CAPACITY - 2]
    cache = layer.new_cache(3, WIDE_CAPACITY)
    assert cache.k_heads.size > 1 << 31
    bits(cache.k_heads[0]).fill(0xFFFF)  # NaN at the start: what an offset that wrapped around would find
    bits(cache.v_heads[0]).fill(0xFFFF)
    rows = [{name: normal((min(n, 400), 8, 128), "float16", seed=b + 10 * i) for i, name in enumerate("kv")}
            for b, n in enumerate(lengths)]  # fmt: skip
    for b, n in enumerate(lengths):
        first = max(0, n - 400)
        cache.k[b, first:n], cache.v[b, first:n] = cupy.asarray(rows[b]["k"]), cupy.asarray(rows[b]["v"])
    cache.assume(lengths)
    x = make_hidden(WIDE, 3, 2, dtype="float16")
    outputs = np.concatenate([to_numpy(layer(x[:, i : i + 1], cache)) for i in (0, 1)], 1)
    for b, n in enumerate(lengths):
        expected = last_rows(layer, x[b], rows[b]["k"], rows[b]["v"], np.arange(n + 2)[-len(rows[b]["k"]) - 2 :])
        check(outputs[b], expected, "float16", most=2.0)
        assert np.isfinite(to_numpy(cache.k_heads[b, :, n : n + 2]).astype(np.float32)).all()
        assert to_numpy(cache.k_heads[b, :, n : n + 2]).any(-1).all()
    assert cache.lengths.tolist() == [5, 72, WIDE_CAPACITY]
    del cache, outputs
    pool.free_all_blocks()


@gpu
def test_quotients_by_way_of_floats_are_those_of_integers():
    """``small_quotient`` of alike.cuh up to the largest dividend it is for: at, below and above multiples."""
    import cupy

    source = """#include "shares.cuh"
    extern "C" __global__ void divide(const int* a, const int* b, int* quotients, int n) {
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) quotients[i] = small_quotient(a[i], b[i]);
    }"""
    macros = {"STORAGE": "__half", "HEAD_DIM": 128, "PARTS": 1, "HEAD_TILES": 1, "WARPS": 8}
    options = ("-std=c++17", f"-I{kernels.SOURCES}", *(f"-D{name}={value}" for name, value in macros.items()))
    divide = cupy.RawModule(code=source, options=options).get_function("divide")
    most, rng = (1 << 21) - 1, np.random.default_rng(1)
    divisors = np.concatenate([np.arange(1, 600), rng.integers(600, most, 1000)])
    b = np.repeat(divisors, 600)
    a = rng.integers(0, most // b + 1) * b + np.tile([-1, 0, 1], len(b) // 3)
    a, b = (cupy.asarray(np.clip(values, 0, most).astype(np.int32)) for values in (a, b))
    quotients = cupy.full_like(a, -1)
    divide((-(-a.size // 256),), (256,), (a, b, quotients, np.int32(a.size)))
    assert (quotients == a // b).all()
