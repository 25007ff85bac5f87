"""Pictures; needs the ``plot`` extra (matplotlib)."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .accuracy import StageError
from .config import AttentionConfig
from .errors import FileError
from .health import HeadHealth, Rows
from .io import OUTPUT, check_place, write_whole
from .verify import Verification
from .weights import PEAK_TO_PAIR, PEAK_TO_RMS

BLUE, ORANGE, RED = "tab:blue", "tab:orange", "tab:red"
STAGE_COLORS = ("tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "0.5")
ROOFLINE = "roofline"  # label of the least time possible, or the highest rate
LETTERS_PER_INCH = 14  # of the small print, on average with some to spare
MOST_INCHES = 500  # of a figure's height: Agg draws up to 65535 pixels
LARGE_MARKS = 64  # tokens up to which the points of a curve are large


def check_plot(path: Path) -> None:
    """Check, before any work is done, that a picture can be drawn and written there.

    Raises
    ------
    FileError
        matplotlib is missing, the name does not end in .png, or the place cannot be written.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise FileError(f"{path} cannot be drawn without matplotlib; pip install 'cupy-attn[plot]'.") from None
    if path.suffix != ".png":
        raise FileError(f"{path} does not end in .png; choose a name that does.")
    check_place(path)


def _new_figure(width: float, height: float, caption: str) -> Any:
    """Return an empty figure of some inches with small print below, in lines no longer than the figure is wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    lines = [textwrap.fill(line, int(width * LETTERS_PER_INCH)) for line in caption.splitlines()]
    figure.supxlabel("\n".join(lines), fontsize="small")
    return figure


def _save(figure: Any, path: Path) -> None:
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def norm_plot(rows: Sequence[dict[str, Any]], config: AttentionConfig, model: str, path: Path) -> None:
    """Draw max, quartiles and median of |norm weight| of every layer, K and Q, and which take the precise path."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    threshold = config.precise_threshold
    figure = _new_figure(
        10,
        6.5,
        f"{model}: {config.model_type}, head_dim {config.head_dim}, {config.num_attention_heads}:"
        f"{config.num_key_value_heads} heads\nprecise path: on a GPU these layers compute scores with split products, "
        f"because max |k_norm.weight| is above {threshold:g}, the largest product of weights of Q and K in a rotated "
        f"pair above {threshold / PEAK_TO_PAIR:g} or rms(q_norm.weight) times rms(k_norm.weight) above "
        f"{threshold / PEAK_TO_RMS:g}",
    )
    layers = [r["layer"] for r in rows]
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, (name, title) in zip(panels, (("k_norm", "K-norm"), ("q_norm", "Q-norm")), strict=True):
        stats = [r[name] for r in rows]
        low, middle, high = zip(*(s["quartiles_abs"] for s in stats), strict=True)
        axes.plot(layers, [s["max_abs"] for s in stats], "o-", color=RED, label="maximum")
        axes.fill_between(layers, low, high, color=BLUE, alpha=0.3, label="quartiles")
        axes.plot(layers, middle, color=BLUE, label="median")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(f"|{name}.weight|")
        axes.set_title(f"{title} weights by layer")
    panels[0].axhline(threshold, color="black", linestyle="--", label=f"threshold {threshold:g}")
    label = "precise path"
    for r in rows:
        if r["precise"]:
            edges = r["layer"] - 0.5, r["layer"] + 0.5
            panels[0].axvspan(*edges, color=ORANGE, alpha=0.15, linewidth=0, label=label)
            label = "_nolegend_"
    for axes in panels:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[1].set_xlabel("layer")
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_xlim(-0.5, max(layers) + 0.5)
    _save(figure, path)


