"""The schema's settings as flags of the command line: each field of a run's groups is one flag of the same name."""

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from politune import presets
from politune.config import GROUPS, DpoRun, SftRun
from politune.errors import ConfigError, safe

PANELS = {"model": "Model", "data": "Data", "lora": "Adapter", "train": "Training", "tracking": "Tracking"}
LISTS = ("--lora-target-modules", "--to")


def kebab(flag: str) -> str:
    """`lora_r` -> `lora-r`: both spellings are one flag."""
    return flag.replace("_", "-")


def with_settings(run_type: type[DpoRun] | type[SftRun]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the flags of every setting; it receives the given ones as `settings`, by dotted name."""
    fields = {
        name: (group, field)
        for group in GROUPS
        for name, field in run_type.model_fields[group].annotation.model_fields.items()  # type: ignore[union-attr]
        if name != "recipe"  # a table, not a value
    }

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        flags = [_parameter(name, group, field) for name, (group, field) in fields.items()]

        def called(**given: Any) -> None:
            settings = {f"{group}.{name}": _read(given.pop(name), field) for name, (group, field) in fields.items()}
            function(settings=settings, **given)

        own = [p for p in inspect.signature(function).parameters.values() if p.name != "settings"]
        called.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
        called.__doc__ = function.__doc__
        return called

    return decorate


def normalise(words: Sequence[str]) -> list[str]:
    """Old command lines made parseable: `--lora_target_modules a b` repeated per value, retired flags explained.

    Raises:
        ConfigError: a flag of the original scripts that has no meaning any more.
    """
    if not words or words[0] != "train":
        return list(words)
    normal: list[str] = []
    list_flag = ""
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", "")
        name = flag.removeprefix("--").replace("-", "_")
        _refuse_retired(word, name)
        if name in presets.RENAMED:
            word = f"--{presets.RENAMED[name].rpartition('.')[2]}{equals}{value}"
        if word.startswith("-"):
            list_flag = kebab(word) if kebab(word) in LISTS else ""
        elif list_flag and normal[-1] != list_flag:
            normal.append(list_flag)
        normal.append(list_flag if list_flag and word.startswith("-") else word)
    return normal


def _refuse_retired(word: str, name: str) -> None:
    if name in presets.RETIRED:
        raise ConfigError(f"{safe(word)} is no flag of politune", why=presets.RETIRED[name], fix="leave it out")
    if name == "resume_from_checkpoint":
        why = "it takes the newest whole checkpoint in --output_dir"
        raise ConfigError("--resume_from_checkpoint is called --resume here", why=why)


def _parameter(name: str, group: str, field: FieldInfo) -> inspect.Parameter:
    """A keyword parameter for Typer; None means that the flag was not given."""
    kind, metavar = _kind(field.annotation)
    flag = f"--{kebab(name)}/--no-{kebab(name)}" if kind is bool else f"--{kebab(name)}"
    silent = field.is_required() or field.default in (None, (), False)
    text = f"{field.description}" if silent else f"{field.description} (default {presets.show_value(field.default)})"
    option = typer.Option(flag, help=text, rich_help_panel=PANELS[group], metavar=metavar)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """The type that Typer parses and the word that stands for a value in the help.

    Numbers and choices are parsed as text and read by the schema, whose refusal names flag, value and reason.
    """
    if get_origin(annotation) in (types.UnionType, Union):
        annotation = next(part for part in get_args(annotation) if part is not types.NoneType)
    if get_origin(annotation) is tuple:
        return list[str], "NAME..."
    if get_origin(annotation) is Literal:
        choices = "|".join(get_args(annotation))
        return str, choices if len(choices) < 40 else "NAME"
    return (bool, None) if annotation is bool else (str, {int: "N", float: "X", str: "TEXT"}[annotation])


def _read(given: Any, field: FieldInfo) -> Any:
    return presets.parse_value(given) if isinstance(given, str) and field.annotation in (int, float) else given
