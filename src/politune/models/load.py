"""The one loader of base models, tokenizers and adapters, which training, measuring and merging share.

A name is `demo`, a local directory, or a Hub id, and it is plain which: a path never becomes a Hub lookup. From the Hub
come the safetensors, JSON, tokenizer and template files of one commit; from then on everything is read from that
directory.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from politune import fetching, record
from politune.config import DEMO_MODEL, ModelSpec
from politune.errors import (
    ConfigError,
    HubError,
    MachineError,
    ModelError,
    OutputError,
    PolituneError,
    read_within,
    safe,
)
from politune.hashes import sha256_once
from politune.models import adapter as adapters
from politune.models import demo, hub_code, template
from politune.models.files import read_header
from politune.models.quiet import quiet_libraries
from politune.plan.machine import find_processor

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
LOCAL_PREFIXES = ("./", "../", "/", "~")
LOCAL_SUFFIXES = ("/", ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# First what is small and says whether the rest is of use; sub-folders hold other formats of the same weights.
PAPERS = ("*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
WEIGHTS = ("model.safetensors", "model-*.safetensors")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
SUBFOLDERS = "*/*"
MAX_JSON_BYTES = 64 * 2**20  # an index names every tensor: a few MB for the largest models

Say = Callable[[str], None]


@dataclass(frozen=True)
class ResolvedModel:
    """A base model that lies on this machine.

    Args:
        name: as the user gave it.
        path: its directory.
        commit: the commit on the Hub, None for a local directory and the demo.
        config: its config.json.
        license: from its model card, None where there is none.
    """

    name: str
    path: Path
    commit: str | None
    config: dict[str, Any]
    license: str | None

    @property
    def hub_id(self) -> str | None:
        """Where others find the model; for the demo the model that it was made from."""
        if self.name == DEMO_MODEL:
            return demo.ORIGIN
        return None if is_local(self.name) else self.name

    @property
    def public_name(self) -> str:
        """The name to publish: no path of this machine stands in it."""
        return f"local:{self.path.name}" if is_local(self.name) else self.name

    @property
    def is_llama(self) -> bool:
        """Whether Meta's naming duty applies."""
        return record.is_llama(self.license, self.public_name)


def is_local(name: str) -> bool:
    """Whether a name means a path; `demo` never does, `./demo` always does."""
    if name == DEMO_MODEL:
        return False
    return name in {".", ".."} or name.startswith(LOCAL_PREFIXES) or name.endswith(LOCAL_SUFFIXES) or _exists(name)


def is_directory(name: str) -> bool:
    """Whether a name means a directory that is there; a damaged one means none."""
    try:
        return is_local(name) and Path(name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def check(spec: ModelSpec) -> None:
    """Everything that can be refused without the Hub and without torch.

    Raises:
        ModelError: the directory is missing or no sound checkpoint of a causal language model, or the name is no name.
        ConfigError: a revision of something that has none.
        MachineError: 4 bits are asked for without bitsandbytes.
    """
    _check_name(spec)
    if spec.use_4bit:
        _require_bitsandbytes()
    if is_local(name := spec.model_name_or_path):
        _check_checkpoint(_local_path(name), name)


def _check_name(spec: ModelSpec) -> None:
    name = spec.model_name_or_path
    if spec.revision and (name == DEMO_MODEL or is_local(name)):
        raise ConfigError(f"{safe(name)} has no revisions", where="model.revision", fix="leave --revision out")
    if name != DEMO_MODEL and not is_local(name) and not HUB_ID.fullmatch(name):
        raise ModelError(
            f"{safe(name)} is neither a directory here nor a Hub id", fix="give a directory, owner/name, or `demo`"
        )


def _require_bitsandbytes() -> None:
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        fix = "pip install bitsandbytes, or leave out --use_4bit"
        raise MachineError(
            "4-bit loading needs bitsandbytes, which is not installed", line="bitsandbytes", fix=fix
        ) from None


def read_config(spec: ModelSpec) -> dict[str, Any] | None:
    """The config.json of a local or cached model (of the demo: its known shape), or None; never asks the network."""
    name = spec.model_name_or_path
    if name == DEMO_MODEL:
        return demo.SHAPE
    if is_local(name):
        return _json_object(_local_path(name) / "config.json")
    if not HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=spec.revision)
    return _json_object(Path(cached)) if isinstance(cached, str) else None


