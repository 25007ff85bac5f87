"""The GPU: kernels against float64, the layer on arrays of every origin, and what is said where there is no GPU."""

from __future__ import annotations

import sys
import types
import warnings

import numpy as np
import pytest
from conftest import K_NORM_MAXIMA, make_config, make_hidden, make_weights

import cupy_attn as ca
from cupy_attn import cuda, io, ops, reference, separate, warmup
from cupy_attn.accuracy import BARS, relative_l2
from cupy_attn.arrays import BFLOAT16, STORAGE_DTYPES, as_array, is_cupy, to_numpy
from cupy_attn.bench import run_bench
from cupy_attn.doctor import examine
from cupy_attn.verify import verify_layer

gpu = pytest.mark.gpu
CONFIG = make_config()
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def make_layer(dtype="float16", device="cuda", config=CONFIG, k_norm_max=96.5) -> ca.Attention:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ca.SlowPathWarning)  # float32 and odd shapes are tested here too
        return ca.Attention(config, make_weights(config, k_norm_max=k_norm_max, dtype=dtype), dtype, device)


def oracle(layer, x, **options) -> np.ndarray:
    return reference.forward(layer.config, layer.weights, to_numpy(x), **options)[0]


def same_bits(a, b) -> bool:
    a, b = to_numpy(a), to_numpy(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# The phases as array functions.


def phase_arguments(dtype: str) -> dict:
    """Return every phase's arguments as NumPy arrays, of one dtype but for the angles."""
    rng = np.random.default_rng(4)
    cos, sin = ca.rope_angles(CONFIG, np.arange(9))

    def array(*shape, scale=1.0):
        return (rng.standard_normal(shape) * scale).astype(STORAGE_DTYPES[dtype])

    heads, kv_heads, dim, hidden = 4, 2, 32, 96
    q, kv = (2, 9, heads, dim), (2, 9, kv_heads, dim)
    return {
        "rms_norm": (array(2, 9, hidden), array(hidden)),
        "project_qkv": (array(2, 9, hidden), array(256, hidden, scale=0.1), array(256)),
        "split_heads": (array(2, 9, 256), heads, kv_heads, dim),
        "qk_norm": (array(*q), array(*kv), array(dim), array(dim, scale=20)),
        "apply_rope": (array(*q), cos, sin),
        "gqa_attention": (array(*q), array(*kv), array(*kv)),
        "project_output": (array(*q), array(hidden, 128, scale=0.1), array(hidden), array(2, 9, hidden)),
    }


@gpu
@pytest.mark.parametrize("dtype", [*STORAGE_DTYPES, "float64"])
@pytest.mark.parametrize("phase", phase_arguments("float32"))
def test_a_phase_is_the_same_on_both_devices(cupy, phase, dtype):
    arguments = phase_arguments("float32" if dtype == "float64" else dtype)[phase]
    if dtype == "float64":
        arguments = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in arguments]
    options = [{}, {"sliding_window": 3}, {"scale": 0.5}] if phase == "gqa_attention" else [{}]
    bar = {"float64": 1e-13, "float32": 2e-6}.get(dtype, 2 * HALF_ULP.get(dtype, 0))
    function = getattr(ca, phase)
    for option in options:
        on_cpu = function(*arguments, **option)
        on_gpu = function(*(cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments), **option)
        pairs = zip(on_cpu, on_gpu, strict=True) if isinstance(on_cpu, tuple) else [(on_cpu, on_gpu)]
        for want, got in pairs:
            assert is_cupy(got)
            assert got.dtype == want.dtype
            assert relative_l2(got, want) <= bar


@gpu
def test_phases_refuse_mixed_devices(cupy):
    for phase, arguments in phase_arguments("float32").items():
        if phase in ("split_heads", "apply_rope"):  # one array, and angles that may come from the host
            continue
        with pytest.raises(ca.InputError, match="mix NumPy and CuPy"):
            getattr(ca, phase)(cupy.asarray(arguments[0]), *arguments[1:])


# The layer.


@gpu
@pytest.mark.parametrize("k_norm_max", K_NORM_MAXIMA)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_the_layer_keeps_its_bar_on_arrays_of_both_devices(cupy, dtype, k_norm_max):
    layer = make_layer(dtype, "auto", k_norm_max=k_norm_max)
    assert layer.device == "cuda"
    x = make_hidden(CONFIG, 2, 50, dtype=dtype)
    y = layer(x, residual=x)
    assert type(y) is np.ndarray
    assert y.dtype == STORAGE_DTYPES[dtype]
    assert np.isfinite(y.astype(np.float32)).all()
    if k_norm_max <= 96.5:  # the bars' range; beyond it the output must only be finite
        assert relative_l2(y, oracle(layer, x, residual=x)) <= BARS[dtype]
    on_gpu = layer(cupy.asarray(x), residual=cupy.asarray(x))
    assert is_cupy(on_gpu)
    assert same_bits(on_gpu, y)
    assert same_bits(layer(x, residual=x), y)


