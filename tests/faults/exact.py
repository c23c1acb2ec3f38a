"""Resumed against uninterrupted, for every kind of run; and what has changed since is refused by its name."""

import itertools
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from faults.damage import contents, die_in_step
from faults.figures import Figure, count, side_by_side
from faults.lab import Ended, Lab, went_on
from politune.config import NOT_OF_AN_ADAPTER
from politune.errors import safe
from politune.presets import flatten, resolve
from tiny import tiny_models
from tiny.small_runs import adapter_hash, write_pairs

# In batches of 2, two a step: 7 steps an epoch, the last of them of one batch; fewer where rows are set aside.
ROWS = 26
POINTS = ("in the first epoch", "at its end", "in the second epoch", "after the last step")
Kind: TypeAlias = tuple[str, str, dict[str, object]]
"""(name, method, settings)"""

OUT_OF_TRIAL = {
    "train.output_dir": "every trial has a directory of its own",
    "model.revision": "a local base has none; what one would name is compared by its content",
    "data.dataset_revision": "a local file has none; what one would name is compared by its content",
}
"""Settings that no trial changes, and why."""
BY_CONTENT = {"model.model_name_or_path": "sha256 of the base model", "data.dataset_name": "sha256 of the data"}
"""Settings of which not the name is compared, but what it names."""
UNASKED = {("begun", "threads"), ("done", "threads")}
"""What may be otherwise where no step was saved, or none is left."""
CHANGED = r"(\S+) -> (?!\1[.;])\S+"
"""How a refusal tells two values that are not the same."""


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    with lab.place("exact") as place:
        rows = {"dpo": write_pairs(place / "pairs.jsonl", ROWS), "sft": _chats(place / "chats.jsonl")}
        yield _resumed(lab, rows, list(_kinds(place)), whole)
        yield _finished(lab, rows, whole)
        yield _can_differ(lab, rows, whole)
    yield _changed_settings(lab, whole)
    yield _changed_surroundings(lab, whole)


def flaw_of(ended: Ended, out: Path, expected: str, step: int, total: int) -> str | None:
    """What a run with `--json` did wrong that was to go on after a step, 0 for the start, and to end as the uninterrupted one.

    Equal bytes alone do not tell a run that goes on from one that starts anew.
    """
    if ended.code:
        return f"{ended.code} {ended.last}"
    trained = [int(number) for number in re.findall(r"^step (\d+)/", ended.err, re.MULTILINE)]
    done = json.loads(ended.out)["steps_done_now"]
    if not went_on(ended, step or None) or done != total - step or any(each <= step for each in trained):
        return f"to go on after step {step} of {total}: {done} steps done, of them {trained}: {ended.err[-300:]}"
    return None if adapter_hash(out) == expected != "none" else "another adapter"


def _chats(path: Path) -> Path:
    pairs = [json.loads(line) for line in write_pairs(path, ROWS).read_text().splitlines()]
    path.write_text("".join(json.dumps({"prompt": p["prompt"], "completion": p["chosen"]}) + "\n" for p in pairs))
    return path


def _kinds(place: Path) -> Iterator[Kind]:
    """Packed and padded, with dropout and without, the reference known, lost or scored in the step; what comes in between."""
    for packing, dropout in itertools.product(("auto", "off"), (False, True)):
        shared: dict[str, object] = {
            "train__packing": packing,
            "train__num_train_epochs": 2,
            "lora__lora_dropout": 0.1 if dropout else 0.0,
        }
        name = f"{'packed' if packing == 'auto' else 'padded'}, dropout {'on' if dropout else 'off'}"
        dpo: dict[str, object] = {**shared, "trl__disable_dropout": not dropout}
        yield f"dpo, {name}, reference kept", "dpo", dpo
        yield f"dpo, {name}, reference lost", "dpo", {**dpo, "lost": True}
        yield f"dpo, {name}, reference in the step", "dpo", {**dpo, "trl__precompute_ref_log_probs": False}
        yield f"sft, {name}", "sft", shared
    between: dict[str, object] = {
        "train__num_train_epochs": 2,
        "data__validation_fraction": 0.2,
        "train__eval_steps": 2,
        "lora__lora_dropout": 0.1,
    }
    yield "dpo, validated in between", "dpo", between
    yield "sft, validated in between", "sft", between
    yield "dpo, measured in between", "dpo", {"train__num_train_epochs": 2, "tracking__measure_every": 6}
    yield "dpo, max_steps in the second epoch", "dpo", {"train__max_steps": 11}
    mistral: dict[str, object] = {
        "train__num_train_epochs": 2,
        "model__model_name_or_path": tiny_models.make_mistral(place / "mistral", seed=0),
    }
    yield "dpo, Mistral", "dpo", mistral
    yield "sft, Mistral", "sft", mistral