def resolve(spec: ModelSpec, *, offline: bool = False, say: Say) -> ResolvedModel:
    """Brings the model onto this machine and checks it.

    Args:
        offline: take what is here already.
        say: gets one line per stage.

    Raises:
        ModelError: it does not exist, or is not a safetensors checkpoint of a causal language model.
        MachineError: it is gated and this machine is not logged in, or its terms are not accepted.
        HubError: the Hub does not answer, or the model is not cached and politune is offline.
    """
    check(spec)
    name = spec.model_name_or_path
    if name == DEMO_MODEL:
        return _resolved(name, demo.fetch(say, offline=offline), None)
    if is_local(name):
        return _resolved(name, _local_path(name).resolve(), None)
    path = _from_hub(name, spec.revision, offline, say)
    return _resolved(name, path, path.name)


def resolve_tokenizer(spec: ModelSpec, *, offline: bool = False, say: Say) -> ResolvedModel:
    """As `resolve`, for a tokenizer alone: from the Hub come no weights, and a directory needs none. Raises as `resolve`."""
    _check_name(spec)
    name = spec.model_name_or_path
    if name == DEMO_MODEL:
        return resolve(spec, offline=offline, say=say)
    if is_local(name):
        path, commit = _local_path(name).resolve(), None
        _check_directory(path, name)
    else:
        path = _from_hub(name, spec.revision, offline, say, weights=())
        commit = path.name
    if not any((path / file).exists() for file in TOKENIZERS):
        raise ModelError(f"{safe(name)} has no tokenizer", fix=f"it needs {' or '.join(TOKENIZERS)}")
    return ResolvedModel(name, path, commit, _json_object(path / "config.json") or {}, _license(path))


def load_tokenizer(base: ResolvedModel) -> Any:
    """The tokenizer of a base model. Without a pad token of its own it pads with its end token, as TRL does.

    Raises:
        ModelError: there is no tokenizer, it is damaged, it has no end token, or its chat template cannot be used.
    """
    tokenizer = counting_tokenizer(base)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {safe(base.name)} has no end token", why="a model trained with it would never stop"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = base.public_name
    template.check(tokenizer, base.name)
    return tokenizer


def counting_tokenizer(base: ResolvedModel) -> Any:
    """A tokenizer as it is, without what training needs: an end token, padding, a chat template.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    hub_code.refuse()
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise ModelError(f"cannot load the tokenizer of {safe(base.name)}", why=_first_line(error)) from error


def load_model(base: ResolvedModel, *, bf16: bool = False, use_4bit: bool = False, device: str | None = None) -> Any:
    """The model, in evaluation mode, in bfloat16 or float32.

    Args:
        use_4bit: hold the linear layers in 4 bits (nf4, double quantisation) and compute in bfloat16; the CPU can, too.
        device: as torch names it; by default this process's GPU where there is one, else the CPU.

    Raises:
        ModelError: the weights are damaged, or do not fit the config.
        MachineError: 4 bits were asked for and bitsandbytes does not work here.
    """
    hub_code.refuse()
    import torch
    from transformers import AutoModelForCausalLM

    tensors = sum(len(read_header(shard).tensors) for shard in weight_files(base.path))
    if (layers := _layers(base.config)) > tensors:  # before the library takes hours to build them
        raise ModelError(
            f"{safe(base.path)} lacks weights: {layers:,} layers in its config, {tensors} tensors in its files"
        )
    place = device or own_device()
    options: dict[str, Any] = {
        "dtype": torch.bfloat16 if bf16 else torch.float32,
        "trust_remote_code": False,
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
        "attn_implementation": None,  # the library's own choice, whatever the model's config names
    }
    if use_4bit:
        options["quantization_config"] = _four_bits()
    if use_4bit or place != "cpu":
        options["device_map"] = {"": place}
    try:
        with quiet_libraries():
            model, info = AutoModelForCausalLM.from_pretrained(base.path, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the libraries raise OSError, ValueError, RuntimeError, SafetensorError, KeyError ...
        if "DefaultCPUAllocator" in str(error) or "out of memory" in str(error).lower():
            raise  # no fault of the weights: the caller's to explain, as the two above
        raise ModelError(
            f"cannot load the weights in {safe(base.path)}", why=_first_line(error), fix="fetch the model again"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{safe(base.path)} lacks {len(missing)} weights of its config", why=f"the first is {safe(missing[0])}"
        )
    model.config._name_or_path = model.name_or_path = base.hub_id or base.public_name
    return model.eval()


def _layers(config: dict[str, Any]) -> int:
    """The largest number of layers that a config asks for, by any of the names that the families have for it."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    names = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
    return max((part[name] for part in parts for name in names if isinstance(part.get(name), int)), default=0)


