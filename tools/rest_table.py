"""The tables of docs/numerics.md on K's products with what rounding hidden states leaves over, which some layers omit.

    python tools/rest_table.py [--past 130] [--new 64] [--draws 48]
    python tools/rest_table.py --folded --new 2 --draws 24

Simulates Hopper's prefill on the normal path in float64, with every rounding of its kernels, of the 0.6B shape: with
hidden states that are exact for keys; and without, where float16 layers have weights with the input norm's in them
instead of rounded hidden states. Errors are those of the new tokens, the largest over the draws. ``--folded``: what
such weights cost in decode of up to 8 tokens with float16, which rounds no hidden states, and would cost in prefill
with bfloat16, where no kernel takes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import click
import numpy as np

import cupy_attn as ca
from cupy_attn import ops, reference
from cupy_attn.arrays import STORAGE_DTYPES
from cupy_attn.bench import model_config, random_layer
from cupy_attn.config import AttentionConfig
from cupy_attn.operands import OPERAND_BITS, power_of_two
from cupy_attn.rope import rope_angles
from cupy_attn.weights import AttentionWeights, largest_pair_product, multiplies_rest

DTYPES = ("float16", "bfloat16")
CONFIG = model_config("0.6B")
PAIR = [5, 5 + CONFIG.head_dim // 2]  # dims that RoPE mixes

Rounding = Callable[[np.ndarray], np.ndarray]
Kind = dict[str, Any]  # arguments of simulate


def rounding(dtype: str) -> Rounding:
    """Return what rounds float64 arrays to a storage dtype and widens them again."""
    return lambda array: array.astype(STORAGE_DTYPES[dtype]).astype(np.float64)


def scaled(weights: AttentionWeights, factor: float) -> AttentionWeights:
    """Return weights whose Q-norm and K-norm are so much larger together."""
    share = np.float32(math.sqrt(factor))
    return dataclasses.replace(weights, q_norm=weights.q_norm * share, k_norm=weights.k_norm * share)


def with_one_pair(weights: AttentionWeights, product: float, others: float) -> AttentionWeights:
    """Return weights of which one pair of dims has such a product, and the K-norm so much of itself in the others."""
    k_norm = weights.k_norm * np.float32(others)
    k_norm[PAIR] = product / np.abs(weights.q_norm[PAIR]).max()
    return dataclasses.replace(weights, k_norm=k_norm)


CASES: dict[str, Callable[[AttentionWeights], AttentionWeights]] = {
    "norms near one": lambda w: scaled(w, 1.12),
    "a pair, next to nothing in other dims": lambda w: with_one_pair(w, 2.49, 0.01),
    "the same, larger": lambda w: with_one_pair(w, 3.3, 0.01),
    "larger still": lambda w: with_one_pair(w, 4.99, 0.01),
    "weights of 0.3 in other dims": lambda w: with_one_pair(w, 4.99, 0.3),
}


def taken(dtype: str, *, rest: bool) -> str | None:
    """Return the dtype of weights with the input norm's in them, where prefill takes such weights."""
    return "float16" if dtype == "float16" and not rest else None


