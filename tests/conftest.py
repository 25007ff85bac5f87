"""What every test shares: small models with extreme K-norm weights, and a GPU if there is one."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_helpers import pretend_gpu, write_sources

import cupy_attn as ca
from cupy_attn import cpu, cuda, kernels

pytest.register_assert_rewrite("gpu_helpers")  # a check that fails tells its figures

# Maxima of |k_norm.weight| the tests are run at: the threshold, Qwen3-0.6B layers 1 and 0, and far beyond.
K_NORM_MAXIMA = (20.0, 44.5, 96.5, 1000.0)


def make_config(**changes) -> ca.AttentionConfig:
    """Return a small config; any ``config.json`` key can be changed."""
    base = {
        "model_type": "qwen3", "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 4096, "num_hidden_layers": 4,
    }  # fmt: skip
    return ca.AttentionConfig.from_dict(base | changes)


def make_weights(config: ca.AttentionConfig, *, k_norm_max=96.5, seed=0, layer=0, dtype="float32"):
    """Return random weights whose |k_norm| has the given maximum, in a few dimensions, as Qwen3-0.6B has."""
    rng = np.random.default_rng(seed)
    h, q, kv, d = config.hidden_size, config.q_size, config.kv_size, config.head_dim
    shapes = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    tensors = {
        f"self_attn.{name}.weight": (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    if config.attention_bias:
        tensors |= {f"self_attn.{n}.bias": rng.standard_normal(s[0]).astype(np.float32) for n, s in shapes.items()}
    k_norm = np.abs(rng.standard_normal(d) * min(k_norm_max / 10, 3)).clip(0.1)
    k_norm[rng.permutation(d)[: max(1, d // 32)]] = k_norm_max
    tensors["self_attn.k_norm.weight"] = k_norm.astype(np.float32)
    tensors["self_attn.q_norm.weight"] = (1 + rng.standard_normal(d) * 0.3).astype(np.float32)
    tensors["input_layernorm.weight"] = (1 + rng.standard_normal(h) * 0.2).astype(np.float32)
    return ca.AttentionWeights.from_dict(tensors, config, layer=layer).astype(dtype)


def make_hidden(config: ca.AttentionConfig, batch: int, seq: int, *, seed=1, dtype="float32") -> np.ndarray:
    """Return hidden states with a few large channels, as a residual stream has."""
    from cupy_attn.arrays import storage_dtype

    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, seq, config.hidden_size))
    x[..., :: max(1, config.hidden_size // 3)] *= 20
    return x.astype(storage_dtype(dtype))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every backend; the GPU where there is one."""
    if request.param == "cuda":
        if cuda.problem():
            pytest.skip(cuda.problem())
        request.getfixturevalue("usual_kernels")
    return request.param


@pytest.fixture(scope="session")
def usual_kernels() -> None:
    """Build, on every core, the kernels of tests that run on every backend."""
    from gpu_helpers import HALVES, build_ahead, kernels_of

    kinds = [(make_config(), dtype, precise) for dtype in HALVES for precise in (False, True)]
    shapes = [(2, 16), (2, 64), (12, 64), (2, 80), (2, 128), (16, 128)]  # G, D of test_layer.py
    odd = [(make_config(num_attention_heads=g, num_key_value_heads=1, head_dim=d), "float16", True) for g, d in shapes]
    wide = [(make_config(head_dim=128), dtype, True) for dtype in HALVES]
    build_ahead([*kernels_of(kinds + odd, [(1, 1), (2, 20)]), *kernels_of(kinds + wide, [(2, 20)], collect=True)])


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return a folder with a demo checkpoint in ``model``; nothing in it is changed by a test."""
    from cli_helpers import invoke

    folder = tmp_path_factory.mktemp("cli")
    (folder / "printed").write_text(invoke("demo", folder / "model").stdout)
    return folder


@pytest.fixture(scope="session")
def model(made):
    return made / "model"


@pytest.fixture
def small(tmp_path):
    """Return a checkpoint of two layers in one file: 96 wide, 4:2 heads of 32, and activations beside it."""
    from cli_helpers import write_small

    folder = tmp_path / "small"
    folder.mkdir()
    write_small(folder, make_config(num_hidden_layers=2))
    return folder


def pytest_collection_modifyitems(items) -> None:
    """Skip what needs a GPU where there is none; tests of every storage dtype may take the slow path."""
    problem = cuda.problem()
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore::cupy_attn.errors.SlowPathWarning"))
        if problem and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture
def small_blocks(monkeypatch):
    """Make every block of the CPU backend so small that a few tokens cross its edges, in two threads."""
    for name, value in (("THREADED_ROWS", 2), ("PROJECT_ROWS", 8), ("NORM_ROWS", 3), ("ATTEND_ROWS", 16),
                        ("ATTEND_KEYS", 8), ("DECODE_KEYS", 8), ("DECODE_ROWS", 2)):  # fmt: skip
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(cpu, "workers", lambda: 2)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Return a folder of small sources that the package compiles instead of its own."""
    folder = tmp_path / "kernels cu"  # a blank in the path, as in a user's folder
    write_sources(folder)
    monkeypatch.setattr(kernels, "SOURCES", folder)
    kernels._kernel.cache_clear()
    yield folder
    kernels._kernel.cache_clear()


@pytest.fixture
def fake_gpu(tmp_path, monkeypatch, sources):
    """Return what makes a GPU of a compute capability that is not there the current one; its cache is ``tmp/cache``."""
    pytest.importorskip("cupy.cuda._compiler_cache", reason="the cache is replaceable from CuPy 14.1")
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    return lambda capability="90": pretend_gpu(folder, capability, monkeypatch.setattr)
