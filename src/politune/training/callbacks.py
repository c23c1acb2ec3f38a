"""What politune adds to the trainer's loop: log.jsonl, progress, commits, a guard against NaN, stopping on a signal.

A callback reads; it leaves model mode, random state, padding side and weights as it found them.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from politune.errors import TrainingError
from politune.training import checkpoints, divergence
from politune.training.signals import StopRequest
from politune.writing import write_whole

# TRL's metric names that a person follows during a run, and how they are called on the progress line.
SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
}


class EvaluationName:
    """What an evaluation that is being logged is of: TRL calls every one `eval`."""

    def __init__(self) -> None:
        self.current = "validation"

    def rename(self, logs: dict[str, Any] | None) -> dict[str, Any]:
        """The logs with `eval_loss` as `validation/loss` or `heldout/loss`."""
        return {
            f"{self.current}/{key.removeprefix('eval_')}" if key.startswith("eval_") else key: value
            for key, value in (logs or {}).items()
        }


class JsonLog(TrainerCallback):
    """One JSON line per logged step in `log.jsonl`; a resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, evaluation: EvaluationName) -> None:
        self.path, self.evaluation = path, evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in self._lines() if line.get("step", 0) <= state.global_step]
            write_whole(self.path, "".join(kept))

    def _lines(self) -> list[dict[str, Any]]:
        """Those there, but for one that a killed process or a full disk left half written."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        return [found for line in text.split("\n") if (found := _parsed(line)) is not None]

    def holds(self, step: int, names: Container[str]) -> bool:
        """Whether a line of the step has a number of one of these names."""
        return any(line.get("step") == step and any(key in names for key in line) for line in self._lines())

    def warnings(self) -> dict[str, str]:
        """What was warned of, by its kind."""
        return {line["kind"]: line["warning"] for line in self._lines() if "warning" in line}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._write(state.global_step, {key: _finite(value) for key, value in self.evaluation.rename(logs).items()})

    def warn(self, step: int, kind: str, text: str) -> None:
        """A line that is a warning."""
        self._write(step, {"kind": kind, "warning": text})

    def _write(self, step: int, entries: dict[str, Any]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **entries}) + "\n"
        with self.path.open("a+b") as handle:
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                line = line if handle.read(1) == b"\n" else f"\n{line}"  # behind one that a full disk cut short
            handle.write(line.encode())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress(TrainerCallback):
    """A live line on a terminal, plain lines elsewhere; both on stderr."""

    def __init__(self, tokens_per_step: float) -> None:
        self.tokens_per_step = tokens_per_step
        self.bar: Any = None
        self.started = 0.0
        self.first_step = 0

    def start(self) -> None:
        """Nothing to open before training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(8),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=Console(stderr=True), transient=False)
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
            self.bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = max(time.monotonic() - self.started, 1e-9)
        speed = (state.global_step - self.first_step) * self.tokens_per_step / seconds
        shown = {key: name for key, name in SHOWN.items() if key in logs}
        if "rewards/margins" in shown:  # the line has to fit into a terminal
            shown.pop("mean_token_accuracy", None)
        numbers = [f"{name} {logs[key]:.3f}" for key, name in shown.items()]
        text = "  ".join([*numbers, f"{speed:,.0f} tokens/s"])
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, numbers=text)
        else:
            left = seconds / max(state.global_step - self.first_step, 1) * (state.max_steps - state.global_step)
            with contextlib.suppress(OSError):  # nobody reads any more: no reason to stop training
                sys.stderr.write(f"step {state.global_step}/{state.max_steps}  {text}  {left / 60:.1f} min left\n")

    def finish(self) -> None:
        """Takes the live line away, so that the terminal is as it was however the run ended."""
        if self.bar:
            self.bar.stop()


class StepClock(TrainerCallback):
    """Counts the seconds of optimizer steps; what comes between them (saving, evaluating, the reference phase) is left out."""

    def __init__(self) -> None:
        self.seconds = self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.monotonic() - self.started


class ScoreReference(TrainerCallback):
    """Has the reference scored after the first step, so that a run that cannot train says so before that.

    A resumed run, whose first step is not the run's first, has it scored before. A request to stop ends the phase; what it
    had is computed again by the resumed run.

    Args:
        score: scores the reference; False where it was stopped.
        progress: its clock leaves the phase out.
        request: of the signals.
    """

    def __init__(self, score: Callable[[], bool], progress: Progress | None, request: StopRequest) -> None:
        self.score, self.progress, self.request = score, progress, request
        self.is_due = True

    def _once(self) -> bool:
        started = time.monotonic()
        self.is_due = False
        complete = self.score()
        if self.progress:
            self.progress.started += time.monotonic() - started
        return complete

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and not self._once():
            _share(self.request, args)
            raise self.request.interrupted(f"interrupted: step {state.global_step} is saved, no adapter was exported")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_due and not control.should_training_stop and not self._once():
            _share(self.request, args)
            control.should_save = True
            control.should_training_stop = True


