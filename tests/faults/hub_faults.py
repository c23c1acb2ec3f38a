"""Runs whose model and data come from a Hub that fails, that dies, or that is not to be asked."""

import csv
import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faults.figures import Figure, count, side_by_side
from faults.hub import (
    EXPECTED_LATER,
    Kind,
    Repository,
    StandIn,
    git_hash,
    kinds,
    other_bytes,
    to_content,
    wait_until,
)
from faults.lab import Ended, Lab
from politune import presets
from tiny import tiny_models
from tiny.small_runs import adapter_hash

LLAMA, MISTRAL = "meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2"
LEFT, RIGHT, ALPACA = "scale-lab/politune-left", "scale-lab/politune-right", "yahma/alpaca-cleaned"
TARGETS = {"model": LLAMA, "data": LEFT}
IN_TIME_SECONDS = 60.0
WAITING = 8
"""Trials at a time that wait for a Hub, and compute little."""

INSTRUMENTS = Path(presets.__file__).parents[1] / "lean" / "instruments"
LINE = b'{"prompt": "Ba de?", "chosen": "Fi go.", "rejected": "Lu ma."}\n'

SOME = (
    ("gated, nobody logged in", "model"), ("private", "data"), ("429, to wait an hour", "model"),
    ("503 once, then well", "data"), ("cut in the middle", "model"),
    ("other bytes of the same length", "model"), ("other bytes of the same length", "data"),
)  # fmt: skip


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    repositories = make_repositories(lab)
    expected = _undisturbed(lab, repositories)
    yield _troubles(lab, repositories, expected, whole)
    if whole:
        yield _no_such_revision(lab, repositories, expected)
        yield _refused(lab, repositories, expected)
        yield _storage(lab, repositories)
        yield _by_its_own_process(lab, repositories, expected)
    yield _dies(lab, repositories, expected)
    yield _offline(lab, repositories, expected, whole)
    yield _presets(lab, repositories, whole)


# --- what the Hub has -------------------------------------------------------------------------------------------------


def make_repositories(lab: Lab) -> list[Repository]:
    """What the shipped presets name: two-layer models, and rows of made-up words in the shapes of the real data sets."""
    from transformers import AutoModelForCausalLM

    mistral = tiny_models.make_mistral(lab.work / "tiny-mistral", seed=1)
    AutoModelForCausalLM.from_pretrained(mistral).save_pretrained(lab.work / "in-parts", max_shard_size="150KB")
    (mistral / "model.safetensors").unlink()
    both = {
        LLAMA: {
            **_files_in(lab.base),
            "README.md": b"---\nlicense: llama3\n---\n\nA card.\n",
            "LICENSE": b"The terms.\n",
            "USE_POLICY.md": b"The policy.\n",
            "original/consolidated.00.pth": b"not to be fetched",
            "original/params.json": b"{}\n",
        },
        MISTRAL: {
            **_files_in(mistral),
            **{name: body for name, body in _files_in(lab.work / "in-parts").items() if name.startswith("model")},
            "README.md": b"---\nlicense: apache-2.0\n---\n\nA card.\n",
            "pytorch_model.bin": b"not to be fetched",
        },
    }
    data = {
        LEFT: {"README.md": b"# Pairs\n", "train.csv": _pairs(seed=1, note=500)},
        RIGHT: {"README.md": b"# Pairs\n", "train.csv": _pairs(seed=2)},
        ALPACA: {"README.md": b"---\nlicense: cc-by-4.0\n---\n", "alpaca_data_cleaned.json": _instructions(seed=3)},
    }
    return [Repository("models", name, files) for name, files in both.items()] + [
        Repository("datasets", name, files) for name, files in data.items()
    ]


def _files_in(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(path.iterdir()) if each.is_file()}


def _words(draw: random.Random, least: int, most: int) -> str:
    """Made-up words, which stand for nothing."""
    syllables = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve")
    words = ("".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(draw.randint(least, most)))
    return " ".join(words).capitalize()


def _pairs(seed: int, rows: int = 24, note: int = 0) -> bytes:
    """Pairs, and with `note` a column of that many words that nobody reads, so that the file is large enough to be slow."""
    draw, text = random.Random(seed), io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("prompt", "chosen", "rejected", *(["note"] if note else [])))
    for _ in range(rows):
        row = (f"{_words(draw, 6, 14)}?", f"{_words(draw, 8, 30)}.", f"{_words(draw, 8, 30)}.")
        writer.writerow((*row, *([_words(draw, note, note)] if note else [])))
    return text.getvalue().encode()


