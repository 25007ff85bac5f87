"""Rotary angles for every ``rope_scaling`` kind, from float64.

Angle of pair i at position n: ``n * inv_freq[i]``; cos and sin are multiplied by an attention factor (yarn).
Frequencies follow transformers' ``modeling_rope_utils``; the papers are named at :class:`config.RopeConfig`.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any

import numpy as np

from .config import AttentionConfig
from .errors import InputError

ANGLE_DTYPES = ("float64", "float32")
_TABLE_STEP = 1024  # positions a table grows by at least


def inverse_frequencies(
    config: AttentionConfig, seq_len: int | None = None, *, angles: str = "float64"
) -> tuple[np.ndarray, float]:
    """Return the inverse frequencies of each rotated pair and the attention factor.

    Parameters
    ----------
    config : AttentionConfig
        Names the kind and its parameters.
    seq_len : int, optional
        Tokens of the longest sequence seen; only ``dynamic`` depends on it, and only past
        ``max_position_embeddings``.
    angles : {"float64", "float32"}
        ``float32`` computes every step in single precision, as transformers does.

    Returns
    -------
    inv_freq : ndarray [D/2]
        Radians per position, of dtype ``angles``.
    attention_factor : float
        Multiplies cos and sin; 1 for every kind but yarn.
    """
    real = _angle_dtype(angles)
    rope, dim = config.rope, config.head_dim
    theta = rope.rope_theta
    if rope.rope_type == "dynamic":
        length = max(seq_len or 0, config.max_position_embeddings)
        stretch = rope.factor * length / config.max_position_embeddings - (rope.factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    exponents = np.arange(0, dim, 2).astype(real) / real(dim)
    # A float64 power rounded to float32 is the nearest float32, which is what a good float32 pow returns.
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(real)
    inv_freq = real(1) / powers
    if rope.rope_type == "linear":
        return inv_freq / real(rope.factor), 1.0
    if rope.rope_type == "yarn":
        return _yarn(config, powers), _yarn_attention_factor(config)
    if rope.rope_type == "llama3":
        return _llama3(config, inv_freq), 1.0
    return inv_freq, 1.0


def _yarn(config: AttentionConfig, powers: np.ndarray) -> np.ndarray:
    rope, dim, real = config.rope, config.head_dim, powers.dtype.type
    original = rope.original_max_position_embeddings
    assert original is not None

    def correction_dim(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = np.clip((np.arange(dim // 2, dtype=powers.dtype) - real(low)) / real(high - low), real(0), real(1))
    keep = real(1) - ramp
    return (real(1) / (real(rope.factor) * powers)) * (real(1) - keep) + (real(1) / powers) * keep


def _yarn_attention_factor(config: AttentionConfig) -> float:
    rope = config.rope
    if rope.attention_factor is not None:
        return float(rope.attention_factor)

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _llama3(config: AttentionConfig, inv_freq: np.ndarray) -> np.ndarray:
    rope, real = config.rope, inv_freq.dtype.type
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    assert original is not None
    assert low is not None
    assert high is not None
    wavelength = real(2 * math.pi) / inv_freq
    smooth = (real(original) / wavelength - real(low)) / real(high - low)
    blended = (real(1) - smooth) * inv_freq / real(rope.factor) + smooth * inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / real(rope.factor), blended)
    return np.where(wavelength < original / high, inv_freq, scaled)


def rope_angles(
    config: AttentionConfig, positions: Any, seq_len: int | None = None, *, angles: str = "float64"
) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin of every rotated pair at the given positions, times the attention factor.

    Parameters
    ----------
    config : AttentionConfig
        Names the RoPE kind.
    positions : array_like of int, any shape
        Absolute positions, 0-based.
    seq_len : int, optional
        See :func:`inverse_frequencies`.
    angles : {"float64", "float32"}
        Precision of the whole computation. float64 is right to 1e-9 rad at position 1,000,000.

    Returns
    -------
    cos, sin : ndarray [*positions.shape, D/2]
        Of dtype ``angles``.
    """
    real = _angle_dtype(angles)
    inv_freq, factor = inverse_frequencies(config, seq_len, angles=angles)
    turns = np.asarray(positions).astype(real)[..., None] * inv_freq
    return np.cos(turns) * real(factor), np.sin(turns) * real(factor)


class RopeTable:
    """cos and sin of positions 0 .. n-1 in float32, [n, D/2] each, grown on demand.

    The angles are float64 (or float32 on request); only the table entries are rounded to float32.
    """

    def __init__(self, config: AttentionConfig, angles: str) -> None:
        self._config, self._angles = config, angles
        self._lock = threading.Lock()
        empty = np.empty((0, config.head_dim // 2), np.float32)
        self._cos, self._sin = empty, empty

    def upto(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tables that cover at least positions 0 .. count-1."""
        with self._lock:
            have = len(self._cos)
            if count > have:
                end = max(count, min(2 * have, self._config.max_position), _TABLE_STEP)
                cos, sin = rope_angles(self._config, np.arange(have, end), angles=self._angles)
                self._cos = np.concatenate([self._cos, cos.astype(np.float32)])
                self._sin = np.concatenate([self._sin, sin.astype(np.float32)])
            return self._cos, self._sin


@functools.lru_cache(maxsize=16)
def rope_table(config: AttentionConfig, angles: str = "float64") -> RopeTable:
    """Return the table of one config, shared by all its layers (all kinds but dynamic past its length)."""
    return RopeTable(config, angles)


def _angle_dtype(angles: str) -> type[np.floating[Any]]:
    if angles not in ANGLE_DTYPES:
        raise InputError(f"angles is {angles!r}; it must be one of {', '.join(ANGLE_DTYPES)}.")
    return np.float64 if angles == "float64" else np.float32
