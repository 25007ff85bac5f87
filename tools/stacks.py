"""Stacks of layers to time: each with its own weights and caches, chained in one CUDA graph, beside measured ceilings.

A stack has layers enough that they come from memory as in a model: 256 MiB, far past L2. Stacks do the same work on the
same numbers in one process and take turns; events take the time, with the graph already queued behind a spinning kernel
when the clock starts, so that no launch by the host is in it. Random data. Outputs are NaN before, and must be finite
after. Shared by tools/bench_stack.py and tools/bench_peers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import cupy
import numpy as np
from cupy_ops import CupyLayer
from separate_ops import Cublas, SeparateLayer

import cupy_attn as ca
from cupy_attn import cuda
from cupy_attn.arrays import storage_dtype
from cupy_attn.bench import MODELS, model_config, random_layer
from cupy_attn.errors import FileError
from cupy_attn.plots import ROOFLINE, Curve, Panel, check_plot, speed_plot
from cupy_attn.weights import multiplies_rest

WORKING_SET = 256 << 20
MIN_LAYERS, MAX_LAYERS = 8, 28  # with fewer, the start of a graph is a good part of a layer's time
ROOM = 64  # cache rows past the tokens
WARM_UPS = 5
SLOW_REPLAYS = 3  # of a stack whose replays would take longer than they may
# With these for ``precise_threshold``, layers whose norm weights are near one do what larger weights need: 8-bit
# products of K's weights in prefill, the precise path.
THRESHOLDS = {"rest": 12.0, "precise": 0.1}
SPIN_NS = 3_000_000  # longer than the host takes to queue a graph of a thousand nodes

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
    """One measurement: ``tokens`` are in the cache after the call; decode adds the last ``new`` of them, prefill all.

    MODEL:BATCH:TOKENS says nothing of ``new``.
    """

    kind: str
    model: str
    batch: int
    tokens: int
    new: int = 1

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
        return self.new if self.kind == "decode" else self.tokens

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


def layer_on(
    path: str | None, config: ca.AttentionConfig, weights: ca.AttentionWeights, dtype: str, **options: Any
) -> ca.Attention:
    """Return a layer that does what norm weights near one ask for, or with a path what larger ones do: THRESHOLDS."""
    if path is not None:
        config = dataclasses.replace(config, precise_threshold=THRESHOLDS[path])
    layer = ca.Attention(config, weights, dtype, "cuda", **options)
    rest = multiplies_rest(config, layer.weights.q_norm, layer.weights.k_norm)
    assert (layer.precise, rest) == (path == "precise", path is not None)
    return layer


@functools.lru_cache(maxsize=2)
def noise_bits(dtype: str) -> Any:
    """Return the bits of some random normals; their count is odd, so that rows do not repeat."""
    values = np.random.default_rng(0).standard_normal(4_000_037, np.float32).astype(storage_dtype(dtype))
    return cupy.asarray(values.view(np.uint16))


def noise(dtype: str, shape: tuple[int, ...], seed: int) -> Any:
    """Return random normals on the GPU."""
    return cupy.resize(noise_bits(dtype)[7919 * seed % 1_000_003 :], shape).view(storage_dtype(dtype))


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """Return what queues ``run`` as a CUDA graph; what it needs must be compiled and allocated already."""
    stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    stream.begin_capture()
    run()
    graph = stream.end_capture()
    graph.upload()
    return graph.launch


class Stack:
    """Layers in a chain: ``hidden[i + 1] = layer i (hidden[i]) + hidden[i]``."""

    def __init__(self, case: Case, dtype: str, layers: int) -> None:
        self.case, self.dtype, self.layers = case, dtype, layers
        self.launch: Callable[[], None]
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

    def capture(self) -> None:
        """Let ``launch`` queue the run as a CUDA graph; a run before it compiles kernels and sizes workspaces."""
        self.rewind()
        self.run()
        self.rewind()
        self.launch = captured(self.run)

    def poison(self) -> None:
        """Fill every output with NaN, of either dtype."""
        for y in self.hidden[1:]:
            y.view(cupy.uint16).fill(0x7FFF)

    def fault(self) -> str | None:
        """Return what is wrong with the outputs: the first layer's that are not finite."""
        exponent = np.uint16({"float16": 0x7C00, "bfloat16": 0x7F80}[self.dtype])
        for i, y in enumerate(self.hidden[1:]):
            bad = int((y.view(cupy.uint16) & exponent == exponent).sum())
            if bad:
                return f"{bad} of {y.size} outputs of layer {i} are NaN or Inf, or were not written"
        return None

    def check(self) -> None:
        """Exit unless every output is finite."""
        fault = self.fault()
        if fault:
            raise SystemExit(f"{type(self).__name__}, {self.case.kind} {self.case.text}: {fault}.")


