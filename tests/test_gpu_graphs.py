"""CUDA graphs: a call captured once and replayed, bit for bit what the same calls give one by one."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_config, make_hidden
from gpu_helpers import HALVES, build_ahead, kernels_of, make_layer, same_bits

import cupy_attn as ca
from cupy_attn import steps
from cupy_attn.arrays import to_numpy
from cupy_attn.workspace import Workspace

pytestmark = pytest.mark.gpu

CONFIG = make_config(hidden_size=320, num_attention_heads=6, num_key_value_heads=2, head_dim=128)
WINDOW = make_config(hidden_size=320, num_attention_heads=6, num_key_value_heads=2, head_dim=128,
                     use_sliding_window=True, sliding_window=20, max_window_layers=0)  # fmt: skip
SMALL = make_config(hidden_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=128)
OTHER = make_config(hidden_size=1032, num_attention_heads=12, num_key_value_heads=2, head_dim=128)
STEPS = 64


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    calls = [(1, 1), (12, 1), (2, 9), (3, 40)]
    for config in (CONFIG, WINDOW):
        kinds = [(config, dtype, precise) for dtype in HALVES for precise in (False, True)]
        build_ahead(kernels_of(kinds, calls, windowed=config is WINDOW))
    build_ahead(kernels_of([(OTHER, "float16", True)], [(batch, 1 + 7 * batch) for batch in range(2, 22)]))
    build_ahead(kernels_of([(SMALL, "float16", True)], [(1, 128)]))
    build_ahead(kernels_of([(make_config(), "float16", True)], [(1, 1)]))


@pytest.fixture
def stream():
    import cupy

    cupy.cuda.Device().synchronize()  # what was made on other streams is there
    with cupy.cuda.Stream(non_blocking=True) as stream:
        yield stream
        stream.synchronize()


class Captured:
    """A call on a layer, a cache and fixed arrays, captured on the current stream after one eager run."""

    def __init__(self, layer, cache, seq: int = 1) -> None:
        import cupy

        self.layer, self.cache, stream = layer, cache, cupy.cuda.get_current_stream()
        before = cache.lengths
        self.x = cupy.zeros((cache.batch, seq, layer.config.hidden_size), layer.dtype)
        self.out = cupy.empty_like(self.x)
        layer(self.x, cache, out=self.out)  # builds kernels and makes room
        cache.truncate(before)
        stream.begin_capture()
        try:
            y = layer(self.x, cache, out=self.out, residual=self.x)
        finally:
            self.graph = stream.end_capture()
        assert y is self.out
        assert cache.lengths.tolist() == before.tolist()  # capturing runs nothing

    def __call__(self, x):
        self.x[...] = x
        self.graph.launch()
        return self.out.copy()


def two_caches(layer, batch: int, capacity: int, counts):
    """Return two caches with the same tokens."""
    import cupy

    x = cupy.asarray(make_hidden(layer.config, batch, max(counts), seed=7, dtype=layer.dtype))
    caches = [layer.new_cache(batch, capacity) for _ in range(2)]
    for cache in caches:
        layer(x, cache, num_tokens=counts)
    return caches


def same_caches(a, b) -> bool:
    """Whether two caches hold the same tokens, bit for bit, on the host and on the GPU."""
    lengths = a.lengths
    rows = all(
        same_bits(mine[i, :, :n], theirs[i, :, :n])
        for mine, theirs in ((a.k_heads, b.k_heads), (a.v_heads, b.v_heads))
        for i, n in enumerate(lengths)
    )
    positions = all((a.positions[i, :n] == b.positions[i, :n]).all() for i, n in enumerate(lengths))
    on_gpu = all(same_bits(c.device_lengths, lengths.astype(np.int32)) for c in (a, b))
    return rows and positions and on_gpu and (lengths == b.lengths).all()


KINDS = {  # batch, tokens cached of each, tokens of a replay
    "a step": (1, [5], 1),
    "a step of three": (3, [1, 33, 17], 1),
    "a step of twelve": (12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 60, 70, 40], 1),
    "a chunk": (2, [40, 3], 9),
}


@pytest.mark.parametrize("config", [CONFIG, WINDOW], ids=["plain", "window"])
@pytest.mark.parametrize("k_norm_max", [1.5, 96.5])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_replays_are_the_eager_calls_bit_for_bit(stream, kind, dtype, k_norm_max, config):
    import cupy

    batch, counts, seq = KINDS[kind]
    count = STEPS if seq == 1 else 10
    layer = make_layer(config, dtype, k_norm_max=k_norm_max)
    capacity = max(counts) + seq * (count + 1)
    cache, eager = two_caches(layer, batch, capacity, counts)
    x = cupy.asarray(make_hidden(config, batch, seq * (count + 1), dtype=dtype))
    captured = Captured(layer, cache, seq)
    inputs = [x[:, i * seq : (i + 1) * seq] for i in range(count + 1)]
    replayed = [captured(part) for part in inputs[:count]]
    assert cache.lengths.tolist() == [n + seq * count for n in counts]
    wanted = [layer(part, eager, residual=part) for part in inputs]
    assert all(same_bits(a, b) for a, b in zip(replayed, wanted, strict=False))
    assert cache.positions[0, : counts[0] + seq * count].tolist() == list(range(counts[0] + seq * count))
    # Calls outside the graph go on where it ended.
    assert same_bits(layer(inputs[-1], cache, residual=inputs[-1]), wanted[-1])
    assert same_caches(cache, eager)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "stream of its own"])
def test_eager_steps_with_the_same_arrays_become_graphs(monkeypatch, dtype, own_stream):
    """Of two layers in turns; and are launched one by one again when other arrays come."""
    import cupy

    made, make = [], steps.in_graph
    monkeypatch.setattr(steps, "in_graph", lambda bind: made.append(bind) or make(bind))
    layers = [make_layer(config, dtype) for config in (CONFIG, SMALL)]
    rounds = steps.SETTLED + 6
    with cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null:
        caches = [two_caches(layer, 2, 40, [5, 3]) for layer in layers]
        inputs = [cupy.asarray(make_hidden(layer.config, 2, rounds, dtype=dtype)) for layer in layers]
        arrays = [(cupy.empty_like(x[:, :1]), cupy.empty_like(x[:, :1])) for x in inputs]
        for i in range(rounds):
            for layer, (cache, planned), x, (fixed, out) in zip(layers, caches, inputs, arrays, strict=True):
                fixed[...], planned.step = x[:, i : i + 1], None
                wanted = layer(x[:, i : i + 1], planned, residual=x[:, i : i + 1])
                assert same_bits(layer(fixed, cache, residual=fixed, out=out if i < rounds - 2 else None), wanted)
        for cache, planned in caches:
            assert same_caches(cache, planned)
    assert len(made) == len(layers)


def test_replays_and_eager_calls_take_turns_and_tokens_are_rejected(stream):
    import cupy

    layer = make_layer(CONFIG)
    cache, eager = two_caches(layer, 2, 80, [5, 9])
    captured = Captured(layer, cache)
    xs = cupy.asarray(make_hidden(CONFIG, 2, 60, dtype="float16"))
    taken = iter(range(60))

    def both(count: int, replay: bool) -> None:
        for _ in range(count):
            i = next(taken)
            x = xs[:, i : i + 1]
            got = captured(x) if replay else layer(x, cache, residual=x)
            assert same_bits(got, layer(x, eager, residual=x))

    both(7, True)
    for c in (cache, eager):
        c.truncate([8, 9])
    both(5, True)
    both(3, False)
    both(4, True)
    chunk = xs[:, :6]
    assert same_bits(layer(chunk, cache, num_tokens=[6, 2]), layer(chunk, eager, num_tokens=[6, 2]))
    both(5, True)
    state = cache.state()
    both(3, True)
    for c in (cache, eager):
        c.restore(state)
    both(4, True)
    assert same_caches(cache, eager)
    for c in (cache, eager):
        c.reset()
    both(4, True)
    assert same_caches(cache, eager)
    assert cache.lengths.tolist() == [4, 4]


def test_a_graph_outlives_scratch_that_grows(stream):
    import cupy

    layer, other = make_layer(CONFIG), make_layer(OTHER)
    cache, eager = two_caches(layer, 3, 40, [5, 9, 1])
    captured = Captured(layer, cache)
    xs = cupy.asarray(make_hidden(CONFIG, 3, 20, dtype="float16"))
    for i in range(20):
        x = xs[:, i : i + 1]
        assert same_bits(captured(x), layer(x, eager, residual=x))
        batch = 2 + i  # larger calls on the same stream: more rows, more heads
        for seq in (1, 1 + 7 * batch):
            other(cupy.asarray(make_hidden(OTHER, batch, seq, dtype="float16")))
    assert same_caches(cache, eager)


@pytest.mark.parametrize("captured", [False, True])
def test_calls_behind_each_other_count_all_their_tokens(stream, captured):
    """Kernels of a call may begin before the call ahead of it has counted, and few blocks leave room for them."""
    import cupy

    layer = make_layer(SMALL, "float16")
    calls, seq = 4, 128
    x = cupy.asarray(make_hidden(SMALL, 1, seq, dtype="float16"))
    layer(x, layer.new_cache(1, seq))  # builds kernels and makes room
    cache = layer.new_cache(1, calls * seq)
    busy = cupy.ones((4096, 4096), np.float32)
    busy = busy @ busy
    if captured:
        stream.begin_capture()
    for _ in range(0 if captured else 20):
        busy = busy @ busy
    try:
        for _ in range(calls):
            layer(x, cache)
    finally:
        graph = stream.end_capture() if captured else None
    if graph is not None:
        graph.launch(stream)
    stream.synchronize()
    assert cache.device_lengths.tolist() == [calls * seq]
    assert cache.lengths.tolist() == [calls * seq]


@pytest.mark.parametrize("captured", [False, True])
def test_scratch_that_must_be_zero_is_not_memory_that_the_stream_still_writes(captured):
    import cupy

    nbytes = 1 << 20
    busy = cupy.ones((4096, 4096), np.float32)
    busy = busy @ busy * np.float32(1 / 4096)  # cuBLAS makes its own room
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy.full(nbytes, 0xFF, np.uint8)  # for the pool to hand out again
        if captured:
            stream.begin_capture()
        try:
            for _ in range(0 if captured else 50):
                busy = busy @ busy * np.float32(1 / 4096)
            cupy.full(nbytes, 0xFF, np.uint8)  # freed at once, written later
            taken = Workspace().take("parts", (nbytes,), np.uint8, capturing=captured, zeroed=True)
        finally:
            graph = stream.end_capture() if captured else None
        if graph is not None:
            graph.launch()
        stream.synchronize()
        assert not taken.any()


@pytest.mark.parametrize("batch", [3, 12])
def test_calls_between_a_capture_that_makes_room_and_its_replay(stream, batch):
    """What is made while a stream is captured must be as kernels want to find it before the graph runs."""
    import cupy

    layer = make_layer(CONFIG)
    caches = two_caches(layer, batch, 400, [300] * batch)
    x = cupy.asarray(make_hidden(CONFIG, batch, 1, dtype="float16"))
    expected = layer(x, caches[1])
    with cupy.cuda.Stream(non_blocking=True) as fresh:  # whose workspace is empty
        junk = [cupy.full(1 << 20, 0xFF, np.uint8) for _ in range(40)]  # for the pool to hand out again
        fresh.synchronize()
        del junk
        fresh.begin_capture()
        try:
            y = layer(x, caches[0], out=cupy.empty_like(x))
        finally:
            graph = fresh.end_capture()
        other, _ = two_caches(layer, batch, 400, [300] * batch)
        assert same_bits(layer(x, other), expected)
        graph.launch()
        fresh.synchronize()
        assert same_bits(y, expected)


def test_two_graphs_take_turns(stream):
    import cupy

    layers = [make_layer(CONFIG), make_layer(WINDOW, "bfloat16", seed=1)]
    pairs = [two_caches(layer, 2, 90, [5, 33]) for layer in layers]
    captured = [Captured(layer, cache) for layer, (cache, _) in zip(layers, pairs, strict=True)]
    inputs = [cupy.asarray(make_hidden(CONFIG, 2, 40, seed=i, dtype=layer.dtype)) for i, layer in enumerate(layers)]
    outputs: list[list] = [[], []]
    for i in range(40):
        for j in (0, 1):
            outputs[j].append(captured[j](inputs[j][:, i : i + 1]))
    for j, layer in enumerate(layers):
        for i, y in enumerate(outputs[j]):
            x = inputs[j][:, i : i + 1]
            assert same_bits(y, layer(x, pairs[j][1], residual=x))
        assert same_caches(*pairs[j])


def test_two_layers_in_one_graph(stream):
    """As an engine captures a whole model: the second layer reads what the first one wrote."""
    import cupy

    layers = [make_layer(CONFIG, seed=i) for i in range(2)]
    caches, eager = ([layer.new_cache(2, 40) for layer in layers] for _ in range(2))
    x, y = cupy.zeros((2, 1, CONFIG.hidden_size), np.float16), cupy.empty((2, 1, CONFIG.hidden_size), np.float16)

    def model(x, y, caches):
        for layer, cache in zip(layers, caches, strict=True):
            x = layer(x, cache, residual=x, out=y)
        return x

    model(x, y, caches)
    for cache in caches:
        cache.truncate(0)
    stream.begin_capture()
    try:
        model(x, y, caches)
    finally:
        graph = stream.end_capture()
    xs = cupy.asarray(make_hidden(CONFIG, 2, 30, dtype="float16"))
    for i in range(30):
        x[...] = xs[:, i : i + 1]
        graph.launch()
        assert same_bits(y, model(xs[:, i : i + 1], cupy.empty_like(y), eager))
    assert all(same_caches(a, b) for a, b in zip(caches, eager, strict=True))


# Past the end.


def overrun(layer, capacity: int, counts, room: int, words: str) -> None:
    """Replay until nothing fits, once more, and look at what is left."""
    import cupy

    batch = len(counts)
    cache, eager = two_caches(layer, batch, capacity, counts)
    captured = Captured(layer, cache)
    xs = cupy.asarray(make_hidden(layer.config, batch, room + 2, dtype=layer.dtype))
    for i in range(room):
        x = xs[:, i : i + 1]
        assert same_bits(captured(x), layer(x, eager, residual=x))
    full = [n + room for n in counts]
    before = cache.k_heads.copy(), cache.v_heads.copy()
    for i in (0, 1):
        y = to_numpy(captured(xs[:, room + i : room + i + 1])).astype(np.float32)
        assert np.isnan(y[0]).all()
    with pytest.raises(ca.CacheError, match=words):
        _ = cache.lengths
    assert cache.lengths.tolist()[0] == full[0]
    assert same_bits(cache.k_heads[0], before[0][0])
    assert same_bits(cache.v_heads[0], before[1][0])
    if batch > 1:  # the others go on
        assert cache.lengths.tolist()[1:] == [n + 2 for n in full[1:]]
    else:
        assert same_bits(cache.k_heads, before[0])
        captured(xs[:, :1])
        with pytest.raises(ca.CacheError, match=words):  # and again, whatever looks first
            layer(xs[:, :1], cache)
        with pytest.raises(ca.InputError if "position" in words else ca.CacheError):
            layer(xs[:, :1], cache)
    cache.truncate([n - 1 for n in counts])
    eager.truncate([n - 1 for n in counts])
    x = xs[:, :1]
    assert same_bits(captured(x), layer(x, eager, residual=x))


def test_a_replay_past_the_capacity_gives_nan_and_appends_nothing(stream):
    overrun(make_layer(CONFIG), 12, [5], 7, "ran past capacity 12")
    overrun(make_layer(CONFIG, "bfloat16"), 12, [8, 3, 2], 4, "ran past capacity 12")
    overrun(make_layer(CONFIG), 12, [8] + [3] * 11, 4, "ran past capacity 12")


def test_a_replay_past_the_models_positions_gives_nan_and_appends_nothing(stream):
    config = make_config(hidden_size=264, num_attention_heads=6, num_key_value_heads=2, head_dim=128,
                         max_position_embeddings=15)  # fmt: skip
    overrun(make_layer(config), 40, [5], 10, "or position 14")


def test_a_replay_past_the_length_of_dynamic_rope_gives_nan(stream):
    """The kernels have the angles of the model's own length only; eager calls leave them for separate operations."""
    import cupy

    config = make_config(max_position_embeddings=8, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    layer = make_layer(config)
    captured = Captured(layer, layer.new_cache(1, 30))
    x = cupy.asarray(make_hidden(config, 1, 1, dtype="float16"))
    outputs = [to_numpy(captured(x)) for _ in range(9)]
    assert np.isfinite(outputs[7]).all()
    assert np.isnan(outputs[8]).all()


# What cannot be captured.


def test_what_a_replay_could_not_repeat_is_refused_and_capturing_goes_on(stream):
    import cupy

    layer = make_layer(CONFIG)
    cache = layer.new_cache(1, 8)
    x = cupy.zeros((1, 1, CONFIG.hidden_size), np.float16)
    out = cupy.empty_like(x)
    layer(x, cache, out=out)
    cache.truncate(0)
    with pytest.warns(ca.SlowPathWarning):
        slow = make_layer(CONFIG, "float32")
    slow_cache, slow_x = slow.new_cache(1, 8), cupy.zeros((1, 1, CONFIG.hidden_size), np.float32)
    stream.begin_capture()
    try:
        with pytest.raises(ca.InputError, match="x is in host memory"):
            layer(np.zeros((1, 1, CONFIG.hidden_size), np.float16), cache)
        with pytest.raises(ca.InputError, match="cache is missing"):
            layer(x)
        for given in ({"positions": [0]}, {"num_tokens": [1]}, {"stages": {}}):
            with pytest.raises(ca.InputError, match="positions, num_tokens and stages cannot be given"):
                layer(x, cache, **given)
        with pytest.raises(ca.InputError, match="which a graph cannot hold"):
            slow(slow_x, slow_cache)
        layer(x, cache, out=out)
    finally:
        graph = stream.end_capture()
    assert cache.lengths.tolist() == slow_cache.lengths.tolist() == [0]
    graph.launch()
    assert cache.lengths.tolist() == [1]
