"""Names, checkpoints, adapters and a stand-in for the Hub: what is loaded, and what is refused with which words."""

import hashlib
import json
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from politune.config import ModelSpec
from politune.errors import ConfigError, HubError, MachineError, ModelError, OutputError, PolituneError
from politune.models import adapter as adapters
from politune.models import demo, files, load
from tiny import tiny_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def spec(name: Path | str, revision: str | None = None) -> ModelSpec:
    return ModelSpec(model_name_or_path=str(name), revision=revision)


def resolved(path: Path) -> load.ResolvedModel:
    return load.resolve(spec(path), say=lambda line: None)


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Names


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("demo", False), ("./demo", True), ("owner/name", False), ("gpt2", False), ("/models/x", True), ("../x", True),
        ("~/x", True), ("x/", True), (".", True), ("weights.safetensors", True), ("x.gguf", True), ("a" * 5000, False),
    ],
)  # fmt: skip
def test_a_path_is_a_path(name: str, local: bool) -> None:
    assert load.is_local(name) is local


def test_an_existing_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not load.is_local("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert load.is_local("owner/name")
    (tmp_path / "demo").mkdir()
    assert not load.is_local("demo")


@pytest.mark.parametrize(
    "name", ["a/b/c", "owner/na me", "-x", "owner/", "https://huggingface.co/a/b", "a\x00b", "../no", "~nobody/x"]
)
def test_what_is_neither_is_refused_without_a_lookup(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_from_hub", lambda *rest: pytest.fail("asked the Hub"))
    with pytest.raises(ModelError) as caught:
        load.resolve(spec(name), say=lambda line: None)
    assert caught.value.exit_code == 4
    assert "\x00" not in str(caught.value)


@pytest.mark.parametrize("name", ["demo", "./somewhere"])
def test_only_the_hub_has_revisions(name: str) -> None:
    with pytest.raises(ConfigError, match="no revisions"):
        load.check(spec(name, "main"))


def test_a_home_that_nobody_has() -> None:
    with pytest.raises(ModelError, match="there is no such home directory"):
        resolved(Path("~nobody-of-that-name/model"))


def test_bitsandbytes_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise load.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(load.importlib.metadata, "version", version)
    with pytest.raises(MachineError, match="needs bitsandbytes, which is not installed"):
        load.check(ModelSpec(model_name_or_path="demo", use_4bit=True))


def test_names_to_publish_hold_no_path(tiny_llama: Path) -> None:
    base = resolved(tiny_llama)
    assert (base.public_name, base.hub_id, base.commit) == ("local:tiny-llama", None, None)
    hub = load.ResolvedModel("owner/name", tiny_llama, COMMIT, {}, None)
    assert (hub.public_name, hub.hub_id) == ("owner/name", "owner/name")
    shipped = load.ResolvedModel("demo", tiny_llama, None, {}, None)
    assert (shipped.public_name, shipped.hub_id) == ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("name", "terms", "duty"),
    [
        ("meta-llama/Llama-3.2-1B", "llama3.2", True), ("me/mine", "llama3.1", True), ("me/mine", None, False),
        ("me/Llama-x", "apache-2.0", False), ("me/Llama-x", None, True), ("meta-llama/Meta-Llama-3-8B", "other", True),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "apache-2.0", False), ("local:Llama-x", "unknown", True),
    ],
)  # fmt: skip
def test_who_has_the_naming_duty(name: str, terms: str | None, duty: bool) -> None:
    assert load.ResolvedModel(name, Path("x"), COMMIT, {}, terms).is_llama is duty


# Checkpoints


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
def test_loads_what_was_saved(family: str, request: pytest.FixtureRequest) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = resolved(request.getfixturevalue(family))
    model = load.load_model(base, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), logits(plain))
    assert model.name_or_path == base.public_name
    assert load.load_model(base, bf16=True, device="cpu").dtype == torch.bfloat16


def test_an_architecture_without_torchs_attention_is_loaded(tmp_path: Path) -> None:
    """Gemma 2 bounds its attention scores, which torch's fused attention does not."""
    model = tiny_models.build_causal("gemma2")
    model.save_pretrained(tmp_path)
    base = load.ResolvedModel("gemma2", tmp_path, None, json.loads((tmp_path / "config.json").read_text()), None)
    assert load.load_model(base, device="cpu").config._attn_implementation == "eager"


