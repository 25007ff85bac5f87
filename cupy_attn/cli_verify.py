"""The command ``cupy-attn verify``: layers held against the float64 reference and against dumps."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from . import __version__, io
from .cli_inputs import (
    ANGLES,
    DTYPE,
    POSITIONS,
    config_differences,
    convert,
    device_name,
    differences_text,
    given_positions,
    layer_of_dump,
    load_layer,
    natural_dtype,
    no_layer,
    other_layer,
)
from .plots import check_plot, verification_plot
from .terminal import DEVICE, JSON, KEY, MODEL, PATH, PLOT, echo_json, table, verdict
from .verify import Verification, verify_layer

ERRORS = "error: relative L2; of y (max): max |error| / max |y|"


@dataclasses.dataclass(frozen=True)
class _Verified:
    """What was found of a layer on a file's activations ``shape`` [B, S, H].

    ``largest`` is max |k_norm.weight|; ``differences`` are those of the dump's config, None if it says none.
    """

    path: Path
    layer: int
    dtype: str
    device: str
    largest: float
    shape: tuple[int, ...]
    differences: list[dict[str, Any]] | None
    result: Verification


@click.command()
@MODEL
@click.argument("activations", type=PATH, nargs=-1, required=True)
@click.option("--layer", "layers", type=int, multiple=True,
              help="Index of the layer, from 0; can be repeated.  [default: what a dump says, 0 for activations "
              "without stages]")  # fmt: skip
@POSITIONS
@click.option("--tokens", type=click.IntRange(1), default=None, help="Use only the first tokens of each sequence.")
@KEY
@DTYPE
@DEVICE
@ANGLES
@PLOT
@JSON
def verify(
    model: Path,
    activations: tuple[Path, ...],
    layers: tuple[int, ...],
    positions: str | None,
    tokens: int | None,
    key: str | None,
    dtype: str | None,
    device: str,
    angles: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare layers of MODEL with the float64 reference on ACTIVATIONS, stage by stage.

    If ACTIVATIONS is a dump that holds stages (named as `cupy-attn run --stages` does, the output y), the layer is
    compared with those too, and values of the dump's config that are not MODEL's are named. Several files, or several
    layers on one, get a line each, with the stage that is nearest its bar or furthest past it. --plot draws the error
    of every stage of one layer beside its bar, and by position. Exit status 1 if any stage of any layer misses its bar.
    """
    if plot is not None:
        check_plot(plot)
    dumps = {path: io.load_dump(path, key) for path in activations}
    wanted = [(path, layer) for path, dump in dumps.items() for layer in _layers_of(path, dump, layers)]
    if plot is not None and len(wanted) > 1:
        raise click.UsageError(f"--plot draws one layer, {len(wanted)} are asked for; name one file and one --layer.")

    def run(path: Path, index: int) -> _Verified:
        dump = dumps[path]
        layer = load_layer(model, index, dtype or natural_dtype(dump.hidden_states), device, angles)
        x = convert(path, dump.hidden_states, layer)
        given = given_positions(positions, dump.positions, x.shape[1])
        differences = config_differences(path, dump.metadata, layer.config, index)
        if sys.stderr.isatty() and not as_json:
            click.echo(f"  computing the float64 reference of layer {index} ...", err=True)
        result = verify_layer(
            layer,
            x,
            positions=given,
            expected=dump.stages,
            expected_dtype=natural_dtype(dump.hidden_states),
            tokens=tokens,
            angles=angles,
        )
        largest = layer.weights.k_norm_stats.max_abs
        return _Verified(path, index, str(layer.dtype), layer.device, largest, x[:, :tokens].shape, differences, result)

    done = [run(path, index) for path, index in wanted]
    passed = all(one.result.passed for one in done)
    if plot is not None:
        one = done[0]
        said = "passed" if one.result.passed else "missed a bar"
        caption = (f"{one.path} by layer {one.layer} of {model}, {one.dtype} on the {device_name(one.device)}: {said}; "
                   f"cupy_attn {__version__}")  # fmt: skip
        verification_plot(one.result, caption, plot)
    if as_json:
        found = [_as_json(one) for one in done]
        echo_json(found[0] if len(done) == 1 else {
            "passed": passed, "layers": [{"activations": str(one.path)} | f for one, f in zip(done, found, strict=True)]
        })  # fmt: skip
    else:
        click.echo(_stage_by_stage(model, done[0]) if len(done) == 1 else _layer_by_layer(model, done))
        if plot is not None:
            click.echo(f"Wrote {plot}.")
    if not passed:
        raise click.exceptions.Exit(1)


