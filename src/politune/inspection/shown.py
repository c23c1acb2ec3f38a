"""Rows that a person would ask to see, rendered so that nothing in them reaches a terminal or a page but words."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from politune.data.format import Encoded, PreferenceRow
from politune.data.texts import whole_text
from politune.data.words import word_hashes
from politune.errors import safe
from politune.inspection.findings import Shown
from politune.inspection.pairs import Similar
from politune.inspection.scan import MARKS, AnyRow, Scan, rows_at
from politune.inspection.shortcuts import Forensics

EXAMPLE_CHARACTERS = 2000
PLACE_CHARACTERS = 80


def parts_of(method: str) -> tuple[str, ...]:
    """What the parts of a row are called."""
    return ("prompt", "chosen", "rejected") if method == "dpo" else ("prompt", "answer")


def render_median(sample: Sequence[AnyRow], encoded: Sequence[Encoded], tokenizer: Any) -> tuple[str, ...]:
    """The row of median length, as it is trained."""
    sizes = [item.longest for item in encoded] or [len(whole_text(row.prompt, *row.completions)) for row in sample]
    middle = sorted(range(len(sample)), key=sizes.__getitem__)[len(sample) // 2]
    return render(sample[middle], encoded[middle] if encoded else None, tokenizer)


def find_rows(
    scan: Scan,
    usable: Sequence[AnyRow],
    forensics: Forensics | None,
    similar: Similar,
    odd: Mapping[str, Sequence[int]],
) -> Iterator[Shown]:
    """The rows that a person would ask for: the broken ones, the longest, the shortest, those that give themselves away.

    Args:
        odd: what a row is, and its number, with that of the row that it is so beside, if any.
    """
    for broken in scan.facts.broken_rows:
        yield Shown("broken", _short(str(broken.error.where)), (broken.error.what, *_shown(broken.text)))
    reasons = scan["reason"]
    sound = (reasons == 0).nonzero()[0]
    wanted: dict[str, list[int]] = {}
    if len(sound):
        sizes = scan["longest"][sound]
        wanted = {"the longest": [int(sound[sizes.argmax()])], "the shortest": [int(sound[sizes.argmin()])]}
    for what, name in (
        ("empty", "an empty one"),
        ("equal", "one with equal sides"),
        *((mark, f"one with {mark.replace('_', ' ')}") for mark in MARKS),
    ):
        wanted |= {name: scan.facts.examples[what][:1]} if what in scan.facts.examples else {}
    for what, numbers in scan.facts.examples.items():
        if what.startswith("leak "):
            wanted[f"shared with {safe(what[5:], 60)}"] = numbers[:1]
    for name, pair in (*odd.items(), ("a near-duplicate", similar.example)):
        wanted |= {name: list(pair[:1]), f"{name}: the other row": list(pair[1:])}
    rows = rows_at(scan, [number for numbers in wanted.values() for number in numbers])
    for why, numbers in wanted.items():
        for number in numbers:
            yield Shown(why, _place(rows[number]), render(rows[number], None, None))
    if forensics and (alike := _most_alike(usable)) is not None:
        yield Shown("the most similar sides", _place(usable[alike]), render(usable[alike], None, None))
    for number in forensics.driven if forensics else ():
        yield Shown("a row that shortcuts give away", _place(usable[number]), render(usable[number], None, None))


def _place(row: AnyRow) -> str:
    """The row's own name, or where it stands; of a long path the end, which says the line."""
    return safe(_short(row.id), None)


def _short(place: str) -> str:
    return place if len(place) <= PLACE_CHARACTERS else f"…{place[1 - PLACE_CHARACTERS :]}"


def _most_alike(rows: Sequence[AnyRow]) -> int | None:
    """The row whose two answers have most words in common, of all words that either has."""
    import numpy as np

    if not rows:
        return None
    words, begins = word_hashes([text for row in rows for text in row.completions])
    best, most = None, 0.0
    for number in range(len(rows)):
        one, other = (np.unique(words[begins[2 * number + side] : begins[2 * number + side + 1]]) for side in (0, 1))
        shared = len(np.intersect1d(one, other, assume_unique=True))
        share = shared / max(1, len(one) + len(other) - shared)
        best, most = (number, share) if share > most else (best, most)
    return best


def render(row: AnyRow, item: Encoded | None, tokenizer: Any) -> tuple[str, ...]:
    """A row line by line, with the boundary between prompt and answers and with every hidden character as its escape."""
    parts = parts_of("dpo" if isinstance(row, PreferenceRow) else "sft")
    if item is None:
        prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in row.prompt)
        texts, sizes = [prompt, *row.completions], [""] * 3
    else:
        sequences = [item.prompt_ids, *item.completions]
        texts = [str(tokenizer.decode(ids)) for ids in sequences]
        sizes = [f"{len(ids)} tokens, " for ids in sequences]
    lines = []
    for index, (part, text) in enumerate(zip(parts, texts, strict=True)):
        lines.append(f"----- {part} ({sizes[index]}{'trained on' if index else 'no loss'}) -----")
        lines += _shown(text)
    return tuple(lines)


def _shown(text: str) -> list[str]:
    r"""Text line by line, with each line break visible as `\n` at its end, and spaces before it as `\x20`."""
    cut = text[:EXAMPLE_CHARACTERS]
    *ended, last = cut.split("\n")
    lines = [rf"{_line(line)}\n" for line in ended] + ([_line(last)] if last else [])
    return [*lines, f"… {len(text) - len(cut)} more characters"] if len(text) > len(cut) else lines


def _line(text: str) -> str:
    bare = text.rstrip(" ")
    return safe(bare, None) + r"\x20" * (len(text) - len(bare))
