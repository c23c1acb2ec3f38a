"""What `inspect-data` and `data build` make of damaged and hostile files: exit code, message, memory, and what they leave behind.

    python benchmarks/damaged.py

Needs 3 GB of disk under the temporary directory for the line of 2 GB. Memory is that of all processes together;
no tokenizer is at hand. A file is handled where the command ends with 0; otherwise it is to say which file, and where in it.
Writes benchmarks/DAMAGED.md.
"""

import csv
import gzip
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import watched
from pyarrow import parquet

PAGE = Path(__file__).with_name("DAMAGED.md")
ROWS = 20_000
LINE_BYTES = 2 * 10**9
MESSAGE = 150
BUILT = ["built.jsonl", "built.jsonl.manifest.json", "built.jsonl.md"]


def row(number: int) -> dict[str, str]:
    words = " ".join(f"word{number * 7 + step}" for step in range(60))
    return {"prompt": f"Question {number}?", "chosen": f"One {words}.", "rejected": f"Another {words}!"}


def lines(count: int = ROWS) -> list[bytes]:
    return [json.dumps(row(number)).encode() for number in range(count)]


def sound() -> bytes:
    return b"\n".join(lines()) + b"\n"


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def zstd(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


def packed_bomb(pack: Callable[[bytes], bytes]) -> bytes:
    """A gigabyte of one letter, packed."""
    return pack(b'{"prompt": "' + b"x" * 10**9)


def ten_thousand_columns(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*row(0), *(f"column {number}" for number in range(10_000))])
        for number in range(200):
            writer.writerow([*row(number).values(), *(["x"] * 10_000)])


def parquet_of(path: Path, rows: list[dict[str, str]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def parquet_bomb(path: Path) -> None:
    """Three gigabytes of text in some kilobytes: one long answer, again and again."""
    texts = {**row(0), "chosen": "x" * 1_000_000}
    again = pyarrow.array([0] * 3000, pyarrow.int32())
    columns = {name: pyarrow.DictionaryArray.from_arrays(again, [text]) for name, text in texts.items()}
    parquet.write_table(pyarrow.table(columns), path, compression="zstd")


def cut_parquet(path: Path) -> None:
    parquet_of(path, [row(number) for number in range(ROWS)])
    path.write_bytes(cut(path.read_bytes()))


def one_long_line(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"prompt": "Why?", "chosen": "')
        for _ in range(LINE_BYTES // 10**7):
            file.write(b"x" * 10**7)
        file.write(b'", "rejected": "No."}\n')


def mixed_line_ends(path: Path) -> None:
    ends = (b"\n", b"\r\n", b"\n\n", b" \r\n")
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(line + ends[number % 4] for number, line in enumerate(lines())))


def with_a_nul(path: Path) -> None:
    path.write_bytes(sound().replace(b"Question 15000?", b"Question \x00 15000?"))


def holds(content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content())  # type: ignore[return-value]


CASES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "whole, for comparison": ("rows.jsonl", holds(sound)),
    "gzip, cut off": ("rows.jsonl.gz", holds(lambda: cut(gzip.compress(sound())))),
    "zstd, cut off": ("rows.jsonl.zst", holds(lambda: cut(zstd(sound())))),
    "parquet, cut off": ("rows.parquet", cut_parquet),
    "ends within a character": ("rows.jsonl", holds(lambda: sound() + '{"prompt": "Größe'.encode()[:-2])),
    "ends within a row": ("rows.jsonl", holds(lambda: cut(sound()))),
    "mixed line ends and a byte order mark": ("rows.jsonl", mixed_line_ends),
    "NUL byte in a text": ("rows.jsonl", with_a_nul),
    "one line of 2 GB": ("rows.jsonl", one_long_line),
    "10,003 columns": ("rows.csv", ten_thousand_columns),
    "gzip bomb": ("rows.jsonl.gz", holds(lambda: packed_bomb(gzip.compress))),
    "zstd bomb": ("rows.jsonl.zst", holds(lambda: packed_bomb(zstd))),
    "parquet bomb": ("rows.parquet", parquet_bomb),
    "zeros": ("rows.jsonl", holds(lambda: bytes(10_000_000))),
    "another kind of file under the name": ("rows.parquet", holds(sound)),
}


def main() -> None:
    text = [
        "# Damaged and hostile files\n",
        f"\nWritten by `python benchmarks/damaged.py` (Python {platform.python_version()}).\n",
        "\n| file | command | exit code | what it says | seconds | peak MB | left behind |\n|---|---|---|---|---|---|---|\n",
    ]
    most = {True: 0, False: 0}
    os.environ["POLITUNE_CACHE"] = tempfile.mkdtemp(prefix="politune-no-cache-")
    for name, (file, make) in CASES.items():
        with tempfile.TemporaryDirectory(prefix="politune-damaged-") as directory:
            place = Path(directory)
            make(place / file)
            (place / "recipe.toml").write_text(f'[[source]]\nname = "{file}"\ndirection = "as-is"\n')
            before = set(place.iterdir())
            for command in (["inspect-data", file], ["data", "build", "recipe.toml", "-o", "built.jsonl"]):
                done = watched.run([sys.executable, "-m", "politune", *command, "--quiet"], place)
                left = sorted(path.name for path in set(place.iterdir()) - before)
                most[done.code == 0] = max(most[done.code == 0], done.peak_bytes)
                name_of = " ".join(command[: command.index("recipe.toml")]) if "recipe.toml" in command else command[0]
                text.append(
                    f"| {name} | `{name_of}` | {done.code} | {said(done)} | "
                    f"{done.seconds:.1f} | {done.peak_bytes / 1e6:,.0f} | "
                    f"{'a whole data set' if left == BUILT else ', '.join(left) or 'nothing'} |\n"
                )
                print(text[-1], end="", flush=True)
    refused, handled = (f"{most[code] / 1e6:,.0f} MB" for code in (False, True))
    text.append(
        f"\nThe most memory that a refused file took: {refused}; one that is handled, as whole ones are: {handled}.\n"
    )
    PAGE.write_text("".join(text), encoding="utf-8")


def said(done: watched.Done) -> str:
    """The error in one line of the table; nothing of a command that went well."""
    if not done.code:
        return "handled"
    found = " ".join(done.err.split())
    return (found[:MESSAGE] + ("…" if len(found) > MESSAGE else "")).replace("|", "\\|")


if __name__ == "__main__":
    main()
