"""The accuracy table of docs/numerics.md: relative L2 error of the layer's output by dtype and max |k_norm.weight|.

    python tools/accuracy_table.py [--model 0.6B] [--tokens 256] [--device auto]

Beside ours stands what rounding after every operation, as an eager all-16-bit chain does, costs on the same weights.
"""

from __future__ import annotations

import dataclasses

import click
import numpy as np

import cupy_attn as ca
from cupy_attn import reference
from cupy_attn.accuracy import BARS
from cupy_attn.bench import MODELS, model_config, random_layer
from cupy_attn.demo import k_norm_weight

MAXIMA = ((1.5, 1.0, 0.1), (20.0, 2.3, 2.2), (44.5, 2.34, 3.98), (96.5, 3.56, 9.13), (1000.0, 20.0, 90.0))


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="0.6B", show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(model: str, tokens: int, device: str) -> None:
    """Print the table as Markdown."""
    config = model_config(model)
    base = random_layer(config)
    x = np.random.default_rng(1).standard_normal((1, tokens, config.hidden_size), np.float32)
    x[..., :4] *= 20
    click.echo("| storage | largest k_norm | ours | bar | rounded after every operation |\n|---|---|---|---|---|")
    for dtype, bar in BARS.items():
        for largest, mean, std in MAXIMA:
            k_norm = k_norm_weight(np.random.default_rng(2), config.head_dim, largest, mean, std)
            layer = ca.Attention(config, dataclasses.replace(base, k_norm=k_norm), dtype, device)
            given = x.astype(layer.dtype)
            exact, _ = reference.forward(config, layer.weights, given)
            chain, _ = reference.forward(config, layer.weights, given, rounding="transformers", angles="float32")
            ours = ca.relative_l2(layer(given), exact)
            row = (dtype, f"{largest:g}", f"{ours:.1e}", f"{bar:g}", f"{ca.relative_l2(chain, exact):.1e}")
            click.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
