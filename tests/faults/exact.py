"""Resumed against uninterrupted, for every kind of run; and what has changed since is refused by its name."""

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from faults.damage import die_in_step
from faults.figures import Figure, count, side_by_side
from faults.lab import Lab
from politune.config import NOT_OF_AN_ADAPTER
from politune.presets import flatten, resolve
from tiny import tiny_models
from tiny.small_runs import adapter_hash, small_run, write_pairs

# 26 rows in batches of 2, two a step: 7 steps an epoch, the last of them of one batch.
ROWS, EPOCH, LAST = 26, 7, 14
POINTS = {"in the first epoch": 3, "at its end": 7, "in the second epoch": 10, "after the last step": 14}


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    with lab.place("exact") as place:
        rows = {"dpo": write_pairs(place / "pairs.jsonl", ROWS), "sft": _chats(place / "chats.jsonl")}
        kinds = list(_kinds(lab, place))
        yield _resumed(
            lab, rows, kinds if whole else kinds[::7], list(POINTS.items()) if whole else [("in the second epoch", 10)]
        )
        yield _finished(lab, rows)
        yield _can_differ(lab, rows, 4 if whole else 1)
    yield _changed_settings(lab)
    yield _changed_surroundings(lab)


def _chats(path: Path) -> Path:
    pairs = [json.loads(line) for line in write_pairs(path, ROWS).read_text().splitlines()]
    path.write_text("".join(json.dumps({"prompt": p["prompt"], "completion": p["chosen"]}) + "\n" for p in pairs))
    return path


