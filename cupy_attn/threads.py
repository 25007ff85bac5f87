"""Threads of our own, and BLAS kept out of their way."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from threadpoolctl import ThreadpoolController


def workers() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(workers() - 1, 1), thread_name_prefix="cupy_attn")


def run_parallel(tasks: Iterable[Callable[[], None]], threads: int) -> None:
    """Run independent tasks on this and ``threads - 1`` more threads, in the order given.

    The first exception, Ctrl-C included, drops the tasks not yet begun and is raised when none is running.
    """
    queue = deque(tasks)

    def drain() -> None:
        while True:
            try:
                task = queue.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException:
                queue.clear()
                raise

    helpers: list[Future[None]] = [_pool().submit(drain) for _ in range(min(threads, len(queue)) - 1)]
    try:
        drain()
    finally:  # after Ctrl-C too: no task outlives the call
        _end(helpers, queue)
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _end(helpers: list[Future[None]], queue: deque[Callable[[], None]]) -> None:
    """Wait until none of them runs; Ctrl-C meanwhile drops the tasks not yet begun and is raised after that."""
    interrupt = None
    for helper in helpers:
        while not (helper.done() or helper.cancel()):
            try:
                helper.exception()
            except KeyboardInterrupt as error:
                queue.clear()
                interrupt = error
    if interrupt is not None:
        raise interrupt


_turn = threading.Lock()


@contextlib.contextmanager
def take_turn(threads: int) -> Iterator[None]:
    """Let one call compute at a time; with several threads of our own, keep BLAS on one, or two pools would fight.

    A call uses every core anyway. And the limit is the whole process's: BLAS picks its kernels by it, so a call
    beside this one would give other bits than alone.
    """
    with _turn:
        if threads == 1:
            yield
            return
        _forget_controlling_thread()
        limit = _blas().limit(limits=1)
        try:
            yield
        finally:
            _forget_controlling_thread()
            limit.restore_original_limits()
            _forget_controlling_thread()


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _forget_controlling_thread() -> None:
    """Let this thread set the limit: threadpoolctl 3.8 listens to the first that did, as long as that one lives."""
    for library in _blas().lib_controllers:
        forget = getattr(library, "clear_controlling_thread", None)
        if forget is not None:
            forget(force=True)


def _after_fork() -> None:
    """Start afresh in a forked child: it has the pool object but not its threads, and nobody to release the lock."""
    global _turn
    _turn = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
