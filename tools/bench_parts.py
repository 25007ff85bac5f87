"""What prefill is made of, in one run on a GPU: its kernels beside cuBLAS and FlashAttention-3, its paths, its batches.

Five parts, a table each; one that cannot run says why in a sentence. Clock and random data are of tools/stacks.py.
Kernels and library calls are timed alone: some launches of the same one in a CUDA graph, over their number. They find
their operands in L2 if those fit, ours and the library's alike; ours are launched as in a call, where each may begin
before the one ahead has ended. Whole layers are timed as calls of Python's, queued
behind a kernel that spins for longer than they take the host. TFLOP/s are those of useful work: the plain products, and
of the scores what a query may see.

    python tools/bench_parts.py [--part NAME] [--json FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import cupy
import numpy as np
from bench_peers import reason, release
from separate_ops import Cublas
from stacks import (
    WARM_UPS,
    Case,
    captured,
    check_gpu,
    event_us,
    layer_on,
    layer_weights,
    machine,
    median_us,
    noise,
)

import cupy_attn as ca
from cupy_attn.arrays import storage_dtype
from cupy_attn.bench import model_config
from cupy_attn.io import write_whole

DTYPES = ("float16", "bfloat16")
REPEATS = 15
MOST_LAUNCHES = 20  # in a graph
GRAPH_US = 5000.0  # longer kernels are launched fewer times
KERNELS_OF_PREFILL, ATTENTION_KERNEL = (-3, -2, -1), -2  # counted from the last

# What is measured: sequences as MODEL:BATCH:TOKENS.
KERNELS = ("0.6B:1:2048", "0.6B:1:8192", "8B:1:2048", "8B:1:8192")
ATTENTION = ("0.6B:1:2048", "0.6B:1:8192", "0.6B:1:32768", "8B:1:2048", "8B:1:8192", "8B:1:32768")
PATHS = ("0.6B:1:2048", "0.6B:1:8192")
CHUNKED, CHUNKS = "0.6B:1:32768", 8
BATCH_MODEL = "0.6B"
LENGTHS = (256, 512, 1024, 1536, 2048, 2560, 3072, 5376)  # tokens of a batch of unequal prompts, 2,048 on average

Row = dict[str, Any]


# Work, in multiplications and additions.


def qkv_flop(case: Case) -> int:
    """Return that of the product of hidden states [M, H] and Wqkv [(Hq + 2 Hkv) D, H]."""
    return 2 * case.batch * case.seq * case.config.hidden_size * (case.config.q_size + 2 * case.config.kv_size)


def output_flop(case: Case) -> int:
    """Return that of the product of attention's output [M, Hq D] and Wo [H, Hq D]."""
    return 2 * case.batch * case.seq * case.config.hidden_size * case.config.q_size


def attention_flop(case: Case) -> int:
    """Return that of scores and their sums over v, of the keys that a query may see."""
    return case.flop - qkv_flop(case) - output_flop(case)


def batch_flop(model: str, lengths: Sequence[int]) -> int:
    """Return that of a whole layer on prompts of these lengths."""
    return sum(prompt(model, length).flop for length in lengths)


def prompt(model: str, tokens: int) -> Case:
    """Return one prompt."""
    return Case("prefill", model, 1, tokens)


def prompts(texts: Sequence[str]) -> list[Case]:
    """Return prompts by MODEL:BATCH:TOKENS."""
    return [Case.parse("prefill", text) for text in texts]


# Times.


@functools.lru_cache(maxsize=2)
def layer_of(model: str, dtype: str, path: str | None = None) -> ca.Attention:
    """Return the layer that is timed: see ``stacks.layer_on``."""
    return layer_on(path, model_config(model), layer_weights(model, dtype, 0), dtype)


def hidden_states(case: Case, dtype: str) -> Any:
    """Return random hidden states [B, S, H]."""
    return noise(dtype, (case.batch, case.seq, case.config.hidden_size), 1)


def alone_us(run: Callable[[], Any], capture: Callable[[Callable[[], Any]], Callable[[], Any]] = captured) -> float:
    """Return the time of one of several launches in a graph."""
    run()
    count = max(1, min(MOST_LAUNCHES, int(GRAPH_US / event_us(run))))

    def several() -> None:
        for _ in range(count):
            run()

    return median_us(capture(several), REPEATS) / count