class Commit(TrainerCallback):
    """Commits each checkpoint after the trainer has written it, then removes the oldest ones."""

    def __init__(self, identity: dict[str, Any], metadata: dict[str, str], keep: int) -> None:
        self.identity, self.metadata, self.keep = identity, metadata, keep

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed trainer takes these from its checkpoint, whatever it was told.
        state.save_steps, state.logging_steps, state.eval_steps = args.save_steps, args.logging_steps, args.eval_steps

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its own random state into the checkpoint
        if state.is_world_process_zero:
            directory = Path(args.output_dir)
            checkpoints.commit(directory / f"checkpoint-{state.global_step}", self.identity, self.metadata)
            checkpoints.rotate(directory, self.keep)


class FiniteGuard(TrainerCallback):
    """Stops the run in the step in which a loss, a gradient, a weight or the optimizer's state is not a finite number.

    Args:
        losses: of the step's batches, each a scalar.
        last_checkpoint: says which one is the last good one.
    """

    def __init__(self, losses: Callable[[], Sequence[torch.Tensor]], last_checkpoint: Callable[[], str]) -> None:
        self.losses, self.last_checkpoint = losses, last_checkpoint

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._check(state.global_step + 1, "the loss", self.losses())
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._check(state.global_step + 1, "a gradient", gradients)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._check(state.global_step, "a weight", weights)
        moments = [moment for each in optimizer.state.values() for moment in each.values()]
        self._check(state.global_step, "the optimizer's state", moments)

    def _check(self, step: int, what: str, tensors: Sequence[Any]) -> None:
        found = [each.detach() for each in tensors if isinstance(each, torch.Tensor) and each.is_floating_point()]
        if not found:
            return
        # A sum is finite only where all of its terms are; one number for all tensors is one wait for the device.
        sums = torch.stack([each.sum().to(found[0].device, torch.float32) for each in found])
        if not math.isfinite(float(sums.sum())):
            raise TrainingError(
                f"{what} is not a finite number at step {step}",
                why=f"nothing was exported; {self.last_checkpoint()}",
                fix="lower --learning_rate, or look at the rows with `politune inspect-data`",
            )


class WarnOfDivergence(TrainerCallback):
    """Tells of what goes wrong though every number is finite (`training.divergence`), each kind once in a run.

    Args:
        longer: the share of pairs whose chosen text is the longer one.
        log: remembers what was told, over resumptions.
        say: takes the warning as a line of progress.
        others: trackers, which take it too.
    """

    def __init__(self, longer: float, log: JsonLog, say: Callable[[str], None], others: Sequence[Any]) -> None:
        self.longer, self.log, self.say, self.others = longer, log, say, others
        self.told: set[str] = set()
        self.lines: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told = set(self.log.warnings())
        self.lines = [line for line in state.log_history if "loss" in line]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        self.lines.append(dict(logs or {}))
        for kind, text in divergence.signs(self.lines, self.longer):
            if kind not in self.told:
                self.told.add(kind)
                self.say(f"warning at step {state.global_step}: {text}")
                for each in (self.log, *self.others):
                    each.warn(state.global_step, kind, text)


class Rehearse(TrainerCallback):
    """Has the longest rows computed before the first step: a run that does not fit into memory says so at once.

    Args:
        rehearse: computes them.
    """

    def __init__(self, rehearse: Callable[[], object]) -> None:
        self.rehearse = rehearse

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rehearse()


class StopOnSignal(TrainerCallback):
    """Saves and ends training at the next step's end once a signal came."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.request.inside_training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _share(self.request, args)
        if self.request.signal_number is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.request.inside_training = False


def _share(request: StopRequest, args: Any) -> None:
    """A signal reaches the processes at different moments, or only one of them; they stop after the same step."""
    if torch.distributed.is_initialized():
        number = torch.tensor(request.signal_number or 0, device=args.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        request.signal_number = int(number) or None


class MeasureLean(TrainerCallback):
    """Measures the lean every so many steps and logs its shift; the model, its mode and the random state stay as they were.

    Args:
        every: optimizer steps.
        measure: measures and logs.
        request: of the signals; a stop is not kept waiting.
    """

    def __init__(self, every: int, measure: Callable[[], None], request: StopRequest) -> None:
        self.every, self.measure, self.request = every, measure, request

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every or self.request.signal_number is not None:
            return
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.random.fork_rng():
                self.measure()
        finally:
            for module, is_training in modes:
                module.training = is_training
