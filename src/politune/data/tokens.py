"""Token ids of earlier runs, kept in the user's cache so that the next run on the same rows does not tokenise again.

A file is found by what its ids follow from, by content and never by path or date, so that it cannot be out of date; and
it begins with the hash of what it holds, so that a damaged one is seen and made again.
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from politune.cache import user_cache
from politune.data import format as rows_format
from politune.data.format import ChatRow, Encoded, PreferenceRow
from politune.data.workers import no_collection

FOLDER = "tokens"
SUFFIX = ".ids"
MOST_BYTES = 2_000_000_000
"""What all files together may take; those that were not used for longest go first."""

LEAST_CHARACTERS = 2_000_000
"""Shorter data are tokenised in less than half a second, and are not kept."""

LIBRARIES = ("tokenizers", "transformers", "jinja2")
UNREPEATABLE = ("strftime_now", "random", "lipsum")
"""What makes a template render otherwise at another time, as Llama 3.2's does, which writes the date."""

DIGEST_BYTES = hashlib.sha256().digest_size


def encode(rows: Sequence[PreferenceRow | ChatRow], tokenizer: Any) -> list[Encoded]:
    """As `format.encode`, from the cache where these rows were tokenised before.

    A cache that cannot be read or written is no error. Raises ModelError as `format.encode` does.
    """
    directory = user_cache()
    key = _key(rows, tokenizer) if directory and _is_worth_it(rows) else None
    if directory is None or key is None:
        return rows_format.encode(rows, tokenizer)
    path = directory / FOLDER / (key + SUFFIX)
    found = _read(path, tokenizer.eos_token_id)
    if found is None:
        found = rows_format.encode(rows, tokenizer)
        _write(path, found)
    return found


def _is_worth_it(rows: Sequence[PreferenceRow | ChatRow]) -> bool:
    characters = 0
    for row in rows:
        characters += sum(map(len, row.completions)) + sum(len(turn["content"]) for turn in row.prompt)
        if characters >= LEAST_CHARACTERS:
            return True
    return False


def _key(rows: Sequence[PreferenceRow | ChatRow], tokenizer: Any) -> str | None:
    """SHA-256 over everything that the ids follow from; None where that cannot be told."""
    backend, template = rows_format.rust_backend(tokenizer), json.dumps(tokenizer.chat_template)
    if backend is None or any(word in template for word in UNREPEATABLE):
        return None
    try:
        code = [inspect.getsource(module) for module in (rows_format, sys.modules[__name__])]
    except OSError:  # installed as byte code alone
        return None
    facts = {
        "tokenizer": backend.to_str(),
        "class": repr(type(tokenizer)),
        "template": template,
        "special tokens": tokenizer.special_tokens_map,  # the template's variables
        "split special tokens": tokenizer.split_special_tokens,
        "end": tokenizer.eos_token_id,
        "libraries": [importlib.metadata.version(name) for name in LIBRARIES],
        "code": code,
        "byte order": sys.byteorder,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(json.dumps([row.prompt, row.completions]).encode() + b"\n")
    return digest.hexdigest()


def _read(path: Path, end: int | None) -> list[Encoded] | None:
    """The rows in a file; None where there is none or where it is damaged."""
    try:
        content = memoryview(path.read_bytes())
        os.utime(path)
    except OSError:
        return None
    if content[:DIGEST_BYTES] != _digest(path, content[DIGEST_BYTES:]):
        return None
    numbers = array("i")
    numbers.frombytes(content[DIGEST_BYTES:])
    with no_collection():
        return _unpack(numbers, end)


def _write(path: Path, encoded: Sequence[Encoded]) -> None:
    """Writes the file in one step and removes the oldest ones; does nothing where the cache cannot be written."""
    content = _pack(encoded).tobytes()
    if len(content) > MOST_BYTES:
        return
    draft = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as handle:
            handle.write(_digest(path, content))
            handle.write(content)
        draft.replace(path)
        _remove_oldest(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()


def _digest(path: Path, content: bytes | memoryview) -> bytes:
    """Of the content and of what it is the content of: a file under another's name is a damaged one."""
    digest = hashlib.sha256(path.stem.encode())
    digest.update(content)
    return digest.digest()


def _remove_oldest(directory: Path) -> None:
    """Keeps the newest files, `MOST_BYTES` together; what killed processes left grows old and goes with them."""
    entries = [(entry.stat(), entry.path) for entry in os.scandir(directory)]
    total = 0
    for facts, path in sorted(entries, key=lambda entry: entry[0].st_mtime, reverse=True):
        total += facts.st_size
        if total > MOST_BYTES:
            Path(path).unlink(missing_ok=True)


def _pack(encoded: Sequence[Encoded]) -> "array[int]":
    """The rows in one array: how many sequences each has, what it lost, whether it stops, the lengths, and the ids."""
    numbers = array("i")
    for item in encoded:
        sequences = (item.prompt_ids, *item.completions)
        numbers.extend((len(sequences), item.lost_prompt_tokens, item.stops, *map(len, sequences)))
        for ids in sequences:
            numbers.extend(ids)
    return numbers


def _unpack(numbers: "array[int]", end: int | None) -> list[Encoded]:
    encoded, place = [], 0
    while place < len(numbers):
        count, lost, stops = numbers[place : place + 3]
        lengths, place = numbers[place + 3 : place + 3 + count], place + 3 + count
        sequences = []
        for length in lengths:
            sequences.append(numbers[place : place + length].tolist())
            place += length
        encoded.append(Encoded(sequences[0], tuple(sequences[1:]), lost, bool(stops), end))
    return encoded
