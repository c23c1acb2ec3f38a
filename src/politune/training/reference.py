"""The reference model's log-probabilities of every row: computed once, kept with the run, never taken for another's."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "reference.safetensors"
# Settings that no reference log-probability depends on: it is of the base model alone, without the adapter.
WITHOUT_INFLUENCE = ("lora.", "train.", "method")


def key_of(identity: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """SHA-256 of all that the log-probabilities depend on.

    Args:
        identity: what a resumed run must share (see `training.identity`): base, tokens, precision, versions, device.
        settings: what stands in no identity or is left out of it here: the layout, and the rows that are not trained on.
    """
    facts = {name: value for name, value in identity.items() if not name.startswith(WITHOUT_INFLUENCE)}
    return hashlib.sha256(json.dumps([facts, settings], sort_keys=True, default=str).encode()).hexdigest()


class ReferenceScores:
    """Log-probabilities of chosen and rejected, float32 [rows, 2], by the rows' numbers; NaN where not computed yet.

    Args:
        path: the file that keeps them; it is read at once, if it was written under the same key and is whole.
        key: of `key_of`.
        rows: how many rows there are.
    """

    def __init__(self, path: Path, key: str, rows: int) -> None:
        self.path, self.key = path, key
        self.values = torch.full((rows, 2), torch.nan)
        self.was_read = self._read()

    @property
    def is_complete(self) -> bool:
        """Whether every row is known."""
        return not bool(self.values.isnan().any())

    def find(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """(chosen, rejected) of the rows with these numbers, None where one of them is not known."""
        found = self.values[rows.cpu()]
        return None if bool(found.isnan().any()) else (found[:, 0], found[:, 1])

    def save(self) -> None:
        """Writes the file in one rename."""
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        save_file({"log_probs": self.values}, draft, {"politune.reference": self.key})
        with draft.open("rb") as handle:
            os.fsync(handle.fileno())
        draft.replace(self.path)

    def _read(self) -> bool:
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("politune.reference") != self.key:
                    return False
                values = file.get_tensor("log_probs")
        except (OSError, RuntimeError, ValueError, KeyError) as _:
            return False
        except Exception as error:  # safetensors raises a class of its own for a damaged file
            if type(error).__name__ != "SafetensorError":
                raise
            return False
        if values.shape != self.values.shape or bool(values.isnan().any()):
            return False
        self.values = values
        return True
