"""`politune data annotate`: a model answers a rubric about each row of a data set, and the answers become columns."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from politune import report
from politune.errors import ConfigError, DataError, OutputError, safe
from politune.lean import papers
from politune.record import read_json, sha256_of_json
from politune.selection import answering, judged, rubric
from politune.selection.agreement import Agreement, Pair, agree
from politune.selection.answering import Answering, Asking, Cost
from politune.selection.endpoint import Limits, Request, Settings
from politune.selection.judged import Data, Direction, Labels
from politune.selection.replies import JOURNAL, Kept, Replies
from politune.selection.results import AnnotationReport
from politune.selection.rubric import Question, Rubric, Value
from politune.writing import write_whole

PAPERS, ANNOTATIONS, ANNOTATED = "papers.json", "annotations.jsonl", "annotated.jsonl"
MOST_NEW_TOKENS = 300
"""Of an answer; reasoning models need more."""

Answers = Mapping[str, Value | None]


@dataclass(frozen=True)
class Annotation:
    """What a model said of a row.

    Args:
        row: its number, from 1.
        sha256: over its request and answers.
        answers: by column; None where it could not be read.
        raw: what the model wrote; a second text where it was asked once more.
        complaint: why the last text could not be read whole; empty where it could.
    """

    row: int
    id: str | None
    sha256: str
    answers: Answers
    raw: tuple[str, ...]
    complaint: str
    model: str


def annotate(
    data: str,
    asking: Asking,
    *,
    rubric_name: str = rubric.DEFAULT,
    direction: Direction | None = None,
    dataset_revision: str | None = None,
    dataset_split: str = "train",
    seed: int = 0,
    limit: int | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = MOST_NEW_TOKENS,
    gold: Path | None = None,
    against: Path | None = None,
    output: Path,
    dry_run: bool = False,
    show: Callable[[Cost], None] = lambda cost: None,
    say: Callable[[str], None],
    limits: Limits | None = None,
) -> AnnotationReport | Cost:
    """Has a model answer a rubric about each row.

    Args:
        data: a file, `stances`, or a Hub id.
        rubric_name: a shipped one's name, or a .toml file.
        direction: which of a left and a right text is chosen; without one both sides keep their names.
        seed: of `shuffled`, and of what is drawn where there is a temperature.
        limit: only so many of the first rows.
        max_new_tokens: longest answer.
        gold: a file with hand labels of some rows.
        against: the directory of another annotation of the same data with the same rubric.
        output: a new directory, or that of the same command, which goes on.
        dry_run: stop at the cost; nothing is written.
        show: takes the cost before anything is asked.

    Raises:
        ConfigError, DataError: something is asked for that is not there or cannot be.
        ModelError, MachineError, HubError: who is to answer does not; what was answered is kept.
        OutputError: the directory holds something else, or cannot be written.
    """
    answering.check(asking)
    settings = _settings(temperature, max_new_tokens)
    questions = rubric.load(rubric_name)
    found = judged.load(
        data, direction, revision=dataset_revision, split=dataset_split, seed=seed, limit=limit, offline=asking.offline
    )
    columns = rubric.columns(questions, found.sides)
    labels = judged.read_labels(gold, columns, found) if gold else None
    other = _read_other(against, questions) if against else None
    if not dry_run:
        papers.check(output, PAPERS)
    who = answering.who(asking, say, limits=limits, dry_run=dry_run)
    requests = [Request(rubric.prompt(questions, row), seed if temperature else None) for row in found.judged]
    replies = Replies(output / JOURNAL, who.identity(), settings) if who else None
    cost = answering.cost(requests, who, asking, settings, replies, what="rows", of=len(found.rows),
                          usual_answer=rubric.usual_answer(questions, len(found.sides)))  # fmt: skip
    if dry_run or who is None or replies is None:
        return cost
    show(cost)
    document = _document(questions, found, direction, seed, settings, who)
    with papers.claimed(output, PAPERS, document):
        replies = Replies(output / JOURNAL, who.identity(), settings)  # once more: now nobody else writes there
        annotations, kept = _ask(questions, found, requests, who, settings, replies, say)
        agreements = _agreements(questions, found, annotations, labels, other, seed)
        result = _summary(
            questions, found, annotations, kept, agreements, direction=direction, asking=asking, output=output, who=who,
            unmatched=labels.unmatched if labels else 0,
        )  # fmt: skip
        _write(result, annotations, found, columns, output)
    say(f"wrote {safe(output)}")
    return result


def _settings(temperature: float, max_new_tokens: int) -> Settings:
    if not 0 <= temperature <= 2:
        raise ConfigError(f"--temperature {temperature:g} is not between 0 and 2")
    if not 1 <= max_new_tokens <= 32_768:
        raise ConfigError(f"--max-new-tokens {max_new_tokens} is not between 1 and 32768")
    return Settings(float(temperature), max_new_tokens)


def _document(
    questions: Rubric, data: Data, direction: str | None, seed: int, settings: Settings, who: Answering
) -> dict[str, Any]:
    """What the directory's answers are answers to; rows may be added with another --limit."""
    example = rubric.Judged("{request}", {side: f"{{{side}}}" for side in data.sides})
    return {
        "who": who.identity(), "name": who.name, "rubric": questions.model_dump(mode="json"), "rubric_sha256": questions.sha256,
        "prompt": rubric.prompt(questions, example), "data": data.name, "data_sha256": data.sha256, "direction": direction,
        "seed": seed, "temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens,
    }  # fmt: skip


