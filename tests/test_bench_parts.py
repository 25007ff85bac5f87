"""tools/bench_parts.py: what counts as work, what it prints, and what it does when a part cannot run."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import bench_parts
import emulated_gpu
import numpy as np
import pytest
import stacks
from bench_parts import PARTS, Part, markdown, part_text, prompts
from click.testing import CliRunner
from stacks import Case

MACHINE = {"gpu": "A GPU", "driver": "1.2, 700 W", "cupy": "14.2.0"}


def test_useful_work_of_the_kernels_is_that_of_the_layer():
    case = Case("prefill", "8B", 1, 3)  # 32:8 heads of 128, 4096 wide
    assert bench_parts.qkv_flop(case) == 2 * 3 * 4096 * (32 + 8 + 8) * 128
    assert bench_parts.attention_flop(case) == 2 * 2 * 32 * 128 * (1 + 2 + 3)
    assert bench_parts.output_flop(case) == 2 * 3 * 32 * 128 * 4096
    assert bench_parts.rate(case.flop, 1.0) == case.flop / 1e6


def test_work_of_unequal_prompts_is_each_ones():
    assert bench_parts.batch_flop("0.6B", [7] * 5) == Case("prefill", "0.6B", 5, 7).flop
    assert bench_parts.batch_flop("0.6B", [7, 0, 9]) == sum(Case("prefill", "0.6B", 1, n).flop for n in (7, 9))
    assert sum(bench_parts.LENGTHS) == 2048 * len(bench_parts.LENGTHS)
    assert len(set(bench_parts.LENGTHS)) == 8


def test_the_usual_cases_are_prompts():
    for texts in (bench_parts.KERNELS, bench_parts.ATTENTION, bench_parts.PATHS, [bench_parts.CHUNKED]):
        assert all(case.batch == 1 and case.cached == 0 for case in prompts(texts))


def test_a_table_says_what_is_there_and_what_is_not():
    row = {"case": "0.6B:1:2048", "kernel": "attend_wgmma", "us": 30.04, "tflop_s": 286.4}
    peer = {"peer_us": 24.0, "peer_tflop_s": 358.2, "ratio": 0.8}
    lines = part_text("attention", {"rows": [row | peer, row | {"missing": "no FA3"}] * 2}).splitlines()
    assert lines[2:6] == [
        "| case | kernel | us | TFLOP/s | FlashAttention-3 us | FlashAttention-3 TFLOP/s | rate / FlashAttention-3's |",
        "|---|---|---|---|---|---|---|",
        "| 0.6B:1:2048 | attend_wgmma | 30.0 | 286 | 24.0 | 358 | 0.80 |",
        "| 0.6B:1:2048 | attend_wgmma | 30.0 | 286 | - | - | - |",
    ]
    assert lines[8:] == ["", "- Missing: no FA3"]
    batch = {"batch": "unequal", "lengths": [1, 2, 3], "us": 1.0, "tflop_s": 10.0, "ratio": 1.0}
    assert part_text("batches", {"rows": [batch]}).endswith("| unequal | 3 | 1.0 | 10 | 1.00 |")


def fake_times(monkeypatch):
    """Take every kernel for 10 us, cuBLAS for 5, FlashAttention-3 for 8, a layer for a microsecond a chunk."""
    names = ("qkv", "attend", "output")
    monkeypatch.setattr(bench_parts, "kernels_us", lambda case, dtype, path=None, which=(-3, -2, -1): [
        {"kernel": names[i], "us": {None: 10.0, "rest": 12.5, "precise": 30.0}[path]} for i in which])  # fmt: skip
    monkeypatch.setattr(bench_parts, "product_us", lambda *_: 5.0)
    monkeypatch.setattr(bench_parts, "fa3_us", lambda case: 8.0)
    monkeypatch.setattr(bench_parts, "hidden_states", lambda case, dtype: None)
    monkeypatch.setattr(bench_parts, "release", lambda: None)
    monkeypatch.setattr(bench_parts, "layer_of", lambda model, dtype, path=None: path)
    monkeypatch.setattr(
        bench_parts, "layer_us", lambda layer, x, chunks=1, **_: chunks * (3.0 if layer == "precise" else 2)
    )


def test_rows_hold_rates_and_ratios(monkeypatch):
    fake_times(monkeypatch)
    case = Case("prefill", "0.6B", 1, 100)
    qkv, attend, output, larger = bench_parts.measure_kernels([case])[:4]
    assert (qkv["dtype"], qkv["ratio"], qkv["peer_tflop_s"]) == ("float16", 0.5, 2 * qkv["tflop_s"])
    assert (larger["kernel"], larger["ratio"]) == ("qkv, larger norms", 0.4)
    assert qkv["tflop_s"] == pytest.approx(1.25 * larger["tflop_s"]) == 2 * output["tflop_s"]
    assert "peer_us" not in attend
    (row,) = bench_parts.measure_attention([case])
    assert (row["kernel"], row["ratio"]) == ("attend", 0.8)
    (row,) = bench_parts.measure_paths([case])
    assert (row["attention_ratio"], row["layer_ratio"]) == (3.0, 1.5)
    once, chunked = bench_parts.measure_chunks(case, 4)
    assert (once["ratio"], chunked["ratio"], chunked["chunks"]) == (1.0, 4.0, 4)
    for name, rows in (("kernels", [qkv, attend, output]), ("paths", [row]), ("chunks", [once, chunked])):
        assert part_text(name, {"rows": rows}).count("\n| 0.6B:1:100 |") == len(rows)


def test_without_flash_attention_ours_is_timed_and_a_sentence_says_why(monkeypatch):
    def no_module(case):
        raise ImportError("no module\nat all")

    fake_times(monkeypatch)
    monkeypatch.setattr(bench_parts, "fa3_us", no_module)
    (row,) = bench_parts.measure_attention([Case("prefill", "8B", 1, 100)])
    assert row["us"] == 10.0
    assert "peer_us" not in row
    assert row["missing"] == "FlashAttention-3: ImportError: no module"


def test_the_published_tables_are_those_of_their_json():
    results = Path(__file__).resolve().parent.parent / "docs" / "results"
    report = json.loads((results / "peers" / "parts.json").read_text())
    assert list(report["parts"]) == list(PARTS)
    page = (results / "parts.md").read_text()
    for text in markdown(report).split("\n\n"):
        assert text in page


def fail():
    raise RuntimeError("no kernel\nand more")


def run_main(monkeypatch, *args):
    monkeypatch.setattr(bench_parts, "check_gpu", lambda: None)
    monkeypatch.setattr(bench_parts, "machine", lambda: MACHINE)
    monkeypatch.setattr(bench_parts, "library_versions", lambda: {"products": "cuBLAS 1", "fa3": "none"})
    monkeypatch.setattr(bench_parts, "torch_tools", lambda: None)
    monkeypatch.setattr(bench_parts, "release", lambda: None)
    monkeypatch.setattr(bench_parts.cupy.cuda, "Stream", lambda **_: contextlib.nullcontext())
    columns = PARTS["chunks"].columns
    monkeypatch.setitem(PARTS, "chunks", Part("Whole", lambda: [{"case": "a", "chunks": 1, "us": 2.0}], columns))
    monkeypatch.setitem(PARTS, "paths", Part("Broken", fail, columns))
    return CliRunner().invoke(bench_parts.main, [str(a) for a in args])


def test_a_part_that_fails_says_so_and_the_others_are_there(monkeypatch, tmp_path):
    result = run_main(monkeypatch, "--part", "paths", "--part", "chunks", "--json", tmp_path / "parts.json")
    assert result.exit_code == 1
    assert "Broken: could not be measured (RuntimeError: no kernel)." in result.stdout
    assert "| a | 1 | 2.0 | - | - |" in result.stdout
    assert result.stdout.startswith("A GPU, driver 1.2, 700 W, CuPy 14.2.0, cupy_attn ")
    report = json.loads((tmp_path / "parts.json").read_text())
    assert report["parts"]["chunks"]["rows"] == [{"case": "a", "chunks": 1, "us": 2.0}]
    assert markdown(report) + "\n" == result.stdout
    assert run_main(monkeypatch, "--part", "chunks").exit_code == 0


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch):
    monkeypatch.setattr(stacks.cuda, "problem", lambda: "no CUDA GPU is visible; use device='cpu'.")
    result = CliRunner().invoke(bench_parts.main, [])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert result.output.startswith("Error: no CUDA GPU is visible; ")


def test_without_pytorch_products_are_cupys(monkeypatch):
    bench_parts.torch_tools.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_peers", None)
    assert bench_parts.torch_tools() is None
    bench_parts.torch_tools.cache_clear()


@pytest.mark.skipif(emulated_gpu.compiler() is None, reason="there is no g++")
def test_kernels_run_again_and_again_on_what_a_call_left(monkeypatch):
    """On the CPU, without the clock: kernels by themselves, then layers on unequal prompts and in chunks."""
    emulated_gpu.pretend(monkeypatch, num_sms=5)
    monkeypatch.setattr(bench_parts, "cupy", fake := sys.modules["cupy"])
    fake.split = np.split
    ran, rng = [], np.random.default_rng(0)

    def timed(run):
        ran.append(run)
        run()
        run()
        return 2.0

    monkeypatch.setattr(bench_parts, "alone_us", timed)
    monkeypatch.setattr(bench_parts, "event_us", lambda run: run() or 3.0)
    monkeypatch.setattr(bench_parts, "REPEATS", 2)
    monkeypatch.setattr(bench_parts, "WARM_UPS", 1)
    # On the device: of NumPy arrays the layer has copies, which end with the call.
    monkeypatch.setattr(bench_parts, "noise",
                        lambda dtype, shape, seed: fake.asarray(rng.standard_normal(shape).astype(dtype)))  # fmt: skip
    bench_parts.layer_of.cache_clear()
    monkeypatch.setitem(stacks.MODELS, "tiny", (64, 2, 1))
    case = Case("prefill", "tiny", 1, 33)  # fewer run on the kernels of decode
    names = ["project_qkv", "attend_prefill", "project_output"]
    for _ in range(2):  # a layer that was used before
        assert bench_parts.kernels_us(case, "float16") == [{"kernel": name, "us": 2.0} for name in names]
    assert bench_parts.kernels_us(case, "float16", path="precise", which=[1]) == [{"kernel": names[1], "us": 2.0}]
    assert len(ran) == 7
    layer = bench_parts.layer_of("tiny", "float16")
    assert layer.precise is False
    x = rng.standard_normal((2, 8, 64)).astype(np.float16)
    assert bench_parts.layer_us(layer, x, lengths=[8, 3]) == 3.0
    assert bench_parts.layer_us(layer, x, chunks=4) == 3.0
    bench_parts.layer_of.cache_clear()


@pytest.mark.gpu
def test_every_part_runs_on_a_gpu():
    import cupy

    case = Case("prefill", "0.6B", 1, 300)
    with contextlib.ExitStack() as current:
        stream = current.enter_context(cupy.cuda.Stream(non_blocking=True))
        if bench_parts.torch_tools() is not None:
            current.enter_context(bench_parts.torch_tools().on_stream(stream.ptr))
        results = {
            "kernels": bench_parts.measure_kernels([case]),
            "attention": bench_parts.measure_attention([case]),
            "paths": bench_parts.measure_paths([case]),
            "chunks": bench_parts.measure_chunks(case, 3),
            "batches": bench_parts.measure_batches("0.6B", [100, 200]),
        }
    assert list(results) == list(PARTS)
    assert [len(rows) for rows in results.values()] == [8, 1, 1, 2, 3]
    for name, rows in results.items():
        assert all(value > 0 for row in rows for key, value in row.items() if key.endswith(("us", "_s", "ratio")))
        assert len(part_text(name, {"rows": rows}).splitlines()) >= 4 + len(rows)
