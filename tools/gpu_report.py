"""Evidence for the kernels on the GPU at hand, as JSON and as short Markdown tables.

    python tools/gpu_report.py [--out docs/results] [--only STEP,STEP]

Steps: ``tests`` (pytest -m gpu), ``sanitizer`` (four tools of compute-sanitizer over tools/small_case.py),
``accuracy`` (every published shape, both 16-bit dtypes, K-norm weights up to 1000), ``bench`` (tools/bench_stack.py),
``traffic`` (the same under ncu), ``import`` (warm import, cold compile, self-tests). Each is a process of its own with
a time limit. What it finds is written at once, to <out>/<gpu>.json and .md, beside what earlier runs found of the same
sources on the same machine. The report holds a digest of what was measured; a CPU test compares it with the sources,
so that a kernel cannot change without a new report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench_stack
import click
import cupy
import numpy as np
import separate_ops
import small_case
from accuracy_table import MAXIMA
from bench_stack import BAR as SAME
from bench_stack import Case
from cupy_ops import CupyLayer
from small_case import DTYPES

import cupy_attn as ca
from cupy_attn import kernels, reference
from cupy_attn.accuracy import BARS, MAX_ERROR_BARS
from cupy_attn.arrays import storage_dtype
from cupy_attn.bench import MODELS, model_config, random_layer
from cupy_attn.demo import k_norm_weight
from cupy_attn.doctor import examine

ROOT = Path(__file__).resolve().parent.parent
BENCH = {
    "decode": ("0.6B:1:1024", "0.6B:1:4096", "0.6B:8:4096"),
    "prefill": ("0.6B:1:512", "0.6B:1:2048", "0.6B:1:8192"),
}
TRAFFIC = {"decode": ("0.6B:1:1024", "0.6B:1:4096"), "prefill": ("0.6B:1:2048",)}
REPLAYS = 21


def cases(chosen: Mapping[str, Sequence[str]]) -> list[Case]:
    """Return cases of both kinds."""
    return [Case.parse(kind, text) for kind, texts in chosen.items() for text in texts]


def output(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program and return what it printed.

    Raises
    ------
    SystemExit
        It failed; the message ends with what it said.
    """
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"exit status {done.returncode}: {without_paths(done.stdout + done.stderr)[-1000:]}")
    return done.stdout


def without_paths(text: str) -> str:
    """Return a text with the machine's paths cut down to their last part."""
    return re.sub(r"(?<![\w./])/(?:[\w.@+~-]+/)+", "", text)


def building_at_import() -> dict[str, str]:
    """Return the environment of a process whose import of cupy_attn builds kernels; steps themselves defer that."""
    return {name: value for name, value in os.environ.items() if name != kernels.DEFER_VARIABLE}


# tests


TEST_PROCESSES = 4


