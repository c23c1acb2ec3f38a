"""Presets and the resolution of a run's settings: schema < preset < flags and `--set`.

A preset is one complete TOML file. `resolve` lays flags over it, validates the whole against the schema, and remembers of every
value where it came from; `explain` shows that.
"""

import difflib
import json
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from politune.config import GROUPS, KNOWN_GENERATORS, DpoRun, Recipe, Run, SftRun
from politune.errors import ConfigError, OutputError, read_within, safe
from politune.report import Lines, Section, Table

MAX_PRESET_BYTES = 64 * 1024
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_RUN_TYPES: dict[str, type[DpoRun] | type[SftRun]] = {"dpo": DpoRun, "sft": SftRun}
# Settings of the original scripts, and what became of them.
RETIRED = {
    "tokenizer_name": "the tokenizer is the base model's own, so that the two cannot disagree",
    "max_prompt_length": "TRL removed it; data.max_length limits prompt + completion",
    "fp16": "float16 training is not offered; use --bf16",
    "use_8bit": "8-bit training is not offered; use --use_4bit",
    "dataset_text_field": "the columns are recognised; see `politune inspect-data --help`",
    "eval_freq": "the lean is measured instead of sampled: --measure-every STEPS",
    "max_generated_tokens": "the lean is measured, not sampled; `politune ask` samples",
    "temperature": "the lean is measured, not sampled; `politune ask` samples",
    "top_k": "the lean is measured, not sampled; `politune ask` samples",
}
RENAMED = {"max_seq_length": "data.max_length"}
OF_ONE_SOURCE = ("dataset_name", "dataset_revision", "dataset_split", "direction")
"""Settings that a recipe has for each of its sources."""


@dataclass(frozen=True)
class Preset:
    """A preset as it was read: its table, and its text for line numbers."""

    name: str
    source: str
    text: str
    table: dict[str, Any]


@dataclass(frozen=True)
class Resolved:
    """A validated run and, for every setting by its dotted name, where its value came from."""

    run: Run
    origins: dict[str, str]
    preset: str | None = None