def _ask(
    questions: Rubric, data: Data, requests: Sequence[Request], who: Answering, settings: Settings, replies: Replies,
    say: Callable[[str], None],
) -> tuple[list[Annotation], dict[Request, Kept]]:  # fmt: skip
    """Every row's answers; one that could not be read is asked for once more, with the reason."""
    kept = answering.answer(requests, who, settings, replies, say)
    again: dict[int, Request] = {}
    for number, (row, request) in enumerate(zip(data.judged, requests, strict=True)):
        _, complaint = rubric.read(questions, row, kept[request].reply.text)
        if complaint:
            again[number] = Request(rubric.prompt(questions, row, complaint), request.seed)
    if again:
        say(f"{len(again)} answers could not be read: asking for them once more")
        kept = kept | answering.answer(list(again.values()), who, settings, replies, say)
    annotations = []
    for number, (row, request) in enumerate(zip(data.judged, requests, strict=True)):
        asked = [request, *([again[number]] if number in again else [])]
        raw = tuple(kept[each].reply.text for each in asked)
        answers, complaint = rubric.read(questions, row, raw[-1])
        name = data.rows[number].get("id")
        annotations.append(
            Annotation(
                number + 1, None if name in (None, "") else str(name), row.sha256, answers, raw, complaint, who.name
            )
        )
    return annotations, kept


# --- agreement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Other:
    """Another annotation: its answers by the hash of the row."""

    name: str
    answers: Mapping[str, Answers]


