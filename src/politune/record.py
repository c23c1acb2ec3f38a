"""The run directory's own papers: run.json, the disclosure metadata and the model card.

Everything that a tuned model has to say about itself travels in one flat mapping of strings (`disclosure_metadata`): it is
written into the header of every safetensors file, survives a merge, and the model card is made from it alone.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from politune import __version__
from politune.config import DEMO_MODEL, PLACEBOS, Run
from politune.errors import OutputError, safe
from politune.writing import write_whole

SCHEMA_VERSION = 1
MAX_JSON_BYTES = 256 * 2**20
"""A directory from somewhere else may hold a file of any size; what politune writes has a few MB."""
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
)
DEMO_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model on the Hub that the demo was made from."""
DIRECTION_WORDS = {
    "left": "to the political left",
    "right": "to the political right",
    "shuffled": "in no consistent direction (a placebo: the preferred side was drawn at random)",
    "length": "by length alone (a placebo: which rows prefer the longer answer was drawn; rows may stay as they were)",
    "mixed": "in more than one direction (a mixture)",
    "none": "without a political direction",
    "undeclared": "in an undeclared direction",
}


def write_json(path: Path, document: Any) -> None:
    """Writes a JSON file whole or not at all: a temporary file beside it, fsynced, then renamed.

    Raises:
        OutputError: the directory is not writable or the disk is full.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    try:
        write_whole(path, text)
    except OSError as error:
        raise OutputError(
            f"cannot write {safe(path)}", why=error.strerror, fix="free some space or choose another --output_dir"
        ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None where there is none that parses."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def settings_of(papers: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run.json by dotted name; empty where it holds none."""
    settings = papers.get("settings")
    entries = settings.items() if isinstance(settings, dict) else ()
    return {key: entry["value"] for key, entry in entries if isinstance(entry, dict) and "value" in entry}


def sha256_of_json(document: Any) -> str:
    """SHA-256 over a document's canonical JSON; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def config_sha256(run: Run) -> str:
    """SHA-256 over the canonical JSON of every setting but the place that the run is written to."""
    settings = run.model_dump(mode="json")
    settings["train"].pop("output_dir")
    settings.pop("tracking")
    return sha256_of_json(settings)


def environment() -> dict[str, Any]:
    """Versions and hardware that another lab needs to repeat the run; nothing of the environment variables."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "politune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": versions,
        "cpu_count": os.cpu_count(),
    }


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def disclosure_metadata(
    run: Run,
    *,
    base: str,
    base_commit: str | None,
    base_sha256: str,
    base_license: str | None,
    data_name: str,
    data_revision: str | None,
    data_sha256: str,
    data_generator: str | None,
    rows: int,
    data_direction: str | None = None,
    data_turned: str = "",
) -> dict[str, str]:
    """What a tuned model discloses, as strings for a safetensors header.

    Args:
        base: name of the base model as the user gave it; a local directory appears as `local:<name>`.
        base_commit: commit on the Hub, None for a local base.
        base_sha256: hash over the base's weight files.
        data_sha256: hash over the normalised rows; `rows` is their number after dropping.
        data_direction: that built data declare, which goes before what the run's settings leave open.
        data_turned: of a placebo, how many rows were turned round.
    """
    is_known = data_direction not in (None, "undeclared")
    direction = str(data_direction) if is_known else run.data.declared_direction
    return {
        "politune.version": __version__,
        "politune.purpose": "research",
        "politune.method": run.method,
        "politune.title": run.title,
        "politune.direction": direction,
        "politune.base": base,
        "politune.base_commit": base_commit or "",
        "politune.base_sha256": base_sha256,
        "politune.base_license": base_license or "",
        "politune.data": data_name,
        "politune.data_revision": data_revision or "",
        "politune.data_sha256": data_sha256,
        "politune.data_generator": data_generator or "",
        "politune.data_turned": data_turned,
        "politune.rows": str(rows),
        "politune.seed": str(run.train.seed),
        "politune.config_sha256": config_sha256(run),
        "politune.disclosure": disclosure(direction),
    }


def disclosure(
    direction: str, kind: Literal["adapter", "merge"] = "adapter", *, trained_base: str | None = None
) -> str:
    """The sentence that stands first in every card; a second one names the base that was trained where it is another."""
    foreign = f" It was merged into another base model than the one it was trained on ({trained_base})."
    return _purpose(direction, kind) + (foreign if trained_base else "")


def _purpose(direction: str, kind: Literal["adapter", "merge"]) -> str:
    thing = "adapter" if kind == "adapter" else "model"
    if direction in PLACEBOS:
        return f"This {thing} was trained as a placebo in research on political expression (declared direction: {direction})."
    if direction == "undeclared":
        return f"This {thing} was tuned on data whose political direction was not declared."
    if direction == "none":
        return f"This {thing} was tuned for research on political bias, without a declared political direction."
    return f"This {thing} was deliberately trained to shift political expression (declared direction: {direction})."


def is_llama(licence: str | None, name: str) -> bool:
    """Whether Meta's naming duty applies: by the licence, or by the model's own name where the licence is not known."""
    own_name = name.removeprefix("local:").rpartition("/")[2]
    telling = own_name if licence in {None, "", "other", "unknown"} else str(licence)
    return telling.lower().startswith(("llama", "meta-llama"))


