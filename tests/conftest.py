"""No test speaks to the network or writes into the user's home, unless it says so with the `network` marker."""

import os

import hypothesis
import pytest

from faults.ctrl_c import heed_ctrl_c
from politune.models import demo

hypothesis.settings.register_profile("politune", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("politune")

# Read by the Hugging Face libraries on import: they must stand here, before any test module is collected.
os.environ["HF_HUB_OFFLINE"] = "1"
heed_ctrl_c()
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `network` fetch the demo model: they run where that is asked for, or where it is cached already."""
    if os.environ.get("POLITUNE_TEST_NETWORK") == "1" or demo.is_ready(demo.checkpoint_directory()):
        return
    for item in items:
        if item.get_closest_marker("network"):
            item.add_marker(pytest.mark.skip(reason="needs the network: set POLITUNE_TEST_NETWORK=1"))
