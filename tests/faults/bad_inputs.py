"""What users mistype: the right exit code, a message that names the culprit, no traceback; and mostly before torch is imported.

Each case is a command line over files that are laid out here. It runs in a forked child of the lab, where the libraries are
imported already; a case that is `light` also in a process of its own, in which they cannot be imported.
"""

import errno
import functools
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults import hub, hub_faults, numbers
from faults.damage import die_in_step
from faults.figures import Figure, count, side_by_side
from faults.in_process import faults_of
from faults.lab import Ended, Lab

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "wandb")
GUARD = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError("heavy import: " + name)
sys.meta_path.insert(0, Refuse())
"""
SEED = 1
HOME = {
    "HOME": "home",
    "XDG_CACHE_HOME": "home/cache",
    "POLITUNE_CACHE": "home/politune",
    "TMPDIR": "home",
    "PIP_NO_INDEX": "1",
    "COLUMNS": "300",
}
"""Of each case: nothing that lies in a cache of this machine decides how it ends, nothing is fetched, no message is broken up."""

MOST_SECONDS, MOST_TIMES = 0.5, 2.5
TIMED = 4
"""Of so many commands one is timed."""


@dataclass(frozen=True)
class Case:
    """A command line, how it must end, and what it must say.

    Args:
        words: of the command line.
        code: its exit code.
        culprits: texts that must stand in the message on stderr; with exit code 0 on stdout.
        light: it is refused without torch.
        before: what breaks the machine for it, in the child.
    """

    words: tuple[str, ...]
    code: int
    culprits: tuple[str, ...]
    light: bool = True
    before: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        return f"politune {shlex.join(self.words)}"


def case(words: str, code: int, *culprits: str, **more: Any) -> Case:
    return Case(tuple(shlex.split(words)), code, culprits, **more)


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    with lab.place("bad-inputs") as place:
        lay_out(place, lab.base)
        found = _in_children(lab, place, CASES if whole else CASES[::12])
        what = "what users mistype, over all commands: the exit code of its kind, the culprit named, no traceback"
        yield count(what, found.values(), at_least=470 if whole else 1)
        what = f"the {len(ROWS)} kinds of bad input that were to be met: the same, of the cases of each"
        beside = "; ".join(f"no case of number {row}: {why}" for row, why in NOT_HAD.items())
        yield count(what, [_of_row(row, found) for row in ROWS], at_least=60, beside=beside)
        yield from _alone(place, [each for each in CASES if each.light and not each.before], whole)


def _in_children(lab: Lab, place: Path, cases: Sequence[Case]) -> dict[str, str | None]:
    """What is wrong with how each case ended, by its name."""

    def trial(each: Case) -> str | None:
        return complaint(each, lab.run(each.words, cwd=place, environment=HOME, before=each.before))

    return dict(zip((each.name for each in cases), side_by_side(trial, cases), strict=True))


def _of_row(row: int, found: Mapping[str, str | None]) -> str | None:
    """What is wrong with the cases of a kind: there are none, or they did not end well where they were tried."""
    for end in ROWS[row]:
        names = [each.name for each in CASES if f" {each.name}".endswith(f" {end}")]
        wrong = [flaw for name in names if (flaw := found.get(name))]
        if wrong or not names:
            return f"{row}, {end}: {wrong or 'no case'}"
    return None


def _alone(place: Path, cases: list[Case], whole: bool) -> Iterator[Figure]:
    """Those that are timed one after the other: two at a time would be timed against one another."""
    (place / "guard").mkdir()
    (place / "guard" / "sitecustomize.py").write_text(GUARD)
    seconds: list[float] = []
    bare: list[float] = []

    def trial(number: int, each: Case) -> str | None:
        if number % 20 == 0:
            bare.append(run_alone(case("--version", 0), place).seconds)
        ended = run_alone(each, place)
        seconds.append(ended.seconds)
        return complaint(each, ended)

    timed = cases[:: TIMED if whole else 50]
    found = [trial(number, each) for number, each in enumerate(timed)]
    if whole:
        others = [each for number, each in enumerate(cases) if number % TIMED]
        found += side_by_side(lambda each: complaint(each, run_alone(each, place)), others)
    what = "such of them as need no model, where torch cannot be imported: the same"
    yield count(what, found, at_least=430 if whole else 1)
    if whole:
        middle, start = statistics.median(seconds), statistics.median(bare)
        whole_time = f"`politune --version` {start:.2f} s from start to end"
        told = f"of {len(seconds)}: median {middle:.2f} s, longest {max(seconds):.2f} s, {whole_time}"
        what = f"their median: at most {MOST_SECONDS} s, or {MOST_TIMES} times `politune --version` where that is more"
        yield count(what, [None if middle <= max(MOST_SECONDS, MOST_TIMES * start) else told], beside=told)


def run_alone(each: Case, place: Path) -> Ended:
    """In a new process in which the libraries cannot be imported."""
    environment = {**os.environ, **HOME, "PYTHONPATH": str(place / "guard"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "politune", *each.words]
    started = time.monotonic()
    done = subprocess.run(words, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    out, err = (stream.decode(errors="backslashreplace") for stream in (done.stdout, done.stderr))
    return Ended(done.returncode, out, err, time.monotonic() - started)


def complaint(each: Case, ended: Ended) -> str | None:
    """What is wrong with how a case ended, in one line."""
    found = faults_of(ended, [each.code])
    message = ended.out + ended.err if each.code == 0 else ended.err
    found += [f"does not say {word!r}: {ended.err.strip()[:300]!r}" for word in each.culprits if word not in message]
    if each.code and ended.out:
        found.append(f"prints to stdout: {ended.out[:80]!r}")
    return f"{each.name}: {'; '.join(found)}" if found else None


# --- files -----------------------------------------------------------------------------------------------------------

HEAD = "prompt,chosen,rejected\n"
ROW = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
ROWS = "".join(f'{{"prompt": "p{i}", "chosen": "c{i}", "rejected": "r{i}"}}\n' for i in range(40))


def _turns(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _line(**row: object) -> str:
    return json.dumps(row) + "\n"


ASKED = ("user", "Why?")
DATA: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty.jsonl": ("", ("the file is empty",)),
    "blank.jsonl": ("\n\n", ("holds no rows",)),
    "header.csv": (HEAD, ("holds no rows", "only a header")),
    "columns.csv": ("question,good,bad\na,b,c\n", ("found question, good, bad", "need prompt, chosen, rejected")),
    "semicolons.csv": ("prompt;chosen;rejected\na;b;c\n", ("separated by ';'",)),
    "sft.csv": ("instruction,input,output\na,,b\n", ("politune train sft",)),
    "both.csv": ("prompt,chosen,rejected,left,right\np,c,r,l,m\n", ("left, right and chosen",)),
    "spaces.csv": ("prompt, chosen,rejected\np,c,r\n", ("white space around its name",)),
    "twice.csv": ("prompt,chosen,chosen\np,c,r\n", ("chosen stands twice",)),
    "ragged.csv": (HEAD + "p,c,r\np,c\n", (":3", "2 cells in a row of 3 columns")),
    "comma.csv": (HEAD + "Why, then?,c,r\n", (":2", "4 cells", "double quotation marks")),
    "open.csv": (HEAD + 'p,"c,r\n', (":2", "never closed")),
    "null.jsonl": (ROW + _line(prompt="p", chosen=None, rejected="r"), (":2", "chosen is null", "every row needs a text there")),
    "missing.jsonl": (ROW + _line(prompt="p", rejected="r"), (":2", "chosen is absent")),
    "number.jsonl": (_line(prompt="p", chosen=3, rejected="r"), (":1", "chosen is a number")),
    "object.jsonl": (_line(prompt="p", chosen={"text": "c"}, rejected="r"), (":1", "chosen is an object")),
    "nothing.jsonl": (_line(prompt=[], chosen="c", rejected="r"), (":1", "prompt is an empty list")),
    "mixed.jsonl": (ROW + _line(prompt=_turns(ASKED), chosen="c", rejected="r"), (":2", "prompt is a list here")),
    "role.jsonl": (_line(prompt=_turns(("human", "p")), chosen="c", rejected="r"), (":1", "the role 'human'", "user")),
    "keys.jsonl": (_line(prompt=[{"from": "user", "value": "p"}], chosen="c", rejected="r"), (":1", "prompt[0]")),
    "last.jsonl": (
        _line(prompt=_turns(ASKED, ("assistant", "So.")), chosen="c", rejected="r"), (":1", "does not end with a message"),
    ),
    "asked.jsonl": (_line(prompt="p", chosen=_turns(ASKED), rejected="r"), (":1", "chosen must be the assistant's")),
    "text.jsonl": (_line(chosen="c", rejected="r"), (":1", "no prompt column")),
    "long.jsonl": (
        _line(chosen=_turns(ASKED, ("assistant", "c"), ASKED), rejected=_turns(ASKED, ("assistant", "r"))),
        (":1", "not one message of the assistant"),
    ),
    "printed.csv": (HEAD + "\"[{'role': 'user', 'content': 'p'}]\",c,r\n", (":2", "list of messages printed as text")),
    "side.jsonl": (_line(prompt="p", left=3, right="r"), (":1", "left is a number, not text")),
    "content.jsonl": (
        _line(prompt=[{"role": "user", "content": 3}], chosen="c", rejected="r"), (":1", "prompt[0].content is a number"),
    ),
    "equal.csv": (HEAD + "p,c,c\n", (":2", "chosen and rejected are equal in 1 of 1 rows")),
    "white.csv": (HEAD + "p,  ,r\n", (":2", "is empty in 1 of 1 rows")),
    "splits.csv": ("prompt,chosen,rejected,split\np,c,r,test\n", ("no rows of the split 'train'", "it has test")),
    "broken.jsonl": (ROW * 6 + '{"prompt": "p" "chosen": "c"}\n' + ROW, (":7:16", "Expecting ',' delimiter")),
    "array.jsonl": (f"[{ROW}]", ("one object per line, not an array", "name it .json")),
    "cut.jsonl": (ROW + '{"prompt": "p", "chos', (":2", "cut off")),
    "cut.json": (f"[{ROW},", ("cut off",)),
    "scalar.jsonl": (ROW + '"p"\n', (":2", "must be an object")),
    "columns.json": ('{"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]}', ("an array of objects", "keys prompt")),
    "number.json": ("3", ("an array of objects",)),
    "key.jsonl": ('{"prompt": "p", "prompt": "q", "chosen": "c", "rejected": "r"}', (":1", "'prompt' stands twice")),
    "deep.jsonl": ('{"a":' * 100_000, (":1", "nested too deeply")),
    "digits.jsonl": (f'{{"prompt": {"9" * 5000}}}', (":1", "malformed JSON")),
    "latin.csv": ((HEAD + "p,c,r\np,é,r\n").encode("latin-1"), (":3:3", "byte 0xE9", "UTF-8")),
    "wide.csv": ((HEAD + "p,c,r\n").encode("utf-16"), ("UTF-16",)),
    "half.jsonl": ('{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}', (":1", "lone surrogate")),
    "rows.zip": (b"PK\x03\x04", ("is a .zip", "unpacks no archives")),
    "rows.pkl": (b"\x80\x04.", ("is a .pkl", "runs no code")),
    "load.py": ("raise SystemExit", ("is a .py",)),
    "rows.tsv": ("prompt\tchosen\trejected\n", ("is a .tsv",)),
    "rows.txt": (ROW, ("is a .txt",)),
    "damaged.parquet": (b"PAR1 and something else PAR1", ("malformed parquet",)),
}  # fmt: skip
"""Files that train nothing, and what `train dpo` says of them."""

SOUND: dict[str, str | bytes] = {
    "good.jsonl": ROWS,
    "words.csv": HEAD + "None,NA,null\nn/a,nan,NULL\n",
    "mark.csv": b"\xef\xbb\xbf" + (HEAD + "p,c,r\n").encode(),
    "flipped.jsonl": ROW + _line(prompt="p", chosen="r", rejected="c"),
    "same.jsonl": ROW * 3,
    "escape.jsonl": _line(prompt="p\x1b]0;t\x07", chosen="c\x1b[31m\x00", rejected="r\x9b2J\u202e"),
    "stances.csv": "prompt,left,right\np,l,r\n",
    "asking.jsonl": _line(messages=_turns(ASKED, ("assistant", "So."), ASKED)),
    "completions.jsonl": _line(prompt="p", completion="c"),
}
RUN = 'method = "dpo"\n[model]\nmodel_name_or_path = "demo"\n[data]\ndataset_name = "stances"\ndirection = "left"\n'
PRESETS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "unknown.toml": (RUN + "[lora]\nlora_rnak = 4\n", (":8", "lora_rnak", "did you mean lora.lora_r")),
    "group.toml": (RUN + "[trian]\nbeta = 1\n", (":7", "trian", "did you mean train")),
    "elsewhere.toml": (RUN + "[train]\nlora_r = 4\n", (":8", "belongs to the group [lora]")),
    "text.toml": (RUN + '[train]\nbeta = "0.1"\n', (":8", "train.beta", "number")),
    "rate.toml": (RUN + '[train]\nlearning_rate = "1e-5"\n', (":8", "train.learning_rate", "number")),
    "word.toml": (RUN + "[train]\ngradient_checkpointing = no\n", (":8", "not valid TOML")),
    "zero.toml": (RUN + "[train]\nsave_steps = 010\n", (":8", "not valid TOML")),
    "clock.toml": (RUN + "[train]\nsave_steps = 12:30:00\n", (":8", "train.save_steps", "integer")),
    "truth.toml": (RUN + "[train]\nsave_steps = true\n", (":8", "train.save_steps", "integer")),
    "lengths.toml": (RUN + "[train]\nnum_train_epochs = 3\nmax_steps = 5\n", (":9", "num_train_epochs and max_steps")),
    "part.toml": (RUN + "[train]\nsave_steps = 1.5\n", (":8", "train.save_steps", "integer")),
    "again.toml": (RUN + "[train]\nbeta = 0.1\nbeta = 0.2\n", (":9", "not valid TOML")),
    "tables.toml": (RUN + "[model]\n", (":7", "not valid TOML")),
    "list.toml": ('method = ["dpo"]\n', (":1", "method")),
    "method.toml": ('method = "ppo"\n', (":1", "method must be 'dpo' or 'sft'")),
    "nameless.toml": ("[model]\n", ("nameless.toml", "method")),
    "flat.toml": ('method = "dpo"\nmodel = "demo"\n', (":2", "group of settings")),
    "numbered.toml": (
        'method = "dpo"\n[model]\nmodel_name_or_path = 3\n',
        (":3", "model.model_name_or_path", "string"),
    ),
    "baseless.toml": ('method = "dpo"\n[data]\ndirection = "left"\n', ("no base model",)),
    "retired.toml": (RUN + "[train]\nmax_prompt_length = 512\n", (":8", "max_prompt_length", "leave it out")),
    "owned.toml": (RUN + "[trl]\nlearning_rate = 1e-4\n", ("use train.learning_rate",)),
    "sides.toml": (RUN.replace("left", "up"), (":6", "data.direction", "'left', 'right'")),
    "yaml.toml": ("method: dpo\nmodel:\n  model_name_or_path: demo\n", (":1", "not valid TOML")),
    "empty.toml": ("", ("empty.toml", "method")),
    "latin.toml": ('method = "dpo"\ntitle = "é"\n'.encode("latin-1"), (":2", "0xe9 is not UTF-8")),
    "nul.toml": (b'title = "\x00"\n', (":1", "not valid TOML")),
    "deep.toml": ("a = " + "[" * 20_000, ("nested too deeply",)),
    "huge.toml": ("#" * 70_000, ("larger than 64 KiB",)),
    "digits.toml": (RUN + f"[train]\nseed = {'9' * 5000}\n", ("digits.toml",)),
}
INSTRUMENT = _line(
    name="mine", version="1", license="MIT", language="en", attribution="me", description="d", axes={"a": ["one", "two"]}
)  # fmt: skip
ITEM: dict[str, Any] = {"kind": "pair", "id": "i", "topic": "t", "axis": "a", "left": ["l"], "right": ["r"]}
INSTRUMENTS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "headless.jsonl": (_line(**ITEM), (":1", "the first line says what the instrument is", "name")),
    "void.jsonl": ("", ("holds no lines",)),
    "kind.jsonl": (INSTRUMENT + _line(**ITEM | {"kind": "pear"}), (":2", "pear")),
    "axis.jsonl": (INSTRUMENT + _line(**ITEM | {"axis": "b"}), (":2", "axis b is not one of a")),
    "wordings.jsonl": (INSTRUMENT + _line(**ITEM | {"left": ["l", "m"]}), (":2", "left has 2 wordings")),
    "extra.jsonl": (INSTRUMENT + _line(**ITEM | {"note": "n"}), (":2", "note")),
    "syntax.jsonl": (INSTRUMENT + "{'kind': 'pair'}\n", (":2", "not JSON")),
    "fields.csv": ("left,right\nl\n", (":2", "not as many fields")),
    "sides.csv": ("prompt,answer\np,a\n", (":2", "neither left and right nor text and key")),
    "bytes.csv": (b"left,right\nl,\xe9\n", ("not UTF-8",)),
    "deep.jsonl": ('{"a":' * 100_000, (":1", "is not JSON")),
    "digits.jsonl": (f'{{"a": {"9" * 5000}}}', (":1", "is not JSON")),
    "white.jsonl": (INSTRUMENT + _line(**ITEM | {"left": [" "]}), (":2", "left")),
    "cell.csv": (f'left,right\n"{"x" * 200_000}",r\n', ("malformed CSV",)),
}
STUDY = 'title = "t"\nseeds = [1]\n[arms.left]\npreset = "demo-left"\n'
STUDIES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "armless.toml": ('title = "t"\nseeds = [1]\n', ("armless.toml", "arms")),
    "seedless.toml": (STUDY.replace("[1]", "[]"), ("seedless.toml", "seeds")),
    "seeds.toml": (STUDY.replace("[1]", "[1, 1]"), ("seeds.toml", "a seed is there twice")),
    "control.toml": (STUDY.replace("[arms", 'control = "x"\n[arms'), ("control names no arm: x",)),
    "arms.toml": (STUDY + '[arms."Left One"]\npreset = "demo-left"\n', ("arms.toml", "Left One")),
    "same.toml": (STUDY + '[arms.right]\npreset = "demo-left"\n', ("arms left and right train the same",)),
    "typo.toml": (STUDY.replace("demo-left", "demo-lft"), ("arm left", "demo-lft", "did you mean 'demo-left'")),
    "setting.toml": (STUDY + "set = { train = { betta = 1 } }\n", ("arm left", "train.betta")),
    "seed.toml": (STUDY + "set = { train = { seed = 1 } }\n", ("train.seed", "which the study gives each run")),
    "groups.toml": (STUDY + "set = { trian = { beta = 1 } }\n", ("trian", "no group of settings")),
    "asked.toml": (STUDY + '[measure]\ninstruments = ["nothing"]\n', ("measure.instruments", "nothing")),
    "syntax.toml": ("title = \n", ("syntax.toml", "not TOML")),
    "deep.toml": ("a = " + "[" * 20_000, ("deep.toml", "not TOML")),
    "digits.toml": (f"a = {'9' * 5000}", ("digits.toml", "not TOML")),
}


def lay_out(place: Path, base: Path) -> None:
    """Every file that a case names, below `place`; `base` is a sound model."""
    for folder in ("", "data", "presets", "instruments", "studies", "models", "adapters", "home", "full", "rows.csv"):
        (place / folder).mkdir(exist_ok=True)
    for folder, files in (("data", DATA), ("presets", PRESETS), ("instruments", INSTRUMENTS), ("studies", STUDIES)):
        for name, (content, _) in files.items():
            _write(place / folder / name, content)
    for name, content in SOUND.items():
        _write(place / "data" / name, content)
    _write(place / "full" / "something.txt", "x")
    _write(place / "instruments" / "items.csv", "text,key\nt,sideways\n")
    for name, lines in RECIPES.items():
        _write(place / "recipes" / f"{name}.toml", f'[[source]]\nname = "data/good.jsonl"\n{lines}')
    _write(place / "recipes" / "gone.toml", '[[source]]\nname = "data/gone.jsonl"\n')
    _write(place / "recipes" / "sides.toml", '[[source]]\nname = "stances"\n')
    _write(place / "instruments" / "8.json", '[{"question": "q"}]')
    os.mkfifo(place / "data" / "pipe.csv")
    with (place / "data" / "huge.jsonl").open("wb") as file:
        file.truncate(2**31 + 1)  # a hole: it takes no space
    _write_bomb(place / "data" / "bomb.parquet")
    for name, (damage, _) in MODELS.items():
        damage(Path(shutil.copytree(base, place / "models" / name)))
    shutil.copytree(base, place / "models" / "whole")
    for name, (damage, _) in TOKENIZERS.items():
        damage(Path(shutil.copytree(base, place / "models" / name)))
    write_adapter(place / "adapters" / "whole")
    for name, (damage, *_) in ADAPTERS.items():
        damage(write_adapter(place / "adapters" / name))
    run = place / "run"
    write_adapter(run / "adapter")
    _write(run / "run.json", json.dumps({"status": "done", "base": {"name": "models/whole"}}))
    _write(place / "odd" / "measurement.json", '{"base": 3}')
    _write(place / "half" / "run.json", json.dumps({"status": "interrupted"}))
    (place / "link").symlink_to(place / "adapters" / "whole")
    (place / "held").mkdir()


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def _write_bomb(path: Path) -> None:
    """Some kB that hold 300 times 1 MiB of one text."""
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), ["x" * 2**20])
    parquet.write_table(pyarrow.table(dict.fromkeys(HEAD.strip().split(","), text)), path, compression="zstd")


RECIPES = {
    "good": "",
    "typo": "[balance]\nchosen_longr = 0.5\n",
    "pattern": '[[filter.drop]]\nfield = "prompt"\npattern = "("\n',
    "nothing": "[filter]\nprompt = [500, 600]\n",
    "hash": f'sha256 = "{"0" * 64}"\n',
    "twin": '[match]\ntwin = "nowhere.toml"\n',
    "dose": "[dose]\nrows = 500\n",
    "shares": 'share = 1\n[[source]]\nname = "data/good.jsonl"\n',
}
"""Recipes of one good file and something else."""
ENDPOINT = "--endpoint http://127.0.0.1:9/v1 --endpoint-model m"
"""Where nobody listens."""


# --- models and adapters ---------------------------------------------------------------------------------------------


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _config(**changes: Any) -> Callable[[Path], object]:
    return lambda path: _edit(path / "config.json", **changes)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _untold(path: Path) -> None:
    """Without a chat template."""
    (path / "chat_template.jinja").unlink(missing_ok=True)
    _edit(path / "tokenizer_config.json", chat_template=None)


Damage = Callable[[Path], object]
MODELS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no-config": (lambda path: (path / "config.json").unlink(), ("no config.json",)),
    "bad-config": (lambda path: (path / "config.json").write_text("{"), ("config.json", "no JSON object")),
    "code": (_config(auto_map={"AutoModel": "code.py"}), ("needs code of its own",)),
    "masked": (_config(architectures=["BertForMaskedLM"]), ("no causal language model", "BertForMaskedLM")),
    "pickles": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), ("pickles, which can run code",),
    ),
    "cut": (lambda path: _cut(path / "model.safetensors"), ("model.safetensors is damaged",)),
    "no-weights": (lambda path: (path / "model.safetensors").unlink(), ("no safetensors weights",)),
    "index": (
        lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        ("index.json is damaged",),
    ),
}  # fmt: skip
TOKENIZERS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "untold": (_untold, ("no chat template", "instruct")),
    "padless": (lambda path: _edit(path / "tokenizer_config.json", pad_token=None), ()),
    "endless": (lambda path: _edit(path / "tokenizer_config.json", eos_token=None), ("no end token",)),
    "no-tokenizer": (lambda path: (path / "tokenizer.json").write_text("{"), ("cannot load the tokenizer",)),
    "small": (_config(intermediate_size=96), ("cannot load the weights",)),
    "other": (_config(), ("trained on another base",)),
    "packed": (_config(quantization_config={"quant_method": "bitsandbytes"}), ("is a quantised checkpoint", "--base")),
}

WEIGHTS, LORA = "adapter_model.safetensors", "adapter_config.json"
LORA_CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
    "base_model_name_or_path": "models/whole",
}  # fmt: skip
MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"


def write_adapter(path: Path, value: float = 0.01, **tensors: tuple[int, ...] | None) -> Path:
    """An adapter of the lab's base, every weight of one value: q_proj of both layers is 64 x 64, the rank 4.

    Args:
        tensors: shapes by name, `None` leaves one out.
    """
    shapes: dict[str, tuple[int, ...] | None] = {
        f"{MODULE.format(layer)}.{part}.weight": shape
        for layer in range(2)
        for part, shape in (("lora_A", (4, 64)), ("lora_B", (64, 4)))
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / LORA).write_text(json.dumps(LORA_CONFIG))
    header, data = {}, b""
    for name, shape in {**shapes, **tensors}.items():
        if shape is not None:
            start, size = len(data), functools.reduce(lambda one, other: one * other, shape, 1)
            data += struct.pack("<f", value) * size
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _lora(**changes: Any) -> Damage:
    return lambda path: _edit(path / LORA, **changes)


def _shaped(**tensors: tuple[int, ...] | None) -> Damage:
    return lambda path: write_adapter(path, **tensors)


FIRST, SEVENTH = (f"{MODULE.format(layer)}.lora_A.weight" for layer in (0, 7))
ADAPTERS: dict[str, tuple[Damage, tuple[str, ...]] | tuple[Damage, tuple[str, ...], bool]] = {
    "no-config": (lambda path: (path / LORA).unlink(), ("no adapter_config.json",)),
    "no-weights": (lambda path: (path / WEIGHTS).unlink(), ("no adapter_model.safetensors",)),
    "pickle": (lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin"), ("is a pickle",)),
    "json": (lambda path: (path / LORA).write_text("{"), ("adapter_config.json is no JSON",)),
    "list": (lambda path: (path / LORA).write_text("[]"), ("no JSON object",)),
    "large": (lambda path: (path / LORA).write_text(" " * 2**21), ("larger than 1 MiB",)),
    "ia3": (_lora(peft_type="IA3"), ("peft_type is IA3", "only LoRA")),
    "code": (_lora(auto_mapping={"parent_library": "evil"}), ("auto_mapping",)),
    "layers": (_lora(modules_to_save=["lm_head"]), ("modules_to_save",)),
    "pattern": (_lora(target_modules="(a+)+$"), ("target_modules",)),
    "rank": (_lora(r=4096), ("r = 4096",)),
    "other-rank": (_lora(r=8), ("has rank [4], its config says [8]",)),
    "rankless": (_lora(r=None), ("lacks r",)),
    "dora": (_lora(use_dora=True), ("use_dora",)),
    "cut": (lambda path: _cut(path / WEIGHTS), (WEIGHTS, "is damaged")),
    "half": (_shaped(**{FIRST: None}), ("is incomplete",)),
    "flat": (_shaped(**{FIRST: (256,)}), ("is incomplete",)),
    "extra": (_shaped(**{"base_model.model.lm_head.weight": (4, 64)}), ("no LoRA weight",)),
    "hollow": (
        lambda path: (path / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"{}"), ("holds no weights",),
    ),
    "lost": (_lora(base_model_name_or_path=None), ("does not say which base", "--base")),
    "local": (_lora(base_model_name_or_path="local:mine"), ("mine", "--base")),
    "nan": (lambda path: write_adapter(path, float("nan")), ("not finite",), False),
    "shape": (
        _shaped(**{FIRST: (4, 32), FIRST.replace("lora_A", "lora_B"): (32, 4)}), ("32 x 32", "64 x 64"), False,
    ),
    "deep": (
        _shaped(**{SEVENTH: (4, 64), SEVENTH.replace("lora_A", "lora_B"): (64, 4)}), ("no linear layer", "layers.7"), False,
    ),
    "names": (_lora(target_modules=[f"m{number}" for number in range(2000)]), ("more modules in its target_modules",)),
}  # fmt: skip


# --- what breaks the machine -----------------------------------------------------------------------------------------


def _hide_bitsandbytes() -> None:
    version = importlib.metadata.version

    def hidden(name: str) -> str:
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    importlib.metadata.version = hidden


def _fill_the_disk() -> None:
    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=1000)  # type: ignore[assignment]


def _hold() -> None:
    """Another descriptor has the lock: for the kernel that is another owner."""
    import fcntl

    fcntl.flock(os.open("held/.politune.lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)


def _fill_the_disk_in_a_save() -> None:
    from transformers import Trainer

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Trainer._save_checkpoint = full


def _hand_a_wrong_login() -> None:
    os.environ |= {"WANDB_MODE": "online", "WANDB_API_KEY": "short"}


def _take_home_and_streams() -> None:
    del os.environ["HOME"], os.environ["XDG_CACHE_HOME"]
    os.environ |= {"LC_ALL": "C", "LANG": "C"}
    os.close(1)
    sys.stdout = None  # type: ignore[assignment]


def _ask_a_hub(kind: str) -> None:
    """A Hub, in a thread of the child, at which that befalls every model; politune came too late to silence bars here."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    model = hub.Repository("models", "no/such", hub_faults._files_in(Path("models/whole")))
    standing = hub.StandIn([model], hub.kinds()[kind].trouble if kind else None, model.name).__enter__()
    hub_faults.beside(standing.url, "home/hub")


