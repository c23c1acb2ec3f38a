"""`politune measure`: one model, or a base and its adapter, put to the instruments; rows first, then the report from the rows.

The directory holds `measurement.json` (what is measured, and with what), `rows.jsonl` (every log-probability), `report.json` and
`report.html`. The same command again goes on where it was stopped, and whatever the interruption the report is the same.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from politune import __version__, record, report
from politune.config import ModelSpec
from politune.errors import ConfigError, DataError, ModelError, OutputError, safe
from politune.lean import instruments, rows
from politune.lean.plan import Block, Preset, blocks
from politune.lean.prompts import Asker, Prompter
from politune.lean.results import MeasureReport, summarise
from politune.lean.rows import State
from politune.models import adapter as adapters
from politune.models import load, tuned
from politune.models.files import sha256_of

Say: TypeAlias = Callable[[str], None]
Dtype: TypeAlias = Literal["float32", "bfloat16"]
DEFAULT_INSTRUMENTS = ("politune-stances", "politune-core", "politune-guards")
PAPERS, ROWS = "measurement.json", "rows.jsonl"


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        base: the base model.
        adapter: its adapter, or None.
        papers: the run.json of the run that made the adapter; empty where there is none.
    """

    base: ModelSpec
    adapter: Path | None
    papers: dict[str, Any]

    @property
    def states(self) -> tuple[State, ...]:
        """Base alone, or base and tuned."""
        return ("base", "tuned") if self.adapter else ("base",)


def subject(model: str, adapter: Path | None) -> Subject:
    """What a model's name or path means: a run or adapter directory, a checkpoint, a Hub id, or `demo`.

    Raises:
        ModelError: there is no such thing.
        ConfigError: two adapters are given.
    """
    path = Path(model).expanduser()
    is_tuned = load.is_directory(model) and ((path / "adapter").is_dir() or (path / adapters.CONFIG).exists())
    if is_tuned and adapter is not None:
        raise ConfigError(f"{safe(model)} holds an adapter already", where="--adapter", fix="name its base instead")
    place = path if is_tuned else adapter
    if place is None:
        return Subject(ModelSpec(model_name_or_path=model), None, {})
    directory = tuned.adapter_directory(place)
    papers = record.read_json(tuned.beside(directory) / "run.json") or {}
    base = tuned.base_spec(adapters.read(directory), papers, None if is_tuned else model)
    in_4_bits = bool(record.settings_of(papers).get("model.use_4bit"))
    return Subject(base.model_copy(update={"use_4bit": in_4_bits}), directory, papers)


def measure(
    model: str,
    *,
    adapter: Path | None = None,
    instrument_names: Sequence[str] = (),
    preset: Preset = "standard",
    askers: Sequence[Asker] = ("none",),
    dtype: Dtype | None = None,
    seed: int = 0,
    output: Path,
    offline: bool = False,
    say: Say,
) -> MeasureReport:
    """Measures a model, with its adapter off and then on where there is one.

    Args:
        model: a run directory, an adapter, a checkpoint, a Hub id, or `demo`.
        adapter: an adapter of `model`.
        instrument_names: names or files; by default the shipped ones that need no generated answers.
        askers: what the questions say of who asks; `none` is always among them.
        dtype: that the model computes in; by default the run's, else float32.
        seed: of the bootstrap's draws.
        output: a new directory, or one of the same measurement.

    Raises:
        ConfigError: no such combination.
        DataError: an instrument is wrong.
        ModelError: a model or adapter is wrong.
        OutputError: the directory belongs to another measurement, or cannot be written.
    """
    given = [instruments.load(name) for name in instrument_names or DEFAULT_INSTRUMENTS]
    names = [each.header.name for each in given]
    if len(set(names)) < len(names):
        raise ConfigError(f"two instruments have the same name: {safe(', '.join(names))}", where="--instrument")
    for each in given:
        errors = [finding.text for finding in instruments.check(each).findings if finding.level == "error"]
        if errors:
            raise DataError(
                f"{safe(each.header.name)} cannot be measured with: {errors[0]}", fix="politune instruments check"
            )
    what = subject(model, adapter)
    base = load.resolve(what.base, offline=offline, say=say)
    tokenizer = load.load_tokenizer(base)
    prompter = Prompter(tokenizer)
    precision = dtype or _own_dtype(what)
    every: tuple[Asker, ...] = ("none", *(each for each in askers if each != "none"))
    document = {
        "politune": __version__,
        "base": {"name": base.public_name, "commit": base.commit, "sha256": load.base_sha256(base)},
        "adapter": _adapter_sha256(what.adapter),
        "recipe": _recipe(what.papers),
        "direction": str(what.papers.get("direction", "undeclared")) if what.adapter else None,
        "dtype": precision,
        "use_4bit": what.base.use_4bit,
        "device": load.own_device(),
        "chat_template_sha256": _template_sha256(tokenizer),
        "instruments": {each.header.name: each.sha256 for each in given},
        "preset": preset,
        "askers": list(every),
        "seed": seed,
        "libraries": {
            name: version for name, version in record.environment()["libraries"].items() if name in _LIBRARIES
        },
    }
    todo = [
        (state, block)
        for state in what.states
        for each in given
        for block in blocks(state, each, prompter, preset, every)
    ]
    if not todo:
        raise DataError(
            "no item of these instruments is scored by log-probability", fix="politune ask takes open prompts"
        )
    _claim(output, document)
    journal = rows.Journal(output / ROWS)
    missing = [(state, block) for state, block in todo if block.name not in journal.rows]
    if missing:
        if len(missing) < len(todo):
            say(f"going on: {len(todo) - len(missing)} of {len(todo)} blocks are measured")
        _score(missing, base, what, precision, journal, say)
    ordered = [row for _, block in todo for row in journal.rows[block.name]]
    found = summarise(document, ordered)
    report.write_json(found, output / "report.json")
    report.write_html(found, output / "report.html")
    return found


