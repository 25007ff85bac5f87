"""Kernels for the current GPU and CuPy's disk cache at its worst: damaged, forbidden, full, shared by processes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from kernel_helpers import HALF, HEADERS, MACROS, write_sources

import cupy_attn as ca
from cupy_attn import kernels, warmup

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("cupy")

# Kernels for the current GPU: CuPy's compiler and disk cache as they are, on a GPU that is not there.


def written(file: Path) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced, and not when it is read."""
    stat = file.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def forget() -> None:
    """Be a new process, as far as kernels go."""
    kernels._kernel.cache_clear()


@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "100", "103", "120"])
def test_only_compute_capability_9_0_gets_its_own_features(fake_gpu, capability):
    fake_gpu(capability)
    arch = "sm_90a" if capability == "90" else f"sm_{capability}"
    assert kernels.current_arch() == arch
    kernel = kernels.kernel("linear", MACROS)
    assert [o for o in kernel.options if "arch" in o] == (["-arch=sm_90a"] if capability == "90" else [])
    assert not any(option.startswith("-D") for option in kernel.options)  # macros are in the source
    if int(capability) < 100:  # from then on a cubin holds the options
        # CuPy adds an -arch of its own; what comes out is what one -arch alone gives.
        assert kernel.cubin == kernels.compile_for(arch, "linear", MACROS).cubin
        assert kernel.cubin != kernels.compile_for("sm_90", "linear", MACROS).cubin


def test_a_kernel_is_built_once_for_each_name_setting_and_capability(fake_gpu):
    compilations = fake_gpu("90")
    first = kernels.kernel("linear", MACROS)
    assert kernels.kernel("linear", MACROS) is first
    assert kernels.kernel("linear", HALF) is not first
    assert len(compilations) == 2
    other = fake_gpu("80")
    assert kernels.kernel("linear", MACROS).cubin != first.cubin
    assert len(other) == 1
    fake_gpu("90")
    assert kernels.kernel("linear", MACROS) is first


def test_a_later_process_takes_the_kernel_from_the_cache(fake_gpu, tmp_path):
    compilations = fake_gpu()
    first = kernels.kernel("linear", MACROS).cubin
    (file,) = (tmp_path / "cache").iterdir()
    before = written(file)
    forget()
    assert kernels.kernel("linear", MACROS).cubin == first
    assert len(compilations) == 1
    assert written(file) == before


def test_an_edited_header_never_runs_the_binary_of_the_old_one(fake_gpu, sources):
    compilations = fake_gpu()
    header = sources / "factor.cuh"
    old = kernels.kernel("linear", MACROS).cubin
    forget()
    header.write_text(HEADERS["factor.cuh"].replace("2", "3"))
    new = kernels.kernel("linear", MACROS).cubin
    assert new != old
    assert new == kernels.compile_for("sm_90a", "linear", MACROS).cubin
    forget()
    header.write_text(HEADERS["factor.cuh"])
    assert kernels.kernel("linear", MACROS).cubin == old
    assert len(compilations) == 2


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:10], lambda data: data[:40], lambda data: data[:1000], lambda data: data[:-1],
    lambda data: data[40:], lambda data: data + b"\0", lambda data: bytes(len(data)),
    lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], lambda data: b"0" + data[1:],
], ids=["empty", "10 bytes", "digest only", "1000 bytes", "one byte short", "no digest", "one byte more", "zeros",
        "one bit", "another digest"])  # fmt: skip
def test_a_damaged_file_in_the_cache_is_rebuilt_not_loaded(fake_gpu, tmp_path, damage):
    compilations = fake_gpu()
    whole = kernels.kernel("linear", MACROS).cubin
    (file,) = (tmp_path / "cache").iterdir()
    data = file.read_bytes()
    assert data[40:] == whole
    file.write_bytes(damage(data))
    forget()
    assert kernels.kernel("linear", MACROS).cubin == whole
    assert len(compilations) == 2
    assert file.read_bytes() == data


def remove(folder, monkeypatch):
    folder.rmdir()


