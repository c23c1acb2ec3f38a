"""Everything that is read before the model: the base, its tokenizer, and the rows as they will be trained."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from politune import plan, preview
from politune.config import Run
from politune.data import format as rows_format
from politune.data import sources, tokens
from politune.errors import DataError, safe
from politune.models import load
from politune.record import generator_note

HELD_OUT = "heldout"


@dataclass(frozen=True)
class Prepared:
    """A run's inputs: every row as token ids, cut to the run's length.

    `lengths` are for the plan; `tokens` those of one epoch, without padding; `counts` the rows' fates.
    """

    base: load.ResolvedModel
    base_sha256: str
    tokenizer: Any
    table: rows_format.Table
    train: list[rows_format.Encoded]
    validation: list[rows_format.Encoded]
    heldout: list[rows_format.Encoded]
    lengths: plan.DataShape
    tokens: int
    tokens_sha256: str
    counts: dict[str, int]

    def base_facts(self) -> dict[str, Any]:
        """What run.json says of the base model."""
        base = self.base
        return {"name": base.public_name, "commit": base.commit, "sha256": self.base_sha256, "license": base.license}

    def data_facts(self) -> dict[str, Any]:
        """What run.json says of the data."""
        table = self.table
        rows = {"train": len(self.train), "validation": len(self.validation), HELD_OUT: len(self.heldout)}
        facts = {"name": table.name, "revision": table.revision, "sha256": table.sha256, "generator": table.generator}
        made = {"manifest": dict(table.manifest)} if table.manifest else {}
        return {**facts, "rows": rows, "training_tokens": self.tokens, "counts": self.counts, **made}


def prepare(run: Run, table: rows_format.Table | None, offline: bool, say: Callable[[str], None]) -> Prepared:
    """Fetches and reads the data and the base, measures every row with the base's tokenizer, and splits.

    Args:
        table: local data, already read; None fetches them from the Hub.

    Raises:
        DataError: the data cannot be read, or no row is left.
        ModelError: the base or its tokenizer cannot be used.
        HubError, MachineError: it could not be fetched.
    """
    table = sources.load(run.data, offline=offline) if table is None else table
    base = load.resolve(run.model, offline=offline, say=say)
    tokenizer = load.load_tokenizer(base)
    fitted, counts = _fit(run, table, tokenizer)
    for fate, count in counts.items():
        if count:
            say(f"{count} of {len(table.rows)} rows: {safe(fate)}")
    if note := generator_note(table.generator, base.public_name):
        say(note)
    training, validation = _split(run, fitted)
    lengths = plan.count_tokens(
        ([len(item.prompt_ids), *map(len, item.completions)] for item in training), templated=True
    )
    return Prepared(
        base=base,
        base_sha256=load.base_sha256(base),
        tokenizer=tokenizer,
        table=table,
        train=training,
        validation=validation,
        heldout=_held_out_rows(run, table, tokenizer, offline),
        lengths=replace(lengths, validation_rows=len(validation)),
        tokens=sum(map(_count_tokens, training)),
        tokens_sha256=hash_tokens(training),
        counts=counts,
    )


def _fit(run: Run, table: rows_format.Table, tokenizer: Any) -> tuple[rows_format.Fitted[Any], dict[str, int]]:
    """A table's rows as they will be trained, and how many met which fate on the way."""
    converted = preview.convert(run, table)
    encoded = tokens.encode(converted.rows, tokenizer)
    fitted = rows_format.fit(converted.rows, encoded, run.data.max_length, run.data.on_overlength)
    counts = asdict(fitted.counts)
    counts.pop("kept")
    return fitted, {**converted.dropped, **{name.replace("_", " "): count for name, count in counts.items()}}


def _split(run: Run, fitted: rows_format.Fitted[Any]) -> tuple[list[rows_format.Encoded], list[rows_format.Encoded]]:
    """(training rows, validation rows), divided by their prompts."""
    training = rows_format.split_validation(fitted.rows, run.data.validation_fraction, run.train.seed)[0]
    chosen = {id(row) for row in training}
    sides: tuple[list[rows_format.Encoded], list[rows_format.Encoded]] = ([], [])
    for row, item in zip(fitted.rows, fitted.encoded, strict=True):
        sides[id(row) not in chosen].append(item)
    return sides


def _held_out_rows(run: Run, table: rows_format.Table, tokenizer: Any, offline: bool) -> list[rows_format.Encoded]:
    """The rows that the data itself sets aside in a split `heldout`; they are evaluated once, after training."""
    if not table.other_splits or run.data.dataset_split == HELD_OUT:
        return []
    try:
        heldout = sources.load(run.data.model_copy(update={"dataset_split": HELD_OUT}), offline=offline)
        return _fit(run, heldout, tokenizer)[0].encoded
    except DataError:  # the other splits have other names, or their rows cannot be used: no reason not to train
        return []


def hash_tokens(rows: list[rows_format.Encoded]) -> str:
    """SHA-256 over the token ids as they are trained: data, order, template, tokenizer and length in one."""
    digest = hashlib.sha256()
    for item in rows:
        digest.update(json.dumps([item.prompt_ids, *item.completions]).encode())
    return digest.hexdigest()


def _count_tokens(item: rows_format.Encoded) -> int:
    """Tokens of a row as the trainer computes it, without padding: the prompt stands before every completion."""
    return sum(len(item.prompt_ids) + len(completion) for completion in item.completions)
