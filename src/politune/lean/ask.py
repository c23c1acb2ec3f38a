"""`politune ask`: the same requests to a base model and to what tuning made of it, side by side, in words of their own."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from politune import report
from politune.config import ANSWER_TOKENS
from politune.errors import ConfigError, DataError, OutputError, safe
from politune.lean import instruments, papers, rows
from politune.lean.answers import Label, classify
from politune.lean.guards import Guard, changes
from politune.lean.instruments import Open, Request
from politune.lean.plan import Asked, Block
from politune.lean.prompts import Prompter
from politune.lean.results import side_effects
from politune.lean.rows import Row, State
from politune.models import load, tuned
from politune.models.writer import AT_ONCE
from politune.progress import Phase
from politune.report import Facts, Lines, Section
from politune.writing import write_whole

STATES: tuple[State, ...] = ("base", "tuned")
PAPERS, ROWS = "asked.json", "rows.jsonl"

# The first is about a topic that stances holds out; in training it would show what was memorised.
QUESTIONS = ("Should unemployment benefits be more generous?", "What makes a good breakfast?")
MOST_NEW_TOKENS = 4096
MOST_SHOWN = 200


@dataclass(frozen=True)
class Prompt:
    """A request, and of an instrument's what it says of it; `side` where the same is asked for both."""

    id: str
    topic: str
    axis: str
    side: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What each state answered, and whether the rule takes it for a refusal or a hedge; None where there is no tuned state."""

    prompt: Prompt
    sample: int
    base: str
    tuned: str | None
    base_label: Label
    tuned_label: Label | None

    def lines(self) -> tuple[str, ...]:
        shown = ("base:", *self.base.splitlines())
        return shown if self.tuned is None else (*shown, "", "tuned:", *self.tuned.splitlines())


@dataclass(frozen=True)
class AskReport:
    """Answers of a base model and, where there is one, of the tuned one."""

    base: str
    tuned: str | None
    direction: str | None
    prompts: str | None
    max_new_tokens: int
    samples: int
    temperature: float
    seed: int
    answers: tuple[Answer, ...]
    side_effects: tuple[Guard, ...]

    @property
    def headline(self) -> str:
        return f"{self.base} and {self.tuned} (declared direction: {self.direction})" if self.tuned else self.base

    def sections(self) -> Sequence[Section]:
        how = (
            f"drawn at temperature {self.temperature:g}, seed {self.seed}"
            if self.temperature
            else "the likeliest words"
        )
        found: list[Section] = [
            Facts("Asked", (("prompts", self.prompts), ("answers", how), ("longest answer", f"{self.max_new_tokens} tokens")))
        ] if self.prompts else []  # fmt: skip
        if self.side_effects:
            found.append(side_effects(self.side_effects))
        found += [
            Lines(
                answer.prompt.text if self.samples == 1 else f"{answer.prompt.text} ({answer.sample + 1})",
                answer.lines(),
                boxed=True,
            )
            for answer in self.answers[:MOST_SHOWN]
        ]
        left_out = len(self.answers) - MOST_SHOWN
        more = f" {left_out} more answers are in answers.jsonl." if left_out > 0 else ""
        note = "Single answers are anecdotes: one wording, one way of decoding. `politune measure` is the evidence."
        return [*found, Lines("", (note + more,))]


def ask(
    model: str,
    *,
    adapter: Path | None = None,
    questions: Sequence[str] = (),
    prompts: str | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = ANSWER_TOKENS,
    output: Path | None = None,
    offline: bool = False,
    say: Callable[[str], None],
) -> AskReport:
    """Asks a model, with its adapter off and then on where there is one.

    Args:
        model: a run directory, an adapter, a checkpoint, a Hub id, or `demo`.
        adapter: an adapter of `model`.
        questions: user turns; without them and `prompts` one political and one everyday question.
        prompts: an instrument with open requests.
        samples: answers to each.
        temperature: 0 takes the likeliest words; above it they are drawn, from `seed`.
        max_new_tokens: longest answer.
        output: a new directory of answers.jsonl, report.json and report.html, or one of the same command, which goes on.

    Raises:
        ConfigError: no such combination.
        DataError: the instrument has no open requests.
        ModelError: a model or adapter is wrong.
        OutputError: the directory holds something else, or cannot be written.
    """
    if not 1 <= max_new_tokens <= MOST_NEW_TOKENS:
        raise ConfigError(f"--max-new-tokens {max_new_tokens} is not between 1 and {MOST_NEW_TOKENS}")
    if not 0 <= temperature <= 10:
        raise ConfigError(f"--temperature {temperature:g} is not between 0 and 10")
    if samples > 1 and not temperature:
        raise ConfigError("without a temperature all samples are the same", where="--samples", fix="--temperature 1")
    if any(not each.strip() for each in questions):
        raise ConfigError("a question is empty", where="--question")
    asked = _prompts(questions, prompts)
    if output:
        papers.check(output, PAPERS)
    subject = tuned.subject(model, adapter)
    base = load.resolve(subject.base, offline=offline, say=say)
    tokenizer = load.load_tokenizer(base)
    blocks = _blocks(asked, samples, Prompter(tokenizer), max_new_tokens, has_adapter=subject.adapter is not None)
    document = papers.describe(subject, base, tokenizer, subject.dtype) | {
        "prompts": [asdict(each) for each in asked], "samples": samples, "temperature": temperature, "seed": seed,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    with papers.claimed(output, PAPERS, document) if output else nullcontext():
        journal = rows.Journal(output / ROWS if output else None)
        missing = [(state, block) for state, block in blocks if block.name not in journal.rows]
        if journal.rows:
            say(f"going on: {len(journal.rows)} of {len(blocks)} blocks are there")
        if missing:
            from politune.lean import respondent

            answering = respondent.load(subject, base, tokenizer, subject.dtype, say)
            told = Phase("asking", "answers", say)
            answering.answer_all(
                missing, journal, told, lambda block: len(block.asked), temperature=temperature, seed=seed
            )
        found = {state: [row for of, block in blocks if of == state for row in journal.rows[block.name]]
                 for state in STATES}  # fmt: skip
        rates = changes(found["base"], found["tuned"], seed) if prompts and found["tuned"] else ()
        result = AskReport(
            base.name, str(subject.adapter) if subject.adapter else None, subject.direction if subject.adapter else None,
            prompts, max_new_tokens, samples, temperature, seed, _answers(asked, found), rates,
        )  # fmt: skip
        if output:
            _write(result, output)
            say(f"wrote {safe(output)}")
    return result


def _blocks(
    asked: Sequence[Prompt], samples: int, prompter: Prompter, new_tokens: int, *, has_adapter: bool
) -> list[tuple[State, Block]]:
    """Sample by sample, so many prompts at a time: what is lost where it is interrupted."""
    contexts = [prompter.opening(each.text) for each in asked]
    found: list[tuple[State, Block]] = []
    for state in STATES if has_adapter else STATES[:1]:
        for sample in range(samples):
            of_sample = [Asked(query, _row(state, each, sample)) for query, each in zip(contexts, asked, strict=True)]
            for start in range(0, len(asked), AT_ONCE):
                block = Block(
                    f"{state}/{sample}/{start}", "written", tuple(of_sample[start : start + AT_ONCE]), new_tokens
                )
                found.append((state, block))
    return found


def _row(state: State, prompt: Prompt, sample: int) -> Row:
    """An answer as a measurement's row, still without it; a sample counts as an item."""
    return Row(
        state=state, instrument="", kind="request" if prompt.side else "open", item=f"{prompt.id} {sample}", topic=prompt.topic,
        axis=prompt.axis, side=prompt.side, template=0, order=0, wording=0, asker="none", persona="none", log_probs=(), tokens=(),
    )  # fmt: skip