def put_a_file_there(folder, monkeypatch):
    folder.rmdir()
    folder.write_text("not a folder")


def forbid(folder, monkeypatch):
    from cupy.cuda import compiler

    monkeypatch.setattr(compiler._kernel_cache_backend, "_cache_dir", "/proc")  # read-only for root, too


def fill_disk(folder, monkeypatch):
    from cupy.cuda import _compiler_cache

    class Full(_compiler_cache.DiskKernelCacheBackend):
        def _write_encoded(self, name, data):
            (Path(self._cache_dir) / "tmpfull").write_bytes(data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cupy.cuda.compiler._kernel_cache_backend", Full(str(folder)))


def belong_to_another_user(folder, monkeypatch):
    usual = open

    def refuse(file, *args, **options):
        if str(file).endswith(".cubin"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return usual(file, *args, **options)

    kernels.kernel("linear", MACROS)  # so that there is a file
    kernels.kernel("linear", HALF)
    forget()
    monkeypatch.setattr("cupy.cuda._compiler_cache.open", refuse, raising=False)


def fill_temporary_folder(folder, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc")


USELESS = [remove, put_a_file_there, forbid, fill_disk, belong_to_another_user, fill_temporary_folder]


@pytest.mark.parametrize("make_useless", USELESS, ids=lambda f: f.__name__)
def test_a_useless_cache_folder_fails_no_kernel_and_changes_nothing_else(fake_gpu, tmp_path, monkeypatch, make_useless):
    from cupy.cuda import compiler

    fake_gpu()
    with monkeypatch.context() as patch:
        make_useless(tmp_path / "cache", patch)
        before = dict(os.environ), compiler._kernel_cache_backend, vars(compiler._kernel_cache_backend).copy()
        built = {macros: kernels.kernel("linear", macros) for macros in (MACROS, HALF)}
        assert (dict(os.environ), compiler._kernel_cache_backend, vars(compiler._kernel_cache_backend)) == before
    for macros, kernel in built.items():
        assert kernel.cubin == kernels.compile_for("sm_90a", "linear", macros).cubin
        assert kernels.kernel("linear", macros) is kernel
    # CuPy knows modules by their paths, and may read them again for another GPU.
    paths = {kernel.path for kernel in built.values()}
    assert len(paths) == 2
    assert all(Path(k.path).read_bytes() == k.cubin for k in built.values())
    assert all(path.startswith("/proc/self/fd/") for path in paths)


def test_a_file_that_cannot_be_replaced_fails_no_kernel(fake_gpu, tmp_path):
    fake_gpu()
    whole = kernels.kernel("linear", MACROS).cubin
    (file,) = (tmp_path / "cache").iterdir()
    file.unlink()
    file.mkdir()
    forget()
    assert kernels.kernel("linear", MACROS).cubin == whole


@pytest.mark.parametrize("useless", [False, True])
def test_a_broken_source_is_reported_whatever_the_cache_is(fake_gpu, sources, tmp_path, useless):
    fake_gpu()
    if useless:
        (tmp_path / "cache").rmdir()
    (sources / "factor.cuh").write_text("constexpr float FACTORY = 2.0f;\n")
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(ca.KernelBuildError, match='"FACTOR" is undefined'):
            kernels.kernel("linear", MACROS)
    (sources / "factor.cuh").write_text(HEADERS["factor.cuh"])
    assert kernels.kernel("linear", MACROS).cubin


@pytest.mark.parametrize("what", ["libnvrtc.so.12", "CUDA headers"])
def test_what_cupy_does_not_find_is_named_with_the_cure(fake_gpu, monkeypatch, what):
    fake_gpu()

    def fail(*_, **__):
        raise RuntimeError(f"Failed to find {what}")

    monkeypatch.setattr("cupy.cuda.compiler._compile_module_with_cache", fail)
    with pytest.raises(ca.KernelBuildError, match=f"{what}.*; pip install .*nvrtc.* nvidia-cuda-runtime-cu12"):
        kernels.kernel("linear", MACROS)


def test_an_error_of_the_gpu_itself_is_not_called_a_build_error(fake_gpu, monkeypatch):
    import cupy

    fake_gpu()

    def fail(*_, **__):
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    monkeypatch.setattr("cupy.cuda.compiler._compile_module_with_cache", fail)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        kernels.kernel("linear", MACROS)


# Filling the cache ahead.


def test_filling_the_cache_says_what_it_compiled_and_is_what_kernels_are_taken_from(fake_gpu):
    compilations = fake_gpu()
    assert [kernels.fill_cache("linear", macros) for macros in (MACROS, HALF, MACROS)] == [True, True, False]
    assert len(compilations) == 2
    kernels.kernel("linear", MACROS)
    assert len(compilations) == 2


@pytest.mark.parametrize("make_useless", USELESS[:-1], ids=lambda f: f.__name__)
def test_a_cache_that_cannot_be_filled_is_named(fake_gpu, tmp_path, monkeypatch, make_useless):
    fake_gpu()
    make_useless(tmp_path / "cache", monkeypatch)
    with pytest.raises(
        ca.FileError, match=r"^the kernel cache .*/cache cannot be used \(.*\); set CUPY_CACHE_DIR .*\.$"
    ):
        kernels.fill_cache("linear", MACROS)


def test_filling_the_cache_reports_a_broken_source(fake_gpu, sources):
    fake_gpu()
    (sources / "factor.cuh").write_text("")
    with pytest.raises(ca.KernelBuildError, match='"FACTOR" is undefined'):
        kernels.fill_cache("linear", MACROS)


def test_the_cache_folder_is_looked_at_by_writing_into_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernels.cache_folder() == str(tmp_path / ".cupy/kernel_cache")
    assert "No such file or directory" in kernels.cache_problem()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert kernels.cache_problem() is None
    assert os.listdir(tmp_path) == []
    for folder in ("/proc", "/proc/none", "", __file__):
        monkeypatch.setenv("CUPY_CACHE_DIR", folder)
        assert kernels.cache_problem().startswith(f"the kernel cache {folder} cannot be used (")
        assert kernels.cache_problem().endswith("; set CUPY_CACHE_DIR to a folder you can write to.")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert kernels.cache_problem().endswith("unset it.")


# Several processes.

BUILDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import kernel_helpers
from cupy_attn import kernels

kernels.SOURCES = Path({sources!r})
compilations = kernel_helpers.pretend_gpu({cache!r})
settings = [(("STORAGE", s), ("UNUSED", str(i))) for s in ("float", "__half") for i in range({count})]
expected = {{s: kernels.compile_for("sm_90a", "linear", s).cubin for s in settings}}
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + {seconds}
rounds = 0
while not rounds or time.monotonic() < end:
    kernels._kernel.cache_clear()
    for s in settings:
        assert kernels.kernel("linear", s).cubin == expected[s]
    rounds += 1
print(len(compilations))
"""


@contextlib.contextmanager
def builders(number, tmp_path, *, count, seconds):
    """Run processes that build the same kernels over and over, and check each; begun together."""
    write_sources(tmp_path / "sources")
    code = BUILDER.format(tests=str(ROOT / "tests"), sources=str(tmp_path / "sources"), cache=str(tmp_path / "cache"),
                          count=count, seconds=seconds)  # fmt: skip
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(number)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n", child.stderr.read()
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


def finish(children) -> list[int]:
    """Return how many times each process compiled."""
    compiled = []
    for child in children:
        stdout, stderr = child.communicate(timeout=120)
        assert child.returncode == 0, stderr
        compiled.append(int(stdout))
    return compiled


def test_processes_that_build_at_once_leave_one_whole_file_for_each_kernel(tmp_path):
    pytest.importorskip("cupy.cuda._compiler_cache")
    with builders(2, tmp_path, count=6, seconds=0) as children:
        compiled = finish(children)
    assert all(1 <= n <= 12 for n in compiled)
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 12
    assert {file.suffix for file in files} == {".cubin"}  # no temporary one is left


def test_processes_build_right_kernels_while_their_files_are_cut_and_deleted(tmp_path):
    pytest.importorskip("cupy.cuda._compiler_cache")
    stop = threading.Event()
    rng = random.Random(0)

    def vandalise():
        while not stop.wait(0.005):
            for file in list((tmp_path / "cache").glob("*.cubin")):
                with contextlib.suppress(OSError):
                    if rng.random() < 0.3:
                        file.unlink()
                    elif rng.random() < 0.5:
                        with open(file, "r+b") as f:
                            f.truncate(rng.randrange(5000))

    vandal = threading.Thread(target=vandalise)
    with builders(2, tmp_path, count=2, seconds=2) as children:
        vandal.start()
        try:
            compiled = finish(children)
        finally:
            stop.set()
            vandal.join()
    assert sum(compiled) > 8  # of 4 kernels: the damage was seen


# Importing CuPy where its cache folder cannot be made.

IMPORTER = """
import os, sys, types
package = types.ModuleType("cupy_attn")  # without __init__, which looks for a GPU and so imports CuPy
package.__path__ = [{package!r}]
sys.modules["cupy_attn"] = package
from cupy_attn import kernels
before = dict(os.environ)
{first}
try:
    cupy = kernels.import_cupy()
    from cupy.cuda import compiler
    assert dict(os.environ) == before
    print(getattr(compiler, "_kernel_cache_backend", None) and compiler._kernel_cache_backend._cache_dir)
    print(kernels.compile_for("sm_90a", *{pair!r}).registers > 0)
except kernels.FileError as error:
    print(error)
"""


def import_in(environment, pair=None, first=""):
    code = IMPORTER.format(package=str(ROOT / "cupy_attn"), pair=pair or warmup.common()[0], first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("environment", [
    {"HOME": "/proc/none"}, {"CUPY_CACHE_DIR": "/proc/none"}, {"CUPY_CACHE_DIR": __file__}, {"CUPY_CACHE_DIR": ""},
], ids=str)  # fmt: skip
def test_cupy_is_imported_even_if_its_cache_folder_cannot_be_made(environment, tmp_path):
    folder, compiles = import_in(environment | {"TMPDIR": str(tmp_path)})
    assert compiles == "True"
    if folder != "None":
        assert Path(folder).parent == tmp_path
    assert os.listdir(tmp_path) == []  # removed when the process ended


def test_cupy_is_imported_as_ever_if_its_cache_folder_can_be_made(tmp_path):
    folder, compiles = import_in({"CUPY_CACHE_DIR": str(tmp_path / "a/b"), "TMPDIR": str(tmp_path)})
    assert compiles == "True"
    assert folder in (str(tmp_path / "a/b"), "None")
    assert os.listdir(tmp_path) == ["a"]


def test_an_import_of_cupy_that_failed_earlier_is_said_to_have_failed():
    first = "try: import cupy\nexcept OSError: pass\nelse: print('imported')"
    printed = import_in({"CUPY_CACHE_DIR": "/proc/none"}, first=first)
    if printed[0] == "imported":
        pytest.skip("this CuPy makes its cache folder later")
    assert printed == ["CuPy failed to import earlier because the kernel cache /proc/none cannot be used (No such file "
                       "or directory); set CUPY_CACHE_DIR to a folder you can write to."]  # fmt: skip


# The same on a GPU that is there.


@pytest.mark.gpu
@pytest.mark.parametrize("make_useless", [None, forbid, fill_disk, fill_temporary_folder])
def test_a_kernel_runs_with_and_without_a_cache(sources, tmp_path, monkeypatch, make_useless):
    import cupy
    from cupy.cuda import _compiler_cache, compiler

    x = cupy.arange(32, dtype=np.float32)  # CuPy's kernel for it belongs in CuPy's own cache
    y = cupy.empty_like(x)
    folder = tmp_path / "cache"
    backend = _compiler_cache.DiskKernelCacheBackend(str(folder))
    monkeypatch.setattr(compiler, "_kernel_cache_backend", backend)
    with monkeypatch.context() as patch:
        if make_useless is not None:
            make_useless(folder, patch)
        kernel = kernels.kernel("linear", MACROS)
    kernel((1,), (32,), (x, y))
    bonus = 100 if kernels.current_arch() == "sm_90a" else 0
    assert np.array_equal(cupy.asnumpy(y), 2 * np.arange(32, dtype=np.float32) + 1 + bonus)
    assert kernel.attributes["local_size_bytes"] == 0
    assert kernel.attributes["num_regs"] > 0
    assert bool(list(folder.glob("*.cubin"))) is (make_useless is None)


@pytest.mark.gpu
def test_a_gpu_takes_the_kernel_that_was_built_ahead(sources, tmp_path, monkeypatch):
    from cupy.cuda import _compiler_cache, compiler

    backend = _compiler_cache.DiskKernelCacheBackend(str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_kernel_cache_backend", backend)
    assert [kernels.fill_cache("linear", MACROS) for _ in range(2)] == [True, False]
    (file,) = (tmp_path / "cache").iterdir()
    before = written(file)
    kernels.kernel("linear", MACROS)
    assert written(file) == before


# Building at import.


def test_building_at_import_can_be_deferred_and_never_raises(monkeypatch):
    asked = []

    def broken(name, macros):
        asked.append((name, macros))
        raise ca.KernelBuildError(f"{name} did not compile")

    monkeypatch.setattr(kernels, "kernel", broken)
    pairs = [("one", MACROS), ("two", HALF)]
    for value in ("1", "yes"):
        monkeypatch.setenv(kernels.DEFER_VARIABLE, value)
        assert kernels.build_common(pairs) == []
    assert asked == []
    for value in ("0", ""):
        monkeypatch.setenv(kernels.DEFER_VARIABLE, value)
        assert kernels.build_common(pairs) == ["one did not compile", "two did not compile"]
    assert sorted(asked) == sorted(pairs * 2)


def test_what_an_earlier_import_built_is_left_to_the_calls_that_need_it(monkeypatch, tmp_path):
    import cupy

    asked, done = [], tmp_path / "done"
    monkeypatch.setattr(kernels, "_all_built", lambda pairs: done)
    monkeypatch.setattr(kernels, "cache_problem", lambda: None)
    monkeypatch.setattr(cupy.cuda, "Device", contextlib.nullcontext)
    monkeypatch.delenv(kernels.DEFER_VARIABLE, raising=False)
    pairs = [("one", MACROS), ("two", HALF)]

    def broken(name, macros):
        raise ca.KernelBuildError(f"{name} did not compile")

    monkeypatch.setattr(kernels, "kernel", broken)
    assert len(kernels.build_common(pairs)) == 2
    assert not done.exists()
    monkeypatch.setattr(kernels, "kernel", lambda *pair: asked.append(pair))
    monkeypatch.setattr(kernels, "cache_problem", lambda: "the kernel cache cannot be used.")
    assert kernels.build_common(pairs) == []
    assert not done.exists()
    monkeypatch.setattr(kernels, "cache_problem", lambda: None)
    assert kernels.build_common(pairs) == kernels.build_common(pairs) == []
    assert sorted(asked) == sorted(pairs * 2)
    assert done.exists()


def test_what_was_built_is_known_by_sources_gpu_and_cuda(monkeypatch, tmp_path):
    import cupy

    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    state = {"arch": "sm_90a", "digest": "a", "runtime": 12090}
    monkeypatch.setattr(kernels, "current_arch", lambda: state["arch"])
    monkeypatch.setattr(kernels, "source_digest", lambda: state["digest"])
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: state["runtime"])
    pairs = [("one", MACROS), ("two", HALF)]
    files = {kernels._all_built(pairs), kernels._all_built(pairs[:1])}
    assert kernels._all_built(pairs[::-1]) in files
    for name, other in (("arch", "sm_80"), ("digest", "b"), ("runtime", 13000)):
        before, state[name] = state[name], other
        files.add(kernels._all_built(pairs))
        state[name] = before
    assert len(files) == 5
    assert {file.parent for file in files} == {tmp_path}
