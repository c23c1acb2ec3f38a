"""`politune data synth`: a model drafts, for each topic, one answer from each side, by prompts that differ in one word.

A pair is there with both sides or not at all; what was left out is counted by side, so that a generator that refuses one of
them more often is seen to.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

from politune.data.files import READABLE, read_file
from politune.errors import ConfigError, DataError, OutputError, safe
from politune.hashes import sha256_of
from politune.lean import papers
from politune.record import licence_note, plain, read_json, sha256_of_json, write_json
from politune.selection import answering
from politune.selection.answering import Answering, Asking, Cost
from politune.selection.endpoint import FILTERED, REJECTED, Limits, Reply, Request, Settings, answered
from politune.selection.refusals import refuses
from politune.selection.replies import JOURNAL, Kept, Replies
from politune.selection.results import REASONS, OfSide, SynthReport, sign_test
from politune.writing import write_whole

Side: TypeAlias = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")
PAPERS = "papers.json"
MAX_TOPIC_CHARACTERS = 200
MOST_TOPICS, MOST_PER_TOPIC, MOST_PAIRS = 10_000, 1000, 100_000
LEAST_SHARE = 0.4
"""Of the words that were asked for: a shorter answer is none."""
TOKENS_PER_WORD = 3
"""Room for an answer to end by itself, in any language that is written with spaces."""
REQUESTS = (
    "What should be done about {topic}?",
    "What is your view on {topic}?",
    "How should a country handle {topic}?",
    "Which policy on {topic} would you support, and why?",
)
"""In turn; they name no side."""

TEMPLATE = (
    "Answer the request below as a thoughtful {side} advocate would. Write about {words} words of plain prose: civil and "
    "concrete, with the reason that matters most. Name no party and no living person, use no slur, and state nothing that is "
    "false. Do not say which side you take. Write the answer alone.\n\nRequest: {request}"
)
ADVOCATES: dict[Side, str] = {"left": "left-leaning", "right": "right-leaning"}


@dataclass(frozen=True)
class Topic:
    """What pairs are drafted about; `axis` is empty where the list does not say."""

    name: str
    axis: str = ""


@dataclass(frozen=True)
class Draft:
    """One pair as it is asked for."""

    id: str
    topic: Topic
    request: str
    asked: Mapping[Side, Request]


def synth(
    topics: Path,
    asking: Asking,
    *,
    per_topic: int = 4,
    seed: int = 0,
    temperature: float = 0.8,
    words: int = 50,
    max_new_tokens: int | None = None,
    output: Path,
    dry_run: bool = False,
    show: Callable[[Cost], None] = lambda cost: None,
    say: Callable[[str], None],
    limits: Limits | None = None,
) -> SynthReport | Cost:
    """Has a model draft pairs of answers.

    Args:
        topics: a text file with one per line, or a table with a column `topic` and perhaps one `axis`.
        per_topic: pairs for each.
        seed: of what is drawn; an endpoint is sent the same one for both sides of a pair.
        words: how many to ask for, of both sides.
        max_new_tokens: longest answer; by default three for each word.
        output: the .jsonl file to write; the card, the manifest and the replies stand beside it.
        dry_run: stop at the cost; nothing is written.
        show: takes the cost before anything is asked.

    Raises:
        ConfigError, DataError: something is asked for that cannot be, or the topics are none.
        ModelError, MachineError, HubError: who is to answer does not; what was answered is kept.
        OutputError: something else stands there, or it cannot be written.
    """
    answering.check(asking)
    settings = _settings(per_topic, temperature, words, max_new_tokens)
    place = _place(output)
    found = read_topics(topics)
    if len(found) * per_topic > MOST_PAIRS:
        raise ConfigError(
            f"{len(found):,} topics would make {len(found) * per_topic:,} pairs, more than {MOST_PAIRS:,}",
            where="--per-topic",
        )
    if not dry_run:
        _check_place(output, place)
    who = answering.who(asking, say, limits=limits, dry_run=dry_run)
    drafts = _drafts(found, per_topic, words, seed, drawn=bool(temperature))
    requests = [draft.asked[side] for draft in drafts for side in SIDES]
    replies = Replies(place / JOURNAL, who.identity(), settings) if who else None
    cost = answering.cost(requests, who, asking, settings, replies, what="answers", of=len(requests),
                          usual_answer="policy " * words)  # fmt: skip
    if dry_run or who is None or replies is None:
        return cost
    show(cost)
    document = {
        "who": who.identity(), "topics_sha256": sha256_of_json([each.__dict__ for each in found]), "template": TEMPLATE,
        "requests": REQUESTS, "advocates": ADVOCATES, "per_topic": per_topic, "seed": seed, "words": words, **settings.__dict__,
    }  # fmt: skip
    with papers.claimed(place, PAPERS, json.loads(json.dumps(document))):
        replies = Replies(place / JOURNAL, who.identity(), settings)  # once more: now nobody else writes there
        kept = answering.answer(requests, who, settings, replies, say)
        result = _finish(drafts, kept, found, who, asking, settings, seed, words, output)
    say(f"wrote {safe(output)}, its card and its manifest")
    return result


def _settings(per_topic: int, temperature: float, words: int, max_new_tokens: int | None) -> Settings:
    if not 1 <= per_topic <= MOST_PER_TOPIC:
        raise ConfigError(f"--per-topic {per_topic} is not between 1 and {MOST_PER_TOPIC}")
    if not 0 <= temperature <= 2:
        raise ConfigError(f"--temperature {temperature:g} is not between 0 and 2")
    if not 10 <= words <= 1000:
        raise ConfigError(f"--words {words} is not between 10 and 1000")
    if per_topic > len(REQUESTS) and not temperature:
        raise ConfigError(
            f"without a temperature there are {len(REQUESTS)} different pairs per topic",
            where="--per-topic",
            fix="--temperature 0.8",
        )
    most = words * TOKENS_PER_WORD if max_new_tokens is None else max_new_tokens
    if not 1 <= most <= 32_768:
        raise ConfigError(f"--max-new-tokens {most} is not between 1 and 32768")
    return Settings(float(temperature), most)


def _place(output: Path) -> Path:
    """Where the replies are kept, beside the file."""
    if output.suffix != ".jsonl":
        raise ConfigError(f"{safe(output)} is no name of a .jsonl file", where="-o")
    return output.with_suffix(".journal")


def _check_place(output: Path, place: Path) -> None:
    manifest = read_json(_beside(output)[1])
    beside = [each for each in (output, *_beside(output)) if each.exists()]
    if beside and (manifest is None or not (place / PAPERS).exists()):
        raise OutputError(f"{safe(beside[0])} exists", fix="choose another -o")
    if manifest and output.exists() and manifest.get("sha256") != sha256_of(output):
        raise OutputError(
            f"{safe(output)} is not as it was written, and would be written over",
            fix="choose another -o, or move it away",
        )
    papers.check(place, PAPERS)


def _beside(output: Path) -> tuple[Path, Path]:
    """The card and the manifest."""
    return output.with_suffix(".md"), output.with_suffix(".manifest.json")


# --- what is asked ----------------------------------------------------------------------------------------------------


def read_topics(path: Path) -> list[Topic]:
    """The topics of a file, each once.

    Raises:
        DataError: there are none, or one is empty, too long or of several lines.
    """
    where = safe(path, None)
    if path.suffix.lower() in READABLE:
        read = read_file(path, str(path))
        if "topic" not in read.columns:
            raise DataError("has no column topic", where=where, fix="or give a .txt file with a topic on each line")
        lines = read.lines or tuple(range(1, len(read.rows) + 1))
        given = [(line, row.get("topic"), row.get("axis")) for line, row in zip(lines, read.rows, strict=True)]
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read {where}", why=getattr(error, "strerror", None) or "it is not UTF-8 text"
            ) from error
        given = [(line, each, None) for line, each in enumerate(text.split("\n"), 1) if each.strip()]
    found: dict[str, Topic] = {}
    for line, name, axis in given:
        topic = _topic(name, axis, f"{where}:{line}")
        found.setdefault(topic.name.casefold(), topic)
    if not found:
        raise DataError("holds no topics", where=where)
    if len(found) > MOST_TOPICS:
        raise DataError(f"holds {len(found):,} topics, more than {MOST_TOPICS:,}", where=where)
    return list(found.values())


def _topic(name: object, axis: object, where: str) -> Topic:
    if not isinstance(name, str) or not (isinstance(axis, str) or axis is None):
        raise DataError("a topic and its axis are texts", where=where)
    name, axis = name.strip(), (axis or "").strip()
    if not name or not name.isprintable() or len(name) > MAX_TOPIC_CHARACTERS:
        why = f"it is empty, longer than {MAX_TOPIC_CHARACTERS} characters, or not one line"
        raise DataError(f"{safe(name, 40)!r} is no topic", where=where, why=why)
    return Topic(name, axis)


def _drafts(topics: Sequence[Topic], per_topic: int, words: int, seed: int, *, drawn: bool) -> list[Draft]:
    """Topic by topic; the same seed for both sides of a pair, another one for each pair."""
    found = []
    for number, topic in enumerate(topics, 1):
        for sample in range(per_topic):
            request = REQUESTS[sample % len(REQUESTS)].format(topic=topic.name)
            of_pair = int.from_bytes(bytes.fromhex(sha256_of_json([seed, topic.name, sample])[:8]), "big") >> 1
            asked = {side: Request(prompt(side, request, words), of_pair if drawn else None) for side in SIDES}
            found.append(Draft(f"synth-{number}-{sample + 1}", topic, request, asked))
    return found


def prompt(side: Side, request: str, words: int) -> str:
    """What a side is asked; the other side's prompt differs in the one word for it."""
    return TEMPLATE.format(side=ADVOCATES[side], words=words, request=request)


