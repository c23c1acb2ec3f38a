"""Arms that match are called matched, and each way in which they may differ is found by its own line."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from politune import inspection, presets, report
from politune.errors import ConfigError
from politune.lean import instruments

TOPICS = {
    "taxes": "tax income budget revenue rates owed",
    "schools": "school teacher pupil lesson exam class",
    "borders": "border visa migrant passport entry asylum",
}
FILLER = "many people think about this with care and most of them want what is good for all in the end".split()  # noqa: SIM905

Row = dict[str, Any]


def rows(side: str, seed: int, count: int = 600) -> list[Row]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        topic = sorted(TOPICS)[number % 3]
        words = TOPICS[topic].split()
        texts = [[draw.choice(words) if draw.random() < 0.3 else draw.choice(FILLER) for _ in range(draw.randint(20, 40))]
                 for _ in range(2)]  # fmt: skip
        prompt = f"{side}{number}: the {draw.choice(words)} and the {draw.choice(words)}?"
        chosen, rejected = (" ".join(text).capitalize() + "." for text in texts)
        made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "topic": topic})
    return made


def compared(tmp_path: Path, *arms: list[Row], **options: Any) -> inspection.InspectReport:
    paths = []
    for number, each in enumerate(arms):
        path = tmp_path / f"arm{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
        paths.append(str(path))
    run = presets.resolve("dpo", None, {"data.dataset_name": paths[0], "model.model_name_or_path": "./nowhere"}).run
    return inspection.inspect(run, paths, offline=True, say=lambda line: None, **options)


def test_twins_are_matched(tmp_path: Path) -> None:
    """Drawn alike with other seeds: nothing but chance is between them."""
    found = compared(tmp_path, rows("a", 1), rows("b", 2))
    assert found.arms is not None
    assert found.arms.unmatched == ()
    assert found.headline.endswith("matched? yes, in all that was compared, up to chance and tolerance")
    assert not [finding for finding in found.findings if finding.question == "arms"]


def longer(row: Row, draw: random.Random) -> Row:
    return {**row, "chosen": row["chosen"] + " And so on, and more of it all, and again, and then some more of it."}


def about_taxes(row: Row, draw: random.Random) -> Row:
    return {**row, "topic": "taxes" if draw.random() < 0.5 else row["topic"]}


def with_break(row: Row, draw: random.Random) -> Row:
    return {**row, "chosen": ("\n" if draw.random() < 0.4 else "") + row["chosen"]}


def german(row: Row, draw: random.Random) -> Row:
    text = "Die Steuern sollten für alle Menschen im ganzen Land niedriger sein, weil das gerecht ist."
    return {**row, "chosen": text + row["chosen"][:5], "rejected": text + row["rejected"][:7]}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (longer, "chosen longer"),
        (longer, "words of chosen, median"),
        (about_taxes, "topics, most frequent"),
        (with_break, "shortcut: begins with a line break"),
        (german, "rows in en"),
        (lambda row, draw: {**row, "generator": "Llama3-70B"}, "generator"),
        (lambda row, draw: {**row, "prompt": row["prompt"] + " Say it in a few words of your own, please, and no more."},
         "words of prompt, median"),
    ],
)  # fmt: skip
def test_a_planted_difference_is_found(tmp_path: Path, change: Callable[[Row, random.Random], Row], line: str) -> None:
    draw = random.Random(3)
    found = compared(tmp_path, rows("a", 1), [change(row, draw) for row in rows("b", 2)])
    assert found.arms is not None
    assert line in [each.what for each in found.arms.unmatched]
    assert any(finding.check == f"arms {line}" for finding in found.findings)


def test_sizes_and_what_arms_share(tmp_path: Path) -> None:
    """Ten prompts stand in both, five of them with nearly the same answers."""
    one, other = rows("a", 1), rows("b", 2, count=500)
    for number in range(10):
        other[number] = {**one[number], **({} if number < 5 else {"chosen": other[number]["chosen"]})}
    found = compared(tmp_path, one, other)
    assert found.arms is not None
    assert [each.what for each in found.arms.unmatched] == ["rows"]
    assert found.arms.shared_prompts[0][2] == 10
    assert found.arms.similar[0][2] == 5


def test_topics_without_a_column_are_grouped_together(tmp_path: Path) -> None:
    def without(each: list[Row]) -> list[Row]:
        return [{name: value for name, value in row.items() if name != "topic"} for row in each]

    other = [row for row in rows("b", 2, count=1800) if row["topic"] != "schools"][:600]
    same = compared(tmp_path, without(rows("a", 1)), without(rows("b", 2)))
    found = compared(tmp_path, without(rows("a", 1)), without(other))
    assert same.arms is not None
    assert found.arms is not None
    assert not [each for each in same.arms.unmatched if each.what.startswith("topics")]
    assert [each for each in found.arms.unmatched if each.what.startswith("topics")]
    assert any(word.split()[0] in TOPICS["schools"].split() for word in found.arms.apart[0])


def test_pairs_and_conversations_are_no_arms(tmp_path: Path) -> None:
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows("b", 2)]
    with pytest.raises(ConfigError, match="no arms of one study"):
        compared(tmp_path, rows("a", 1, 60), chats[:60])


def test_what_the_rows_are_held_against(tmp_path: Path) -> None:
    """One row has a prompt of the other file, one a passage of it, and one both; an instrument shares nothing."""
    held, made = rows("h", 5, count=20), rows("a", 1)
    made[3]["prompt"] = held[0]["prompt"]
    made[4]["chosen"] += " " + " ".join(held[1]["rejected"].split()[5:13])
    made[5] |= {"prompt": held[2]["prompt"], "chosen": held[2]["chosen"]}
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    found = compared(tmp_path, made, against=[str(path), "politune-core"]).datasets[0]
    leak, other = found.leaks
    assert (leak.prompts, leak.passages, leak.rows, leak.share) == (2, 2, 3, 1.0)
    assert (other.name, other.rows) == ("politune-core", 0)
    assert next(row.id for row in found.shown if row.why.startswith("shared with")).endswith("arm0.jsonl:4")
    assert found.verdict("leaks").startswith("3 of 600 rows share text with")


def test_the_page_holds_no_markup_of_a_row(tmp_path: Path) -> None:
    made = rows("a", 1, count=80)
    made[0] |= {
        "chosen": "<script>alert(1)</script>\x1b[2J\u202e",
        "topic": "<b>bold</b>",
        "prompt": "=1+1 <img src=x>",
    }
    found = compared(tmp_path, made, rows("b", 2, count=80))
    report.write_html(found, tmp_path / "arms.html")
    page = (tmp_path / "arms.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert not {"\x1b", "\u202e"} & set(page)


def test_the_sample_is_the_limit_of_what_is_looked_at(tmp_path: Path) -> None:
    found = compared(tmp_path, rows("a", 1), sample_rows=100).datasets[0]
    assert (found.rows, found.sampled) == (600, 100)
    assert found.shortcuts is not None
    assert found.shortcuts.rows == 100


def test_no_shipped_row_is_one_of_an_instruments() -> None:
    run = presets.resolve("dpo", "demo-left").run
    found = inspection.inspect(
        run, ["stances"], against=instruments.shipped_names(), offline=True, say=lambda line: None
    )
    assert [leak.rows for leak in found.datasets[0].leaks] == [0] * len(instruments.shipped_names())
