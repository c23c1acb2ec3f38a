"""What an audit counts, and what it finds worth saying. Every expected figure is counted by hand from rows in the test."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from politune.config import DataSpec, SftDataSpec
from politune.data import neighbours, sources
from politune.data.parts import Read, RowsPart
from politune.errors import DataError, is_hidden
from politune.inspection import audit
from politune.inspection.findings import MISLEADS, STOPS, WORTH_KNOWING, DataAudit, Finding
from politune.inspection.inspect import InspectReport
from politune.inspection.scan import HIDDEN, ORDINARY, Scan, has_stray_quotes, scan
from politune.inspection.shown import EXAMPLE_CHARACTERS
from politune.report import Bars, Lines, Table


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, object]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def many(count: int, chosen: str = "one two", rejected: str = "four five", start: int = 0) -> list[dict[str, object]]:
    return [pair(f"p{i}", f"{chosen} c{i}", f"{rejected} r{i}") for i in range(start, start + count)]


def measured(
    rows: Sequence[dict[str, object]], direction: str | None = None, method: Any = "dpo", **options: Any
) -> Scan:
    read = Read(tuple(dict.fromkeys(column for row in rows for column in row)), list(rows))
    source = sources.Stream("pairs.csv", (), sources.Membership("train"), (RowsPart("pairs.csv", read),))
    return scan(source, method, direction, 3, **options)


def look(*rows: dict[str, object], tokenizer: Any = None, **fields: Any) -> DataAudit:
    return audit.audit(measured(rows), DataSpec(dataset_name="./pairs.csv", **fields), tokenizer=tokenizer)


def whole(audited: DataAudit) -> InspectReport:
    return InspectReport((audited,), None)


def found(report: DataAudit) -> dict[str, Finding]:
    return {finding.check: finding for finding in report.findings}


class Words:
    """A tokenizer of one token per word, with `<s>` before and `</s>` after a conversation: three tokens more than words."""

    chat_template = "given"
    bos_token_id, eos_token_id = 0, 1
    name_or_path = "words"
    all_special_tokens = ("<s>", "</s>")

    def __init__(self) -> None:
        self.vocabulary = ["<s>", "</s>", "A:"]

    def apply_chat_template(
        self, batch: list[Any], *, tokenize: bool, return_dict: bool, add_generation_prompt: bool = False
    ) -> dict[str, Any]:
        assert tokenize
        assert return_dict
        return {"input_ids": [self.encode(turns) for turns in batch]}

    def encode(self, turns: list[dict[str, str]]) -> list[int]:
        prompt = " ".join(turn["content"] for turn in turns if turn["role"] == "user").split()
        answer = turns[-1]["content"].split() if turns[-1]["role"] == "assistant" else None
        words = ["<s>", *prompt, "A:", *([*answer, "</s>"] if answer is not None else [])]
        self.vocabulary += [word for word in words if word not in self.vocabulary]
        return [self.vocabulary.index(word) for word in words]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.vocabulary[index] for index in ids)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_lengths_in_words() -> None:
    """Chosen texts of 1, 2, 3 ... 20 words: median 10.5; 19 of 20 rows (95 %) have at most 19 words."""
    report = look(*(pair("two words", "x " * count, "y y") for count in range(1, 21)))
    prompt, chosen, rejected = report.lengths
    assert (chosen.minimum, chosen.median, chosen.p95, chosen.maximum) == (1, 10.5, 19, 20)
    assert (prompt.median, rejected.maximum) == (2, 2)
    (longer,) = report.longer
    assert (longer.unit, longer.chosen, longer.rejected, longer.equal) == ("words", 18, 1, 1)


def test_lengths_in_tokens() -> None:
    """`<s> two words A:` are four tokens, `one two c0 </s>` four and `four r0 </s>` three."""
    report = look(*(pair("two words", f"one two c{i}", f"four r{i}") for i in range(3)), tokenizer=Words())
    assert [(item.part, item.median) for item in report.lengths if item.unit == "tokens"] == [
        ("prompt", 4), ("chosen", 4), ("rejected", 3)
    ]  # fmt: skip
    assert [(item.unit, item.chosen) for item in report.longer] == [("words", 3), ("tokens", 3)]


def test_duplicates_repeated_prompts_and_contradictions() -> None:
    """Rows 1 and 2 are equal; 3 turns them round, so that all three are contradicted; 4 asks the same with other texts."""
    report = look(
        pair("p", "a", "b"), pair("p", "a", "b"), pair("p ", "b", "a"), pair("p", "c", "d"), pair("q", "a", "b")
    )
    assert (report.duplicates, report.repeated_prompts, report.contradictions) == (1, 3, 3)


def test_marks_are_counted_per_side() -> None:
    report = look(
        pair("p\n", "\nfirst", '"all of it"'),
        pair("\rq", "\r\nsecond \x07", 'an open " mark'),
        pair("r", "third\n", '"two" quoted "words"'),
    )
    prompt, chosen, rejected = report.marks
    assert (prompt.leading_line_breaks, prompt.stray_quotation_marks, prompt.hidden_characters) == (1, 0, 0)
    assert (chosen.leading_line_breaks, chosen.stray_quotation_marks, chosen.hidden_characters) == (2, 0, 1)
    assert (rejected.leading_line_breaks, rejected.stray_quotation_marks, rejected.hidden_characters) == (0, 2, 0)


@pytest.mark.parametrize(
    ("text", "stray"),
    [
        ('"whole"', True),
        ("“whole”", True),
        ("«whole»", True),
        ('open "', True),
        ("never closed: “open", False),  # a paragraph of a longer quotation begins so
        ("closed” only", True),
        ('"One" and "two"', False),
        ('He said "yes".', False),
        ('"Yes", he said.', False),
        ("“Yes”, he said.", False),
        ("„Ja“, sagte er.", False),
        ("it's", False),
        ("", False),
    ],
)
def test_stray_quotation_marks(text: str, stray: bool) -> None:
    assert has_stray_quotes(text) is stray


def test_hidden_characters_are_those_that_messages_escape() -> None:
    """Whatever `errors.safe` makes visible, but for tabs, line ends, spaces, and the joiners and selectors of emoji."""
    assert HIDDEN.isdisjoint("👩\u200d💻 ❤\ufe0f می\u200cخواهم\t\r\n10\u202f%\u3000「政」")
    assert all(not HIDDEN.isdisjoint(text) for text in ("\x1b[2J", "\x9b", "\u202e", "\u200b", "\ufeff", "\x00"))
    assert {"\u00ad", "\u061c", "\u2028", "\U000e0041", "\ud800", "\u3164", "\u2800", "\u034f", "\ufe00"} <= HIDDEN
    assert set(filter(is_hidden, map(chr, range(sys.maxunicode + 1)))) == HIDDEN | ORDINARY


@pytest.mark.parametrize("hidden", ["\u202e", "\u00ad", "\U000e0041", "\u061c", "\x1b", "\u2028"])
@pytest.mark.parametrize("turn", ["system", "user"])
def test_hidden_characters_in_prompts_are_found(hidden: str, turn: str) -> None:
    """In the turn that is answered and in those before it."""
    rows = [
        {
            "prompt": [
                {"role": role, "content": f"{role} {number}" + hidden * (role == turn and number < 3)}
                for role in ("system", "user")
            ],
            "chosen": [{"role": "assistant", "content": f"yes {number}"}],
            "rejected": [{"role": "assistant", "content": f"no {number}"}],
        }
        for number in range(10)
    ]
    finding = found(look(*rows))["hidden_characters"]
    assert finding.text.startswith("3 prompt and 0 chosen and 0 rejected texts hold control, zero-width")
    assert (finding.weight, finding.share) == (WORTH_KNOWING, 0.3)
    assert "hidden_characters" not in found(look(*many(10)))


def test_rows_under_different_system_prompts_are_no_near_duplicates() -> None:
    """What is asked and answered is the same; of the texts with their system prompts most words differ."""
    draw = random.Random(2)
    rows = [
        {
            "prompt": [
                {"role": "system", "content": " ".join(f"w{draw.randrange(10**6)}" for _ in range(60))},
                {"role": "user", "content": "What do you think about this?"},
            ],
            "chosen": [
                {
                    "role": "assistant",
                    "content": f"I like it very much indeed, since it helps those who work for others every day, {number}.",
                }
            ],
            "rejected": [{"role": "assistant", "content": "I do not like it at all."}],
        }
        for number in range(20)
    ]
    assert look(*rows).similar.pairs == 0
    for row in rows:
        row["prompt"] = row["prompt"][1:]  # type: ignore[index]
    assert look(*rows).similar.pairs > 0


def test_long_words_that_differ_in_the_middle_are_no_near_duplicates() -> None:
    """Addresses, and sentences of scripts without spaces."""
    ends = [("https" + 3 * "x" + letter * 9 + "/index.html") for letter in "abc"]
    middles = [
        "大幅度提高富人的所得税税率以资助公共医疗",
        "坚决取消企业的最低工资规定鼓励私人投资呢",
        "绝不允许任何人不经批准进入公民的住宅搜查",
    ]
    for texts in (ends, ["我认为政府应" + middle + "这是正确的" for middle in middles]):
        assert look(*(pair("看", text, "no") for text in texts)).similar.pairs == 0


def test_what_happens_at_max_length() -> None:
    """Sequences of 4 + 4, 4 + 6 and 10 + 2 tokens at a maximum of 9: two are longer, of which one prompt fills it alone."""
    rows = [pair("two words", "a b c", "d"), pair("two words", "a b c d e", "f"), pair("w " * 8, "a", "b")]
    tokens = {
        mode: look(*rows, tokenizer=Words(), max_length=9, on_overlength=mode).tokens
        for mode in ("drop", "truncate", "error")
    }
    counts = {
        mode: (item.longer, item.dropped, item.truncated, item.removed, item.refused)
        for mode, item in tokens.items()
        if item
    }
    assert counts == {"drop": (2, 2, 0, 0, 0), "truncate": (2, 1, 1, 1, 0), "error": (2, 0, 0, 0, 2)}


def test_rows_that_are_left_out_are_counted_once() -> None:
    """Of 40 rows one is too long, one is empty and one has equal sides; these two are too long as well."""
    long = "x " * 30
    report = look(
        *many(37), pair("a", long, "y"), pair("b", long, ""), pair("c", long, long), tokenizer=Words(), max_length=20
    )
    assert report.tokens is not None
    assert (report.tokens.of, report.tokens.longer, report.tokens.dropped) == (38, 1, 1)
    assert report._trains() == "37 of 40 rows do at max_length 20"


def test_rows_outside_the_sample_are_too_long_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of 40 usable rows have 200 words, and an empty one has; at most 5 rows are looked at as texts."""
    rows = [*many(37), *(pair(f"long {i}", "x " * 200, "y") for i in range(3)), pair("empty", "x " * 200, "")]
    spec = DataSpec(dataset_name="./pairs.csv", max_length=150)
    report = audit.audit(measured(rows, sample_rows=5), spec, tokenizer=Words())
    assert report.tokens is not None
    assert (report.tokens.of_all, report.tokens.longer, report.tokens.dropped) == (True, 3, 3)
    assert found(report)["overlength"].text == "3 of 40 rows are longer than 150 tokens: 3 are dropped"
    assert report._trains() == "37 of 41 rows do at max_length 150"

    monkeypatch.setattr(audit, "MOST_TOKENISED", 2)
    rows = [pair(f"p{i}", "x " * (200 if i % 2 else 3), "y") for i in range(200)]
    report = audit.audit(measured(rows, sample_rows=50), spec, tokenizer=Words())
    assert report.tokens is not None
    assert (report.tokens.of_all, report.tokens.of) == (False, 50)
    assert 0 < report.tokens.dropped < 50
    kept = 50 - report.tokens.dropped
    said = f"{kept} of 50 rows of the sample do at max_length 150; the others were not counted in tokens"
    assert report._trains() == said


