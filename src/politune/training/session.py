"""The heavy part of a run: model, trainer, callbacks, evaluation, export."""

import itertools
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from politune import plan, record
from politune.config import Run
from politune.data import format as rows_format
from politune.data.build import public as public_recipe
from politune.errors import ConfigError, ModelError, PolituneError, TrainingError, safe
from politune.lean.midway import Midway
from politune.models import files, load, seal
from politune.presets import flatten, toml_value
from politune.progress import Phase
from politune.training import callbacks, checkpoints, divergence, reference, trackers, trainer_factory
from politune.training.identity import CALL_TOKENS
from politune.training.outcome import TrainReport, draw_curves, draw_leans, named
from politune.training.prepare import Prepared, hash_tokens
from politune.training.processes import is_main_process, world_size
from politune.training.signals import StopRequest

CHANGED = "adapter-changed-"
"""How the names of adapters begin that have been exported again, each with its number."""
REHEARSAL_SHARE = 0.01
"""Of a run's tokens, at most so many are computed once more beforehand, to see whether the longest rows fit."""
_SHARDED = ("DistributedType.FSDP", "DistributedType.DEEPSPEED")


class Session:
    """A model in its trainer, from loading to export.

    Args:
        identity: what a resumed run must share (see `training.identity`); stands in every checkpoint.
        metadata: the disclosure; stands in every checkpoint and in the adapter.
    """

    def __init__(
        self,
        run: Run,
        prepared: Prepared,
        directory: Path,
        identity: dict[str, Any],
        metadata: dict[str, str],
        stop: StopRequest,
        say: Callable[[str], None],
        quiet: bool = False,
    ) -> None:
        self.run, self.prepared, self.directory, self.stop, self.say = run, prepared, directory, stop, say
        self.metadata, self.quiet = metadata, quiet
        self.first_step = 0
        self.seconds = self.reference_seconds = 0.0
        self.evaluation = callbacks.EvaluationName()
        self.log = callbacks.JsonLog(directory / "log.jsonl", self.evaluation)
        # An `accelerate config` on this machine must not change what a run computes in.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if trainer_factory.computes_in_bf16(run) else "no"
        config = trainer_factory.trl_config(run, directory / "checkpoints")
        self.watchers = self._watchers() if is_main_process() else []
        for tracker in self.watchers:
            tracker.start()
        say(f"loading {safe(prepared.base.name)}")
        model = load.load_model(prepared.base, bf16=run.model.bf16, use_4bit=run.model.use_4bit)
        _check_modules(model, run)
        rows = trainer_factory.TrainingRows(rows_format.to_trl(prepared.train), rows_format.to_trl(prepared.validation))
        self.started = time.monotonic()
        self.clock = callbacks.StepClock()
        everywhere = [
            self.clock,  # first of all: what others do after a step is no part of it
            callbacks.Commit(identity, metadata, run.train.save_total_limit),
            callbacks.StopOnSignal(stop),
            callbacks.FiniteGuard(lambda: self.trainer.losses, self._last_checkpoint),
            callbacks.Rehearse(lambda: trainer_factory.rehearse(self.trainer, self._rehearsal_tokens)),
        ]
        self.trainer = trainer_factory.build(
            run, config, model, prepared.tokenizer, rows, [*everywhere, *self._logs(), *self.watchers]
        )
        self._pack(identity[CALL_TOKENS])
        self._keep_reference(identity)
        if run.tracking.measure_every:
            self._measure_on_the_way(run.tracking.measure_every)

    @property
    def _rehearsal_tokens(self) -> float:
        """What a dry pass may take: a shorter run meets its longest rows soon enough."""
        _, steps = plan.count_optimizer_steps(self.run, len(self.prepared.train), world_size())
        return REHEARSAL_SHARE * self.tokens_per_step / world_size() * steps

    def _measure_on_the_way(self, every: int) -> None:
        if str(self.trainer.accelerator.distributed_type) in _SHARDED:
            raise ConfigError(
                "one process alone cannot measure a model whose weights are shared out over several",
                where="tracking.measure_every",
                fix="leave it out, and measure the run when it is done",
            )
        if not is_main_process():
            return
        on_the_way = Midway(
            self.prepared.tokenizer, say=self.say, is_stopped=lambda: self.stop.signal_number is not None
        )

        def measure() -> None:
            try:
                with trainer_factory.unpacked(self.trainer) as model:
                    found = on_the_way.measure(model)
            except PolituneError as error:  # no reason to stop training, which has guards of its own
                self.say(f"the lean was not measured at step {self.trainer.state.global_step}: {error}")
            else:
                if found:
                    trainer_factory.log_apart(self.trainer, found)

        self.trainer.add_callback(callbacks.MeasureLean(every, measure, self.stop))

    def _pack(self, tokens_per_call: int | None) -> None:
        """Packs the rows of every forward pass, or says why not."""
        if self.run.train.packing == "off":
            return
        tokens = tokens_per_call or plan.TOKENS_PER_CALL
        if reason := trainer_factory.use_packed_rows(self.trainer, self.run, tokens):
            self.say(f"rows are padded, not packed: {safe(reason, 300)}")

    def _keep_reference(self, identity: dict[str, Any]) -> None:
        """Gives DPO a place for its reference's log-probabilities, and has them computed once where they are used again."""
        trainer = self.trainer
        if not self._scores_reference:
            return
        kept = self._rows_seen_again()
        layout = {
            "packed tokens": trainer.packed.tokens_per_call if trainer.packed else None,
            "rows": self.run.train.per_device_train_batch_size,
            "kept": [kept.start, kept.stop],
            "sha256 of the validation tokens": hash_tokens(self.prepared.validation),
        }
        rows = len(self.prepared.train) + len(self.prepared.validation)
        path, key = self.directory / reference.FILE, reference.key_of(identity, layout)
        trainer.reference = reference.ReferenceScores(path, key, rows, kept)
        if not trainer.reference.is_complete:
            progress = next((each for each in self.watchers if isinstance(each, callbacks.Progress)), None)
            trainer.add_callback(callbacks.ScoreReference(self._score_reference, progress, self.stop))

    def _rows_seen_again(self) -> range:
        """The numbers of the rows that the run takes more than once: training rows, then validation rows."""
        train, validation = len(self.prepared.train), len(self.prepared.validation)
        per_epoch, steps = plan.count_optimizer_steps(self.run, train, world_size())
        every = self.run.train.eval_steps
        evaluated_again = bool(every) and steps >= every
        return range(0 if steps > per_epoch else train, train + validation if evaluated_again else train)

    def _score_reference(self) -> bool:
        """The reference phase: its own lines of progress, its own seconds; False where a signal ended it."""
        started, trainer = time.monotonic(), self.trainer
        kept = trainer.reference.kept
        self.say(f"computing the reference's log-probabilities of {len(kept)} rows, once for the whole run")
        progress = Phase("reference", "rows", self.say)
        complete: bool = trainer.score_reference(progress, lambda: self.stop.signal_number is not None)
        if complete and is_main_process() and (flaw := trainer.reference.save()):
            self.say(f"they are not kept, a resumed run computes them again: {safe(flaw)}")
        self.reference_seconds = time.monotonic() - started
        return complete

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        for watcher in self.watchers:
            watcher.finish()

    def hand_over(self) -> list[Any]:
        """The trackers, still open, for what is logged when the model is gone: the caller finishes them."""
        given = self._trackers()
        self.watchers = [each for each in self.watchers if each not in given]
        return given

    def _logs(self) -> list[Any]:
        """What reads the log, in the first process; the log itself comes before what reads it."""
        if not is_main_process():
            return []
        longer = divergence.share_of_longer([row.completions for row in self.prepared.train])
        return [self.log, callbacks.WarnOfDivergence(longer, self.log, self.say, self._trackers())]

    def _trackers(self) -> list[Any]:
        return [each for each in self.watchers if not isinstance(each, callbacks.Progress)]

    def _watchers(self) -> list[Any]:
        """The live progress and the trackers: what has to be opened and, however the run ends, closed."""
        wanted = self.run.tracking.trackers
        made: list[Any] = [] if self.quiet else [callbacks.Progress(self.tokens_per_step)]
        if "wandb" in wanted:
            made.append(trackers.WandbLog(self.run, self._public_settings(), self.directory, self.evaluation))
        if "tensorboard" in wanted:
            made.append(trackers.TensorBoardLog(self.directory / "tensorboard", self.evaluation))
        return made

    def _public_settings(self) -> dict[str, Any]:
        """The run's settings without a path of this machine."""
        settings = {key: list(v) if isinstance(v, tuple) else v for key, v in flatten(self.run).items()}
        public = {
            "model.model_name_or_path": self.prepared.base.public_name,
            "data.dataset_name": self.prepared.table.name,
        }
        if self.run.data.recipe:
            public["data.recipe"] = toml_value(public_recipe(self.run.data.recipe))
        return {**settings, **public, "train.output_dir": self.directory.name}

    @property
    def tokens_per_step(self) -> float:
        """Tokens of an average optimizer step, over all processes, without padding."""
        rows = self.run.train.per_device_train_batch_size * self.run.train.gradient_accumulation_steps * world_size()
        return self.prepared.tokens / len(self.prepared.train) * min(rows, len(self.prepared.train))

    def _last_checkpoint(self) -> str:
        found = checkpoints.newest(self.directory / "checkpoints")
        return f"the last good checkpoint is {safe(found)}" if found else "there is no checkpoint before it"

    def train(self, checkpoint: Path | None, steps: int | None) -> None:
        """Runs the trainer's loop from a checkpoint or from the start.

        Args:
            steps: optimizer steps of the whole run, where known: a checkpoint of the last one needs no training.

        Raises:
            Interrupted: a signal came; the step is saved.
            ModelError: the checkpoint holds what no run like this one writes.
            TrainingError: not a finite number, or out of memory.
        """
        from transformers import set_seed

        if checkpoint:
            self.first_step = checkpoints.step_of(checkpoint)
            self.say(f"resuming from {checkpoint.name}")
            if self.first_step == steps:
                self._take_adapter(checkpoint)
                return
            if self.trainer.accelerator.scaler is None and (checkpoint / "scaler.pt").exists():
                raise ModelError(
                    f"{checkpoint.name} holds a scaler.pt, which no run without --fp16 writes",
                    fix="take no checkpoints from somebody whom you do not trust",
                )
        set_seed(self.run.train.seed)
        self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.seconds = time.monotonic() - self.started
        state = self.trainer.state
        step = f"step {state.global_step} of {state.max_steps}"
        if self.stop.signal_number is not None:
            raise self.stop.interrupted(f"interrupted: {step} is saved, no adapter was exported")
        if state.global_step != state.max_steps:
            raise TrainingError(
                f"training ended after {step}", why="no adapter was exported", fix="go on with --resume"
            )

    def _take_adapter(self, checkpoint: Path) -> None:
        """Training was over when the run ended: the last checkpoint's adapter is the result."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file
        from transformers import TrainerState

        set_peft_model_state_dict(self.trainer.model, load_file(checkpoint / "adapter_model.safetensors"))
        self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def evaluate(self, rows: list[Any], name: str) -> dict[str, float]:
        """The metrics over rows that are no part of training, logged under `name`; empty for no rows."""
        if not rows:
            return {}
        self.say(f"evaluating {len(rows)} {name} rows")
        self.evaluation.current = name
        rows_per_pass = self.run.train.per_device_train_batch_size * world_size()
        numbered = len(self.prepared.train) if rows is self.prepared.validation else None
        return named(trainer_factory.evaluate(self.trainer, rows_format.to_trl(rows), rows_per_pass, numbered))

    def export(self) -> Path:
        """Writes `adapter/` in one rename: weights with their disclosure, config with the base, tokenizer, model card.

        Raises:
            TrainingError: the adapter is not finite or did not move; it is not exported.
            OutputError: the disk is full or not writable.
        """
        adapter = self.directory / "adapter"
        if not is_main_process():
            return adapter
        model, base = self.trainer.accelerator.unwrap_model(self.trainer.model), self.prepared.base
        config = model.peft_config["default"]
        config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
        config.base_model_name_or_path, config.revision = base.hub_id or base.public_name, base.commit
        # A resumed run may find the adapter of an attempt that ended between its export and its last line.
        shutil.rmtree(adapter, ignore_errors=True)
        with files.staged(adapter) as staging:
            model.save_pretrained(staging, save_embedding_layers=False)
            self.prepared.tokenizer.save_pretrained(staging)
            weights = staging / "adapter_model.safetensors"
            _check_adapter(weights)
            files.rewrite_metadata(weights, self.metadata)
            (staging / "README.md").write_text(record.model_card(self.metadata, "adapter"), encoding="utf-8")
            seal.seal(staging, {})
        return adapter

    def export_again(self) -> None:
        """As `export`, for a finished run whose adapter has changed: that one is kept beside, and its card in the new one."""
        adapter = self.directory / "adapter"
        if not is_main_process():
            return
        card = None
        if adapter.is_dir():
            taken = {path.name for path in self.directory.iterdir()}
            name = next(each for number in itertools.count(1) if (each := f"{CHANGED}{number}") not in taken)
            card = adapter.rename(self.directory / name) / seal.CARD
            self.say(f"what was there is in {name}/")
        self.export()
        if card and card.is_file():
            shutil.copyfile(card, adapter / seal.CARD)

    def report(self, validation: dict[str, float], heldout: dict[str, float]) -> TrainReport:
        """Sums the run up, and remembers its speed for later plans."""
        state = self.trainer.state
        done = state.global_step - self.first_step
        machine = plan.probe(self.directory)
        rate = self._rate(done, machine.device)
        # A resumed run that found its reference does not know how long that takes.
        if rate and is_main_process() and (rate.reference_tokens_per_second or not self._scores_reference):
            plan.remember_rate(self.run, machine, rate, processes=world_size())
        logged = [line for line in state.log_history if "loss" in line]
        return TrainReport(
            method=self.run.method,
            direction=self.metadata["politune.direction"],
            output_dir=str(self.directory),
            adapter=str(self.directory / "adapter"),
            optimizer_steps=state.global_step,
            steps_done_now=done,
            rows=len(self.prepared.train),
            left_out={reason: count for reason, count in self.prepared.counts.items() if count},
            tokens_per_second=round(rate.tokens_per_second, 1) if rate else 0.0,
            minutes=round(self.seconds / 60, 2),
            reference_seconds=round(self.reference_seconds, 2),
            peak_bytes=_peak_bytes(),
            training=named(logged[-1]) if logged else {},
            validation=validation,
            heldout=heldout,
            heldout_rows=len(self.prepared.heldout),
            warnings=tuple(self.log.warnings().values()),
            curves=(*draw_curves(logged), *draw_leans(state.log_history)),
            sync_command=next(
                (each.sync_command for each in self.watchers if isinstance(each, trackers.WandbLog)), None
            ),
            disclosure=self.metadata["politune.disclosure"],
        )

    @property
    def _scores_reference(self) -> bool:
        """Whether the run scores DPO's reference apart from its steps."""
        return self.run.method == "dpo" and bool(self.trainer.precompute_ref_logps)

    def _rate(self, steps: int, device: str) -> plan.Rate | None:
        """How fast this run was, over the steps that it did now; None where it did none."""
        inside = getattr(self.trainer, "reference_seconds", 0.0)
        seconds = self.clock.seconds - inside
        if not steps or seconds <= 0:
            return None
        row = self.prepared.tokens / len(self.prepared.train)
        in_phase = len(self.trainer.reference.kept) * row if self.reference_seconds else 0.0
        scoring = self.reference_seconds or inside
        return plan.Rate(
            tokens_per_second=steps * self.tokens_per_step / seconds,
            reference_tokens_per_second=(in_phase or steps * self.tokens_per_step) / scoring if scoring else None,
            row_tokens=row,
            measured=plan.today(),
            source="run",
            device=device,
        )


def _check_adapter(path: Path) -> None:
    """An adapter that is not a number, or that never left its initial zeros, is not exported."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise TrainingError(f"{safe(broken[0])} holds values that are not finite", why="the adapter was not exported")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name):
        raise TrainingError(
            "the adapter did not move: every lora_B weight is still zero",
            why="it was not exported",
            fix="check --learning_rate, --warmup_steps and --max_steps",
        )


def _check_modules(model: Any, run: Run) -> None:
    """PEFT takes the target modules that it finds and is silent about the others."""
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := sorted(set(run.lora.lora_target_modules) - found - {"all-linear"}):
        raise ConfigError(f"the model has no layer {safe(missing[0])}", where="lora.lora_target_modules")


def _peak_bytes() -> int:
    """The most memory that the run held: of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
