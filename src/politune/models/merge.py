"""An adapter folded into its base model, written as a plain checkpoint, and proved to answer as base and adapter did.

The merge is done in float32 on the full base, never on a quantised one (PEFT would quantise the sum again and can lose
the tuning), and the sum is rounded once to the dtype that is written. The proof is a chain of four sets of logits over
the same prompts, all computed in float32:

    base + adapter  --fold-->  merged in memory  --round-->  rounded in memory  --write, read-->  files on disk

- Folding adds B A scaled to W before instead of after the product: it may change the order of float32 sums only.
- Rounding is the one step that may lose something, so its effect is measured by itself. It is zero for float32.
- Writing and reading must lose nothing.

So the first and the last link have to hold within the noise of float32 sums (`noise_tolerance`), and by the triangle
inequality the files may differ from base + adapter by the measured rounding plus twice that noise: this is the
tolerance of the report. (The rounding error of the base itself is no measure: for a base in bfloat16 it is zero.)
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from politune import __version__, record
from politune.errors import MachineError, ModelError, OutputError, safe
from politune.models import adapter as adapters
from politune.models import files, load, tuned
from politune.models.quiet import quiet_libraries
from politune.report import Facts, Lines, Section

Dtype: TypeAlias = Literal["bfloat16", "float16", "float32"]
Say: TypeAlias = Callable[[str], None]
Logits: TypeAlias = list[Any]

PROMPTS = (
    "Water boils at one hundred degrees Celsius at sea level, and it freezes at",
    "List three things to pack for a weekend by the sea.",
    "Dear neighbour, thank you for watering the plants while we were",
    "def add(first, second):\n    return",
    "Question: Which day comes after Tuesday?\nAnswer:",
    "The train to the coast leaves at nine and arrives shortly before",
)
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_SHARD_SIZE = "4GB"
NOISE_FLOOR = 1e-4
NOISE_PER_LOGIT = 4e-5
# Rounding that moves the logits by more than this share of what the adapter moves them deserves a word.
NOTABLE_ROUNDING = 0.1
# From the pinned base, word for word: tokenizer, template, generation settings, and the terms.
COPIED = (
    "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how far its answers are from base + adapter, in logits over `prompts` prompts."""

    output: str
    base: str
    adapter: str
    direction: str
    dtype: str
    bytes: int
    shards: int
    largest_logit_difference: float
    tolerance: float
    largest_rounding_effect: float
    largest_adapter_effect: float
    prompts: int
    seconds: float
    disclosure: str
    notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        difference = f"{self.largest_logit_difference:.1e}"
        return f"Merged into {self.output}: verified, logits within {difference} of base and adapter"

    def sections(self) -> Sequence[Section]:
        verified = f"{self.largest_logit_difference:.2e} (tolerance {self.tolerance:.2e})"
        facts = (
            ("base model", self.base),
            ("adapter", self.adapter),
            ("direction", self.direction),
            ("weights", f"{self.dtype}, {self.bytes / 1e9:.2f} GB in {self.shards} files"),
            (f"largest logit difference over {self.prompts} prompts", verified),
            (f"of that, rounding to {self.dtype}", f"{self.largest_rounding_effect:.2e}"),
            ("what the adapter itself changes", f"{self.largest_adapter_effect:.2e}"),
            ("time", f"{self.seconds:.0f} s"),
            ("disclosure", self.disclosure),
        )
        return [Facts("Merge", facts), *([Lines("Notes", self.notes)] if self.notes else [])]


@dataclass(frozen=True)
class Effects:
    """Largest absolute logit differences between the links of the chain; `peak` is the largest absolute logit."""

    peak: float
    adapter: float
    folding: float
    rounding: float

    @property
    def noise_tolerance(self) -> float:
        """What float32 sums in another order may change: a share of the largest logit, but no less than 1e-4.

        Measured on a model of 30 layers with random adapters of three sizes: 3e-6 to 1e-5 of the largest logit.
        """
        return max(NOISE_FLOOR, NOISE_PER_LOGIT * self.peak)

    @property
    def tolerance(self) -> float:
        """The bound on the difference between the files and base + adapter (see the module's docstring)."""
        return self.noise_tolerance if self.rounding == 0 else self.rounding + 2 * self.noise_tolerance


