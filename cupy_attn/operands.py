"""Weights as the CUDA kernels read them: operands in float16, with powers of two that keep their precision."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from . import launch_decode
from .config import AttentionConfig
from .rope import inverse_frequencies
from .weights import AttentionWeights, largest_pair_product

# Powers of two bring the largest value an operand can have just below 2^OPERAND_BITS, half of float16's range. The
# values of v keep more room: a cache can hold some that these weights did not make.
OPERAND_BITS, VALUE_BITS = 15, 11
# The same of 8-bit weights of K; and what storage.cuh multiplies their operands by.
REST_BITS, E4M3_SCALE = 8, 32.0
STEP = 8  # positions from one row of a thread of finish_heads.cuh to the other
# decode_scores.cuh: room for keys that are not normalised yet; for queries with k_norm on them; what sines of next to
# nothing are multiplied by.
TURN_SCALE, SECOND_SCALE, SINE_SCALE = 1 / 8, 1 / 1024, 64.0
# attend_wgmma.cu: a power of two of which 32 are a float32; how much larger scores may be for rounding q' and k'.
FINITE_BITS, ROUNDING = 122, 1.01


def power_of_two(largest: float, bits: int) -> float:
    """Return the power of two that brings ``largest`` into [2^(bits - 1), 2^bits)."""
    return 2.0 ** (bits - math.frexp(largest)[1]) if largest > 0 and math.isfinite(largest) else 1.0


def has_close_scores(config: AttentionConfig, weights: AttentionWeights, *, angles: str) -> bool:
    """Return whether 2 to the power of any difference of two scores, in base-2 logarithms, is a float32, as are 32."""
    _, factor = inverse_frequencies(config, angles=angles)
    largest_score = math.sqrt(config.head_dim) * factor**2 * largest_pair_product(weights.q_norm, weights.k_norm)
    return 2 * largest_score * math.log2(math.e) * ROUNDING <= FINITE_BITS


class Operands:
    """One layer's weights as the kernels read them: float16 products, float32 norms, powers of two folded in.

    Parameters
    ----------
    config : AttentionConfig
        Shapes and numerics.
    weights : AttentionWeights
        In the storage dtype.
    angles : {"float64", "float32"}
        Precision of the rotary angles.
    multiplies_rest : bool
        Make the 8-bit weights of K that ``weights.multiplies_rest`` asks for.
    folded : bool
        Make a second Wqkv with the input norm's weight in it.
    """

    def __init__(
        self, config: AttentionConfig, weights: AttentionWeights, *, angles: str, multiplies_rest: bool, folded: bool
    ) -> None:
        import cupy

        wide = {name: tensor.astype(np.float32) for name, tensor in weights.tensors().items()}
        hidden_bound = math.sqrt(config.hidden_size) * float(np.abs(wide["input_norm"]).max())
        hidden_scale = power_of_two(hidden_bound, OPERAND_BITS)
        self.input_norm = cupy.asarray(wide["input_norm"] * np.float32(hidden_scale))

        def operand(name: str) -> tuple[Any, float]:
            tensor = getattr(weights, name)
            if tensor.dtype == np.float16:
                return cupy.asarray(np.ascontiguousarray(tensor)), 1.0
            scale = power_of_two(float(np.abs(wide[name]).max()), OPERAND_BITS)
            return cupy.asarray((wide[name] * np.float32(scale)).astype(np.float16)), scale

        self.qkv_proj, qkv_scale = operand("qkv_proj")
        self.o_proj, o_scale = operand("o_proj")
        self.folded_proj, folded_scale = None, 1.0
        if folded:
            product = wide["qkv_proj"] * wide["input_norm"]
            folded_scale = power_of_two(float(np.abs(product).max()), OPERAND_BITS)
            self.folded_proj = cupy.asarray((product * np.float32(folded_scale)).astype(np.float16))
        k_rows = wide["qkv_proj"][config.q_size : config.q_size + config.kv_size]
        rest_scale = power_of_two(float(np.abs(k_rows).max()), REST_BITS)
        self.k_proj = None
        if multiplies_rest:
            k_rest = (k_rows * np.float32(rest_scale)).astype(ml_dtypes.float8_e4m3fn)
            self.k_proj = cupy.asarray(k_rest.view(np.uint8))
        v_rows = wide["qkv_proj"][config.q_size + config.kv_size :]
        v_bias = wide["qkv_bias"][config.q_size + config.kv_size :] if "qkv_bias" in wide else np.zeros(1, np.float32)
        v_bound = hidden_bound * float(np.linalg.norm(v_rows, axis=1).max()) + float(np.abs(v_bias).max())
        self.v_scale = 1.0 if weights.dtype == np.float16 else power_of_two(v_bound, VALUE_BITS)

        _, factor = inverse_frequencies(config, angles=angles)
        norms: dict[str, tuple[np.ndarray, float]] = {}
        for name in ("q_norm", "k_norm"):
            bound = math.sqrt(config.head_dim) * float(np.abs(wide[name]).max()) * factor
            scale = power_of_two(bound, OPERAND_BITS)
            norms[name] = wide[name] * np.float32(factor * scale), scale
        (q_norm, q_scale), (k_norm, k_scale) = norms["q_norm"], norms["k_norm"]
        self.q_norm, self.k_norm = cupy.asarray(q_norm), cupy.asarray(k_norm)
        self.k_turns = self.turns = self.half_turns = self.second_turns = None
        if angles != "float32":
            scaled = k_norm * np.float32(TURN_SCALE)
            tables = key_turns, turns_apart, second_turns
            self.k_turns, self.turns, self.second_turns = (cupy.asarray(table(config, scaled)) for table in tables)
            self.half_turns = cupy.asarray(half_turns(config))
        self.qkv_bias = None if "qkv_bias" not in wide else cupy.asarray(wide["qkv_bias"])
        self.o_bias = None if "o_bias" not in wide else cupy.asarray(wide["o_bias"])
        steps = step_turns(config).view(np.uint64).ravel()
        self.frequency = cupy.asarray(np.concatenate([angle_frequencies(config, angles), steps]))
        self.scalars = {
            "qkv_scale": hidden_scale * qkv_scale, "qkv_unscale": 1 / (hidden_scale * qkv_scale),
            "folded_rescale": hidden_scale * qkv_scale / folded_scale,
            "o_unscale": 1 / (o_scale * self.v_scale), "rest_unscale": qkv_scale / (rest_scale * E4M3_SCALE),
            "score_scale": math.log2(math.e) / math.sqrt(config.head_dim) / q_scale / k_scale, "v_scale": self.v_scale,
            "hidden_unscale": 1 / hidden_scale, "q_norm_unscale": 1 / (factor * q_scale), "q_rope_unscale": 1 / q_scale,
            "k_norm_unscale": 1 / (factor * k_scale), "k_rope_unscale": 1 / k_scale,
        }  # fmt: skip
        cupy.cuda.get_current_stream().synchronize()  # kernels of any stream read these without waiting

    def pointers(self) -> dict[str, int]:
        """Return the address of every array the kernels read."""
        return {name: array.data.ptr for name, array in vars(self).items() if hasattr(array, "data")}


def angle_frequencies(config: AttentionConfig, angles: str) -> np.ndarray:
    """Return each pair's frequency as rope.cuh reads it, [D/2] uint64."""
    inv_freq, _ = inverse_frequencies(config, angles=angles)
    if angles == "float32":
        return inv_freq.view(np.uint32).astype(np.uint64) << np.uint64(32)
    turns = inv_freq / (2 * np.pi)
    return np.array([int(turn * 2**64) % 2**64 for turn in turns.tolist()], np.uint64)