def verification_plot(result: Verification, caption: str, path: Path) -> None:
    """Draw the relative L2 error of every stage beside its bar, and of y and a dump's stages by position.

    Errors of zero, and those that are no number, have no place on a log axis: they go to its ends and are named there.
    """
    figure = _new_figure(13, 6.5, caption)
    by_stage, by_token = figure.subplots(1, 2, width_ratios=(5, 6))
    stages = list(dict.fromkeys(row.stage for row in (*result.reference, *result.dump)))
    offset = 0.17 if result.dump else 0.0
    _stage_points(by_stage, stages, result.reference, -offset, "o", BLUE, "error against the reference")
    if result.dump:
        _stage_points(by_stage, stages, result.dump, offset, "s", ORANGE, "error against the dump")
    by_stage.plot([], [], "|", color="black", markersize=11, markeredgewidth=2, label="bar")
    if not result.passed:
        by_stage.plot([], [], "o", color=RED, markersize=6, label="missed")
    by_stage.set_xscale("log")
    by_stage.margins(x=0.12)
    by_stage.set_yticks(range(len(stages)), stages)
    by_stage.invert_yaxis()
    by_stage.grid(axis="x", alpha=0.3)
    by_stage.set_xlabel("relative L2 error (no unit); y (max): max |error| / max |y|")
    by_stage.set_title("Error of each stage, and the bar it has to keep")
    by_stage.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize="small", frameon=False)

    _token_curves(by_token, result)
    by_token.grid(alpha=0.3)
    by_token.set_title("Error by position")
    by_token.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    _save(figure, path)


def _stage_points(
    axes: Any, stages: Sequence[str], rows: Sequence[StageError], offset: float, marker: str, color: str, label: str
) -> None:
    """Mark each row's error and its bar on the line of its stage."""
    for row in rows:
        y = stages.index(row.stage) + offset
        axes.plot(row.bar, y, "|", color="black", markersize=11, markeredgewidth=2)
        shade = color if row.passed else RED
        if 0 < row.relative_l2 < np.inf:
            axes.plot(row.relative_l2, y, marker, color=shade, markersize=6)
            continue
        x, align, text = (0.01, "left", "0 (exact)") if row.relative_l2 == 0 else (0.99, "right", "NaN or Inf")
        axes.text(
            x, y, text, color=shade, fontsize="small", ha=align, va="center", transform=axes.get_yaxis_transform()
        )
    axes.plot([], [], marker, color=color, markersize=6, label=label)


def _token_curves(axes: Any, result: Verification) -> None:
    """Draw the error of y against the reference, of each stage against the dump, and the bars of y."""
    from matplotlib.ticker import MaxNLocator

    x, label_x = _shared_positions(result.positions)
    size = 6 if len(x) <= LARGE_MARKS else 3
    every = np.stack([result.y_by_token, *result.dump_by_token.values()])
    measured = every[(every > 0) & np.isfinite(every)]
    floor = measured.min() / 3 if measured.size else 1e-17

    def curve(errors: np.ndarray, label: str, color: str, **style: Any) -> None:
        label = label if errors.any() else f"{label}: 0 (exact)"
        measured = np.where((errors > 0) & np.isfinite(errors), errors, np.nan)
        axes.plot(x, measured, marker=".", markersize=size, color=color, label=label, **style)
        exact = x[errors == 0]
        axes.plot(exact, np.full(exact.size, floor), ".", markersize=size, color=color)

    others = [stage for stage in result.dump_by_token if stage != OUTPUT]
    for i, stage in enumerate(others):
        color, style = STAGE_COLORS[i % len(STAGE_COLORS)], "-" if i < len(STAGE_COLORS) else "--"
        curve(result.dump_by_token[stage], f"{stage}, dump", color, linestyle=style, linewidth=1)
    for errors, rows, color, style, label in (
        (result.dump_by_token.get(OUTPUT), result.dump, ORANGE, ":", "dump"),
        (result.y_by_token, result.reference, BLUE, "--", "reference"),
    ):
        if errors is not None:
            curve(errors, f"{OUTPUT}, {label}", color, linewidth=2)
            bar = next(row.bar for row in rows if row.stage == OUTPUT)
            axes.axhline(bar, color="black", linestyle=style, label=f"bar of {OUTPUT}, {label}")
    broken = x[~np.isfinite(every).all(axis=0)]
    if broken.size:
        axes.plot(broken, np.full(broken.size, 0.98), "x", color=RED, transform=axes.get_xaxis_transform(),
                  label="NaN or Inf")  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor / 2)
    axes.set_ylabel(
        "relative L2 error at the token (no unit)" + ("; 0 at the lower edge" if (every == 0).any() else "")
    )
    axes.set_xlabel(label_x)
    axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