CONFIGS = {
    "one query head a key head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "a width no kernel takes": {"hidden_size": 100},
    "biases": {"attention_bias": True},
    "a window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 20},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}


@gpu
@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_of_every_kind_verify_stage_by_stage(kind):
    config = make_config(**CONFIGS[kind])
    layer = make_layer("float16", config=config)
    result = verify_layer(layer, make_hidden(config, 2, 40, dtype="float16"))
    assert result.passed, [row for row in result.reference if not row.passed] + result.collapse


@gpu
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_a_cache_on_the_gpu_goes_on_where_it_was_and_its_tail_is_not_read(cupy, dtype):
    layer = make_layer(dtype)
    x = make_hidden(CONFIG, 2, 30, dtype=dtype)
    want = oracle(layer, x)
    cache = layer.new_cache(2, 40)
    assert cache.xp is cupy
    parts = []
    for start, stop in ((0, 17), (17, 25), *((i, i + 1) for i in range(25, 30))):
        cache.k_heads[:, :, start:] = cache.v_heads[:, :, start:] = np.nan
        parts.append(layer(x[:, start:stop], cache))
    assert relative_l2(np.concatenate(parts, 1), want) <= BARS[dtype]
    assert cache.lengths.tolist() == [30, 30]
    whole = layer.new_cache(2, 30)
    layer(x, whole)
    assert relative_l2(cache.k[:, :30], whole.k) <= BARS[dtype]


@gpu
def test_rows_that_are_padding_are_zero_and_change_nothing(cupy):
    layer, x = make_layer(), make_hidden(CONFIG, 3, 12, dtype="float16")
    counts = np.array([12, 0, 5])
    spoiled = x.copy()
    spoiled[1], spoiled[2, 5:] = np.nan, np.nan
    stages = {}
    y = layer(spoiled, num_tokens=counts, stages=stages)
    for b, count in enumerate(counts):
        assert not y[b, count:].any()
        if count:
            assert relative_l2(y[b, :count], oracle(layer, x[b : b + 1, :count])[0]) <= BARS["float16"]
    assert all(np.isfinite(to_numpy(stage)).all() for stage in stages.values())


@gpu
def test_a_cache_file_moves_between_devices(tmp_path):
    x = make_hidden(CONFIG, 2, 12, dtype="float16")
    layers = {device: make_layer(device=device) for device in ("cpu", "cuda")}
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        cache = layers[here].new_cache(2, 8)
        layers[here](x[:, :8], cache)
        io.save_cache(tmp_path / "cache.safetensors", cache)
        read = io.load_cache(tmp_path / "cache.safetensors", layers[there], room=4)
        assert same_bits(read.k[:, :8], cache.k)
        y = layers[there](x[:, 8:], read)
        assert relative_l2(y, oracle(layers[there], x)[:, 8:]) <= BARS["float16"]


@gpu
def test_the_layer_works_on_the_current_stream(cupy):
    layer = make_layer()
    x = make_hidden(CONFIG, 2, 20, dtype="float16")
    want = layer(cupy.asarray(x))
    given = cupy.asarray(x)
    late = cupy.zeros_like(given)
    busy = cupy.ones((4096, 4096), np.float32)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(20):  # tens of milliseconds before x is there
            busy = busy @ busy * np.float32(1 / 4096)
        late[...] = given
        y = layer(late)  # another stream would not wait, and read zeros
        stream.synchronize()
        assert same_bits(y, want)


@gpu
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_torch_tensors_on_the_gpu_are_taken_without_a_copy(cupy, dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    layer, x = make_layer(dtype), make_hidden(CONFIG, 2, 20, dtype=dtype)
    tensor = torch.from_numpy(x.astype(np.float32)).cuda().to(getattr(torch, dtype))
    torch.cuda.synchronize()
    view = as_array("x", tensor)
    assert is_cupy(view)
    assert view.data.ptr == tensor.data_ptr()
    assert same_bits(view, x)
    assert same_bits(layer(tensor, residual=tensor), layer(x, residual=x))
    out = torch.zeros_like(tensor)
    layer(tensor, out=out)
    torch.cuda.synchronize()
    assert same_bits(as_array("out", out), layer(x))


@gpu
def test_bfloat16_arrays_of_cupy(cupy):
    layer = make_layer("bfloat16")
    x = cupy.asarray(make_hidden(CONFIG, 1, 20, dtype="bfloat16"))
    assert x.dtype == BFLOAT16
    out = cupy.empty_like(x)
    cache = layer.new_cache(1, 20)
    assert layer(x, cache, out=out) is out
    assert out.dtype == cache.k.dtype == BFLOAT16
    assert relative_l2(out, oracle(layer, x)) <= BARS["bfloat16"]


@gpu
def test_mixed_devices_are_refused_before_anything_is_written(cupy):
    layer, on_cpu = make_layer(), make_layer(device="cpu")
    x = make_hidden(CONFIG, 1, 5, dtype="float16")
    cache = layer.new_cache(1, 8)
    with pytest.raises(ca.InputError, match="residual and x are on different devices"):
        layer(cupy.asarray(x), cache, residual=x)
    with pytest.raises(ca.InputError, match="residual and x are on different devices"):
        layer(x, cache, residual=cupy.asarray(x))
    with pytest.raises(ca.InputError, match="out and x are on different devices"):
        layer(cupy.asarray(x), cache, out=np.empty_like(x))
    with pytest.raises(ca.InputError, match="x is on the GPU and the layer on the CPU"):
        on_cpu(cupy.asarray(x))
    with pytest.raises(ca.CacheError, match="lives in numpy, the layer computes in cupy"):
        layer(x, on_cpu.new_cache(1, 8))
    with pytest.raises(ca.CacheError, match="lives in cupy, the layer computes in numpy"):
        on_cpu(x, cache)
    assert cache.lengths.tolist() == [0]
    assert not cache.k.any()


@gpu
def test_positions_and_counts_may_be_on_the_gpu(cupy):
    layer, x = make_layer(), make_hidden(CONFIG, 1, 5, dtype="float16")
    steps = np.array([3, 4, 9, 10, 40])
    want = layer(x, positions=steps)
    assert same_bits(layer(x, positions=cupy.asarray(steps), num_tokens=cupy.asarray([5])), want)
    assert not same_bits(layer(x), want)


@gpu
def test_weights_of_cupy_arrays_are_those_of_numpy_arrays(cupy):
    x = make_hidden(CONFIG, 1, 9, dtype="float16")
    tensors = make_weights(CONFIG, dtype="float16").to_dict(CONFIG)
    on_gpu = {name: cupy.asarray(tensor) for name, tensor in tensors.items()}
    assert same_bits(ca.forward(x, CONFIG, on_gpu, device="cuda"), ca.forward(x, CONFIG, tensors, device="cuda"))


@gpu
def test_doctor_and_bench_use_the_gpu():
    report = examine()
    assert report["gpu"]["usable"] is True
    assert report["ok"] is True
    assert [row["dtype"] for row in report["self_test"] if row["device"] == "cuda"] == list(STORAGE_DTYPES)
    rows = list(run_bench(CONFIG, dtype="float16", device="cuda", batch=1, tokens=16, repeats=2))
    assert all(0 < row.min_us <= row.median_us for row in rows)


# Without a GPU.


without_gpu = pytest.mark.skipif(cuda.problem() is None, reason="there is a GPU")


@without_gpu
def test_without_a_gpu_the_layer_says_why_or_takes_the_cpu():
    why = cuda.problem()
    assert why.endswith(".")
    assert "\n" not in why
    with pytest.raises(ca.DeviceError) as caught:
        make_layer(device="cuda")
    assert str(caught.value) == why
    assert make_layer(device="auto").device == make_layer(device="cpu").device == "cpu"
    assert warmup.build_at_import() is None
    assert examine()["gpu"] == {"usable": False, "why": why}


def ask(monkeypatch, *, count=1, capability="90") -> str | None:
    """Ask :func:`cuda.problem` anew on a machine with other GPUs."""
    cupy = pytest.importorskip("cupy")
    number = count if callable(count) else lambda: count
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", number)
    monkeypatch.setattr(cupy.cuda, "Device", lambda: types.SimpleNamespace(compute_capability=capability))
    return cuda.problem.__wrapped__()


@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "100", "120"])
def test_a_gpu_since_ampere_is_usable(monkeypatch, capability):
    assert ask(monkeypatch, capability=capability) is None


