"""The whole user surface: parse, call one function, show its report. `main` is the one error boundary.

The settings of a run are not listed here: each field of `politune.config` becomes a flag of the same name.
"""

import contextlib
import errno
import io
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from typer.core import TyperGroup

from politune import __version__, interrupts, presets, report
from politune.config import ANSWER_TOKENS, SHIPPED_DATA, DataSpec, DpoRun, Run, SftRun
from politune.errors import (
    ConfigError,
    DataError,
    Interrupted,
    MachineError,
    OutputError,
    PolituneError,
    safe,
    without_secrets,
)
from politune.flags import kebab, normalise, with_settings
from politune.training.processes import is_main_process


class _Commands(TyperGroup):
    """Typer repeats the words that it cannot make sense of, hidden characters included; of Ctrl-C it says nothing."""

    def invoke(self, ctx: Any) -> Any:
        interrupts.raise_again()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", signal_number=signal.SIGINT) from None
        except Exception as error:
            if hasattr(error, "format_message") and isinstance(getattr(error, "message", None), str):
                error.message = safe(error.message, None)  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="politune",
    cls=_Commands,
    help="Political preference tuning of language models, as a research instrument: it takes no side and says what was done.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": kebab, "help_option_names": ["-h", "--help"]},
    epilog="Every flag may be written with - or _ (--lora-r, --lora_r). Start with: politune train dpo --preset demo-left",
)
train_app = typer.Typer(no_args_is_help=True, help="Tune a model: dpo (preferences) or sft (completions).")
presets_app = typer.Typer(help="List, show, check and export presets.")
instruments_app = typer.Typer(help="List, show, check and import the items that a model's lean is measured with.")
data_app = typer.Typer(
    no_args_is_help=True, help="Make data sets: build by a recipe, annotate with a model, synth from topics."
)
app.add_typer(train_app, name="train")

Json = Annotated[bool, typer.Option("--json", help="Print the report as one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress lines.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")]
PresetName = Annotated[str | None, typer.Option("--preset", help="A preset's name, or the path of a preset file.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="GROUP.NAME=VALUE", help="Set any setting; may be repeated.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, then stop before anything is loaded.")]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate", help="Measure for some seconds how fast this run would go, for the plan; it is remembered."
    ),
]
Measure = Annotated[
    Literal["before-after"] | None,
    typer.Option(
        "--measure", help="When the run is done, measure how far it moved the model's lean (`politune measure`)."
    ),
]
MOST_MINUTES = 60 * 24 * 60
"""No queue gives more than two months, and a timer takes no endless time."""


def _minutes(text: str) -> float:
    """A range of Typer's would let NaN pass."""
    with suppress(ValueError):
        if 0.1 <= float(text) <= MOST_MINUTES:
            return float(text)
    raise typer.BadParameter(f"{text} is no number of minutes from 0.1 to {MOST_MINUTES} (60 days)")


StopAfter = Annotated[
    float | None,
    typer.Option(
        "--stop-after",
        metavar="MINUTES",
        parser=_minutes,
        help="After so many minutes, save and leave as after SIGTERM: for queues with a time limit.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in --output-dir.")]
OF_THE_FILE_SYSTEM = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
"""What a path that the user names can run into anywhere, and that is no bug of politune's."""


def main() -> None:
    """Runs the command line; every error that the user can put right becomes one message and its exit code."""
    _prepare_environment()
    try:
        if int(os.environ.get("RANK", "0")) >= int(os.environ.get("WORLD_SIZE", "1")):
            raise ConfigError("RANK is set and WORLD_SIZE is not", fix="unset RANK, or start with torchrun")
        app(args=normalise(sys.argv[1:]))
    except PolituneError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary: what nobody foresaw is reported as a bug
        sys.exit(_report_unforeseen(error))


