"""A part of `make faults` in every test run: each kind of fault a few times, each trial in a process of its own."""

import importlib

import pytest

from faults.__main__ import SUBJECTS
from faults.lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults") / "lab")


@pytest.mark.parametrize("subject", [subject for subject in SUBJECTS if subject != "cost"])
def test_it_is_survived(subject: str, lab: Lab) -> None:
    found = list(importlib.import_module(f"faults.{subject}").figures(lab, whole=False))
    assert found
    failures = [f"{figure.what}: {line}" for figure in found for line in figure.failures]
    assert not failures, "\n".join(failures)
