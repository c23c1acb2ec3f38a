"""What a name or path of a model means: its base, and of a tuned one its adapter and the papers of its run.

A run directory holds `adapter/` and run.json; an adapter directory may lie anywhere, and its own metadata then says what it was
trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from politune import record
from politune.config import DEMO_MODEL, ModelSpec
from politune.errors import ConfigError, ModelError, safe
from politune.models import adapter as adapters
from politune.models import load

Dtype: TypeAlias = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Subject:
    """A model that is looked at, base and tuned where it has an adapter.

    Args:
        base: the base model, in 4 bits where the run had it so.
        adapter: its adapter, or None.
        papers: the run.json of the run that made the adapter; empty where there is none.
    """

    base: ModelSpec
    adapter: Path | None
    papers: dict[str, Any]

    @property
    def direction(self) -> str:
        """That the run declared."""
        return str(self.papers.get("direction", "undeclared"))

    @property
    def dtype(self) -> Dtype:
        """That the run computed in; float32 where no run is known."""
        settings = record.settings_of(self.papers)
        return "bfloat16" if settings.get("model.bf16") or settings.get("model.use_4bit") else "float32"


def subject(model: str, adapter: Path | None = None) -> Subject:
    """What a model's name or path means: a run or adapter directory, a checkpoint, a Hub id, or `demo`.

    Raises:
        ModelError: there is no such thing.
        ConfigError: two adapters are given.
    """
    if not model:
        raise ModelError("an empty name is no model", fix="give a run, a directory, a Hub id, or `demo`")
    path = Path(model).expanduser()
    is_tuned = load.is_directory(model) and any(
        (path / name).exists() for name in ("adapter", "run.json", adapters.CONFIG)
    )
    if is_tuned and adapter is not None:
        raise ConfigError(f"{safe(model)} holds an adapter already", where="--adapter", fix="name its base instead")
    place = path if is_tuned else adapter
    if place is None:
        return Subject(ModelSpec(model_name_or_path=model), None, {})
    directory = adapter_directory(place)
    papers = record.read_json(beside(directory) / "run.json") or {}
    base = base_spec(adapters.read(directory), papers, None if is_tuned else model)
    in_4_bits = bool(record.settings_of(papers).get("model.use_4bit"))
    return Subject(base.model_copy(update={"use_4bit": in_4_bits}), directory, papers)


def adapter_directory(path: Path) -> Path:
    """The adapter that a path means: its own `adapter/` where it is a run, else itself."""
    if not load.is_directory(str(path.absolute())):
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
