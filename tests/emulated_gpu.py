"""A GPU that is this CPU: CUDA sources turned into C++ (emulator/cuda_emulator.h), and what stands for CuPy.

What it shows: wrong results, reads and writes outside shared memory, reads before a copy has landed, warps that rely on
each other without a barrier, blocks of a cluster that do, lanes that part ways where they must not. What it does not:
speed, memory accesses outside of arrays, races between clusters (they run one after the other), the hardware's rounding
inside products.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cupy_attn import cuda, kernels, steps, wgmma, workspace
from cupy_attn.kernels import Macros
from cupy_attn.launch import Launch

HEADER = Path(__file__).resolve().parent / "emulator"
RESERVED = (
    1024  # bytes of shared memory ahead of a block's own; static arrays take one alignment of the dynamic part more
)

# Inline PTX: the beginning of the instruction, the function that stands for it, arguments of its own. All of it where
# its operands are not in the order of their numbers.
INSTRUCTIONS = (
    ("griddepcontrol.", "ptx_griddepcontrol", ""),
    ("prefetch.", "ptx_prefetch", ""),
    ("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;", "ptx_to_e4m3", ""),
    ("ex2.approx.ftz.f32 %0, %1;", "ptx_power_of_two", ""),
    ("atom.add.", "ptx_atom", ""),
    ("cp.async.cg.", "ptx_cp_async", "16"),
    ("cp.async.bulk.prefetch.L2.global [%0], %1;", "ptx_prefetch", ""),
    ("createpolicy.", "ptx_policy", ""),
    ("setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }", "ptx_store_four", ""),
    (
        "{ .reg .b128 word; mov.b128 word, {%1, %2}; st.relaxed.gpu.global.b128 [%0], word; }",
        "ptx_store_128",
        "",
    ),
    (
        "{ .reg .b128 word; ld.relaxed.gpu.global.b128 word, [%2]; mov.b128 {%0, %1}, word; }",
        "ptx_load_128",
        "",
    ),
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
    ("mbarrier.init.shared::cta.b64 [%0], %1;", "ptx_barrier_init", ""),
    ("mbarrier.arrive.shared::cta.b64 _, [%0];", "ptx_barrier_arrive", ""),
    ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;", "ptx_barrier_expect", ""),
    (
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }",
        "ptx_barrier_try_wait",
        "",
    ),
    ("bar.sync %0, %1;", "ptx_bar_sync", ""),
    ("bar.arrive %0, %1;", "ptx_bar_arrive", ""),
    ("fence.mbarrier_init.", "ptx_fence", ""),
    ("fence.proxy.async", "ptx_fence", ""),
    (
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];",
        "ptx_tensor_copy",
        "",
    ),
    (
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %5, %5, %5, %4}], [%2];",
        "ptx_quads_copy",
        "",
    ),
    (
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %6, %6, %6, %4}], [%2], %5;",
        "ptx_quads_copy_to_blocks",
        "",
    ),
    (
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;",
        "ptx_tensor_copy_to_blocks",
        "",
    ),
    ("mov.u32 %0, %%cluster_ctarank;", "ptx_cluster_rank", ""),
    ("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", "ptx_cluster_sync", ""),
    ("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;", "ptx_cluster_sync", ""),
    ("mov.u32 %0, %%cluster_nctaid.x;", "ptx_cluster_size", ""),
    ("mov.u32 %0, %%dynamic_smem_size;", "ptx_dynamic_shared", ""),
    ("mapa.shared::cluster.u32 %0, %1, %2;", "ptx_address_in", ""),
    ("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];", "ptx_load_there", ""),
    ("ld.shared::cluster.f32 %0, [%1];", "ptx_load_float_there", ""),
    (
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];",
        "ptx_store_there",
        "",
    ),
    ("elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }", "ptx_elect", ""),
    ("mbarrier.arrive.shared::cluster.b64 _, [%0];", "ptx_barrier_arrive_at", ""),
    ("setmaxnreg.inc.", "ptx_setmaxnreg", ""),
    ("setmaxnreg.dec.", "ptx_setmaxnreg", ""),
    ("wgmma.fence.", "ptx_products_fence", ""),
    ("wgmma.commit_group.", "ptx_products_commit", ""),
    ("wgmma.wait_group.", "ptx_products_wait", ""),
)
# wgmma.mma_async: N, type, sums, A (a number or four in braces), B, whether it adds, which of A (in shared memory only)
# and B is transposed, which of 8 bits neither can be.
PRODUCT = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(?:16\.f32\.(?=b?f)|32\.f32\.(?=e))(f16|bf16|e4m3)\.\2 \{([^}]*)\}, "
    r"(%\d+|\{[^}]*\}), (%\d+), (\w+), 1, 1((?:, [01])*);"
)
PRODUCT_TYPES = {"f16": "__half", "bf16": "__nv_bfloat16", "e4m3": "emulator::E4m3"}


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
    while (match := re.compile(r'[\s,]*"[^"]*"\s*\(').match(text, i)) is not None:
        end = _closing(text, match.end() - 1)
        found.append(text[match.end() : end])
        i = end + 1
    if text[i:].strip():
        raise ValueError(f"the emulator cannot read {text[i:].strip()!r}")
    return found


def _arguments(text: str) -> list[str]:
    """Return what commas separate, outside of parentheses."""
    found, depth = [""], 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == "," and not depth:
            found.append("")
        else:
            found[-1] += c
    return [argument.strip() for argument in found]


Defines = dict[str, tuple[list[str] | None, str]]


def _defines(text: str) -> Defines:
    """Return the macros that a source defines: parameters, or None, and what they stand for."""
    found: Defines = {}
    for match in re.finditer(r"^#define (\w+)(\([\w, ]*\))?((?:.*\\\n)*.*)$", text, re.M):
        parameters = None if match[2] is None else _arguments(match[2][1:-1])
        if not re.search(rf"\b{match[1]}\b", match[3]):  # or it would be expanded without end
            found[match[1]] = parameters, match[3].replace("\\\n", " ").strip()
    return found


def _expand(text: str, defines: Defines) -> str:
    """Expand macros outside of strings, where an asm statement's operands would be hidden in them."""

    def in_code(change: Callable[[str], str], text: str) -> str:
        return "".join(piece if piece[:1] == '"' else change(piece) for piece in re.split(r'("[^"]*")', text))

    pattern = re.compile(r'"[^"]*"|\b(' + "|".join([*defines, "(?!)"]) + r")\b")
    start = 0
    while (match := pattern.search(text, start)) is not None:
        start = match.end()
        if match[1] is None:  # a string
            continue
        (parameters, body), end = defines[match[1]], match.end()
        if parameters is not None:
            if text[end : end + 1] != "(":
                continue
            close = _closing(text, end)
            values = dict(zip(parameters, _arguments(text[end + 1 : close]), strict=True))
            if values:
                names = re.compile(r"\b(" + "|".join(values) + r")\b")
                body = in_code(lambda code: names.sub(lambda name: values[name[0]], code), body)  # noqa: B023
            end = close + 1
        text, start = text[: match.start()] + body + text[end:], match.start()
    return text


