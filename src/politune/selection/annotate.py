"""`politune data annotate`: a model answers a rubric about each row of a data set, and the answers become columns."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from politune import report
from politune.errors import ConfigError, DataError, OutputError, safe
from politune.lean import papers
from politune.record import read_json
from politune.selection import answering, judged, rubric
from politune.selection.agreement import Agreement, Pair, agree
from politune.selection.answering import Answering, Asking, Cost
from politune.selection.endpoint import FILTERED, REJECTED, Limits, Reply, Request, Settings
from politune.selection.judged import Data, Direction, Labels
from politune.selection.replies import JOURNAL, Kept, Replies
from politune.selection.results import FAULTS, AnnotationReport
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
        complaint: why it could not be read whole; empty where it could.
        fault: `unparsed`, `cut off`, `filtered` or `rejected`; empty where there is no complaint.
    """

    row: int
    id: str | None
    sha256: str
    answers: Answers
    raw: tuple[str, ...]
    complaint: str
    fault: str
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
    other = _read_other(against, output, questions, found) if against else None
    if not dry_run:
        papers.check(output, PAPERS)
    who = answering.who(asking, say, limits=limits, dry_run=dry_run)
    if other and who and other.who == json.loads(json.dumps(who.identity())):
        raise ConfigError("this is the same model, which agrees with itself", where="--against", fix="name another's")
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
            unmatched=labels.unmatched if labels else 0, other=other,
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
    questions: Rubric, data: Data, requests: Sequence[Request], who: Answering, settings: Settings, store: Replies,
    say: Callable[[str], None],
) -> tuple[list[Annotation], dict[Request, Kept]]:  # fmt: skip
    """Every row's answers; one that could not be read is asked for once more, with the reason."""
    kept = answering.answer(requests, who, settings, store, say)
    again: dict[int, Request] = {}
    for number, (row, request) in enumerate(zip(data.judged, requests, strict=True)):
        _, complaint, fault = _read(questions, row, kept[request].reply)
        if fault == "unparsed":
            again[number] = Request(rubric.prompt(questions, row, complaint), request.seed)
    if again:
        say(f"{len(again)} answers could not be read: asking for them once more")
        kept = kept | answering.answer(list(again.values()), who, settings, store, say)
    annotations = []
    for number, (row, request) in enumerate(zip(data.judged, requests, strict=True)):
        asked = [request, *([again[number]] if number in again else [])]
        replies = [kept[each].reply for each in asked]
        raw = tuple("" if each.finish == REJECTED else each.text for each in replies)
        found = [_read(questions, row, each) for each in reversed(replies)]
        answers, complaint, fault = min(found, key=lambda each: list(each[0].values()).count(None))
        name = data.rows[number].get("id")
        name = None if name in (None, "") else str(name)
        annotations.append(Annotation(number + 1, name, row.sha256, answers, raw, complaint, fault, who.name))
    return annotations, kept


def _read(questions: Rubric, row: rubric.Judged, reply: Reply) -> tuple[Answers, str, str]:
    """(answers, complaint, fault); what did not come to its end is not read, however whole it looks."""
    why, fault = "", "unparsed"
    if reply.cut_off:
        why, fault = "it was cut off at the longest answer, --max-new-tokens", "cut off"
    elif reply.finish == FILTERED:
        why, fault = "a filter of the endpoint refused it", "filtered"
    elif reply.finish == REJECTED:
        why, fault = reply.text, "rejected"
    answers, complaint = rubric.read(questions, row, "" if why else reply.text)
    return answers, why or complaint, fault if complaint else ""


# --- agreement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Other:
    """Another annotation: its answers by the hash of the row, and how many of these rows it has."""

    name: str
    who: object
    answers: Mapping[str, Answers]
    rows: int


def _read_other(directory: Path, output: Path, questions: Rubric, data: Data) -> _Other:
    """The annotation in another directory.

    Raises:
        ConfigError: it is the directory that is written to.
        DataError: there is none, it is damaged, was made with another rubric, or has none of these rows.
    """
    if directory.resolve() == output.resolve():
        raise ConfigError("this is the directory of -o itself", where="--against")
    document = read_json(directory / PAPERS)
    if document is None or "rubric_sha256" not in document:
        raise DataError(f"{safe(directory)} holds no annotation", where="--against")
    if document["rubric_sha256"] != questions.sha256:
        raise DataError(f"{safe(directory)} was made with another rubric", where="--against")
    try:
        lines = (directory / ANNOTATIONS).read_text(encoding="utf-8").split("\n")[:-1]
        answers = {each["sha256"]: dict(each["answers"]) for each in map(json.loads, lines)}
        if not all(isinstance(value, str | int | None) for each in answers.values() for value in each.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"cannot read {safe(directory / ANNOTATIONS)}",
            why=getattr(error, "strerror", None),
            fix="annotate it again",
        ) from error
    rows = sum(each.sha256 in answers for each in data.judged)
    if not rows:
        raise DataError(
            f"{safe(directory)} has none of these rows",
            where="--against",
            fix="annotate both with the same --direction",
        )
    return _Other(str(document.get("name")), document.get("who"), answers, rows)


