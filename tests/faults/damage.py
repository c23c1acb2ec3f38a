"""Checkpoints that rot: every file of the newest one, damaged in every way, beside what the libraries alone make of it."""

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.figures import Figure, count, side_by_side
from faults.lab import Lab, went_on
from politune.models import adapter as adapters
from politune.models.seal import CARD, SEAL
from tiny.small_runs import adapter_hash

NEWEST = "checkpoint-4"


def _missing(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _changed_at(share: float) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(len(data) * share)] ^= 1
        path.write_bytes(data)

    changed.__name__ = f"_flipped_at_{share:.3f}"
    return changed


DAMAGES: tuple[Callable[[Path], None], ...] = (_missing, _empty, _half, _zeroed, _changed_at(0.75))
"""The bit that is flipped three quarters in lies among the tensors of files that hold some."""
PLACES_IN_THE_MARKER = (0.02, 0.1, 0.3, 0.5, 0.9)


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    with lab.place("damage") as place:
        expected, killed = _killed_run(lab, place)
        cases = list(_cases(killed / "checkpoints" / NEWEST))
        beside = _plain(lab, place) if whole else ""
        yield _ours(lab, killed, expected, cases if whole else cases[::9], beside, at_least=55 if whole else 1)
        yield _strangers(lab, killed, expected)
        yield _adapters(lab, place / "whole", whole)


def _killed_run(lab: Lab, place: Path) -> tuple[str, Path]:
    """(the adapter's hash of the run that nothing happened to, one that was killed in step 5 with steps 2 and 4 saved)."""
    lab.run(lab.train(place / "whole"))
    expected = adapter_hash(place / "whole")
    assert lab.run(lab.train(place / "run"), before=die_in_step, given=[5]).code == -signal.SIGKILL
    return expected, place / "run"


def die_in_step(step: int, number: int = signal.SIGKILL) -> None:
    """In the child: a signal before the optimizer's step."""
    from politune.training.callbacks import FiniteGuard

    original = FiniteGuard.on_pre_optimizer_step

    def die(self: FiniteGuard, args: object, state: object, *more: object, **kwargs: object) -> None:
        original(self, args, state, *more, **kwargs)
        if state.global_step + 1 == step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), number)

    FiniteGuard.on_pre_optimizer_step = die


