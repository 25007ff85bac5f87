"""The command ``cupy-attn bench``: times of every phase and of the layer, and a picture of them over tokens."""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from . import __version__, cuda
from .arrays import STORAGE_DTYPES
from .bench import DECODE, MODELS, PREFILL, TOGETHER, Timing, model_config, run_bench
from .config import AttentionConfig
from .errors import InputError
from .plots import Curve, Panel, check_plot, speed_plot
from .terminal import DEVICE, JSON, PLOT, echo_json, table
from .threads import workers

TOKENS, PLOT_TOKENS = (512,), (128, 256, 512, 1024, 2048)

TIME = "time (µs)"


@click.command()
@click.option("--model", default="0.6B", show_default=True,
              help=f"A published size ({', '.join(MODELS)}) or a model folder; weights are random.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@click.option("--tokens", type=click.IntRange(1), multiple=True,
              help="Tokens of each sequence; can be repeated.  [default: 512; with --plot "
              f"{', '.join(map(str, PLOT_TOKENS))}; as far as the model has positions]")  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True, help="Timed runs of each row.")
@click.option("--dtype", type=click.Choice(list(STORAGE_DTYPES)), default="float32", show_default=True,
              help="Storage dtype.")  # fmt: skip
@DEVICE
@PLOT
@JSON
def bench(
    model: str, batch: int, tokens: tuple[int, ...], repeats: int, dtype: str, device: str, plot: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Time every phase alone and the whole layer, on random data.

    The phases are separate array operations with materialised scores; the layer is what `run` runs. Times are
    medians of single calls, from the GPU's events or the CPU's clock. --plot draws them over tokens: the layer and the
    phases for a prompt, the layer for a token after it.
    """
    if plot is not None:
        check_plot(plot)
    config = _config_of(model)
    device = "cuda" if device != "cpu" and (device == "cuda" or cuda.problem() is None) else "cpu"
    most = config.max_position - 1  # a token is decoded after the prompt
    counts = sorted(set(tokens) or {min(count, most) for count in (PLOT_TOKENS if plot else TOKENS)})
    if counts[-1] > most:
        raise InputError(f"--tokens {counts[-1]} and a token decoded after them are more than the model's "
                         f"{config.max_position} positions; pass --tokens {most} or fewer.")  # fmt: skip
    rows: list[Timing] = []
    for count in counts:
        for row in run_bench(config, dtype=dtype, device=device, batch=batch, tokens=count, repeats=repeats):
            rows.append(row)
            if sys.stderr.isatty() and not as_json:
                click.echo(f"  {row.what}, {count} tokens ...", err=True)
    if plot is not None:
        _draw(rows, f"{model}, batch {batch}, {dtype}, {_machine(device)}, cupy_attn {__version__}", plot)
    if as_json:
        echo_json({"model": model, "batch": batch, "tokens": counts, "dtype": dtype, "device": device,
                    "rows": [dataclasses.asdict(r) for r in rows]})  # fmt: skip
        return
    for count in counts:
        click.echo(f"{model}, batch {batch}, {count} tokens, {dtype}, device {device}:")
        cells = [(r.what, f"{r.median_us:.1f}", f"{r.min_us:.1f}") for r in rows if r.tokens == count]
        click.echo(table(("what", "median us", "min us"), cells))
    if plot is not None:
        click.echo(f"Wrote {plot}.")


def _config_of(model: str) -> AttentionConfig:
    """Return the config of a published size or of a model folder."""
    if model in MODELS:
        return model_config(model)
    if not Path(model).exists():
        raise InputError(f"--model {model} does not exist and is no published size; name a model folder or one of "
                         f"{', '.join(MODELS)}.")  # fmt: skip
    return AttentionConfig.from_pretrained(model)


def _machine(device: str) -> str:
    """Return what ran it."""
    if device == "cuda":
        import cupy

        name: str = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        return f"on the GPU, {name}"
    return f"on the CPU, {platform.machine()}, {workers()} cores"


def _draw(rows: Sequence[Timing], caption: str, path: Path) -> None:
    """Draw the layer beside its phases for a prompt, and alone for one token more."""

    def curve(what: str, label: str) -> Curve:
        these = [row for row in rows if row.what == what]
        return Curve(label, [row.tokens for row in these], [row.median_us for row in these])

    left_out = (PREFILL, DECODE, TOGETHER, "split_heads")  # the last makes views, in no time
    phases = [what for what in dict.fromkeys(row.what for row in rows) if what not in left_out]
    prompt = [curve(PREFILL, "layer"), curve(TOGETHER, TOGETHER), *(curve(what, what) for what in phases)]
    panels = [
        Panel("Prefill of one attention layer", "tokens of the prompt", TIME, prompt),
        Panel("Decode of one attention layer", "context (tokens)", TIME, [curve(DECODE, "layer")]),
    ]
    speed_plot(panels, f"Qwen3, {caption}\nmedians of single calls; phases are separate array "
               "operations", path)  # fmt: skip