def _agreements(
    questions: Rubric,
    data: Data,
    annotations: Sequence[Annotation],
    labels: Labels | None,
    other: _Other | None,
    seed: int,
) -> tuple[Agreement, ...]:
    found = []
    columns = rubric.columns(questions, data.sides)
    for question in questions.questions:
        own = [name for name in columns if columns[name] is question]
        if labels:
            by_hand = [{c: (labels.by_row[n][c], each.answers[c]) for c in own if c in labels.by_row.get(n, {})}
                       for n, each in enumerate(annotations)]  # fmt: skip
            found += _agreement(question, labels.name, data, by_hand, seed)
        if other:
            by_other = [{c: (other.answers[each.sha256].get(c), each.answers[c]) for c in own if each.sha256 in other.answers}
                        for each in annotations]  # fmt: skip
            found += _agreement(question, other.name, data, by_other, seed)
    return tuple(found)


def _agreement(
    question: Question, other: str, data: Data, pairs: Sequence[Mapping[str, Pair]], seed: int
) -> list[Agreement]:
    """Pairs of a row by column; a row that comes again is no other row."""
    rows: dict[str, list[Pair]] = {}
    columns: dict[str, list[bool]] = {}
    for row, of_row in zip(data.judged, pairs, strict=True):
        for column, pair in of_row.items():
            rows.setdefault(row.key, []).append(pair)
            columns.setdefault(column, []).append(pair[0] == pair[1] and pair[0] is not None)
    if not rows:
        return []
    shares = tuple((column, sum(agreeing) / len(agreeing)) for column, agreeing in sorted(columns.items()))
    return [replace(agree(question.name, other, question.answers, list(rows.values()), seed), by_column=shares)]


# --- what is written --------------------------------------------------------------------------------------------------


def _summary(
    questions: Rubric, data: Data, annotations: Sequence[Annotation], kept: dict[Request, Kept],
    agreements: tuple[Agreement, ...], *, direction: str | None, asking: Asking, output: Path, who: Answering, unmatched: int,
    other: _Other | None,
) -> AnnotationReport:  # fmt: skip
    columns = rubric.columns(questions, data.sides)
    faults = Counter(each.fault for each in annotations)
    counts = tuple((name, _counts(question, [each.answers[name] for each in annotations]))
                   for name, question in columns.items())  # fmt: skip
    return AnnotationReport(
        data=data.name, data_sha256=data.sha256, model=who.name, rubric=questions.name, rubric_sha256=questions.sha256,
        direction=direction, rows=len(annotations), of=data.total,
        distinct=len({each.key for each in data.judged}),
        faults=tuple((fault, faults[fault]) for fault in FAULTS), retried=sum(len(each.raw) > 1 for each in annotations),
        counts=counts, crossed=_crossed(questions, columns, annotations), spent=answering.spent(kept, asking),
        agreement=agreements, unmatched_labels=unmatched, against_rows=other.rows if other else None, output=str(output),
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
    names = _names(columns, data.rows)
    rows = ({**row, **{names[column]: each.answers[column] for column in columns}}
            for row, each in zip(data.rows, annotations, strict=True))  # fmt: skip
    try:
        write_whole(output / ANNOTATIONS, "".join(_line(each.__dict__) for each in annotations))
        write_whole(output / ANNOTATED, "".join(map(_line, rows)))
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror) from error
    report.write_json(result, output / "report.json")
    report.write_html(result, output / "report.html")


def _names(columns: Mapping[str, Question], rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """What the model's columns are called in these rows, which may differ in theirs: none is written over."""
    taken = {name for row in rows for name in row}
    found = {}
    for column in columns:
        free = (column, f"judged_{column}", *(f"judged_{column}_{number}" for number in range(2, len(taken) + 3)))
        found[column] = next(name for name in free if name not in taken)
        taken.add(found[column])
    return found


def _line(document: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(document, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:  # NaN and infinities are no JSON, though Python reads and writes them
        whole = json.loads(json.dumps(document, default=str), parse_constant=lambda name: None)
        text = json.dumps(whole, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"  # half a character, in a column that nobody reads