# --- cases -----------------------------------------------------------------------------------------------------------

LONG = "x" * 300
HOSTILE = "\x1b]0;t\x07"
DRY = "train dpo --preset demo-left --dry-run"
TRAIN = "train dpo --preset demo-left"
RUN_HERE = (
    f"{TRAIN} --dataset_name data/good.jsonl --direction none --max_length 64 --max_steps 2 --warmup_steps 0 --lora_r 4 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 1"
)


def _run(flags: str, code: int, *culprits: str, **more: Any) -> Case:
    model = "" if "--model_name_or_path" in flags else "--model_name_or_path models/whole "
    return case(f"{RUN_HERE} {model}{flags}", code, *culprits, light=False, **more)


FLAGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("--learning_rate 0", ("--learning_rate", "train.learning_rate", "stand still")),
    ("--learning_rate -1e-4", ("train.learning_rate",)),
    ("--learning_rate nan", ("train.learning_rate", "finite")),
    ("--learning_rate inf", ("train.learning_rate", "finite")),
    ("--learning_rate 2", ("train.learning_rate", "less than or equal to 1")),
    ("--learning_rate 5e-4x", ("train.learning_rate", "5e-4x", "number")),
    ("--learning_rate 0,0005", ("train.learning_rate", "0,0005", "number")),
    ("--beta 0", ("--beta", "inverts the direction")),
    ("--beta -0.1", ("--beta", "inverts the direction")),
    ("--beta nan", ("--beta", "finite")),
    ("--beta high", ("--beta", "high", "number")),
    ("--beta 101", ("--beta", "100")),
    ("--lora_r 0", ("--lora_r", "greater than or equal to 1")),
    ("--lora_r 1025", ("--lora_r", "1024")),
    ("--lora_r 8.5", ("--lora_r", "integer")),
    ("--lora_alpha 0", ("--lora_alpha", "switch it off")),
    ("--lora_alpha 65537", ("--lora_alpha", "65536")),
    ("--lora_dropout 1.0", ("--lora_dropout", "probability")),
    ("--lora_dropout -0.1", ("--lora_dropout", "probability")),
    ("--lora_target_modules lm_head", ("lm_head", "output layer")),
    ("--lora_target_modules all-linear q_proj", ("all-linear stands alone",)),
    ("--lora_target_modules q_porj", ("q_porj", "did you mean q_proj")),
    ("--set lora.lora_target_modules=[]", ("names no module",)),
    ("--num_train_epochs 0", ("--num_train_epochs", "no epoch trains nothing")),
    ("--num_train_epochs 1001", ("--num_train_epochs", "1000")),
    ("--max_steps 0", ("--max_steps", "-1 (all epochs)")),
    ("--max_steps -2", ("--max_steps", "-1 (all epochs)")),
    ("--num_train_epochs 3 --max_steps 5", ("--num_train_epochs and --max_steps", "give one of them")),
    ("--per_device_train_batch_size 0", ("--per_device_train_batch_size", "count of rows")),
    ("--per_device_train_batch_size 4097", ("--per_device_train_batch_size", "4096")),
    ("--gradient_accumulation_steps 0", ("--gradient_accumulation_steps", "forward passes")),
    ("--gradient_accumulation_steps 65537", ("--gradient_accumulation_steps", "65536")),
    ("--weight_decay -1", ("--weight_decay", "negative decay")),
    ("--weight_decay 2", ("--weight_decay", "1")),
    ("--warmup_steps -1", ("--warmup_steps", "count of steps")),
    ("--seed -1", ("--seed", "numpy")),
    ("--seed 4294967296", ("--seed", "numpy")),
    ("--seed 1e400", ("--seed", "an integer")),
    ("--logging_steps 0", ("--logging_steps", "count of steps")),
    ("--eval_steps -1", ("--eval_steps", "count of steps")),
    ("--save_steps 0", ("--save_steps", "count of steps")),
    ("--save_total_limit 0", ("--save_total_limit", "at least one checkpoint")),
    ("--tokens_per_call -1", ("--tokens_per_call", "count of tokens")),
    ("--measure_every -1", ("--measure_every", "measures nothing")),
    ("--max_length 7", ("--max_length", "must fit into it")),
    ("--max_length 1000001", ("--max_length", "1000000")),
    ("--max_length 1k", ("--max_length", "1k", "integer")),
    ("--validation_fraction 0.6", ("--validation_fraction", "0.5")),
    ("--validation_fraction -0.1", ("--validation_fraction", "share")),
    ("--label_smoothing 0.5", ("--label_smoothing", "flipped labels")),
    ("--label_smoothing -0.1", ("--label_smoothing", "flipped labels")),
    ("--loss_type kto", ("--loss_type", "kto", "'sigmoid'")),
    ("--loss_type exo_pair", ("--loss_type", "label_smoothing above 0")),
    ("--lr_scheduler_type step", ("--lr_scheduler_type", "'cosine'")),
    ("--on_overlength cut", ("--on_overlength", "'drop'")),
    ("--packing on", ("--packing", "'auto' or 'off'")),
    ("--to tensorbord", ("tensorbord", "'wandb' or 'tensorboard'")),
    ("--direction up", ("--direction", "up", "'left', 'right'")),
    ("--direction none", ("--direction", "left, right or shuffled")),
    ("--dataset_split heldout", ("--dataset_split", "heldout is for reporting")),
    ("--dataset_split ''", ("--dataset_split", "an empty name is no split")),
    ("--dataset_name ''", ("--dataset_name", "an empty name is no data set")),
    ("--dataset_revision main", ("data.dataset_revision", "stances has no revision")),
    ("--dataset_name data/good.jsonl --dataset_revision main", ("data.dataset_revision", "no revision")),
    ("--dataset_name data/good.jsonl --dataset_split test", ("data.dataset_split", "no splits")),
    ("--dataset_name scale-lab/politune-left --direction right", ("--dataset_name", "direction 'right' contradicts")),
    ("--dataset_name yahma/alpaca-cleaned --direction shuffled", ("--dataset_name", "no sides to shuffle")),
    ("--model_name_or_path ''", ("--model_name_or_path", "an empty name is no model")),
    ("--revision main", ("model.revision", "demo has no revisions")),
    ("--model_name_or_path models/whole --revision main", ("model.revision", "no revisions")),
    ("--output_dir ''", ("--output_dir", "needs a directory")),
    ("--wandb_project ''", ("--wandb_project", "needs a project")),
    ("--use_4bit --use_8bit", ("--use_8bit", "use --use_4bit")),
    ("--bf16 --fp16", ("--fp16", "use --bf16")),
    ("--bf16 true", ("unexpected extra argument", "true")),
    ("--max_prompt_length 512", ("max_prompt_length", "data.max_length")),
    ("--tokenizer_name x", ("tokenizer_name", "leave it out")),
    ("--resume_from_checkpoint x", ("--resume_from_checkpoint is called --resume here",)),
    ("--betta 1", ("--betta",)),
    ("--beta", ("--beta", "requires an argument")),
    ("beta=0.1", ("unexpected extra argument", "beta=0.1")),
    ("--set", ("--set", "requires an argument")),
    ("--set beta=0.2", ("--set train.beta=0.2",)),
    ("--set train.betta=1", ("train.betta", "did you mean train.beta")),
    ("--set trian.beta=1", ("trian", "did you mean train")),
    ("--set train.lora_r=1", ("belongs to the group [lora]",)),
    ("--set train", ("group.name=value",)),
    ("--set =1", ("group.name=value",)),
    ("--set train=1", ("--set train",)),
    ("--set train.beta.x=1", ("beta is a group of settings, not a value",)),
    ("--set train.max_seq_length=64", ("train.max_seq_length", "data.max_length")),
    ("--set title=1", ("--set title", "string")),
    ("--set trl.learning_rate=1", ("use train.learning_rate",)),
    ("--set trl.precompute_ref_log_probs=1", ("precompute_ref_log_probs is true or false",)),
    ("--set train.beta=0.2 --beta 0.3", ("--beta", "--set train.beta", "one of them")),
    ("--stop-after 0", ("--stop-after",)),
    ("--stop-after soon", ("--stop-after",)),
    ("--measure after", ("--measure", "before-after")),
)
"""After `train dpo --preset demo-left --dry-run`: usage, exit code 2."""
SFT_FLAGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("--learning_rate 0", ("train.learning_rate", "stand still")),
    ("--learning_rate 2", ("train.learning_rate", "less than or equal to 1")),
    ("--num_train_epochs 0", ("train.num_train_epochs", "no epoch trains nothing")),
    ("--num_train_epochs 1001", ("train.num_train_epochs", "1000")),
    ("--per_device_train_batch_size 0", ("train.per_device_train_batch_size", "count of rows")),
    ("--per_device_train_batch_size 4097", ("train.per_device_train_batch_size", "4096")),
    ("--gradient_accumulation_steps 0", ("train.gradient_accumulation_steps", "forward passes")),
    ("--gradient_accumulation_steps 65537", ("train.gradient_accumulation_steps", "65536")),
    ("--weight_decay -1", ("train.weight_decay", "negative decay")),
    ("--weight_decay 2", ("train.weight_decay", "1")),
    ("--dataset_name ''", ("data.dataset_name", "an empty name is no data set")),
    ("--beta 0.1", ("--beta",)),
    ("--label_smoothing 0.1", ("--label-smoothing",)),
    ("--set train.beta=0.1", ("train.beta",)),
)
"""After `train sft --preset demo-sft --dry-run`: the same."""

