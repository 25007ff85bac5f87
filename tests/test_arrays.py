"""Arrays of other libraries come in without a copy, or with a sentence that says why not."""

from __future__ import annotations

import ctypes
import gc
import inspect
import weakref

import ml_dtypes
import numpy as np
import pytest
from conftest import make_config, make_weights

import cupy_attn as ca
from cupy_attn.arrays import BFLOAT16, _DLTensor, _DLVersioned, as_array, is_cupy, namespace, storage_dtype, to_numpy

NAMES = ("float32", "float16", "bfloat16")
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def torch_tensor(name: str):
    torch = pytest.importorskip("torch")
    return torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).to(getattr(torch, name))


EXPECTED = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

VIEWS = {
    "contiguous": lambda x: x,
    "every other": lambda x: x[:, ::2, 1::2],
    "offset": lambda x: x[1:, 1:],
    "transposed": lambda x: x.swapaxes(0, 2),
    "one number": lambda x: x[1, 2, 3],
    "empty": lambda x: x[:0],
    "repeated": lambda x: (
        x[:1, :1, :1].expand(5, 3, 1) if hasattr(x, "expand") else np.broadcast_to(x[:1, :1, :1], (5, 3, 1))
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", NAMES)
def test_torch_tensors_keep_values_and_shape(name, view):
    got = as_array("x", VIEWS[view](torch_tensor(name)))
    assert isinstance(got, np.ndarray)
    assert got.dtype == NUMPY[name]
    np.testing.assert_array_equal(got.astype(np.float32), VIEWS[view](EXPECTED))


@pytest.mark.parametrize("view", ["contiguous", "every other", "transposed"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_shared(name, view):
    tensor = torch_tensor(name)
    got = as_array("x", VIEWS[view](tensor))
    before = got.copy()
    tensor += 1
    np.testing.assert_array_equal(got, before + 1)
    got[...] = 5
    assert VIEWS[view](tensor).float().eq(5).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_array_keeps_the_tensor_alive(name):
    tensor = torch_tensor(name)
    got = as_array("x", tensor)[1:]  # a view of the view
    del tensor
    gc.collect()
    junk = [np.full(24, 7, NUMPY[name]) for _ in range(1000)]  # what freed memory would be reused for
    np.testing.assert_array_equal(got.astype(np.float32), EXPECTED[1:])
    del junk


def test_the_bfloat16_capsule_dies_with_the_last_view():
    """A tensor whose capsule leaked would never be freed."""
    torch = pytest.importorskip("torch")

    class Exporter:
        """Hands out the capsule of a tensor, and can be watched."""

        def __init__(self):
            self.storage = np.zeros(8, np.uint16)
            self.tensor = torch.from_numpy(self.storage.view(np.int16)).view(torch.bfloat16)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

        def __dlpack__(self, **keywords):
            return self.tensor.__dlpack__(**keywords)

    exporter = Exporter()
    watched = weakref.ref(exporter.storage)
    got = as_array("x", exporter)
    assert got.dtype == BFLOAT16
    view = got[2:4]
    del exporter, got
    gc.collect()
    assert watched() is not None
    assert view.astype(np.float32).tolist() == [0, 0]
    del view
    gc.collect()
    assert watched() is None


def test_what_says_it_must_not_be_written_is_not():
    """JAX arrays do not change, and say so from version 1 of DLPack on."""
    torch = pytest.importorskip("torch")

    class Exporter:
        tensor = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
        shape = tensor.shape
        __dlpack_device__ = tensor.__dlpack_device__

        def __dlpack__(self, *, max_version=None, **keywords):
            capsule = self.tensor.__dlpack__(max_version=(1, 0))
            get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
            get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            _DLVersioned.from_address(get_pointer(capsule, b"dltensor_versioned")).flags |= 1
            return capsule

    if "max_version" not in inspect.signature(torch.Tensor.__dlpack__).parameters:
        pytest.skip("this PyTorch exports DLPack before version 1")
    assert not as_array("x", Exporter()).flags.writeable
    config = make_config(hidden_size=64)
    layer = ca.Attention(config, make_weights(config, dtype="bfloat16"), "bfloat16", "cpu")
    with pytest.raises(ca.InputError, match="out is read-only; pass a writable array"):
        layer(torch.ones_like(Exporter.tensor), out=Exporter())
    assert not Exporter.tensor.any()


def test_a_byte_offset_is_counted():
    """PyTorch always gives 0; dlpack.h allows any."""
    torch = pytest.importorskip("torch")

    class Exporter:
        """Points two elements before the data, and says so."""

        tensor = torch.arange(6, dtype=torch.bfloat16)[2:]
        __dlpack_device__ = tensor.__dlpack_device__

        def __dlpack__(self, **keywords):
            if keywords:  # NumPy would take the capsule, and refuse bfloat16
                raise BufferError
            capsule = self.tensor.__dlpack__()
            get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
            get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            described = _DLTensor.from_address(get_pointer(capsule, b"dltensor"))
            described.data, described.byte_offset = described.data - 4, 4
            return capsule

    assert as_array("x", Exporter()).tolist() == [2, 3, 4, 5]


def test_numpy_arrays_come_back_as_they_are():
    x = np.zeros((2, 3), np.float32)
    assert as_array("x", x) is x
    assert to_numpy(x) is x
    assert not is_cupy(x)
    assert namespace(x, None) is np


# Refusals.


@pytest.mark.parametrize("value", [3.0, [1.0, 2.0], None, "x"])
def test_what_is_no_array_is_refused(value):
    with pytest.raises(ca.InputError, match=f"hidden is a {type(value).__name__}; pass a NumPy or CuPy array"):
        as_array("hidden", value)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_requires_grad_is_refused(name):
    with pytest.raises(ca.InputError, match=r"x cannot be taken through DLPack \(.*gradient.*\); convert it"):
        as_array("x", torch_tensor(name).requires_grad_())


def test_a_dtype_numpy_does_not_have_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ca.InputError, match=r"DLPack dtype \(code \d+, 8 bits\) is not a float NumPy has"):
        as_array("x", torch.zeros(2, dtype=torch.float8_e4m3fn))


def test_a_tensor_without_memory_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ca.InputError, match="x cannot be taken through DLPack"):
        as_array("x", torch.zeros(2, device="meta"))
    with pytest.raises(ca.InputError, match="x cannot be taken through DLPack"):
        as_array("x", torch.eye(2).to_sparse())


def test_another_device_is_refused():
    class OnRocm:
        """Claims to be on DLPack device type 10, an AMD GPU."""

        def __dlpack__(self, **keywords):
            raise AssertionError("must not be asked")

        def __dlpack_device__(self):
            return (10, 0)

    with pytest.raises(ca.InputError, match="x is on DLPack device type 10; move it to the CPU or to a CUDA GPU"):
        as_array("x", OnRocm())


# Names of dtypes.


@pytest.mark.parametrize("name", NAMES)
def test_storage_dtype_spellings(name):
    expected = np.dtype(NUMPY[name])
    for spelling in (name, expected, NUMPY[name], f"torch.{name}"):
        assert storage_dtype(spelling) == expected
    torch = pytest.importorskip("torch")
    assert storage_dtype(getattr(torch, name)) == expected


@pytest.mark.parametrize("dtype", ["float64", "half", "int8", np.float64, np.dtype(np.int32), float, None, ""])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ca.InputError, match="it must be one of float16, bfloat16, float32"):
        storage_dtype(dtype)