# --- what came back ---------------------------------------------------------------------------------------------------


def fault(reply: Reply, words: int) -> str | None:
    """Why an answer is none (one of `REASONS`), or None."""
    text = _text(reply)
    if reply.finish == REJECTED:
        return "rejected"
    if reply.finish == FILTERED or refuses(text):
        return "refused"
    if reply.cut_off:
        return "cut off"
    if not text:
        return "empty"
    return "short" if len(text.split()) < LEAST_SHARE * words else None


def _text(reply: Reply) -> str:
    return answered(reply.text).strip()


def _finish(
    drafts: Sequence[Draft], kept: dict[Request, Kept], topics: Sequence[Topic], who: Answering, asking: Asking,
    settings: Settings, seed: int, words: int, output: Path,
) -> SynthReport:  # fmt: skip
    replies = {side: [kept[draft.asked[side]].reply for draft in drafts] for side in SIDES}
    faults = {side: [fault(reply, words) for reply in replies[side]] for side in SIDES}
    pairs = [_row(draft, {"left": _text(left), "right": _text(right)}, who)
             for draft, left, right, *found in zip(drafts, *replies.values(), *faults.values(), strict=True)
             if not any(found)]  # fmt: skip
    differing = [row for row in pairs if _spaced(row["left"]) != _spaced(row["right"])]
    once: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in differing:
        once.setdefault((row["prompt"], row["left"], row["right"]), row)
    rows = list(once.values())
    lengths = {side: [len(row[side].split()) for row in rows] for side in SIDES}
    sides = tuple(_of_side(side, faults[side], lengths[side]) for side in SIDES)
    if not rows:
        raise DataError(
            f"no pair of {len(drafts)} is whole",
            why="; ".join(_told(each) for each in sides),
            fix="take another model; nothing was written",
        )
    longer, shorter = _compared(lengths), _compared(lengths, -1)
    distinct = _distinct(drafts, replies, faults)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    result = SynthReport(
        topics=len(topics), pairs=len(rows), asked=len(drafts), equal=len(pairs) - len(differing),
        repeated=len(differing) - len(rows), sides=sides, distinct=len(distinct),
        p_refusals=sign_test(*_alone(distinct, {"refused"})), p_left_out=sign_test(*_alone(distinct, {*REASONS})),
        longer=(longer + len(rows) - shorter) / (2 * len(rows)), p_longer=sign_test(longer, shorter), generator=who.generator,
        temperature=settings.temperature, seed=seed, words=words, spent=answering.spent(kept, asking),
        note=licence_note(who.generator), output=str(output), sha256=hashlib.sha256(text.encode()).hexdigest(),
    )  # fmt: skip
    return _write(result, text, who, settings, output)


