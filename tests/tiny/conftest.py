"""Tiny base models, one of each family for the whole session: nobody may write into them."""

import gc
import importlib
from pathlib import Path

import pytest

from tiny import tiny_models


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machine's other cores may be busy, and two-layer models gain nothing from them."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def frozen() -> None:
    """Every run that ends looks for garbage, a third of a second among all that the libraries made, which stays."""
    importlib.import_module("politune.training.session")
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_llama(tmp_path_factory.mktemp("base") / "tiny-llama", seed=0)


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_mistral(tmp_path_factory.mktemp("base") / "tiny-mistral", seed=0)
