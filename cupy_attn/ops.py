"""The phases of the layer as plain array functions, for NumPy and CuPy arrays alike.

Each computes in float32 (float64 for float64 arrays) and returns the dtype of its first argument, so chained on
16-bit arrays they are the layer as separate library operations, and on float32 arrays an almost exact one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import STORAGE_DTYPES, as_array, namespace
from .errors import InputError


def rms_norm(x: Any, weight: Any, eps: float = 1e-6) -> Any:
    """Scale each row of x to unit root mean square, then by weight.

    ``y[..., i] = x[..., i] / sqrt(mean_i(x[..., i]^2) + eps) * weight[i]``, rounded once, at the end.

    Parameters
    ----------
    x : array [..., N]
        NumPy or CuPy; float16, bfloat16, float32 or float64.
    weight : array [N]
        Any float dtype.
    eps : float
        In units of x^2; Qwen3 has 1e-6.

    Returns
    -------
    array [..., N]
        Of x's dtype.

    Raises
    ------
    InputError
        The shapes do not fit.

    Notes
    -----
    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    x, weight = _floats("rms_norm", x=x, weight=weight)
    xp = namespace(x, weight)
    if weight.ndim != 1 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise InputError(
            f"rms_norm: x is {list(x.shape)} and weight {list(weight.shape)}; weight must match x's last axis."
        )
    real = _compute_dtype(x)
    wide = x.astype(real, copy=False)
    mean_square = xp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide / xp.sqrt(mean_square + real(eps)) * weight.astype(real, copy=False)).astype(x.dtype, copy=False)


def project_qkv(x: Any, qkv_proj: Any, qkv_bias: Any = None) -> Any:
    """Project normalised hidden states to queries, keys and values in one product: ``x @ qkv_proj.T (+ bias)``.

    Parameters
    ----------
    x : array [..., H]
        Output of :func:`rms_norm`.
    qkv_proj : array [(Hq + 2 Hkv) D, H]
        Rows of q_proj, then k_proj, then v_proj: ``AttentionWeights.qkv_proj``.
    qkv_bias : array [(Hq + 2 Hkv) D], optional
        ``AttentionWeights.qkv_bias``.

    Returns
    -------
    array [..., (Hq + 2 Hkv) D]
        Of x's dtype.
    """
    return _linear("project_qkv", x, qkv_proj, qkv_bias)


def split_heads(qkv: Any, num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> tuple[Any, Any, Any]:
    """Cut the projected rows into heads, without a copy.

    Parameters
    ----------
    qkv : array [..., (Hq + 2 Hkv) D]
        Output of :func:`project_qkv`.
    num_attention_heads, num_key_value_heads, head_dim : int
        Hq, Hkv, D.

    Returns
    -------
    q, k, v : arrays [..., Hq, D], [..., Hkv, D], [..., Hkv, D]
        Views of qkv.
    """
    (qkv,) = _floats("split_heads", qkv=qkv)
    total = num_attention_heads + 2 * num_key_value_heads
    if qkv.shape[-1] != total * head_dim:
        raise InputError(
            f"split_heads: rows have {qkv.shape[-1]} columns, {num_attention_heads} + 2 x {num_key_value_heads} heads "
            f"of {head_dim} need {total * head_dim}; pass the model's head counts and head_dim."
        )
    heads = qkv.reshape(*qkv.shape[:-1], total, head_dim)
    last_q, last_k = num_attention_heads, num_attention_heads + num_key_value_heads
    return heads[..., :last_q, :], heads[..., last_q:last_k, :], heads[..., last_k:, :]


def qk_norm(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float = 1e-6) -> tuple[Any, Any]:
    """Apply :func:`rms_norm` over D to every head of q and of k, before RoPE.

    Parameters
    ----------
    q, k : arrays [..., Hq, D], [..., Hkv, D]
        Projected queries and keys.
    q_weight, k_weight : arrays [D]
        Shared by all heads.
    eps : float
        In units of x^2.

    Returns
    -------
    q, k : arrays
        Of the same shapes and dtypes.
    """
    return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)


def apply_rope(x: Any, cos: Any, sin: Any) -> Any:
    """Rotate pairs (i, i + D/2) of every head by the angle of its token.

    ``y[i] = x[i] cos - x[i + D/2] sin``, ``y[i + D/2] = x[i + D/2] cos + x[i] sin``.

    Parameters
    ----------
    x : array [..., S, heads, D]
        Normalised queries or keys.
    cos, sin : arrays [S, D/2] or [..., S, D/2]
        From :func:`rope_angles`.

    Returns
    -------
    array [..., S, heads, D]
        Of x's dtype.

    Notes
    -----
    Su et al. 2021, arXiv:2104.09864, in the rotate-half layout of GPT-NeoX.
    """
    x, cos, sin = _floats("apply_rope", x=x, cos=cos, sin=sin)
    xp = namespace(x)
    if x.ndim < 3:
        raise InputError(f"apply_rope: x is {list(x.shape)}; it must be [..., S, heads, D].")
    half = x.shape[-1] // 2
    if cos.shape != sin.shape or cos.shape[-1] != half or (cos.ndim > 1 and cos.shape[-2] != x.shape[-3]):
        raise InputError(
            f"apply_rope: x is {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}; "
            f"cos and sin must be [S, D/2], here [{x.shape[-3]}, {half}]."
        )
    real = _compute_dtype(x)
    cos, sin = (xp.asarray(a).astype(real, copy=False)[..., None, :] for a in (cos, sin))
    x1, x2 = x[..., :half].astype(real, copy=False), x[..., half:].astype(real, copy=False)
    return xp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype, copy=False)


