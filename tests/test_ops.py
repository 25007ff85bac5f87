"""Each public phase against plain float64 formulas written out here, and all of them chained against the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights
from hypothesis import given, settings
from hypothesis import strategies as st

import cupy_attn as ca
from cupy_attn import reference
from cupy_attn.accuracy import max_error, relative_l2

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
# One rounding of the result to its dtype (half an ulp), after float32 sums over at most a few hundred terms.
BARS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 1e-6, "float64": 1e-14}

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def random(seed: int, *shape: int, dtype="float32", scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(DTYPES[dtype])


def f64(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def check(got: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert got.dtype == DTYPES[dtype]
    assert got.shape == expected.shape
    assert max_error(got, expected) <= BARS[dtype]


# One phase at a time.


@every_dtype
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 4, 6)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_rms_norm(dtype, shape, scale):
    x, w = random(0, *shape, dtype=dtype, scale=scale), random(1, shape[-1], dtype=dtype)
    expected = np.empty(shape)
    for index in np.ndindex(shape[:-1]):
        row = f64(x[index])
        expected[index] = row / np.sqrt((row**2).mean() + 1e-6) * f64(w)
    check(ca.rms_norm(x, w, 1e-6), expected, dtype)


def test_rms_norm_eps_is_added_to_the_mean_square():
    x = np.full((1, 4), 2e-3)
    np.testing.assert_allclose(ca.rms_norm(x, np.ones(4), eps=4e-6), x / np.sqrt(8e-6), rtol=1e-14)
    assert not ca.rms_norm(np.zeros((1, 4)), np.ones(4)).any()


def test_rms_norm_of_float16_does_not_overflow():
    x = np.full((1, 8), 60000, np.float16)
    np.testing.assert_array_equal(ca.rms_norm(x, np.ones(8, np.float16)), np.ones((1, 8), np.float16))


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_project_qkv(dtype, bias):
    x, w = random(0, 2, 5, 24, dtype=dtype), random(1, 32, 24, dtype=dtype)
    b = random(2, 32, dtype=dtype) if bias else None
    expected = np.einsum("bsi,oi->bso", f64(x), f64(w)) + (f64(b) if bias else 0)
    check(ca.project_qkv(x, w, b), expected, dtype)


def test_split_heads_gives_views_of_q_then_k_then_v():
    qkv = random(0, 2, 5, (6 + 2 * 3) * 4)
    q, k, v = ca.split_heads(qkv, 6, 3, 4)
    assert (q.shape, k.shape, v.shape) == ((2, 5, 6, 4), (2, 5, 3, 4), (2, 5, 3, 4))
    for part in (q, k, v):
        assert np.shares_memory(part, qkv)
    np.testing.assert_array_equal(q[1, 2, 5], qkv[1, 2, 20:24])
    np.testing.assert_array_equal(k[1, 2, 0], qkv[1, 2, 24:28])
    np.testing.assert_array_equal(v[1, 2, 2], qkv[1, 2, 44:48])


@every_dtype
def test_qk_norm_is_rms_norm_of_each_head(dtype):
    q, k = random(0, 2, 5, 4, 8, dtype=dtype), random(1, 2, 5, 2, 8, dtype=dtype)
    wq, wk = random(2, 8, dtype=dtype), random(3, 8, dtype=dtype, scale=96.5)
    got_q, got_k = ca.qk_norm(q, k, wq, wk)
    for got, x, w in ((got_q, q, wq), (got_k, k, wk)):
        expected = f64(x) / np.sqrt((f64(x) ** 2).mean(-1, keepdims=True) + 1e-6) * f64(w)
        check(got, expected, dtype)


@every_dtype
@pytest.mark.parametrize("head_dim", [2, 6, 128])
def test_apply_rope_is_a_complex_rotation_of_pairs_half_a_head_apart(dtype, head_dim):
    x = random(0, 2, 7, 3, head_dim, dtype=dtype)
    angles = np.random.default_rng(1).uniform(-10, 10, (7, head_dim // 2))
    half = head_dim // 2
    turned = (f64(x[..., :half]) + 1j * f64(x[..., half:])) * np.exp(1j * angles)[None, :, None]
    got = ca.apply_rope(x, np.cos(angles), np.sin(angles))
    check(got, np.concatenate([turned.real, turned.imag], -1), dtype)


def test_apply_rope_takes_angles_of_each_sequence():
    x = random(0, 2, 3, 1, 4, dtype="float64")
    angles = np.random.default_rng(1).uniform(-3, 3, (2, 3, 2))
    got = ca.apply_rope(x, np.cos(angles), np.sin(angles))
    for b in range(2):
        np.testing.assert_array_equal(got[b], ca.apply_rope(x[b], np.cos(angles[b]), np.sin(angles[b])))


def plain_attention(q, k, v, *, q_pos=None, k_pos=None, window=None, scale=None) -> np.ndarray:
    """One query, one head at a time, in float64."""
    batch, seq, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    k_pos = np.broadcast_to(np.arange(keys) if k_pos is None else k_pos, (batch, keys))
    q_pos = np.broadcast_to(np.arange(keys - seq, keys) if q_pos is None else q_pos, (batch, seq))
    scale = 1 / np.sqrt(dim) if scale is None else scale
    out = np.zeros(q.shape)
    for b, s, h in np.ndindex(batch, seq, heads):
        seen = [t for t in range(keys) if k_pos[b, t] <= q_pos[b, s]]
        seen = [t for t in seen if window is None or q_pos[b, s] - k_pos[b, t] < window]
        if not seen:
            continue
        kv_head = h // (heads // kv_heads)
        scores = np.array([f64(q[b, s, h]) @ f64(k[b, t, kv_head]) * scale for t in seen])
        p = np.exp(scores - scores.max())
        out[b, s, h] = (p / p.sum()) @ f64(v[b, seen, kv_head])
    return out


@every_dtype
@pytest.mark.parametrize("window", [None, 1, 3])
def test_gqa_attention(dtype, window):
    q, k, v = (random(i, 2, n, h, 8, dtype=dtype) for i, (n, h) in enumerate([(4, 6), (7, 2), (7, 2)]))
    got = ca.gqa_attention(q, k, v, sliding_window=window)
    check(got, plain_attention(q, k, v, window=window), dtype)


def test_gqa_attention_with_positions_scale_and_nothing_to_see():
    q, k, v = (random(i, 2, n, 2, 8, dtype="float64") for i, n in enumerate((3, 5, 5)))
    q_pos, k_pos = np.array([[1, 2, 30], [9, 10, 11]]), np.array([2, 5, 8, 10, 20])
    got = ca.gqa_attention(q, k, v, q_positions=q_pos, k_positions=k_pos, scale=0.5, sliding_window=9)
    check(got, plain_attention(q, k, v, q_pos=q_pos, k_pos=k_pos, scale=0.5, window=9), "float64")
    assert not got[0, 0].any()  # position 1 sees no key
    assert not got[0, 2].any()  # position 30 has left every key behind


def test_gqa_attention_survives_scores_beyond_exp():
    """exp(1000) does not exist; the row maximum is subtracted first."""
    q, k, v = (random(i, 1, 6, 2, 16) for i in range(3))
    got = ca.gqa_attention(q * 300, k * 300, v)
    assert np.isfinite(got).all()
    assert relative_l2(got, plain_attention(q * 300, k * 300, v)) < 1e-4


@every_dtype
@pytest.mark.parametrize("extras", ["", "bias", "residual", "bias residual"])
def test_project_output(dtype, extras):
    attention, w = random(0, 2, 5, 4, 8, dtype=dtype), random(1, 24, 32, dtype=dtype)
    b = random(2, 24, dtype=dtype) if "bias" in extras else None
    residual = random(3, 2, 5, 24, dtype=dtype) if "residual" in extras else None
    expected = np.einsum("bsi,oi->bso", f64(attention).reshape(2, 5, 32), f64(w))
    expected = expected + (0 if b is None else f64(b)) + (0 if residual is None else f64(residual))
    got = ca.project_output(attention, w, b, residual)
    assert got.dtype == DTYPES[dtype]
    assert max_error(got, expected) <= BARS[dtype] * (2 if residual is not None else 1)  # rounded before and after


# Chained.


def chained(config, weights, x, *, window=None) -> np.ndarray:
    positions = np.arange(x.shape[1])
    h = ca.rms_norm(x, weights.input_norm, config.rms_norm_eps)
    qkv = ca.project_qkv(h, weights.qkv_proj, weights.qkv_bias)
    q, k, v = ca.split_heads(qkv, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    q, k = ca.qk_norm(q, k, weights.q_norm, weights.k_norm, config.rms_norm_eps)
    cos, sin = ca.rope_angles(config, positions)
    q, k = ca.apply_rope(q, cos, sin), ca.apply_rope(k, cos, sin)
    return ca.project_output(ca.gqa_attention(q, k, v, sliding_window=window), weights.o_proj, weights.o_bias)


@pytest.mark.parametrize("bias", [False, True])
def test_chained_phases_are_the_layer(bias):
    config = make_config(attention_bias=bias)
    weights = make_weights(config, k_norm_max=96.5)
    x = make_hidden(config, 2, 20)
    _, stages = reference.forward(config, weights, x)
    assert relative_l2(chained(config, weights, x), stages["output"]) < 1e-5
    # In float64 the two share no code but rope_angles; what differs is that the reference stores float32 K and V.
    assert relative_l2(chained(config, weights, x.astype(np.float64)), stages["output"]) < 1e-6


def test_chained_phases_with_a_window():
    config = make_config(use_sliding_window=True, sliding_window=5, max_window_layers=0)
    weights = make_weights(config, k_norm_max=96.5)
    x = make_hidden(config, 2, 20)
    _, stages = reference.forward(config, weights, x)
    assert relative_l2(chained(config, weights, x, window=5), stages["output"]) < 1e-5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    group=st.sampled_from([1, 2, 3, 5, 8, 16]),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 32).map(lambda n: 2 * n),
    batch=st.integers(1, 2),
    new=st.integers(1, 6),
    past=st.integers(0, 9),
    window=st.one_of(st.none(), st.integers(1, 16)),
    seed=st.integers(0, 2**32 - 1),
)
def test_gqa_attention_for_any_shape(group, kv_heads, head_dim, batch, new, past, window, seed):
    q = random(seed, batch, new, group * kv_heads, head_dim)
    k, v = (random(seed + i, batch, past + new, kv_heads, head_dim) for i in (1, 2))
    got = ca.gqa_attention(q, k, v, sliding_window=window)
    assert max_error(got, plain_attention(q, k, v, window=window)) < 2e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    group=st.sampled_from([1, 2, 3, 5, 8, 16]),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 32).map(lambda n: 2 * n),
    hidden_size=st.integers(1, 40),
    seq=st.integers(1, 9),
    window=st.one_of(st.none(), st.integers(1, 10)),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_chained_phases_for_any_shape(group, kv_heads, head_dim, hidden_size, seq, window, bias, seed):
    config = make_config(
        hidden_size=hidden_size, num_attention_heads=group * kv_heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        use_sliding_window=window is not None, sliding_window=window, max_window_layers=0, attention_bias=bias,
    )  # fmt: skip
    weights = make_weights(config, k_norm_max=20.0, seed=seed)
    x = make_hidden(config, 1, seq, seed=seed)
    _, stages = reference.forward(config, weights, x)
    got = chained(config, weights, x.astype(np.float64), window=window)
    assert relative_l2(got, stages["output"]) < 1e-5


# Refusals.


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z: ca.rms_norm(z(2, 8), z(7)), "rms_norm: x is [2, 8] and weight [7]"),
        (lambda z: ca.rms_norm(z(2, 8), z(1)), "rms_norm: x is [2, 8] and weight [1]"),
        (lambda z: ca.rms_norm(z(2, 8), z(2, 8)), "rms_norm: x is [2, 8] and weight [2, 8]"),
        (lambda z: ca.project_qkv(z(2, 8), z(8, 12)), "project_qkv: x is [2, 8], the weight [8, 12]"),
        (lambda z: ca.project_qkv(z(2, 8), z(12, 8), z(8)), "x is [2, 8], the weight [12, 8], the bias [8]"),
        (lambda z: ca.split_heads(z(2, 20), 4, 2, 3), "rows have 20 columns, 4 + 2 x 2 heads of 3 need 24"),
        (lambda z: ca.qk_norm(z(2, 4, 8), z(2, 2, 8), z(8), z(4)), "rms_norm: x is [2, 2, 8] and weight [4]"),
        (lambda z: ca.apply_rope(z(5, 2, 8), z(5, 8), z(5, 8)), "here [5, 4]"),
        (lambda z: ca.apply_rope(z(5, 2, 8), z(4, 4), z(4, 4)), "here [5, 4]"),
        (lambda z: ca.apply_rope(z(5, 2, 8), z(5, 4), z(5, 3)), "here [5, 4]"),
        (lambda z: ca.gqa_attention(z(1, 2, 4, 8), z(1, 5, 3, 8), z(1, 5, 3, 8)), "with Hq a multiple of Hkv"),
        (lambda z: ca.gqa_attention(z(1, 2, 4, 8), z(1, 5, 2, 8), z(1, 6, 2, 8)), "k [1, 5, 2, 8], v [1, 6, 2, 8]"),
        (lambda z: ca.gqa_attention(z(2, 2, 4, 8), z(1, 5, 2, 8), z(1, 5, 2, 8)), "gqa_attention: q is [2, 2, 4, 8]"),
        (lambda z: ca.gqa_attention(z(1, 2, 4, 8), z(1, 5, 2, 6), z(1, 5, 2, 6)), "gqa_attention: q is [1, 2, 4, 8]"),
        (lambda z: ca.project_output(z(2, 4, 8), z(24, 31)), "project_output: x is [2, 32], the weight [24, 31]"),
        (lambda z: ca.project_output(z(2, 4, 8), z(24, 32), z(23)), "the bias [23]"),
        (lambda z: ca.project_output(z(2, 4, 8), z(24, 32), None, z(3, 2, 24)), "residual is [3, 2, 24]"),
        (lambda z: ca.rms_norm(z(2, 8).astype(np.int32), z(8)), "rms_norm: x is int32; convert it to a float dtype"),
        (lambda z: ca.apply_rope(z(2, 8), z(2, 4), z(2, 4)), "x is [2, 8]; it must be [..., S, heads, D]"),
        (lambda z: ca.gqa_attention(z(1, 2, 4, 8), z(1, 5, 2, 8), z(1, 5, 2, 8), k_positions=np.arange(4)),
         "k_positions is [4]; make it [5] or [1, 5]"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ca.InputError) as caught:
        call(lambda *shape: np.ones(shape, np.float32))
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_phases_take_torch_tensors(dtype):
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    weight = torch.ones(8).to(x.dtype)
    got = ca.rms_norm(x, weight)
    want = ca.rms_norm(x.float().numpy(), np.ones(8, np.float32))
    assert str(got.dtype) == dtype
    assert relative_l2(got, want) < (1e-6 if dtype == "float32" else 4e-3)