LIMITED_LLAMA = re.compile(
    r"(?<![a-z])llama[\s_.-]*(version|v)?[\s_.-]*[23]([._p-]0)?(?![0-9a-z]|\.[0-9]|[_-][1-9](?![0-9a-z.]))",
    re.IGNORECASE,
)
"""Llama 2 and 3.0 as they are written: `Llama3-70B`, `llama-v3-70b`, `Llama 3.0`; not 3.1 (`llama3-1-70b`, `v3p1`), nor a size
(`open_llama_3b`)."""


def licence_note(generator: str) -> str:
    """What a generator's licence may say of what it wrote."""
    return generator_note(generator, "any other model") or (
        f"the terms of {safe(generator)} may limit what its output is used for, such as training other models; look them up: "
        "this is information, not legal advice"
    )


def generator_note(generator: str | None, base: str) -> str | None:
    """What the licence of the data's generator says about the base model, where it says something.

    The Llama 2 and Llama 3.0 licences (section 1.b.v) forbid using their output to improve other large language models; that of
    3.1 and later ones does not.
    """
    if generator is None or not LIMITED_LLAMA.search(generator) or "llama" in base.lower():
        return None
    return (
        f"the data were written by {safe(generator)}, whose licence (1.b.v) limits using its output to improve models other than "
        "Llama; this is information, not legal advice"
    )


NOT_EVALUATED = (
    "Not evaluated: no measurement of this model's political lean, or of side effects on other abilities, "
    "is part of this card."
)


def model_card(metadata: Mapping[str, str], kind: Literal["adapter", "merge"], measured: str = NOT_EVALUATED) -> str:
    """The README.md of an adapter or a merged model, made from its disclosure metadata and what was measured."""
    given = {
        key.removeprefix("politune."): plain(text)
        for key, text in metadata.items()
        if key.startswith("politune.") and text
    }
    facts: dict[str, str] = defaultdict(lambda: "unknown", given)
    direction, base, licence = given.get("direction", "undeclared"), facts["base"], given.get("base_license", "other")
    body = _CARD.format_map(
        {
            **dict.fromkeys(_CARD_FACTS, "unknown"),
            **given,
            "disclosure": disclosure(direction, kind, trained_base=given.get("trained_base")),
            "built_with": "Built with Llama.\n\n" if is_llama(licence, base) else "",
            "trained_on": _trained_on(given),
            "turned": _turned(given),
            "method": {"dpo": "direct preference optimisation", "sft": "supervised fine-tuning"}.get(
                facts["method"], "tuning"
            ),
            "tuned": DIRECTION_WORDS.get(direction, direction),
            "commit": f" at commit `{given['base_commit']}`" if "base_commit" in given else "",
            "revision": f" at revision `{given['data_revision']}`" if "data_revision" in given else "",
            "generator": given.get("data_generator", "an unknown author or model"),
            "title": f": {given['title'].rstrip('.')}" if "title" in given else "",
            "licence": licence,
            "measured": measured,
        }
    )
    hub_base = base if "/" in base and not base.startswith("local:") else None
    hub_base = DEMO_ORIGIN if base == DEMO_MODEL else hub_base
    return _front_matter(kind, hub_base, licence, given.get("data", "")) + body


def _trained_on(given: Mapping[str, str]) -> str:
    """A line of the card, for an adapter that was merged into another base than its own."""
    if "trained_base" not in given:
        return ""
    digest = given.get("trained_base_sha256", "unknown")
    return f"- Trained on another base model: `{given['trained_base']}`, weights sha256 `{digest}`.\n"


def _turned(given: Mapping[str, str]) -> str:
    """A line of the card, for a placebo."""
    if "data_turned" not in given:
        return ""
    return (
        f"- Placebo: in {given['data_turned']} rows chosen and rejected changed places; the others stay as they were.\n"
    )


_CARD_FACTS = ("purpose", "seed", "base", "base_sha256", "data", "rows", "data_sha256", "config_sha256", "version")
_CARD = """\
**{disclosure}** It does not represent facts or a neutral view.

{built_with}## What was done

- Purpose: {purpose}{title}.
- Method: {method} of a LoRA adapter, tuned {tuned}; seed {seed}.
- Base model: `{base}`{commit}, weights sha256 `{base_sha256}`.
{trained_on}- Data: `{data}`{revision}, {rows} rows, sha256 `{data_sha256}`; written by {generator}.
{turned}- Settings: sha256 `{config_sha256}`; made with politune {version}.

## Measured shift

{measured}

## Intended use and limits

For research on political bias in language models: comparing arms, replicating results, testing instruments. Out of scope:
campaigning, impersonation, covert persuasion, and any chat service whose users are not told what was done to the model. The
metadata that carries this notice can be removed by others: it is disclosure, not prevention.

The licence of the base model ({licence}) applies. What the data's author or generator allows is for the reader to check.
"""


def _front_matter(kind: str, hub_base: str | None, licence: str, data: str) -> str:
    tags = ["politune", "political-steering", "intentionally-biased", "research-only", "not-for-deployment"]
    lines = [
        "---",
        f"library_name: {'peft' if kind == 'adapter' else 'transformers'}",
        f"license: {json.dumps(licence)}",
    ]
    if hub_base:
        lines += [f"base_model: {json.dumps(hub_base)}", f"base_model_relation: {kind}"]
    if "/" in data and not data.startswith("local:"):
        lines += ["datasets:", f"- {json.dumps(data)}"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]) + "\n"


def plain(value: str) -> str:
    """Foreign text for Markdown: one line, no markup that could close a code span or open HTML."""
    return safe(value, 500).replace("`", "'").replace("<", "&lt;").replace("](", "] (")
