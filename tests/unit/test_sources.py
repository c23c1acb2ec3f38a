"""Data from the package and from local files: what is read word for word, and what is refused with its line."""

import csv
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from politune.config import DataSpec, SftDataSpec
from politune.data import files, sources
from politune.data.format import to_preference_rows
from politune.errors import ConfigError, DataError, MachineError

GOOD: list[dict[str, object]] = [
    {"prompt": "Why, then?", "chosen": 'He said "yes".\nTwice.', "rejected": "None"},
    {"prompt": "n/a", "chosen": "null", "rejected": "NA\u2028é"},
]


def spec(name: object, **fields: Any) -> DataSpec:
    return DataSpec(dataset_name=str(name), **fields)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows in the format that the suffix names."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write(path, "\n".join(lines) + "\n" if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows_and_hash(tmp_path: Path, suffix: str) -> None:
    """pandas would have read "None", "n/a", "null" and "NA" as missing values."""
    path = write_rows(tmp_path / f"pairs{suffix}", GOOD)
    table = sources.load(spec(path))
    assert table.rows == GOOD
    assert table.columns == ("prompt", "chosen", "rejected")
    assert table.sha256 == sources.hash_rows(GOOD)
    assert (table.name, table.path, table.revision, table.generator) == (path.name, path, None, None)


def test_the_hash_is_of_the_texts_in_their_order() -> None:
    """Columns that hold no text to train on, and their order, make no difference; a changed or moved text does."""
    with_more = [{"id": index, **dict(reversed(row.items()))} for index, row in enumerate(GOOD)]
    assert sources.hash_rows(with_more) == sources.hash_rows(GOOD)
    turns: list[dict[str, object]] = [{"messages": [{"role": "user", "content": "q"}]}]
    turned: list[dict[str, object]] = [{"messages": [{"content": "q", "role": "user"}]}]
    assert sources.hash_rows(turned) == sources.hash_rows(turns)
    assert sources.hash_rows(GOOD[::-1]) != sources.hash_rows(GOOD)
    assert sources.hash_rows([{**GOOD[0], "chosen": "x"}, GOOD[1]]) != sources.hash_rows(GOOD)


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    """The first row of the CSV stands on lines 2 and 3; the blank line of the JSONL counts."""
    table = sources.load(spec(write_rows(tmp_path / "pairs.csv", GOOD)))
    assert table.lines == (2, 4)
    assert table.place(1) == f"{tmp_path}/pairs.csv:4"
    text = f"{json.dumps(GOOD[0])}\n\n{json.dumps(GOOD[1])}"
    assert sources.load(spec(write(tmp_path / "a.jsonl", text))).lines == (1, 3)


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbfprompt,chosen,rejected\r\np,c,r\r\n")
    assert sources.load(spec(path)).rows == [{"prompt": "p", "chosen": "c", "rejected": "r"}]


def test_a_cell_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    long = "x" * 200_000
    before = csv.field_size_limit()
    path = write_rows(tmp_path / "a.csv", [{"prompt": "p", "chosen": long, "rejected": "r"}])
    assert sources.load(spec(path)).rows[0]["chosen"] == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("wrap", ['{{"data": {}}}', '{{"version": "1", "rows": {}}}', "{}"])
def test_json_may_stand_in_an_object_with_one_array(tmp_path: Path, wrap: str) -> None:
    assert sources.load(spec(write(tmp_path / "a.json", wrap.format(json.dumps(GOOD))))).rows == GOOD


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row) for row in GOOD)
    assert sources.load(spec(write(tmp_path / "a.json", text))).rows == GOOD


def test_parquet_reads_messages_and_leaves_other_columns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_rows(tmp_path / "a.parquet", [{"messages": turns, "embedding": [0.5] * 8}])
    table = sources.load(spec(path))
    assert table.rows == [{"messages": turns}]
    assert table.columns == ("messages", "embedding")