class Ours(Stack):
    """:class:`cupy_attn.Attention`."""

    batch_invariant = False
    path: str | None = None  # of THRESHOLDS

    def __init__(self, case: Case, dtype: str, layers: int) -> None:
        super().__init__(case, dtype, layers)
        self._layers = [
            layer_on(self.path, case.config, layer_weights(case.model, dtype, i), dtype,
                     batch_invariant=self.batch_invariant)
            for i in range(layers)
        ]  # fmt: skip
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


class InAnyBatch(Ours):
    """The same with the same bits in any batch."""

    batch_invariant = True


class WithRest(Ours):
    """The same with what prefill multiplies besides where norm weights are larger."""

    path = "rest"


class OnPrecisePath(Ours):
    """The same on the precise path, whatever the norm weights."""

    path = "precise"


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


def read_all(data: Any, out: Any, blocks: int = 8, threads: int = 512) -> None:
    """Read an array, with so many blocks a multiprocessor, and leave something of it in ``out`` [1], uint32."""
    processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    kernel("read_all")((blocks * processors,), (threads,), (data, np.int64(data.nbytes // 16), out))


class Reads:
    """As many arrays as a stack has layers, each as large as a layer's weights and cache, which are read and no more.

    What :func:`bench_stack.traffic_rows` compares stacks with.
    """

    def __init__(self, case: Case, dtype: str, layers: int) -> None:
        self._data = [noise(dtype, (case.bytes_moved // 16 * 8,), i) for i in range(layers)]
        self._out = cupy.zeros(1, np.uint32)

    def rewind(self) -> None:
        """Nothing has grown."""

    def run(self) -> None:
        """Read all of them."""
        for data in self._data:
            read_all(data, self._out)

    def check(self) -> None:
        """There is no result."""


# Labels of both axes of a plot, and what is drawn of a row and a time of it.
AXES: dict[str, tuple[str, str, Callable[[Mapping[str, Any], float], float]]] = {
    "decode": ("context (tokens)", "µs a layer", lambda row, us: us),
    "prefill": ("new tokens", "TFLOP/s", lambda row, us: row["tflop_s"] * row["ours_us"] / us),
}
BASELINES = {"cupy": "CuPy ops", "separate": "row kernels + cuBLAS"}


def check_drawing(path: Path) -> None:
    """End with a sentence, before anything is timed, if no picture can be drawn there."""
    try:
        check_plot(path)
    except FileError as error:
        raise click.ClickException(str(error)) from None


def draw_rows(report: Mapping[str, Any], labels: Mapping[str, str], path: Path) -> None:
    """Draw the rows of a report over their tokens: a panel for each kind, model and batch with several lengths.

    Decode as times, prefill as rates. Where no case has a second length, every case is drawn. Says which are not.
    """
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["kind"], row["model"], row["batch"]), []).append(row)
    several = {group: rows for group, rows in groups.items() if len({row["tokens"] for row in rows}) > 1}
    panels = []
    for (kind, model, batch), unsorted in (several or groups).items():
        rows = sorted(unsorted, key=lambda row: row["tokens"])
        label_x, label_y, value = AXES[kind]
        curves = [
            Curve(label, *zip(*points, strict=True))
            for name, label in {"ours": "cupy_attn", **labels, "floor": ROOFLINE}.items()
            if (points := [(row["tokens"], value(row, row[f"{name}_us"])) for row in rows if f"{name}_us" in row])
        ]
        panels.append(Panel(f"{kind.capitalize()}: {model}, batch {batch}", label_x, label_y, curves))
    info = report["machine"]
    caption = (f"One Qwen3 attention layer, {report['dtype']}, {info['gpu']}, driver {info['driver']}, CuPy "
               f"{info['cupy']}, cupy_attn {ca.__version__}\na layer of a stack in a CUDA graph, medians; roofline: "
               "weights and cache read, or products done, at the rates measured in the same run")  # fmt: skip
    speed_plot(panels, caption, path)
    click.echo(f"Wrote {path}.")
    left_out = [
        f"{kind} {model}:{batch}:{rows[0]['tokens']}"
        for (kind, model, batch), rows in groups.items()
        if several and (kind, model, batch) not in several
    ]
    if left_out:
        click.echo(f"Not drawn, having one length only: {', '.join(left_out)}.")


def stack_names(dtype: str) -> list[str]:
    """Return the stacks that run in a dtype."""
    return [name for name in STACKS if name != "cupy" or dtype == "float16"]


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
    grids = itertools.product((2, 4, 8, 16, 32), (256, 512))
    read_us = min(median_us(functools.partial(read_all, data, out, *grid)) for grid in grids)
    copy_us = median_us(lambda: copied.data.copy_from_device_async(data.data, data.nbytes))
    x, w, y = (a[: 8192 * 8192].reshape(8192, 8192) for a in (data, data[1 << 27 :], copied))
    blas = Cublas(storage_dtype(dtype))
    matmul_us = median_us(lambda: blas.linear(x, w, y))
    return {"read_tb_s": data.nbytes / read_us / 1e6, "copy_tb_s": 2 * data.nbytes / copy_us / 1e6,
            "matmul_tflop_s": 2 * 8192**3 / matmul_us / 1e6, "cublas": blas.version}  # fmt: skip


def take_turns(stacks: Mapping[str, Stack], replays: int, most_s: float = math.inf) -> dict[str, list[float]]:
    """Return the times of each captured stack in microseconds a layer, its warm-ups left out.

    A stack that has run for ``most_s`` seconds stops early, but not before ``SLOW_REPLAYS`` runs after as many
    warm-ups.
    """
    times: dict[str, list[float]] = {name: [] for name in stacks}
    for stack in stacks.values():
        stack.poison()
    for _ in range(WARM_UPS + replays):
        for name, stack in stacks.items():
            taken = times[name]
            if sum(taken) < most_s * 1e6 or len(taken) < 2 * SLOW_REPLAYS:
                stack.rewind()
                taken.append(event_us(stack.launch))
    return {
        name: [us / stacks[name].layers for us in taken[min(WARM_UPS, len(taken) // 2) :]]
        for name, taken in times.items()
    }


def timed_row(case: Case, times: Mapping[str, list[float]], limits: Mapping[str, float]) -> dict[str, Any]:
    """Return what was timed: every stack's median and fastest, the others' ratio to ours, our speed, the floor."""
    row: dict[str, Any] = {**dataclasses.asdict(case), "layers": case.layers, "mb": case.bytes_moved / 1e6}
    for name, taken in times.items():
        row |= {f"{name}_us": float(np.median(taken)), f"{name}_min_us": min(taken), f"{name}_replays": len(taken)}
    us = row["ours_us"]
    row |= {f"{name}_ratio": row[f"{name}_us"] / us for name in times if name != "ours"}
    row |= {"tb_s": case.bytes_moved / us / 1e6, "tflop_s": case.flop / us / 1e6}
    read_us, matmul_us = case.bytes_moved / limits["read_tb_s"] / 1e6, case.flop / limits["matmul_tflop_s"] / 1e6
    row["floor_us"] = read_us if case.kind == "decode" else max(read_us, matmul_us)
    return row


def check_gpu() -> None:
    """End with a sentence, before anything is done, if no GPU is usable."""
    problem = cuda.problem()
    if problem:
        cure = problem.replace("use device='cpu' or ", "").replace("use device='cpu'", "run this on a newer one")
        raise click.ClickException(cure)


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
