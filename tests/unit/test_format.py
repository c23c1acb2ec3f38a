"""Rows as prompts and answers: every accepted shape, every refusal, and the arithmetic of fitting and splitting."""

import os
from typing import Any

import pytest

from politune.data import format as rows_format
from politune.data.format import (
    ChatRow,
    Encoded,
    PreferenceRow,
    Table,
    encode,
    fit,
    methods_of,
    needs_direction,
    parse_preferences,
    split_validation,
    to_chat_rows,
    to_preference_rows,
    to_trl,
)
from politune.errors import DataError, ModelError, PolituneError

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Why?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def table(*rows: dict[str, object], lines: tuple[int, ...] | None = None) -> Table:
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    return Table(columns, list(rows), "pairs.csv", "0" * 64, lines=lines)


def pairs(count: int) -> Table:
    return table(*({"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(count)))


def message_of(error: pytest.ExceptionInfo[PolituneError]) -> str:
    return str(error.value)


# --- preference rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "yes", "rejected": "no"},
        {"prompt": [ASK], "chosen": "yes", "rejected": "no"},
        {"prompt": "Why?", "chosen": [YES], "rejected": [NO]},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"prompt": "Why?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": "Why?", "left": "yes", "right": "no"},
    ],
)
def test_every_shape_gives_the_same_pair(row: dict[str, object]) -> None:
    done = to_preference_rows(table(row), "left", seed=0)
    assert done.dropped == {}
    assert done.rows == [PreferenceRow((ASK,), "yes", "no", "train", "pairs.csv row 1")]


def test_the_prompt_is_the_longest_shared_run_of_turns() -> None:
    turns = [SYSTEM, ASK, NO, {"role": "user", "content": "Really?"}]
    row = to_preference_rows(table({"chosen": [*turns, YES], "rejected": [*turns, NO]}), None, seed=0).rows[0]
    assert list(row.prompt) == turns
    assert (row.chosen, row.rejected) == ("yes", "no")


def test_line_breaks_around_a_text_stay() -> None:
    row = to_preference_rows(table({"prompt": "p", "chosen": "\r\nyes\n", "rejected": " no"}), None, seed=0).rows[0]
    assert (row.chosen, row.rejected) == ("\r\nyes\n", " no")


def test_right_mirrors_left_row_by_row() -> None:
    stances = table(*({"prompt": f"p{i}", "left": f"l{i}", "right": f"r{i}", "id": f"s-{i}"} for i in range(5)))
    left = to_preference_rows(stances, "left", seed=0).rows
    right = to_preference_rows(stances, "right", seed=0).rows
    assert [(row.chosen, row.rejected) for row in right] == [(row.rejected, row.chosen) for row in left]
    assert [row.id for row in left] == ["s-0", "s-1", "s-2", "s-3", "s-4"]


@pytest.mark.parametrize("direction", ["left", "right", "none", None])
def test_direction_is_only_a_declaration_where_the_sides_are_fixed(direction: str | None) -> None:
    assert [row.chosen for row in to_preference_rows(pairs(3), direction, seed=0).rows] == ["c0", "c1", "c2"]


def test_shuffled_swaps_half_of_the_rows_by_the_seed() -> None:
    """Exactly 50 of 100 rows are swapped; the same ones for the same seed, others for another."""
    once = to_preference_rows(pairs(100), "shuffled", seed=1).rows
    again = to_preference_rows(pairs(100), "shuffled", seed=1).rows
    other = to_preference_rows(pairs(100), "shuffled", seed=2).rows
    assert sum(row.chosen.startswith("r") for row in once) == 50
    assert once == again
    assert once != other
    assert all({row.chosen[0], row.rejected[0]} == {"c", "r"} for row in once)


@pytest.mark.parametrize("direction", [None, "none"])
def test_stances_need_a_direction(direction: str | None) -> None:
    with pytest.raises(DataError, match=r"data.direction: .* left and a right text"):
        to_preference_rows(table({"prompt": "p", "left": "l", "right": "r"}), direction, seed=0)


# --- chat rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add.", "input": "1 + 1", "output": "2"}, "Add.\n\n1 + 1"),
        ({"instruction": "Add.", "input": "", "output": "2"}, "Add."),
        ({"instruction": "Add.", "input": None, "output": "2"}, "Add."),
        ({"instruction": "Add.", "output": "2"}, "Add."),
        ({"prompt": "Add.", "completion": "2"}, "Add."),
        ({"prompt": "Add.", "completion": [{"role": "assistant", "content": "2"}]}, "Add."),
        ({"prompt": "Add.", "left": "2", "right": "3"}, "Add."),
        ({"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "2"}]}, "Add."),
    ],
)
def test_every_chat_shape(row: dict[str, object], prompt: str) -> None:
    rows = to_chat_rows(table(row), "left", seed=0).rows
    assert rows == [ChatRow(({"role": "user", "content": prompt},), "2", "train", "pairs.csv row 1")]


