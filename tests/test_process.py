"""The command line as a real process: pipes, signals, and what an import brings with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

COMMAND = [sys.executable, "-m", "cupy_attn"]

# The command line, saying on standard error when the first chunk is computed.
TELLING = """
import sys
from cupy_attn import cli, cpu
forward = cpu.CpuBackend.forward

def telling(*args):
    print("computing", file=sys.stderr, flush=True)
    return forward(*args)

cpu.CpuBackend.forward = telling
cli.main(sys.argv[1:])
"""


def run(*args, status=0, **options):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("process") / "model"
    done = run(*COMMAND, "demo", folder, "--device", "cpu")
    assert "Try next:" in done.stdout
    assert done.stderr == ""
    return folder


def test_run_and_verify_in_a_pipe(model, tmp_path):
    done = run(*COMMAND, "run", model, model / "hidden_states.npy", "--out", tmp_path / "y.npy", "--device", "cpu")
    assert done.stderr == ""
    assert np.isfinite(np.load(tmp_path / "y.npy")).all()
    assert "MISSED" not in run(*COMMAND, "verify", model, model / "dump-layer0.safetensors").stdout


def test_an_error_is_one_sentence_and_status_one(model):
    done = run(*COMMAND, "run", model, model / "none.npy", status=1)
    assert done.stdout == ""
    assert done.stderr == f"Error: {model / 'none.npy'} does not exist; check the name.\n"
    assert run(*COMMAND, "--help").stdout.startswith("Usage: cupy-attn ")


def test_ctrl_c_in_a_long_run_leaves_no_file(model, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40_000, 256), np.float32))
    command = [sys.executable, "-c", TELLING, "run", model, tmp_path / "x.npy", "--out", tmp_path / "y.npy",
               "--cache-out", tmp_path / "c.safetensors", "--device", "cpu"]  # fmt: skip
    with subprocess.Popen(
        [str(a) for a in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr.readline() == "computing\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        start = time.monotonic()
        stdout, stderr = child.communicate(timeout=60)
        waited = time.monotonic() - start
    assert child.returncode == 130
    assert stdout == ""
    assert [line for line in stderr.splitlines() if line != "computing"] == [
        "Interrupted: no file was left half written."
    ]
    assert os.listdir(tmp_path) == ["x.npy"]
    assert waited < 20  # a chunk, not the whole run


@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--json"], ["verify"], ["run"]])
def test_a_reader_that_leaves_early_gets_no_traceback(model, command):
    args = [*COMMAND, command[0], str(model), *command[1:]]
    args += [str(model / "hidden_states.npy")] if command[0] != "inspect" else []
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        child.stdout.close()
        stderr = child.stderr.read()
    assert stderr == ""
    assert child.returncode == 1


def test_head_takes_one_line(model):
    line = f"{sys.executable} -m cupy_attn inspect {model} | head -1"
    done = run("sh", "-c", line)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


LEFT_OUT = ("torch", "transformers", "matplotlib", "jax", "hypothesis", "pytest", "tqdm", "pandas")


@pytest.mark.parametrize("module", ["cupy_attn", "cupy_attn.cli"])
def test_an_import_brings_no_framework(module):
    code = f"import sys, {module}; print([m for m in {LEFT_OUT} if m in sys.modules])"
    assert run(sys.executable, "-c", code).stdout == "[]\n"


@pytest.mark.parametrize("value", [None, "", "0", "1", "yes"])
def test_an_import_is_silent_whether_or_not_it_builds(value):
    environment = {k: v for k, v in os.environ.items() if k != "CUPY_ATTN_DEFER_BUILD"}
    environment |= {} if value is None else {"CUPY_ATTN_DEFER_BUILD": value}
    done = run(sys.executable, "-W", "error", "-c", "import cupy_attn", env=environment)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("changes", [{"HOME": "/proc/nonexistent"}, {"CUPY_CACHE_DIR": "/proc/nonexistent"}])
def test_an_import_needs_no_writable_folder(changes):
    done = run(sys.executable, "-c", "import cupy_attn as ca; print(ca.__version__)", env=os.environ | changes)
    assert done.stderr == ""
    done = run(*COMMAND, "doctor", env=os.environ | changes)
    assert "/proc/nonexistent" in done.stdout


def test_an_import_works_from_a_read_only_folder_that_is_not_the_checkout(tmp_path):
    run(sys.executable, "-B", "-c", "import cupy_attn", cwd=tmp_path)
    assert os.listdir(tmp_path) == []