_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "bitsandbytes")


def _score(
    missing: Sequence[tuple[State, Block]],
    base: load.ResolvedModel,
    what: Subject,
    dtype: Dtype,
    journal: rows.Journal,
    say: Say,
) -> None:
    from politune.lean.scorer import Scorer

    say(f"loading {safe(base.name)} in {dtype}")
    model = load.load_model(base, bf16=dtype == "bfloat16", use_4bit=what.base.use_4bit)
    if what.adapter is not None:
        model = load.load_adapter(model, what.adapter, base=base)
    scorer = Scorer(model)
    for state, block in missing:
        with model.disable_adapter() if state == "base" and what.adapter is not None else nullcontext():
            scores = scorer.score([each.query for each in block.asked])
        found = [
            each.row.with_scores(tuple(sum(log_probs) for log_probs in of_each))
            for each, of_each in zip(block.asked, scores, strict=True)
        ]
        if not all(math.isfinite(value) for row in found for value in row.log_probs):
            raise ModelError(
                f"the {state} model gives log-probabilities that are no numbers", fix="measure with --dtype float32"
            )
        journal.append(block.name, found)


def _own_dtype(what: Subject) -> Dtype:
    """That a run trained in; float32 for everything else."""
    settings = record.settings_of(what.papers)
    return "bfloat16" if settings.get("model.bf16") or settings.get("model.use_4bit") else "float32"


def _recipe(papers: dict[str, Any]) -> str | None:
    """Of a run's settings but its seed and its place: what runs over seeds share; None where no run is known."""
    settings = {
        name: value for name, value in record.settings_of(papers).items()
        if name not in ("train.seed", "train.output_dir") and not name.startswith("tracking.")
    }  # fmt: skip
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest() if settings else None


def _adapter_sha256(adapter: Path | None) -> str | None:
    return None if adapter is None else sha256_of(adapter / adapters.WEIGHTS)


def _template_sha256(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()


def _claim(output: Path, document: dict[str, Any]) -> None:
    """Makes the directory this measurement's, or finds it to be."""
    there = record.read_json(output / PAPERS)
    if there == document:
        return
    if there is not None:
        changed = sorted(key for key in {*there, *document} if there.get(key) != document.get(key))
        raise OutputError(
            f"{safe(output)} holds another measurement",
            why=f"it differs in {', '.join(changed)}",
            fix="choose another -o, or remove it first",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise OutputError(f"{safe(output)} is not empty", fix="choose another -o")
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror, fix="choose another -o") from error
    record.write_json(output / PAPERS, document)


def read(directory: Path) -> tuple[dict[str, Any], list[rows.Row]]:
    """What was measured, and its rows.

    Raises:
        DataError: the directory holds no measurement.
    """
    document = record.read_json(directory / PAPERS)
    if document is None:
        raise DataError(f"{safe(directory)} holds no measurement", fix="politune measure writes one")
    return document, rows.read(directory / ROWS)
