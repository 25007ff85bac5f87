"""What the tests of the layer share."""

from __future__ import annotations

import numpy as np
from conftest import make_config, make_weights

import cupy_attn as ca
from cupy_attn.arrays import to_numpy

CONFIG = make_config()


def make_layer(dtype="float32", device="cpu", *, config=CONFIG, k_norm_max=96.5, seed=0, **options) -> ca.Attention:
    weights = make_weights(config, k_norm_max=k_norm_max, seed=seed, dtype=dtype)
    return ca.Attention(config, weights, dtype, device, **options)


def in_chunks(layer, x, sizes, *, cache=None) -> np.ndarray:
    """Run x [B, S, H] chunk by chunk through one cache."""
    cache = layer.new_cache(len(x), x.shape[1]) if cache is None else cache
    ends = np.cumsum(sizes)
    assert ends[-1] == x.shape[1]
    return np.concatenate([to_numpy(layer(x[:, e - n : e], cache)) for n, e in zip(sizes, ends, strict=True)], axis=1)