def simulate(
    config: AttentionConfig, weights: AttentionWeights, x: np.ndarray, *, rest: bool, folded: str | None,
    is_exact: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return y of a prompt x [1, S, H], in float64, as the kernels round.

    ``rest``: keys as if hidden states were exact; ``is_exact``: queries and values, too. ``folded``: the dtype of
    weights with the input norm's in them, or None; without the rest they are multiplied with hidden states as they are.
    """
    half, store = rounding("float16"), rounding(weights.dtype.name)
    w = {name: tensor.astype(np.float64) for name, tensor in weights.tensors().items()}
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if folded is not None:
        w["qkv_proj"] *= w["input_norm"]
        scale = power_of_two(float(np.abs(w["qkv_proj"]).max()), OPERAND_BITS)
        w["qkv_proj"] = rounding(folded)(w["qkv_proj"] * scale) / scale
        w["input_norm"] = np.ones_like(w["input_norm"])
    exact = ops.rms_norm(x.astype(np.float64), w["input_norm"], config.rms_norm_eps)
    hidden = exact if is_exact or (folded and not rest) else half(exact)
    q, k, v = ops.split_heads(ops.project_qkv(hidden, w["qkv_proj"]), *heads)
    if rest:
        k = ops.split_heads(ops.project_qkv(exact, w["qkv_proj"]), *heads)[1]
    k, v = store(k), store(v)
    q, k = ops.qk_norm(q, k, w["q_norm"], w["k_norm"], config.rms_norm_eps)
    cos, sin = rope_angles(config, np.arange(x.shape[1])[None])
    q, k, v = (half(a)[0] for a in (ops.apply_rope(q, cos, sin), ops.apply_rope(k, cos, sin), v))
    seen = np.tril(np.ones((x.shape[1], x.shape[1]), bool))
    attention = np.empty_like(q)
    for head in range(heads[0]):
        kv_head = head // (heads[0] // heads[1])
        scores = np.where(seen, q[:, head] @ k[:, kv_head].T / math.sqrt(config.head_dim), -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        attention[:, head] = half(share) @ v[:, kv_head] / share.sum(-1, keepdims=True)
    return store(ops.project_output(half(attention)[None], w["o_proj"]))


def errors(
    dtype: str, change: Callable[[AttentionWeights], AttentionWeights], kinds: Sequence[Kind], past: int, new: int,
    draws: int,
) -> Any:  # fmt: skip
    """Return the weights of the last draw, and the largest relative L2 and largest error of each kind."""
    worst = np.zeros((len(kinds), 2))
    for seed in range(draws):
        weights = dataclasses.replace(change(random_layer(CONFIG, seed)).astype(dtype), losses={})
        x = np.random.default_rng(100 + seed).standard_normal((1, past + new, CONFIG.hidden_size), np.float32)
        x[..., :4] *= 20
        x = x.astype(weights.dtype)
        exact = reference.forward(CONFIG, weights, x)[1]["output"][:, past:]  # before its last rounding
        for i, kind in enumerate(kinds):
            y = simulate(CONFIG, weights, x, **kind)[:, past:]
            worst[i] = np.maximum(worst[i], (ca.relative_l2(y, exact), ca.max_error(y, exact)))
    return weights, worst


@click.command()
@click.option("--past", type=click.IntRange(min=0), default=130, show_default=True, help="Tokens before those.")
@click.option("--new", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens whose errors count.")
@click.option("--draws", type=click.IntRange(min=1), default=48, show_default=True)
@click.option("--folded", is_flag=True, help="Instead: weights with the input norm's in them, in decode or refused.")
def main(past: int, new: int, draws: int, *, folded: bool) -> None:
    """Print the table as Markdown; errors in units of 1e-3."""
    columns = ("as it is", "with the norm in the weights") if folded else ("with the rest", "without")
    head = "storage", "norm weights", "largest product", "rms(w_q) rms(w_k)", *columns, "has the rest"
    click.echo(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for dtype in DTYPES:
        kinds = [{"rest": rest, "folded": taken(dtype, rest=rest)} for rest in (True, False)]
        if folded:  # decode in float16 has hidden states in two parts, prefill in bfloat16 rounds them
            kinds = [{"rest": False, "folded": of, "is_exact": dtype == "float16"} for of in (None, dtype)]
        for name, change in CASES.items():
            weights, ((with_l2, with_max), (l2, largest)) = errors(dtype, change, kinds, past, new, draws)
            product = largest_pair_product(weights.q_norm, weights.k_norm)
            rms = weights.q_norm_stats.rms * weights.k_norm_stats.rms
            has = "yes" if multiplies_rest(CONFIG, weights.q_norm, weights.k_norm) else "no"
            cells = (dtype, name, f"{product:.1f}", f"{rms:.2f}", f"{with_l2 * 1e3:.2f}, {with_max * 1e3:.2f}",
                     f"{l2 * 1e3:.2f}, {largest * 1e3:.2f}", has)  # fmt: skip
            click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