def _product_of(template: str, operands: list[str]) -> str:
    """Return the call that stands for one product of a warpgroup, of known form."""
    match = PRODUCT.search(template)
    predicate = re.match(r"setp\.ne\.b32 p, (%\d+), 0; ", template)
    if match is None or template[predicate.end() if predicate else 0 :] not in (match[0], f"{match[0]} }}"):
        raise ValueError(f"the emulator does not know {template!r}")
    n, sums = int(match[1]), re.findall(r"%\d+", match[3])
    inputs = re.findall(r"%\d+", match[4]) + [match[5]] + ([predicate[1]] if predicate else [])
    transposed = re.findall(r"\d", match[7])
    adds = operands[-1] if predicate else match[6]
    in_registers = match[4][0] == "{"
    if (
        sums + inputs != [f"%{i}" for i in range(len(operands))]
        or len(sums) != n // 2
        or len(transposed) != (0 if match[2] == "e4m3" else 2 - in_registers)
        or match[6] not in (("p",) if predicate else ("0", "1"))
    ):
        raise ValueError(f"the emulator does not know {template!r} with {len(operands)} operands")
    what = f"wgmma of n{n}{' with A in registers' if in_registers else ''}"
    kind = [
        PRODUCT_TYPES[match[2]],
        str(n),
        *("false" if t == "0" else "true" for t in transposed or ["0", "0"]),
    ]
    places = ", ".join(f"&({sum_})" for sum_ in operands[: len(sums)])
    rest = operands[len(sums) : -1] if predicate else operands[len(sums) :]
    name = "ptx_product_of_registers" if in_registers else "ptx_product"
    arguments = [f'"{what}"', f"ProductOperands<{n}>{{{{{places}}}}}", adds, *rest]
    return f"{name}<{', '.join(kind)}>({', '.join(arguments)})"