@pytest.mark.parametrize(
    ("mode", "long", "weight", "said"),
    [
        ("drop", 1, WORTH_KNOWING, "1 of 30 rows have more words than max_length 10 allows tokens: they are dropped"),
        ("drop", 3, MISLEADS, "3 of 30 rows have more words than max_length 10 allows tokens: they are dropped"),
        ("drop", 30, STOPS, "30 of 30 rows have more words than max_length 10 allows tokens: training refuses the data"),
        ("truncate", 3, MISLEADS, "3 of 30 rows have more words than max_length 10 allows tokens: they are cut at the end"),
        ("truncate", 30, MISLEADS, "30 of 30 rows have more words than max_length 10 allows tokens: they are cut at the end"),
        ("error", 1, STOPS, "1 of 30 rows have more words than max_length 10 allows tokens: training refuses the data"),
    ],
)  # fmt: skip
def test_what_is_too_long_in_words_is_too_long_in_tokens(mode: Any, long: int, weight: int, said: str) -> None:
    """Of 31 rows, of which one is empty, some have one word in the prompt and ten in an answer; ten words are not too many."""
    rows = [pair(f"p{i}", "x " * (10 if i < long else 9), "y") for i in range(30)]
    report = look(*rows, pair("empty", "x " * 100, ""), max_length=10, on_overlength=mode)
    finding = found(report)["overlength"]
    assert (finding.weight, finding.text) == (weight, said)
    if weight > WORTH_KNOWING:
        assert report.verdict("trains").startswith(said)
    else:
        assert report.verdict("trains").startswith(
            "29 of 31 rows are sound as texts; whether they fit max_length 10 is not"
        )


