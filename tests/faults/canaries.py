"""Hostile input: what must not run, not connect, not end in a report or on a terminal, and what must not get out."""

import ast
import contextlib
import gzip
import importlib.metadata
import importlib.util
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypeAlias

import politune
from faults import hostile
from faults.figures import Figure, count, side_by_side
from faults.lab import Ended, Lab
from politune.errors import MAX_FOREIGN_CHARACTERS, safe

SOUND_CODES = (0, 2, 3, 4, 5, 6, 7, 8)
"""Of commands that end as designed: 1 is a bug, a number below zero a signal."""
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
MOST_RSS_BYTES = 500 * 10**6
IN_A_CHECKPOINT = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt")
PICKLES = (*IN_A_CHECKPOINT, "adapter_model.bin", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "vocab.pkl",
           "tokenizer.pkl", "model.ckpt", "consolidated.00.pth")  # fmt: skip


@dataclass(frozen=True)
class Sound:
    """What each trial takes a copy of, and makes hostile: a finished run, and an instrument.

    `before` is called in the child of each command, with the path of the canary.
    """

    lab: Lab
    run: Path
    instrument: Path
    before: Callable[[Path], None]

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"


Trial: TypeAlias = Callable[[Sound, Path], str | None]


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    with lab.place("sound") as place:
        sound = Sound(lab, place / "run", hostile.write_instrument(place / "small.jsonl"), watch)
        trained = lab.run(lab.train(sound.run))
        assert trained.code == 0, trained.err
        yield _guarded(sound, whole)
        yield _secrets(sound, whole)
        yield _can_fire(sound, whole)