def merge(
    path: Path,
    *,
    output: Path | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
    force_base: bool = False,
    offline: bool = False,
    say: Say,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> MergeReport:
    """Merges the adapter of a run, or an adapter directory, into its base model, and verifies the files.

    Args:
        path: a run directory (with `adapter/` in it) or an adapter directory.
        output: a new or empty directory; by default `merged` (`Llama-merged` for a Llama) beside the adapter.
        dtype: of the written weights; by default the base model's own.
        base: base model instead of the recorded one: `demo`, a directory, or a Hub id.
        force_base: accept a base that the adapter was not trained on.
        offline: use what is on this machine.
        say: takes one line per stage.

    Raises:
        ModelError: the adapter or the base is missing, damaged, of another shape, or the verification failed.
        MachineError: the base in float32 does not fit into this machine's memory.
        OutputError: the output is in use, is the adapter, the run or the base itself, or does not fit on the disk.
    """
    started = time.monotonic()
    adapter = adapters.read(tuned.adapter_directory(path))
    beside = tuned.beside(adapter.path)
    papers = record.read_json(beside / "run.json") or {}
    if output is not None:
        _check_output(output, adapter.path)
    model = load.resolve(tuned.base_spec(adapter, papers, base), offline=offline, say=say)
    target = output or beside / ("Llama-merged" if model.is_llama else "merged")
    _check_output(target, adapter.path, model.path)
    written = dtype or _own_dtype(model)
    _check_resources(target, model, written)
    metadata = _metadata(adapter, model, force_base)
    with files.staged(target.resolve()) as staging:
        chain = _fold(adapter, model, staging, written, max_shard_size, say)
        _write_papers(staging, model, metadata)
        difference = _verify(staging, model, chain, say)
        sizes = [shard.stat().st_size for shard in load.weight_files(staging)]
    return MergeReport(
        output=str(target),
        base=model.public_name,
        adapter=str(adapter.path),
        direction=metadata["politune.direction"],
        dtype=written,
        bytes=sum(sizes),
        shards=len(sizes),
        largest_logit_difference=difference,
        tolerance=chain.effects.tolerance,
        largest_rounding_effect=chain.effects.rounding,
        largest_adapter_effect=chain.effects.adapter,
        prompts=len(PROMPTS),
        seconds=round(time.monotonic() - started, 1),
        disclosure=metadata["politune.disclosure"],
        notes=_notes(model, papers, written, chain.effects),
    )


@dataclass(frozen=True)
class _Chain:
    """Logits per prompt, each (1, tokens, vocabulary) in float32, and the effects measured in memory."""

    reference: Logits
    rounded: Logits
    effects: Effects


def _check_output(output: Path, adapter: Path, base: Path | None = None) -> None:
    real, shown = output.resolve(), safe(output)
    owners = {
        "the adapter": adapter,
        "the directory that the adapter lies in": tuned.beside(adapter),
        "the base model": base,
    }
    for owner, place in owners.items():
        if place is not None and real == place.resolve():
            raise OutputError(f"{shown} is {owner} itself", fix="choose another --output")
    for owner, place in (("the adapter", adapter), ("the base model", base)):
        if place is not None and real.is_relative_to(place.resolve()):
            raise OutputError(f"{shown} lies inside {owner}", fix="choose another --output")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{shown} is a file", fix="choose another --output")
    if output.is_dir() and any(output.iterdir()):
        raise OutputError(f"{shown} is not empty", fix="choose another --output")


def _own_dtype(model: load.ResolvedModel) -> Dtype:
    """The dtype that the base was published in; float32 where its config does not say."""
    named = model.config.get("dtype") or model.config.get("torch_dtype")
    return named if named in DTYPE_BYTES else "float32"


def _check_resources(target: Path, model: load.ResolvedModel, dtype: Dtype) -> None:
    """Refuses what cannot work before the base is loaded: a quantised base, too little memory, too little disk."""
    if model.config.get("quantization_config"):
        raise ModelError(
            f"{safe(model.name)} is a quantised checkpoint",
            why="an adapter cannot be added to it without losing it to the quantisation again",
            fix="name the full model with --base",
        )
    shapes = [shape for shard in load.weight_files(model.path) for shape in files.read_header(shard).shapes().values()]
    parameters = sum(math.prod(shape) for shape in shapes)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * parameters > memory_bytes:
        have, need = memory_bytes / 1e9, 4 * parameters / 1e9
        raise MachineError(
            f"merging needs {need:.0f} GB of memory for the base in float32 and this machine has {have:.0f} GB",
            line="memory",
        )
    files.remove_leftovers(target.resolve())
    size = DTYPE_BYTES[dtype] * parameters
    files.require_space(target, size + min(size, 4_000_000_000))  # one shard at a time is copied when it is stamped


def _metadata(adapter: adapters.Adapter, model: load.ResolvedModel, force_base: bool) -> dict[str, str]:
    """The adapter's own disclosure, with the base that it is merged into; another base than its own has to be forced."""
    foreign = {} if _is_own_base(adapter, model, force_base) else _trained_base(adapter)
    own = {
        "politune.version": __version__,
        "politune.purpose": "research",
        "politune.direction": "undeclared",
        **adapter.metadata,
    }
    recorded = None if foreign else adapter.metadata.get("politune.base_sha256")
    trained_base = foreign.get("politune.trained_base")
    return {
        **own,
        **foreign,
        "politune.base": model.public_name,
        "politune.base_commit": model.commit or "",
        "politune.base_sha256": recorded or load.base_sha256(model),
        "politune.base_license": model.license or "",
        "politune.disclosure": record.disclosure(own["politune.direction"], "merge", trained_base=trained_base),
    }


def _is_own_base(adapter: adapters.Adapter, model: load.ResolvedModel, force_base: bool) -> bool:
    try:
        load.check_base(adapter, model)
    except ModelError:
        if not force_base:
            raise
        return False
    return True


def _trained_base(adapter: adapters.Adapter) -> dict[str, str]:
    """The adapter's own account of its base, to publish: of a path on some machine the last part alone."""
    name = adapter.base_name or "unknown"
    public = f"local:{Path(name).name}" if load.is_local(name) else name
    digest = adapter.metadata.get("politune.base_sha256", "")
    return {"politune.trained_base": safe(public), "politune.trained_base_sha256": digest}


def _fold(
    adapter: adapters.Adapter, model: load.ResolvedModel, staging: Path, dtype: Dtype, max_shard_size: str, say: Say
) -> _Chain:
    """Folds in float32, rounds, and saves; one copy of the model is in memory."""
    say(f"loading {safe(model.name)} in float32")
    prompts = _token_ids(model)
    network = load.load_model(model, device="cpu")
    untuned = _logits(network, prompts)
    adapted = load.load_adapter(network, adapter.path, base=model, force_base=True)  # the base was compared before
    reference = _logits(adapted, prompts)
    say("merging")
    with quiet_libraries():
        merged = adapted.merge_and_unload(safe_merge=True)
    folded = _logits(merged, prompts)
    _round(merged, dtype)
    rounded = _logits(merged, prompts)
    effects = Effects(
        peak=max(float(each.abs().max()) for each in reference),
        adapter=_largest_difference(untuned, reference),
        folding=_largest_difference(reference, folded),
        rounding=_largest_difference(folded, rounded),
    )
    if not effects.folding <= effects.noise_tolerance:
        raise _unlike(effects.folding, effects.noise_tolerance, "the merge in memory differs from base and adapter")
    if not math.isfinite(effects.rounding):
        raise ModelError(f"the merged weights do not fit into {dtype}", fix="merge with --dtype bfloat16 or float32")
    say(f"writing {dtype} weights")
    _save(merged, model, staging, dtype, max_shard_size)
    return _Chain(reference, rounded, effects)


def _token_ids(model: load.ResolvedModel) -> list[Any]:
    tokenizer = load.load_tokenizer(model)
    return [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]


def _logits(network: Any, prompts: list[Any]) -> Logits:
    import torch

    with torch.inference_mode():
        return [network(input_ids=ids).logits.float() for ids in prompts]


def _largest_difference(one: Logits, other: Logits) -> float:
    """The largest absolute difference; infinite where a value is not finite, so that every bound refuses it."""
    import torch

    largest = torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max()
    return float(largest) if bool(largest.isfinite()) else math.inf


def _round(network: Any, dtype: Dtype) -> None:
    """Rounds each weight to `dtype` in place and keeps it in float32, so that only the weights change."""
    import torch

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)).float())


