"""The run directory: one owner at a time, and papers that say what the run is and how it ended."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from politune import record
from politune.errors import Interrupted, OutputError, PolituneError, safe
from politune.locks import LOCK, owned
from politune.models.seal import flaw_of_adapter
from politune.presets import Resolved, command, flatten
from politune.training import checkpoints
from politune.training.processes import is_main_process, world_size

PAPERS = "run.json"
PROBE = ".politune-probe"
LEFT_BY_THE_KILLED = (f".{PAPERS}-", PROBE)
"""How the names of files begin that a killed process may leave before anything of a run is there."""


class Papers:
    """run.json: its document, written whole at each change, by the first process only.

    A resumed run keeps the papers of its former attempts untouched until `begin` says that it really goes on.
    """

    def __init__(self, directory: Path, resolved: Resolved) -> None:
        self.path = directory / PAPERS
        self.resolved = resolved
        self.document = record.read_json(self.path) or {}
        self.begun = False

    @property
    def is_done(self) -> bool:
        """Whether the run has ended; what became of its adapter since, `flaw` says."""
        return self.document.get("status") == "done"

    @property
    def flaw(self) -> str | None:
        """Why the run's adapter is not the one that it exported."""
        return flaw_of_adapter(self.path.parent / "adapter")

    def begin(self, **facts: Any) -> None:
        """The run starts, or goes on: from here on its end is recorded whatever it is."""
        run = self.resolved.run
        former = {"started": record.now(), "resumed": []} if not self.document else self.document
        resumed = [*former.get("resumed", []), *([record.now()] if self.document and not self.begun else [])]
        self.document = {
            "schema_version": record.SCHEMA_VERSION,
            "status": "running",
            "started": former.get("started"),
            "resumed": resumed,
            "method": run.method,
            "title": run.title,
            "direction": run.data.declared_direction,
            "preset": self.resolved.preset,
            "command": command(run),
            "settings": {k: {"value": v, "origin": self.resolved.origins[k]} for k, v in flatten(run).items()},
            "environment": record.environment(),
            "processes": world_size(),
            **facts,
        }
        self.begun = True
        self._write()

    def finish(self, metrics: dict[str, Any]) -> None:
        """The run is done."""
        self.document |= {"status": "done", "finished": record.now(), "metrics": metrics}
        self._write()

    def fail(self, status: str, error: str) -> None:
        """The run ended badly; a resumption that was refused before it began leaves the papers as they were."""
        if self.begun:
            self.document |= {"status": status, "error": error}
            with contextlib.suppress(OutputError):  # the error itself matters more than its record
                self._write()

    def _write(self) -> None:
        if is_main_process() and self.path.parent.is_dir():
            record.write_json(self.path, self.document)


@contextlib.contextmanager
def claimed(directory: Path, resolved: Resolved, resume: bool, resume_words: str) -> Iterator[Papers]:
    """The run directory for one run: a new or empty one, or one to be resumed, locked while the block runs.

    Args:
        resume_words: the command that goes on with a run that is there.

    Raises:
        OutputError: in use by another run, not empty, not writable, or nothing to resume.
    """
    with contextlib.ExitStack() as stack:
        if is_main_process():
            with _writable(directory):
                if not (directory / LOCK).exists():
                    _check(directory, resume, resume_words)  # nothing, not even a lock, is put among other things
                directory.mkdir(parents=True, exist_ok=True)
            fix = "wait for it to end, or choose another --output_dir"
            stack.enter_context(owned(directory, OutputError(f"another run is at work in {safe(directory)}", fix=fix)))
            _check(directory, resume, resume_words)  # a run may have come and gone before the lock was ours
            _probe(directory)
        papers = Papers(directory, resolved)
        try:
            if not resume:
                papers.document = {}
                papers.begin()
            yield papers
        except PolituneError as error:
            papers.fail("interrupted" if isinstance(error, Interrupted) else "failed", str(error))
            raise
        except KeyboardInterrupt:
            papers.fail("interrupted", "interrupted")
            raise
        except BaseException as error:
            papers.fail("failed", f"{type(error).__name__}: {safe(error)}")
            raise


def _check(directory: Path, resume: bool, resume_words: str) -> None:
    shown = safe(directory)
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"{shown} is a file", fix="choose another --output_dir")
    papers = record.read_json(directory / PAPERS) or {}
    # What a damaged run.json said of the run stands in the marker of each checkpoint, too.
    if resume and not papers and not checkpoints.newest(directory / "checkpoints"):
        is_there = (directory / PAPERS).exists()
        why = "its run.json cannot be read, and there is no whole checkpoint" if is_there else "it has no run.json"
        fix = "choose another --output_dir" if is_there else "leave out --resume to start one"
        raise OutputError(f"{shown} holds no run to resume", why=why, fix=fix)
    if not resume and directory.is_dir() and not _is_free(directory, papers):
        fix = "choose another --output_dir"
        if papers or checkpoints.newest(directory / "checkpoints"):
            fix += f", or go on with: {resume_words}"
        raise OutputError(f"{shown} is not empty", fix=fix)


def _probe(directory: Path) -> None:
    with _writable(directory):
        probe = directory / PROBE
        probe.write_bytes(b"x")
        probe.unlink()


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to {safe(directory)}", why=error.strerror, fix="choose another --output_dir"
        ) from error


def _is_free(directory: Path, papers: dict[str, Any]) -> bool:
    """Empty, or with nothing in it but the papers of an attempt that ended before its first step."""
    names = {entry.name for entry in directory.iterdir()}
    entries = {name for name in names if not name.startswith(LEFT_BY_THE_KILLED)} - {LOCK}
    return not entries or (entries == {PAPERS} and papers.get("status") in {"failed", "interrupted"})
