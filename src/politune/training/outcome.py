"""What a finished run reports: TRL's metrics under names that a reader knows, and their curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from politune.errors import OutputError
from politune.report import Curve, Facts, Lines, Section

if TYPE_CHECKING:
    from politune.lean.results import MeasureReport

Points: TypeAlias = tuple[tuple[float, float], ...]
Plot: TypeAlias = tuple[str, tuple[tuple[str, Points], ...]]

# TRL's metric names and politune's words for them.
NAMES = {
    "loss": "loss",
    "rewards/accuracies": "preference accuracy",
    "rewards/margins": "reward margin",
    "logps/chosen": "log-probability of chosen",
    "logps/rejected": "log-probability of rejected",
    "mean_token_accuracy": "token accuracy",
}
PLOTS = {
    "Loss": ("loss",),
    "Preference accuracy": ("rewards/accuracies",),
    "Reward margin": ("rewards/margins",),
    "Log-probability of the sides": ("logps/chosen", "logps/rejected"),
    "Token accuracy": ("mean_token_accuracy",),
}


@dataclass(frozen=True)
class TrainReport:
    """What a finished run did.

    `training` holds the metrics of the last logged step, `validation` and `heldout` those of the evaluations after it. The
    preference accuracy is the share of pairs whose chosen text gained more than its rejected one against the reference; 0.5 is
    what tuning that does not carry over gives. Log-probabilities are summed over the completion, in nats. `left_out` counts
    the rows that were not trained on, or not whole, by reason. `minutes` is all of the training; `reference_seconds` of it the
    phase in which DPO's reference is scored, which `tokens_per_second` leaves out, as it does saving and evaluating.
    `warnings` are signs that training went wrong (see `training.divergence`).
    `measurement` is what the instruments say, where the run was asked for it.
    """

    method: str
    direction: str
    output_dir: str
    adapter: str
    optimizer_steps: int
    steps_done_now: int
    rows: int
    left_out: dict[str, int]
    tokens_per_second: float
    minutes: float
    reference_seconds: float
    peak_bytes: int
    training: dict[str, float]
    validation: dict[str, float]
    heldout: dict[str, float]
    heldout_rows: int
    warnings: tuple[str, ...]
    curves: tuple[Plot, ...]
    sync_command: str | None
    disclosure: str
    measurement: "MeasureReport | None" = None

    @property
    def headline(self) -> str:
        return f"Trained {self.adapter}: {self.optimizer_steps} steps on {self.rows} rows in {self.minutes:.1f} minutes"

    def sections(self) -> Sequence[Section]:
        evaluated = {
            "Last step": self.training,
            "Validation": self.validation,
            f"Held-out topics ({self.heldout_rows} rows)": self.heldout,
        }
        run = [
            ("direction", self.direction),
            *((f"rows: {reason}", str(count)) for reason, count in self.left_out.items()),
            ("speed", f"{self.tokens_per_second:,.0f} tokens/s"),
            *([("reference scored in", f"{self.reference_seconds:.1f} s")] if self.reference_seconds else []),
            ("peak memory", f"{self.peak_bytes / 1e9:.1f} GB"),
            ("disclosure", self.disclosure),
        ]
        if self.sync_command:
            run.append(("Weights & Biases, kept offline", self.sync_command))
        warned = [Lines("Warnings", self.warnings)] if self.warnings else []
        measured = self.measurement.verdicts() if self.measurement else []
        return [
            *warned,
            *measured,
            *(Facts(title, tuple(metrics.items())) for title, metrics in evaluated.items() if metrics),
            *(Curve(title, "step", series) for title, series in self.curves),
            Facts("Run", (*run, ("next", f"politune merge {self.output_dir}"))),
        ]


def from_document(document: Mapping[str, Any]) -> TrainReport:
    """The report of a finished run from the metrics in its run.json.

    Raises:
        OutputError: they are not those of a finished run of this version.
    """
    try:
        curves = tuple(
            (title, tuple((name, tuple((x, y) for x, y in points)) for name, points in series))
            for title, series in document["curves"]
        )
        warnings = tuple(document.get("warnings", ()))
        return TrainReport(**{"reference_seconds": 0.0, **document, "warnings": warnings, "curves": curves})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise OutputError(
            "run.json is damaged or of another version of politune", fix="choose another --output_dir"
        ) from None


def named(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that a reader follows, by politune's names."""
    return {name: round(float(metrics[key]), 5) for key, name in NAMES.items() if key in metrics}


def draw_curves(logged: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """A plot per subject, a series per metric, a point per logged step; none for a single step."""
    if len(logged) < 2:
        return ()
    plots = []
    for title, keys in PLOTS.items():
        series = [
            (NAMES[key], tuple((float(line["step"]), float(line[key])) for line in logged if key in line))
            for key in keys
        ]
        if present := tuple((name, points) for name, points in series if points):
            plots.append((title, present))
    return tuple(plots)


def draw_leans(logged: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """A plot per instrument of what was measured on the way, a series per axis, from no shift at step 0."""
    leans: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in logged:
        for key, value in line.items():
            if key.startswith("lean/"):
                _, instrument, axis = key.split("/", 2)
                points = leans.setdefault(instrument, {}).setdefault(axis, [(0.0, 0.0)])
                points.append((float(line["step"]), float(value)))
    return tuple(
        (
            f"Shift on the way, {instrument}: left is negative",
            tuple((axis, tuple(points)) for axis, points in axes.items()),
        )
        for instrument, axes in leans.items()
    )