def test_a_long_conversation_is_trained_on_its_last_message() -> None:
    turns = [SYSTEM, ASK, NO, ASK, YES]
    row = to_chat_rows(table({"messages": turns}), None, seed=0).rows[0]
    assert (list(row.prompt), row.completion) == (turns[:-1], "yes")


def test_shuffled_needs_two_sides() -> None:
    with pytest.raises(DataError, match=r"no sides to shuffle"):
        to_chat_rows(table({"prompt": "p", "completion": "c"}), "shuffled", seed=0)
    stances = table(*({"prompt": f"p{i}", "left": "l", "right": "r"} for i in range(10)))
    assert sorted(row.completion for row in to_chat_rows(stances, "shuffled", seed=0).rows) == ["l"] * 5 + ["r"] * 5


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "pairs.csv:7: chosen is null"),
        ({"prompt": "p", "chosen": 3, "rejected": "r"}, "pairs.csv:7: chosen is a number"),
        (
            {"prompt": "p", "chosen": {"a": 1}, "rejected": "r"},
            "pairs.csv:7: chosen is an object, neither text nor a list of messages",
        ),
        ({"prompt": "p", "chosen": "\ud800", "rejected": "r"}, "pairs.csv:7: chosen holds half a character"),
        ({"prompt": "p", "chosen": "[{'role': 'user'}]", "rejected": "r"}, "a list of messages printed as text"),
        ({"prompt": "p", "chosen": [], "rejected": []}, "chosen is an empty list, neither"),
        ({"prompt": "p", "chosen": ["x"], "rejected": ["x"]}, r"chosen\[0\] is no message"),
        ({"prompt": "p", "chosen": [{"role": "bot", "content": ""}], "rejected": []}, "has the role 'bot'"),
        ({"prompt": [YES], "chosen": "c", "rejected": "r"}, "the prompt does not end with a message of the user"),
        ({"prompt": "other", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "the assistant's one message to the prompt"),
        ({"prompt": "p", "chosen": [ASK], "rejected": [YES]}, "the assistant's one message to the prompt"),
        ({"chosen": "c", "rejected": "r"}, "chosen is text and there is no prompt column"),
        ({"chosen": [ASK, YES, ASK, YES], "rejected": [ASK, NO]}, "chosen is not one message of the assistant after"),
        ({"chosen": [ASK, YES], "rejected": [YES, NO]}, "the prompt does not end with a message of the user"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_preference_rows(table(row, lines=(7,)), None, seed=0)


def test_a_missing_key_is_said_to_be_absent() -> None:
    rows = table({"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c"})
    with pytest.raises(DataError, match=r"pairs.csv row 2: rejected is absent"):
        to_preference_rows(rows, None, seed=0)


def test_rows_of_mixed_shape_are_refused() -> None:
    """TRL looks at one row only, and at an arbitrary key of it."""
    rows = table({"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": [ASK], "chosen": "c", "rejected": "r"})
    with pytest.raises(DataError, match=r"pairs.csv row 2: prompt is a list here and text in the first row"):
        to_preference_rows(rows, None, seed=0)


def test_wrong_columns_are_listed_beside_the_right_ones() -> None:
    with pytest.raises(DataError, match=r"found question, good, bad; need prompt, chosen, rejected"):
        to_preference_rows(table({"question": "q", "good": "g", "bad": "b"}), None, seed=0)
    with pytest.raises(DataError, match=r"what `politune train sft` reads"):
        to_preference_rows(table({"prompt": "p", "completion": "c"}), None, seed=0)
    with pytest.raises(DataError, match=r"what `politune train dpo` reads"):
        to_chat_rows(table({"prompt": "p", "chosen": "c", "rejected": "r"}), None, seed=0)
    with pytest.raises(DataError, match=r"separated by ';'"):
        to_preference_rows(table({"prompt;chosen;rejected": "p;c;r"}), None, seed=0)


def test_foreign_column_names_reach_the_terminal_escaped() -> None:
    with pytest.raises(DataError) as error:
        to_preference_rows(table({"\x1b[31mred": "x"}), None, seed=0)
    assert "\x1b" not in message_of(error)
    assert "\\x1b[31mred" in message_of(error)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "p", "chosen": "same", "rejected": "same\n"}, "equal"),
        ({"prompt": "p", "chosen": " \n", "rejected": "r"}, "empty"),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "empty"),
    ],
)
def test_a_few_useless_rows_are_left_out_and_counted(bad: dict[str, object], reason: str) -> None:
    """1 of 20 rows is 5 %: left out. 2 of 20 is 10 %: refused, and the first of them is named."""
    good = pairs(19).rows
    done = to_preference_rows(table(*good, bad), None, seed=0)
    assert (len(done.rows), done.dropped) == (19, {reason: 1})
    assert len(parse_preferences(table(*good, bad), None, seed=0)) == 20
    with pytest.raises(DataError, match=r"pairs.csv row 19: .* in 2 of 20 rows"):
        to_preference_rows(table(*good[:18], bad, bad), None, seed=0)