def _guarded(sound: Sound, whole: bool) -> Figure:
    lines = {  # the longest first, so that the cores end together; of each line as many as `make test` does
        "reports": (_reports(), 1), "bombs": (_bombs(), 2), "network": (_network(), 1), "templates": (_templates(), 2),
        "models": (_code(), 4), "pickles": (_pickles(), 2), "adapters": (_adapters(), 6), "terminal": (_terminal(), 4),
        "paths": (_paths(), 4),
    }  # fmt: skip
    cases = [
        (f"{line}: {name}", trial)
        for line, (trials, some) in lines.items()
        for name, trial in list(trials.items())[:: 1 if whole else max(1, len(trials) // some)]
    ]

    def run(case: tuple[str, Trial]) -> str | None:
        name, trial = case
        with sound.lab.place("canary") as place:
            flaw = _found(trial, sound, place)
            return None if flaw is None else f"{name}: {flaw}"

    found = [
        *side_by_side(run, cases),
        _dangerous_calls(),
        _kernels_are_not_asked_for(),
        _strings(10_000 if whole else 1000),
    ]
    beside = ", ".join(f"{line} {len(trials)}" for line, (trials, _) in lines.items()) if whole else ""
    what = "hostile models, adapters, data and names: nothing runs, connects or reaches the terminal"
    return count(what, found, beside=beside, at_least=190 if whole else 1)


def _found(trial: Trial, sound: Sound, place: Path) -> str | None:
    """What a trial finds wrong, be it the canary."""
    flaw, canary = trial(sound, place), place / "canary"
    if flaw is None and canary.exists():
        told = canary.read_text(errors="replace")[:300] if canary.is_file() else "made"
        flaw = f"the canary is there: {told}"
    return flaw


def watch(canary: Path) -> None:
    """In the child: the Hub may be asked, as far as this goes; who connects to it, or asks at the keyboard, is told on."""
    import builtins
    import socket

    import huggingface_hub.constants as hub

    def told(what: str, error: type[Exception]) -> Callable[..., Any]:
        def tell(*args: object, **kwargs: object) -> Any:
            with canary.open("a") as file:
                file.write(f"{what} {args!r:.200}\n")
            raise error(what)

        return tell

    hub.HF_HUB_OFFLINE = False
    os.environ.pop("HF_HUB_OFFLINE", None)
    builtins.input = told("input", EOFError)
    socket.getaddrinfo = told("getaddrinfo", socket.gaierror)
    connect, tell = socket.socket.connect, told("connect", OSError)

    def connected(self: socket.socket, address: Any) -> None:
        here = self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1")
        return connect(self, address) if here else tell(address)

    socket.socket.connect = connected  # type: ignore[method-assign, assignment]
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - open as long as the process
    sys.stdin.readline = told("readline", EOFError)  # type: ignore[method-assign]


def _run(sound: Sound, place: Path, argv: Sequence[object], **options: Any) -> Ended:
    return sound.lab.run(argv, before=sound.before, given=[place / "canary"], **{"cwd": place, **options})


def _flaw(ended: Ended, codes: Sequence[int] = SOUND_CODES, seconds: float = 120) -> str | None:
    if ended.code not in codes:
        return f"exit {ended.code}: {ended.last[:300]}"
    if ended.seconds > seconds:
        return f"took {ended.seconds:.1f} s"
    if found := HIDDEN.search(ended.out + ended.err):
        return f"prints {found[0]!r}"
    return None


def _first(flaws: Iterator[str | None]) -> str | None:
    return next((flaw for flaw in flaws if flaw is not None), None)


# --- models and adapters ------------------------------------------------------------------------------------------------


def _commands(sound: Sound, place: Path, base: Path) -> dict[str, list[object]]:
    """Every command that reaches a base model."""
    lab = sound.lab
    shown = ["--instrument", sound.instrument, "--preset", "quick", "-o", place / "measured"]
    adapter = ["--adapter", sound.adapter]
    return {
        "train": lab.train(place / "out", model__model_name_or_path=base),
        "plan": [*lab.train(place / "out", model__model_name_or_path=base), "--dry-run"],
        "merge": ["merge", sound.adapter, "--base", base, "--force-base", "-o", place / "merged"],
        "measure": ["measure", base, *adapter, *shown],
        "ask": ["ask", base, *adapter, "--question", "Why?", "--max-new-tokens", "4"],
        "inspect-data": ["inspect-data", lab.pairs, "--model", base],
    }


COMMANDS = ("train", "merge", "measure", "inspect-data", "ask", "plan")


AUTO = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
CODE: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "config": ("config.json", {"auto_map": AUTO, "model_type": "evil"}, (4,)),
    "tokenizer": ("tokenizer_config.json", {"auto_map": AUTO, "tokenizer_class": "Evil"}, (0, 4)),
    "attention": ("config.json", {"attn_implementation": "attacker/evil", "use_kernels": True}, (0, 4)),
    "layers": ("config.json", {"num_hidden_layers": 10**7}, (0, 4, 7)),  # 7: their checkpoints fit on no disk
    "words": ("config.json", {"vocab_size": 10**12}, (0, 4)),
}
"""The file of a model, what is put into it, and the exit codes that may come of it."""


def _code() -> dict[str, Trial]:
    def trial(case: str, command: str, sound: Sound, place: Path) -> str | None:
        base = _with_code(case, sound, place)
        return _flaw(_run(sound, place, _commands(sound, place, base)[command]), CODE[case][2], seconds=20)

    return {f"{command} {case}": partial(trial, case, command) for command in COMMANDS for case in CODE}


def _with_code(case: str, sound: Sound, place: Path) -> Path:
    """A base model that brings code, or asks for what nobody has."""
    file, changes, _ = CODE[case]
    base = hostile.copied(sound.lab.base, place / "base")
    hostile.edit(base / file, **changes)
    hostile.write_code(base, place / "canary")
    return base


def _pickles() -> dict[str, Trial]:
    def base(command: str, sound: Sound, place: Path) -> str | None:
        model = hostile.copied(sound.lab.base, place / "base")
        hostile.write_pickles(model, place / "canary", PICKLES)
        return _flaw(_run(sound, place, _commands(sound, place, model)[command]), (0,))

    def only(command: str, sound: Sound, place: Path) -> str | None:
        model = hostile.copied(sound.lab.base, place / "base")
        hostile.write_pickles(model, place / "canary", PICKLES)
        (model / "model.safetensors").unlink()
        return _flaw(_run(sound, place, _commands(sound, place, model)[command]), (4,))

    def adapter(sound: Sound, place: Path, *, alone: bool) -> str | None:
        path = hostile.copied(sound.adapter, place / "adapter")
        hostile.write_pickles(path, place / "canary", PICKLES)
        if alone:
            (path / hostile.WEIGHTS).unlink()
        argv = ["measure", sound.lab.base, "--adapter", path, "--instrument", sound.instrument, "--preset", "quick"]
        return _flaw(_run(sound, place, argv), (4,) if alone else (0,))

    def checkpoint(names: tuple[str, ...], sound: Sound, place: Path) -> str | None:
        """A run of somebody else's, to go on with: its marker says that the files are those that were written."""
        run = hostile.copied(sound.run, place / "run")
        shutil.rmtree(run / "adapter")
        hostile.edit(run / "run.json", status="interrupted")
        newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        shutil.rmtree(newest)  # of the last step: training has to go on
        left = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        hostile.write_pickles(left, place / "canary", names)
        if "adapter_model.bin" in names:
            (left / hostile.WEIGHTS).unlink()
        hostile.write_marker(left)
        ended = _run(sound, place, [*sound.lab.train(run), "--resume"])
        taken = f"resuming from {left.name}" in ended.err.splitlines()
        return _flaw(ended, (0, 4)) or (None if taken else f"does not resume from {left.name}: {ended.err[-300:]}")

    files = {"all": IN_A_CHECKPOINT, "weights": ("adapter_model.bin",)}
    files |= {name: (name,) for name in IN_A_CHECKPOINT}
    return {
        **{f"resume {name}": partial(checkpoint, names) for name, names in files.items()},
        **{f"{command} beside the weights": partial(base, command) for command in COMMANDS},
        **{f"{command} alone": partial(only, command) for command in COMMANDS},
        "an adapter beside": partial(adapter, alone=False),
        "an adapter alone": partial(adapter, alone=True),
    }


def _adapters() -> dict[str, Trial]:
    return {name: partial(_merged, change) for name, change in hostile.adapters().items()}


def _merged(change: Callable[[Path], None], sound: Sound, place: Path) -> str | None:
    """An adapter that something was done to is refused."""
    path = hostile.copied(sound.adapter, place / "adapter")
    change(path)
    hostile.write_code(path, place / "canary")
    argv = ["merge", path, "--base", sound.lab.base, "-o", place / "merged"]
    return _flaw(_run(sound, place, argv), (4,), seconds=10)


def _templates() -> dict[str, Trial]:
    def base(name: str, command: str, sound: Sound, place: Path) -> str | None:
        model = _with_template(name, sound, place)
        return _flaw(_run(sound, place, _commands(sound, place, model)[command]), (4,), seconds=10)

    def adapter(sound: Sound, place: Path) -> str | None:
        """The template is the base's: the adapter's own is never read."""
        path = hostile.copied(sound.adapter, place / "adapter")
        (path / "chat_template.jinja").write_text(hostile.ENDLESS)
        hostile.edit(path / "tokenizer_config.json", chat_template=hostile.ENDLESS)
        argv = ["ask", sound.lab.base, "--adapter", path, "--question", "Why?", "--max-new-tokens", "4"]
        return _flaw(_run(sound, place, argv), (0,))

    names = list(hostile.TEMPLATES)
    reaching = [name for name in COMMANDS if name != "plan"]
    commands = {name: reaching[number % len(reaching)] for number, name in enumerate(names)}
    return {
        "of the adapter": adapter,
        **{f"{command} {name}": partial(base, name, command) for name, command in commands.items()},
        **{f"{command} {names[0]}": partial(base, names[0], command) for command in reaching[1:]},
    }


def _with_template(name: str, sound: Sound, place: Path) -> Path:
    model = hostile.copied(sound.lab.base, place / "base")
    if len(name) % 2:
        (model / "chat_template.jinja").write_text(hostile.TEMPLATES[name])
    else:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        hostile.edit(model / "tokenizer_config.json", chat_template=hostile.TEMPLATES[name])
    return model


# --- what is printed and written ----------------------------------------------------------------------------------------


def _terminal() -> dict[str, Trial]:
    text = hostile.TEXT
    wrong: dict[str, list[object]] = {
        "a preset": ["train", "dpo", "--preset", text],
        "a flag": ["train", "dpo", f"--{text}"],
        "a command": [text],
        "a second word": ["doctor", text],
        "a choice": ["merge", "x", "--dtype", text],
        "a number": ["ask", "demo", "--samples", text],
        "a value": ["train", "dpo", "--preset", "demo-left", "--beta", text],
        "a key": ["train", "dpo", "--preset", "demo-left", "--set", f"{text}={text}"],
        "a key in a group": ["train", "dpo", "--preset", "demo-left", "--set", f"train.{text}=1"],
        "a layer": [
            "train",
            "dpo",
            "--preset",
            "demo-left",
            "--model-name-or-path",
            "{base}",
            "--lora-target-modules",
            text,
        ],
        "a path to merge": ["merge", f"./{text}"],
        "a model to measure": ["measure", text],
        "an adapter": ["ask", "demo", "--adapter", text],
        "data": ["inspect-data", f"./{text}.jsonl"],
        "an instrument": ["instruments", "show", text],
        "a study": ["study", text],
        "an asker": ["measure", "demo", "--asker", text],
    }

    def message(argv: list[object], sound: Sound, place: Path) -> str | None:
        words = [str(word).replace("{base}", str(sound.lab.base)) for word in argv]
        return _flaw(_run(sound, place, words), (2, 3, 4, 7))

    def data(sound: Sound, place: Path) -> str | None:
        rows = hostile.write_rows(place / f"{hostile.TEXT.replace('/', '')}.jsonl"[-200:])
        return _flaw(_run(sound, place, ["inspect-data", rows, "--model", sound.lab.base]), (0,))

    def terminal(sound: Sound, place: Path) -> str | None:
        rows = hostile.write_rows(place / "rows.jsonl")
        leader, follower = pty.openpty()
        argv = ["inspect-data", rows, "--model", sound.lab.base]
        terminal, kind = os.ttyname(follower), {"TERM": "xterm-256color"}
        child = sound.lab.start(
            argv, before=print_on, given=[terminal, sound.before, place / "canary"], environment=kind, cwd=place
        )
        over = threading.Event()
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(_read_until_silent, leader, over)
            ended = child.wait()  # in one thread alone: two that ask after one process can take another one's answer
            over.set()
            seen = reading.result()
        os.close(leader)
        os.close(follower)
        if "\x1b[31mred" in seen or "\x1b[" not in seen:
            return f"exit {ended.code}, a colour of the data or none of its own: {seen[-200:]!r}"
        return _flaw(Ended(ended.code, COLOURS.sub("", seen).replace("\r\n", "\n"), "", ended.seconds), (0,))

    def preset(key: str, code: int, sound: Sound, place: Path) -> str | None:
        # TOML has the escapes of JSON, and wants this character as one, too.
        title, name = (json.dumps(text).replace("\x7f", "\\u007f") for text in (hostile.TEXT, key))
        model = f'[model]\nmodel_name_or_path = "demo"\n[data]\ndataset_name = {title}\n[train]\n{name} = 1\n'
        (place / "x.toml").write_text(f'method = "dpo"\ntitle = {title}\n{model}', encoding="utf-8")
        return _flaw(_run(sound, place, ["presets", "show", place / "x.toml"]), (code,))

    return {
        "data": data,
        "data on a terminal": terminal,
        "a preset's texts": partial(preset, "beta", 0),
        "a preset's key": partial(preset, hostile.TEXT[:60], 2),
        **{f"{name} in a message": partial(message, argv) for name, argv in wrong.items()},
    }


def print_on(terminal: str, before: Callable[[Path], None], canary: Path) -> None:
    """In the child."""
    before(canary)
    handle = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    for number in (1, 2):
        os.dup2(handle, number)


def _read_until_silent(leader: int, over: threading.Event) -> str:
    """What comes out of a terminal, until its process has ended and nothing more comes."""
    seen, ended = b"", False
    while not ended:
        ended = over.is_set()
        while select.select([leader], [], [], 0.2)[0]:
            seen += os.read(leader, 65536)
    return seen.decode(errors="replace")


class Page(HTMLParser):
    """The tags and attributes of a page, and what of them no page of politune has."""

    TAGS = frozenset({
        "html", "head", "meta", "title", "style", "body", "header", "p", "h1", "h2", "main", "footer", "section", "table",
        "thead", "tbody", "tr", "th", "td", "div", "pre", "details", "summary", "figure", "svg", "g", "text", "line", "rect",
        "circle", "polyline", "desc",
    })  # fmt: skip

    def __init__(self, text: str) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.styles = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.styles += tag == "style"
        bad = [
            name
            for name, value in attrs
            if name.startswith("on") or name in ("href", "src") or "script:" in (value or "")
        ]
        if tag not in self.TAGS or bad:
            self.wrong.append(f"<{tag} {' '.join(bad)}>")


def _page_flaw(path: Path) -> str | None:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    if page.wrong or page.styles != 1:
        return f"{path.name} holds {page.wrong[:3]}, {page.styles} style sheets"
    found = HIDDEN.search(text)
    return f"{path.name} holds {found[0]!r}" if found else None


def _card_flaw(path: Path) -> str | None:
    import yaml

    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    keys = set(yaml.safe_load(front))
    known = {"library_name", "license", "base_model", "base_model_relation", "datasets", "tags"}
    outside = re.sub(r"`[^`\n]*`", "", body)
    if keys - known or yaml.safe_load(front).get("license") == "mit":
        return f"its front matter has {sorted(keys)}"
    if found := re.search(r"<|`|\]\(|^(---|=HYPER|# heading)", outside, re.MULTILINE) or HIDDEN.search(body):
        return f"its card holds {found[0]!r}"
    return None


def _reports() -> dict[str, Trial]:
    def chain(sound: Sound, place: Path) -> str | None:
        """A run on hostile rows, of a hostile name, measured with hostile items, asked hostile questions, compared."""
        lab, run = sound.lab, place / "out [x] <script>alert(1)</script> \x1b[31m=1+1"[:60].replace("/", "")
        base = hostile.copied(lab.base, place / "base <b> `x`")
        (base / "README.md").write_text('---\nlicense: "x\'<script>`"\n---\n# ](javascript:x)')
        rows = hostile.write_rows(place / "rows <img src=x onerror=1> `.jsonl")
        items = hostile.write_instrument(place / "items.jsonl", hostile.TEXT)
        train = lab.train(run, model__model_name_or_path=base, data__dataset_name=rows, data__max_length=2000)
        train += ["--set", f"title={hostile.LINES}", "--set", 'tracking.to=["tensorboard"]']
        asked = ["--instrument", items, "--preset", "quick"]
        commands: list[tuple[list[object], tuple[int, ...]]] = [
            (train, (0,)),
            (["inspect-data", rows, "--model", base, "--html", place / "data.html"], (0,)),
            (["measure", run, *asked, "-o", place / "measured"], (0,)),
            (["measure", base, *asked, "-o", place / "base-measured"], (0,)),
            (["ask", run, "--question", hostile.LINES, "--max-new-tokens", "4", "-o", place / "asked"], (0,)),
            (["instruments", "show", items], (0,)),
            (["instruments", "check", items], (0, 3)),
            (["merge", run, "-o", place / "merged"], (0,)),
            (["compare", place / "measured", place / "measured", "-o", place / "compared"], (0,)),
        ]
        for argv, codes in commands:
            if flaw := _flaw(_run(sound, place, argv), codes):
                return f"{argv[0]}: {flaw}"
        return _first(_papers(place))

    def study(sound: Sound, place: Path) -> str | None:
        path = place / "study.toml"
        _write_study(path, sound, title=hostile.TEXT, data=hostile.write_rows(place / "rows.jsonl"))
        ended = _run(sound, place, ["study", path, "-o", place / "study"])
        pages = [*(place / "study").rglob("*.html")]
        return _flaw(ended, (0,)) or _first(_papers(place)) or (None if pages else "no page was written")

    return {"every page and card": chain, "a study's page": study}


def _papers(place: Path) -> Iterator[str | None]:
    """The flaws of every page, card, JSON and CSV file below a place."""
    yield from map(_page_flaw, place.rglob("*.html"))
    for directory in ("adapter", "merged"):
        yield from map(_card_flaw, place.rglob(f"{directory}/README.md"))
    for path in place.rglob("*.jsonl"):
        try:
            for line in path.read_text(encoding="utf-8").split("\n"):
                json.loads(line or "{}")
        except ValueError as error:
            yield f"{path.name} is no JSON Lines: {error}"
    yield from (f"{path.name} may begin a cell with a formula" for path in place.rglob("*.csv"))


def _write_study(path: Path, sound: Sound, *, title: str = "x", arm: str = "left", data: Path | None = None) -> None:
    settings = (
        f"{{ model = {{ model_name_or_path = {json.dumps(str(sound.lab.base))}, bf16 = false }},"
        f" data = {{ dataset_name = {json.dumps(str(data or sound.lab.pairs))}, max_length = 2000 }},"
        " lora = { lora_r = 4 }, train = { num_train_epochs = 1, warmup_steps = 0, learning_rate = 1e-2 } }"
    )
    path.write_text(
        f"title = {json.dumps(title)}\nseeds = [1]\n"
        f'measure = {{ preset = "quick", instruments = [{json.dumps(str(sound.instrument))}] }}\n'
        f'[arms.{json.dumps(arm)}]\npreset = "demo-left"\nset = {settings}\n'
    )


# --- names, files, the network ------------------------------------------------------------------------------------------


def _paths() -> dict[str, Trial]:
    names = (
        "../../etc/passwd",
        "..%2fleft",
        "/etc/passwd",
        "demo-left/../../x",
        "..",
        ".",
        "",
        "DEMO-LEFT",
        "a" * 5000,
    )
    missing: dict[str, list[object]] = {
        "merge": ["merge", "runs/left-typo"],
        "merge an old form": ["merge", "adapter", "runs/left-typo"],
        "measure an adapter": ["measure", "demo", "--adapter", "runs/left-typo"],
        "ask with an adapter": ["ask", "demo", "--adapter", "owner/left-typo"],
        "measure": ["measure", "./left-typo"],
        "measure a run": ["measure", "runs/left-typo/"],
        "ask": ["ask", "~nobody-here/left-typo"],
        "inspect": ["inspect-data", "stances", "--model", "../left-typo"],
    }

    def link(sound: Sound, place: Path) -> str | None:
        (place / "link.toml").symlink_to("/etc/passwd")
        return _refused(["train", "dpo", "--preset", place / "link.toml"], (2,), sound, place)

    def shards(sound: Sound, place: Path) -> str | None:
        model = hostile.copied(sound.lab.base, place / "base")
        shutil.move(model / "model.safetensors", place / "secret.safetensors")
        (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../secret.safetensors"}}')
        return _refused(["measure", model], (4,), sound, place)

    def linked(sound: Sound, place: Path) -> str | None:
        """A link in a model that somebody packed up: what it leads to on this machine is no part of what is merged."""
        model = hostile.copied(sound.lab.base, place / "base")
        (place / "secret").write_text(PASSWORD)
        for name in ("LICENSE", "tokenizer_secret.json"):
            (model / name).symlink_to(place / "secret")
        argv = ["merge", sound.adapter, "--base", model, "--force-base", "-o", place / "merged"]
        flaw = _refused(argv, (0, 4), sound, place)
        return flaw or _first(
            f"{path.name} is merged" for path in place.glob("merged/*") if PASSWORD.encode() in path.read_bytes()
        )

    def arm(name: str, sound: Sound, place: Path) -> str | None:
        _write_study(place / "study.toml", sound, arm=name)
        return _refused(["study", place / "study.toml", "-o", place / "study"], (2,), sound, place)

    def nul(setting: str, sound: Sound, place: Path) -> str | None:
        argv = [*sound.lab.train(place / "run"), "--set", f'{setting}="a\\u0000b"']
        return _refused(argv, (2, 3, 4, 7), sound, place)

    return {
        **{f"{name} to nothing": partial(_refused, argv, (2, 4)) for name, argv in missing.items()},
        **{f"the preset {name:.20}": partial(_refused, ["presets", "show", name], (2,)) for name in names},
        **{
            f"the instrument {name:.20}": partial(_refused, ["instruments", "show", name], (2, 3)) for name in names[:3]
        },
        **{f"the study {name:.20}": partial(_refused, ["study", name, "-o", "x"], (2,)) for name in names[:3]},
        **{f"the arm {name:.20}": partial(arm, name) for name in ("../x", "/x", "a/b", "")},
        **{
            f"NUL in {name}": partial(nul, name)
            for name in ("train.output_dir", "data.dataset_name", "model.model_name_or_path")
        },
        "a preset that is a link": link,
        "shards elsewhere": shards,
        "links out of a base": linked,
    }


def _refused(argv: list[object], codes: tuple[int, ...], sound: Sound, place: Path) -> str | None:
    ended = _run(sound, place, argv)
    return _flaw(ended, codes, seconds=10) or ("shows the file" if "root:" in ended.out + ended.err else None)


def _bombs() -> dict[str, Trial]:
    """In processes of their own, without what the lab has imported, so that their memory is theirs."""

    def trial(name: str, sound: Sound, place: Path) -> str | None:
        write, argv, expected = hostile.bombs(place, sound.lab.base)[name]
        write()
        nothing_cached = {"POLITUNE_CACHE": str(place / "cache")}  # a tokenizer would take memory and time of its own
        seconds, code, rss_bytes, words = _alone(argv, nothing_cached)
        held = f"exit {code} after {seconds:.1f} s with {rss_bytes / 1e6:.0f} MB: {words[:200]}"
        return None if code == expected and seconds < 5 and rss_bytes < MOST_RSS_BYTES else held

    return {name: partial(trial, name) for name in hostile.bombs(Path(), Path())}


def _alone(argv: Sequence[object], environment: Mapping[str, str] = {}) -> tuple[float, int, int, str]:
    """(processor seconds, exit code, most memory in bytes, stderr) of a command, in a process that was not forked from here."""
    return _alone_python(["-m", "politune", *argv], environment)


def _alone_python(argv: Sequence[object], environment: Mapping[str, str] = {}) -> tuple[float, int, int, str]:
    """The same of what Python does with these arguments."""
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, argv)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    code, seconds, kilobytes = json.loads(ended.stdout)
    return seconds, code, kilobytes * 1024, ended.stderr


# A process between: the kernel counts as a child's memory what its parent held when it was forked.
MEASURED = """
import json, resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # what asks for 50 GB gets an error, not the machine's memory
ended = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([ended.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""
KERNELS = """
import os
def get_kernel(*args, **kwargs):
    os.makedirs(os.environ["CANARY"], exist_ok=True)
    raise RuntimeError("asked for")
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else self
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything
"""


def _network() -> dict[str, Trial]:
    def telemetry(sound: Sound, place: Path) -> str | None:
        lab, run = sound.lab, place / "run"
        for argv in (
            lab.train(run),
            ["measure", run, "--instrument", sound.instrument, "--preset", "quick", "-o", place / "measured"],
            ["merge", run, "-o", place / "merged"],
        ):
            if flaw := _flaw(_run(sound, place, argv), (0,)):
                return f"{argv[0]}: {flaw}"
        return None

    def kernels(command: str, sound: Sound, place: Path) -> str | None:
        base, environment = _with_kernels(sound, place)
        _, code, _, words = _alone(_commands(sound, place, base)[command], environment)
        return None if code == 0 else f"exit {code}: {words[-300:]}"

    def calibrated(sound: Sound, place: Path) -> str | None:
        """The stand-in of the model is built from its config, in a process of its own."""
        base, environment = _with_kernels(sound, place)
        _, code, _, words = _alone([*_commands(sound, place, base)["plan"], "--calibrate"], environment)
        good = code == 0 and "not calibrated" not in words
        return None if good else f"exit {code}: {words[-300:]}"

    return {
        "a run, its measurement and its merge": telemetry,
        **{f"{command} with kernels": partial(kernels, command) for command in ("merge", "train", "measure")},
        "a calibration with kernels": calibrated,
    }


def _with_kernels(sound: Sound, place: Path) -> tuple[Path, dict[str, str]]:
    """(a base that names one, the environment of a process that finds a `kernels` of a version that transformers takes)."""
    (place / "kernels" / "layer").mkdir(parents=True)
    (place / "kernels" / "__init__.py").write_text(KERNELS)
    (place / "kernels" / "layer" / "__init__.py").touch()
    (place / "kernels" / "layer" / "mode.py").write_text("from kernels import Mode\n")
    (place / "kernels-0.18.3.dist-info").mkdir()
    (place / "kernels-0.18.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n"
    )
    base = hostile.copied(sound.lab.base, place / "base")
    hostile.edit(base / "config.json", attn_implementation="attacker/evil")
    path = f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return base, {"PYTHONPATH": path, "CANARY": str(place / "canary")}


def _kernels_are_not_asked_for() -> str | None:
    wanted = [text for text in importlib.metadata.requires("politune") or () if re.match(r"kernels\b", text)]
    return f"politune asks for {wanted}" if wanted or importlib.util.find_spec("kernels") else None


def _dangerous_calls() -> str | None:
    """Over the source: what would run code of others, whatever it is called with."""
    found = [
        f"{path.name}:{getattr(node, 'lineno', 0)} {flaw}"
        for path in sorted(Path(politune.__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (flaw := _dangerous(node))
    ]
    return f"the source has {found}" if found else None


def _dangerous(node: ast.AST) -> str | None:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "xmlrpc", "telnetlib"}
    match node:
        case ast.Import(names=names) if wrong := modules & {alias.name.partition(".")[0] for alias in names}:
            return f"import {wrong}"
        case ast.ImportFrom(module=str(module), names=names):
            if module.partition(".")[0] in modules or any("AutoPeft" in alias.name for alias in names):
                return f"from {module}"
        case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
            return "weights_only=False"
        case ast.keyword(arg="trust_remote_code", value=value) if not _is(value, False):
            return "trust_remote_code"
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                told = isinstance(getattr(value, "value", None), str)  # what is said of it, in a table of settings
                if _is(key, "trust_remote_code") and not told and not _is(value, False):
                    return "trust_remote_code"
        case ast.keyword(arg="shell", value=value) if not _is(value, False):
            return "shell"
        case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" | "__import__" as name)):
            return name
        case ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen" as name):
            return f"os.{name}"
        case ast.Attribute(value=ast.Name(id="yaml"), attr="load" | "unsafe_load" | "full_load" as name):
            return f"yaml.{name}"
        case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
            return "torch.load"
        case ast.Attribute(attr=str(name)) if name.startswith("AutoPeft"):
            return name
    return None


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


def _strings(number: int, safe: Callable[..., str] = safe) -> str | None:
    for text in hostile.strings(number, seed=1):
        shown = safe(text)
        if HIDDEN.search(shown) or safe(shown, None) != shown:
            return f"safe({text!r:.80}) is {shown!r:.80}"
        whole = safe(text, None)
        if (len(text) > MAX_FOREIGN_CHARACTERS and not shown.endswith("…")) or HIDDEN.search(whole):
            return f"safe({text!r:.80}) is not cut, or shows what is hidden"
        shown.encode("utf-8")
    return None


# --- what must not get out ----------------------------------------------------------------------------------------------


HF, KEY, PASSWORD = "hf_CanaryCanaryCanaryCanaryCanaryCanary", "ca4a47" * 6 + "ca4a", "CanaryOfTheRemote"
TYPED = "hf_TypedByMistakeTypedByMistakeTyped"
SECRETS = tuple(each.encode() for each in (HF, KEY, PASSWORD, TYPED))


def _secrets(sound: Sound, whole: bool) -> Figure:
    """Each command in a repository whose remote has a password, with tokens in the environment or typed where none belongs."""
    searched: list[Path] = []

    def trial(name: str) -> str | None:
        with sound.lab.place("secret") as place:
            before = leak_in_training if name == "train that fails" else None
            flaw = _leak(name, before, searched, sound, place)
            return flaw and f"{name}: {flaw}"

    names = list(_with_logins(sound))
    found = side_by_side(trial, names if whole else names[:8])
    beside = f"{len(searched)} files searched, archives opened" if whole else ""
    what = "tokens in the environment, in a remote, or typed by mistake: in no file and on no screen"
    return count(what, found, beside=beside, at_least=13 if whole else 1)


def _with_logins(sound: Sound) -> dict[str, Callable[[Path], tuple[list[object], tuple[int, ...]]]]:
    """Commands that may meet a token, each with the exit codes that may come of it."""
    lab, url = sound.lab, f"https://user:{TYPED}@host.example/model"
    logged = {"tracking__use_wandb": True, "tracking__to": '["tensorboard"]'}
    instrument = ["--instrument", sound.instrument, "--preset", "quick"]
    question = ["--question", "Why?", "--max-new-tokens", "4"]
    page = ["inspect-data", lab.pairs, "--model", lab.base, "--html"]
    return {
        "train with trackers": lambda place: (lab.train(place / "run", **logged), (0,)),
        "train that fails": lambda place: (lab.train(place / "run", **logged), (1, 6)),
        "measure": lambda place: (["measure", sound.run, *instrument], (0,)),
        "merge": lambda place: (["merge", sound.run, "-o", place / "merged"], (0,)),
        "doctor": lambda place: (["doctor", "--json"], (0,)),
        "a model typed with a token": lambda place: (lab.train(place / "run", model__model_name_or_path=url), (4,)),
        "data typed with a token": lambda place: (lab.train(place / "run", data__dataset_name=url), (3,)),
        "a token for a flag": lambda place: (["train", "dpo", f"--hf-token={TYPED}", "--preset", "demo-left"], (2,)),
        "a token for a model": lambda place: (["measure", f"{TYPED}/"], (4,)),
        "ask": lambda place: (["ask", sound.run, *question, "-o", place / "asked"], (0,)),
        "inspect-data": lambda place: ([*page, place / "x.html"], (0,)),
        "sft, measured": lambda place: (
            [*lab.train(place / "run", "sft", **logged), "--measure", "before-after"],
            (0,),
        ),
        "study": lambda place: (["study", place / "study.toml", "-o", place / "study"], (0,)),
    }


def _leak(name: str, before: Callable[[], None] | None, searched: list[Path], sound: Sound, place: Path) -> str | None:
    """Where a command left a token; what was searched for it is added to `searched`."""
    for directory in ("home", "tmp", "cache", ".git"):
        (place / directory).mkdir()
    remote = f'[remote "origin"]\n\turl = https://user:{PASSWORD}@host.example/x.git\n'
    (place / ".git" / "config").write_text(remote)
    _write_study(place / "study.toml", sound)
    argv, codes = _with_logins(sound)[name](place)
    ended = sound.lab.run(argv, environment=_environment(place), cwd=place, before=before)
    shutil.rmtree(place / ".git")
    if ended.code not in codes:
        return f"exit {ended.code}: {ended.last}"
    (place / "printed").write_text(ended.out + ended.err)
    searched += [path for path in place.rglob("*") if path.is_file()]
    found = [f"{path.relative_to(place)}: {secret}" for path in place.rglob("*") for secret in _held(path)]
    return f"{found[:5]}" if found else None


def _environment(place: Path) -> dict[str, str]:
    places = {"HOME": place / "home", "TMPDIR": place / "tmp", "XDG_CACHE_HOME": place / "cache"}
    tokens = {"HF_TOKEN": HF, "HUGGING_FACE_HUB_TOKEN": HF, "WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}
    return {**tokens, **{name: str(path) for name, path in places.items()}}


def leak_in_training() -> None:
    """In the child: a library that puts the login into its error, as HTTP clients do with a header that they refuse."""
    from transformers import Trainer

    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"Illegal header value b'Bearer {os.environ['HF_TOKEN']}'")

    Trainer._save_checkpoint = refused


def _held(path: Path) -> list[str]:
    """The secrets in a file, and in what it packs."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content += gzip.decompress(content)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content += b"".join(archive.read(name) for name in archive.namelist())
    return [secret.decode() for secret in SECRETS if secret in content]


# --- that a canary can fire ---------------------------------------------------------------------------------------------


def _can_fire(sound: Sound, whole: bool) -> Figure:
    """What is handed to politune above, handed to the libraries, or to politune without the guard that it has against it.

    Each control names what has to be found: that nothing is found would say that the trials above could find nothing either.
    """
    controls = _quick_controls()
    controls = {**controls, **_slow_controls()} if whole else dict(list(controls.items())[::5])

    def run(name: str) -> str | None:
        control, expected = controls[name]
        with sound.lab.place("control") as place:
            found = _found(control, sound, place) or "nothing"
            return None if expected in found else f"{name}: found {found}, not {expected}"

    what = "each canary can fire: the same input without politune's guard"
    return count(what, side_by_side(run, controls), at_least=50 if whole else 1)


Control: TypeAlias = tuple[Trial, str]
QUOTED = tuple(f"{name} in a message" for name in ("a command", "a choice", "a number", "a value"))
"""What Typer and pydantic themselves print as Python would write it."""


def _quick_controls() -> dict[str, Control]:
    """Without a process of their own, or in one that was forked."""
    names = [name for name in _terminal() if name not in QUOTED]
    escaped = {f"terminal: {name}": (partial(_unescaped, name), "prints ") for name in names}
    bare = {f"pickles: {name}": (partial(_unpickled, name), "canary is there: made") for name in PICKLES}
    return {
        "models: code of a config": (partial(_loaded, "config"), "canary is there: made"),
        "models: code of a tokenizer": (partial(_loaded, "tokenizer"), "canary is there: made"),
        "models: a question whether to run it": (partial(_without, ask_about_code, "config"), "there: input"),
        **bare,
        "adapters: a sound one is merged": (partial(_merged, lambda adapter: None), "exit 0"),
        "adapters: code in auto_mapping": (_imported, "canary is there: made"),
        **escaped,
        "terminal: data on a terminal": (partial(_unescaped, "data on a terminal"), "a colour of the data"),
        "terminal: random texts": (lambda sound, place: _strings(100, lambda text, limit=None: text), "safe("),
        "network: a look-up": (partial(_watched, look_up), "there: getaddrinfo"),
        "network: a connection": (partial(_watched, connect), "there: connect"),
        "paths: a typing error": (partial(_watched, load_adapter_typed_wrongly), "there: getaddrinfo"),
        "paths: a file that is shown": (_shown, "shows the file"),
        "tokens: in a text": (partial(_planted, lambda path: path.write_text(HF)), HF),
        "tokens: packed": (partial(_planted, lambda path: path.write_bytes(gzip.compress(KEY.encode()))), KEY),
        "tokens: in the trainer's arguments": (partial(_planted, save_arguments), HF),
        "tokens: in an error": (partial(_leak, "train that fails", leak_unredacted, []), HF),
        "reports: a page": (_page_of_data, "<script"),
        "reports: a card": (partial(_card, lambda card: card + hostile.LINES), "its card holds"),
        "reports: what a card declares": (
            partial(_card, lambda card: card.replace("---", "---\nevil: 1", 1)),
            "its front matter has",
        ),
        "reports: a table": (partial(_paper, "x.csv", "=1+1"), "begin a cell with a formula"),
        "reports: lines": (partial(_paper, "x.jsonl", "{}\n{"), "no JSON Lines"),
        "source: dangerous calls": (lambda sound, place: _all_dangerous(), "all of them"),
    }


def _slow_controls() -> dict[str, Control]:
    return {
        "templates: a loop": (_rendered, "had not ended after 10 s"),
        "bombs: a parquet file": (_read_whole, "takes more"),
        "network: kernels": (_asked_for_kernels, "canary is there: made"),
    }


def alone(function: Callable[..., object], given: Sequence[Any], canary: Path) -> None:
    """In the child, in place of a command: libraries that are watched, and try nothing again later."""
    watch(canary)
    time.sleep = lambda seconds: None
    with contextlib.suppress(Exception, SystemExit):
        function(*given)
    os._exit(0)


def _watched(
    function: Callable[..., object], sound: Sound, place: Path, *given: object, limit: float = 60
) -> str | None:
    child = sound.lab.start([], before=alone, given=[function, given, place / "canary"], cwd=place)
    return _flaw(child.wait(limit), (0,))


def _loaded(case: str, sound: Sound, place: Path) -> str | None:
    return _watched(load_with_code, sound, place, _with_code(case, sound, place), case)


def load_with_code(base: Path, case: str) -> None:
    """In the child."""
    import transformers

    library = transformers.AutoTokenizer if case == "tokenizer" else transformers.AutoModelForCausalLM
    library.from_pretrained(base, trust_remote_code=True)


def _without(function: Callable[..., object], case: str, sound: Sound, place: Path) -> str | None:
    return _watched(function, sound, place, _with_code(case, sound, place))


def ask_about_code(base: Path) -> None:
    """In the child."""
    import transformers

    transformers.AutoConfig.from_pretrained(base)


def _unpickled(name: str, sound: Sound, place: Path) -> str | None:
    hostile.write_pickles(place, place / "canary", PICKLES)
    return _watched(unpickle, sound, place, place / name)


def unpickle(path: Path) -> None:
    """In the child."""
    import torch

    torch.load(path, weights_only=False)


def _imported(sound: Sound, place: Path) -> str | None:
    """By PEFT's own class for adapters that name their model's, told that it may."""
    path = hostile.copied(sound.adapter, place / "adapter")
    hostile.adapters()["code in auto_mapping"](path)
    hostile.edit(path / "adapter_config.json", task_type=None)
    hostile.write_code(path, place / "canary")
    return _watched(import_for_adapter, sound, place, path)


def import_for_adapter(adapter: Path) -> None:
    """In the child."""
    import peft

    sys.path.insert(0, str(adapter))
    peft.AutoPeftModel.from_pretrained(adapter, import_allowlist=["evil"])


def _unescaped(name: str, sound: Sound, place: Path) -> str | None:
    return _terminal()[name](replace(sound, before=show_as_it_is), place)


def show_as_it_is(canary: Path) -> None:
    """In the child: politune's `safe` and the escapes of its pages change nothing."""
    from politune import errors
    from politune.report import html

    watch(canary)
    original = errors.safe
    for module in list(sys.modules.values()):
        if getattr(module, "safe", None) is original:
            module.safe = lambda text, limit=None: str(text)  # type: ignore[attr-defined]
    html.escape = lambda text, quote=True: text  # type: ignore[attr-defined]


def look_up() -> None:
    """In the child."""
    import huggingface_hub

    huggingface_hub.HfApi().model_info("owner/model")


def connect() -> None:
    """In the child: to an address that is nobody's."""
    import socket

    socket.socket().connect(("192.0.2.1", 80))


def load_adapter_typed_wrongly() -> None:
    """In the child."""
    import peft

    peft.PeftConfig.from_pretrained("runs/left-typo")


def _shown(sound: Sound, place: Path) -> str | None:
    return _refused([], (2,), replace(sound, before=show_passwords), place)


def show_passwords(canary: Path) -> None:
    """In the child."""
    print(Path("/etc/passwd").read_text())  # noqa: T201
    sys.exit(2)


def _planted(plant: Callable[[Path], object], sound: Sound, place: Path) -> str | None:
    plant(place / "file")
    return ", ".join(_held(place / "file")) or None


def save_arguments(path: Path) -> None:
    """As transformers saves them beside every checkpoint."""
    import torch
    from trl import DPOConfig

    torch.save(DPOConfig(hub_token=HF, use_cpu=True, bf16=False, report_to="none"), path)


def leak_unredacted() -> None:
    """In the child: politune puts stars for nothing."""
    from politune import cli, errors

    errors.without_secrets = cli.without_secrets = str  # type: ignore[attr-defined, assignment]
    leak_in_training()


def _page_of_data(sound: Sound, place: Path) -> str | None:
    rows = hostile.write_rows(place / "rows.jsonl")
    argv = ["inspect-data", rows, "--model", sound.lab.base, "--html", place / "data.html"]
    _run(replace(sound, before=show_as_it_is), place, argv)
    return _first(_papers(place))


def _card(change: Callable[[str], str], sound: Sound, place: Path) -> str | None:
    (place / "adapter").mkdir()
    card = (sound.adapter / "README.md").read_text(encoding="utf-8")
    (place / "adapter" / "README.md").write_text(change(card), encoding="utf-8")
    return _first(_papers(place))


def _paper(name: str, text: str, sound: Sound, place: Path) -> str | None:
    (place / name).write_text(text)
    return _first(_papers(place))


def _all_dangerous() -> str | None:
    calls = (
        "import pickle", "from dill import loads", "from peft import AutoPeftModel", "f(weights_only=False)",
        "f(trust_remote_code=True)", "{'trust_remote_code': True}", "f(shell=True)", "eval(x)", "os.system(x)",
        "yaml.load(x)", "torch.load(x)", "peft.AutoPeftModel",
    )  # fmt: skip
    missed = [call for call in calls if not any(_dangerous(node) for node in ast.walk(ast.parse(call)))]
    return f"all of them but {missed}" if missed else "all of them"


def _rendered(sound: Sound, place: Path) -> str | None:
    """Killed after the time that politune has for all of it."""
    try:
        return _watched(render, sound, place, _with_template("loops", sound, place), limit=10)
    except TimeoutError as error:
        return str(error)


def render(base: Path) -> None:
    """In the child."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)


def _read_whole(sound: Sound, place: Path) -> str | None:
    write, (_, path), _ = hostile.bombs(place, sound.lab.base)["text.parquet"]
    write()
    code = "import sys; from pyarrow import parquet; parquet.read_table(sys.argv[1]).to_pylist()"
    rss_bytes = _alone_python(["-c", code, path])[2]
    return f"takes more: {rss_bytes}" if rss_bytes > MOST_RSS_BYTES else f"takes {rss_bytes}"


def _asked_for_kernels(sound: Sound, place: Path) -> str | None:
    base, environment = _with_kernels(sound, place)
    code = "import sys; import transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    _alone_python(["-c", code, base], environment)
    return None
