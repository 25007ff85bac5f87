"""What the tests of the layer share."""

from __future__ import annotations

import dataclasses

import numpy as np
from conftest import make_config, make_weights

import cupy_attn as ca
from cupy_attn.arrays import storage_dtype, to_numpy

CONFIG = make_config()


def make_layer(dtype="float32", device="cpu", *, config=CONFIG, k_norm_max=96.5, seed=0, **options) -> ca.Attention:
    weights = make_weights(config, k_norm_max=k_norm_max, seed=seed, dtype=dtype)
    return ca.Attention(config, weights, dtype, device, **options)


def far_scores(
    config, dtype: str, pair_product: float, seq: int, pair: int | None = None
) -> tuple[ca.AttentionWeights, np.ndarray]:
    """Return weights and hidden states [1, S, H] whose scores are as far apart as the norm weights let them.

    One dim carries them, of ``pair`` or the last, which RoPE hardly turns: the last half of the tokens has the lowest
    scores that are possible, the third before it the highest, the first sixth zero. Keys of a kind are the same.
    """
    half = config.head_dim // 2
    dim = half - 1 if pair is None else pair
    weights = make_weights(config, k_norm_max=1.5, dtype="float32")
    qkv, hidden = weights.qkv_proj.copy(), config.hidden_size
    q = qkv[: config.q_size].reshape(-1, config.head_dim, hidden)
    k = qkv[config.q_size : config.q_size + config.kv_size].reshape(-1, config.head_dim, hidden)
    qkv[..., :3] = 0
    q[:], k[:] = 0, 0
    q[:, dim, 0] = k[:, dim, 1] = k[:, dim - 1, 2] = 16  # so that eps is nothing beside them
    norm = np.ones(config.head_dim, np.float32)
    norm[[dim, dim + half]] = np.sqrt(pair_product)
    x = np.random.default_rng(3).standard_normal((1, seq, hidden))
    kinds = np.searchsorted([seq // 6, seq // 2], np.arange(seq), side="right")
    x[..., :3] = np.stack([np.ones(seq), np.array([0, 1, -1])[kinds], kinds == 0], -1)
    weights = dataclasses.replace(weights, qkv_proj=qkv, q_norm=norm, k_norm=norm).astype(dtype)
    return weights, x.astype(storage_dtype(dtype))


def in_chunks(layer, x, sizes, *, cache=None) -> np.ndarray:
    """Run x [B, S, H] chunk by chunk through one cache."""
    cache = layer.new_cache(len(x), x.shape[1]) if cache is None else cache
    ends = np.cumsum(sizes)
    assert ends[-1] == x.shape[1]
    return np.concatenate([to_numpy(layer(x[:, e - n : e], cache)) for n, e in zip(sizes, ends, strict=True)], axis=1)