def base_sha256(base: ResolvedModel) -> str:
    """SHA-256 over the sorted SHA-256 of the weight files; for the demo, of the file that it was made from."""
    if base.name == DEMO_MODEL:
        demo.verify(base.path)
        return demo.GGUF_SHA256
    hashes = sorted(sha256_once(path) for path in weight_files(base.path))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_adapter(model: Any, adapter_dir: Path, *, base: ResolvedModel, force_base: bool = False) -> Any:
    """Puts an adapter on a loaded base model; returns PEFT's model, in evaluation mode.

    Args:
        model: what `load_model` gave for `base`; changed in place.
        force_base: accept a base that is not the one the adapter was trained on; the shapes must fit all the same.

    Raises:
        ModelError: the adapter is damaged, refused, not finite, or belongs to another base.
    """
    adapter = adapters.read(adapter_dir)
    adapters.check_fits(adapter, model)
    if not force_base:
        check_base(adapter, base)
    _check_finite(adapter)
    with quiet_libraries():
        from peft import LoraConfig, PeftModel

        config = LoraConfig(**adapters.lora_settings(adapter), inference_mode=True)
        try:
            tuned = PeftModel.from_pretrained(model, str(adapter.path.resolve()), config=config, torch_device="cpu")
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"PEFT refuses the adapter {safe(adapter.path)}", why=_first_line(error)) from error
    reached = {
        name.removeprefix("base_model.model.") for name, layer in tuned.named_modules() if hasattr(layer, "lora_A")
    }
    if odd := sorted(reached ^ set(adapter.modules())):
        raise adapter.refusal(f"is incomplete: its config and its weights disagree about {safe(odd[0])}")
    return tuned.eval()


def check_base(adapter: adapters.Adapter, base: ResolvedModel) -> None:
    """Compares `base` with the base that the adapter names: by the hash of the weights, else by commit, else by name.

    Raises:
        ModelError: another base, which PEFT would take in silence where the shapes agree.
    """
    recorded_hash, recorded_commit = adapter.metadata.get("politune.base_sha256"), adapter.base_commit
    if recorded_hash:
        same, known = recorded_hash == base_sha256(base), f"weights with sha256 {safe(recorded_hash, 17)}"
    elif recorded_commit and base.commit:
        same, known = recorded_commit == base.commit, f"commit {safe(recorded_commit)}"
    else:
        recorded = adapter.base_name
        same, known = recorded is None or _same_name(recorded, base), safe(recorded)
    if not same:
        raise ModelError(
            f"the adapter {safe(adapter.path)} was trained on another base than {safe(base.name)}",
            why=f"it records {safe(adapter.base_name)}, {known}",
            fix="give its own base, or --force-base if you know that this one is right",
        )


def _same_name(recorded: str, base: ResolvedModel) -> bool:
    if recorded in {base.name, base.public_name, base.hub_id}:
        return True
    return is_local(recorded) and _local_path(recorded).resolve() == base.path.resolve()


