"""Runs of two-layer models: rows of words in a fixed pseudo-random order, settings for six steps, and what came of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

WORDS = tuple(
    "the rent tax of every town should rise fall stay because people need work school bread water and a plan".split()  # noqa: SIM905
)


def write_pairs(path: Path, count: int = 24) -> Path:
    """Pairs whose sides differ in words, in a fixed pseudo-random order."""
    lines = []
    for i in range(count):
        pick = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(12)]
        lines.append(
            {"prompt": f"{' '.join(pick[:5])} {i}", "chosen": " ".join(pick[3:9]), "rejected": " ".join(pick[5:12])}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_chats(path: Path) -> Path:
    pairs = map(json.loads, write_pairs(path).read_text().splitlines())
    path.write_text("".join(json.dumps({"prompt": p["prompt"], "completion": p["chosen"]}) + "\n" for p in pairs))
    return path


def small_run(model: Path, data: Path, out: Path, **flags: Any) -> dict[str, Any]:
    """Settings of a run of six steps of four rows that saves every second one; `train__save_steps=1` changes one."""
    settings = {
        "model.model_name_or_path": str(model), "data.dataset_name": str(data), "data.direction": "left", "data.max_length": 96,
        "lora.lora_r": 4, "lora.lora_alpha": 8, "train.output_dir": str(out), "train.num_train_epochs": 1,
        "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2, "train.warmup_steps": 0,
        "train.save_steps": 2, "train.learning_rate": 1e-3,
    }  # fmt: skip
    settings |= {key.replace("__", "."): value for key, value in flags.items()}
    if settings.get("train.max_steps", -1) != -1:
        del settings["train.num_train_epochs"]
    return settings


def adapter_hash(out: Path) -> str:
    """A hash over a run's exported adapter, whatever stands in its header; `none` where there is no adapter."""
    import torch
    from safetensors.torch import load_file

    path = out / "adapter" / "adapter_model.safetensors"
    if not path.exists():
        return "none"
    tensors = load_file(path)
    return hashlib.sha256(
        b"".join(name.encode() + tensors[name].view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    ).hexdigest()
