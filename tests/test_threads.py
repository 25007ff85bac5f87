"""A layer called from several threads, beside BLAS's own, and what a failure leaves behind."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time

import numpy as np
import pytest
from conftest import make_config, make_hidden
from gpu_helpers import same_bits
from layer_helpers import CONFIG, in_chunks, make_layer
from threadpoolctl import threadpool_limits

from cupy_attn import cpu
from cupy_attn.threads import _blas, run_parallel, take_turn


@pytest.mark.parametrize("sizes", [([300, 270], [280]), ([30] + [1] * 20, [40] + [1] * 10)], ids=["large", "small"])
def test_two_threads_give_the_bits_of_one(device, sizes):
    """Large calls share the pool of threads, small ones BLAS's."""
    layers = [make_layer("float32", device, seed=seed) for seed in (0, 1)]
    inputs = [make_hidden(CONFIG, 2, sum(s), seed=sum(s)) for s in sizes]
    expected = [in_chunks(layer, x, s) for layer, x, s in zip(layers, inputs, sizes, strict=True)]
    results: list[list[bool]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait(10)
        for _ in range(8):
            results[i].append(same_bits(in_chunks(layers[i], inputs[i], sizes[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[True] * 8, [True] * 8]


def test_a_small_call_beside_a_large_one_gives_the_bits_it_gives_alone(monkeypatch):
    """A large call keeps BLAS on one thread, for the whole process: a decode step beside it must not notice."""
    config = make_config(num_attention_heads=8, num_key_value_heads=1, head_dim=128)
    layer, other = make_layer(config=config), make_layer(config=config, seed=1)
    cache = layer.new_cache(1, 1001)
    layer(make_hidden(config, 1, 1000), cache)
    step = make_hidden(config, 1, 1, seed=2)

    def decode() -> np.ndarray:
        cache.truncate(1000)
        return layer(step, cache)

    decode()  # rotates what is kept
    alone = decode()
    started, release = threading.Event(), threading.Event()
    project = cpu._Run._project

    def wait_inside(self, *args):
        if threading.current_thread() is not threading.main_thread():
            started.set()
            release.wait(0.5)
        project(self, *args)

    monkeypatch.setattr(cpu._Run, "_project", wait_inside)
    large = threading.Thread(target=other, args=(make_hidden(config, 1, 600),))
    large.start()
    assert started.wait(10)
    beside = decode()
    release.set()
    large.join(60)
    assert same_bits(beside, alone)


def failing(method, error: BaseException, *, in_helper: bool):
    """Return ``method`` so that it fails once: in a helper thread, while this one waits, or in this one."""
    raised = threading.Event()

    def run(self, *args):
        here = threading.current_thread() is threading.main_thread()
        if here and in_helper:
            assert raised.wait(10), "no task ran in a helper thread"
            time.sleep(0.01)
        elif here != in_helper and not raised.is_set():
            raised.set()
            raise error
        return method(self, *args)

    return run


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError("full")], ids=repr)
@pytest.mark.parametrize("in_helper", [False, True], ids=["main", "helper"])
@pytest.mark.parametrize("phase", ["_project", "_attend", "_project_output"])
def test_a_failing_task_leaves_the_cache_as_it_was(small_blocks, monkeypatch, error, in_helper, phase):
    layer = make_layer()
    x, past = make_hidden(CONFIG, 2, 20), make_hidden(CONFIG, 2, 9, seed=2)
    cache, untouched = layer.new_cache(2, 40), layer.new_cache(2, 40)
    layer(past, cache)
    layer(past, untouched)
    before = {name: array.tobytes() for name, array in cache.state().items()}
    out = np.full_like(x, 7)
    with monkeypatch.context() as patch:
        patch.setattr(cpu._Run, phase, failing(getattr(cpu._Run, phase), error, in_helper=in_helper))
        with pytest.raises(type(error)) as caught:
            layer(x, cache, out=out)
    assert caught.value is error
    assert {name: array.tobytes() for name, array in cache.state().items()} == before
    assert (out == 7).all()
    assert same_bits(layer(x, cache), layer(x, untouched))


def test_a_failure_drops_what_has_not_begun_and_waits_for_what_has():
    both_run, log = threading.Barrier(2), []

    def fail_here_work_there():
        both_run.wait(10)
        if threading.current_thread() is threading.main_thread():
            raise RuntimeError("broken")
        time.sleep(0.1)
        log.append("finished")

    later = [lambda: log.append("begun after the failure")] * 20
    with pytest.raises(RuntimeError, match="broken"):
        run_parallel([fail_here_work_there] * 2 + later, threads=2)
    assert log == ["finished"]


def blas_threads() -> list[int]:
    """Return the threads of NumPy's BLAS; other libraries, JAX with SciPy's, bring their own later."""
    return [pool["num_threads"] for pool in _blas().info()]


def test_large_calls_of_any_thread_keep_blas_on_one(monkeypatch):
    """threadpoolctl 3.8 listens to the thread that set a limit first, as long as that one lives: here this one."""
    before, during = blas_threads(), []
    project = cpu._Run._project

    def note(self, *args):
        during.append(blas_threads())
        project(self, *args)

    monkeypatch.setattr(cpu, "THREADED_ROWS", 1)
    monkeypatch.setattr(cpu._Run, "_project", note)
    layer, x = make_layer(), make_hidden(CONFIG, 2, 20)
    layer(x)
    threadpool_limits(before[0], user_api="blas")
    thread = threading.Thread(target=layer, args=(x,))
    thread.start()
    thread.join(60)
    assert len(during) >= 2
    assert during == [[1] * len(before)] * len(during)
    assert blas_threads() == before


def test_calls_take_turns_and_blas_has_its_threads_back():
    before = blas_threads()
    inside, leave, log = threading.Event(), threading.Event(), []

    def first():
        with take_turn(2):
            inside.set()
            leave.wait(10)
            log.append("first")

    other = threading.Thread(target=first)
    other.start()
    assert inside.wait(10)
    assert blas_threads() == [1] * len(before)
    threading.Timer(0.1, leave.set).start()
    with take_turn(1):
        log.append("second")
        assert blas_threads() == before
    other.join(10)
    assert log == ["first", "second"]
    with take_turn(2):
        assert blas_threads() == [1] * len(before)
    assert blas_threads() == before


def _one_call(layer, x, expected, queue):
    queue.put(same_bits(layer(x), expected))


def test_a_forked_child_can_call_the_layer():
    layer, x = make_layer(), make_hidden(CONFIG, 2, 200)
    expected = layer(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with take_turn(2):  # held by this thread at the time of the fork
        child = context.Process(target=_one_call, args=(layer, x, expected, queue))
        child.start()
    assert queue.get(timeout=60)
    child.join(10)
    assert child.exitcode == 0


def test_blas_has_its_threads_back_after_a_failure(monkeypatch):
    before, during = blas_threads(), []

    def fail(self, *args):
        during.append(blas_threads())
        raise RuntimeError("broken")

    monkeypatch.setattr(cpu, "THREADED_ROWS", 1)
    monkeypatch.setattr(cpu._Run, "_project", fail)
    with pytest.raises(RuntimeError, match="broken"):
        make_layer()(make_hidden(CONFIG, 2, 20))
    assert during[0] == [1] * len(before)
    assert blas_threads() == before


def test_ctrl_c_while_a_helper_is_waited_for_waits_for_it():
    begun, ended = threading.Event(), []

    def task():
        if threading.current_thread() is threading.main_thread():
            begun.wait()
            return
        begun.set()
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        run_parallel([task, task], 2)
    assert ended == [True]
