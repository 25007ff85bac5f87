"""Every kernel in every specialisation, compiled for every architecture on a machine that needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import cupy_attn as ca
from cupy_attn import kernels
from cupy_attn.arrays import STORAGE_DTYPES

ROOT = Path(__file__).resolve().parent.parent
FLOAT32 = np.dtype(np.float32)

pytest.importorskip("cupy")


def settings(macros) -> str:
    return " ".join(f"{key}={value}" for key, value in macros)


def check_build(arch, name, macros):
    """Compile, print what ptxas says, and fail on any byte of local memory."""
    build = kernels.compile_for(arch, name, macros)
    print(f"\n{name} {arch} {settings(macros)}: {build.registers} registers, {build.spill_bytes} bytes spilled, "
          f"{build.stack_bytes} bytes of stack", end="")  # fmt: skip
    assert build.cubin[:4] == b"\x7fELF"
    assert 0 < build.registers <= 255
    assert (build.spill_bytes, build.stack_bytes) == (0, 0)
    return build


@pytest.mark.parametrize("arch", kernels.ARCHITECTURES)
@pytest.mark.parametrize(("name", "macros"), kernels.specialisations(), ids=lambda v: v if isinstance(v, str) else
                         re.sub(r"[^\w=.]+", "-", settings(v)))  # fmt: skip
def test_every_specialisation_compiles_without_spills(arch, name, macros):
    check_build(arch, name, macros)


@pytest.mark.parametrize("hidden_size", [8, 24, 248, 256, 264, 2056, 8192])
def test_hidden_sizes_of_no_published_model_compile_without_spills(hidden_size):
    for dtype in STORAGE_DTYPES.values():
        check_build("sm_80", "rms_norm", kernels.rms_norm_macros(dtype, dtype, hidden_size))


def test_the_specialisations_are_those_of_the_published_models():
    pairs = kernels.specialisations()
    assert len(set(pairs)) == len(pairs)
    files = {file.stem for file in kernels.SOURCES.glob("*.cu")}
    assert {name for name, _ in pairs} == files
    held = {(dict(m)["STORAGE"], dict(m)["HIDDEN_SIZE"]) for name, m in pairs if name == "rms_norm"}
    assert held == {(t, h) for t in kernels.CUDA_NAMES.values() for h in ("1024", "2048", "2560", "4096", "5120")}
    common = kernels.common_specialisations()
    assert set(common) < set(pairs)
    assert all(dict(macros)["STORAGE"] != "float" for _, macros in common)


@pytest.mark.parametrize(
    ("hidden_size", "warps"), [(8, 1), (256, 1), (264, 2), (1024, 4), (2048, 8), (2056, 8), (5120, 8)]
)
def test_the_macros_give_one_vector_a_thread_and_eight_warps_at_most(hidden_size, warps):
    macros = dict(kernels.rms_norm_macros(STORAGE_DTYPES["bfloat16"], FLOAT32, hidden_size))
    assert macros == {"STORAGE": "__nv_bfloat16", "WEIGHT": "__nv_bfloat16", "OUTPUT": "float",
                      "HIDDEN_SIZE": str(hidden_size), "WARPS": str(warps)}  # fmt: skip


# Sources, stamps, failures.


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Return a copy of kernels_cu that the package compiles instead."""
    copy = tmp_path / "kernels cu"  # a blank in the path, as in a user's folder
    shutil.copytree(kernels.SOURCES, copy)
    monkeypatch.setattr(kernels, "SOURCES", copy)
    return copy


def test_the_sources_are_found_and_are_the_checkouts():
    names = {file.name for file in kernels.SOURCES.iterdir()}
    assert names >= {"rms_norm.cu", "reduce.cuh", "storage.cuh"}
    for name in names:
        assert (kernels.SOURCES / name).read_bytes() == (ROOT / "kernels_cu" / name).read_bytes()


def test_an_edited_header_changes_the_source_that_is_the_cache_key(sources):
    before = kernels._source("rms_norm")
    assert before.partition("\n")[2] == (sources / "rms_norm.cu").read_text()
    assert kernels._source("rms_norm") == before
    header = sources / "reduce.cuh"
    header.write_text(header.read_text() + "// edited\n")
    edited = kernels._source("rms_norm")
    assert edited != before
    assert edited.partition("\n")[2] == before.partition("\n")[2]


