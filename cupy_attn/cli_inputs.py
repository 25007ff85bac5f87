"""What ``run``, ``verify`` and ``demo`` share: options of a layer, and what they make of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from . import io
from .arrays import STORAGE_DTYPES
from .config import SLIDING, AttentionConfig
from .errors import FileError, InputError
from .layer import Attention
from .rope import ANGLE_DTYPES
from .weights import AttentionWeights

DTYPE = click.option(
    "--dtype",
    type=click.Choice(list(STORAGE_DTYPES)),
    help="Storage dtype of weights, cache, input and output.  [default: that of the input]",
)
ANGLES = click.option(
    "--angles",
    type=click.Choice(ANGLE_DTYPES),
    default="float64",
    show_default=True,
    help="Precision of the rotary angles; float32 is what transformers computes.",
)
POSITIONS = click.option(
    "--positions",
    help="First position, or a file with one for each token.  [default: those in the input file, or counting on from "
    "the cache]",
)


def layer_of_dump(path: Path, metadata: dict[str, str]) -> int | None:
    """Return the layer that a dump says it is of, or None."""
    said = metadata.get("layer")
    if said is not None and not said.isdecimal():
        raise InputError(f"{path} says that it is of layer {said!r}, which is no number; dump it again.")
    return None if said is None else int(said)


def config_differences(
    path: Path, metadata: dict[str, str], config: AttentionConfig, layer: int
) -> list[dict[str, Any]] | None:
    """Return what of the config that a dump was made with is not the model's: name, value in the dump, in the model.

    None if the dump does not say its config.
    """
    if "config" not in metadata:
        return None
    try:
        made_with = AttentionConfig.from_dict(json.loads(metadata["config"]))
    except (TypeError, ValueError) as error:  # not JSON, not a config, a value of another type
        raise InputError(
            f"{path} holds a config that cannot be read ({str(error).rstrip('.')}); dump it again."
        ) from None
    dump, model = (_config_values(one, layer) for one in (made_with, config))
    return [{"name": name, "dump": dump[name], "model": value} for name, value in model.items() if dump[name] != value]


def _config_values(config: AttentionConfig, layer: int) -> dict[str, Any]:
    """Return the values that one layer depends on, and how many layers and of what model there are."""
    values = config.to_dict() | dataclasses.asdict(config.rope)
    for name in ("rope_parameters", "use_sliding_window", "max_window_layers", "layer_types"):
        del values[name]
    if config.layer_types is not None and config.layer_types[layer : layer + 1] != (SLIDING,):
        values["sliding_window"] = None
    return values


def differences_text(differences: Sequence[dict[str, Any]]) -> str:
    """Return a sentence with every difference."""
    values = [f"{one['name']} {_spelled(one['dump'])}, the model has {_spelled(one['model'])}" for one in differences]
    return f"the dump was made with {'; '.join(values)}."


def _spelled(value: Any) -> str:
    """Return a value as ``config.json`` has it, a string without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def no_layer(path: Path) -> InputError:
    """Return what to raise where a dump does not say which layer it is of."""
    return InputError(f"{path} does not say which layer it is of; pass --layer.")


def other_layer(path: Path, said: int, asked: int) -> InputError:
    """Return what to raise for a dump of another layer than was asked for."""
    return InputError(f"{path} is of layer {said}, not {asked}; leave out --layer or name a dump of layer {asked}.")


def load_layer(model: Path, layer: int, dtype: str, device: str, angles: str) -> Attention:
    """Return a layer of a checkpoint; a note says what converting its weights has lost."""
    config = AttentionConfig.from_pretrained(model)
    weights = AttentionWeights.from_pretrained(model, layer, config=config)
    attention = Attention(config, weights, dtype, device, angles=angles)
    lost = attention.weights.losses
    if lost and (weights.dtype != np.float32 or any(loss.zeroed for loss in lost.values())):
        zeroed = sum(loss.zeroed for loss in lost.values())
        worst = max(lost.items(), key=lambda item: item[1].relative)
        click.echo(f"Note: converting {weights.dtype} to {dtype} set {zeroed} values to zero and moved {worst[0]} the "
                   f"most, by {worst[1].relative:.1g} (relative L2).", err=True)  # fmt: skip
    return attention


def natural_dtype(x: np.ndarray) -> str:
    """Return the storage dtype that activations are of, float32 for float64."""
    return x.dtype.name if x.dtype in STORAGE_DTYPES.values() else "float32"


def convert(path: Path, x: np.ndarray, layer: Attention) -> np.ndarray:
    """Return activations in the layer's dtype, which must hold them."""
    io.check_activations(str(path), x, layer.config.hidden_size)
    with np.errstate(over="ignore"):
        converted = x.astype(layer.dtype, copy=False)
    if converted is not x and not np.isfinite(converted.astype(np.float32)).all():
        cure = "pass --dtype bfloat16 or float32" if layer.dtype == np.float16 else "dump the activations again"
        raise InputError(f"{path} holds values up to {np.abs(x.astype(np.float64)).max():.4g}, too large for "
                         f"{layer.dtype}; {cure}.")  # fmt: skip
    return converted


def given_positions(option: str | None, from_dump: np.ndarray | None, seq: int) -> np.ndarray | None:
    """Return the positions that ``--positions`` or else the input file gives."""
    if option is None:
        return from_dump
    try:
        start = int(option)
    except ValueError:
        if Path(option).suffix not in io.FORMATS:
            raise InputError(f"--positions {option} is neither a whole number nor a file of {', '.join(io.FORMATS)}; "
                             "give the first position or such a file.") from None  # fmt: skip
        arrays, _ = io.load_arrays(option)
    else:
        if abs(start) > np.iinfo(np.int32).max:
            raise InputError(f"--positions {option} is beyond any model's positions; give the first token's position.")
        return start + np.arange(seq)
    if io.POSITIONS in arrays:
        return arrays[io.POSITIONS]
    if len(arrays) != 1:
        raise FileError(f"{option} holds {len(arrays)} arrays, none named {io.POSITIONS}; name the positions so.")
    return next(iter(arrays.values()))


def device_name(device: str) -> str:
    """Return what the layer runs on, for people."""
    return "GPU" if device == "cuda" else "CPU"
