"""Microseconds per layer of a stack of layers chained in one CUDA graph, beside the layer as separate operations.

A stack has layers enough, each with its own weights and cache, that they come from memory as in a model: 256 MiB, far
past L2. Ours and the baselines do the same work on the same numbers in one process and take turns; the figure is the
median over replays, by events, with the graph already queued behind a spinning kernel when the clock starts, so that
no launch by the host is in it. Random data. Outputs are NaN before, and must be finite and agree after. Ceilings are
measured in the same run. There are two baselines: "CuPy ops" (tools/cupy_ops.py, float16), the layer as a CuPy user
writes it, and "row kernels + cuBLAS" (tools/separate_ops.py), with one kernel written by hand for each phase.

    python tools/bench_stack.py --baseline [--decode] [--prefill] [--case MODEL:BATCH:TOKENS] [--json FILE]
    python tools/bench_stack.py --traffic [--json FILE]      bytes moved by a layer, from ncu
    python tools/bench_stack.py --profile MODEL:BATCH:TOKENS --decode --what ours    what ncu watches
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cupy
import cupy.cuda.profiler
import numpy as np
from cupy_ops import CupyLayer
from separate_ops import BAR, Cublas, SeparateLayer

import cupy_attn as ca
from cupy_attn.arrays import storage_dtype
from cupy_attn.bench import MODELS, model_config, random_layer

DECODE = ("0.6B:1:128", "0.6B:1:1024", "0.6B:1:4096", "0.6B:1:32768", "0.6B:8:4096", "8B:1:1024")
PREFILL = ("0.6B:1:512", "0.6B:1:2048", "0.6B:1:8192", "8B:1:2048")
TRAFFIC = {"prefill": ("0.6B:1:512", "0.6B:1:2048"), "decode": ("0.6B:1:1024",)}

WORKING_SET = 256 << 20
MIN_LAYERS, MAX_LAYERS = 2, 28
ROOM = 64  # cache rows past the tokens
WARM_UPS = 5
SPIN_NS = 1_000_000  # longer than the host takes to queue a graph of some hundred nodes
METRICS = {"dram__bytes.sum": "dram_bytes", "lts__t_bytes.sum": "l2_bytes"}
NCU_LIMIT_S = 300
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}

SOURCE = r"""
// Keep the stream busy for some nanoseconds. Grid (1), block (1).
extern "C" __global__ void spin(long long duration_ns) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < duration_ns);
}