COMMANDS: tuple[Case, ...] = (
    case("trian dpo", 2, "trian"),
    case("train kto", 2, "kto"),
    case("--frobnicate", 2, "--frobnicate"),
    case("train dpo", 2, "--model_name_or_path", "demo-left"),
    case("train dpo --preset demo-lft", 2, "demo-lft", "did you mean 'demo-left'"),
    case("train dpo --preset demo-sft", 2, "demo-sft", "train sft"),
    case("train sft --preset demo-left", 2, "demo-left", "train dpo"),
    case("train sft --preset demo-sft --dry-run --dataset_name data/good.jsonl", 3, "politune train dpo"),
    case(
        "train sft --preset demo-sft --dry-run --dataset_name data/asking.jsonl --direction none",
        3,
        ":1",
        "last message is not the assistant's",
    ),
    case(
        "train sft --preset demo-sft --dry-run --dataset_name data/completions.jsonl --direction shuffled",
        3,
        "no sides",
    ),
    case("train dpo --preset ../../etc/passwd", 2, "cannot read", "passwd"),
    case("train dpo --preset ..%2fpasswd", 2, "..%2fpasswd"),
    case("train dpo --preset ~nobody-here/mine.toml", 2, "~nobody-here"),
    case("train dpo --preset presets", 2, "unknown preset 'presets'", "./presets.toml"),
    case("train dpo --preset ./presets", 2, "cannot read", "directory"),
    case(f"train dpo --preset ./{LONG}.toml", 2, "cannot read", "too long"),
    case(f"train dpo --preset '{HOSTILE}'", 2, "unknown preset"),
    case(f"{TRAIN} --loss_type '{HOSTILE}'", 2, "--loss_type"),
    case(f"{TRAIN} '{HOSTILE}'", 2, "unexpected extra argument"),
    case(f"{DRY} --set trl.frobnicate=1", 2, "frobnicate", light=False),
    case(f"{DRY} --dataset_name data/nowhere.jsonl", 3, "nowhere.jsonl", "no such file"),
    case(f"{DRY} --dataset_name data/god.jsonl", 3, "god.jsonl", "did you mean data/good.jsonl"),
    case(f"{DRY} --dataset_name ./scale-lab/politune-left", 3, "scale-lab/politune-left", "no such file"),
    case(f"{DRY} --dataset_name a/b/c", 3, "a/b/c", "neither a file here nor"),
    case(f"{DRY} --dataset_name 'two words'", 3, "two words"),
    case(f"{DRY} --dataset_name ~nobody-here/rows.csv", 3, "~nobody-here"),
    case(f"{DRY} --dataset_name {LONG}.csv", 3, "no such file"),
    case(f"{DRY} --dataset_name '{HOSTILE}.csv'", 3, "no such file"),
    case(f"{DRY} --dataset_name data", 3, "is a directory", "name one of its files"),
    case(f"{DRY} --dataset_name rows.csv", 3, "is a directory"),
    case(f"{DRY} --dataset_name data/pipe.csv", 3, "no regular file"),
    case(f"{DRY} --dataset_name /dev/zero", 3, "no regular file"),
    case(f"{DRY} --dataset_name data/huge.jsonl", 3, "huge.jsonl", "a record of more than 16 MiB"),
    case(f"{DRY} --dataset_name data/bomb.parquet", 3, "bomb.parquet", "decompression bomb"),
    case(f"{DRY} --dataset_name data/stances.csv --direction none", 3, "data.direction", "left, right or shuffled"),
    case(f"{DRY} --model_name_or_path ./nowhere", 4, "nowhere does not exist"),
    case(f"{DRY} --model_name_or_path ~nobody-here/model", 4, "~nobody-here"),
    case(f"{DRY} --model_name_or_path data/good.jsonl", 4, "is a file, not a directory"),
    case(f"{DRY} --model_name_or_path data", 4, "no config.json"),
    case(f"{DRY} --model_name_or_path a/b/c", 4, "a/b/c", "neither a directory here nor a Hub id"),
    case(f"{DRY} --model_name_or_path {LONG}", 4, "neither a directory here nor a Hub id"),
    case(f"{DRY} --model_name_or_path './{HOSTILE}'", 4, "does not exist"),
    case(f"{DRY} --model_name_or_path adapters/whole", 4, "is an adapter, not a base model", "politune merge"),
    case(f"{TRAIN} --output_dir full", 7, "full is not empty", "choose another --output_dir"),
    case(f"{TRAIN} --output_dir data/good.jsonl", 7, "good.jsonl is a file"),
    case(f"{TRAIN} --output_dir data/good.jsonl/run", 7, "good.jsonl/run", "Not a directory"),
    case(f"{TRAIN} --output_dir /proc/nowhere", 7, "cannot write to /proc/nowhere"),
    case(f"{TRAIN} --output_dir {LONG}", 7, "cannot write to", "too long"),
    case(f"{TRAIN} --output_dir ~nobody-here/run", 7, "--output_dir", "~nobody-here"),
    case(f"{TRAIN} --output_dir held", 7, "another run is at work in held", before=_hold),
    case(f"{TRAIN} --use_4bit", 5, "bitsandbytes", "`politune doctor`", before=_hide_bitsandbytes),
    case(f"""{TRAIN} --set trl.max_grad_norm='"much"'""", 2, "trl.max_grad_norm", "a number", light=False),
    case(f"{TRAIN} --output_dir fresh --resume", 7, "fresh holds no run to resume"),
    case(f"{TRAIN} --output_dir full --resume", 7, "full holds no run to resume"),
    case(f"{TRAIN} --output_dir unreached --model_name_or_path no/such", 6, "no/such is not cached", light=False),
    case(f"{DRY} --use_4bit", 0, "use_4bit without a GPU is slow"),
    case(f"{DRY} --lora_dropout 0.1", 0, "lora_dropout = 0.1 has no effect"),
    case("merge", 2, "PATH"),
    case("merge a b", 2, "takes one path"),
    case("merge adapter", 4, "no directory adapter"),
    case("merge ./nowhere", 4, "no directory nowhere"),
    case(f"merge {LONG}", 4, "no directory"),
    case("merge data/good.jsonl", 4, "good.jsonl"),
    case("merge data", 4, "neither a run nor an adapter"),
    case("merge models/whole", 4, "neither a run nor an adapter"),
    case("merge half", 4, "has no adapter/", "interrupted", "--resume"),
    case("merge run --dtype int8", 2, "--dtype", "int8"),
    case("merge run -o run/adapter", 7, "is the adapter itself"),
    case("merge run -o run", 7, "is the directory that the adapter lies in"),
    case("merge run -o run/adapter/merged", 7, "lies inside the adapter"),
    case("merge run -o models/whole", 7, "models/whole is not empty"),
    case("merge adapters/whole -o link", 7, "is the adapter itself"),
    case("merge run -o full", 7, "full is not empty"),
    case("merge run -o data/good.jsonl", 7, "good.jsonl is a file"),
    case(f"merge run -o {LONG}", 7, LONG[:100], "too long"),
    case("merge run -o merged", 7, "merged needs", before=_fill_the_disk),
    case("merge run --base ./nowhere -o merged", 4, "nowhere does not exist"),
    case("merge run --base models/packed -o merged", 4, "is a quantised checkpoint", "--base"),
    case("merge run --base models/other -o merged", 4, "another base", "--force-base"),
    case("inspect-data data/good.jsonl missing.jsonl", 3, "missing.jsonl"),
    case("inspect-data data/good.jsonl --against missing.jsonl", 3, "missing.jsonl"),
    case("inspect-data data/good.jsonl --sample 0", 2, "--sample"),
    case("inspect-data data/good.jsonl --html data", 7, "it is a directory"),
    case("inspect-data data/good.jsonl --dataset-split dev", 2, "no splits to choose 'dev'"),
    case("data nothing", 2, "nothing"),
    case("data build missing.toml -o new.jsonl", 2, "missing.toml"),
    case("data build recipes/typo.toml -o new.jsonl", 2, "typo.toml:4", "did you mean balance.chosen_longer"),
    case("data build recipes/pattern.toml -o new.jsonl", 2, "pattern.toml:5", "no regular expression"),
    case("data build recipes/nothing.toml -o new.jsonl", 3, "no row is left after the step filter"),
    case("data build recipes/gone.toml -o new.jsonl", 3, "data/gone.jsonl", "no such file"),
    case("data build recipes/sides.toml -o new.jsonl", 2, "direction must be"),
    case("data build recipes/hash.toml -o new.jsonl", 3, "other rows than the recipe says"),
    case("data build recipes/twin.toml -o new.jsonl", 2, "nowhere.toml"),
    case("data build recipes/dose.toml -o new.jsonl", 3, "asks for 500 rows"),
    case("data build recipes/shares.toml -o new.jsonl", 2, "every source has a share or none"),
    case("data build recipes/good.toml -o data/good.jsonl", 7, "good.jsonl"),
    case("data build recipes/good.toml -o new.txt", 7, "no name of a data set"),
    case("data build recipes/good.toml -o nowhere/new.jsonl", 7, "a directory that does not exist"),
    case("data build recipes/good.toml", 2, "-o FILE"),
    case("data annotate data/good.jsonl", 2, "--model, or --endpoint"),
    case(f"data annotate data/gone.jsonl {ENDPOINT}", 3, "data/gone.jsonl"),
    case(f"data annotate data/good.jsonl {ENDPOINT} --rubric recipes/good.toml", 2, "good.toml"),
    case(f"data annotate data/good.jsonl {ENDPOINT} --concurrency 0", 2, "--concurrency"),
    case(f"data annotate data/good.jsonl {ENDPOINT} -o annotated", 6, "127.0.0.1:9"),
    case("data annotate data/good.jsonl --endpoint ftp://x --endpoint-model m", 2, "ftp://x"),
    case(f"data synth gone.txt -o new.jsonl {ENDPOINT}", 3, "gone.txt"),
    case(f"data synth data/rows.txt -o new.txt {ENDPOINT}", 2, "no name of a .jsonl file"),
    case("inspect-data missing.jsonl", 3, "missing.jsonl"),
    case("inspect-data ''", 2, "an empty name is no data set"),
    case("inspect-data ' '", 3, "neither a file here nor"),
    case("inspect-data data/good.jsonl --direction up", 2, "--direction"),
    case("inspect-data data/good.jsonl --max-length 0", 2, "data.max_length"),
    case("inspect-data data/good.jsonl --preset nothing", 2, "unknown preset 'nothing'"),
    case("inspect-data data/good.jsonl --model ./nowhere", 4, "nowhere does not exist"),
    case("inspect-data data/good.jsonl --html nowhere/page.html", 7, "nowhere/page.html", "cannot be written"),
    case("inspect-data data/broken.jsonl", 3, "broken.jsonl:7:16"),
    case("inspect-data data/latin.csv", 3, "latin.csv:3:3"),
    case("inspect-data data/bomb.parquet", 3, "bomb.parquet"),
    case("inspect-data data/columns.csv", 3, "found question, good, bad"),
    case("inspect-data data/words.csv", 0, "2 preference pairs", "nan", "NULL"),
    case("inspect-data data/mark.csv", 0, "prompt, chosen, rejected"),
    case("inspect-data data/flipped.jsonl", 0, "they cancel"),
    case("inspect-data data/same.jsonl", 0, "repeat an earlier row"),
    case("inspect-data data/escape.jsonl", 0, "hold control, zero-width or bidirectional characters"),
    case("inspect-data data/equal.csv", 0, "training refuses the data"),
    case("inspect-data data/good.jsonl --model models/untold", 4, "no chat template", light=False),
    case("inspect-data data/good.jsonl --model models/padless", 0, "tokens", light=False),
    case("inspect-data data/good.jsonl --model models/endless", 4, "no end token", light=False),
    case("inspect-data data/good.jsonl --model models/no-tokenizer", 4, "cannot load the tokenizer", light=False),
    case(
        "inspect-data data/good.jsonl --model models/whole --max-length 8", 0, "training refuses the data", light=False
    ),
    case("presets frobnicate", 2, "frobnicate"),
    case("presets show", 2, "name"),
    case("presets show nothing", 2, "unknown preset 'nothing'", "demo-left"),
    case("presets show Demo-Left", 2, "unknown preset 'Demo-Left'", "did you mean 'demo-left'"),
    case("presets show ~nobody-here/mine.toml", 2, "~nobody-here"),
    case("presets validate nowhere.toml", 2, "nowhere.toml"),
    case("presets validate data", 2, "data", "directory"),
    case("presets export nothing", 2, "unknown preset 'nothing'"),
    case("presets export demo-left -o data/good.jsonl", 7, "good.jsonl", "exists"),
    case("presets export demo-left -o nowhere/mine.toml", 7, "nowhere/mine.toml"),
    case("measure", 2, "model"),
    case("measure '' -o fresh", 4, "an empty name is no model"),
    case("measure ./nowhere -o fresh", 4, "nowhere does not exist"),
    case("measure 'two words' -o fresh", 4, "two words"),
    case("measure half -o fresh", 4, "has no adapter/"),
    case("measure adapters/rank -o fresh", 4, "r = 4096"),
    case("measure models/whole --adapter ./nowhere -o fresh", 4, "no directory nowhere"),
    case("measure run --adapter adapters/whole -o fresh", 2, "--adapter", "holds an adapter already"),
    case("measure demo --instrument nothing -o fresh", 3, "no instrument nothing", "politune-core"),
    case("measure demo --instrument politune-core --instrument politune-core -o fresh", 2, "the same name"),
    case("measure demo --asker centre -o fresh", 2, "--asker", "centre"),
    case("measure demo --preset huge -o fresh", 2, "--preset", "huge"),
    case("measure demo --seed -1 -o fresh", 2, "--seed"),
    case("measure demo --dtype float16 -o fresh", 2, "--dtype", "float16"),
    case("measure ~nobody-here/run -o fresh", 2, "~nobody-here", "home directory"),
    case("measure demo --instrument ~nobody-here/items.csv -o fresh", 2, "~nobody-here", "home directory"),
    case(f"measure demo -o {LONG}", 7, LONG[:100], "too long"),
    case("measure demo -o full", 7, "full is not empty"),
    case("measure demo -o data/good.jsonl", 7, "good.jsonl"),
    case("compare run", 2, "tuned"),
    case("compare nowhere full", 3, "nowhere holds no measurement"),
    case("compare odd odd", 3, "odd/measurement.json is damaged"),
    case("compare data/good.jsonl data/good.jsonl", 3, "good.jsonl holds no measurement"),
    case("ask", 2, "model"),
    case("ask ''", 4, "an empty name is no model"),
    case("ask demo --question ' '", 2, "--question"),
    case("ask ./nowhere", 4, "nowhere does not exist"),
    case("ask demo --temperature 11", 2, "--temperature 11"),
    case("ask demo --temperature nan", 2, "--temperature nan"),
    case("ask demo --temperature warm", 2, "--temperature"),
    case("ask demo --samples 0", 2, "--samples"),
    case("ask demo --samples 2", 2, "--samples", "--temperature 1"),
    case("ask demo --max-new-tokens 0", 2, "--max-new-tokens 0"),
    case("ask demo --prompts politune-core", 3, "politune-core has no open requests"),
    case("ask demo --prompts nothing", 3, "no instrument nothing"),
    case("ask demo -o full", 7, "full is not empty"),
    case("ask models/whole --adapter adapters/rank", 4, "r = 4096"),
    case("ask ~nobody-here/run", 2, "~nobody-here", "home directory"),
    case(f"ask demo -o {LONG}", 7, LONG[:100], "too long"),
    case("study", 2, "study"),
    case("study nothing", 2, "no study nothing", "demo"),
    case("study data", 2, "no study data", "directory"),
    case("study ~nobody-here/study.toml", 2, "~nobody-here", "home directory"),
    case(f"study demo --run 0 -o {LONG}", 7, LONG[:100], "too long"),
    case("study demo --run 99 -o fresh", 2, "--run", "99"),
    case("study demo --run first -o fresh", 2, "--run"),
    case("study demo --run 0 -o full", 7, "full is not empty"),
    case("study demo --run 0 -o data/good.jsonl", 7, "good.jsonl"),
    case("instruments frobnicate", 2, "frobnicate"),
    case("instruments show nothing", 3, "no instrument nothing", "politune-core"),
    case("instruments check politune-core --against nothing.jsonl", 3, "nothing.jsonl"),
    case("instruments check politune-core --against ''", 2, "--against"),
    case("instruments import pears a -o b.jsonl", 2, "pears", "pairs"),
    case("instruments import pairs data/good.jsonl", 2, "--output"),
    case("instruments import pairs nothing.csv -o b.jsonl", 3, "cannot read nothing.csv"),
    case("instruments import pairs data/words.csv -o b.jsonl", 3, "words.csv:2", "left and right"),
    case("instruments import propositions instruments/items.csv -o b.jsonl", 3, "items.csv:2", "sideways"),
    case("instruments import 8values instruments/8.json -o b.jsonl", 3, "question 1", "effect"),
    case("doctor extra", 2, "unexpected extra argument", "extra"),
    case("presets", 0, before=_take_home_and_streams),
)
"""Whole command lines, of all commands."""

