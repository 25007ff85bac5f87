"""A decode step of one cache, planned once and launched again for every further token."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .workspace import Workspace


class Step:
    """The launches of a decode step, ready but for the addresses of x, residual and y.

    Parameters
    ----------
    owner : object
        The backend that made it.
    call : ndarray
        One element of ``launch.CALL``, the step's own.
    launches : sequence of callables
        Bound to ``call`` and ``stream``.
    stream : int
        ``ptr`` of the stream they go to.
    workspace : Workspace
        Whose buffers ``call`` points to.
    shape, dtype
        Of x and y.
    room : int
        Further tokens for which there is room in the cache and below the model's last position.
    """

    def __init__(
        self, owner: Any, call: np.ndarray, launches: Sequence[Callable[[], None]], stream: int, workspace: Workspace,
        shape: tuple[int, ...], dtype: np.dtype[Any], room: int,
    ) -> None:  # fmt: skip
        self._owner, self._call, self._launches, self._stream = owner, call, launches, stream
        self._workspace, self._generation = workspace, workspace.generation
        self.shape, self.dtype, self._room = shape, dtype, room
        self._addresses = (ctypes.c_uint64 * 3).from_buffer(call.data)  # x, residual, y: CALL begins with them

    def serves(self, owner: Any, stream: int) -> bool:
        """Whether a backend may launch it on a stream now."""
        return (
            self._room > 0
            and owner is self._owner
            and stream == self._stream
            and self._generation == self._workspace.generation
        )

    def takes(self, array: Any, kind: Any) -> bool:
        """Whether an array can stand for x, residual or y as it is."""
        return bool(
            isinstance(array, kind)
            and array.shape == self.shape
            and array.dtype == self.dtype
            and array.flags.c_contiguous
            and array.data.ptr % 16 == 0
        )

    def launch(self, x: int, residual: int, y: int) -> None:
        """Append one token to every sequence; arguments are addresses, 0 for no residual."""
        self._addresses[:] = [x, residual, y]
        self._room -= 1
        for run in self._launches:
            run()
