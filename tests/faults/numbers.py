"""What is not a number, and what does not fit into memory."""

import itertools
import json
import resource
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file

from faults.exact import flaw_of
from faults.figures import Figure, count, side_by_side
from faults.lab import Ended, Lab
from politune.plan import format_bytes
from politune.training import checkpoints
from tiny import tiny_models
from tiny.small_runs import adapter_hash

PLACES = ("loss", "gradient", "weight", "first moment", "second moment")
VALUES = ("nan", "inf")
PARTS = {
    "loading": (0, 0), "the dry pass": (0, 0), "step 1": (0, 0), "the reference phase": (0, 0), "step 3": (2, 2),
    "the validation of step 4": (4, 2), "the save of step 4": (4, 2), "the last validation": (10, 10), "the export": (10, 10),
}  # fmt: skip
"""Of a run of ten steps that saves every second one: where memory runs out, and which step is logged and saved by then."""
WORDS = ("CUDA out of memory. Tried to allocate 2.00 GiB", "DefaultCPUAllocator: can't allocate memory", "")
"""Of the allocators of a GPU, of the CPU and of Python, whose error has none."""
SPARE_BYTES = 8 << 20
"""By how much an address space may still grow, which a step does not fit into."""


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    yield _not_a_number(lab, whole)
    yield _out_of_memory(lab, whole)
    yield _limited(lab, whole)
    yield _rehearsed(lab, whole)


def _not_a_number(lab: Lab, whole: bool) -> Figure:
    cases = list(itertools.product(PLACES, VALUES, (1, 6), ("dpo", "sft"), ("auto", "off")))
    cases = cases if whole else cases[::27]
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
                good &= all(_is_finite(each) for each in saved)
                good &= (saved[-1].name if saved else "checkpoint-0") == f"checkpoint-{step - 1}"
                good &= not saved or str(saved[-1]) in ended.last
                if not good:
                    return f"{case}: {ended.code} {ended.last}, saved: {[each.name for each in saved]}"
                again = lab.go_on([*argv, "--json"])
                flaw = flaw_of(again, own / "run", expected[method, packing], step - 1, 6)
                return flaw and f"{case}: {flaw}"

        found = side_by_side(trial, cases)
    what = (
        "NaN or infinity put into a loss, gradient, weight or optimizer moment: 8 in that step, never saved, then equal"
    )
    return count(what, found, at_least=80 if whole else 3)


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


def _out_of_memory(lab: Lab, whole: bool) -> Figure:
    """The allocators' own words, two of three in every part of a run, whose rows are packed and padded in turns."""
    parts = [case for case in itertools.product(("dpo", "sft"), PARTS) if case != ("sft", "the reference phase")]
    words = [[word for place, word in enumerate(WORDS) if place != number % len(WORDS)] for number in range(len(parts))]
    numbered = list(enumerate((*part, word) for part, two in zip(parts, words, strict=True) for word in two))
    numbered = numbered if whole else numbered[9::19]

    with lab.place("memory") as place:

        def command(out: Path, method: str, packing: str) -> list[object]:
            settings: dict[str, object] = {"train__num_train_epochs": 2, "data__validation_fraction": 0.2}
            return lab.train(out, method, train__packing=packing, train__eval_steps=4, **settings)

        expected = {}
        for kind in {(case[0], _packing(number)) for number, case in numbered}:
            lab.run(command(place / "-".join(kind), *kind))
            expected[kind] = adapter_hash(place / "-".join(kind))

        def trial(each: tuple[int, tuple[str, str, str]]) -> str | None:
            number, (method, part, words) = each
            packing = _packing(number)
            with lab.place("no-memory") as own:
                argv = command(own / "run", method, packing)
                ended = lab.run(argv, before=run_out, given=[part, words])
                # Of packed rows a batch is divided anyhow, and bfloat16 costs a small model on a CPU more than it saves.
                flaw = _not_told(ended, own / "run", *PARTS[part], ways=2 if packing == "auto" else 3)
                if flaw is None:
                    again = lab.go_on([*argv, "--json"])
                    flaw = flaw_of(again, own / "run", expected[method, packing], PARTS[part][1], 10)
                return flaw and f"{method}, {packing}, {part}, {words}: {flaw}"

        found = side_by_side(trial, numbered)
    what = (
        f"no memory in {', '.join(PARTS)}: 8, with three settings that need less (packed rows of this size have two),"
        " nothing exported, then equal"
    )
    return count(what, found, at_least=34 if whole else 2)


def _packing(number: int) -> str:
    """Of a numbered case: with two words for each part of a run, every part comes with both."""
    return ("auto", "off")[number % 2]


