"""kernels_cu sources -> kernels: the one place that compiles.

A kernel is a file ``kernels_cu/<name>.cu`` with an ``extern "C"`` function of the same name, specialised with ``-D``
macros. :func:`kernel` compiles through ``cupy.RawModule`` (and CuPy's disk cache); :func:`compile_for` through NVRTC
alone, for any architecture, on a machine without a GPU.

CuPy 14.2's disk cache (``cupy/cuda/_compiler_cache.py``): a file is the cubin's SHA-1, then the cubin. It is written
under another name in the same folder and moved with ``os.replace``, so processes that build at once see each other's
files whole or not at all; one whose digest does not fit is compiled anew and replaced. But any ``OSError`` there fails
the build: the folder is made when CuPy is imported and at no other time, a full or read-only one cannot take the file,
and files have mode 0600, so another user's in a shared folder cannot be read.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import FileError, KernelBuildError
from .threads import run_parallel, workers

_HERE = Path(__file__).resolve().parent
# In a wheel the sources are package data; in a checkout they stand beside the package.
SOURCES = next(p for p in (_HERE / "kernels_cu", _HERE.parent / "kernels_cu") if p.is_dir())

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""Architectures every source must compile for."""

WGMMA_ARCHITECTURE = "sm_90a"
"""Architecture that sources named ``*_wgmma.cu`` are for."""

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


def runs_wgmma(arch: str) -> bool:
    """Return whether an architecture has what ``*_wgmma.cu`` are made of."""
    return arch == WGMMA_ARCHITECTURE


def compiles_for(name: str, arch: str) -> bool:
    """Return whether a kernel is for an architecture: those with wgmma, and what goes ahead of them, are for one."""
    return runs_wgmma(arch) or not (name.endswith("_wgmma") or name == "normalise_rows")


def kernel(name: str, macros: Macros) -> Any:
    """Return a kernel for the current GPU as a ``cupy.RawKernel``, compiled or taken from CuPy's disk cache.

    Where that cache or the folder for temporary files is of no use, the kernel is compiled in memory.

    Raises
    ------
    KernelBuildError
        NVRTC refused the source, and the message carries its log; or NVRTC or the CUDA headers are missing.
    """
    return _kernel(name, macros, current_arch())


def current_arch() -> str:
    """Return the architecture that kernels for the current GPU are compiled for, such as ``sm_80``.

    It is ``sm_90a``, with wgmma, for compute capability 9.0 exactly: code for it runs on no other.
    """
    import cupy

    capability = cupy.cuda.Device().compute_capability
    return WGMMA_ARCHITECTURE if capability == "90" else f"sm_{capability}"


@functools.cache
def _kernel(name: str, macros: Macros, arch: str) -> Any:
    module = _module(name, macros, arch)
    with _sentences(name, macros):
        try:
            return module.get_function(name)
        except OSError:  # the disk, never the source
            return _load(compile_for(arch, name, macros))


def _module(name: str, macros: Macros, arch: str) -> Any:
    # CuPy appends its own -arch=sm_90. Of the two NVRTC takes the number of the last and keeps the "a".
    options = (f"-arch={arch}",) if runs_wgmma(arch) else ()
    return import_cupy().RawModule(code=_source(name, macros), options=(*options, *_options()))


def _load(build: Build) -> Any:
    """Return a cubin as a ``cupy.RawKernel`` by way of a file in memory, which needs no folder.

    The file stays open: CuPy reads it again for another GPU, and knows modules by their paths, so a path must not come
    to mean another kernel.
    """
    file = os.memfd_create(f"{build.name}.cubin")
    with open(file, "wb", closefd=False) as writer:
        writer.write(build.cubin)
    return import_cupy().RawModule(path=f"/proc/self/fd/{file}").get_function(build.name)


def fill_cache(name: str, macros: Macros) -> bool:
    """Build a kernel for the current GPU into CuPy's disk cache; return whether it had to be compiled.

    Raises
    ------
    KernelBuildError
        As :func:`kernel`.
    FileError
        The cache cannot take the file or give it back.
    """

    class Witness:
        compiled = False

        def write(self, log: str) -> None:  # CuPy hands over NVRTC's log, be it empty, if and only if it compiled
            self.compiled = True

    witness = Witness()
    with _sentences(name, macros):
        try:
            _module(name, macros, current_arch()).compile(log_stream=witness)
        except OSError as error:
            raise FileError(_useless(error)) from None
    return witness.compiled


def cache_folder() -> str:
    """Return the folder of CuPy's disk cache, whether it exists or not."""
    return os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))


