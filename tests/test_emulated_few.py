"""Projections of a few tokens on Hopper's own units, on the CPU (emulated_gpu.py)."""

from __future__ import annotations

import emulated_gpu
import numpy as np
import pytest
from conftest import make_hidden
from test_emulated import TAME, WILD, call, config_of, filled_cache, held, make_layer, many_lengths

from cupy_attn import reference, wgmma, workspace

pytestmark = pytest.mark.skipif(emulated_gpu.compiler() is None, reason="there is no g++")

FOLDED = ["project_qkv_few_wgmma", "attend_decode", "project_output_few_wgmma"]
NAMES = ["normalise_rows", *FOLDED]


def names_of(layer):
    return FOLDED if layer._backend._shape.folded else NAMES


def launches_of(layer):
    (launches,) = layer._backend._launches.values()
    assert [one.name for one in launches] == names_of(layer)
    return launches


# Dtype; Hq, Hkv, D, H; tokens, multiprocessors; blocks of the clusters of either projection, on the normal path. Tests
# below take some of the same kernels, which take longer to build than to run.
SHAPES = [
    ("float16", (4, 2, 128, 256), 10, 5, (1, 4)),
    ("bfloat16", (4, 2, 128, 512), 18, 40, (4, 4)),
    ("float16", (3, 1, 80, 320), 33, 14, (2, 4)),  # k of 5 and of 4 chunks
    ("bfloat16", (2, 2, 64, 128), 70, 9, (2, 2)),
    ("bfloat16", (2, 2, 64, 128), 128, 9, (2, 2)),
    ("bfloat16", (2, 2, 64, 128), 150, 9, (2, 2)),
]


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_decode_of_many_sequences(monkeypatch, case):
    dtype, shape, tokens, num_sms, splits = SHAPES[case]
    emulated_gpu.pretend(monkeypatch, num_sms)
    layer = make_layer(config_of(*shape, attention_bias=True), dtype, TAME)
    call(layer, filled_cache(layer, many_lengths(tokens), 140), 1, [1, 0, *[1] * (tokens - 2)])
    *_, first, _, last = launches_of(layer)
    assert (first.splits, last.splits) == splits


@pytest.mark.parametrize("case", [1, 3])
def test_the_precise_path(monkeypatch, case):
    dtype, shape, tokens, num_sms, _ = SHAPES[case]
    emulated_gpu.pretend(monkeypatch, num_sms)
    layer = make_layer(config_of(*shape), dtype, WILD)
    call(layer, filled_cache(layer, many_lengths(tokens), 140), 1)
    assert dict(launches_of(layer)[1].macros)["PARTS"] == "2"


@pytest.mark.parametrize("k_norm_max", [TAME, WILD])
def test_bits_do_not_depend_on_the_batch_if_that_is_asked_for(monkeypatch, k_norm_max):
    emulated_gpu.pretend(monkeypatch, num_sms=14)
    layer = make_layer(config_of(4, 2, 128, 320), "float16", k_norm_max, batch_invariant=True)
    lengths = many_lengths(140)
    x = make_hidden(layer.config, len(lengths), 1, dtype="float16")

    def outputs(rows):
        full, cache = filled_cache(layer, lengths, 140), layer.new_cache(len(rows), 140)
        cache.k_heads[:], cache.v_heads[:] = full.k_heads[rows], full.v_heads[rows]
        cache.assume([lengths[row] for row in rows])
        return np.array(layer(x[rows], cache))

    whole = outputs(list(range(len(lengths))))
    for rows in ([5], [130, 70, 3]):
        assert whole[rows].tobytes() == outputs(rows).tobytes()
    assert all([one.name for one in launches] == names_of(layer) for launches in layer._backend._launches.values())


def test_appends(monkeypatch):
    emulated_gpu.pretend(monkeypatch, num_sms=5)
    layer = make_layer(config_of(*SHAPES[0][1]), "float16", TAME)
    call(layer, filled_cache(layer, [0, 63, 17, 130], 140), 3, [3, 3, 0, 2])
    launches_of(layer)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_layer_of_many_weights(monkeypatch, tokens):
    """However few the tokens."""
    emulated_gpu.pretend(monkeypatch, num_sms=40)
    monkeypatch.setattr(wgmma, "MANY_WEIGHTS", 1)
    layer = make_layer(config_of(*SHAPES[1][1]), "bfloat16", TAME)
    call(layer, filled_cache(layer, many_lengths(tokens), 140), 1)
    launches_of(layer)