def test_stances_are_narrowed_to_their_axis_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six rows, two are economic or social and to train on, one is held out, and the control has two and one."""
    axes = ("economic", "social", "social", "control", "control", "control")
    splits = ("train", "train", "heldout", "train", "train", "heldout")
    rows = [
        {"id": f"s-{i}", "axis": axes[i], "prompt": "p", "left": f"l{i}", "right": "r", "split": splits[i]}
        for i in range(6)
    ]
    monkeypatch.setattr(sources, "_shipped_text", lambda: "\n".join(map(json.dumps, rows)))
    table = sources.load(spec("stances", direction="left"))
    assert [row["id"] for row in table.rows] == ["s-0", "s-1"]
    assert (table.other_splits, table.generator, table.name) == (1, "politune's authors", "stances")
    control = sources.load(spec("stances-control", direction="left"))
    assert [row["id"] for row in control.rows] == ["s-3", "s-4"]
    trained = spec("stances", direction="left")
    held_out = sources.load(trained.model_copy(update={"dataset_split": "heldout"}))
    assert [row.id for row in to_preference_rows(held_out, "left", seed=0).rows] == ["s-2"]
    with pytest.raises(DataError, match=r"no rows of the split 'test'; it has heldout, train"):
        sources.load(trained.model_copy(update={"dataset_split": "test"}))


def test_the_shipped_stances_are_there() -> None:
    table = sources.load(spec("stances", direction="left"))
    assert {row["axis"] for row in table.rows} == {"economic", "social"}
    assert {row["split"] for row in table.rows} == {"train"}
    assert {row["axis"] for row in sources.load(spec("stances-control", direction="left")).rows} == {"control"}


def test_a_local_copy_of_stances_keeps_its_held_out_rows_apart(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "p", "left": "l", "right": "r", "split": split} for split in ("train", "heldout", "train")
    ]
    table = sources.load(spec(write_rows(tmp_path / "a.jsonl", rows), direction="left"))
    assert (len(table.rows), table.other_splits, table.lines) == (2, 1, (1, 3))


ANSWERS: dict[str, dict[str, object]] = {
    "pairs": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "conversations": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "completions": {"prompt": "p", "completion": "c"},
    "alpaca": {"instruction": "i", "output": "o"},
}


@pytest.mark.parametrize("shape", ANSWERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_split_column_keeps_rows_apart_in_every_shape(tmp_path: Path, suffix: str, shape: str) -> None:
    """Rows 1 and 4 say train, row 5 says nothing, which means train; rows 2 and 3 are of other splits."""
    splits = ("train", "test", "heldout", "train", None)
    rows = [{**ANSWERS[shape], "split": split} for split in splits]
    path = write_rows(tmp_path / f"a{suffix}", rows)
    table = sources.load(spec(path))
    assert ([row["split"] for row in table.rows], table.other_splits) == (["train", "train", None], 2)
    assert [row["split"] for row in sources.load(spec(path, dataset_split="heldout")).rows] == ["heldout"]
    with pytest.raises(DataError, match=r"no rows of the split 'dev'; it has heldout, test, train.*--dataset_split"):
        sources.load(spec(path, dataset_split="dev"))


# --- what a name means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("stances", "shipped"),
        ("./stances", "local"),
        ("../x", "local"),
        ("/x", "local"),
        ("~/x", "local"),
        ("a\\b", "local"),
        ("pairs.csv", "local"),
        ("scale-lab/pairs.JSONL", "local"),
        ("owner/pairs.zip", "local"),
        ("script.py", "local"),
        ("scale-lab/politune-left", "hub"),
        ("squad", "hub"),
        ("owner/v1.5-data", "hub"),
    ],
)
def test_names_resolve_without_surprise(name: str, kind: str) -> None:
    assert sources.locate(name) == kind


def test_what_is_there_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert sources.locate("owner/name") == "local"
    assert sources.locate("owner/other") == "hub"


@pytest.mark.parametrize("name", ["a/b/c", "owner/na me", "-x/y", "a..b/c", "o/x\x1b[31m", "o/" + "x" * 200, "a\0b"])
def test_neither_path_nor_hub_name(name: str) -> None:
    with pytest.raises(DataError, match=r"neither a file here nor the name of a data set") as error:
        sources.locate(name)
    assert "\x1b" not in str(error.value)


def test_a_missing_file_is_no_hub_lookup_and_names_its_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.hub, "fetch", lambda *_: pytest.fail("asked the Hub"))
    write(tmp_path / "pairs-left.csv", "x")
    with pytest.raises(DataError, match=r"there is no such file.*did you mean .*pairs-left.csv"):
        sources.load(spec(tmp_path / "pairs_left.csv"))
    with pytest.raises(DataError, match=r"there is no such file.*the directory .*nowhere is empty or does not exist"):
        sources.load(spec(tmp_path / "nowhere" / "pairs.csv"))
    with pytest.raises(DataError, match="there is no such file"):
        sources.load(spec("~nobody-of-that-name/pairs.csv"))


@pytest.mark.parametrize("suffix", [".zip", ".pkl", ".py", ".txt", ".gz", ""])
def test_other_kinds_of_file_are_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", "prompt,chosen,rejected\np,c,r\n")
    with pytest.raises(DataError, match=r"politune reads .csv, .json, .jsonl, .parquet"):
        sources.check(spec(path))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    write(tmp_path / "pairs.csv", "x")
    with pytest.raises(DataError, match=r"is a directory.*name one of its files: pairs.csv"):
        sources.check(spec(tmp_path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(DataError, match="no regular file"):
        sources.check(spec(tmp_path / "a.csv"))


def test_a_local_file_has_no_revision_and_no_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.csv", GOOD)
    with pytest.raises(ConfigError, match=r"data.dataset_revision"):
        sources.check(spec(path, dataset_revision="main"))
    with pytest.raises(ConfigError, match=r"data.dataset_revision: stances has no revision"):
        sources.check(spec("stances", direction="left", dataset_revision="main"))
    with pytest.raises(ConfigError, match=r"data.dataset_split: .*no splits to choose 'test'"):
        sources.check(spec(path, dataset_split="test"))


# --- malformed files -------------------------------------------------------------------------------------------------

HEAD = "prompt,chosen,rejected\n"
LINE = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "the file is empty"),
        ("a.csv", "\n\n", "the file holds no rows"),
        ("a.csv", HEAD, "the file holds no rows.*only a header: prompt, chosen, rejected"),
        ("a.csv", "question,good,bad\n1,2,3\n", "found question, good, bad; need prompt, chosen, rejected"),
        ("a.csv", HEAD + "p,c,r\np,c\n", "a.csv:3: 2 cells in a row of 3 columns"),
        ("a.csv", HEAD + 'p,"c\nd",r\np,c,r,x\n', "a.csv:4: 4 cells in a row of 3 columns"),
        ("a.csv", HEAD + 'p,c,r\np,"c,r\np,c,r\n', "a.csv:3: a quotation mark opens here and is never closed"),
        ("a.csv", "prompt,chosen,chosen\np,c,r\n", "the column chosen stands twice"),
        ("a.csv", "prompt, chosen,rejected\np,c,r\n", "the column ' chosen' has white space around its name"),
        ("a.csv", HEAD + "p,,r\n", "a.csv:2: the prompt or an answer is empty in 1 of 1 rows"),
        ("a.csv", HEAD + "p,c,c\n", "a.csv:2: chosen and rejected are equal in 1 of 1 rows"),
        ("a.csv", (HEAD + "p,c,r\np,é,r\n").encode("latin-1"), r"a.csv:3:3: byte 0xE9 is not UTF-8"),
        ("a.csv", b"\xef\xbb\xbf" + HEAD.encode() + b"\xe9", r"a.csv:2:1: byte 0xE9 is not UTF-8"),
        ("a.csv", HEAD.encode("utf-16"), "a.csv:1: is UTF-16, not UTF-8"),
        ("a.jsonl", LINE + '{"prompt": "p" "chosen": 1}\n' + LINE, "a.jsonl:2:16: malformed JSON: Expecting ',' delimiter$"),
        ("a.jsonl", LINE + '{"prompt": "né" "chosen": 1}\n' + LINE, "a.jsonl:2:18: malformed JSON: Expecting ',' delimiter$"),
        ("a.jsonl", LINE.encode() + '{"prompt": "né'.encode() + b'\xe9"}', "a.jsonl:2:16: byte 0xE9 is not UTF-8"),
        ("a.json", '[{"prompt":\n"né" "c"}]', "a.json:2:7: malformed JSON: Expecting ',' delimiter$"),
        ("a.jsonl", LINE + '{"prompt": "né\0"}\n', "a.jsonl:2:16: a NUL byte$"),
        ("a.jsonl", LINE + "\0\0\0", "a.jsonl:2:1: a NUL byte$"),
        ("a.jsonl", LINE + '{"prompt": "p", "cho', "a.jsonl:2:17: malformed JSON.*cut off"),
        ("a.jsonl", LINE + '{"prompt": "p",', "a.jsonl:2:.*cut off"),
        ("a.jsonl", f"[{LINE}]", "one object per line, not an array.*name it .json"),
        ("a.jsonl", LINE + "[1]\n", "a.jsonl:2: a row must be an object"),
        ("a.jsonl", LINE + '{"prompt": null, "chosen": "c", "rejected": "r"}', "a.jsonl:2: prompt is null"),
        ("a.jsonl", LINE + '{"prompt": "p", "chosen": 1, "rejected": "r"}', "a.jsonl:2: chosen is a number, neither text nor"),
        ("a.jsonl", '{"prompt": "p", "prompt": "q"}', "a.jsonl:1: .*the key 'prompt' stands twice"),
        ("a.jsonl", "[" * 100_000, "not an array"),
        ("a.jsonl", '{"a":' * 100_000, "a.jsonl:1: JSON that is nested too deeply"),
        ("a.jsonl", f'{{"a": {"9" * 5000}}}', "a.jsonl:1: malformed JSON"),
        ("a.jsonl", "\n\n", "the file holds no rows"),
        ("a.json", "[]", "the file holds no rows"),
        ("a.json", "3", "holds an array of objects"),
        ("a.json", '{"prompt": ["p"], "chosen": ["c"]}', "an array of objects.*keys prompt, chosen"),
        ("a.json", "[\n" + LINE + ", 3]", "a.json row 2: a row must be an object"),
        ("a.json", "[\n" + LINE, "a.json:3:1: .*cut off"),
        ("a.parquet", b"PAR1 and then something else PAR1", "a.parquet: malformed parquet"),
        ("a.parquet", b"x", "a.parquet: malformed parquet"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_where_it_goes_wrong(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        sources.check(spec(path))


def test_check_reads_rows_as_the_run_will(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.csv", [{"instruction": "i", "input": "", "output": "o"}])
    sources.check(SftDataSpec(dataset_name=str(path)))
    with pytest.raises(DataError, match="politune train sft"):
        sources.check(spec(path))
    sources.check(spec("scale-lab/politune-left"))


def test_a_parquet_bomb_is_refused_while_it_unpacks(tmp_path: Path) -> None:
    """Some kB that hold 300 times 1 MiB of one text: refused past 32 MiB, and before it is all in memory."""
    import tracemalloc

    import pyarrow
    from pyarrow import parquet

    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), ["x" * 2**20])
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"prompt": text}), path, compression="zstd")
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"bomb.parquet: holds more than 32 MiB of text.*decompression bomb"):
            sources.load(spec(path))
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory was taken")
@pytest.mark.parametrize("kind", ["bytes", "map"])
def test_no_kind_of_value_hides_a_bomb(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    again = pyarrow.array([0] * 200, pyarrow.int32())
    if kind == "bytes":
        column = pyarrow.DictionaryArray.from_arrays(again, pyarrow.array([b"x" * 10**6]))
    else:
        items = pyarrow.DictionaryArray.from_arrays(again, pyarrow.array(["x" * 10**6]))
        column = pyarrow.MapArray.from_arrays(pyarrow.array(range(201), pyarrow.int32()), ["key"] * 200, items)
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "bomb.parquet")
    with pytest.raises(DataError, match="decompression bomb"):
        sources.load(spec(tmp_path / "bomb.parquet"))


def test_one_row_of_many_turns_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 200, pyarrow.int32()), pyarrow.array(["x" * 10**6]))
    turns = pyarrow.StructArray.from_arrays([pyarrow.array(["user"] * 200), text], ["role", "content"])
    rows = pyarrow.ListArray.from_arrays(pyarrow.array([0, 200], pyarrow.int32()), turns)
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "bomb.parquet")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="decompression bomb"):
            sources.load(spec(tmp_path / "bomb.parquet"))
        assert tracemalloc.get_traced_memory()[1] < 50 * 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory was taken")
@pytest.mark.parametrize("shape", ["column", "turns of one row"])
def test_a_text_that_a_dictionary_repeats_is_refused_before_it_fills_the_memory(tmp_path: Path, shape: str) -> None:
    """Some kB that hold one text of 30 MB 16 times: half a GB at once, and once more as text; in a process of its own."""
    import subprocess
    import sys

    import pyarrow
    from pyarrow import parquet

    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 16, pyarrow.int32()), ["x" * 30_000_000])
    path = tmp_path / "bomb.parquet"
    if shape == "column":
        parquet.write_table(pyarrow.table({"prompt": text}), path, compression="zstd")
    else:  # of the others there is one each; the writer says nothing of dictionaries
        turns = pyarrow.StructArray.from_arrays(
            [["x"] * 10 + ["user"] * 16, [None] * 10 + text.tolist()], ["role", "content"]
        )
        rows = pyarrow.ListArray.from_arrays(pyarrow.array([*range(11), 26], pyarrow.int32()), turns)
        parquet.write_table(pyarrow.table({"messages": rows}), path, compression="zstd", store_schema=False)
    code = (
        "import sys; from pathlib import Path; from politune.data import files\n"
        "try: files.read_file(Path(sys.argv[1]), 'bomb')\n"
        "except files.DataError as error: print(error)\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    complaint, kilobytes = done.stdout.splitlines()
    assert "more than 32 MiB" in complaint
    assert int(kilobytes) < 500_000


def test_a_small_parquet_file_is_read_as_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    turns = [
        [{"role": "user", "content": word, "n": 1}] * count for word, count in (("a", 2), (None, 1), ("ä", 0), ("a", 3))
    ]
    marks = pyarrow.array(
        [[("k", "v")], [], None, [("k", None), ("l", "v")]], pyarrow.map_(pyarrow.string(), pyarrow.string())
    )
    table = pyarrow.table({"messages": turns, "prompt": ["p", None, "q", "p"], "topic": marks})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    small = sources.load(spec(tmp_path / "a.parquet")).rows
    monkeypatch.setattr("politune.data.parquet.SMALL_BYTES", 0)
    assert sources.load(spec(tmp_path / "a.parquet")).rows == small == table.to_pylist()


@pytest.mark.parametrize("kind", ["bytes", "numbers"])
def test_many_values_in_few_bytes_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import pyarrow
    from pyarrow import parquet

    values = (
        pyarrow.array([b"x" * 10**6] * 40, pyarrow.binary(10**6)) if kind == "bytes" else pyarrow.array([0] * 600_000)
    )
    rows = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("it is unpacked"))
    with pytest.raises(DataError, match=r"bomb.parquet: holds more than 32 MiB of text.*decompression bomb"):
        sources.load(spec(tmp_path / "bomb.parquet"))


def test_what_a_parquet_file_says_of_its_size_is_believed_where_it_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["x" * 70_000_000]}), path, compression="zstd")
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("it is unpacked"))
    with pytest.raises(DataError, match="more than 32 MiB"):
        sources.load(spec(path))


def test_parquet_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write(tmp_path / "a.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError, match="reading parquet needs pyarrow"):
        sources.load(spec(path))


def test_a_date_of_no_calendar(tmp_path: Path) -> None:
    """2**50 seconds after 1970 is a year that Python has no date for."""
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([2**50], pyarrow.timestamp("s"))}), path)
    with pytest.raises(DataError, match=r"a.parquet: malformed parquet"):
        sources.load(spec(path))


def test_what_the_system_refuses_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        files.read_file(tmp_path, "rows.csv")


def test_text_files_have_a_size_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("parts", "files"):
        monkeypatch.setattr(f"politune.data.{module}.MAX_TEXT_BYTES", 1000)
    for name, content in (("a.csv", HEAD + "p,c,r\n" * 400), ("a.json", json.dumps([json.loads(LINE)] * 400))):
        with pytest.raises(DataError, match=r"holds more than"):
            sources.load(spec(write(tmp_path / name, content)))


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_packed_file_that_is_cut_off_says_how_far_it_could_be_read(tmp_path: Path, codec: str) -> None:
    import pyarrow

    texts = random.Random(0).sample(range(10**9), 9000)
    lines = "".join(json.dumps({"prompt": str(text), "chosen": "c", "rejected": "r"}) + "\n" for text in texts)
    packed = pyarrow.compress(lines.encode(), codec=codec, asbytes=True)
    path = tmp_path / f"a.jsonl.{ {'gzip': 'gz', 'zstd': 'zst'}[codec] }"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(
        DataError, match=r"the compressed file is cut off.*after line [\d,]+, [\d,]+ bytes.*pack it once more"
    ):
        sources.load(spec(path))


@pytest.mark.parametrize(
    "content", [LINE + "x" * 3000, HEAD + "p,c," + "x" * 3000, HEAD + 'p,c,"' + "x\n" * 1500 + '"']
)
def test_a_record_without_end_is_refused(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("RECORD_BYTES", "PART_BYTES"):
        monkeypatch.setattr(files, limit, 1000)
    path = write(tmp_path / ("a.csv" if content.startswith(HEAD) else "a.jsonl"), content)
    with pytest.raises(DataError, match=r":2: .*(a record|cell is longer) .*MiB"):
        sources.load(spec(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.csv.gz", "a.json", "a.parquet"])
def test_parts_say_what_they_take_of_their_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All together the whole file, and each its share: by it the rows are guessed to within a quarter from half of them on."""
    import pyarrow

    monkeypatch.setattr(files, "PART_BYTES", 20_000)
    draw = random.Random(0)
    rows = [{key: " ".join(map(str, draw.choices(range(99), k=20))) for key in ("prompt", "chosen", "rejected")}
            for _ in range(10_000)]  # fmt: skip
    plain = write_rows(tmp_path / ("plain" + Path(name).suffixes[0]), rows)
    path = tmp_path / name
    if name.endswith((".gz", ".zst")):
        with pyarrow.output_stream(path) as file:
            file.write(plain.read_bytes())
    else:
        plain.rename(path)
    found = sources.stream(spec(path))
    assert found.size_bytes == path.stat().st_size
    done = taken = 0
    for part in found.parts():
        done, taken = done + len(part.read().rows), taken + part.size_bytes
        if done > len(rows) / 2:
            assert done / taken * found.size_bytes == pytest.approx(len(rows), rel=0.25)
    assert taken == pytest.approx(found.size_bytes, abs=10)


