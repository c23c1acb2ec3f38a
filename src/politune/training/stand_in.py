"""Some steps of a run on a stand-in of its model, for their time: `python -m politune.training.stand_in DIRECTORY`.

The stand-in has the model's architecture and sizes, but random weights and few layers. Every other step goes through a part of
them only: the difference is what a layer takes, and the rest (output layer, loss, optimizer) stays the same, so the time with
all of the model's layers follows from both. Whatever the machine's other work changes meets both kinds of steps alike.

DIRECTORY holds `asked.json` (`plan.calibration` writes it) and gets `measured.json`.
"""

# ruff: noqa: E402 - what refuses code from the Hub comes before the libraries

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from politune.models import hub_code

hub_code.refuse()

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from politune.config import DpoRun, Run, SftRun
from politune.models import load
from politune.models.quiet import quiet_libraries
from politune.training import trainer_factory
from politune.training.reference import ReferenceScores

BUDGET_SECONDS = 8.0
"""After so much training no further pair of steps begins."""
FEWEST_PAIRS, MOST_PAIRS = 2, 8
MOST_LAYERS = 8
MOST_LAYER_WEIGHTS = 100_000_000
FEWEST_LAYERS = 3
REFERENCE_PAIRS = 2


def measure(asked: dict[str, Any], directory: Path) -> dict[str, float | None]:
    """Seconds of a step, and of the reference's scores of a step's rows (None for SFT).

    Args:
        asked: `method`, `run`, `config` (the model's config.json), `rows` (lengths: prompt, then each completion) and
            `tokens_per_call` (None: rows are padded).
        directory: for what the libraries write.
    """
    lengths = asked["rows"]
    run = _one_step_an_epoch(asked, len(lengths), directory)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if trainer_factory.computes_in_bf16(run) else "no"
    model, layers = _model(asked["config"], run, directory)
    config = trainer_factory.trl_config(run, directory / "checkpoints")
    config.save_strategy = "no"
    halving = _Layers(model)
    rows = trainer_factory.TrainingRows(_rows(run, lengths, model.config.vocab_size), [])
    trainer = trainer_factory.build(run, config, model, _tokenizer(), rows, [_Clock(halving)])
    if asked["tokens_per_call"] is not None:
        trainer_factory.use_packed_rows(trainer, run, asked["tokens_per_call"])
    if run.method == "dpo":
        trainer.reference = ReferenceScores(directory / "reference", "stand-in", len(lengths), range(len(lengths)))
        trainer.reference.values.zero_()
    trainer.train()
    clock = next(each for each in trainer.callback_handler.callbacks if isinstance(each, _Clock))
    measured: dict[str, float | None] = {"step_seconds": halving.extrapolate(clock.whole, clock.part, layers)}
    measured["reference_seconds"] = _reference_seconds(trainer, halving, layers) if run.method == "dpo" else None
    return measured


def _one_step_an_epoch(asked: dict[str, Any], rows: int, directory: Path) -> Run:
    run: Run = (DpoRun if asked["method"] == "dpo" else SftRun).model_validate(asked["run"])
    batch = min(run.train.per_device_train_batch_size, rows)
    changed = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": rows // batch,
        "max_steps": 2 + 2 * MOST_PAIRS,
        "warmup_steps": 0,
        "eval_steps": 0,
        "output_dir": str(directory),
    }
    return run.model_copy(update={"train": run.train.model_copy(update=changed)})


def _model(config: dict[str, Any], run: Run, directory: Path) -> tuple[Any, int]:
    """A model with few of its layers, and how many it really has."""
    sizes = dict(config.get("text_config") or config)
    layers = int(sizes["num_hidden_layers"])
    weights = sizes["hidden_size"] * (3 * sizes["intermediate_size"] + 4 * sizes["hidden_size"])
    few = min(layers, MOST_LAYERS if weights * MOST_LAYERS <= MOST_LAYER_WEIGHTS else FEWEST_LAYERS)
    sizes["num_hidden_layers"] = few
    if sizes.get("layer_types"):
        sizes["layer_types"] = sizes["layer_types"][:few]
    # What config.json asks for beside sizes may name code elsewhere: the library's own choice, as in `load.load_model`.
    for name in ("quantization_config", "attn_implementation", "_attn_implementation", "auto_map"):
        sizes.pop(name, None)
    dtype = torch.bfloat16 if run.model.bf16 else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes), dtype=dtype)
    if run.model.use_4bit:
        model.save_pretrained(directory / "model")
        base = load.ResolvedModel("stand-in", directory / "model", None, {}, None)
        return load.load_model(base, bf16=run.model.bf16, use_4bit=True), layers
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), layers


def _tokenizer() -> PreTrainedTokenizerFast:
    """Rows come as token ids: only the padding token is asked for."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _rows(run: Run, lengths: list[list[int]], vocabulary: int) -> list[dict[str, list[int]]]:
    chance = random.Random(0)

    def ids(count: int) -> list[int]:
        return [chance.randrange(2, vocabulary) for _ in range(count)]

    if run.method == "dpo":
        return [
            {"prompt_ids": ids(prompt), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected)}
            for prompt, chosen, rejected in lengths
        ]
    rows = ((ids(prompt), ids(completion)) for prompt, completion in lengths)
    return [{"input_ids": prompt + side, "labels": [-100] * len(prompt) + side} for prompt, side in rows]


class _Layers:
    """A model's layers, all of them or a part."""

    def __init__(self, model: Any) -> None:
        self.backbone = model.model
        self.all = list(self.backbone.layers)
        self.part = max(1, len(self.all) // 4)

    def use(self, *, whole: bool) -> None:
        """Lets the model consist of all layers, or of a part."""
        self.backbone.layers = torch.nn.ModuleList(self.all if whole else self.all[: self.part])

    def extrapolate(self, whole: list[float], part: list[float], layers: int) -> float:
        """Seconds with that many layers, from those with all of these and with a part of them."""
        longer, shorter = statistics.median(whole), statistics.median(part)
        if len(self.all) == self.part:
            return longer * layers / self.part
        layer = max(0.0, longer - shorter) / (len(self.all) - self.part)
        return longer + layer * (layers - len(self.all))


class _Clock(TrainerCallback):
    """Times whole steps and steps of a part of the layers in turn; the first of each kind is not counted."""

    def __init__(self, layers: _Layers) -> None:
        self.layers = layers
        self.whole: list[float] = []
        self.part: list[float] = []
        self.steps = 0
        self.started = self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = _now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = _now() - self.started
        was_whole = self.steps % 2 == 0
        if self.steps > 1:
            (self.whole if was_whole else self.part).append(seconds)
        self.steps += 1
        self.layers.use(whole=not was_whole)
        is_late = _now() - self.began > BUDGET_SECONDS
        if not was_whole and is_late and len(self.part) >= FEWEST_PAIRS:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.layers.use(whole=True)


def _reference_seconds(trainer: Any, layers: _Layers, of_layers: int) -> float:
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(REFERENCE_PAIRS):
        for whole in (True, False):
            layers.use(whole=whole)
            started = _now()
            trainer.score_reference(lambda done, rows: None, lambda: False)
            times[whole].append(_now() - started)
    return layers.extrapolate([min(times[True])], [min(times[False])], of_layers)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(directory: Path) -> None:
    """Measures what the directory asks for."""
    asked = json.loads((directory / "asked.json").read_text(encoding="utf-8"))
    with quiet_libraries():
        measured = measure(asked, directory)
    (directory / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