def test_empty_answers_are_left_out_of_chat_rows_too() -> None:
    rows = [{"prompt": f"p{i}", "completion": "c" if i else "  "} for i in range(20)]
    done = to_chat_rows(table(*rows), None, seed=0)
    assert (len(done.rows), done.dropped) == (19, {"empty": 1})


@pytest.mark.parametrize("convert", [to_preference_rows, to_chat_rows])
@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "left, right and chosen, rejected"),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, "left, right and chosen, rejected"),
        ({"prompt": "p", "completion": "c"}, "left, right and completion"),
        ({"messages": [ASK, YES]}, "left, right and messages"),
    ],
)
def test_sides_of_two_kinds_are_refused(convert: Any, row: dict[str, object], named: str) -> None:
    """A direction would pick a side of left and right, and something else would be trained on."""
    with pytest.raises(DataError, match=rf"pairs.csv has the columns {named}, so it is not plain.*remove"):
        convert(table({**row, "left": "l", "right": "r"}), "left", seed=0)


@pytest.mark.parametrize(
    ("columns", "methods"),
    [
        ("prompt chosen rejected", ("dpo",)),
        ("chosen rejected", ("dpo",)),
        ("prompt left right", ("dpo", "sft")),
        ("instruction input output", ("sft",)),
        ("prompt completion", ("sft",)),
        ("messages", ("sft",)),
        ("text", ()),
    ],
)
def test_the_columns_say_which_method_reads_them(columns: str, methods: tuple[str, ...]) -> None:
    assert methods_of(table(dict.fromkeys(columns.split(), "x"))) == methods
    assert needs_direction(table(dict.fromkeys(columns.split(), "x"))) is (columns == "prompt left right")


# --- token ids -------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token per character, whose template writes `^`, `u:` or `a:` before and `$` after each turn."""

    chat_template = "given"
    bos_token_id, eos_token_id = ord("^"), ord("$")
    name_or_path = "letters"
    bos, ending, prompt_ending = "^", "$", "a:"

    def apply_chat_template(
        self, conversations: list[Any], *, tokenize: bool, return_dict: bool, add_generation_prompt: bool = False
    ) -> dict[str, Any]:
        assert tokenize
        assert return_dict
        batch = conversations if isinstance(conversations[0], list) else [conversations]
        ids = [[ord(letter) for letter in self.render(turns, add_generation_prompt)] for turns in batch]
        return {"input_ids": ids if batch is conversations else ids[0]}

    def render(self, turns: list[dict[str, str]], ask: bool) -> str:
        text = "".join(f"{turn['role'][0]}:{turn['content']}{self.ending}" for turn in turns)
        return self.bos + text + (self.prompt_ending if ask else "")


def read(ids: list[int]) -> str:
    return "".join(map(chr, ids))


ROW = PreferenceRow((ASK,), "yes", "no", id="r-1")


def test_a_sequence_is_cut_where_the_answer_begins() -> None:
    (item,) = encode([ROW], Letters())
    assert read(item.prompt_ids) == "^u:Why?$a:"
    assert (read(item.chosen_ids), read(item.rejected_ids)) == ("yes$", "no$")
    assert (item.longest, item.lost_prompt_tokens, item.stops) == (14, 0, True)


def test_a_boundary_mismatch_is_counted() -> None:
    """The prompt alone ends with `a:<think>`, of which the conversation keeps `a:`: seven tokens are lost."""
    tokenizer = Letters()
    tokenizer.prompt_ending = "a:<think>"
    (item,) = encode([ROW], tokenizer)
    assert (read(item.prompt_ids), item.lost_prompt_tokens) == ("^u:Why?$a:", len("<think>"))
    assert fit([ROW], [item], 100, "drop").counts.boundary_mismatches == 1


