"""A study's file: which arms, which seeds, how they are measured. Every run of it is resolved before the first one starts."""

import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from politune import presets
from politune.config import GROUPS, NOT_OF_AN_ADAPTER
from politune.errors import ConfigError, PolituneError, read_within, safe
from politune.lean import measure
from politune.presets import Resolved

SUFFIX = ".toml"
MAX_BYTES = 64 * 1024
OWN = ("train.seed", "train.output_dir")
"""Settings that the study gives each run."""
MOVABLE = ("train.output_dir", "title")
"""Settings that may differ from one call of a study to the next."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(_Model):
    """How every run is measured."""

    preset: Literal["quick", "standard", "full"] = "standard"
    instruments: tuple[str, ...] = ()
    asker: tuple[Literal["none", "left", "right"], ...] = Field(default=("none",), min_length=1)


class Arm(_Model):
    """A preset, and what is set otherwise, by group: `train = { learning_rate = 1e-4 }`."""

    preset: str
    set: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Study(_Model):
    """A study as its file says it."""

    title: str
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    arms: dict[Name, Arm] = Field(min_length=1)
    control: str | None = None
    """The arm that shows what tuning does without politics; its run of the same seed is taken off."""
    measure: Measure = Measure()

    @model_validator(mode="after")
    def _hangs_together(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is there twice")
        if self.control is not None and self.control not in self.arms:
            raise ValueError(f"control names no arm: {self.control}")
        for name, arm in self.arms.items():
            if unknown := set(arm.set) - set(GROUPS) - {"trl"}:
                raise ValueError(f"arm {name} sets {sorted(unknown)[0]}, which is no group of settings")
            if own := [key for key in OWN if key.split(".")[1] in arm.set.get(key.split(".")[0], {})]:
                raise ValueError(f"arm {name} sets {own[0]}, which the study gives each run")
        return self


@dataclass(frozen=True)
class Task:
    """One run of a study.

    Args:
        arm, seed: which.
        directory: of the run.
        resolved: its settings.
        words: of `politune train` for it.
    """

    arm: str
    seed: int
    directory: Path
    resolved: Resolved
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def measurement(self) -> Path:
        return self.directory / "measurement"

    @property
    def settings(self) -> dict[str, Any]:
        """All but its place and title, as plain JSON."""
        values = {"method": self.resolved.run.method, **presets.flatten(self.resolved.run)}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if key not in MOVABLE}

    @property
    def adapters_settings(self) -> dict[str, Any]:
        """Without those that change how a run is followed and saved, but no adapter."""
        return {key: value for key, value in self.settings.items() if not key.startswith(NOT_OF_AN_ADAPTER)}


def shipped_names() -> tuple[str, ...]:
    """The studies that are part of the package."""
    folder = resources.files("politune.study") / "studies"
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in folder.iterdir() if path.name.endswith(SUFFIX)))


def load(name: str) -> Study:
    """A study that is part of the package, or from a file.

    Raises:
        ConfigError: there is none, or its file is wrong.
    """
    if name in shipped_names():
        text = (resources.files("politune.study") / "studies" / (name + SUFFIX)).read_text("utf-8")
    else:
        text = _read(name)
    try:
        study = Study.model_validate(tomllib.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        sentence = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(": ".join(safe(each) for each in (place, sentence) if each), where=safe(name)) from error
    except (ValueError, RecursionError) as error:  # also thousands of digits, or of brackets
        raise ConfigError(f"is not TOML: {safe(error)}", where=safe(name)) from error
    try:
        measure.given_instruments(study.measure.instruments, study.measure.preset)
    except PolituneError as error:
        raise ConfigError(error.what, where=f"{safe(name)}: measure.instruments", why=error.why) from error
    return study


def _read(name: str) -> str:
    path = Path(name).expanduser()
    try:
        raw = read_within(path, MAX_BYTES)
        if raw is None:
            raise ConfigError(f"{safe(name)} is larger than {MAX_BYTES // 1024} KiB")
        return raw.decode("utf-8-sig")
    except OSError as error:
        known = ", ".join(shipped_names())
        raise ConfigError(
            f"there is no study {safe(name)}", why=error.strerror, fix=f"name one of {known}, or a .toml file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8", where=safe(name)) from error


def tasks(study: Study, output: Path) -> tuple[Task, ...]:
    """Every run, seed by seed, so that a study that is stopped early has all arms of the seeds that it finished.

    Raises:
        ConfigError: an arm's settings are wrong, or two arms are the same.
    """
    found = tuple(
        _task(arm, name, seed, output / name / f"seed-{seed}")
        for seed in study.seeds
        for name, arm in study.arms.items()
    )
    for one, two in itertools.combinations(found[: len(study.arms)], 2):
        if one.adapters_settings == two.adapters_settings:
            raise ConfigError(
                f"arms {one.arm} and {two.arm} train the same",
                why="they differ at most in how a run is followed and saved",
                fix="leave one of them out",
            )
    return found


def _task(arm: Arm, name: str, seed: int, directory: Path) -> Task:
    changed = {f"{group}.{key}": value for group, values in arm.set.items() for key, value in values.items()}
    sets = [f"{key}={presets.toml_value(value)}" for key, value in changed.items()]
    given = {"train.seed": seed, "train.output_dir": str(directory)}
    try:
        resolved = presets.resolve(None, arm.preset, given, sets)
    except ConfigError as error:
        raise ConfigError(
            error.what,
            where=f"arm {name}: {error.where}" if error.where else f"arm {name}",
            why=error.why,
            fix=error.fix,
        ) from error
    words = ("train", resolved.run.method, "--preset", arm.preset, *_repeated("--set", sets), "--seed", str(seed))
    return Task(name, seed, directory, resolved, (*words, "--output_dir", str(directory)))


def _repeated(flag: str, values: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (flag, value))