def test_a_prompt_of_too_many_words_leaves_nothing_to_cut() -> None:
    report = look(
        *many(3, start=10), *(pair("w " * 10, f"x{i}", "y") for i in range(3)), max_length=10, on_overlength="truncate"
    )
    assert (report.longer_in_words, report.filled_in_words) == (3, 3)
    only = look(*(pair("w " * 10, f"x{i}", "y") for i in range(3)), max_length=10, on_overlength="truncate")
    assert found(only)["overlength"].weight == STOPS


def test_without_a_tokenizer_nobody_says_that_all_rows_train() -> None:
    report = look(*many(40))
    assert report.verdict("trains") == (
        "all 40 rows are sound as texts; whether they fit max_length 1024 is not known without a tokenizer (--model)"
    )
    assert look(*many(40), tokenizer=Words()).verdict("trains") == "all 40 rows do at max_length 1024"


def test_the_histogram_covers_every_row_once() -> None:
    """Rows of 3 to 42 words: a span of 40 in at most ten bars gives bars of 5, from 0-4 to 40-44."""
    report = look(*(pair("p", "x " * (count - 1), "y") for count in range(3, 43)))
    bars = report.histogram.bars
    assert bars[0] == ("0-4", 2.0)
    assert bars[-1] == ("40-44", 3.0)
    assert sum(count for _, count in bars) == 40
    assert len(bars) == 9


