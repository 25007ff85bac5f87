"""What this machine offers the package, and a self-test."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, cuda, demo, kernels, reference
from .accuracy import BARS, relative_l2
from .arrays import STORAGE_DTYPES
from .config import AttentionConfig
from .errors import CupyAttnError
from .layer import Attention
from .threads import workers
from .weights import AttentionWeights

PACKAGES = ("numpy", "ml-dtypes", "safetensors", "click", "threadpoolctl", "nvidia-cuda-nvrtc-cu12",
            "nvidia-cuda-runtime-cu12")  # fmt: skip
PROBE_ARCH = "sm_90a"


def examine() -> dict[str, Any]:
    """Return versions, GPU, NVRTC, kernel cache and self-test results; ``ok`` is whether all self-tests passed."""
    report: dict[str, Any] = {
        "versions": _versions(),
        "cpu": {"machine": platform.machine(), "cores": workers(), "blas": _blas()},
        "gpu": _gpu(),
        "nvrtc": _nvrtc(),
        "cache": _kernel_cache(),
    }
    devices = ["cpu"] + (["cuda"] if cuda.problem() is None else [])
    report["self_test"] = [_self_test(device, dtype) for device in devices for dtype in STORAGE_DTYPES]
    report["ok"] = all(row["passed"] for row in report["self_test"])
    return report


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cupy_attn": __version__}
    for name in (*PACKAGES, "cupy-cuda12x", "cupy-cuda13x"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if not name.startswith("cupy"):
                found[name] = "not installed"
    return found


def _blas() -> str:
    from threadpoolctl import threadpool_info

    pools = [p for p in threadpool_info() if p["user_api"] == "blas"]
    return ", ".join(f"{p['internal_api']} {p['version']} ({p['num_threads']} threads)" for p in pools) or "unknown"


def _gpu() -> dict[str, Any]:
    problem = cuda.problem()
    if problem:
        return {"usable": False, "why": problem}
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "usable": True,
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "multiprocessors": properties["multiProcessorCount"],
        "l2_mib": round(properties["l2CacheSize"] / 2**20, 1),
        "driver": _cuda_version(cupy.cuda.runtime.driverGetVersion()),
        "runtime": _cuda_version(cupy.cuda.runtime.runtimeGetVersion()),
    }


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _nvrtc() -> dict[str, Any]:
    """Compile one kernel for a fixed architecture, past every cache; needs no GPU."""
    try:
        from cupy.cuda import nvrtc

        name, macros = kernels.common_specialisations()[0]
        start = time.perf_counter()
        build = kernels.compile_for(PROBE_ARCH, name, macros)
        seconds = time.perf_counter() - start
        version = ".".join(map(str, nvrtc.getVersion()))
    except (CupyAttnError, ImportError, OSError, RuntimeError) as error:
        return {"usable": False, "why": str(error)}
    return {
        "usable": True, "version": version, "probe": f"{name}.cu for {PROBE_ARCH}", "compile_s": round(seconds, 3),
        "registers": build.registers, "spill_bytes": build.spill_bytes,
    }  # fmt: skip


def _kernel_cache() -> dict[str, Any]:
    """Describe CuPy's disk cache of compiled kernels."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache")))
    files = list(folder.glob("*.cubin")) if folder.is_dir() else []
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return {
        "folder": str(folder), "exists": folder.is_dir(), "writable": os.access(nearest, os.W_OK),
        "kernels": len(files), "mib": round(sum(f.stat().st_size for f in files) / 2**20, 2),
        "import_builds": os.environ.get(kernels.DEFER_VARIABLE, "0") in ("", "0"),
    }  # fmt: skip


def _self_test(device: str, dtype: str) -> dict[str, Any]:
    """Run a layer with the K-norm weights of Qwen3-0.6B layer 0 and hold it to its bar."""
    config = AttentionConfig.from_dict(demo.CONFIG)
    tensors = {n: t for n, t in demo.model_tensors(np.random.default_rng(0)).items() if ".layers.0." in n}
    layer = Attention(config, AttentionWeights.from_dict(tensors, config), dtype, device)
    x = demo.hidden_states(1, 33, config.hidden_size).astype(layer.dtype)
    row: dict[str, Any] = {"device": device, "dtype": dtype, "bar": BARS[dtype]}
    try:
        error = relative_l2(layer(x), reference.forward(config, layer.weights, x)[0])
    except CupyAttnError as problem:
        return row | {"relative_l2": None, "passed": False, "why": str(problem)}
    return row | {"relative_l2": error, "passed": error <= BARS[dtype]}
