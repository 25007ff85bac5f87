"""The layer on every backend against the float64 reference: shapes, chunks, batches, windows, positions, arrays."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import K_NORM_MAXIMA, make_config, make_hidden, make_weights
from gpu_helpers import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_helpers import CONFIG, in_chunks, make_layer

import cupy_attn as ca
from cupy_attn import cpu, reference
from cupy_attn.accuracy import BARS, MAX_ERROR_BARS, compare_stages, max_error, relative_l2
from cupy_attn.arrays import to_numpy
from cupy_attn.config import FULL, SLIDING

DTYPES = ("float16", "bfloat16", "float32")

# Far beyond any published weight a score reaches 10^4, and its float32 rounding alone (10^4 x 6e-8) moves a weight of
# the softmax by 6e-4 in rows where two keys contend: float32 storage cannot keep 1e-5 elementwise there (3.7e-5 is
# the worst of 32 seeds and shapes). The 16-bit bars hold everywhere.
FLOAT32_BAR_AT_1000 = 1e-4


def exact(layer: ca.Attention, x, residual=None, **keywords) -> np.ndarray:
    """Return the reference's output before its last rounding, float64."""
    _, stages = reference.forward(layer.config, layer.weights, x, dtype=layer.dtype, **keywords)
    return stages["output"] + (0 if residual is None else residual.astype(np.float64))


def check(y, expected: np.ndarray, dtype: str, k_norm_max=96.5) -> None:
    """Hold y to both bars of its dtype."""
    y = to_numpy(y)
    assert str(y.dtype) == dtype
    beyond = dtype == "float32" and k_norm_max > 100
    assert relative_l2(y, expected) <= (FLOAT32_BAR_AT_1000 if beyond else BARS[dtype])
    assert max_error(y, expected) <= (FLOAT32_BAR_AT_1000 if beyond else MAX_ERROR_BARS[dtype])


# Against the reference.