def _command(
    lab: Lab, rows: Mapping[str, Path], out: Path, method: str, settings: Mapping[str, object]
) -> list[object]:
    given = {key: value for key, value in settings.items() if key != "lost"}
    return lab.train(out, method, data__dataset_name=rows[method], train__save_steps=1, **given)


def _resumed(lab: Lab, rows: Mapping[str, Path], kinds: Sequence[Kind], whole: bool) -> Figure:
    """Stopped by SIGTERM or SIGKILL, in turns; at the last step the kill comes between the last save and the export."""

    def trial(case: tuple[int, Kind, Sequence[str]]) -> list[str | None]:
        number, (name, method, settings), points = case
        with lab.place("kind") as place:
            ended = lab.run(_command(lab, rows, place / "whole", method, settings))
            if ended.code:
                return [f"{name}: {ended.code} {ended.last}"]
            steps, expected = _steps(place / "whole"), adapter_hash(place / "whole")
            found = []
            for point in points:
                out, terminated = place / point.replace(" ", "-"), (number + POINTS.index(point)) % 2 == 0
                argv = _command(lab, rows, out, method, settings)
                flaw = _interrupt(lab, argv, steps[point], steps[POINTS[-1]], terminated=terminated)
                flaw = flaw or _go_on(lab, argv, out, expected, steps[point], steps[POINTS[-1]], "lost" in settings)
                found.append(flaw and f"{name}, {point}: {flaw}")
        return found

    numbered = list(enumerate(kinds))
    cases = (
        [(number, kind, POINTS) for number, kind in numbered]
        if whole
        else [(number, kind, (POINTS[(turn + 1) % 4],)) for turn, (number, kind) in enumerate(numbered[7::6])]
    )
    told = [each if isinstance(each, list) else [each] for each in side_by_side(trial, cases)]
    what = f"stopped {' / '.join(POINTS)} and resumed: goes on after that step, equal"
    beside = f"{len(cases)} kinds of run"
    return count(what, itertools.chain(*told), beside=beside, at_least=80 if whole else 3)


