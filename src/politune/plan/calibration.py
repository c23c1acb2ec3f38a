"""How fast a run would go: a few seconds of training on a stand-in of its model, in a process of its own.

The stand-in (`training.stand_in`) has the model's layers, though fewer of them, random weights, and rows of the data's lengths;
it goes through the trainer that the run will have. What it reaches is remembered (`plan.rates`), so that a machine is measured
once for every kind of run.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from politune.config import Run
from politune.errors import safe
from politune.plan.calls import reference_passes
from politune.plan.rates import Rate, known_rate, remember_rate, today
from politune.plan.report import PlanReport, TimePlan, TokenPlan
from politune.plan.shapes import DataShape, ModelShape, shape_from_config

STAND_IN = "politune.training.stand_in"
TIMEOUT_SECONDS = 300
PADDED_PASSES = 2
"""Forward and backward passes of a padded step: more of them take as much longer."""

Say = Callable[[str], None]


def timed(
    plan: PlanReport,
    run: Run,
    model: Mapping[str, Any] | ModelShape | None,
    data: DataShape | None,
    *,
    calibrate: bool,
    say: Say,
) -> PlanReport:
    """A plan with its time, at the speed that is known here for this kind of run.

    Args:
        plan: from `estimate`.
        model: its config.json, or its sizes alone, for which a Llama stands in.
        data: the data's sizes.
        calibrate: measure the speed now, whatever is known.
        say: told that it is measured, or why it could not be.
    """
    if plan.tokens is None or plan.tokens.per_epoch is None or plan.steps is None:
        if calibrate:
            say("not calibrated: the lengths of the rows are not known")
        return plan
    row_tokens = plan.tokens.per_epoch / plan.steps.rows
    rate = known_rate(run, plan.machine, row_tokens, processes=plan.processes)
    if calibrate:
        try:
            rate = _calibrate(plan, run, model, data, say)
        except _NotMeasurableError as error:
            say(f"not calibrated: {error}")
    return replace(plan, time=_time_of(run, plan.tokens, rate) if rate else None)


class _NotMeasurableError(Exception):
    """Why there is no rate."""


def _calibrate(
    plan: PlanReport,
    run: Run,
    model: Mapping[str, Any] | ModelShape | None,
    data: DataShape | None,
    say: Say,
) -> Rate:
    shape = model if isinstance(model, ModelShape) or model is None else shape_from_config(model)
    if shape is None or model is None or data is None:
        raise _NotMeasurableError("the sizes of the model or of the rows are not known")
    if plan.processes > 1:
        raise _NotMeasurableError("several processes train together")
    if plan.fits is False:
        raise _NotMeasurableError("the run does not fit into the memory")
    say("calibrating: some steps on a stand-in of the model, for about a quarter of a minute")
    template = 0 if data.templated else shape.template_tokens
    rows = rows_like(data, template, run.data.max_length, _rows_of_a_step(plan, run))
    asked = {
        "method": run.method,
        "run": run.model_dump(mode="json"),
        "config": llama_config(model) if isinstance(model, ModelShape) else dict(model),
        "rows": rows,
        "tokens_per_call": plan.tokens_per_call,
    }
    measured = _run_stand_in(asked)
    tokens = sum(prompt + side for prompt, *sides in rows for side in sides)
    reference = measured["reference_seconds"]
    rate = Rate(
        tokens_per_second=tokens / measured["step_seconds"],
        reference_tokens_per_second=tokens / reference if reference else None,
        row_tokens=tokens / len(rows),
        measured=today(),
        source="calibration",
        device=plan.machine.device,
    )
    remember_rate(run, plan.machine, rate)
    return rate


def _run_stand_in(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the stand-in's process: what it measured.

    Raises:
        _NotMeasurableError: it did not end well.
    """
    with tempfile.TemporaryDirectory(prefix="politune-") as directory:
        Path(directory, "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-P", "-m", STAND_IN, directory]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise _NotMeasurableError(f"it took longer than {TIMEOUT_SECONDS} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise _NotMeasurableError(safe(lines[-1], 200) if lines else f"exit status {done.returncode}")
        measured: dict[str, Any] = json.loads(Path(directory, "measured.json").read_text(encoding="utf-8"))
    return measured


def _rows_of_a_step(plan: PlanReport, run: Run) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches) of a step that is as the run's, but no longer than it takes to fill a call."""
    assert plan.steps and plan.tokens
    batch = min(run.train.per_device_train_batch_size, plan.steps.rows)
    passes = min(run.train.gradient_accumulation_steps, max(1, plan.steps.rows // batch))
    if plan.tokens_per_call is None:
        return batch, min(passes, PADDED_PASSES)
    row = (plan.tokens.computed_per_epoch or 0) / plan.steps.rows
    return batch, max(1, min(passes, int(plan.tokens_per_call / (batch * row)))) if row else 1


def rows_like(data: DataShape, template: int, max_length: int, step: tuple[int, int]) -> list[list[int]]:
    """Lengths of one step's rows (prompt, then each completion), spread as evenly as the data's.

    Args:
        template: tokens that the chat template adds to a prompt.
        max_length: a prompt and a completion are cut to it.
        step: rows of a micro-batch, and micro-batches.
    """
    count = step[0] * step[1]
    typical: tuple[float, ...] = (data.prompt_tokens or 1, *(data.completion_tokens or (1,)))
    sample: Sequence[tuple[float, ...]] = data.sample or (typical,)
    rows = [sample[int((index + 0.5) * len(sample) / count)] for index in range(count)]
    return [list(_cut(round(prompt) + template, sides, max_length)) for prompt, *sides in rows]


def _cut(prompt: int, sides: Sequence[float], max_length: int) -> Iterator[int]:
    prompt = max(1, min(prompt, max_length - 1))
    yield prompt
    for side in sides:
        yield max(1, min(round(side), max_length - prompt))


def llama_config(shape: ModelShape) -> dict[str, Any]:
    """The config.json of a Llama with these sizes."""
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied_embeddings,
    }


def _time_of(run: Run, tokens: TokenPlan, rate: Rate) -> TimePlan | None:
    if tokens.per_epoch is None or tokens.total is None:
        return None
    reference = 0.0
    # Where TRL scores the reference in each step, the rate of the steps holds it.
    if rate.reference_tokens_per_second and run.trl.get("precompute_ref_log_probs", True):
        reference = tokens.per_epoch * reference_passes(run, tokens.epochs) / rate.reference_tokens_per_second
    return TimePlan(
        tokens.total / rate.tokens_per_second + reference, tokens.per_epoch / rate.tokens_per_second, reference, rate
    )
