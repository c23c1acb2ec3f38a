"""What asks a command to stop, and how it ends then."""

import subprocess
import sys
from pathlib import Path

COMMAND = """
import sys
from politune.errors import Interrupted
from politune.training.signals import caught

try:
    with caught("politune"):
        exec("import os, signal; os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(1000)]")
except Interrupted as error:
    sys.exit(error.exit_code)
"""


def test_a_signal_while_a_text_is_executed_has_its_exit_code(tmp_path: Path) -> None:
    """As data classes are, while a library is imported. `python -m` would end by SIGINT, had a KeyboardInterrupt been raised."""
    (tmp_path / "command.py").write_text(COMMAND)
    ended = subprocess.run([sys.executable, "-m", "command"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (143, "")
