"""What the tests of the GPU share: layers with kernels, both bars at once, kernels built on every core ahead."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import numpy as np
from conftest import make_weights

import cupy_attn as ca
from cupy_attn import cuda, launch, launch_decode, ops, reference, warmup, wgmma
from cupy_attn.accuracy import BARS, MAX_ERROR_BARS, max_error, relative_l2
from cupy_attn.arrays import storage_dtype, to_numpy
from cupy_attn.rope import rope_angles

HALVES = ("float16", "bfloat16")
NAN_BITS = 0xFFFF  # NaN in float16 and in bfloat16


def make_layer(config, dtype="float16", *, k_norm_max=96.5, seed=0, **options) -> ca.Attention:
    """Return a layer on the GPU; one without kernels warns, and pytest makes that an error."""
    return ca.Attention(config, make_weights(config, k_norm_max=k_norm_max, seed=seed, dtype=dtype), dtype, "cuda",
                        **options)  # fmt: skip


def exact(layer: ca.Attention, x, *, rounded=False, **options) -> np.ndarray:
    """Return the reference's output [B, S, H] in float64: before its last rounding, unless that is asked for.

    A layer that is off by next to nothing still rounds some values to the other neighbour, a whole unit in the last
    place away: in float16 that alone can be all of the bar on the largest error.
    """
    y, stages = reference.forward(layer.config, layer.weights, to_numpy(x), dtype=layer.dtype, **options)
    return y if rounded else stages["output"]


def check(y, expected, dtype: str, *, most: float = 1.0) -> None:
    """Hold y to both bars of its dtype; to ``most`` times that on the largest error.

    A key that is a hair's breadth off can round to the other neighbour on its way into the cache. With weights of 96.5
    that moves its score by up to 0.05, and a row in which two keys contend by more than float16's bar on single values.
    """
    y = to_numpy(y)
    assert str(y.dtype) == str(dtype)
    assert relative_l2(y, expected) <= BARS[str(dtype)]
    assert max_error(y, expected) <= most * MAX_ERROR_BARS[str(dtype)]


def same_bits(a, b) -> bool:
    """Whether two arrays on any device are of one shape and dtype and equal bit for bit, NaN and all."""
    a, b = to_numpy(a), to_numpy(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def normal(shape, dtype, *, seed=0) -> np.ndarray:
    """Return random values of a storage dtype."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(storage_dtype(dtype))


def bits(array):
    """Return a CuPy array's 16-bit elements as integers, a view."""
    return array.view(np.uint16)


# Caches.


def filled_cache(layer: ca.Attention, lengths, capacity: int, *, seed=5):
    """Return a cache that holds random keys and values at positions 0, 1, ...; rows past a length are NaN."""
    import cupy

    cache = layer.new_cache(len(lengths), capacity)
    for i, heads in enumerate((cache.k_heads, cache.v_heads)):
        bits(heads).fill(NAN_BITS)
        for b, length in enumerate(lengths):
            rows = normal((heads.shape[1], length, heads.shape[3]), layer.dtype, seed=seed + 1000 * i + b)
            heads[b, :, :length] = cupy.asarray(rows)
    cache.assume(list(lengths))
    return cache


def held(cache, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens of one sequence of a cache as ``reference.forward`` takes them."""
    count = int(cache.lengths[b])
    k, v = (to_numpy(heads[b : b + 1, :, :count]).transpose(0, 2, 1, 3) for heads in (cache.k_heads, cache.v_heads))
    return k, v, cache.positions[b : b + 1, :count]


def last_rows(layer: ca.Attention, x, k, v, positions, first_position: int = 0) -> np.ndarray:
    """Return the output for the last tokens of one long sequence in float64, as :func:`exact` does, [S, H].

    The scores are one head's at a time and the products BLAS: T of 10^5 takes a second and not minutes.

    Parameters
    ----------
    layer : Attention
        Its config and weights.
    x : ndarray [S, H]
        The last tokens' hidden states.
    k, v : ndarray [T - S, Hkv, D]
        What the cache held before them.
    positions : ndarray [T]
        Of all tokens.
    first_position : int
        Leave out tokens before this one.
    """
    config, w = layer.config, {name: t.astype(np.float64) for name, t in layer.weights.tensors().items()}
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden = ops.rms_norm(x.astype(np.float64), w["input_norm"], config.rms_norm_eps)
    qkv = ops.project_qkv(hidden, w["qkv_proj"], w.get("qkv_bias"))
    q, new_k, new_v = ops.split_heads(qkv, heads, kv_heads, dim)
    seen = positions >= first_position
    keys = np.concatenate([k, new_k.astype(layer.dtype)])[seen].astype(np.float64)
    values = np.concatenate([v, new_v.astype(layer.dtype)])[seen].astype(np.float64)
    q_pos, k_pos = positions[-len(x) :], positions[seen]
    q, keys = ops.qk_norm(q, keys, w["q_norm"], w["k_norm"], config.rms_norm_eps)
    angles = rope_angles(config, k_pos, int(k_pos[-1]) + 1)
    q, keys = ops.apply_rope(q, *(a[-len(x) :] for a in angles)), ops.apply_rope(keys, *angles)
    hidden_keys = k_pos[None] > q_pos[:, None]
    if layer.sliding_window is not None:
        hidden_keys |= q_pos[:, None] - k_pos[None] >= layer.sliding_window
    out = np.empty(q.shape)
    for h in range(heads):
        scores = q[:, h] @ keys[:, h // config.group].T / np.sqrt(dim)
        scores[hidden_keys] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = weights @ values[:, h // config.group] / weights.sum(-1, keepdims=True)
    return ops.project_output(out, w["o_proj"], w.get("o_bias"))


# Kernels.

Kind = tuple[ca.AttentionConfig, str, bool]  # config, storage dtype, precise
_built: set = set()


def kernels_of(
    kinds: Iterable[Kind], calls: Iterable[tuple[int, int]], *, windowed=False, collect=False
) -> Iterator[tuple]:
    """Yield the kernels of calls with (batch, tokens)."""
    gpu = cuda.limits(0)
    for config, dtype, precise in kinds:
        for half_turns in {False, not precise}:
            shape = launch.Shape(dtype, config.head_dim, precise, windowed, float32_angles=False, half_turns=half_turns)
            for batch, seq in calls:
                if not collect and launch_decode.decodes(config, shape, batch, seq):
                    launches = wgmma.decode(config, shape, gpu, batch, seq)
                else:
                    launches = wgmma.prefill(config, shape, gpu, batch, seq, past_tiles=0, collect=collect)
                yield from ((one.name, one.macros) for one in launches)


def build_ahead(pairs: Iterable[tuple]) -> None:
    """Build kernels on every core into CuPy's cache, so that no test has to wait for its own; failures show there."""
    wanted = dict.fromkeys(pair for pair in pairs if pair not in _built)
    warmup.build_all([warmup.on_this_gpu(functools.partial(warmup.build_here, *pair)) for pair in wanted])
    _built.update(wanted)
