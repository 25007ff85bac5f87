"""kernels_cu sources -> kernels: the one place that compiles.

A kernel is a file ``kernels_cu/<name>.cu`` with an ``extern "C"`` function of the same name, specialised with ``-D``
macros. :func:`kernel` compiles through ``cupy.RawModule`` (and CuPy's disk cache); :func:`compile_for` through NVRTC
alone, for any architecture, on a machine without a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .errors import KernelBuildError

_HERE = Path(__file__).resolve().parent
# In a wheel the sources are package data; in a checkout they stand beside the package.
SOURCES = next(p for p in (_HERE / "kernels_cu", _HERE.parent / "kernels_cu") if p.is_dir())

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""Architectures every source must compile for."""

DEFER_VARIABLE = "CUPY_ATTN_DEFER_BUILD"
"""Set to anything but 0 or nothing: build no kernel at import, each at its first use instead."""

CUDA_NAMES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}
"""CUDA type of each storage dtype."""

Macros = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Build:
    """One compiled specialisation and what ptxas said of it."""

    name: str
    macros: Macros
    arch: str
    cubin: bytes
    log: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def rms_norm_macros(dtype: np.dtype[Any], output: np.dtype[Any], hidden_size: int) -> Macros:
    """Return the macros of ``rms_norm.cu``: enough warps for one vector a thread, 8 at most."""
    vectors = hidden_size // 8
    name = CUDA_NAMES[dtype.name]
    values = {"STORAGE": name, "WEIGHT": name, "OUTPUT": CUDA_NAMES[output.name], "HIDDEN_SIZE": hidden_size,
              "WARPS": max(1, min(8, -(-vectors // 32)))}  # fmt: skip
    return tuple(sorted((key, str(value)) for key, value in values.items()))


def specialisations() -> list[tuple[str, Macros]]:
    """Return every kernel in every specialisation that the published Qwen3 models use."""
    float32 = np.dtype(np.float32)
    from .arrays import STORAGE_DTYPES

    return [
        ("rms_norm", rms_norm_macros(dtype, float32, hidden))
        for dtype in STORAGE_DTYPES.values()
        for hidden in (1024, 2048, 2560, 4096, 5120)
    ]


def common_specialisations() -> list[tuple[str, Macros]]:
    """Return what is built at import: head_dim 128, 16-bit storage."""
    return [(name, macros) for name, macros in specialisations() if ("STORAGE", "float") not in macros]


@functools.cache
def kernel(name: str, macros: Macros) -> Any:
    """Return a kernel as a ``cupy.RawKernel``, compiled or taken from CuPy's disk cache.

    Raises
    ------
    KernelBuildError
        NVRTC refused the source; the message carries its log.
    """
    import cupy

    module = cupy.RawModule(code=_source(name), options=_options(macros), name_expressions=None)
    try:
        return module.get_function(name)
    except cupy.cuda.compiler.CompileException as error:
        raise _build_error(name, macros, str(error)) from None


def build_common() -> list[str]:
    """Build :func:`common_specialisations` unless deferred; return the failures, never raise.

    A kernel that failed raises its error at the first call that needs it.
    """
    if os.environ.get(DEFER_VARIABLE, "0") not in ("", "0"):
        return []
    failures = []
    for name, macros in common_specialisations():
        try:
            kernel(name, macros)
        except Exception as error:
            failures.append(str(error))
    return failures


def compile_for(arch: str, name: str, macros: Macros) -> Build:
    """Compile one specialisation with NVRTC for one architecture; needs no GPU.

    Parameters
    ----------
    arch : str
        ``sm_80``, ``sm_90a`` and so on.
    name : str
        File and function, without ``.cu``.
    macros : tuple of (name, value)
        ``-D`` macros.

    Raises
    ------
    KernelBuildError
        NVRTC refused the source, or is not installed.
    """
    from cupy.cuda import nvrtc

    options = [*_options(macros), f"-arch={arch}", "-ftz=true", "--ptxas-options=-v", f"-I{_cuda_headers()}"]
    if nvrtc.getVersion() >= (12, 9):
        options.append("--no-cache")  # NVRTC's own: on a hit there is no log, so no registers and no spills
    try:
        program = nvrtc.createProgram(_source(name), f"{name}.cu", (), ())
    except RuntimeError as error:  # CuPy loads NVRTC at the first call
        raise KernelBuildError(f"NVRTC cannot be used ({error}); pip install nvidia-cuda-nvrtc-cu12.") from None
    try:
        nvrtc.compileProgram(program, tuple(options))
        log, cubin = nvrtc.getProgramLog(program), nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        raise _build_error(name, macros, nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    return Build(
        name=name,
        macros=macros,
        arch=arch,
        cubin=cubin,
        log=log,
        registers=max((int(r) for r in re.findall(r"Used (\d+) registers", log)), default=0),
        spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
    )


def source_digest() -> str:
    """Return a SHA-256 over kernels_cu and the CUDA backend: what a report of measurements belongs to."""
    digest = hashlib.sha256()
    for file in (*sorted(SOURCES.glob("*.cu*")), _HERE / "cuda.py", _HERE / "kernels.py"):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _source(name: str) -> str:
    """Return a source with a stamp of the headers: CuPy's cache key holds the text, not what it includes."""
    headers = hashlib.sha256()
    for file in sorted(SOURCES.glob("*.cuh")):
        headers.update(file.read_bytes())
    return f"// headers {headers.hexdigest()}\n" + (SOURCES / f"{name}.cu").read_text(encoding="utf-8")


def _options(macros: Macros) -> tuple[str, ...]:
    return ("-std=c++17", f"-I{SOURCES}", *(f"-D{key}={value}" for key, value in macros))


def _cuda_headers() -> str:
    """Return the folder of cuda_fp16.h, which CuPy finds the same way."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    if folder is None:
        raise KernelBuildError("the CUDA headers were not found; pip install nvidia-cuda-runtime-cu12.")
    return str(folder)


def _build_error(name: str, macros: Macros, log: str) -> KernelBuildError:
    settings = " ".join(f"{key}={value}" for key, value in macros)
    return KernelBuildError(
        f"kernels_cu/{name}.cu ({settings}) did not compile; report this with NVRTC's message: {log.strip()}"
    )
