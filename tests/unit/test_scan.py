"""A scan gives the same figures whatever the number of processes and the parts; what it was taken from can be read again."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from politune.config import DataSpec
from politune.data import files, sources
from politune.data.format import Table, parse_chats, parse_preferences
from politune.errors import ConfigError, DataError
from politune.inspection import scan as scanning
from politune.inspection.scan import COLUMNS, OTHER_SPLITS, Scan, rows_at, scan


def some_rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(500)]
    return [
        {
            name: " ".join(draw.choices(words, k=size)) + "."
            for name, size in (("prompt", 8), ("chosen", 30), ("rejected", 25))
        }
        for _ in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scanned(path: Path, direction: str | None = None, **options: Any) -> Scan:
    source = sources.stream(DataSpec(dataset_name=str(path), dataset_split=options.pop("split", "train")))
    return scan(source, options.pop("method", "dpo"), direction, 3, **options)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_BYTES", 5000)
    monkeypatch.setattr(files, "ROWS_OF_A_PART", 30)


@pytest.mark.usefixtures("small_parts")
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """What is written in many parts, and sampled, is the same in one process, in two, and in one part."""
    path = write(tmp_path / "a.jsonl", some_rows(400))
    one, two = (scanned(path, sample_rows=50, processes=processes) for processes in (1, 2))
    assert len(one.parts) > 10
    assert one.facts.sample == two.facts.sample
    assert [each.rank for each in one.facts.sample] == sorted(each.rank for each in one.facts.sample)
    for name in COLUMNS:
        assert (one[name] == two[name]).all(), name
    assert one.facts.digest.hex() == two.facts.digest.hex() == sources.load(DataSpec(dataset_name=str(path))).sha256


@pytest.mark.usefixtures("small_parts")
def test_the_sample_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = some_rows(300)
    texts = [
        {each.row.prompt[0]["content"] for each in scanned(write(tmp_path / name, order), sample_rows=40).facts.sample}
        for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1]))
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 40


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz", ".json", ".parquet"])
def test_rows_are_read_again_by_their_numbers(tmp_path: Path, suffix: str) -> None:
    rows = some_rows(150)
    measured = scanned(pack(tmp_path, suffix, rows))
    again = rows_at(measured, [0, 7, 149, 77, 7])
    assert {number: row.completions[0] for number, row in again.items()} == {
        number: rows[number]["chosen"] for number in (0, 7, 77, 149)
    }


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".parquet"])
def test_a_row_that_is_read_again_is_named_by_where_it_stands(tmp_path: Path, suffix: str) -> None:
    """Every third row is of another split; row 76 (from 0) is the fiftieth of the others, and a CSV file has a header."""
    rows = [{**row, "split": "train" if number % 3 else "heldout"} for number, row in enumerate(some_rows(150))]
    measured = scanned(pack(tmp_path, suffix, rows))
    (again,) = rows_at(measured, [50]).values()
    assert again.completions[0] == rows[76]["chosen"]
    assert (
        again.id.rpartition("/")[2]
        == {
            ".jsonl": "rows.jsonl:77",
            ".csv": "rows.csv:78",
            ".json": "rows.json row 77",
            ".parquet": "rows.parquet row 77",
        }[suffix]
    )
    assert {each.number: each.row.id for each in measured.facts.sample}[50] == again.id


def pack(place: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    import csv
    import gzip
    import io

    import pyarrow
    from pyarrow import parquet

    path = place / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=64)
        return path
    text = io.StringIO()
    if ".csv" in suffix:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    elif suffix == ".json":
        json.dump(rows, text)
    else:
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    content = text.getvalue().encode()
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    elif suffix.endswith(".zst"):
        content = pyarrow.Codec("zstd").compress(content, asbytes=True)
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(text.getvalue().encode())
        return path
    path.write_bytes(content)
    return path


def test_what_changed_since_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", some_rows(20))
    measured = scanned(path)
    write(path, some_rows(10))
    with pytest.raises(DataError, match="changed while it was read"):
        rows_at(measured, [15])


@pytest.mark.usefixtures("small_parts")
def test_what_grew_since_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", some_rows(20))
    measured = scanned(path)
    write(path, some_rows(200))
    with pytest.raises(DataError, match="changed while it was read"):
        rows_at(measured, [0])


@pytest.mark.usefixtures("small_parts")
def test_shuffled_sides_are_those_that_a_run_draws(tmp_path: Path) -> None:
    """Over many parts as over the whole table: the run's placebo, of which a half is swapped."""
    rows = some_rows(201)
    path = write(tmp_path / "a.jsonl", rows)
    measured = scanned(path, "shuffled", processes=1)
    again = rows_at(measured, range(len(rows)))
    table = Table(("prompt", "chosen", "rejected"), [dict(row) for row in rows], "a", "")
    expected = parse_preferences(table, "shuffled", 3)
    assert [again[number].completions for number in range(len(rows))] == [row.completions for row in expected]
    assert sum(again[number].completions[0] != row["chosen"] for number, row in enumerate(rows)) == 100