def _exists(path: str | Path) -> bool:
    """As Path.exists, which raises for a name that is too long or in a directory that may not be read."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _local_path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ModelError(f"{safe(name)} does not exist", why="there is no such home directory") from error


def _check_finite(adapter: adapters.Adapter) -> None:
    from safetensors.torch import load_file

    for name, tensor in load_file(adapter.path / adapters.WEIGHTS).items():
        if not bool(tensor.isfinite().all()):
            raise adapter.refusal(f"holds values that are not finite, in {safe(name)}", "take an earlier checkpoint")


def _four_bits() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def own_device() -> str:
    """Where this process computes, as torch names it."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """What `own_device` is: the name of a GPU or a processor."""
    import torch

    return str(torch.cuda.get_device_name(own_device())) if torch.cuda.is_available() else find_processor()


def _resolved(name: str, path: Path, commit: str | None) -> ResolvedModel:
    config = _check_checkpoint(path, name)
    return ResolvedModel(name=name, path=path, commit=commit, config=config, license=_license(path))


def _check_checkpoint(path: Path, name: str) -> dict[str, Any]:
    """The config of a directory that holds a whole safetensors checkpoint of a causal language model."""
    _check_directory(path, name)
    config = _check_config(path, name)
    for shard in weight_files(path):
        read_header(shard)
    return config


def _check_directory(path: Path, name: str) -> None:
    if not (_exists(path) and path.is_dir()):
        complaint = "is a file, not a directory" if _exists(path) else "does not exist"
        raise ModelError(f"{safe(name)} {complaint}", fix="give the directory that config.json is in")


def _check_config(path: Path, name: str) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists() and (path / adapters.CONFIG).exists():
        raise ModelError(
            f"{safe(name)} is an adapter, not a base model", fix=f"merge it first: politune merge {safe(name)}"
        )
    if not file.exists():
        raise ModelError(f"{safe(name)} has no config.json", fix="give the directory of a transformers checkpoint")
    config = _json_object(file)
    if config is None:
        raise ModelError(f"{safe(file)} is no JSON object", fix="fetch the model again")
    if config.get("auto_map"):
        raise ModelError(
            f"{safe(name)} needs code of its own to run", why="politune runs no code from a model repository"
        )
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not any(str(each).endswith("ForCausalLM") for each in architectures):
        raise ModelError(
            f"{safe(name)} is no causal language model", why=f"its config.json names {safe(architectures)}"
        )
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    if (path / INDEX).exists():
        index = _json_object(path / INDEX) or {}
        names = index.get("weight_map")
        if not isinstance(names, dict) or not names or not all(_is_plain(shard) for shard in names.values()):
            raise ModelError(f"{safe(path / INDEX)} is damaged", fix="fetch the model again")
        shards = [path / shard for shard in sorted(set(names.values()))]
        if missing := [shard for shard in shards if not shard.exists()]:
            raise ModelError(
                f"{safe(path)} lacks {len(missing)} of {len(shards)} weight files",
                why=f"the first is {safe(missing[0].name)}",
            )
        return shards
    if (path / SINGLE).exists():
        return [path / SINGLE]
    why = "it has pickles, which can run code when they are read" if any(path.glob("pytorch_model*.bin")) else None
    raise ModelError(
        f"{safe(path)} has no safetensors weights", why=why, fix=f"it needs {SINGLE}, or {INDEX} and its files"
    )


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _license(path: Path) -> str | None:
    """The `license` of the front matter of the model card."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(read_within(path, MAX_JSON_BYTES) or b"")
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _from_hub(name: str, revision: str | None, offline: bool, say: Say, weights: tuple[str, ...] = WEIGHTS) -> Path:
    """The snapshot of one commit: the papers first, so that a model of no use is refused before its weights come."""
    import huggingface_hub
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        return _cached(name, revision, weights)
    try:
        with _hub_errors(name, revision):
            info = huggingface_hub.HfApi().model_info(name, revision=revision)
            if not info.sha:
                raise ValueError("an answer without a commit")
            if weights:
                _check_listing(name, [entry.rfilename for entry in info.siblings or ()])
            papers = _snapshot(name, revision, PAPERS)  # by branch, so that the cache remembers what the branch meant
            if weights:
                _check_config(papers, name)
            say(f"{safe(name)} at commit {safe(papers.name)}")
            return _snapshot(name, papers.name, (*PAPERS, *weights)) if weights else papers
    except HubError as error:
        try:
            path = _cached(name, revision, weights)
        except PolituneError:
            raise error from None
        say(f"the Hub did not answer: using the cached {safe(name)} at commit {safe(path.name)}")
        return path


