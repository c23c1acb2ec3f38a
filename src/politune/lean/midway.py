"""The lean of a model that is in training, by the quick preset: the base once, then the model as it is."""

from collections.abc import Callable, Mapping
from typing import Any

from politune.errors import ModelError
from politune.lean import analysis, instruments
from politune.lean.analysis import Part
from politune.lean.plan import Block, blocks
from politune.lean.prompts import Prompter
from politune.lean.respondent import Respondent
from politune.lean.results import log_name
from politune.lean.rows import Row, State

INSTRUMENTS = ("politune-stances", "politune-core")


class Midway:
    """Measures one model again and again.

    Args:
        tokenizer: the model's.
        say: takes one line of progress.
        is_stopped: asked before each block.
    """

    def __init__(self, tokenizer: Any, *, say: Callable[[str], None], is_stopped: Callable[[], bool]) -> None:
        self.tokenizer, self.say, self.is_stopped = tokenizer, say, is_stopped
        self.given = [instruments.load(name) for name in INSTRUMENTS]
        self.prompter = Prompter(tokenizer)
        self.base: Mapping[Part, list[Row]] | None = None

    def measure(self, model: Any) -> dict[str, float]:
        """The mean shift of every axis so far, by `lean/INSTRUMENT/AXIS`; left is negative. Empty where it was stopped.

        Args:
            model: with PEFT's adapter, in evaluation mode.

        Raises:
            ModelError: the model cannot be measured, or the memory does not suffice beside the training's.
        """
        import torch

        try:
            return self._measured(model)
        except torch.OutOfMemoryError as error:
            raise ModelError("no memory is left to measure the lean", fix="measure the run when it is done") from error

    def _measured(self, model: Any) -> dict[str, float]:
        respondent = Respondent(model, self.tokenizer)
        if self.base is None:
            self.say("measuring the base's lean, once")
            self.base = self._rows(respondent, "base")
        tuned = self._rows(respondent, "tuned") if self.base is not None else None
        if self.base is None or tuned is None:
            return {}
        found = {}
        for part, rows in self.base.items():
            for axis, before, after in analysis.axis_leans(rows, tuned[part]):
                moved = analysis.differences(after, before)
                found[log_name(part, axis)] = sum(value for _, value in moved.values()) / len(moved)
        return found

    def _rows(self, respondent: Respondent, state: State) -> Mapping[Part, list[Row]] | None:
        rows: list[Row] = []
        for each in self.given:
            for block in blocks(state, each, self.prompter, "quick", ("none",)):
                if self.is_stopped():
                    return None
                if block.mode == "scored":
                    asked = tuple(one for one in block.asked if one.row.persona == "none")
                    rows += respondent.answer(state, Block(block.name, "scored", asked)) if asked else []
        return analysis.by_part(rows, state)