def _steps(out: Path) -> dict[str, int]:
    """The step of each point of a run, by the epochs in its log."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    epochs = {line["step"]: line["epoch"] for line in lines if "loss" in line}
    epoch, last = next(step for step, done in sorted(epochs.items()) if done >= 1), max(epochs)
    assert epochs[epoch] == 1 and epoch + 1 < last, epochs
    return dict(zip(POINTS, (epoch // 2, epoch, (epoch + last) // 2, last), strict=True))


def _interrupt(lab: Lab, argv: list[object], step: int, last: int, *, terminated: bool) -> str | None:
    """Ends a run so that this step is the last one saved: asked to in it, killed in the next one or, after the last, killed."""
    if step == last:
        ended, code = lab.run(argv, before=die_in_export), -signal.SIGKILL
    elif terminated:
        ended, code = lab.run(argv, before=die_in_step, given=[step, signal.SIGTERM]), 128 + signal.SIGTERM
    else:
        ended, code = lab.run(argv, before=die_in_step, given=[step + 1]), -signal.SIGKILL
    return None if ended.code == code else f"not interrupted: {ended.code} {ended.last}"


def _go_on(
    lab: Lab, argv: list[object], out: Path, expected: str, step: int, last: int, is_reference_lost: bool
) -> str | None:
    if (out / "adapter").exists():
        return "a half-trained adapter was exported"
    if is_reference_lost:
        (out / "reference.safetensors").unlink()
    ended = lab.run([*argv, "--resume", "--json"])
    if flaw := flaw_of(ended, out, expected, step, last):
        return flaw
    is_scored = "computing the reference's" in ended.err
    return None if is_scored == (is_reference_lost and step < last) else f"the reference scored again: {is_scored}"


def die_in_export() -> None:
    """In the child: killed between the last save and the export."""
    import os

    from politune.training.session import Session

    def die(self: Session) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Session.export = die  # type: ignore[method-assign,assignment]


def _finished(lab: Lab, rows: Mapping[str, Path], whole: bool) -> Figure:
    def trial(case: tuple[str, dict[str, object]]) -> str | None:
        method, settings = case
        with lab.place("finished") as place:
            argv = _command(lab, rows, place / "run", method, settings)
            lab.run(argv)
            before = contents(place / "run")
            ended = lab.run([*argv, "--resume", "--json"])
            done = json.loads(ended.out)["steps_done_now"] if ended.code == 0 else None
            same = contents(place / "run") == before
            return None if done == 0 and same else f"{case}: {ended.code}, {done} steps, files as before: {same}"

    lengths: tuple[dict[str, object], ...] = ({"train__num_train_epochs": 1}, {"train__max_steps": 3})
    kinds = list(itertools.product(("dpo", "sft"), lengths))
    found = side_by_side(trial, kinds if whole else kinds[::3])
    return count("a finished run resumed: 0 steps, no file changed", found, at_least=4 if whole else 2)


def _can_differ(lab: Lab, rows: Mapping[str, Path], whole: bool) -> Figure:
    """The negative control: what would make a resumed run another one does make another adapter."""

    def trial(setting: tuple[str, object]) -> str | None:
        with lab.place("differ") as place:
            usual = {"train__num_train_epochs": 2}
            hashes = []
            for name, settings in (("usual", usual), ("other", {**usual, setting[0]: setting[1]})):
                ended = lab.run(_command(lab, rows, place / name, "dpo", settings))
                hashes.append(adapter_hash(place / name))
                if ended.code or hashes[-1] == "none":
                    return f"{setting}: {ended.code} {ended.last}"
            return None if hashes[0] != hashes[1] else f"{setting}: the same adapter"

    settings = [
        ("train__seed", 43),
        ("train__beta", 0.1001),
        ("trl__disable_dropout", False),
        ("trl__adam_beta2", 0.998),
    ]
    what = "the comparison can fail: a seed, a beta, a dropout, an optimizer's setting give other bytes"
    return count(what, side_by_side(trial, settings if whole else settings[:1]), at_least=4 if whole else 1)


def _other_value(name: str, value: object, lab: Lab, place: Path) -> object:
    """Another value of a setting that a fresh run takes; by hand only where its type does not say how."""
    by_hand = {
        "model.model_name_or_path": tiny_models.make_llama(place / "other-base", seed=1) if "path" in name else None,
        "data.dataset_name": lab.work / "other.csv", "data.dataset_split": "test", "data.direction": "right",
        "data.on_overlength": "truncate", "lora.lora_target_modules": '["q_proj"]', "train.max_steps": 3,
        "train.num_train_epochs": 2, "train.lr_scheduler_type": "linear", "train.packing": "off",
        "train.tokens_per_call": 512, "train.loss_type": "ipo", "tracking.wandb_run_name": "other",
        "tracking.to": '["tensorboard"]', "tracking.use_wandb": "true", "trl.adam_beta2": 0.9,
    }  # fmt: skip
    if name in by_hand:
        return by_hand[name]
    match value:
        case bool():
            return str(not value).lower()
        case int():
            return value + 1
        case float():
            return value / 2 if value else 0.25
        case _:
            return "other"


def _changed_settings(lab: Lab, whole: bool) -> Figure:
    """Every field of both schemas, from the schemas: a new one cannot be forgotten. A fresh run takes every other value."""
    with lab.place("changed") as place:
        line = "a plan,the tax of a town,the rent of a school,the rent of a school\n"
        (lab.work / "other.csv").write_text("prompt,chosen,rejected,completion\n" + line * 24)
        given = {
            method: {"data__dataset_name": _in_splits(place / f"{method}.jsonl", data), "trl__adam_beta1": 0.8}
            for method, data in (("dpo", lab.pairs), ("sft", lab.chats))
        }
        expected, cases = {}, []
        for method, settings in given.items():
            whole_run, killed = lab.train(place / "whole" / method, method, **settings), place / method
            assert lab.run(whole_run).code == 0
            expected[method] = adapter_hash(place / "whole" / method)
            ended = lab.run(lab.train(killed, method, **settings), before=die_in_step, given=[5])
            assert ended.code == -signal.SIGKILL
            names = _values(whole_run)
            assert set(OUT_OF_TRIAL) < set(names)
            cases += [(method, name) for name in (*names, "trl.adam_beta2") if name not in OUT_OF_TRIAL]

        def trial(case: tuple[str, str]) -> str | None:
            method, name = case
            with lab.place("changed-setting") as own:
                out = shutil.copytree(place / method, own / "run")
                before = _values(lab.train(out, method, **given[method]))
                if name == "method":
                    other = "sft" if method == "dpo" else "dpo"
                    argv = lab.train(out, other, **given[other])
                else:
                    value = _other_value(name, before.get(name), lab, own)
                    argv = lab.train(out, method, **{**given[method], name.replace(".", "__"): value})
                fresh = lab.run([*argv, "--dry-run"])
                if fresh.code:
                    return f"{case}: a fresh run does not take it either: {fresh.code} {fresh.last}"
                ended = lab.run([*argv, "--resume", "--json"])
                if name.startswith(NOT_OF_AN_ADAPTER):
                    flaw = flaw_of(ended, out, expected[method], 4, 6)
                else:
                    flaw = _not_refused(ended, name, before.get(name), _values(argv)[name])
                return flaw and f"{case}: {flaw}"

        found = side_by_side(trial, cases if whole else cases[::12])
    allowed = sum(name.startswith(NOT_OF_AN_ADAPTER) for _, name in cases)
    beside = f"{len(cases) - allowed} refused, {allowed} of no influence on the adapter taken, equal" if whole else ""
    what = (
        "a setting changed on resume, every field of both schemas, to what a fresh run takes: refused by name, or equal"
    )
    return count(what, found, beside=beside, at_least=75 if whole else 6)


def _in_splits(path: Path, data: Path) -> Path:
    """The rows of a file twice: those to train on, and a split beside them."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    splits = [{**row, "split": split} for split in ("train", "test") for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in splits))
    return path