def _report_unforeseen(error: Exception) -> int:
    """One line about an error that is none of ours; its exit code."""
    if isinstance(error, ModuleNotFoundError):
        name, again = safe(error.name), "install politune again: pip install politune"
        _complain(f"the library {name} is missing. {again}; `politune doctor` shows the libraries")
        return MachineError.exit_code
    # Ctrl-C while pydantic builds a schema: it says that the schema cannot be built.
    if type(error).__module__.startswith("pydantic") and "KeyboardInterrupt" in str(error):
        _complain("interrupted")
        return 128 + signal.SIGINT
    if isinstance(error, MemoryError):
        _complain("this machine has too little free memory for it; `politune doctor` shows it under memory")
        return MachineError.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _complain("no space left where the output goes")
        return OutputError.exit_code
    if isinstance(error, OSError) and error.errno in OF_THE_FILE_SYSTEM and error.filename is not None:
        _complain(f"cannot use {safe(error.filename)}: {error.strerror}")
        return OutputError.exit_code
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # Path.expanduser, of `~name`
        named = next((word for word in sys.argv if "~" in word), "~")
        _complain(f"{safe(named)}: there is no such home directory")
        return ConfigError.exit_code
    what = f"this is a bug in politune: {type(error).__name__}: {safe(error)}"
    try:
        where = f"the traceback is in {_write_traceback()}"
    except OSError as refusal:
        where = f"its traceback could not be written: {refusal.strerror}"
    _complain(f"{what}\n{where}")
    return 1