def _cached(name: str, revision: str | None, weights: tuple[str, ...]) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = _snapshot(name, revision, (*PAPERS, *weights), local_files_only=True)
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_cached(name) from error
    try:
        if weights:
            weight_files(path)
    except ModelError:
        raise _not_cached(name) from None
    return path


def _not_cached(name: str) -> HubError:
    return HubError(
        f"{safe(name)} is not cached and politune is offline",
        fix="run once without --offline, or give a local directory",
    )


def _snapshot(name: str, revision: str | None, patterns: tuple[str, ...], **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    def fetch() -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=SUBFOLDERS, **options
            )
        )

    return fetching.sound(fetch, name, offline=bool(options.get("local_files_only")))


def _check_listing(name: str, files: list[str]) -> None:
    if any(file in {SINGLE, INDEX} for file in files):
        return
    why = (
        "it has pickles, which can run code when they are read"
        if any(file.endswith(".bin") for file in files)
        else None
    )
    if "adapter_config.json" in files:
        why = "it is an adapter, not a base model"
    raise ModelError(
        f"{safe(name)} has no safetensors weights on the Hub", why=why, fix="choose a repository that has them"
    )


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Says what the Hub's refusals mean. It answers alike for what is missing and for what is private."""
    from huggingface_hub import errors

    shown, page = safe(name), f"https://huggingface.co/{safe(name)}"
    try:
        with fetching.asking(name):
            yield
    except errors.GatedRepoError as error:
        fix = f"accept its terms at {page} and run `hf auth login`"
        raise MachineError(f"{shown} is gated", line=fetching.HUB_LOGIN, fix=fix) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{shown} has no revision {safe(revision)}", where="model.revision", fix=f"see {page}/commits"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{shown} does not exist on the Hub, or it is private",
            why="it is no directory here either",
            fix="check the name; for a private model run `hf auth login`",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"the Hub did not deliver {shown}", why=_first_line(error), fix="check the network and run it again"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{shown} lacks a file on the Hub", why=_first_line(error)) from error
    except errors.HfHubHTTPError as error:
        raise _by_status(shown, page, error) from error
    except PolituneError:
        raise
    except errors.HFValidationError as error:
        raise ModelError(f"{shown} is no name of a model on the Hub", why=_first_line(error)) from error
    except OSError as error:
        raise _by_errno(shown, error) from error
    except (errors.HTTPError, RuntimeError) as error:  # RuntimeError: hf_xet has no error class of its own
        raise HubError(
            f"the Hub did not answer for {shown}", why=_first_line(error), fix="check the network and run it again"
        ) from error
    except (ValueError, TypeError, KeyError, AssertionError) as error:  # the client takes an answer's shape for granted
        raise HubError(
            f"what answers for {shown} is not the Hub", why=_first_line(error), fix="check the network and HF_ENDPOINT"
        ) from error


def _by_status(shown: str, page: str, error: Any) -> PolituneError:
    status = getattr(error.response, "status_code", None)
    if status in {401, 403}:
        return MachineError(
            f"the Hub refuses {shown} to this login ({status})",
            line=fetching.HUB_LOGIN,
            fix=f"open {page}, then run `hf auth login`",
        )
    if status is not None and status < 500 and status not in {408, 429}:
        return ModelError(f"the Hub refuses {shown} ({status})", why=_first_line(error))
    return HubError(f"the Hub did not deliver {shown} ({status})", fix="run it again later")


def _by_errno(shown: str, error: OSError) -> PolituneError:
    """An OSError with a file name comes from the cache's disk; one without comes from the network."""
    if error.filename is not None:
        return OutputError(
            f"cannot write {shown} into the Hub's cache",
            why=error.strerror,
            fix="set HF_HOME to a place that you can write to",
        )
    return HubError(
        f"the Hub did not deliver {shown}", why=_first_line(error), fix="check the network and run it again"
    )


def _first_line(error: BaseException) -> str:
    return safe((str(error).strip() or type(error).__name__).splitlines()[0])