def test_rings_of_several_rounds_whichever_warp_runs_first(monkeypatch):
    emulated_gpu.pretend(monkeypatch, num_sms=9)
    monkeypatch.setattr(wgmma, "MOST_W_STAGES", 2)  # what the launch leaves room for
    layer = make_layer(config_of(6, 2, 128, 960), "float16", TAME)
    results = set()
    for seed in range(0, 2000, 500):
        monkeypatch.setattr(emulated_gpu.EmulatedLauncher, "seed", seed)
        results.add(call(layer, filled_cache(layer, many_lengths(12), 140), 1).tobytes())
        for space in workspace._workspaces.values():
            space.poison()
    assert len(results) == 1


def test_keys_are_rounded_once(monkeypatch):
    """To storage, where they matter: what rounding hidden states to float16 changes of them is multiplied as well."""
    dtype = "float16"
    emulated_gpu.pretend(monkeypatch, num_sms=9)
    config = config_of(3, 1, 128, 192)  # a cluster has keys along with queries and values
    layer = make_layer(config, dtype, 4.0)
    assert not layer.precise
    assert not layer._backend._shape.folded
    cache, x = layer.new_cache(100, 2), make_hidden(config, 100, 1, dtype=dtype)
    layer(x, cache)
    w_k = layer.weights.qkv_proj[config.q_size : config.q_size + config.kv_size].astype(np.float64)
    off = twice = 0.0
    for b in range(100):
        _, stages = reference.forward(config, layer.weights, x[b : b + 1])
        hidden = stages["input_norm"].astype(np.float16).astype(np.float64)
        off += np.mean(held(cache, b)[0].astype(np.float64) != stages["k"].astype(dtype).astype(np.float64))
        twice += np.mean((hidden @ w_k.T).astype(dtype).astype(np.float64).ravel()
                         != stages["k"].astype(dtype).astype(np.float64).ravel())  # fmt: skip
    print(f"\n{dtype}: {off:.2f} % of keys differ from those rounded once, {twice:.2f} % without such products")
    assert off < twice / 8


def test_replays_without_room(monkeypatch):
    """Of a graph: the sequence that is full is left out whole and its output is NaN."""
    emulated_gpu.pretend(monkeypatch, num_sms=5)
    layer = make_layer(config_of(*SHAPES[0][1]), "float16", TAME)
    cache, twin = (filled_cache(layer, [70, *[3] * 9], 72) for _ in range(2))
    x = layer._backend.xp.asarray(make_hidden(layer.config, 10, 1, dtype="float16"))
    y, replay = emulated_gpu.capture(monkeypatch, lambda: layer(x, cache))
    launches_of(layer)
    for turn in range(3):
        replay()
        if turn < 2:
            assert y.tobytes() == layer(x, twin).tobytes()
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 2.0**9])
@pytest.mark.parametrize("tokens", [9, 40, 70])
def test_x_as_it_is_and_another_x_in_the_next_step(monkeypatch, tokens, scale):
    """One column of it is a hundred times the others; a step that repeats the one before finds its own."""
    emulated_gpu.pretend(monkeypatch, num_sms=9)
    layer = make_layer(config_of(2, 1, 128, 320, attention_bias=True), "float16", TAME)
    cache, other = (filled_cache(layer, many_lengths(tokens), 160) for _ in range(2))
    xs = [make_hidden(layer.config, tokens, 1, seed=seed, dtype="float16") for seed in range(4)]
    for x in xs:
        x[..., 7] *= 100
        x[...] = (x.astype(np.float32) * scale).clip(-6e4, 6e4)
    steps = [np.array(layer(x, cache)) for x in (*xs, xs[2])]
    launches_of(layer)
    for x, y in zip((*xs, xs[2]), steps, strict=True):
        other.step = None
        assert np.array(layer(x, other)).tobytes() == y.tobytes()
    call(layer, filled_cache(layer, many_lengths(tokens), 160), 1, x=xs[0])