def _call_of(body: str) -> str:
    """Return the call that stands for the inside of one asm statement, its macros expanded."""
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
    if re.sub(r'"[^"]*"', "", parts[0]).strip():
        raise ValueError(f"the emulator cannot read {parts[0].strip()!r}")
    template = re.sub(r"(\\[nt]|\s)+", " ", "".join(re.findall(r'"([^"]*)"', parts[0]))).strip()
    template = re.sub(r"^\{ \.reg \.pred p; ", "", template)
    operands = [operand for part in parts[1:3] for operand in _operands(part)]
    if not template:
        return f"ptx_nothing({', '.join(operands)})"
    if "wgmma.mma_async" in template:
        return _product_of(template, operands)
    for beginning, name, own in INSTRUCTIONS:
        if template.startswith(beginning):
            if own:
                operands.insert(2, own)
            return f"{name}({', '.join(operands)})"
    raise ValueError(f"the emulator does not know {template!r}")


def _variables(match: re.Match[str]) -> str:
    """Return what stands for one declaration of __shared__ variables: references to the block's own."""
    found = []
    for declared in _arguments(match[4]):
        variable = re.fullmatch(r"(\w+)((?:\[[^\]]*\])*)", declared)
        if variable is None:
            raise ValueError(f"the emulator cannot read {match[0].strip()!r}")
        name, type_ = variable[1], f"{variable[1]}_type"
        found.append(
            f"using {type_} = {match[3]}{variable[2]}; static char {name}_name; "
            f"{type_}& {name} = emulator::variable<{type_}>(&{name}_name, {match[2] or 1});"
        )
    return match[1] + " ".join(found)


def translate(text: str) -> str:
    """Return CUDA source as C++."""
    out, i, defines = [], 0, _defines(text)
    for match in re.finditer(r"\basm(?:\s+volatile)?\s*\(", text):
        end = _closing(text, match.end() - 1)
        out += [text[i : match.start()], _call_of(_expand(text[match.end() : end], defines))]
        i = end + 1
    text = "".join([*out, text[i:]])
    # One for all threads, where it is: of tensor maps, their addresses count.
    text = re.sub(r"const __grid_constant__ (\w+) (\w+)", r"const \1& \2", text)
    text = re.sub(r"extern __shared__ __align__\((\d+)\) (\w+) (\w+)\[\];",
                  r"\2* const \3 = reinterpret_cast<\2*>(emulator::block->memory);", text)  # fmt: skip
    return re.sub(r"(?<=\n)( *)__shared__ (?:__align__\((\d+)\) )?([\w:]+\**) ([^;]+);", _variables, text)


FLAGS = ("-std=c++17", "-O1", "-fPIC", "-w", "-fwrapv", "-U_FORTIFY_SOURCE", "-D__CUDA_ARCH__=900",
         "-D__CUDA_ARCH_FEAT_SM90_ALL")  # fmt: skip