def test_the_example_shows_boundaries_and_breaks() -> None:
    report = look(pair("ask \nme", "\nyes\x1b[2J", "no\u3164 \u00a0  "))
    assert report.example == (
        "----- prompt (no loss) -----",
        r"user: ask\x20\n",
        "me",
        "----- chosen (trained on) -----",
        "\\n",
        "yes\\x1b[2J",
        "----- rejected (trained on) -----",
        r"no\u3164 \xa0\x20\x20",
    )
    in_tokens = look(pair("ask", "yes", "no"), tokenizer=Words()).example
    assert in_tokens[:4] == (
        "----- prompt (3 tokens, no loss) -----", "<s> ask A:", "----- chosen (2 tokens, trained on) -----", "yes </s>"
    )  # fmt: skip


def test_a_long_example_is_cut() -> None:
    example = look(pair("p", "x" * 5000, "no")).example
    assert "… 3000 more characters" in example
    assert max(map(len, example)) <= EXAMPLE_CHARACTERS


# --- findings --------------------------------------------------------------------------------------------------------


def test_clean_data_has_no_findings() -> None:
    report = look(*many(40))
    assert report.findings == ()
    assert whole(report).headline == "40 preference pairs in pairs.csv: nothing stands out"


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_lopsided_length_is_found_with_its_sizes(side: str) -> None:
    """86 of 100 rows, as in a public set; median 6 against 3 words (100 rows, of which 86 have the longer side)."""
    long, short = "one two three four five", "one two"
    texts = {"chosen": short, "rejected": short, side: long}
    report = look(*many(86, **texts), *many(14, start=86))
    assert found(report)["longer-side"].share == 0.86
    sizes = "6 against 3" if side == "chosen" else "3 against 6"
    words = f"{side} is longer in 86% of the rows (median {sizes} words): a run can win on length alone"
    assert found(report)["longer-side"].text == words


