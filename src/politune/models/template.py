"""A chat template is a program that came with a model, tried before anything depends on it.

Jinja's sandbox keeps it from code and files, not from running for ever or asking for all memory, also inside one operation of
the interpreter, which no timer of this process could end. So short conversations are rendered in a process of their own, under
limits that the kernel keeps. A template that misbehaves with certain words alone is not found this way.
"""

import os
import resource
import select
import signal
import warnings
from pathlib import Path
from typing import Any

from politune.errors import ModelError, safe

PROCESSOR_SECONDS = 2
"""For some lines of text; the templates in use take a hundredth of it, compiling included."""
PATIENCE_SECONDS = 60
"""For a process that waits for something, which costs no processor time."""
MOST_BYTES = 256 * 2**20
MOST_CHARACTERS = 100_000
TALKS = (("user",), ("user", "assistant"), ("system", "user"))
"""Who speaks in a conversation that is tried; many a template refuses a system turn, none the others."""


def check(tokenizer: Any, name: str) -> None:
    """Renders conversations of a few words, as training and measuring will with theirs; does nothing without a template.

    Raises:
        ModelError: the template does not end, asks for too much memory, or cannot write a question and an answer.
    """
    if getattr(tokenizer, "chat_template", None) and (flaw := _flaw(tokenizer)):
        raise ModelError(
            f"the chat template of {safe(name)} cannot be used",
            why=flaw,
            fix="take another base model, or mend its template",
        )


def _flaw(tokenizer: Any) -> str:
    """What is wrong, found by a forked process, which has the tokenizer already; empty where nothing is."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of locks that other threads may hold: rendering takes none
        child = os.fork()
    if child == 0:
        try:
            os.write(writing, _try(tokenizer).encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as words:
            said, _, _ = select.select([words], [], [], PATIENCE_SECONDS)
            flaw = words.read().decode() if said else f"it says nothing for {PATIENCE_SECONDS} s"
    finally:
        os.kill(child, signal.SIGKILL)  # it has ended, or this process was asked to
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return f"it does not end within {PROCESSOR_SECONDS} s of processor time"
    return flaw or ("it brings the interpreter down" if status else "")


def _try(tokenizer: Any) -> str:
    """In the process of its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, PROCESSOR_SECONDS)
    if (memory := _address_space_bytes()) is not None:
        _limit(resource.RLIMIT_AS, memory + MOST_BYTES)
    for speakers in TALKS:
        talk = [{"role": speaker, "content": "Hello."} for speaker in speakers]
        try:
            text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=speakers[-1] == "user")
        except MemoryError:
            return f"it asks for more than {MOST_BYTES >> 20} MiB of memory"
        except Exception as error:  # noqa: BLE001 - templates raise what they like
            if "system" not in speakers:
                return f"a conversation of {' and '.join(speakers)}: {safe(error)}"
        else:
            if len(text) > MOST_CHARACTERS:
                return f"it makes more than {MOST_CHARACTERS:,} characters of one word"
    return ""


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _address_space_bytes() -> int | None:
    """Of this process; None where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except OSError:
        return None
    return int(pages) * resource.getpagesize()
