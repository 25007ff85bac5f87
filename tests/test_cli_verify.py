"""``cupy-attn verify``: what it passes, what it notices, where a dump departs, pictures."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from cli_helpers import dumped, invoke, layer_of, png_size, read, refused
from conftest import make_config, make_hidden

from cupy_attn import cli, cli_bench, io, reference
from cupy_attn.accuracy import BARS
from cupy_attn.arrays import STORAGE_DTYPES
from cupy_attn.cpu import CpuBackend
from cupy_attn.verify import verify_layer

# verify


def test_verify_passes_and_shows_every_stage(small):
    printed = invoke("verify", small, dumped(small)).stdout
    for stage in (*cli.RUN_STAGES, "y", "y (max)", "y (decode)"):
        assert f"\n{stage} " in printed
    assert "Against the dump" in printed
    assert "error: relative L2; of y (max): max |error| / max |y|" in printed
    assert "All stages are within their bars." in printed
    assert "Against the dump" not in invoke("verify", small, small / "x.npy").stdout


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("options", [[], ["--tokens", "3"], ["--tokens", "1"], ["--tokens", "999"], ["--layer", "1"],
                                     ["--positions", "40"], ["--angles", "float32"]])  # fmt: skip
def test_verify_passes_with_every_option(small, dtype, options):
    told = json.loads(invoke("verify", small, small / "x.npy", "--dtype", dtype, "--json", *options).stdout)
    assert told["passed"] is True
    assert told["dtype"] == dtype
    assert told["layer"] == (1 if "--layer" in options else 0)
    assert told["shape"] == [1, {"3": 3, "1": 1}.get(options[-1], 7) if "--tokens" in options else 7, 96]


def test_verify_with_tokens_cuts_the_dump_and_its_positions(small):
    path = dumped(small, "dump.npz")
    arrays = read(path) | {"positions": np.arange(7)}
    arrays["y"][:, 4:] = np.nan
    arrays["lse"][:, :, 4:] = np.nan
    np.savez(path, **arrays)
    invoke("verify", small, path, "--layer", 0, "--tokens", 4)
    assert "MISSED: lse, y;" in invoke("verify", small, path, "--layer", 0, status=1).stdout


VERIFY_KEYS = {"passed", "layer", "dtype", "device", "shape", "reference", "dump", "departure", "collapse",
               "config_differences"}  # fmt: skip


@pytest.mark.parametrize("stage", [*cli.RUN_STAGES, "y"])
@pytest.mark.parametrize("damage", ["wrong", "NaN"])
def test_verify_names_the_stage_of_a_dump_that_is_wrong(small, stage, damage):
    def spoil(array):
        array = array.copy()
        array.flat[0] = np.nan if damage == "NaN" else 3 * np.abs(array).max() * np.sqrt(array.size)
        return array

    path = dumped(small, **{stage: spoil})
    printed = invoke("verify", small, path, status=1).stdout
    assert f"MISSED: {stage};" in printed
    assert f"First departure: {stage}, most at sequence 0, " in printed
    result = invoke("verify", small, path, "--json", status=1)
    told = json.loads(result.stdout, parse_constant=pytest.fail)
    assert set(told) == VERIFY_KEYS
    assert told["passed"] is False
    assert [row["stage"] for row in told["dump"] if not row["passed"]] == [stage]
    assert all(row["passed"] for row in told["reference"])
    departure = told["departure"]
    assert departure["stage"] == stage
    assert set(departure["where"].values()) == {0}
    assert departure["dtype_alone"] < departure["relative_l2"] if damage == "wrong" else departure["dump"] is None


def test_verify_says_where_a_dump_departs(small):
    def spoil(array):
        array = array.copy()
        array[0, 5, 1, 3] += 1000
        return array

    path = dumped(small, k_norm=spoil, output=lambda array: array + 1)  # k_norm comes first
    departure = json.loads(invoke("verify", small, path, "--json", status=1).stdout)["departure"]
    assert departure["stage"] == "k_norm"
    assert departure["where"] == {"sequence": 0, "token": 5, "head": 1, "dim": 3}
    assert departure["dump"] - departure["ours"] == pytest.approx(1000, abs=1)
    assert "token 5, head 1, dim 3: " in invoke("verify", small, path, status=1).stdout
    assert json.loads(invoke("verify", small, dumped(small), "--json").stdout)["departure"] is None


def dumped_by_run(folder, layer):
    path = folder / f"run-layer{layer}.safetensors"
    invoke("run", folder, folder / "x.npy", "--layer", layer, "--out", path, "--stages", "all")
    return path


def test_verify_takes_the_layer_that_a_dump_says(small):
    path = dumped_by_run(small, 1)
    assert json.loads(invoke("verify", small, path, "--json").stdout)["layer"] == 1
    refused("verify", small, path, "--layer", 0, says="is of layer 1, not 0; leave out --layer")


def test_verify_does_not_guess_the_layer_of_stages(small, tmp_path):
    path = tmp_path / "y.npz"
    invoke("run", small, small / "x.npy", "--layer", 1, "--out", path, "--stages", "q_norm")
    refused("verify", small, path, says=f"{path} does not say which layer it is of; pass --layer.")
    refused("verify", small, small / "x.npy", path, says=f"{path} does not say which layer it is of; pass --layer.")
    assert json.loads(invoke("verify", small, path, "--layer", 1, "--json").stdout)["layer"] == 1
    np.savez(path, x=np.load(small / "x.npy"), positions=np.arange(7))
    assert json.loads(invoke("verify", small, path, "--json").stdout)["layer"] == 0


OTHER_VALUES = {
    "nothing": ({}, None),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
              "rope_theta 10000.0, the model has 1000000.0"),
    "eps, bias": ({"rms_norm_eps": 1e-5, "attention_bias": True},
                  "rms_norm_eps 1e-05, the model has 1e-06; attention_bias true, the model has false"),
    "scaling": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
                "rope_type linear, the model has default; factor 2.0, the model has 1.0"),
    "window of this layer": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
                             "sliding_window 8, the model has null"),
    "window of another layer": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
                                 "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_VALUES)
def test_a_dump_of_another_config_says_what_differs(small, kind):
    changes, says = OTHER_VALUES[kind]
    path = dumped(small)
    arrays, metadata = io.load_arrays(path)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    io.save_arrays(path, arrays, metadata | {"config": json.dumps(config | {"num_hidden_layers": 2} | changes)})
    line = None if says is None else f"the dump was made with {says}."
    for printed in (invoke("verify", small, path).stdout, invoke("inspect", small, "--dump", path).stdout):
        assert [text for text in printed.splitlines() if text.startswith("Config")] == [f"Config: {line}"] * bool(line)
    both = invoke("verify", small, path, dumped(small, "plain.safetensors")).stdout
    passed = "All stages of all layers are within their bars."
    assert both.splitlines()[-1] == (f"Config of {path.name}: {line}" if line else passed)
    for told in (json.loads(invoke("verify", small, path, "--json").stdout),
                 json.loads(invoke("inspect", small, "--dump", path, "--json").stdout)["dumps"][0]):  # fmt: skip
        differences = told["config_differences"]
        assert bool(differences) == bool(says)
        assert all(f"{one['name']} " in says and one["dump"] != one["model"] for one in differences)


def test_a_dump_without_a_config_or_with_a_damaged_one(small):
    path = dumped(small)
    assert json.loads(invoke("verify", small, path, "--json").stdout)["config_differences"] is None
    arrays, metadata = io.load_arrays(path)
    for bad in ("{", "[]", "{}", '{"hidden_size": "wide"}', "null"):
        io.save_arrays(path, arrays, metadata | {"config": bad})
        refused("verify", small, path, says=f"{path} holds a config that cannot be read (")
        refused("inspect", small, "--dump", path, says=f"{path} holds a config that cannot be read (")


def test_verify_of_several_dumps_is_one_table(small):
    paths = [dumped_by_run(small, layer) for layer in (0, 1)]
    printed = invoke("verify", small, *paths).stdout
    assert "2 layers of" in printed
    for layer, path in enumerate(paths):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{layer}, {path.name} "))
        assert line.split()[-2:] == ["ok", "ok"]
    assert printed.endswith("All stages of all layers are within their bars.\n")
    told = json.loads(invoke("verify", small, *paths, "--json").stdout)
    assert told["passed"] is True
    assert [one["layer"] for one in told["layers"]] == [0, 1]
    assert [one["activations"] for one in told["layers"]] == [str(path) for path in paths]
    assert all(set(one) == VERIFY_KEYS | {"activations"} for one in told["layers"])


def test_verify_of_several_names_the_layer_that_misses(small):
    path = dumped_by_run(small, 1)
    arrays, metadata = io.load_arrays(path)
    io.save_arrays(path, arrays | {"k_norm": arrays["k_norm"] * 2}, metadata)
    printed = invoke("verify", small, dumped(small), path, status=1).stdout
    assert "MISSED: layer 1 of run-layer1.safetensors (k_norm). Verify such a layer alone" in printed
    lines = [line.split() for line in printed.splitlines() if line.endswith((" ok", " MISSED"))]
    assert [line[-2:] for line in lines] == [["ok", "ok"], ["k_norm", "MISSED"]]
    assert json.loads(invoke("verify", small, dumped(small), path, "--json", status=1).stdout)["passed"] is False


def test_files_of_the_same_name_are_told_apart(small, tmp_path):
    (tmp_path / "other").mkdir()
    path, other = dumped(small), tmp_path / "other" / "dump.safetensors"
    arrays, metadata = io.load_arrays(path)
    io.save_arrays(other, arrays | {"y": arrays["y"] * 2}, metadata)
    printed = invoke("verify", small, path, other, status=1).stdout
    assert f"MISSED: layer 0 of {other} (y). " in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("0, ")] == [str(path), str(other)]


def test_verify_of_several_layers_on_the_same_activations(small, tmp_path):
    options = ("--layer", 1, "--layer", 0, "--layer", 1)
    told = json.loads(invoke("verify", small, small / "x.npy", *options, "--json", "--tokens", 3).stdout)
    assert [(one["layer"], one["shape"]) for one in told["layers"]] == [(1, [1, 3, 96]), (0, [1, 3, 96])]
    table = invoke("verify", small, small / "x.npy", *options).stdout.splitlines()
    assert [line.split()[0] for line in table[4:6]] == ["1", "0"]
    pytest.importorskip("matplotlib")
    refused("verify", small, small / "x.npy", *options, "--plot", tmp_path / "v.png", status=2,
            says="--plot draws one layer, 2 are asked for", where=tmp_path)  # fmt: skip


@pytest.mark.parametrize("damage", ["wrong", "NaN"])
def test_verify_notices_a_backend_that_is_wrong(small, monkeypatch, damage):
    usual = CpuBackend.forward

    def spoiled(self, plan, cache):
        y = usual(self, plan, cache)
        if plan.stages is not None:
            plan.stages["attention"][..., 0] *= 1.5 if damage == "wrong" else np.nan
        return y * np.asarray(1.5 if damage == "wrong" else np.nan, y.dtype)

    monkeypatch.setattr(CpuBackend, "forward", spoiled)
    printed = invoke("verify", small, small / "x.npy", status=1).stdout
    assert "MISSED: attention, y, y (max), y (decode);" in printed
    assert ("Collapse: attention" in printed) == (damage == "NaN")
    result = invoke("verify", small, small / "x.npy", "--json", status=1)
    assert json.loads(result.stdout, parse_constant=pytest.fail)["passed"] is False


def test_verify_refuses_a_dump_that_does_not_fit(small):
    for change in (lambda a: a[:, :-1], lambda a: a[..., 0], lambda a: a.astype(str), lambda a: np.zeros(())):
        path = dumped(small, "dump.npz", q_norm=change)
        refused("verify", small, path, "--layer", 0, says="the dump's q_norm")
        refused("verify", small, path, "--layer", 0, "--tokens", 2, says="the dump's q_norm")


def test_verify_refuses_more_tokens_than_the_reference_takes(small, tmp_path):
    np.save(tmp_path / "long.npy", make_hidden(make_config(max_position_embeddings=9000), 1, 5001))
    config = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": 9000}
    (small / "config.json").write_text(json.dumps(config))
    message = refused("verify", small, tmp_path / "long.npy", says="pass --tokens 5000 or fewer")
    assert "5001 tokens" in message
    invoke("verify", small, tmp_path / "long.npy", "--tokens", 10)


def test_errors_by_token_are_those_of_the_token(small):
    def spoil(axis):
        return lambda array: np.where(np.arange(7).reshape([-1] + [1] * (array.ndim - axis - 1)) == 5, np.nan, array)

    dump = io.load_dump(dumped(small, k_norm=spoil(1), lse=spoil(2)))
    dump.stages["y"][0, 2] *= 3
    layer = layer_of(small)
    result = verify_layer(layer, dump.hidden_states, positions=np.arange(7) + 9, expected=dump.stages)
    assert result.positions.tolist() == [list(range(9, 16))]
    assert result.y_by_token.shape == (7,)
    assert (result.y_by_token <= BARS["float32"]).all()
    for stage in ("k_norm", "lse"):
        assert np.isinf(result.dump_by_token[stage]).tolist() == [i == 5 for i in range(7)]
    off = result.dump_by_token["y"]
    assert off[2] == pytest.approx(2 / 3, rel=1e-3)
    assert (off[[0, 1, 3, 4, 5, 6]] < 1e-4).all()


@pytest.mark.parametrize("options", [[], ["--tokens", "1"], ["--dtype", "float16"]])
def test_verify_draws_a_png(small, tmp_path, options):
    pytest.importorskip("matplotlib")
    for source in (small / "x.npy", dumped(small)):
        printed = invoke("verify", small, source, "--plot", tmp_path / "v.png", *options).stdout
        assert printed.endswith(f"Wrote {tmp_path / 'v.png'}.\n")
        assert png_size(tmp_path / "v.png") == (1560, 780)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_verify_draws_a_miss_too(small, tmp_path, bad):
    def spoil(array):
        array = array.copy()
        array[0, 3] = bad
        return array

    pytest.importorskip("matplotlib")
    path = dumped(small, attention=spoil, v=lambda array: array * np.nan)
    invoke("verify", small, path, "--plot", tmp_path / "v.png", "--json", status=1)
    assert png_size(tmp_path / "v.png") == (1560, 780)


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_run(small, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(reference, "forward", lambda *args, **options: pytest.fail("ran"))
    monkeypatch.setattr(cli_bench, "run_bench", lambda *args, **options: pytest.fail("ran"))
    commands = (("verify", small, small / "x.npy"), ("inspect", small), ("bench", "--model", small))
    for command in commands:
        refused(*command, "--plot", tmp_path / "k.pdf", says=".png", where=tmp_path)
        refused(*command, "--plot", small, says=".png", where=tmp_path)
        refused(*command, "--plot", tmp_path / "absent" / "k.png", says="make the folder first", where=tmp_path)
        (tmp_path / "k.png").mkdir(exist_ok=True)
        refused(*command, "--plot", tmp_path / "k.png", says="k.png is a folder", where=tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for command in commands:
        refused(*command, "--plot", tmp_path / "v.png", says="pip install 'cupy-attn[plot]'.", where=tmp_path)