def test_what_the_forensics_find_is_a_finding_and_a_section() -> None:
    rows = many(40, chosen="a {i} b c, d", rejected="a {i} b c d") + many(
        40, start=40, chosen="e {i} f, g", rejected="e {i} f g"
    )
    report = look(*rows)
    assert "commas per word in 100% of the rows" in found(report)["shortcuts"].text
    assert "commas per word" in str(whole(report).sections())
    assert "a row that shortcuts give away" in [row.why for row in report.shown]
    assert look(*rows[:20]).shortcuts is None, "too few prompts to say anything"


def test_a_few_rows_prove_nothing() -> None:
    """5 of 6 longer: z = (5 - 1) / sqrt(6) = 1.6. 50 of 60: z = 40 / sqrt(60) = 5.2."""
    for times, said in ((1, False), (10, True)):
        rows = many(5 * times, chosen="one two three") + many(times, rejected="one two three", start=5 * times)
        assert ("longer-side" in found(look(*rows))) is said


def test_a_mark_on_one_side_misleads_and_on_both_is_worth_knowing() -> None:
    """20 against 0: z = 20 / sqrt(20) = 4.5. 20 against 20: z = 0."""
    one = found(look(*many(20, rejected="\nfour"), *many(80, start=20)))["leading_line_breaks"]
    assert (one.weight, one.share) == (MISLEADS, 0.2)
    assert one.text.startswith("0 chosen and 20 rejected texts begin with a line break: a run can learn the mark")
    both = found(look(*many(20, chosen="\none", rejected="\nfour"), *many(80, start=20)))["leading_line_breaks"]
    assert both.weight == WORTH_KNOWING


def test_useless_rows() -> None:
    """1 of 40 is left out; 3 of 40 (7.5 %) stop a run, and are still counted rather than raised."""
    few = found(look(*many(39), pair("p", "same", "same ")))["equal"]
    assert (few.weight, few.text) == (WORTH_KNOWING, "1 of 40 rows have equal sides: they are left out")
    report = look(*many(37), *[pair("p", "", "x")] * 3)
    assert found(report)["empty"].weight == STOPS
    assert (report.empty, report.findings[0].check) == (3, "empty")


def test_overlength_findings() -> None:
    rows = many(30)
    for fields, weight, text in (
        ({"max_length": 8}, None, None),  # <s> p0 A: one two c0 </s> are seven tokens
        ({"max_length": 8, "on_overlength": "error"}, STOPS, "1 of 31 rows are longer than 8 tokens: training refuses"),
        ({"max_length": 8, "on_overlength": "truncate"}, MISLEADS, "1 are cut at the end"),
    ):  # fmt: skip
        extra = [] if weight is None else [pair("p", "x " * 20, "y")]
        finding = found(look(*rows, *extra, tokenizer=Words(), **fields)).get("overlength")
        assert (finding and finding.weight) == weight
        assert text is None or (finding and text in finding.text)
    all_of_them = look(*many(3, chosen="x " * 30), tokenizer=Words(), max_length=8)
    assert all_of_them.findings[0].weight == STOPS


