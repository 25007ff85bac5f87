"""All attention layers of a checkpoint on the CPU, NumPy alone: a prompt, then one token at a time.

python docs/examples/numpy_only.py demo/
"""

import sys

import numpy as np

import cupy_attn as ca


def main(folder: str, steps: int = 3) -> np.ndarray:
    config = ca.AttentionConfig.from_pretrained(folder)
    layers = [
        ca.Attention(config, ca.AttentionWeights.from_pretrained(folder, layer=i), dtype="float32", device="cpu")
        for i in range(config.num_hidden_layers)
    ]
    caches = [layer.new_cache(batch=1, capacity=64) for layer in layers]

    x = np.random.default_rng(0).standard_normal((1, 12, config.hidden_size)).astype(np.float32)
    for step in range(1 + steps):
        for layer, cache in zip(layers, caches, strict=True):
            x = layer(x, cache, residual=x)  # a model's MLP would come here
        rms = np.sqrt((x**2).mean())
        print(f"step {step}: {x.shape[1]} new tokens, {caches[0].lengths[0]} in every cache, rms {rms:.3g}")
        x = x[:, -1:]
    return x


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name one Qwen3 folder, such as: python docs/examples/numpy_only.py demo/")
    main(sys.argv[1])