def shipped_names() -> list[str]:
    """Names of the presets inside the package, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__package__).iterdir()
        if entry.name.endswith(".toml")
    )


def read(name: str) -> Preset:
    """A shipped preset by name, or a preset file by path (anything with a slash or the suffix `.toml`).

    Raises:
        ConfigError: no such preset, not TOML, or too large.
    """
    if "/" in name or name.endswith(".toml"):
        return _parse(name, name, _read_file(Path(name), "preset", "`politune presets` lists the names"))
    shipped = shipped_names()
    if not _NAME.fullmatch(name) or name not in shipped:
        guess = difflib.get_close_matches(name, shipped, 1, 0.5)
        hint = f"did you mean {guess[0]!r}?" if guess else f"available: {', '.join(shipped)}."
        raise ConfigError(
            f"unknown preset {safe(name)!r}",
            fix=f"{hint} A preset file is named by a path, such as ./{safe(name)}.toml",
        )
    text = resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return _parse(name, f"{name}.toml", text)


def read_recipe(name: str) -> Recipe:
    """The recipe of a data set in a TOML file.

    Raises:
        ConfigError: there is none, it is no TOML, or the schema refuses it; names file and line.
    """
    loaded = _parse(name, name, _read_file(Path(name), "recipe", "name a .toml file"))
    try:
        return Recipe.model_validate(loaded.table)
    except ValidationError as error:
        raise _as_config_error(error, Recipe, {}, loaded) from None


def _read_file(path: Path, kind: str, fix: str) -> str:
    try:
        raw = read_within(path.expanduser(), MAX_PRESET_BYTES)
    except (OSError, RuntimeError, ValueError) as error:  # also `~name` of no user here, and a name with a NUL
        why = getattr(error, "strerror", None) or safe(error)
        raise ConfigError(f"cannot read the {kind} file {safe(path)}", why=why, fix=fix) from error
    if raw is None:
        raise ConfigError(f"the {kind} file {safe(path)} is larger than {MAX_PRESET_BYTES // 1024} KiB")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"byte 0x{raw[error.start]:02x} is not UTF-8", where=f"{safe(path)}:{line}") from error


def _parse(name: str, source: str, text: str) -> Preset:
    try:
        return Preset(name, source, text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        where = f"{safe(source)}:{found.group(1)}" if found else safe(source)
        raise ConfigError(f"not valid TOML: {safe(str(error).split(' (at')[0])}", where=where) from error
    except RecursionError as error:
        raise ConfigError("nested too deeply", where=safe(source)) from error
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"not valid TOML: {safe(error)}", where=safe(source)) from error


def resolve(
    method: Literal["dpo", "sft"] | None,
    preset: str | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> Resolved:
    """Schema < preset < flags and `--set`, validated.

    Args:
        method: the command's method; None takes the preset's.
        preset: a shipped name or a path.
        flags: given flags by dotted setting name (`train.beta`); None values count as not given.
        sets: `key=value` texts of `--set`.

    Raises:
        ConfigError: anything that the schema refuses, with the setting, its origin and, for a preset, its line.
    """
    loaded = read(preset) if preset is not None else None
    table: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if loaded:
        _refuse_two_lengths(_flatten(loaded.table), loaded)
        _overlay(table, origins, _flatten(loaded.table), lambda key: _place(loaded, key))
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    assigned = dict(_parse_assignment(text) for text in sets)
    if both := sorted(set(given) & set(assigned)):
        raise ConfigError(f"--{_leaf(both[0])} and --set {both[0]} both set {both[0]}", fix="give one of them")
    typed = given | assigned
    _refuse_two_lengths(typed)
    if typed.get("train.num_train_epochs") is not None and "train.max_steps" not in typed:
        # Instead of a preset's.
        _overlay(table, origins, {"train.max_steps": -1}, lambda key: "--num_train_epochs")
    _overlay(table, origins, given, lambda key: f"--{_leaf(key)}")
    _overlay(table, origins, assigned, lambda key: f"--set {key}")
    chosen = _method_of(table, method, loaded)
    model = table.get("model", {})
    if isinstance(model, dict) and "model_name_or_path" not in model:
        raise ConfigError(
            "no base model: --model_name_or_path is required unless a preset gives it", fix="try --preset demo-left"
        )
    try:
        run = _RUN_TYPES[chosen].model_validate(table)
    except ValidationError as error:
        raise _as_config_error(error, _RUN_TYPES[chosen], origins, loaded) from None
    return Resolved(run, {key: origins.get(key, "default") for key in flatten(run)}, preset)


def _refuse_two_lengths(values: Mapping[str, Any], preset: Preset | None = None) -> None:
    """Refuses epochs beside steps in one place, where neither overrides the other; flags may override a preset's epochs.

    Args:
        values: by dotted name, all flags or all of a preset; None counts as not given.
        preset: the one that they are of.

    Raises:
        ConfigError: both are given.
    """
    steps = values.get("train.max_steps")
    if isinstance(steps, int) and steps > 0 and values.get("train.num_train_epochs") is not None:
        names = "num_train_epochs and max_steps" if preset else "--num_train_epochs and --max_steps"
        where = _place(preset, "train.max_steps") if preset else None
        raise ConfigError(f"{names} both say how long the run is", where=where, fix="give one of them")


def _method_of(table: Mapping[str, Any], method: str | None, loaded: Preset | None) -> str:
    declared = table.get("method", method)
    if not isinstance(declared, str) or declared not in _RUN_TYPES:
        where = _place(loaded, "method") if loaded else None
        raise ConfigError(f"method must be 'dpo' or 'sft', not {safe(declared)!r}", where=where)
    if method is not None and declared != method and loaded:
        raise ConfigError(f"preset {safe(loaded.name)} is for `politune train {declared}`, not for `train {method}`")
    return str(declared)


def _overlay(table: dict[str, Any], origins: dict[str, str], values: Mapping[str, Any], origin: Any) -> None:
    for key, value in values.items():
        _group_of(table, key)[_leaf(key)] = value
        origins[key] = origin(key)


def _group_of(table: dict[str, Any], key: str) -> dict[str, Any]:
    node = table
    for group in key.split(".")[:-1]:
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{safe(group)} is a group of settings, not a value")
    return node


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train": {"beta": 1}}` -> `{"train.beta": 1}`, one level deep: groups are not nested."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def flatten(run: BaseModel) -> dict[str, Any]:
    """Every setting of a run by its dotted name, in the schema's order, but for those that another one makes idle."""
    ordered = {"method": None, "title": None, **dict.fromkeys(GROUPS), "trl": None}
    dumped = run.model_dump(mode="python")
    if dumped["data"]["recipe"] is None:
        del dumped["data"]["recipe"]
    else:  # it says all that these do
        dumped["data"] = {key: value for key, value in dumped["data"].items() if key not in OF_ONE_SOURCE}
    if dumped["train"]["max_steps"] > 0:
        del dumped["train"]["num_train_epochs"]
    return _flatten({key: dumped[key] for key in ordered})


