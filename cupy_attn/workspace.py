"""Scratch memory of the CUDA kernels, shared by all layers that run on one stream."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class Workspace:
    """Named buffers that grow and are otherwise reused: after the first call of a shape nothing is allocated.

    Kernels of one stream run one after the other, so layers that share a stream can share these.
    """

    def __init__(self) -> None:
        self.generation = 0  # goes up whenever a buffer moves
        self._buffers: dict[str, Any] = {}
        self._zeroed: set[str] = set()
        self._kept: list[Any] = []

    def take(self, name: str, shape: tuple[int, ...], dtype: Any, *, capturing: bool, zeroed: bool = False) -> Any:
        """Return a buffer of at least this size as an array.

        Parameters
        ----------
        name : str
            Which one; ``zeroed`` ones are zero when made, and what kernels leave in them stays.
        shape, dtype
            Of the array.
        capturing : bool
            Whether the stream is being captured: a graph keeps the address, so the buffer must outlive it.
        """
        import cupy

        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            if zeroed and capturing:
                buffer = _zeros_now(nbytes)
            else:
                buffer = cupy.empty(nbytes, np.uint8)
                if zeroed:
                    buffer.fill(0)
            if zeroed:
                self._zeroed.add(name)
            self.generation += 1  # before it moves: a call may be interrupted
            self._buffers[name] = buffer  # once it is what it should be
        if capturing and not any(kept is buffer for kept in self._kept):
            self._kept.append(buffer)
        return buffer[:nbytes].view(dtype).reshape(shape)

    def clear(self, name: str) -> None:
        """Zero a buffer where it is, as graphs may hold it: a call ended halfway and left it in no known state."""
        if name in self._buffers:
            self._buffers[name].fill(0)

    def poison(self) -> None:
        """Fill every buffer that kernels must write before they read with 0xff bytes: NaN, for tests."""
        for name, buffer in self._buffers.items():
            if name not in self._zeroed:
                buffer.fill(0xFF)


def _zeros_now(nbytes: int) -> Any:
    """Return zeros while a stream is being captured, which would write them only when the graph is replayed.

    Not from the pool: that gives again what was freed in the capture, and the graph's replays write there.
    """
    import cupy

    memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
    buffer = cupy.ndarray(nbytes, np.uint8, memory)
    with cupy.cuda.Stream(non_blocking=True) as own:
        buffer.fill(0)
        own.synchronize()
    return buffer


_workspaces: dict[tuple[int, int], Workspace] = {}


def workspace_of(device_id: int, stream: int) -> Workspace:
    """Return the workspace of one stream (its ``ptr``) of one GPU."""
    return _workspaces.setdefault((device_id, stream), Workspace())
