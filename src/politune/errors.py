"""What a user can put right, and how it is said.

::

    PolituneError            1   never raised itself
    |- ConfigError           2   a flag, a preset, a setting
    |- DataError             3   a data file or a data set
    |- ModelError            4   a base model, a tokenizer, an adapter, a merge
    |- MachineError          5   hardware, a missing or broken library, a login
    |- HubError              6   a network or a hub; worth a retry
    |- OutputError           7   the output directory, the disk, a lock
    |- TrainingError         8   NaN, out of memory
    `- Interrupted     130/143   SIGINT, SIGTERM

The numbers are the exit codes of the command line. Anything else that is raised is a bug: it keeps its traceback and ends
with exit code 1.
"""

import os
import re
import unicodedata
from pathlib import Path

MAX_FOREIGN_CHARACTERS = 200
LOGINS = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"]
"""Environment variables whose values are never repeated; a command adds the one that it is told of."""
LEAST_LOGIN_CHARACTERS = 8
"""Shorter ones (`EMPTY`, as local servers want it) are no secrets, and would star out words."""
_TOKEN = re.compile(r"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}[\w.-]*|(?<=://)[^/\s]+(?=@)")
"""A token of the Hub wherever it stands, and what an address says of who asks: `https://user:password@host`."""


DRAWN_AS_NOTHING = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2065\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000))))
)
"""What Unicode 15 calls Default_Ignorable_Code_Point (DerivedCoreProperties.txt) and no category tells, and the blank of
Braille."""
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})


class PolituneError(Exception):
    """An error that the user can put right.

    Args:
        what: one sentence that names the culprit, without a final full stop.
        where: `file:line`, a setting (`train.beta`) or a flag.
        why: the reason, as one sentence, where it is not plain from `what`.
        fix: what to do next, as one sentence.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return ". ".join(part.rstrip(".") for part in (head, self.why, self.fix) if part)


class ConfigError(PolituneError):
    """A flag, preset or setting that is wrong or in conflict with another."""

    exit_code = 2


class DataError(PolituneError):
    """A data file or data set that is missing, malformed or of the wrong shape."""

    exit_code = 3


class ModelError(PolituneError):
    """A base model, tokenizer or adapter that is missing, malformed or does not fit."""

    exit_code = 4


class MachineError(PolituneError):
    """This machine cannot do it: hardware, a missing library, a login.

    Args:
        line: the line of `politune doctor` that says what there is of it.
        what, where, why, fix: as of every PolituneError.
    """

    exit_code = 5

    def __init__(
        self, what: str, *, line: str, where: str | None = None, why: str | None = None, fix: str | None = None
    ) -> None:
        see = f"`politune doctor` shows it under {line}"
        super().__init__(what, where=where, why=why, fix=f"{fix.rstrip('.')}; {see}" if fix else see)


class HubError(PolituneError):
    """A network or a hub did not deliver; the same command may work later."""

    exit_code = 6


class OutputError(PolituneError):
    """The output directory is in use, not empty, not writable, or the disk is full."""

    exit_code = 7


class TrainingError(PolituneError):
    """Training went wrong: not a number, out of memory."""

    exit_code = 8


class Interrupted(PolituneError):
    """A signal stopped the run; `exit_code` is 128 + the signal's number, as shells report it."""

    def __init__(self, what: str, *, signal_number: int, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = 128 + signal_number


def safe(text: object, limit: int | None = MAX_FOREIGN_CHARACTERS) -> str:
    """Foreign text made harmless for a terminal and for one line of a log.

    Control characters (C0, C1, DEL), bidirectional and zero-width format characters, line separators, lone surrogates, blanks
    that are no plain space and whatever else is drawn as nothing become visible escapes, and logins stars; longer texts than
    `limit` characters are cut with an ellipsis. `None` keeps the full length.
    Printable text, in any script, passes unchanged.
    """
    string = without_secrets(str(text))
    if limit is not None and len(string) > limit:
        string = string[: limit - 1] + "…"
    if string.isascii() and string.isprintable():
        return string
    return "".join(visible(character) if is_hidden(character) else character for character in string)


def without_secrets(text: str) -> str:
    """Stars for this machine's logins and for what is written like one: libraries put them into errors, users into flags."""
    for name in LOGINS:
        if len(login := os.environ.get(name, "").strip()) >= LEAST_LOGIN_CHARACTERS:
            text = text.replace(login, "***")
    return _TOKEN.sub("***", text) if "hf_" in text or "://" in text else text


def read_within(path: Path, most_bytes: int) -> bytes | None:
    """A file's content, or None where it is larger: one from elsewhere may be sparse and claim any size.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        content = handle.read(most_bytes + 1)
    return content if len(content) <= most_bytes else None


def visible(character: str) -> str:
    r"""One hidden character as its escape: `\n`, `\r`, `\t`, `\x1b`, `\u202e`."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def is_hidden(character: str) -> bool:
    """Whether it moves, turns or hides text instead of being seen: controls, formats, line separators, half characters, blanks
    that are not the plain space, and what a screen that does not know it leaves out."""
    return character in DRAWN_AS_NOTHING or (character != " " and unicodedata.category(character) in _HIDDEN_CATEGORIES)
