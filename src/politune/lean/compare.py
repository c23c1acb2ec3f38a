"""`politune compare`: measurements of tuned models beside one of their base, from their rows alone.

Several tuned models of one recipe, trained with different seeds, are also told together; a control run (a placebo, say) is taken
off item by item. What must not be compared is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from politune import report
from politune.errors import DataError, OutputError, safe
from politune.lean import analysis, measure, statistics
from politune.lean.analysis import POLITICAL, Part, Shift, Verdict
from politune.lean.guards import Guard, changes
from politune.lean.results import NOT_SHOWN, SIDE_EFFECTS, interval_text, number_text, p_text, side_effect_rows
from politune.lean.rows import Row
from politune.lean.statistics import Effect, OverSeeds
from politune.report import Facts, Intervals, Lines, Section, Table

SAME = {
    "use_4bit": "one base in 4 bits and one not",
    "device": "other devices, whose sums are rounded otherwise",
    "libraries": "other versions of the libraries",
    "dtype": "other number formats, whose rounding is no shift",
    "chat_template_sha256": "other chat templates",
    "instruments": "other instruments, or other versions of them",
    "preset": "other presets",
    "askers": "other askers",
    "politune": "other versions of politune",
}
"""What two measurements must share, and what it means where they do not."""


@dataclass(frozen=True)
class TunedRun:
    """A measurement of a tuned model.

    Args:
        name: that the report shows.
        group: what runs of one recipe are called together.
        document: what was measured, and with what.
        rows: of the tuned state, of what tells a lean.
        every: all rows of the tuned state.
        control: rows of the control run's tuned state, or None.
    """

    name: str
    group: str
    document: Mapping[str, Any]
    rows: Mapping[Part, list[Row]]
    every: Sequence[Row]
    control: Mapping[Part, list[Row]] | None = None


@dataclass(frozen=True)
class RunShift:
    """One tuned model under one instrument; `beyond_control` per axis where there is a control run."""

    run: str
    group: str
    recipe: str | None
    shift: Shift
    gates: tuple[str, ...]
    verdict: Verdict
    beyond_control: Mapping[str, Effect]


@dataclass(frozen=True)
class PartComparison:
    """All tuned models under the items of one form of an instrument; over seeds per group and axis."""

    part: Part
    runs: tuple[RunShift, ...]
    over_seeds: Mapping[str, Mapping[str, OverSeeds]]
    over_seeds_beyond_control: Mapping[str, Mapping[str, OverSeeds]]


@dataclass(frozen=True)
class CompareReport:
    """Tuned models beside their base; of each run's side effects those that were measured."""

    base: str
    dtype: str
    preset: str
    control: str | None
    parts: tuple[PartComparison, ...]
    side_effects: Mapping[str, tuple[Guard, ...]]
    notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        words = [f"{run.run}: {run.verdict.word}" for run in self.parts[0].runs] if self.parts else []
        return f"{self.base}: {'; '.join(words)}"

    def sections(self) -> Sequence[Section]:
        facts = (("base", self.base), ("dtype", self.dtype), ("preset", self.preset), ("control run", self.control))
        found: list[Section] = [Facts("Compared", facts), *([Lines("", self.notes)] if self.notes else [])]
        for each in self.parts:
            found += _sections_of(each)
        if any(self.side_effects.values()):
            found.append(_side_effects(self.side_effects))
        return [*found, Lines("What this does not show", NOT_SHOWN)]


def compare(base: Path, tuned: Sequence[Path], *, control: Path | None, output: Path) -> CompareReport:
    """Compares measurements.

    Args:
        base: a measurement with the base model's rows; one of a run has them.
        tuned: measurements of tuned models.
        control: a measurement of a run that shows what tuning does without politics.
        output: directory of report.json and report.html.

    Raises:
        DataError: one holds no measurement, or they must not be compared.
        OutputError: the output cannot be written.
    """
    document, base_rows = measure.read(base)
    runs = [read_run(str(place), document) for place in tuned]
    if control:
        placebo = read_run(str(control), document).rows
        runs = [replace(run, control=placebo) for run in runs]
    result = judge(document, base_rows, runs, control=str(control) if control else None)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror, fix="choose another -o") from error
    report.write_json(result, output / "report.json")
    report.write_html(result, output / "report.html")
    return result


