"""What a layer refuses, in which words, and that nothing was written; what is decided when it is made."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights
from layer_helpers import CONFIG, make_layer

import cupy_attn as ca
from cupy_attn import cuda
from cupy_attn.arrays import to_numpy


def z(*shape, dtype=np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


READ_ONLY = np.zeros((2, 3, 96), np.float32)
READ_ONLY.flags.writeable = False

REFUSALS = [
    ({"x": z(3, 96)}, "x has shape [3, 96], expected [B, S, 96]; reshape it to [batch, tokens, hidden]"),
    ({"x": z(2, 3, 95)}, "x has shape [2, 3, 95], expected [B, S, 96]; the model's hidden_size is 96, take"),
    ({"x": z(2, 0, 96)}, "x has shape [2, 0, 96] and holds no token; pass at least one"),
    ({"x": z(0, 3, 96)}, "holds no token"),
    ({"x": z(2, 3, 96, dtype=np.float16)}, "x is float16, the layer is float32; convert it with astype or make"),
    ({"x": z(2, 3, 96, dtype=np.float64)}, "x is float64, the layer is float32"),
    ({"x": z(2, 3, 96, dtype=ml_dtypes.bfloat16)}, "x is bfloat16, the layer is float32"),
    ({"x": z(2, 3, 96).tolist()}, "x is a list; pass a NumPy or CuPy array"),
    ({"residual": z(2, 2, 96)}, "residual has shape [2, 2, 96], expected [2, 3, 96]; give it the shape of x"),
    ({"residual": z(2, 3, 96, dtype=np.float16)}, "residual is float16, the layer is float32"),
    ({"residual": 1.0}, "residual is a float; pass a NumPy or CuPy array"),
    ({"out": z(1, 3, 96)}, "out has shape [1, 3, 96], expected [2, 3, 96]"),
    ({"out": z(2, 3, 96, dtype=np.float64)}, "out is float64, the layer is float32"),
    ({"out": READ_ONLY}, "out is read-only; pass a writable array"),
    ({"stages": []}, "stages is a list; pass a dict to be filled"),
    ({"num_tokens": [3]}, "num_tokens has shape [1], expected [2]; give one for each sequence"),
    ({"num_tokens": 3}, "num_tokens is a int"),
    ({"num_tokens": [3, 4]}, "num_tokens is [3, 4]; each must be 0 to 3, the rows of x"),
    ({"num_tokens": [-1, 3]}, "num_tokens is [-1, 3]; each must be 0 to 3"),
    ({"num_tokens": [1.0, 2.0]}, "num_tokens has dtype float64; give integers"),
    ({"positions": [5, 6]}, "positions has shape [2], expected [3] or [2, 3]"),
    ({"positions": [[5, 6, 7]]}, "positions has shape [1, 3], expected [3] or [2, 3]"),
    ({"positions": [5.0, 6.0, 7.0]}, "positions has dtype float64; give integers"),
    ({"positions": np.array([True, True, True])}, "positions has dtype bool; give integers"),
    ({"positions": [5, 6, 4096]}, "token 2 of sequence 0 is at position 4096, the model's positions are 0 to 4095"),
    ({"positions": [[5, 6, 7], [5, 6, 1 << 40]]}, "token 2 of sequence 1 is at position 1099511627776"),
    ({"positions": [-1, 6, 7]}, "token 0 of sequence 0 is at position -1"),
    ({"positions": [5, 7, 7]}, "positions of sequence 0 go from 7 to 7 at token 2; they must increase"),
    ({"positions": [[5, 6, 7], [8, 7, 9]]}, "positions of sequence 1 go from 8 to 7 at token 1"),
    ({"positions": [3, 5, 6]}, "sequence 0 starts at position 3 but its cache ends at 3; positions must go on from 4"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), REFUSALS)
def test_refused_before_anything_is_written(device, change, words):
    layer = make_layer("float32", device)
    cache = layer.new_cache(2, 16)
    layer(make_hidden(CONFIG, 2, 4), cache)
    before = [to_numpy(a).tobytes() for a in (cache.k_heads, cache.v_heads, cache.positions, cache.lengths)]
    given = {"x": make_hidden(CONFIG, 2, 3, seed=3), "out": np.full((2, 3, 96), 7, np.float32), "stages": {}} | change
    out_before = given["out"].tobytes()
    with pytest.raises(ca.InputError) as caught:
        layer(given.pop("x"), cache, **given)
    assert words in str(caught.value)
    assert [to_numpy(a).tobytes() for a in (cache.k_heads, cache.v_heads, cache.positions, cache.lengths)] == before
    assert given["out"].tobytes() == out_before
    assert not given["stages"]


def test_default_positions_past_the_end_of_the_model(device):
    config = make_config(max_position_embeddings=10)
    layer = make_layer("float32", device, config=config)
    cache = layer.new_cache(1, 16)
    layer(make_hidden(config, 1, 9), cache)
    with pytest.raises(ca.InputError, match=r"token 1 of sequence 0 is at position 10, .* positions are 0 to 9"):
        layer(make_hidden(config, 1, 2), cache)
    assert cache.lengths.tolist() == [9]
    layer(make_hidden(config, 1, 1), cache)
    assert cache.lengths.tolist() == [10]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'; it must be one of float16, bfloat16, float32"),
        ({"device": "gpu"}, "device is 'gpu'; it must be one of auto, cuda, cpu"),
        ({"layer": 3}, "layer is 3, the weights are of layer 0; leave layer out"),
        ({"angles": "float16"}, "angles is 'float16'; it must be one of float64, float32"),
    ],
)
def test_options_of_a_layer_are_checked(options, words):
    with pytest.raises(ca.InputError) as caught:
        ca.Attention(CONFIG, make_weights(CONFIG), **({"dtype": "float32", "device": "cpu"} | options))
    assert words in str(caught.value)


def test_cuda_without_a_gpu_says_why(monkeypatch):
    monkeypatch.setattr(cuda, "problem", lambda: "no CUDA GPU is visible; use device='cpu'.")
    with pytest.raises(ca.DeviceError, match="no CUDA GPU is visible; use device='cpu'"):
        make_layer("float32", "cuda")
    assert make_layer("float32", "auto").device == "cpu"


def test_precise_is_decided_by_the_largest_weight_or_pair_or_by_the_spread_of_scores():
    def precise(k_norm, q_norm=1.0, **config):
        weights = make_weights(CONFIG)
        d = CONFIG.head_dim
        weights = dataclasses.replace(
            weights, k_norm=np.resize(np.float32(k_norm), d), q_norm=np.resize(np.float32(q_norm), d)
        )
        return ca.Attention(ca.AttentionConfig.from_dict(CONFIG.to_dict(), **config), weights, "float32", "cpu").precise

    assert precise(np.array([20.1, *[0.1] * 63]), q_norm=0.1)
    assert precise(np.array([-20.1, *[0.1] * 63]), q_norm=0.1)
    assert not precise(np.array([20.0, *[0.1] * 63]), q_norm=0.1)
    assert not precise(np.array([20.1, *[0.1] * 63]), q_norm=0.1, precise_threshold=21.0)
    assert not precise(2.4)
    assert precise(2.6)  # no weight is large, but the scores are: 20 / 8 = 2.5
    assert precise(2.4, q_norm=1.1)
    assert not precise(4.9, precise_threshold=40.0)
    one, same, other = (np.eye(64)[i] for i in (3, 3 + CONFIG.head_dim // 2, 4))  # RoPE mixes the first two
    for peak in (one, same):
        assert precise(0.1 + 9.9 * peak, q_norm=0.1 + 0.71 * one)  # 10 x 0.81, above 20 / 2.5 = 8
        assert precise(0.1 - 10.1 * peak, q_norm=0.1 + 0.71 * one)
        assert not precise(0.1 + 9.9 * peak, q_norm=0.1 + 0.69 * one)
        assert not precise(0.1 + 9.9 * peak, q_norm=0.1 + 0.71 * one, precise_threshold=20.5)
    assert not precise(0.1 + 9.9 * one, q_norm=0.1 + 0.71 * other)
    assert "float32" in repr(make_layer())