@pytest.mark.parametrize("name", ["rms_norm.cu", "reduce.cuh", "storage.cuh"])
def test_the_digest_changes_with_every_file_and_every_name(sources, name):
    before = kernels.source_digest()
    file = sources / name
    file.write_bytes(file.read_bytes() + b"\n")
    edited = kernels.source_digest()
    file.rename(file.with_stem("other"))
    assert len({before, edited, kernels.source_digest()}) == 3


def test_an_edited_header_is_what_is_compiled(sources):
    macros = kernels.rms_norm_macros(FLOAT32, FLOAT32, 64)
    kernels.compile_for("sm_80", "rms_norm", macros)
    (sources / "reduce.cuh").write_text("#error edited\n")
    with pytest.raises(ca.KernelBuildError, match="edited"):
        kernels.compile_for("sm_80", "rms_norm", macros)


def test_a_broken_source_is_reported_with_nvrtcs_log(sources):
    file = sources / "rms_norm.cu"
    file.write_text(file.read_text().replace("sum_squares", "sum_of_nothing", 1))
    macros = kernels.rms_norm_macros(FLOAT32, FLOAT32, 64)
    with pytest.raises(ca.KernelBuildError) as caught:
        kernels.compile_for("sm_90a", "rms_norm", macros)
    message = str(caught.value)
    assert message.startswith("kernels_cu/rms_norm.cu (HIDDEN_SIZE=64 ")
    assert 'error: identifier "sum_squares" is undefined' in message


def test_an_architecture_or_size_that_does_not_exist_is_refused():
    with pytest.raises(ca.KernelBuildError, match="invalid value for --gpu-architecture"):
        kernels.compile_for("sm_13", *kernels.specialisations()[0])
    with pytest.raises(ca.KernelBuildError, match="8 elements at a time"):
        kernels.compile_for("sm_80", "rms_norm", kernels.rms_norm_macros(FLOAT32, FLOAT32, 60))


def test_a_missing_nvrtc_is_said_to_be_missing(monkeypatch):
    def fail(*_):
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    monkeypatch.setattr("cupy.cuda.nvrtc.createProgram", fail)
    with pytest.raises(ca.KernelBuildError, match=r"libnvrtc\.so\.12.*; pip install nvidia-cuda-nvrtc-cu12"):
        kernels.compile_for("sm_80", *kernels.specialisations()[0])


# Building at import.


def test_building_at_import_can_be_deferred_and_never_raises(monkeypatch):
    asked = []

    def broken(name, macros):
        asked.append((name, macros))
        raise ca.KernelBuildError(f"{name} did not compile")

    monkeypatch.setattr(kernels, "kernel", broken)
    for value in ("1", "yes"):
        monkeypatch.setenv(kernels.DEFER_VARIABLE, value)
        assert kernels.build_common() == []
    assert asked == []
    for value in ("0", ""):
        monkeypatch.setenv(kernels.DEFER_VARIABLE, value)
        assert kernels.build_common() == ["rms_norm did not compile"] * len(kernels.common_specialisations())
    assert asked == kernels.common_specialisations() * 2


# The wheel.


def test_the_wheel_holds_the_sources_and_finds_them(tmp_path):
    if importlib.util.find_spec("build") is None or importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs build and hatchling")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for file in (ROOT / "kernels_cu").iterdir():
        assert f"cupy_attn/kernels_cu/{file.name}" in names
    packaged = {name for name in names if "dist-info" not in name}
    assert packaged == {f"cupy_attn/{file.relative_to(folder).as_posix()}" for folder, pattern in (
        (ROOT / "cupy_attn", "*.py"), (ROOT, "kernels_cu/*")) for file in folder.glob(pattern)}  # fmt: skip
    code = "import cupy_attn, cupy_attn.kernels as k; print(k.SOURCES); print(k.source_digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "site")
    assert done.stdout.splitlines() == [str(tmp_path / "site/cupy_attn/kernels_cu"), kernels.source_digest()]
