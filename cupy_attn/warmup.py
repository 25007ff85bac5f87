"""Which kernels a checkpoint needs, and building many at once, ahead of the first call."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from . import cuda, kernels
from .arrays import STORAGE_DTYPES
from .bench import MODELS, model_config
from .config import AttentionConfig
from .kernels import Macros
from .threads import run_parallel, workers
from .weights import takes_precise_path

Pair = tuple[str, Macros]


@dataclasses.dataclass(frozen=True)
class Result:
    """One kernel: ``status`` is "built", "cached" or "failed"; ``arch`` None means the GPU of this machine.

    ``registers`` and ``spill_bytes`` are known of kernels compiled for a named architecture, ``error`` of failed ones.
    """

    name: str
    macros: Macros
    arch: str | None
    status: str
    seconds: float
    registers: int | None = None
    spill_bytes: int | None = None
    error: str | None = None


# What converting norm weights to a 16-bit dtype can change of the product of two: bfloat16's rounding, 2^-8, twice.
ROUNDING = 2.0**-7 + 2.0**-16


def needed(
    config: AttentionConfig, norms: Iterable[tuple[int, np.ndarray, np.ndarray]], dtypes: Iterable[np.dtype[Any]]
) -> list[Pair]:
    """Return every kernel, once, that some layers of a checkpoint need.

    Parameters
    ----------
    config : AttentionConfig
        Of the checkpoint.
    norms : iterable of (layer, Q-norm, K-norm)
        As :func:`weights.read_norms` yields them: which layers, and what decides on their paths. A layer looks at its
        weights in its own dtype; where their rounding may decide, both paths are listed.
    dtypes : iterable of dtype
        Storage dtypes to run in.
    """
    kinds: dict[tuple[bool, bool], None] = {}
    for layer, q_norm, k_norm in norms:
        for edge in (1 - ROUNDING, 1 + ROUNDING):
            precise = takes_precise_path(config, q_norm, k_norm.astype(np.float64) * edge)
            kinds[precise, config.window(layer) is not None] = None
    return _unique(
        cuda.specialisations(config, dtype, precise=precise, windowed=windowed)
        for dtype in dtypes
        for precise, windowed in kinds
    )


def published(dtypes: Iterable[str] = tuple(STORAGE_DTYPES)) -> list[Pair]:
    """Return every kernel, once, that the published Qwen3 models need, on both paths."""
    return _unique(
        cuda.specialisations(model_config(model), STORAGE_DTYPES[dtype], precise=precise)
        for dtype in dtypes
        for model in MODELS
        for precise in (False, True)
    )


def _unique(lists: Iterable[Iterable[Pair]]) -> list[Pair]:
    return list(dict.fromkeys(pair for pairs in lists for pair in pairs))


def common() -> list[Pair]:
    """Return the kernels of the published models in 16-bit storage."""
    return published(("float16", "bfloat16"))


def build_at_import() -> None:
    """Build the common kernels if there is a GPU; silent, and never the reason that an import fails."""
    if cuda.problem() is None:
        kernels.build_common(common())


def build_here(name: str, macros: Macros) -> Result:
    """Build one kernel for the current GPU into CuPy's disk cache."""

    def build() -> dict[str, Any]:
        return {"status": "built" if kernels.fill_cache(name, macros) else "cached"}

    return _timed(name, macros, None, build)


def build_offline(arch: str, name: str, macros: Macros) -> Result:
    """Compile one kernel for an architecture, past every cache, and throw it away; needs no GPU."""

    def build() -> dict[str, Any]:
        done = kernels.compile_for(arch, name, macros)
        return {"status": "built", "registers": done.registers, "spill_bytes": done.spill_bytes}

    return _timed(name, macros, arch, build)


def known_to_nvrtc(arch: str) -> bool:
    """Return whether NVRTC compiles for an architecture; True where it cannot be asked, which a build will explain."""
    try:
        nvrtc = kernels.import_cupy().cuda.nvrtc
        program = nvrtc.createProgram("", "empty.cu", (), ())
    except (ImportError, OSError, RuntimeError):
        return True
    try:
        nvrtc.compileProgram(program, (f"-arch={arch}",))
    except nvrtc.NVRTCError:
        return False
    finally:
        nvrtc.destroyProgram(program)
    return True


def _timed(name: str, macros: Macros, arch: str | None, build: Callable[[], dict[str, Any]]) -> Result:
    start = time.perf_counter()
    try:
        outcome = build()
    except Exception as error:  # one kernel's failure is no reason to leave out the others
        outcome = {"status": "failed", "error": str(error) or type(error).__name__}
    return Result(name, macros, arch, seconds=time.perf_counter() - start, **outcome)


def build_all(
    builds: Sequence[Callable[[], Result]],
    done: Callable[[Result], None] = lambda result: None,
    *,
    limit_s: float = math.inf,
) -> list[Result]:
    """Run builds on every core and return their results in the order given.

    Threads do: CuPy releases the GIL around NVRTC; two of them built 26 kernels in 9.5 s where one took 15.5.

    Parameters
    ----------
    builds : sequence of callables
        :func:`build_here` or :func:`build_offline` with their arguments.
    done : callable
        Called with each result as it comes, by one thread at a time.
    limit_s : float
        Builds that have not begun after so many seconds are left out.
    """
    end = time.perf_counter() + limit_s
    results: dict[int, Result] = {}
    one_at_a_time = threading.Lock()

    def run(i: int) -> None:
        if time.perf_counter() < end:
            result = builds[i]()
            with one_at_a_time:
                results[i] = result
                done(result)

    run_parallel([functools.partial(run, i) for i in range(len(builds))], workers())
    return [results[i] for i in sorted(results)]


def on_this_gpu(build: Callable[[], Result]) -> Callable[[], Result]:
    """Return a build that any thread can run: CUDA's current device is each thread's own."""
    import cupy

    device = cupy.cuda.Device()

    def run() -> Result:
        with device:
            return build()

    return run
