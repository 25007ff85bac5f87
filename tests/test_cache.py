"""The KV cache: what fits, what survives a refusal, what a file gives back, and that its tail is never read."""

from __future__ import annotations

import types

import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights

import cupy_attn as ca
from cupy_attn import reference
from cupy_attn.accuracy import BARS, relative_l2
from cupy_attn.arrays import to_numpy

CONFIG = make_config()
DTYPES = ("float16", "bfloat16", "float32")


def make_layer(dtype="float16", device="cpu", config=CONFIG, seed=0, layer=0) -> ca.Attention:
    return ca.Attention(config, make_weights(config, seed=seed, layer=layer, dtype=dtype), dtype, device)


def filled(layer, *, batch=2, capacity=16, tokens=6):
    """Return a cache that holds some tokens."""
    cache = layer.new_cache(batch, capacity)
    layer(make_hidden(layer.config, batch, tokens, dtype=layer.dtype), cache)
    return cache


def snapshot(cache) -> dict[str, bytes]:
    """Return every byte of a cache that could be read later."""
    arrays = {"k": cache.k_heads, "v": cache.v_heads, "positions": cache.positions, "lengths": cache.lengths}
    return {name: to_numpy(array).tobytes() for name, array in arrays.items()}


def same_bits(a, b) -> bool:
    a, b = to_numpy(a), to_numpy(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_cache_is_empty(dtype):
    cache = make_layer(dtype).new_cache(3, 10)
    assert cache.k.shape == cache.v.shape == (3, 10, CONFIG.num_key_value_heads, CONFIG.head_dim)
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.next_positions().tolist() == [0, 0, 0]
    assert cache.nbytes == 2 * 3 * 10 * CONFIG.kv_size * (4 if dtype == "float32" else 2)
    assert "lengths=[0, 0, 0]" in repr(cache)


def test_default_capacity_is_every_position_of_the_model():
    config = make_config(max_position_embeddings=40, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert make_layer(config=config).new_cache().capacity == 80


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3", None])
@pytest.mark.parametrize("name", ["batch", "capacity"])
def test_size_is_checked(name, value):
    with pytest.raises(ca.CacheError, match=f"{name} is .*; it must be an integer of at least 1"):
        ca.KVCache(CONFIG, 0, **({"batch": 1, "capacity": 4, "dtype": "float16"} | {name: value}))


def test_numpy_integers_are_sizes():
    cache = ca.KVCache(CONFIG, 0, batch=np.int64(2), capacity=np.int32(4), dtype="float16")
    assert (cache.batch, cache.capacity) == (2, 4)


def test_properties_are_copies_that_cannot_change_the_cache(device):
    cache = filled(make_layer(device=device))
    cache.lengths[:] = 0
    cache.positions[:] = 9
    assert cache.lengths.tolist() == [6, 6]
    assert cache.positions[1, :6].tolist() == [0, 1, 2, 3, 4, 5]


# What is stored.


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_keys_and_values_are_before_norm_and_rope(device, dtype):
    layer = make_layer(dtype, device)
    x = make_hidden(CONFIG, 2, 6, dtype=dtype)
    cache = layer.new_cache(2, 8)
    layer(x, cache)
    _, stages = reference.forward(CONFIG, layer.weights, x)
    for name, stored in (("k", cache.k), ("v", cache.v)):
        # The reference rounds to storage too: equal up to float32 sums that round to the other neighbour.
        assert relative_l2(to_numpy(stored)[:, :6], stages[name]) <= BARS[dtype] / 10
    assert not to_numpy(cache.k)[:, 6:].any()
    assert cache.positions[:, :6].tolist() == [[0, 1, 2, 3, 4, 5]] * 2


# Overflow.


def test_exactly_full_is_not_an_overflow(device):
    layer = make_layer(device=device)
    cache = filled(layer, capacity=6)
    assert cache.lengths.tolist() == [6, 6]


@pytest.mark.parametrize("tokens", [3, 30])
def test_overflow_leaves_the_cache_as_it_was(device, tokens):
    layer = make_layer(device=device)
    cache = filled(layer, capacity=8)
    before = snapshot(cache)
    words = rf"capacity 8 cannot take 6 \+ {tokens} tokens \(sequence 0\).*>= {6 + tokens}"
    with pytest.raises(ca.CacheError, match=words):
        layer(make_hidden(CONFIG, 2, tokens, dtype="float16"), cache)
    assert snapshot(cache) == before
    y = layer(make_hidden(CONFIG, 2, 2, seed=3, dtype="float16"), cache)
    fresh = filled(layer, capacity=8)
    assert same_bits(y, layer(make_hidden(CONFIG, 2, 2, seed=3, dtype="float16"), fresh))


def test_overflow_of_one_sequence_stops_all(device):
    layer = make_layer(device=device)
    cache = layer.new_cache(2, 8)
    layer(make_hidden(CONFIG, 2, 6, dtype="float16"), cache, num_tokens=[2, 6])
    before = snapshot(cache)
    x = make_hidden(CONFIG, 2, 3, dtype="float16")
    with pytest.raises(ca.CacheError, match=r"capacity 8 cannot take 6 \+ 3 tokens \(sequence 1\)"):
        layer(x, cache)
    assert snapshot(cache) == before
    layer(x, cache, num_tokens=[3, 2])
    assert cache.lengths.tolist() == [5, 8]


# Truncate and reset.


@pytest.mark.parametrize("keep", [0, 1, 4, 6])
def test_truncate_forgets_the_last_tokens(device, keep):
    layer = make_layer(device=device)
    x, rejected = make_hidden(CONFIG, 2, 9, dtype="float16"), make_hidden(CONFIG, 2, 6, seed=9, dtype="float16")
    cache = layer.new_cache(2, 16)
    if keep:
        layer(x[:, :keep], cache)
    layer(rejected, cache)
    cache.truncate(keep)
    assert cache.lengths.tolist() == [keep, keep]
    expected = layer.new_cache(2, 16)
    if keep:
        layer(x[:, :keep], expected)
    assert same_bits(layer(x[:, keep:], cache), layer(x[:, keep:], expected))
    assert same_bits(cache.state()["k"], expected.state()["k"])


def test_truncate_each_sequence_to_its_own_length(device):
    layer = make_layer(device=device)
    cache = filled(layer)
    cache.truncate([2, 5])
    assert cache.lengths.tolist() == [2, 5]
    assert cache.next_positions().tolist() == [2, 5]
    cache.truncate(np.array([2, 0]))
    assert cache.lengths.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (7, "sequence 0 holds 6 tokens and cannot be truncated to 7; give 0 to 6"),
        ([6, -1], "sequence 1 holds 6 tokens and cannot be truncated to -1"),
        ([1, 2, 3], "give one integer or 2 of them"),
        (1.0, "dtype float64; give one integer or 2 of them"),
        (True, "dtype bool"),
    ],
)
def test_truncate_refusals_forget_nothing(lengths, words):
    cache = filled(make_layer())
    before = snapshot(cache)
    with pytest.raises(ca.InputError, match=words):
        cache.truncate(lengths)
    assert snapshot(cache) == before


