"""Error measures, the bars they are held to, and checks for collapsed attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import to_numpy
from .errors import InputError

BARS = {"float16": 1e-3, "bfloat16": 3e-3, "float32": 1e-5}
"""Largest relative L2 error of the layer against the float64 reference, by storage dtype (docs/numerics.md)."""

MAX_ERROR_BARS = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-5}
"""Largest |error| over largest |y|, by storage dtype; half a unit in the last place of bfloat16 alone is 4e-3."""


def relative_l2(actual: Any, expected: Any) -> float:
    """Return ||actual - expected|| / ||expected|| in float64; inf where it is not a number.

    Parameters
    ----------
    actual, expected : array_like
        Of equal shapes; NumPy, CuPy or DLPack-free array-likes.
    """
    a, e = _float64(actual, expected)
    norm = float(np.linalg.norm(e.ravel()))
    with np.errstate(invalid="ignore"):  # Inf - Inf
        error = float(np.linalg.norm((a - e).ravel()))
    if not np.isfinite(error) or not np.isfinite(norm):
        return float("inf")
    return 0.0 if error == 0 else error / norm if norm else float("inf")


def relative_l2_along(actual: Any, expected: Any, axis: int) -> np.ndarray:
    """Return the relative L2 error at every index of one axis, over all others, float64; inf where it is no number.

    Parameters
    ----------
    actual, expected : array_like
        Of equal shapes, as :func:`relative_l2` takes them.
    axis : int
        The axis that is kept, such as that of tokens.
    """
    a, e = (np.moveaxis(array, axis, 0) for array in _float64(actual, expected))
    return np.array([relative_l2(*pair) for pair in zip(a, e, strict=True)])


def max_error(actual: Any, expected: Any) -> float:
    """Return max |actual - expected| / max |expected| in float64; inf where it is not a number."""
    a, e = _float64(actual, expected)
    if a.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):  # Inf - Inf
        error, scale = float(np.abs(a - e).max()), float(np.abs(e).max())
    if not np.isfinite(error) or not np.isfinite(scale):
        return float("inf")
    return 0.0 if error == 0 else error / scale if scale else float("inf")


def _float64(actual: Any, expected: Any) -> tuple[np.ndarray, np.ndarray]:
    a, e = to_numpy(actual).astype(np.float64), to_numpy(expected).astype(np.float64)
    if a.shape != e.shape:
        raise InputError(f"shapes differ: {a.shape} and {e.shape}; compare arrays of one shape.")
    return a, e


@dataclasses.dataclass(frozen=True)
class StageError:
    """How far one stage is from what was expected, and whether that is within its bar."""

    stage: str
    max_abs: float
    relative_l2: float
    bar: float

    @property
    def passed(self) -> bool:
        """Whether the relative L2 error is within the bar."""
        return self.relative_l2 <= self.bar


def compare_stages(actual: Mapping[str, Any], expected: Mapping[str, Any], bar: float) -> list[StageError]:
    """Compare every stage both sides have, in the order of ``expected``."""
    rows = []
    for stage, want in expected.items():
        if stage not in actual:
            continue
        got, ref = _float64(actual[stage], want)
        difference = np.abs(got - ref)
        worst = float(difference.max()) if difference.size else 0.0
        rows.append(StageError(stage, worst if np.isfinite(worst) else float("inf"), relative_l2(got, ref), bar))
    return rows


# What counts as collapsed: see check_collapse.
SINGLE_KEY_WEIGHT = 0.99
NEARLY_ALL_ROWS = 0.95
UNIFORM_ENTROPY = 0.99
MIN_KEYS = 8  # rows that see fewer keys say nothing about a head


def check_collapse(stages: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every sign that the attention has collapsed; an empty list is a healthy layer.

    Looks for: NaN or Inf in any stage; heads whose output is zero everywhere; layers whose output is the same for
    every token; and, where ``probs`` is among the stages, heads that give one and the same key nearly all the weight
    in nearly all rows, and heads whose rows are uniform over the keys they see.

    Parameters
    ----------
    stages : mapping of str to array
        What :func:`reference.forward` or ``layer(..., stages=...)`` collected.
    """
    found = []
    for name, value in stages.items():
        array = to_numpy(value).astype(np.float64)
        if name == "scores":  # masked scores are -inf by definition
            array = np.where(np.isneginf(array), 0.0, array)
        bad = int((~np.isfinite(array)).sum())
        if bad:
            found.append(f"{name}: {bad} of {array.size} values are NaN or Inf.")
    if found:
        return found
    if "attention" in stages:
        attention = to_numpy(stages["attention"]).astype(np.float64)  # [B, S, Hq, D]
        dead = np.flatnonzero(np.abs(attention).max(axis=(0, 1, 3)) == 0)
        found += [f"attention: head {h} is zero for every token." for h in dead]
    if "output" in stages:
        output = to_numpy(stages["output"]).astype(np.float64)
        rows = output.reshape(-1, output.shape[-1])
        if len(rows) > 1 and np.abs(rows - rows[0]).max() <= 1e-6 * np.abs(rows).max():
            found.append(f"output: all {len(rows)} tokens have the same output.")
    if "probs" in stages:
        probs = to_numpy(stages["probs"]).astype(np.float64)
        # Masked scores are -inf. Without scores a probability of zero must pass for a mask, underflow or not.
        visible = ~np.isneginf(to_numpy(stages["scores"])) if "scores" in stages else probs > 0
        found += _collapsed_heads(probs, visible)
    return found


