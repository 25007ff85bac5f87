"""Decode steps that repeat the call before: the same bits and the same errors, without planning anew."""

from __future__ import annotations

import sys

import emulated_gpu
import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights

import cupy_attn as ca
from cupy_attn import cuda, steps

pytestmark = pytest.mark.skipif(emulated_gpu.compiler() is None, reason="there is no g++")

CONFIG = make_config(hidden_size=72, num_attention_heads=2, num_key_value_heads=1, head_dim=16)


@pytest.fixture
def planned(monkeypatch):
    """Count the calls that were planned."""
    emulated_gpu.pretend(monkeypatch, num_sms=2)
    calls, forward = [], cuda.CudaBackend.forward

    def counted(self, plan, cache):
        calls.append(plan)
        return forward(self, plan, cache)

    monkeypatch.setattr(cuda.CudaBackend, "forward", counted)
    return calls


def make_layer(config=CONFIG) -> ca.Attention:
    return ca.Attention(config, make_weights(config, dtype="float16"), "float16", "cuda")


def tokens(count: int, batch: int = 1):
    """Return single tokens [B, 1, H] on the GPU."""
    xp = sys.modules["cupy"]
    return [xp.asarray(make_hidden(CONFIG, batch, 1, seed=i, dtype="float16")) for i in range(count)]


def same(a, b) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def slowly(layer, cache, x, **options):
    """Call with every step planned."""
    cache.step = None
    return layer(x, cache, **options)


@pytest.mark.parametrize("prompts", [[0], [5, 0, 3]])
def test_repeated_steps_are_planned_steps_bit_for_bit(planned, prompts):
    layer = make_layer()
    xs, caches = tokens(6, len(prompts)), [layer.new_cache(len(prompts), 12) for _ in range(2)]
    if max(prompts):
        prompt = make_hidden(CONFIG, len(prompts), max(prompts), seed=9, dtype="float16")
        for cache in caches:
            layer(prompt, cache, num_tokens=prompts)
    planned.clear()
    ys = [layer(x, caches[0], residual=x) for x in xs]
    assert len(planned) == 1
    assert all(same(y, slowly(layer, caches[1], x, residual=x)) for x, y in zip(xs, ys, strict=True))
    assert len(planned) == 7
    assert repr(caches[0]) == repr(caches[1])
    for name, array in caches[0].state().items():
        assert same(array, caches[1].state()[name]), name
    assert same(caches[0].device_lengths, caches[0].lengths.astype(np.int32))


def test_arrays_may_differ_from_step_to_step(planned):
    layer, (a, b, c, d) = make_layer(), tokens(4)
    cache, other, xp = layer.new_cache(1, 12), layer.new_cache(1, 12), sys.modules["cupy"]
    out = xp.zeros(a.shape, a.dtype)
    calls = [{"residual": a}, {}, {"residual": d, "out": out}, {"out": out}]
    for x, options in zip((a, b, c, d), calls, strict=True):
        y = layer(x, cache, **options)
        assert same(y, slowly(layer, other, x, **({} if "out" not in options else {"out": out.copy()}) |
                              {name: value for name, value in options.items() if name != "out"}))  # fmt: skip
        assert ("out" in options) is (y is out)
    assert len(planned) == 1 + 4


def test_the_same_arrays_again(planned):
    """With new content, without a residual that was there, and in another shape, which is looked at anew."""
    layer, xs = make_layer(), tokens(7)
    cache, other, xp = layer.new_cache(1, 12), layer.new_cache(1, 12), sys.modules["cupy"]
    x, residual, out = (xp.zeros(xs[0].shape, xs[0].dtype) for _ in range(3))
    for new, added in zip(xs, [residual, residual, x, x, None, None, residual], strict=True):
        x[...], residual[...] = new, 2 * new
        wanted = np.array(slowly(layer, other, x, residual=added))
        assert same(layer(x, cache, residual=added, out=out), wanted)
    assert len(planned) == len(xs) + 1
    for array in (residual, out, x):
        array.shape = (1, CONFIG.hidden_size, 1)
        with pytest.raises(ca.InputError, match=r"shape .*1, 72, 1"):
            layer(x, cache, residual=residual, out=out)
        array.shape = xs[0].shape
    assert cache.lengths.tolist() == [len(xs)]
    planned.clear()
    layer(x, cache, residual=residual, out=out)
    assert not planned  # what was refused has not cost the step