def test_reset_makes_it_new(device):
    layer = make_layer(device=device)
    cache = filled(layer)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]
    x = make_hidden(CONFIG, 2, 6, seed=5, dtype="float16")
    assert same_bits(layer(x, cache), layer(x, layer.new_cache(2, 16)))


# State and restore.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [6, 32])
def test_state_round_trip(device, dtype, capacity):
    layer = make_layer(dtype, device)
    cache = layer.new_cache(2, 16)
    layer(make_hidden(CONFIG, 2, 6, dtype=dtype), cache, positions=[0, 1, 5, 6, 7, 9])
    cache.truncate([3, 6])
    state = cache.state()
    assert {name: array.shape for name, array in state.items()} == {
        "k": (2, 6, 2, 32), "v": (2, 6, 2, 32), "positions": (2, 6), "lengths": (2,),
    }  # fmt: skip
    assert not state["k"][0, 3:].any()  # a short sequence's padding
    assert state["positions"][0].tolist() == [0, 1, 5, 0, 0, 0]
    other = layer.new_cache(2, capacity)
    layer(make_hidden(CONFIG, 2, 5, seed=8, dtype=dtype), other)  # what restore must overwrite
    other.restore(state)
    assert other.lengths.tolist() == [3, 6]
    assert other.next_positions().tolist() == [6, 10]
    assert {n: a.tobytes() for n, a in other.state().items()} == {n: a.tobytes() for n, a in state.items()}
    if capacity > 6:
        x = make_hidden(CONFIG, 2, 2, seed=4, dtype=dtype)
        assert same_bits(layer(x, other), layer(x, cache))


def test_state_of_an_empty_cache():
    layer = make_layer()
    state = layer.new_cache(2, 4).state()
    assert state["k"].shape == (2, 0, 2, 32)
    cache = filled(layer)
    cache.restore(state)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {"k": s["k"][:1]}, "stored k has shape"),
        (lambda s: s | {"k": s["k"][:, :5]}, "stored v has shape"),
        (lambda s: s | {"k": s["k"][..., :16]}, "stored k has shape"),
        (lambda s: s | {"v": s["v"][:, :, :1]}, "stored v has shape"),
        (lambda s: s | {"k": s["k"][0]}, "stored k has shape"),
        (lambda s: s | {"positions": s["positions"][:, :3]}, r"stored positions has shape \(2, 3\), expected \(2, 6\)"),
        (lambda s: s | {"lengths": s["lengths"][:1]}, r"stored lengths has shape \(1,\), expected \(2,\)"),
        (lambda s: s | {"k": s["k"].astype(np.float32)}, "stored as float32, the layer stores float16"),
        (lambda s: s | {"lengths": np.array([6, 7])}, r"stored lengths \[6, 7\] are not all 0 to 6"),
        (lambda s: s | {"lengths": np.array([-1, 6])}, r"stored lengths \[-1, 6\]"),
        (lambda s: s | {"positions": s["positions"][:, ::-1]}, "positions of sequence 0 do not increase"),
        (lambda s: s | {"positions": s["positions"] - 1}, "positions of sequence 0 do not increase"),
        (lambda s: s | {"positions": s["positions"] + 4096}, "positions of sequence 0 do not increase"),
        (lambda s: {n: np.repeat(a, 3, 1) if a.ndim > 1 else a for n, a in s.items()},
         "18 stored tokens exceed capacity 16"),
    ],
)  # fmt: skip
def test_restore_refusals_leave_the_cache_as_it_was(change, words):
    layer = make_layer()
    state = filled(layer).state()
    cache = layer.new_cache(2, 16)
    layer(make_hidden(CONFIG, 2, 3, seed=8, dtype="float16"), cache)
    before = snapshot(cache)
    with pytest.raises(ca.CacheError, match=words):
        cache.restore(change(state))
    assert snapshot(cache) == before


