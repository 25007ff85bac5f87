"""The command line: every command does what it prints, every refusal is one sentence and leaves nothing behind."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import sys

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_config, make_hidden, make_weights

import cupy_attn as ca
from cupy_attn import cli, cli_bench, cuda, demo, io, reference
from cupy_attn.accuracy import BARS, relative_l2
from cupy_attn.arrays import BFLOAT16, STORAGE_DTYPES
from cupy_attn.cpu import CpuBackend
from cupy_attn.verify import verify_layer
from cupy_attn.weights import INDEX_NAME

SUFFIXES = (".npy", ".npz", ".safetensors")


def invoke(*args, status=0):
    """Run ``cupy-attn`` on the CPU unless told otherwise, and check its exit status."""
    args = [str(a) for a in args]
    if args[0] in ("demo", "run", "verify", "bench") and "--device" not in args:
        args += ["--device", "cpu"]
    result = CliRunner().invoke(cli.main, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result


def listing(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def refused(*args, status=1, says="", where=None) -> str:
    """Run a command that must fail: one "Error: ..." sentence, nothing on standard output, nothing written."""
    before = None if where is None else listing(where)
    result = invoke(*args, status=status)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    if status == 1:
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        assert lines[0].endswith(".")
    else:
        assert [line.startswith("Error: ") for line in lines].count(True) == 1
    assert says in result.stderr
    assert before is None or listing(where) == before
    return result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a demo checkpoint in ``model``; nothing in it is changed by a test."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "printed").write_text(invoke("demo", folder / "model").stdout)
    return folder


@pytest.fixture(scope="module")
def model(made):
    return made / "model"


@pytest.fixture
def small(tmp_path):
    """Return a checkpoint of two layers in one file: 96 wide, 4:2 heads of 32, and activations beside it."""
    folder = tmp_path / "small"
    folder.mkdir()
    write_small(folder, make_config(num_hidden_layers=2))
    return folder


def write_small(folder, config, **changes):
    """Write a checkpoint and x.npy, [7, 96] float32; ``changes`` replaces tensors by name."""
    tensors = {}
    for layer in range(2):
        tensors |= make_weights(config, layer=layer, seed=layer).to_dict(config)
    tensors |= changes
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    io.save_arrays(folder / "model.safetensors", kept)
    np.save(folder / "x.npy", make_hidden(config, 1, 7)[0])


def layer_of(folder, index=0, dtype="float32") -> ca.Attention:
    config = ca.AttentionConfig.from_pretrained(folder)
    return ca.Attention(config, ca.AttentionWeights.from_pretrained(folder, index, config=config), dtype, "cpu")


def read(path):
    return io.load_arrays(path)[0]


# demo


def test_demo_makes_a_checkpoint_with_the_published_statistics(made, model):
    assert listing(model) > {"config.json", INDEX_NAME, "hidden_states.npy", "dump-layer0.safetensors"}
    config = ca.AttentionConfig.from_pretrained(model)
    for layer, (largest, mean, std) in enumerate(demo.K_NORM_STATISTICS):
        stats = ca.AttentionWeights.from_pretrained(model, layer, config=config).k_norm_stats
        assert stats.max_abs == largest
        assert stats.mean == pytest.approx(mean, rel=0.05)
        assert stats.std == pytest.approx(std, rel=0.1)
    printed = (made / "printed").read_text()
    assert printed.count(": ok.") == 3
    assert "MISSED" not in printed


def test_demo_is_the_same_every_time(tmp_path, model):
    invoke("demo", tmp_path / "again")
    assert listing(tmp_path / "again") == listing(model)
    for file in model.iterdir():
        again = tmp_path / "again" / file.name
        if file.suffix != ".safetensors":
            assert again.read_bytes() == file.read_bytes(), file.name
            continue
        (a, a_metadata), (b, b_metadata) = io.load_arrays(file), io.load_arrays(again)
        assert a_metadata == b_metadata
        assert {n: (t.dtype, t.tobytes()) for n, t in a.items()} == {n: (t.dtype, t.tobytes()) for n, t in b.items()}


def test_what_demo_says_to_try_next_works(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (made / "printed").read_text().partition("Try next:\n")[2].splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [command[:2] for command in commands] == [["cupy-attn", name] for name in ("inspect", "verify", "run",
                                                                                     "bench")]  # fmt: skip
    for command in commands:
        invoke(*command[1:])
    assert set(read(tmp_path / "y.npz")) == {"y", "q_norm", "k_norm", "hidden_states", "positions"}


def test_demo_in_a_folder_whose_name_needs_quotes(tmp_path):
    printed = invoke("demo", tmp_path / "my demo; $x").stdout
    invoke(*shlex.split(printed.partition("Try next:\n")[2].splitlines()[0])[1:])


def test_demo_replaces_only_a_demo(tmp_path):
    folder = tmp_path / "model"
    invoke("demo", folder)
    refused("demo", folder, says="--force", where=folder)
    (folder / "config.json").write_text("{}")
    invoke("demo", folder, "--force")
    invoke("inspect", folder)
    (folder / "thesis.tex").write_text("mine")
    refused("demo", folder, "--force", says="thesis.tex", where=folder)
    refused("demo", folder / "thesis.tex", says="is a file")
    refused("demo", folder / "thesis.tex" / "deep", says="cannot be made")


def test_demo_without_the_gpu_it_was_told_to_use_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "problem", lambda: "no GPU here; use device='cpu'.")
    refused("demo", tmp_path / "model", "--device", "cuda", says="no GPU here", where=tmp_path)


# run


@pytest.mark.parametrize("suffix_in", SUFFIXES)
@pytest.mark.parametrize("suffix_out", SUFFIXES)
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_run_reads_and_writes_every_format_in_both_ranks(small, tmp_path, suffix_in, suffix_out, batch):
    x = make_hidden(make_config(), batch or 1, 5, dtype="float16")
    io.save_arrays(tmp_path / f"x{suffix_in}", {"hidden_states": x[0] if batch is None else x})
    out = tmp_path / f"y{suffix_out}"
    invoke("run", small, tmp_path / f"x{suffix_in}", "--layer", 1, "--out", out)
    y = read(out)["hidden_states" if suffix_out == ".npy" else "y"]
    expected = layer_of(small, 1, "float16")(x)
    assert y.dtype == np.float16
    assert np.array_equal(y, expected[0] if batch is None else expected)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_run_takes_its_dtype_from_the_input_or_the_option(small, tmp_path, dtype):
    x = make_hidden(make_config(), 1, 5, dtype=dtype)
    io.save_arrays(tmp_path / "x.safetensors", {"x": x})
    out = tmp_path / "y.safetensors"
    for options in ([], ["--dtype", "float32"]):
        invoke("run", small, tmp_path / "x.safetensors", "--out", out, *options)
        wanted = options[1] if options else dtype
        assert read(out)["y"].dtype == STORAGE_DTYPES[wanted]
        assert np.array_equal(read(out)["y"], layer_of(small, 0, wanted)(x.astype(STORAGE_DTYPES[wanted])))


def test_run_of_float64_is_float32(small, tmp_path):
    np.save(tmp_path / "x.npy", np.load(small / "x.npy").astype(np.float64))
    invoke("run", small, tmp_path / "x.npy", "--out", tmp_path / "y.npy")
    assert np.load(tmp_path / "y.npy").dtype == np.float32


def test_run_without_out_writes_nothing(small, tmp_path):
    before = listing(tmp_path), listing(small)
    assert "1 x 7 tokens, float32 on the CPU" in invoke("run", small, small / "x.npy").stdout
    assert (listing(tmp_path), listing(small)) == before


def test_run_adds_the_residual(small, tmp_path):
    x = np.load(small / "x.npy")
    for options in ([], ["--residual"]):
        invoke("run", small, small / "x.npy", "--out", tmp_path / "y.npy", *options)
        expected = layer_of(small)(x[None], residual=x[None] if options else None)[0]
        assert np.array_equal(np.load(tmp_path / "y.npy"), expected)


def test_run_takes_positions_from_a_number_a_file_or_the_dump(small, tmp_path):
    x, layer = np.load(small / "x.npy")[None], layer_of(small)
    steps = np.array([3, 4, 9, 10, 11, 40, 41])
    np.save(tmp_path / "p.npy", steps)
    np.savez(tmp_path / "p.npz", positions=steps, other=steps)
    np.savez(tmp_path / "dump.npz", x=x, positions=steps)
    invoke("run", small, small / "x.npy", "--positions", 100, "--out", tmp_path / "y.npy")
    assert np.array_equal(np.load(tmp_path / "y.npy"), layer(x, positions=100 + np.arange(7))[0])
    for source in ("p.npy", "p.npz"):
        invoke("run", small, small / "x.npy", "--positions", tmp_path / source, "--out", tmp_path / "y.npy")
        assert np.array_equal(np.load(tmp_path / "y.npy"), layer(x, positions=steps)[0])
    invoke("run", small, tmp_path / "dump.npz", "--out", tmp_path / "y.npy")
    assert np.array_equal(np.load(tmp_path / "y.npy"), layer(x, positions=steps))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("batched", [True, False])
def test_run_writes_the_stages_it_is_asked_for(small, tmp_path, suffix, batched):
    x = make_hidden(make_config(), 2 if batched else 1, 5)
    np.save(tmp_path / "x.npy", x if batched else x[0])
    out = tmp_path / f"y{suffix}"
    expected = {}
    layer_of(small)(x, stages=expected)
    for asked, names in (("all", cli.RUN_STAGES), ("q_norm, lse", ("q_norm", "lse"))):
        invoke("run", small, tmp_path / "x.npy", "--stages", asked, "--out", out)
        arrays = read(out)
        assert set(arrays) == {"y", *names, "hidden_states", "positions"}
        for name in names:
            assert np.array_equal(arrays[name], expected[name] if batched else expected[name][0]), name
        told = json.loads(invoke("verify", small, out, "--json").stdout)
        assert {row["stage"] for row in told["dump"]} == {"y", *names}


def test_a_run_that_is_not_whole_by_itself_is_no_dump(small, tmp_path):
    out, cache = tmp_path / "y.npz", tmp_path / "c.safetensors"
    invoke("run", small, small / "x.npy", "--stages", "q", "--out", out, "--residual", "--cache-out", cache)
    assert set(read(out)) == {"y", "q"}
    invoke("run", small, small / "x.npy", "--stages", "q", "--out", out, "--cache-in", cache)
    assert set(read(out)) == {"y", "q"}


def test_stages_that_cannot_be_written_are_refused(small, tmp_path):
    x, out = small / "x.npy", tmp_path / "y.npz"
    refused("run", small, x, "--stages", "all", status=2, says="--out", where=tmp_path)
    message = refused("run", small, x, "--stages", "q_norm,qnorm", "--out", out, status=2, where=tmp_path)
    assert "lse" in message
    refused("run", small, x, "--stages", " , ", "--out", out, status=2, where=tmp_path)
    refused("run", small, x, "--stages", "scores", "--out", out, status=2, where=tmp_path)
    refused("run", small, x, "--stages", "q", "--out", tmp_path / "y.npy", says="a .npy holds one", where=tmp_path)


@pytest.mark.parametrize("options", [[], ["--positions", "5"], ["--residual", "--stages", "all"]])
def test_a_run_in_chunks_is_the_run_as_a_whole(small, tmp_path, monkeypatch, options):
    np.save(tmp_path / "x.npy", make_hidden(make_config(), 2, 50))
    outs = []
    for chunk in (1024, 16, 7):
        monkeypatch.setattr(cli, "CHUNK_TOKENS", chunk)
        invoke("run", small, tmp_path / "x.npy", "--out", tmp_path / "y.npz", *options)
        outs.append(read(tmp_path / "y.npz"))
    for name, whole in outs[0].items():
        for chunked in outs[1:]:
            assert relative_l2(chunked[name], whole) <= BARS["float32"] / 10, name


def test_dynamic_rope_past_its_length_is_not_cut_into_chunks(tmp_path, monkeypatch):
    config = make_config(num_hidden_layers=2, max_position_embeddings=32, rope_theta=1e4,
                         rope_scaling={"rope_type": "dynamic", "factor": 4.0})  # fmt: skip
    write_small(tmp_path, config)
    x = make_hidden(config, 1, 60)
    np.save(tmp_path / "long.npy", x)
    monkeypatch.setattr(cli, "CHUNK_TOKENS", 16)
    invoke("run", tmp_path, tmp_path / "long.npy", "--out", tmp_path / "y.npy")
    assert relative_l2(np.load(tmp_path / "y.npy"), layer_of(tmp_path)(x)) <= BARS["float32"] / 10
    assert invoke("verify", tmp_path, tmp_path / "long.npy").stdout.count("MISSED") == 0


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_two_runs_through_a_cache_are_one(small, tmp_path, dtype):
    x = make_hidden(make_config(), 2, 12, dtype=dtype)
    for name, part in (("whole", x), ("first", x[:, :8]), ("second", x[:, 8:])):
        io.save_arrays(tmp_path / f"{name}.safetensors", {"x": part})
    cache, out = tmp_path / "cache.safetensors", tmp_path / "y.safetensors"
    ys = []
    for name, options in (("whole", []), ("first", ["--cache-out", cache]),
                          ("second", ["--cache-in", cache, "--cache-out", cache])):  # fmt: skip
        result = invoke("run", small, tmp_path / f"{name}.safetensors", "--out", out, "--json", *options)
        ys.append(read(out)["y"].astype(np.float32))
    assert json.loads(result.stdout)["cached_tokens"] == [12, 12]
    # The second run adds up keys in blocks of other sizes: float32 noise, and now and then a rounding of the output.
    assert relative_l2(np.concatenate(ys[1:], 1), ys[0]) <= BARS[dtype] / 10


RUN_KEYS = {"model", "layer", "dtype", "device", "shape", "finite", "rms", "max_abs", "precise", "cached_tokens", "out",
            "stages", "cache_out"}  # fmt: skip


def test_run_prints_one_json_object(small, tmp_path):
    out = tmp_path / "y.npz"
    told = json.loads(invoke("run", small, small / "x.npy", "--out", out, "--stages", "q", "--json").stdout)
    assert set(told) == RUN_KEYS
    y = read(out)["y"]
    assert (told["shape"], told["stages"], told["out"], told["cache_out"]) == ([7, 96], ["q"], str(out), None)
    assert told["rms"] == pytest.approx(float(np.sqrt(np.mean(y.astype(np.float64) ** 2))))
    assert told["max_abs"] == pytest.approx(float(np.abs(y).max()))
    assert told["finite"] is True
    assert told["precise"] is True
    assert told["cached_tokens"] == [7]


def test_run_says_if_the_output_is_not_finite(small, monkeypatch):
    usual = CpuBackend.forward
    monkeypatch.setattr(CpuBackend, "forward", lambda *args: usual(*args) * np.float32(np.inf))
    told = json.loads(invoke("run", small, small / "x.npy", "--json", status=1).stdout)
    assert (told["finite"], told["rms"], told["max_abs"]) == (False, None, None)
    assert "NOT FINITE" in invoke("run", small, small / "x.npy", status=1).stdout


# verify


def dumped(folder, name="dump.npz", **changes):
    """Write a dump of layer 0 with the reference's stages; ``changes`` maps a name to a function of its array."""
    layer, x = layer_of(folder), np.load(folder / "x.npy")[None]
    y, stages = reference.forward(layer.config, layer.weights, x)
    arrays = {"hidden_states": x, "y": y} | {name: stages[name].astype(np.float32) for name in cli.RUN_STAGES}
    for key, change in changes.items():
        arrays[key] = change(arrays[key])
    io.save_arrays(folder / name, arrays)
    return folder / name