HUBS = ((5, "gated, terms not accepted", ""), (4, "not there", ""), (4, "", "--revision v9"), (6, "429", ""))
"""Exit codes, what befalls the Hub, and further flags."""
RUNS: tuple[Case, ...] = (
    _run("--max_length 8 --output_dir too-long", 3, "max_length"),
    _run("--max_length 21 --output_dir shortened", 0, "of 40 rows"),
    _run("--output_dir no-room", 7, "no-room needs", "its disk has", before=_fill_the_disk),
    _run("--output_dir filled", 7, "filled is full", "--resume", before=_fill_the_disk_in_a_save),
    _run("--use_wandb --output_dir unknown", 5, "Weights & Biases", before=_hand_a_wrong_login),
    _run("--output_dir pressed", 130, "step 2 of 2", "--resume", before=partial(die_in_step, 2, signal.SIGINT)),
    _run("--output_dir ended", 143, "step 2 of 2", "--resume", before=partial(die_in_step, 2, signal.SIGTERM)),
    _run("--output_dir crowded", 8, "out of memory", before=partial(numbers.run_out, "step 1", numbers.WORDS[0])),
    _run("--output_dir diverged", 8, "not a finite number", before=partial(numbers.put_in, "loss", "nan", 2)),
    *(
        _run(f"--model_name_or_path no/such --output_dir hub-{code}-{number} {more}", code, "no/such",
             before=partial(_ask_a_hub, kind))
        for number, (code, kind, more) in enumerate(HUBS)
    ),
)  # fmt: skip
"""Runs of a two-layer model, most of which train or ask a Hub before they end."""

