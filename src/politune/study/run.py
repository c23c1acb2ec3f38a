"""`politune study`, told from top to bottom."""

from collections.abc import Callable
from pathlib import Path

from politune import report
from politune.data import sources
from politune.errors import ConfigError
from politune.models import load
from politune.study import results, slurm, spec, work
from politune.study.results import RunState, StudyReport
from politune.study.spec import Task


def study(
    name: str,
    output: Path,
    *,
    only: int | None = None,
    offline: bool = False,
    quiet: bool = False,
    say: Callable[[str], None],
) -> StudyReport:
    """Does what is missing of a study and that nobody else is at, then compares what there is.

    A run that fails does not stop the others. The report is written into the directory whenever a run was added to it.

    Args:
        name: a shipped study, or a file.
        output: the study's directory.
        only: the number of the one run to do.
        offline: use what is on this machine only.
        quiet: no progress of the runs.
        say: takes one line of progress.

    Raises:
        ConfigError: the file, or the settings of an arm, are wrong.
        OutputError: the directory is another study's.
        Interrupted: a signal came.
    """
    asked = spec.load(name)
    tasks = spec.tasks(asked, output)
    if only is not None and not 0 <= only < len(tasks):
        raise ConfigError(f"there is no run {only}: the study has {len(tasks)}, from 0 on", where="--run")
    for task in tasks[: len(asked.arms)]:
        sources.check(task.resolved.run.data)
        load.check(task.resolved.run.model)
    work.claim(asked, tasks, output)
    failures: list[work.Failure] = []
    states: list[RunState] = []
    for number, task in enumerate(tasks):
        held_by = None
        if only in (None, number) and work.state_of(task) != "measured":
            with work.locked(task, output) as held_by:
                if held_by is None:
                    say(f"run {number + 1} of {len(tasks)}")
                    failures += _done(task, asked, offline, quiet, say)
        states.append(_state(task, held_by))
    states = [
        _state(task, state.held_by) for task, state in zip(tasks, states, strict=True)
    ]  # others went on meanwhile
    found = results.gather(asked, tasks, states, failures, output)
    report.write_json(found, output / "report.json")
    report.write_html(found, output / "report.html")
    return found


def slurm_script(name: str, output: Path, *, offline: bool) -> str:
    """The study as a Slurm array; makes its directory, into which the jobs log.

    Raises:
        ConfigError: the file, or the settings of an arm, are wrong.
        OutputError: the directory is another study's.
    """
    asked = spec.load(name)
    tasks = spec.tasks(asked, output)
    work.claim(asked, tasks, output)
    return slurm.script(name, str(output), len(tasks), offline=offline)


def _done(task: Task, asked: spec.Study, offline: bool, quiet: bool, say: Callable[[str], None]) -> list[work.Failure]:
    if work.state_of(task) == "measured":  # by another process, between the look and the lock
        return []
    failure = work.do(task, asked.measure, offline=offline, quiet=quiet, say=say)
    if failure:
        say(f"{task.name} failed with exit code {failure.exit_code}; the other runs go on")
    return [failure] if failure else []


def _state(task: Task, held_by: str | None) -> RunState:
    return RunState(
        task.name, task.arm, task.seed, work.state_of(task), held_by, None, " ".join(("politune", *task.words))
    )
