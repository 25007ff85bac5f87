"""Mistakes that are easy to make and hard to see: each is computed here, and must be far from the layer.

The layer in plain float64 NumPy, independent of reference.py, with every wrong order of operations as an option.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights

import cupy_attn as ca
from cupy_attn.accuracy import BARS, relative_l2
from cupy_attn.arrays import to_numpy

CONFIG = make_config(num_attention_heads=6)  # three query heads a KV head: h % Hkv and h // G differ
SEQ = 24


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def layer_norm(x, weight):
    return rms_norm(x - x.mean(-1, keepdims=True), weight)


def rope(x, *, pairs="halves", theta=1e6, first=0):
    """Rotate x [B, S, heads, D] as complex numbers: pairs (i, i + D/2), or (2i, 2i + 1) as other models have."""
    dim = x.shape[-1]
    angles = (first + np.arange(x.shape[1]))[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    turn = np.exp(1j * angles)[None, :, None]
    if pairs == "halves":
        turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def layer_in_numpy(weights, x, wrong=None) -> np.ndarray:
    """Return the layer's output, float64; ``wrong`` names what to get wrong."""
    c = CONFIG
    w = {name: tensor.astype(np.float64) for name, tensor in weights.tensors().items()}
    h = x.astype(np.float64)
    if wrong != "no input norm":
        h = (layer_norm if wrong == "input LayerNorm" else rms_norm)(h, w["input_norm"])
    q, k, v = np.split(h @ w["qkv_proj"].T, [c.q_size, c.q_size + c.kv_size], -1)
    if wrong == "k and v swapped":
        k, v = v, k
    q, k, v = (a.reshape(*a.shape[:2], -1, c.head_dim) for a in (q, k, v))

    norm = layer_norm if wrong == "head LayerNorm" else rms_norm
    w_q, w_k = w["q_norm"], w["k_norm"]
    if wrong == "q and k norms swapped":
        w_q, w_k = w_k, w_q
    if wrong == "norm weight clipped":
        w_k = w_k.clip(-20, 20)
    pairs = "neighbours" if wrong == "interleaved RoPE" else "halves"
    theta = 10_000.0 if wrong == "RoPE theta of other models" else 1e6
    if wrong == "norm after RoPE":
        q, k = norm(rope(q), w_q), norm(rope(k), w_k)
    else:
        if wrong == "norm over all heads":
            shape_q, shape_k = q.shape, k.shape
            q = norm(q.reshape(*q.shape[:2], -1), np.tile(w_q, shape_q[2])).reshape(shape_q)
            k = norm(k.reshape(*k.shape[:2], -1), np.tile(w_k, shape_k[2])).reshape(shape_k)
        else:
            q = q if wrong == "no Q norm" else norm(q, w_q)
            k = k if wrong == "no K norm" else norm(k, w_k)
        if wrong == "norm twice":
            k = norm(k, w_k)
        q = rope(q, pairs=pairs, theta=theta)
        if wrong != "K not rotated":
            k = rope(k, pairs=pairs, theta=theta, first=int(wrong == "K one position on"))

    heads, group = np.arange(c.num_attention_heads), c.group
    kv_head = heads % c.num_key_value_heads if wrong == "h % Hkv" else heads // group
    scores = np.einsum("bshd,bthd->bhst", q, k[:, :, kv_head])
    scores /= {"no scale": 1, "scale 1 / D": c.head_dim}.get(wrong, np.sqrt(c.head_dim))
    position = np.arange(SEQ)
    ahead = {"sees one token ahead": 1, "does not see itself": -1, "not causal": SEQ}.get(wrong, 0)
    visible = position[None, :] <= position[:, None] + ahead
    visible[0, 0] = True
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    attention = np.einsum("bhst,bthd->bshd", p, v[:, :, kv_head])
    if wrong == "heads joined in the wrong order":
        attention = attention.transpose(0, 1, 3, 2)
    return attention.reshape(*x.shape[:2], -1) @ w["o_proj"].T


WRONG = [
    "norm after RoPE", "norm twice", "no Q norm", "no K norm", "norm over all heads", "norm weight clipped",
    "q and k norms swapped", "head LayerNorm", "input LayerNorm", "no input norm", "interleaved RoPE",
    "RoPE theta of other models", "K not rotated", "K one position on", "h % Hkv", "no scale", "scale 1 / D",
    "sees one token ahead", "does not see itself", "not causal", "k and v swapped", "heads joined in the wrong order",
]  # fmt: skip


def run(device: str, dtype: str, k_norm_max: float):
    weights = make_weights(CONFIG, k_norm_max=k_norm_max, dtype=dtype)
    x = make_hidden(CONFIG, 2, SEQ, dtype=dtype)
    return weights, x, to_numpy(ca.Attention(CONFIG, weights, dtype, device)(x))


@pytest.mark.parametrize("k_norm_max", [44.5, 96.5])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_right_form_is_the_layer(device, dtype, k_norm_max):
    weights, x, y = run(device, dtype, k_norm_max)
    # The layer rounds K and V to storage, this form does not: at bfloat16 that alone is 2^-9 of each score.
    assert relative_l2(y, layer_in_numpy(weights, x)) <= (BARS[dtype] if dtype == "float32" else 10 * BARS[dtype])


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("k_norm_max", [44.5, 96.5])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_wrong_form_is_not_the_layer(device, dtype, k_norm_max, wrong):
    weights, x, y = run(device, dtype, k_norm_max)
    assert relative_l2(y, layer_in_numpy(weights, x, wrong)) > 100 * BARS[dtype]