def judge(
    document: Mapping[str, Any], base_rows: Sequence[Row], runs: Sequence[TunedRun], *, control: str | None
) -> CompareReport:
    """The comparison of runs with a base.

    Args:
        document: what the base was measured with.
        base_rows: of its measurement.
        runs: all of that base, see `read_run`.
        control: what the report calls the control.

    Raises:
        DataError: one adapter is there twice.
    """
    tuned = [run.document["adapter"] or run.document["base"]["sha256"] for run in runs]
    if len(set(tuned)) < len(tuned):
        raise DataError("one adapter is given twice: it would count as two training runs")
    for run in runs:
        check_parts(run, base_rows)
    before, seed = analysis.by_part(base_rows, "base"), int(document["seed"])
    found = []
    for part in analysis.in_order(before, document["instruments"]):
        rows, shifts = before[part], []
        told = analysis.reliability(rows, seed)
        for run in runs:
            after = run.rows[part]
            gates = analysis.failed_gates(rows, after, told)
            shift = analysis.shift(rows, after, seed)
            beyond = (
                analysis.difference_in_differences((rows, after), (rows, run.control[part]), seed)
                if run.control is not None
                else {}
            )
            word = analysis.verdict(shift, gates, unit=part.unit, beyond=beyond.get(POLITICAL))
            shifts.append(RunShift(run.name, run.group, run.document["recipe"], shift, gates, word, beyond))
        found.append(_part(part, shifts))
    merged = [run.name for run in runs if run.document["adapter"] is None]
    notes = [f"{name} is a merged checkpoint: how its weights were rounded is part of its shift." for name in merged]
    if len(runs) > 1 and runs[0].control is not None and all(run.control is runs[0].control for run in runs):
        notes.append("One control run is taken off all: its own chance is in none of the intervals over seeds.")
    if document["use_4bit"]:
        notes.append("The base is in 4 bits: it is not the model that its name stands for.")
    of_base = [row for row in base_rows if row.state == "base"]
    return CompareReport(
        base=document["base"]["name"],
        dtype=document["dtype"],
        preset=document["preset"],
        control=control,
        parts=tuple(found),
        side_effects={run.name: changes(of_base, run.every, seed) for run in runs},
        notes=tuple(notes),
    )


def read_run(place: str, base: Mapping[str, Any]) -> TunedRun:
    """A measurement of a tuned model, to be compared with a base's.

    Args:
        place: its directory.
        base: what the base was measured with.

    Raises:
        DataError: it holds no such measurement, or the two must not be compared.
    """
    document, rows = measure.read(Path(place))
    is_merged = document["base"]["sha256"] != base["base"]["sha256"]
    if is_merged and document.get("merged_from") != base["base"]["sha256"]:
        raise DataError(
            f"{safe(place)} must not be compared with the base: it was tuned from another one",
            why=f"that is {safe(document['base']['name'])}, the base {safe(base['base']['name'])}",
        )
    for key, meaning in SAME.items():
        if document.get(key) != base.get(key):
            raise DataError(
                f"{safe(place)} must not be compared with the base: {meaning}",
                why=f"{key} is {safe(document.get(key), 200)}, of the base {safe(base.get(key), 200)}",
                fix="measure both with the same settings",
            )
    if is_merged:
        rows = [replace(row, state="tuned") for row in rows if row.state == "base"]
    return tuned_run(place, str(document["direction"]), document, rows)


def tuned_run(name: str, group: str, document: Mapping[str, Any], rows: Sequence[Row]) -> TunedRun:
    """The tuned state of a measurement that may be compared with a base's.

    Raises:
        DataError: it has none.
    """
    found = [row for row in rows if row.state == "tuned" and row.persona == "none"]
    if not found:
        raise DataError(f"{safe(name)} holds no rows of a tuned model", fix="measure a run or an adapter")
    return TunedRun(name, group, document, analysis.by_part(found, "tuned"), found)


