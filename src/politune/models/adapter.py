"""What an adapter directory says, and whether it may and does fit a base model; judged before PEFT reads it.

PEFT takes a directory that is not there for a Hub id, reads pickles, matches module names with patterns from the file,
and accepts any base whose shapes agree. So the config is read here by an allow-list, the shapes come from the
safetensors header, and the base is compared with the one that the adapter was trained on.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from politune.errors import ModelError, safe
from politune.models.files import Header, read_header
from politune.models.seal import SEAL, flaw_of_adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1024
SPARE_NAMES = 1000
"""Names of modules in a list of the config beyond those that have weights: PEFT's time grows with the square of their number."""
TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.(?P<part>lora_A|lora_B)\.weight")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk that passed every check which needs no base model."""

    path: Path
    config: dict[str, Any]
    header: Header

    @property
    def metadata(self) -> dict[str, str]:
        """The disclosure in the header of the weights; empty for an adapter made elsewhere."""
        return {key: value for key, value in self.header.metadata.items() if key.startswith("politune.")}

    @property
    def base_name(self) -> str | None:
        """The base model by the adapter's own account: `demo`, a Hub id, `local:<name>`, or a path."""
        return self.metadata.get("politune.base") or self.config.get("base_model_name_or_path")

    @property
    def base_commit(self) -> str | None:
        return self.metadata.get("politune.base_commit") or self.config.get("revision")

    def modules(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """For each adapted module the shapes of its lora_A (rank, in) and lora_B (out, rank)."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.header.shapes().items():
            match = TENSOR.fullmatch(name)
            if match is None:
                raise self.refusal(f"holds {safe(name)}, which is no LoRA weight of a linear layer")
            found.setdefault(match["module"], {})[match["part"]] = shape
        return found

    def refusal(self, complaint: str, fix: str | None = None) -> ModelError:
        return ModelError(f"the adapter {safe(self.path)} {complaint}", fix=fix)


def read(path: Path) -> Adapter:
    """Reads and judges an adapter directory; neither torch nor PEFT is imported.

    Raises:
        ModelError: a file is missing, damaged or not the one that was exported, the adapter is no plain LoRA, or a setting
            is refused.
    """
    if not path.is_dir():
        raise ModelError(
            f"there is no adapter directory {safe(path)}", fix="give a directory with adapter_config.json in it"
        )
    config_path, weights_path = path / CONFIG, path / WEIGHTS
    if not config_path.is_file():
        raise ModelError(f"{safe(path)} is no adapter: it has no {CONFIG}")
    if not weights_path.is_file():
        why = f"{PICKLE} is a pickle, which can run code when it is read" if (path / PICKLE).exists() else None
        raise ModelError(f"{safe(path)} has no {WEIGHTS}", why=why, fix="save the adapter as safetensors")
    config = _read_config(config_path)
    _check_weights(weights_path)
    adapter = Adapter(path, config, read_header(weights_path))
    modules = adapter.modules()
    if not modules:
        raise adapter.refusal("holds no weights")
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        if len(adapter.config.get(key) or ()) > len(modules) + SPARE_NAMES:
            raise adapter.refusal(f"names far more modules in its {key} than it holds weights of")
    for module, shapes in modules.items():
        _check_rank(adapter, module, shapes)
    if flaw := flaw_of_adapter(path, (CONFIG, WEIGHTS)):
        again = "its run's command with --resume exports it again"
        again = again if (path.absolute().parent / "run.json").exists() else "fetch it again"
        fix = f"{again}; remove {SEAL} if it was changed on purpose"
        raise adapter.refusal(f"is not as it was exported: {flaw}", fix)
    return adapter


def check_fits(adapter: Adapter, model: Any) -> None:
    """Compares the shape of each adapter weight with the linear layer of `model` that it belongs to.

    Raises:
        ModelError: the adapter was made for a model of another shape.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "in_features")}
    if model.config.tie_word_embeddings and any(
        layers.get(name) is model.get_output_embeddings() for name in adapter.modules()
    ):
        raise adapter.refusal(
            "changes the output layer, which is the same matrix as the input embedding in this base model"
        )
    for module, shapes in adapter.modules().items():
        if module not in layers:
            raise adapter.refusal(
                f"does not fit: the base model has no linear layer {safe(module)}", "give its own base model"
            )
        layer = layers[module]
        adapted, base = (shapes["lora_B"][0], shapes["lora_A"][1]), (layer.out_features, layer.in_features)
        if adapted != base:
            raise adapter.refusal(
                f"does not fit: its {safe(module)} is {_by(adapted)}, the base model's is {_by(base)}",
                "give its own base model",
            )


