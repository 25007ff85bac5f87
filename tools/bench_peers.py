"""Our layer beside others', microseconds a layer of a stack, in one run: CuPy, PyTorch, FlashAttention-3, FlashInfer.

Stacks, clock and ceilings are those of tools/stacks.py. Whatever is installed takes part: the layer as separate CuPy
operations always (in bfloat16 with hand-written kernels between the products, in float16 with CuPy's own too), the
peers of tools/torch_peers.py where PyTorch and their packages are. A peer that fails on a case is left out of that
case, and the report says why. Every peer starts from the same numbers, and what its stack adds to the hidden states
must be what ours adds, up to rounding.

    python tools/bench_peers.py [--decode] [--prefill] [--case MODEL:BATCH:TOKENS] [--budget SECONDS] [--json FILE]
    python tools/bench_peers.py --from FILE.json --plot FILE.png        print and draw an earlier run
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import cupy
import numpy as np
from stacks import (
    BASELINES,
    STACKS,
    Case,
    Stack,
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
from cupy_attn.arrays import storage_dtype
from cupy_attn.bench import MODELS
from cupy_attn.io import write_whole

CASES = {
    "decode": ("0.6B:1:128", "0.6B:1:1024", "0.6B:1:4096", "0.6B:1:32768", "0.6B:8:4096", "0.6B:64:4096", "8B:1:1024",
               "8B:1:32768", "8B:16:8192", "8B:64:4096", "235B-A22B:8:8192"),
    "prefill": ("0.6B:1:512", "0.6B:1:2048", "0.6B:1:8192", "0.6B:1:32768", "8B:1:2048", "8B:1:8192", "8B:1:32768",
                "32B:1:8192"),
}  # fmt: skip
LABELS = {
    "torch_eager": "PyTorch eager", "torch_compile": "torch.compile", "fa3": "cuBLAS + FlashAttention-3",
    "flashinfer": "cuBLAS + FlashInfer", **BASELINES,
}  # fmt: skip
REPLAYS = 21
MOST_S = 3.0  # of GPU time for a stack of one case; a slower one is replayed less often
COMPARED_TOKENS = 1024  # of each sequence, at most
# Relative L2 between what two stacks add to the hidden states. At 32,768 tokens they add a hundredth of them, and each
# layer rounds the sum: PyTorch's layer on the CPU is off by 0.006 and 0.06 then. Another attention would be by 1.
SAME_WORK = {"bfloat16": 0.2, "float16": 0.05}

REPORT_KEYS = ("machine", "version", "dtype", "versions", "missing", "ceilings", "rows", "left_out")

Builder = Callable[[Case, str, int], Stack]


def found_peers(dtype: str) -> tuple[dict[str, Builder], dict[str, str], dict[str, str]]:
    """Return what builds each stack, the versions of what is installed, and why the other peers are missing."""
    builders: dict[str, Builder] = {"ours": STACKS["ours"]}
    try:
        torch_peers = importlib.import_module("torch_peers")
    except (ImportError, OSError) as error:  # the latter from a library that PyTorch does not find
        versions, missing = {}, dict.fromkeys(LABELS.keys() - BASELINES.keys(), str(error))
    else:
        versions, missing = torch_peers.versions()
        builders |= torch_peers.stack_builders(list(versions))
    # Last, for they need the most memory.
    builders |= {name: STACKS[name] for name in stack_names(dtype) if name in BASELINES}
    missing |= {name: f"it does not run in {dtype}" for name in BASELINES if name not in builders}
    return builders, versions, {name: missing[name] for name in LABELS if name in missing}


def release() -> None:
    """Give back the memory of a case, CuPy's and PyTorch's."""
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if sys.modules.get("torch_peers"):
        sys.modules["torch_peers"].release()


def reason(error: BaseException) -> str:
    """Return an exception in one line."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


