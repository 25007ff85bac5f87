"""A decode step of one cache, planned once and launched again for every further token."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .launcher import in_graph
from .workspace import Workspace

SETTLED = 3  # steps with the same addresses, after which they become a graph
MOST_GRAPHS = 8  # that a step makes, if addresses change again and again


class Step:
    """The launches of a decode step, ready but for the addresses of x, residual and y.

    Where those stay the same, and the GPU is sooner done than the host would have launched the kernels, they become a
    CUDA graph, which is launched at once.

    Parameters
    ----------
    owner : object
        The backend that made it.
    call : ndarray
        One element of ``launch.CALL``, the step's own.
    bind : callable
        Given a CuPy stream, returns the launches on it, of what ``call`` holds then.
    launches : sequence of callables
        Those on ``stream``.
    stream : int
        Its ``ptr``.
    workspace : Workspace
        Whose buffers ``call`` points to.
    shape, dtype
        Of x and y.
    map_x : callable
        Given the address of x, puts it into the tensor maps that ``launches`` and ``bind`` have.
    room : int
        Further tokens for which there is room in the cache and below the model's last position.
    short : int
        Further tokens after which the GPU takes longer than the host.
    """

    def __init__(
        self, owner: Any, call: np.ndarray, bind: Callable[[Any], Sequence[Callable[[], None]]],
        launches: Sequence[Callable[[], None]], stream: int, workspace: Workspace, shape: tuple[int, ...],
        dtype: np.dtype[Any], map_x: Callable[[int], None], room: int, short: int,
    ) -> None:  # fmt: skip
        self._owner, self._call, self._bind, self._launches, self._stream = owner, call, bind, launches, stream
        self._short = short
        self._graph: Callable[[Any], None] | None = None
        self._settled, self._graphs = 0, 0  # steps since addresses changed, graphs made
        self._workspace, self._generation = workspace, workspace.generation
        self.shape, self.dtype, self._room, self._map_x = shape, dtype, room, map_x
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
        addresses = [x.data.ptr, 0 if residual is None else residual.data.ptr, y.data.ptr]
        if addresses != self._addresses[:]:
            # An interrupt must not leave some of them changed: then whoever comes next has others.
            self._arrays, self._addresses[:] = (None, None, None), [0, 0, 0]
            self._settled, self._graph = 0, None
            self._map_x(addresses[0])
            self._addresses[:] = addresses
        self._arrays = x, residual, y

    def launch(self, stream: Any) -> None:
        """Append one token to every sequence, on the stream that it serves."""
        self._room -= 1
        self._short -= 1
        if self._short >= 0 and self._settled == SETTLED and self._graphs < MOST_GRAPHS:
            self._graphs, self._settled = self._graphs + 1, SETTLED + 1
            with contextlib.suppress(RuntimeError):  # kernels one by one will say what is wrong with the GPU, if it is
                self._graph = in_graph(self._bind)
        if self._short >= 0 and self._graph is not None:
            self._graph(stream)
            return
        for run in self._launches:
            run()
        self._settled += 1
