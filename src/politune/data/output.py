"""Where a built data set is written: a hidden file that is renamed when it is whole, and nobody's file replaced."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from politune.data.sources import MADE_BY, MANIFEST
from politune.errors import OutputError, safe
from politune.hashes import sha256_of
from politune.locks import locked
from politune.record import read_json
from politune.writing import sync, write_whole

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
CARD = ".md"


def suffix_of(output: Path) -> str:
    """That of a data set; empty where the name is none."""
    return next((suffix for suffix in reversed(SUFFIXES) if output.name.endswith(suffix)), "")


@contextlib.contextmanager
def drafted(output: Path, replaces: bool) -> Iterator[Path]:
    """A hidden file beside the output, this build's alone while the block runs, and gone after it unless it was renamed.

    Its lock is the kernel's and goes with the process that has it: what a killed build left is taken over.

    Raises:
        OutputError: the output is not ours to replace, another build is at work on it, or it cannot be written.
    """
    draft = output.with_name(f".{output.name}.draft")
    _check_name(output)
    if not replaces:
        _check_is_ours(output, draft)
    with disk_errors(output):
        handle = _locked_file(draft, output)
        _remove_leftovers(output)
    try:
        yield draft
    finally:
        with contextlib.suppress(OSError):
            if _is_still(draft, handle):
                draft.unlink()
        os.close(handle)


class InUse(OutputError):
    """Another build of the same file is at work."""


def _locked_file(draft: Path, output: Path) -> int:
    while True:
        handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not locked(handle, output.parent):
            os.close(handle)
            raise InUse(f"another build of {safe(output)} is at work", fix="wait for it to end, or name another file")
        if _is_still(draft, handle):
            return handle
        os.close(handle)  # renamed or removed between the opening and the lock: no draft any more


def _remove_leftovers(output: Path) -> None:
    """What a build left that was killed while it wrote manifest or card."""
    begins = "|".join(re.escape(_beside(output, suffix).name) for suffix in (MANIFEST, CARD))
    name = re.compile(rf"\.({begins})-[a-z0-9_]{{8}}")  # as tempfile ends them
    for path in output.parent.iterdir():
        if name.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _is_still(draft: Path, handle: int) -> bool:
    try:
        found = draft.stat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (os.fstat(handle).st_dev, os.fstat(handle).st_ino)


def _check_name(output: Path) -> None:
    if not suffix_of(output):
        raise OutputError(
            f"{safe(output.name)} is no name of a data set", where="--output", fix=f"end it in {', '.join(SUFFIXES)}"
        )
    if output.is_dir() or not output.parent.is_dir():
        what = "is a directory" if output.is_dir() else "lies in a directory that does not exist"
        raise OutputError(f"{safe(output)} {what}", where="--output")


def _check_is_ours(output: Path, draft: Path) -> None:
    """Whether whatever is there was made by this command and is as it was made; a killed build may have left it as a draft."""
    papers = [_beside(output, suffix) for suffix in (MANIFEST, CARD)]
    manifest = read_json(papers[0])
    made = manifest if manifest and manifest.get("made_by") == MADE_BY else None
    there = [path for path in (output, *papers) if path.exists()]
    if made is None:
        if not there:
            return
        why = f"it has no {MANIFEST} of a former build beside it"
    elif output.exists() and made.get("sha256") not in [sha256_of(path) for path in (output, draft) if path.is_file()]:
        why = "it was changed after it was built: its sha256 is not that of its manifest"
    else:
        return
    raise OutputError(f"{safe(there[0])} exists", why=why, fix="name another file with -o")


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def refuse_source(output: Path, paths: Sequence[Path]) -> None:
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise OutputError(f"{safe(output)} is one of the recipe's sources", fix="name another file with -o")


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {safe(output)}", why=error.strerror or safe(error), fix="free some space, or name another file with -o"
        ) from error  # fmt: skip


def publish(draft: Path, output: Path, manifest: str, card: str) -> None:
    """Manifest and card first: a build that is killed before the last rename is done again over them."""
    papers = {_beside(output, MANIFEST): manifest, _beside(output, CARD): card}
    new = [path for path in papers if not path.exists()]
    try:
        for path, text in papers.items():
            write_whole(path, text)
        draft.replace(output)
    except BaseException:
        if not output.exists():
            for path in new:
                path.unlink(missing_ok=True)
        raise
    sync(output.parent)
