"""What `politune doctor` says of a machine, of which it reads only what the test gives it."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from politune import doctor, fetching, plan
from politune.errors import MachineError
from politune.plan.machine import Gpu, Machine
from politune.report import to_json
from politune.training.trackers import wandb_mode

CPU = Machine(cores=2, memory_available_bytes=8 * 10**9, disk_free_bytes=10**12, processor="A processor")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_TOKEN", "HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "POLITUNE_CACHE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(plan, "probe", lambda directory: CPU)
    return tmp_path


def found(name: str) -> doctor.Finding:
    (one,) = [each for each in doctor.examine(Path("outputs")).findings if each.name == name]
    return one


def test_a_bare_machine(home: Path) -> None:
    assert found("GPU").state == "note"
    assert found("processor").found == "A processor, 2 cores"
    assert found("Hugging Face login").found == "none"
    assert "hf auth login" in found("Hugging Face login").advice
    assert found("Weights & Biases login").found == "none"
    assert found("demo model").state == "note"
    assert found("cache").found == str(home / ".cache" / "politune")
    assert wandb_mode() == "offline"


def test_logins_are_told_and_their_keys_are_not(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = home / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_canarycanary")
    (home / ".netrc").write_text("machine api.wandb.ai login user password canarycanary")
    (home / ".netrc").chmod(0o600)
    assert found("Hugging Face login").found == "a token file"
    assert found("Weights & Biases login").found == "netrc"
    assert wandb_mode() == "online"
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanary")
    monkeypatch.setenv("WANDB_API_KEY", "canarycanary")
    report = doctor.examine(Path("outputs"))
    assert "canary" not in to_json(report)
    assert {each.found for each in report.findings} > {"HF_TOKEN", "WANDB_API_KEY"}


def test_gpus(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (Gpu("Old", 16 * 2**30, (7, 5)), Gpu("New", 80 * 2**30, (9, 0)))
    monkeypatch.setattr(plan, "probe", lambda directory: Machine(2, None, None, gpus))
    assert found("GPU 0").state == "note"
    assert found("GPU 0").advice.endswith("set --no-bf16")
    assert found("GPU 1") == doctor.Finding("GPU 1", "ok", "New, 80 GiB, capability 9.0")
    assert found("memory").found == "not known"


def test_a_version_outside_of_the_bounds_is_wrong(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.examine(Path("outputs"))
    assert {each.name for each in report.findings} > {"torch", "trl", "peft", "transformers"}
    assert report.headline.endswith("nothing is wrong here")
    original = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError
        return "0.1" if name == "trl" else original(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert found("trl").state == "wrong"
    assert found("trl").advice.startswith("pip install 'trl")
    assert found("peft").found == "not installed"
    assert "trl is wrong" in doctor.examine(Path("outputs")).headline


def test_a_cache_that_cannot_be_written_is_wrong(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("POLITUNE_CACHE", str(home / "file"))
    assert found("cache").state == "wrong"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("name", "line", "advice"),
    [
        ("POLITUNE_CACHE", "cache", "set POLITUNE_CACHE"),
        ("HF_HOME", "Hub cache", "set HF_HOME"),
        ("HF_HUB_CACHE", "Hub cache", "set HF_HUB_CACHE"),
    ],
)
def test_a_cache_that_takes_no_file_is_wrong_for_root_too(
    name: str, line: str, advice: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc: os.access says yes to root there."""
    monkeypatch.setenv(name, "/proc/nowhere")
    assert (found(line).state, found(line).found[:29]) == ("wrong", "cannot write to /proc/nowhere")
    assert found(line).advice.startswith(advice)


def test_a_hub_cache_that_is_only_read_is_none_of_doctors_business(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/proc/nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found("Hub cache").state == "note"


def test_a_cache_on_a_disk_that_is_not_mounted_is_wrong(home: Path) -> None:
    (home / ".cache").mkdir()
    (home / ".cache" / "huggingface").symlink_to(home / "unmounted")
    assert found("Hub cache").state == "wrong"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "{home}/shared"},
        {"HF_HOME": "~/hugging", "XDG_CACHE_HOME": "{home}/shared"},
        {"HF_HUB_CACHE": "$HOME/hub", "HF_HOME": "{home}/hugging"},
    ],
)
def test_the_hub_cache_is_where_the_hub_library_has_it(
    environment: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(home=home))
    place = subprocess.run(
        [sys.executable, "-c", "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    before = sorted(home.rglob("*"))
    assert found("Hub cache").state == "ok"
    assert re.fullmatch(rf"{re.escape(place)}, [\d.]+ GB free", found("Hub cache").found)
    assert sorted(home.rglob("*")) == before, "nothing is left behind"


def test_a_processor_says_what_it_can_do(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx512_bf16\n")
    flags = doctor._processor_flags(cpuinfo)
    assert flags == {"fpu", "avx512_bf16"}
    bfloat16 = next(each for each in doctor._devices(CPU, flags) if each.name == "bfloat16")
    assert bfloat16.found == "yes, with AVX-512 BF16"
    assert doctor._processor_flags(tmp_path / "nowhere") == frozenset()


def test_the_command_shows_it_and_loads_nothing_heavy() -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "politune", "doctor", "--json"], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert json.loads(answer.stdout)["report"] == "DoctorReport"
    assert not any(line.endswith((" torch", " transformers")) for line in answer.stderr.splitlines())


def test_every_environment_error_points_to_a_line(home: Path) -> None:
    """Each MachineError in the sources names a line that is printed, on a machine with everything installed."""
    lines = {each.name for each in doctor.examine(Path("outputs")).findings}
    named = [
        keyword.value
        for path in Path(doctor.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "MachineError"
        for keyword in call.keywords
        if keyword.arg == "line"
    ]
    assert len(named) > 5
    for value in named:
        name = value.value if isinstance(value, ast.Constant) else getattr(fetching, value.attr)
        assert name in lines
    assert "`politune doctor` shows it under memory" in str(MachineError("no room", line="memory", fix="make some"))
