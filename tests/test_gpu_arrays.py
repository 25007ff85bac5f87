"""What x, residual and out may be on the GPU: views at any address, one another, arrays of other libraries."""

from __future__ import annotations

import functools
import itertools
import os

import numpy as np
import pytest
from conftest import make_config, make_hidden
from gpu_helpers import HALVES, NAN_BITS, bits, build_ahead, kernels_of, make_layer, same_bits

import cupy_attn as ca
from cupy_attn.arrays import as_array, is_cupy, to_numpy

pytestmark = pytest.mark.gpu

CONFIG = make_config()
SHAPES = [(2, 1), (12, 1), (2, 21)]  # few and many tokens of decode, and a chunk


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    build_ahead(kernels_of([(CONFIG, dtype, True) for dtype in HALVES], SHAPES))


@functools.cache
def layer_of(dtype: str) -> ca.Attention:
    return make_layer(CONFIG, dtype)


def run(layer, x, residual=None, **options):
    """Run a call after five cached tokens."""
    cache = layer.new_cache(x.shape[0], 40)
    layer(make_hidden(CONFIG, x.shape[0], 5, seed=9, dtype=layer.dtype), cache)
    return layer(x, cache, residual=residual, **options)


def placed(array: np.ndarray, how: str):
    """Return a CuPy array with these values: contiguous, or a view of some other order or address."""
    import cupy

    batch, seq, hidden = array.shape
    if how == "contiguous":
        return cupy.asarray(array)
    if how.startswith("offset"):
        start = int(how.split()[1])  # elements of two bytes: 8 of them are what kernels read at a time
        room = cupy.empty(array.size + start, array.dtype)
        view = room[start:].reshape(array.shape)
    elif how == "every other token":
        view = cupy.empty((batch, 2 * seq, hidden), array.dtype)[:, ::2]
    elif how == "every other channel":
        view = cupy.empty((batch, seq, 2 * hidden), array.dtype)[..., ::2]
    elif how == "tokens first":
        view = cupy.empty((seq, batch, hidden), array.dtype).transpose(1, 0, 2)
    elif how == "backwards":
        view = cupy.empty(array.shape, array.dtype)[:, ::-1]
    else:
        view = cupy.empty((batch, seq, hidden + 8), array.dtype)[..., :hidden]
    view[...] = cupy.asarray(array)
    return view


PLACES = ["contiguous", "offset 1", "offset 3", "offset 8", "every other token", "every other channel", "tokens first",
          "backwards", "part of a wider row"]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", PLACES)
def test_views_are_read_and_written_as_what_they_show(how, dtype, shape):
    layer = layer_of(dtype)
    x, residual = (make_hidden(CONFIG, *shape, seed=seed, dtype=dtype) for seed in (1, 2))
    want = run(layer, x, residual)
    assert not same_bits(want, run(layer, x))
    given = placed(x, how), placed(residual, how)
    assert same_bits(run(layer, *given), want)
    assert same_bits(given[0], x)
    assert same_bits(given[1], residual)
    out = placed(x, how)
    whole = out if out.base is None else out.base  # what the view was cut from
    bits(out).fill(NAN_BITS)
    before = to_numpy(bits(whole)).ravel().copy()
    assert run(layer, *given, out=out) is out
    assert same_bits(out, want)
    assert (to_numpy(bits(whole)).ravel() != before).sum() <= want.size  # nothing beside it


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_out_may_be_x_or_the_residual_or_both(dtype, shape):
    layer = layer_of(dtype)
    x, residual = (make_hidden(CONFIG, *shape, seed=seed, dtype=dtype) for seed in (1, 2))
    want, plain, both = run(layer, x, residual), run(layer, x), run(layer, x, x)
    for how in ("contiguous", "offset 1", "every other token"):
        a, r = placed(x, how), placed(residual, how)
        assert same_bits(run(layer, a, r, out=r), want)
        assert same_bits(a, x)
        a, r = placed(x, how), placed(residual, how)
        assert same_bits(run(layer, a, r, out=a), want)
        assert same_bits(r, residual)
        a = placed(x, how)
        assert same_bits(run(layer, a, out=a), plain)
        a = placed(x, how)
        assert same_bits(run(layer, a, a, out=a), both)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift", [8, 96, -8, -96, 1])
