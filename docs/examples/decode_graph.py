"""A decode loop as one CUDA graph: captured once, replayed for every further token. Needs a GPU.

python docs/examples/decode_graph.py demo/
"""

import sys

import cupy
import numpy as np

import cupy_attn as ca


def main(folder: str, steps: int = 8) -> cupy.ndarray:
    config = ca.AttentionConfig.from_pretrained(folder)
    layers = [
        ca.Attention(config, ca.AttentionWeights.from_pretrained(folder, layer=i), dtype="float16", device="cuda")
        for i in range(config.num_hidden_layers)
    ]
    with cupy.cuda.Stream(non_blocking=True) as stream:  # the default stream cannot be captured
        caches = [layer.new_cache(batch=1, capacity=64) for layer in layers]
        prompt = cupy.asarray(np.random.default_rng(0).standard_normal((1, 12, config.hidden_size)), cupy.float16)
        hidden = prompt
        for layer, cache in zip(layers, caches, strict=True):
            hidden = layer(hidden, cache, residual=hidden)
        x = hidden[:, -1:].copy()  # the graph reads this array and writes it

        def step() -> None:
            for layer, cache in zip(layers, caches, strict=True):
                layer(x, cache, residual=x, out=x)

        kept = x.copy()
        step()  # once as usual: builds kernels and makes room
        for cache in caches:
            cache.truncate(cache.lengths - 1)
        x[...] = kept

        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for _ in range(steps):
            graph.launch(stream)  # lengths live on the GPU and go on by themselves
        stream.synchronize()
        print(f"{steps} tokens more, {caches[0].lengths[0]} in every cache, finite: {bool(cupy.isfinite(x).all())}")
    return x


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name one Qwen3 folder, such as: python docs/examples/decode_graph.py demo/")
    main(sys.argv[1])