def _collapsed_heads(probs: np.ndarray, visible: np.ndarray) -> list[str]:
    """Check probabilities [B, Hq, S, T], of which ``visible`` ones are not masked, head by head."""
    found = []
    for h in range(probs.shape[1]):
        rows = probs[:, h].reshape(-1, probs.shape[-1])
        seen = visible[:, h].reshape(rows.shape).sum(axis=1)
        rows, seen = rows[seen >= MIN_KEYS], seen[seen >= MIN_KEYS]
        if len(rows) < MIN_KEYS:
            continue
        winner, share = rows.argmax(axis=1), rows.max(axis=1)
        key = collapsed_key(winner, share)
        if key is not None:
            found.append(f"probs: head {h} gives key {key} more than {SINGLE_KEY_WEIGHT} of the weight in "
                         f"{(share > SINGLE_KEY_WEIGHT).mean():.0%} of rows.")  # fmt: skip
        if is_uniform(-(rows * np.log(np.where(rows > 0, rows, 1.0))).sum(axis=1) / np.log(seen)):
            found.append(f"probs: head {h} is uniform over the keys it sees in nearly all rows.")
    return found


def collapsed_key(top_key: np.ndarray, top_weight: np.ndarray) -> int | None:
    """Return the key that takes nearly all the weight in nearly all rows, None if no key does.

    Parameters
    ----------
    top_key, top_weight : ndarray [R] of int, [R]
        The key with most weight in each row of a head, and that weight.
    """
    if not is_one_hot(top_weight):
        return None
    taken = top_weight > SINGLE_KEY_WEIGHT
    key = int(np.bincount(top_key[taken]).argmax())
    return key if (top_key[taken] == key).mean() >= NEARLY_ALL_ROWS else None


def is_one_hot(top_weight: np.ndarray) -> bool:
    """Return whether nearly all rows [R] of a head give one key, whichever, nearly all the weight."""
    return bool(top_weight.size and (top_weight > SINGLE_KEY_WEIGHT).mean() >= NEARLY_ALL_ROWS)


def is_uniform(relative_entropy: np.ndarray) -> bool:
    """Return whether nearly all rows [R] of a head have nearly the entropy, over the most possible, of 1."""
    return bool(relative_entropy.size and (relative_entropy > UNIFORM_ENTROPY).mean() >= NEARLY_ALL_ROWS)
