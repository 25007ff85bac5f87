"""The command line: demo, run, help; every command does what it prints."""

from __future__ import annotations

import json
import shlex

import click
import numpy as np
import pytest
from cli_helpers import SUFFIXES, invoke, layer_of, listing, read, refused, write_small
from conftest import make_config, make_hidden

import cupy_attn as ca
from cupy_attn import cli, cuda, demo, io
from cupy_attn.accuracy import BARS, relative_l2
from cupy_attn.arrays import STORAGE_DTYPES
from cupy_attn.cpu import CpuBackend
from cupy_attn.weights import INDEX_NAME

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


def test_what_demo_says_to_try_next_works(made, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (made / "printed").read_text().partition("Try next:\n")[2].splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [command[:2] for command in commands] == [["cupy-attn", name] for name in ("inspect", "verify", "run",
                                                                                     "bench")]  # fmt: skip
    for command in commands:
        invoke(*command[1:])
    assert json.loads(invoke("verify", model, "y.safetensors", "--json").stdout)["layer"] == 3
    assert set(read(tmp_path / "y.safetensors")) == {"y", "q_norm", "k_norm", "hidden_states", "positions"}


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
        told = json.loads(invoke("verify", small, out, "--layer", 0, "--json").stdout)
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
