"""What can be said of a run before it starts: its plan without loading anything, and a look at its data."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from politune import plan
from politune.config import DataSpec, DpoRun, Run
from politune.data import audit, sources
from politune.data import format as rows_format
from politune.errors import ConfigError, PolituneError, safe
from politune.models import load


def plan_run(run: Run, *, calibrate: bool, say: Callable[[str], None]) -> plan.PlanReport:
    """The plan of a run from shipped knowledge, local files and the cache alone: no network, no torch in this process.

    Args:
        calibrate: measure how fast it would go (`plan.timed`).
        say: told of that.

    Raises:
        DataError: local data that would not train.
        ModelError: a local model that could not be loaded.
    """
    table = sources.check(run.data)
    load.check(run.model)
    machine = plan.probe(Path(run.train.output_dir))
    config = load.read_config(run.model)
    shipped = plan.SHIPPED_SHAPES.get(run.model.model_name_or_path)
    shape = shipped or (plan.shape_from_config(config) if config else None)
    check_modules(run, shape)
    data = _data_shape(run, table)
    estimate = plan.estimate(run, shape, data, machine)
    return plan.timed(estimate, run, shipped or config, data, calibrate=calibrate, say=say)


def check_modules(run: Run, shape: plan.ModelShape | None) -> None:
    """Refuses a target module that a model of known shape does not have.

    Raises:
        ConfigError: names the module and what there is.
    """
    wanted = set(run.lora.lora_target_modules) - {"all-linear"}
    if shape and (unknown := sorted(wanted - set(shape.linear_shapes))):
        guess = difflib.get_close_matches(unknown[0], list(shape.linear_shapes), 1)
        fix = f"did you mean {guess[0]}?" if guess else f"it has {', '.join(shape.linear_shapes)}"
        raise ConfigError(f"the model has no layer {safe(unknown[0])}", where="lora.lora_target_modules", fix=fix)


def _data_shape(run: Run, table: rows_format.Table | None) -> plan.DataShape | None:
    if table is None:
        return plan.KNOWN_DATA.get(run.data.name)
    rows = convert(run, table).rows
    return plan.count_words([" ".join(turn["content"] for turn in row.prompt), *row.completions] for row in rows)


def convert(run: Run, table: rows_format.Table) -> rows_format.Rows[Any]:
    """A table's rows in the shape that the run's method trains on."""
    to_rows: Any = rows_format.to_preference_rows if isinstance(run, DpoRun) else rows_format.to_chat_rows
    return to_rows(table, run.data.direction, run.train.seed)  # type: ignore[no-any-return]


def inspect(run: Run, *, tokenizer_asked_for: bool, offline: bool, say: Callable[[str], None]) -> audit.InspectReport:
    """The audit of a run's data, in tokens where the tokenizer of its model is at hand.

    Data that only the other method could train are shown as that method trains them, and a left and a right text
    without a direction as `left`; `say` is told of both.

    Args:
        tokenizer_asked_for: fetch the tokenizer, and fail where it cannot be had; otherwise take it only from this machine.
    """
    table = sources.load(run.data, offline=offline)
    method, spec = _method(run, table, say), _with_direction(run.data, table, say)
    tokenizer = _tokenizer(run, tokenizer_asked_for, offline, say)
    return audit.audit(table, spec, tokenizer=tokenizer, seed=run.train.seed, method=method)


def _method(run: Run, table: rows_format.Table, say: Callable[[str], None]) -> rows_format.Method:
    """The run's own method, where it can read the columns or none can."""
    fitting = rows_format.methods_of(table)
    if not fitting or run.method in fitting:
        return run.method
    say(f"{safe(table.name)} has the columns of `politune train {fitting[0]}`: showing it as {fitting[0]} trains it")
    return fitting[0]


def _with_direction(spec: DataSpec, table: rows_format.Table, say: Callable[[str], None]) -> DataSpec:
    if spec.direction is not None or not rows_format.needs_direction(table):
        return spec
    say(f"{safe(table.name)} holds a left and a right text per row: showing direction left (--direction chooses)")
    return spec.model_copy(update={"direction": "left"})


def _tokenizer(run: Run, asked_for: bool, offline: bool, say: Callable[[str], None]) -> Any:
    try:
        return load.load_tokenizer(load.resolve(run.model, offline=offline or not asked_for, say=say))
    except PolituneError:
        if asked_for:
            raise
        name = run.model.model_name_or_path
        say(
            f"counting words only: the tokenizer of {safe(name)} is not on this machine (--model {safe(name)} fetches it)"
        )
        return None