def _instructions(seed: int, rows: int = 24) -> bytes:
    draw = random.Random(seed)
    made = [
        {
            "instruction": f"{_words(draw, 5, 10)}.",
            "input": _words(draw, 3, 8) if draw.random() < 0.4 else "",
            "output": f"{_words(draw, 8, 30)}.",
        }
        for _ in range(rows)
    ]
    return json.dumps(made, indent=2).encode()


# --- a command beside a Hub -------------------------------------------------------------------------------------------


def beside(url: str, home: str, guarded: bool = False, storage: bool = False) -> None:
    """In the child: the Hub is there, and the cache is here. The libraries read both when the server imported them.

    Args:
        guarded: refuse every connection, and say so where the parent finds it.
        storage: speak the storage protocol for large files.
    """
    import datasets.config
    import huggingface_hub.constants as constants
    import huggingface_hub.utils._http as http

    cache = str(Path(home) / "hub")
    constants.ENDPOINT = datasets.config.HF_ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HOME, constants.HF_HUB_CACHE, constants.HUGGINGFACE_HUB_CACHE = home, cache, cache
    constants.HF_TOKEN_PATH = str(Path(home) / "token")
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET, constants.HF_HUB_DISABLE_TELEMETRY = (
        False,
        not storage,
        True,
    )
    datasets.config.HF_HUB_OFFLINE = False
    datasets.config.HF_DATASETS_CACHE = Path(home) / "datasets"
    http._HUB_ORIGINS = frozenset({*http._HUB_ORIGINS, http._url_origin(url)})
    os.environ.pop("HF_HUB_OFFLINE", None)
    if guarded:
        _refuse_connections(Path(home) / "connections")


def _refuse_connections(log: Path) -> None:
    def refused(self: socket.socket, address: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{address}\n")
        raise ConnectionRefusedError(111, "not in this trial")

    socket.socket.connect = socket.socket.connect_ex = refused  # type: ignore[method-assign]


def _train(lab: Lab, place: Path, **settings: object) -> list[object]:
    return lab.train(
        place / "run",
        **{"model__model_name_or_path": LLAMA, "data__dataset_name": LEFT, "data__max_length": 256, **settings},
    )


def _run(lab: Lab, argv: list[object], hub: StandIn, place: Path, guarded: bool = False) -> Ended:
    return lab.run(argv, before=beside, given=(hub.url, str(place / "hf"), guarded))


def _run_traced(lab: Lab, argv: list[object], hub: StandIn, place: Path) -> tuple[Ended, list[str]]:
    """In a process that imports the libraries itself and is told of the Hub as users tell it; every connection over the
    Internet's protocols that any of its code tries, Python's or not, as strace shows it."""
    log, started = place / "connects", time.monotonic()
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "0"}
    traced = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect", "-o", str(log)]
    words = [*traced, sys.executable, "-m", "politune", *map(str, argv)]
    environment = {**os.environ, **lab.environment, **told}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    ended = Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - started)
    return ended, [line for line in log.read_text().splitlines() if "AF_INET" in line]


def _wrong_in_cache(place: Path) -> str | None:
    """A file in the Hub's cache that is not what its name says, or half of one."""
    for path in (place / "hf").glob("hub/*/blobs/*"):
        body = path.read_bytes()
        if path.name not in (git_hash(body), hashlib.sha256(body).hexdigest()):
            return f"left {path.name[:12]} in the cache"
    return None


def _undisturbed(lab: Lab, repositories: list[Repository]) -> str:
    with lab.place("undisturbed") as place, StandIn(repositories) as hub:
        ended = _run(lab, _train(lab, place), hub, place)
        assert ended.code == 0, ended.err
        assert hub.requests("telemetry") == 0, hub.asked
        assert not any("original/" in each.name for each in hub.asked if each.what in ("file", "bytes"))
        return adapter_hash(place / "run")


def _judge(ended: Ended, place: Path, code: int, culprit: str) -> str | None:
    """What is wrong with how a command ended beside a Hub in trouble."""
    if ended.code != code:
        return f"{ended.code} in place of {code}: {ended.last[:300]}"
    if ended.seconds > IN_TIME_SECONDS:
        return f"took {ended.seconds:.0f} s"
    if "Traceback" in ended.err:
        return f"a traceback: {ended.last[:200]}"
    if code and culprit not in ended.last:
        return f"does not name {culprit}: {ended.last[:300]}"
    if code and adapter_hash(place / "run") != "none":
        return "an adapter was made"
    return _wrong_in_cache(place)


