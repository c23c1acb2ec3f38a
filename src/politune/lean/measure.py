"""`politune measure`: one model, or a base and its adapter, put to the instruments; rows first, then the report from the rows.

The directory holds `measurement.json` (what is measured, and with what), `rows.jsonl` (every log-probability), `report.json` and
`report.html`. The same command again goes on where it was stopped, and whatever the interruption the report is the same.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from politune import record, report
from politune.config import NOT_OF_AN_ADAPTER
from politune.errors import ConfigError, DataError, safe
from politune.lean import instruments, papers, rows
from politune.lean.instruments import Instrument
from politune.lean.kept import KeptRows
from politune.lean.plan import PRESETS, Preset, blocks, is_asked
from politune.lean.prompts import Asker, Prompter
from politune.lean.results import MeasureReport, summarise
from politune.lean.rows import State
from politune.models import adapter as adapters
from politune.models import load, tuned
from politune.progress import Phase
from politune.writing import write_whole

Say: TypeAlias = Callable[[str], None]
DEFAULT_INSTRUMENTS = ("politune-stances", "politune-core", "politune-guards")
ANSWERED = "politune-open"
"""Measured with as well where a preset has open requests answered."""
PAPERS, ROWS = "measurement.json", "rows.jsonl"
WRITTEN = {"adapter", "use_4bit", "dtype", "recipe", "instruments", "preset", "askers", "seed"}
"""What stands in the papers besides the base, and is read again."""


def measure(
    model: str,
    *,
    adapter: Path | None = None,
    instrument_names: Sequence[str] = (),
    preset: Preset = "standard",
    askers: Sequence[Asker] = ("none",),
    dtype: tuned.Dtype | None = None,
    seed: int = 0,
    output: Path,
    offline: bool = False,
    say: Say,
) -> MeasureReport:
    """Measures a model, with its adapter off and then on where there is one; a run's model card then says the verdict.

    Args:
        model: a run directory, an adapter, a checkpoint, a Hub id, or `demo`.
        adapter: an adapter of `model`.
        instrument_names: names or files; by default the shipped ones, that of open requests only where the preset answers them.
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
    given = given_instruments(instrument_names, preset)
    papers.check(output, PAPERS)
    what = tuned.subject(model, adapter)
    states: tuple[State, ...] = ("base", "tuned") if what.adapter else ("base",)
    base = load.resolve(what.base, offline=offline, say=say)
    tokenizer = load.load_tokenizer(base)
    prompter = Prompter(tokenizer)
    precision = dtype or what.dtype
    every: tuple[Asker, ...] = ("none", *(each for each in askers if each != "none"))
    document = papers.describe(what, base, tokenizer, precision) | {
        "recipe": _recipe(what.papers),
        "instruments": {each.header.name: each.sha256 for each in given},
        "preset": preset,
        "askers": list(every),
        "seed": seed,
    }
    asked = {
        (state, each.header.name): list(blocks(state, each, prompter, preset, every))
        for state in states
        for each in given
    }
    todo = [(state, block) for (state, _), found in asked.items() for block in found]
    with papers.claimed(output, PAPERS, document):
        journal = rows.Journal(output / ROWS)
        if journal.rows:
            say(f"going on: {len(journal.rows)} of {len(todo)} blocks are there")
        of_base = [KeptRows(document, found) for (state, _), found in asked.items() if state == "base"]
        if sum(kept.fill(journal) for kept in of_base):
            say("the base was measured before on this machine: its rows are taken from there")
        missing = [(state, block) for state, block in todo if block.name not in journal.rows]
        if missing:
            from politune.lean import respondent

            answering = respondent.load(what, base, tokenizer, precision, say)
            answering.answer_all(missing, journal, Phase("measuring", "tokens", say), lambda block: block.tokens)
        for kept in of_base:
            kept.keep(journal)
        found = summarise(document, [row for _, block in todo for row in journal.rows[block.name]])
        report.write_html(found, output / "report.html")
        report.write_json(found, output / "report.json")
    if what.adapter is not None and what.papers:
        _write_card(what.adapter, found, say)
    return found


def given_instruments(names: Sequence[str], preset: Preset) -> list[Instrument]:
    """Those named, or a preset's own.

    Raises:
        ConfigError: two have the same name.
        DataError: one is wrong, or the preset asks nothing of any of them.
    """
    own = (*DEFAULT_INSTRUMENTS, ANSWERED) if PRESETS[preset].answers else DEFAULT_INSTRUMENTS
    found = [instruments.load(name) for name in names or own]
    called = [each.header.name for each in found]
    if len(set(called)) < len(called):
        raise ConfigError(f"two instruments have the same name: {safe(', '.join(called))}", where="--instrument")
    for each in found:
        errors = [finding.text for finding in instruments.check(each).findings if finding.level == "error"]
        if errors:
            raise DataError(
                f"{safe(each.header.name)} cannot be measured with: {errors[0]}", fix="politune instruments check"
            )
    if not any(is_asked(item, preset) for each in found for item in each.items):
        raise DataError(
            f"preset {preset} asks nothing of these instruments", fix="--preset full has open requests answered"
        )
    return found


def _write_card(adapter: Path, found: MeasureReport, say: Say) -> None:
    """A run's model card says what was measured last."""
    if not found.card_text:
        return
    card = record.model_card(adapters.read(adapter).metadata, "adapter", found.card_text)
    try:
        write_whole(adapter / "README.md", card)
    except OSError as error:
        say(f"the model card stays as it was: {safe(error.strerror)}")


def _recipe(run: dict[str, Any]) -> str | None:
    """Of a run's settings but its seed and its place: what runs over seeds share; None where no run is known."""
    settings = {
        name: value for name, value in record.settings_of(run).items()
        if name != "train.seed" and not name.startswith(NOT_OF_AN_ADAPTER)
    }  # fmt: skip
    return record.sha256_of_json({**settings, "data": run.get("data")}) if settings else None


def read(directory: Path) -> tuple[dict[str, Any], list[rows.Row]]:
    """What was measured, and its rows.

    Raises:
        DataError: the directory holds no measurement.
    """
    document = record.read_json(directory / PAPERS)
    if document is None:
        raise DataError(f"{safe(directory)} holds no measurement", fix="politune measure writes one")
    if not isinstance(document.get("base"), dict) or WRITTEN - set(document):
        raise DataError(
            f"{safe(directory / PAPERS)} is damaged or of another version", fix="politune measure writes one"
        )
    return document, [row for block in rows.read(directory / ROWS).values() for row in block]
