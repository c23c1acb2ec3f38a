"""What a path to a tuned model means: its adapter, the papers of its run, and its base.

A run directory holds `adapter/` and run.json; an adapter directory may lie anywhere, and its own metadata then says what it was
trained on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from politune import record
from politune.config import DEMO_MODEL, ModelSpec
from politune.errors import ModelError, safe
from politune.models import adapter as adapters
from politune.models import load


def adapter_directory(path: Path) -> Path:
    """The adapter that a path means: its own `adapter/` where it is a run, else itself."""
    if not path.is_dir():
        raise ModelError(f"there is no directory {safe(path)}", fix="give a run directory or an adapter directory")
    if (path / "adapter").is_dir() and not (path / adapters.CONFIG).exists():
        return path / "adapter"
    if (path / adapters.CONFIG).exists() or (path / adapters.WEIGHTS).exists():
        return path
    if (path / "run.json").exists():
        status = safe((record.read_json(path / "run.json") or {}).get("status", "unknown"))
        raise ModelError(
            f"the run {safe(path)} has no adapter/", why=f"its status is {status}", fix="finish it with --resume"
        )
    raise ModelError(
        f"{safe(path)} is neither a run nor an adapter", why=f"there is no adapter/ and no {adapters.CONFIG} in it"
    )


def beside(adapter: Path) -> Path:
    """The directory that the adapter lies in; `.` and `..` do not say it by themselves."""
    return adapter.resolve().parent if adapter.name in {"", ".."} else adapter.parent


def base_spec(adapter: adapters.Adapter, papers: Mapping[str, Any], given: str | None) -> ModelSpec:
    """The base as given, else as the run beside the adapter recorded it, else by the adapter's own account."""
    ran_on = papers.get("base")
    recorded = ran_on.get("name") if isinstance(ran_on, dict) else adapter.base_name
    name = given or recorded
    if not isinstance(name, str) or not name:
        raise adapter.refusal("does not say which base model it belongs to", "name it with --base")
    if name.startswith("local:"):
        path = None if given else record.settings_of(papers).get("model.model_name_or_path")
        if not isinstance(path, str) or not load.is_directory(path):
            raise adapter.refusal(
                f"was trained on a local model, {safe(name.removeprefix('local:'))}", "say where it is with --base"
            )
        return ModelSpec(model_name_or_path=path)
    on_the_hub = name != DEMO_MODEL and not load.is_local(name)
    return ModelSpec(model_name_or_path=name, revision=adapter.base_commit if on_the_hub and name == recorded else None)
