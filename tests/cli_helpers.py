"""What the tests of the command line share."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_hidden, make_weights

import cupy_attn as ca
from cupy_attn import cli, io, reference

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


def dumped(folder, name="dump.safetensors", **changes):
    """Write a dump of layer 0 with the reference's stages; ``changes`` maps a name to a function of its array."""
    layer, x = layer_of(folder), np.load(folder / "x.npy")[None]
    y, stages = reference.forward(layer.config, layer.weights, x)
    arrays = {"hidden_states": x, "y": y} | {name: stages[name].astype(np.float32) for name in cli.RUN_STAGES}
    for key, change in changes.items():
        arrays[key] = change(arrays[key])
    io.save_arrays(folder / name, arrays, {"layer": "0"})  # which a .npz does not keep
    return folder / name


def png_size(path) -> tuple[int, int]:
    """Return width and height of a PNG that is whole and not blank."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 10
    return image.shape[1], image.shape[0]
