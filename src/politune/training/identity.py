"""What a resumed run must share with the run that it goes on with, and how a difference is named."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from politune import record
from politune.config import NOT_OF_AN_ADAPTER, Run
from politune.data.build import public as public_recipe
from politune.errors import ConfigError, OutputError, safe
from politune.presets import flatten
from politune.training import checkpoints
from politune.training.prepare import Prepared
from politune.training.processes import world_size

# Names whose content is compared instead: a path may be written differently, and a revision may move.
COMPARED_BY_HASH = ("model.model_name_or_path", "model.revision", "data.dataset_name", "data.dataset_revision")
# Of a packed call; what is chosen for a machine depends on its free memory, so a resumed run takes the former value.
CALL_TOKENS = "tokens per call"
OF_THE_MACHINE = (CALL_TOKENS, "processes", "threads", "device")
"""What only the steps that are left depend on: nothing where none is left, or none was saved."""


def identity_of(run: Run, prepared: Prepared, tokens_per_call: int | None) -> dict[str, Any]:
    """Everything that must be equal for a resumed run to give the bytes of an uninterrupted one, as plain JSON."""
    import torch

    settings = {
        key: value for key, value in flatten(run).items() if not key.startswith((*NOT_OF_AN_ADAPTER, *COMPARED_BY_HASH))
    }
    if run.data.recipe is not None:  # paths may be written differently here, too
        settings["data.recipe"] = public_recipe(run.data.recipe)
    accelerator = torch.accelerator.current_accelerator()
    found = {
        **settings,
        "sha256 of the data": prepared.table.sha256,
        "sha256 of the training tokens": prepared.tokens_sha256,
        "sha256 of the base model": prepared.base_sha256,
        "sha256 of the base model's config": record.sha256_of_json(prepared.base.config),
        CALL_TOKENS: tokens_per_call,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "device": accelerator.type if accelerator else "cpu",
        **{f"version of {name}": version for name, version in _versions().items()},
    }
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _versions() -> dict[str, str]:
    """Of what computes a step. A second release of Python with the same syntax computes the same."""
    found = record.environment()
    return {"python": ".".join(found["python"].split(".")[:2]), "politune": found["politune"], **found["libraries"]}


def check_checkpoint(checkpoint: Path, identity: Mapping[str, Any], *, is_last: bool) -> None:
    """Refuses a checkpoint of a run that was not the same.

    Args:
        is_last: no step is left, so that the machine is no matter.

    Raises:
        ConfigError: names what has changed, each with its old and new value.
    """
    before = checkpoints.identity_of(checkpoint)
    _refuse(*map(_of_the_run, (before, identity)) if is_last else (before, identity))


def check_papers(document: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuses to go on, without a checkpoint, in the directory of a run that was not the same: of a finished one, or of one
    that ended before its first checkpoint.

    Args:
        document: its run.json.

    Raises:
        ConfigError: names what has changed, each with its old and new value.
        OutputError: run.json does not say what the run was.
    """
    before = document.get("identity")
    if not isinstance(before, dict):
        raise OutputError("run.json is damaged or of another version of politune", fix="choose another --output_dir")
    _refuse(*map(_of_the_run, (before, identity)))


def _of_the_run(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in OF_THE_MACHINE}


def _refuse(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, now = _named(before), _named(now)
    if changed := [key for key in {**now, **before} if before.get(key) != now.get(key)]:
        lines = "; ".join(f"{safe(key)}: {safe(before.get(key))} -> {safe(now.get(key))}" for key in changed)
        fix = "use the former settings, or start anew in another --output_dir"
        raise ConfigError(f"cannot resume, because something has changed: {lines}", fix=fix)


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every value by its whole name, also those of a table within a table: `data.recipe.source.0.share`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, list) and any(isinstance(v, dict) for v in value) else value
        found |= (
            _named({f"{key}.{name}": each for name, each in inner.items()}) if isinstance(inner, dict) else {key: value}
        )
    return found
