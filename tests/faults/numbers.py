"""What is not a number, and what does not fit into memory."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file

from faults.figures import Figure, count, side_by_side
from faults.lab import Lab
from tiny.small_runs import adapter_hash

PLACES = ("loss", "gradient", "weight", "first moment", "second moment")
VALUES = ("nan", "inf")


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    yield _not_a_number(lab, whole)
    yield _out_of_memory(lab, 12 if whole else 2, seed=5)
    yield _rehearsed(lab, 8 if whole else 3)


def _not_a_number(lab: Lab, whole: bool) -> Figure:
    cases = list(itertools.product(PLACES, VALUES, (1, 4, 6), ("dpo", "sft"), ("auto", "off")))
    cases = cases if whole else cases[::23]
    with lab.place("finite") as place:
        expected = {}
        for method, packing in itertools.product(("dpo", "sft"), ("auto", "off")):
            out = place / f"{method}-{packing}"
            lab.run(lab.train(out, method, train__packing=packing, train__save_steps=1))
            expected[method, packing] = adapter_hash(out)

        def trial(case: tuple[str, str, int, str, str]) -> str | None:
            what, value, step, method, packing = case
            with lab.place("nan") as own:
                argv = lab.train(own / "run", method, train__packing=packing, train__save_steps=1)
                ended = lab.run(argv, before=put_in, given=[what, value, step])
                saved = sorted((own / "run" / "checkpoints").glob("checkpoint-*"))
                good = ended.code == 8 and f"at step {step}." in ended.last and adapter_hash(own / "run") == "none"
                good &= len(saved) <= step and all(_is_finite(each) for each in saved)
                good &= not saved or str(saved[-1]) in ended.last
                again = lab.go_on(argv)
                good &= again.code == 0 and adapter_hash(own / "run") == expected[method, packing]
                return None if good else f"{case}: {ended.code} {ended.last}; then {again.code} {again.last}"

        found = side_by_side(trial, cases)
    what = (
        "NaN or infinity put into a loss, gradient, weight or optimizer moment: 8 in that step, never saved, then equal"
    )
    return count(what, found)


def _is_finite(checkpoint: Path) -> bool:
    import torch

    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = [each for state in optimizer["state"].values() for each in state.values()]
    return all(
        bool(each.isfinite().all())
        for each in [*load_file(checkpoint / "adapter_model.safetensors").values(), *moments]
    )


def put_in(what: str, value: str, step: int) -> None:
    """In the child: one number, in that step."""
    import torch
    from transformers import Trainer

    from politune.training import trainer_factory
    from politune.training.callbacks import StepClock

    bad = float(value)
    trainer_type = trainer_factory._Trainer
    step_end, training_step = StepClock.on_step_end, trainer_type.training_step

    def poisoned_step(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step + 1 == step:
            if what == "loss":
                loss += bad
            if what == "gradient":
                found = [each.grad for each in self.model.parameters() if each.grad is not None]
                for gradient in found[:1]:  # packed rows have theirs after the last batch
                    gradient.view(-1)[0] = bad
        return loss

    def poisoned_end(self: StepClock, args: object, state: object, *more: object, **kwargs: object) -> None:
        step_end(self, args, state, *more, **kwargs)
        if state.global_step == step:  # type: ignore[attr-defined]
            moments = next(iter(kwargs["optimizer"].state.values()))  # type: ignore[attr-defined]
            weight = next(each for each in kwargs["model"].parameters() if each.requires_grad)  # type: ignore[attr-defined]
            place = {"weight": weight.data, "first moment": moments["exp_avg"], "second moment": moments["exp_avg_sq"]}
            if what in place:
                place[what].view(-1)[0] = bad

    trainer_type.training_step, StepClock.on_step_end = poisoned_step, poisoned_end


def _out_of_memory(lab: Lab, trials: int, seed: int) -> Figure:
    """The allocator's own words, at random in loading, the dry pass, a step, the reference phase, a save, the evaluation."""
    draw = random.Random(seed)

    def trial(case: tuple[str, str]) -> str | None:
        where, words = case
        with lab.place("memory") as place:
            argv = lab.train(place / "run", data__validation_fraction=0.2, train__num_train_epochs=2)
            ended = lab.run(argv, before=run_out, given=[where, words])
            good = ended.code == 8 and "out of memory with 2 rows" in ended.last and "Traceback" not in ended.err
            good &= ended.last.count("(about ") in (2, 3) and "tokens" in ended.last
            again = lab.go_on(argv)
            good &= again.code == 0
            return None if good else f"{case}: {ended.code} {ended.last}; then {again.code} {again.last}"

    words = ("CUDA out of memory. Tried to allocate 2.00 GiB", "DefaultCPUAllocator: can't allocate memory", "memory")
    cases = [(where, word) for where in ("load", "step", "reference", "evaluation") for word in words]
    draw.shuffle(cases)
    return count("no memory while loading, in a step, the reference phase, the evaluation: 8, with three settings that need less",
                 side_by_side(trial, cases[:trials]), seed=seed)  # fmt: skip


