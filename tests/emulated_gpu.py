"""A GPU that is this CPU: CUDA sources turned into C++ (emulator/cuda_emulator.h), and what stands for CuPy.

What it shows: wrong results, reads and writes outside shared memory, reads before a copy has landed, warps that rely on
each other without a barrier, lanes that part ways where they must not. What it does not: speed, memory accesses outside
of arrays, blocks that race, the hardware's rounding inside products.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cupy_attn import cuda, kernels, workspace
from cupy_attn.kernels import Macros
from cupy_attn.launch import Launch

HEADER = Path(__file__).resolve().parent / "emulator"
RESERVED = (
    1024  # bytes of shared memory ahead of a block's own; static arrays take one alignment of the dynamic part more
)

# Inline PTX: the beginning of the instruction, the function that stands for it, arguments of its own.
INSTRUCTIONS = (
    ("griddepcontrol.", "ptx_griddepcontrol", ""),
    ("prefetch.", "ptx_prefetch", ""),
    ("mad.hi.u32", "ptx_mad", ""),
    ("atom.add.", "ptx_atom", ""),
    ("cp.async.cg.", "ptx_cp_async", "16"),
    ("cp.async.ca.shared.global [%0], [%1], 4, %2;", "ptx_cp_async", "4"),
    ("cp.async.ca.shared.global [%0], [%1], 4;", "ptx_cp_async", "4, 4"),
    ("cp.async.commit_group", "ptx_cp_commit", ""),
    ("cp.async.wait_group", "ptx_cp_wait", ""),
    ("ldmatrix.sync.aligned.m8n8.x4.shared", "ptx_ldmatrix", ""),
    ("ldmatrix.sync.aligned.m8n8.x2.shared", "ptx_ldmatrix_two", ""),
    ("ldmatrix.sync.aligned.m8n8.x4.trans", "ptx_ldmatrix_trans", ""),
    ("movmatrix.", "ptx_movmatrix", ""),
    ("mma.sync.aligned.m16n8k16.row.col.f32.f16", "ptx_mma_k16_f16", ""),
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16", "ptx_mma_k16_bf16", ""),
    ("mma.sync.aligned.m16n8k8.row.col.f32.f16", "ptx_mma_k8_f16", ""),
    ("mma.sync.aligned.m16n8k8.row.col.f32.bf16", "ptx_mma_k8_bf16", ""),
)


def compiler() -> str | None:
    """Return the C++ compiler, or None."""
    return shutil.which("g++")


def _closing(text: str, start: int) -> int:
    """Return the place of the parenthesis that closes the one at ``start``; strings may hold any."""
    depth, i = 0, start
    while True:
        c = text[i]
        if c == '"':
            i = text.index('"', i + 1)
        elif c == "(":
            depth += 1
        elif c == ")":
            depth -= 1
            if not depth:
                return i
        i += 1


def _operands(text: str) -> list[str]:
    """Return the expressions of one list of operands."""
    found, i = [], 0
    while (match := re.compile(r'"[^"]*"\s*\(').search(text, i)) is not None:
        end = _closing(text, match.end() - 1)
        found.append(text[match.end() : end])
        i = end
    return found


def _call_of(body: str) -> str:
    """Return the call that stands for the inside of one asm statement."""
    parts, depth, last, in_string = [], 0, 0, False
    for i, c in enumerate(body):
        if c == '"':
            in_string = not in_string
        elif not in_string and c in "()":
            depth += 1 if c == "(" else -1
        elif not in_string and c == ":" and not depth:
            parts.append(body[last:i])
            last = i + 1
    parts.append(body[last:])
    template = "".join(re.findall(r'"([^"]*)"', parts[0]))
    operands = [operand for part in parts[1:3] for operand in _operands(part)]
    if not template:
        return f"ptx_nothing({', '.join(operands)})"
    for beginning, name, own in INSTRUCTIONS:
        if template.startswith(beginning):
            if own:
                operands.insert(2, own)
            return f"{name}({', '.join(operands)})"
    raise ValueError(f"the emulator does not know {template!r}")


def translate(text: str) -> str:
    """Return CUDA source as C++."""
    out, i = [], 0
    for match in re.finditer(r"\basm(?:\s+volatile)?\s*\(", text):
        end = _closing(text, match.end() - 1)
        out += [text[i : match.start()], _call_of(text[match.end() : end])]
        i = end + 1
    text = "".join([*out, text[i:]])
    return re.sub(r"extern __shared__ __align__\((\d+)\) (\w+) (\w+)\[\];",
                  r"\2* const \3 = reinterpret_cast<\2*>(emulator::shared_memory);", text)  # fmt: skip


@functools.cache
def kernel(name: str, macros: Macros):
    """Return a kernel as a function of (grid, threads, smem_bytes, seed, call)."""
    defines = "".join(f"#define {key} {value}\n" for key, value in macros)
    source = (kernels.SOURCES / f"{name}.cu").read_text()
    alignment = re.search(r"extern __shared__ __align__\((\d+)\)", source)
    start = RESERVED + (int(alignment[1]) if alignment else 0)
    with tempfile.TemporaryDirectory() as folder:
        for header in kernels.SOURCES.glob("*.cuh"):
            (Path(folder) / header.name).write_text(translate(header.read_text()))
        (Path(folder) / "kernel.cpp").write_text(
            f'#define __CUDA_ARCH__ 900\n#include "cuda_emulator.h"\n{defines}{translate(source)}\n'
            'extern "C" const char* run(unsigned grid, unsigned threads, int smem, unsigned seed, const Call* call) {\n'
            f"    emulator::shared_start = {start};\n"
            f"    return emulator::launch(grid, threads, smem, seed, [=] {{ {name}(*call); }});\n}}\n"
        )
        library = Path(folder) / "kernel.so"
        command = [
            str(compiler()), "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fwrapv", f"-I{folder}", f"-I{HEADER}",
            str(Path(folder) / "kernel.cpp"), "-o", str(library),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[:4000])
        run = ctypes.CDLL(str(library)).run
    run.argtypes = (ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    run.restype = ctypes.c_char_p

    def launch(grid: int, threads: int, smem_bytes: int, seed: int, call: np.ndarray) -> None:
        why = run(grid, threads, smem_bytes, seed, call.ctypes.data)
        if why:
            raise AssertionError(f"{name}: {why.decode()}")

    return launch


# What the package asks of CuPy, on NumPy.


class DeviceArray(np.ndarray):
    """An array that passes for one on the GPU."""

    @property
    def data(self) -> types.SimpleNamespace:  # type: ignore[override]
        """Where it is."""
        return types.SimpleNamespace(ptr=self.ctypes.data)


class _Stream:
    ptr = 0

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


class _Device:
    id = 0

    def synchronize(self) -> None:
        pass


def unwritten(shape: Any, dtype: Any) -> np.ndarray:
    """Return an array of 0xff bytes, which are NaN."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0xFF)
    return array


