"""Microseconds per layer of a stack of layers chained in one CUDA graph, beside the layer as separate operations.

What a stack is and how it is timed: tools/stacks.py. Ours and the baselines must agree. There are two: "CuPy ops"
(tools/cupy_ops.py, float16), the layer as a CuPy user writes it, and "row kernels + cuBLAS" (tools/separate_ops.py),
with one kernel written by hand for each phase. tools/bench_peers.py has peers from other libraries.

    python tools/bench_stack.py --baseline [--decode] [--prefill] [--case MODEL:BATCH:TOKENS] [--json FILE] [--plot PNG]
    python tools/bench_stack.py --decode --case 0.6B:1:4100 --new 4     4 tokens after 4,096, as in speculative decoding
    python tools/bench_stack.py --decode --batch-invariant              what the same bits in any batch cost
    python tools/bench_stack.py --prefill --rest --precise              what larger norm weights cost
    python tools/bench_stack.py --traffic [--json FILE]      bytes moved by a layer, from ncu
    python tools/bench_stack.py --profile MODEL:BATCH:TOKENS --decode --what ours    what ncu watches
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import cupy
import cupy.cuda.profiler
from separate_ops import BAR
from stacks import (
    BASELINES,
    STACKS,
    Case,
    InAnyBatch,
    OnPrecisePath,
    Reads,
    WithRest,
    ceilings,
    check_drawing,
    check_gpu,
    draw_rows,
    machine,
    stack_names,
    take_turns,
    timed_row,
)  # fmt: skip

import cupy_attn as ca

DECODE = ("0.6B:1:128", "0.6B:1:1024", "0.6B:1:4096", "0.6B:1:32768", "0.6B:8:4096", "8B:1:1024")
PREFILL = ("0.6B:1:512", "0.6B:1:2048", "0.6B:1:8192", "8B:1:2048")
TRAFFIC = {"prefill": ("0.6B:1:512", "0.6B:1:2048"), "decode": ("0.6B:1:1024",)}

METRICS = {"dram__bytes.sum": "dram_bytes", "lts__t_bytes.sum": "l2_bytes"}
NCU_LIMIT_S = 300
TIMED = {**STACKS, "invariant": InAnyBatch, "rest": WithRest, "precise": OnPrecisePath}
# Of what is timed beside ours.
LABELS = {**BASELINES, "invariant": "batch-invariant", "rest": "larger norms", "precise": "precise path"}
PROFILED: dict[str, Any] = {**STACKS, "read": Reads}
PASSES = 3  # that ncu watches: what stays in L2 differs from one to the next
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}


def measure(case: Case, dtype: str, names: list[str], replays: int, limits: dict[str, float]) -> dict[str, Any]:
    """Time one case; return its row."""
    stacks = {name: TIMED[name](case, dtype, case.layers) for name in names}
    for stack in stacks.values():
        stack.capture()
    times = take_turns(stacks, replays)
    for stack in stacks.values():
        stack.check()
    row = timed_row(case, times, limits)
    ours = cupy.asnumpy(stacks["ours"].hidden[-1])
    for name in names[1:]:
        theirs = cupy.asnumpy(stacks[name].hidden[-1])
        row[f"{name}_relative_l2"] = ca.relative_l2(ours, theirs)
    return row


def disagreements(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each other stack whose output is not ours."""
    errors = {label: row.get(f"{name}_relative_l2", 0.0) for name, label in LABELS.items()}
    what = f"{row['kind']} {row['model']}:{row['batch']}:{row['tokens']}"
    return [f"{what}: relative L2 {error:.2g} between ours and {name}" for name, error in errors.items() if error > BAR]