def test_both_answers_begin_at_the_same_place() -> None:
    """The prompt alone ends with `a:y`, as `a:yes` begins and `a:no` does not: TRL cuts both behind `a:`."""
    tokenizer = Letters()
    tokenizer.prompt_ending = "a:y"
    (item,) = encode([ROW], tokenizer)
    assert (read(item.prompt_ids), read(item.chosen_ids), read(item.rejected_ids)) == ("^u:Why?$a:", "yes$", "no$")
    assert item.lost_prompt_tokens == 1


def test_both_answers_need_an_end() -> None:
    class Careless(Letters):
        def render(self, turns: list[dict[str, str]], ask: bool) -> str:
            return super().render(turns, ask).replace("no$", "no")

    assert not encode([ROW], Careless())[0].stops


def test_a_template_that_forgets_the_end_is_counted() -> None:
    tokenizer = Letters()
    tokenizer.ending = ""
    (item,) = encode([ChatRow((ASK,), "yes")], tokenizer)
    assert (read(item.completion_ids), item.stops) == ("yes", False)
    assert fit([ROW], [item], 100, "drop").counts.without_end == 1


def test_two_bos_tokens_are_refused() -> None:
    tokenizer = Letters()
    tokenizer.bos = "^^"
    with pytest.raises(ModelError, match=r"two BOS"):
        encode([ROW], tokenizer)


def test_no_chat_template_says_what_to_do() -> None:
    tokenizer = Letters()
    tokenizer.chat_template = ""
    with pytest.raises(ModelError, match=r"letters has no chat template.*take the model's instruct or chat version"):
        encode([ROW], tokenizer)


def test_a_template_that_refuses_is_quoted_with_the_row() -> None:
    from jinja2 import TemplateError

    class Strict(Letters):
        def render(self, turns: list[dict[str, str]], ask: bool) -> str:
            if turns[0]["role"] == "system":
                raise TemplateError("no system role here")
            return super().render(turns, ask)

    rows = [ROW, PreferenceRow((SYSTEM, ASK), "yes", "no", id="r-2")]
    with pytest.raises(ModelError, match=r"r-2: the chat template of letters refuses a row: no system role here"):
        encode(rows, Strict())


@pytest.mark.parametrize("kind", [PreferenceRow, ChatRow])
def test_slices_encode_as_their_rows_do(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Seven rows in slices of three: the last one is short."""
    answers = 2 if kind is PreferenceRow else 1
    rows = [kind((SYSTEM, ASK) if i % 2 else (ASK,), *["yes" * i, "no"][:answers], id=f"r-{i}") for i in range(7)]
    one_by_one = [item for row in rows for item in encode([row], Letters())]
    monkeypatch.setattr(rows_format, "SLICE_ROWS", 3)
    assert encode(rows, Letters()) == one_by_one


def test_a_refused_row_is_named_in_a_later_slice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(Letters):
        def render(self, turns: list[dict[str, str]], ask: bool) -> str:
            if turns[-1]["content"] == "never":
                raise ValueError("not that")
            return super().render(turns, ask)

    monkeypatch.setattr(rows_format, "SLICE_ROWS", 2)
    rows = [PreferenceRow((ASK,), "yes", "never" if i == 3 else "no", id=f"r-{i}") for i in range(5)]
    with pytest.raises(ModelError, match=r"r-3: the chat template of letters refuses a row: not that"):
        encode(rows, Strict())


@pytest.mark.parametrize("given", [None, "false", "true"])
def test_every_core_tokenises_and_the_setting_stays(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    """The variable is what tokenizers reads at each call; it comes back after an error, too."""
    seen = []

    class Curious(Letters):
        def render(self, turns: list[dict[str, str]], ask: bool) -> str:
            seen.append(os.environ["TOKENIZERS_PARALLELISM"])
            if turns[-1]["content"] == "no":
                raise ValueError("no")
            return super().render(turns, ask)

    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if given is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", given)
    encode([ChatRow((ASK,), "yes")], Curious())
    assert os.environ.get("TOKENIZERS_PARALLELISM") == given
    with pytest.raises(ModelError, match="refuses a row"):
        encode([ROW], Curious())
    assert os.environ.get("TOKENIZERS_PARALLELISM") == given
    assert set(seen) == {"true"}


def test_no_rows_no_tokens() -> None:
    assert encode([], Letters()) == []


def test_records_for_trl() -> None:
    """Loss is on the answer alone: a chat's labels are -100 over the prompt."""
    assert to_trl([Encoded([1, 2], ([3, 4], [5]))]) == [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    ]
    assert to_trl([Encoded([1, 2], ([3, 4],))]) == [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}]


