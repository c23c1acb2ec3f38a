"""Signs that a run goes wrong though every number is finite: each is told once, with its numbers and what to try."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

WINDOW = 10
"""Logged lines that are averaged: one line is a few rows."""
RISEN = 1.5
"""The loss so many times its first value; one that is merely noisy stays below."""
COLLAPSED = 1.5
"""The chosen side's log-probability so many times what it began with: e.g. from -130 to -195 nats."""
SATURATED_MARGIN = 10.0
"""From here on the weight of a pair in the gradient, sigmoid(-margin), is below 5e-5 (Rafailov et al. 2023, section 4)."""
PERFECT = 0.99
FIRST_LINES = 5
ONE_SIDED = 0.95
"""Share of pairs whose chosen text is the longer (or the shorter) one, from which length alone tells the sides apart."""


def share_of_longer(completions: Sequence[tuple[list[int], ...]]) -> float:
    """The share of pairs, each (chosen, rejected) token ids, whose chosen text is the longer one; equal ones count half."""
    if not completions or len(completions[0]) != 2:
        return 0.5
    return fmean(((len(first) > len(second)) + (len(first) >= len(second))) / 2 for first, second in completions)


def signs(lines: Sequence[Mapping[str, Any]], longer: float) -> Iterator[tuple[str, str]]:
    """(kind, one sentence) of what the lines that a trainer logged so far are signs of.

    Args:
        lines: TRL's metrics of training, a mapping per logged line, oldest first.
        longer: from `share_of_longer`.
    """
    if text := _too_easy(lines, longer):
        yield "length", text
    if len(lines) <= WINDOW:
        return
    if first := _mean(lines[:1], "loss"):
        last = _mean(lines[-WINDOW:], "loss")
        if last > RISEN * first > 0:
            yield (
                "loss",
                f"the loss rose from {first:.3f} to {last:.3f}: lower --learning-rate, or raise --warmup-steps",
            )
    first, last = (_mean(part, "logps/chosen") for part in (lines[:FIRST_LINES], lines[-WINDOW:]))
    if last < COLLAPSED * first < 0:
        yield (
            "collapse",
            f"the chosen texts' log-probability fell from {first:.0f} to {last:.0f} nats: the model unlearns "
            "what it should prefer; lower --learning-rate, or raise --beta",
        )
    margin = _mean(lines[-WINDOW:], "rewards/margins")
    if margin > SATURATED_MARGIN:
        yield (
            "margin",
            f"the reward margin is {margin:.1f}: nothing more is learned from such pairs, and the adapter "
            "moves far from its base; lower --learning-rate, or train for fewer epochs",
        )


def _too_easy(lines: Sequence[Mapping[str, Any]], longer: float) -> str | None:
    accuracies = [
        float(line["rewards/accuracies"]) for line in lines[1 : FIRST_LINES + 1] if "rewards/accuracies" in line
    ]
    if len(accuracies) < FIRST_LINES or fmean(accuracies) < PERFECT or 1 - ONE_SIDED < longer < ONE_SIDED:
        return None
    share, which = (longer, "longer") if longer > 0.5 else (1 - longer, "shorter")
    return (
        f"preference accuracy is {fmean(accuracies):.2f} from the first steps on, and the chosen text is the {which} one in "
        f"{share:.0%} of the pairs: length alone tells the sides apart; see `politune inspect-data`"
    )


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """0 where no line has it."""
    values = [float(line[name]) for line in lines if name in line]
    return fmean(values) if values else 0.0
