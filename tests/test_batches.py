"""Bits that do not depend on the batch: every sequence alone, in part of a batch and in all of it."""

from __future__ import annotations

import itertools

import emulated_gpu
import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights
from gpu_helpers import HALVES, filled_cache, make_layer, same_bits

import cupy_attn as ca
from cupy_attn.arrays import to_numpy

CONFIG = make_config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
ODD = make_config(hidden_size=136, num_attention_heads=20, num_key_value_heads=1, head_dim=80, attention_bias=True)
BATCH = 70  # more than one tile of tokens
LENGTHS = [0, 1, 15, 16, 300, 2000, 64, 129, 700, 33]
CALLS = (1, 1, 3, 16, 40, 130)  # decode kernels, portable ones and those of Hopper


def outputs(layer: ca.Attention, rows: list[int]) -> list[np.ndarray]:
    """Return what every call gives for some of the batch's sequences."""
    lengths = list(itertools.islice(itertools.cycle(LENGTHS), BATCH))
    full, cache = filled_cache(layer, lengths, 2200), layer.new_cache(len(rows), 2200)
    cache.k_heads[:], cache.v_heads[:] = full.k_heads[rows], full.v_heads[rows]
    cache.assume([lengths[row] for row in rows])
    xs = [make_hidden(layer.config, BATCH, seq, seed=i, dtype=layer.dtype) for i, seq in enumerate(CALLS)]
    return [to_numpy(layer(x[rows], cache)) for x in xs]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k_norm_max", [1.5, 96.5])
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["0.6B", "odd"])
def test_a_sequence_has_the_same_bits_in_any_batch(config, k_norm_max, dtype):
    layer = make_layer(config, dtype, k_norm_max=k_norm_max, batch_invariant=True)
    whole = outputs(layer, list(range(BATCH)))
    for rows in ([0], [4], [5], [9, 3], list(range(20, 33)), list(range(5, 69))):
        for what, (a, b) in zip(CALLS, zip(whole, outputs(layer, rows), strict=True), strict=True):
            assert same_bits(a[rows], b), f"{len(rows)} sequences, {what} tokens"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_on_the_cpu_too(dtype):
    config, rng = make_config(), np.random.default_rng(0)
    layer = ca.Attention(config, make_weights(config, dtype=dtype), dtype, "cpu", batch_invariant=True)
    counts = [40, 3, 0, 17, 1]
    xs = [make_hidden(config, len(counts), seq, seed=seq, dtype=dtype) for seq in (40, 1, 600)]

    def some(rows):
        cache = layer.new_cache(len(rows), 700)
        first = layer(xs[0][rows], cache, num_tokens=[counts[row] for row in rows])
        return [first, *(layer(x[rows], cache) for x in xs[1:])]

    whole = some(list(range(len(counts))))
    for rows in ([0], [3], [4, 1], rng.permutation(len(counts)).tolist()):
        assert all(same_bits(a[rows], b) for a, b in zip(whole, some(rows), strict=True))


@pytest.mark.skipif(emulated_gpu.compiler() is None, reason="there is no g++")
def test_refused_where_no_kernel_can_keep_the_promise(monkeypatch):
    emulated_gpu.pretend(monkeypatch, num_sms=5)
    config = make_config()
    weights = make_weights(config, dtype="float32")
    with pytest.raises(
        ca.ConfigError, match="batch_invariant needs the kernels, and there is none for layer 0, because"
    ):
        ca.Attention(config, weights, "float32", "cuda", batch_invariant=True)
    rope = {"rope_type": "dynamic", "factor": 2.0}
    dynamic = make_config(rope_parameters=rope | {"rope_theta": 1e6}, max_position_embeddings=32)
    layer = ca.Attention(dynamic, make_weights(dynamic, dtype="float16"), "float16", "cuda", batch_invariant=True)
    cache = layer.new_cache(1, 60)
    layer(make_hidden(dynamic, 1, 32, dtype="float16"), cache)
    with pytest.raises(ca.InputError, match="positions reach 32, where dynamic RoPE changes the angles"):
        layer(make_hidden(dynamic, 1, 1, dtype="float16"), cache)