def test_splits(tmp_path: Path) -> None:
    rows = [
        {**row, "split": split}
        for row, split in zip(some_rows(4), ("train", "heldout", "train", "heldout"), strict=True)
    ]
    rows[3]["prompt"] = rows[0]["prompt"] + " "
    path = write(tmp_path / "a.jsonl", rows)
    measured = scanned(path)
    assert (measured.rows, measured.facts.others) == (2, 2)
    assert rows_at(measured, [1])[1].completions[0] == rows[2]["chosen"]
    assert measured.facts.leaks[OTHER_SPLITS, "prompt"] == 1
    with pytest.raises(DataError, match="no rows of the split 'dev'; it has heldout, train"):
        scanned(path, split="dev")
    with pytest.raises(ConfigError, match="no splits to choose 'dev'"):
        scanned(write(tmp_path / "b.jsonl", some_rows(3)), split="dev")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("processes", [1, 2])
def test_passages_of_other_splits_are_looked_for(tmp_path: Path, processes: int) -> None:
    """40 of 60 held-out rows have the answers of training rows under other prompts; they stand before and behind these."""
    rows, others = some_rows(200), some_rows(60, seed=2)
    for number in range(40):
        others[number] |= {side: rows[3 * number][side] for side in ("chosen", "rejected")}
    mixed = [
        *({**row, "split": "heldout"} for row in others[:20]),
        *rows,
        *({**row, "split": "heldout"} for row in others[20:]),
    ]
    measured = scanned(write(tmp_path / "a.jsonl", mixed), processes=processes)
    found = measured.facts
    assert [found.leaks[OTHER_SPLITS, how] for how in ("prompt", "passage", "row")] == [0, 40, 40]
    assert (found.others_share, found.examples[f"leak {OTHER_SPLITS}"]) == (1.0, [0, 3, 6, 9, 12])
    answers = {
        side: rows_at(measured, [12])[12].completions[number] for number, side in enumerate(("chosen", "rejected"))
    }
    assert answers == {side: rows[12][side] for side in answers}


@pytest.mark.usefixtures("small_parts")
def test_what_changes_before_it_is_held_against_other_splits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*some_rows(20), {**some_rows(1, seed=2)[0], "split": "heldout"}]
    path, original = write(tmp_path / "a.jsonl", rows), scanning._hold_against_others

    def changed(*given: Any) -> None:
        write(path, some_rows(20)[1:])
        original(*given)

    monkeypatch.setattr(scanning, "_hold_against_others", changed)
    with pytest.raises(DataError, match="changed while it was read"):
        scanned(path, processes=1)


@pytest.mark.usefixtures("small_parts")
def test_data_of_which_no_row_can_be_read_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "rejected": None} for row in some_rows(20)]
    with pytest.raises(DataError, match="rejected is null"):
        scanned(write(tmp_path / "a.jsonl", rows), processes=1)


def broken_in_places(count: int = 150) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of which some cannot be read, the last 40 among them; the numbers of the others."""
    rows = some_rows(count)
    del rows[3]["rejected"]
    rows[50]["chosen"] = None
    rows[51] |= {"prompt": 7}
    rows[60] |= {"chosen": [{"role": "assistant", "content": "a list here"}]}
    rows[70] |= {"chosen": "half a character: \ud800"}
    for row in rows[-40:]:
        del row["rejected"]
    return rows, [number for number in range(count - 40) if number not in (3, 50, 51, 60, 70)]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("direction", [None, "shuffled"])
def test_broken_rows_are_counted_and_the_others_measured(tmp_path: Path, direction: str | None) -> None:
    """The last parts hold no row with all columns, which the first part's tell."""
    rows, sound = broken_in_places()
    path = write(tmp_path / "a.jsonl", rows)
    measured = scanned(path, direction, columns=("prompt", "chosen", "rejected"), processes=1)
    assert (measured.rows, measured.facts.broken) == (105, 45)
    assert [str(broken.error.where).rpartition("/")[2] for broken in measured.facts.broken_rows] == [
        f"a.jsonl:{line}" for line in (4, 51, 52, 61, 71)
    ]
    assert [broken.error.what.partition(" (")[0].partition(":")[0] for broken in measured.facts.broken_rows] == [
        "rejected is absent", "chosen is null", "prompt is a number, neither text nor a list of messages",
        "chosen is a list, unlike in most rows", "chosen holds half a character",
    ]  # fmt: skip
    again = rows_at(measured, range(105))
    assert [again[number].prompt[0]["content"] for number in range(105)] == [rows[number]["prompt"] for number in sound]
    turned = sum(again[number].completions[0] == rows[sound[number]]["rejected"] for number in range(105))
    assert turned == (52 if direction else 0)
    for each in measured.facts.sample:
        assert each.row.completions == again[each.number].completions


