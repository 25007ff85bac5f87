"""Arrays of any origin: dtypes by name, NumPy or CuPy, DLPack in."""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

import ml_dtypes
import numpy as np

from .errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
}
"""Dtypes of weights, caches and activations, by name."""

_DLPACK_CPU = (1, 3)  # kDLCPU, kDLCUDAHost: dlpack.h
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DLPACK_BFLOAT = 4  # kDLBfloat


def storage_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the NumPy dtype of a storage dtype given by name, NumPy dtype or anything whose name ends in one."""
    name = str(dtype).rpartition(".")[2] if not isinstance(dtype, type) else dtype.__name__
    if name not in STORAGE_DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(STORAGE_DTYPES)}.")
    return STORAGE_DTYPES[name]


def is_cupy(x: Any) -> bool:
    """Return whether x is a CuPy array, without importing CuPy."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def namespace(*arrays: Any) -> Any:
    """Return ``cupy`` if any argument is a CuPy array, else ``numpy``; a mixture raises InputError."""
    kinds = {is_cupy(a) for a in arrays if a is not None}
    if kinds == {True, False}:
        raise InputError("arguments mix NumPy and CuPy arrays; move them all to one device.")
    return sys.modules["cupy"] if kinds == {True} else np


def as_array(name: str, x: Any) -> Any:
    """Return x as a NumPy or CuPy array without copying its data.

    Parameters
    ----------
    name : str
        What the array is called in an error message.
    x : ndarray, cupy.ndarray, or object with ``__dlpack__``
        A PyTorch or JAX array on the CPU becomes a NumPy view, on a GPU a CuPy view.

    Raises
    ------
    InputError
        x is no array, or lives on a device this package does not use.
    """
    if isinstance(x, np.ndarray) or is_cupy(x):
        return x
    if not hasattr(x, "__dlpack__"):
        raise InputError(f"{name} is a {type(x).__name__}; pass a NumPy or CuPy array, or one with __dlpack__.")
    try:
        device = int(x.__dlpack_device__()[0])
        if device in _DLPACK_CUDA:
            import cupy

            return cupy.from_dlpack(x)
        if device in _DLPACK_CPU:
            return _numpy_from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be taken through DLPack ({error}); convert it to a plain array.") from None
    raise InputError(f"{name} is on DLPack device type {device}; move it to the CPU or to a CUDA GPU.")


def to_numpy(x: Any) -> np.ndarray:
    """Return x in host memory; a CuPy array is copied, anything else NumPy can read is viewed."""
    return sys.modules["cupy"].asnumpy(x) if is_cupy(x) else np.asarray(x)


class _DLTensor(ctypes.Structure):
    """``DLTensor`` of dlpack.h, the first member of a ``dltensor`` capsule."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLVersioned(ctypes.Structure):
    """``DLManagedTensorVersioned`` of dlpack.h, a ``dltensor_versioned`` capsule."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_DLPACK_READ_ONLY = 1


def _dltensor(x: Any) -> tuple[Any, _DLTensor, bool]:
    """Return a capsule of x, what it describes, and whether that must not be written; before version 1 none says."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    try:
        capsule = x.__dlpack__(max_version=(1, 0))
    except (TypeError, BufferError):  # older than that
        capsule = x.__dlpack__()
    is_valid = ctypes.pythonapi.PyCapsule_IsValid
    is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
    if not is_valid(capsule, b"dltensor_versioned"):
        return capsule, _DLTensor.from_address(get_pointer(capsule, b"dltensor")), False
    managed = _DLVersioned.from_address(get_pointer(capsule, b"dltensor_versioned"))
    return capsule, managed.tensor, bool(managed.flags & _DLPACK_READ_ONLY)


def _numpy_from_dlpack(x: Any) -> np.ndarray:
    """Like ``np.from_dlpack``, which does not know bfloat16."""
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError):
        capsule, tensor, read_only = _dltensor(x)
    if (tensor.code, tensor.bits, tensor.lanes) != (_DLPACK_BFLOAT, 16, 1):
        raise BufferError(f"its DLPack dtype (code {tensor.code}, {tensor.bits} bits) is not a float NumPy has")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(2 * tensor.strides[i] for i in range(tensor.ndim))
    else:  # NULL strides mean C order
        strides = tuple(2 * math.prod(shape[i + 1 :]) for i in range(tensor.ndim))
    if min(strides, default=0) < 0:
        raise BufferError("it has negative strides")
    if 0 in shape:
        return np.empty(shape, BFLOAT16)
    items = 1 + sum((n - 1) * s // 2 for n, s in zip(shape, strides, strict=True))
    buffer = (ctypes.c_uint16 * items).from_address(tensor.data + tensor.byte_offset)
    buffer.capsule = capsule  # the unconsumed capsule frees the tensor when the last view of it goes
    array = np.ndarray(shape, np.uint16, buffer, strides=strides).view(BFLOAT16)
    array.flags.writeable = not read_only
    return array