def test_a_layer_of_another_gpu_than_the_current_one(monkeypatch, planned):
    layer, (a, b) = make_layer(), tokens(2)
    cache = layer.new_cache(1, 12)
    layer(a, cache)
    runtime = sys.modules["cupy"].cuda.runtime
    for ready in (True, False):
        if not ready:
            cache.step = None
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "getDevice", lambda: 1)
            with pytest.raises(ca.InputError, match=r"on GPU 0 and GPU 1 is .*within cupy.cuda.Device\(0\)"):
                layer(b, cache)
        assert cache.lengths.tolist() == [1]
    layer(b, cache)
    assert cache.lengths.tolist() == [2]


@pytest.fixture
def graphs(monkeypatch):
    """Count the graphs that were made and launched."""
    counts, make = {"made": 0, "launched": 0}, steps.in_graph

    def counted(bind):
        counts["made"] += 1
        start = make(bind)

        def launch(stream):
            counts["launched"] += 1
            start(stream)

        return launch

    monkeypatch.setattr(steps, "in_graph", counted)
    return counts


def test_steps_with_the_same_addresses_become_a_graph(planned, graphs):
    """Until one of them changes."""
    layer, xs = make_layer(), tokens(24)
    cache, other, xp = layer.new_cache(1, 40), layer.new_cache(1, 40), sys.modules["cupy"]
    arrays = [[xp.zeros(xs[0].shape, xs[0].dtype) for _ in range(3)] for _ in range(2)]

    def step(i, x, residual, out):
        x[...], residual[...] = xs[i], 2 * xs[i]
        wanted = np.array(slowly(layer, other, x, residual=residual))
        assert same(layer(x, cache, residual=residual, out=out), wanted)

    for i in range(10):
        step(i, *arrays[0])
    assert graphs == {"made": 1, "launched": 9 - steps.SETTLED}
    for i in range(10, 15):  # an array at another address ends it, and it begins anew
        step(i, arrays[0][0], arrays[0][1], arrays[1][2])
    assert graphs == {"made": 2, "launched": 9 - steps.SETTLED + 5 - steps.SETTLED}
    x, residual, out = arrays[0][0], arrays[0][1], arrays[1][2]
    step(15, x, residual, out[:])  # the same addresses
    assert graphs["launched"] == 9 - steps.SETTLED + 6 - steps.SETTLED
    for i in range(16, 22):  # addresses in turns: none
        step(i, *arrays[i % 2])
    assert graphs == {"made": 2, "launched": 9 - steps.SETTLED + 6 - steps.SETTLED}
    assert cache.lengths.tolist() == other.lengths.tolist() == [22]
    assert len(planned) == 1 + 22


def test_steps_go_on_where_no_graph_can_be_made(monkeypatch, planned):
    def refused(bind):
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(steps, "in_graph", refused)
    layer, xs = make_layer(), tokens(12)
    cache, other = layer.new_cache(1, 12), layer.new_cache(1, 12)
    x = sys.modules["cupy"].zeros(xs[0].shape, xs[0].dtype)
    for one in xs:
        x[...] = one
        assert same(layer(x, cache, out=x), slowly(layer, other, one))
    assert len(planned) == 1 + len(xs)


def test_long_steps_are_launched_one_by_one(monkeypatch, planned, graphs):
    """Kernels of a graph begin late, and the GPU is what takes time then."""
    layer, (x,) = make_layer(), tokens(1)
    of_a_token = 4 * CONFIG.num_key_value_heads * CONFIG.head_dim
    weights = 4 * CONFIG.hidden_size * 3 * CONFIG.head_dim
    monkeypatch.setattr(cuda, "SHORT_STEP", weights + 8 * of_a_token)
    cache, out = layer.new_cache(1, 40), sys.modules["cupy"].zeros(x.shape, x.dtype)
    for _ in range(20):
        layer(x, cache, out=out)
    assert graphs == {"made": 1, "launched": 8 - 1 - steps.SETTLED}
    cache.truncate(0)  # and short ones as a graph again
    for _ in range(20):
        layer(x, cache, out=out)
    assert graphs == {"made": 2, "launched": 2 * (8 - 1 - steps.SETTLED)}


def test_what_no_step_takes_is_planned(planned):
    layer, (a, b, c) = make_layer(), tokens(3)
    cache, xp = layer.new_cache(1, 40), sys.modules["cupy"]
    layer(a, cache)
    wide = xp.zeros((1, 1, 2 * CONFIG.hidden_size), a.dtype)
    for x, options in [
        (np.asarray(b).view(np.ndarray), {}),
        (wide[..., ::2], {}),
        (b, {"residual": wide[..., ::2]}),
        (b, {"positions": [30]}),
        (b, {"num_tokens": [1]}),
        (b, {"stages": {}}),
        (xp.asarray(make_hidden(CONFIG, 1, 2, dtype="float16")), {}),
    ]:
        layer(c, cache)  # a step is ready
        before = len(planned)
        layer(x, cache, **options)
        assert len(planned) == before + 1, options