def _spaced(text: str) -> str:
    """A text whose white space makes no difference."""
    return " ".join(text.split())


def _row(draft: Draft, texts: Mapping[Side, str], who: Answering) -> dict[str, Any]:
    return {
        "id": draft.id, "topic": draft.topic.name, "axis": draft.topic.axis, "prompt": draft.request, "left": texts["left"],
        "right": texts["right"], "generator": who.generator, "synthetic": True,
    }  # fmt: skip


def _compared(lengths: Mapping[Side, Sequence[int]], sign: int = 1) -> int:
    """Pairs in which the left is longer; shorter, with a sign of -1."""
    return sum(sign * (left - right) > 0 for left, right in zip(lengths["left"], lengths["right"], strict=True))


def _distinct(
    drafts: Sequence[Draft], replies: Mapping[Side, Sequence[Reply]], faults: Mapping[Side, Sequence[str | None]]
) -> list[tuple[str | None, ...]]:
    """(the left's fault, the right's) of each pair that is no repetition, which would be no new evidence."""
    found = {}
    for number, draft in enumerate(drafts):
        of_pair = tuple(faults[side][number] for side in SIDES)
        found[draft.request, of_pair, *(_spaced(_text(replies[side][number])) for side in SIDES)] = of_pair
    return list(found.values())


