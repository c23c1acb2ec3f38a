"""What `speed.py` measures, each command in a process of its own so that its peak memory is its own.

    python benchmarks/arms.py trl      one run of TRL's DPOTrainer: `--recipe original` or `--recipe best`
    python benchmarks/arms.py profile  one epoch of politune, through its own code, under torch's profiler
    python benchmarks/arms.py peak     what plain matrix products reach on this machine now
    python benchmarks/arms.py model    a Llama-shaped model with random weights and the demo model's tokenizer

politune itself is measured as the command that users type; `settings` gives it and TRL the same recipe.
Each command writes one JSON document to `--out`.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

RANK = 16
REFERENCE_EPOCHS = 4  # of the original recipe: so many epochs share one reference pass
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEAK_SIDE = 2048

# The demo model is SmolLM2 135M; 360M is its larger sister's shape, 30M one of the same proportions.
SHAPES = {
    "30M": (384, 1024, 8, 6, 2),
    "135M": (576, 1536, 30, 9, 3),
    "360M": (960, 2560, 32, 15, 5),
}

# Self time of the profiler's operations by the first group whose word is part of the name.
OPERATIONS = {
    "attention": ("attention",),
    "softmax and log-softmax": ("softmax", "logsumexp", "cross_entropy", "nll_loss"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "mkldnn"),
    "optimizer": ("adam", "optimizer", "foreach", "clip_grad"),
    "copies, gathers and fills": (
        "copy", "clone", "cat", "fill_", "zero", "index", "gather", "scatter", "embedding", "contiguous", "pad", "ones",
    ),
    "element-wise": (
        "aten::mul", "aten::add", "aten::sub", "aten::rsub", "aten::div", "silu", "sigmoid", "aten::pow", "sqrt", "aten::mean",
        "aten::sum", "aten::neg", "aten::exp", "where", "aten::cos", "aten::sin", "aten::square", "rms_norm", "aten::isfinite",
    ),
}  # fmt: skip


def settings(batch: int, accumulation: int, epochs: int, max_length: int) -> dict[str, Any]:
    """The recipe that all arms share, under names that politune's flags and TRL's config have in common."""
    return {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
        "max_length": max_length,
        "learning_rate": 5e-4,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "seed": 42,
        "beta": 0.1,
    }


def politune_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The same recipe as politune's settings."""
    return {
        "model_name_or_path": str(options.model),
        "dataset_name": str(options.rows),
        "on_overlength": "error",
        "bf16": options.dtype == "bf16",
        "lora_r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "lora_target_modules": MODULES,
        "gradient_checkpointing": False,
        **settings(options.batch, options.accumulation, options.epochs, options.max_length),
    }


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    """TRL's DPOTrainer.

    `original` loads a second model as the reference, asks it in each step, and recomputes activations. `best` takes the
    reference from the model with its adapter off, once before training, and keeps the activations.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    original, bf16 = options.recipe == "original", options.dtype == "bf16"
    times: list[float] = []
    reference = [0.0]

    class StepTimes(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                times.append(time.time())

    class Timed(DPOTrainer):  # type: ignore[misc]
        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            started = time.perf_counter()
            done = super()._precompute_ref_logps(*arguments)
            reference[0] += time.perf_counter() - started
            return done

    def load() -> Any:
        dtype = torch.bfloat16 if bf16 else torch.float32
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa")

    config = DPOConfig(
        output_dir=str(options.out.with_suffix(".trl")),
        bf16=bf16,
        use_cpu=True,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        precompute_ref_log_probs=not original,
        gradient_checkpointing=original,
        gradient_checkpointing_kwargs={"use_reentrant": False} if original else None,
        **settings(options.batch, options.accumulation, options.epochs, options.max_length),
    )
    trainer = Timed(
        model=load(),
        ref_model=load() if original else None,
        args=config,
        # From a list, so that no reference values of a former run are found in a cache.
        train_dataset=Dataset.from_list([_conversation(line) for line in options.rows.read_text("utf-8").splitlines()]),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=list(MODULES), task_type="CAUSAL_LM"
        ),
        callbacks=[StepTimes()],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"times": times, "reference_seconds": reference[0], "losses": losses, "threads": torch.get_num_threads()}


def _conversation(line: str) -> dict[str, list[dict[str, str]]]:
    """A row as politune hands it to TRL."""
    row = json.loads(line)
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def run_profile(options: argparse.Namespace) -> dict[str, Any]:
    """`politune train dpo` in this process, its session's training under the profiler: seconds of self time by group."""
    from torch.profiler import ProfilerActivity, profile

    from politune import presets
    from politune.config import GROUPS, DpoRun
    from politune.training import run, session
    from politune.training.signals import caught

    values = {**politune_settings(options), "output_dir": str(options.out.with_suffix(".run"))}
    fields: Any = DpoRun.model_fields
    groups = {name: group for group in GROUPS for name in fields[group].annotation.model_fields}
    resolved = presets.resolve("dpo", flags={f"{groups[name]}.{name}": value for name, value in values.items()})
    measured: dict[str, Any] = {}
    session_type: Any = session.Session
    train = session_type.train

    def profiled(self: Any, *arguments: Any) -> None:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train(self, *arguments)
        averages = profiler.key_averages()
        measured["groups"] = _grouped([(event.key, event.self_cpu_time_total / 1e6) for event in averages])
        measured["operations"] = sorted(
            ([event.key, event.self_cpu_time_total / 1e6] for event in averages), key=lambda pair: -pair[1]
        )[:40]

    session_type.train = profiled
    with caught("politune train --resume") as stop:
        run.train(resolved, stop=stop, offline=True, quiet=True, say=lambda line: None, show=lambda plan: None)
    return measured


