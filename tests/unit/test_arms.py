"""Arms that match are called matched, and each way in which they may differ is found by its own line."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from politune import presets, report
from politune.chance import counts_p, shares_p
from politune.errors import ConfigError
from politune.inspection import arms, inspect
from politune.inspection.arms import Arms, Compared
from politune.inspection.scan import OTHER_SPLITS, Facts, Scan
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


def compared(tmp_path: Path, *arms: list[Row], **options: Any) -> inspect.InspectReport:
    paths = []
    for number, each in enumerate(arms):
        path = tmp_path / f"arm{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
        paths.append(str(path))
    run = presets.resolve("dpo", None, {"data.dataset_name": paths[0], "model.model_name_or_path": "./nowhere"}).run
    return inspect.inspect(run, paths, offline=True, say=lambda line: None, **options)


def arms_of(tmp_path: Path, *given: list[Row], **options: Any) -> Arms:
    found = compared(tmp_path, *given, **options).arms
    assert found is not None
    return found


def line_of(found: Arms, what: str) -> Compared:
    (line,) = (each for each in found.lines if each.what == what)
    return line


def test_twins_are_matched(tmp_path: Path) -> None:
    """Drawn alike with other seeds: nothing but chance is between them."""
    found = compared(tmp_path, rows("a", 1, 120), rows("b", 2, 120))
    assert found.arms is not None
    assert found.arms.unmatched == ()
    assert found.headline.endswith("matched? yes, in all that was compared, up to chance and tolerance")
    assert not [finding for finding in found.findings if finding.question == "arms"]


def few(seed: int) -> list[Row]:
    """60 rows, whose topics are drawn."""
    draw = random.Random(seed)
    return [{**row, "topic": draw.choice(sorted(TOPICS))} for row in rows("ab"[seed % 2], seed, 60)]


def test_what_chance_explains_is_no_difference(tmp_path: Path) -> None:
    """60 rows each: shares, lengths and topics of the two are further apart than the tolerance, all by chance."""
    found = arms_of(tmp_path, few(5), few(26))
    assert found.unmatched == ()
    beyond = {line.what for line in found.lines if float(re.sub(r"[^0-9.]", "", line.difference) or 0) > (
        100 * arms.SHARE_WITHIN if "points" in line.difference else arms.DISTANCE_WITHIN
    )}  # fmt: skip
    assert beyond >= {"chosen longer", "words of chosen, median", "topics, most frequent"}


def longer(row: Row) -> Row:
    return {**row, "chosen": row["chosen"] + " And so on, and more of it all, and again, and then some more of it."}


def german(row: Row) -> Row:
    text = "Die Steuern sollten für alle Menschen im ganzen Land niedriger sein, weil das gerecht ist."
    return {**row, "chosen": text + row["chosen"][:5], "rejected": text + row["rejected"][:7]}


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (longer, ("chosen longer", "words of chosen, median", "shortcut: length in words")),
        (lambda row: {**row, "topic": "taxes"}, ("topics, most frequent",)),
        (lambda row: {**row, "chosen": "\n" + row["chosen"]}, ("shortcut: begins with a line break",)),
        (german, ("rows in en",)),
        (lambda row: {**row, "generator": "Llama3-70B"}, ("generator",)),
        (lambda row: {**row, "prompt": row["prompt"] + " Say it in a few words of your own, please, and no more."},
         ("words of prompt, median",)),
    ],
    ids=["longer", "topics", "line breaks", "language", "generator", "prompts"],
)  # fmt: skip
def test_a_planted_difference_is_found(tmp_path: Path, change: Callable[[Row], Row], lines: tuple[str, ...]) -> None:
    found = compared(tmp_path, rows("a", 1, 60), [change(row) for row in rows("b", 2, 60)])
    assert found.arms is not None
    assert {each.what for each in found.arms.unmatched} >= set(lines)
    assert {finding.check for finding in found.findings} >= {f"arms {line}" for line in lines}


@pytest.mark.parametrize(
    ("change", "feature", "means"),
    [
        (lambda text: "\n" + text, "begins with a line break", ("0 / 0", "1 / 1")),
        (lambda text: f'"{text}"', "quotation marks", ("0 / 0", "2 / 2")),
        (lambda text: " " + text, "begins with a space", ("0 / 0", "1 / 1")),
        (lambda text: text.replace(" ", "\n- ", 2), "list items", ("0 / 0", "2 / 2")),
    ],
    ids=["line breaks", "quotes", "spaces", "lists"],
)
def test_what_all_answers_of_one_arm_have_is_found(
    tmp_path: Path, change: Callable[[str], str], feature: str, means: tuple[str, str]
) -> None:
    """On both sides of every row, so that within the arm it is no shortcut; from none to all h is pi."""
    other = [{**row, "chosen": change(row["chosen"]), "rejected": change(row["rejected"])} for row in rows("b", 2, 60)]
    found = compared(tmp_path, rows("a", 1, 60), other)
    assert found.arms is not None
    line = line_of(found.arms, f"{feature}, mean of chosen / rejected")
    assert (line.values, line.difference, line.is_matched) == (means, "h 3.14", False)
    assert f"arms {line.what}" in {finding.check for finding in found.findings}
    assert not any(
        each.feature == feature and each.is_found for audit in found.datasets for each in audit.shortcuts.found
    )


def answers_of(made: list[Row]) -> tuple[Scan, Any]:
    """What the comparison of answers looks at."""
    sample = [SimpleNamespace(number=number, row=SimpleNamespace(completions=(row["chosen"], row["rejected"])))
              for number, row in enumerate(made)]  # fmt: skip
    keys = np.repeat(np.arange(len(made), dtype=np.uint64)[:, None], 3, axis=1)
    facts = Facts(rows=len(made), columns={"keys": keys}, sample=sample)  # type: ignore[arg-type]
    return Scan(None, None, facts, ()), SimpleNamespace(method="dpo")  # type: ignore[arg-type]


def differing(one: list[Row], other: list[Row]) -> list[str]:
    scans, audits = zip(answers_of(one), answers_of(other), strict=True)
    return [line.what.split(",")[0] for line in arms._answers(scans, audits) if not line.is_matched]


def test_halves_of_one_set_have_the_same_answers() -> None:
    """60 random splits of 160 rows with marks here and there: chance parts the halves by more than the tolerance in most."""
    draw = random.Random(0)
    made = rows("a", 1, 160)
    for row in made:
        for side in ("chosen", "rejected"):
            row[side] = "\n" * (draw.random() < 0.1) + row[side].replace(" ", draw.choice((", ", " - ", "; ", " ")), 3)
    alarms = 0
    for _ in range(60):
        draw.shuffle(made)
        alarms += bool(differing(made[:80], made[80:]))
    assert alarms <= 3


def test_what_is_rare_is_found_where_one_arm_alone_has_it() -> None:
    """A line break before 4 % of the chosen and 9 % of the rejected answers, as in a public set: h = 2 asin(sqrt(0.09)) = 0.61.
    3 % against 5 % are within the tolerance: 0.45 - 0.35 = 0.10."""

    def broken(made: list[Row], chosen: int, rejected: int) -> list[Row]:
        return [
            {**row, "chosen": "\n" * (number % 100 < chosen) + row["chosen"],
             "rejected": "\n" * (number % 100 < rejected) + row["rejected"]}
            for number, row in enumerate(made)
        ]  # fmt: skip

    one, other = rows("a", 1), rows("b", 2)
    assert differing(one, broken(other, 4, 9)) == ["begins with a line break"]
    assert differing(broken(one, 3, 3), broken(other, 5, 5)) == []


def test_arms_match_only_if_every_two_of_them_do(tmp_path: Path) -> None:
    """The third, of 8 rows, is furthest from both in its topics, which 8 rows do not prove: the first two are what differs."""
    third = [{**row, "topic": "schools"} for row in rows("c", 3, 8)]
    first = [{**row, "topic": "taxes" if number % 4 else "schools"} for number, row in enumerate(rows("a", 1, 60))]
    second = [{**row, "topic": "schools" if number % 4 else "taxes"} for number, row in enumerate(rows("b", 2, 60))]
    second = [{**row, "chosen": "\n" + row["chosen"]} for row in second]
    third = third[:6] + [{**row, "topic": "taxes"} for row in third[6:]]
    found = arms_of(tmp_path, first, second, third)
    topics = line_of(found, "topics, most frequent")
    assert (topics.is_matched, topics.furthest, topics.difference) == (False, (0, 1), "distance 0.50")
    said = [finding.text for finding in found.findings() if "topics" in finding.check]
    assert said[0].endswith("(distance 0.50 between arm0.jsonl and arm1.jsonl)")
    assert line_of(found, "rows").difference == "650.0%"
    assert line_of(found, "rows").furthest in ((0, 2), (1, 2))
    assert line_of(found, "shortcut: begins with a line break").values == ("50%", "100%", "")
    assert line_of(found, "shortcuts").values == (
        "looked at",
        "looked at",
        "fewer than 50 prompts with answers of their own",
    )


def test_arms_without_forensics_are_said_to_have_none(tmp_path: Path) -> None:
    found = compared(tmp_path, rows("a", 1, 60), rows("b", 2, 60), sample_rows=10)
    assert found.arms is not None
    line = line_of(found.arms, "shortcuts")
    assert (line.is_matched, set(line.values)) == (
        None,
        {"fewer than 50 prompts with answers of their own in the sample of 10"},
    )
    assert found.arms.verdict.endswith("up to chance and tolerance; shortcuts were not")
    assert [finding.check for finding in found.findings if finding.question == "arms"] == ["arms shortcuts"]
    assert found.datasets[0].verdict("shortcuts") == (
        "not looked at: fewer than 50 prompts with answers of their own in the sample of 10"
    )


def test_prompts_of_one_word_are_compared(tmp_path: Path) -> None:
    same = [{**row, "prompt": "p"} for row in rows("a", 1, 20)]
    other = [{**row, "prompt": "p"} for row in rows("b", 2, 20)]
    found = arms_of(tmp_path, same, other)
    assert (found.apart, found.unmatched) == (((), ()), ())
    changed = arms_of(tmp_path, same, [longer(row) for row in other]).unmatched
    assert "words of chosen, median" in [line.what for line in changed]


# --- chance ----------------------------------------------------------------------------------------------------------


def test_small_cells_are_fishers() -> None:
    """No row of one against 19 of 20: one of the 21 is not among the 19, with chances of 2 / 21. z would be 3.1."""
    assert shares_p((0.0, 1), (0.95, 20)) == pytest.approx(2 / 21)
    assert shares_p((0.5, 400), (0.6, 400)) == pytest.approx(
        0.0045, abs=0.0001
    )  # z = 0.1 / sqrt(0.55 x 0.45 / 200) = 2.84
    assert shares_p((1.0, 50), (1.0, 40)) == 1.0


def test_rare_topics_are_taken_together() -> None:
    """Six topics of one row in either set prove no more than six rows of 106 do."""
    assert counts_p([100, 100, *[1] * 6, *[0] * 6], [100, 100, *[0] * 6, *[1] * 6]) > 0.9
    assert counts_p([8, 0], [0, 8]) == pytest.approx(2 / 12870)  # 16 over 8; too few for chi-squared
    assert counts_p([4, 4, 0, 0], [0, 0, 4, 4]) > 0.1
    assert counts_p([40, 40, 0], [40, 0, 40]) < 1e-6


def drawn(chance: np.random.Generator, prompts: int, times: int, shift: int = 0) -> Scan:
    """Rows whose lengths and topics are those of their prompt, but for a little."""
    groups = np.repeat(np.arange(prompts), times)
    answers = chance.integers(20, 60, (prompts, 2))[groups] + chance.integers(0, 5, (len(groups), 2)) + [shift, 0]
    words = np.column_stack([chance.integers(8, 30, prompts)[groups], answers])
    keys = np.repeat(chance.integers(0, 2**62, prompts).astype(np.uint64)[groups][:, None], 3, axis=1)
    topics = Counter(chance.choice(list("abcdefghij"), prompts)[groups].tolist())
    facts = Facts(rows=len(groups), columns={"words": words, "keys": keys}, topics=topics)
    return Scan(None, None, facts, ())  # type: ignore[arg-type]


def unmatched(*scans: Scan) -> list[str]:
    audits: Any = [SimpleNamespace(method="dpo", topics_are_named=True) for _ in scans]
    lines = [line for compare in (arms._lengths, arms._longer, arms._topics) for line in compare(scans, audits)]
    return [line.what for line in lines if not line.is_matched]


@pytest.mark.parametrize(("prompts", "times"), [(20, 50), (200, 5), (500, 1)])
def test_rows_of_one_prompt_give_no_false_alarms(prompts: int, times: int) -> None:
    """200 pairs of sets that are drawn alike; by single rows, 97 % of those with 20 prompts were called different."""
    chance = np.random.default_rng(0)
    alarms = [unmatched(drawn(chance, prompts, times), drawn(chance, prompts, times)) for _ in range(200)]
    assert sum(map(bool, alarms)) <= 10
    found = unmatched(drawn(chance, prompts, times), drawn(chance, prompts, times, shift=45))
    assert "words of chosen, median" in found
    assert set(found) <= {"words of chosen, median", "chosen longer"}


def test_sizes_and_what_arms_share(tmp_path: Path) -> None:
    """Ten prompts stand in both, five of them with nearly the same answers."""
    one, other = rows("a", 1, 60), rows("b", 2, 50)
    for number in range(10):
        other[number] = {**one[number], **({} if number < 5 else {"chosen": other[number]["chosen"]})}
    found = compared(tmp_path, one, other)
    assert found.arms is not None
    assert [(each.what, each.difference) for each in found.arms.unmatched] == [("rows", "20.0%")]
    assert found.arms.shared_prompts[0][2] == 10
    assert found.arms.similar[0][2] == 5


def test_topics_without_a_column_are_grouped_together(tmp_path: Path) -> None:
    def without(each: list[Row]) -> list[Row]:
        return [{name: value for name, value in row.items() if name != "topic"} for row in each]

    other = [row for row in rows("b", 2, count=360) if row["topic"] != "schools"]
    one = without(rows("a", 1, 240))
    same, found = arms_of(tmp_path, one, without(rows("b", 2, 240))), arms_of(tmp_path, one, without(other))
    assert line_of(same, "topics, most frequent").is_matched
    assert not line_of(found, "topics, most frequent").is_matched
    assert any(word.split()[0] in TOPICS["schools"].split() for word in found.apart[0])


def test_pairs_and_conversations_are_no_arms(tmp_path: Path) -> None:
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows("b", 2)]
    with pytest.raises(ConfigError, match="no arms of one study"):
        compared(tmp_path, rows("a", 1, 60), chats[:60])


def test_what_the_rows_are_held_against(tmp_path: Path) -> None:
    """One row has a prompt of the other file, one a passage of it, and one both; an instrument shares nothing."""
    held, made = rows("h", 5, count=20), rows("a", 1, 40)
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
    assert found.verdict("leaks").startswith("3 of 40 rows share text with")


def test_the_page_holds_no_markup_of_a_row(tmp_path: Path) -> None:
    made = rows("a", 1, count=20)
    made[0] |= {
        "chosen": "<script>alert(1)</script>\x1b[2J\u202e",
        "topic": "<b>bold</b>",
        "prompt": "=1+1 <img src=x>",
    }
    found = compared(tmp_path, made, rows("b", 2, count=20))
    report.write_html(found, tmp_path / "arms.html")
    page = (tmp_path / "arms.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert not {"\x1b", "\u202e"} & set(page)


def test_the_sample_is_the_limit_of_what_is_looked_at(tmp_path: Path) -> None:
    found = compared(tmp_path, rows("a", 1, 80), sample_rows=60).datasets[0]
    assert (found.rows, found.sampled) == (80, 60)
    assert found.shortcuts is not None
    assert found.shortcuts.rows == 60
    titles = [section.title for section in found.evidence()]
    assert "Languages in the sample of 60" in titles
    assert "Topics" in titles, "which all rows name"


def test_no_shipped_row_is_one_of_an_instruments() -> None:
    run = presets.resolve("dpo", "demo-left").run
    found = inspect.inspect(run, ["stances"], against=instruments.shipped_names(), offline=True, say=lambda line: None)
    leaks = {leak.name: leak.rows for leak in found.datasets[0].leaks}
    assert leaks == dict.fromkeys((OTHER_SPLITS, *instruments.shipped_names()), 0)
