"""A layer called with JAX arrays: taken through DLPack without a copy, on the CPU or on the GPU they are on.

python docs/examples/from_jax.py demo/
"""

import sys

import jax
import jax.numpy as jnp

import cupy_attn as ca


def main(folder: str) -> jax.Array:
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    config = ca.AttentionConfig.from_pretrained(folder)
    weights = ca.AttentionWeights.from_pretrained(folder, layer=0)
    layer = ca.Attention(config, weights, dtype="float16", device=device)
    cache = layer.new_cache(batch=1, capacity=64)

    x = jax.random.normal(jax.random.key(0), (1, 12, config.hidden_size), jnp.float16)
    y = jnp.from_dlpack(layer(x, cache, residual=x))  # prefill; JAX arrays do not change, so they are never `out`
    step = jnp.from_dlpack(layer(y[:, -1:], cache))  # one more token
    print(f"{y.shape} then {step.shape} on {step.device.platform}, {cache.lengths[0]} tokens cached")
    return step


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name one Qwen3 folder, such as: python docs/examples/from_jax.py demo/")
    main(sys.argv[1])
