"""What this machine offers the package, and a self-test."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import time
import warnings
from typing import Any

import numpy as np

from . import __version__, cuda, demo, kernels, reference, warmup
from .accuracy import BARS, relative_l2
from .arrays import STORAGE_DTYPES
from .config import AttentionConfig
from .errors import CupyAttnError, SlowPathWarning
from .layer import Attention
from .threads import workers
from .weights import AttentionWeights

PACKAGES = ("numpy", "ml-dtypes", "safetensors", "click", "threadpoolctl", "nvidia-cuda-nvrtc-cu12",
            "nvidia-cuda-runtime-cu12")  # fmt: skip
PROBE_ARCH = "sm_90a"  # compiled for where there is no GPU
COLD_COMPILE_S = 20.0  # a cold compile begins no more kernels after this, unless it is asked for all of them


def examine(everything: bool = False) -> dict[str, Any]:
    """Return versions, GPU, NVRTC, kernel cache and self-test results; ``ok`` is whether all self-tests passed.

    Parameters
    ----------
    everything : bool
        Compile every common kernel cold, however long it takes.
    """
    report: dict[str, Any] = {
        "versions": _versions(),
        "cpu": {"machine": platform.machine(), "cores": workers(), "blas": _blas()},
        "gpu": _gpu(),
        "nvrtc": _nvrtc(everything),
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


def _nvrtc(everything: bool) -> dict[str, Any]:
    """Compile the common kernels past every cache, for this GPU or for a fixed architecture."""
    try:
        version = ".".join(map(str, kernels.import_cupy().cuda.nvrtc.getVersion()))
    except (ImportError, OSError, RuntimeError) as error:
        return {"usable": False, "why": str(error)}
    arch = PROBE_ARCH if cuda.problem() else kernels.current_arch()
    builds = [functools.partial(warmup.build_offline, arch, *pair) for pair in warmup.common()]
    start = time.perf_counter()
    results = warmup.build_all(builds, limit_s=float("inf") if everything else COLD_COMPILE_S)
    seconds = time.perf_counter() - start
    built, failures = [r for r in results if not r.error], [r.error for r in results if r.error]
    report = {
        "usable": bool(built) or not failures, "version": version, "cold_compile_s": round(seconds, 2), "arch": arch,
        "kernels": len(built), "max_registers": max((r.registers or 0 for r in built), default=0),
        "spill_bytes": sum(r.spill_bytes or 0 for r in built),
    }  # fmt: skip
    if len(results) < len(builds):
        report["not_compiled"] = len(builds) - len(results)
    if failures:
        report |= {"failed": len(failures), "why": failures[0]}
    return report


def _kernel_cache() -> dict[str, Any]:
    """Describe CuPy's disk cache of compiled kernels."""
    folder = kernels.cache_folder()
    sizes = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        sizes = [entry.stat().st_size for entry in entries if entry.name.endswith(".cubin")]
    problem = kernels.cache_problem()
    report = {
        "folder": folder, "exists": os.path.isdir(folder), "writable": problem is None,
        "kernels": len(sizes), "mib": round(sum(sizes) / 2**20, 2),
        "import_builds": os.environ.get(kernels.DEFER_VARIABLE, "0") in ("", "0"),
    }  # fmt: skip
    return report if problem is None else report | {"why": problem}


def _self_test(device: str, dtype: str) -> dict[str, Any]:
    """Run a layer with the K-norm weights of Qwen3-0.6B layer 0 and hold it to its bar."""
    config = AttentionConfig.from_dict(demo.CONFIG)
    tensors = {n: t for n, t in demo.model_tensors(np.random.default_rng(0)).items() if ".layers.0." in n}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)  # float32 on a GPU is tested as what it is
        layer = Attention(config, AttentionWeights.from_dict(tensors, config), dtype, device)
    x = demo.hidden_states(1, 33, config.hidden_size).astype(layer.dtype)
    row: dict[str, Any] = {"device": device, "dtype": dtype, "bar": BARS[dtype]}
    try:
        error = relative_l2(layer(x), reference.forward(config, layer.weights, x)[0])
    except CupyAttnError as problem:
        return row | {"relative_l2": None, "passed": False, "why": str(problem)}
    return row | {"relative_l2": error, "passed": error <= BARS[dtype]}