def step_turns(config: AttentionConfig) -> np.ndarray:
    """Return the cosine and sine of each pair's angle over the STEP positions of finish_heads.cuh, [D/2, 2] float32."""
    inv_freq, _ = inverse_frequencies(config, angles="float64")
    return np.stack([np.cos(STEP * inv_freq), np.sin(STEP * inv_freq)], axis=-1).astype(np.float32)


def key_turns(config: AttentionConfig, k_norm: np.ndarray) -> np.ndarray:
    """Return what attend_decode.cu multiplies cached keys with, [DECODE_TILE, D/2, 4] float32.

    Of key ``offset`` of a tile and a pair of dims, w its two weights: w_low cos, w_high sin, w_high cos, w_low sin.
    Odd offsets have neighbouring pairs in opposite order, as the kernel reads them.
    """
    inv_freq, _ = inverse_frequencies(config, angles="float64")
    angles = np.arange(launch_decode.DECODE_TILE)[:, None] * inv_freq
    low, high = np.split(k_norm.astype(np.float64), 2)
    cos, sin = np.cos(angles), np.sin(angles)
    turns = np.stack([low * cos, high * sin, high * cos, low * sin], axis=-1)
    turns[1::2] = turns[1::2].reshape(-1, inv_freq.size // 2, 2, 4)[:, :, ::-1].reshape(-1, inv_freq.size, 4)
    return np.ascontiguousarray(turns, np.float32)


def turns_apart(config: AttentionConfig, k_norm: np.ndarray) -> np.ndarray:
    """Return the same for several tiles, weights and turns apart, [1 + keys, turn_stride(D/2), 4] float32.

    First, of two pairs of dims, their weights: both lower ones, both upper ones. Then, of key ``offset`` of
    DECODE_TOGETHER tiles and those pairs, the cosine and sine of each. Rows are padded.
    """
    inv_freq, _ = inverse_frequencies(config, angles="float64")
    angles = np.arange(launch_decode.DECODE_TOGETHER * launch_decode.DECODE_TILE)[:, None] * inv_freq
    turns = np.zeros((1 + len(angles), launch_decode.turn_stride(config.head_dim // 2), 4), np.float32)
    used = turns[:, : config.head_dim // 4]
    used[0] = np.concatenate([half.reshape(-1, 2) for half in np.split(k_norm, 2)], axis=1)
    used[1:] = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(len(angles), -1, 4)
    return turns


def half_turns(config: AttentionConfig) -> np.ndarray:
    """Return cosines and sines that keys are multiplied by in float16 (``decode_scores.cuh``), as uint32.

    [keys of DECODE_TOGETHER tiles, turn_row(D/16), 4], a thread's two pairs of dims in each 16 bytes: cosines of both,
    sines of both, and those of the two pairs that are eight on.
    """
    inv_freq, _ = inverse_frequencies(config, angles="float64")
    keys, row = launch_decode.DECODE_TOGETHER * launch_decode.DECODE_TILE, launch_decode.turn_row(config.head_dim // 16)
    angles = np.zeros((keys, row * 4))
    angles[:, : inv_freq.size] = np.arange(keys)[:, None] * inv_freq
    # Of a key, by 16 pairs, 8 pairs, a thread's two.
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16).reshape(keys, 2, row // 4, 2, 4, 2)
    return np.ascontiguousarray(turns.transpose(0, 2, 4, 3, 1, 5)).view(np.uint32).reshape(keys, row, 4)


def second_turns(config: AttentionConfig, k_norm: np.ndarray) -> np.ndarray:
    """Return what rotated queries are multiplied by if keys are not (``decode_queries.cuh``), [D/4, 2, 4] float32.

    Of two pairs of dims: their weights, both lower ones, both upper ones; and, for pairs that turn slowly, angles over
    a position times the weights, upper ones negative.
    """
    inv_freq, _ = inverse_frequencies(config, angles="float64")
    low, high = np.split(k_norm.astype(np.float64) * SECOND_SCALE, 2)
    angle = inv_freq * SINE_SCALE
    weights = (low, high), (angle * low, -angle * high)
    return np.stack([np.concatenate([a.reshape(-1, 2), b.reshape(-1, 2)], 1) for a, b in weights], 1).astype(np.float32)
