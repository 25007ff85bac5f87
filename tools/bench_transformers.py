"""Our CPU layer beside the transformers layer (torch CPU, float32, sdpa): same weights, same inputs, same run.

Both do the attention half of a decoder layer: input norm, attention with KV cache, residual. Outputs are compared
first. Then the two take turns, some calls each, so that a machine whose speed drifts slows both; the figure is the
median over all calls. Needs the hf extra.

    python tools/bench_transformers.py [--model 0.6B] [--json FILE]
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
import transformers
from transformers import DynamicCache, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

import cupy_attn as ca
from cupy_attn.bench import MODELS, model_config, random_layer

PREFILL_TOKENS = (128, 512, 2048, 4096)
DECODE_CONTEXTS = (128, 1024, 4096)
SAME = 1e-5  # relative L2 between the two


class Theirs:
    """The attention half of a transformers decoder layer."""

    def __init__(self, config: ca.AttentionConfig, weights: ca.AttentionWeights) -> None:
        self.hf_config = Qwen3Config(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=8,
            num_hidden_layers=1,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=config.rope.to_dict(),
            rms_norm_eps=config.rms_norm_eps,
        )
        self.hf_config._attn_implementation = "sdpa"
        self.layer = Qwen3DecoderLayer(self.hf_config, 0).eval()
        state = {name: torch.from_numpy(t.copy()) for name, t in weights.to_dict(config, prefix="").items()}
        missing = self.layer.load_state_dict(state, strict=False).missing_keys
        if any("self_attn" in name or name.startswith("input_layernorm") for name in missing):
            raise SystemExit(f"transformers did not take {missing}")
        self.rope = Qwen3RotaryEmbedding(self.hf_config)

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.hf_config)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, first: int, cache: DynamicCache | None = None) -> torch.Tensor:
        positions = torch.arange(first, first + x.shape[1])[None]
        h = self.layer.input_layernorm(x)
        # The cache by its place: transformers 5.24 renamed it.
        out, _ = self.layer.self_attn(h, self.rope(x, positions), None, cache)
        return x + out


def take_turns(ours: Callable[[], None], theirs: Callable[[], None], rounds: int, calls: int) -> tuple[float, float]:
    """Return the median time of each in milliseconds."""
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    for _ in range(rounds):
        for run, collected in zip((ours, theirs), times, strict=True):
            run()  # wakes this side's threads, lets the other's go to sleep
            for _ in range(calls):
                start = time.perf_counter()
                run()
                collected.append((time.perf_counter() - start) * 1e3)
    gc.enable()
    return float(np.median(times[0])), float(np.median(times[1]))


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="0.6B", show_default=True)
@click.option("--rounds", default=6, show_default=True, help="Turns each side takes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(model: str, rounds: int, json_file: Path | None) -> None:
    """Time both layers and print a table; exit status 1 if their outputs differ."""
    config = model_config(model)
    weights = random_layer(config)
    ours, theirs = ca.Attention(config, weights, "float32", "cpu"), Theirs(config, weights)
    rng = np.random.default_rng(0)
    rows = []

    def hidden(tokens: int) -> np.ndarray:
        return rng.standard_normal((1, tokens, config.hidden_size), np.float32)

    def check(mine: np.ndarray, other: torch.Tensor) -> None:
        error = ca.relative_l2(mine, other.numpy())
        if error > SAME:
            raise SystemExit(f"the outputs differ by {error:.2g}")

    for tokens in PREFILL_TOKENS:
        x = hidden(tokens)
        xt = torch.from_numpy(x)
        check(ours(x, residual=x), theirs(xt, 0))
        pair = take_turns(lambda x=x: ours(x, residual=x), lambda xt=xt: theirs(xt, 0), rounds, 3)
        rows.append({"what": f"prefill {tokens}", "ours_ms": pair[0], "transformers_ms": pair[1]})
    for context in DECODE_CONTEXTS:
        prompt = hidden(context)
        my_cache, their_cache = ours.new_cache(1, context + 2000), theirs.new_cache()
        check(ours(prompt, my_cache, residual=prompt), theirs(torch.from_numpy(prompt), 0, their_cache))
        x = hidden(1)
        xt = torch.from_numpy(x)
        count = [context]

        def step(xt: torch.Tensor = xt, cache: DynamicCache = their_cache, count: list[int] = count) -> torch.Tensor:
            count[0] += 1
            return theirs(xt, count[0] - 1, cache)

        check(ours(x, my_cache, residual=x), step())
        pair = take_turns(lambda x=x, c=my_cache: ours(x, c, residual=x), step, rounds, 12)
        rows.append({"what": f"decode at {context}", "ours_ms": pair[0], "transformers_ms": pair[1]})

    click.echo(f"Qwen3-{model} shape, float32, {platform.machine()}, {torch.get_num_threads()} cores, NumPy "
               f"{np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n")  # fmt: skip
    click.echo("| what | ours, ms | transformers, ms | ratio |\n|---|---|---|---|")
    for row in rows:
        ratio = row["transformers_ms"] / row["ours_ms"]
        click.echo(f"| {row['what']} | {row['ours_ms']:.2f} | {row['transformers_ms']:.2f} | {ratio:.2f} |")
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
