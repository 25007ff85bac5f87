"""What the tests of files share: arrays, files of any kind, the sentence of a refusal."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from conftest import make_config

from cupy_attn.arrays import STORAGE_DTYPES

CONFIG = make_config()
SUFFIXES = (".npy", ".npz", ".safetensors")


def sample(dtype="float32", shape=(5, 8)) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(STORAGE_DTYPES[dtype])


def write(folder, suffix, **arrays):
    """Write arrays with NumPy's and safetensors' own writers, and return the path."""
    path = folder / f"given{suffix}"
    if suffix == ".npy":
        np.save(path, next(iter(arrays.values())))
    elif suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)
    return path


def npy_bytes(shape: str, data: bytes, descr="<f4") -> bytes:
    """Return a .npy whose header says what it is told to."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def safetensors_bytes(header: dict | bytes, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refused(error, call, *args, **kwargs) -> str:
    """Return the message of the error that a call raises: one line, one sentence with a cure."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert ";" in message
    return message
