"""What can be said of a run before it starts, without loading anything: its plan."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from politune import plan
from politune.config import DpoRun, Run
from politune.data import format as rows_format
from politune.data import sources
from politune.errors import ConfigError, safe
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
