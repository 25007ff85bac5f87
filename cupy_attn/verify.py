"""A layer held against the float64 reference, and against a dump, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import reference
from .accuracy import BARS, MAX_ERROR_BARS, StageError, check_collapse, compare_stages, max_error, relative_l2_along
from .arrays import storage_dtype, to_numpy
from .errors import InputError
from .io import OUTPUT, check_stages
from .layer import Attention
from .plan import check_positions

REFERENCE_SCORES = 10**8  # materialised scores the reference may have: 0.8 GB in float64
DECODE_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Departure:
    """The first stage that is not the dump's: where it is furthest off, and by how much.

    ``where`` names an element by sequence, token, head, dim or channel; ``ours`` and ``dump`` are its values.
    ``dtype_alone`` is the relative L2 error that rounding after every operation costs this stage in the coarser dtype.
    """

    stage: str
    where: dict[str, int]
    ours: float
    dump: float
    relative_l2: float
    dtype: str
    dtype_alone: float

    @property
    def text(self) -> str:
        """A sentence or two."""
        where = ", ".join(f"{axis} {index}" for axis, index in self.where.items())
        return (
            f"First departure: {self.stage}, most at {where}: {self.ours:.6g} here, {self.dump:.6g} in the dump. Its "
            f"relative L2 is {self.relative_l2:.1e}; rounding to {self.dtype} alone explains {self.dtype_alone:.1e}."
        )


@dataclasses.dataclass(frozen=True)
class Verification:
    """Rows of the comparison with the reference and of that with a dump, where the dump departs, signs of collapse.

    ``positions`` [B, S] are those of the tokens compared; ``y_by_token`` [S] is the relative L2 error of y against the
    reference at each of them, over all sequences, and ``dump_by_token`` that of every stage of the dump.
    """

    reference: list[StageError]
    dump: list[StageError]
    collapse: list[str]
    departure: Departure | None
    positions: np.ndarray
    y_by_token: np.ndarray
    dump_by_token: dict[str, np.ndarray]

    @property
    def passed(self) -> bool:
        """Whether every row is within its bar and nothing has collapsed."""
        return all(row.passed for row in (*self.reference, *self.dump)) and not self.collapse


def verify_layer(
    layer: Attention,
    x: np.ndarray,
    *,
    positions: np.ndarray | None = None,
    expected: Mapping[str, np.ndarray] | None = None,
    expected_dtype: Any = None,
    tokens: int | None = None,
    angles: str = "float64",
) -> Verification:
    """Run a layer on activations and compare every stage.

    Parameters
    ----------
    layer : Attention
        On any device.
    x : ndarray [B, S, H]
        Of the layer's dtype.
    positions : ndarray [S] or [B, S], optional
        Default: 0 .. S-1.
    expected : mapping of str to ndarray, optional
        Stages of a dump, by the names of ``reference.STAGES`` and ``y``. Its rows get the bar of the
        coarser dtype, the layer's or the dump's, plus twice what rounding as transformers does costs in it.
    expected_dtype : str or dtype, optional
        Storage dtype the dump was made in; default: the layer's.
    tokens : int, optional
        Use only the first tokens of each sequence, of ``positions`` and of ``expected``.
    angles : {"float64", "float32"}
        Of the reference; the layer has its own.

    Raises
    ------
    InputError
        Positions or expected stages do not fit x, or the reference would need more than ``REFERENCE_SCORES`` scores.
    """
    batch, seq, _ = x.shape
    if positions is not None:
        cache, counts = layer.new_cache(batch, 1), np.full(batch, seq)
        positions = check_positions(positions, layer.config, cache, counts, seq)[:, :tokens]
    expected = check_stages(expected or {}, layer.config, batch, seq)
    expected = {name: _first_tokens(name, stage, tokens) for name, stage in expected.items()}
    x = x[:, :tokens]
    seq = x.shape[1]
    if batch * layer.config.num_attention_heads * seq * seq > REFERENCE_SCORES:
        most = int((REFERENCE_SCORES / batch / layer.config.num_attention_heads) ** 0.5)
        raise InputError(f"the float64 reference cannot take {seq} tokens; pass --tokens {most} or fewer.")
    bar = BARS[str(layer.dtype)]
    y_ref, stages_ref = reference.forward(layer.config, layer.weights, x, positions=positions, angles=angles)
    stages: dict[str, Any] = {}
    y = layer(x, positions=positions, stages=stages)
    got, want = stages | {OUTPUT: y}, stages_ref | {OUTPUT: y_ref}
    rows = compare_stages(got, want, bar)
    worst = max_error(y, y_ref)
    rows.append(StageError("y (max)", rows[-1].max_abs, worst, MAX_ERROR_BARS[str(layer.dtype)]))
    if seq > 1:
        rows.append(_decode_row(layer, x, positions, y_ref, bar))

    against_dump: list[StageError] = []
    departure = None
    if expected:
        rounding = _rounding(
            layer, x, positions, stages_ref, {layer.dtype, storage_dtype(expected_dtype or layer.dtype)}
        )
        for row in compare_stages(got, expected, bar):
            against_dump.append(dataclasses.replace(row, bar=rounding[row.stage].bar + 2 * rounding[row.stage].error))
        first = next((row for row in against_dump if not row.passed), None)
        if first is not None:
            departure = _departure(first, got[first.stage], expected[first.stage], rounding[first.stage])
    return Verification(
        rows,
        against_dump,
        check_collapse(stages | {"probs": stages_ref["probs"]}),
        departure,
        positions=np.broadcast_to(np.arange(seq), (batch, seq)) if positions is None else positions,
        y_by_token=relative_l2_along(y, y_ref, 1),
        dump_by_token={
            row.stage: relative_l2_along(got[row.stage], expected[row.stage], _token_axis(row.stage))
            for row in against_dump
        },
    )


@dataclasses.dataclass(frozen=True)
class _Rounding:
    """What rounding after every operation costs a stage: the dtype, its bar, the relative L2 error."""

    dtype: str
    bar: float
    error: float


def _rounding(
    layer: Attention,
    x: np.ndarray,
    positions: np.ndarray | None,
    exact: Mapping[str, np.ndarray],
    dtypes: set[np.dtype[Any]],
) -> dict[str, _Rounding]:
    """Return for each stage what the coarsest of some dtypes costs, rounding as transformers does."""
    found: dict[str, _Rounding] = {}
    compared = {name: value for name, value in exact.items() if name not in ("scores", "probs")}
    for dtype in dtypes:
        _, rounded = reference.forward(
            layer.config, layer.weights, x, positions=positions, dtype=dtype, rounding="transformers", angles="float32"
        )
        for row in compare_stages(rounded, compared, BARS[str(dtype)]):
            costs = _Rounding(str(dtype), row.bar, row.relative_l2)
            found[row.stage] = max(found.get(row.stage, costs), costs, key=lambda one: one.bar + 2 * one.error)
    return found | {OUTPUT: found["output"]}


def _departure(row: StageError, ours: Any, dump: np.ndarray, rounding: _Rounding) -> Departure:
    """Find the element of a stage that is furthest off."""
    mine, theirs = to_numpy(ours).astype(np.float64), dump.astype(np.float64)
    with np.errstate(invalid="ignore"):  # Inf - Inf
        difference = np.abs(mine - theirs)
    at = np.unravel_index(np.argmax(np.where(np.isfinite(difference), difference, np.inf)), mine.shape)
    axes = ["sequence", "token", "head", "dim"] if mine.ndim == 4 else ["sequence", "token", "channel"]
    if row.stage in ("row_max", "lse"):
        axes = ["sequence", "head", "token"]
    where = {axis: int(index) for axis, index in zip(axes, at, strict=True)}
    return Departure(
        row.stage, where, float(mine[at]), float(theirs[at]), row.relative_l2, rounding.dtype, rounding.error
    )


def _token_axis(name: str) -> int:
    """Return the axis of tokens: 2 in row statistics [B, Hq, S] and in [B, Hq, S, T], else 1, [B, S, ...]."""
    return 2 if name in ("scores", "row_max", "lse", "probs") else 1


def _first_tokens(name: str, stage: np.ndarray, tokens: int | None) -> np.ndarray:
    """Cut a stage to its first tokens, as queries and as keys."""
    if _token_axis(name) == 1:
        return stage[:, :tokens]
    return stage[:, :, :tokens, :tokens] if name in ("scores", "probs") else stage[:, :, :tokens]


def _decode_row(
    layer: Attention, x: np.ndarray, positions: np.ndarray | None, y_ref: np.ndarray, bar: float
) -> StageError:
    """Feed the last tokens one at a time through a cache and compare them with the whole."""
    batch, seq, _ = x.shape
    # Dynamic RoPE may turn by other angles when the sequence was shorter: only the last step is the whole's.
    first = seq - min(1 if layer.config.rope.rope_type == "dynamic" else DECODE_STEPS, seq - 1)
    cache = layer.new_cache(batch, seq)

    def part(start: int, stop: int) -> np.ndarray:
        given = None if positions is None else positions[..., start:stop]
        return to_numpy(layer(x[:, start:stop], cache, positions=given))

    part(0, first)
    steps = np.concatenate([part(i, i + 1) for i in range(first, seq)], axis=1)
    return dataclasses.replace(compare_stages({OUTPUT: steps}, {OUTPUT: y_ref[:, first:]}, bar)[0], stage="y (decode)")