def added(stack: Stack) -> np.ndarray:
    """Return what a stack's layers added to their input, of some tokens of each sequence, float32."""
    step = -(-stack.case.seq // COMPARED_TOKENS)
    first, last = (
        cupy.asnumpy(y.view(cupy.uint16)[:, ::step]).view(storage_dtype(stack.dtype)).astype(np.float32)
        for y in (stack.hidden[0], stack.hidden[-1])
    )
    return last - first


def captured(build: Builder, case: Case, dtype: str) -> Stack:
    """Return a stack that is ready to launch."""
    stack = build(case, dtype, case.layers)
    stack.capture()
    return stack


def measure(case: Case, dtype: str, builders: Mapping[str, Builder], limits: Mapping[str, float]) -> dict[str, Any]:
    """Time one case; return its row. What fails, or does other work than ours, is in ``missing`` with the reason."""
    stacks: dict[str, Stack] = {}
    missing: dict[str, str] = {}
    for name, build in builders.items():
        try:
            stacks[name] = captured(build, case, dtype)
        except Exception as error:
            if name == "ours":
                raise
            missing[name] = reason(error)
        if name in missing:  # past the handler: until then the exception holds on to the stack's memory
            release()
    times = take_turns(stacks, REPLAYS, MOST_S)
    stacks["ours"].check()
    ours, errors = added(stacks["ours"]), {}
    for name in list(stacks)[1:]:
        fault = stacks[name].fault()
        if fault is None:
            errors[name] = ca.relative_l2(added(stacks[name]), ours)
            if not errors[name] <= SAME_WORK[dtype]:
                fault = f"not our work: what it adds is off by {errors[name]:.2g} (relative L2)"
        if fault:
            missing[name] = fault
            del times[name]
    row = timed_row(case, times, limits) | {f"{name}_added_l2": error for name, error in errors.items()}
    peers = [name for name in times if name != "ours"]
    if peers:
        best = min(peers, key=lambda name: row[f"{name}_us"])
        row |= {"best_peer": best, "best_ratio": row[f"{best}_ratio"]}
    return row | {"missing": missing}


def run_cases(
    report: dict[str, Any], cases: Sequence[Case], budget_s: float, measure_case: Callable[[Case], dict[str, Any]],
    keep: Callable[[], None], clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Put a row for each case into the report and keep it at once; start no case after ``budget_s`` seconds."""
    start = clock()
    report |= {"rows": [], "left_out": []}
    for case in cases:
        if clock() - start >= budget_s:
            report["left_out"].append(f"{case.kind} {case.text}")
            continue
        report["rows"].append(measure_case(case))
        report["seconds"] = round(clock() - start, 1)
        keep()
        click.echo(f"{case.kind} {case.text}: {report['seconds']:.0f} s", err=True)
    keep()


def row_order(row: Mapping[str, Any]) -> tuple[str, int, int, int]:
    """Return what sorts rows by kind, model as published, batch and tokens."""
    return row["kind"], list(MODELS).index(row["model"]), row["batch"], row["tokens"]


def markdown(report: Mapping[str, Any]) -> str:
    """Return a report as one table, with versions above it and what is missing below."""
    info, limits, rows = report["machine"], report["ceilings"], sorted(report["rows"], key=row_order)
    shown = {name: label for name, label in LABELS.items() if any(f"{name}_us" in row for row in rows)}
    head = ("kind: model, batch, tokens", "ours us", *(f"{label} us" for label in shown.values()), "best peer / ours",
            "floor us")  # fmt: skip
    lines = [
        f"{info['gpu']}, driver {info['driver']}, CuPy {info['cupy']}, cuBLAS {limits['cublas']}; {report['dtype']}, "
        f"us a layer, medians of {REPLAYS} (slow stacks: fewer). Read {limits['read_tb_s']:.2f} TB/s, 8192^3 matmul "
        f"{limits['matmul_tflop_s']:.0f} TFLOP/s. cupy_attn {report['version']}"
        + "".join(f"; {LABELS[name]}: {version}" for name, version in report["versions"].items()) + ".",
        "", f"| {' | '.join(head)} |", "|---" * len(head) + "|",
    ]  # fmt: skip
    for row in rows:
        cells = [f"{row['kind']}: {row['model']}, {row['batch']}, {row['tokens']}", f"{row['ours_us']:.1f}"]
        cells += [f"{row[f'{name}_us']:.1f}" if f"{name}_us" in row else "-" for name in shown]
        cells += [f"{row['best_ratio']:.2f}" if "best_ratio" in row else "-", f"{row['floor_us']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {LABELS[name]} is missing: {why}" for name, why in report["missing"].items()]
    notes += [
        f"- {LABELS[name]} is missing at {row['kind']} {row['model']}, {row['batch']}, {row['tokens']}: {why}"
        for row in rows
        for name, why in row["missing"].items()
    ]
    if report["left_out"]:
        notes.append(f"- Left out, the budget was spent: {', '.join(report['left_out'])}")
    return "\n".join([*lines, "", *notes] if notes else lines)


def chosen_cases(kind: str | None, texts: Sequence[str]) -> list[Case]:
    """Return the cases of one kind or of both: those given, or the usual ones."""
    return [Case.parse(one, text) for one in ([kind] if kind else CASES) for text in texts or CASES[one]]


@click.command()
@click.option("--decode", "kind", flag_value="decode", help="Only decode cases.")
@click.option("--prefill", "kind", flag_value="prefill", help="Only prefill cases.")
@click.option("--case", "texts", multiple=True, metavar="MODEL:BATCH:TOKENS", help="Instead of the usual cases.")
@click.option("--dtype", type=click.Choice(list(SAME_WORK)), default="bfloat16", show_default=True,
              help="FlashAttention-3's package takes bfloat16 only, CuPy's operations float16 only.")  # fmt: skip
@click.option("--budget", type=click.FloatRange(min=0), default=480.0, show_default=True, metavar="SECONDS",
              help="Start no case after that.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything here, after each case.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw decode's times and prefill's rates as a PNG.")
@click.option(
    "--from", "earlier", type=click.Path(path_type=Path, exists=True), help="Print a run's JSON; time nothing."
)
def main(
    kind: str | None, texts: tuple[str, ...], dtype: str, budget: float, json_file: Path | None, plot: Path | None,
    earlier: Path | None,
) -> None:  # fmt: skip
    """Time peers beside our layer; exit status 1 if one of them did other work than ours."""
    if plot:
        check_drawing(plot)
    if earlier:
        report = earlier_report(earlier)
    else:
        cases = chosen_cases(kind, texts)
        check_gpu()
        report = timed_report(cases, dtype, budget, json_file)
    click.echo(markdown(report))
    if plot and report["rows"]:
        draw_rows(report, LABELS, plot)
    if any("not our work" in why for row in report["rows"] for why in row["missing"].values()):
        raise SystemExit(1)


def earlier_report(path: Path) -> dict[str, Any]:
    """Return the report that a file holds, or end with a sentence if it holds none of this tool's."""
    try:
        report = json.loads(path.read_text())
        missing = [name for name in REPORT_KEYS if name not in report]
        fault = f"it lacks {', '.join(missing)}" if missing else None
    except (OSError, ValueError, TypeError) as error:  # a folder, no JSON or no text, a number
        fault = str(error)
    if fault:
        raise click.ClickException(f"{path} is no report of this tool ({fault}); name a file that --json wrote.")
    return dict(report)


def timed_report(cases: Sequence[Case], dtype: str, budget_s: float, json_file: Path | None) -> dict[str, Any]:
    """Measure cases; return the report, which is written as it grows."""
    builders, versions, missing = found_peers(dtype)
    report: dict[str, Any] = {
        "machine": machine(), "version": ca.__version__, "dtype": dtype, "versions": versions, "missing": missing
    }  # fmt: skip

    def keep() -> None:
        if json_file:
            write_whole(json_file, lambda file: file.write(f"{json.dumps(report, indent=1)}\n".encode()))

    with contextlib.ExitStack() as current:
        stream = current.enter_context(cupy.cuda.Stream(non_blocking=True))
        if versions:
            current.enter_context(importlib.import_module("torch_peers").on_stream(stream.ptr))
        limits = report["ceilings"] = ceilings(dtype)

        def measure_case(case: Case) -> dict[str, Any]:
            release()
            return measure(case, dtype, builders, limits)

        run_cases(report, cases, budget_s, measure_case, keep)
    return report


if __name__ == "__main__":
    main()