def run_tests() -> dict[str, Any]:
    """Run the gpu tests and count them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", str(ROOT / "tests")]
        if importlib.util.find_spec("xdist") is not None:  # most of the time goes to the float64 reference
            command += ["-n", str(TEST_PROCESSES), "--dist", "loadfile"]
        subprocess.run(command, cwd=ROOT, env=building_at_import(), check=False)
        suite = ElementTree.parse(report).getroot()[0].attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    return {"tests": counts | {"passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}}


# sanitizer

# Tools, and among how many processes each shares out the runs: one takes much longer than the others.
SANITIZERS = {"memcheck": 1, "racecheck": 3, "initcheck": 1, "synccheck": 1}
SANITIZER_LIMIT_S = 330  # for one process, while the others run beside it


def sanitize() -> dict[str, Any]:
    """Run the small case on its own, which fills the kernel cache, then under each tool of compute-sanitizer."""
    small = [sys.executable, str(Path(small_case.__file__))]
    click.echo(output(small))
    program = bench_stack.cuda_tool("compute-sanitizer")
    if program is None:
        return {"sanitizer": dict.fromkeys(SANITIZERS, "not installed")}

    def verdict(tool: str, share: str) -> str:
        command = [program, "--tool", tool, "--error-exitcode", "9", *small, "--share", share]
        with tempfile.TemporaryFile("w+") as log:  # a pipe would be waited for as long as anyone holds it
            try:
                done = subprocess.run(command, cwd=ROOT, timeout=SANITIZER_LIMIT_S, check=False, stdout=log,
                                      stderr=subprocess.STDOUT)  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"FAILED: took more than {SANITIZER_LIMIT_S} s"
            log.seek(0)
            said = without_paths(log.read())
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
        if done.returncode == 0 and summary:
            return str(summary[-1])
        return f"FAILED ({done.returncode}): {said[:1000]} ... {said[-300:]}"

    with ThreadPoolExecutor(sum(SANITIZERS.values())) as pool:
        verdicts = {
            tool: [pool.submit(verdict, tool, f"{i}/{n}") for i in range(1, n + 1)] for tool, n in SANITIZERS.items()
        }
        return {"sanitizer": {tool: of_all([one.result() for one in ones]) for tool, ones in verdicts.items()}}


def of_all(verdicts: Sequence[str]) -> str:
    """Return one verdict on all shares of the runs: the first that is not clean, if there is one."""
    return next((verdict for verdict in verdicts if not is_clean(verdict)), verdicts[0])


def is_clean(verdict: str) -> bool:
    """Return whether a tool of compute-sanitizer found nothing."""
    return re.match(r"0 (errors|hazards)", verdict) is not None


# accuracy

PREFILL_TOKENS, DECODE_TOKENS = 48, 3
FINITE_ONLY = 1000.0  # from this largest K-norm weight on, y must be finite and has no other bar
QUARTER = 44.0  # from this one on, bfloat16 must be at most a quarter of what rounding as transformers does costs


def accuracy() -> dict[str, Any]:
    """Compare a prefill and some decode steps of every published shape with the reference."""
    rows = []
    for model in MODELS:
        config = model_config(model)
        base = random_layer(config)
        shape = (1, PREFILL_TOKENS + DECODE_TOKENS, config.hidden_size)
        x = np.random.default_rng(1).standard_normal(shape, np.float32)
        x[..., :4] *= 20
        for dtype in DTYPES:
            given, stored = x.astype(storage_dtype(dtype)), base.astype(dtype)
            wide = in_float64(stored)  # the reference converts at every call, which takes longest from 16 bits
            for largest, mean, std in MAXIMA:
                k_norm = k_norm_weight(np.random.default_rng(2), config.head_dim, largest, mean, std)
                weights = dataclasses.replace(stored, k_norm=k_norm.astype(given.dtype), losses={})
                layer = ca.Attention(config, weights, dtype, "cuda")
                errors = accuracy_of(layer, dataclasses.replace(wide, k_norm=weights.k_norm), given)
                rows.append({"model": model, "dtype": dtype, "k_norm": largest, **errors})
        largest_error = max(worst(row) for row in rows if row["model"] == model)
        click.echo(f"accuracy: {model}, relative L2 at most {largest_error:.1e}")
    return {"accuracy": rows}


def in_float64(weights: ca.AttentionWeights) -> ca.AttentionWeights:
    """Return the same weights, wider."""
    tensors: dict[str, Any] = {name: tensor.astype(np.float64) for name, tensor in weights.tensors().items()}
    return dataclasses.replace(weights, **tensors)


def accuracy_of(layer: ca.Attention, weights: ca.AttentionWeights, x: np.ndarray) -> dict[str, float]:
    """Return relative L2 and max errors: of prefill, of decode, of both; and of transformers' rounding for bfloat16."""
    cache = layer.new_cache(1, x.shape[1])
    parts = [layer(x[:, :PREFILL_TOKENS], cache)]
    parts += [layer(x[:, i : i + 1], cache) for i in range(PREFILL_TOKENS, x.shape[1])]
    y, (exact, _) = np.concatenate(parts, 1), reference.forward(layer.config, weights, x)
    errors = {}
    for kind, tokens in (("prefill", slice(PREFILL_TOKENS)), ("decode", slice(PREFILL_TOKENS, None))):
        errors[f"{kind}_l2"] = ca.relative_l2(y[:, tokens], exact[:, tokens])
        errors[f"{kind}_max"] = ca.max_error(y[:, tokens], exact[:, tokens])
    errors["l2"] = ca.relative_l2(y, exact)
    if layer.dtype.name == "bfloat16":
        chain, _ = reference.forward(layer.config, weights, x, rounding="transformers", angles="float32")
        errors["transformers_l2"] = ca.relative_l2(chain, exact)
    return errors