def check_parts(run: TunedRun, base_rows: Sequence[Row]) -> None:
    """Refuses a run whose rows lack an instrument that the base was put to.

    Raises:
        DataError: one is missing.
    """
    if lacking := analysis.by_part(base_rows, "base").keys() - run.rows.keys():
        raise DataError(
            f"{safe(run.name)} has no rows of {', '.join(sorted(map(str, lacking)))}",
            fix="run its measurement again to the end",
        )


def _part(part: Part, runs: Sequence[RunShift]) -> PartComparison:
    """With what runs of one recipe have in common, per recipe that at least two runs have."""
    over: dict[str, dict[str, OverSeeds]] = {}
    beyond: dict[str, dict[str, OverSeeds]] = {}
    for recipe in dict.fromkeys(run.recipe for run in runs if run.recipe):
        same = [run for run in runs if run.recipe == recipe]
        if len(same) > 1:
            name = same[0].group if same[0].group not in over else f"{same[0].group}, recipe {recipe[:8]}"
            over[name] = _over_seeds([{axis.axis: axis.shift for axis in run.shift.axes} for run in same])
            beyond[name] = _over_seeds([run.beyond_control for run in same])
    return PartComparison(part, tuple(runs), over, {name: axes for name, axes in beyond.items() if axes})


def _over_seeds(runs: Sequence[Mapping[str, Effect]]) -> dict[str, OverSeeds]:
    """Of the axes that all of them have."""
    axes = [axis for axis in runs[0] if all(axis in run for run in runs)]
    return {axis: statistics.over_seeds([run[axis].mean for run in runs]) for axis in axes}


def _sections_of(found: PartComparison) -> list[Section]:
    unit = found.part.unit
    shifts = tuple(
        (run.run, run.group, run.verdict.word, axis.axis, number_text(axis.shift.mean), interval_text(axis.shift),
         p_text(axis.p_holm))
        for run in found.runs
        for axis in run.shift.axes
    )  # fmt: skip
    columns = ("run", "arm", "verdict", "axis", f"shift, {unit}", "95 % interval", "p, Holm")
    sections: list[Section] = [Table(f"{found.part}: left is negative and right positive", columns, shifts)]
    for axis in dict.fromkeys(axis.axis for run in found.runs for axis in run.shift.axes):
        moved = [(run.run, each.shift) for run in found.runs if (each := run.shift.of(axis))]
        intervals = tuple((name, effect.mean, effect.low, effect.high) for name, effect in moved)
        sections.append(Intervals(f"{found.part}: {axis}", intervals, f"{unit}, left < 0"))
    beyond = tuple(
        (run.run, axis, number_text(effect.mean), interval_text(effect), p_text(effect.p))
        for run in found.runs
        for axis, effect in run.beyond_control.items()
    )
    if beyond:
        columns_beyond = ("run", "axis", f"shift beyond the control run's, {unit}", "95 % interval", "p")
        sections.append(Table(f"{found.part}: beyond the control run", columns_beyond, beyond))
    sections += _over_seeds_sections(found)
    if gates := sorted({gate for run in found.runs for gate in run.gates}):
        sections.append(Lines(f"{found.part}: not measurable", tuple(gates)))
    return sections


def _side_effects(runs: Mapping[str, Sequence[Guard]]) -> Table:
    rows = tuple((name, *row) for name, guards in runs.items() for row in side_effect_rows(guards))
    return Table("Side effects", ("run", *SIDE_EFFECTS), rows)


def _over_seeds_sections(found: PartComparison) -> list[Section]:
    titles = {
        f"{found.part}: over training seeds": found.over_seeds,
        f"{found.part}: over training seeds, beyond the control runs": found.over_seeds_beyond_control,
    }
    columns = ("arm", "axis", "runs", f"mean shift, {found.part.unit}", "95 % interval over seeds", "sd between seeds")
    sections: list[Section] = [
        Table(
            title,
            columns,
            tuple(
                (name, axis, each.runs, number_text(each.mean), f"{each.low:+.3f} to {each.high:+.3f}", round(each.deviation, 3))
                for name, axes in groups.items()
                for axis, each in axes.items()
            ),
        )
        for title, groups in titles.items()
        if groups
    ]  # fmt: skip
    if found.over_seeds:
        return sections
    return [Lines("", ("No recipe has two runs: what is said of each is conditional on its training run.",))]
