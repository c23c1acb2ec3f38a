"""`politune study`, told from top to bottom."""

from collections.abc import Callable
from pathlib import Path

from politune import report
from politune.data import sources
from politune.errors import ConfigError
from politune.models import load
from politune.study import results, slurm, spec, work
from politune.study.results import StudyReport


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

    A run that fails does not stop the others. The report in the directory is of all that is there, whoever did it.

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
    held_by: dict[str, str] = {}
    for number, task in enumerate(tasks):
        if only in (None, number) and work.state_of(task) != "measured":
            with work.locked(task, output) as lock:
                if isinstance(lock, str):
                    held_by[task.name] = lock
                else:
                    say(f"run {number + 1} of {len(tasks)}")
                    work.do(task, asked.measure, output, lock, offline=offline, quiet=quiet, say=say)
    with work.alone(output):
        found = results.gather(asked, tasks, held_by, output)
        report.write_html(found, output / "report.html")
        report.write_json(found, output / "report.json")
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
    return slurm.script(name, output, len(tasks), offline=offline)
