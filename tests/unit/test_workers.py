"""Work in processes: the results in order, the first error, nothing left running."""

import os
import time
from collections.abc import Iterator

import pytest

from politune.data.workers import in_order
from politune.errors import DataError


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
