"""Building ahead: which kernels a checkpoint needs, ``cupy-attn warmup`` and what ``cupy-attn doctor`` compiles."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import threading
import time

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_config, make_weights
from kernel_helpers import HALF, MACROS

import cupy_attn as ca
from cupy_attn import cli, cuda, doctor, io, kernels, warmup
from cupy_attn.arrays import STORAGE_DTYPES
from cupy_attn.bench import model_config
from cupy_attn.weights import read_norms

pytest.importorskip("cupy")

FLOAT16, BFLOAT16, FLOAT32 = (STORAGE_DTYPES[name] for name in ("float16", "bfloat16", "float32"))
SUMMARY = r"Built (\d+) kernels in \d+\.\d s, (\d+) came from the cache(?:, (\d+) failed)?\."


def settings(config, dtype, *, precise, windowed=False):
    """Stand in for ``cuda.specialisations``: the kernel of kernel_helpers, one setting for each path."""
    storage = ("STORAGE", kernels.CUDA_NAMES[np.dtype(dtype).name])
    use = ("precise" if precise else "normal") + (" windowed" if windowed else "")
    return [("linear", (storage, ("USE", name))) for name in ("all", use)]


@pytest.fixture
def small_kernels(sources, monkeypatch):
    """Let layers need the kernels of kernel_helpers."""
    monkeypatch.setattr(cuda, "specialisations", settings)


MAXIMA = (96.5, 7.0, 44.5, 1.5)


@pytest.fixture
def model(tmp_path):
    """Return a checkpoint of four layers, two of them precise, whose projections nothing can read."""
    config = make_config()
    tensors = {}
    for layer, largest in enumerate(MAXIMA):
        tensors |= make_weights(config, layer=layer, k_norm_max=largest).to_dict(config)
    tensors = {name: t if "norm" in name else np.zeros(1, np.float32) for name, t in tensors.items()}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    io.save_arrays(folder / "model.safetensors", tensors)
    return folder


def invoke(*args, status=0):
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def refused(*args, status=1, says):
    result = invoke(*args, status=status)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert line.endswith(".")
    assert says in line
    return line


def uses(pairs) -> set[tuple[str, str]]:
    return {(dict(macros)["STORAGE"], dict(macros)["USE"]) for _, macros in pairs}


# Which kernels.


def test_layers_need_each_kernel_of_their_path_and_dtype_once(small_kernels, model):
    config = ca.AttentionConfig.from_pretrained(model)
    norms = list(read_norms(model, config))
    assert [np.abs(k).max() for _, _, k in norms] == list(MAXIMA)
    pairs = warmup.needed(config, norms, [FLOAT16, BFLOAT16])
    assert len(pairs) == len(set(pairs)) == 6
    assert uses(pairs) == {(t, use) for t in ("__half", "__nv_bfloat16") for use in ("all", "normal", "precise")}
    assert uses(warmup.needed(config, norms[:1], [FLOAT32])) == {("float", "all"), ("float", "precise")}
    assert uses(warmup.needed(config, norms[1::2], [FLOAT32])) == {("float", "all"), ("float", "normal")}
    assert warmup.needed(config, [], [FLOAT16]) == []


@pytest.mark.parametrize("q_scale", [0.5, 1.0, 16.0])
@pytest.mark.parametrize("largest", [1.5, 19.5, 19.99, 20.0, 20.001, 20.01, 20.5, 65520.0])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_the_path_that_the_layer_takes_in_its_dtype_is_listed(small_kernels, largest, dtype, q_scale):
    config = make_config()
    weights = make_weights(config, k_norm_max=largest)
    weights = dataclasses.replace(weights, q_norm=weights.q_norm * np.float32(q_scale))
    norms = [(0, weights.q_norm, weights.k_norm)]
    listed = {use for _, use in uses(warmup.needed(config, norms, [STORAGE_DTYPES[dtype]]))} - {"all"}
    try:
        layer = ca.Attention(config, weights, dtype, "cpu")
    except ca.WeightsError:
        assert (largest, dtype) == (65520.0, "float16")
    else:
        assert ("precise" if layer.precise else "normal") in listed
    if abs(largest - 20) > 0.2:
        assert len(listed) == 1


def test_layers_with_a_window_need_kernels_of_their_own(small_kernels):
    config = make_config(use_sliding_window=True, sliding_window=64, max_window_layers=2)
    weights = make_weights(config)
    norms = [(layer, weights.q_norm, weights.k_norm) for layer in range(4)]
    assert [config.window(layer) for layer in range(4)] == [None, None, 64, 64]
    assert {u for _, u in uses(warmup.needed(config, norms, [FLOAT16]))} == {"all", "precise", "precise windowed"}
    assert {u for _, u in uses(warmup.needed(config, norms[2:], [FLOAT16]))} == {"all", "precise windowed"}


def test_both_paths_are_listed_where_rounding_both_weights_decides(small_kernels):
    config = make_config(head_dim=128)
    q, k = (np.full(128, 0.1, np.float32) for _ in range(2))
    q[3], k[3] = 2.399746705773435, 3.3206  # product 7.97, in bfloat16 8.008
    pairs = warmup.needed(config, [(0, q, k)], [BFLOAT16])
    assert {use for _, use in uses(pairs)} == {"all", "normal", "precise"}


def test_the_published_models_need_kernels_on_both_paths_and_the_common_ones_are_16_bit(small_kernels):
    every = {(t, use) for t in kernels.CUDA_NAMES.values() for use in ("all", "normal", "precise")}
    assert uses(warmup.published()) == every
    assert uses(warmup.common()) == {pair for pair in every if pair[0] != "float"}


def test_a_checkpoint_of_a_published_shape_needs_kernels_of_the_published_models():
    config = model_config("0.6B")
    for largest, dtype in ((1.5, FLOAT16), (96.5, BFLOAT16)):
        k_norm = np.array([largest, *[1.0] * 127], np.float32)
        pairs = warmup.needed(config, [(0, np.ones(128, np.float32), k_norm)], [dtype])
        assert pairs
        assert set(pairs) <= set(warmup.common())


# Building many.


def test_builds_run_side_by_side_and_results_keep_their_order(monkeypatch):
    monkeypatch.setattr(warmup, "workers", lambda: 2)
    both = threading.Barrier(2, timeout=20)

    def build(i):
        if i < 2:
            both.wait()  # passes only if two builds run at once
        return warmup.Result(str(i), (), None, "built", 0.0)

    told = []
    results = warmup.build_all([functools.partial(build, i) for i in range(7)], told.append)
    assert [r.name for r in results] == list("0123456")
    assert sorted(r.name for r in told) == list("0123456")


def test_nvrtc_lets_other_threads_run(small_kernels):
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    result = warmup.build_offline("sm_90a", "linear", HALF)
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert result.status == "built"
    assert sum(start < t < end for t in ticks) >= 5  # with the GIL held there would be none


def test_no_build_is_begun_after_the_limit():
    def build(i):
        time.sleep(0.2)
        return warmup.Result(str(i), (), None, "built", 0.2)

    results = warmup.build_all([functools.partial(build, i) for i in range(50)], limit_s=0.3)
    assert 1 <= len(results) < 50
    assert [r.name for r in results] == [str(i) for i in range(len(results))]


def test_a_build_that_fails_is_a_result(small_kernels, monkeypatch):
    assert warmup.build_offline("sm_90a", "linear", ()).status == "failed"
    for error in (RuntimeError("out of memory"), OSError(28, "No space left on device"), AssertionError()):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(kernels, "compile_for", fail)
        result = warmup.build_offline("sm_90a", "linear", MACROS)
        assert (result.status, result.registers) == ("failed", None)
        assert result.error == (str(error) or "AssertionError")


# The command.


def test_warmup_without_a_gpu_says_what_to_do(model, monkeypatch):
    why = "no CUDA GPU is usable (cudaErrorNoDevice); use device='cpu' or install the NVIDIA driver."
    monkeypatch.setattr(cuda, "problem", lambda: why)
    line = refused(
        "warmup", model, says="no CUDA GPU is usable (cudaErrorNoDevice); install the NVIDIA driver, or pass"
    )
    assert line.endswith("or pass --arch sm_90a to compile for the GPU of another machine.")


def test_warmup_compiles_for_another_gpu_without_one(small_kernels, model, monkeypatch):
    monkeypatch.setattr(cuda, "problem", lambda: "there is none.")
    printed = invoke("warmup", model, "--arch", "sm_90a", "--arch", "sm_80", "--arch", "sm_80")
    head, _, *rows, summary = printed.stdout.splitlines()
    assert head.split() == ["kernel", "arch", "registers", "spilled", "bytes", "outcome"]
    assert len(rows) == 12
    for row in rows:
        assert re.fullmatch(r"linear STORAGE=\S+ USE=(all|normal|precise) +sm_(90a|80) +\d+ +0 +built", row)
    assert re.fullmatch(SUMMARY, summary).groups() == ("12", "0", None)
    # Not a terminal: a plain line for each.
    assert [line.split(" ")[0] for line in printed.stderr.splitlines()] == [f"{i}/12" for i in range(1, 13)]


def test_warmup_builds_into_the_cache_and_later_finds_it_there(small_kernels, fake_gpu, model, monkeypatch):
    compilations = fake_gpu()
    monkeypatch.setattr(cuda, "problem", lambda: None)
    printed = invoke("warmup", model).stdout
    assert re.fullmatch(SUMMARY, printed.strip()).groups() == ("6", "0", None)
    assert len(compilations) == 6
    printed = invoke("warmup", model, "--dtype", "float32", "--dtype", "float16").stdout
    assert re.fullmatch(SUMMARY, printed.strip()).groups() == ("3", "3", None)
    kernels.kernel(*settings(None, FLOAT32, precise=True)[1])
    assert len(compilations) == 9


def test_warmup_builds_for_the_layers_it_is_told(small_kernels, fake_gpu, model, monkeypatch):
    fake_gpu()
    monkeypatch.setattr(cuda, "problem", lambda: None)
    for layers, path in (("0", "precise"), ("0,2", "precise"), ("1, 3-3", "normal"), ("2-3", "both"), ("all", "both")):
        told = json.loads(invoke("warmup", model, "--layers", layers, "--dtype", "float32", "--json").stdout)
        wanted = {"all"} | ({"normal", "precise"} if path == "both" else {path})
        assert {k["macros"]["USE"] for k in told["kernels"]} == wanted
        assert told["layers"] == {"0": [0], "0,2": [0, 2], "1, 3-3": [1, 3], "2-3": [2, 3], "all": [0, 1, 2, 3]}[layers]
    assert told["cached"] == 3


def test_warmup_prints_one_json_object(small_kernels, model):
    printed = invoke("warmup", model, "--arch", "sm_86", "--dtype", "float16", "--json")
    assert printed.stderr == ""
    told = json.loads(printed.stdout)
    assert set(told) == {"model", "dtypes", "layers", "built", "cached", "failed", "seconds", "no_kernels",
                         "kernels"}  # fmt: skip
    assert (told["dtypes"], told["built"], told["cached"], told["failed"]) == (["float16"], 3, 0, 0)
    for row in told["kernels"]:
        assert set(row) == {"name", "macros", "arch", "status", "seconds", "registers", "spill_bytes", "error"}
        assert (row["name"], row["arch"], row["status"], row["error"]) == ("linear", "sm_86", "built", None)
        assert 0 < row["seconds"] <= told["seconds"]
        assert row["registers"] > 0
        assert row["spill_bytes"] == 0


def test_warmup_prints_the_time_of_each_kernel_if_told(small_kernels, fake_gpu, model, monkeypatch):
    fake_gpu()
    monkeypatch.setattr(cuda, "problem", lambda: None)
    head, _, *rows, summary = invoke("warmup", model, "--verbose").stdout.splitlines()
    assert head.split() == ["kernel", "seconds", "outcome"]
    assert all(re.search(r" \d+\.\d\d +built$", row) for row in rows)
    assert re.fullmatch(SUMMARY, summary)
    assert " cached" in invoke("warmup", model, "--verbose").stdout
    head = invoke("warmup", model, "--verbose", "--arch", "sm_80").stdout.splitlines()[0]
    assert head.split() == ["kernel", "arch", "registers", "spilled", "bytes", "seconds", "outcome"]


def test_warmup_shows_a_bar_on_a_terminal(small_kernels, model, monkeypatch):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    assert "building" in invoke("warmup", model, "--arch", "sm_80").stderr
    assert invoke("warmup", model, "--arch", "sm_80", "--json").stderr == ""


@pytest.mark.parametrize("offline", [True, False])
def test_a_kernel_that_does_not_compile_is_reported_and_the_others_are_built(
    small_kernels, fake_gpu, sources, model, monkeypatch, offline
):  # fmt: skip
    fake_gpu()
    monkeypatch.setattr(cuda, "problem", lambda: None)
    source = sources / "linear.cu"
    source.write_text(source.read_text() + "#if PRECISE\n#error no such path\n#endif\n")
    usual = settings

    def broken(*args, **options):
        return [(n, (*m, ("PRECISE", str(int(("USE", "precise") in m))))) for n, m in usual(*args, **options)]

    monkeypatch.setattr(cuda, "specialisations", broken)
    options = ["--dtype", "float16", *(["--arch", "sm_90a"] if offline else [])]
    printed = invoke("warmup", model, *options, status=1)
    assert re.fullmatch(SUMMARY, printed.stdout.splitlines()[-1]).groups() == ("2", "0", "1")
    assert printed.stderr.count("Error: ") == 1
    assert "Error: kernels_cu/linear.cu (STORAGE=__half USE=precise PRECISE=1) did not compile; " in printed.stderr
    assert "no such path" in printed.stderr
    told = json.loads(invoke("warmup", model, *options, "--json", status=1).stdout)
    assert [row["status"] for row in told["kernels"]].count("failed") == 1
    assert "no such path" in next(row["error"] for row in told["kernels"] if row["error"])


@pytest.mark.parametrize("arch", ["sm_99", "sm_90z", "sm_86a"])
def test_an_architecture_that_nvrtc_does_not_know_is_refused(small_kernels, model, arch):
    line = refused("warmup", model, "--arch", "sm_80", "--arch", arch, status=2, says=f"--arch {arch}: this NVRTC")
    assert line.endswith("; name one that it does, such as sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120.")


def test_what_has_no_kernels_is_said(model):
    printed = invoke("warmup", model, "--arch", "sm_90a", "--dtype", "float32")
    assert printed.stderr == (
        "Note: layers in float32 have no kernels and run as separate array operations, because the storage dtype is "
        "float32.\n"
    )
    assert re.fullmatch(SUMMARY, printed.stdout.strip()).groups() == ("0", "0", None)
    told = json.loads(invoke("warmup", model, "--arch", "sm_90a", "--dtype", "float32", "--json").stdout)
    assert (told["no_kernels"], told["kernels"]) == ({"float32": "the storage dtype is float32"}, [])


def test_a_missing_nvrtc_is_said_once(small_kernels, model, monkeypatch):
    def fail(*_):
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    monkeypatch.setattr("cupy.cuda.nvrtc.createProgram", fail)
    printed = invoke("warmup", model, "--arch", "sm_90a", status=1)
    assert printed.stderr.count("libnvrtc.so.12") == 1


def test_what_warmup_cannot_do_is_refused_before_anything_is_built(
    small_kernels, fake_gpu, model, tmp_path, monkeypatch
):
    compilations = fake_gpu()
    monkeypatch.setattr(cuda, "problem", lambda: None)
    for layers in ("", "one", "3-1", "1-", "-1", "0,,1", "0 1"):
        refused("warmup", model, "--layers", layers, status=2, says=f"--layers {layers}: give 'all', or layers")
    refused("warmup", model, "--layers", "0,9", says="--layers 0,9 asks for layer 9, the checkpoint has 0 to 3;")
    refused("warmup", model, "--layers", "0-99999999999", says="asks for layer 99999999999")
    refused("warmup", model, "--arch", "90a", status=2, says="--arch 90a: name one as NVRTC does, such as sm_80")
    refused("warmup", model, "--arch", "sm_75", status=2, says="--arch sm_75: the kernels need compute capability 8.0;")
    refused("warmup", model, "--dtype", "int8", status=2, says="int8")
    refused("warmup", tmp_path / "none", says="does not exist")
    (model / "model.safetensors").unlink()
    refused("warmup", model, says="holds neither model.safetensors")
    assert compilations == []


@pytest.mark.parametrize("folder", ["/proc", "/proc/none"])
def test_warmup_into_a_cache_that_keeps_nothing_is_refused(small_kernels, fake_gpu, model, monkeypatch, folder):
    compilations = fake_gpu()
    monkeypatch.setattr(cuda, "problem", lambda: None)
    monkeypatch.setenv("CUPY_CACHE_DIR", folder)
    refused("warmup", model, says=f"the kernel cache {folder} cannot be used (")
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    refused("warmup", model, says="CUPY_CACHE_IN_MEMORY")
    assert compilations == []


def test_a_cache_that_fails_on_the_way_is_said_once(small_kernels, fake_gpu, model, monkeypatch):
    fake_gpu()
    monkeypatch.setattr(cuda, "problem", lambda: None)
    monkeypatch.setattr("cupy.cuda.compiler._kernel_cache_backend._cache_dir", "/proc")
    printed = invoke("warmup", model, status=1)
    assert re.fullmatch(SUMMARY, printed.stdout.splitlines()[-1]).groups() == ("0", "0", "6")
    assert printed.stderr.count("Error: the kernel cache ") == 1


@pytest.mark.gpu
def test_warmup_on_a_gpu_builds_what_the_layers_then_use(tmp_path, monkeypatch):
    from cupy.cuda import _compiler_cache, compiler

    folder = tmp_path / "cache"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    monkeypatch.setattr(compiler, "_kernel_cache_backend", _compiler_cache.DiskKernelCacheBackend(str(folder)))
    kernels._kernel.cache_clear()
    invoke("demo", tmp_path / "demo", "--device", "cpu")
    first = json.loads(invoke("warmup", tmp_path / "demo", "--json").stdout)
    assert first["built"] == len(first["kernels"]) > 0
    again = json.loads(invoke("warmup", tmp_path / "demo", "--json").stdout)
    assert (again["built"], again["cached"]) == (0, first["built"])


# What the doctor compiles.


def test_doctor_compiles_the_common_kernels_cold(small_kernels):
    told = doctor.examine()["nvrtc"]
    assert set(told) == {"usable", "version", "cold_compile_s", "arch", "kernels", "max_registers", "spill_bytes"}
    assert told["usable"] is True
    assert told["kernels"] == len(warmup.common()) == 6
    assert told["arch"] == (doctor.PROBE_ARCH if cuda.problem() else kernels.current_arch())
    assert told["cold_compile_s"] > 0
    assert told["max_registers"] > 0
    assert told["spill_bytes"] == 0
    assert re.search(r"^  cold_compile_s +\d+\.\d+$", invoke("doctor").stdout, re.MULTILINE)


def test_doctor_compiles_for_the_gpu_it_has(small_kernels, fake_gpu, monkeypatch):
    fake_gpu("89")
    monkeypatch.setattr(cuda, "problem", lambda: None)
    assert doctor._nvrtc(False)["arch"] == "sm_89"


def test_doctor_stops_compiling_when_it_takes_long_unless_told(small_kernels, monkeypatch):
    monkeypatch.setattr(doctor, "COLD_COMPILE_S", 0.0)
    told = json.loads(invoke("doctor", "--json").stdout)["nvrtc"]
    assert (told["usable"], told["kernels"], told["not_compiled"]) == (True, 0, 6)
    told = json.loads(invoke("doctor", "--compile", "--json").stdout)["nvrtc"]
    assert told["kernels"] == 6
    assert "not_compiled" not in told


def test_doctor_counts_kernels_that_do_not_compile(small_kernels, sources):
    source = sources / "linear.cu"
    source.write_text(source.read_text().replace("sm_90a only", "").replace("extern", "#error broken\nextern"))
    told = doctor.examine()["nvrtc"]
    assert (told["usable"], told["kernels"], told["failed"]) == (False, 0, 6)
    assert "broken" in told["why"]


def test_doctor_without_nvrtc_says_so(monkeypatch):
    def fail():
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    monkeypatch.setattr("cupy.cuda.nvrtc.getVersion", fail)
    assert doctor._nvrtc(False) == {"usable": False, "why": "CuPy failed to load libnvrtc.so.12"}


def test_doctor_says_what_is_wrong_with_the_cache(monkeypatch, tmp_path):
    (tmp_path / "a.cubin").write_bytes(bytes(1 << 20))
    (tmp_path / "tmp1").write_bytes(bytes(1 << 20))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    told = doctor._kernel_cache()
    assert (told["exists"], told["writable"], told["kernels"], told["mib"]) == (True, True, 1, 1.0)
    assert "why" not in told
    for folder, exists in (("/proc", True), ("/proc/none", False), (str(tmp_path / "a.cubin"), False)):
        monkeypatch.setenv("CUPY_CACHE_DIR", folder)
        told = doctor._kernel_cache()
        assert (told["folder"], told["exists"], told["writable"], told["kernels"]) == (folder, exists, False, 0)
        assert told["why"].endswith("; set CUPY_CACHE_DIR to a folder you can write to.")
