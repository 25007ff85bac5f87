"""tools/bench_peers.py: whom it times, what it does when one of them fails, and that the peers do our work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import types
from pathlib import Path

import bench_peers
import bench_stack
import click
import gpu_report
import numpy as np
import pytest
import small_case
import stacks
from bench_peers import LABELS, chosen_cases, markdown, run_cases
from click.testing import CliRunner
from stacks import Case

import cupy_attn as ca
from cupy_attn.bench import random_layer

LIMITS = {"read_tb_s": 4.4, "copy_tb_s": 4.2, "matmul_tflop_s": 700.0, "cublas": 130100}
CASE = Case("decode", "0.6B", 1, 1024)


class FakeStack:
    """A stack that takes ``us`` a layer, adds ``adds`` to the hidden states, and fails as it is told to."""

    def __init__(self, us=1.0, *, adds=1.0, error=None, fault=None):
        self.us, self.adds, self.error, self.layers = us, adds, error, CASE.layers
        self.fault = lambda: fault

    def capture(self):
        if self.error:
            raise self.error

    def check(self):
        if self.fault():
            raise SystemExit(self.fault())

    def poison(self): ...

    def rewind(self): ...

    def launch(self): ...


@pytest.fixture
def measured(monkeypatch):
    """Return what measures fake stacks, by name."""
    monkeypatch.setattr(bench_peers, "take_turns", lambda stacks, *_: {name: [s.us] * 3 for name, s in stacks.items()})
    monkeypatch.setattr(bench_peers, "added", lambda stack: np.full(8, stack.adds, np.float32))
    monkeypatch.setattr(bench_peers, "release", lambda: None)

    def measure(**fakes):
        builders = {name: lambda case, dtype, layers, fake=fake: fake for name, fake in fakes.items()}
        return bench_peers.measure(CASE, "float16", builders, LIMITS)

    return measure


def test_the_usual_cases_are_cases():
    cases = chosen_cases(None, ())
    assert [case.kind for case in cases] == ["decode"] * 11 + ["prefill"] * 8
    assert cases[10] == Case("decode", "235B-A22B", 8, 8192)
    assert chosen_cases("prefill", ("8B:2:77",)) == [Case("prefill", "8B", 2, 77)]
    with pytest.raises(click.BadParameter, match="is not MODEL:BATCH:TOKENS; models: "):
        chosen_cases("decode", ("9B:1:1",))


def test_a_case_of_several_new_tokens_counts_what_each_sees():
    case = Case("decode", "0.6B", 2, 100, new=4)
    assert (case.seq, case.cached, case.bytes_moved) == (4, 96, Case("decode", "0.6B", 2, 100).bytes_moved)
    steps = [Case("decode", "0.6B", 2, tokens) for tokens in range(97, 101)]
    assert case.flop == sum(step.flop for step in steps)
    assert Case("prefill", "0.6B", 2, 100).seq == 100


@pytest.mark.parametrize("cls", [stacks.Ours, stacks.InAnyBatch, stacks.WithRest, stacks.OnPrecisePath])
def test_a_stack_makes_layers_of_its_kind(monkeypatch, cls):
    made = []

    def attention(config, *_, batch_invariant):
        made.append((config.precise_threshold, batch_invariant))
        raise InterruptedError

    monkeypatch.setattr(stacks.Stack, "__init__", lambda *_: None)
    monkeypatch.setattr(stacks, "layer_weights", lambda *_: None)
    monkeypatch.setattr(ca, "Attention", attention)
    with pytest.raises(InterruptedError):
        cls(CASE, "float16", 1)
    threshold = CASE.config.precise_threshold if cls.path is None else stacks.THRESHOLDS[cls.path]
    assert made == [(threshold, cls is stacks.InAnyBatch)]


@pytest.mark.parametrize("path", [None, *stacks.THRESHOLDS])
def test_a_layer_is_on_the_path_that_it_is_timed_for(monkeypatch, path):
    weights = stacks.layer_weights("0.6B", "float16", 0)
    monkeypatch.setattr(ca, "Attention", functools.partial(on_the_cpu, ca.Attention))
    assert stacks.layer_on(path, CASE.config, weights, "float16").precise is (path == "precise")
    large = dataclasses.replace(weights, k_norm=8 * weights.k_norm)
    with pytest.raises(AssertionError):
        stacks.layer_on("rest" if path is None else None, CASE.config, large, "float16")


def on_the_cpu(attention, config, weights, dtype, _device, **options):
    """Make a layer where there is no GPU."""
    return attention(config, weights, dtype, "cpu", **options)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--new", "4"], "are for times of --decode"),
        (["--prefill", "--batch-invariant"], "are for times of --decode"),
        (["--decode", "--new", "4", "--traffic"], "are for times of --decode"),
        (["--decode", "--new", "9", "--case", "0.6B:1:8"], "a case has fewer than 9 tokens"),
        (["--precise", "--traffic"], "--precise are for times"),
        (["--rest"], "--rest needs --prefill"),
    ],
)
def test_what_decode_alone_can_be_asked_for(arguments, says):
    result = CliRunner().invoke(bench_stack.main, arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_a_row_has_times_ratios_and_the_best_peer(measured):
    row = measured(ours=FakeStack(10.0), torch_eager=FakeStack(40.0), fa3=FakeStack(15.0, adds=1.02))
    assert (row["ours_us"], row["torch_eager_ratio"], row["fa3_ratio"]) == (10.0, 4.0, 1.5)
    assert (row["best_peer"], row["best_ratio"], row["missing"]) == ("fa3", 1.5, {})
    assert row["fa3_added_l2"] == pytest.approx(0.02, rel=1e-4)
    assert row["floor_us"] == pytest.approx(CASE.bytes_moved / 4.4e6)


def test_a_peer_that_fails_is_missing_with_its_reason(measured):
    row = measured(
        ours=FakeStack(10.0), torch_eager=FakeStack(error=RuntimeError("no kernel\nand more")),
        torch_compile=FakeStack(fault="3 of 8 outputs of layer 1 are NaN"), fa3=FakeStack(5.0, adds=2.0),
        cupy=FakeStack(error=MemoryError()), separate=FakeStack(20.0),
    )  # fmt: skip
    assert row["missing"] == {
        "torch_eager": "RuntimeError: no kernel", "torch_compile": "3 of 8 outputs of layer 1 are NaN",
        "fa3": "not our work: what it adds is off by 1 (relative L2)", "cupy": "MemoryError",
    }  # fmt: skip
    assert {name for name in LABELS if f"{name}_us" in row} == {"separate"}
    assert row["best_peer"] == "separate"
    assert "best_peer" not in measured(ours=FakeStack())


def test_ours_may_not_fail(measured):
    with pytest.raises(RuntimeError, match="broken"):
        measured(ours=FakeStack(error=RuntimeError("broken")))
    with pytest.raises(SystemExit):
        measured(ours=FakeStack(fault="NaN"))


def test_no_case_is_started_once_the_budget_is_spent(capsys):
    report, kept, now = {}, [], [0.0]

    def measure(case):
        now[0] += 30.0
        return {"tokens": case.tokens}

    cases = [Case("decode", "0.6B", 1, n) for n in (1, 2, 3, 4)]
    run_cases(report, cases, 50.0, measure, lambda: kept.append(len(report["rows"])), lambda: now[0])
    assert report == {"rows": [{"tokens": 1}, {"tokens": 2}], "left_out": ["decode 0.6B:1:3", "decode 0.6B:1:4"],
                      "seconds": 60.0}  # fmt: skip
    assert kept == [1, 2, 2]
    assert "decode 0.6B:1:2: 60 s" in capsys.readouterr().err


def test_slow_stacks_take_fewer_turns(monkeypatch):
    stacks_by_name = {"ours": FakeStack(), "slow": FakeStack()}
    times = {id(stacks_by_name["ours"].launch.__self__): iter(range(100, 200)), "slow": iter(range(1000000, 1000100))}

    def event_us(launch):
        stack = launch.__self__
        return next(times.get(id(stack), times["slow"])) * stack.layers

    monkeypatch.setattr(stacks, "event_us", event_us)
    taken = stacks.take_turns(stacks_by_name, 21, most_s=3.0)
    assert taken["ours"] == list(range(105, 126))
    assert taken["slow"] == [1000003, 1000004, 1000005]
    assert len(stacks.take_turns({"ours": FakeStack()}, 15)["ours"]) == 15


def report_of(rows, **more):
    return {
        "machine": {"gpu": "A GPU", "driver": "1.2, 700 W", "cupy": "14.2.0"}, "version": "0.1.0", "dtype": "float16",
        "ceilings": LIMITS, "versions": {"torch_eager": "PyTorch 2.11.0"}, "missing": {"fa3": "No module named 'x'"},
        "rows": rows, "left_out": [],
    } | more  # fmt: skip


def test_the_table_says_what_is_there_and_what_is_not(measured):
    rows = [
        measured(ours=FakeStack(10.0), torch_eager=FakeStack(40.0), separate=FakeStack(30.0)),
        measured(ours=FakeStack(10.0), torch_eager=FakeStack(error=MemoryError()), separate=FakeStack(5.0)),
    ]
    lines = markdown(report_of(rows, left_out=["decode 8B:1:1"])).splitlines()
    assert "A GPU, driver 1.2, 700 W, CuPy 14.2.0" in lines[0]
    assert lines[0].endswith("cupy_attn 0.1.0; PyTorch eager: PyTorch 2.11.0.")
    assert lines[2:6] == [
        "| kind: model, batch, tokens | ours us | PyTorch eager us | row kernels + cuBLAS us | best peer / ours "
        "| floor us |",
        "|---|---|---|---|---|---|",
        "| decode: 0.6B, 1, 1024 | 10.0 | 40.0 | 30.0 | 3.00 | 3.8 |",
        "| decode: 0.6B, 1, 1024 | 10.0 | - | 5.0 | 0.50 | 3.8 |",
    ]
    assert lines[7:] == [
        "- cuBLAS + FlashAttention-3 is missing: No module named 'x'",
        "- PyTorch eager is missing at decode 0.6B, 1, 1024: MemoryError",
        "- Left out, the budget was spent: decode 8B:1:1",
    ]


def test_rows_are_sorted_by_kind_model_batch_and_tokens(measured):
    row = measured(ours=FakeStack(10.0))
    cases = [("prefill", "0.6B", 1, 8), ("decode", "235B-A22B", 1, 8), ("decode", "8B", 2, 4), ("decode", "8B", 1, 16),
             ("decode", "8B", 1, 8), ("decode", "0.6B", 1, 8)]  # fmt: skip
    rows = [row | dict(zip(("kind", "model", "batch", "tokens"), case, strict=True)) for case in cases]
    shown = [line.split(" | ")[0][2:] for line in markdown(report_of(rows)).splitlines()[4:10]]
    assert shown == ["decode: 0.6B, 1, 8", "decode: 8B, 1, 8", "decode: 8B, 1, 16", "decode: 8B, 2, 4",
                     "decode: 235B-A22B, 1, 8", "prefill: 0.6B, 1, 8"]  # fmt: skip


PEERS = Path(__file__).resolve().parent.parent / "docs" / "results" / "peers"


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_the_published_table_is_that_of_its_json(name):
    lines = markdown(json.loads((PEERS / f"{name}.json").read_text())).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(bench_peers.CASES[name])
    page = (PEERS.parent / "peers.md").read_text()
    assert "\n".join(rows) in page
    assert lines[0] in page


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_the_published_sizes_are_those_of_their_json(name):
    report = json.loads((PEERS / f"sizes_{name}.json").read_text())
    table = bench_stack.table(name, report["rows"], report["ceilings"])
    assert table.count("\n") > len(report["rows"])
    assert table.strip() in (PEERS.parent / "sizes.md").read_text()


def run_main(*args, status=0):
    result = CliRunner().invoke(bench_peers.main, [str(a) for a in args])
    assert result.exit_code == status, result.output
    return result


def test_an_earlier_run_is_printed_and_drawn(measured, tmp_path):
    pytest.importorskip("matplotlib")
    row = measured(ours=FakeStack(10.0), torch_eager=FakeStack(40.0))
    rows = [row | {"tokens": 2048}, row, row | {"batch": 8}]
    (tmp_path / "run.json").write_text(json.dumps(report_of(rows)))
    printed = run_main("--from", tmp_path / "run.json", "--plot", tmp_path / "run.png").stdout
    assert printed.count("\n| decode: 0.6B") == 3
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert printed.splitlines()[-2:] == [f"Wrote {tmp_path / 'run.png'}.",
                                         "Not drawn, having one length only: decode 0.6B:8:1024."]  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(report_of([row])))
    alone = run_main("--from", tmp_path / "run.json", "--plot", tmp_path / "run.png").stdout
    assert alone.endswith(f"Wrote {tmp_path / 'run.png'}.\n")
    assert "does not end in .png" in run_main("--plot", "run.pdf", status=1).stderr
    wrong = row | {"missing": {"fa3": "not our work: what it adds is off by 1 (relative L2)"}}
    (tmp_path / "run.json").write_text(json.dumps(report_of([wrong])))
    run_main("--from", tmp_path / "run.json", status=1)


@pytest.mark.parametrize(
    ("held", "says"),
    [(b'{"rows": []}', "it lacks machine, version, dtype"), (b"3", "not iterable"), (b"{", "Expecting property name"),
     (b"\x89PNG\xff", "can't decode byte 0x89")],
)  # fmt: skip
def test_another_file_is_no_earlier_run(tmp_path, held, says):
    (tmp_path / "run.json").write_bytes(held)
    said = run_main("--from", tmp_path / "run.json", status=1).stderr
    assert said.startswith(f"Error: {tmp_path / 'run.json'} is no report of this tool (")
    assert says in said
    assert said.endswith("); name a file that --json wrote.\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("problem", "said"),
    [("no CUDA GPU is visible; use device='cpu' or check CUDA_VISIBLE_DEVICES.",
      "no CUDA GPU is visible; check CUDA_VISIBLE_DEVICES."),
     ("the GPU has compute capability 7.5, the kernels need 8.0; use device='cpu'.",
      "the GPU has compute capability 7.5, the kernels need 8.0; run this on a newer one.")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("tool", "options"),
    [(bench_peers, []), (bench_stack, []), (bench_stack, ["--profile", "0.6B:1:8", "--decode"]), (gpu_report, []),
     (small_case, [])],
)  # fmt: skip
def test_without_a_gpu_a_tool_says_so_in_one_sentence(monkeypatch, tool, options, problem, said):
    monkeypatch.setattr(stacks.cuda, "problem", lambda: problem)
    result = CliRunner().invoke(tool.main, options)
    assert (result.exit_code, result.output) == (1, f"Error: {said}\n")


def test_a_run_that_dies_leaves_what_it_had(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_peers.cupy.cuda, "Stream", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(bench_peers, "found_peers", lambda dtype: ({}, {}, {}))
    monkeypatch.setattr(bench_peers, "machine", dict)
    monkeypatch.setattr(bench_peers, "ceilings", lambda dtype: LIMITS)
    monkeypatch.setattr(bench_peers, "release", lambda: None)

    def measure(case, *_):
        if case.tokens == 2:
            raise KeyboardInterrupt
        return {"tokens": case.tokens}

    monkeypatch.setattr(bench_peers, "measure", measure)
    cases = [Case("decode", "0.6B", 1, n) for n in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        bench_peers.timed_report(cases, "float16", 60.0, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["rows"] == [{"tokens": 1}]


def test_without_pytorch_its_peers_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_peers", None)
    builders, versions, missing = bench_peers.found_peers("bfloat16")
    assert list(builders) == ["ours", "separate"]
    assert versions == {}
    assert list(missing) == ["torch_eager", "torch_compile", "fa3", "flashinfer", "cupy"]
    assert "torch_peers" in missing["fa3"]
    assert missing["cupy"] == "it does not run in bfloat16"


# The peers of PyTorch, on the CPU, with attention of PyTorch's in the place of the libraries that need a GPU.


@pytest.fixture
def torch_peers(monkeypatch):
    torch_peers = pytest.importorskip("torch_peers")
    monkeypatch.setattr(torch_peers, "COMPILE", {"dynamic": False, "backend": "eager"})
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", fake_fa3(torch_peers.torch))
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer(torch_peers.torch))
    return torch_peers


def attend(torch, q, k, v, causal):
    """Return attention of q [B, S, Hq, D] over k, v [B, T, Hkv, D], aligned at the end as libraries do."""
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2)


def fake_fa3(torch):
    module = types.ModuleType("fa3_fwd_interface")
    module.flash_attn_with_kvcache = lambda q, k, v, causal: attend(torch, q, k, v, causal)
    module.flash_attn_func = lambda q, k, v, causal: (attend(torch, q, k, v, causal), None)
    return module


def fake_flashinfer(torch):
    class Wrapper:
        def __init__(self, workspace, layout, **options):
            assert layout == "NHD"

        def plan(self, *args, causal=False, q_data_type, kv_data_type):
            *queries, starts, places, last = args[:-4]
            assert args[-4:-1] == (6, 2, 32)
            self.starts, self.places, self.last, self.page = starts.tolist(), places.long(), last.tolist(), args[-1]
            self.queries = queries[0].tolist() if queries else list(range(len(self.starts)))

        def run(self, q, pages):
            parts = []
            for i, last in enumerate(self.last):
                mine = self.places[self.starts[i] : self.starts[i + 1]]
                total = (len(mine) - 1) * self.page + last
                k, v = (p[mine].flatten(0, 1)[None, :total] for p in pages)
                parts.append(attend(torch, q[None, self.queries[i] : self.queries[i + 1]], k, v, True)[0])
            return torch.cat(parts)

    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = module.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    return module


@pytest.mark.parametrize("name", [name for name in LABELS if name not in stacks.BASELINES])
@pytest.mark.parametrize(("seq", "start"), [(21, 0), (1, 20), (1, 47)])
def test_a_peer_does_our_work(torch_peers, name, seq, start):
    config = ca.AttentionConfig.from_dict(
        {"hidden_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e6,
         "max_position_embeddings": 4096}
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, seq, 64), np.float32)
    peer = torch_peers.PEERS[name](config, batch=2, seq=seq, start=start, dtype="float32", device="cpu")
    y = x
    for i in range(2):
        weights = random_layer(config, seed=i)
        layer = ca.Attention(config, weights, "float32", "cpu")
        cache = layer.new_cache(2, 64)
        earlier = [rng.standard_normal((2, start, 2, 32), np.float32) for _ in range(2)]
        cache.k[:, :start], cache.v[:, :start] = earlier
        cache.assume(np.full(2, start))
        y = layer(y, cache, residual=y)
        peer.add_layer(weights, *map(torch_peers.torch.from_numpy, earlier))
    outputs = peer.run(torch_peers.torch.from_numpy(x))
    assert len(outputs) == 2
    assert ca.relative_l2(outputs[-1].numpy() - x, y - x) < 1e-5


def test_16_bit_weights_are_taken_bit_for_bit(torch_peers):
    for dtype in ("float16", "bfloat16"):
        array = np.linspace(-3, 3, 7).astype(ca.arrays.storage_dtype(dtype))
        assert torch_peers.from_numpy(array).float().tolist() == array.astype(np.float32).tolist()


def test_peers_that_see_no_gpu_are_missing(torch_peers):
    if torch_peers.torch.cuda.is_available():
        pytest.skip("PyTorch sees a GPU")
    found, missing = torch_peers.versions()
    assert found == {}
    assert set(missing) == set(torch_peers.PEERS)
    assert "sees no GPU" in missing["torch_eager"]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "dtype"), [("decode", "float16"), ("prefill", "bfloat16")])
def test_pytorch_beside_ours_on_a_gpu(kind, dtype):
    import cupy

    torch_peers = pytest.importorskip("torch_peers")
    if not torch_peers.torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    builders = {"ours": stacks.STACKS["ours"], **torch_peers.stack_builders(["torch_eager"])}
    with cupy.cuda.Stream(non_blocking=True) as stream, torch_peers.on_stream(stream.ptr):
        row = bench_peers.measure(Case(kind, "0.6B", 2, 100), dtype, builders, LIMITS)
    assert row["missing"] == {}
    assert min(row["torch_eager_us"], row["ours_us"]) > row["floor_us"]


def test_traffic_is_what_goes_beyond_a_mere_reading(monkeypatch):
    moved = {"read": (100e6, 210e6), "ours": (101e6, 215e6), "cupy": (104e6, 240e6), "separate": (102e6, 220e6)}

    def traffic(case, what, layers, dtype):
        dram, l2 = moved[what]
        return {"kind": case.kind, "model": case.model, "batch": 1, "tokens": 8, "what": what, "layers": layers,
                "kernels": 3.0, "dram_bytes": dram, "l2_bytes": l2, "minimum_bytes": 99e6,
                "beyond_weights_and_cache": dram - 98e6}  # fmt: skip

    monkeypatch.setattr(bench_stack, "traffic", traffic)
    rows = bench_stack.traffic_rows(bench_stack.Case.parse("decode", "0.6B:1:8"), 2)
    assert [row["what"] for row in rows] == list(moved)
    assert [row.get("dram_bytes_beyond") for row in rows] == [None, 1e6, 4e6, 2e6]
    lines = bench_stack.traffic_table(rows).splitlines()
    assert lines[2] == "| decode 0.6B, 1, 8 | reading weights and cache | 3.0 | 100.00 | 2.00 |  | 210.00 |  | 99.00 |"
    assert lines[3] == "| decode 0.6B, 1, 8 | ours | 3.0 | 101.00 | 3.00 | 1.00 | 215.00 | 5.00 | 99.00 |"
