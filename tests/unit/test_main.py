"""How the program is entered: Ctrl-C before there is a command line."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("words", [["-m", "politune"], [str(Path(sys.executable).with_name("politune"))]])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143)])
def test_a_signal_while_the_command_line_is_imported(words: list[str], name: str, code: int, tmp_path: Path) -> None:
    """In a callback whose exceptions Python drops, as those of its own import locks."""
    how = f"""
import os, signal
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.{name}); [None for _ in range(1000)]
Dropped()
"""
    (tmp_path / "typer.py").write_text(how)
    done = subprocess.run(
        [sys.executable, *words, "presets"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "politune: interrupted\n")


@pytest.mark.parametrize(
    "how", ["KeyboardInterrupt", "pydantic_core.SchemaError('Error building `model` serializer: KeyboardInterrupt: ')"]
)
def test_ctrl_c_in_a_command(how: str, tmp_path: Path) -> None:
    """The second: as pydantic has it, which catches the exception while it builds a schema."""
    code = f"import pydantic_core\nfrom politune import presets\ndef overview(): raise {how}\npresets.overview = overview\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "politune", "presets"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "politune: interrupted\n")


def test_the_console_script_enters_there() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="politune")
    assert script.value == "politune.__main__:main"