def _grouped(events: list[tuple[str, float]]) -> dict[str, float]:
    seconds = dict.fromkeys([*OPERATIONS, "rest"], 0.0)
    for name, spent in events:
        known = (group for group, words in OPERATIONS.items() if any(word in name.lower() for word in words))
        seconds[next(known, "rest")] += spent
    return seconds


def measure_peak(options: argparse.Namespace) -> dict[str, Any]:
    """Operations per second of a square product on all threads: the best of three medians, about a second in all."""
    import torch

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    left, right = (torch.randn(PEAK_SIDE, PEAK_SIDE).to(dtype) for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        torch.mm(left, right)
        return time.perf_counter() - started

    once()
    median = min(statistics.median(once() for _ in range(5)) for _ in range(3))
    return {"flops_per_second": 2 * PEAK_SIDE**3 / median, "threads": torch.get_num_threads()}


def build_model(options: argparse.Namespace) -> dict[str, Any]:
    """Saves a model of one of `SHAPES` beside the demo model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv_heads = SHAPES[options.shape]
    base = json.loads((options.model / "config.json").read_text("utf-8"))
    changed = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**base, **changed})).to(torch.bfloat16)
    target = options.out.with_suffix("")
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(options.model / name, target / name)
    return {"weights": model.num_parameters(), "path": str(target)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One arm of the speed benchmark.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("trl", "profile", "peak", "model"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True)
        if name != "peak":
            command.add_argument("--model", type=Path, required=True)
        if name != "model":
            command.add_argument("--dtype", choices=("bf16", "fp32"), required=True)
        if name in ("trl", "profile"):
            command.add_argument("--rows", type=Path, required=True)
            for flag in ("batch", "accumulation", "epochs", "max-length"):
                command.add_argument(f"--{flag}", type=int, required=True)
    commands.choices["trl"].add_argument("--recipe", choices=("original", "best"), required=True)
    commands.choices["model"].add_argument("--shape", choices=tuple(SHAPES), required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    command = {"trl": run_trl, "profile": run_profile, "peak": measure_peak, "model": build_model}[options.command]
    options.out.write_text(json.dumps(command(options)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
