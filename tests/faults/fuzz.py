"""Presets and data files of all kinds of rubbish: read, or refused with an exit code of the table; no bug, no great memory.

Half the cases of a kind run one after the other in one process, which has torch in no part of it. What it takes at most is what
the worst file takes and what the cases before left, libraries above all: one that takes too much is tried again, by itself. A
case is drawn from the seed and its number alone, so that one of them can be made again by hand.
"""

import csv
import functools
import io
import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from faults.figures import WORKERS, Figure, count, side_by_side
from faults.in_process import faults_of, run_here
from faults.lab import Lab

SEED = 1
CODES = (0, 2, 3, 4, 5, 6, 7)
MOST_BYTES = 500 * 10**6
ADDRESS_SPACE = 16 * 2**30
"""Beyond it a case is stopped before the machine is: far above what is measured."""


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    cases = 1000 if whole else 75
    for kind, what in (("presets", "preset files"), ("data", "data files")):
        shares = _shares(cases)
        with lab.place(f"fuzz-{kind}") as place:
            parts = side_by_side(functools.partial(_part, kind, place), shares)
        yield _figure(
            f"{what} of rubbish: read, or refused with an exit code of the table, in under 500 MB", shares, parts, cases
        )


def _shares(cases: int) -> list[range]:
    """Which cases: one share for each process at a time."""
    size = -(-cases // WORKERS)
    return [range(start, min(start + size, cases)) for start in range(0, cases, size)]


def _figure(what: str, shares: Sequence[range], parts: Sequence[dict[str, Any] | str], cases: int) -> Figure:
    """A share that did not come to its end, of which there is a text in place of a report, is a failure of each of its cases."""
    found, codes, largest = list[str | None](), Counter[str](), 0
    for share, part in zip(shares, parts, strict=True):
        if isinstance(part, str):
            found += [f"case {number} came to no end: {part}" for number in share]
        else:
            found += part["found"]
            codes.update(part["codes"])
            largest = max(largest, part["bytes"])
    ended = ", ".join(f"{number} with {code}" for code, number in sorted(codes.items()))
    return count(what, found, seed=SEED, beside=f"{ended}; at most {largest / 1e6:.0f} MB", at_least=cases)


def _part(kind: str, place: Path, share: range) -> dict[str, Any]:
    """What is wrong with each case of a share, how often which exit code, and the memory."""
    report = _in_a_process(kind, place, share)
    for number in report["large"]:
        alone = _in_a_process(kind, place, range(number, number + 1))
        report["found"][number - share.start] = alone["found"][0]
        report["bytes"] = max(report["bytes"], alone["bytes"])
    return report


def _in_a_process(kind: str, place: Path, share: range) -> dict[str, Any]:
    work = place / f"{share.start}-{share.stop}"
    work.mkdir()
    environment = {**os.environ, "HOME": str(work), "XDG_CACHE_HOME": str(work), "POLITUNE_CACHE": str(work / "none")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(work), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "faults.fuzz", kind, str(share.start), str(share.stop)]
    done = subprocess.run(words, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-400:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> None:
    """`python -m faults.fuzz presets 17 18` is case 17 again, in the directory where it is started; the file stays there."""
    kind, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    found, codes, most, large = list[str | None](), Counter[str](), 0, list[int]()
    is_alone = stop - start == 1
    for number in range(start, stop):
        wrong = []
        for words in _write(kind, number, keep=is_alone):
            _forget_memory()
            ended = run_here(words)
            codes[str(ended.code)] += 1
            faults = faults_of(ended, CODES)
            if "torch" in sys.modules:
                faults.append("torch is imported")
            size = _most_bytes()
            if size > MOST_BYTES and not is_alone:
                large.append(number)
            else:
                most = max(most, size)
                faults += [f"takes {size / 1e6:.0f} MB"] * (size > MOST_BYTES)
            if faults:
                wrong.append(f"({' '.join(words)}) {'; '.join(faults)[:400]}")
        found.append(f"{kind} case {number} {'; '.join(wrong)}" if wrong else None)
    sys.stdout.write(json.dumps({"found": found, "codes": codes, "bytes": most, "large": large}))


def _forget_memory() -> None:
    """What earlier cases took, which in a process of its own a command would not have: Arrow keeps for a while what it freed."""
    if arrow := sys.modules.get("pyarrow"):
        arrow.default_memory_pool().release_unused()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew


def _most_bytes() -> int:
    """Of memory, since it was last forgotten; `ru_maxrss` would count what the process that started this one had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _write(kind: str, number: int, keep: bool) -> Iterator[list[str]]:
    """Writes a case's file; the command lines that are given it."""
    draw = random.Random(f"{SEED} {kind} {number}")
    if kind == "presets":
        path, content = Path(f"{number}.toml"), _preset(draw)
        path.write_bytes(content)
        yield ["presets", "validate", str(path)]
        if b"trl" not in content:  # TRL's settings are checked by TRL itself, which is not for this process
            yield ["train", draw.choice(["dpo", "sft"]), "--preset", f"./{path}", "--dry-run"]
    else:
        suffix, content = _data(draw)
        path = Path(f"{number}{suffix}")
        path.write_bytes(content)
        direction = draw.choice([[], [], ["--direction", "shuffled"]])
        yield ["inspect-data", f"./{path}", *direction, *draw.choice([[], ["--json"]])]
    if not keep:
        path.unlink()


# --- rubbish ---------------------------------------------------------------------------------------------------------

ALPHABETS = (
    "ab \n", "\x00\x01\x07\x08\t\r\x1b\x7f", "\x80\x85\x9b\xa0\xad", "\u200b\u200d\u2028\u202e\u2066\ufeff\ufffe", "äéßñ",
    "\U0001f600\U000e0001\U0010ffff", "[]{}\"'\\,;:=#", "0123456789.eE+-_", "中文عربىעברית",
)  # fmt: skip


def _text(draw: random.Random, most: int = 40) -> str:
    alphabet = draw.choice(ALPHABETS) + draw.choice(ALPHABETS)
    return "".join(draw.choices(alphabet, k=draw.randrange(most)))


def _number(draw: random.Random) -> Any:
    return draw.choice([
        0, -1, 1, draw.randrange(100), 10**draw.randrange(400), -(2**64), 0.1, 1e-320, 1e308, -0.0, float("nan"), float("inf"),
        True, False,
    ])  # fmt: skip


def _value(draw: random.Random, depth: int = 3) -> Any:
    """Anything that JSON has, and lone surrogates."""
    kind = draw.randrange(9)
    if kind < 3 or depth == 0:
        return _text(draw)
    if kind == 3:
        return _number(draw)
    if kind == 4:
        return draw.choice([None, "", " ", "\ud800", "x" * draw.choice([1, 300, 5000]), "=1+1", "<script>"])
    if kind < 7:
        return [_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {_text(draw, 8): _value(draw, depth - 1) for _ in range(draw.randrange(4))}


def _mutated(draw: random.Random, good: bytes) -> bytes:
    """A good file with a few stretches cut, doubled, moved or overwritten."""
    data = bytearray(good)
    for _ in range(draw.randrange(1, 5)):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice([1, 3, 20, 200]))
        piece = draw.choice([
            b"", bytes(data[start:stop]) * 2, draw.randbytes(stop - start), _text(draw).encode("utf-8", "surrogatepass"),
            b"\x00", b"\n", b'"', json.dumps(_value(draw)).encode(), b"9" * 400,
        ])  # fmt: skip
        data[start:stop] = piece
    return bytes(data[: draw.randrange(len(data) + 1)]) if draw.random() < 0.2 else bytes(data)


def _noise(draw: random.Random) -> bytes:
    return draw.choice([
        lambda: draw.randbytes(draw.randrange(2000)),
        lambda: _text(draw, 2000).encode("utf-8", "surrogatepass"),
        lambda: _text(draw, 500).encode("utf-16"),
        lambda: b"",
        lambda: b"\x00" * draw.randrange(1, 5000),
        lambda: draw.choice([b"[", b"{", b'{"a":', b"[[", b"a.", b"(", b'"', b"\n", b","]) * draw.randrange(1, 20_000),
    ])()  # fmt: skip


# --- presets ---------------------------------------------------------------------------------------------------------


@functools.cache
def _good_presets() -> list[bytes]:
    from politune import presets

    return [presets.read(name).text.encode() for name in presets.shipped_names()]


@functools.cache
def _settings() -> list[str]:
    from politune import presets

    names = {key for name in ("demo-left", "demo-sft") for key in presets.resolve(None, name).origins}
    return sorted(name for name in names if not name.startswith("trl"))


def _preset(draw: random.Random) -> bytes:
    return draw.choice([_noise, _mutated_preset, _odd_preset, _odd_preset, _odd_values, _odd_values])(draw)


def _mutated_preset(draw: random.Random) -> bytes:
    return _mutated(draw, draw.choice(_good_presets()))


def _odd_values(draw: random.Random) -> bytes:
    """A good preset in which some settings have values of another one, or of any kind."""
    lines = draw.choice(_good_presets()).decode().splitlines()
    for _ in range(draw.randrange(1, 8)):
        number = draw.choice([number for number, line in enumerate(lines) if " = " in line])
        name, _, own = lines[number].partition(" = ")
        value = draw.choice(
            [own, own, draw.choice(["1", "0", "0.5", "2", "true", "64", '"none"', '"auto"', '""']), _toml(draw)]
        )
        lines[number] = f"{name} = {value}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _odd_preset(draw: random.Random) -> bytes:
    """Tables and keys as they come: known, unknown, nested, quoted, doubled."""
    method = draw.choice(['"dpo"', '"sft"', _toml(draw)])
    lines = [f"method = {method}"] if draw.random() < 0.8 else []
    for _ in range(draw.randrange(12)):
        key, value, name = draw.choice(_settings()), _toml(draw), json.dumps(_text(draw, 10))
        group, _, leaf = key.rpartition(".")
        lines.append(draw.choice([
            f"[{group or 'model'}]", f"[{name}]", f"[[{group or 'data'}]]", f"{leaf} = {value}", f"{key} = {value}",
            f"{leaf}.x.y = {value}", f"{name} = {value}", f"# {_text(draw)}", '[model]\nmodel_name_or_path = "demo"',
            '[data]\ndataset_name = "stances"\ndirection = "right"',
        ]))  # fmt: skip
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml(draw: random.Random) -> str:
    return draw.choice([
        json.dumps(_text(draw)), json.dumps(_value(draw)), str(_number(draw)).lower(), "[" * draw.choice([3, 900, 9000]),
        draw.choice(["1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "0x10", "1_000", "inf", "-nan", "9" * 4500]),
        draw.choice(['"./nowhere"', '"~nobody/x"', '"a/b"', '"../../x"', '"/dev/null"', '"/proc/self/mem"', '"."', '""']),
        "{a = {b = {}}}", "[1, [2, [3]]]", "'''" + _text(draw),
    ])  # fmt: skip


# --- data ------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "left",
    "right",
    "completion",
    "messages",
    "instruction",
    "input",
    "output",
    "split",
    "id",
)


def _data(draw: random.Random) -> tuple[str, bytes]:
    suffix = draw.choice([".csv", ".json", ".jsonl", ".parquet"] * 5 + [".CSV", ".txt"])
    if suffix == ".parquet" and draw.random() < 0.05:
        return suffix, _bomb(draw)
    makers: dict[str, Callable[[random.Random], bytes]] = {".csv": _csv, ".json": _json, ".jsonl": _json_lines}
    make = makers.get(suffix.lower(), _parquet if suffix == ".parquet" else _json_lines)
    content = make(draw) if draw.random() < 0.9 else _noise(draw)
    content = b"\xef\xbb\xbf" * (draw.random() < 0.05) + content
    mutated = draw.random() < (0.2 if suffix == ".parquet" else 0.4)
    return suffix, _mutated(draw, content) if mutated else content


def _shape(draw: random.Random) -> list[str]:
    sound = draw.choice(
        [("prompt", "chosen", "rejected"), ("prompt", "left", "right"), ("messages",), ("prompt", "completion")]
    )
    odd = draw.sample(COLUMNS, draw.randrange(1, 6))
    return list(sound) if draw.random() < 0.8 else odd


def _rows(draw: random.Random) -> list[dict[str, Any]]:
    """Rows of one shape, most of them sound, some with cells of any kind."""
    shape, wild = _shape(draw), draw.choice([0, 0, 0, 0.02, 0.5])
    return [
        {column: _value(draw) if draw.random() < wild else _cell(draw, column, number) for column in shape}
        for number in range(draw.choice([1, 2, 5, 30]))
    ]


def _cell(draw: random.Random, column: str, number: int) -> Any:
    if column == "messages":
        return [
            {"role": "user", "content": f"q{number} {_text(draw)}"},
            {"role": "assistant", "content": f"a {_text(draw)}"},
        ]
    return "train" if column == "split" else f"{column} {number} {_text(draw)}"


def _csv(draw: random.Random) -> bytes:
    buffer = io.StringIO(newline="")
    rows = _rows(draw)
    quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(
        buffer,
        delimiter=draw.choice("," * 8 + ";\t"),
        quoting=quoting,
        lineterminator=draw.choice(["\n", "\r\n", "\r"]),
    )
    writer.writerow(list(rows[0]))
    for row in rows:
        cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
        writer.writerow(cells + ["more"] * (draw.random() < 0.02))
    text = buffer.getvalue()
    return text.encode(
        draw.choice(["utf-8"] * 6 + ["utf-16", "latin-1"]), "surrogatepass" if text.isascii() else "replace"
    )


def _json_lines(draw: random.Random) -> bytes:
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in _rows(draw)]
    for _ in range(draw.choice([0, 0, 0, 1])):
        odd = [json.dumps(_value(draw)), "", "  ", '{"a": 1, "a": 2}', "{", "nan", '{"n": ' + "9" * 5000 + "}"]
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(odd))
    return draw.choice(["\n", "\r\n", "\n\n"]).join(lines).encode("utf-8", "surrogatepass")


def _json(draw: random.Random) -> bytes:
    rows: Any = _rows(draw)
    wrapped = draw.choice([rows, rows, rows, {"data": rows}, {"a": rows, "b": rows}, _value(draw), rows[0], [rows]])
    return json.dumps(wrapped, indent=draw.choice([None, None, 1])).encode("utf-8", "surrogatepass")


def _parquet(draw: random.Random) -> bytes:
    """Columns of known names and random types: nested, null, binary, dates, dictionaries, and many repetitions."""
    import pyarrow
    from pyarrow import parquet

    size = draw.choice([0, 1, 3, 40, 40, 40_000])
    columns = {name: draw.choice(_ARRAYS)(pyarrow, _texts(draw, name, size)) for name in _shape(draw)}
    buffer = io.BytesIO()
    table = pyarrow.table(list(columns.values()), names=list(columns))
    parquet.write_table(table, buffer, compression=draw.choice(["snappy", "zstd", "none"]))
    return buffer.getvalue()


def _bomb(draw: random.Random) -> bytes:
    """One large text that a dictionary repeats."""
    import pyarrow
    from pyarrow import parquet

    places = pyarrow.array([0] * draw.choice([4, 16, 1000]), pyarrow.int32())
    text = pyarrow.DictionaryArray.from_arrays(places, ["x" * draw.choice([10**6, 5 * 10**6, 20 * 10**6])])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(dict.fromkeys(_shape(draw), text)), buffer, compression="zstd")
    return buffer.getvalue()


