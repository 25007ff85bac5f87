"""Tensor maps: what Hopper's copy engine is told of an array (CUDA driver API, tensor map object management)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from .errors import DeviceError
from .launcher import INVALID_CONTEXT, make_context_current

MAP_BYTES = 128
BOX_COLUMNS = 64  # of float16: the 128 bytes of a swizzled row
_FLOAT16, _NO_INTERLEAVE, _SWIZZLE_128B, _ZEROS_OUTSIDE = 6, 0, 3, 0  # enums of cuda.h
_PROMOTE_TO_256B, _PROMOTE_NOTHING = 3, 0


@functools.cache
def _encode() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    function.argtypes = (
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint32), ctypes.c_int,
        ctypes.c_int, ctypes.c_int, ctypes.c_int,
    )  # fmt: skip
    return function


@functools.lru_cache(maxsize=1024)
def tensor_map(
    address: int, columns: int, rows: int, box_rows: int, *, by_quads: bool = False, once: bool = False
) -> bytes:
    """Return the map of a C-contiguous float16 matrix on the GPU, copied in boxes of ``box_rows`` x 64.

    Parameters
    ----------
    address : int
        A multiple of 16.
    columns, rows : int
        Shape; ``2 * columns`` must be a multiple of 16.
    box_rows : int
        At most 256.
    by_quads : bool
        Copy row ``8 q + 2 j + e`` of every 32 to row ``8 j + 2 q + e`` of the box, e of 2, q and j of 4: wgmma.cuh says
        why. Then ``rows`` and ``box_rows`` must be multiples of 32.
    once : bool
        It is read from memory once, or by a few at about the same time: L2 asks for no more than a box has, which is a
        few per cent faster.

    Raises
    ------
    DeviceError
        The driver refused it.
    """
    aligned = np.zeros(MAP_BYTES + 64, np.uint8)
    start = -aligned.ctypes.data % 64
    # Dimensions from the innermost: columns, then rows; or their e, q, j and how many 32 of them. The driver's page has
    # strides grow from one to the next; what it refuses is others than multiples of 16 bytes (driver 580 takes these).
    sizes, steps, box = [columns, rows], [1], [BOX_COLUMNS, box_rows]
    if by_quads:
        sizes, steps, box = [columns, 2, 4, 4, rows // 32], [1, 8, 2, 32], [BOX_COLUMNS, 2, 4, 4, box_rows // 32]
    rank = len(sizes)
    arguments = (
        aligned.ctypes.data + start, _FLOAT16, rank, address, (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*(2 * columns * step for step in steps)), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank), _NO_INTERLEAVE, _SWIZZLE_128B,
        _PROMOTE_NOTHING if once else _PROMOTE_TO_256B, _ZEROS_OUTSIDE,
    )  # fmt: skip
    status = _encode()(*arguments)
    if status == INVALID_CONTEXT:
        make_context_current()
        status = _encode()(*arguments)
    if status:
        raise DeviceError(
            f"the CUDA driver refused a tensor map of {rows} x {columns} float16 (error {status}); set "
            "CUPY_ATTN_PORTABLE=1 to do without."
        )
    return aligned[start : start + MAP_BYTES].tobytes()
