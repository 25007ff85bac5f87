"""The layer in float64, every stage named: what every backend is measured against.

Rounding happens at three places: the inputs and weights as given, K and V as stored in the cache (storage dtype),
and the output (output dtype). Everything between is float64. ``rounding="transformers"`` rounds instead wherever
transformers' eager Qwen3 layer does, to tell what a dtype alone costs from a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import storage_dtype
from .config import AttentionConfig
from .errors import InputError
from .rope import rope_angles
from .weights import AttentionWeights

STAGES = (
    "input_norm",   # [B, S, H]            x / rms(x) * w_in
    "q",            # [B, S, Hq, D]        projected
    "k",            # [B, S, Hkv, D]       projected: what the cache stores
    "v",            # [B, S, Hkv, D]
    "q_norm",       # [B, S, Hq, D]        per-head RMSNorm
    "k_norm",       # [B, S, Hkv, D]
    "q_rope",       # [B, S, Hq, D]        rotated
    "k_rope",       # [B, S, Hkv, D]
    "scores",       # [B, Hq, S, T]        q' k'^T / sqrt(D), -inf where masked
    "row_max",      # [B, Hq, S]           largest score
    "lse",          # [B, Hq, S]           ln sum exp(scores)
    "probs",        # [B, Hq, S, T]        softmax
    "attention",    # [B, S, Hq, D]        probs v
    "output",       # [B, S, H]            attention Wo^T (+ bias)
)  # fmt: skip
"""Every intermediate in order; ``q`` to ``k_rope`` are of the new tokens only."""

ROUNDINGS = ("exact", "transformers")


def forward(
    config: AttentionConfig,
    weights: AttentionWeights,
    x: np.ndarray,
    *,
    past: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    positions: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    dtype: Any = None,
    rounding: str = "exact",
    angles: str = "float64",
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run the layer on sequences of equal lengths and return the output and every stage.

    Materialises the scores: meant for B Hq S T up to about 10^8.

    Parameters
    ----------
    config, weights : AttentionConfig, AttentionWeights
        Weights as given: they are not rounded again.
    x : ndarray [B, S, H]
        Hidden states.
    past : (k, v, positions), optional
        Earlier tokens as a cache holds them: k and v [B, T0, Hkv, D] before norm and RoPE, positions [B, T0].
    positions : ndarray [S] or [B, S] of int, optional
        Absolute positions of the new tokens; default: counting on from ``past``, or from 0.
    residual : ndarray [B, S, H], optional
        Added to the output before it is rounded.
    dtype : str or dtype, optional
        Storage and output dtype; default: that of x.
    rounding : {"exact", "transformers"}
        Where to round; see the module's docstring.
    angles : {"float64", "float32"}
        Precision of the rotary angles; transformers has float32.

    Returns
    -------
    y : ndarray [B, S, H]
        Of ``dtype``.
    stages : dict of str to ndarray, float64
        Keys and shapes: ``STAGES``.
    """
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding is {rounding!r}; it must be one of {', '.join(ROUNDINGS)}.")
    storage = storage_dtype(x.dtype if dtype is None else dtype)

    def stored(a: np.ndarray) -> np.ndarray:
        return a.astype(storage).astype(np.float64)

    def exact(a: np.ndarray) -> np.ndarray:
        return a

    op_round = stored if rounding == "transformers" else exact
    batch, seq, _ = x.shape
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    w = {name: tensor.astype(np.float64) for name, tensor in weights.tensors().items()}
    x64 = x.astype(np.float64)
    q_pos, k_past, v_past, past_pos = _past_and_positions(config, past, positions, batch, seq)

    st: dict[str, np.ndarray] = {}
    st["input_norm"] = _rms_norm(x64, w["input_norm"], config.rms_norm_eps, op_round)
    qkv = st["input_norm"] @ w["qkv_proj"].T + w.get("qkv_bias", 0.0)
    q, k, v = np.split(qkv, [config.q_size, config.q_size + config.kv_size], axis=-1)
    st["q"] = op_round(q.reshape(batch, seq, heads, dim))
    st["k"] = stored(k.reshape(batch, seq, kv_heads, dim))
    st["v"] = stored(v.reshape(batch, seq, kv_heads, dim))
    keys, values = np.concatenate([k_past, st["k"]], 1), np.concatenate([v_past, st["v"]], 1)
    k_pos = np.concatenate([past_pos, q_pos], 1)

    q_norm = _rms_norm(st["q"], w["q_norm"], config.rms_norm_eps, op_round)
    k_norm = _rms_norm(keys, w["k_norm"], config.rms_norm_eps, op_round)
    # Dynamic frequencies depend on the longest position of each sequence, its own only.
    rotated = [_rope(config, q_norm[b], k_norm[b], q_pos[b], k_pos[b], angles, op_round) for b in range(batch)]
    q_rope, k_rope = (np.stack(parts) for parts in zip(*rotated, strict=True))
    st["q_norm"], st["k_norm"] = q_norm, k_norm[:, -seq:]
    st["q_rope"], st["k_rope"] = q_rope, k_rope[:, -seq:]

    head_map = np.arange(heads) // config.group
    scores = op_round(np.einsum("bshd,bthd->bhst", q_rope, k_rope[:, :, head_map]))
    scores = op_round(scores / np.sqrt(dim))
    visible = k_pos[:, None, :] <= q_pos[:, :, None]
    window = config.window(weights.layer)
    if window is not None:
        visible &= q_pos[:, :, None] - k_pos[:, None, :] < window
    st["scores"] = np.where(visible[:, None], scores, -np.inf)
    st["row_max"] = st["scores"].max(-1)
    exp = np.exp(st["scores"] - st["row_max"][..., None])
    st["lse"] = st["row_max"] + np.log(exp.sum(-1))
    st["probs"] = op_round(exp / exp.sum(-1, keepdims=True))
    st["attention"] = op_round(np.einsum("bhst,bthd->bshd", st["probs"], values[:, :, head_map]))
    st["output"] = op_round(st["attention"].reshape(batch, seq, -1) @ w["o_proj"].T + w.get("o_bias", 0.0))
    y = st["output"] if residual is None else st["output"] + residual.astype(np.float64)
    return y.astype(storage), st