def _texts(draw: random.Random, name: str, size: int) -> list[str]:
    """As many as asked for, of forty."""
    few = [f"{name} {number} {_text(draw, 10)}" for number in range(40)]
    return [few[number % 40] for number in range(size)]


_TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
_ARRAYS: tuple[Callable[[Any, list[str]], Any], ...] = (
    *[lambda arrow, texts: arrow.array(texts, arrow.string())] * 50,
    lambda arrow, texts: arrow.array(texts, arrow.string()).dictionary_encode(),
    lambda arrow, texts: arrow.array([each.encode() for each in texts], arrow.large_binary()),
    lambda arrow, texts: arrow.array([b"\xff\xfe"] * len(texts), arrow.binary()),
    lambda arrow, texts: arrow.array(range(len(texts)), arrow.int64()),
    lambda arrow, texts: arrow.array([2.5] * len(texts), arrow.float64()),
    lambda arrow, texts: arrow.nulls(len(texts)),
    lambda arrow, texts: arrow.array(
        [None if number % 3 else text for number, text in enumerate(texts)], arrow.string()
    ),
    lambda arrow, texts: arrow.array([0] * len(texts), arrow.timestamp("us", "Asia/Tokyo")),
    lambda arrow, texts: arrow.array([2**50] * len(texts), arrow.timestamp("s")),
    lambda arrow, texts: arrow.array([_TURNS] * len(texts)),
    lambda arrow, texts: arrow.array([{"a": [1, None]}] * len(texts)),
    lambda arrow, texts: arrow.array([[("k", 1)]] * len(texts), arrow.map_("string", "int8")),
    lambda arrow, texts: arrow.DictionaryArray.from_arrays(arrow.array([0] * len(texts), arrow.int32()), ["x" * 4000]),
)


if __name__ == "__main__":
    main()
