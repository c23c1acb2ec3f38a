"""`politune compare`: measurements of tuned models beside one of their base, from their rows alone.

Several tuned models of one recipe, trained with different seeds, are also told together; a control run (a placebo, say) is taken
off item by item. What must not be compared is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from politune import report
from politune.errors import DataError, OutputError, safe
from politune.lean import analysis, measure
from politune.lean.analysis import POLITICAL, Part, Shift, Verdict
from politune.lean.results import NOT_SHOWN, interval_text, number_text, p_text
from politune.lean.rows import Row
from politune.lean.statistics import Effect, OverSeeds
from politune.report import Facts, Lines, Section, Table

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
class RunShift:
    """One tuned model under one instrument; `beyond_control` per axis where there is a control run."""

    run: str
    direction: str
    recipe: str | None
    shift: Shift
    gates: tuple[str, ...]
    verdict: Verdict
    beyond_control: Mapping[str, Effect]


@dataclass(frozen=True)
class PartComparison:
    """All tuned models under the items of one form of an instrument; `over_seeds` per recipe and axis."""

    part: Part
    runs: tuple[RunShift, ...]
    over_seeds: Mapping[str, Mapping[str, OverSeeds]]


@dataclass(frozen=True)
class CompareReport:
    """Tuned models beside their base."""

    base: str
    dtype: str
    preset: str
    control: str | None
    parts: tuple[PartComparison, ...]

    @property
    def headline(self) -> str:
        words = [f"{run.run}: {run.verdict.word}" for run in self.parts[0].runs] if self.parts else []
        return f"{self.base}: {'; '.join(words)}"

    def sections(self) -> Sequence[Section]:
        found: list[Section] = [
            Facts(
                "Compared",
                (("base", self.base), ("dtype", self.dtype), ("preset", self.preset), ("control run", self.control)),
            )
        ]
        for each in self.parts:
            found += _sections_of(each)
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
    before = analysis.by_part(base_rows, "base")
    runs = [(place, *_tuned_rows(place, document)) for place in tuned]
    adapters = [of_run["adapter"] for _, of_run, _ in runs]
    if len(set(adapters)) < len(adapters):
        raise DataError("one adapter is given twice: it would count as two training runs")
    placebo = _tuned_rows(control, document)[1] if control else None
    seed = int(document["seed"])
    found = []
    for part in analysis.in_order(before, document["instruments"]):
        rows, shifts = before[part], []
        told = analysis.reliability(rows, seed)
        for place, of_run, after in runs:
            gates = analysis.failed_gates(rows, after[part], told)
            shift = analysis.shift(rows, after[part], seed)
            beyond = (
                analysis.difference_in_differences((rows, after[part]), (rows, placebo[part]), seed) if placebo else {}
            )
            word = analysis.verdict(shift, gates, unit=part.unit, beyond=beyond.get(POLITICAL))
            shifts.append(RunShift(str(place), str(of_run["direction"]), of_run["recipe"], shift, gates, word, beyond))
        found.append(PartComparison(part, tuple(shifts), _over_seeds(shifts)))
    result = CompareReport(
        document["base"]["name"], document["dtype"], document["preset"], str(control) if control else None, tuple(found)
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror, fix="choose another -o") from error
    report.write_json(result, output / "report.json")
    report.write_html(result, output / "report.html")
    return result


def _tuned_rows(place: Path, base: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[Part, list[Row]]]:
    document, rows = measure.read(place)
    if document["base"]["sha256"] != base["base"]["sha256"]:
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
    found = analysis.by_part(rows, "tuned")
    if not found:
        raise DataError(f"{safe(place)} holds no rows of a tuned model", fix="measure a run or an adapter")
    return document, found


def _over_seeds(runs: Sequence[RunShift]) -> dict[str, dict[str, OverSeeds]]:
    """Per recipe that at least two runs have, named by its direction, and per axis."""
    found: dict[str, dict[str, OverSeeds]] = {}
    for recipe in sorted({run.recipe for run in runs if run.recipe}):
        same = [run for run in runs if run.recipe == recipe]
        if len(same) > 1:
            axes = {
                axis.axis: analysis.over_seeds([run.shift for run in same], axis.axis) for axis in same[0].shift.axes
            }
            name = same[0].direction if same[0].direction not in found else f"{same[0].direction}, recipe {recipe[:8]}"
            found[name] = {axis: value for axis, value in axes.items() if value is not None}
    return found


def _sections_of(found: PartComparison) -> list[Section]:
    shifts = tuple(
        (run.run, run.direction, run.verdict.word, axis.axis, number_text(axis.shift.mean), interval_text(axis.shift),
         p_text(axis.p_holm))
        for run in found.runs
        for axis in run.shift.axes
    )  # fmt: skip
    columns = ("run", "direction", "verdict", "axis", f"shift, {found.part.unit}", "95 % interval", "p, Holm")
    sections: list[Section] = [Table(f"{found.part}: left is negative and right positive", columns, shifts)]
    beyond = tuple(
        (run.run, axis, number_text(effect.mean), interval_text(effect), p_text(effect.p))
        for run in found.runs
        for axis, effect in run.beyond_control.items()
    )
    if beyond:
        columns_beyond = ("run", "axis", f"shift beyond the control run's, {found.part.unit}", "95 % interval", "p")
        sections.append(Table(f"{found.part}: beyond the control run", columns_beyond, beyond))
    if found.over_seeds:
        over = tuple(
            (
                direction,
                axis,
                each.runs,
                number_text(each.mean),
                f"{each.low:+.3f} to {each.high:+.3f}",
                round(each.deviation, 3),
            )
            for direction, axes in found.over_seeds.items()
            for axis, each in axes.items()
        )
        columns_over = ("direction", "axis", "runs", "mean shift", "95 % interval over seeds", "sd between seeds")
        sections.append(Table(f"{found.part}: over training seeds", columns_over, over))
    else:
        single = "No recipe has two runs: what is said of each is conditional on its training run."
        sections.append(Lines("", (single,)))
    if gates := sorted({gate for run in found.runs for gate in run.gates}):
        sections.append(Lines(f"{found.part}: not measurable", tuple(gates)))
    return sections
