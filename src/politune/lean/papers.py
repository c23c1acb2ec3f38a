"""What a directory of answers says of itself: which model gave them, on what; it belongs to one set of questions."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from politune import __version__, record
from politune.errors import OutputError, safe
from politune.hashes import sha256_of
from politune.locks import LOCK, owned
from politune.models import adapter as adapters
from politune.models import load, tuned

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "bitsandbytes")
ANSWERED_BY = (
    "lean/plan.py", "lean/prompts.py", "lean/scorer.py", "lean/respondent.py", "models/scoring.py", "models/fused.py",
    "models/writer.py", "models/load.py",
)  # fmt: skip
"""The code that answers depend on: another way of batching rounds otherwise."""


def describe(what: tuned.Subject, base: load.ResolvedModel, tokenizer: Any, dtype: tuned.Dtype) -> dict[str, Any]:
    """A model and its adapter, and all that their answers depend on besides the questions."""
    merged = base.config.get("politune")
    from_merge: Mapping[str, Any] = merged if isinstance(merged, dict) else {}
    return {
        "politune": __version__,
        "base": {
            "name": base.public_name,
            "commit": base.commit,
            "sha256": load.base_sha256(base),
            "config_sha256": record.sha256_of_json(base.config),
        },
        "adapter": None if what.adapter is None else sha256_of(what.adapter / adapters.WEIGHTS),
        "merged_from": from_merge.get("base_sha256"),
        "direction": what.direction if what.adapter else from_merge.get("direction"),
        "dtype": dtype,
        "use_4bit": what.base.use_4bit,
        "device": load.device_name(),
        "code": code(),
        "chat_template_sha256": _template_sha256(tokenizer),
        "libraries": {
            name: version for name, version in record.environment()["libraries"].items() if name in LIBRARIES
        },
    }


def code() -> str:
    """A hash of the code that answers depend on."""
    package = resources.files("politune")
    parts = [package.joinpath(*name.split("/")).read_bytes() for name in ANSWERED_BY]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _template_sha256(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()


@contextlib.contextmanager
def claimed(output: Path, name: str, document: dict[str, Any]) -> Iterator[None]:
    """The directory belongs to this document, and to this process while the block lasts.

    Args:
        name: of the file that holds the document.

    Raises:
        OutputError: another document's answers are in it, another process is at work there, or it cannot be written.
    """
    shown = safe(output)
    fix = "wait for it to end, or choose another -o"
    busy = OutputError(f"another process is at work in {shown}", fix=fix)
    with contextlib.ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(owned(output, busy))
            _claim(output, name, document)
        except OSError as error:
            raise OutputError(f"cannot write into {shown}", why=error.strerror, fix="choose another -o") from error
        yield


def _claim(output: Path, name: str, document: dict[str, Any]) -> None:
    there = record.read_json(output / name)
    if there == document:
        return
    if there is not None:
        changed = sorted(key for key in {*there, *document} if there.get(key) != document.get(key))
        raise OutputError(
            f"{safe(output)} holds answers to something else",
            why=f"it differs in {', '.join(changed)}",
            fix="choose another -o, or remove it first",
        )
    check(output, name)
    record.write_json(output / name, document)


def check(output: Path, name: str) -> None:
    """Refuses a directory of something else, before anything is loaded.

    Raises:
        OutputError: it is not empty and has no such document, or it is a file.
    """
    if (output / name).exists() or not output.exists():
        return
    killed = f".{name}-"  # what a killed process left
    try:
        if any(entry.name != LOCK and not entry.name.startswith(killed) for entry in output.iterdir()):
            raise OutputError(f"{safe(output)} is not empty", fix="choose another -o")
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror, fix="choose another -o") from error