def kernels_us(
    case: Case, dtype: str, *, path: str | None = None, which: Sequence[int] = KERNELS_OF_PREFILL
) -> list[Row]:
    """Time kernels of a prefill, counted from its last one on, each by itself; return their names and times.

    That which normalises rows ahead of Hopper's products is left out. The last one counts the new tokens. Launched
    again it finds no room for more of them, which costs it nothing.
    """
    layer, x = layer_of(case.model, dtype, path), hidden_states(case, dtype)
    cache, backend, stream = layer.new_cache(case.batch, case.tokens), layer._backend, cupy.cuda.get_current_stream()
    backend._launches.clear()
    y = layer(x, cache, residual=x)
    (launches,), call = backend._launches.values(), backend._call.copy()
    rows = []
    for i in which:
        cache.reset()
        run = backend._launcher(launches[i]).bind(call, stream, backend._maps(launches[i], call))
        rows.append({"kernel": launches[i].name, "us": alone_us(run)})
    del x, y  # not before: the kernels know their addresses only
    return rows


def layer_us(layer: ca.Attention, x: Any, *, lengths: Sequence[int] | None = None, chunks: int = 1) -> float:
    """Time a layer on prompts [B, S, H], of unequal lengths if those are given, in chunks over a growing cache."""
    cache, times = layer.new_cache(*x.shape[:2]), []
    parts = [cupy.ascontiguousarray(part) for part in cupy.split(x, chunks, axis=1)]

    def run() -> None:
        for part in parts:
            layer(part, cache, residual=part, num_tokens=lengths)

    for _ in range(WARM_UPS + REPEATS):
        cache.reset()
        times.append(event_us(run))
    return float(np.median(times[WARM_UPS:]))


@functools.cache
def product_us(rows: int, columns: int, inner: int, dtype: str) -> float:
    """Time x [M, K] W [N, K]^T alone: PyTorch's if it is there, which brings its own cuBLAS, or CuPy's cuBLAS."""
    x, w = noise(dtype, (rows, inner), 1), noise(dtype, (columns, inner), 2)
    y = cupy.empty((rows, columns), storage_dtype(dtype))
    torch_peers = torch_tools()
    if torch_peers is None:
        return alone_us(lambda: cublas(dtype).linear(x, w, y))
    a, b, c = map(torch_peers.as_tensor, (x, w, y))
    return alone_us(lambda: torch_peers.torch.mm(a, b.t(), out=c), torch_peers.captured)


def fa3_us(case: Case) -> float:
    """Time FlashAttention-3 on bfloat16 queries, keys and values of a prompt, causal."""
    fa3, torch_peers = importlib.import_module("fa3_fwd_interface"), importlib.import_module("torch_peers")
    config = case.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch_peers.as_tensor(noise("bfloat16", (case.batch, case.seq, n, config.head_dim), i))
               for i, n in enumerate(heads))  # fmt: skip
    return alone_us(lambda: fa3.flash_attn_func(q, k, v, causal=True), torch_peers.captured)


@functools.cache
def cublas(dtype: str) -> Cublas:
    """Return CuPy's cuBLAS."""
    return Cublas(storage_dtype(dtype))


@functools.cache
def torch_tools() -> Any:
    """Return tools/torch_peers.py, or None where PyTorch is not installed or sees no GPU."""
    try:
        torch_peers = importlib.import_module("torch_peers")
    except (ImportError, OSError):
        return None
    return torch_peers if torch_peers.torch.cuda.is_available() else None


# The parts.


def rate(flop: int, us: float) -> float:
    """Return TFLOP/s."""
    return flop / us / 1e6


def measure_kernels(cases: Sequence[Case]) -> list[Row]:
    """Time each kernel of a prefill, and the bare product of the same shape."""
    rows = []
    for case in cases:
        c, size = case.config, case.batch * case.seq
        qkv_shape = c.q_size + 2 * c.kv_size, c.hidden_size
        shapes = (qkv_shape, None, (c.hidden_size, c.q_size), qkv_shape)
        work = (qkv_flop(case), attention_flop(case), output_flop(case), qkv_flop(case))
        for dtype in DTYPES:
            timed = kernels_us(case, dtype) + kernels_us(case, dtype, path="rest", which=KERNELS_OF_PREFILL[:1])
            timed[-1]["kernel"] += ", larger norms"
            for row, shape, useful in zip(timed, shapes, work, strict=True):
                row |= {"case": case.text, "dtype": dtype, "tflop_s": rate(useful, row["us"])}
                if shape is not None:
                    row["peer_us"] = product_us(size, *shape, dtype)
                    row |= {"peer_tflop_s": rate(useful, row["peer_us"]), "ratio": row["peer_us"] / row["us"]}
                rows.append(row)
    return rows


