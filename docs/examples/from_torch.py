"""A layer called with PyTorch tensors: taken without a copy, on the CPU or on the GPU they are on.

python docs/examples/from_torch.py demo/
"""

import sys

import torch

import cupy_attn as ca


def main(folder: str) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ca.AttentionConfig.from_pretrained(folder)
    weights = ca.AttentionWeights.from_pretrained(folder, layer=0)
    layer = ca.Attention(config, weights, dtype="bfloat16", device=device)
    cache = layer.new_cache(batch=1, capacity=64)

    x = torch.randn(1, 12, config.hidden_size, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    layer(x, cache, residual=x, out=y)  # prefill, into a tensor of PyTorch's
    step = torch.empty_like(y[:, -1:])
    layer(y[:, -1:].contiguous(), cache, out=step)  # one more token
    print(f"{tuple(y.shape)} then {tuple(step.shape)} on {step.device}, {cache.lengths[0]} tokens cached")
    return step


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name one Qwen3 folder, such as: python docs/examples/from_torch.py demo/")
    main(sys.argv[1])
