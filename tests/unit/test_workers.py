"""Work in processes: the results in order, the first error, nothing left running."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from politune.data import workers
from politune.data.workers import aside, in_order
from politune.errors import DataError, MachineError


def double(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 else 0.06)
    return 2 * number, os.getpid()


def refuse_seven(number: int) -> int:
    if number == 7:
        raise DataError("seven", where="a:7", fix="eight")
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_parts(processes: int) -> None:
    found = list(in_order(double, range(12), processes))
    assert [value for value, _ in found] == [2 * number for number in range(12)]
    assert len({process for _, process in found}) == processes


def test_few_parts_start_no_process() -> None:
    assert {process for _, process in in_order(double, range(2), 2)} == {os.getpid()}


def test_an_error_is_raised_when_its_turn_has_come() -> None:
    got = []
    with pytest.raises(DataError) as error:
        for value in in_order(refuse_seven, range(20), 2):
            got.append(value)  # noqa: PERF402 - what came before the error
    assert got == list(range(7))
    assert (error.value.where, error.value.fix, error.value.exit_code) == ("a:7", "eight", 3)


def die(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_is_killed_is_no_bug_of_ours() -> None:
    with pytest.raises(MachineError, match=r"was killed.*lack of memory") as error:
        list(in_order(die, range(20), 2))
    assert error.value.exit_code == 5


def children() -> set[str]:
    """The processes whose parent is this one."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_nothing_is_left_running() -> None:
    before = children()
    results = in_order(refuse_seven, range(30), 2)
    assert next(results) == 0
    assert len(children() - before) >= 2
    results.close()  # type: ignore[attr-defined]
    left = children() - before
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in left if Path(f"/proc/{pid}/cmdline").exists()]
    assert not [command for command in commands if "spawn_main" in command]


def test_parts_are_taken_as_they_are_needed() -> None:
    taken = []

    def parts() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_order(refuse_seven, parts(), 2)
    next(results)
    assert len(taken) < 12
    results.close()  # type: ignore[attr-defined]
    assert len(taken) < 12


def begin(path: Path) -> int:
    path.touch()
    return os.getpid()


def test_what_is_done_aside_has_begun_before_it_is_asked_for_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 2)
    before, begun, end = children(), tmp_path / "begun", time.monotonic() + 60
    results = aside(begin, begun)
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert begun.exists()
    (process,) = results
    assert process != os.getpid()
    assert str(process) not in children() - before


def test_one_core_does_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 1)
    results = aside(begin, tmp_path / "begun")
    assert not (tmp_path / "begun").exists()
    assert list(results) == [os.getpid()]


def has_pandas(_: int) -> bool:
    importlib.import_module("sklearn.linear_model")
    return "pandas" in sys.modules


def test_scikit_learn_loads_no_pandas_in_a_process_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 2)
    assert importlib.util.find_spec("pandas"), "nothing to be left out"
    assert list(aside(has_pandas, 0)) == [False]


def test_parts_may_hold_what_pandas_made() -> None:
    """As rows of Parquet with times in nanoseconds do."""
    pandas = pytest.importorskip("pandas")
    assert list(in_order(str, [pandas.Timestamp(0)] * 4, 2)) == ["1970-01-01 00:00:00"] * 4


def test_one_thread_is_one_where_nothing_was_loaded_before() -> None:
    code = (
        "from politune.data.workers import one_thread\nfrom threadpoolctl import threadpool_info\n"
        "def threads():\n    import scipy.linalg, sklearn.cluster\n"
        "    return {each['num_threads'] for each in threadpool_info()}\n"
        "print(one_thread()(threads)())"
    )
    environment = {key: value for key, value in os.environ.items() if "NUM_THREADS" not in key}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "{1}\n"