def measure_attention(cases: Sequence[Case]) -> list[Row]:
    """Time the attention kernel beside FlashAttention-3, in bfloat16."""
    rows = []
    for case in cases:
        (row,) = kernels_us(case, "bfloat16", which=[ATTENTION_KERNEL])
        row |= {"case": case.text, "tflop_s": rate(attention_flop(case), row["us"])}
        try:
            row["peer_us"] = fa3_us(case)
        except Exception as error:  # not installed, or built for another PyTorch
            row["missing"] = f"FlashAttention-3: {reason(error)}"
        else:
            row |= {"peer_tflop_s": rate(attention_flop(case), row["peer_us"]), "ratio": row["peer_us"] / row["us"]}
        rows.append(row)
        release()
    return rows


def measure_paths(cases: Sequence[Case]) -> list[Row]:
    """Time the attention kernel and the whole layer on the precise path beside the normal one, in float16."""
    rows = []
    for case in cases:
        row: Row = {"case": case.text}
        for name, path in (("normal", None), ("rest", "rest"), ("precise", "precise")):
            if path != "rest":  # attention is the same
                (kernel,) = kernels_us(case, "float16", path=path, which=[ATTENTION_KERNEL])
                row[f"{name}_attention_us"] = kernel["us"]
            row[f"{name}_layer_us"] = layer_us(layer_of(case.model, "float16", path), hidden_states(case, "float16"))
        for what in ("attention", "layer"):
            row[f"{what}_ratio"] = row[f"precise_{what}_us"] / row[f"normal_{what}_us"]
        rows.append(row)
    return rows


def measure_chunks(case: Case, chunks: int) -> list[Row]:
    """Time a prompt that arrives in chunks over a growing cache, and the same at once, in float16."""
    layer, x = layer_of(case.model, "float16"), hidden_states(case, "float16")
    rows = []
    for count in (1, chunks):
        us = layer_us(layer, x, chunks=count)
        rows.append({"case": case.text, "chunks": count, "us": us, "tflop_s": rate(case.flop, us)})
        rows[-1]["ratio"] = us / rows[0]["us"]
    return rows


def measure_batches(model: str, lengths: Sequence[int]) -> list[Row]:
    """Time a batch of prompts of equal and of unequal lengths beside one prompt of their mean, in float16."""
    layer, mean = layer_of(model, "float16"), sum(lengths) // len(lengths)
    rows = []
    for what, tokens in (("one", [mean]), ("equal", [mean] * len(lengths)), ("unequal", list(lengths))):
        x = noise("float16", (len(tokens), max(tokens), layer.config.hidden_size), 1)
        us = layer_us(layer, x, lengths=tokens if what == "unequal" else None)
        rows.append({"batch": what, "lengths": tokens, "us": us, "tflop_s": rate(batch_flop(model, tokens), us)})
        rows[-1]["ratio"] = rows[-1]["tflop_s"] / rows[0]["tflop_s"]
        release()
    return rows


@dataclasses.dataclass(frozen=True)
class Part:
    """One table: its title, what measures its rows, the columns as heading, key of a row and format."""

    title: str
    measure: Callable[[], list[Row]]
    columns: tuple[tuple[str, str, str], ...]