def _kinds(lab: Lab, place: Path) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(name, method, settings): packed and padded, with dropout and without, the reference known, lost or scored in the step."""
    for packing, dropout in itertools.product(("auto", "off"), (False, True)):
        shared: dict[str, object] = {
            "train__packing": packing,
            "train__num_train_epochs": 2,
            "lora__lora_dropout": 0.1 if dropout else 0.0,
        }
        name = f"{'packed' if packing == 'auto' else 'padded'}, dropout {'on' if dropout else 'off'}"
        dpo = {**shared, "trl__disable_dropout": not dropout}
        yield f"dpo, {name}, reference kept", "dpo", dpo
        yield f"dpo, {name}, reference lost", "dpo", {**dpo, "lost": True}
        yield f"dpo, {name}, reference in the step", "dpo", {**dpo, "trl__precompute_ref_log_probs": False}
        yield f"sft, {name}", "sft", shared
    between = {
        "train__num_train_epochs": 2,
        "data__validation_fraction": 0.2,
        "train__eval_steps": 2,
        "lora__lora_dropout": 0.1,
    }
    yield "dpo, validated in between", "dpo", between
    yield "sft, validated in between", "sft", between
    yield "dpo, measured in between", "dpo", {"train__num_train_epochs": 2, "tracking__measure_every": 6}
    yield "dpo, max_steps in the second epoch", "dpo", {"train__max_steps": 11}


def _command(
    lab: Lab, rows: Mapping[str, Path], out: Path, method: str, settings: Mapping[str, object]
) -> list[object]:
    given = {key: value for key, value in settings.items() if key != "lost"}
    return lab.train(out, method, data__dataset_name=rows[method], train__save_steps=1, **given)


def _resumed(lab: Lab, rows: Mapping[str, Path], kinds: list[Any], points: list[tuple[str, int]]) -> Figure:
    """Stopped by SIGTERM or SIGKILL, in turns; at the last step the kill comes between the last save and the export."""

    def trial(case: tuple[str, str, dict[str, object]]) -> list[str | None]:
        name, method, settings = case
        found: list[str | None] = []
        with lab.place("kind") as place:
            ended = lab.run(_command(lab, rows, place / "whole", method, settings))
            expected = adapter_hash(place / "whole")
            if ended.code:
                return [f"{name}: {ended.code} {ended.last}"]
            for number, (where, step) in enumerate(points):
                out = place / f"run-{step}"
                argv = _command(lab, rows, out, method, settings)
                last = int(settings.get("train__max_steps", LAST))  # type: ignore[call-overload]
                if step >= last:
                    lab.run(argv, before=die_in_export)
                else:
                    lab.run(
                        argv, before=die_in_step, given=[step + 1, signal.SIGTERM if number % 2 else signal.SIGKILL]
                    )
                if (out / "adapter").exists():
                    found.append(f"{name}, {where}: it was not interrupted")
                    continue
                if settings.get("lost"):
                    (out / "reference.safetensors").unlink(missing_ok=True)
                ended = lab.run([*argv, "--resume"])
                good = ended.code == 0 and adapter_hash(out) == expected
                found.append(None if good else f"{name}, {where}: {ended.code} {ended.last}")
        return found

    told = [each if isinstance(each, list) else [each] for each in side_by_side(trial, kinds)]  # type: ignore[arg-type]
    what = f"stopped {' / '.join(where for where, _ in points)} and resumed: equal"
    return count(what, itertools.chain(*told), beside=f"{len(kinds)} kinds of run")


def die_in_export() -> None:
    """In the child: killed between the last save and the export."""
    import os

    from politune.training.session import Session

    def die(self: Session) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Session.export = die  # type: ignore[method-assign,assignment]


def _finished(lab: Lab, rows: Mapping[str, Path]) -> Figure:
    def trial(case: tuple[str, dict[str, object]]) -> str | None:
        method, settings = case
        with lab.place("finished") as place:
            argv = _command(lab, rows, place / "run", method, settings)
            lab.run(argv)
            before = _contents(place / "run")
            ended = lab.run([*argv, "--resume", "--json"])
            done = json.loads(ended.out)["steps_done_now"] if ended.code == 0 else None
            same = _contents(place / "run") == before
            return None if done == 0 and same else f"{case}: {ended.code}, {done} steps, files as before: {same}"

    kinds = list(itertools.product(("dpo", "sft"), ({"train__num_train_epochs": 1}, {"train__max_steps": 3})))
    return count("a finished run resumed: 0 steps, no file changed", side_by_side(trial, kinds))


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _can_differ(lab: Lab, rows: Mapping[str, Path], trials: int) -> Figure:
    """The negative control: what would make a resumed run another one does make another adapter."""

    def trial(setting: tuple[str, object]) -> str | None:
        with lab.place("differ") as place:
            usual = {"train__num_train_epochs": 2}
            hashes = []
            for name, settings in (("usual", usual), ("other", {**usual, setting[0]: setting[1]})):
                lab.run(_command(lab, rows, place / name, "dpo", settings))
                hashes.append(adapter_hash(place / name))
            return None if hashes[0] != hashes[1] else f"{setting}: the same adapter"

    settings = [
        ("train__seed", 43),
        ("train__beta", 0.1001),
        ("trl__disable_dropout", False),
        ("trl__adam_beta2", 0.998),
    ]
    return count("the comparison can fail: a seed, a beta, a dropout, an optimizer's setting give other bytes",
                 side_by_side(trial, settings[:trials]))  # fmt: skip


def _other_value(name: str, value: object, lab: Lab, place: Path) -> object:
    """Another value of a setting that the schema takes; by hand only where its type does not say how."""
    by_hand = {
        "model.model_name_or_path": tiny_models.make_llama(place / "other-base", seed=1) if "path" in name else None,
        "model.revision": "v2", "data.dataset_name": lab.work / "pairs.csv", "data.dataset_revision": "v2",
        "data.dataset_split": "test", "data.direction": "right", "data.on_overlength": "truncate",
        "lora.lora_target_modules": '["q_proj"]', "train.max_steps": 3, "train.num_train_epochs": 2,
        "train.lr_scheduler_type": "linear", "train.packing": "off", "train.tokens_per_call": 512, "train.loss_type": "ipo",
        "tracking.wandb_run_name": "other", "tracking.to": '["tensorboard"]', "tracking.use_wandb": "true",
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


def _changed_settings(lab: Lab) -> Figure:
    """Every field of both schemas, from the schemas: a new one cannot be forgotten."""
    from faults.damage import _killed_run

    with lab.place("changed") as place:
        (lab.work / "pairs.csv").write_text(
            "prompt,chosen,rejected\n" + "a plan,the tax of a town,the rent of a school\n" * 24
        )
        expected, killed = _killed_run(lab, place)
        run = resolve("dpo", None, small_run(lab.base, lab.pairs, place / "run")).run
        settings = {**flatten(run), "trl.adam_beta1": 0.8}
        for no_choice in ("train.output_dir", "method"):
            del settings[no_choice]

        def trial(name: str) -> str | None:
            with lab.place("changed-setting") as own:
                shutil.copytree(killed, own / "run")
                value = _other_value(name, settings[name], lab, own)
                ended = lab.run([*lab.train(own / "run", **{name.replace(".", "__"): value}), "--resume"])
                allowed = name.startswith(NOT_OF_AN_ADAPTER)
                named = name in ended.last or name.rpartition(".")[2] in ended.last
                by_content = name in ("model.model_name_or_path", "data.dataset_name") and "sha256 of the" in ended.last
                if allowed:
                    good = ended.code == 0 and adapter_hash(own / "run") == expected
                else:
                    good = ended.code == 2 and (named or by_content)
                return (
                    None if good and "Traceback" not in ended.err else f"{name} -> {value}: {ended.code} {ended.last}"
                )

        found = side_by_side(trial, settings)
    allowed = sum(name.startswith(NOT_OF_AN_ADAPTER) for name in settings)
    beside = f"{len(settings) - allowed} refused, {allowed} of no influence on the adapter taken, equal"
    return count(
        "a setting changed on resume, every field of the schema: refused by name, or equal", found, beside=beside
    )


def _changed_surroundings(lab: Lab) -> Figure:
    """The same command, and something behind it is another."""

    with lab.place("surroundings") as place:
        base = shutil.copytree(lab.base, place / "base")
        pairs = shutil.copy(lab.pairs, place / "data.jsonl")
        argv = lab.train(place / "run", model__model_name_or_path=base, data__dataset_name=pairs)
        assert lab.run(argv, before=die_in_step, given=[5]).code == -signal.SIGKILL

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
            "threads": (nothing, two_threads),
        }

        def trial(name: str) -> str | None:
            change, before = changes[name]
            with lab.place("changed") as own:
                for each in ("base", "run"):
                    shutil.copytree(place / each, own / each)
                shutil.copy(pairs, own / "data.jsonl")
                change(own)
                again = lab.train(
                    own / "run", model__model_name_or_path=own / "base", data__dataset_name=own / "data.jsonl"
                )
                ended = lab.run([*again, "--resume"], before=before)
                good = ended.code == 2 and f"{name}: " in ended.last and "->" in ended.last
                return None if good else f"{name}: {ended.code} {ended.last}"

        found = side_by_side(trial, changes)
        given = lab.train(place / "trl", trl__adam_beta1=0.8)
        lab.run(given, before=die_in_step, given=[5])
        ended = lab.run([*lab.train(place / "trl"), "--resume"])
        found.append(
            None if ended.code == 2 and "trl.adam_beta1: 0.8 -> None" in ended.last else f"left out: {ended.last}"
        )
        control = lab.run([*argv, "--resume"])
        found.append(None if control.code == 0 else f"nothing changed, and refused: {control.last}")
    return count("the data, the base, its template, its config, a library or the threads changed on resume: refused by name",
                 found)  # fmt: skip


def another_version() -> None:
    """In the child."""
    from politune import record

    environment = record.environment

    def other() -> dict[str, Any]:
        found = environment()
        return {**found, "libraries": {**found["libraries"], "trl": "1.0.0"}}

    record.environment = other


def two_threads() -> None:
    """In the child."""
    import torch

    torch.set_num_threads(2)