CASES: tuple[Case, ...] = (
    *COMMANDS,
    *RUNS,
    *(case(f"{DRY} {flags}", 2, *words) for flags, words in FLAGS),
    *(case(f"train sft --preset demo-sft --dry-run {flags}", 2, *words) for flags, words in SFT_FLAGS),
    *(case(f"presets validate presets/{name}", 2, *words) for name, (_, words) in PRESETS.items()),
    *(
        case(f"train dpo --preset presets/{name} --dry-run", 2, *words)
        for name, (_, words) in list(PRESETS.items())[:8]
    ),
    *(case(f"{DRY} --dataset_name data/{name}", 3, name, *words) for name, (_, words) in DATA.items()),
    *(case(f"{DRY} --model_name_or_path models/{name}", 4, name, *words) for name, (_, words) in MODELS.items()),
    *(
        case(f"merge adapters/{name} -o merged-{name}", 4, *words, light=not heavy)
        for name, (_, words, *heavy) in ADAPTERS.items()
    ),
    *(case(f"instruments check instruments/{name}", 3, name, *words) for name, (_, words) in INSTRUMENTS.items()),
    *(case(f"study studies/{name} --run 0 -o fresh", 2, *words) for name, (_, words) in STUDIES.items()),
)

ROWS: dict[int, tuple[str, ...]] = {
    1: ("--preset demo-lft",),
    2: ("presets/unknown.toml",),
    3: ("--beta high", "presets/text.toml"),
    4: ("presets/again.toml",),
    5: ("presets/rate.toml", "presets/word.toml", "presets/zero.toml", "presets/clock.toml"),
    6: (
        "--learning_rate 0",
        "--learning_rate -1e-4",
        "--learning_rate nan",
        "--learning_rate inf",
        "--learning_rate 2",
    ),
    7: ("--beta 0", "--beta -0.1", "--beta nan"),
    8: ("--lora_r 0", "--lora_alpha 0", "--lora_dropout 1.0", "--lora_dropout -0.1"),
    9: ("--num_train_epochs 0", "--per_device_train_batch_size 0", "--gradient_accumulation_steps 0", "--max_steps 0"),
    10: ("--max-length 0", "--max_length 7", "--max_prompt_length 512"),
    11: (
        "--use_4bit --use_8bit",
        "--bf16 --fp16",
        "--num_train_epochs 3 --max_steps 5",
        "presets/lengths.toml",
    ),
    12: ("--lora_dropout 0.1",),
    13: ("--lora_target_modules lm_head", "--lora_target_modules q_porj"),
    14: ("--dry-run --use_4bit",),
    16: ("demo-left --use_4bit",),
    17: ("demo-left --output_dir full",),
    18: ("--output_dir data/good.jsonl", "--output_dir data/good.jsonl/run", "--output_dir /proc/nowhere"),
    19: ("--output_dir no-room",),
    20: ("--output_dir filled",),
    21: ("--output_dir held",),
    22: ("--dataset_name data/nowhere.jsonl",),
    23: ("data/empty.jsonl", "data/header.csv", "data/blank.jsonl"),
    24: ("data/columns.csv",),
    25: ("data/null.jsonl",),
    26: ("data/words.csv",),
    27: ("data/number.jsonl",),
    28: ("data/equal.csv",),
    29: ("data/white.csv",),
    30: ("data/broken.jsonl",),
    31: ("data/array.jsonl", "data/cut.jsonl"),
    32: ("data/mark.csv",),
    33: ("data/latin.csv", "data/wide.csv"),
    34: ("data/same.jsonl", "data/flipped.jsonl"),
    35: ("data/half.jsonl", "data/escape.jsonl"),
    36: ("data/mixed.jsonl",),
    37: ("--output_dir too-long",),
    38: ("--output_dir shortened",),
    39: ("data/huge.jsonl", "data/bomb.parquet"),
    40: ("data/rows.zip", "data/rows.pkl", "data/load.py", "--dataset_name data"),
    41: ("--output_dir unreached --model_name_or_path no/such",),
    42: ("--output_dir hub-5-0",),
    43: ("--output_dir hub-4-1",),
    44: ("--output_dir hub-4-2 --revision v9",),
    45: ("--output_dir hub-6-3",),
    46: ("models/code",),
    47: ("models/pickles",),
    48: ("--model models/untold",),
    49: ("--model models/padless", "--model models/endless"),
    50: ("adapters/no-config -o merged-no-config", "adapters/no-weights -o merged-no-weights"),
    51: ("adapters/ia3 -o merged-ia3", "adapters/code -o merged-code", "adapters/json -o merged-json"),
    52: ("--base models/other -o merged", "adapters/shape -o merged-shape"),
    53: ("--base models/packed -o merged",),
    54: ("run -o run/adapter", "adapters/whole -o link"),
    55: ("adapters/nan -o merged-nan",),
    56: ("--use_wandb --output_dir unknown",),
    57: ("--output_dir fresh --resume", "--output_dir full --resume"),
    58: ("--output_dir pressed", "--output_dir ended"),
    59: ("--output_dir crowded",),
    60: ("--output_dir diverged",),
    61: ("politune presets",),
}
"""The ends of the command lines of each kind of bad input, by its number in the design's list of 61."""
NOT_HAD = {15: "every CPU computes bfloat16, and no GPU without it is at hand"}