def _cases(checkpoint: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for path in sorted(checkpoint.iterdir()):
        for damage in DAMAGES:
            yield path.name, damage
    for place in PLACES_IN_THE_MARKER:
        yield "politune-commit.json", _changed_at(place)


def _ours(
    lab: Lab, killed: Path, expected: str, cases: list[tuple[str, Callable[[Path], None]]], beside: str, at_least: int
) -> Figure:
    def trial(case: tuple[str, Callable[[Path], None]]) -> str | None:
        name, damage = case
        with lab.place("damaged") as place:
            # A run is known by its settings, not by the path of its directory.
            shutil.copytree(killed, place / "run")
            damage(place / "run" / "checkpoints" / NEWEST / name)
            ended = lab.run([*lab.train(place / "run"), "--resume"])
            said = f"{NEWEST}:" in ended.err and went_on(ended, 2)
            good = ended.code == 0 and said and adapter_hash(place / "run") == expected
            return None if good else f"{name} {damage.__name__}: {ended.code} {ended.err[-300:]}"

    what = (
        "a file of the newest checkpoint missing, empty, half, zeroed, one bit flipped: the one before is used, equal"
    )
    return count(what, side_by_side(trial, cases), beside=beside, at_least=at_least)


def _strangers(lab: Lab, killed: Path, expected: str) -> Figure:
    """Files that were not saved with it, and checkpoints of nobody."""

    def extra_file(checkpoint: Path) -> None:
        (checkpoint / "scaler.pt").write_bytes(b"not ours")

    def number_of_nobody(checkpoint: Path) -> None:
        shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-6"))

    def copies_of_a_user(checkpoint: Path) -> None:
        for name in ("checkpoint-best-4", "checkpoint-copy"):
            shutil.copytree(checkpoint, checkpoint.with_name(name))

    def backup_of_a_user(checkpoint: Path) -> None:
        checkpoint.rename(checkpoint.with_name("checkpoint-backup"))
        (checkpoint.with_name("checkpoint-backup") / "politune-commit.json").unlink()
        shutil.rmtree(checkpoint.with_name("checkpoint-2"))

    def file_of_that_name(checkpoint: Path) -> None:
        checkpoint.with_name("checkpoint-9").write_text("a note")

    def trial(change: Callable[[Path], None]) -> str | None:
        with lab.place("strange") as place:
            shutil.copytree(killed, place / "run")
            change(place / "run" / "checkpoints" / NEWEST)
            ended = lab.run([*lab.train(place / "run", train__save_total_limit=1), "--resume"])
            step = None if change is backup_of_a_user else 2 if change in (extra_file,) else 4
            good = ended.code == 0 and adapter_hash(place / "run") == expected and went_on(ended, step)
            for name in {"backup_of_a_user": ["backup"], "copies_of_a_user": ["best-4", "copy"]}.get(
                change.__name__, []
            ):
                good &= (place / "run" / "checkpoints" / f"checkpoint-{name}").exists()
            return None if good else f"{change.__name__}: {ended.code} {ended.err[-300:]}"

    changes = (extra_file, number_of_nobody, copies_of_a_user, backup_of_a_user, file_of_that_name)
    return count(
        "what does not belong among the checkpoints: not used, a user's own not deleted, equal",
        side_by_side(trial, changes),
    )


def _adapters(lab: Lab, finished: Path, whole: bool) -> Figure:
    """What is computed from is refused where it is used; the run's command with `--resume` exports the same bytes again."""
    sound = contents(finished / "adapter")
    damages = [(name, damage) for name in sorted(sound) for damage in DAMAGES]

    def trial(case: tuple[str, Callable[[Path], None]]) -> str | None:
        name, damage = case
        with lab.place("rotten") as place:
            adapter = shutil.copytree(finished, place / "run") / "adapter"
            damage(adapter / name)
            is_card, is_unsealed = name == CARD, name == SEAL and damage is _missing
            if name in (adapters.CONFIG, adapters.WEIGHTS, SEAL):
                merged = lab.run(["merge", place / "run", "-o", place / "merged"])
                if merged.code != (0 if is_unsealed else 4) or (place / "merged").exists() != is_unsealed:
                    return f"{name} {damage.__name__}: merge gives {merged.code} {merged.last}"
            left = contents(adapter)
            ended = lab.run([*lab.train(place / "run"), "--resume"])
            good = ended.code == 0 and contents(adapter) == (left if is_card or is_unsealed else sound)
            return None if good else f"{name} {damage.__name__}: {ended.code} {ended.err[-300:]}"

    found = side_by_side(trial, damages if whole else damages[::17])
    what = (
        "a file of a finished run's adapter missing, empty, half, zeroed, one bit flipped: no merge, and `--resume` exports "
        "the same bytes again; the card is its owner's, and without its seal an adapter is as one made elsewhere"
    )
    return count(what, found, at_least=35 if whole else 2)


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory, by their names in it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _plain(lab: Lab, place: Path) -> str:
    """The same damages to checkpoints of TRL's own trainer, resumed with `resume_from_checkpoint=True`."""
    whole = place / "plain-whole"
    assert lab.run([], before=train_plainly, given=[lab.base, lab.pairs, whole, False]).code == 0
    expected = adapter_hash(whole)
    for name in ("checkpoint-6", "adapter"):
        shutil.rmtree(whole / name)
    control = lab.run(
        [], before=train_plainly, given=[lab.base, lab.pairs, shutil.copytree(whole, place / "intact"), True]
    )
    assert control.code == 0, control.err
    assert adapter_hash(place / "intact") == expected, "the same harness finds nothing wrong with an intact checkpoint"
    ends = Counter[str]()

    def trial(case: tuple[str, Callable[[Path], None]]) -> None:
        name, damage = case
        with lab.place("plain") as own:
            shutil.copytree(whole, own / "run")
            damage(own / "run" / NEWEST / name)
            ended = lab.run([], before=train_plainly, given=[lab.base, lab.pairs, own / "run", True])
            same = adapter_hash(own / "run") == expected
            ends["equal" if same else "crashed" if ended.code else "other weights in silence"] += 1
            ends["fell back"] += "step 3" in ended.out

    cases = [(path.name, damage) for path in sorted((whole / NEWEST).iterdir()) for damage in DAMAGES]
    found = side_by_side(trial, cases)
    assert not any(found), found
    total = sum(ends.values()) - ends["fell back"]
    assert ends["equal"] < total, "the same harness finds nothing wrong with TRL's trainer alone"
    parts = ", ".join(f"{number} {name}" for name, number in sorted(ends.items()) if number and name != "fell back")
    return f"TRL's trainer alone, {total}: {parts}; {ends['fell back']} fell back"


def train_plainly(base: Path, pairs: Path, out: Path, resume: bool) -> None:
    """In the child, in place of a command: LoRA and DPO as TRL's documentation has it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from politune.data.files import read_jsonl

    class Steps(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
            os.write(1, f"step {state.global_step + 1}\n".encode())  # type: ignore[attr-defined]

    rows = read_jsonl(pairs.read_text(), "pairs").rows
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    config = DPOConfig(
        output_dir=str(out), max_length=96, num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_steps=2, learning_rate=1e-3, use_cpu=True, report_to="none", disable_tqdm=True, seed=42, bf16=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows), peft_config=LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"),
        callbacks=[Steps()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(out / "adapter"))
    sys.exit(0)