def test_verify_passes_and_shows_every_stage(small):
    printed = invoke("verify", small, dumped(small)).stdout
    for stage in (*cli.RUN_STAGES, "y", "y (max)", "y (decode)"):
        assert f"\n{stage} " in printed
    assert "Against the dump" in printed
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
    path = dumped(small)
    arrays = read(path) | {"positions": np.arange(7)}
    arrays["y"][:, 4:] = np.nan
    arrays["lse"][:, :, 4:] = np.nan
    np.savez(path, **arrays)
    invoke("verify", small, path, "--tokens", 4)
    assert "MISSED: lse, y;" in invoke("verify", small, path, status=1).stdout


VERIFY_KEYS = {"passed", "layer", "dtype", "device", "shape", "reference", "dump", "departure", "collapse"}


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
    assert "MISSED: layer 1 (k_norm). Verify such a layer alone" in printed
    lines = [line.split() for line in printed.splitlines() if line.endswith((" ok", " MISSED"))]
    assert [line[-2:] for line in lines] == [["ok", "ok"], ["k_norm", "MISSED"]]
    assert json.loads(invoke("verify", small, dumped(small), path, "--json", status=1).stdout)["passed"] is False


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
        path = dumped(small, q_norm=change)
        refused("verify", small, path, says="the dump's q_norm")
        refused("verify", small, path, "--tokens", 2, says="the dump's q_norm")


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