def worst(row: dict[str, Any], kind: str = "l2") -> float:
    """Return the larger error of prefill and decode."""
    return float(max(row[f"prefill_{kind}"], row[f"decode_{kind}"]))


def accuracy_misses(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each bar that a row of :func:`accuracy` misses."""
    bars = [
        ("relative L2", worst(row), BARS[row["dtype"]]),
        ("max error", worst(row, "max"), MAX_ERROR_BARS[row["dtype"]]),
    ]
    if row["k_norm"] >= FINITE_ONLY:
        bars = [(name, error, sys.float_info.max) for name, error, _ in bars]
    elif row["dtype"] == "bfloat16" and row["k_norm"] >= QUARTER:
        bars.append(("relative L2 of all tokens", row["l2"], row["transformers_l2"] / 4))
    where = f"{row['model']}, {row['dtype']}, K-norm {row['k_norm']:g}"
    return [f"{where}: {name} {error:.2g}, the bar is {bar:.2g}" for name, error, bar in bars if not error <= bar]


# bench, traffic, import


def bench() -> dict[str, Any]:
    """Time the issue's cases beside both baselines, after comparing the baselines with the reference."""
    checks = {"cupy": separate_ops.self_check("float16", CupyLayer), "separate": separate_ops.self_check("float16")}
    report: dict[str, Any] = {"dtype": "float16", "replays": REPLAYS, "self_checks": checks}
    with cupy.cuda.Stream(non_blocking=True):
        bench_stack.run_cases(report, cases(BENCH), "float16", bench_stack.stack_names("float16"), REPLAYS)
    return {"bench": report}


def traffic() -> dict[str, Any]:
    """Count the bytes that layers move, or say why they could not be counted."""
    if bench_stack.cuda_tool("ncu") is None:
        return {"traffic": {"skipped": "ncu is not installed."}}
    rows = []
    for case in cases(TRAFFIC):
        try:
            rows += bench_stack.traffic_rows(case, case.layers)
        except SystemExit as error:
            if "ERR_NVGPUCTRPERM" in str(error):
                return {"traffic": {"skipped": "ncu may not read the GPU's counters here (ERR_NVGPUCTRPERM)."}}
            raise
    return {"traffic": {"rows": rows}}


IMPORT_RUNS = 5
IMPORT_TIMER = """
import time
start = time.perf_counter()
import cupy
middle = time.perf_counter()
import cupy_attn
print(middle - start, time.perf_counter() - middle)
"""


HOST_CALLS, HOST_RUNS = 50, 9
SHORT, LONG = "0.6B", "1.7B"  # whose steps become a graph, and whose kernels are launched one by one


def host_us(model: str) -> float:
    """Return what a repeated decode step takes the host, of few enough that none waits for the GPU."""
    config = model_config(model)
    layer = ca.Attention(config, random_layer(config), "float16", "cuda")
    cache, x = layer.new_cache(1, HOST_CALLS * (HOST_RUNS + 1)), cupy.zeros((1, 1, config.hidden_size), np.float16)
    y, times = cupy.empty_like(x), []
    for _ in range(1 + HOST_RUNS):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            layer(x, cache, residual=x, out=y)
        times.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    return float(np.median(times[1:]))


def imports() -> dict[str, Any]:
    """Time the import of cupy_attn over that of cupy and a step's host side; let the doctor compile cold and test."""
    times = []
    for _ in range(1 + IMPORT_RUNS):  # the first fills the kernel cache
        printed = output([sys.executable, "-c", IMPORT_TIMER], building_at_import())
        times.append([float(number) for number in printed.split()])
    cupy_s, over_cupy_s = np.median(times[1:], axis=0).tolist()
    doctor = {name: value for name, value in examine().items() if name != "cache"}
    took = {"runs": IMPORT_RUNS, "cupy_s": cupy_s, "over_cupy_s": over_cupy_s}
    took |= {"host_us": host_us(SHORT), "host_long_us": host_us(LONG)}
    return {"import": took, "doctor": doctor}


# the report

# What a step does, and its limit in seconds.
STEPS: dict[str, tuple[Callable[[], dict[str, Any]], float]] = {
    "tests": (run_tests, 600), "sanitizer": (sanitize, 360), "accuracy": (accuracy, 360), "bench": (bench, 180),
    "traffic": (traffic, 240), "import": (imports, 180),
}  # fmt: skip


def limited(step: str, limit_s: float) -> dict[str, Any]:
    """Run a step in a process of its own and return what it found, or why it found nothing."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--step", step, "--to", str(found)]
        environment = os.environ | {kernels.DEFER_VARIABLE: "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sys.stderr.fileno(), start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return {step: {"error": f"took more than {limit_s:g} s"}}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
        if not found.exists():
            return {step: {"error": f"ended with status {status}"}}
        return dict(json.loads(found.read_text()))


def run_step(step: str, to: Path) -> None:
    """Write what a step finds, or the exception that ended it."""
    try:
        found = STEPS[step][0]()
    except (Exception, SystemExit) as error:
        found = {step: {"error": f"{type(error).__name__}: {error}"}}
    to.write_text(json.dumps(plain(found)))


def plain(value: Any) -> Any:
    """Return a value for JSON: paths of the machine cut down to their last part, no NaN or Inf."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, str):
        return without_paths(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def failures(report: dict[str, Any]) -> list[str]:
    """Return a sentence for all that failed in the steps a report holds."""
    found = [f"{step}: {report[step]['error']}" for step in STEPS if "error" in dict_of(report, step)]
    tests = dict_of(report, "tests")
    if "passed" in tests and (tests["failures"] or tests["errors"] or not tests["passed"]):
        found.append(f"tests: {tests['passed']} passed, {tests['failures'] + tests['errors']} failed")
    for tool, verdict in dict_of(report, "sanitizer").items():
        if tool != "error" and not is_clean(verdict):
            found.append(f"{tool}: {verdict}")
    rows = report.get("accuracy", [])
    found += [sentence for row in rows if isinstance(row, dict) for sentence in accuracy_misses(numbers(row))]
    timed = dict_of(report, "bench")
    found += [sentence for row in timed.get("rows", ()) for sentence in bench_stack.disagreements(numbers(row))]
    for name, error in numbers(timed.get("self_checks", {})).items():
        if not error <= SAME:
            found.append(f"{bench_stack.BASELINES[name]}: relative L2 {error:.2g}, the bar is {SAME:g}")
    doctor = dict_of(report, "doctor")
    if not doctor.get("ok", True):
        found.append("doctor: a self-test failed")
    if "why" in doctor.get("nvrtc", {}):
        found.append(f"doctor: {doctor['nvrtc']['why']}")
    return found


def dict_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a part of the report; an empty one if it is missing or a list."""
    part = report.get(name, {})
    return part if isinstance(part, dict) else {}


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with what :func:`plain` wrote as text made a float again."""
    return {name: float(value) if value in ("inf", "nan", "-inf") else value for name, value in row.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def markdown(report: dict[str, Any]) -> str:
    """Return the report as short tables."""
    machine = report["machine"]
    parts = [
        f"# {machine['gpu']}",
        f"Driver {machine['driver']}, CUDA runtime {machine['cuda_runtime']}, CuPy {machine['cupy']}, Python "
        f"{machine['python']}; sources {report['digest'][:12]}; `python tools/gpu_report.py`.",
    ]
    missing = [step for step in STEPS if step not in report]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    failed = failures(report)
    if failed:
        parts += ["## Failed", "\n".join(f"- {one_line(sentence, 300)}" for sentence in failed)]
    for section in (tests_section, sanitizer_section, accuracy_section, speed_section, traffic_section, build_section):
        parts += section(report)
    return "\n\n".join(parts) + "\n"


def tests_section(report: dict[str, Any]) -> list[str]:
    """Return the counts."""
    tests = dict_of(report, "tests")
    if "passed" not in tests:
        return []
    failed = tests["failures"] + tests["errors"]
    counts = f"Of those that need a GPU: {tests['passed']} passed, {failed} failed, {tests['skipped']} skipped."
    return ["## Tests", counts]


def sanitizer_section(report: dict[str, Any]) -> list[str]:
    """Return a line for each tool."""
    verdicts = [(tool, one_line(said, 100)) for tool, said in dict_of(report, "sanitizer").items() if tool != "error"]
    if not verdicts:
        return []
    what = "Prefill, chunked prefill and decode on small inputs, every kernel."
    return ["## compute-sanitizer", what, table(("tool", "verdict"), verdicts)]


def accuracy_section(report: dict[str, Any]) -> list[str]:
    """Return a line for each dtype and largest K-norm weight: the worst of all shapes."""
    if not isinstance(report.get("accuracy"), list):
        return []
    rows = [numbers(row) for row in report["accuracy"]]
    what = (f"Worst of {len({row['model'] for row in rows})} published shapes, {PREFILL_TOKENS} tokens of prefill and "
            f"{DECODE_TOKENS} of decode, against the float64 reference; beside it the least that rounding as "
            "transformers does costs.")  # fmt: skip
    head = ("storage", "largest k_norm", "prefill L2", "decode L2", "bar", "prefill max", "decode max", "bar",
            "transformers L2")  # fmt: skip
    lines = []
    for dtype, largest in dict.fromkeys((row["dtype"], row["k_norm"]) for row in rows):
        these = [row for row in rows if (row["dtype"], row["k_norm"]) == (dtype, largest)]
        bars = ("finite", "finite") if largest >= FINITE_ONLY else (f"{BARS[dtype]:g}", f"{MAX_ERROR_BARS[dtype]:g}")
        l2, most = (
            [number(max(row[f"{kind}_{which}"] for row in these)) for kind in ("prefill", "decode")]
            for which in ("l2", "max")
        )
        chain = [row["transformers_l2"] for row in these if "transformers_l2" in row]
        lines.append((dtype, f"{largest:g}", *l2, bars[0], *most, bars[1], number(min(chain)) if chain else ""))
    return ["## Accuracy", what, table(head, lines)]


def speed_section(report: dict[str, Any]) -> list[str]:
    """Return the tables of tools/bench_stack.py."""
    timed = dict_of(report, "bench")
    if "rows" not in timed:
        return []
    limits, kinds = timed["ceilings"], dict.fromkeys(row["kind"] for row in timed["rows"])
    what = (f"{timed['dtype']}, us per layer of a stack in a CUDA graph, median of {timed['replays']}; model, "
            f"batch, tokens. Ceilings measured in the same run: read {limits['read_tb_s']:.2f} TB/s, copy "
            f"{limits['copy_tb_s']:.2f} TB/s, 8192^3 matmul {limits['matmul_tflop_s']:.0f} TFLOP/s.")  # fmt: skip
    return ["## Speed", what, *(bench_stack.table(kind, [row for row in timed["rows"] if row["kind"] == kind], limits)
                                for kind in kinds)]  # fmt: skip


def traffic_section(report: dict[str, Any]) -> list[str]:
    """Return the table of tools/bench_stack.py, or why there is none."""
    moved, heading = dict_of(report, "traffic"), "## Traffic of one layer"
    if "rows" in moved:
        return [heading, bench_stack.traffic_table(moved["rows"])]
    return [heading, f"Not measured: {moved['skipped']}"] if "skipped" in moved else []


def build_section(report: dict[str, Any]) -> list[str]:
    """Return what importing and compiling cost, and the self-tests."""
    took, doctor = dict_of(report, "import"), dict_of(report, "doctor")
    if "over_cupy_s" not in took:
        return []
    nvrtc = doctor["nvrtc"]
    sentences = [f"Importing cupy_attn takes {took['over_cupy_s']:.2f} s more than cupy's {took['cupy_s']:.2f} s, with "
                 f"kernels in CuPy's cache (medians of {took['runs']})."]  # fmt: skip
    sentences.append(f"A decode step that repeats the one before takes the host {took['host_us']:.1f} us as a "
                     f"graph, {took['host_long_us']:.1f} us where it is too long for one.")  # fmt: skip
    if "cold_compile_s" in nvrtc:
        left = f", {nvrtc['not_compiled']} left out" if "not_compiled" in nvrtc else ""
        sentences.append(f"Cold, {nvrtc['kernels']} kernels compile in {nvrtc['cold_compile_s']} s on "
                         f"{doctor['cpu']['cores']} cores{left}; at most {nvrtc['max_registers']} registers, "
                         f"{nvrtc['spill_bytes']} bytes spilled in all.")  # fmt: skip
    rows = [(r["device"], r["dtype"], number(r["relative_l2"]), f"{r['bar']:g}") for r in doctor["self_test"]]
    return ["## Import and build", " ".join(sentences), table(("self-test", "dtype", "relative L2", "bar"), rows)]


def one_line(text: str, most: int) -> str:
    """Return the beginning of a text for a cell or a list."""
    return " ".join(text.split())[:most].replace("|", "/")


def number(value: Any) -> str:
    """Return an error in short."""
    return f"{float(value):.1e}" if value is not None else "failed"


def earlier(file: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """Return the report that a file holds, if it is of the same sources and the same machine, else the fresh one."""
    if not file.exists():
        return fresh
    held = json.loads(file.read_text())
    for name, value in fresh.items():
        if held.get(name) != value:
            click.echo(f"{file.name} is of another {name}; its steps are dropped.", err=True)
            return fresh
    return dict(held)


def chosen_steps(context: click.Context, parameter: click.Parameter, text: str | None) -> list[str]:
    """Read STEP,STEP."""
    steps = list(STEPS) if text is None else text.split(",")
    unknown = sorted(set(steps) - set(STEPS))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}; steps: {', '.join(STEPS)}.")
    return steps


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs" / "results", show_default=True)
@click.option("--only", "steps", metavar="STEP,STEP", callback=chosen_steps,
              help=f"Of {', '.join(STEPS)}; merged into the report that is there.")  # fmt: skip
@click.option("--step", type=click.Choice(list(STEPS)), hidden=True)
@click.option("--to", type=click.Path(path_type=Path), hidden=True)
def main(out: Path, steps: list[str], step: str | None, to: Path | None) -> None:
    """Make the report; exit status 1 if a test, a sanitizer, a bar or a self-test failed."""
    bench_stack.check_gpu()
    if step and to:
        run_step(step, to)
        return
    fresh = plain({"digest": kernels.source_digest(), "machine": bench_stack.machine()})
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", fresh["machine"]["gpu"].lower()).strip("-")
    file = out / f"{name}.json"
    report = earlier(file, fresh)
    for one in steps:
        start = time.perf_counter()
        report |= limited(one, STEPS[one][1])
        report["seconds"] = report.get("seconds", {}) | {one: round(time.perf_counter() - start, 1)}
        click.echo(f"{one}: {report['seconds'][one]} s", err=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text(markdown(report))
    click.echo(markdown(report))
    if failures(report):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