@pytest.mark.parametrize("k_norm_max", [1.0, *K_NORM_MAXIMA])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_and_decode_within_the_bars(device, dtype, k_norm_max):
    layer = make_layer(dtype, device, k_norm_max=k_norm_max)
    x = make_hidden(CONFIG, 2, 40, dtype=dtype)
    expected = exact(layer, x)
    for y in (layer(x), in_chunks(layer, x, [30] + [1] * 10)):
        if device == "cuda" and dtype != "float32" and k_norm_max > 96.5:  # beyond the bars' range
            assert np.isfinite(y.astype(np.float32)).all()
        else:
            check(y, expected, dtype, k_norm_max)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_16_bit_result_is_the_references_but_for_the_last_rounding(dtype):
    """Where float32 arithmetic is exact enough, hardly a value may round to another neighbour."""
    layer = make_layer(dtype)
    x = make_hidden(CONFIG, 2, 40, dtype=dtype)
    y, expected = to_numpy(layer(x)), reference.forward(CONFIG, layer.weights, x)[0]
    if dtype != "float32":
        assert (y != expected).mean() < 0.02
    assert relative_l2(y, expected) < BARS[dtype] / 3


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("k_norm_max", [1.0, 96.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stage_within_the_bars(device, dtype, k_norm_max, threaded, request):
    if threaded:
        request.getfixturevalue("small_blocks")
    layer = make_layer(dtype, device, k_norm_max=k_norm_max)
    x = make_hidden(CONFIG, 2, 20, dtype=dtype)
    stages = {}
    y = layer(x, stages=stages)
    expected = reference.forward(CONFIG, layer.weights, x)[1]
    assert list(stages) == [name for name in reference.STAGES if name not in ("scores", "probs")]
    assert {to_numpy(value).dtype for value in stages.values()} == {np.dtype(np.float32)}
    # Kernels multiply float16 operands: what the 16-bit bars are for.
    bar = BARS[dtype] if dtype == "float32" or device == "cuda" else BARS[dtype] / 3
    for row in compare_stages(stages, expected, bar):
        assert row.passed, row
    assert relative_l2(y, to_numpy(stages["output"])) < BARS[dtype]


def test_stages_of_a_decode_step_are_of_the_new_token(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 2, 9)
    cache = layer.new_cache(2, 16)
    layer(x[:, :8], cache)
    past = (to_numpy(cache.k)[:, :8].copy(), to_numpy(cache.v)[:, :8].copy(), cache.positions[:, :8])
    stages = {}
    layer(x[:, 8:], cache, stages=stages)
    expected = reference.forward(CONFIG, layer.weights, x[:, 8:], past=past)[1]
    assert {n: to_numpy(s).shape for n, s in stages.items()} == {n: expected[n].shape for n in stages}
    assert all(row.passed for row in compare_stages(stages, expected, BARS["float32"]))


SHAPES = [  # Hq, Hkv, D: groups of 1, 2, 4, 5, 8, 12, 16
    (3, 3, 16), (4, 2, 128), (8, 2, 80), (5, 1, 32), (10, 2, 2), (16, 2, 16), (12, 1, 64), (16, 1, 128), (1, 1, 2),
    (40, 8, 16), (64, 4, 8),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_group_and_head_dim(device, heads, kv_heads, head_dim, dtype):
    config = make_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, hidden_size=72)
    layer = make_layer(dtype, device, config=config)
    x = make_hidden(config, 2, 19, dtype=dtype)
    expected = exact(layer, x)
    check(layer(x), expected, dtype)
    check(in_chunks(layer, x, [11, 1, 1, 6]), expected, dtype)


@pytest.mark.parametrize("hidden_size", [1, 7, 97])
def test_odd_hidden_sizes(device, hidden_size):
    config = make_config(hidden_size=hidden_size)
    layer = make_layer("float32", device, config=config)
    x = make_hidden(config, 2, 5)
    check(layer(x), exact(layer, x), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases(device, dtype):
    config = make_config(attention_bias=True)
    layer = make_layer(dtype, device, config=config)
    x = make_hidden(config, 2, 12, dtype=dtype)
    expected = exact(layer, x)
    check(in_chunks(layer, x, [9, 1, 2]), expected, dtype)


def test_a_single_token(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 3, 1)
    check(layer(x), exact(layer, x), "float32")


# Chunks, batches, padding.

CHUNKINGS = [
    [33], [1] * 33, [1, 32], [32, 1], [8, 8, 8, 9], [7, 1, 9, 16], [16, 17], [2, 3, 5, 7, 11, 5], [9, 1, 1, 1, 21],
]  # fmt: skip


@pytest.mark.parametrize("sizes", CHUNKINGS, ids=lambda s: "+".join(map(str, s)) if len(s) < 8 else "ones")
@pytest.mark.parametrize("k_norm_max", [1.0, 96.5])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_chunks_are_the_whole(device, small_blocks, sizes, k_norm_max, dtype):
    layer = make_layer(dtype, device, k_norm_max=k_norm_max)
    x = make_hidden(CONFIG, 2, 33, dtype=dtype)
    check(in_chunks(layer, x, sizes), exact(layer, x), dtype)


@pytest.mark.parametrize("seq", [7, 8, 9, 15, 16, 17, 24, 25])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_lengths_around_the_edges_of_blocks(small_blocks, monkeypatch, seq, workers):
    monkeypatch.setattr(cpu, "workers", lambda: workers)
    layer = make_layer()
    x = make_hidden(CONFIG, 2, seq)
    check(layer(x), exact(layer, x), "float32")


@pytest.mark.parametrize("seq", [200, 300])
def test_the_blocks_as_they_are(device, seq):
    """300 tokens take the threaded path of the CPU backend as users have it, and more than one block of queries."""
    config = make_config(num_attention_heads=8)
    layer = make_layer("float32", device, config=config)
    x = make_hidden(config, 2, seq)
    check(layer(x), exact(layer, x), "float32")


def test_a_batch_is_its_sequences_one_by_one(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 4, 21)
    cache = layer.new_cache(4, 32)
    together = [to_numpy(layer(x[:, :20], cache)), to_numpy(layer(x[:, 20:], cache))]
    for b in range(4):
        alone = layer.new_cache(1, 32)
        for part, got in zip((x[b : b + 1, :20], x[b : b + 1, 20:]), together, strict=True):
            assert relative_l2(got[b : b + 1], to_numpy(layer(part, alone))) < 2e-6


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unequal_lengths(device, dtype, threaded, request):
    if threaded:
        request.getfixturevalue("small_blocks")
    layer = make_layer(dtype, device)
    x = make_hidden(CONFIG, 4, 20, dtype=dtype)
    residual = make_hidden(CONFIG, 4, 20, seed=2, dtype=dtype)
    first, then = np.array([9, 0, 13, 1]), np.array([7, 5, 0, 1])
    cache = layer.new_cache(4, 24)
    outputs = []
    for counts, rows in ((first, slice(0, 13)), (then, slice(13, 20))):
        part, res = x[:, rows].copy(), residual[:, rows].copy()
        for b, n in enumerate(counts):
            part[b, n:] = res[b, n:] = np.nan  # padding must not matter
        outputs.append(to_numpy(layer(part, cache, num_tokens=counts, residual=res)))
    assert cache.lengths.tolist() == [16, 5, 13, 2]
    for b in range(4):
        tokens = np.concatenate([x[b, : first[b]], x[b, 13 : 13 + then[b]]])[None]
        res = np.concatenate([residual[b, : first[b]], residual[b, 13 : 13 + then[b]]])[None]
        got = np.concatenate([outputs[0][b, : first[b]], outputs[1][b, : then[b]]])[None]
        check(got, exact(layer, tokens, res), dtype)
        assert not outputs[0][b, first[b] :].any()
        assert not outputs[1][b, then[b] :].any()


def test_stages_of_padding_are_zero(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 2, 6)
    x[0, 2:] = np.nan
    stages = {}
    layer(x, num_tokens=[2, 6], stages=stages)
    for name, value in stages.items():
        value = to_numpy(value)
        padding = value[0, :, 2:] if name in ("row_max", "lse") else value[0, 2:]
        assert not padding.any(), name
        assert np.isfinite(value).all(), name


def test_no_tokens_at_all_is_no_work(device):
    layer = make_layer("float32", device)
    cache = layer.new_cache(2, 4)
    y = layer(np.full((2, 3, 96), np.nan, np.float32), cache, num_tokens=[0, 0])
    assert not to_numpy(y).any()
    assert cache.lengths.tolist() == [0, 0]


# Sliding windows.


@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 34, 1000])
@pytest.mark.parametrize("sizes", [[33], [16, 16, 1], [20] + [1] * 13])
def test_sliding_windows(device, small_blocks, window, sizes):
    config = make_config(use_sliding_window=True, sliding_window=window, max_window_layers=0)
    layer = make_layer("float32", device, config=config)
    x = make_hidden(config, 2, 33)
    assert layer.sliding_window == window
    check(in_chunks(layer, x, sizes), exact(layer, x), "float32")


def test_a_window_of_one_sees_itself_only(device):
    config = make_config(use_sliding_window=True, sliding_window=1, max_window_layers=0)
    layer = make_layer("float32", device, config=config)
    stages = {}
    layer(make_hidden(config, 1, 9), stages=stages)
    v = to_numpy(stages["v"]).repeat(config.group, axis=2)
    np.testing.assert_allclose(to_numpy(stages["attention"]), v, rtol=1e-6)


def test_a_window_longer_than_everything_is_no_window(device):
    config = make_config(use_sliding_window=True, sliding_window=33, max_window_layers=0)
    x = make_hidden(CONFIG, 1, 33)
    assert same_bits(make_layer("float32", device, config=config)(x), make_layer("float32", device)(x))


def test_a_window_counts_positions_not_tokens(device):
    config = make_config(use_sliding_window=True, sliding_window=5, max_window_layers=0)
    layer = make_layer("float32", device, config=config)
    x = make_hidden(config, 1, 8)
    positions = [0, 3, 4, 8, 9, 20, 24, 25]
    check(layer(x, positions=positions), exact(layer, x, positions=np.array(positions)), "float32")


def test_only_sliding_layers_slide():
    config = make_config(use_sliding_window=True, sliding_window=4, layer_types=[FULL, SLIDING, FULL, FULL])
    x = make_hidden(config, 1, 12)
    for index, window in ((0, None), (1, 4)):
        weights = make_weights(config, layer=index)
        layer = ca.Attention(config, weights, "float32", "cpu")
        assert layer.sliding_window == window
        check(layer(x), exact(layer, x), "float32")


# Positions.


@pytest.mark.parametrize("positions", [range(100, 112), [0, 1, 5, 6, 7, 50, 51, 500, 1000, 2000, 4000, 4095]])
def test_positions_with_an_offset_and_gaps(device, positions):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 2, 12)
    positions = np.array(positions)
    expected = exact(layer, x, positions=positions)
    check(layer(x, positions=positions), expected, "float32")
    cache = layer.new_cache(2, 12)
    got = [to_numpy(layer(x[:, i : i + 3], cache, positions=positions[i : i + 3].tolist())) for i in range(0, 12, 3)]
    check(np.concatenate(got, 1), expected, "float32")
    assert cache.positions[0].tolist() == positions.tolist()
    assert cache.next_positions().tolist() == [positions[-1] + 1] * 2