def _parse_assignment(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    key = RENAMED.get(key.strip(), key.strip())
    if not equals or not key:
        raise ConfigError(
            f"--set {safe(text)!r} is not of the form group.name=value", fix="for example --set train.save_steps=50"
        )
    if "." not in key and key != "title":
        group = next((group for group in GROUPS if key in _fields_of(DpoRun, group) | _fields_of(SftRun, group)), None)
        hint = (
            f"write --set {group}.{safe(key)}={safe(raw)}"
            if group
            else "settings are named group.name, for example train.save_steps"
        )
        raise ConfigError(f"--set {safe(key)} names no group", fix=hint)
    return key, parse_value(raw)


def parse_value(text: str) -> Any:
    """What a value on the command line means: TOML where it is TOML (numbers, booleans, lists), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, a number of thousands of digits, thousands of brackets
        return text


def _fields_of(run_type: type[BaseModel], group: str) -> dict[str, Any]:
    """The fields of a group, which may stand in another one: `train`, `data.recipe.source`."""
    inner: type[BaseModel] | None = run_type
    for name in group.split("."):
        field = inner.model_fields.get(name) if inner else None
        inner = _model_in(field.annotation) if field else None
    return dict(inner.model_fields) if inner else {}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field is, or is a list of, or may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)


def _place(preset: Preset, key: str, index: int | None = None) -> str:
    """`file:line` of a setting in its preset, or of the nearest one around it, found by the table headers above it.

    Args:
        index: which of the tables `[[...]]` of that name it stands in, from 0.
    """
    current, is_asked, seen, nearest = "", True, Counter[str](), (0, 0)
    for number, line in enumerate(preset.text.splitlines(), 1):
        if header := re.match(r"\s*(\[{1,2})\s*([^\]]+?)\s*\]", line):
            here = current = header.group(2).strip("\"'")
            is_asked = index is None or header.group(1) == "[" or seen[current] == index
            seen[current] += 1
        elif assignment := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            written = assignment.group(1).replace('"', "").replace("'", "")
            here = f"{current}.{written}" if current else written
        else:
            continue
        if is_asked and here == key:
            return f"{safe(preset.source)}:{number}"
        if is_asked and key.startswith(f"{here}.") and len(here) > nearest[0]:
            nearest = (len(here), number)
    return f"{safe(preset.source)}:{nearest[1]}" if nearest[1] else safe(preset.source)


def _as_config_error(
    error: ValidationError, run_type: type[BaseModel], origins: Mapping[str, str], loaded: Preset | None
) -> ConfigError:
    """Pydantic's findings as one error: the first in full, the others named."""
    sentences = []
    for finding in error.errors():
        key = ".".join(str(part) for part in finding["loc"] if not isinstance(part, int))
        index = next((part for part in finding["loc"] if isinstance(part, int)), None)
        origin = origins.get(key) or _origin_of_group(key, origins, loaded, index)
        sentences.append((origin, *_sentence(finding, key, run_type)))
    origin, what, why, fix = sentences[0]
    more = "".join(f"\n{safe(o)}: {w}" if o else f"\n{w}" for o, w, _, _ in sentences[1:])
    return ConfigError(what + more, where=safe(origin) if origin else None, why=why, fix=fix)


def _origin_of_group(group: str, origins: Mapping[str, str], loaded: Preset | None, index: int | None) -> str | None:
    """Where a finding about a whole group comes from: a flag that touched it, else its header in the preset."""
    touched = [origin for key, origin in origins.items() if key.startswith(f"{group}.") and origin.startswith("--")]
    if touched:
        return touched[0]
    return _place(loaded, group, index) if loaded else None


def _sentence(finding: Mapping[str, Any], key: str, run_type: type[BaseModel]) -> tuple[str, str | None, str | None]:
    group, _, leaf = key.rpartition(".")
    if finding["type"] == "extra_forbidden":
        return _unknown_key(group, leaf, run_type)
    message = (
        str(finding["msg"]).removeprefix("Value error, ").replace("Input should be", "must be").replace("valid ", "")
    ).replace("a integer", "an integer")
    if finding["type"] in {"model_type", "model_attributes_type"}:
        return f"{safe(key)} is a group of settings and must be a table", None, None
    field = (_fields_of(run_type, group) if group else run_type.model_fields).get(leaf)
    extra = field.json_schema_extra if field is not None else None
    why = extra.get("why") if isinstance(extra, dict) else None
    value = finding.get("input")
    shown = f" = {safe(json.dumps(value, default=str), 60)}" if not isinstance(value, dict | BaseModel) else ""
    of = f"{safe(key)}{shown}: " if key else ""  # what is said of a whole file has no key
    return f"{of}{safe(message, 400)}", str(why) if why else None, None


def _unknown_key(group: str, leaf: str, run_type: type[BaseModel]) -> tuple[str, str | None, str | None]:
    name = safe(f"{group}.{leaf}" if group else leaf)
    if leaf in RETIRED:
        return f"{name} is not a setting of politune", RETIRED[leaf], "leave it out"
    if leaf in RENAMED:
        return f"unknown setting {name}", None, f"it is called {RENAMED[leaf]} here"
    groups = [g for g, field in run_type.model_fields.items() if _model_in(field.annotation)]
    known = {g: list(_fields_of(run_type, g)) for g in groups}
    for other, fields in known.items():
        if leaf in fields and other != group:
            return f"unknown setting {name}", None, f"{safe(leaf)} belongs to the group [{other}]"
    everywhere = {f"{g}.{field}": field for g, fields in known.items() for field in fields}
    if group and group not in known:  # a group within a group: its names mean something there alone
        guess = difflib.get_close_matches(leaf, list(_fields_of(run_type, group)), 1, 0.6)
        return f"unknown setting {name}", None, f"did you mean {group}.{guess[0]}?" if guess else None
    local = known.get(group) or list(run_type.model_fields)
    guess = difflib.get_close_matches(leaf, local, 1, 0.6) or difflib.get_close_matches(
        leaf, list(everywhere.values()), 1, 0.7
    )
    full = next(
        (dotted for dotted, field in everywhere.items() if guess and field == guess[0]), guess[0] if guess else ""
    )
    return (
        f"unknown setting {name}",
        None,
        f"did you mean {full}?" if guess else "`politune presets schema` lists every setting",
    )


@dataclass(frozen=True)
class SettingsReport:
    """Every setting of a run with its value, meaning and origin, and the command that equals it."""

    title: str
    method: str
    settings: tuple[tuple[str, Any, str, str], ...]
    command: str
    notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        return self.title

    def sections(self) -> Sequence[Section]:
        rows = tuple((key, show_value(value), origin, meaning) for key, value, origin, meaning in self.settings)
        shown: list[Section] = [Table("Settings", ("setting", "value", "origin", "meaning"), rows)]
        if self.notes:
            shown.append(Lines("Good to know", tuple(f"- {note}" for note in self.notes)))
        return [*shown, Lines("The same run as one command", (self.command,))]


def explain(resolved: Resolved) -> SettingsReport:
    """What `presets show` prints."""
    run = resolved.run
    settings = tuple(
        (key, list(value) if isinstance(value, tuple) else value, resolved.origins[key], _meaning(type(run), key))
        for key, value in flatten(run).items()
    )
    return SettingsReport(run.title or "run", run.method, settings, command(run), notes(run))


def _meaning(run_type: type[BaseModel], key: str) -> str:
    group, _, leaf = key.rpartition(".")
    fields = _fields_of(run_type, group) if group else dict(run_type.model_fields)
    return (fields[leaf].description or "").removesuffix(".") if leaf in fields else "handed to TRL"


def notes(run: Run) -> tuple[str, ...]:
    """What a reader of the original recipe should know about this run on the libraries of today."""
    # Imported here: the help of the command line needs neither.
    from politune.plan.notes import settings_without_effect
    from politune.record import generator_note

    found = list(settings_without_effect(run))
    if run.model.model_name_or_path in {"meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2"}:
        found.append(
            "the paper's torchtune recipe also put an adapter on the output layer; TRL 1.16 reads the output layer's own weight "
            "in its loss, so that part cannot be reproduced and the adapter covers the attention and MLP layers only"
        )
    recipe = run.data.recipe
    names = [each.name for each in recipe.source] if recipe else [run.data.dataset_name]
    told = (generator_note(KNOWN_GENERATORS.get(name), run.model.model_name_or_path) for name in names)
    found += dict.fromkeys(note for note in told if note)
    return tuple(found)


def show_value(value: Any) -> str:
    """A setting's value as a person writes it."""
    if isinstance(value, tuple | list):
        return " ".join(str(item) for item in value) or "-"
    if value is None or value == "" or value == {}:
        return "-"
    if isinstance(value, dict):
        return toml_value(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def command(run: Run) -> str:
    """The one full `politune train` command that equals this run, word for word for a shell."""
    words = ["politune", "train", run.method]
    for key, value in flatten(run).items():
        if key == "method" or value is None or value == () or value == {} or value == "":
            continue
        if key in ("title", "data.recipe") or key.startswith("trl."):
            words += ["--set", f"{key}={toml_value(value)}"]
        elif isinstance(value, bool):
            words += [f"--{_leaf(key)}"] if value else []
        elif isinstance(value, tuple):
            words += [f"--{_leaf(key)}", *value]
        else:
            words += [f"--{_leaf(key)}", str(value)]
    return shlex.join(words)


def toml_value(value: Any) -> str:
    """A value as TOML writes it on one line: JSON but for tables."""
    if isinstance(value, dict):
        given = {key: inner for key, inner in value.items() if inner is not None}  # TOML has no null
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(inner)}" for key, inner in given.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, date | time):  # TOML has them; no setting does, and what is read back says so
        return value.isoformat()
    return repr(value) if isinstance(value, float) else json.dumps(value)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a preset file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "politune preset",
        "oneOf": [DpoRun.model_json_schema(), SftRun.model_json_schema()],
    }


@dataclass(frozen=True)
class Overview:
    """The shipped presets, a line each."""

    presets: tuple[tuple[str, str, str, str, str], ...]

    @property
    def headline(self) -> str:
        return f"{len(self.presets)} presets"

    def sections(self) -> Sequence[Section]:
        note = "politune presets show NAME explains one; politune train METHOD --preset NAME runs it"
        return [Table("Presets", ("name", "method", "direction", "base model", "data"), self.presets, note)]


def overview() -> Overview:
    """What `politune presets` prints."""
    runs = {name: resolve(None, name).run for name in shipped_names()}
    return Overview(
        tuple(
            (name, run.method, run.data.declared_direction, run.model.model_name_or_path, run.data.name)
            for name, run in runs.items()
        )
    )


def export(name: str, output: Path | None, echo: Callable[[str], object]) -> None:
    """Writes a preset's text to a new file, or hands it to `echo`.

    Raises:
        OutputError: the file exists already or cannot be written.
    """
    text = read(name).text
    if output is None:
        echo(text.rstrip("\n"))
        return
    try:
        with output.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        raise OutputError(
            f"cannot write {safe(output)}", why=error.strerror, fix="name another file with -o"
        ) from error
