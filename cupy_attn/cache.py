"""The KV cache of one layer: K before normalisation and before RoPE, V, positions, lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import storage_dtype, to_numpy
from .config import AttentionConfig
from .errors import CacheError, InputError

POSITION_ALIGNMENT = 16  # of a sequence's positions on the device, in numbers: call.cuh


class KVCache:
    """Keys (before K-norm and RoPE) and values of one layer, for a batch of sequences of unequal lengths.

    Stored head by head, ``[B, Hkv, capacity, D]``, so that the tokens of one head are contiguous; ``k`` and
    ``v`` show them token by token. Rows at and past a sequence's length are never read.

    Parameters
    ----------
    config : AttentionConfig
        The model the cache belongs to.
    layer : int
        The layer it belongs to.
    batch, capacity : int
        B sequences of at most ``capacity`` tokens.
    dtype : str or dtype
        Storage dtype: float16, bfloat16 or float32.
    xp : module
        ``numpy`` or ``cupy``: where the arrays live.

    Raises
    ------
    CacheError
        batch or capacity is not a positive integer.
    """

    def __init__(
        self, config: AttentionConfig, layer: int, *, batch: int, capacity: int, dtype: Any, xp: Any = np
    ) -> None:
        for name, value in (("batch", batch), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise CacheError(f"cache: {name} is {value!r}; it must be an integer of at least 1.")
        self.config, self.layer = config, layer
        self.batch, self.capacity = int(batch), int(capacity)
        self.dtype, self.xp = storage_dtype(dtype), xp
        shape = (self.batch, config.num_key_value_heads, self.capacity, config.head_dim)
        self.k_heads = xp.zeros(shape, self.dtype)
        self.v_heads = xp.zeros(shape, self.dtype)
        self._positions = np.zeros((self.batch, self.capacity), np.int64)
        self._lengths = np.zeros(self.batch, np.int64)
        if xp is not np:  # what kernels read and advance; the host's copy is behind once a graph has been replayed
            self.device_lengths = xp.zeros(self.batch, np.int32)
            places = -(-self.capacity // POSITION_ALIGNMENT) * POSITION_ALIGNMENT
            self.device_positions = xp.zeros((self.batch, places), np.int32)[:, : self.capacity]
            self.device_fault = xp.zeros(1, np.int32)
        self._captured = False
        self.step: Any = None  # a decode step that the CUDA backend has ready, good for as long as nothing else is done
        self._steps = 0  # tokens that such steps appended to every sequence, not yet in what the host keeps
        # What the CPU backend keeps: normalised, rotated keys, of which the first counts[b] are current.
        self.rotated = np.empty((0, 0, 0, 0), np.float32)
        self.rotated_counts = np.zeros(self.batch, np.int64)
        self._rotated_by: Any = None

    @property
    def k(self) -> Any:
        """Pre-norm, pre-RoPE keys, a writable view [B, capacity, Hkv, D].

        Take it anew for every write to cached rows: taking it is what tells the layer that keys may have changed.
        """
        self.rotated_counts[:] = 0
        return self.k_heads.transpose(0, 2, 1, 3)

    @property
    def v(self) -> Any:
        """Values, a writable view [B, capacity, Hkv, D]."""
        return self.v_heads.transpose(0, 2, 1, 3)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens held for each sequence, a copy, [B] int64; waits for the GPU if a graph may have appended some."""
        self.refresh()
        return self._lengths.copy()

    @property
    def positions(self) -> np.ndarray:
        """Absolute position of every cached token, a copy, [B, capacity] int64; rows past a length mean nothing."""
        self.refresh()
        return self._positions.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the K and V storage; the CPU backend keeps rotated keys beside it, in float32."""
        return int(self.k_heads.nbytes + self.v_heads.nbytes)

    def __repr__(self) -> str:
        self._settle()
        return (
            f"KVCache(layer={self.layer}, batch={self.batch}, capacity={self.capacity}, dtype={self.dtype}, "
            f"lengths={self._lengths.tolist()})"
        )

    def mark_captured(self) -> None:
        """Note that a CUDA graph holds a call on this cache: from now on only the GPU knows how many tokens it has."""
        self._captured, self.step = True, None

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds a call on this cache."""
        return self._captured

    def count_step(self) -> None:
        """Note that one token was appended to every sequence, counting on; cheaper than :meth:`commit`."""
        self._steps += 1

    def _settle(self) -> None:
        """Enter the tokens of :meth:`count_step` into lengths and positions."""
        if self._steps:
            count, self._steps = self._steps, 0
            start = self.next_positions()  # of what is entered
            for b in range(self.batch):
                end = int(self._lengths[b])
                self._positions[b, end : end + count] = start[b] + np.arange(count)
            self._lengths += count

    def refresh(self) -> None:
        """Bring the host's lengths and positions up to date with the GPU's, where a graph may have changed them.

        Raises
        ------
        CacheError
            A replay would have run past the capacity or the model's positions; it appended nothing and returned NaN.
        """
        self._settle()
        if not self._captured or self.xp.cuda.get_current_stream().is_capturing():
            return
        self.xp.cuda.Device().synchronize()  # replays may be on any stream
        self._lengths = self.device_lengths.get().astype(np.int64)
        self._positions = self.device_positions.get().astype(np.int64)
        if int(self.device_fault.get()[0]):
            self.device_fault.fill(0)
            raise CacheError(
                f"cache: a replayed graph ran past capacity {self.capacity} or position "
                f"{self.config.lasting_positions - 1}; nothing was appended beyond lengths {self._lengths.tolist()} "
                "and the outputs of those steps are NaN, make a larger cache."
            )

    def advance_device(self, positions: np.ndarray, num_tokens: np.ndarray) -> None:
        """Count new tokens on the GPU, for a backend whose operations do not: as :meth:`commit` does on the host."""
        self._settle()
        for b in range(self.batch):
            start, new = int(self._lengths[b]), int(num_tokens[b])
            self.device_positions[b, start : start + new] = self.xp.asarray(positions[b, :new].astype(np.int32))
        self.device_lengths += self.xp.asarray(num_tokens.astype(np.int32))

    def _upload(self) -> None:
        """Give the GPU the host's lengths and positions, which are new."""
        self.step, self._steps = None, 0
        if self.xp is not np:
            self.device_lengths[...] = self.xp.asarray(self._lengths.astype(np.int32))
            longest = int(self._lengths.max())
            self.device_positions[:, :longest] = self.xp.asarray(self._positions[:, :longest].astype(np.int32))

    def key_positions(self, batch_idx: int, new: np.ndarray | None = None) -> np.ndarray:
        """Return the positions of one sequence's cached tokens, then those of ``new`` tokens, [T] int64."""
        self._settle()
        cached = self._positions[batch_idx, : self._lengths[batch_idx]]
        return cached if new is None else np.concatenate([cached, new])

    def next_positions(self) -> np.ndarray:
        """Return the position after each sequence's last token, [B] int64; 0 for an empty one."""
        self._settle()
        last = np.maximum(self._lengths - 1, 0)
        return np.where(self._lengths > 0, self._positions[np.arange(self.batch), last] + 1, 0).astype(np.int64)

    def check_room(self, num_tokens: np.ndarray) -> None:
        """Raise CacheError, before anything is written, unless ``num_tokens`` [B] more tokens fit."""
        self._settle()
        over = np.flatnonzero(self._lengths + num_tokens > self.capacity)
        if over.size:
            b = int(over[0])
            have, new = int(self._lengths[b]), int(num_tokens[b])
            raise CacheError(
                f"cache: capacity {self.capacity} cannot take {have} + {new} tokens (sequence {b}); nothing was "
                f"appended, make it with capacity >= {have + new}."
            )

    def commit(self, positions: np.ndarray, num_tokens: np.ndarray) -> None:
        """Count tokens whose K and V a backend has written past each length.

        Parameters
        ----------
        positions : ndarray [B, S] int
            Positions of the new tokens.
        num_tokens : ndarray [B] int
            How many of the S belong to each sequence.
        """
        self._settle()
        for b in range(self.batch):
            start, new = int(self._lengths[b]), int(num_tokens[b])
            self._positions[b, start : start + new] = positions[b, :new]
        self._lengths += num_tokens

    def keep_rotated(self, owner: Any, lasting: np.ndarray) -> np.ndarray:
        """Make room for rotated keys and return how many of each sequence are already there, [B].

        Parameters
        ----------
        owner : object
            The backend that rotates: another one's keys (other weights, other angles) are of no use to it.
        lasting : ndarray [B] of bool
            Whether each sequence's angles are those of earlier calls; dynamic RoPE changes them as it grows.
        """
        if self._rotated_by is not owner:
            self._rotated_by = owner
            self.rotated = np.empty(self.k_heads.shape, np.float32)
            self.rotated_counts[:] = 0
        self.rotated_counts[~lasting] = 0
        np.minimum(self.rotated_counts, self._lengths, out=self.rotated_counts)
        return self.rotated_counts.copy()

    def truncate(self, lengths: Any) -> None:
        """Forget all but the first tokens of each sequence, as after rejected speculative tokens.

        Parameters
        ----------
        lengths : int or array_like [B] of int
            Tokens to keep; at most what each sequence holds.

        Raises
        ------
        InputError
            A length is negative or larger than what is held; nothing is forgotten.
        """
        self.refresh()
        wanted = self._checked_lengths(lengths)
        bad = np.flatnonzero((wanted < 0) | (wanted > self._lengths))
        if bad.size:
            b = int(bad[0])
            raise InputError(
                f"sequence {b} holds {self._lengths[b]} tokens and cannot be truncated to {wanted[b]}; "
                f"give 0 to {self._lengths[b]}."
            )
        self._lengths = wanted.copy()
        self._upload()

    def _checked_lengths(self, lengths: Any) -> np.ndarray:
        """Return lengths, or one for all, as [B] int64."""
        try:
            wanted = np.asarray(to_numpy(lengths))
        except ValueError as error:  # rows of unlike lengths
            raise InputError(f"lengths is no list of integers ({error}); give one or {self.batch}.") from None
        if wanted.dtype.kind not in "iu" or wanted.shape not in ((), (self.batch,)):
            raise InputError(
                f"lengths has shape {wanted.shape} and dtype {wanted.dtype}; give one integer or {self.batch} of them."
            )
        return np.broadcast_to(wanted, (self.batch,)).astype(np.int64)

    def reset(self) -> None:
        """Forget every token."""
        if self.xp is not np:
            self.device_fault.fill(0)
        self._lengths = np.zeros(self.batch, np.int64)
        self._upload()

    def assume(self, lengths: Any) -> None:
        """Declare that each sequence holds so many tokens, at positions 0, 1, ...: after writing ``k`` and ``v``.

        Parameters
        ----------
        lengths : int or array_like [B] of int
            Tokens; at most the capacity and the model's positions.

        Raises
        ------
        InputError
            A length is negative or too large; nothing is changed.
        """
        wanted = self._checked_lengths(lengths)
        limit = min(self.capacity, self.config.max_position)
        if wanted.min() < 0 or wanted.max() > limit:
            raise InputError(f"lengths is {wanted.tolist()}; give 0 to {limit}, what the cache and the model can hold.")
        self.rotated_counts[:] = 0
        self._positions[:] = np.arange(self.capacity)
        self._lengths = wanted
        self._upload()

    def check_config(self, config: AttentionConfig, layer: int, dtype: np.dtype[Any]) -> None:
        """Raise CacheError unless the cache was made for this config, layer and storage dtype."""
        theirs, ours = self.config.to_dict(), config.to_dict()
        for key, value in ours.items():
            if theirs[key] != value:
                raise CacheError(
                    f"cache: made for a config with {key} {theirs[key]}, used with {value}; "
                    "make one with this layer's new_cache()."
                )
        if self.layer != layer:
            raise CacheError(
                f"cache: made for layer {self.layer}, used with layer {layer}; each layer needs a cache of its own."
            )
        if self.dtype != dtype:
            raise CacheError(
                f"cache: holds {self.dtype}, the layer stores {dtype}; make one with this layer's new_cache()."
            )

    def state(self) -> dict[str, np.ndarray]:
        """Return what a file needs to hold, in host memory: k and v [B, T, Hkv, D], positions [B, T], lengths [B].

        T is the longest length; rows past a sequence's own length are zero.
        """
        self.refresh()
        longest = int(self._lengths.max())
        held = np.arange(longest)[None, :] < self._lengths[:, None]
        out = {"lengths": self._lengths.copy(), "positions": np.where(held, self._positions[:, :longest], 0)}
        for name, heads in (("k", self.k_heads), ("v", self.v_heads)):
            rows = np.ascontiguousarray(to_numpy(heads[:, :, :longest]).transpose(0, 2, 1, 3))
            rows[~held] = 0
            out[name] = rows
        return out

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what :meth:`state` returned.

        Raises
        ------
        CacheError
            Shapes, dtype or lengths do not fit this cache; it is left unchanged.
        """
        names = ("k", "v", "positions", "lengths")
        missing = [name for name in names if name not in state]
        if missing:
            raise CacheError(f"cache: {', '.join(missing)} missing from the stored state; pass what state() returned.")
        k, v, positions, lengths = (np.asarray(state[name]) for name in names)
        longest = k.shape[1] if k.ndim == 4 else -1
        want = (self.batch, longest, self.config.num_key_value_heads, self.config.head_dim)
        for name, array, shape in (("k", k, want), ("v", v, want), ("positions", positions, want[:2]),
                                   ("lengths", lengths, want[:1])):  # fmt: skip
            if array.shape != shape:
                raise CacheError(
                    f"cache: stored {name} has shape {array.shape}, expected {shape}; make the cache with the config "
                    "and batch it was stored with."
                )
        for name, array in (("k", k), ("v", v)):
            if array.dtype != self.dtype:
                raise CacheError(
                    f"cache: {name} is stored as {array.dtype}, the layer stores {self.dtype}; use dtype {array.dtype}."
                )
        if longest > self.capacity:
            raise CacheError(f"cache: {longest} stored tokens exceed capacity {self.capacity}; make a larger one.")
        if positions.dtype.kind not in "iu" or lengths.dtype.kind not in "iu":
            raise CacheError(
                f"cache: stored lengths are {lengths.dtype} and positions {positions.dtype}; give integers."
            )
        if lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > longest):
            raise CacheError(
                f"cache: stored lengths {lengths.tolist()} are not all 0 to {longest}, the tokens stored; "
                "the file is damaged, write it again."
            )
        for b in range(self.batch):
            row = positions[b, : int(lengths[b])].astype(np.int64)
            if row.size and (row[0] < 0 or row[-1] >= self.config.max_position or (np.diff(row) <= 0).any()):
                raise CacheError(
                    f"cache: stored positions of sequence {b} do not increase within 0 to "
                    f"{self.config.max_position - 1}; the file is damaged, write it again."
                )
            for name, array in (("k", k), ("v", v)):
                if not np.isfinite(array[b, : int(lengths[b])]).all():
                    raise CacheError(f"cache: stored {name} of sequence {b} holds NaN or Inf; run its tokens again.")
        self.k[:, :longest] = self.xp.asarray(k)
        self.v[:, :longest] = self.xp.asarray(v)
        self._positions[:, :longest] = positions
        self._lengths = lengths.astype(np.int64)
        self._upload()