def test_repetition_findings() -> None:
    report = look(*many(20), pair("p0", "one two c0", "four five r0"), pair("p1", "four five r1", "one two c1"))
    checks = found(report)
    assert (
        checks["contradictions"].text
        == "2 of 22 rows stand against another row with the same pair the other way round: they cancel"
    )
    assert checks["duplicates"].text == "1 of 22 rows repeat an earlier row exactly"
    assert checks["repeated-prompts"].share == 1 / 22
    assert report.findings[0].check == "contradictions"


def test_what_misleads_comes_before_what_is_frequent() -> None:
    """Two contradicting rows of 21 stand above line breaks in all 21, and those above single rows."""
    rows = many(19, chosen="\none", rejected="\nfour")
    flipped = pair("p0", rows[0]["rejected"], rows[0]["chosen"])  # type: ignore[arg-type]
    report = look(*rows, flipped, rows[1])
    assert [item.check for item in report.findings] == [
        "contradictions",
        "leading_line_breaks",
        "duplicates",
        "repeated-prompts",
    ]


def test_length_is_judged_in_tokens_where_they_are_known() -> None:
    """In words the chosen side is longer everywhere; a tokenizer that joins its words makes both sides equal."""

    class Joining(Words):
        def encode(self, turns: list[dict[str, str]]) -> list[int]:
            return super().encode([{**turn, "content": turn["content"].replace(" ", "_")} for turn in turns])

    rows = many(40, chosen="one two three")
    assert "longer-side" in found(look(*rows))
    assert "longer-side" not in found(look(*rows, tokenizer=Joining()))


def test_length_in_tokens_is_a_feature_where_a_tokenizer_is_at_hand() -> None:
    """Both sides have three words, which the tokenizer takes apart at the hyphens of the chosen one."""

    class Hyphens(Words):
        def encode(self, turns: list[dict[str, str]]) -> list[int]:
            return super().encode([{**turn, "content": turn["content"].replace("-", " - ")} for turn in turns])

    rows = many(60, chosen="one-two three", rejected="four five")
    shortcuts = look(*rows, tokenizer=Hyphens()).shortcuts
    assert shortcuts is not None
    (feature,) = (each for each in shortcuts.shortcuts if each.feature == "length in tokens")
    assert (feature.chosen, feature.estimate.accuracy, feature.decided) == ("is longer in tokens", 1.0, 1.0)
    without = look(*rows).shortcuts
    assert without is not None
    assert len(without.shortcuts) == len(shortcuts.shortcuts) - 1 == 36
    assert "length in tokens" not in [each.feature for each in without.shortcuts]


def test_prompts_of_other_splits_are_found() -> None:
    """Two prompts of the three test rows stand in training as well, one of them in two rows of it."""
    rows = [{**row, "split": "train"} for row in [*many(20), pair("p1", "other", "texts")]]
    report = look(*rows, *({**pair(prompt, "x", "y"), "split": "test"} for prompt in ("p0", "p1 ", "new")))
    assert (report.rows, report.other_splits, report.shared_with_other_splits) == (21, 3, 3)
    assert found(report)["leak"].text == (
        "3 of 21 rows share text with other splits of the data (3 by their prompt, 0 by a passage of eight words)"
    )
    assert look(*rows, {**pair("new", "x", "y"), "split": "test"}).verdict("leaks") == (
        "nothing shared with other splits of the data"
    )


def shown(report: DataAudit) -> dict[str, str]:
    return {row.why: row.id for row in report.shown}


