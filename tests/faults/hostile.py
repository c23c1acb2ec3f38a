"""What somebody might hand over: models, adapters, checkpoints, data and names that are after more than their place.

What would run code makes the file that is named `canary` in the arguments; that it is not there afterwards is the proof.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

TEXT = (
    "\x1b[31mred\x1b]0;title\x07\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\\x9b2J\x08\x7f \u202egpj.exe\u202c\u2066\u200b"
    ' [bold]b[/bold] [/x] [link=http://evil.example]l[/link] :smile: <script>alert(1)</script> " onmouseover="alert(1)" </style>'
    " </pre></td> ](javascript:alert(1)) ` ``` | = + - @ &lt;b&gt; {{ 7 * 7 }} %s {0}"
)
LINES = f"{TEXT}\n---\nlicense: mit\n---\n# heading\r\n```\n=HYPERLINK(1)\n@SUM(1)\t"
ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
TEMPLATES = {
    "loops": ENDLESS,
    "a loop in Jinja's C parts": "{% set n = namespace(t=[1]) %}{% for i in range(99999) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "a range beyond the sandbox": "{% for i in range(10**9) %}x{% endfor %}",
    "a power": "{{ 10 ** (messages|length * 10 ** 9) }}",
    "a constant power": "{{ 10 ** (10 ** 9) }}",
    "a long text": "{{ 'x' * 10 ** 10 }}",
    "a text of 100 MB": "{{ 'x' * 10 ** 8 }}",
    "a padded number": "{{ '%1000000000d' % 1 }}",
    "text of loops": ENDLESS.replace("%}{% endfor", "%}x{% endfor", 1),
    "wrapped words": "{{ ('a ' * 10 ** 7)|wordwrap(1) }}",
    "deep brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "half a template": "{% if %}",
}
WEIGHTS = "adapter_model.safetensors"


class Pickled:
    """Makes a directory when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def edit(path: Path, **changes: Any) -> None:
    """Changes the keys of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_code(model: Path, canary: Path) -> None:
    """Code of the model's own, wherever transformers would look for it."""
    code = f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\nclass Evil: pass\n"
    for name in ("evil.py", "setup.py", "custom_generate/generate.py", "__init__.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)


def write_pickles(directory: Path, canary: Path, names: tuple[str, ...]) -> None:
    """The same pickle under each name: every other one as torch's archive, the others bare."""
    import torch

    bare = b"cposix\nmkdir\n(V" + str(canary).encode() + b"\ntR."
    for number, name in enumerate(names):
        if number % 2:
            (directory / name).write_bytes(bare)
        else:
            torch.save({"weights": Pickled(canary)}, directory / name)


def write_marker(checkpoint: Path) -> None:
    """The marker that politune would have written for the checkpoint's files as they are now."""
    from politune.models import seal
    from politune.training import checkpoints

    said = seal.read(checkpoint) or {}
    seal.seal(checkpoint, {name: said[name] for name in ("step", "identity")})
    assert checkpoints._flaw(checkpoint) is None, "politune would not take this for a checkpoint of its own"


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any], *, raw: bytes | None = None) -> None:
    """Changes the header of a safetensors file, or puts other bytes in its place; the tensors stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda adapter: edit(adapter / "adapter_config.json", **changes)


def _text(text: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / "adapter_config.json").write_text(text) and None


def _header(
    change: Callable[[dict[str, Any]], Any] = lambda header: None, raw: bytes | None = None
) -> Callable[[Path], None]:
    return lambda adapter: rewrite_header(adapter / WEIGHTS, change, raw=raw)


def _without_account(adapter: Path, **changes: Any) -> None:
    """As an adapter from elsewhere: nothing but its config says which base it belongs to."""
    rewrite_header(adapter / WEIGHTS, lambda header: header.pop("__metadata__"))
    edit(adapter / "adapter_config.json", **changes)


def adapters() -> dict[str, Callable[[Path], None]]:
    """What is done to a sound adapter; each is to be refused with its base at hand."""
    redos = "(a+)+$"
    many = {f"m{number}": 4 for number in range(60_000)}
    return {
        "code in auto_mapping": _config(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}),
        "auto_map": _config(auto_map={"AutoModel": "evil.Evil"}),
        "another base on the Hub": lambda path: _without_account(path, base_model_name_or_path="attacker/model"),
        "another base by a path": lambda path: _without_account(path, base_model_name_or_path="../../../etc"),
        "a base that is a number": lambda path: _without_account(path, base_model_name_or_path=7),
        "a rank of 10**9": _config(r=10**9),
        "a rank below zero": _config(r=-4),
        "a rank of 4.0": _config(r=4.0),
        "an alpha of infinity": _text(
            '{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999, "target_modules": ["q_proj"]}'
        ),
        "an alpha of thousands of digits": _text('{"peft_type": "LORA", "r": 4, "lora_alpha": 1' + "0" * 9000 + "}"),
        "a slow pattern for modules": _config(target_modules=redos),
        "a slow pattern in a list": _config(target_modules=[redos]),
        "a slow pattern for what to leave out": _config(exclude_modules=redos),
        "a slow pattern of layers": _config(layers_pattern=redos, layers_to_transform=[0]),
        "slow patterns of ranks": _config(rank_pattern={redos: 4}),
        "slow patterns of alphas": _config(alpha_pattern={redos: 4}),
        "60,000 patterns of ranks": _config(rank_pattern=many),
        "60,000 patterns of alphas": _config(alpha_pattern=many),
        "60,000 modules": _config(target_modules=["q_proj", *many]),
        "another method": _config(peft_type="PROMPT_TUNING", num_virtual_tokens=10**9),
        "a method that is a list": _config(peft_type=["LORA"]),
        "another task": _config(task_type="SEQ_CLS"),
        "repeated layers": _config(layer_replication=[[0, 10**9]]),
        "Megatron": _config(megatron_config={"x": 1}, megatron_core="evil.core"),
        "pissa": _config(init_lora_weights="pissa"),
        "eva": _config(init_lora_weights="eva", eva_config={"rho": 1}),
        "a start from a path": _config(init_lora_weights="/etc/passwd"),
        "whole modules": _config(modules_to_save=["lm_head", "embed_tokens"]),
        "tokens": _config(trainable_token_indices=[1, 2]),
        "parameters": _config(target_parameters=["weight"]),
        "a run-time": _config(runtime_config={"ephemeral_gpu_offload": True}),
        "LoftQ": _config(loftq_config={"loftq_bits": 4}),
        "corda": _config(corda_config={"cache_file": "/etc/passwd"}),
        "biases": _config(bias="all"),
        "DoRA": _config(use_dora=True),
        "a setting of tomorrow": _config(**{f"use_{TEXT}": True}),
        "escapes in a value": _config(peft_type=TEXT),
        "deep JSON": _text('{"r":' * 100_000),
        "2 MiB": _text("{" + " " * (2 << 20) + "}"),
        "a list": _text("[]"),
        "not a number": _config(lora_dropout=float("nan")),
        "a deep header": _header(raw=b"[" * 200_000),
        "a header of texts": _header(lambda header: next(iter(header.values())).update(data_offsets=["a", "b"])),
        "a header beyond the file": _header(lambda header: list(header.values())[-1].update(data_offsets=[0, 2**70])),
        "a header with a negative shape": _header(lambda header: list(header.values())[-1].update(shape=[-4, -64])),
        "a header of 10**12 weights": _header(lambda header: list(header.values())[-1].update(shape=[4, 10**12])),
        "a header of tensors that are not there": _header(
            lambda header: header.update(
                {f"evil.{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(9)}
            )
        ),
    }


def write_rows(path: Path) -> Path:
    """Preference pairs whose texts and columns are hostile, for a run and for a look at the data."""
    rows = [
        {"prompt": f"{LINES} {n}", "chosen": f"yes {TEXT} {n}", "rejected": f"no {LINES} {n}", f"extra {TEXT}": TEXT}
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_instrument(path: Path, text: str = "") -> Path:
    """A small instrument, each of whose texts ends with `text`."""
    axes = {"economic": ["left", "right"]}
    about = {"license": f"MIT {text}", "attribution": f"a test {text}", "description": f"A test. {text}"}
    lines: list[dict[str, Any]] = [{"name": "small", "version": "1", "language": "en", **about, "axes": axes}]
    for n in range(4):
        item = {"id": f"p-{n}", "topic": f"rule {n} {text}", "axis": "economic"}
        sides = {"left": f"Yes, rule {n} helps. {text}", "right": f"No, rule {n} costs. {text}"}
        lines.append({"kind": "texts", **item, "prompts": [f"Rule {n}? {text}"], **sides})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def bombs(place: Path, base: Path) -> dict[str, tuple[Callable[[], object], list[object], int]]:
    """Files that are small, or look it, and unpack to much: what writes each, the command that meets it, and its exit code."""

    def data(name: str, content: bytes) -> tuple[Callable[[], object], list[object], int]:
        return partial((place / name).write_bytes, content), ["inspect-data", place / name, "--direction", "left"], 3

    def sparse(name: str, start: bytes = b"") -> None:
        (place / name).write_bytes(start)
        os.truncate(place / name, 50 * 10**9)

    def model() -> None:
        copied(base, place / "config")
        sparse("config/config.json", b"{")

    packed = ("pairs.jsonl.gz", "pairs.zip", "pairs.tar", "pairs.xz")
    return {
        "text.parquet": (partial(_write_gigabyte, place / "text.parquet"), ["inspect-data", place / "text.parquet"], 3),
        "deep.json": data("deep.json", b"[" * 10**6),
        "a preset": (partial(sparse, "x.toml"), ["presets", "show", place / "x.toml"], 2),
        "talk.parquet": (partial(_write_gigabyte, place / "talk.parquet"), ["inspect-data", place / "talk.parquet"], 3),
        "turns.parquet": (
            partial(_write_gigabyte, place / "turns.parquet"),
            ["inspect-data", place / "turns.parquet"],
            3,
        ),
        "sparse.csv": (partial(sparse, "x.csv", b"prompt,chosen\na,b\n"), ["inspect-data", place / "x.csv"], 3),
        "a model's config": (model, ["measure", place / "config", "-o", place / "measured"], 4),
        "sparse.jsonl": (partial(sparse, "x.jsonl"), ["inspect-data", place / "x.jsonl"], 3),
        "a study": (partial(sparse, "x.toml"), ["study", place / "x.toml", "-o", place / "study"], 2),
        "an instrument": (partial(sparse, "x.jsonl"), ["instruments", "check", place / "x.jsonl"], 3),
        "deep.jsonl": data("deep.jsonl", b'{"prompt": ' * 10**5),
        "digits.json": data("digits.json", b'[{"prompt": ' + b"1" * 10**6 + b"}]"),
        "line.csv": data("line.csv", b'prompt,chosen,rejected\n"' + b"x" * 2 * 10**7),
        **{name: data(name, b"\x1f\x8b" + b"\0" * 100) for name in packed},
    }


def _write_gigabyte(path: Path) -> None:
    """One text of 100 kB ten thousand times, in a file of 6 kB: as a column, as the turns of conversations, or most of them as
    those of one, by a writer that says nothing of dictionaries."""
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["x" * 10**5]))
    short = pa.array(["x"] * 10_000)
    if path.name == "text.parquet":
        parquet.write_table(pa.table({"prompt": short, "chosen": text, "rejected": short}), path)
    else:
        turns = pa.StructArray.from_arrays([pa.array(["user"] * 10_000), text], ["role", "content"])
        ends = range(0, 10_001, 100) if path.name == "talk.parquet" else (0, *range(9_000, 10_001))
        talks = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), turns)
        parquet.write_table(pa.table({"messages": talks}), path, store_schema=path.name == "talk.parquet")


def strings(number: int, seed: int) -> Iterator[str]:
    """Of all code points, the hidden ones in every second place."""
    draw = random.Random(seed)
    hidden = [*range(0x20), *range(0x7F, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2065), 0xAD,
              0xFEFF, *range(0xD800, 0xE000, 97), *range(0xE0000, 0xE0080)]  # fmt: skip
    for _ in range(number):
        length = draw.choice((0, 1, 3, 20, 199, 200, 201, 1000))
        yield "".join(
            chr(draw.choice(hidden) if draw.random() < 0.5 else draw.randrange(0x110000)) for _ in range(length)
        )


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
