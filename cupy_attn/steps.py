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
        self._arrays: tuple[Any, Any, Any] = (None, None, None)  # the same

    def serves(self, owner: Any, stream: int) -> bool:
        """Whether a backend may launch it on a stream now."""
        return (
            self._room > 0
            and owner is self._owner
            and stream == self._stream
            and self._generation == self._workspace.generation
        )

    def repeats(self, x: Any, residual: Any, y: Any) -> bool:
        """Whether arrays are those it was launched with before. The shape is all of one that can have changed since."""
        last = self._arrays
        return (
            y is not None
            and y is last[2]
            and x is last[0]
            and residual is last[1]
            and x.shape == self.shape
            and y.shape == self.shape
            and (residual is None or residual is x or residual.shape == self.shape)
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

    def use(self, x: Any, residual: Any, y: Any) -> None:
        """Take arrays as x, residual, which may be None, and y from now on."""
        self._arrays = x, residual, y
        self._addresses[:] = [x.data.ptr, 0 if residual is None else residual.data.ptr, y.data.ptr]

    def launch(self) -> None:
        """Append one token to every sequence."""
        self._room -= 1
        for run in self._launches:
            run()
