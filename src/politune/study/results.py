"""What a study found: every run with its verdict, and the comparison of all that share a base."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from politune import record
from politune.errors import PolituneError, safe
from politune.lean import compare, measure
from politune.lean.compare import CompareReport, TunedRun
from politune.lean.rows import Row
from politune.report import Cell, Facts, Lines, Section, Table
from politune.study import work
from politune.study.spec import Study, Task
from politune.study.work import Failure, State
from politune.training.identity import OF_THE_MACHINE

OF_A_SEED = {"train.seed", "sha256 of the training tokens", *OF_THE_MACHINE}
"""Which rows are trained on is drawn with the seed."""


@dataclass(frozen=True)
class RunState:
    """A run: how far it is, who is at work on it, what its first verdict says, and the command that trains it."""

    run: str
    arm: str
    seed: int
    state: State
    held_by: str | None
    verdict: str | None
    command: str


@dataclass(frozen=True)
class StudyReport:
    """A study; its comparisons are of the runs that are measured, one for all that may be compared.

    Args:
        notes: what of it is missing from the comparisons, and why.
    """

    title: str
    directory: str
    runs: tuple[RunState, ...]
    failures: tuple[Failure, ...]
    comparisons: tuple[CompareReport, ...]
    notes: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        return all(run.state == "measured" for run in self.runs)

    @property
    def headline(self) -> str:
        if not self.is_done:
            done = sum(run.state == "measured" for run in self.runs)
            return f"{self.title}: {done} of {len(self.runs)} runs are done"
        arms = dict.fromkeys(run.arm for run in self.runs)
        words = (Counter(run.verdict or "not compared" for run in self.runs if run.arm == arm) for arm in arms)
        told = ("; ".join(f"{word} in {count}" for word, count in each.most_common()) for each in words)
        return f"{self.title}: " + ". ".join(f"{arm}: {text}" for arm, text in zip(arms, told, strict=True))

    def sections(self) -> Sequence[Section]:
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (run.arm, run.seed, f"{run.state}, at work: {run.held_by}" if run.held_by else run.state, run.verdict or "")
            for run in self.runs
        )
        found: list[Section] = [Table("Runs", ("arm", "seed", "state", "verdict"), rows)]
        if self.notes:
            found.append(Lines("", self.notes))
        for failure in self.failures:
            facts = (("command", failure.command), ("exit code", failure.exit_code), ("last words", failure.words))
            found.append(Facts(f"Failed: {failure.task}", facts))
        for each in self.comparisons:
            found += each.sections()
        found.append(Lines("The commands that made it", tuple(run.command for run in self.runs), boxed=True))
        return found


@dataclass(frozen=True)
class _Group:
    """Runs that may be compared, and the base's rows as one of them has them."""

    document: Mapping[str, Any]
    rows: Sequence[Row]
    runs: dict[tuple[str, int], TunedRun]


def gather(study: Study, tasks: Sequence[Task], held_by: Mapping[str, str], output: Path) -> StudyReport:
    """The report of what is there.

    Args:
        held_by: who is at work on a run, by its name.
    """
    states = {task.name: work.state_of(task) for task in tasks}
    notes = [*_unlike([task for task in tasks if states[task.name] != "missing"])]
    comparisons = _compare(study, [task for task in tasks if states[task.name] == "measured"], notes)
    verdicts = {run.run: run.verdict.word for each in comparisons if each.parts for run in each.parts[0].runs}
    runs = tuple(
        RunState(
            task.name, task.arm, task.seed, states[task.name],
            None if states[task.name] == "measured" else held_by.get(task.name), verdicts.get(task.name),
            shlex.join(["politune", *task.words]),
        )
        for task in tasks
    )  # fmt: skip
    failures = tuple(failure for task in tasks if (failure := work.failure_of(task, output)))
    return StudyReport(study.title, str(output), runs, failures, comparisons, tuple(notes))


def _unlike(tasks: Sequence[Task]) -> Iterator[str]:
    """In what the seeds of an arm differ beside the seed: somebody changed the data, the base or a library in between."""
    first: dict[str, tuple[Task, Mapping[str, Any]]] = {}
    for task in tasks:
        found = (record.read_json(task.directory / "run.json") or {}).get("identity")
        if not isinstance(found, dict):
            continue
        of_arm, before = first.setdefault(task.arm, (task, found))
        for key in sorted(before.keys() | found.keys()):
            if key not in OF_A_SEED and before.get(key) != found.get(key):
                values = f"{safe(before.get(key))} -> {safe(found.get(key))}"
                yield f"{task.name} differs from {of_arm.name} in more than the seed: {safe(key)}: {values}"


def _compare(study: Study, tasks: Sequence[Task], notes: list[str]) -> tuple[CompareReport, ...]:
    """One comparison for all that may be compared; what is left out is noted."""
    groups: dict[tuple[str, ...], _Group] = {}
    for task in tasks:
        try:
            document, rows = measure.read(task.measurement)
            run = compare.tuned_run(task.name, task.arm, document, rows)
            kind = (document["base"]["sha256"], *(str(document.get(key)) for key in compare.SAME))
            group = groups.get(kind, _Group(document, rows, {}))
            compare.check_parts(run, group.rows)
        except PolituneError as error:
            notes.append(f"{task.name} is not compared: {error}")
            continue
        groups[kind] = group
        group.runs[task.arm, task.seed] = run
    if len(groups) > 1:
        notes.append("Not all runs may be compared with one another: each group has its own comparison.")
    found = []
    for group in groups.values():
        controlled = []
        for (arm, seed), run in group.runs.items():
            control = group.runs.get((str(study.control), seed))
            if study.control and control is None:
                notes.append(f"{run.name} has no control: {study.control}/seed-{seed} is not there to be compared.")
            controlled.append(replace(run, control=control.rows if control and arm != study.control else None))
        label = f"{study.control}, the run of the same seed" if study.control else None
        try:
            found.append(compare.judge(group.document, group.rows, controlled, control=label))
        except PolituneError as error:
            notes.append(f"No comparison of {', '.join(run.name for run in controlled)}: {error}")
    return tuple(found)
