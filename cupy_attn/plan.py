"""One call of a layer, checked: nothing is written before all of this holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .arrays import STORAGE_DTYPES, as_array, is_cupy, to_numpy
from .cache import KVCache
from .config import AttentionConfig
from .errors import CacheError, InputError


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a backend runs.

    ``x`` and ``residual`` are [B, S, H] where the backend computes; ``positions`` [B, S] int64 and ``num_tokens``
    [B] int64 are in host memory. Rows at and past a sequence's ``num_tokens`` are padding: not read, not cached,
    zero in the output. ``counting_on`` and ``unpadded`` say that the caller gave neither positions nor counts, so that
    both follow from the cache alone. A backend fills ``stages``, if it is a dict, and may write y to ``out``.
    """

    x: Any
    residual: Any
    positions: np.ndarray
    num_tokens: np.ndarray
    dtype: np.dtype[Any]
    stages: dict[str, Any] | None
    out: Any = None
    counting_on: bool = False
    unpadded: bool = False

    @property
    def batch(self) -> int:
        """B, sequences."""
        return int(self.x.shape[0])

    @property
    def seq(self) -> int:
        """S, rows of each sequence, padding included."""
        return int(self.x.shape[1])


def check_hidden(name: str, x: Any, dtype: np.dtype[Any], shape: tuple[int | None, int | None, int]) -> Any:
    """Return x as an array after checking its shape (None: any size) and dtype."""
    array = as_array(name, x)
    wanted = "[" + ", ".join(s if n is None else str(n) for n, s in zip(shape, "BSH", strict=True)) + "]"
    fits = array.ndim == 3 and all(n is None or n == got for n, got in zip(shape, array.shape, strict=True))
    if not fits:
        if array.ndim != 3:
            cure = "reshape it to [batch, tokens, hidden]"
        elif array.shape[-1] != shape[-1]:
            cure = f"the model's hidden_size is {shape[-1]}, take activations of this model"
        else:
            cure = "give it the shape of x"
        raise InputError(f"{name} has shape {list(array.shape)}, expected {wanted}; {cure}.")
    if array.size == 0:
        raise InputError(f"{name} has shape {list(array.shape)} and holds no token; pass at least one.")
    if array.dtype != dtype:
        other = f" or make the layer with dtype={str(array.dtype)!r}" if array.dtype in STORAGE_DTYPES.values() else ""
        raise InputError(f"{name} is {array.dtype}, the layer is {dtype}; convert it with astype{other}.")
    return array


def check_num_tokens(num_tokens: Any, batch: int, seq: int) -> np.ndarray:
    """Return how many of the S rows belong to each sequence, [B] int64; None means all."""
    if num_tokens is None:
        return np.full(batch, seq, np.int64)
    counts = _integers("num_tokens", num_tokens)
    if counts.shape != (batch,):
        raise InputError(f"num_tokens has shape {list(counts.shape)}, expected [{batch}]; give one for each sequence.")
    if counts.min() < 0 or counts.max() > seq:
        raise InputError(f"num_tokens is {counts.tolist()}; each must be 0 to {seq}, the rows of x.")
    return counts


def check_positions(
    positions: Any, config: AttentionConfig, cache: KVCache, num_tokens: np.ndarray, seq: int
) -> np.ndarray:
    """Return the absolute position of every new token, [B, S] int64; by default counting on from the cache."""
    batch, limit = cache.batch, config.max_position
    start = cache.next_positions()
    if positions is None:
        given = start[:, None] + np.arange(seq)
    else:
        given = _integers("positions", positions)
        if given.shape not in ((seq,), (batch, seq)):
            raise InputError(
                f"positions has shape {list(given.shape)}, expected [{seq}] or [{batch}, {seq}]; one a token."
            )
        given = np.broadcast_to(given, (batch, seq))
    for b in range(batch):
        row = given[b, : num_tokens[b]]
        bad = np.flatnonzero((row < 0) | (row >= limit))
        if bad.size:
            i = int(bad[0])
            raise InputError(
                f"token {i} of sequence {b} is at position {row[i]}, the model's positions are 0 to {limit - 1}; "
                + (
                    "count positions from 0."
                    if row[i] < 0
                    else "shorten the input, or raise max_position_embeddings in the config if you mean it."
                )
            )
        falls = np.flatnonzero(np.diff(row) <= 0)
        if falls.size:
            i = int(falls[0])
            raise InputError(
                f"positions of sequence {b} go from {row[i]} to {row[i + 1]} at token {i + 1}; they must increase "
                "(mark padding with num_tokens instead)."
            )
        if row.size and row[0] < start[b]:
            raise InputError(
                f"sequence {b} starts at position {row[0]} but its cache ends at {start[b] - 1}; "
                f"positions must go on from {start[b]} or later."
            )
    return given


def check_cache(cache: Any, config: AttentionConfig, layer: int, dtype: np.dtype[Any], batch: int, xp: Any) -> KVCache:
    """Return the cache after checking that it belongs to this layer, batch and device."""
    if not isinstance(cache, KVCache):
        raise CacheError(f"cache is a {type(cache).__name__}; make one with this layer's new_cache().")
    cache.check_config(config, layer, dtype)
    if cache.batch != batch:
        raise CacheError(
            f"cache: made for batch {cache.batch}, x has batch {batch}; make one with new_cache(batch={batch})."
        )
    if cache.xp is not xp:
        raise CacheError(
            f"cache: lives in {cache.xp.__name__}, the layer computes in {xp.__name__}; "
            "make one with this layer's new_cache()."
        )
    return cache


def check_out(out: Any, x: Any, dtype: np.dtype[Any]) -> Any:
    """Return ``out`` after checking that y [B, S, H] can be written to it, beside x."""
    array = check_hidden("out", out, dtype, x.shape)
    if is_cupy(array) != is_cupy(x):
        raise InputError("out and x are on different devices; allocate out where x is.")
    if not is_cupy(array) and not array.flags.writeable:
        raise InputError("out is read-only; pass a writable array.")
    return array


def _integers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values if isinstance(values, list | tuple | range) else to_numpy(as_array(name, values)))
    except ValueError as error:  # rows of unlike lengths
        raise InputError(f"{name} is not a rectangle of integers ({error}); give rows of one length.") from None
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {array.dtype}; give integers.")
    return array.astype(np.int64)