// Read everything, 16 bytes a load, 8 loads a turn. Any grid, any block.
extern "C" __global__ void read_all(const uint4* data, long long vectors, unsigned* out) {
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    unsigned mixed = 0;
    for (; i + 7 * step < vectors; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = __ldg(data + i + j * step);
#pragma unroll
        for (int j = 0; j < 8; ++j) mixed += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < vectors; i += step) mixed += __ldg(data + i).x;
    if (mixed == 0x12345678) *out = mixed;  // so that the loads are not removed
}
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: ``tokens`` are in the cache after the call; decode adds the last of them, prefill all."""

    kind: str
    model: str
    batch: int
    tokens: int

    @classmethod
    def parse(cls, kind: str, text: str) -> Case:
        """Read MODEL:BATCH:TOKENS."""
        match = re.fullmatch(r"([^:]+):(\d+):(\d+)", text)
        if match is None or match[1] not in MODELS or not int(match[2]) or not int(match[3]):
            raise click.BadParameter(f"{text!r} is not MODEL:BATCH:TOKENS; models: {', '.join(MODELS)}.")
        return cls(kind, match[1], int(match[2]), int(match[3]))

    @property
    def text(self) -> str:
        """MODEL:BATCH:TOKENS."""
        return f"{self.model}:{self.batch}:{self.tokens}"

    @property
    def config(self) -> ca.AttentionConfig:
        """The model's."""
        return model_config(self.model)

    @property
    def seq(self) -> int:
        """New tokens of a sequence."""
        return 1 if self.kind == "decode" else self.tokens

    @property
    def cached(self) -> int:
        """Tokens in the cache before the call."""
        return self.tokens - self.seq

    @property
    def weight_bytes(self) -> int:
        """Both projections, 16-bit."""
        c = self.config
        return 2 * c.hidden_size * (2 * c.q_size + 2 * c.kv_size)

    @property
    def cache_bytes(self) -> int:
        """K and V of all tokens, the new ones included, 16-bit."""
        return 2 * 2 * self.batch * self.tokens * self.config.kv_size

    @property
    def bytes_moved(self) -> int:
        """Weights and cache: what a layer cannot do without."""
        return self.weight_bytes + self.cache_bytes

    @property
    def minimum_bytes(self) -> int:
        """And x and y, each once."""
        return self.bytes_moved + 2 * 2 * self.batch * self.seq * self.config.hidden_size

    @property
    def flop(self) -> int:
        """Multiplications and additions of the products; of the scores only what a query may see."""
        c = self.config
        projections = 2 * self.batch * self.seq * c.hidden_size * (2 * c.q_size + 2 * c.kv_size)
        pairs = self.seq * self.cached + self.seq * (self.seq + 1) // 2
        return projections + 4 * self.batch * c.q_size * pairs

    @property
    def layers(self) -> int:
        """Layers of the stack."""
        return min(MAX_LAYERS, max(MIN_LAYERS, -(-WORKING_SET // self.bytes_moved)))


@functools.lru_cache(maxsize=2)
def base_weights(model: str, dtype: str) -> ca.AttentionWeights:
    """Return one layer's weights, norms near one."""
    return random_layer(model_config(model)).astype(dtype)


def layer_weights(model: str, dtype: str, index: int) -> ca.AttentionWeights:
    """Return the weights of one layer of a stack: the base's with their rows moved on."""
    base = base_weights(model, dtype)
    return dataclasses.replace(
        base, qkv_proj=np.roll(base.qkv_proj, index, 0), o_proj=np.roll(base.o_proj, index, 0)
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def noise_bits(dtype: str) -> Any:
    """Return the bits of some random normals; their count is odd, so that rows do not repeat."""
    values = np.random.default_rng(0).standard_normal(4_000_037, np.float32).astype(storage_dtype(dtype))
    return cupy.asarray(values.view(np.uint16))


def noise(dtype: str, shape: tuple[int, ...], seed: int) -> Any:
    """Return random normals on the GPU."""
    return cupy.resize(noise_bits(dtype)[7919 * seed % 1_000_003 :], shape).view(storage_dtype(dtype))


class Stack:
    """Layers in a chain: ``hidden[i + 1] = layer i (hidden[i]) + hidden[i]``."""

    def __init__(self, case: Case, dtype: str, layers: int) -> None:
        self.case, self.dtype, self.layers = case, dtype, layers
        shape = (case.batch, case.seq, case.config.hidden_size)
        self.hidden = [noise(dtype, shape, 1), *(cupy.empty(shape, storage_dtype(dtype)) for _ in range(layers))]

    def earlier_tokens(self, index: int) -> tuple[Any, Any]:
        """Return what one layer's cache holds before the call: k before norm and RoPE, v, [B, T, Hkv, D]."""
        c = self.case.config
        shape = (self.case.batch, self.case.cached, c.num_key_value_heads, c.head_dim)
        return noise(self.dtype, shape, 2 * index + 2), noise(self.dtype, shape, 2 * index + 3)

    def rewind(self) -> None:
        """Put the caches back to where they were before a run."""

    def run(self) -> None:
        """Run every layer once."""
        raise NotImplementedError

    def poison(self) -> None:
        """Fill every output with NaN, of either dtype."""
        for y in self.hidden[1:]:
            y.view(cupy.uint16).fill(0x7FFF)

    def check(self) -> None:
        """Exit unless every output is finite."""
        exponent = np.uint16({"float16": 0x7C00, "bfloat16": 0x7F80}[self.dtype])
        for i, y in enumerate(self.hidden[1:]):
            bad = int((y.view(cupy.uint16) & exponent == exponent).sum())
            if bad:
                raise SystemExit(f"{type(self).__name__}, {self.case.kind} {self.case.text}: {bad} of {y.size} outputs "
                                 f"of layer {i} are NaN or Inf, or were not written.")  # fmt: skip


class Ours(Stack):
    """:class:`cupy_attn.Attention`."""

    def __init__(self, case: Case, dtype: str, layers: int) -> None:
        super().__init__(case, dtype, layers)
        self._layers = [
            ca.Attention(case.config, layer_weights(case.model, dtype, i), dtype, "cuda") for i in range(layers)
        ]
        self._caches = [layer.new_cache(case.batch, case.tokens + ROOM) for layer in self._layers]
        for i, cache in enumerate(self._caches if case.cached else ()):
            for target, tokens in zip((cache.k, cache.v), self.earlier_tokens(i), strict=True):
                target.view(cupy.uint16)[:, : case.cached] = tokens.view(cupy.uint16)

    def rewind(self) -> None:
        """Declare the caches to hold the earlier tokens."""
        for cache in self._caches:
            cache.assume(np.full(self.case.batch, self.case.cached))

    def run(self) -> None:
        """Run every layer once."""
        for layer, cache, x, y in zip(self._layers, self._caches, self.hidden, self.hidden[1:], strict=False):
            layer(x, cache, residual=x, out=y)


class Separate(Stack):
    """:class:`separate_ops.SeparateLayer`."""

    layer_type: type[SeparateLayer] = SeparateLayer

    def __init__(self, case: Case, dtype: str, layers: int) -> None:
        super().__init__(case, dtype, layers)
        size = {"batch": case.batch, "seq": case.seq, "capacity": case.tokens + ROOM}
        scratch = self.layer_type.scratch_type(case.config, dtype, **size)
        self._layers = [self.layer_type(layer_weights(case.model, dtype, i), scratch) for i in range(layers)]
        if case.cached:
            for i, layer in enumerate(self._layers):
                layer.fill(*self.earlier_tokens(i))

    def run(self) -> None:
        """Run every layer once."""
        for layer, x, y in zip(self._layers, self.hidden, self.hidden[1:], strict=False):
            layer(x, y, self.case.cached)


class CupyOps(Separate):
    """:class:`cupy_ops.CupyLayer`."""

    layer_type = CupyLayer


STACKS: dict[str, type[Stack]] = {"ours": Ours, "cupy": CupyOps, "separate": Separate}
BASELINES = {"cupy": "CuPy ops", "separate": "row kernels + cuBLAS"}


def stack_names(dtype: str) -> list[str]:
    """Return the stacks that run in a dtype."""
    return [name for name in STACKS if name != "cupy" or dtype == "float16"]


def capture(stack: Stack) -> Any:
    """Return the run as a CUDA graph; a run before it compiles kernels and sizes workspaces."""
    stream = cupy.cuda.get_current_stream()
    stack.rewind()
    stack.run()
    stack.rewind()
    stream.synchronize()
    stream.begin_capture()
    stack.run()
    graph = stream.end_capture()
    graph.upload()
    return graph


@functools.cache
def kernel(name: str) -> Any:
    """Return a kernel of SOURCE."""
    return cupy.RawModule(code=SOURCE, options=("-std=c++17",)).get_function(name)


def event_us(run: Callable[[], Any]) -> float:
    """Return the time on the GPU of what ``run`` queues, without the host's part in it."""
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    kernel("spin")((1,), (1,), (np.int64(SPIN_NS),))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e3


def median_us(run: Callable[[], Any], repeats: int = 15) -> float:
    """Return the median of some runs after a warm-up."""
    return float(np.median([event_us(run) for _ in range(WARM_UPS + repeats)][WARM_UPS:]))


def ceilings(dtype: str) -> dict[str, float]:
    """Measure what the GPU can do: reading and copying 2 GiB, an 8192^3 product, on random data."""
    data = noise(dtype, (1 << 30,), 0)
    out, copied = cupy.zeros(1, np.uint32), cupy.empty_like(data)
    processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    count = np.int64(data.nbytes // 16)

    def read(blocks: int, threads: int) -> None:
        kernel("read_all")((blocks * processors,), (threads,), (data, count, out))

    grids = itertools.product((2, 4, 8, 16, 32), (256, 512))
    read_us = min(median_us(functools.partial(read, *grid)) for grid in grids)
    copy_us = median_us(lambda: copied.data.copy_from_device_async(data.data, data.nbytes))
    x, w, y = (a[: 8192 * 8192].reshape(8192, 8192) for a in (data, data[1 << 27 :], copied))
    blas = Cublas(storage_dtype(dtype))
    matmul_us = median_us(lambda: blas.linear(x, w, y))
    return {"read_tb_s": data.nbytes / read_us / 1e6, "copy_tb_s": 2 * data.nbytes / copy_us / 1e6,
            "matmul_tflop_s": 2 * 8192**3 / matmul_us / 1e6, "cublas": blas.version}  # fmt: skip


def measure(case: Case, dtype: str, names: list[str], replays: int, limits: dict[str, float]) -> dict[str, Any]:
    """Time one case; return its row."""
    stacks = {name: STACKS[name](case, dtype, case.layers) for name in names}
    graphs = {name: capture(stack) for name, stack in stacks.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for stack in stacks.values():
        stack.poison()
    for _ in range(WARM_UPS + replays):
        for name, stack in stacks.items():
            stack.rewind()
            times[name].append(event_us(graphs[name].launch) / case.layers)
    for stack in stacks.values():
        stack.check()

    row: dict[str, Any] = {**dataclasses.asdict(case), "layers": case.layers, "mb": case.bytes_moved / 1e6}
    for name, collected in times.items():
        kept = collected[WARM_UPS:]
        row |= {f"{name}_us": float(np.median(kept)), f"{name}_min_us": min(kept)}
    us = row["ours_us"]
    row |= {"tb_s": case.bytes_moved / us / 1e6, "tflop_s": case.flop / us / 1e6}
    read_us, matmul_us = case.bytes_moved / limits["read_tb_s"] / 1e6, case.flop / limits["matmul_tflop_s"] / 1e6
    row["floor_us"] = read_us if case.kind == "decode" else max(read_us, matmul_us)
    ours = cupy.asnumpy(stacks["ours"].hidden[-1])
    for name in names[1:]:
        theirs = cupy.asnumpy(stacks[name].hidden[-1])
        row |= {f"{name}_ratio": row[f"{name}_us"] / us, f"{name}_relative_l2": ca.relative_l2(ours, theirs)}
    return row


def disagreements(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each baseline whose output is not ours."""
    errors = {BASELINES[name]: row.get(f"{name}_relative_l2", 0.0) for name in BASELINES}
    what = f"{row['kind']} {row['model']}:{row['batch']}:{row['tokens']}"
    return [f"{what}: relative L2 {error:.2g} between ours and {name}" for name, error in errors.items() if error > BAR]


def table(kind: str, rows: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """Return the rows of one kind as Markdown."""
    speed, name, ceiling = {
        "decode": ("tb_s", "TB/s", "read"),
        "prefill": ("tflop_s", "TFLOP/s", "matmul"),
    }[kind]
    timed = {name: label for name, label in BASELINES.items() if any(f"{name}_us" in r for r in rows)}
    others = [cell for label in timed.values() for cell in (f"{label} us", "/ ours")]
    head = (kind, "layers", "ours us (median, min)", *others, "MB", name, f"% of {ceiling} ceiling", "floor us")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        other = [cell for what in timed for cell in (f"{r[f'{what}_us']:.1f}", f"{r[f'{what}_ratio']:.2f}")]
        share = 100 * r[speed] / limits[f"{ceiling}_{speed}"]
        cells = (
            f"{r['model']}, {r['batch']}, {r['tokens']}", str(r["layers"]), f"{r['ours_us']:.1f}, "
            f"{r['ours_min_us']:.1f}", *other, f"{r['mb']:.0f}", f"{r[speed]:.3g}", f"{share:.0f}",
            f"{r['floor_us']:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def profile(case: Case, dtype: str, what: str, layers: int) -> None:
    """Run a stack once to warm up and once between cudaProfilerStart and cudaProfilerStop."""
    stack = STACKS[what](case, dtype, layers)
    for watched in (False, True):
        stack.rewind()
        cupy.cuda.get_current_stream().synchronize()
        if watched:
            cupy.cuda.profiler.start()
        stack.run()
        cupy.cuda.get_current_stream().synchronize()
    cupy.cuda.profiler.stop()
    stack.check()


def cuda_tool(name: str) -> str | None:
    """Return where a program of the CUDA toolkit is, or None."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def parse_ncu(text: str) -> dict[str, float]:
    """Sum ``ncu --csv`` over all kernels: ``dram_bytes``, ``l2_bytes``, ``kernels``.

    Raises
    ------
    ValueError
        There is no table, a metric is missing or has no number; the message ends with the output.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    sums, kernels = dict.fromkeys(METRICS.values(), 0.0), {name: set[str]() for name in METRICS}
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[first:] if line.startswith('"')))):
        metric = row["Metric Name"]
        if metric in METRICS:
            try:
                value = float(row["Metric Value"].replace(",", ""))
            except ValueError:
                value = math.nan
            if not math.isfinite(value) or row["Metric Unit"] not in UNITS:
                raise ValueError(f"{metric} of {row['Kernel Name']} is {row['Metric Value']} {row['Metric Unit']}.")
            sums[METRICS[metric]] += value * UNITS[row["Metric Unit"]]
            kernels[metric].add(row["ID"])
    counts = {len(ids) for ids in kernels.values()}
    if counts == {0} or len(counts) > 1:
        raise ValueError(f"ncu measured {', '.join(f'{m} of {len(k)}' for m, k in kernels.items())} kernels:\n{text}")
    return {**sums, "kernels": counts.pop()}


def traffic(case: Case, what: str, layers: int, dtype: str = "float16") -> dict[str, Any]:
    """Return what one layer of a stack moves: bytes to and from memory and through L2, kernels, and the minimum.

    Runs this file under ncu, whose counters many machines keep to root.
    """
    ncu = cuda_tool("ncu")
    if ncu is None:
        raise SystemExit("ncu is not installed; it comes with the CUDA toolkit.")
    command = [
        ncu, "--profile-from-start", "off", "--cache-control", "none", "--clock-control", "none", "--print-units",
        "base", "--metrics", ",".join(METRICS), "--csv", sys.executable, __file__, "--profile", case.text,
        f"--{case.kind}", "--what", what, "--layers", str(layers), "--dtype", dtype,
    ]  # fmt: skip
    done = subprocess.run(command, timeout=NCU_LIMIT_S, check=False, capture_output=True, text=True)
    try:
        if done.returncode:
            raise ValueError(f"exit status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        sums = parse_ncu(done.stdout)
    except ValueError as error:
        raise SystemExit(f"ncu, {what}, {case.kind} {case.text}: {error}") from None
    per_layer = {name: value / layers for name, value in sums.items()}
    return {**dataclasses.asdict(case), "what": what, "layers": layers, **per_layer,
            "minimum_bytes": case.minimum_bytes, "beyond_weights_and_cache": per_layer["dram_bytes"] - case.bytes_moved,
            }  # fmt: skip


def traffic_table(rows: list[dict[str, Any]]) -> str:
    """Return what layers move as Markdown, in MB."""
    head = ("case", "what", "kernels a layer", "memory MB", "less weights and cache", "L2 MB", "minimum MB")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        sizes = (r["dram_bytes"], r["beyond_weights_and_cache"], r["l2_bytes"], r["minimum_bytes"])
        cells = (f"{r['kind']} {r['model']}, {r['batch']}, {r['tokens']}", r["what"], f"{r['kernels']:.1f}",
                 *(f"{size / 1e6:.2f}" for size in sizes))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Return the GPU and the versions."""
    runtime = cupy.cuda.runtime
    fields = "driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        asked = subprocess.run(command, timeout=30, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        asked = f"unknown, CUDA {runtime.driverGetVersion()}"
    return {
        "gpu": runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "driver": asked,
        "cuda_runtime": str(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
        "python": platform.python_version(),
    }


@click.command()
@click.option("--decode", "kinds", flag_value="decode", help="Only decode cases.")
@click.option("--prefill", "kinds", flag_value="prefill", help="Only prefill cases.")
@click.option("--case", "cases", multiple=True, metavar="MODEL:BATCH:TOKENS", help="Instead of the default cases.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--baseline", is_flag=True, help="Time the layer as separate operations too, two ways.")
@click.option("--replays", type=click.IntRange(min=15), default=21, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here too.")
@click.option("--traffic", "show_traffic", is_flag=True, help="Print the bytes that layers move instead of times.")
@click.option("--profile", "profiled", metavar="MODEL:BATCH:TOKENS", help="Run one case for ncu; needs a kind.")
@click.option("--what", type=click.Choice(list(STACKS)), default="ours", show_default=True, help="With --profile.")
@click.option("--layers", type=click.IntRange(min=1), help="With --profile and --traffic; default: 256 MiB.")
def main(
    kinds: str | None, cases: tuple[str, ...], dtype: str, baseline: bool, replays: int, json_file: Path | None,
    show_traffic: bool, profiled: str | None, what: str, layers: int | None,
) -> None:  # fmt: skip
    """Time stacks of layers, or count what they move; exit status 1 if ours and a baseline disagree."""
    if profiled and not kinds:
        raise click.UsageError("--profile needs --decode or --prefill.")
    defaults: dict[str, tuple[str, ...]] = TRAFFIC if show_traffic else {"decode": DECODE, "prefill": PREFILL}
    wanted = [
        Case.parse(kind, text)
        for kind in ([kinds] if kinds else defaults)
        for text in ((profiled,) if profiled else cases or defaults[kind])
    ]
    if profiled:
        with cupy.cuda.Stream(non_blocking=True):
            profile(wanted[0], dtype, what, layers or wanted[0].layers)
        return
    report: dict[str, Any] = {"machine": machine(), "dtype": dtype}
    info = report["machine"]
    click.echo(f"{info['gpu']}, driver {info['driver']}, CUDA runtime {info['cuda_runtime']}, CuPy {info['cupy']}, "
               f"{dtype}.\n")  # fmt: skip
    if show_traffic:
        report["traffic"] = [
            traffic(case, name, layers or case.layers, dtype) for case in wanted for name in stack_names(dtype)
        ]
        click.echo(traffic_table(report["traffic"]))
    else:
        with cupy.cuda.Stream(non_blocking=True):
            run_cases(report, wanted, dtype, stack_names(dtype) if baseline else ["ours"], replays)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if any(disagreements(row) for row in report.get("rows", ())):
        raise SystemExit(1)


def run_cases(report: dict[str, Any], cases: list[Case], dtype: str, names: list[str], replays: int) -> None:
    """Measure ceilings and cases, print as it goes, put all of it into the report."""
    limits = report["ceilings"] = ceilings(dtype)
    cupy.get_default_memory_pool().free_all_blocks()
    click.echo(f"Ceilings: read {limits['read_tb_s']:.2f} TB/s, copy {limits['copy_tb_s']:.2f} TB/s, 8192^3 matmul "
               f"{limits['matmul_tflop_s']:.0f} TFLOP/s (cuBLAS {limits['cublas']}).")  # fmt: skip
    rows = report["rows"] = []
    for case in cases:
        rows.append(measure(case, dtype, names, replays, limits))
        cupy.get_default_memory_pool().free_all_blocks()
        click.echo(f"{case.kind} {case.text}: {rows[-1]['ours_us']:.1f} us", err=True)
        for sentence in disagreements(rows[-1]):
            click.echo(sentence, err=True)
    for kind in dict.fromkeys(case.kind for case in cases):
        click.echo(f"\n{table(kind, [row for row in rows if row['kind'] == kind], limits)}")


if __name__ == "__main__":
    main()
