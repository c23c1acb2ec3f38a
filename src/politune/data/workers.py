"""One function over the parts of a stream, in processes of their own, its results in the order of the parts."""

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import connection
from typing import Any, TypeVar

from politune.errors import MachineError

T = TypeVar("T")
R = TypeVar("R")

FEW = 3
"""Parts that are done sooner here than processes are started."""
AHEAD = 2
"""Parts that wait for each process: none is idle while the next is read, and memory stays within bounds."""


def cores() -> int:
    """How many processes this one may keep busy."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[T], R], parts: Iterable[T], processes: int | None = None) -> Generator[R]:
    """What `work` makes of each part, in their order, whatever the number of processes.

    Where there are processes, they are at work on the first parts when this returns; others are taken from the iterable as they
    are needed, a few ahead. What `work` raises is raised when its part's turn has come; the processes end with the results, or
    when those are closed.

    Args:
        work: a function at module level, or a partial of one; it and the parts travel to other processes.
        processes: as many as there are cores, where None.
    """
    processes, parts = cores() if processes is None else processes, iter(parts)
    first = list(islice(parts, FEW))
    if processes == 1 or len(first) < FEW:
        return (work(part) for part in chain(first, parts))
    results = _by_processes(work, first, parts, processes, _begin)
    next(results)
    return results


def here(work: Callable[[T], R], part: T) -> Generator[R]:
    """What `work` makes of one part, when it is asked for."""
    yield work(part)


def aside(work: Callable[[T], R], part: T) -> Generator[R]:
    """As `here`, by a process that is at work when this returns, and ends with its work.

    Args:
        work, part: as `in_order` takes them, but for a part that holds what pandas makes: that process has none.
    """
    if cores() == 1:
        return here(work, part)
    results = _by_processes(work, [part], iter(()), 1, _begin_without_pandas)
    next(results)
    return results


def _by_processes(
    work: Callable[[T], R],
    first: Sequence[T],
    parts: Iterator[T],
    processes: int,
    begin: Callable[[], None],
) -> Generator[Any]:
    """Nothing, when the first parts are under way; then the results."""
    # Not forked: libraries may have started threads by now, and a forked copy of them hangs.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=begin)
    waiting: deque[Future[R]] = deque()
    try:
        with _interrupts_blocked():  # a process that is started now inherits that, until it has its own say
            waiting.extend(pool.submit(work, part) for part in first)
        yield None
        for part in parts:
            with _interrupts_blocked():
                waiting.append(pool.submit(work, part))
            if len(waiting) >= processes + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise MachineError(
            "a process that read a part of the data was killed",
            line="memory",
            why="as a rule by the system, for lack of memory",
            fix="close other programs",
        ) from None
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """For a block in which nothing becomes garbage but by its last reference: looking for it among many objects takes time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


class _NoPandas:
    """Says that there is no pandas, which scikit-learn loads where it is installed: 0.2 s and 90 MB that it has no use for."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _begin() -> None:
    """Ctrl-C goes to every process of a terminal; the one that reads the results ends the others, also where it is killed."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_IGN)
    if first := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(first.sentinel,), daemon=True).start()


def _begin_without_pandas() -> None:
    sys.meta_path.insert(0, _NoPandas)
    _begin()


def _end_with(sentinel: int) -> None:
    """Ends this process when the one with the sentinel has ended: an idle worker would wait for its work for ever."""
    connection.wait([sentinel])
    os._exit(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra in one thread: on arrays of this size several wait for one another, and round otherwise."""
    from threadpoolctl import threadpool_limits

    importlib.import_module(
        "sklearn.linear_model"
    )  # and what it computes by: a limit reaches libraries that are loaded
    with threadpool_limits(1):
        yield