def table(kind: str, rows: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """Return the rows of one kind as Markdown."""
    speed, name, ceiling = {
        "decode": ("tb_s", "TB/s", "read"),
        "prefill": ("tflop_s", "TFLOP/s", "matmul"),
    }[kind]
    timed = {name: label for name, label in LABELS.items() if any(f"{name}_us" in r for r in rows)}
    others = [cell for label in timed.values() for cell in (f"{label} us", "/ ours")]
    head = (kind, "layers", "ours us (median, min)", *others, "MB", name, f"% of {ceiling} ceiling", "floor us")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        other = [cell for what in timed for cell in (f"{r[f'{what}_us']:.1f}", f"{r[f'{what}_ratio']:.2f}")]
        share = 100 * r[speed] / limits[f"{ceiling}_{speed}"]
        cells = (
            f"{r['model']}, {r['batch']}, {r['tokens']}" + (f", {new} new" if (new := r.get("new", 1)) > 1 else ""),
            str(r["layers"]), f"{r['ours_us']:.1f}, "
            f"{r['ours_min_us']:.1f}", *other, f"{r['mb']:.0f}", f"{r[speed]:.3g}", f"{share:.0f}",
            f"{r['floor_us']:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def profile(case: Case, dtype: str, what: str, layers: int) -> None:
    """Run a stack once to warm up and ``PASSES`` times between cudaProfilerStart and cudaProfilerStop."""
    stack = PROFILED[what](case, dtype, layers)
    for watched in range(1 + PASSES):
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

    Runs this file under ncu, whose counters many machines keep to root. ``what``: one of ``PROFILED``.
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
    per_layer = {name: value / layers / PASSES for name, value in sums.items()}
    return {**dataclasses.asdict(case), "what": what, "layers": layers, **per_layer,
            "minimum_bytes": case.minimum_bytes, "beyond_weights_and_cache": per_layer["dram_bytes"] - case.bytes_moved,
            }  # fmt: skip


def traffic_rows(case: Case, layers: int, dtype: str = "float16") -> list[dict[str, Any]]:
    """Return :func:`traffic` of every stack, and what that is beyond a mere reading of weights and cache, measured.

    Counters tell of more than was asked for: L2 counts what comes from memory and what goes to a multiprocessor, some
    of it twice on its way between its halves, and a kernel's instructions come from memory too. So reading is measured.
    """
    read = traffic(case, "read", layers, dtype)
    rows = [traffic(case, name, layers, dtype) for name in stack_names(dtype)]
    for row in rows:
        row |= {f"{name}_beyond": row[name] - read[name] for name in METRICS.values()}
    return [read, *rows]


def traffic_table(rows: list[dict[str, Any]]) -> str:
    """Return what layers move as Markdown, in MB."""
    head = ("case", "what", "kernels a layer", "memory MB", "less weights and cache", "less their reading", "L2 MB",
            "L2, less their reading", "minimum MB")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        names = ("dram_bytes", "beyond_weights_and_cache", "dram_bytes_beyond", "l2_bytes", "l2_bytes_beyond",
                 "minimum_bytes")  # fmt: skip
        sizes = [r.get(name) for name in names]
        cells = (f"{r['kind']} {r['model']}, {r['batch']}, {r['tokens']}",
                 "reading weights and cache" if r["what"] == "read" else r["what"], f"{r['kernels']:.1f}",
                 *("" if size is None else f"{size / 1e6:.2f}" for size in sizes))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--decode", "kinds", flag_value="decode", help="Only decode cases.")
@click.option("--prefill", "kinds", flag_value="prefill", help="Only prefill cases.")
@click.option("--case", "cases", multiple=True, metavar="MODEL:BATCH:TOKENS", help="Instead of the default cases.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--baseline", is_flag=True, help="Time the layer as separate operations too, two ways.")
@click.option("--batch-invariant", is_flag=True, help="Time the layer with batch_invariant=True too.")
@click.option("--rest", is_flag=True, help="Time prefill with what larger norm weights need too.")
@click.option("--precise", is_flag=True, help="Time the layer on the precise path too.")
@click.option(
    "--new",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tokens that a decode call adds to each sequence, the last of TOKENS.",
)
@click.option("--replays", type=click.IntRange(min=15), default=21, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw decode's times and prefill's rates as a PNG.")
@click.option("--traffic", "show_traffic", is_flag=True, help="Print the bytes that layers move instead of times.")
@click.option("--profile", "profiled", metavar="MODEL:BATCH:TOKENS", help="Run one case for ncu; needs a kind.")
@click.option("--what", type=click.Choice(list(PROFILED)), default="ours", show_default=True, help="With --profile.")
@click.option("--layers", type=click.IntRange(min=1), help="With --profile and --traffic; default: 256 MiB.")
def main(
    kinds: str | None, cases: tuple[str, ...], dtype: str, baseline: bool, batch_invariant: bool, rest: bool,
    precise: bool, new: int, replays: int, json_file: Path | None, plot: Path | None, show_traffic: bool,
    profiled: str | None, what: str, layers: int | None,
) -> None:  # fmt: skip
    """Time stacks of layers, or count what they move; exit status 1 if ours and a baseline disagree."""
    if profiled and not kinds:
        raise click.UsageError("--profile needs --decode or --prefill.")
    if (new > 1 or batch_invariant) and (kinds != "decode" or profiled or show_traffic or plot):
        raise click.UsageError("--new and --batch-invariant are for times of --decode.")
    if (rest or precise) and (profiled or show_traffic or plot):
        raise click.UsageError("--rest and --precise are for times.")
    if rest and kinds != "prefill":
        raise click.UsageError("--rest needs --prefill: decode does the same either way.")
    if plot:
        check_drawing(plot)
    defaults: dict[str, tuple[str, ...]] = TRAFFIC if show_traffic else {"decode": DECODE, "prefill": PREFILL}
    wanted = [
        Case.parse(kind, text)
        for kind in ([kinds] if kinds else defaults)
        for text in ((profiled,) if profiled else cases or defaults[kind])
    ]
    if any(case.tokens < new for case in wanted):
        raise click.UsageError(f"a case has fewer than {new} tokens.")
    wanted = [dataclasses.replace(case, new=new) for case in wanted]
    check_gpu()
    if profiled:
        with cupy.cuda.Stream(non_blocking=True):
            profile(wanted[0], dtype, what, layers or wanted[0].layers)
        return
    report: dict[str, Any] = {"machine": machine(), "dtype": dtype}
    info = report["machine"]
    click.echo(f"{info['gpu']}, driver {info['driver']}, CUDA runtime {info['cuda_runtime']}, CuPy {info['cupy']}, "
               f"{dtype}.\n")  # fmt: skip
    if show_traffic:
        report["traffic"] = [row for case in wanted for row in traffic_rows(case, layers or case.layers, dtype)]
        click.echo(traffic_table(report["traffic"]))
    else:
        with cupy.cuda.Stream(non_blocking=True):
            names = stack_names(dtype) if baseline else ["ours"]
            asked = {"invariant": batch_invariant, "rest": rest, "precise": precise}
            run_cases(report, wanted, dtype, [*names, *(name for name, wish in asked.items() if wish)], replays)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot and "rows" in report:
        draw_rows(report, BASELINES, plot)
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