def gqa_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    q_positions: Any = None,
    k_positions: Any = None,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Any:
    """Causal grouped-query attention with materialised scores: ``softmax(scale q k^T) v``.

    Query head h reads KV head ``h // (Hq / Hkv)``. A key is seen where its position is at most the query's and,
    with a window, less than ``sliding_window`` behind it.

    Parameters
    ----------
    q : array [B, S, Hq, D]
        Rotated queries.
    k, v : arrays [B, T, Hkv, D]
        Rotated keys, values.
    q_positions, k_positions : arrays [S] or [B, S], [T] or [B, T] of int, optional
        Default: keys 0 .. T-1, queries the last S of them.
    sliding_window : int, optional
        Tokens a query sees, itself included.
    scale : float, optional
        Default 1 / sqrt(D).

    Returns
    -------
    array [B, S, Hq, D]
        Of q's dtype. A query that sees no key gets zeros.
    """
    q, k, v = _floats("gqa_attention", q=q, k=k, v=v)
    xp = namespace(q, k, v)
    batch, seq, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim or heads % kv_heads:
        raise InputError(
            f"gqa_attention: q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; k and v must be "
            "[B, T, Hkv, D] with Hq a multiple of Hkv."
        )
    real = _compute_dtype(q)
    k_pos = xp.arange(keys) if k_positions is None else xp.asarray(k_positions)
    q_pos = xp.arange(keys - seq, keys) if q_positions is None else xp.asarray(q_positions)
    for name, given, count in (("q_positions", q_pos, seq), ("k_positions", k_pos, keys)):
        if given.shape not in ((count,), (batch, count)):
            raise InputError(f"gqa_attention: {name} is {list(given.shape)}; make it [{count}] or [{batch}, {count}].")
    k_pos, q_pos = xp.broadcast_to(k_pos, (batch, keys)), xp.broadcast_to(q_pos, (batch, seq))
    visible = k_pos[:, None, :] <= q_pos[:, :, None]
    if sliding_window is not None:
        visible &= q_pos[:, :, None] - k_pos[:, None, :] < sliding_window

    group = heads // kv_heads
    q5 = q.reshape(batch, seq, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)  # [B, Hkv, G, S, D]
    kt = k.transpose(0, 2, 3, 1)[:, :, None]  # [B, Hkv, 1, D, T]
    scores = xp.matmul(q5.astype(real, copy=False), kt.astype(real, copy=False)) * real(
        dim**-0.5 if scale is None else scale
    )
    scores = xp.where(visible[:, None, None], scores, real(-np.inf))
    row_max = xp.maximum(scores.max(-1, keepdims=True), np.finfo(real).min)  # -inf - -inf would be NaN
    weights = xp.exp(scores - row_max)
    total = weights.sum(-1, keepdims=True)
    weights = weights / xp.where(total == 0, real(1), total)
    out = xp.matmul(weights, v.transpose(0, 2, 1, 3)[:, :, None].astype(real, copy=False))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, dim).astype(q.dtype, copy=False)


def project_output(attention: Any, o_proj: Any, o_bias: Any = None, residual: Any = None) -> Any:
    """Join the heads and project back: ``concat(attention) @ o_proj.T (+ bias) (+ residual)``.

    Parameters
    ----------
    attention : array [..., Hq, D]
        Output of :func:`gqa_attention`.
    o_proj : array [H, Hq D]
        ``AttentionWeights.o_proj``.
    o_bias : array [H], optional
        ``AttentionWeights.o_bias``.
    residual : array [..., H], optional
        Added last.

    Returns
    -------
    array [..., H]
        Of attention's dtype.
    """
    (attention,) = _floats("project_output", attention=attention)
    joined = attention.reshape(*attention.shape[:-2], -1)
    y = _linear("project_output", joined, o_proj, o_bias)
    if residual is None:
        return y
    (residual,) = _floats("project_output", residual=residual)
    namespace(y, residual)
    if residual.shape != y.shape:
        raise InputError(
            f"project_output: residual is {list(residual.shape)}, the output {list(y.shape)}; make them match."
        )
    real = _compute_dtype(y)
    return (y.astype(real, copy=False) + residual.astype(real, copy=False)).astype(y.dtype, copy=False)


def _linear(name: str, x: Any, weight: Any, bias: Any) -> Any:
    x, weight = _floats(name, x=x, weight=weight)
    bias = None if bias is None else _floats(name, bias=bias)[0]
    xp = namespace(x, weight, bias)
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        got = f"x is {list(x.shape)}, the weight {list(weight.shape)}"
        raise InputError(f"{name}: {got}{'' if bias is None else f', the bias {list(bias.shape)}'}; "
                         "the weight must be [out, in] and match.")  # fmt: skip
    real = _compute_dtype(x)
    # NumPy has no 16-bit BLAS; cuBLAS multiplies float16 with float32 sums.
    narrow = xp is not np and x.dtype == weight.dtype == np.float16
    y = xp.matmul(x, weight.T) if narrow else xp.matmul(x.astype(real, copy=False), weight.T.astype(real, copy=False))
    if bias is not None:
        y = y.astype(real, copy=False) + bias.astype(real, copy=False)
    return y.astype(x.dtype, copy=False)


def _floats(where: str, **arrays: Any) -> list[Any]:
    """Return the arguments as NumPy or CuPy arrays (DLPack objects are viewed) after checking that they are floats."""
    out = [as_array(f"{where}: {name}", value) for name, value in arrays.items()]
    for name, array in zip(arrays, out, strict=True):
        if array.dtype not in (*STORAGE_DTYPES.values(), np.dtype(np.float64)):
            raise InputError(f"{where}: {name} is {array.dtype}; convert it to a float dtype.")
    return out


def _compute_dtype(x: Any) -> type[np.floating[Any]]:
    return np.float64 if x.dtype == np.float64 else np.float32
