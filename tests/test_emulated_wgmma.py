"""Prefill on Hopper's own units, on the CPU (emulated_gpu.py): right whichever warp runs first and when copies land."""

from __future__ import annotations

import dataclasses

import emulated_gpu
import numpy as np
import pytest
from conftest import make_hidden
from layer_helpers import far_scores
from test_emulated import BARS, HALVES, TAME, WILD, WINDOW, call, config_of, filled_cache, held, make_layer

import cupy_attn as ca
from cupy_attn import cuda, reference, wgmma, workspace

FOLDED = ["project_qkv_wgmma"]
QKV = ["normalise_rows", *FOLDED]
MIDDLING = 6.0  # on the normal path, with products of what rounding hidden states leaves over

pytestmark = pytest.mark.skipif(emulated_gpu.compiler() is None, reason="there is no g++")


@pytest.fixture
def cluster():
    """How many blocks a cluster has, unless a test says."""
    return 1


@pytest.fixture
def num_sms():
    """How many multiprocessors there are, unless a test says."""
    return 5


@pytest.fixture
def macros():
    """What those kernels that ran last are specialised for, by name."""
    return {}


@pytest.fixture
def launched(cluster, num_sms, macros, monkeypatch):
    """Collect the names of the kernels that run."""
    emulated_gpu.pretend(monkeypatch, num_sms=num_sms, cluster=cluster)
    names, plan = [], cuda.CudaBackend._plan_launches

    def planned(self, *args, **options):
        launches = plan(self, *args, **options)
        for one in launches:
            names.append(one.name)
            macros[one.name] = found = dict(one.macros)
            alone = "SPLITS" in found or "SPLIT_KEYS" in found
            if one.name == "attend_wgmma" and (self._config.group % cluster or num_sms < cluster):
                alone = True
            assert found.get("CLUSTER", str(cluster)) == ("1" if alone else str(cluster))
        return launches

    monkeypatch.setattr(cuda.CudaBackend, "_plan_launches", planned)
    return names