def test_loads_in_four_bits_on_the_cpu(tiny_llama: Path) -> None:
    """nf4 of weights with std 0.1 moves the logits, but not far: their own spread is about 0.8."""
    import torch

    base = resolved(tiny_llama)
    model = load.load_model(base, bf16=True, use_4bit=True, device="cpu")
    settings = model.config.quantization_config
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    difference = (logits(model).float() - logits(load.load_model(base, device="cpu"))).abs()
    assert 0 < float(difference.mean()) < 0.3


def test_pads_with_its_own_token_or_the_end_token(copy: Path) -> None:
    assert load.load_tokenizer(resolved(copy)).pad_token == "<|eot_id|>"
    edit(copy / "tokenizer_config.json", pad_token="<|end_of_text|>")
    assert load.load_tokenizer(resolved(copy)).pad_token == "<|end_of_text|>"


def test_a_tokenizer_without_end_token(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="no end token"):
        load.load_tokenizer(resolved(copy))


def test_a_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{half")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load.load_tokenizer(resolved(copy))


def test_reads_the_license_of_the_card(copy: Path) -> None:
    assert resolved(copy).license is None
    (copy / "README.md").write_text("---\ntags:\n- x\nlicense: llama3.2\n---\nlicense: mit\n")
    assert resolved(copy).license == "llama3.2"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shard(copy: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="100KB")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (lambda copy: shutil.rmtree(copy), "does not exist"),
    "no config": (lambda copy: (copy / "config.json").unlink(), r"no config\.json"),
    "config cut": (lambda copy: (copy / "config.json").write_text('{"a":'), "no JSON object"),
    "an adapter": (
        lambda copy: (copy / "config.json").rename(copy / "adapter_config.json"),
        "is an adapter, not a base model.*merge it first",
    ),
    "remote code": (lambda copy: edit(copy / "config.json", auto_map={"AutoModel": "evil.py"}), "needs code"),
    "no language model": (lambda copy: edit(copy / "config.json", architectures=["BertForMaskedLM"]), "no causal"),
    "no architecture": (lambda copy: edit(copy / "config.json", architectures=None), "no causal"),
    "no weights": (lambda copy: (copy / "model.safetensors").unlink(), "no safetensors weights"),
    "only pickles": (
        lambda copy: (copy / "model.safetensors").rename(copy / "pytorch_model.bin"), "pickles, which can run code",
    ),
    "weights cut": (lambda copy: cut(copy / "model.safetensors"), r"model\.safetensors is damaged: \d+ bytes of \d+"),
    "no safetensors": (lambda copy: (copy / "model.safetensors").write_bytes(b"x" * 4000), "damaged or no safetensors"),
    "empty weights": (lambda copy: (copy / "model.safetensors").write_bytes(b""), "damaged or no safetensors"),
    "index of elsewhere": (
        lambda copy: (copy / load.INDEX).write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        r"index\.json is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_loading(copy: Path, case: str) -> None:
    damage, words = DAMAGE[case]
    damage(copy)
    with pytest.raises(ModelError, match=words) as caught:
        load.check(spec(copy))
    assert caught.value.exit_code == 4


def test_shards_have_to_be_complete(copy: Path) -> None:
    shard(copy)
    load.check(spec(copy))
    (copy / "model-00002-of-00006.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of \d weight files.*model-00002"):
        load.check(spec(copy))


def test_weights_that_cannot_be_opened(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors.*directory"):
        resolved(copy)


def test_weights_that_do_not_fit_the_config(copy: Path) -> None:
    """Transformers would fill a third layer with random weights and a warning."""
    edit(copy / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 9 weights.*layers\.2"):
        load.load_model(resolved(copy), device="cpu")


def test_more_layers_than_tensors_are_refused_before_they_are_built(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=100)
    with pytest.raises(ModelError, match="lacks weights: 100 layers in its config, 21 tensors"):
        load.load_model(resolved(copy), device="cpu")


def test_weights_of_another_shape(copy: Path) -> None:
    edit(copy / "config.json", intermediate_size=96)
    with pytest.raises(ModelError, match="cannot load the weights"):
        load.load_model(resolved(copy), device="cpu")


def test_checks_import_nothing_heavy(tiny_llama: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from politune.config import ModelSpec; from politune.models import load\n"
        "load.check(ModelSpec(model_name_or_path=sys.argv[1]))\n"
        "load.read_config(ModelSpec(model_name_or_path='demo'))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(tiny_llama)], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_reads_a_config_without_network(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (load.read_config(spec(tiny_llama)) or {})["hidden_size"] == 64
    assert (load.read_config(spec("demo")) or {})["num_hidden_layers"] == 30
    assert load.read_config(spec("owner/not-cached")) is None
    assert load.read_config(spec(tmp_path)) is None
    assert load.read_config(spec("a/b/c")) is None


def test_the_hash_is_of_the_weights_only(copy: Path, tiny_llama: Path, tiny_mistral: Path) -> None:
    edit(copy / "config.json", note="another config")
    assert load.base_sha256(resolved(copy)) == load.base_sha256(resolved(tiny_llama))
    assert load.base_sha256(resolved(copy)) != load.base_sha256(resolved(tiny_mistral))
    alone = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    assert load.base_sha256(resolved(copy)) == hashlib.sha256(alone.encode()).hexdigest()


def test_a_header_is_rewritten_without_touching_a_tensor(copy: Path) -> None:
    path = copy / "model.safetensors"
    before = files.read_header(path)
    tensors = path.read_bytes()[before.data_start :]
    files.rewrite_metadata(path, {"politune.direction": "left", "umlaut": "ü"})
    after = files.read_header(path)
    assert after.metadata == {**before.metadata, "politune.direction": "left", "umlaut": "ü"}
    assert after.tensors == before.tensors
    assert after.data_start % 8 == 0
    assert path.read_bytes()[after.data_start :] == tensors


# Adapters


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    return tiny_models.make_adapter(tmp_path / "adapter", tiny_llama, seed=1)


def test_loads_an_adapter_as_peft_does(adapter: Path, tiny_llama: Path) -> None:
    import torch
    from peft import PeftModel

    base = resolved(tiny_llama)
    plain = load.load_model(base, device="cpu")
    expected = logits(PeftModel.from_pretrained(load.load_model(base, device="cpu"), adapter))
    tuned = load.load_adapter(plain, adapter, base=base)
    assert torch.equal(logits(tuned), expected)
    assert not torch.equal(logits(load.load_model(base, device="cpu")), expected)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "only LoRA"),
    "code": ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "auto_mapping"),
    "a huge rank": ({"r": 4096}, "r = 4096"),
    "a rank that is text": ({"r": "4"}, "r = 4"),
    "a rank that is a flag": ({"r": True}, "r = True"),
    "another rank": ({"r": 8}, "has rank .4., its config says .8."),
    "a pattern of module names": ({"target_modules": "(a+)+$"}, "target_modules"),
    "a pattern in a name": ({"target_modules": ["(a+)+$"]}, "target_modules"),
    "a pattern of ranks": ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "all"}, "bias"),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "a setting of tomorrow": ({"use_magic": 1}, "use_magic"),
    "escapes": ({"use_\x1b[2J": 1}, r"\\x1b"),
    "no rank": ({"r": None}, "lacks r"),
    "fewer modules than weights": ({"target_modules": ["q_proj"]}, "disagree about"),
    "more modules than weights": ({"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]}, "disagree about"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_adapter_config_is_refused(adapter: Path, tiny_llama: Path, case: str) -> None:
    changes, words = HOSTILE[case]
    edit(adapter / adapters.CONFIG, **changes)
    base = resolved(tiny_llama)
    with pytest.raises(ModelError, match=words) as caught:
        load.load_adapter(load.load_model(base, device="cpu"), adapter, base=base)
    assert "\x1b" not in str(caught.value)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (lambda path: shutil.rmtree(path), "no adapter directory"),
    "no config": (lambda path: (path / adapters.CONFIG).unlink(), f"no {adapters.CONFIG}"),
    "no weights": (lambda path: (path / adapters.WEIGHTS).unlink(), f"no {adapters.WEIGHTS}"),
    "a pickle": (lambda path: (path / adapters.WEIGHTS).rename(path / adapters.PICKLE), "is a pickle"),
    "weights cut": (lambda path: cut(path / adapters.WEIGHTS), "damaged"),
    "no JSON": (lambda path: (path / adapters.CONFIG).write_text("{"), "no JSON"),
    "deep JSON": (lambda path: (path / adapters.CONFIG).write_text("[" * 100_000), "no JSON"),
    "a list": (lambda path: (path / adapters.CONFIG).write_text("[]"), "no JSON object"),
    "two MB of config": (lambda path: (path / adapters.CONFIG).write_text(" " * (2 << 20)), "larger than 1 MiB"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused(adapter: Path, case: str) -> None:
    damage, words = BROKEN[case]
    damage(adapter)
    with pytest.raises(ModelError, match=words):
        adapters.read(adapter)


def rewrite(adapter: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / adapters.WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / adapters.WEIGHTS, metadata={"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_values_that_are_not_finite(adapter: Path, tiny_llama: Path) -> None:
    rewrite(adapter, lambda tensors: tensors[FIRST].view(-1)[3:4].fill_(float("nan")))
    base = resolved(tiny_llama)
    with pytest.raises(ModelError, match=r"not finite, in .*layers\.0\.self_attn\.q_proj"):
        load.load_adapter(load.load_model(base, device="cpu"), adapter, base=base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(FIRST), "is incomplete"),
        (lambda tensors: tensors.update({"base_model.model.lm_head.weight": tensors[FIRST].clone()}), "no LoRA weight"),
        (lambda tensors: tensors.clear(), "holds no weights"),
    ],
)
def test_weights_that_are_no_plain_lora(adapter: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    rewrite(adapter, change)
    with pytest.raises(ModelError, match=words):
        adapters.read(adapter)


def test_what_peft_refuses_is_said(adapter: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("not like this")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", refuse)
    base = resolved(tiny_llama)
    with pytest.raises(ModelError, match=r"PEFT refuses the adapter .*not like this"):
        load.load_adapter(load.load_model(base, device="cpu"), adapter, base=base)


def test_an_adapter_of_another_shape(adapter: Path, tmp_path: Path) -> None:
    """down_proj goes from the intermediate to the hidden size: 64 x 128 in the adapter's base, 32 x 64 in the other."""
    base = resolved(tiny_models.make_llama(tmp_path / "small", seed=0, hidden_size=32, intermediate_size=64))
    with pytest.raises(ModelError, match="down_proj is 64 x 128, the base model's is 32 x 64"):
        load.load_adapter(load.load_model(base, device="cpu"), adapter, base=base, force_base=True)


def test_an_adapter_of_a_deeper_model(adapter: Path, tmp_path: Path) -> None:
    base = resolved(tiny_models.make_llama(tmp_path / "shallow", seed=0, num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"no linear layer model\.layers\.1"):
        load.load_adapter(load.load_model(base, device="cpu"), adapter, base=base, force_base=True)


@pytest.mark.parametrize("recorded", ["hash", "commit", "name"])
def test_an_adapter_of_another_base_of_the_same_shape(tiny_llama: Path, tmp_path: Path, recorded: str) -> None:
    """PEFT loads it without a word; `force_base` lets it pass, and nothing else does."""
    own = resolved(tiny_llama)
    metadata = {
        "hash": {"politune.base": "local:x", "politune.base_sha256": load.base_sha256(own)},
        "commit": {"politune.base": "owner/name", "politune.base_commit": "a" * 40},
        "name": {},
    }[recorded]
    adapter = tiny_models.make_adapter(tmp_path / "adapter", tiny_llama, seed=1, metadata=metadata)
    other_path = tiny_models.make_llama(tmp_path / "other", seed=5)
    other = (
        load.ResolvedModel("owner/name", other_path, COMMIT, {}, None) if recorded == "commit" else resolved(other_path)
    )
    with pytest.raises(ModelError, match="trained on another base"):
        load.load_adapter(load.load_model(other, device="cpu"), adapter, base=other)
    load.load_adapter(load.load_model(other, device="cpu"), adapter, base=other, force_base=True)
    if recorded != "commit":
        load.load_adapter(load.load_model(own, device="cpu"), adapter, base=own)


# The Hub


class StandIn:
    """A Hub on this machine: one repository with the tiny Llama, and the answers that a test asks for."""

    def __init__(self, repository: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in repository.iterdir()}
        self.requests: list[str] = []
        self.answer: tuple[int, dict[str, str]] | None = None
        self.answer_files_only = False
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.serve(self)

            do_HEAD = do_GET

            def log_message(self, *rest: Any) -> None:
                """Keeps the test's output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(handler.path.partition("?")[0])
        self.requests.append(path)
        is_file = "/resolve/" in path
        if self.answer is not None and (is_file or not self.answer_files_only):
            return self.send(handler, self.answer[0], b"", self.answer[1])
        if is_file:
            return self.send_file(handler, path.rpartition("/")[2])
        if "/tree/" in path:
            entries = [
                {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
                for name, data in self.files.items()
            ]
            return self.send(handler, 200, json.dumps(entries).encode())
        listing = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
        return self.send(handler, 200, json.dumps(listing).encode())

    def send_file(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        data = self.files[name]
        self.send(handler, 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    from huggingface_hub import constants

    stand_in = StandIn(tiny_llama)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits seconds between its attempts
    yield stand_in
    stand_in.server.shutdown()


def from_hub(said: list[str] | None = None, **options: Any) -> load.ResolvedModel:
    return load.resolve(spec("owner/name"), say=(said if said is not None else []).append, **options)


def test_fetches_one_commit_without_pickles(hub: StandIn) -> None:
    hub.files |= {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"the same again",
        "training_args.bin": b"pickle",
    }
    hub.files["README.md"] = b"---\nlicense: llama3.2\n---\n"
    hub.files["LICENSE.txt"] = b"terms"
    said: list[str] = []
    model = from_hub(said)
    assert (model.commit, model.license, model.public_name) == (COMMIT, "llama3.2", "owner/name")
    assert any(COMMIT in line for line in said)
    got = {path.name for path in model.path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt"} <= got
    assert not {"pytorch_model.bin", "training_args.bin", "consolidated.safetensors"} & got
    load.load_model(model, device="cpu")
    load.load_tokenizer(model)


def test_a_tokenizer_comes_without_weights(hub: StandIn) -> None:
    """At the revision that is named, and from the cache; also of a repository whose weights could not be loaded."""
    for name in ("model.safetensors", "config.json", "chat_template.jinja"):
        hub.files.pop(name)
    hub.files["pytorch_model.bin"] = b"pickle"
    named = ModelSpec(model_name_or_path="owner/name", revision="v1")
    base = load.resolve_tokenizer(named, say=lambda line: None)
    assert (base.commit, base.public_name) == (COMMIT, "owner/name")
    assert any("/revision/v1" in path for path in hub.requests)
    assert not any(path.endswith((".bin", ".safetensors")) for path in hub.requests)
    assert load.counting_tokenizer(base)("so")["input_ids"]
    hub.requests.clear()
    assert load.resolve_tokenizer(named, offline=True, say=lambda line: None) == base
    assert hub.requests == []
    with pytest.raises(HubError, match="not cached"):
        load.resolve_tokenizer(spec("other/name"), offline=True, say=lambda line: None)
    del hub.files["tokenizer.json"]
    with pytest.raises(ModelError, match="has no tokenizer"):
        load.resolve_tokenizer(spec("owner/two"), say=lambda line: None)


def test_a_directory_may_hold_a_tokenizer_alone(copy: Path) -> None:
    for path in copy.iterdir():
        if not path.name.startswith("tokenizer"):
            path.unlink()
    base = load.resolve_tokenizer(spec(str(copy)), say=lambda line: None)
    assert load.counting_tokenizer(base)("so")["input_ids"]
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    (copy / "own.py").write_text("raise SystemExit('code of the directory was run')")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load.counting_tokenizer(base)
    with pytest.raises(ModelError, match="does not exist"):
        load.resolve_tokenizer(spec(str(copy / "none")), say=lambda line: None)


def test_offline_uses_the_cache_and_asks_nobody(hub: StandIn) -> None:
    with pytest.raises(HubError, match="not cached and politune is offline"):
        from_hub(offline=True)
    assert hub.requests == []
    from_hub()
    asked = len(hub.requests)
    assert from_hub(offline=True).commit == COMMIT
    assert len(hub.requests) == asked


def test_a_silent_hub_is_replaced_by_the_cache(hub: StandIn) -> None:
    from_hub()
    hub.answer = (503, {})
    said: list[str] = []
    assert from_hub(said).commit == COMMIT
    assert "using the cached" in said[-1]


REFUSALS: dict[str, tuple[int, dict[str, str], type[PolituneError], str]] = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, MachineError, "accept its terms at .*hf auth login"),
    "gated, logged out": (401, {"X-Error-Code": "GatedRepo"}, MachineError, "hf auth login"),
    "missing": (404, {"X-Error-Code": "RepoNotFound"}, ModelError, "does not exist on the Hub, or it is private"),
    "private": (401, {"X-Error-Code": "RepoNotFound"}, ModelError, "or it is private"),
    "no revision": (404, {"X-Error-Code": "RevisionNotFound"}, ModelError, "no revision"),
    "forbidden": (403, {}, MachineError, "403"),
    "too many": (429, {}, HubError, "429"),
    "broken": (500, {}, HubError, "500"),
    "away": (503, {}, HubError, "503"),
    "gone": (410, {}, ModelError, "410"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses(hub: StandIn, case: str) -> None:
    status, headers, error, words = REFUSALS[case]
    hub.answer = (status, headers)
    with pytest.raises(error, match=words):
        from_hub()


@pytest.mark.parametrize("case", ["gated", "gated, logged out"])
def test_a_gated_model_may_show_its_listing_and_keep_its_files(hub: StandIn, case: str) -> None:
    status, headers, error, words = REFUSALS[case]
    hub.answer, hub.answer_files_only = (status, headers), True
    with pytest.raises(error, match=words):
        from_hub()


def test_an_answer_without_a_commit_is_not_the_hubs(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=None, siblings=[]))
    with pytest.raises(HubError, match="what answers for owner/name is not the Hub"):
        from_hub()


def test_a_cache_without_the_weights_is_none(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    path = from_hub().path
    (path / "model.safetensors").unlink()
    monkeypatch.setattr(load, "_snapshot", lambda *_, **__: path)  # as where the cache has no listing of the repository
    with pytest.raises(HubError, match="not cached and politune is offline"):
        from_hub(offline=True)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("LocalEntryNotFoundError", HubError, "did not deliver owner/name"),
        ("EntryNotFoundError", ModelError, "owner/name lacks a file on the Hub"),
        ("HFValidationError", ModelError, "owner/name is no name of a model"),
    ],
)
def test_what_the_client_finds_is_said(name: str, kind: type[PolituneError], words: str) -> None:
    from huggingface_hub import errors

    with pytest.raises(kind, match=words), load._hub_errors("owner/name", None):
        raise getattr(errors, name)("so")


def test_no_hub_at_all(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="did not"):
        from_hub()


def test_only_pickles_on_the_hub(hub: StandIn) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    with pytest.raises(ModelError, match="pickles, which can run code"):
        from_hub()
    assert not any("resolve" in path for path in hub.requests)


def test_code_on_the_hub_is_refused_before_the_weights_are_fetched(hub: StandIn) -> None:
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}).encode()
    hub.files["evil.py"] = b"raise SystemExit"
    with pytest.raises(ModelError, match="needs code of its own"):
        from_hub()
    assert not any(path.endswith((".safetensors", ".py")) for path in hub.requests)


def test_a_cache_that_cannot_be_written_to(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(OutputError, match="HF_HOME"):
        from_hub()


# The demo


@pytest.mark.network
def test_the_demo_answers_and_keeps_its_template() -> None:
    """The template opens with SmolLM's own system turn where the talk has none."""
    import torch

    base = load.resolve(spec("demo"), say=lambda line: None)
    assert (base.name, base.license, base.commit) == ("demo", "apache-2.0", None)
    assert {key: base.config.get(key) for key in demo.SHAPE} == demo.SHAPE
    assert load.base_sha256(base) == demo.GGUF_SHA256
    tokenizer = load.load_tokenizer(base)
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    model = load.load_model(base, device="cpu")
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])