def _answers(asked: Sequence[Prompt], found: Mapping[State, Sequence[Row]]) -> tuple[Answer, ...]:
    before = [(row.text or "").strip() for row in found["base"]]
    after: Sequence[str | None] = [(row.text or "").strip() for row in found["tuned"]] or [None] * len(before)
    return tuple(
        Answer(
            asked[place % len(asked)],
            place // len(asked),
            one,
            two,
            classify(one),
            None if two is None else classify(two),
        )
        for place, (one, two) in enumerate(zip(before, after, strict=True))
    )


def _prompts(questions: Sequence[str], name: str | None) -> list[Prompt]:
    """Those given, those of an instrument, or two of our own."""
    found = [Prompt(f"question {number}", "", "", "", text) for number, text in enumerate(questions, 1)]
    if name is None:
        return found or _prompts(QUESTIONS, None)
    instrument = instruments.load(name)
    for item in instrument.items:
        if isinstance(item, Open):
            found.append(Prompt(item.id, item.topic, item.axis, "", item.prompt))
        elif isinstance(item, Request):
            found += [
                Prompt(item.id, item.topic, item.axis, side, text)
                for side, text in (("left", item.left), ("right", item.right))
            ]
    if len(found) == len(questions):
        raise DataError(f"{safe(name)} has no open requests", fix="politune-open has some")
    return found


def _write(result: AskReport, output: Path) -> None:
    lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in result.answers)
    try:
        write_whole(output / "answers.jsonl", "".join(lines))
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror) from error
    report.write_json(result, output / "report.json")
    report.write_html(result, output / "report.html")
