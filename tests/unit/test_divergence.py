"""What a run is warned of: made-up histories, each with one thing wrong, and one with nothing."""

from typing import Any

import pytest

from politune.training.divergence import share_of_longer, signs


def history(count: int = 30, **last: float) -> list[dict[str, Any]]:
    """Lines whose numbers go from those of an ordinary first step to `last` on a straight line."""
    first = {"loss": 0.693, "logps/chosen": -130.0, "rewards/margins": 0.0, "rewards/accuracies": 0.5}
    end = {"loss": 0.4, "logps/chosen": -150.0, "rewards/margins": 2.0, "rewards/accuracies": 0.9, **last}
    return [
        {name: value + (end[name] - value) * step / max(count - 1, 1) for name, value in first.items()}
        for step in range(count)
    ]


def test_an_ordinary_run_is_not_warned_of() -> None:
    for count in range(1, 60):
        assert not list(signs(history(count), longer=1.0))


@pytest.mark.parametrize(
    ("kind", "last", "words"),
    [
        ("loss", {"loss": 1.6}, "the loss rose from 0.693"),
        ("collapse", {"logps/chosen": -400.0}, "fell from -1"),
        ("margin", {"rewards/margins": 30.0}, "the reward margin is 2"),
    ],
)
def test_each_sign_has_its_numbers(kind: str, last: dict[str, float], words: str) -> None:
    [(found, text)] = signs(history(**last), longer=0.5)
    assert found == kind
    assert words in text


def test_accuracy_that_length_alone_explains() -> None:
    """Perfect from step 2 on; a fault of the data only where nearly every chosen text is the longer, or the shorter, one."""
    lines = [{"loss": 0.69, "rewards/accuracies": 0.0}, *[{"loss": 0.6, "rewards/accuracies": 1.0}] * 5]
    assert not list(signs(lines[:5], longer=0.97)), "four lines are too few"
    assert "longer one in 97% of the pairs" in next(iter(signs(lines, longer=0.97)))[1]
    assert "shorter one in 98% of the pairs" in next(iter(signs(lines, longer=0.02)))[1]
    assert not list(signs(lines, longer=0.6))
    lines[3] = {"loss": 0.6, "rewards/accuracies": 0.75}
    assert not list(signs(lines, longer=0.97))


def test_completions_without_a_pair_have_no_sides() -> None:
    """One longer, one equal (which counts half), one shorter: 1.5 of 3."""
    assert share_of_longer([([1, 2], [1]), ([1], [1]), ([1], [1, 2])]) == 0.5
    assert share_of_longer([([1, 2],)]) == 0.5
    assert share_of_longer([]) == 0.5
