"""Every refusal of the command line is one sentence and leaves nothing behind; so does Ctrl-C."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
from cli_helpers import invoke, listing, read, refused, write_small
from conftest import make_config, make_hidden, make_weights

from cupy_attn import cuda, reference
from cupy_attn.arrays import BFLOAT16
from cupy_attn.cpu import CpuBackend
from cupy_attn.weights import INDEX_NAME

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