def png_size(path) -> tuple[int, int]:
    """Return width and height of a PNG that is whole and not blank."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 10
    return image.shape[1], image.shape[0]


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


# inspect, doctor, bench


def test_inspect_lists_every_layer(model):
    printed = invoke("inspect", model).stdout
    maxima = [largest for largest, *_ in demo.K_NORM_STATISTICS]
    rows = [line.split() for line in printed.splitlines()[4 : 4 + len(maxima)]]
    assert [row[:2] for row in rows] == [[str(i), f"{largest:.4g}"] for i, largest in enumerate(maxima)]
    # Layer 8 has no weight above 20, but scores as large as such weights make.
    precise = [largest > 20 or i == 8 for i, largest in enumerate(maxima)]
    assert [row[-1] for row in rows] == ["precise" if p else "normal" for p in precise]
    assert f"{sum(precise)} of {len(maxima)} layers" in printed


def test_inspect_prints_one_json_object(small):
    told = json.loads(invoke("inspect", small, "--json").stdout)
    assert set(told) == {"model", "threshold", "config", "layers"}
    assert ca.AttentionConfig.from_dict(told["config"]) == ca.AttentionConfig.from_pretrained(small)
    for row in told["layers"]:
        weights = layer_of(small, row["layer"]).weights
        assert row["k_norm"]["max_abs"] == weights.k_norm_stats.max_abs
        assert row["q_norm"]["mean"] == weights.q_norm_stats.mean
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
    path, named = dumped(small), model / "dump-layer0.safetensors"
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


def test_doctor_finds_this_machine_healthy():
    told = json.loads(invoke("doctor", "--json").stdout)
    assert set(told) == {"versions", "cpu", "gpu", "nvrtc", "cache", "self_test", "ok"}
    assert told["ok"] is True
    assert [row["dtype"] for row in told["self_test"] if row["device"] == "cpu"] == list(STORAGE_DTYPES)
    assert told["gpu"]["usable"] is (cuda.problem() is None)
    assert told["versions"]["cupy_attn"] == ca.__version__
    printed = invoke("doctor").stdout
    for section in ("versions:", "cpu:", "gpu:", "nvrtc:", "cache:", "self-test"):
        assert f"{section}" in printed


def test_doctor_notices_a_layer_that_is_wrong(monkeypatch):
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


# Help, warnings, progress.


@pytest.mark.parametrize("name", sorted(cli.main.commands))
def test_help_names_every_option_and_argument(name):
    printed = invoke(name, "--help").stdout
    command = cli.main.commands[name]
    assert command.params
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            assert parameter.make_metavar(click.Context(command)) in printed
        else:
            assert all(option in printed for option in (*parameter.opts, *parameter.secondary_opts))
            assert parameter.help
    assert f"  {name} " in invoke("--help").stdout


def test_version_and_a_wrong_command():
    assert ca.__version__ in invoke("--version").stdout
    refused("runn", status=2)
    refused("run", status=2)
    refused("run", "model", "x.npy", "--layer", "two", status=2, says="--layer")
    refused("verify", "model", "x.npy", "--tokens", "0", status=2, says="--tokens")
    refused("run", "model", "x.npy", "--dtype", "int8", status=2, says="--dtype")


def test_warnings_are_lines_and_progress_is_for_terminals_only(small, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "CHUNK_TOKENS", 2)
    assert invoke("run", small, small / "x.npy").stderr == ""
    assert invoke("demo", tmp_path / "d").stderr == ""
    tensors = read(small / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(128, np.float32)
    io.save_arrays(small / "model.safetensors", tensors)
    result = invoke("run", small, small / "x.npy")
    assert result.stderr.splitlines() == [
        "Warning: layer 0 holds biases of q_proj but attention_bias is false; they were ignored, set it to true if "
        "the model was trained with them."
    ]


def test_progress_is_shown_on_a_terminal(small, monkeypatch):
    monkeypatch.setattr(cli, "CHUNK_TOKENS", 2)
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    assert "running" in invoke("run", small, small / "x.npy").stderr


# Refusals.


def sharded(model, tmp_path):
    shutil.copytree(model, tmp_path / "broken")
    return tmp_path / "broken"


def test_a_missing_checkpoint(tmp_path, small):
    for args in (("run", tmp_path / "none", small / "x.npy"), ("verify", tmp_path / "none", small / "x.npy"),
                 ("inspect", tmp_path / "none"), ("bench", "--model", tmp_path / "none")):  # fmt: skip
        refused(*args, says="does not exist", where=tmp_path)
    (small / "model.safetensors").unlink()
    for args in (("run", small, small / "x.npy"), ("inspect", small)):
        refused(*args, says="holds neither model.safetensors")
    (small / "config.json").write_text("{")
    refused("inspect", small, says="not valid JSON")


def test_damaged_shards(model, tmp_path):
    broken = sharded(model, tmp_path)
    index = json.loads((broken / INDEX_NAME).read_text())
    shard = broken / index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    whole, out = shard.read_bytes(), tmp_path / "y.npy"
    for length in (0, 7, 100, len(whole) - 1):
        shard.write_bytes(whole[:length])
        refused("run", broken, broken / "hidden_states.npy", "--out", out, says=shard.name, where=tmp_path)
    shard.unlink()
    refused(
        "run", broken, broken / "hidden_states.npy", "--out", out, says="download the missing shard", where=tmp_path
    )
    shard.write_bytes(whole)
    for change in ({"model.layers.0.self_attn.q_proj.weight": "model-00009-of-00009.safetensors"},
                   {"model.layers.0.self_attn.q_proj.weight": "../elsewhere.safetensors"},
                   {"model.layers.0.self_attn.extra.weight": shard.name}):  # fmt: skip
        damaged = index | {"weight_map": index["weight_map"] | change}
        (broken / INDEX_NAME).write_text(json.dumps(damaged))
        refused("run", broken, broken / "hidden_states.npy", "--out", out, where=tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"):
        (broken / INDEX_NAME).write_text(text, encoding="latin-1")
        refused("inspect", broken, says=INDEX_NAME)


Q = "model.layers.0.self_attn.q_proj.weight"
BAD_TENSORS = {
    "missing": ({Q: None}, "q_proj.weight is missing"),
    "misshapen": ({Q: np.zeros((96, 128), np.float32)}, "has shape [96, 128], the config says [128, 96]"),
    "of rank 1": ({Q: np.zeros(128 * 96, np.float32)}, "has shape [12288]"),
    "int8": ({Q: np.zeros((128, 96), np.int8)}, "I8"),
    "float64": ({Q: np.zeros((128, 96), np.float64)}, "F64"),
    "a norm with NaN": ({"model.layers.0.self_attn.k_norm.weight": np.full(32, np.nan, np.float32)}, "NaN"),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_tensors_that_do_not_fit(tmp_path, bad, command):
    changes, says = BAD_TENSORS[bad]
    write_small(tmp_path, make_config(num_hidden_layers=2), **changes)
    options = ["--out", tmp_path / "y.npy"] if command == "run" else []
    message = refused(command, tmp_path, tmp_path / "x.npy", *options, says=says, where=tmp_path)
    assert next(iter(changes)) in message


def test_float8_weights_are_refused(small):
    header = {Q: {"dtype": "F8_E4M3", "shape": [128, 96], "data_offsets": [0, 12288]}}
    text = json.dumps(header).encode()
    (small / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12288))
    refused("run", small, small / "x.npy", says="is missing")  # the norm, looked for first
    tensors = make_weights(make_config(num_hidden_layers=2)).to_dict(make_config())
    del tensors[Q]
    data = {name: tensor.tobytes() for name, tensor in tensors.items()}
    start = 12288
    for name, raw in data.items():
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, start + len(raw)]}
        start += len(raw)
    text = json.dumps(header).encode()
    body = bytes(12288) + b"".join(data.values())
    (small / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    refused("run", small, small / "x.npy", says="F8_E4M3")


@pytest.mark.parametrize("layer", [-1, 2, 10**30])
def test_a_layer_out_of_range(small, layer):
    refused("run", small, small / "x.npy", "--layer", layer, says="layer")


BAD_CONFIGS = {
    "contradiction": ({"rope_theta": 10.0}, "rope_theta"),
    "heads that do not divide": ({"num_attention_heads": 3}, "multiple"),
    "another model": ({"model_type": "llama"}, "llama"),
    "other widths than the weights": ({"hidden_size": 64}, "the config says"),
    "other head_dim than the weights": ({"head_dim": 64}, "the config says"),
}


@pytest.mark.parametrize("bad", BAD_CONFIGS)
def test_configs_that_contradict_themselves_or_the_weights(small, bad):
    changes, says = BAD_CONFIGS[bad]
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | changes))
    refused("run", small, small / "x.npy", "--out", small / "y.npy", says=says, where=small)


BAD_ACTIVATIONS = {
    "another width": (np.ones((5, 64), np.float32), "rows of 64, the model's hidden_size is 96"),
    "empty": (np.ones((0, 96), np.float32), "holds no token"),
    "NaN": (np.full((5, 96), np.nan, np.float32), "NaN first in row 0"),
    "Inf": (np.full((5, 96), np.inf, np.float16), "Inf first in row 0"),
    "integers": (np.ones((5, 96), np.int64), "is int64"),
    "one row": (np.ones(96, np.float32), "has shape [96]"),
    "pickled": (np.array([{}], object), "never loaded"),
}


@pytest.mark.parametrize("bad", BAD_ACTIVATIONS)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_activations_that_do_not_fit(small, bad, command):
    x, says = BAD_ACTIVATIONS[bad]
    np.save(small / "bad.npy", x)
    options = ["--out", small / "y.npy"] if command == "run" else []
    assert "bad.npy" in refused(command, small, small / "bad.npy", *options, says=says, where=small)


@pytest.mark.filterwarnings("error:overflow")
@pytest.mark.parametrize("command", ["run", "verify"])
def test_activations_too_large_for_the_dtype(small, command):
    x = np.load(small / "x.npy")
    x[2, 5] = 70000
    np.save(small / "big.npy", x)
    refused(command, small, small / "big.npy", "--dtype", "float16", says="7e+04, too large for float16; pass --dtype")
    np.save(small / "big.npy", x.astype(np.float64) * 1e300)
    message = refused(command, small, small / "big.npy", says="too large for float32")
    assert "--dtype" not in message


BAD_POSITIONS = {
    "-1": "position -1",
    "4090": "position 4096, the model's positions are 0 to 4095",
    "9" * 30: "beyond any model's positions",
    "9" * 5000: "",
    "5.5": "neither a whole number nor a file",
    "start": "neither a whole number nor a file",
    "none.npy": "none.npy does not exist",
}


@pytest.mark.parametrize("positions", BAD_POSITIONS)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_positions_that_are_no_positions(small, monkeypatch, positions, command):
    monkeypatch.chdir(small)
    options = ["--out", small / "y.npy"] if command == "run" else []
    says = BAD_POSITIONS[positions]
    refused(command, small, small / "x.npy", "--positions", positions, *options, says=says, where=small)


BAD_POSITION_FILES = {
    "too few": np.arange(6),
    "too many": np.arange(8),
    "of another batch": np.zeros((2, 7), int) + np.arange(7),
    "a single number": np.array(5),
    "fractions": np.arange(7) + 0.5,
    "falling": np.arange(7)[::-1],
    "equal": np.zeros(7, int),
    "negative": np.arange(7) - 3,
    "text": np.array(list("abcdefg")),
}


@pytest.mark.parametrize("bad", BAD_POSITION_FILES)
@pytest.mark.parametrize("command", ["run", "verify", "verify --tokens 3"])
def test_position_files_that_do_not_fit(small, bad, command):
    np.save(small / "p.npy", BAD_POSITION_FILES[bad])
    command, *options = command.split()
    options += ["--out", small / "y.npy"] if command == "run" else []
    refused(command, small, small / "x.npy", "--positions", small / "p.npy", *options, where=small)


def test_position_files_with_several_arrays_need_a_name(small):
    np.savez(small / "p.npz", a=np.arange(7), b=np.arange(7))
    refused("run", small, small / "x.npy", "--positions", small / "p.npz", says="none named positions")


def test_input_longer_than_the_model_is_refused_before_it_is_run(small, monkeypatch):
    np.save(small / "long.npy", make_hidden(make_config(), 1, 4097))
    monkeypatch.setattr(CpuBackend, "forward", lambda *_: pytest.fail("ran"))
    refused("run", small, small / "long.npy", says="positions are 0 to 4095")


def test_caches_that_do_not_fit(small, tmp_path):
    cache, out, x = tmp_path / "c.safetensors", tmp_path / "y.npy", small / "x.npy"
    invoke("run", small, x, "--cache-out", cache)
    go_on = ("run", small, x, "--cache-in", cache, "--out", out)
    refused(*go_on, "--layer", 1, says="made for layer 0", where=tmp_path)
    refused(*go_on, "--dtype", "float16", says="holds float32", where=tmp_path)
    refused(*go_on, "--positions", 6, says="go on from 7", where=tmp_path)
    for batch in (2, 3):
        np.save(tmp_path / "wide.npy", make_hidden(make_config(), batch, 5))
        refused("run", small, tmp_path / "wide.npy", "--cache-in", cache, "--out", out, says="made for batch 1",
                where=tmp_path)  # fmt: skip
    invoke("run", small, tmp_path / "wide.npy", "--cache-out", tmp_path / "c3.safetensors")
    np.save(tmp_path / "two.npy", make_hidden(make_config(), 2, 5))
    refused("run", small, tmp_path / "two.npy", "--cache-in", tmp_path / "c3.safetensors", says="made for batch 3")
    config = json.loads((small / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (small / "config.json").write_text(json.dumps(config))
    refused(*go_on, says="rms_norm_eps", where=tmp_path)
    refused("run", small, x, "--cache-in", small / "model.safetensors", says="is not a cache")
    refused("run", small, x, "--cache-in", tmp_path / "none.safetensors", says="does not exist")
    cache.write_bytes(cache.read_bytes()[:-5])
    refused(*go_on, says="not a readable", where=tmp_path)


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_run(small, tmp_path, monkeypatch):
    (tmp_path / "folder.npy").mkdir()
    x = small / "x.npy"
    monkeypatch.setattr(CpuBackend, "forward", lambda *_: pytest.fail("ran"))
    for out in ("y", "y.txt", "y.NPY", "absent/y.npy", "folder.npy", "/proc/1/none/y.npy"):
        refused("run", small, x, "--out", tmp_path / out, where=tmp_path)
    for cache in ("c", "c.npz", "absent/c.safetensors"):
        refused("run", small, x, "--cache-out", tmp_path / cache, where=tmp_path)
    same = tmp_path / "both.safetensors"
    refused("run", small, x, "--out", same, "--cache-out", same, status=2, says="name two files", where=tmp_path)
    refused("run", small, x, "--out", tmp_path / ("y" * 300 + ".npy"), says="name too long", where=tmp_path)


def test_a_gpu_that_is_not_there(small, monkeypatch):
    monkeypatch.setattr(cuda, "problem", lambda: "no GPU here; use device='cpu'.")
    for args in (("run", small, small / "x.npy"), ("verify", small, small / "x.npy"), ("bench", "--model", small)):
        refused(*args, "--device", "cuda", says="no GPU here")


def test_memory_that_is_not_there(small, monkeypatch):
    def fail(*_):
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr(CpuBackend, "forward", fail)
    refused("run", small, small / "x.npy", says="out of memory (Unable to allocate 3 TiB)")


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["cupy_attn.cpu.CpuBackend.forward", "cupy_attn.io.os.fsync"])
def test_ctrl_c_leaves_nothing(small, tmp_path, monkeypatch, where):
    monkeypatch.setattr(where, interrupt)
    before = listing(tmp_path)
    result = invoke("run", small, small / "x.npy", "--out", tmp_path / "y.npy", "--cache-out",
                    tmp_path / "c.safetensors", status=130)  # fmt: skip
    assert result.stdout == ""
    assert result.stderr.splitlines() == ["Interrupted: no file was left half written."]
    assert listing(tmp_path) == before


def test_ctrl_c_leaves_no_half_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "forward", interrupt)
    assert "Interrupted" in invoke("demo", tmp_path / "d", status=130).stderr
    assert listing(tmp_path) == set()


def test_a_note_says_what_a_conversion_cost(model):
    result = invoke("run", model, model / "hidden_states.npy", "--dtype", "float16")
    assert result.stderr.startswith("Note: converting bfloat16 to float16 set ")
    assert len(result.stderr.splitlines()) == 1
    assert invoke("run", model, model / "hidden_states.npy", "--dtype", "bfloat16").stderr == ""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_bfloat16_dump_is_no_miss_in_another_dtype(model, dtype):
    """Its keys were rounded to bfloat16 in the cache, the layer's are not."""
    invoke("verify", model, model / "dump-layer0.safetensors", "--dtype", dtype)


def test_the_demo_dump_is_bfloat16(model):
    assert read(model / "dump-layer0.safetensors")["hidden_states"].dtype == BFLOAT16