def _prepare_environment() -> None:
    """Streams that can be written to, and what the libraries read when they are imported: no telemetry, no bars."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - open as long as the process
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # a caller put another file into the stream's place
                stream.reconfigure(errors="backslashreplace")
                if stream is getattr(sys, f"__{name}__"):
                    setattr(sys, name, _whoever_reads(stream))
    for name in (
        "HF_HUB_DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
        "TRL_EXPERIMENTAL_SILENCE",
    ):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class _Pipe(io.FileIO):
    """That nobody reads any more (`| head`) is no error of the command; a full disk is one once, and not at exit again."""

    has_failed = False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not (self.has_failed or isinstance(error, BrokenPipeError)):
                self.has_failed = True
                raise
            return memoryview(data).nbytes


def _whoever_reads(stream: Any) -> TextIO:
    """The same stream, which takes what is written after its reader has left."""
    pipe = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
    lines = stream.line_buffering or stream.write_through  # the second: python -u
    return io.TextIOWrapper(pipe, encoding=stream.encoding, errors=stream.errors, line_buffering=lines)


def _complain(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    where = f" (process {rank})" if rank != "0" else ""
    sys.stderr.write(f"politune{where}: {without_secrets(text)}\n")


def _write_traceback() -> str:
    handle, name = tempfile.mkstemp(prefix="politune-crash-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"politune {__version__}\n{without_secrets(traceback.format_exc())}")
    return name


def _say(quiet: bool) -> Callable[[str], None]:
    """A writer of progress lines to stderr, silent when asked to be and in all processes but the first."""
    if quiet or not is_main_process():
        return lambda line: None

    def say(line: str) -> None:
        with suppress(OSError):  # nobody reads any more: no reason to stop
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    return say


@contextmanager
def _stdout_reserved() -> Iterator[None]:
    """Libraries that print while they are imported or run print to stderr: stdout belongs to the report."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _train_command(method: Literal["dpo", "sft"]) -> Callable[..., None]:
    def command(
        *,
        settings: dict[str, Any],
        preset: PresetName = None,
        set_: Sets = None,
        dry_run: DryRun = False,
        calibrate: Calibrate = False,
        measure: Measure = None,
        stop_after: StopAfter = None,
        resume: Resume = False,
        offline: Offline = False,
        json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        resolved = presets.resolve(method, preset, settings, set_ or ())
        if dry_run:
            _show_plan(resolved.run, calibrate, json, quiet)
        else:
            _train(resolved, calibrate, measure is not None, stop_after, resume, offline, json, quiet)

    return command


train_app.command("dpo", help="Tune a LoRA adapter on preference pairs with DPO.")(
    with_settings(DpoRun)(_train_command("dpo"))
)
train_app.command("sft", help="Tune a LoRA adapter on completions.")(with_settings(SftRun)(_train_command("sft")))


def _show_plan(run: Run, calibrate: bool, as_json: bool, quiet: bool) -> None:
    from politune import preview

    if run.trl:
        from politune.training.run import check_trl_table

        check_trl_table(run)
    report.show(preview.plan_run(run, calibrate=calibrate, say=_say(quiet)), as_json=as_json)


def _train(
    resolved: presets.Resolved, calibrate: bool, measure: bool, stop_after: float | None, resume: bool, offline: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    from politune.training.processes import resuming
    from politune.training.signals import caught

    # What comes while the libraries are imported is not lost either: Python may drop what a handler raises there.
    with (
        _stdout_reserved(),
        caught(resuming(shlex.join(["politune", *sys.argv[1:]])), stop_after=stop_after) as stop,
    ):
        from politune.training import run as training

        result = training.train(
            resolved,
            resume=resume,
            offline=offline,
            quiet=quiet,
            calibrate=calibrate,
            measure=measure,
            stop=stop,
            say=_say(quiet),
            show=lambda estimate: None if quiet else report.show(estimate, as_json=False, file=sys.stderr),
        )
    if is_main_process():
        report.show(result, as_json=as_json)


@app.command("merge")
def merge_command(
    path: Annotated[
        list[str],
        typer.Argument(
            metavar="[adapter] PATH", help="A run directory or an adapter directory; `adapter` alone means ./adapter."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the merged model (default: beside the adapter).")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Number format of the merged model (default: the base model's own)."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base model, where the adapter's record of it does not lead to one."),
    ] = None,
    force_base: Annotated[
        bool,
        typer.Option("--force-base", help="Merge although the base is not the one that the adapter was trained on."),
    ] = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge an adapter into its base: a checkpoint that plain transformers loads."""
    words = path[1:] if path[0] == "adapter" and len(path) > 1 else path
    if len(words) != 1:
        raise ConfigError(f"merge takes one path, not {len(words)}: {safe(' '.join(words))}")
    from politune.models import merge
    from politune.training.signals import caught

    with _stdout_reserved(), caught(shlex.join(["politune", *sys.argv[1:]])):
        result = merge.merge(
            Path(words[0]),
            output=output,
            dtype=dtype,
            base=base,
            force_base=force_base,
            offline=offline,
            say=_say(quiet),
        )
    report.show(result, as_json=json)


@app.command("inspect-data")
def inspect_data(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]...",
            help="Files, `stances`, Hub ids; several are compared as arms (default: the demo's data).",
        ),
    ] = None,
    preset: PresetName = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Count tokens with this model's tokenizer (default: the preset's, where it is on this machine).",
        ),
    ] = None,
    dataset_revision: Annotated[
        str | None, typer.Option("--dataset-revision", help="Commit, tag or branch on the Hub.")
    ] = None,
    dataset_split: Annotated[
        str | None, typer.Option("--dataset-split", help="Split on the Hub, or of rows with a column `split`.")
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option("--direction", metavar="left|right|shuffled", help="Chosen side where a row holds both."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Longest prompt + completion, in tokens.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="A data file, Hub id or instrument to share no text with; may be repeated."),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", min=1, help="Rows that are looked at as texts: shortcuts, topics, tokens.")
    ] = 5000,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the report as one HTML page.")] = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what the trainer will see of data: what trains, shortcuts, leaks, and whether several sets are matched arms."""
    say = _say(quiet)
    if not data and preset is None:
        preset = "demo-left"
        say("no data named: showing the demo's (preset demo-left)")
    flags = {
        "data.dataset_name": data[0] if data else None,
        "data.dataset_revision": dataset_revision,
        "data.dataset_split": dataset_split,
        "data.direction": direction,
        "data.max_length": max_length,
    }
    if html:
        report.require_place(html)
    if data and data[0] in SHIPPED_DATA and direction is None and preset is None:
        flags["data.direction"] = "left"
    resolved = presets.resolve(
        None if preset else "dpo", preset, {**flags, "model.model_name_or_path": model or (None if preset else "demo")}
    )
    from politune.training.signals import caught

    with _stdout_reserved(), caught(shlex.join(["politune", *sys.argv[1:]])):
        from politune.inspection import inspect

        result = inspect.inspect(
            resolved.run,
            data or (),
            against=against or (),
            sample_rows=sample,
            tokenizer_asked_for=model is not None,
            offline=offline,
            say=say,
        )
    if html:
        report.write_html(result, html)
        say(f"wrote {safe(html)}")
    report.show(result, as_json=json)


@presets_app.callback(invoke_without_command=True)
def presets_command(context: typer.Context) -> None:
    """List the presets (same as `politune presets list`)."""
    if context.invoked_subcommand is None:
        report.show(presets.overview(), as_json=False)


@presets_app.command("list")
def presets_list(json: Json = False) -> None:
    """List the presets that are part of the package."""
    report.show(presets.overview(), as_json=json)


@presets_app.command("show")
def presets_show(name: Annotated[str, typer.Argument(help="A preset's name or file.")], json: Json = False) -> None:
    """Show every value with its origin and meaning, and the command that equals the preset."""
    report.show(presets.explain(presets.resolve(None, name)), as_json=json)


@presets_app.command("validate")
def presets_validate(file: Annotated[str, typer.Argument(help="A preset file.")]) -> None:
    """Check a preset file against the schema."""
    path = file if "/" in file or file.endswith(".toml") else f"./{file}"
    resolved = presets.resolve(None, path)
    typer.echo(f"{safe(file)} is a valid preset for `politune train {resolved.run.method}`")


@presets_app.command("export")
def presets_export(
    name: Annotated[str, typer.Argument(help="A preset's name.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write (default: stdout).")] = None,
) -> None:
    """Write a preset's file, to be changed and used with --preset FILE."""
    presets.export(name, output, typer.echo)


@presets_app.command("schema")
def presets_schema() -> None:
    """Print the JSON schema of preset files."""
    import json

    typer.echo(json.dumps(presets.json_schema(), indent=2))


app.add_typer(presets_app, name="presets")


@app.command("measure")
def measure_command(
    model: Annotated[
        str, typer.Argument(help="A run directory, an adapter, a checkpoint's directory, a Hub id, or `demo`.")
    ],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="An adapter of MODEL: both are measured.")] = None,
    instrument: Annotated[
        list[str] | None,
        typer.Option("--instrument", help="An instrument's name, or a .jsonl or .csv file; may be repeated."),
    ] = None,
    preset: Annotated[
        Literal["quick", "standard", "full"], typer.Option("--preset", help="How much is asked.")
    ] = "standard",
    asker: Annotated[
        str, typer.Option("--asker", help="What the questions say of who asks: none,left,right or some of them.")
    ] = "none",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--dtype", help="Number format to compute in (default: the run's, else float32)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws that the intervals come from.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new directory, or that of the same measurement to go on with.")
    ] = Path("measurement"),
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model's political lean; of a run or an adapter, how far tuning moved it, with an interval and a control."""
    askers = tuple(asker.split(","))
    if unknown := [each for each in askers if each not in ("none", "left", "right")]:
        raise ConfigError(f"{safe(unknown[0])} is none of none, left, right", where="--asker")
    from politune.training.signals import caught

    with _stdout_reserved(), caught(shlex.join(["politune", *sys.argv[1:]])):
        from politune.lean import measure

        result = measure.measure(
            model,
            adapter=adapter,
            instrument_names=instrument or (),
            preset=preset,
            askers=askers,  # type: ignore[arg-type]  # checked above
            dtype=dtype,
            seed=seed,
            output=output,
            offline=offline,
            say=_say(quiet),
        )
    report.show(result, as_json=json)


@app.command("compare")
def compare_command(
    base: Annotated[Path, typer.Argument(help="A measurement that has the base model's rows.")],
    tuned: Annotated[list[Path], typer.Argument(help="Measurements of tuned models.")],
    control: Annotated[
        Path | None, typer.Option("--control", help="A measurement of a control run, to be taken off item by item.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the report.")] = Path("comparison"),
    json: Json = False,
) -> None:
    """Compare measurements of tuned models with one of their base; nothing is loaded but their rows."""
    from politune.lean import compare

    report.show(compare.compare(base, tuned, control=control, output=output), as_json=json)


@app.command("study")
def study_command(
    study: Annotated[str, typer.Argument(help="A study's file, or `demo`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The study's directory (default: outputs/ and its name).")
    ] = None,
    run: Annotated[
        int | None, typer.Option("--run", metavar="N", help="Do one run only, numbered from 0: for array jobs.")
    ] = None,
    print_slurm: Annotated[
        bool,
        typer.Option("--print-slurm", help="Make the directory and print the study as a Slurm array job; run nothing."),
    ] = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train and measure every arm with every seed, whatever of it is missing, and compare them in one report."""
    from politune.study import run as studies
    from politune.training.signals import caught

    place = output or Path("outputs") / f"study-{Path(study).stem}"
    if print_slurm:
        typer.echo(studies.slurm_script(study, place, offline=offline), nl=False)
        return
    with caught(shlex.join(["politune", *sys.argv[1:]])):
        result = studies.study(study, place, only=run, offline=offline, quiet=quiet, say=_say(quiet))
    report.show(result, as_json=json)
    own = [each for each in result.failures if run is None or each.task == result.runs[run].run]
    if own:
        raise typer.Exit(own[0].exit_code)


@instruments_app.callback(invoke_without_command=True)
def instruments_command(context: typer.Context) -> None:
    """List the instruments (same as `politune instruments list`)."""
    if context.invoked_subcommand is None:
        instruments_list()


@instruments_app.command("list")
def instruments_list(json: Json = False) -> None:
    """List the instruments that are part of the package."""
    from politune.lean import instruments

    report.show(instruments.overview(), as_json=json)


@instruments_app.command("show")
def instruments_show(
    name: Annotated[str, typer.Argument(help="An instrument's name, or a .jsonl or .csv file.")], json: Json = False
) -> None:
    """Print every item, word for word."""
    from politune.lean import instruments

    report.show(instruments.contents(instruments.load(name)), as_json=json)


@instruments_app.command("check")
def instruments_check(
    name: Annotated[str, typer.Argument(help="An instrument's name, or a .jsonl or .csv file.")],
    against: Annotated[
        str | None, typer.Option("--against", help="Training data (as --dataset_name) to look for the same words in.")
    ] = None,
    json: Json = False,
) -> None:
    """Look for what would make a measurement misleading: one side, lengths, duplicates, few topics, items seen in training."""
    from politune.data import sources
    from politune.lean import instruments

    rows: Sequence[dict[str, object]] = []
    if against == "":
        raise ConfigError("an empty name is no data set", where="--against")
    if against:  # a shipped row holds both sides, whichever direction is asked for
        direction: Literal["left"] | None = "left" if against in SHIPPED_DATA else None
        rows = sources.load(DataSpec(dataset_name=against, direction=direction)).rows
    result = instruments.check(instruments.load(name), against=rows, against_name=against)
    report.show(result, as_json=json)
    if result.has_errors:
        raise typer.Exit(DataError.exit_code)


@instruments_app.command("import")
def instruments_import(
    kind: Annotated[
        Literal["propositions", "8values", "pairs"],
        typer.Argument(metavar="FORMAT", help="propositions (CSV), 8values (JSON), or pairs (CSV, a column per side)."),
    ],
    file: Annotated[Path, typer.Argument(help="The file to read.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The instrument to write, a new .jsonl file.")],
    licence: Annotated[
        str, typer.Option("--license", help="The items' licence, for the instrument's first line.")
    ] = "unknown",
    json: Json = False,
) -> None:
    """Rewrite items that you hold in another form as an instrument."""
    from politune.lean import importers

    report.show(importers.import_items(kind, file, output, licence=licence), as_json=json)


app.add_typer(instruments_app, name="instruments")


@data_app.command("build")
def data_build(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.toml", help="What it is made of, and how.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The .jsonl, .jsonl.gz or .parquet file to write."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a data set of others by a recipe: mixed, filtered, balanced, matched with its twin, a placebo, or a dose of it."""
    if output is None and not dry_run:
        raise ConfigError("no file to write", fix="name one with -o FILE, or look first with --dry-run")
    from politune.training.signals import caught

    with _stdout_reserved(), caught(shlex.join(["politune", *sys.argv[1:]])):
        from politune.data import build

        made = None if dry_run else output
        result = build.build(presets.read_recipe(recipe), made, offline=offline, say=_say(quiet))
    report.show(result, as_json=json)


@app.command("ask")
def ask_command(
    model: Annotated[
        str, typer.Argument(help="A run directory, an adapter, a checkpoint's directory, a Hub id, or `demo`.")
    ],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="An adapter of MODEL: both are asked.")] = None,
    question: Annotated[list[str] | None, typer.Option("--question", help="A question; may be repeated.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="An instrument with open requests, such as politune-open.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to each, where they are drawn.")] = 1,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0: the likeliest words; above it they are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")] = ANSWER_TOKENS,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory of answers.jsonl and the report; the same command goes on there (default: only shown).",
        ),
    ] = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask the base and the tuned model the same questions and show both answers."""
    from politune.training.signals import caught

    with _stdout_reserved(), caught(shlex.join(["politune", *sys.argv[1:]])):
        from politune.lean import ask

        result = ask.ask(
            model,
            adapter=adapter,
            questions=tuple(question or ()),
            prompts=prompts,
            samples=samples,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            output=output,
            offline=offline,
            say=_say(quiet),
        )
    report.show(result, as_json=json)


ByModel = Annotated[
    str | None, typer.Option("--model", help="Who answers: a run, an adapter, a checkpoint, a Hub id, or `demo`.")
]
ByEndpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint", metavar="URL", help="Who answers: an OpenAI-compatible API, such as http://127.0.0.1:8000/v1."
    ),
]
EndpointModel = Annotated[str | None, typer.Option("--endpoint-model", help="The model's name at the endpoint.")]
KeyEnv = Annotated[
    str | None,
    typer.Option(
        "--key-env",
        metavar="NAME",
        help="Environment variable that holds the endpoint's key, or `none` (default: OPENAI_API_KEY; none for this machine).",
    ),
]
Concurrency = Annotated[int, typer.Option("--concurrency", help="Requests to the endpoint at a time.")]
PriceIn = Annotated[float | None, typer.Option("--price-in", help="Money per million tokens of prompts.")]
PriceOut = Annotated[float | None, typer.Option("--price-out", help="Money per million tokens of answers.")]
CostOnly = Annotated[bool, typer.Option("--dry-run", help="Show the cost, then stop; nothing is asked or written.")]


@data_app.command("annotate")
def annotate_command(
    data: Annotated[str, typer.Argument(help="A file, `stances`, or a Hub id.")],
    model: ByModel = None,
    endpoint: ByEndpoint = None,
    endpoint_model: EndpointModel = None,
    key_env: KeyEnv = None,
    concurrency: Concurrency = 4,
    rubric: Annotated[str, typer.Option("--rubric", help="A shipped rubric's name, or a .toml file.")] = "political",
    direction: Annotated[
        Literal["left", "right", "shuffled"] | None,
        typer.Option("--direction", help="Chosen side where a row holds both (default: both keep their names)."),
    ] = None,
    dataset_revision: Annotated[
        str | None, typer.Option("--dataset-revision", help="Commit, tag or branch on the Hub.")
    ] = None,
    dataset_split: Annotated[str, typer.Option("--dataset-split", help="Split of the data set.")] = "train",
    gold: Annotated[
        Path | None,
        typer.Option("--gold", help="Hand labels to compare with: a table with row or id, and some of the columns."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Another annotation's directory, to compare two models.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Only the first N rows.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest words.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")] = 300,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new directory, or that of the same command to go on with.")
    ] = Path("annotation"),
    dry_run: CostOnly = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have a model answer a rubric about each row: topic, axis, stance; with its agreement with hand labels."""
    from politune.training.signals import caught

    with _stdout_reserved(), caught(shlex.join(["politune", *sys.argv[1:]])):
        from politune.selection import annotate
        from politune.selection.answering import Asking

        result = annotate.annotate(
            data,
            Asking(model, endpoint, endpoint_model, key_env, concurrency, price_in, price_out, offline),
            rubric_name=rubric,
            direction=direction,
            dataset_revision=dataset_revision,
            dataset_split=dataset_split,
            seed=seed,
            limit=limit,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            gold=gold,
            against=against,
            output=output,
            dry_run=dry_run,
            show=_show_cost(quiet),
            say=_say(quiet),
        )
    report.show(result, as_json=json)


@data_app.command("synth")
def synth_command(
    topics: Annotated[
        Path, typer.Argument(help="A .txt file with a topic on each line, or a table with a column topic.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .jsonl file to write.")],
    model: ByModel = None,
    endpoint: ByEndpoint = None,
    endpoint_model: EndpointModel = None,
    key_env: KeyEnv = None,
    concurrency: Concurrency = 4,
    per_topic: Annotated[int, typer.Option("--per-topic", help="Pairs for each topic.")] = 4,
    words: Annotated[int, typer.Option("--words", help="Words to ask for, of both sides.")] = 50,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest words.")] = 0.8,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest answer, in tokens (default: three for each word).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    dry_run: CostOnly = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have a model draft pairs of answers, one from each side, by prompts that differ in one word."""
    from politune.training.signals import caught

    with _stdout_reserved(), caught(shlex.join(["politune", *sys.argv[1:]])):
        from politune.selection import synth
        from politune.selection.answering import Asking

        result = synth.synth(
            topics,
            Asking(model, endpoint, endpoint_model, key_env, concurrency, price_in, price_out, offline),
            per_topic=per_topic,
            seed=seed,
            temperature=temperature,
            words=words,
            max_new_tokens=max_new_tokens,
            output=output,
            dry_run=dry_run,
            show=_show_cost(quiet),
            say=_say(quiet),
        )
    report.show(result, as_json=json)


app.add_typer(data_app, name="data")


def _show_cost(quiet: bool) -> Callable[[Any], None]:
    return lambda cost: None if quiet else report.show(cost, as_json=False, file=sys.stderr)


@app.command("doctor")
def doctor_command(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", help="Where runs are to be written: its disk counts.")
    ] = Path("outputs"),
    json: Json = False,
) -> None:
    """Show what this machine can do: devices, memory, disk, cache, logins (not their keys), versions."""
    from politune import doctor

    report.show(doctor.examine(output_dir), as_json=json)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"politune {__version__}")
        raise typer.Exit