def _past_and_positions(
    config: AttentionConfig,
    past: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    positions: np.ndarray | None,
    batch: int,
    seq: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    empty = np.zeros((batch, 0, config.num_key_value_heads, config.head_dim))
    k_past, v_past, past_pos = (empty, empty, np.zeros((batch, 0), np.int64)) if past is None else past
    if positions is None:
        start = past_pos[:, -1:] + 1 if past_pos.shape[1] else np.zeros((batch, 1), np.int64)
        positions = start + np.arange(seq)
    q_pos = np.broadcast_to(np.asarray(positions, np.int64), (batch, seq))
    return q_pos, k_past.astype(np.float64), v_past.astype(np.float64), past_pos


def _rms_norm(
    x: np.ndarray, weight: np.ndarray, eps: float, op_round: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; transformers rounds before the weight and after."""
    return op_round(op_round(x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)) * weight)


def _rope(
    config: AttentionConfig,
    q: np.ndarray,
    k: np.ndarray,
    q_pos: np.ndarray,
    k_pos: np.ndarray,
    angles: str,
    op_round: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Rotate q [S, Hq, D] and k [T, Hkv, D] of one sequence: pairs (i, i + D/2)."""
    seq_len = int(k_pos.max()) + 1

    def rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        cos, sin = (
            op_round(a.astype(np.float64))[:, None, :] for a in rope_angles(config, positions, seq_len, angles=angles)
        )
        x1, x2 = np.split(x, 2, axis=-1)
        return op_round(
            np.concatenate([op_round(x1 * cos) + op_round(-x2 * sin), op_round(x2 * cos) + op_round(x1 * sin)], axis=-1)
        )

    return rotate(q, q_pos), rotate(k, k_pos)
