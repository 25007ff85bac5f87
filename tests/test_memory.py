"""Long inputs: the layer's memory grows with the tokens, not with their square."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cupy_attn.accuracy import BARS

TOKENS = 32_768
LIMIT_GB = 4.0

# One query against every key in float64, straight from the definition, a block of tokens at a time.
CHILD = f"""
import dataclasses, json, resource
import numpy as np
import cupy_attn as ca
from cupy_attn.bench import model_config, random_layer

config = model_config("0.6B")
k_norm = np.random.default_rng(1).uniform(0.5, 3, config.head_dim).astype(np.float32)
k_norm[:4] = 96.5
weights = dataclasses.replace(random_layer(config), k_norm=k_norm).astype("float16")
layer = ca.Attention(config, weights, "float16", "cpu")
x = np.random.default_rng(2).standard_normal((1, {TOKENS}, config.hidden_size), np.float32).astype(np.float16)
y = layer(x)[0]
peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

H, G, D, eps = config.num_key_value_heads, config.group, config.head_dim, config.rms_norm_eps
w = {{name: tensor.astype(np.float64) for name, tensor in weights.tensors().items()}}
w_q, w_k, w_v = np.split(w["qkv_proj"], [config.q_size, config.q_size + config.kv_size])

def norm(a, weight):
    return a / np.sqrt((a * a).mean(-1, keepdims=True) + eps) * weight

def rope(a, positions):
    angle = positions[:, None, None] * 1e6 ** (-np.arange(0, D, 2) / D)
    pairs = (a[..., : D // 2] + 1j * a[..., D // 2 :]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], -1)

last = norm(x[0, -1:].astype(np.float64), w["input_norm"])
q = rope(norm((last @ w_q.T).reshape(1, H * G, D), w["q_norm"]), np.array([{TOKENS - 1}]))[0].reshape(H, G, D)
scores, values = [], []
for start in range(0, {TOKENS}, 4096):
    h = norm(x[0, start : start + 4096].astype(np.float64), w["input_norm"])
    k = (h @ w_k.T).astype(np.float16).astype(np.float64).reshape(-1, H, D)
    k = rope(norm(k, w["k_norm"]), start + np.arange(len(k)))
    scores.append(np.einsum("hgd,thd->hgt", q, k) / np.sqrt(D))
    values.append((h @ w_v.T).astype(np.float16).reshape(-1, H, D))
scores = np.concatenate(scores, -1)
p = np.exp(scores - scores.max(-1, keepdims=True))
p /= p.sum(-1, keepdims=True)
out = sum(np.einsum("hgt,thd->hgd", p[..., i * 4096 : (i + 1) * 4096], v.astype(np.float64))
          for i, v in enumerate(values))
expected = out.reshape(-1) @ w["o_proj"].T
error = np.linalg.norm(y[-1] - expected) / np.linalg.norm(expected)
print(json.dumps({{"peak_gb": peak_gb, "finite": bool(np.isfinite(y).all()), "shape": y.shape, "error": error}}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_32768_tokens_of_the_smallest_qwen3_fit_in_4_gb():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(f"\npeak {told['peak_gb']:.2f} GB, relative L2 of the last row {told['error']:.2g}")
    assert told["shape"] == [TOKENS, 1024]
    assert told["finite"]
    assert told["peak_gb"] < LIMIT_GB
    assert told["error"] <= BARS["float16"]
