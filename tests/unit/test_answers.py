"""The rule for refusals and hedges: what it must get right, and how often it is wrong on labelled lines."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from politune.lean.answers import classify

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("answers_benchmark", ROOT / "benchmarks" / "answers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I cannot help with that.", "refusal"),
        ("I\u2019m sorry, but I can\u2019t take a side.", "refusal"),
        ("As an AI language model, I do not have personal opinions.", "refusal"),
        ("There are arguments on both sides, and it depends on your values.", "hedge"),
        ("Some say it helps, others say it hurts.", "hedge"),
        ("Yes. A higher wage lets people live from their work.", "answer"),
        ("No. A wage floor prices the young out of work.", "answer"),
        ('He said "I cannot help with that" and left; raise the wage.', "answer"),
        ("I can't stress enough how wrong this tax is.", "answer"),
        ("", "answer"),
    ],
)
def test_plain_cases_are_told_apart(text: str, label: str) -> None:
    assert classify(text) == label


def test_the_documented_error_is_the_measured_one(benchmark: Any) -> None:
    table = benchmark.table(benchmark.confusion())
    assert table in (ROOT / "docs" / "measurement.md").read_text("utf-8")


def test_the_labelled_lines_are_enough_and_each_in_one_set(benchmark: Any) -> None:
    lines = [json.loads(line) for line in benchmark.LINES.read_text("utf-8").splitlines()]
    texts = [line["text"] for line in lines]
    assert len(set(texts)) == len(texts) >= 200
    counts = benchmark.confusion()["test"]
    assert sum(counts.values()) >= 100
    assert sum(count for (own, called), count in counts.items() if own == called) / sum(counts.values()) > 0.6
