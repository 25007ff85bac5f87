"""Times of every phase and of the whole layer on random data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import ops
from .arrays import storage_dtype
from .config import AttentionConfig
from .layer import Attention
from .rope import rope_angles
from .weights import AttentionWeights

# hidden_size, num_attention_heads, num_key_value_heads of the published Qwen3 models; head_dim is 128 in all.
MODELS = {
    "0.6B": (1024, 16, 8), "1.7B": (2048, 16, 8), "4B": (2560, 32, 8), "8B": (4096, 32, 8), "14B": (5120, 40, 8),
    "32B": (5120, 64, 8), "30B-A3B": (2048, 32, 4), "235B-A22B": (4096, 64, 4),
}  # fmt: skip


TOGETHER, PREFILL, DECODE = "phases together", "layer, prefill", "layer, decode after it"


@dataclasses.dataclass(frozen=True)
class Timing:
    """One row: what was timed, at how many tokens, median and fastest run in microseconds, repetitions."""

    what: str
    tokens: int
    median_us: float
    min_us: float
    repeats: int


def random_layer(config: AttentionConfig, seed: int = 0) -> AttentionWeights:
    """Return random weights of the scale that trained ones have; norms near one."""
    rng = np.random.default_rng(seed)
    h, rows = config.hidden_size, config.q_size + 2 * config.kv_size

    def normal(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    return AttentionWeights(
        layer=0,
        input_norm=1 + normal((h,), 0.1),
        qkv_proj=normal((rows, h), h**-0.5),
        q_norm=1 + normal((config.head_dim,), 0.1),
        k_norm=1 + normal((config.head_dim,), 0.1),
        o_proj=normal((h, config.q_size), config.q_size**-0.5),
        qkv_bias=normal((rows,), 0.1) if config.attention_bias else None,
        o_bias=normal((h,), 0.1) if config.attention_bias else None,
    )


def model_config(name: str) -> AttentionConfig:
    """Return the config of a published Qwen3 model by its size."""
    hidden, heads, kv_heads = MODELS[name]
    return AttentionConfig.from_dict(
        {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
         "rope_theta": 1e6, "max_position_embeddings": 1 << 17}
    )  # fmt: skip


def run_bench(
    config: AttentionConfig, *, dtype: Any, device: str, batch: int, tokens: int, repeats: int
) -> Iterator[Timing]:
    """Yield one row for each phase on its own, for a prefill of ``tokens`` and for one decode step after it.

    The phases are :mod:`ops` on float32 arrays (CPU) or arrays of ``dtype`` (GPU), with materialised scores: the
    layer as separate operations.
    """
    layer = Attention(config, random_layer(config), dtype, device)
    xp = layer.new_cache(1, 1).xp
    rng = np.random.default_rng(1)
    x = xp.asarray(rng.standard_normal((batch, tokens, config.hidden_size), np.float32).astype(layer.dtype))

    def time_it(what: str, run: Callable[[], Any]) -> Timing:
        times = [_time_us(run, xp) for _ in range(repeats)]
        return Timing(what, tokens, float(np.median(times)), min(times), repeats)

    compute = np.dtype(np.float32) if xp is np else storage_dtype(dtype)
    w = {name: xp.asarray(t.astype(compute)) for name, t in layer.weights.tensors().items()}
    cos, sin = (xp.asarray(a, np.float32) for a in rope_angles(config, np.arange(tokens)))
    eps, heads = config.rms_norm_eps, (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    separate: list[Timing] = []

    def phase(what: str, run: Callable[[], Any]) -> tuple[Any, Timing]:
        result = run()  # also the warm-up
        separate.append(time_it(what, run))
        return result, separate[-1]

    x_in = x.astype(compute)
    h, row = phase("rms_norm", lambda: ops.rms_norm(x_in, w["input_norm"], eps))
    yield row
    qkv, row = phase("project_qkv", lambda: ops.project_qkv(h, w["qkv_proj"], w.get("qkv_bias")))
    yield row
    (q, k, v), row = phase("split_heads", lambda: ops.split_heads(qkv, *heads))
    yield row
    (q_norm, k_norm), row = phase("qk_norm", lambda: ops.qk_norm(q, k, w["q_norm"], w["k_norm"], eps))
    yield row
    (q_rope, k_rope), row = phase("apply_rope", lambda: [ops.apply_rope(a, cos, sin) for a in (q_norm, k_norm)])
    yield row
    window = layer.sliding_window
    out, row = phase("gqa_attention", lambda: ops.gqa_attention(q_rope, k_rope, v, sliding_window=window))
    yield row
    _, row = phase("project_output", lambda: ops.project_output(out, w["o_proj"], w.get("o_bias"), x_in))
    yield row
    yield Timing(TOGETHER, tokens, sum(r.median_us for r in separate), sum(r.min_us for r in separate), repeats)

    layer(x, residual=x)
    yield time_it(PREFILL, lambda: layer(x, residual=x))
    cache = layer.new_cache(batch, tokens + 1)
    layer(x, cache)
    step = x[:, :1]

    def decode() -> None:
        layer(step, cache, residual=step)
        cache.truncate(tokens)

    decode()
    yield time_it(DECODE, decode)


def _time_us(run: Callable[[], Any], xp: Any) -> float:
    if xp is np:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    start, stop = xp.cuda.Event(), xp.cuda.Event()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(xp.cuda.get_elapsed_time(start, stop)) * 1e3
