"""How many packed tokens go through the model in one forward and backward pass.

Measured on two cores, SmolLM2-135M, 4 pairs of about 250 tokens a micro-batch: calls of up to 2,048 and of 4,096 tokens are
equally fast; with 1,024 many a micro-batch is longer than a call, and what is divided goes forward twice.
"""

import math
from dataclasses import dataclass

from politune.config import DpoRun, Run
from politune.plan.memory import ATTENTION_BLOCK, MOST_CPU_KERNELS, MemoryNeed, memory_need
from politune.plan.shapes import DataShape, ModelShape

PAYING_TOKENS = 2048
"""Larger calls are not faster on a CPU; on a GPU this is assumed, not measured."""
SHAPES_PER_BLOCK = 4
"""Products of attention's backward pass (`training.attention`), for every length of a block and what it sees."""
SHAPES_PER_CALL = 26
"""Products with the four shapes of projections and their adapters, for every number of tokens."""
STEP_TOKENS = 256
"""Calls are rounded up to a multiple of this."""
DEVIATIONS = 2.5
"""99 of 100 sums of rows are within so many standard deviations of their mean."""
DEVIATIONS_AT_95 = 1.645


# Settings of TRL and transformers that packed rows would change or break.
NEEDS_PADDED_ROWS = {
    "activation_offloading": "wants the backward pass inside the trainer's own step",
    "label_smoothing_factor": "needs the logits of every token",
    "torch_compile": "compiles the model for padded batches",
    "neftune_noise_alpha": "scales its noise by the length of the padded rows",
    "use_liger_kernel": "puts another forward pass in the model's place",
}


@dataclass(frozen=True)
class RowTokens:
    """Packed tokens of a row: its prompt once, and every completion."""

    rows: float
    """How many there are; infinite where that is not known."""
    mean: float
    deviation: float
    longest: int

    def most(self, rows: int) -> int:
        """What hardly any `rows` rows together exceed."""
        rows = int(min(rows, self.rows))
        return min(rows * self.longest, math.ceil(rows * self.mean + DEVIATIONS * self._deviation_of(rows)))

    def share_above(self, rows: int, tokens: int) -> float:
        """Share of groups of `rows` rows that have more tokens, as if their sums were normally distributed."""
        deviation = self._deviation_of(rows)
        if deviation == 0:
            return float(rows * self.mean > tokens)
        return 0.5 * math.erfc((tokens - rows * self.mean) / deviation / math.sqrt(2))

    def _deviation_of(self, rows: int) -> float:
        """Of the sum of `rows` rows that are drawn without putting them back."""
        return self.deviation * math.sqrt(rows * max(0.0, 1 - rows / self.rows))


def is_packed(run: Run, shape: ModelShape | None) -> bool:
    """Whether rows will be packed, as far as can be told before the model is loaded."""
    needs_padding = any(run.trl.get(setting) for setting in NEEDS_PADDED_ROWS)
    return run.train.packing != "off" and not needs_padding and (shape is None or shape.packs)


def reference_passes(run: Run, epochs: float) -> float:
    """How often DPO's reference scores the rows."""
    if not isinstance(run, DpoRun):
        return 0.0
    return min(1.0, epochs) if run.trl.get("precompute_ref_log_probs", True) else epochs


def row_tokens(run: Run, data: DataShape | None, template: int) -> RowTokens:
    """Of the run's rows; rows of `max_length` where their lengths are not known.

    Args:
        template: tokens that the chat template adds to a row.
    """
    sides = 2 if run.method == "dpo" else 1
    longest = sides * run.data.max_length
    if data is None or data.prompt_tokens is None or data.completion_tokens is None:
        return RowTokens(math.inf if data is None else data.rows, longest, 0.0, longest)
    mean = data.prompt_tokens + sum(data.completion_tokens) + template
    if data.longest_packed_tokens is not None:
        longest = min(longest, data.longest_packed_tokens + template)
    elif data.longest_tokens is not None:
        longest = min(longest, sides * (data.longest_tokens + template))
    deviation = data.packed_deviation
    if deviation is None:
        tail = data.completion_tokens_p95 or max(data.completion_tokens)
        deviation = sides * max(0.0, tail - sum(data.completion_tokens) / sides) / DEVIATIONS_AT_95
    return RowTokens(max(1, data.rows), min(mean, longest), deviation, longest)


@dataclass(frozen=True)
class Calls:
    """The packed calls of one run on one machine."""

    run: Run
    rows: RowTokens
    on_gpu: bool
    divisible: bool

    @property
    def least(self) -> int:
        """Tokens that a call must be able to hold: a row is never divided, a micro-batch only in a single process."""
        return self.rows.longest if self.divisible else self.rows.most(self.run.train.per_device_train_batch_size)

    def tokens(self, limit: int) -> int:
        """Tokens of the largest call under a limit: all rows of a step go into as few calls as it allows."""
        train = self.run.train
        step = self.rows.most(train.per_device_train_batch_size * train.gradient_accumulation_steps)
        return max(self.least, min(limit, step))

    def need(self, shape: ModelShape, sequence_tokens: int, limit: int) -> MemoryNeed:
        """The memory of a run whose calls have this limit."""
        return memory_need(
            self.run, shape, sequence_tokens, self.tokens(limit), self.kernels(limit), on_gpu=self.on_gpu
        )

    def kernels(self, limit: int) -> int:
        """Different shapes of matrix products in the run; 1,024 stands for more than are kept."""
        if math.isinf(self.rows.rows):
            return MOST_CPU_KERNELS
        sides = 2 if self.run.method == "dpo" else 1
        # Attention cuts a segment into blocks of queries, the last of which is as long as it happens to be.
        blocks = self.rows.rows * sides * max(1.0, self.rows.mean / sides / ATTENTION_BLOCK + 0.5)
        calls = self.rows.rows * self.rows.mean * self.run.train.num_train_epochs / self.tokens(limit)
        return min(MOST_CPU_KERNELS, round(SHAPES_PER_BLOCK * blocks + SHAPES_PER_CALL * calls))

    def limit(self, shape: ModelShape | None, sequence_tokens: int, available_bytes: int | None) -> int:
        """The limit that was asked for, else as large as pays, halved until it fits.

        Hardly any micro-batch is then divided, where the memory has room for that.
        """
        train = self.run.train
        if train.tokens_per_call:
            return train.tokens_per_call
        whole = self.rows.most(train.per_device_train_batch_size)
        limit = max(PAYING_TOKENS, math.ceil(whole / STEP_TOKENS) * STEP_TOKENS)
        while shape and available_bytes is not None and limit > self.least:
            if self.need(shape, sequence_tokens, limit).fits_into(available_bytes):
                break
            limit = max(self.least, limit // 2)
        return limit