def test_every_reason_against_a_gpu_is_a_sentence(monkeypatch):
    cupy = pytest.importorskip("cupy")

    def no_driver():
        raise cupy.cuda.runtime.CUDARuntimeError(35)  # cudaErrorInsufficientDriver

    reasons = [ask(monkeypatch, count=0), ask(monkeypatch, capability="75"), ask(monkeypatch, count=no_driver)]
    monkeypatch.setitem(sys.modules, "cupy", None)
    reasons.append(cuda.problem.__wrapped__())
    said = ("CUDA_VISIBLE_DEVICES", "capability 7.5, the kernels need 8.0", "NVIDIA driver", "pip install cupy-cuda12x")
    for reason, says in zip(reasons, said, strict=True):
        assert says in reason
        assert reason.endswith(".")


def test_an_array_of_the_gpu_is_refused_by_a_layer_on_the_cpu(monkeypatch):
    class Array(np.ndarray):
        """Stands for a CuPy array on a machine without a GPU."""

    layer = make_layer("float32", "cpu")
    x = make_hidden(CONFIG, 1, 3).view(Array)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=Array))
    with pytest.raises(ca.InputError, match="x is on the GPU and the layer on the CPU; make the layer with"):
        layer(x)
    with pytest.raises(ca.InputError, match="mix NumPy and CuPy arrays; move them all to one device"):
        ops.rms_norm(x, np.ones(96, np.float32))


def test_a_missing_cuda_library_is_a_device_error(monkeypatch):
    backend = object.__new__(separate.SeparateOps)

    def fail(*_):
        raise ImportError("libcublas.so.12: cannot open shared object file")

    monkeypatch.setattr(backend, "_forward", fail)
    with pytest.raises(ca.DeviceError, match=r"libcublas\.so\.12.*; pip install 'cupy-cuda12x\[ctk\]'\."):
        backend.forward(None, None)