def _again(lab: Lab, argv: list[object], place: Path, repositories: list[Repository], expected: str) -> str | None:
    """The same command once the Hub is well."""
    with StandIn(repositories) as hub:
        ended = _run(lab, argv, hub, place)
    if ended.code:
        return f"not again once the Hub is well: {ended.code} {ended.last[:300]}"
    return None if adapter_hash(place / "run") == expected else "another adapter once the Hub is well"


# --- the figures ------------------------------------------------------------------------------------------------------


def _troubles(lab: Lab, repositories: list[Repository], expected: str, whole: bool) -> Figure:
    cases: Sequence[tuple[str, str]] = [(name, part) for name in kinds() for part in TARGETS] if whole else SOME
    seconds: dict[str, float] = {}

    def trial(case: tuple[str, str]) -> str | None:
        name, part = case
        kind = kinds()[name]
        code, target = (kind.model if part == "model" else kind.data), TARGETS[part]
        with lab.place("hub") as place:
            with StandIn(repositories, kind.trouble, target) as hub:
                ended = _run(lab, _train(lab, place), hub, place)
            seconds[f"{name}, {part}"] = ended.seconds
            wrong = _judge(ended, place, code, target) or _unfelt(hub, kind)
            if wrong is None and code:
                wrong = _again(lab, _train(lab, place), place, repositories, expected)
            elif wrong is None and adapter_hash(place / "run") != expected:
                wrong = "another adapter"
            return wrong and f"{name}, {part}: {wrong}"

    found = side_by_side(trial, [case for case in cases if not kinds()[case[0]].waits])
    with ThreadPoolExecutor(WAITING) as pool:
        waiting = [case for case in cases if kinds()[case[0]].waits]
        found += pool.map(lambda case: side_by_side(trial, [case])[0], waiting)
    slowest = max(seconds, key=seconds.__getitem__)
    told = f"the slowest gave up after {seconds[slowest]:.0f} s ({slowest})"
    ways = len({name for name, _ in cases})
    return count(
        f"{ways} ways for the Hub to fail, over a model or a data set: the right exit code within 60 s, "
        "nothing wrong left in the cache, and equal by the same command once the Hub is well",
        found,
        beside=f"{told}; {_plain_client(lab, repositories)}" if whole else told,
        at_least=70 if whole else len(SOME),
    )


def _unfelt(hub: StandIn, kind: Kind) -> str | None:
    """Where the trouble did not happen, whatever came of it."""
    if not hub.applied:
        return "the Hub was never in that trouble"
    return f"no answer took more than {hub.longest:.0f} s" if hub.longest < kind.lasts else None


def _plain_client(lab: Lab, repositories: list[Repository]) -> str:
    """What `huggingface_hub` alone makes of other bytes of the same length."""
    name = "model.safetensors"
    with lab.place("plain") as place, StandIn(repositories, to_content(other_bytes), LLAMA) as hub:
        ended = lab.run(["--version"], before=_fetch_plainly, given=(hub.url, str(place / "hf"), LLAMA, name))
        told = place / "hf" / "told"
        found = told.read_text() if told.exists() else ended.last
    right = hashlib.sha256(next(each.files[name] for each in repositories if each.name == LLAMA)).hexdigest()
    taken = "takes" if found != right and len(found) == len(right) else "refuses"
    return f"`huggingface_hub` alone {taken} other bytes of the same length"


def _fetch_plainly(url: str, home: str, repository: str, name: str) -> None:
    beside(url, home)
    from huggingface_hub import hf_hub_download

    body = Path(hf_hub_download(repository, name)).read_bytes()
    (Path(home) / "told").write_text(hashlib.sha256(body).hexdigest())


def _no_such_revision(lab: Lab, repositories: list[Repository], expected: str) -> Figure:

    def trial(case: tuple[str, dict[str, object], int]) -> str | None:
        part, settings, code = case
        with lab.place("revision") as place:
            argv = _train(lab, place, **settings)
            with StandIn(repositories) as hub:
                wrong = _judge(_run(lab, argv, hub, place), place, code, TARGETS[part])
            later = [Repository(each.kind, each.name, each.files, ("main", "v9")) for each in repositories]
            wrong = wrong or _again(lab, argv, place, later, expected)
            return wrong and f"{part}: {wrong}"

    cases = [("model", {"model__revision": "v9"}, 4), ("data", {"data__dataset_revision": "v9"}, 3)]
    return count("a revision that is not there: 4 and 3, and equal once it is", side_by_side(trial, cases), at_least=2)