# A cache of something else.


def make_cache(**changes) -> ca.KVCache:
    return make_layer(config=make_config(**changes)).new_cache(2, 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_cache(rope_theta=5e5), "made for a config with rope_parameters"),
        (lambda: make_cache(rms_norm_eps=1e-5), "config with rms_norm_eps 1e-05, used with 1e-06"),
        (lambda: make_cache(num_key_value_heads=1), "num_key_value_heads 1, used with 2"),
        (lambda: make_layer(layer=1).new_cache(2, 8), "made for layer 1, used with layer 0; each layer needs a cache"),
        (lambda: make_layer("float32").new_cache(2, 8), "holds float32, the layer stores float16"),
        (lambda: make_layer().new_cache(3, 8), r"made for batch 3, x has batch 2; make one with new_cache\(batch=2\)"),
        (lambda: {"k": 1}, "cache is a dict; make one with this layer's new_cache"),
    ],
)  # fmt: skip
def test_a_cache_of_something_else_is_refused(make, words):
    layer, cache = make_layer(), make()
    before = snapshot(cache) if isinstance(cache, ca.KVCache) else None
    with pytest.raises(ca.CacheError, match=words):
        layer(make_hidden(CONFIG, 2, 3, dtype="float16"), cache)
    assert before is None or snapshot(cache) == before


def test_a_cache_on_another_device_is_refused():
    layer = make_layer()
    cache = layer.new_cache(1, 8)
    cache.xp = types.SimpleNamespace(__name__="cupy")
    with pytest.raises(ca.CacheError, match="lives in cupy, the layer computes in numpy"):
        layer(make_hidden(CONFIG, 1, 3, dtype="float16"), cache)


def test_an_equal_config_made_anew_is_the_same_config():
    layer = make_layer()
    cache = ca.KVCache(make_config(), 0, batch=1, capacity=8, dtype="float16")
    layer(make_hidden(CONFIG, 1, 3, dtype="float16"), cache)
    assert cache.lengths.tolist() == [3]


# Writing into it.


@pytest.mark.parametrize("name", ["k", "v"])
def test_writing_to_cached_rows_is_honoured_by_the_next_call(device, name):
    """The CPU keeps rotated keys beside the cache: they must be made anew."""
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 2, 10)
    cache = filled(layer)
    rows = getattr(cache, name)
    rows[:, 1:4] = rows[:, 1:4] * 0.5 + 1
    k, v = (to_numpy(a)[:, :6].copy() for a in (cache.k, cache.v))
    y = layer(x[:, :2], cache)
    expected, _ = reference.forward(CONFIG, layer.weights, x[:, :2], past=(k, v, cache.positions[:, :6]))
    assert relative_l2(to_numpy(y), expected) <= BARS["float32"]
    unchanged = layer(x[:, :2], filled(layer))
    assert relative_l2(to_numpy(y), to_numpy(unchanged)) > 100 * BARS["float32"]


def test_two_layers_can_take_turns_on_one_cache(device):
    """Rotated keys of other weights are of no use; who made them is remembered."""
    first, second = make_layer("float32", device, seed=0), make_layer("float32", device, seed=1)
    x = make_hidden(CONFIG, 2, 1, seed=6)
    cache = filled(first)
    k, v = (to_numpy(heads).transpose(0, 2, 1, 3)[:, :6].copy() for heads in (cache.k_heads, cache.v_heads))
    for layer in (first, second, first):
        expected, _ = reference.forward(CONFIG, layer.weights, x, past=(k, v, cache.positions[:, :6]))
        assert relative_l2(to_numpy(layer(x, cache)), expected) <= BARS["float32"]
        cache.truncate(6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new_tokens", [1, 5, 40])
def test_the_tail_is_never_read(device, dtype, poison, new_tokens):
    layer = make_layer(dtype, device)
    x = make_hidden(CONFIG, 2, new_tokens, seed=2, dtype=dtype)
    past = make_hidden(CONFIG, 2, 9, dtype=dtype)
    clean, poisoned = layer.new_cache(2, 64), layer.new_cache(2, 64)
    for cache in (clean, poisoned):
        layer(past, cache, num_tokens=[4, 9])
    for b, length in enumerate((4, 9)):
        poisoned.k[b, length:] = poison
        poisoned.v[b, length:] = poison
    assert same_bits(layer(x, poisoned), layer(x, clean))