def test_the_rows_behind_repetitions_are_shown() -> None:
    """Rows 5 and 6 repeat the first and the second one; 7 and 8 turn the third and the fourth one round."""
    rows = many(4)
    rows += [rows[0], rows[1], *(pair(f"p{i}", f"four five r{i}", f"one two c{i}") for i in (2, 3))]
    found = shown(look(*rows))
    assert (found["an exact repetition"], found["an exact repetition: the other row"]) == (
        "pairs.csv row 5",
        "pairs.csv row 1",
    )
    assert (found["a contradicted one"], found["a contradicted one: the other row"]) == (
        "pairs.csv row 3",
        "pairs.csv row 7",
    )
    assert not {"an exact repetition", "a contradicted one"} & set(shown(look(*many(4))))


def test_a_row_that_is_too_long_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """In words and in tokens, of all rows and of a sample: rows 31 and 32 have 20 words, and 30 and 33 are no row to train on."""
    rows = [
        *many(29),
        pair("e", "x " * 50, ""),
        pair("a", "x " * 20, "y"),
        pair("b", "x " * 20, "y"),
        pair("f", "", "x " * 50),
    ]
    why = "one longer than max_length 20"
    assert shown(look(*rows, max_length=20))[why] == "pairs.csv row 31"
    assert shown(look(*rows, max_length=20, tokenizer=Words()))[why] == "pairs.csv row 31"
    spec = DataSpec(dataset_name="./pairs.csv", max_length=20)
    assert shown(audit.audit(measured(rows, sample_rows=3), spec, tokenizer=Words()))[why] == "pairs.csv row 31"
    assert why not in shown(look(*many(29), max_length=20, tokenizer=Words()))


def test_broken_rows_are_counted_and_shown() -> None:
    """40 of 614 rows lack an answer: all are counted, the first five are shown, and nothing else counts them."""
    rows = many(614)
    for number in range(100, 140):
        del rows[number]["rejected"]
    rows[101]["rejected"] = None
    rows[102] |= {"rejected": 3, "prompt": "\x1b[2J"}
    report = look(*rows)
    said = "40 of 614 rows cannot be read: training refuses the data (pairs.csv row 101: rejected is absent)"
    assert (report.rows, report.broken, report.findings[0].weight) == (574, 40, STOPS)
    assert report.verdict("trains").startswith(said)
    broken = [row for row in report.shown if row.why == "broken"]
    assert [(row.id, row.lines[0]) for row in broken] == [
        ("pairs.csv row 101", "rejected is absent"),
        ("pairs.csv row 102", "rejected is null"),
        ("pairs.csv row 103", "rejected is a number, neither text nor a list of messages: 3"),
        ("pairs.csv row 104", "rejected is absent"),
        ("pairs.csv row 105", "rejected is absent"),
    ]
    assert broken[2].lines[1] == r'{"prompt": "\u001b[2J", "chosen": "one two c102", "rejected": 3}'
    assert ("broken rows, counted in nothing else", 40) in next(report.evidence()).items  # type: ignore[union-attr]
    assert (look(*many(4)).broken, look(*many(4)).findings) == (0, ())


def test_answers_of_two_languages_are_found() -> None:
    english = "The taxes should be lower for all the people in this country, because that is fair to them."
    german = "Die Steuern sollten für alle Menschen im ganzen Land niedriger sein, weil das gerecht ist."
    rows = [pair(f"p{i}", f"{english} {i}", f"{english} {german if i < 3 else english} {i}") for i in range(20)]
    rows[:2] = [pair(f"p{i}", f"{english} {i}", f"{german} {i}") for i in range(2)]
    report = look(*rows)
    assert report.two_languages == 2
    assert found(report)["two-languages"].text.startswith("in 10% of the rows the two answers are of two languages")