@pytest.mark.parametrize("change", ["truncate", "assume", "reset", "restore"])
def test_a_cache_that_was_changed_by_hand_is_looked_at_again(planned, change):
    layer, xs = make_layer(), tokens(6)
    cache, other = layer.new_cache(1, 12), layer.new_cache(1, 12)
    for x in xs[:4]:
        layer(x, cache)
        slowly(layer, other, x)
    for one in (cache, other):
        given = {"truncate": (2,), "assume": (3,), "reset": (), "restore": (one.state(),)}[change]
        getattr(one, change)(*given)
    for x in xs[4:]:
        assert same(layer(x, cache), slowly(layer, other, x))
    assert cache.lengths.tolist() == other.lengths.tolist()
    assert cache.positions[:, : int(cache.lengths[0])].tolist() == other.positions[:, : int(cache.lengths[0])].tolist()


def test_every_way_to_look_at_a_cache_knows_its_steps(planned):
    layer, xs = make_layer(), tokens(4)
    looks = {
        "next_positions": lambda cache: cache.next_positions().tolist() == [4],
        "key_positions": lambda cache: cache.key_positions(0).tolist() == [0, 1, 2, 3],
        "check_room": lambda cache: cache.check_room(np.array([16])) is None,
        "lengths": lambda cache: cache.lengths.tolist() == [4],
        "positions": lambda cache: cache.positions[0, :4].tolist() == [0, 1, 2, 3],
        "state": lambda cache: cache.state()["lengths"].tolist() == [4],
        "repr": lambda cache: "lengths=[4]" in repr(cache),
    }
    for name, look in looks.items():
        cache = layer.new_cache(1, 20)
        for x in xs:
            layer(x, cache)
        assert look(cache), name
    cache = layer.new_cache(1, 20)
    for x in xs:
        layer(x, cache)
    with pytest.raises(ca.CacheError, match="cannot take 4 \\+ 17 tokens"):
        cache.check_room(np.array([17]))


def test_an_interrupted_step_is_not_repeated(planned, monkeypatch):
    layer, xs = make_layer(), tokens(3)
    cache = layer.new_cache(1, 12)
    layer(xs[0], cache)

    def interrupt():
        raise KeyboardInterrupt

    cache.step._launches.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        layer(xs[1], cache)
    assert cache.step is None
    assert cache.lengths.tolist() == [1]


def test_steps_end_with_the_cache_and_with_the_model(planned):
    layer, xs = make_layer(), tokens(6)
    cache = layer.new_cache(1, 5)
    for x in xs[:5]:
        layer(x, cache)
    with pytest.raises(ca.CacheError, match="capacity 5 cannot take 5 \\+ 1 tokens"):
        layer(xs[5], cache)
    assert cache.lengths.tolist() == [5]
    short = make_config(hidden_size=72, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                        max_position_embeddings=4)  # fmt: skip
    layer = make_layer(short)
    cache = layer.new_cache(1, 9)
    for x in xs[:4]:
        layer(x, cache)
    with pytest.raises(ca.InputError, match="position 4, the model's positions are 0 to 3"):
        layer(xs[4], cache)
    assert len(planned) == 2


def test_another_stream_and_scratch_that_moved_are_planned_for(planned, monkeypatch):
    layer, xs = make_layer(), tokens(5)
    cache = layer.new_cache(1, 12)
    layer(xs[0], cache)
    layer(xs[1], cache)
    assert len(planned) == 1
    layer(make_hidden(CONFIG, 3, 50, dtype="float16"))  # needs more scratch
    layer(xs[2], cache)
    assert len(planned) == 3
    monkeypatch.setattr(emulated_gpu._Stream, "ptr", 7)
    layer(xs[3], cache)
    assert len(planned) == 4


def test_each_layer_has_steps_of_its_own(planned):
    layer, other = make_layer(), make_layer()
    xs, caches = tokens(4), [layer.new_cache(1, 12) for _ in range(2)]
    for x in xs:
        assert same(layer(x, caches[0]), other(x, caches[1]))
    assert len(planned) == 2
    other(xs[0], caches[0])  # of the same config: it may, but not by the first one's step
    assert len(planned) == 3