def test_positions_of_each_sequence(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 2, 6)
    positions = np.array([[0, 1, 2, 3, 4, 5], [7, 9, 11, 100, 101, 102]])
    check(layer(x, positions=positions), exact(layer, x, positions=positions), "float32")


def test_positions_of_padding_are_not_read(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 2, 4)
    cache = layer.new_cache(2, 8)
    y = layer(x, cache, positions=[[5, 6, -1, 99999], [0, 1, 2, 3]], num_tokens=[2, 4])
    check(to_numpy(y)[:1, :2], exact(layer, x[:1, :2], positions=np.array([5, 6])), "float32")
    assert cache.next_positions().tolist() == [7, 4]


def test_default_positions_count_on_after_a_gap(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 1, 5)
    cache = layer.new_cache(1, 8)
    layer(x[:, :2], cache, positions=[3, 10])
    layer(x[:, 2:], cache)
    assert cache.positions[0, :5].tolist() == [3, 10, 11, 12, 13]


@pytest.mark.parametrize("angles", ["float64", "float32"])
def test_angles_at_the_far_end_of_a_long_context(device, angles):
    config = make_config(max_position_embeddings=1_000_000)
    layer = make_layer("float32", device, config=config, angles=angles)
    x = make_hidden(config, 1, 8)
    positions = np.array([0, 1, 500_000, 999_990, 999_991, 999_997, 999_998, 999_999])
    # The table's entries are float32: what is lost is 2^-24 of each, not of the angle.
    check(layer(x, positions=positions), exact(layer, x, positions=positions, angles=angles), "float32")