@pytest.mark.parametrize(
    ("seq", "cluster"), [(64, 1), (128, 1), (131, 1), (300, 1), (64, 2), (131, 2), (300, 2), (400, 2), (300, 4)]
)
@pytest.mark.parametrize("k_norm_max", [TAME, MIDDLING, WILD], ids=["small", "normal", "precise"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_prompt(launched, dtype, k_norm_max, seq, cluster):
    layer = make_layer(config_of(4, 2, 128, 128), dtype, k_norm_max)
    assert (layer._backend._ready.k_proj is not None) == (k_norm_max == MIDDLING)
    call(layer, filled_cache(layer, [0], seq + 3), seq)
    last = "project_output_few_wgmma" if seq <= 128 and cluster == 1 else "project_output_wgmma"
    folded = dtype == "float16" and k_norm_max == TAME
    first = FOLDED if folded else QKV
    assert launched == [*first, "attend_prefill" if seq < 128 else "attend_wgmma", last]


@pytest.mark.parametrize(("k_norm_max", "hidden_size"), [(MIDDLING, 128), (MIDDLING, 192), (WILD, 128)])
@pytest.mark.parametrize("dtype", HALVES)
def test_keys_are_rounded_once(launched, dtype, k_norm_max, hidden_size):
    """To storage: what rounding hidden states to float16 changes of them has products of its own.

    In 8 bits on the normal path: 192 columns are no whole copies then.
    """
    config = config_of(3, 1, 128, hidden_size)  # keys share a tile with queries and values
    layer = make_layer(config, dtype, k_norm_max)
    cache, x = layer.new_cache(1, 150), make_hidden(config, 1, 150, dtype=dtype)
    layer(layer._backend.xp.asarray(x), cache)
    _, stages = reference.forward(config, layer.weights, x)
    w_k = layer.weights.qkv_proj[config.q_size : config.q_size + config.kv_size].astype(np.float64)
    hidden = stages["input_norm"].astype(np.float16).astype(np.float64)
    rounded_twice = (hidden @ w_k.T).astype(dtype).reshape(1, 150, 1, 128)
    off, bar = (np.mean(k.astype(np.float64) != stages["k"]) for k in (held(cache, 0)[0], rounded_twice))
    print(f"\n{dtype}: {off:.2%} of keys differ from those rounded once, {bar:.2%} without such products")
    assert off < bar / 8


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("num_sms", [5, 40], ids=["wide tiles", "shared tiles"])
@pytest.mark.parametrize(("pair_product", "is_finite"), [(3.6, True), (3.8, False), (6.0, False)])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_scores_as_far_apart_as_norm_weights_let_them(
    launched, macros, num_sms, dtype, backwards, pair_product, is_finite
):
    """Weights relative to the first scores of a row would be infinite, too large for float16, or nothing in it.

    From the first row of the second chunk all keys of its first step are hidden, and no key of the next step is.
    """
    config = config_of(2, 1, 128, 128)
    weights, x = far_scores(config, dtype, pair_product, 400)
    layer = ca.Attention(config, weights, dtype, "cuda")
    assert not layer.precise
    x = x[:, ::-1] if backwards else x
    cache = filled_cache(layer, [0], 400)
    for chunk in (x[:, :127], x[:, 127:]):
        call(layer, cache, chunk.shape[1], x=np.ascontiguousarray(chunk))
    assert ("SPLIT_KEYS" in macros["attend_wgmma"]) == (num_sms == 40)
    assert ("OPTIMISTIC" in macros["attend_wgmma"]) == (is_finite and num_sms == 5)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("window", [40, 130, 1000])
@pytest.mark.parametrize("k_norm_max", [TAME, WILD], ids=["normal", "precise"])
def test_a_window(launched, k_norm_max, window):
    changes = WINDOW | {"sliding_window": window}
    layer = make_layer(config_of(2, 1, 128, 128, **changes), "float16", k_norm_max)
    positions = np.cumsum(np.random.default_rng(2).integers(1, 4, (2, 260)), 1)
    call(layer, filled_cache(layer, [260, 3], 600, positions), 290, [290, 131])
    assert launched[-2] == "attend_wgmma"


@pytest.mark.parametrize(("cluster", "heads"), [(1, 3), (2, 3), (2, 4), (4, 4)])
@pytest.mark.parametrize("k_norm_max", [TAME, MIDDLING, WILD], ids=["small", "normal", "precise"])
@pytest.mark.parametrize("dtype", HALVES)
def test_unequal_prompts_after_unequal_pasts(launched, dtype, k_norm_max, heads):
    layer = make_layer(config_of(heads, 1, 128, 192, attention_bias=True), dtype, k_norm_max)
    call(layer, filled_cache(layer, [130, 0, 65, 7], 290), 150, [150, 1, 64, 0])
    assert launched[-2] == "attend_wgmma"


@pytest.mark.parametrize("num_sms", [20])
def test_unequal_short_prompts(launched):
    """Fewer rows than fill tiles of project_output_wgmma, and padding among them."""
    layer = make_layer(config_of(3, 1, 128, 192), "bfloat16", TAME)
    call(layer, filled_cache(layer, [130, 0, 65], 200), 65, [65, 1, 0])
    assert launched == [*QKV, "attend_prefill", "project_output_few_wgmma"]


@pytest.mark.parametrize("seq", [130, 133])
@pytest.mark.parametrize("k_norm_max", [TAME, MIDDLING, WILD], ids=["small", "normal", "precise"])
@pytest.mark.parametrize("dtype", HALVES)
def test_batch_invariance(launched, dtype, k_norm_max, seq):
    """Whatever a thread's other row is, and wherever in its tile a position falls."""
    layer = make_layer(config_of(4, 2, 128, 128), dtype, k_norm_max, batch_invariant=True)
    lengths = [0, 15, 3]
    full, x = filled_cache(layer, lengths, 150), make_hidden(layer.config, 3, seq, dtype=dtype)

    def some(rows):
        cache = layer.new_cache(len(rows), 150)
        cache.k_heads[:], cache.v_heads[:] = full.k_heads[rows], full.v_heads[rows]
        cache.assume([lengths[row] for row in rows])
        return layer(layer._backend.xp.asarray(x[rows]), cache)

    whole = np.array(some([0, 1, 2]))
    for rows in ([0], [1], [2, 1]):
        assert np.array_equal(whole[rows], np.array(some(rows)))
    assert {"project_qkv_wgmma", "attend_wgmma"} <= set(launched)


SPLIT_TILES = ("project_output_wgmma", "SPLITS"), ("attend_wgmma", "SPLIT_KEYS")


@pytest.mark.parametrize("num_sms", [40])
@pytest.mark.parametrize("seq", [257, 300, 448, 500])
@pytest.mark.parametrize("k_norm_max", [TAME, MIDDLING], ids=["small", "normal"])
@pytest.mark.parametrize("dtype", HALVES)
def test_tiles_that_two_share(launched, macros, dtype, k_norm_max, seq):
    """A prompt that has tiles for less than half of the GPU: two blocks of a product, two warpgroups of attention."""
    layer = make_layer(config_of(2, 1, 128, 192), dtype, k_norm_max)
    call(layer, filled_cache(layer, [0], seq + 3), seq)
    assert all(macro in macros[name] for name, macro in SPLIT_TILES)


@pytest.mark.parametrize("num_sms", [40])
@pytest.mark.parametrize("window", [None, 40, 130, 1000])
def test_shared_tiles_after_unequal_pasts(launched, macros, window):
    """With one step of keys or many, which begin within a tile of queries; padding; positions with gaps."""
    changes = {} if window is None else WINDOW | {"sliding_window": window}
    layer = make_layer(config_of(2, 1, 128, 128, attention_bias=True, **changes), "float16", TAME)
    positions = np.cumsum(np.random.default_rng(2).integers(1, 4, (4, 260)), 1)
    call(layer, filled_cache(layer, [130, 0, 65, 7], 460, positions), 130, [130, 1, 64, 0])
    call(layer, filled_cache(layer, [255, 3], 460, positions[:2]), 201, [201, 131])
    assert all(macro in macros[name] for name, macro in SPLIT_TILES)


@pytest.mark.parametrize("num_sms", [40])
@pytest.mark.parametrize(("blocks", "window"), [(2, None), (4, None), (6, 100)])
def test_shared_tiles_one_after_the_other(launched, macros, monkeypatch, blocks, window):
    """On a GPU that holds fewer blocks at a time than there are tiles."""
    for name in ("attend", "project_output"):
        usual = getattr(wgmma, name)
        monkeypatch.setattr(wgmma, name, lambda *a, usual=usual, **o: dataclasses.replace(usual(*a, **o), grid=blocks))
    changes = {} if window is None else WINDOW | {"sliding_window": window}
    layer = make_layer(config_of(2, 1, 128, 192, **changes), "bfloat16", TAME)
    cache = filled_cache(layer, [0, 70], 700)
    for seed, (seq, counts) in enumerate([(257, [257, 131]), (256, [1, 256])]):
        call(layer, cache, seq, counts, seed=seed)
        check_workspace()
    assert all(macro in macros[name] for name, macro in SPLIT_TILES)


def check_workspace():
    """Hold counters to the zero that the next kernel, whichever it is, must find; leave no other result behind."""
    (space,) = workspace._workspaces.values()
    assert not space._buffers["counters"].view(np.int32).any()
    space.poison()


@pytest.mark.parametrize(("num_sms", "cluster"), [(1, 1), (4, 1), (1, 2), (2, 2), (5, 2)])
@pytest.mark.parametrize("k_norm_max", [TAME, WILD], ids=["normal", "precise"])
@pytest.mark.parametrize("window", [None, 100])
def test_blocks_that_attend_to_many_tiles(launched, monkeypatch, window, k_norm_max):
    """Even and odd numbers of steps; tiles of padding alone, first, last and between; a decode step among the calls."""
    changes = {} if window is None else WINDOW | {"sliding_window": window}
    layer = make_layer(config_of(2, 1, 128, 64, **changes), "bfloat16", k_norm_max)
    monkeypatch.setattr(emulated_gpu.EmulatedLauncher, "seed", 100)
    cache = filled_cache(layer, [0, 0, 70, 130], 600)
    for seed, (seq, counts) in enumerate([(300, [300, 0, 131, 1]), (140, [0, 140, 0, 128]), (1, None), (130, None)]):
        call(layer, cache, seq, counts, seed=seed)
        check_workspace()
    assert launched.count("attend_wgmma") == 3


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("fit", "kv_heads", "together"), [(1, 3, 1), (2, 3, 2), (3, 5, 4)])
def test_heads_a_few_at_a_time(launched, monkeypatch, fit, kv_heads, together):
    """As where not all of their keys fit L2: every tile once, whichever heads go together; the last may be fewer."""
    layer = make_layer(config_of(2 * kv_heads, kv_heads, 128, 64), "bfloat16", TAME)
    monkeypatch.setattr(wgmma, "LEAST_TILES", 0)
    monkeypatch.setattr(wgmma, "L2_SHARE", fit * 500 * 512)
    found, find = [], wgmma.heads_together
    monkeypatch.setattr(wgmma, "heads_together", lambda *a: found.append(find(*a)) or found[-1])
    call(layer, filled_cache(layer, [0, 70], 600), 300, [300, 131])
    assert found == [together]
    check_workspace()


@pytest.mark.parametrize(
    ("num_sms", "seq", "last"),
    [(5, 150, "project_output_wgmma"), (20, 128, "project_output_few_wgmma"), (20, 130, "project_output_wgmma")],
)
def test_replays(launched, monkeypatch, seq, last):
    """Of a graph, the last of which has no room left and so no tiles."""
    layer = make_layer(config_of(2, 1, 128, 64), "float16", TAME)
    cache, twin = (filled_cache(layer, [70, 3], 70 + 2 * seq) for _ in range(2))
    x = layer._backend.xp.asarray(make_hidden(layer.config, 2, seq, dtype="float16"))
    y, replay = emulated_gpu.capture(monkeypatch, lambda: layer(x, cache))
    assert launched == [*FOLDED, "attend_wgmma", last]
    for turn in range(3):
        replay()
        check_workspace()
        if turn < 2:
            assert y.tobytes() == layer(x, twin).tobytes()
    assert np.isnan(y[0]).all()


@pytest.mark.parametrize("cluster", [2, 4])
def test_clusters_whichever_block_is_ahead(launched):
    """Rings of several rounds, with an even and an odd number of rows of tiles."""
    layer = make_layer(config_of(4, 2, 128, 576), "float16", TAME)
    for seq in (131, 300):
        for _ in range(4):
            call(layer, filled_cache(layer, [0], seq), seq)


@pytest.mark.parametrize("cluster", [1, 2])
def test_tiles_of_padding_alone(launched, cluster):
    """At the beginning, in between and at the end; the call after it is whole again."""
    layer = make_layer(config_of(4, 2, 128, 128), "float16", TAME)
    for counts in ([0, 600, 3, 0], [600, 0, 0, 257], [0, 0, 0, 0], None):
        call(layer, filled_cache(layer, [0, 9, 70, 0], 680), 600, counts)
        assert launched[-3:] == [*FOLDED, "attend_wgmma", "project_output_wgmma"]


def prompt_of(layer, seq, scale):
    return (make_hidden(layer.config, 1, seq, dtype="float16").astype(np.float32) * scale).astype(np.float16)


def check_folded(layer, x, y):
    _, stages = reference.forward(layer.config, layer.weights, x, dtype="float16")
    assert ca.relative_l2(y, stages["output"]) <= BARS["float16"]


@pytest.mark.parametrize(("cluster", "hidden"), [(1, 64), (2, 576), (1, 1088)])
def test_notes_of_rows_are_of_their_own_call(launched, cluster, hidden):
    """The row before was 16 times as large, or the call before shorter or longer."""
    layer = make_layer(config_of(2, 1, 128, hidden), "float16", TAME)
    for seq, scale in ((150, 16.0), (150, 1.0), (300, 0.25), (70, 4.0), (300, 1.0)):
        x = prompt_of(layer, seq, scale)
        check_folded(layer, x, layer(x, layer.new_cache(1, seq)))
    assert "project_qkv_wgmma" in launched
    assert "normalise_rows" not in launched


def test_notes_of_rows_in_replays(launched, monkeypatch):
    layer = make_layer(config_of(2, 1, 128, 64), "float16", TAME)
    xs = [prompt_of(layer, 150, scale) for scale in (16.0, 1.0, 4.0)]
    cache = layer.new_cache(1, 450)
    x = layer._backend.xp.asarray(xs[0].copy())
    y, replay = emulated_gpu.capture(monkeypatch, lambda: layer(x, cache))
    for turn, given in enumerate(xs):
        cache.reset()
        x[...] = given
        replay()
        check_folded(layer, given, y)
        assert int(cache.device_lengths[0]) == 150, turn


def end_halfway(layer, monkeypatch, error):
    """Call the layer on other rows of as many tokens; their notes are made, but not counted."""
    bind = emulated_gpu.EmulatedLauncher.bind

    def fail():
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(emulated_gpu.EmulatedLauncher, "bind", lambda self, *args: (
            fail if self._launch.name == "attend_wgmma" else bind(self, *args)
        ))  # fmt: skip
        with pytest.raises(error):
            layer(prompt_of(layer, 150, 16.0), layer.new_cache(1, 150))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_ended_halfway_leaves_no_notes(launched, monkeypatch, error):
    layer = make_layer(config_of(2, 1, 128, 64), "float16", TAME)
    x = prompt_of(layer, 150, 1.0)
    end_halfway(layer, monkeypatch, error)
    check_folded(layer, x, layer(x, layer.new_cache(1, 150)))


def test_a_replay_after_a_call_that_ended_halfway(launched, monkeypatch):
    """The graph has the same notes, and counts on the same number."""
    layer = make_layer(config_of(2, 1, 128, 64), "float16", TAME)
    x, cache = prompt_of(layer, 150, 1.0), layer.new_cache(1, 300)
    given = layer._backend.xp.asarray(x)
    y, replay = emulated_gpu.capture(monkeypatch, lambda: layer(given, cache))
    replay()
    end_halfway(layer, monkeypatch, KeyboardInterrupt)
    (space,) = workspace._workspaces.values()
    assert not space._buffers["notes"].any()
    cache.reset()
    replay()
    check_folded(layer, x, y)