@dataclasses.dataclass(frozen=True)
class Curve:
    """One thing over tokens; one labelled ``roofline`` is drawn as a bound, the first of a panel as ours."""

    label: str
    tokens: Sequence[int]
    values: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves that share axes."""

    title: str
    label_x: str
    label_y: str
    curves: Sequence[Curve]


def speed_plot(panels: Sequence[Panel], caption: str, path: Path) -> None:
    """Draw times or rates over tokens, both on log axes, a label in the same colour everywhere."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = _new_figure(1.6 + 4.2 * columns, 0.8 + 3.6 * rows, caption)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    ours = {panel.curves[0].label for panel in panels}
    others = dict.fromkeys(c.label for p in panels for c in p.curves if c.label not in {*ours, ROOFLINE})
    styles: dict[str, dict[str, Any]] = {
        label: {"color": color, "linewidth": 1, "markersize": 5}
        for label, color in zip(others, itertools.cycle((ORANGE, *STAGE_COLORS)), strict=False)
    }
    styles |= {label: {"color": BLUE, "linewidth": 2.5, "markersize": 7} for label in ours}
    styles[ROOFLINE] = {"color": "black", "linewidth": 1, "linestyle": "--", "markersize": 3}
    drawn: dict[str, Any] = {}
    for axes, panel in zip(grid, panels, strict=False):
        for curve in panel.curves:
            (drawn[curve.label],) = axes.plot(curve.tokens, curve.values, marker="o", **styles[curve.label])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({n for curve in panel.curves for n in curve.tokens})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
        axes.set_title(panel.title)
        axes.set_xlabel(panel.label_x)
        axes.set_ylabel(panel.label_y)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.legend(drawn.values(), drawn, loc="outside right upper", fontsize="small")
    _save(figure, path)


def _shared_positions(positions: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the positions [S] of all sequences, or the index of their tokens where they differ, and what it is."""
    if (positions == positions[0]).all():
        return positions[0], "position (tokens)"
    return np.arange(positions.shape[1]), "token of each sequence"


def entropy_plot(
    panels: Sequence[tuple[str, Rows, Sequence[HeadHealth], np.ndarray]], caption: str, path: Path
) -> None:
    """Draw the relative entropy of every head by position, a mean over sequences; a panel for each dump.

    Parameters
    ----------
    panels : sequence of (title, rows, heads, positions)
        What was measured; positions are [B, S].
    caption : str
        Below the picture.
    path : Path
        Of the .png.
    """
    from matplotlib.ticker import MaxNLocator

    heights = [min(0.28 * len(heads), 9.0) + 1.2 for _, _, heads, _ in panels]
    figure = _new_figure(11, min(sum(heights) + 0.4, MOST_INCHES), caption)
    column = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows, heads, positions) in zip(column, panels, strict=True):
        x, label_x = _shared_positions(positions)
        values = np.ma.masked_invalid(rows.relative_entropy).mean(axis=0)  # [Hq, S]
        edges = np.concatenate([x[:1] - 0.5, (x[:-1] + x[1:]) / 2, x[-1:] + 0.5])
        axes.set_facecolor("0.8")
        mesh = axes.pcolormesh(edges, np.arange(len(heads) + 1) - 0.5, values, vmin=0, vmax=1, cmap="viridis")
        if len(heads) <= 32:
            axes.set_yticks(range(len(heads)), [", ".join((str(head.head), *head.flags)) for head in heads])
            for tick, head in zip(axes.get_yticklabels(), heads, strict=True):
                tick.set_color(RED if head.flags else "black")
        axes.invert_yaxis()
        axes.set_ylabel("head")
        axes.set_xlabel(label_x)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(f"Entropy of attention: {title}")
        figure.colorbar(mesh, ax=axes, label="entropy / ln(keys seen)", pad=0.01)
    _save(figure, path)