def run_out(where: str, words: str) -> None:
    """In the child."""
    import torch
    import transformers

    from politune.training import trainer_factory

    def fail(*args: object, **kwargs: object) -> None:
        raise (
            MemoryError()
            if words == "memory"
            else torch.OutOfMemoryError(words)
            if "CUDA" in words
            else RuntimeError(words)
        )

    match where:
        case "load":
            transformers.AutoModelForCausalLM.from_pretrained = fail
        case "step":
            trainer_factory.PreferenceTrainer.compute_loss = fail
        case "reference":
            trainer_factory.PreferenceTrainer.score_reference = fail
        case "evaluation":
            trainer_factory.evaluate = fail


def _rehearsed(lab: Lab, trials: int) -> Figure:
    """The dry pass happens, before the first step, and leaves no trace in weights, metrics or the random state."""

    def trial(case: tuple[str, str, bool]) -> str | None:
        method, packing, dropout = case
        with lab.place("dry") as place:
            dropped: dict[str, object] = {"lora__lora_dropout": 0.1 if dropout else 0.0}
            if method == "dpo":
                dropped["trl__disable_dropout"] = not dropout
            hashes, lines = [], []
            for share in (0.0, 1.0):
                out = place / str(share)
                argv = lab.train(out, method, train__packing=packing, train__tokens_per_call=64, **dropped)
                ended = lab.run(argv, before=rehearse_up_to, given=[share, place / f"{share}.done"])
                if ended.code:
                    return f"{case}: {ended.code} {ended.last}"
                hashes.append(adapter_hash(out))
                lines.append([_numbers(line) for line in (out / "log.jsonl").read_text().splitlines()])
            done = [(place / f"{share}.done").read_text() for share in (0.0, 1.0)]
            good = hashes[0] == hashes[1] and lines[0] == lines[1] and done == ["False 0", "True 0"]
            return None if good else f"{case}: {hashes}, {done}"

    cases = list(itertools.product(("dpo", "sft"), ("auto", "off"), (False, True)))
    cases = cases[:: 8 // trials]
    return count(
        "the longest rows computed before step 1: equal to a run without, its log too", side_by_side(trial, cases)
    )


def _numbers(line: str) -> dict[str, float]:
    return {
        key: value
        for key, value in json.loads(line).items()
        if key != "time" and "runtime" not in key and "second" not in key
    }


def rehearse_up_to(share: float, done: Path) -> None:
    """In the child: says whether there was a dry pass, and in which step."""
    from politune.training import session, trainer_factory

    session.REHEARSAL_SHARE = share
    rehearse = trainer_factory.rehearse

    def told(trainer: object, most_tokens: float) -> bool:
        found = rehearse(trainer, most_tokens)
        done.write_text(f"{found} {trainer.state.global_step}")  # type: ignore[attr-defined]
        return found

    trainer_factory.rehearse = told
