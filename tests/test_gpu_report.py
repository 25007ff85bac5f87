"""What tools/gpu_report.py runs under compute-sanitizer, without a GPU."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("cupy")

import gpu_report

import cupy_attn as ca
from cupy_attn import cuda, launch, warmup, wgmma


def specialisations(run: gpu_report.Small) -> set[tuple]:
    """Return the kernels that a run launches on a Hopper GPU."""
    raw = gpu_report.SMALL | dict(zip(("num_attention_heads", "num_key_value_heads"), run.heads, strict=True))
    config = ca.AttentionConfig.from_dict(raw)
    limits = dataclasses.replace(cuda.H200, num_sms=run.num_sms or cuda.H200.num_sms, wgmma=not run.portable)
    shape = launch.Shape(run.dtype, config.head_dim, run.precise, run.window is not None, float32_angles=False)
    found, past = set(), 0
    for seq in run.calls:
        if seq == 1:
            launches = launch.decode(config, shape, limits, run.batch)
        else:
            launches = wgmma.prefill(config, shape, limits, run.batch, seq, collect=run.stages,
                                     past_tiles=-(-past // launch.PAST_ROWS))  # fmt: skip
        found |= {(one.name, one.macros) for one in launches}
        past += seq
    return found


def test_the_small_case_takes_every_kernel_that_an_import_builds():
    found = set().union(*map(specialisations, gpu_report.small_runs()))
    assert not set(warmup.common()) - found
    windowed = {name for name, macros in found if dict(macros).get("WINDOW")}
    assert windowed == {"attend_prefill", "attend_wgmma", "attend_decode"}


def test_a_small_run_lets_blocks_of_attention_go_from_tile_to_tile_after_a_past():
    run = next(run for run in gpu_report.small_runs() if run.batch == 2)
    assert (run.calls[:2], run.num_sms) == ((130, 130), 2)
    assert 2 * 4 * run.batch > 2  # tiles of queries, heads
