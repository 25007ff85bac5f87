"""A transformers Qwen3 model with this package's layers in it, beside itself without: tokens a second, error of logits.

Two copies of one model take turns at greedy generation, one of them patched
(:func:`cupy_attn.integrations.transformers.patch`). Tokens a second are those after the first. Logits of both, over
prompt and answer, are compared with those of a third copy in float32. Without MODEL, weights are random, of the shape
of Qwen3-0.6B, K-norm weights as large as its own. Needs the hf extra.

    python tools/patch_speed.py [MODEL] [--batch 1 --batch 4] [--dtype bfloat16] [--json FILE]
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers

import cupy_attn as ca
from cupy_attn.errors import CupyAttnError
from cupy_attn.integrations.transformers import patch

SIZES: dict[str, Any] = {
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28,
    "intermediate_size": 3072, "vocab_size": 151_936, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
# Largest |k_norm.weight| by layer, as in Qwen3-0.6B: layers 1 to 7 above 20, 16 of 28 above 10.
MAXIMA = [96.5, 44.5, 44.0, 30.0, 41.75, 34.0, 25.0, 21.0, *[12.0] * 8, *[6.0] * 12]
ROUNDS = 3  # timed turns of each model, after one to warm up


def random_model(dtype: str, device: str, **changes: Any) -> Any:
    """Return a random model of the 0.6B shape with such norms."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES | changes)).eval()
    with torch.no_grad():
        for layer, largest in zip(model.model.layers, MAXIMA, strict=True):
            weight = layer.self_attn.k_norm.weight
            weight.normal_().mul_(min(largest / 10, 3)).abs_().clamp_(min=0.1)
            weight[7] = largest
    model = model.to(device, getattr(torch, dtype))
    # from_pretrained leaves the frequencies in float32, .to() does not.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """Return a model's logits [B, S, vocabulary]."""
    return model(ids, attention_mask=mask, **options).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the relative L2 error of a against b."""
    return float((a - b).norm() / b.norm())


def logit_error(model: Any, ids: torch.Tensor, mask: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 error of a model's logits where the mask shows a token."""
    shown = mask.bool()
    return relative(logits(model, ids, mask).float()[shown], expected[shown])


class Clock(transformers.LogitsProcessor):
    """Notes when the first token of an answer is ready; the GPU's part is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.first = device.type == "cuda", 0.0

    def now(self) -> float:
        """Return the time in seconds, once the GPU is done."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Let logits pass."""
        self.first = self.first or self.now()
        return scores


def answer(model: Any, ids: torch.Tensor, new: int, *clocks: Clock) -> torch.Tensor:
    """Return prompts with exactly ``new`` tokens after each, chosen greedily."""
    lengths = {"min_new_tokens": new, "max_new_tokens": new}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths,
                          logits_processor=transformers.LogitsProcessorList(clocks))  # fmt: skip


def speeds(models: Mapping[str, Any], ids: torch.Tensor, new: int) -> dict[str, float]:
    """Return what each model does with prompts: milliseconds to the first token, tokens a second after it, medians."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(1 + ROUNDS):
        for name, model in models.items():
            clock = Clock(ids.device)
            start = clock.now()
            answer(model, ids, new, clock)
            taken[name].append((clock.first - start, clock.now() - clock.first))
    row = {}
    for name, times in taken.items():
        prompt_s, decode_s = np.median(times[1:], axis=0).tolist()
        row |= {f"{name}_prompt_ms": prompt_s * 1e3, f"{name}_tokens_per_s": len(ids) * (new - 1) / decode_s}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as Markdown."""
    head = ("batch", "prompt", "new tokens", "plain tokens/s", "patched tokens/s", "patched / plain", "plain prompt ms",
            "patched prompt ms", "plain logit error", "patched logit error")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        cells = (
            str(r["batch"]), str(r["prompt"]), str(r["new"]), f"{r['plain_tokens_per_s']:.1f}",
            f"{r['patched_tokens_per_s']:.1f}", f"{r['patched_tokens_per_s'] / r['plain_tokens_per_s']:.2f}",
            f"{r['plain_prompt_ms']:.1f}", f"{r['patched_prompt_ms']:.1f}", f"{r['plain_logit_error']:.2g}",
            f"{r['patched_logit_error']:.2g}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_positions(model: Path | None, prompt: int, new: int) -> None:
    """End with a sentence, before anything is loaded, unless a model has positions for a prompt and its answer."""
    positions = SIZES["max_position_embeddings"]
    if model is not None:
        try:
            positions = ca.AttentionConfig.from_pretrained(model).max_position
        except CupyAttnError as error:
            raise click.ClickException(str(error)) from None
    if prompt + new > positions:
        raise click.ClickException(f"a prompt of {prompt} tokens and an answer of {new} are more than the model's "
                                   f"{positions} positions; take fewer.")  # fmt: skip


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 4), show_default=True)
@click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--new", type=click.IntRange(2), default=128, show_default=True, help="Tokens of each answer.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here too.")
def main(
    model: Path | None, batches: tuple[int, ...], prompt: int, new: int, dtype: str, json_file: Path | None
) -> None:  # fmt: skip
    """Time MODEL, a transformers folder, plain and patched; exit status 1 if patching costs accuracy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_positions(model, prompt, new)
    if model is None:
        plain = random_model(dtype, device)
    else:
        plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
    models, wide = {"plain": plain, "patched": copy.deepcopy(plain)}, copy.deepcopy(plain).float()
    patch(models["patched"], capacity=prompt + new)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"
    report: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
        "cupy_attn": ca.__version__, "model": "random, 0.6B shape" if model is None else model.name, "dtype": dtype,
        "rows": [],
    }  # fmt: skip
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(wide.config.vocab_size, (batch, prompt), generator=generator).to(device)
        row = {"batch": batch, "prompt": prompt, "new": new} | speeds(models, ids, new)
        tokens = answer(wide, ids, new)
        shown = torch.ones_like(tokens)
        expected = logits(wide, tokens, shown)
        row |= {f"{which}_logit_error": logit_error(one, tokens, shown, expected) for which, one in models.items()}
        report["rows"].append(row)
        if json_file:
            json_file.write_text(json.dumps(report, indent=1) + "\n")
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, cupy_attn {ca.__version__}"
    click.echo(f"{name}, {libraries}; {report['model']}, {dtype}; logit errors: relative L2 against float32.\n")
    click.echo(table(report["rows"]))
    if any(not row["patched_logit_error"] <= row["plain_logit_error"] for row in report["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
