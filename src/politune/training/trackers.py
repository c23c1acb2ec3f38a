"""Weights & Biases and TensorBoard, fed by politune itself.

The integrations of transformers send every trainer argument and the model's config; these send the metrics and what the caller
passes, nothing of the environment.
"""

import os
import secrets
import shlex
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from politune.config import Run
from politune.doctor import knows_wandb
from politune.errors import MachineError, safe
from politune.models.files import REFUSALS
from politune.training.callbacks import EvaluationName
from politune.writing import write_whole


class WandbLog(TrainerCallback):
    """Metrics to Weights & Biases; the run's settings are its config."""

    def __init__(self, run: Run, settings: dict[str, Any], directory: Path, evaluation: EvaluationName) -> None:
        self.run_spec, self.settings, self.directory, self.evaluation = run, settings, directory, evaluation
        self.wandb_run: Any = None

    def start(self) -> None:
        """Opens the run, before anything expensive.

        Raises:
            MachineError: the client refuses a name, a key or a mode, or the server cannot be reached.
        """
        import wandb

        try:
            self._open(wandb)
        except (wandb.errors.Error, ValueError, TypeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in REFUSALS:
                raise  # the disk's, not the client's
            fix = "log in with `wandb login`, set WANDB_MODE=offline, or leave --use_wandb out"
            raise MachineError(
                f"Weights & Biases refuses the run: {safe(error)}", line="Weights & Biases login", fix=fix
            ) from error

    def _open(self, wandb: Any) -> None:
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True,
            x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        mode = wandb_mode()
        self.wandb_run = wandb.init(
            id=_run_id(self.directory),
            resume=None
            if mode == "offline"
            else "allow",  # a resumed run goes on in its own one; offline the id alone says so
            project=self.run_spec.tracking.wandb_project,
            name=self.run_spec.tracking.wandb_run_name or Path(self.run_spec.train.output_dir).name,
            config=self.settings,
            dir=str(self.directory),
            mode=mode,
            settings=quiet,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.wandb_run is not None:
            self.wandb_run.log(self.evaluation.rename(logs), step=state.global_step)

    def warn(self, step: int, kind: str, text: str) -> None:
        """Into the run's summary, and as an alert."""
        if self.wandb_run is not None:
            self.wandb_run.summary[f"warnings/{kind}"] = f"step {step}: {text}"
            self.wandb_run.alert(title=f"politune: {kind}", text=f"step {step}: {text}")

    @property
    def sync_command(self) -> str | None:
        """The command that uploads the run where it is kept offline: all of its parts, one for each time it was resumed."""
        if self.wandb_run is None or self.wandb_run.settings.mode != "offline":
            return None
        return f"wandb sync {shlex.quote(str(self.directory / 'wandb'))}/offline-run-*-{self.wandb_run.id}"

    def finish(self) -> None:
        """Ends the run on Weights & Biases, and the client's own process, which writes for a while after the run's end."""
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.finish()
            self.wandb_run = None
            wandb.teardown()


def _run_id(directory: Path) -> str:
    """The run's name for Weights & Biases, made up once and kept with the run."""
    path = directory / "wandb" / "politune-id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


def wandb_mode() -> Any:
    """What `WANDB_MODE` asks for, else online where a key is known for the server, else offline."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or knows_wandb() else "offline"


class TensorBoardLog(TrainerCallback):
    """Scalars to TensorBoard event files in the run directory."""

    def __init__(self, directory: Path, evaluation: EvaluationName) -> None:
        self.directory, self.evaluation = directory, evaluation
        self.writer: Any = None

    def start(self) -> None:
        """Opens the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for key, value in self.evaluation.rename(logs).items():
            if isinstance(value, int | float):
                self.writer.add_scalar(key, value, state.global_step)
        self.writer.flush()

    def warn(self, step: int, kind: str, text: str) -> None:
        """As a text."""
        self.writer.add_text(f"warnings/{kind}", text, step)
        self.writer.flush()

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()