# Dynamic RoPE.


def held(cache, sequences: slice, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return copies of the first cached tokens; taking ``cache.k`` would make the layer rotate all keys anew."""
    k, v = (to_numpy(a).transpose(0, 2, 1, 3)[sequences, :count].copy() for a in (cache.k_heads, cache.v_heads))
    return k, v, cache.positions[sequences, :count]


@pytest.mark.parametrize("sizes", [[30] + [1] * 15, [20, 25], [45], [32, 1, 12]])
def test_dynamic_rope_past_its_length(device, sizes):
    """Each call rotates all keys, old ones too, at the frequencies of the length it reaches."""
    config = make_config(max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    layer = make_layer("float32", device, config=config)
    x = make_hidden(config, 2, 45)
    cache = layer.new_cache(2, 64)
    for n, end in zip(sizes, np.cumsum(sizes), strict=True):
        past = held(cache, slice(None), int(cache.lengths[0]))
        part = x[:, end - n : end]
        check(layer(part, cache), exact(layer, part, past=past), "float32")


def test_dynamic_rope_of_sequences_on_either_side_of_its_length(device):
    config = make_config(max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    layer = make_layer("float32", device, config=config)
    x = make_hidden(config, 2, 40)
    cache = layer.new_cache(2, 64)
    y = to_numpy(layer(x, cache, num_tokens=[10, 40]))
    check(y[:1, :10], exact(layer, x[:1, :10]), "float32")
    check(y[1:], exact(layer, x[1:]), "float32")
    cache.truncate([10, 20])  # back below the length: its frequencies are the plain ones again
    step = make_hidden(config, 2, 1, seed=5)
    got = to_numpy(layer(step, cache))  # what it appends lies past what ``held`` copies
    for b, have in ((0, 10), (1, 20)):
        past = held(cache, slice(b, b + 1), have)
        check(got[b : b + 1], exact(layer, step[b : b + 1], past=past), "float32")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_other_rope_kinds(device, rope):
    config = make_config(rope_scaling=rope, rope_theta=10_000.0)
    layer = make_layer("float32", device, config=config)
    x = make_hidden(config, 2, 40)
    check(in_chunks(layer, x, [35, 1, 4]), exact(layer, x), "float32")


# residual, out, stages, input arrays.


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_added_before_the_rounding(device, dtype):
    layer = make_layer(dtype, device)
    x, residual = make_hidden(CONFIG, 2, 9, dtype=dtype), make_hidden(CONFIG, 2, 9, seed=3, dtype=dtype)
    check(layer(x, residual=residual), exact(layer, x, residual), dtype)


@pytest.mark.parametrize("target", ["x", "residual", "fresh"])
def test_out_may_be_x_or_the_residual(device, target):
    layer = make_layer("float16", device)
    x = make_hidden(CONFIG, 2, 9, dtype="float16")
    expected = to_numpy(layer(x, residual=x))
    arrays = {"x": x.copy(), "residual": x.copy(), "fresh": np.empty_like(x)}
    out = arrays[target]
    y = layer(arrays["x"], residual=arrays["residual"], out=out)
    assert y is out
    assert same_bits(out, expected)


def test_out_may_be_a_strided_view():
    layer = make_layer()
    x = make_hidden(CONFIG, 2, 9)
    wide = np.zeros((2, 18, 96), np.float32)
    layer(x, out=wide[:, ::2])
    assert same_bits(np.ascontiguousarray(wide[:, ::2]), layer(x))
    assert not wide[:, 1::2].any()


def test_x_may_be_a_strided_view(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 2, 18)
    assert same_bits(layer(x[:, ::2]), layer(np.ascontiguousarray(x[:, ::2])))


def test_x_is_not_written(device):
    layer = make_layer("float32", device)
    x = make_hidden(CONFIG, 2, 9)
    before = x.copy()
    x.flags.writeable = False
    layer(x, residual=x)
    assert same_bits(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_go_in(dtype):
    torch = pytest.importorskip("torch")
    layer = make_layer(dtype)
    x = make_hidden(CONFIG, 2, 9, dtype=dtype)
    tensor = torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype))
    positions = torch.arange(9)
    y = layer(tensor, residual=tensor, positions=positions, num_tokens=torch.tensor([9, 9]))
    assert isinstance(y, np.ndarray)
    assert same_bits(y, layer(x, residual=x))
    out = torch.empty_like(tensor)
    layer(tensor, residual=tensor, out=out)
    assert same_bits(out.float().numpy(), y.astype(np.float32))


def test_collecting_stages_does_not_move_the_result(device):
    layer = make_layer("float32", device, k_norm_max=1.0)
    x = make_hidden(CONFIG, 2, 30)
    assert same_bits(layer(x, stages={}), layer(x))


# Determinism.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq", [1, 30, 300])
def test_the_same_call_gives_the_same_bits(device, dtype, seq):
    layer = make_layer(dtype, device)
    x, past = make_hidden(CONFIG, 2, seq, dtype=dtype), make_hidden(CONFIG, 2, 5, seed=2, dtype=dtype)
    results = []
    for _ in range(3):
        cache = layer.new_cache(2, seq + 5)
        layer(past, cache)
        y = layer(x, cache)
        results.append(b"".join(to_numpy(a).tobytes() for a in (y, cache.k_heads, cache.v_heads)))
    assert results[0] == results[1] == results[2]


def test_a_layer_made_anew_gives_the_same_bits(device):
    x = make_hidden(CONFIG, 2, 30)
    assert same_bits(make_layer("float32", device)(x), make_layer("float32", device)(x))


@pytest.mark.parametrize("k_norm_max", [96.5, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_nan_or_inf_whatever_the_weights(device, dtype, k_norm_max):
    config = make_config(head_dim=128)
    layer = make_layer(dtype, device, config=config, k_norm_max=k_norm_max)
    x = make_hidden(config, 2, 20, dtype=dtype)
    x[0, 3] = 0  # a row whose mean square is nothing but eps
    x[1, 2] *= np.asarray(100, x.dtype)
    stages = {}
    assert np.isfinite(to_numpy(layer(x, stages=stages)).astype(np.float32)).all()
    assert ca.check_collapse(stages) == []


def test_two_layers_take_turns(device):
    layers = [make_layer("float16", device, seed=seed) for seed in (0, 1)]
    x = make_hidden(CONFIG, 2, 12, dtype="float16")
    alone = [in_chunks(layer, x, [8, 1, 1, 2]) for layer in layers]
    caches = [layer.new_cache(2, 12) for layer in layers]
    got: list[list[np.ndarray]] = [[], []]
    for rows in (slice(0, 8), slice(8, 9), slice(9, 10), slice(10, 12)):
        for i, layer in enumerate(layers):
            got[i].append(to_numpy(layer(x[:, rows], caches[i])))
    for i in range(2):
        assert same_bits(np.concatenate(got[i], 1), alone[i])


# Shapes nobody thought of.


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    group=st.sampled_from([1, 2, 3, 5, 8]), kv_heads=st.integers(1, 3), half_dim=st.integers(1, 12),
    hidden=st.integers(1, 40), past=st.integers(0, 20), seq=st.integers(1, 20),
    window=st.sampled_from([None, 1, 3, 50]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_is_right(group, kv_heads, half_dim, hidden, past, seq, window, bias, seed):
    config = make_config(
        hidden_size=hidden, num_attention_heads=group * kv_heads, num_key_value_heads=kv_heads, head_dim=2 * half_dim,
        attention_bias=bias, use_sliding_window=window is not None, sliding_window=window, max_window_layers=0,
    )  # fmt: skip
    layer = make_layer(config=config, k_norm_max=20.0, seed=seed)
    x = make_hidden(config, 2, past + seq, seed=seed)
    cache = layer.new_cache(2, past + seq)
    if past:
        layer(x[:, :past], cache)
    expected, _ = reference.forward(config, layer.weights, x)
    assert relative_l2(layer(x[:, past:], cache), expected[:, past:]) < BARS["float32"]


# One call.


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_from_plain_dicts(device, dtype):
    weights = make_weights(CONFIG, layer=2, dtype=dtype)
    x = make_hidden(CONFIG, 2, 9, dtype=dtype)
    layer = ca.Attention(CONFIG, weights, dtype, device)
    expected = to_numpy(layer(x, residual=x))
    y = ca.forward(x, CONFIG.to_dict(), weights.to_dict(CONFIG), layer=2, residual=x, device=device)
    assert same_bits(y, expected)
    assert same_bits(ca.forward(x, CONFIG, weights, residual=x, device=device), expected)


def test_forward_with_a_cache(device):
    weights = make_weights(CONFIG)
    x = make_hidden(CONFIG, 1, 9)
    layer = ca.Attention(CONFIG, weights, "float32", device)
    cache = layer.new_cache(1, 16)
    parts = [to_numpy(ca.forward(x[:, rows], CONFIG, weights, cache=cache, device=device))
             for rows in (slice(0, 5), slice(5, 6), slice(6, 9))]  # fmt: skip
    check(np.concatenate(parts, 1), exact(layer, x), "float32")
    assert cache.lengths.tolist() == [9]


def test_forward_converts_to_the_dtype_asked_for():
    weights, x = make_weights(CONFIG), make_hidden(CONFIG, 1, 5)
    y = ca.forward(x, CONFIG, weights, dtype="float16", device="cpu")
    assert same_bits(y, ca.Attention(CONFIG, weights, "float16", "cpu")(x.astype(np.float16)))
    with pytest.raises(ca.InputError, match="hidden_states is float64; convert it to one of float16, bfloat16"):
        ca.forward(x.astype(np.float64), CONFIG, weights, device="cpu")
