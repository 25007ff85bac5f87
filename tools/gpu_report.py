"""Evidence for the kernels on the GPU at hand: tests, compute-sanitizer, times, as JSON and a Markdown table.

    python tools/gpu_report.py [--out docs/results]

Writes <out>/<gpu>.json and .md. The report holds a digest of kernels_cu/ and the CUDA backend; a CPU test compares it
with the sources, so that a kernel cannot change without a new report.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import click
import cupy
import numpy as np

import cupy_attn as ca
from cupy_attn import cuda, kernels
from cupy_attn.bench import model_config, run_bench
from cupy_attn.doctor import examine

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEP_LIMIT_S = 300


def run_tests() -> dict[str, int]:
    """Run the gpu tests and count them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", str(ROOT / "tests")]
        subprocess.run(command, cwd=ROOT, timeout=STEP_LIMIT_S, check=False)
        suite = ElementTree.parse(report).getroot()[0].attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    return counts | {"passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}


def sanitize() -> dict[str, str]:
    """Run a small case of every kernel under each tool of compute-sanitizer."""
    if shutil.which("compute-sanitizer") is None:
        return dict.fromkeys(SANITIZERS, "not installed")
    verdicts = {}
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--small"]
        done = subprocess.run(command, cwd=ROOT, timeout=STEP_LIMIT_S, check=False, capture_output=True, text=True)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.stdout)
        verdicts[tool] = (
            summary[-1] if done.returncode == 0 and summary else f"FAILED ({done.returncode}): {done.stdout[-500:]}"
        )
    return verdicts


def small_case() -> None:
    """Launch every kernel once on a small input."""
    rng = np.random.default_rng(0)
    for hidden in (64, 1024, 5120):
        x = cupy.asarray(rng.standard_normal((5, hidden)).astype(np.float16))
        weight = cupy.asarray(rng.standard_normal(hidden).astype(np.float16))
        y = cuda.rms_norm(x, weight, 1e-6, np.float32)
        error = ca.relative_l2(y, ca.rms_norm(x.get().astype(np.float64), weight.get().astype(np.float64)))
        if error > 1e-6:
            raise SystemExit(f"rms_norm at {hidden}: relative L2 {error:.2g}")


def median_us(run: Any, repeats: int = 50) -> float:
    """Return the median time of a launch from the GPU's events."""
    run()
    times = []
    for _ in range(repeats):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3)
    return float(np.median(times))


def copy_ceiling() -> float:
    """Return the TB/s of a device-to-device copy far beyond L2, bytes read plus bytes written."""
    source = cupy.ones(1 << 30, cupy.float32)
    target = cupy.empty_like(source)
    return 2 * source.nbytes / median_us(lambda: cupy.copyto(target, source), 10) / 1e6


def time_rms_norm() -> list[dict[str, Any]]:
    """Time the kernel on 1 GiB of random rows."""
    rows = []
    for dtype in ("float16", "bfloat16"):
        for hidden in (1024, 4096, 5120):
            count = (1 << 29) // hidden
            x = cupy.random.standard_normal((count, hidden), dtype=cupy.float32).astype(ca.arrays.storage_dtype(dtype))
            weight = x[0].copy()
            y = cuda.rms_norm(x, weight, 1e-6, np.float32)
            us = median_us(lambda x=x, weight=weight: cuda.rms_norm(x, weight, 1e-6, np.float32))
            bytes_moved = x.nbytes + y.nbytes
            rows.append({"kernel": "rms_norm", "dtype": dtype, "hidden_size": hidden, "rows": count, "us": us,
                         "tb_s": bytes_moved / us / 1e6})  # fmt: skip
            del x, y
            cupy.get_default_memory_pool().free_all_blocks()
    return rows


def markdown(report: dict[str, Any]) -> str:
    """Return the short table."""
    gpu, tests, self_tests = report["doctor"]["gpu"], report["tests"], report["doctor"]["self_test"]
    failed = tests["failures"] + tests["errors"]
    lines = [
        f"# {gpu['name']}", "",
        f"Driver {gpu['driver']}, CUDA runtime {gpu['runtime']}, CuPy {report['cupy']}, {report['platform']}. Made by "
        f"`python tools/gpu_report.py`; sources {report['digest'][:12]}.", "",
        f"Tests that need a GPU: {tests['passed']} passed, {failed} failed, {tests['skipped']} skipped.", "",
        "| compute-sanitizer | verdict |", "|---|---|",
        *(f"| {tool} | {verdict} |" for tool, verdict in report["sanitizer"].items()), "",
        "| device | dtype | relative L2 | bar |", "|---|---|---|---|",
        *(f"| {r['device']} | {r['dtype']} | {r['relative_l2']:.1e} | {r['bar']:g} |" for r in self_tests),
        "", f"Copy ceiling {report['copy_tb_s']:.2f} TB/s (bytes read plus written).", "",
        "| kernel | dtype | hidden_size | us | TB/s | % of copy |", "|---|---|---|---|---|---|",
        *(f"| {r['kernel']} | {r['dtype']} | {r['hidden_size']} | {r['us']:.0f} | {r['tb_s']:.2f} | "
          f"{100 * r['tb_s'] / report['copy_tb_s']:.0f} |" for r in report["kernels"]), "",
        "The layer, 0.6B, batch 1, float16, single calls (medians, us):", "",
        "| what | us |", "|---|---|", *(f"| {r['what']} | {r['median_us']:.0f} |" for r in report["layer"]), "",
    ]  # fmt: skip
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs" / "results", show_default=True)
@click.option("--small", is_flag=True, help="Only launch every kernel once: what compute-sanitizer watches.")
def main(out: Path, small: bool) -> None:
    """Make the report; exit status 1 if a test, a sanitizer or a self-test failed."""
    if small:
        small_case()
        return
    small_case()
    layer = run_bench(model_config("0.6B"), dtype="float16", device="cuda", batch=1, tokens=512, repeats=20)
    report = {
        "digest": kernels.source_digest(),
        "cupy": cupy.__version__,
        "platform": f"Python {platform.python_version()}",
        "doctor": {name: value for name, value in examine().items() if name != "cache"},  # no paths of a machine
        "tests": run_tests(),
        "sanitizer": sanitize(),
        "copy_tb_s": copy_ceiling(),
        "kernels": time_rms_norm(),
        "layer": [vars(row) for row in layer],
    }
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", report["doctor"]["gpu"]["name"].lower()).strip("-")
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(report))
    click.echo(markdown(report))
    clean = all(re.match(r"0 (errors|hazards)", verdict) for verdict in report["sanitizer"].values())
    failed = report["tests"]["failures"] + report["tests"]["errors"]
    if failed or not clean or not report["doctor"]["ok"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
