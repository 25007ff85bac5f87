"""tools/gpu_report.py and what it runs under compute-sanitizer, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("cupy")

import emulated_gpu
import gpu_report
import small_case

import cupy_attn as ca
from cupy_attn import cuda, launch, launch_decode, warmup, wgmma
from cupy_attn.bench import model_config
from cupy_attn.launch import Launch

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def launches_of(run: small_case.Small) -> list[Launch]:
    """Return what a run launches on a Hopper GPU."""
    config = ca.AttentionConfig.from_dict(small_case.SMALL | run.shape)
    limits = dataclasses.replace(cuda.H200, num_sms=run.num_sms or cuda.H200.num_sms, wgmma=not run.portable)
    shape = launch.Shape(run.dtype, config.head_dim, run.precise, run.window is not None, float32_angles=False,
                         batch_invariant=run.batch_invariant)  # fmt: skip
    shape = dataclasses.replace(shape, folded=wgmma.can_fold(config, shape, cuda.H200) and not run.rest,
                                close_scores=not (run.precise or run.rest),
                                half_turns=not (run.precise or run.rest))  # fmt: skip
    found, past = [], 0
    for seq in run.calls:
        if not run.stages and launch_decode.decodes(config, shape, run.batch, seq):
            found += wgmma.decode(config, shape, limits, run.batch, seq)
        else:
            found += wgmma.prefill(config, shape, limits, run.batch, seq, collect=run.stages,
                                   past_tiles=-(-past // launch.PAST_ROWS))  # fmt: skip
        past += seq
    return found


def test_the_small_case_takes_every_kernel_that_an_import_builds():
    found = {(one.name, one.macros) for run in small_case.small_runs() for one in launches_of(run)}
    assert not set(warmup.common()) - found
    windowed = {name for name, macros in found if dict(macros).get("WINDOW")}
    assert windowed == {"attend_prefill", "attend_wgmma", "attend_decode"}


def test_of_the_two_steps_that_the_host_is_timed_at_one_becomes_a_graph():
    tokens = gpu_report.HOST_CALLS * gpu_report.HOST_RUNS
    cache = SimpleNamespace(lengths=np.array([0]))
    left = [
        cuda.CudaBackend._short(SimpleNamespace(_config=model_config(model)), SimpleNamespace(batch=1), cache)
        for model in (gpu_report.SHORT, gpu_report.LONG)
    ]
    assert left[0] > tokens
    assert left[1] < 0


def test_small_runs_let_blocks_of_attention_go_from_tile_to_tile_after_a_past():
    several = []
    for run in small_case.small_runs():
        grids = [one.grid for one in launches_of(run) if one.name == "attend_wgmma"]
        tiles = [-(-seq // wgmma.BLOCK_M) * run.heads[0] * run.batch for seq in run.calls if seq >= wgmma.LEAST_QUERIES]
        several += [(run.dtype, run.precise) for grid, count in zip(grids[1:], tiles[1:], strict=False) if grid < count]
    assert set(several) == {(dtype, precise) for dtype in small_case.DTYPES for precise in (False, True)}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_shares_of_the_small_runs_are_all_of_them(n):
    runs = small_case.small_runs()
    shares = [small_case.share_of(runs, (i + 1, n)) for i in range(n)]
    assert sorted(run.text for share in shares for run in share) == sorted(run.text for run in runs)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["3", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1/500"])
def test_what_is_no_share_is_refused(text):
    done = CliRunner().invoke(small_case.main, ["--share", text])
    assert done.exit_code == 2
    most = len(small_case.small_runs())
    said = f"'{text}' is no share; give I/N, such as 1/3, with I from 1 to N and N up to {most}."
    assert said in " ".join(done.output.split())


def test_one_share_that_is_not_clean_is_the_verdict_on_all():
    clean, bad = "0 hazards displayed (0 errors, 0 warnings)", "FAILED: took more than 270 s"
    assert gpu_report.of_all([clean, clean, clean]) == clean
    assert gpu_report.of_all([clean, bad, clean]) == gpu_report.of_all([bad]) == bad
    assert gpu_report.is_clean("0 errors")
    assert not any(map(gpu_report.is_clean, (bad, "10 errors", "not installed", "2 hazards displayed")))


@pytest.mark.skipif(emulated_gpu.compiler() is None, reason="there is no g++")
def test_a_small_run_compares_with_the_reference(monkeypatch):
    emulated_gpu.pretend(monkeypatch, num_sms=5)
    monkeypatch.setattr(small_case, "cupy", sys.modules["cupy"])
    run = small_case.Small("float16", precise=False, calls=(20, 3, 1), num_sms=2, portable=True, stages=True)
    share, launched = small_case.run_small(run)
    assert 0 < share < 1
    assert launched == {"project_qkv", "attend_prefill", "project_output"}
    monkeypatch.setitem(small_case.BARS, "float16", 1e-9)
    with pytest.raises(SystemExit, match=r"stages True: input_norm: relative L2 .*, the bar is 1e-09"):
        small_case.run_small(run)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_the_tables_of_a_report_are_those_of_its_json(file):
    assert file.with_suffix(".md").read_text() == gpu_report.markdown(json.loads(file.read_text()))