def cache_problem() -> str | None:
    """Return why CuPy's disk cache would keep no kernel, as a sentence, or None if it would."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return "CUPY_CACHE_IN_MEMORY is 1, so CuPy keeps no kernel on disk; unset it."
    try:
        os.stat(os.path.join(cache_folder(), ""))  # tempfile would take no name for the current folder
        with tempfile.NamedTemporaryFile(dir=cache_folder()) as file:
            file.write(bytes(1 << 16))  # a full disk still has room for an empty file
    except OSError as error:
        return _useless(error)
    return None


def _useless(error: OSError) -> str:
    why = error.strerror or error
    return f"the kernel cache {cache_folder()} cannot be used ({why}); set CUPY_CACHE_DIR to a folder you can write to."


def import_cupy() -> Any:
    """Import CuPy, with a temporary cache folder where its own cannot be made.

    CuPy makes the folder when it is imported; if that fails so does the import, this one and every later one.
    """
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is not None:
        try:
            os.makedirs(cache_folder(), exist_ok=True)  # as CuPy does
        except OSError as error:
            if any(module.startswith("cupy.") for module in sys.modules):
                raise FileError(f"CuPy failed to import earlier because {_useless(error)}") from None
            with _temporary_cache():
                import cupy
    import cupy

    return cupy


@contextlib.contextmanager
def _temporary_cache() -> Iterator[None]:
    """Name CuPy a cache folder that lasts as long as the process; it looks at the environment only when imported."""
    folder, owner = tempfile.mkdtemp(prefix="cupy_attn-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    usual = os.environ.get("CUPY_CACHE_DIR")
    os.environ["CUPY_CACHE_DIR"] = folder
    try:
        yield
    finally:
        if usual is None:
            del os.environ["CUPY_CACHE_DIR"]
        else:
            os.environ["CUPY_CACHE_DIR"] = usual


def build_common(pairs: Sequence[tuple[str, Macros]]) -> list[str]:
    """Build kernels for the current GPU on every core, unless that is deferred or was done before.

    Returns the failures and never raises: a kernel that failed raises its error at the first call that needs it.
    A file in CuPy's cache folder says that all of them were built, so that later imports neither load them nor start
    CUDA. Where it is wrong, because the cache was emptied around it, kernels are built by the calls that need them.
    """
    if os.environ.get(DEFER_VARIABLE, "0") not in ("", "0"):
        return []
    cupy = import_cupy()
    try:
        device: Any = cupy.cuda.Device()  # CUDA's current device is each thread's own
        done: Path | None = _all_built(pairs)
    except cupy.cuda.runtime.CUDARuntimeError:
        device, done = contextlib.nullcontext(), None  # the builds will say what is wrong
    if done is not None and os.path.isfile(done) and cache_problem() is None:
        return []
    failures: list[str] = []

    def build(name: str, macros: Macros) -> None:
        try:
            with device:
                kernel(name, macros)
        except Exception as error:
            failures.append(str(error))

    run_parallel([functools.partial(build, *pair) for pair in pairs], workers())
    if done is not None and not failures and cache_problem() is None:
        with contextlib.suppress(OSError):
            done.touch()
    return sorted(failures)


def _all_built(pairs: Sequence[tuple[str, Macros]]) -> Path:
    """Return the file that says that kernels of these sources were built for the current GPU by this CuPy and CUDA."""
    cupy = import_cupy()
    key = (source_digest(), cupy.__version__, cupy.cuda.runtime.runtimeGetVersion(), current_arch(), *sorted(pairs))
    return Path(cache_folder(), f"cupy_attn-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.built")


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
    nvrtc = import_cupy().cuda.nvrtc
    # As CuPy does, whatever it is given: flush subnormals, and take functions for device functions.
    usual = ("-ftz=true", "--device-as-default-execution-space")
    options = [*_options(), *usual, f"-arch={arch}", "--ptxas-options=-v", f"-I{_cuda_headers()}"]
    with _sentences(name, macros):
        if nvrtc.getVersion() >= (12, 9):
            options.append("--no-cache")  # NVRTC's own: on a hit there is no log, so no registers and no spills
        program = nvrtc.createProgram(_source(name, macros), f"{name}.cu", (), ())
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
    backend = ("cuda.py", "kernels.py", "launch.py", "launch_decode.py", "launcher.py", "operands.py", "separate.py",
               "steps.py", "tensor_maps.py", "wgmma.py", "workspace.py")  # fmt: skip
    for file in (*sorted(SOURCES.glob("*.cu*")), *(_HERE / name for name in backend)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _source(name: str, macros: Macros) -> str:
    """Return a source with its macros and a stamp of the headers.

    CuPy's cache key holds the text, not what it includes. Macros are text and not options because CuPy runs NVRTC once
    for every set of options, only to make the key: 34 kernels from the cache would take a second and not a third.
    """
    headers = hashlib.sha256()
    for file in sorted(SOURCES.glob("*.cuh")):
        headers.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    defines = "".join(f"#define {key} {value}\n" for key, value in macros)
    text = (SOURCES / f"{name}.cu").read_text(encoding="utf-8")
    return f"// headers {headers.hexdigest()}\n{defines}#line 1\n{text}"


def _options() -> tuple[str, ...]:
    return ("-std=c++17", f"-I{SOURCES}")


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


@contextlib.contextmanager
def _sentences(name: str, macros: Macros) -> Iterator[None]:
    """Turn what CuPy raises into sentences; errors of the GPU itself pass."""
    cupy = import_cupy()
    try:
        yield
    except cupy.cuda.compiler.CompileException as error:
        raise _build_error(name, macros, str(error)) from None
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        # At its first build CuPy loads NVRTC and looks for the CUDA headers.
        raise KernelBuildError(f"NVRTC cannot be used ({error}); pip install nvidia-cuda-nvrtc-cu12 "
                               "nvidia-cuda-runtime-cu12.") from None  # fmt: skip