def _values(argv: list[object]) -> dict[str, Any]:
    """Every setting of a command, as JSON has it."""
    method, sets = argv[1], [str(each) for each in argv[3::2]]
    run = resolve("sft" if method == "sft" else "dpo", sets=sets).run
    return json.loads(json.dumps(flatten(run)))  # type: ignore[no-any-return]


def _not_refused(ended: Ended, name: str, old: object, new: object) -> str | None:
    """How a resumption did otherwise than to refuse a changed setting by its name, its old and its new value."""
    told = f"{name}: {safe(old)} -> {safe(new)}"
    named = re.search(f"{BY_CONTENT[name]}: {CHANGED}", ended.last) if name in BY_CONTENT else told in ended.last
    good = ended.code == 2 and "cannot resume" in ended.last and named and "Traceback" not in ended.err
    return None if good else f"{old} -> {new}: {ended.code} {ended.last}"


def _changed_surroundings(lab: Lab, whole: bool) -> Figure:
    """The same command, and something behind it is another."""
    with lab.place("surroundings") as place:
        base = shutil.copytree(lab.base, place / "base")
        pairs = shutil.copy(lab.pairs, place / "data.jsonl")
        given: dict[str, object] = {"model__model_name_or_path": base, "data__dataset_name": pairs}
        assert lab.run(lab.train(place / "run", **given), before=die_in_step, given=[5]).code == -signal.SIGKILL
        assert lab.run(lab.train(place / "begun", **given), before=die_in_step, given=[2]).code == -signal.SIGKILL
        assert lab.run(lab.train(place / "done", **given)).code == 0

        def rows(own: Path) -> None:
            lines = (own / "data.jsonl").read_text().splitlines(keepends=True)
            (own / "data.jsonl").write_text("".join(reversed(lines)))

        def weights(own: Path) -> None:
            tiny_models.make_llama(own / "base", seed=2)

        def template(own: Path) -> None:
            path = own / "base" / "chat_template.jinja"
            path.write_text(path.read_text().replace("\n\n", "\n"))

        def config(own: Path) -> None:
            path = own / "base" / "config.json"
            path.write_text(path.read_text().replace("500000.0", "400000.0"))

        def nothing(own: Path) -> None:
            pass

        changes: dict[str, tuple[Callable[[Path], None], Callable[..., None] | None]] = {
            "sha256 of the data": (rows, None),
            "sha256 of the base model": (weights, None),
            "sha256 of the training tokens": (template, None),
            "sha256 of the base model's config": (config, None),
            "version of trl": (nothing, another_version),
            "version of politune": (nothing, another_version),
            "threads": (nothing, two_threads),
        }

        def trial(case: tuple[str, str]) -> str | None:
            run, name = case
            change, before = changes[name]
            with lab.place("changed") as own:
                for each in ("base", run):
                    shutil.copytree(place / each, own / each)
                shutil.copy(pairs, own / "data.jsonl")
                change(own)
                again = lab.train(
                    own / run, model__model_name_or_path=own / "base", data__dataset_name=own / "data.jsonl"
                )
                ended = lab.run([*again, "--resume"], before=before)
                good = ended.code == 2 and "cannot resume" in ended.last
                good &= re.search(f"{name}: {CHANGED}", ended.last) is not None
                return None if good else f"{case}: {ended.code} {ended.last}"

        # What the steps that are left depend on is no matter where none is left, or none was saved.
        cases = [(run, name) for run in ("run", "begun", "done") for name in changes if (run, name) not in UNASKED]
        found = side_by_side(trial, cases if whole else cases[::5])
        if whole:
            lab.run(lab.train(place / "trl", trl__adam_beta1=0.8), before=die_in_step, given=[5])
            flaw = _not_refused(lab.run([*lab.train(place / "trl"), "--resume"]), "trl.adam_beta1", 0.8, None)
            found.append(flaw and f"left out: {flaw}")
        for run, step, surroundings in (("run", 4, None), ("begun", None, two_threads), ("done", None, two_threads)):
            control = lab.run([*lab.train(place / run, **given), "--resume"], before=surroundings)
            good = control.code == 0 and went_on(control, step)
            found.append(None if good else f"{run}: nothing changed, and refused: {control.last}")
    what = (
        "the data, the base, its template, its config, a version or the threads changed on resume, of a run with a checkpoint, "
        "without one, and of a finished one: refused by name, old -> new"
    )
    return count(what, found, at_least=22 if whole else 6)


def another_version() -> None:
    """In the child."""
    from politune import record

    environment = record.environment

    def other() -> dict[str, Any]:
        found = environment()
        return {**found, "politune": "0.0.1", "libraries": {**found["libraries"], "trl": "1.0.0"}}

    record.environment = other


def two_threads() -> None:
    """In the child."""
    import torch

    torch.set_num_threads(2)