def _refused(lab: Lab, repositories: list[Repository], expected: str) -> Figure:

    def trial(part: str) -> str | None:
        with lab.place("refused") as place:
            argv = _train(lab, place) if part == "data" else _train(lab, place, data__dataset_name=lab.pairs)
            with StandIn(repositories) as hub:
                hub.die()
                wrong = _judge(_run(lab, argv, hub, place), place, EXPECTED_LATER, TARGETS[part])
            if wrong is None and part == "data":
                wrong = _again(lab, argv, place, repositories, expected)
            return wrong and f"{part}: {wrong}"

    return count("connections refused: exit code 6", side_by_side(trial, TARGETS), at_least=2)


def _storage(lab: Lab, repositories: list[Repository]) -> Figure:
    """The storage protocol's own library makes these requests."""

    def trial(refuses: bool) -> str | None:
        with socket.socket() as listening, lab.place("storage") as place:
            listening.bind(("127.0.0.1", 0))
            if not refuses:
                listening.listen(64)
            with StandIn(repositories, storage=f"http://127.0.0.1:{listening.getsockname()[1]}") as hub:
                given = (hub.url, str(place / "hf"), False, True)
                ended = lab.run(_train(lab, place), before=beside, given=given)
            wrong = _judge(ended, place, EXPECTED_LATER, LLAMA)
            if wrong is None and not any(each.path == "/storage-token" for each in hub.asked):
                wrong = "was not asked for"
            return wrong and f"{'refuses' if refuses else 'is silent'}: {wrong}"

    return count(
        "the storage of large files (Xet) refuses, or is silent: exit code 6 within 60 s",
        side_by_side(trial, (True, False)),
        at_least=2,
    )


def _dies(lab: Lab, repositories: list[Repository], expected: str) -> Figure:

    def trial(dead: bool) -> str | None:
        with lab.place("dies") as place, StandIn(repositories) as hub:
            child = lab.start(_train(lab, place), before=beside, given=(hub.url, str(place / "hf")))
            began = wait_until(lambda: _has_base(place / "run" / "run.json"))
            asked = hub.connections
            if dead:
                hub.die()
            ended = child.wait()
            more, moment = hub.connections - asked, "dead" if dead else "listening"
            if not began or ended.code or more or adapter_hash(place / "run") != expected:
                return f"{moment}: {ended.code}, {more} requests: {ended.last[:300]}"
            return None

    return count(
        "the Hub dies, or listens, once everything is fetched: no request from then on, equal",
        side_by_side(trial, (True, False)),
        at_least=2,
    )


def _has_base(path: Path) -> bool:
    """Whether a run has written down what it found, after its last request."""
    try:
        return bool(json.loads(path.read_text()).get("base"))
    except (OSError, ValueError):
        return False


def _offline(lab: Lab, repositories: list[Repository], expected: str, whole: bool) -> Figure:
    """Whole: whatever connects is seen; else what connects by Python's own sockets, in a fraction of the time."""
    mixed = Repository("datasets", "owner/mixed", {"README.md": b"# Pairs\n", "a.csv": _pairs(seed=4), "b.jsonl": LINE})

    def trial(case: str) -> str | None:
        with lab.place("offline") as place, StandIn([*repositories, mixed]) as hub:
            settings = {"data__dataset_name": mixed.name} if case.startswith("a layout") else {}
            filled = "none"
            if case != "an empty one":
                online = _run(lab, _train(lab, place, **settings), hub, place)
                assert online.code == 0, online.err
                filled = adapter_hash(place / "run")
            argv = [*_train(lab, place, **settings, train__output_dir=place / "again"), "--offline"]
            before = hub.connections
            if whole:
                ended, tried = _run_traced(lab, argv, hub, place)
            else:
                ended, log = _run(lab, argv, hub, place, guarded=True), place / "hf" / "connections"
                tried = log.read_text().splitlines() if log.exists() else []
            asked = hub.connections - before + len(tried)
            right = ended.code == (EXPECTED_LATER if filled == "none" else 0) and "Traceback" not in ended.err
            same = adapter_hash(place / "again") == filled and (case != "the cache" or filled == expected)
            wrong = f"{case}: {ended.code}, {asked} asked {tried[:2]}: {ended.last[:300]}"
            return None if right and same and not asked else wrong

    seen = "strace sees no connection over IPv4 or IPv6" if whole else "no socket of Python's is connected"
    return count(
        f"`--offline`: equal from the cache, exit code 6 from an empty one, and {seen}",
        side_by_side(trial, ("the cache", "an empty one", "a layout that is left to `datasets`")),
        at_least=3,
    )