def test_shuffled_answers_are_read_on_both_sides(tmp_path: Path) -> None:
    """Whichever side would be drawn for a row that lacks the other one."""
    rows = [{"prompt": row["prompt"], "left": row["chosen"], "right": row["rejected"]} for row in some_rows(40)]
    for number in range(8):
        broken = [{**row, "left": None} if index == number else row for index, row in enumerate(rows)]
        measured = scanned(write(tmp_path / "a.jsonl", broken), "shuffled", method="sft")
        assert (measured.rows, measured.facts.broken) == (39, 1)


def test_where_no_row_can_be_read_the_first_is_named(tmp_path: Path) -> None:
    rows = [{**row, "chosen": None} for row in some_rows(5)]
    with pytest.raises(DataError, match=r"a.jsonl:1: chosen is null"):
        scanned(write(tmp_path / "a.jsonl", rows))


TURNS = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"prompt": TURNS, "chosen": "c", "rejected": "r"}, r"prompt \(a list\).* where others hold prompt \(text\)"),
        ({"chosen": [*TURNS, {"role": "assistant", "content": "c"}], "rejected": [*TURNS, {"role": "assistant", "content": "r"}]},
         r"chosen \(a list\), rejected \(a list\) where others"),
    ],
)  # fmt: skip
def test_parts_of_another_shape_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], message: str
) -> None:
    """Each part is of one shape, so that nothing within a part is wrong: the first one ends where its ten rows end."""
    rows = [json.dumps({"prompt": f"p{number}", "chosen": "c", "rejected": "r"}) + "\n" for number in range(10)]
    monkeypatch.setattr(files, "PART_BYTES", len("".join(rows)))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(rows) + "".join(json.dumps(other) + "\n" for _ in range(3)))
    with pytest.raises(DataError, match=message):
        scanned(path)


@pytest.mark.usefixtures("small_parts")
def test_shuffled_answers_are_those_that_a_run_draws(tmp_path: Path) -> None:
    """For one answer a row as for two: the side is drawn over all rows, whichever of them are read again."""
    rows = [{"prompt": row["prompt"], "left": row["chosen"], "right": row["rejected"]} for row in some_rows(100)]
    measured = scanned(write(tmp_path / "a.jsonl", rows), "shuffled", method="sft", processes=1)
    table = Table(("prompt", "left", "right"), [dict(row) for row in rows], "a", "")
    expected = parse_chats(table, "shuffled", 3)
    again = rows_at(measured, [3, 4, 5, 6, 30, 99])
    assert {number: row.completions for number, row in again.items()} == {
        number: expected[number].completions for number in (3, 4, 5, 6, 30, 99)
    }
    assert len({row.completions[0] in {each["left"] for each in rows} for row in expected}) == 2


def test_the_sample_of_pairs_that_contradict_each_other_keeps_to_the_rows(tmp_path: Path) -> None:
    """Ten rows of one prompt, five of them the others turned round: the same five in either order of the file."""
    rows = [{"prompt": "p", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(5)]
    rows += [{"prompt": "p", "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    found = [
        [each.row.completions for each in scanned(write(tmp_path / name, order), sample_rows=5).facts.sample]
        for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1]))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_parts_end_by_bytes_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    for module in ("files", "parquet"):
        monkeypatch.setattr(f"politune.data.{module}.PART_BYTES", 20_000)
    monkeypatch.setattr("politune.data.parquet.ROWS_AT_ONCE", 2)
    rows = [{"prompt": f"p{n}", "chosen": "c" * 5000, "rejected": "r"} for n in range(40)]
    path = pack(tmp_path, suffix, rows)
    sizes = [len(part.read().rows) for part in files.parts(path, "a")]
    assert sum(sizes) == 40
    assert max(sizes) <= 5


@pytest.mark.usefixtures("small_parts")
def test_an_error_in_a_late_part_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", some_rows(300))
    text = path.read_text().split("\n")
    text[250] = text[250][:-30]
    path.write_text("\n".join(text))
    with pytest.raises(DataError, match=r"a.jsonl:251:\d+: malformed JSON"):
        scanned(path, processes=2)