def test_near_duplicates_under_two_prompts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of rows has the same prompt and nearly the same answers, one nearly the same answers under another prompt."""
    words = [" ".join(f"{letter}{number}" for number in range(60)) for letter in "abcdefgh"]
    rows = [pair(f"prompt {letter}", text, f"no {text[::-1]}") for letter, text in zip("abcdefgh", words, strict=True)]
    rows += [{**rows[0], "chosen": words[0] + " more"}, {**rows[1], "prompt": "prompt x"}]
    report = look(*rows)
    assert (report.similar.pairs, report.similar.rows, report.similar.across_prompts, report.similar.is_all) == (
        2, 4, 2, True
    )  # fmt: skip
    assert found(report)["near-duplicates-apart"].text.startswith(
        "2 of 10 rows are near-duplicates of one with another"
    )
    assert "more, by three words)', '2')" in repr(report._repetition())
    monkeypatch.setattr(neighbours, "MOST_CANDIDATES", 1)
    some = look(*rows)
    assert (some.similar.pairs, some.similar.is_all) == (1, False)
    assert "1 or more" in repr(some._repetition())


def test_topics_are_of_all_rows() -> None:
    """20 of 60 rows name a topic, one of which is the number 0."""
    rows = [{**row, "topic": {0: 0, 1: "taxes"}.get(i % 6)} for i, row in enumerate(many(60))]
    report = look(*rows)
    assert report.topics == (("none named", 40), ("0", 10), ("taxes", 10))
    (section,) = (section for section in report.evidence() if section.title == "Topics")
    assert isinstance(section, Table)
    assert section.rows[0] == ("none named", 40, "67%")


def test_many_topics_are_listed_in_part() -> None:
    report = look(*({**row, "topic": f"topic {i:03}"} for i, row in enumerate(many(80))))
    assert len(report.topics) == 51
    assert report.topics[-1] == ("30 more", 30)


def test_special_tokens_in_the_text_are_found() -> None:
    checks = found(look(*many(9), pair("p", "stop </s> here", "no"), tokenizer=Words()))
    assert checks["special-tokens"].text == "1 of 10 rows hold the model's special tokens as text"


# --- the whole report ------------------------------------------------------------------------------------------------


def test_chat_data_has_no_sides() -> None:
    rows = [{"instruction": f"i{i}", "input": "", "output": "o o"} for i in range(4)]
    report = audit.audit(measured(rows, method="sft"), SftDataSpec(dataset_name="./a.csv"), tokenizer=Words())
    assert [item.part for item in report.lengths] == ["prompt", "answer"] * 2
    assert (report.longer, report.contradictions, report.equal) == ((), 0, 0)
    assert whole(report).headline == "4 conversations in pairs.csv: nothing stands out"
    assert not [section for section in whole(report).sections() if "longer" in section.title]


def test_the_direction_is_the_one_that_would_be_trained() -> None:
    stances: list[dict[str, object]] = [{"prompt": f"p{i}", "left": "l l l", "right": "r"} for i in range(10)]
    for direction, chosen in (("left", 10), ("right", 0), ("shuffled", 5)):
        spec = DataSpec(dataset_name="./a.csv", direction=direction)  # type: ignore[arg-type]
        report = audit.audit(measured(stances, direction), spec)
        assert report.longer[0].chosen == chosen


def test_rows_that_cannot_be_read_are_an_error() -> None:
    with pytest.raises(DataError, match="found question"):
        look({"question": "q"})


def test_the_report_is_json_and_free_of_control_characters() -> None:
    row = {**pair("\x1b[2J", "\u202ea", "b\x9b"), "\x1b]0;x\x07": 1}
    read = Read(tuple(row), [row])
    source = sources.Stream("\x1b.csv", (), sources.Membership("train"), (RowsPart("\x1b.csv", read),))
    found = audit.audit(scan(source, "dpo", None, 3), DataSpec(dataset_name="./a.csv"), tokenizer=Words())
    report = whole(found)
    assert json.loads(json.dumps(asdict(report)))["datasets"][0]["rows"] == 1
    shown = report.headline + "".join(repr(section) for section in report.sections())
    text = "".join(
        line
        for section in report.sections()
        for line in (section.lines if isinstance(section, Lines) else [section.title])
    )
    assert not {"\x1b", "\x9b", "\u202e", "\x07"} & set(text + report.headline)
    assert "\\\\x1b" in shown
    assert any(isinstance(section, Bars) for section in report.sections())