@functools.cache
def compiled_headers() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with the emulator's headers, compiled once: parsing them would take half of a kernel's build."""
    folder = tempfile.TemporaryDirectory()
    for header in HEADER.glob("*.h"):
        shutil.copy(header, folder.name)
    whole = Path(folder.name) / "cuda_emulator.h"
    command = [str(compiler()), *FLAGS, f"-I{folder.name}", "-x", "c++-header", str(whole), "-o", f"{whole}.gch"]
    subprocess.run(command, check=True)
    return folder


@functools.cache
def kernel(name: str, macros: Macros, cluster: int = 1):
    """Return a kernel as a function of (grid, threads, smem_bytes, seed, call, maps=None).

    ``cluster``: blocks of a cluster, where the source does not say it.
    """
    defines = "".join(f"#define {key} {value}\n" for key, value in macros)
    source = (kernels.SOURCES / f"{name}.cu").read_text()
    alignment = re.search(r"extern __shared__ __align__\((\d+)\)", source)
    start = RESERVED + (int(alignment[1]) if alignment else 0)
    if "__cluster_dims__" in source:
        cluster = int(dict(macros)["CLUSTER"]) * int(dict(macros).get("SPLITS", 1))
    has_maps = re.search(r"const __grid_constant__ Maps\b", source) is not None
    arguments = "*call, own" if has_maps else "*call"
    copy_maps = (
        '    if (bytes != sizeof(Maps)) return "tensor maps of another size";\n'
        "    static Maps own;\n"  # aligned as they must be
        "    std::memcpy(&own, maps, bytes);\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        for header in kernels.SOURCES.glob("*.cuh"):
            (Path(folder) / header.name).write_text(translate(header.read_text()))
        (Path(folder) / "kernel.cpp").write_text(
            f'#include "cuda_emulator.h"\n{defines}{translate(source)}\n'
            'extern "C" const char* run(unsigned grid, unsigned threads, int smem, unsigned seed, const Call* call,\n'
            "                           const void* maps, size_t bytes) {\n"
            f"{copy_maps if has_maps else ''}"
            f"    emulator::shared_start = {start};\n"
            f"    return emulator::launch(grid, threads, {cluster}, smem, seed,\n"
            f"                            [=] {{ {name}({arguments}); }});\n}}\n"
        )
        library = Path(folder) / "kernel.so"
        command = [
            str(compiler()), *FLAGS, "-shared", f"-I{folder}", f"-I{compiled_headers().name}",
            str(Path(folder) / "kernel.cpp"), "-o", str(library),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[:4000])
        run = ctypes.CDLL(str(library)).run
    run.argtypes = (
        ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t,
    )  # fmt: skip
    run.restype = ctypes.c_char_p

    def launch(
        grid: int, threads: int, smem_bytes: int, seed: int, call: np.ndarray, maps: bytes | np.ndarray | None = None
    ) -> None:
        held = np.frombuffer(b"" if maps is None else maps, np.uint8)
        assert bool(held.size) == has_maps, f"{name}: tensor maps {'are missing' if has_maps else 'for none'}"
        why = run(grid, threads, smem_bytes, seed, call.ctypes.data, held.ctypes.data, held.nbytes)
        if why:
            raise AssertionError(f"{name}: {why.decode()}")

    return launch


def encode_tensor_map(
    address: int, columns: int, rows: int, pitch_bytes: int, box_columns: int, box_rows: int, by_quads: bool = False
) -> np.ndarray:
    """Return what stands for a CUtensorMap of 2-byte elements, 128-byte swizzle: 128 bytes, at a multiple of 64.

    ``by_quads``: five dimensions, as :func:`cupy_attn.tensor_maps.tensor_map` has them. Refuses what
    ``cuTensorMapEncodeTiled`` is known to (CUDA driver API), and boxes other than of 64 columns.
    """
    if address % 16 or pitch_bytes % 16 or not 0 < pitch_bytes < 1 << 40:
        raise ValueError(f"a tensor at {address:#x} with rows {pitch_bytes} bytes apart is not aligned to 16 bytes")
    if not (0 < columns <= 1 << 32 and 0 < rows <= 1 << 32):
        raise ValueError(f"a tensor of {rows} x {columns} elements")
    if box_columns != 64 or not 0 < box_rows <= 256:
        raise ValueError(f"a box of {box_rows} x {box_columns} elements is not 1 to 256 rows of 64")
    if by_quads and (rows % 32 or box_rows % 32):
        raise ValueError(f"a box of {box_rows} of {rows} rows is not of whole 32")
    room = np.zeros(128 + 64, np.uint8)
    encoded = room[-room.ctypes.data % 64 :][:128]
    encoded[:56].view(np.int64)[:] = address, columns, rows, pitch_bytes, box_columns, box_rows, by_quads
    return encoded


# What the package asks of CuPy, on NumPy.


class DeviceArray(np.ndarray):
    """An array that passes for one on the GPU."""

    @property
    def data(self) -> types.SimpleNamespace:  # type: ignore[override]
        """Where it is."""
        return types.SimpleNamespace(ptr=self.ctypes.data)


def fake_tensor_map(
    address: int, columns: int, rows: int, box_rows: int, *, by_quads: bool = False, once: bool = False
) -> bytes:
    """Stand for :func:`cupy_attn.tensor_maps.tensor_map`."""
    return encode_tensor_map(address, columns, rows, 2 * columns, 64, box_rows, by_quads).tobytes()


class _Stream:
    ptr = 0

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
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
    cupy.cuda = types.SimpleNamespace(
        Device=_Device,
        runtime=types.SimpleNamespace(getDevice=lambda: 0),
        Stream=lambda non_blocking: _Stream(),
        get_current_stream=_Stream,
        Memory=lambda nbytes: bytearray(b"\xff" * nbytes),
        MemoryPointer=lambda memory, offset: memory,
    )
    return cupy


class EmulatedLauncher:
    """Stands for :class:`cupy_attn.launcher.Launcher`; ``seed`` decides which warp runs when.

    ``copies``: launches are of what a call holds when they are bound.
    """

    seed, copies = 0, False

    def __init__(self, launch: Launch) -> None:
        self._launch, self._kernel = launch, kernel(launch.name, launch.macros, launch.splits)

    def bind(self, call: np.ndarray, stream: Any, maps: bytes | np.ndarray | None = None) -> Callable[[], None]:
        one, call = self._launch, call.copy() if self.copies else call

        def run() -> None:
            EmulatedLauncher.seed += 1
            self._kernel(one.grid, one.threads, one.smem_bytes, EmulatedLauncher.seed, call, maps)

        return run


def in_graph(bind: Callable[[Any], list[Callable[[], None]]]) -> Callable[[Any], None]:
    """Stand for :func:`cupy_attn.launcher.in_graph`."""
    EmulatedLauncher.copies = True
    try:
        launches = bind(None)
    finally:
        EmulatedLauncher.copies = False

    def start(stream: Any) -> None:
        for launch in launches:
            launch()

    return start


def capture(monkeypatch: Any, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Return what a call gives while its stream is captured, when nothing runs, and what replays its launches."""
    bind, graph = EmulatedLauncher.bind, []
    with monkeypatch.context() as patch:
        patch.setattr(_Stream, "is_capturing", lambda stream: True)
        patch.setattr(EmulatedLauncher, "bind", lambda *args: graph.append(bind(*args)) or (lambda: None))
        result = call()

    def replay() -> None:
        for run in graph:
            run()

    return result, replay