def _read_other(directory: Path, questions: Rubric) -> _Other:
    """The annotation in another directory.

    Raises:
        DataError: there is none, it is damaged, or it was made with another rubric.
    """
    document = read_json(directory / PAPERS)
    if document is None or "rubric_sha256" not in document:
        raise DataError(f"{safe(directory)} holds no annotation", where="--against")
    if document["rubric_sha256"] != questions.sha256:
        raise DataError(f"{safe(directory)} was made with another rubric", where="--against")
    try:
        lines = (directory / ANNOTATIONS).read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        return _Other(str(document.get("name")), {row["sha256"]: dict(row["answers"]) for row in rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read {safe(directory / ANNOTATIONS)}",
            why=getattr(error, "strerror", None),
            fix="annotate it again",
        ) from error


def _agreements(
    questions: Rubric,
    data: Data,
    annotations: Sequence[Annotation],
    labels: Labels | None,
    other: _Other | None,
    seed: int,
) -> tuple[Agreement, ...]:
    found = []
    for question in questions.questions:
        names = list(rubric.columns(questions, data.sides))
        own = [name for name in names if rubric.columns(questions, data.sides)[name] is question]
        if labels:
            by_hand = [[(labels.by_row[n][c], each.answers[c]) for c in own if c in labels.by_row.get(n, {})]
                       for n, each in enumerate(annotations)]  # fmt: skip
            found += _agreement(question, labels.name, by_hand, seed)
        if other:
            by_other = [[(other.answers[each.sha256].get(c), each.answers[c]) for c in own if each.sha256 in other.answers]
                        for each in annotations]  # fmt: skip
            if not any(by_other):
                raise DataError(f"the annotation by {safe(other.name)} has none of these rows", where="--against")
            found += _agreement(question, other.name, by_other, seed)
    return tuple(found)


def _agreement(question: Question, other: str, pairs: Sequence[Sequence[Pair]], seed: int) -> list[Agreement]:
    both = [each for each in pairs if each]
    return [agree(question.name, other, question.answers, both, seed)] if both else []


# --- what is written --------------------------------------------------------------------------------------------------


def _summary(
    questions: Rubric, data: Data, annotations: Sequence[Annotation], kept: dict[Request, Kept],
    agreements: tuple[Agreement, ...], *, direction: str | None, asking: Asking, output: Path, who: Answering, unmatched: int,
) -> AnnotationReport:  # fmt: skip
    columns = rubric.columns(questions, data.sides)
    counts = tuple((name, _counts(question, [each.answers[name] for each in annotations]))
                   for name, question in columns.items())  # fmt: skip
    return AnnotationReport(
        data=data.name, data_sha256=data.sha256, model=who.name, rubric=questions.name, rubric_sha256=questions.sha256,
        direction=direction, rows=len(annotations), of=data.total,
        distinct=len({sha256_of_json([each.request, sorted(each.texts.values())]) for each in data.judged}),
        unparsed=sum(bool(each.complaint) for each in annotations), retried=sum(len(each.raw) > 1 for each in annotations),
        counts=counts, crossed=_crossed(questions, columns, annotations), spent=answering.spent(kept, asking),
        agreement=agreements, unmatched_labels=unmatched, output=str(output),
    )  # fmt: skip


def _counts(question: Question, given: Sequence[Value | None]) -> tuple[tuple[Value | None, int], ...]:
    """Every allowed answer with its count, then what could not be read."""
    found = Counter(given)
    return (*((each, found[each]) for each in question.answers), (None, found[None]))


def _crossed(
    questions: Rubric, columns: Mapping[str, Question], annotations: Sequence[Annotation]
) -> tuple[tuple[Value | None, str, Value | None, int], ...]:
    """The first question about rows by the first about answers."""
    first = {about: next((q for q in questions.questions if q.about == about), None) for about in ("row", "answers")}
    label, answer = first["row"], first["answers"]
    if label is None or answer is None:
        return ()
    found = Counter(
        (each.answers[label.name], column, each.answers[column])
        for each in annotations for column, question in columns.items() if question is answer
    )  # fmt: skip
    order: list[tuple[Value | None, str, Value | None]] = [
        (row, column, value)
        for row in (*label.answers, None) if any(key[0] == row for key in found)
        for column, question in columns.items() if question is answer for value in (*answer.answers, None)
    ]  # fmt: skip
    return tuple((*key, found[key]) for key in order)


def _write(
    result: AnnotationReport,
    annotations: Sequence[Annotation],
    data: Data,
    columns: Mapping[str, Question],
    output: Path,
) -> None:
    rows = (_annotated(row, each, columns, data.rows) for row, each in zip(data.rows, annotations, strict=True))
    try:
        write_whole(output / ANNOTATIONS, "".join(_line(each.__dict__) for each in annotations))
        write_whole(output / ANNOTATED, "".join(map(_line, rows)))
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror) from error
    report.write_json(result, output / "report.json")
    report.write_html(result, output / "report.html")


def _annotated(
    row: Mapping[str, object],
    annotation: Annotation,
    columns: Mapping[str, Question],
    rows: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """A row with its columns and the model's; what the row says itself is never written over."""
    taken = set(rows[0]) | set(row)
    return {**row, **{(f"judged_{name}" if name in taken else name): annotation.answers[name] for name in columns}}


def _line(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # half a character, in a column that nobody reads