def fake_cupy() -> types.ModuleType:
    """Return a module with what the CUDA backend and caches use of CuPy."""
    cupy = types.ModuleType("cupy")

    def on_device(make: Callable[..., np.ndarray]) -> Callable[..., DeviceArray]:
        return lambda *args, **options: make(*args, **options).view(DeviceArray)

    cupy.ndarray = DeviceArray
    for name in ("zeros", "ascontiguousarray"):
        setattr(cupy, name, on_device(getattr(np, name)))
    cupy.empty = on_device(unwritten)
    cupy.asarray = on_device(np.array)
    cupy.asnumpy = lambda array: np.array(array).view(np.ndarray)
    cupy.cuda = types.SimpleNamespace(Device=_Device, get_current_stream=_Stream)
    return cupy


class EmulatedLauncher:
    """Stands for :class:`cupy_attn.launcher.Launcher`; ``seed`` decides which warp runs when."""

    seed = 0

    def __init__(self, launch: Launch) -> None:
        self._launch, self._kernel = launch, kernel(launch.name, launch.macros)

    def bind(self, call: np.ndarray, stream: Any) -> Callable[[], None]:
        one = self._launch

        def run() -> None:
            EmulatedLauncher.seed += 1
            self._kernel(one.grid, one.threads, one.smem_bytes, EmulatedLauncher.seed, call)

        return run


def pretend(monkeypatch: Any, num_sms: int) -> None:
    """Let the package find a GPU with so many multiprocessors, which is this CPU."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(cuda, "problem", lambda: None)
    monkeypatch.setattr(cuda, "limits", lambda device: dataclasses.replace(cuda.H200, num_sms=num_sms))
    monkeypatch.setattr(cuda, "Launcher", EmulatedLauncher)
    monkeypatch.setattr(workspace, "_workspaces", {})