def pretend(monkeypatch: Any, num_sms: int, cluster: int = 1, *, hopper: bool = True) -> None:
    """Let the package find a GPU with so many multiprocessors, which is this CPU.

    ``cluster``: blocks of a cluster of Hopper's own prefill kernels, which there are if ``hopper``.
    """
    plan = cuda.CudaBackend._plan_launches

    def planned(self: Any, *args: Any, **options: Any) -> list[Launch]:
        launches = plan(self, *args, **options)
        compiled_headers()
        with ThreadPoolExecutor() as pool:  # a call's kernels are built at once
            list(pool.map(EmulatedLauncher, launches))
        return launches

    monkeypatch.setattr(cuda.CudaBackend, "_plan_launches", planned)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(cuda, "problem", lambda: None)
    monkeypatch.setattr(cuda, "limits", lambda device: dataclasses.replace(cuda.H200, num_sms=num_sms, wgmma=hopper))
    monkeypatch.setattr(wgmma, "CLUSTER", cluster)
    monkeypatch.setattr(cuda, "Launcher", EmulatedLauncher)
    monkeypatch.setattr(steps, "in_graph", in_graph)
    monkeypatch.setattr(cuda, "tensor_map", fake_tensor_map)
    monkeypatch.setattr(workspace, "_workspaces", {})
