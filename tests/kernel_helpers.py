"""Small sources that stand for the package's own, and a GPU that is not there."""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path

HEADERS = {
    "factor.cuh": "constexpr float FACTOR = 2.0f;\n",
    "term.cuh": "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\nconstexpr float TERM = 1.0f;\n",
}
LINEAR_CU = """
#include "factor.cuh"
#include "term.cuh"
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr float BONUS = 100.0f;  // sm_90a only
#else
constexpr float BONUS = 0.0f;
#endif
extern "C" __global__ void __launch_bounds__(32) linear(const STORAGE* x, STORAGE* y) {
    y[threadIdx.x] = static_cast<STORAGE>(FACTOR * static_cast<float>(x[threadIdx.x]) + TERM + BONUS);
}
"""
MACROS = (("STORAGE", "float"),)
HALF = (("STORAGE", "__half"),)


def write_sources(folder: Path) -> None:
    folder.mkdir()
    for name, text in HEADERS.items():
        (folder / name).write_text(text)
    (folder / "linear.cu").write_text(LINEAR_CU)


class Kernel:
    """What the tests look at of a ``cupy.RawKernel``."""

    def __init__(self, cubin: bytes, options: tuple[str, ...], path: str | None) -> None:
        self.cubin, self.options, self.path = cubin, options, path


def pretend_gpu(folder, capability="90", patch=setattr):
    """Let CuPy compile and cache for a GPU of a compute capability; only loading a module touches no driver.

    Returns the compilations, one entry for each time CuPy ran NVRTC.
    """
    import cupy
    from cupy._core import core
    from cupy.cuda import _compiler_cache, compiler, function

    class Module(function.Module):
        def load(self, cubin):
            self.cubin = cubin

    class RawModule:
        def __init__(self, *, code=None, path=None, options=()):
            self._code, self._path, self._options = code, path, options

        def compile(self, log_stream=None):
            if self._path is not None:
                return Kernel(Path(self._path).read_bytes(), (), self._path)
            module = core.compile_with_cache(
                self._code, self._options, arch=capability, prepend_cupy_headers=False, log_stream=log_stream
            )
            return Kernel(module.cubin, self._options, None)

        def get_function(self, name):
            return self.compile()

    class Device(contextlib.nullcontext):
        compute_capability = capability

    compilations = []
    usual = compiler._compile_using_nvrtc_no_warning

    @functools.wraps(usual)
    def compile_and_count(*args, **options):
        compilations.append(time.perf_counter())
        return usual(*args, **options)

    patch(cupy, "RawModule", RawModule)
    patch(cupy.cuda, "Device", Device)
    patch(function, "Module", Module)
    patch(compiler, "_compile_using_nvrtc_no_warning", compile_and_count)
    patch(compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin"))
    patch(compiler, "_kernel_cache_backend", _compiler_cache.DiskKernelCacheBackend(str(folder)))
    return compilations
