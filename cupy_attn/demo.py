"""A small but real Qwen3 checkpoint with the K-norm weights of Qwen3-0.6B's first layers, made from a seed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import reference
from .arrays import BFLOAT16
from .config import AttentionConfig
from .io import DUMP_FORMAT, save_arrays, write_whole
from .weights import INDEX_NAME, AttentionWeights

# (max |k_norm.weight|, mean, standard deviation) published for Qwen3-0.6B, layers 0 to 7; where only "above 20" is, a
# value above it. The last two stand for its later layers, most of which stay below 10.
K_NORM_STATISTICS = (
    (96.5, 3.56, 9.13), (44.5, 2.34, 3.98), (44.0, 2.47, 3.94), (25.0, 2.4, 3.0),
    (41.75, 2.4, 3.8), (34.0, 2.4, 3.2), (23.0, 2.3, 2.4), (21.0, 2.3, 2.2), (12.0, 2.2, 1.2), (6.5, 2.1, 0.7),
)  # fmt: skip

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": len(K_NORM_STATISTICS),
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 1024,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    "max_position_embeddings": 40960, "attention_bias": False, "attention_dropout": 0.0,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
    "tie_word_embeddings": True, "initializer_range": 0.02, "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

SHARD_BYTES = 4_000_000
FILES = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?|hidden_states\.npy|dump-layer\d+\.safetensors")
"""Names of what the demo writes, and so may replace."""
TOKENS = 96
SEED = 20250428


def k_norm_weight(rng: np.random.Generator, head_dim: int, largest: float, mean: float, std: float) -> np.ndarray:
    """Return a K-norm weight [D] float32 with the given maximum and nearly the given mean and deviation.

    As in Qwen3, most entries are of the order of one and a few carry the rest: entries fall off geometrically from
    the largest, with the rate that gives the deviation.
    """
    ranks = np.arange(head_dim)
    low, high = 0.01, 0.999
    for _ in range(60):  # a slower fall-off means a larger deviation
        rate = (low + high) / 2
        low, high = (rate, high) if np.std((largest - mean) * rate**ranks) < std else (low, rate)
    tail = (largest - mean) * rate**ranks
    body = mean - tail.mean() + 0.3 * rng.standard_normal(head_dim)
    weight = np.maximum(tail + body, 0.05)
    weight[0] = largest
    return rng.permutation(np.minimum(weight, largest)).astype(np.float32)


def model_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return every tensor of the model under transformers' names, bfloat16."""
    c = CONFIG
    hidden, inner, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q_size, kv_size = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim

    def linear(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) / np.sqrt(columns)

    def norm(size: int) -> np.ndarray:
        return 1 + 0.1 * rng.standard_normal(size)

    tensors = {"model.embed_tokens.weight": rng.standard_normal((c["vocab_size"], hidden))}
    for i, statistics in enumerate(K_NORM_STATISTICS):
        prefix = f"model.layers.{i}."
        tensors |= {
            f"{prefix}input_layernorm.weight": norm(hidden),
            f"{prefix}self_attn.q_proj.weight": linear(q_size, hidden),
            f"{prefix}self_attn.k_proj.weight": linear(kv_size, hidden),
            f"{prefix}self_attn.v_proj.weight": linear(kv_size, hidden),
            f"{prefix}self_attn.o_proj.weight": linear(hidden, q_size),
            f"{prefix}self_attn.q_norm.weight": norm(dim),
            f"{prefix}self_attn.k_norm.weight": k_norm_weight(rng, dim, *statistics),
            f"{prefix}post_attention_layernorm.weight": norm(hidden),
            f"{prefix}mlp.gate_proj.weight": linear(inner, hidden),
            f"{prefix}mlp.up_proj.weight": linear(inner, hidden),
            f"{prefix}mlp.down_proj.weight": linear(hidden, inner),
        }
    tensors["model.norm.weight"] = norm(hidden)
    return {name: tensor.astype(BFLOAT16) for name, tensor in tensors.items()}


def write_checkpoint(folder: Path, progress: Callable[[str], None]) -> None:
    """Write config.json and sharded safetensors with their index, laid out as transformers does.

    Parameters
    ----------
    folder : Path
        Exists, is empty.
    progress : callable
        Called with a phrase before each step.
    """
    tensors = model_tensors(np.random.default_rng(SEED))
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        progress(f"writing {file}")
        save_arrays(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    for name, data in (("config.json", CONFIG), (INDEX_NAME, index)):
        text = json.dumps(data, indent=2) + "\n"
        write_whole(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def hidden_states(seed: int, tokens: int, hidden_size: int) -> np.ndarray:
    """Return activations as they enter a layer, [1, tokens, H] bfloat16: a few channels are much larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, tokens, hidden_size))
    x[..., rng.permutation(hidden_size)[:4]] *= 40
    return x.astype(BFLOAT16)


def write_dumps(folder: Path, layer: int, progress: Callable[[str], None]) -> None:
    """Write activations for ``run`` (.npy) and a dump with the reference's stages for ``verify`` (.safetensors)."""
    config = AttentionConfig.from_pretrained(folder)
    weights = AttentionWeights.from_pretrained(folder, layer, config=config)
    x = hidden_states(SEED, TOKENS, config.hidden_size)
    progress("writing activations")
    save_arrays(folder / "hidden_states.npy", {"hidden_states": x[0].astype(np.float32)})
    progress("computing the float64 reference")
    y, stages = reference.forward(config, weights, x)
    kept = {name: value.astype(np.float32) for name, value in stages.items() if name not in ("scores", "probs")}
    metadata = {
        "format": DUMP_FORMAT, "made_by": "cupy-attn demo", "layer": str(layer), "dtype": "bfloat16",
        "config": json.dumps(config.to_dict()),
    }  # fmt: skip
    arrays = {"hidden_states": x, "positions": np.arange(TOKENS, dtype=np.int64), "y": y, **kept}
    save_arrays(folder / f"dump-layer{layer}.safetensors", arrays, metadata)