def lora_settings(adapter: Adapter) -> dict[str, Any]:
    """The keyword arguments of PEFT's LoraConfig: only what the allow-list knows and what is not left empty."""
    return {
        key: value
        for key, value in adapter.config.items()
        if key in _ALLOWED and key != "peft_type" and value is not None
    }


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _check_rank(adapter: Adapter, module: str, shapes: dict[str, tuple[int, ...]]) -> None:
    if set(shapes) != {"lora_A", "lora_B"} or any(len(shape) != 2 for shape in shapes.values()):
        raise adapter.refusal(f"is incomplete: {safe(module)} needs a lora_A and a lora_B, each with two dimensions")
    ranks = {shapes["lora_A"][0], shapes["lora_B"][1]}
    pattern, parts = adapter.config.get("rank_pattern") or {}, module.split(".")
    ends = {".".join(parts[start:]) for start in range(len(parts))}
    expected = {pattern[end] for end in ends & set(pattern)} or {adapter.config["r"]}
    if len(ranks) != 1 or not ranks <= expected:
        raise adapter.refusal(
            f"contradicts itself: {safe(module)} has rank {sorted(ranks)}, its config says {sorted(expected)}"
        )


def _check_weights(path: Path) -> None:
    """Asks the library that will read the weights: no odd header gets past it to where its refusal would be a surprise."""
    from safetensors import SafetensorError, safe_open

    try:
        with suppress(OSError), safe_open(path, framework="numpy"):  # what cannot be read, read_header has words for
            pass
    except SafetensorError as error:
        raise ModelError(
            f"{safe(path)} is damaged or no safetensors file", why=safe(error), fix="fetch it again"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{safe(path)} is larger than 1 MiB, which no adapter config is")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {safe(path)}", why=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{safe(path)} is no JSON", why=safe(error)) from error
    if not isinstance(config, dict):
        raise ModelError(f"{safe(path)} is no JSON object")
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{safe(path)}: peft_type is {safe(config.get('peft_type'))}", fix="only LoRA adapters are supported"
        )
    for key, value in config.items():
        _check_setting(path, key, value)
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]:
        raise ModelError(f"{safe(path)} lacks {missing[0]}")
    return config


def _check_setting(path: Path, key: str, value: Any) -> None:
    """A setting is known and of its kind, or it is switched off: an unknown one that is on could change the weights."""
    allowed = _ALLOWED.get(key) or _IGNORED.get(key)
    inert = value is None or value is False or value == {} or value == []
    if not (inert or (allowed is not None and allowed(value))):
        raise ModelError(
            f"{safe(path)}: {safe(key)} = {safe(value, 80)} is refused", why="only plain LoRA settings are read"
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 65536


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and PLAIN_NAME.fullmatch(value) is not None


def _are_names(value: Any) -> bool:
    """A list of plain names; one string would be a pattern, and a pattern from a file can run for ever."""
    return isinstance(value, list) and all(_is_name(name) for name in value)


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and all(type(layer) is int and layer >= 0 for layer in value)


def _are_ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(name) and _is_count(rank) for name, rank in value.items())


def _are_scales(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(name) and _is_number(scale) for name, scale in value.items())


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is known or (isinstance(value, str) and value == known) for known in values)


_ALLOWED: dict[str, Callable[[Any], bool]] = {
    "peft_type": _one_of("LORA"),
    "task_type": _one_of("CAUSAL_LM"),
    "r": _is_count,
    "lora_alpha": _is_number,
    "target_modules": _are_names,
    "exclude_modules": _are_names,
    "layers_to_transform": _are_layers,
    "rank_pattern": _are_ranks,
    "alpha_pattern": _are_scales,
    "use_rslora": _is_flag,
    "bias": _one_of("none"),
    "lora_dropout": _is_number,
}
# Known to stand in PEFT's files, without a bearing on what a loaded adapter computes.
_IGNORED: dict[str, Callable[[Any], bool]] = {
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
    "peft_version": _is_text,
    "inference_mode": _is_flag,
    "init_lora_weights": _one_of(True, "gaussian"),
    "megatron_core": _is_text,
    "qalora_group_size": _is_count,
}