def _save(network: Any, model: load.ResolvedModel, staging: Path, dtype: Dtype, max_shard_size: str) -> None:
    """Writes weights and config; the weights hold rounded values already, so that changing their dtype is exact."""
    import torch
    from transformers import GenerationConfig

    network.to(getattr(torch, dtype))
    if (model.path / "generation_config.json").exists():
        # The base's own file is copied later; saving would refuse the odd ones that are published.
        network.generation_config = GenerationConfig()
    with quiet_libraries():
        network.save_pretrained(staging, max_shard_size=max_shard_size)


def _write_papers(staging: Path, model: load.ResolvedModel, metadata: Mapping[str, str]) -> None:
    """Tokenizer, template and terms of the base; the disclosure in the config, in each weight file and in the card."""
    for pattern in COPIED:
        for source in model.path.glob(pattern):
            if source.is_file() and _is_own(source, model):
                shutil.copyfile(source, staging / source.name)
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    config["politune"] = {key.removeprefix("politune."): value for key, value in metadata.items()}
    (staging / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for shard in load.weight_files(staging):
        files.rewrite_metadata(shard, metadata)
    (staging / "README.md").write_text(record.model_card(metadata, "merge"), encoding="utf-8")


def _is_own(source: Path, model: load.ResolvedModel) -> bool:
    """Whether a file is the model's: the Hub's cache is made of links, a directory from elsewhere may link to anything here."""
    real, own = source.resolve(), model.path.resolve()
    return real.is_relative_to(own) or (
        own.parent.name == "snapshots" and real.is_relative_to(own.parent.parent / "blobs")
    )


def _verify(staging: Path, model: load.ResolvedModel, chain: _Chain, say: Say) -> float:
    """Reads the files again and returns their largest logit difference from base + adapter.

    Raises:
        ModelError: they differ from what was in memory, or from base + adapter by more than the tolerance.
    """
    say("verifying the written files against base and adapter")
    written = replace(model, path=staging)
    logits = _logits(load.load_model(written, device="cpu"), _token_ids(written))
    effects = chain.effects
    writing = _largest_difference(chain.rounded, logits)
    if not writing <= effects.noise_tolerance:
        raise _unlike(writing, effects.noise_tolerance, "the written files differ from the merge in memory")
    difference = _largest_difference(chain.reference, logits)
    if not difference <= effects.tolerance:
        raise _unlike(difference, effects.tolerance, "the written files differ from base and adapter")
    return difference


def _unlike(found: float, tolerance: float, what: str) -> ModelError:
    return ModelError(
        f"the merge failed its verification: {what}",
        why=f"the largest logit difference is {found:.2e}, the tolerance {tolerance:.2e}",
        fix="nothing was written; merge again, and report it if it comes back",
    )


def _notes(model: load.ResolvedModel, papers: Mapping[str, Any], dtype: Dtype, effects: Effects) -> tuple[str, ...]:
    notes = []
    if effects.adapter == 0:
        notes.append("The adapter changes nothing: the merged model is the base model.")
    elif effects.rounding > NOTABLE_ROUNDING * effects.adapter:
        share = f"{effects.rounding / effects.adapter:.0%}"
        notes.append(
            f"Rounding to {dtype} moves the logits by {share} of the adapter's own effect; float32 keeps all of it."
        )
    if record.settings_of(papers).get("model.use_4bit") is True:
        notes.append(
            "The adapter was trained on a 4-bit base and is merged into the full one, whose answers differ a little."
        )
    if model.is_llama:
        notes.append(
            'Built with Llama: publish it under a name that begins with "Llama", with the base\'s licence and notice.'
        )
    return tuple(notes)
