"""The reference model's log-probabilities of every row: computed once, kept with the run, never taken for another's."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from politune import record
from politune.writing import sync

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
    return record.sha256_of_json([facts, settings])


class ReferenceScores:
    """Log-probabilities of chosen and rejected, float32 [rows, 2], by the rows' numbers; NaN where not known.

    Args:
        path: the file that keeps them; it is read at once, if it was written under the same key and is whole.
        key: of `key_of`.
        rows: how many rows there are.
        kept: the numbers of those that are needed more than once; the others are never looked up.
    """

    def __init__(self, path: Path, key: str, rows: int, kept: range) -> None:
        self.path, self.key, self.kept = path, key, kept
        self.values = torch.full((rows, 2), torch.nan)
        self._read()

    @property
    def is_complete(self) -> bool:
        """Whether every row that is needed more than once is known."""
        return not bool(self.values[self.kept.start : self.kept.stop].isnan().any())

    def find(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """(chosen, rejected) of the rows with these numbers, None where one of them is not known."""
        found = self.values[rows.cpu()]
        return None if bool(found.isnan().any()) else (found[:, 0], found[:, 1])

    def save(self) -> str | None:
        """Writes the file in one rename; what went wrong, where that failed: the file only saves a resumed run time."""
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        metadata = {"politune.reference": self.key, "sha256": _hash(self.values)}
        try:
            draft.write_bytes(save({"log_probs": self.values}, metadata))
            sync(draft)
            draft.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            return str(error)
        return None

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                metadata, values = file.metadata() or {}, file.get_tensor("log_probs")
        except (OSError, ValueError, KeyError, SafetensorError):
            return
        same = metadata.get("politune.reference") == self.key and values.shape == self.values.shape
        if same and metadata.get("sha256") == _hash(values):
            self.values = values


def _hash(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
