"""Checkpoints that are known to be whole: a marker with a hash per file, written last.

TRL's trainer writes `checkpoint-N` in place, file by file. A checkpoint counts only once its marker stands in it; resuming takes
the newest one whose files still have the marker's hashes and sets the others aside.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from politune.errors import safe
from politune.models import files
from politune.models.seal import SEAL, changed, contents, read, seal
from politune.record import model_card
from politune.writing import sync

# A pickle of every trainer argument, which resuming never reads.
PICKLED_ARGUMENTS = "training_args.bin"
SET_ASIDE = ".damaged"


def commit(checkpoint: Path, identity: dict[str, Any], metadata: Mapping[str, str]) -> None:
    """Makes a written checkpoint count: discloses, drops the pickled arguments, hashes and fsyncs every file, marks it.

    Args:
        checkpoint: a directory `checkpoint-N` whose files are complete.
        identity: what a resumed run must share with this one (see `training.identity`).
        metadata: the disclosure; a checkpoint is an adapter too.
    """
    files.rewrite_metadata(checkpoint / "adapter_model.safetensors", metadata)
    (checkpoint / "README.md").write_text(model_card(metadata, "adapter"), encoding="utf-8")
    (checkpoint / PICKLED_ARGUMENTS).unlink(missing_ok=True)
    seal(checkpoint, {"step": step_of(checkpoint), "identity": identity})
    sync(checkpoint.parent)


def rotate(directory: Path, keep: int) -> None:
    """Removes the oldest committed checkpoints until `keep` are left; the marker goes first, so that none is half there.

    Unfinished ones that were set aside go once `keep` whole ones have come after them.
    """
    committed = [each for each in _written(directory) if (each / SEAL).is_file()]
    for checkpoint in committed[:-keep]:
        (checkpoint / SEAL).unlink()
        shutil.rmtree(checkpoint)
    if len(committed) >= keep:
        for checkpoint in _written(directory / SET_ASIDE):
            if not (checkpoint / SEAL).exists():
                shutil.rmtree(checkpoint)
        with contextlib.suppress(OSError):  # damaged ones stay in it
            (directory / SET_ASIDE).rmdir()


def newest(directory: Path, set_aside: Callable[[str], None] | None = None) -> Path | None:
    """The newest whole checkpoint, or None.

    Args:
        set_aside: those that are damaged or were never finished are moved to `.damaged/`, each with one line through this;
            None leaves them where they are (of several processes only the first may move).
    """
    found = None
    for checkpoint in reversed(_written(directory)):
        # Behind the newest whole one only what a killed process left half removed is looked for.
        flaw = _flaw(checkpoint) if found is None else _unfinished(checkpoint)
        if flaw is None:
            found = found or checkpoint
        elif set_aside is not None:
            _move(checkpoint, directory / SET_ASIDE / checkpoint.name)
            set_aside(f"set aside {checkpoint.name}: {flaw}")
    return found


def taken_bytes(directory: Path) -> int:
    """What the checkpoints of a run take of its disk, which a run that goes on gets back."""
    paths = (path for checkpoint in _written(directory) for path in checkpoint.rglob("*"))
    return sum(path.stat().st_size for path in paths if path.is_file())


def _move(checkpoint: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    checkpoint.rename(target)


def identity_of(checkpoint: Path) -> dict[str, Any]:
    """What the run that wrote this checkpoint said it was."""
    return dict((read(checkpoint) or {}).get("identity", {}))


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name, -1 where the name is none of a checkpoint's."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def _written(directory: Path) -> list[Path]:
    """The checkpoints by their names, oldest first; what somebody keeps beside them under a name of their own is none."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in paths if path.is_dir() and step_of(path) >= 0), key=step_of)


def _flaw(checkpoint: Path) -> str | None:
    if flaw := _unfinished(checkpoint):
        return flaw
    marker = read(checkpoint)
    if marker is None or set(marker) != {"step", "identity", "files"}:
        return "its marker cannot be read"
    if marker["step"] != step_of(checkpoint):
        return f"it is step {safe(marker['step'])} under another name"
    strangers = {str(path.relative_to(checkpoint)) for path in contents(checkpoint)} - set(marker["files"])
    if strangers:
        return f"{safe(min(strangers))} was not saved with it"
    return changed(checkpoint, marker, marker["files"])


def _unfinished(checkpoint: Path) -> str | None:
    return None if (checkpoint / SEAL).exists() else "it is not complete"