def _not_told(ended: Ended, out: Path, logged: int, saved: int, ways: int) -> str | None:
    """How a run that had no memory left did otherwise than to say so with the plan's numbers, and to leave what is whole."""
    memory = json.loads((out / "run.json").read_text())["plan"]["memory"]
    rows, peak, tokens = 2, memory["peak_bytes"], memory["sequence_tokens"]
    said = f"out of memory with {rows} rows per forward pass, the longest sequence of {tokens} tokens"
    advice = ", or ".join(f"{flags} (about {format_bytes(needed)})" for flags, needed in memory["ways"])
    good = ended.code == 8 and f"{said}, about {format_bytes(peak)} in all" in ended.last
    good &= f"try {advice}" in ended.last and "Traceback" not in ended.err and not (out / "adapter").exists()
    good &= len(memory["ways"]) == ways and all(needed < peak for _, needed in memory["ways"])
    log, newest = out / "log.jsonl", checkpoints.newest(out / "checkpoints")
    steps = log.read_text().count('"loss"') if log.exists() else 0
    good &= (steps, checkpoints.step_of(newest) if newest else 0) == (logged, saved)
    return None if good else f"{steps} steps, then {ended.code} {ended.last}, {newest}"


def run_out(part: str, words: str) -> None:
    """In the child."""
    import torch
    import transformers

    from politune.training import session, trainer_factory

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError(words) if "CUDA" in words else RuntimeError(words) if words else MemoryError

    def fail_after(step: int, owner: type, name: str) -> None:
        """Lets a trainer's method fail once so many steps are done."""
        usual = getattr(owner, name)

        def until_then(self: transformers.Trainer, *args: object, **kwargs: object) -> object:
            return fail() if self.state.global_step == step else usual(self, *args, **kwargs)

        setattr(owner, name, until_then)

    def fail_inside(*args: object) -> bool:
        """A dry pass without memory: whatever comes after it has enough."""
        usual, trainer_factory._Trainer.training_step = trainer_factory._Trainer.training_step, fail
        try:
            return rehearse(*args)
        finally:
            trainer_factory._Trainer.training_step = usual

    match part:
        case "loading":
            transformers.AutoModelForCausalLM.from_pretrained = fail
        case "the dry pass":
            session.REHEARSAL_SHARE, rehearse, trainer_factory.rehearse = 1.0, trainer_factory.rehearse, fail_inside
        case "the reference phase":
            trainer_factory.PreferenceTrainer.score_reference = fail
        case "step 1" | "step 3":
            fail_after(int(part[-1]) - 1, trainer_factory._Trainer, "training_step")
        case "the validation of step 4":
            fail_after(4, transformers.Trainer, "evaluation_loop")
        case "the save of step 4":  # the adapter is written by then
            fail_after(4, transformers.Trainer, "_save_optimizer_and_scheduler")
        case "the last validation":
            trainer_factory.evaluate = fail
        case "the export":
            session._check_adapter = fail


def _limited(lab: Lab, whole: bool) -> Figure:
    """A model whose step takes hundreds of megabytes: from its first step on a process gets a few more."""
    with lab.place("limited") as place:
        base = tiny_models.make_llama(place / "wide", seed=0, intermediate_size=4096)
        data = {
            method: _long(place / f"{method}.jsonl", rows) for method, rows in (("dpo", lab.pairs), ("sft", lab.chats))
        }

        def trial(case: tuple[str, str]) -> str | None:
            method, packing = case
            with lab.place("limit") as own:
                settings = {
                    "model__model_name_or_path": base,
                    "data__dataset_name": data[method],
                    "data__max_length": 1024,
                }
                argv = [
                    lab.train(own / name, method, train__packing=packing, train__max_steps=1, **settings)
                    for name in ("whole", "run")
                ]
                lab.run(argv[0])
                ended = lab.run(argv[1], before=limit_memory)
                flaw = _not_told(ended, own / "run", 0, 0, ways=3)
                if "DefaultCPUAllocator" not in ended.last:
                    flaw = flaw or f"not the allocator's error: {ended.last}"
                if flaw is None:
                    again = lab.go_on([*argv[1], "--json"])
                    flaw = flaw_of(again, own / "run", adapter_hash(own / "whole"), 0, 1)
                return flaw and f"{case}: {flaw}"

        cases = list(itertools.product(("dpo", "sft"), ("auto", "off")))
        found = side_by_side(trial, cases if whole else cases[:1])
    what = "an address space that ends in the first step (RLIMIT_AS): 8, with three settings that need less, then equal"
    return count(what, found, at_least=4 if whole else 1)


def _long(path: Path, data: Path) -> Path:
    """The rows of a file, with longer answers."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    longer = [{key: text if key == "prompt" else " ".join([text] * 20) for key, text in row.items()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in longer))
    return path


def limit_memory() -> None:
    """In the child."""
    import torch

    from politune.training import trainer_factory

    training_step = trainer_factory._Trainer.training_step

    def limited(self: object, *args: object, **kwargs: object) -> torch.Tensor:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        return training_step(self, *args, **kwargs)

    trainer_factory._Trainer.training_step = limited


def _rehearsed(lab: Lab, whole: bool) -> Figure:
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
    found = side_by_side(trial, cases if whole else cases[::7])
    what = "the longest rows computed before step 1: equal to a run without, its log too"
    return count(what, found, at_least=8 if whole else 2)


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
