"""The command ``cupy-attn inspect``: what a checkpoint's norm weights say, and what its heads do with a dump."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from . import __version__, health, io
from .cache import KVCache
from .cli_inputs import config_differences, differences_text, layer_of_dump, no_layer, other_layer
from .config import AttentionConfig
from .errors import InputError
from .plan import check_positions
from .plots import check_plot, entropy_plot, norm_plot
from .terminal import JSON, KEY, MODEL, PATH, PLOT, echo_json, table
from .weights import (
    PEAK_TO_PAIR,
    PEAK_TO_RMS,
    AttentionWeights,
    NormStats,
    largest_pair_product,
    read_norms,
    takes_precise_path,
)


@click.command()
@MODEL
@click.option("--dump", "dumps", type=PATH, multiple=True,
              help="Print what the heads do in this dump instead; can be repeated.")  # fmt: skip
@click.option("--layer", type=int, help="Layer of the dump.  [default: what its metadata say]")
@KEY
@PLOT
@JSON
def inspect(
    model: Path, dumps: tuple[Path, ...], layer: int | None, key: str | None, plot: Path | None, as_json: bool
) -> None:
    """Print the Q-norm and K-norm weights of every layer of MODEL and which layers take the precise path.

    A layer whose max |k_norm.weight| exceeds the threshold, or whose weights of Q and K together make as large scores,
    computes them with split products on a GPU: an error of 0.0005 before the norm is one of 0.05 after a weight of
    96.5. max |q k| is the largest product of two weights that RoPE lets meet, rms q k that of root mean squares.

    With --dump, a file as `verify` takes: for each head the range of its scores, the mean entropy of its rows over the
    most that the keys they see allow, the mean weight of the first key (an attention sink), and whether it holds NaN or
    Inf, has collapsed onto one key, is one-hot (each row on a key of its own), uniform or dead. Rows come from the
    dump's probs or scores, or from its queries and keys. --plot then draws the entropy of every head by position.
    """
    if not dumps and (layer is not None or key is not None):
        raise click.UsageError("--layer and --key say what is in a dump; pass it with --dump.")
    if plot is not None:
        check_plot(plot)
    config = AttentionConfig.from_pretrained(model)
    if dumps:
        _inspect_dumps(model, config, [_read_dump(model, config, path, layer, key) for path in dumps], plot, as_json)
    else:
        _inspect_weights(model, config, plot, as_json)


def _inspect_weights(model: Path, config: AttentionConfig, plot: Path | None, as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for index, q_norm, k_norm in read_norms(model, config):
        q, k = NormStats.of(q_norm), NormStats.of(k_norm)
        rows.append({
            "layer": index, "precise": takes_precise_path(config, q_norm, k_norm),
            "sliding_window": config.window(index), "k_norm": dataclasses.asdict(k), "q_norm": dataclasses.asdict(q),
            "largest_pair_product": largest_pair_product(q_norm, k_norm), "spread": q.rms * k.rms,
        })  # fmt: skip
    if plot is not None:
        norm_plot(rows, config, str(model), plot)
    if as_json:
        echo_json({"model": str(model), "threshold": config.precise_threshold, "config": config.to_dict(),
                    "layers": rows})  # fmt: skip
        return
    click.echo(f"{model}: {config.model_type}, hidden_size {config.hidden_size}, heads {config.num_attention_heads}:"
               f"{config.num_key_value_heads} of {config.head_dim}, RoPE {config.rope.rope_type} theta "
               f"{config.rope.rope_theta:g}, positions to {config.max_position - 1}\n")  # fmt: skip
    click.echo(table(
        ("layer", "max |k|", "mean k", "std k", "median |k|", "max |q|", "max |q k|", "rms q k", "window", "scores"),
        [(str(r["layer"]), f"{r['k_norm']['max_abs']:.4g}", f"{r['k_norm']['mean']:.3f}", f"{r['k_norm']['std']:.3f}",
          f"{r['k_norm']['quartiles_abs'][1]:.3f}", f"{r['q_norm']['max_abs']:.4g}",
          f"{r['largest_pair_product']:.4g}", f"{r['spread']:.3g}", str(r["sliding_window"] or "-"),
          "precise" if r["precise"] else "normal") for r in rows]))  # fmt: skip
    precise, threshold = sum(r["precise"] for r in rows), config.precise_threshold
    click.echo(f"\n{precise} of {len(rows)} layers take the precise path: max |k| above {threshold:g}, max |q k| above "
               f"{threshold / PEAK_TO_PAIR:g} or rms q k above {threshold / PEAK_TO_RMS:g}.")  # fmt: skip
    if plot is not None:
        click.echo(f"Wrote {plot}.")


@dataclasses.dataclass(frozen=True)
class _Inspected:
    """A dump, what its heads do, and how its config is another; ``source`` names the stages of the probabilities."""

    path: Path
    layer: int
    dtype: str
    positions: np.ndarray
    source: str
    rows: health.Rows
    heads: list[health.HeadHealth]
    differences: list[dict[str, Any]] | None


def _read_dump(model: Path, config: AttentionConfig, path: Path, layer: int | None, key: str | None) -> _Inspected:
    dump = io.load_dump(path, key)
    layer = _layer_of(path, dump.metadata, layer)
    weights = AttentionWeights.from_pretrained(model, layer, config=config)
    batch, seq, _ = dump.hidden_states.shape
    stages = io.check_stages(dump.stages, config, batch, seq)
    cache = KVCache(config, layer, batch=batch, capacity=1, dtype="float32")
    positions = check_positions(dump.positions, config, cache, np.full(batch, seq), seq)
    try:
        source, rows = health.measure_dump(stages, config, weights, positions)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    heads = health.head_health(rows, stages.get("attention"))
    differences = config_differences(path, dump.metadata, config, layer)
    dtype = dump.metadata.get("dtype", str(dump.hidden_states.dtype))
    return _Inspected(path, layer, dtype, positions, source, rows, heads, differences)


def _layer_of(path: Path, metadata: dict[str, str], asked: int | None) -> int:
    """Return the layer that a dump is of: what it says, or what was asked for if it says nothing."""
    said = layer_of_dump(path, metadata)
    if said is None:
        if asked is None:
            raise no_layer(path)
        return asked
    if asked not in (None, said):
        raise other_layer(path, said, asked)
    return said


def _inspect_dumps(
    model: Path, config: AttentionConfig, found: Sequence[_Inspected], plot: Path | None, as_json: bool
) -> None:
    if plot is not None:
        caption = (
            f"{model}, {config.num_attention_heads}:{config.num_key_value_heads} heads, cupy_attn {__version__}\n"
            "1: even over the keys a token sees; 0: all on one of them; grey: it sees one key only, or NaN or Inf"
        )
        panels = [(f"{d.path.name}, layer {d.layer}, {d.dtype}", d.rows, d.heads, d.positions) for d in found]
        entropy_plot(panels, caption, plot)
    if as_json:
        echo_json({"model": str(model), "dumps": [
            {"dump": str(d.path), "layer": d.layer, "shape": list(d.positions.shape), "source": d.source,
             "heads": [dataclasses.asdict(head) for head in d.heads],
             "config_differences": d.differences} for d in found]})  # fmt: skip
        return
    click.echo("\n\n".join(_described(model, d) for d in found))
    if plot is not None:
        click.echo(f"Wrote {plot}.")


def _described(model: Path, found: _Inspected) -> str:
    """Return what was found as text: a line about the dump, a table of its heads, a sentence."""
    batch, seq = found.positions.shape
    title = f"{found.path}: layer {found.layer} of {model}, {batch} x {seq} tokens, rows from {found.source}"
    lines = [(str(h.head), _number(h.min_score, ".4g"), _number(h.max_score, ".4g"),
              _number(h.relative_entropy, ".3f"), _number(h.first_key, ".3f"), ", ".join(h.flags) or "-")
             for h in found.heads]  # fmt: skip
    heads = table(("head", "min score", "max score", "entropy", "first key", "flags"), lines)
    end = f"Layer {found.layer}: {health.summary(found.heads)}"
    if found.differences:
        end += f"\nConfig: {differences_text(found.differences)}"
    return f"{title}\n\n{heads}\n\n{end}"


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)