def _by_its_own_process(lab: Lab, repositories: list[Repository], expected: str) -> Figure:
    """What is put right for the forked children by hand has to hold without that; and strace sees what it is to see."""

    def trial(_: None) -> str | None:
        with lab.place("process") as place, StandIn(repositories) as hub:
            ended, tried = _run_traced(lab, _train(lab, place), hub, place)
            odd = [each.path for each in hub.asked if each.what in ("telemetry", "other")]
            right = ended.code == 0 and not odd and tried and adapter_hash(place / "run") == expected
            return None if right else f"{ended.code}, {len(tried)} connections, {odd}: {ended.err[-300:]}"

    return count(
        "a process of its own, told of the Hub by `HF_ENDPOINT`: equal, no telemetry, and strace sees it connect",
        side_by_side(trial, [None]),
    )


def _presets(lab: Lab, repositories: list[Repository], whole: bool) -> Figure:
    """Whole: every one, measured with all instruments; else one of them, with a few items of one."""
    demo_cache = _plant_demo(lab)
    names = presets.shipped_names() if whole else ["mistral-left"]
    few = lab.work / "few.jsonl"
    few.write_bytes(b"".join((INSTRUMENTS / "politune-core.jsonl").read_bytes().splitlines(keepends=True)[:13]))
    instruments = [] if whole else ["--instrument", few]

    def trial(name: str) -> str | None:
        with lab.place("preset") as place, StandIn(repositories) as hub:
            out, method = place / "run", "sft" if name.endswith("sft") else "dpo"
            lines: list[list[object]] = [
                ["train", method, "--preset", name, "--output_dir", out],
                ["measure", out, "--preset", "quick", *instruments, "--output", place / "measured"],
                ["merge", out, "--output", place / "merged"],
            ]
            for argv in lines:
                given = {"before": beside, "given": (hub.url, str(place / "hf"))}
                ended = lab.run(argv, environment={"POLITUNE_CACHE": str(demo_cache)}, **given)
                if ended.code:
                    return f"{name}, {argv[0]}: {ended.code} {ended.last[:300]}"
            return _wrong_papers(repositories, name, out) or _wrong_merge(place / "merged") or _unasked(hub, name)

    return count(
        "shipped presets, each downloaded from the Hub, trained, measured (quick) and merged: exit code 0, the Hub's names and "
        "commits in run.json and adapter_config.json, no telemetry, no file that was not needed",
        side_by_side(trial, names),
        at_least=9 if whole else 1,
    )


def _plant_demo(lab: Lab) -> Path:
    """A cache of politune's that has the tiny Llama in the place of the demo model, which comes from no Hub."""
    from politune.models import demo

    cache = lab.work / "demo-cache"
    place = cache / f"smollm2-135m-instruct-{demo.GGUF_SHA256[:12]}"
    place.mkdir(parents=True)
    for name, body in _files_in(lab.base).items():
        (place / name).write_bytes(body)
    marker = {"gguf_sha256": demo.GGUF_SHA256, "files": {}}
    (place / demo.MARKER).write_text(json.dumps(marker))
    return cache


def _wrong_papers(repositories: list[Repository], preset: str, out: Path) -> str | None:
    """What run.json and adapter_config.json say otherwise than the Hub's name and commit."""
    papers, settings = (json.loads((out / name).read_text()) for name in ("run.json", "adapter/adapter_config.json"))
    commits = {each.name: each.commit for each in repositories}
    base, data = papers["base"], papers["data"]
    for facts, commit in ((base, base["commit"]), (data, data["revision"])):
        if commit != commits.get(facts["name"]):
            return f"{preset}: run.json has {facts['name']} at {commit}"
    if not preset.startswith("demo") and (settings["base_model_name_or_path"], settings["revision"]) != (
        base["name"],
        base["commit"],
    ):
        return f"{preset}: adapter_config.json has {settings['base_model_name_or_path']} at {settings['revision']}"
    return None


def _wrong_merge(merged: Path) -> str | None:
    return None if (merged / "config.json").exists() and [*merged.glob("*.safetensors")] else "nothing was merged"


def _unasked(hub: StandIn, preset: str) -> str | None:
    """Requests that nobody needed: telemetry, other weights, or any for a preset that is not from the Hub."""
    for each in hub.asked:
        if each.what in ("telemetry", "other") or each.name.endswith((".pth", "params.json", ".bin")):
            return f"{preset}: asked for {each.path}"
    return f"{preset}: asked the Hub" if preset.startswith("demo") and hub.connections else None
