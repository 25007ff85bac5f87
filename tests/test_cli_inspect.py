"""``cupy-attn inspect``, ``doctor`` and ``bench``."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_helpers import dumped, invoke, layer_of, png_size, read, refused, write_small
from conftest import make_config

import cupy_attn as ca
from cupy_attn import cuda, demo, doctor, io, plots
from cupy_attn.arrays import STORAGE_DTYPES
from cupy_attn.bench import MODELS
from cupy_attn.cpu import CpuBackend
from cupy_attn.weights import NormStats, largest_pair_product, read_norms

# inspect, doctor, bench


def test_inspect_lists_every_layer(model):
    printed = invoke("inspect", model).stdout
    maxima = [largest for largest, *_ in demo.K_NORM_STATISTICS]
    rows = [line.split() for line in printed.splitlines()[4 : 4 + len(maxima)]]
    assert [row[:2] for row in rows] == [[str(i), f"{largest:.4g}"] for i, largest in enumerate(maxima)]
    # Layer 8 has no weight above 20, but scores as large as such weights make: 12 with a q weight of about one.
    precise = [largest > 20 or i == 8 for i, largest in enumerate(maxima)]
    assert [row[-1] for row in rows] == ["precise" if p else "normal" for p in precise]
    assert f"{sum(precise)} of {len(maxima)} layers take the precise path: max |k| above 20, " in printed


def test_inspect_prints_one_json_object(small):
    told = json.loads(invoke("inspect", small, "--json").stdout)
    assert set(told) == {"model", "threshold", "config", "layers"}
    assert ca.AttentionConfig.from_dict(told["config"]) == ca.AttentionConfig.from_pretrained(small)
    for row in told["layers"]:
        weights = layer_of(small, row["layer"]).weights
        assert row["k_norm"]["max_abs"] == weights.k_norm_stats.max_abs
        assert row["q_norm"]["mean"] == weights.q_norm_stats.mean
        assert row["largest_pair_product"] == largest_pair_product(weights.q_norm, weights.k_norm)
        assert row["spread"] == weights.q_norm_stats.rms * weights.k_norm_stats.rms
        assert row["precise"] is layer_of(small, row["layer"]).precise
    assert len(told["layers"]) == 2


def test_inspect_refuses_nan_weights(tmp_path):
    config = make_config(num_hidden_layers=2)
    write_small(tmp_path, config, **{"model.layers.1.self_attn.k_norm.weight": np.full(32, np.nan, np.float32)})
    refused("inspect", tmp_path, "--json", says="layers.1.self_attn.k_norm.weight holds NaN or Inf")


def test_inspect_draws_a_png(small, tmp_path):
    pytest.importorskip("matplotlib")
    assert f"Wrote {tmp_path / 'k.png'}." in invoke("inspect", small, "--plot", tmp_path / "k.png").stdout
    assert png_size(tmp_path / "k.png") == (1200, 780)


def test_the_picture_says_why_a_layer_is_shaded(model, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    invoke("inspect", model, "--plot", tmp_path / "k.png")
    caption = " ".join(drawn[0].get_supxlabel().split())
    assert "max |k_norm.weight| is above 20, " in caption
    assert "product of weights of Q and K in a rotated pair above 8 or rms(q_norm.weight) times" in caption
    assert "rms(k_norm.weight) above 2.5" in caption
    for layer, q_norm, k_norm in read_norms(model, ca.AttentionConfig.from_pretrained(model)):
        q, k = NormStats.of(q_norm), NormStats.of(k_norm)
        precise = k.max_abs > 20 or largest_pair_product(q_norm, k_norm) > 8 or q.rms * k.rms > 2.5
        spans = [patch.get_x() for patch in drawn[0].axes[0].patches]
        assert (layer - 0.5 in spans) == precise


def test_inspect_of_a_dump_says_what_each_head_does(model):
    path = model / "dump-layer0.safetensors"
    told = json.loads(invoke("inspect", model, "--dump", path, "--json").stdout)
    (dump,) = told["dumps"]
    assert (dump["dump"], dump["layer"], dump["shape"]) == (str(path), 0, [1, demo.TOKENS])
    assert dump["source"] == "q_rope and k_rope"
    largest = read(path)["row_max"].max(axis=(0, 2))
    for head, most in zip(dump["heads"], largest, strict=True):
        assert set(head) == {"head", "min_score", "max_score", "relative_entropy", "first_key", "flags"}
        assert head["max_score"] == pytest.approx(most, rel=1e-5)
        assert 0 < head["relative_entropy"] < 1
        assert 0 < head["first_key"] < 1
        assert head["flags"] == []
    printed = invoke("inspect", model, "--dump", path).stdout
    rows = [line.split() for line in printed.splitlines()[4:8]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[3] for row in rows] == [f"{head['relative_entropy']:.3f}" for head in dump["heads"]]
    assert printed.endswith("\nLayer 0: 4 of 4 heads are healthy.\n")


def sick(array):
    """Return q_rope [1, S, 4, D] with a NaN in head 1, and head 3 of zeros."""
    array = array.copy()
    array[0, 4, 1, 0], array[:, :, 3] = np.nan, 0
    return array


def test_inspect_flags_heads_and_ends_well(small):
    def dead(array):
        return array * np.array([1, 1, 0, 1])[:, None]

    path = dumped(small, q_rope=sick, attention=dead)
    printed = invoke("inspect", small, "--dump", path, "--layer", 0).stdout
    assert "Layer 0: 1 of 4 heads is healthy; NaN or Inf: head 1; uniform: head 3; dead: head 2." in printed
    both = invoke("inspect", small, "--dump", path, "--dump", dumped(small, "other.npz"), "--layer", 0)
    assert both.stdout.startswith(printed.rstrip() + "\n\n")
    assert both.stdout.endswith("\nLayer 0: 4 of 4 heads are healthy.\n")
    json.loads(invoke("inspect", small, "--dump", path, "--layer", 0, "--json").stdout, parse_constant=pytest.fail)


def test_inspect_takes_what_run_writes(small, tmp_path):
    invoke("run", small, small / "x.npy", "--layer", 1, "--out", tmp_path / "q.safetensors", "--stages", "q,k")
    invoke("run", small, small / "x.npy", "--layer", 1, "--out", tmp_path / "all.npz", "--stages", "all")
    named = json.loads(invoke("inspect", small, "--dump", tmp_path / "q.safetensors", "--json").stdout)["dumps"][0]
    told = json.loads(invoke("inspect", small, "--dump", tmp_path / "all.npz", "--layer", 1, "--json").stdout)
    (whole,) = told["dumps"]
    assert (named["layer"], named["source"]) == (1, "q and k")
    assert (whole["layer"], whole["source"]) == (1, "q_rope and k_rope")
    for one, other in zip(named["heads"], whole["heads"], strict=True):
        for measure in ("min_score", "max_score", "relative_entropy", "first_key"):
            assert one[measure] == pytest.approx(other[measure], rel=1e-4, abs=1e-5)


def test_inspect_draws_the_entropy_of_a_dump(small, tmp_path):
    pytest.importorskip("matplotlib")
    path = dumped(small, q_rope=sick)
    printed = invoke("inspect", small, "--dump", path, "--layer", 0, "--plot", tmp_path / "e.png").stdout
    assert printed.endswith(f"Wrote {tmp_path / 'e.png'}.\n")
    width, height = png_size(tmp_path / "e.png")
    assert (width, 300 < height < 400) == (1320, True)
    options = ("--dump", path) * 2
    invoke("inspect", small, *options, "--layer", 0, "--plot", tmp_path / "e.png", "--json")
    assert png_size(tmp_path / "e.png") > (width, 1.5 * height)


def test_inspect_refuses_dumps_that_do_not_fit(small, model, tmp_path):
    path, named = dumped(small, "dump.npz"), model / "dump-layer0.safetensors"
    refused("inspect", small, "--layer", 0, status=2, says="pass it with --dump")
    refused("inspect", small, "--key", "x", status=2, says="pass it with --dump")
    refused("inspect", small, "--dump", tmp_path / "none.npz", says="does not exist")
    refused("inspect", small, "--dump", path, says=f"{path} does not say which layer it is of; pass --layer.")
    refused("inspect", small, "--dump", path, "--layer", 2, says="layer 2 is out of range; the model has layers 0 to 1")
    refused("inspect", model, "--dump", named, "--layer", 3, says="is of layer 0, not 3; leave out --layer or")
    refused("inspect", small, "--dump", named, says="the dump's")
    refused("inspect", small, "--dump", small / "x.npy", "--layer", 0, says="the dump holds no stages; attention")
    refused("inspect", small, "--dump", path, "--layer", 0, "--key", "z", says="none is named z")
    arrays, metadata = io.load_arrays(named)
    io.save_arrays(tmp_path / "odd.safetensors", arrays, metadata | {"layer": "first"})
    refused("inspect", model, "--dump", tmp_path / "odd.safetensors", says="of layer 'first', which is no number")
    io.save_arrays(tmp_path / "odd.safetensors", arrays | {"positions": np.zeros(demo.TOKENS, np.int64)}, metadata)
    refused("inspect", model, "--dump", tmp_path / "odd.safetensors", says="they must increase")


def compile_one_kernel(monkeypatch) -> None:
    """Let doctor compile one of the common kernels: all of them take half a minute on two cores."""
    some = doctor.warmup.common()[:1]
    monkeypatch.setattr(doctor.warmup, "common", lambda: some)


def test_doctor_finds_this_machine_healthy(monkeypatch):
    told = json.loads(invoke("doctor", "--json").stdout)
    assert set(told) == {"versions", "cpu", "gpu", "nvrtc", "cache", "self_test", "ok"}
    assert told["ok"] is True
    assert [row["dtype"] for row in told["self_test"] if row["device"] == "cpu"] == list(STORAGE_DTYPES)
    assert told["gpu"]["usable"] is (cuda.problem() is None)
    assert told["versions"]["cupy_attn"] == ca.__version__
    compile_one_kernel(monkeypatch)
    printed = invoke("doctor").stdout
    for section in ("versions:", "cpu:", "gpu:", "nvrtc:", "cache:", "self-test"):
        assert f"{section}" in printed


def test_doctor_notices_a_layer_that_is_wrong(monkeypatch):
    compile_one_kernel(monkeypatch)
    usual = CpuBackend.forward
    monkeypatch.setattr(CpuBackend, "forward", lambda *args: usual(*args) * np.float32(np.nan))
    assert "MISSED" in invoke("doctor", status=1).stdout
    told = json.loads(invoke("doctor", "--json", status=1).stdout, parse_constant=pytest.fail)
    assert told["ok"] is False


def test_bench_times_every_phase(small):
    options = ("--tokens", 4, "--repeats", 2)
    told = json.loads(invoke("bench", "--model", small, "--json", *options).stdout)
    assert set(told) == {"model", "batch", "tokens", "dtype", "device", "rows"}
    assert told["tokens"] == [4]
    times = {row["what"]: row for row in told["rows"]}
    assert list(times) == ["rms_norm", "project_qkv", "split_heads", "qk_norm", "apply_rope", "gqa_attention",
                           "project_output", "phases together", "layer, prefill", "layer, decode after it"]  # fmt: skip
    assert all(0 < row["min_us"] <= row["median_us"] and row["repeats"] == 2 for row in told["rows"])
    phases = list(times.values())[:7]
    assert times["phases together"]["median_us"] == pytest.approx(sum(row["median_us"] for row in phases))
    assert "phases together" in invoke("bench", "--model", small, *options).stdout


def test_bench_takes_no_more_tokens_than_the_model_has_positions(small, tmp_path):
    config = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": 200}
    (small / "config.json").write_text(json.dumps(config))
    options = ("--model", small, "--repeats", 1)
    assert json.loads(invoke("bench", *options, "--json").stdout)["tokens"] == [199]
    assert json.loads(invoke("bench", *options, "--json", "--tokens", 199).stdout)["tokens"] == [199]
    refused("bench", *options, "--tokens", 3, "--tokens", 200, says="--tokens 200 and a token decoded after them are "
            "more than the model's 200 positions; pass --tokens 199 or fewer.")  # fmt: skip
    pytest.importorskip("matplotlib")
    told = json.loads(invoke("bench", *options, "--json", "--plot", tmp_path / "b.png").stdout)
    assert told["tokens"] == [128, 199]


def test_bench_names_the_published_sizes(tmp_path):
    sizes = ", ".join(MODELS)
    for name in ("7B", tmp_path / "none"):
        refused("bench", "--model", name, says=f"--model {name} does not exist and is no published size; name a model "
                f"folder or one of {sizes}.")  # fmt: skip
    refused("bench", "--model", tmp_path, says=f"{tmp_path / 'config.json'} does not exist; name a model folder")


def test_bench_times_several_lengths_and_draws_them(small, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--model", small, "--tokens", 8, "--tokens", 3, "--tokens", 8, "--repeats", 1)
    told = json.loads(invoke("bench", *options, "--json", "--plot", tmp_path / "b.png").stdout)
    assert told["tokens"] == [3, 8]
    assert [row["tokens"] for row in told["rows"]] == [3] * 10 + [8] * 10
    width, height = png_size(tmp_path / "b.png")
    printed = invoke("bench", *options, "--plot", tmp_path / "b.png").stdout
    assert printed.count("phases together") == 2
    assert printed.endswith(f"Wrote {tmp_path / 'b.png'}.\n")
    assert png_size(tmp_path / "b.png") == (width, height)
