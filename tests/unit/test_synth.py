"""Drafting pairs: both sides are asked the same, a pair is whole or not there, and what was left out is counted by side."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from politune import cli, errors
from politune.config import DataSpec
from politune.data import sources
from politune.data.format import to_preference_rows
from politune.errors import ConfigError, DataError, MachineError, OutputError
from politune.selection import results, synth
from politune.selection.answering import Asking, Cost
from politune.selection.endpoint import Limits, Reply
from politune.selection.refusals import refuses
from politune.selection.results import SynthReport
from politune.selection.synth import Topic
from unit.stand_in_endpoint import StandIn, completion, echo, refusal

KEY = "sk-canary-0123456789abcdef"
QUICK = Limits(answer_seconds=2.0, pauses=(0.01, 0.02))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(errors, "LOGINS", list(errors.LOGINS))
    (tmp_path / "topics.txt").write_text("rent control\n\n  inheritance taxes \nrent control\n")
    return tmp_path


def write_well(prompt: str, before: int = 0) -> str:
    """An answer of 20 words that names its side and its request."""
    side = "left" if "left-leaning" in prompt else "right"
    return f"A {side} view of {prompt.rpartition('Request: ')[2]} " + "because reasons matter here " * 4


def side_of(prompt: str) -> str:
    return "left" if "left-leaning" in prompt else "right"


def run(url: str, output: str = "pairs.jsonl", topics: str = "topics.txt", **given: Any) -> SynthReport:
    asking = Asking(
        url=url, endpoint_model=given.pop("endpoint_model", "tiny"), concurrency=given.pop("concurrency", 2)
    )
    given = {"words": 20, "per_topic": 2, "say": lambda line: None, "limits": QUICK, **given}
    found = synth.synth(Path(topics), asking, output=Path(output), **given)
    assert isinstance(found, SynthReport)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_the_prompts_of_the_two_sides_differ_in_one_word() -> None:
    left, right = (synth.prompt(side, "What about rent?", 40) for side in synth.SIDES)
    assert left != right
    assert left.replace("left-leaning", "right-leaning") == right
    assert left.count("left-leaning") == right.count("right-leaning") == 1
    assert not any(word in left.replace("left-leaning", "") for word in ("left", "right"))


def test_no_request_names_a_side() -> None:
    text = " ".join(synth.REQUESTS).lower()
    assert not any(word in text for word in ("left", "right", "liberal", "conservative", "progressive"))
    assert all("{topic}" in each for each in synth.REQUESTS)


def test_both_sides_are_sent_the_same_numbers(place: Path) -> None:
    with StandIn(write_well) as server:
        run(server.url)
    assert len(server.bodies) == 8
    by_side: dict[str, list[Any]] = {"left": [], "right": []}
    for body in server.bodies:
        [message] = body.pop("messages")
        neutral = message["content"].replace("left-leaning", "-").replace("right-leaning", "-")
        by_side[side_of(message["content"])].append(json.dumps([neutral, body], sort_keys=True))
    assert sorted(by_side["left"]) == sorted(by_side["right"])
    assert len({json.loads(each)[1]["seed"] for each in by_side["left"]}) == 4, "each pair has a seed of its own"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "rent\ntrade\n"),
        ("a.csv", "topic,axis\nrent,economic\ntrade,\n"),
        ("a.jsonl", '{"topic": "rent"}\n{"topic": "trade"}\n'),
    ],
)
def test_topics_come_in_three_forms(name: str, text: str, place: Path) -> None:
    (place / name).write_text(text)
    assert [topic.name for topic in synth.read_topics(place / name)] == ["rent", "trade"]
    assert synth.read_topics(place / name)[0] == Topic("rent", "economic" if "axis" in text else "")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "no topics"), ("a.txt", b"\xff\xfe\x00", "not UTF-8"), ("a.csv", b"subject\nrent\n", "no column topic"),
        ("a.txt", b"x" * 300, "a.txt:1.*longer"), ("a.txt", b"rent\nre\x1bnt\n", "a.txt:2"),
        ("a.jsonl", b'{"topic": 3}\n', "are texts"),
        ("a.jsonl", b'{"topic": "a\\nb"}\n', "not one line"), ("b.txt", None, "cannot read"),
    ],
)  # fmt: skip
def test_topics_that_are_none(name: str, content: bytes | None, said: str, place: Path) -> None:
    if content is not None:
        (place / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        synth.read_topics(place / name)


# --- what comes back --------------------------------------------------------------------------------------------------


def test_pairs_are_written_in_the_shape_of_stances(place: Path) -> None:
    with StandIn(write_well) as server:
        found = run(server.url)
    rows = lines(place / "pairs.jsonl")
    assert [row["id"] for row in rows] == ["synth-1-1", "synth-1-2", "synth-2-1", "synth-2-2"]
    assert rows[0] == {
        "id": "synth-1-1", "topic": "rent control", "axis": "", "prompt": "What should be done about rent control?",
        "left": write_well("left-leaning Request: What should be done about rent control?").strip(),
        "right": write_well("right-leaning Request: What should be done about rent control?").strip(),
        "generator": "tiny", "synthetic": True,
    }  # fmt: skip
    for direction in ("left", "right"):
        spec = DataSpec(dataset_name="./pairs.jsonl", direction=direction)
        read = to_preference_rows(sources.load(spec), direction, seed=0).rows
        assert [each.chosen for each in read] == [row[direction] for row in rows]
    assert (found.pairs, found.asked, found.topics, found.equal, found.longer) == (4, 4, 2, 0, 0.5)
    assert [(each.side, each.words) for each in found.sides] == [("left", 27.0), ("right", 27.0)]  # 4 + 7 + 4 * 4
    manifest = json.loads((place / "pairs.manifest.json").read_text())
    assert manifest["sha256"] == found.sha256 == hashlib.sha256((place / "pairs.jsonl").read_bytes()).hexdigest()
    assert (manifest["template"], manifest["temperature"], manifest["seed"]) == (synth.TEMPLATE, 0.8, 0)
    card = (place / "pairs.md").read_text()
    assert "written by a language model (tiny)" in card
    assert "as a thoughtful {side} advocate" in card
    assert "look them up: this is information, not legal advice" in card


def test_a_refused_side_takes_its_pair_and_is_counted(place: Path) -> None:
    """The right is refused in three of four pairs, the left in none; one right answer is short."""

    def answer(prompt: str, before: int) -> Any:
        if side_of(prompt) == "left":
            return write_well(prompt)
        return (
            "Too short."
            if "your view on inheritance" in prompt
            else "I cannot help with that request, I am sorry to say so."
        )

    with (
        StandIn(answer) as server,
        pytest.raises(DataError, match=r"no pair of 4 is whole.*3 refused, 0 rejected, 0 empty, 1 short"),
    ):
        run(server.url)
    assert not (place / "pairs.jsonl").exists()
    (place / "topics.txt").write_text("\n".join(f"topic {n}" for n in range(8)))

    def often(prompt: str, before: int) -> Any:
        refused = side_of(prompt) == "right" and "topic 7" not in prompt
        return "I cannot help with that." if refused else write_well(prompt)

    with StandIn(often) as server:
        found = run(server.url, output="other.jsonl", endpoint_model="another")
    left, right = found.sides
    assert (found.pairs, left.refusal_rate, right.refusal_rate) == (2, 0.0, 14 / 16)
    assert dict(right.reasons) == {"refused": 14, "rejected": 0, "empty": 0, "short": 0, "cut off": 0}
    assert found.p_refusals == pytest.approx(2 / 2**14)
    assert "0.0% of the left's answers, 87.5% of the right's" in found.verdicts[0]
    assert "refuses one side more often" in found.verdicts[0]
    assert "right: 14 refused" in (place / "other.md").read_text()


def test_a_sign_test_by_hand() -> None:
    """Of 7: 2 * 64 / 128 for 3 and 4, 2 * (1 + 7) / 128 for 1 and 6, 2 / 128 for none and 7."""
    found = [results.sign_test(*each) for each in ((3, 4), (1, 6), (7, 0), (0, 0))]
    assert found == pytest.approx([1.0, 0.125, 1 / 64, 1.0])
    assert results.sign_test(4_000, 6_000) < 1e-80
    faults = (
        [("refused", None)] * 3
        + [(None, "refused")] * 4
        + [("refused", "refused"), ("short", "refused"), ("short", None)]
    )
    assert synth._alone(faults, {"refused"}) == (3, 5)
    assert synth._alone(faults, {"refused", "short"}) == (4, 4)


@pytest.mark.parametrize("per_topic", [4, 8])
def test_an_answer_that_comes_again_is_no_new_evidence(per_topic: int, place: Path) -> None:
    """One topic of two is refused on the right, by a generator that heeds no seed: 4 requests, however often; 2 / 2^4."""

    def answer(prompt: str, before: int) -> str:
        return "I cannot help with that." if side_of(prompt) == "right" and "rent" in prompt else write_well(prompt)

    with StandIn(answer) as server:
        found = run(server.url, per_topic=per_topic)
    assert (found.asked, found.distinct, found.p_refusals, found.p_left_out) == (2 * per_topic, 8, 0.125, 0.125)
    assert "(p 0.12 of 8 distinct pairs): no difference that can be told" in found.verdicts[0]


def test_what_is_left_out_of_one_side_is_tested_whatever_the_reason(place: Path) -> None:
    """The right is filtered, rejected, empty, short in turn in 7 of 8 pairs; nothing is refused in words."""
    (place / "topics.txt").write_text("\n".join(f"topic {n}" for n in range(8)))

    def answer(prompt: str, before: int) -> Any:
        number = int(prompt[prompt.index("topic ") + 6])
        if side_of(prompt) == "left" or number == 7:
            return write_well(prompt)
        return [completion(None, finish_reason="SAFETY"), refusal(400, "no"), "", "short"][number % 4]

    with StandIn(answer) as server:
        found = run(server.url, per_topic=1)
    assert dict(found.sides[1].reasons) == {"refused": 2, "rejected": 2, "empty": 2, "short": 1, "cut off": 0}
    assert (found.p_refusals, found.p_left_out) == (0.5, pytest.approx(2 / 2**7))
    assert "left out for any reason: 0.0% and 87.5% (p 0.016): one side is left out more often" in found.verdicts


WEIGHED = "<think>The user wants {side}.</think>\n"


def test_what_a_generator_weighs_is_no_part_of_a_draft(place: Path) -> None:
    with StandIn(lambda prompt, before: WEIGHED + write_well(prompt)) as server:
        run(server.url)
    assert "think" not in (place / "pairs.jsonl").read_text()


REFUSED = (
    "I'm sorry, but I can't write this from a {side}-leaning point of view. Political topics should be approached with care.",
    "I cannot fulfil this request. Content that argues for a {side}-leaning position must be written by a person.",
    "I\u2019m not able to write a {side}-leaning argument.", "I must decline to write as a {side}-leaning advocate. It is wrong.",
    "As an AI language model, I do not speak for the {side}.", "I understand that you want the {side}. But I won't write it.",
    "I'm unable to provide a {side}-leaning response.", "I won't be able to help with this {side}-leaning request.",
    "I'm sorry. I can't assist with that.", "This {side}-leaning request violates the content policy.",
)  # fmt: skip
ADVOCATED = {
    "left": (
        "I do not trust a landlord to set the rent. Cities should.", "I cannot accept that a nurse pays more than a landlord.",
        "I won't write off a generation.", "I can't share the view that markets solve this. They had decades to help you.",
        "Workers asked to sign are not rude in declining to do it.", "I refuse to accept hunger. A different subject, they say.",
    ),
    "right": (
        "I do not trust distant agencies to spend what families earn.", "I cannot support a tax that takes a farm away.",
        "Those who cross the border outside the rules gain an edge.", "I will not give up the position that work should pay.",
        "A baker asked to write a message is not rude in declining to do it.", "No. The state should stay out of politics.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", synth.SIDES)
def test_a_draft_refuses_in_its_opening_on_both_sides_alike(side: Any) -> None:
    """And of the shipped answers, which people read, none of either side does."""
    assert [text for text in REFUSED if synth.fault(Reply(text.format(side=side)), 10) != "refused"] == []
    assert [text for text in ADVOCATED[side] if refuses(text)] == []
    table = sources.load(DataSpec(dataset_name="stances", direction="left"))
    assert [row[side] for row in table.rows if refuses(str(row[side]))] == []


def test_a_long_opening_takes_no_time() -> None:
    assert not refuses("content " * 500_000)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply("word " * 20), None), (Reply("word " * 8), None), (Reply("word " * 7), "short"), (Reply(" \n"), "empty"),
        (Reply("word " * 20, "length"), "cut off"), (Reply("", "content_filter"), "refused"),
        (Reply("word " * 3, "length"), "cut off"), (Reply("<think>word " * 20), "cut off"),
        (Reply("I can't.", "rejected"), "rejected"),
        (Reply("<think>I can't help.</think>" + "word " * 20), None),
        (Reply("I'm sorry, but I can't help with that request, whatever it is that you say you want."), "refused"),
    ],
)  # fmt: skip
def test_why_an_answer_is_none(reply: Reply, expected: str | None) -> None:
    assert synth.fault(reply, 20) == expected


def test_lengths_that_differ_are_said(place: Path) -> None:
    with StandIn(lambda prompt, before: "word " * (30 if side_of(prompt) == "left" else 20)) as server:
        found = run(server.url)
    assert found.longer == 1.0
    assert "30 words on the left, 20 on the right" in found.verdicts[-1]
    assert "could learn length" in found.verdicts[-1]
    with StandIn(lambda prompt, before: "word " * (21 if side_of(prompt) == "left" else 20) + prompt[-30:]) as server:
        found = run(server.url, output="slightly.jsonl", endpoint_model="another", per_topic=4)
    assert (found.longer, found.p_longer) == (1.0, pytest.approx(2 / 2**8))
    assert "could learn length" in found.verdicts[-1], (
        "the medians are alike; what tells them apart is that it is always so"
    )
    with StandIn(write_well) as server:
        assert run(server.url, output="well.jsonl", endpoint_model="third").verdicts[-1].endswith("alike"), (
            "the control"
        )


def test_pairs_with_equal_sides_are_left_out(place: Path) -> None:
    def answer(prompt: str, before: int) -> str:
        return "the very same words " * 5 if "view" in prompt else write_well(prompt)

    with StandIn(answer) as server:
        found = run(server.url)
    assert (found.pairs, found.equal, found.repeated) == (2, 2, 0)


def test_pairs_that_are_there_already_are_left_out(place: Path) -> None:
    """A generator that heeds no seed answers the fifth question as the first."""
    with StandIn(write_well) as server:
        found = run(server.url, per_topic=6)
    assert (found.pairs, found.asked, found.repeated) == (8, 12, 4)
    assert [row["id"] for row in lines(place / "pairs.jsonl")][:5] == [
        "synth-1-1", "synth-1-2", "synth-1-3", "synth-1-4", "synth-2-1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("generator", "limited"),
    [
        ("meta-llama/Meta-Llama-3-70B-Instruct", True),
        ("llama-2-7b", True),
        ("meta-llama/Llama-3.1-8B-Instruct", False),
        ("tiny", False),
    ],
)
def test_the_licence_of_the_generator_is_told(generator: str, limited: bool) -> None:
    assert ("1.b.v" in synth.licence_note(generator)) == limited
    assert "not legal advice" in synth.licence_note(generator)


# --- stopped, dear, twice ---------------------------------------------------------------------------------------------


def test_a_stopped_command_goes_on_and_leaves_no_half_file(place: Path) -> None:
    with StandIn(write_well) as server:
        run(server.url, output="whole.jsonl", concurrency=1)
        for file in (place / "cache" / "replies").iterdir():
            file.unlink()
        server.bodies.clear()
        server.answer = lambda prompt, before: write_well(prompt) if before < 5 else refusal(401)
        with pytest.raises(MachineError):
            run(server.url, concurrency=1)
        assert not (place / "pairs.jsonl").exists()
        assert not (place / "pairs.md").exists()
        server.answer = write_well
        run(server.url, concurrency=1)
        assert len(server.bodies) == 8 + 1, "the one that was refused"
        assert (place / "pairs.jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()
        run(server.url, concurrency=1)
        assert len(server.bodies) == 9, "a finished command asks nothing"


def test_a_file_of_something_else_is_left_alone(place: Path) -> None:
    (place / "pairs.jsonl").write_text("mine")
    with StandIn(write_well) as server:
        with pytest.raises(OutputError, match=r"pairs\.jsonl exists"):
            run(server.url)
        run(server.url, output="other.jsonl")
        with pytest.raises(OutputError, match=r"differs in.*seed"):
            run(server.url, output="other.jsonl", seed=1)
        (place / "topics.txt").write_text("something else")
        with pytest.raises(OutputError, match=r"differs in.*topics"):
            run(server.url, output="other.jsonl")
    assert (place / "pairs.jsonl").read_text() == "mine"


def test_what_a_person_changed_is_not_written_over(place: Path) -> None:
    with StandIn(write_well) as server:
        run(server.url)
        kept = "".join((place / "pairs.jsonl").read_text().splitlines(keepends=True)[:2])
        (place / "pairs.jsonl").write_text(kept)
        with pytest.raises(OutputError, match="not as it was written"):
            run(server.url)
        assert (place / "pairs.jsonl").read_text() == kept
        (place / "pairs.jsonl").unlink()
        run(server.url)
        server.answer = lambda prompt, before: refusal(401)
        with pytest.raises(MachineError):
            run(server.url, output="other.jsonl", endpoint_model="another")
        (place / "other.md").write_text("my own notes")
        with pytest.raises(OutputError, match=r"other\.md exists"):
            run(server.url, output="other.jsonl", endpoint_model="another")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"per_topic": 0}, "--per-topic"), ({"per_topic": 5, "temperature": 0.0}, "without a temperature"),
        ({"words": 5}, "--words"),
        ({"temperature": -1.0}, "--temperature"), ({"output": "pairs.csv"}, "no name of a .jsonl"),
        ({"max_new_tokens": 0}, "--max-new"), ({"topics": "many.txt", "per_topic": 1000}, "more than 100,000"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(given: dict[str, Any], said: str, place: Path) -> None:
    (place / "many.txt").write_text("\n".join(map(str, range(101))))
    with StandIn(write_well) as server:
        with pytest.raises(ConfigError, match=said):
            run(server.url, **given)
        assert server.bodies == []


def test_the_cost_is_known_before(place: Path) -> None:
    with StandIn(write_well) as server:
        cost = synth.synth(
            Path("topics.txt"), Asking(url=server.url, endpoint_model="tiny", price_out=3.0), per_topic=2, words=20,
            output=Path("pairs.jsonl"), dry_run=True, say=lambda line: None,
        )  # fmt: skip
    assert isinstance(cost, Cost)
    assert (cost.of, cost.distinct, cost.most_answer_tokens, server.bodies) == (8, 8, 8 * 60, [])
    assert cost.most_money == pytest.approx(8 * 60 * 3.0 / 1e6)
    assert sorted(path.name for path in place.iterdir()) == ["topics.txt"]


def test_the_command_and_its_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with StandIn(lambda prompt, before: echo(f"{write_well(prompt)} {KEY}", refusal=None)) as server:
        words = [
            "topics.txt",
            "-o",
            "pairs.jsonl",
            "--endpoint",
            server.url,
            "--endpoint-model",
            "tiny",
            "--key-env",
            "MY_KEY",
        ]
        done = CliRunner().invoke(cli.app, ["data", "synth", *words, "--words", "20", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"] == "SynthReport"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}", "the control: it was sent"
    written = [path for path in place.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in done.output
    assert "***" in (place / "pairs.jsonl").read_text()