def test_the_direction_of_a_built_file_is_its_own() -> None:
    built = sources.Stream("left.jsonl", (), sources.Membership("train"), manifest={"direction": "left"})
    sources.refuse_other_direction(built, "left")
    with pytest.raises(ConfigError, match=r"contradicts left\.jsonl, which was built with the direction 'left'"):
        sources.refuse_other_direction(built, "right")


# --- anything at all -------------------------------------------------------------------------------------------------

SEEDS = {
    ".csv": (HEAD + 'p,"c\n",r\n').encode(),
    ".json": json.dumps(GOOD).encode(),
    ".jsonl": LINE.encode() * 2,
}


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    noise=st.binary(max_size=60),
    place=st.integers(min_value=0, max_value=2000),
    length=st.integers(min_value=0, max_value=60),
)
def test_damaged_files_are_read_or_refused(tmp_path: Path, suffix: str, noise: bytes, place: int, length: int) -> None:
    """A stretch of a good file is replaced by random bytes: either rows come out, or a DataError with the file's name."""
    if suffix not in SEEDS:
        SEEDS[suffix] = write_rows(tmp_path / "good.parquet", GOOD).read_bytes()
    data, start = SEEDS[suffix], place % len(SEEDS[suffix])
    path = write(tmp_path / f"damaged{suffix}", data[:start] + noise + data[start + length :])
    try:
        sources.check(spec(path))
    except DataError as error:
        assert "damaged" in str(error)
        assert "\x1b" not in str(error)