def _layers_of(path: Path, dump: io.Dump, asked: Sequence[int]) -> list[int]:
    """Return the layers to verify on a file's activations; stages can only be compared with their own layer's."""
    said = layer_of_dump(path, dump.metadata)
    if not asked:
        if dump.stages and said is None:
            raise no_layer(path)
        return [said or 0]
    for layer in asked:
        if dump.stages and said not in (None, layer):
            raise other_layer(path, said, layer)
    return list(dict.fromkeys(asked))


def _stage_by_stage(model: Path, one: _Verified) -> str:
    """Return what was found of one layer as text."""
    result, (batch, seq, _) = one.result, one.shape
    ran = f"Layer {one.layer} of {model}, {batch} x {seq} tokens, {one.dtype}"
    parts = [f"{ran} on the {device_name(one.device)}, max |k_norm.weight| {one.largest:g}."]
    reference = f"Against the float64 reference ({ERRORS})"
    for title, rows in ((reference, result.reference), ("Against the dump (error: relative L2)", result.dump)):
        if rows:
            lines = [(r.stage, f"{r.max_abs:.2e}", f"{r.relative_l2:.2e}", f"{r.bar:.2e}", verdict(r.passed))
                     for r in rows]  # fmt: skip
            parts.append(f"{title}:\n{table(('stage', 'max abs', 'error', 'bar', 'verdict'), lines)}")
    findings = [] if result.departure is None else [result.departure.text]
    findings += [f"Collapse: {sentence}" for sentence in result.collapse]
    if one.differences:
        findings.append(f"Config: {differences_text(one.differences)}")
    if findings:
        parts.append("\n".join(findings))
    missed = ", ".join(_misses(result)) or "collapsed"
    parts.append("All stages are within their bars." if result.passed else
                 f"MISSED: {missed}; the first stage named is where to look.")  # fmt: skip
    return "\n\n".join(parts)


def _layer_by_layer(model: Path, done: Sequence[_Verified]) -> str:
    """Return what was found of several layers as text, a line each."""
    paths = {one.path for one in done}
    names = {path: path.name if len({p.name for p in paths}) == len(paths) else str(path) for path in paths}
    several = len(paths) > 1
    header = ("layer", "tokens", "dtype", "max |k|", "error of y", "worst stage", "its error", "its bar", "dump",
              "verdict")  # fmt: skip
    lines = []
    for one in done:
        result, (batch, seq, _) = one.result, one.shape
        y = next(row for row in result.reference if row.stage == io.OUTPUT)
        worst = max(result.reference, key=lambda row: _of_bar(row.relative_l2, row.bar))
        dump = next((row.stage for row in result.dump if not row.passed), "ok") if result.dump else "-"
        lines.append((
            f"{one.layer}, {names[one.path]}" if several else str(one.layer),
            f"{batch} x {seq}", one.dtype, f"{one.largest:.4g}",
            f"{y.relative_l2:.2e}", worst.stage, f"{worst.relative_l2:.2e}", f"{worst.bar:.2e}", dump,
            verdict(result.passed),
        ))  # fmt: skip
    missed = [
        f"{one.layer}{f' of {names[one.path]}' if several else ''} ({', '.join(_misses(one.result)) or 'collapsed'})"
        for one in done
        if not one.result.passed
    ]
    end = "All stages of all layers are within their bars."
    if missed:
        end = f"MISSED: layer {'; layer '.join(missed)}. Verify such a layer alone for its stages and where it departs."
    notes = [f"Config of {names[one.path]}: {differences_text(one.differences)}" for one in done if one.differences]
    end = "\n".join(dict.fromkeys([end, *notes]))
    where = (
        f"{len(done)} layers of {model} on the {device_name(done[0].device)}, against the float64 reference ({ERRORS})"
    )
    return f"{where}:\n\n{table(header, lines)}\n\n{end}"


def _of_bar(error: float, bar: float) -> float:
    """Return an error as a share of its bar; NaN is worse than everything."""
    return error / bar if np.isfinite(error) else np.inf


def _misses(result: Verification) -> list[str]:
    return [row.stage for row in (*result.reference, *result.dump) if not row.passed]


def _as_json(one: _Verified) -> dict[str, Any]:
    def rows(stage_errors: list[Any]) -> list[dict[str, Any]]:
        return [dataclasses.asdict(r) | {"passed": r.passed} for r in stage_errors]

    result = one.result
    return {
        "passed": result.passed, "layer": one.layer, "dtype": one.dtype, "device": one.device,
        "shape": list(one.shape), "reference": rows(result.reference), "dump": rows(result.dump),
        "departure": result.departure and dataclasses.asdict(result.departure), "collapse": result.collapse,
        "config_differences": one.differences,
    }  # fmt: skip