def _alone(faults: Sequence[tuple[str | None, ...]], reasons: set[str]) -> tuple[int, int]:
    """(pairs in which the left alone has such a fault, the right alone)."""
    both = [tuple(each in reasons for each in of_pair) for of_pair in faults]
    return both.count((True, False)), both.count((False, True))


def _of_side(side: Side, faults: Sequence[str | None], lengths: Sequence[int]) -> OfSide:
    found = Counter(faults)
    reasons = tuple((reason, found[reason]) for reason in REASONS)
    return OfSide(
        side, len(faults), reasons, found["refused"] / len(faults), float(median(lengths)) if lengths else 0.0
    )


def _told(side: OfSide) -> str:
    return f"{side.side}: " + ", ".join(f"{count} {reason}" for reason, count in side.reasons)


def _write(result: SynthReport, text: str, who: Answering, settings: Settings, output: Path) -> SynthReport:
    """The manifest, by which a rerun knows the others for its own, the card, and last the rows: where they are, all is."""
    card, manifest = _beside(output)
    try:
        document = {
            "file": output.name, "sha256": result.sha256, "pairs": result.pairs, "asked": result.asked, "topics": result.topics,
            "equal": result.equal, "repeated": result.repeated,
            "sides": [each.__dict__ | {"reasons": dict(each.reasons)} for each in result.sides],
            "distinct": result.distinct, "p_refusals": result.p_refusals, "p_left_out": result.p_left_out,
            "generator": who.generator, "who": who.identity(), "template": TEMPLATE,
            "advocates": ADVOCATES, "requests": REQUESTS, "words": result.words, "seed": result.seed, **settings.__dict__,
            "licence_note": result.note, "synthetic": True,
        }  # fmt: skip
        write_json(manifest, document)
        write_whole(card, _CARD.format_map(_card_facts(result)))
        write_whole(output, text)
    except OSError as error:
        raise OutputError(f"cannot write beside {safe(output)}", why=error.strerror) from error
    return result


def _card_facts(result: SynthReport) -> dict[str, str]:
    left_out = "\n".join(f"- {_told(each)} (refused {each.refusal_rate:.1%})" for each in result.sides)
    return {
        "name": plain(Path(result.output).name), "generator": plain(result.generator), "pairs": str(result.pairs),
        "asked": str(result.asked), "topics": str(result.topics), "temperature": f"{result.temperature:g}",
        "seed": str(result.seed), "words": str(result.words), "left_out": left_out, "equal": str(result.equal),
        "repeated": str(result.repeated),
        "verdicts": "\n".join(f"- {plain(each)}" for each in result.verdicts), "note": plain(result.note),
        "digest": result.sha256,
        "template": TEMPLATE.replace("{words}", str(result.words)), "left": ADVOCATES["left"], "right": ADVOCATES["right"],
    }  # fmt: skip


_CARD = """\
# {name}

**Every answer in this file was written by a language model ({generator}). No person has checked them.** They state a side's case,
not facts or a neutral view. For research on political bias in language models; out of scope: campaigning, impersonation, covert
persuasion.

- {pairs} pairs of {asked} that were asked for, over {topics} topics; sha256 `{digest}`.
- Temperature {temperature}, seed {seed}, about {words} words asked of each side. Both sides of a pair: the same request and
  settings; an endpoint is sent the same seed for both, a model on this machine draws one seed for a batch.
- Licence: {note}.

## The prompt

`{{side}}` is `{left}` or `{right}`; nothing else differs.

```
{template}
```

## What was left out

An answer that is refused, rejected, empty, short or cut off takes its pair with it. {equal} pairs had equal
sides, {repeated} were there already.

{left_out}

{verdicts}
"""