OURS = (("us", "us", ".1f"), ("TFLOP/s", "tflop_s", ".0f"))
PARTS = {
    "kernels": Part(
        "Each kernel of a prefill alone, beside the bare product of its shape; where norm weights are larger, K's "
        "columns are multiplied a second time, in 8 bits",
        lambda: measure_kernels(prompts(KERNELS)),
        (("case", "case", ""), ("dtype", "dtype", ""), ("kernel", "kernel", ""), *OURS, ("cuBLAS us", "peer_us", ".1f"),
         ("cuBLAS TFLOP/s", "peer_tflop_s", ".0f"), ("rate / cuBLAS's", "ratio", ".2f")),
    ),
    "attention": Part(
        "The attention kernel alone, beside FlashAttention-3: causal, bfloat16, head_dim 128",
        lambda: measure_attention(prompts(ATTENTION)),
        (("case", "case", ""), ("kernel", "kernel", ""), *OURS, ("FlashAttention-3 us", "peer_us", ".1f"),
         ("FlashAttention-3 TFLOP/s", "peer_tflop_s", ".0f"), ("rate / FlashAttention-3's", "ratio", ".2f")),
    ),
    "paths": Part(
        "The precise path beside the normal one, float16",
        lambda: measure_paths(prompts(PATHS)),
        (("case", "case", ""), ("attention, normal us", "normal_attention_us", ".1f"),
         ("attention, precise us", "precise_attention_us", ".1f"), ("layer, normal us", "normal_layer_us", ".1f"),
         ("layer, larger norms us", "rest_layer_us", ".1f"), ("layer, precise us", "precise_layer_us", ".1f"),
         ("attention, precise / normal", "attention_ratio", ".2f"), ("layer, precise / normal", "layer_ratio", ".2f")),
    ),
    "chunks": Part(
        "A prompt at once and in chunks over a growing cache, whole layer, float16",
        lambda: measure_chunks(Case.parse("prefill", CHUNKED), CHUNKS),
        (("case", "case", ""), ("chunks", "chunks", "d"), *OURS, ("/ at once", "ratio", ".2f")),
    ),
    "batches": Part(
        f"Batches of {BATCH_MODEL}: unequal are {', '.join(map(str, LENGTHS))} tokens; whole layer, float16",
        lambda: measure_batches(BATCH_MODEL, LENGTHS),
        (("batch", "batch", ""), ("sequences", "lengths", "count"), *OURS, ("rate / one's", "ratio", ".2f")),
    ),
}  # fmt: skip


# The report.


def cell(row: Mapping[str, Any], key: str, form: str) -> str:
    """Return one value as text, "-" where a row has none."""
    if key not in row:
        return "-"
    return str(len(row[key])) if form == "count" else format(row[key], form)


def part_text(name: str, result: Mapping[str, Any]) -> str:
    """Return one part as Markdown: a title, a table and what is missing from it, or why there is none."""
    part = PARTS[name]
    if "missing" in result:
        return f"{part.title}: could not be measured ({result['missing']})."
    heads = [head for head, _, _ in part.columns]
    lines = [f"{part.title}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(cell(row, key, form) for _, key, form in part.columns)} |" for row in result["rows"]]
    notes = dict.fromkeys(row["missing"] for row in result["rows"] if "missing" in row)
    return "\n".join([*lines, *([""] if notes else []), *(f"- Missing: {note}" for note in notes)])


def markdown(report: Mapping[str, Any]) -> str:
    """Return a report as text, the machine first."""
    info = report["machine"]
    head = (f"{info['gpu']}, driver {info['driver']}, CuPy {info['cupy']}, cupy_attn {report['version']}; products: "
            f"{report['products']}; FlashAttention-3: {report['fa3']}. Medians of {REPEATS}; cases are "
            "model:batch:tokens.")  # fmt: skip
    return "\n\n".join([head, *(part_text(name, result) for name, result in report["parts"].items())])


def measured(name: str) -> Row:
    """Return the rows of a part, or why there are none, and the seconds it took."""
    start = time.monotonic()
    try:
        result: Row = {"rows": PARTS[name].measure()}
    except Exception as error:
        result = {"missing": reason(error)}
    release()
    return result | {"seconds": round(time.monotonic() - start, 1)}


def library_versions() -> dict[str, str]:
    """Return whose products are beside ours, and which FlashAttention-3."""
    torch_peers = torch_tools()
    if torch_peers is None:
        return {"products": f"cuBLAS {cublas('float16').version}", "fa3": "none (no PyTorch that sees a GPU)"}
    found, missing = torch_peers.versions()
    return {"products": found["torch_eager"], "fa3": found.get("fa3", f"none ({missing.get('fa3')})")}


@click.command()
@click.option("--part", "names", multiple=True, type=click.Choice(list(PARTS)), help="Only this; can be repeated.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here, after each part.")
def main(names: tuple[str, ...], json_file: Path | None) -> None:
    """Time what prefill is made of; exit status 1 if a part could not be measured."""
    check_gpu()
    report: Row = {"machine": machine(), "version": ca.__version__, **library_versions(), "parts": {}}
    with contextlib.ExitStack() as current:
        stream = current.enter_context(cupy.cuda.Stream(non_blocking=True))
        if torch_tools() is not None:
            current.enter_context(torch_tools().on_stream(stream.ptr))
        for name in names or PARTS:
            report["parts"][name] = measured(name)
            click.echo(f"{name}: {report['parts'][name]['seconds']:.0f} s", err=True)
            if json_file:
                write_whole(json_file, lambda file: file.write(f"{json.dumps(report, indent=1)}\n".encode()))
    click.echo(markdown(report))
    if any("missing" in result for result in report["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