def test_out_may_overlap_x_and_the_residual_in_part(shift, shape):
    import cupy

    layer = layer_of("float16")
    x, residual = (make_hidden(CONFIG, *shape, seed=seed, dtype="float16") for seed in (1, 2))
    want = run(layer, x, residual)
    for overlaps in ("x", "residual"):
        room = cupy.zeros(x.size + abs(shift), x.dtype)
        first, second = room[: x.size].reshape(x.shape), room[abs(shift) :].reshape(x.shape)
        given, out = (first, second) if shift > 0 else (second, first)
        given[...] = cupy.asarray(x if overlaps == "x" else residual)
        arrays = {"x": cupy.asarray(x), "residual": cupy.asarray(residual)} | {overlaps: given}
        assert same_bits(run(layer, **arrays, out=out), want)


@pytest.mark.parametrize("dtype", HALVES)
def test_numpy_arrays_go_in_and_come_out(dtype):
    layer = layer_of(dtype)
    for shape in SHAPES:
        x = make_hidden(CONFIG, *shape, dtype=dtype)
        want = to_numpy(run(layer, placed(x, "contiguous"), placed(x, "contiguous")))
        for given in (x, np.repeat(x, 2, axis=1)[:, ::2], np.asfortranarray(x)):
            y = run(layer, given, given)
            assert type(y) is np.ndarray
            assert same_bits(y, want)
        out = np.empty((shape[0], 2 * shape[1], 96), x.dtype)[:, ::2]
        assert run(layer, x, x, out=out) is out
        assert same_bits(out, want)
        assert same_bits(run(layer, mine := x.copy(), mine, out=mine), want)


# Other libraries.


def torch_with_cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


@pytest.mark.parametrize("dtype", HALVES)
def test_a_torch_tensor_is_waited_for_on_the_stream_that_makes_it(dtype):
    torch = torch_with_cuda()
    layer, x = layer_of(dtype), make_hidden(CONFIG, 2, 20, dtype=dtype)
    want = layer(x, residual=x)
    given = torch.from_numpy(x.astype(np.float32)).cuda().to(getattr(torch, dtype))
    busy = torch.ones(4096, 4096, device="cuda")
    late, out = torch.zeros_like(given), torch.zeros_like(given)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):  # tens of milliseconds before x is there
            busy = busy @ busy * (1 / 4096)
        late.copy_(given)
        y = layer(late, residual=late, out=out)
    torch.cuda.synchronize()  # which waits for the streams of CuPy, too
    assert same_bits(y, want)
    assert same_bits(as_array("out", out), want)


@pytest.mark.parametrize("dtype", HALVES)
def test_torch_views_and_positions_go_in(dtype):
    torch = torch_with_cuda()
    layer, x = layer_of(dtype), make_hidden(CONFIG, 2, 20, dtype=dtype)
    tensor = torch.from_numpy(x.astype(np.float32)).cuda().to(getattr(torch, dtype))
    wide = torch.zeros(2, 40, 96, device="cuda", dtype=tensor.dtype)
    wide[:, ::2] = tensor
    torch.cuda.synchronize()
    view = as_array("x", wide[:, ::2])
    assert view.data.ptr == wide.data_ptr()
    positions = torch.arange(3, 23, device="cuda")
    y = layer(wide[:, ::2], positions=positions, num_tokens=torch.tensor([20, 20], device="cuda"))
    assert is_cupy(y)
    assert same_bits(y, layer(x, positions=np.arange(3, 23)))
    assert same_bits(as_array("y", torch.from_dlpack(y)), y)  # and back


@pytest.mark.parametrize("dtype", HALVES)
def test_jax_arrays_are_taken_without_a_copy(dtype):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX takes three quarters of the GPU
    jax = pytest.importorskip("jax")
    try:
        gpu = jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX has no CUDA: {error}")
    layer, x = layer_of(dtype), make_hidden(CONFIG, 2, 20, dtype=dtype)
    array = jax.device_put(x, gpu)
    array.block_until_ready()
    view = as_array("x", array)
    assert is_cupy(view)
    assert view.data.ptr == array.unsafe_buffer_pointer()
    assert same_bits(view, x)
    want = layer(x, residual=x)
    assert same_bits(layer(array, residual=array), want)
    assert same_bits(np.asarray(array), x)  # JAX arrays do not change
    made = jax.numpy.flip(jax.numpy.flip(array, 1), 1) * 1  # not waited for
    assert same_bits(layer(made, residual=made), want)


def test_every_library_can_be_mixed_in_one_call():
    torch = torch_with_cuda()
    import cupy

    layer, x = layer_of("float16"), make_hidden(CONFIG, 2, 20, dtype="float16")
    want = layer(x, residual=x)
    kinds = [cupy.asarray(x), torch.from_numpy(x).cuda()]
    torch.cuda.synchronize()
    for a, b in itertools.product(kinds, kinds):
        assert same_bits(layer(a, residual=b), want)