# --- fit -------------------------------------------------------------------------------------------------------------


def sized(prompt: int, *completions: int) -> Encoded:
    return Encoded([1] * prompt, tuple([2] * count for count in completions))


ROWS = [PreferenceRow((ASK,), "yes", "no", id=name) for name in ("short", "long", "full")]
ENCODED = [sized(4, 6, 5), sized(4, 5, 7), sized(10, 1, 1)]  # 10, 11 and 11 tokens


def test_drop_leaves_out_what_is_longer() -> None:
    done = fit(ROWS, ENCODED, 10, "drop")
    assert [row.id for row in done.rows] == ["short"]
    assert (done.counts.kept, done.counts.dropped, done.counts.truncated) == (1, 2, 0)


def test_truncate_cuts_answers_and_drops_what_has_no_room_for_one() -> None:
    """At 10 tokens the second row keeps its 4 + 5 and cuts 4 + 7 to 4 + 6; the third row's prompt fills all 10."""
    done = fit(ROWS, ENCODED, 10, "truncate")
    assert [row.id for row in done.rows] == ["short", "long"]
    assert [[len(ids) for ids in item.completions] for item in done.encoded] == [[6, 5], [5, 6]]
    assert (done.counts.kept, done.counts.dropped, done.counts.truncated) == (2, 1, 1)


def test_an_answer_that_is_cut_has_no_end() -> None:
    """`^u:Why?$a:` has 10 tokens: at 13, `yes$` loses its `$` and `no$` keeps it; at 14 nothing is cut."""
    encoded = encode([ROW], Letters())
    assert fit([ROW], encoded, 14, "truncate").counts.without_end == 0
    counts = fit([ROW], encoded, 13, "truncate").counts
    assert (counts.truncated, counts.without_end) == (1, 1)


def test_a_cut_behind_the_end_token_keeps_it() -> None:
    """The template writes a line break behind `$`: at 14 tokens only that is cut."""
    tokenizer = Letters()
    tokenizer.ending = "$\n"
    row = ChatRow((ASK,), "yes")
    (item,) = encode([row], tokenizer)
    counts = fit([row], [item], item.longest - 1, "truncate").counts
    assert (counts.truncated, counts.without_end) == (1, 0)


def test_error_names_the_first_row_that_is_longer() -> None:
    with pytest.raises(DataError, match=r"long: 2 of 3 rows are longer than data.max_length = 10 tokens"):
        fit(ROWS, ENCODED, 10, "error")
    assert fit(ROWS, ENCODED, 11, "error").counts.kept == 3


@pytest.mark.parametrize("mode", ["drop", "truncate"])
def test_nothing_left_is_an_error(mode: Any) -> None:
    with pytest.raises(DataError, match=r"3 of 3 rows are longer than data.max_length = 4 tokens"):
        fit(ROWS, ENCODED, 4, mode)
    with pytest.raises(DataError, match=r"no row"):
        fit([], [], 4, mode)


# --- validation ------------------------------------------------------------------------------------------------------


def asked(*prompts: str) -> list[ChatRow]:
    return [ChatRow(({"role": "user", "content": prompt},), str(index)) for index, prompt in enumerate(prompts)]


def test_equal_prompts_stay_together() -> None:
    """20 rows of 10 prompts, each asked twice (once with a space behind it); 0.3 of the prompts are 3 prompts, 6 rows."""
    rows = asked(*(f"p{index % 10}" + " " * (index // 10) for index in range(20)))
    training, validation = split_validation(rows, 0.3, seed=5)
    assert (len(training), len(validation)) == (14, 6)
    held = {row.prompt[0]["content"].strip() for row in validation}
    assert held.isdisjoint(row.prompt[0]["content"].strip() for row in training)


def test_the_split_depends_on_prompts_and_seed_alone() -> None:
    rows = asked(*(f"p{index}" for index in range(30)))
    held = [{row.prompt[0]["content"] for row in split_validation(order, 0.2, 7)[1]} for order in (rows, rows[::-1])]
    assert held[0] == held[1]
    assert held[0] != {row.prompt[0]["content"] for row in split_validation(rows, 0.2, 8)[1]}


def test_no_fraction_no_validation() -> None:
    assert split_validation(asked("a", "b"), 0.0, seed=0) == (asked("a", "b"), [])
    assert len(split_validation(asked("a", "b"), 0.01, seed=0)[1]) == 1


def test_one_prompt_cannot_be_divided() -> None:
    with pytest.raises(DataError, match=r"data.validation_fraction: 1 distinct prompts"):
        split_validation(asked("a", "a"), 0.5, seed=0)
