"""The one place that launches kernels: on the current stream, one call by value."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import kernels
from .errors import DeviceError
from .launch import Launch

# cuda.h (CUDA 12 and 13): CUlaunchConfig, CUlaunchAttribute and the ids of two attributes.
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: what a thread gets that CUDA has not met
OVERLAPPING_CAPABILITY = 90


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_uint * 3),
        ("rest", ctypes.c_char * 52),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4  # addresses: typed pointers take half a microsecond more
    library.cuOccupancyMaxActiveClusters.argtypes = (
        ctypes.POINTER(ctypes.c_int), ctypes.c_void_p, ctypes.POINTER(_Config),
    )  # fmt: skip
    return library


def make_context_current() -> None:
    """Give this thread the current GPU's context, as the first call of the CUDA runtime does."""
    from cupy.cuda import runtime

    runtime.setDevice(runtime.getDevice())


def in_graph(bind: Callable[[Any], Sequence[Callable[[], None]]]) -> Callable[[Any], None]:
    """Return a function that starts, on a CuPy stream, a CUDA graph of some launches as they are now.

    The host takes a tenth of the time for it that the launches take one by one. But the first of them does not begin
    before all ahead of the graph has ended.

    Parameters
    ----------
    bind : callable
        Given a CuPy stream, returns the launches on it.
    """
    import cupy

    own = cupy.cuda.Stream(non_blocking=True)  # the current one may be the default, which cannot be captured
    launches = bind(own)
    own.begin_capture()
    try:
        for launch in launches:
            launch()
    finally:
        graph = own.end_capture()

    def start(stream: Any) -> None:
        try:
            graph.launch(stream)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"a decode step's graph could not be launched ({error}); an earlier error on this GPU is the usual "
                "cause, start the process again."
            ) from None

    return start


class Launcher:
    """One kernel on one GPU, ready to be launched again and again.

    From compute capability 9.0 on, kernels that say so begin before the one ahead of them in the stream has ended, and
    fetch their weights meanwhile; they wait (``griddepcontrol.wait``) before they look at anything else. CuPy has no
    such launch, so all go to the driver (CUDA C++ Programming Guide, programmatic dependent launch). Portable prefill
    kernels fill the GPU to the end and gain nothing: 512 tokens of the 0.6B shape took 65 us instead of 55.

    Parameters
    ----------
    launch : Launch
        Kernel, grid, block and shared memory.
    """

    def __init__(self, launch: Launch) -> None:
        import cupy

        self._launch = launch
        self._kernel = kernels.kernel(launch.name, launch.macros)
        if self._kernel.max_dynamic_shared_size_bytes < launch.smem_bytes:  # one kernel, launches of several sizes
            self._kernel.max_dynamic_shared_size_bytes = launch.smem_bytes
        self._overlaps = launch.overlaps and int(cupy.cuda.Device().compute_capability) >= OVERLAPPING_CAPABILITY
        if self._overlaps:  # a multiprocessor divides its memory anew only once it is empty: all must want the same
            self._kernel.preferred_shared_memory_carveout = 100
        attributes = [_Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=(1, 0, 0))] if self._overlaps else []
        if launch.splits > 1:
            attributes.append(_Attribute(id=_CLUSTER_DIMENSION, value=(launch.splits, 1, 1)))
        self._attributes = (_Attribute * len(attributes))(*attributes)
        self._function = ctypes.c_void_p(self._kernel.kernel.ptr)
        self._cuda_launch = _driver().cuLaunchKernelEx
        self._grid = launch.grid if launch.cluster == 1 else min(launch.grid, self._most_clusters() * launch.cluster)

    def _config(self, stream: int) -> _Config:
        launch = self._launch
        return _Config((launch.grid, 1, 1), (launch.threads, 1, 1), launch.smem_bytes, stream,
                       self._attributes, len(self._attributes))  # fmt: skip

    def _most_clusters(self) -> int:
        """Return how many clusters the GPU holds at a time; more would wait for those to end."""
        launch, most = self._launch, ctypes.c_int()
        status = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(most), self._function, self._config(0))
        if status:
            raise self._failed(status, launch.grid)
        if not most.value:
            raise DeviceError(
                f"{launch.name} needs {launch.cluster} multiprocessors that work together and this GPU has none; set "
                "CUPY_ATTN_PORTABLE=1 to do without."
            )
        return most.value

    def _failed(self, status: int, grid: int) -> DeviceError:
        launch = self._launch
        return DeviceError(
            f"{launch.name} could not be launched (CUDA driver error {status}; grid {grid}, block {launch.threads}, "
            f"{launch.smem_bytes} bytes of shared memory); an earlier error on this GPU is the usual cause, start the "
            "process again."
        )

    def bind(self, call: np.ndarray, stream: Any, maps: Any) -> Callable[[], None]:
        """Return a function that launches with what ``call`` and ``maps`` hold then, on a CuPy stream.

        Parameters
        ----------
        call : ndarray
            One element of ``launch.CALL``, which must stay where it is.
        stream : cupy.cuda.Stream
            Where to.
        maps : ctypes array of char
            Tensor maps of ``launch.boxes``, one after the other.
        """
        cuda_launch, function = self._cuda_launch, self._function.value
        config = self._config(stream.ptr)
        config.grid[0] = self._grid
        arguments = (ctypes.c_void_p * 2)(call.ctypes.data, ctypes.addressof(maps))
        where, parameters = ctypes.addressof(config), ctypes.addressof(arguments)

        def run(_held: Any = (call, config, maps, arguments)) -> None:
            status = cuda_launch(where, function, parameters, None)
            if status == INVALID_CONTEXT:
                make_context_current()
                status = cuda_launch(where, function, parameters, None)
            if status:
                raise self._failed(status, self._grid)

        return run
