"""The examples of docs/examples run as they stand, on the demo's checkpoint."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cupy_attn import demo

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Return the folder of the demo's checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    demo.write_checkpoint(folder, lambda phrase: None)
    return str(folder)


def load(name: str):
    """Import an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numpy_alone(checkpoint, capsys):
    x = load("numpy_only").main(checkpoint, steps=2)
    assert x.shape == (1, 1, 256)
    assert np.isfinite(x).all()
    assert "step 2: 1 new tokens, 14 in every cache" in capsys.readouterr().out


def test_from_torch(checkpoint, capsys):
    torch = pytest.importorskip("torch")
    step = load("from_torch").main(checkpoint)
    assert step.shape == (1, 1, 256)
    assert torch.isfinite(step).all()
    assert "13 tokens cached" in capsys.readouterr().out


def test_from_jax(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # where there is a GPU, leave room for others
    jnp = pytest.importorskip("jax.numpy")
    step = load("from_jax").main(checkpoint)
    assert step.shape == (1, 1, 256)
    assert jnp.isfinite(step).all()
    assert "13 tokens cached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "needs"),
    [("numpy_only", "numpy"), ("from_torch", "torch"), ("from_jax", "jax"), ("decode_graph", "cupy")],
)
def test_without_an_argument_an_example_says_how_it_is_run(name, needs):
    pytest.importorskip(needs)
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], check=False, capture_output=True, text=True)
    said = f"name one Qwen3 folder, such as: python docs/examples/{name}.py demo/\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


@pytest.mark.gpu
def test_decode_in_a_graph(checkpoint, capsys):
    x = load("decode_graph").main(checkpoint, steps=8)
    assert x.shape == (1, 1, 256)
    assert "20 in every cache, finite: True" in capsys.readouterr().out


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    assert all(f'load("{file.stem}")' in source for file in EXAMPLES.glob("*.py"))
