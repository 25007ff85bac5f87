"""Pictures; needs the ``plot`` extra (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import AttentionConfig
from .errors import FileError
from .io import write_whole


def norm_plot(rows: Sequence[dict[str, Any]], config: AttentionConfig, model: str, path: Path) -> None:
    """Draw max, quartiles and median of |norm weight| of every layer, K and Q, with the precise-path threshold.

    Raises
    ------
    FileError
        matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError:
        raise FileError(f"{path} cannot be drawn without matplotlib; pip install 'cupy-attn[plot]'.") from None
    if path.suffix != ".png":
        raise FileError(f"{path} does not end in .png; choose a name that does.")

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    layers = [r["layer"] for r in rows]
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, (name, title) in zip(panels, (("k_norm", "K-norm"), ("q_norm", "Q-norm")), strict=True):
        stats = [r[name] for r in rows]
        low, middle, high = zip(*(s["quartiles_abs"] for s in stats), strict=True)
        axes.plot(layers, [s["max_abs"] for s in stats], "o-", color="tab:red", label="maximum")
        axes.fill_between(layers, low, high, color="tab:blue", alpha=0.3, label="quartiles")
        axes.plot(layers, middle, color="tab:blue", label="median")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(f"|{name}.weight|")
        axes.set_title(f"{title} weights by layer")
    panels[0].axhline(
        config.precise_threshold, color="black", linestyle="--", label=f"threshold {config.precise_threshold:g}"
    )
    label = "precise path"
    for r in rows:
        if r["precise"]:
            edges = r["layer"] - 0.5, r["layer"] + 0.5
            panels[0].axvspan(*edges, color="tab:orange", alpha=0.15, linewidth=0, label=label)
            label = "_nolegend_"
    for axes in panels:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[1].set_xlabel("layer")
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_xlim(-0.5, max(layers) + 0.5)
    figure.supxlabel(
        f"{model}: {config.model_type}, head_dim {config.head_dim}, {config.num_attention_heads}:"
        f"{config.num_key_value_heads} heads; layers above the threshold take the precise path on a GPU",
        fontsize="small",
    )
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
