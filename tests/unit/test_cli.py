"""The command line as a user types it, without torch: help, presets, dry runs, errors and their exit codes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "wandb", "accelerate", "bitsandbytes", "numpy", "pyarrow")
# Fails on the first heavy import, by the name of the module.
GUARD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise AssertionError("heavy import: " + name)
sys.meta_path.insert(0, Refuse())
"""
DPO, SFT = "train dpo --model_name_or_path", "train sft --model_name_or_path"
LLAMA, MISTRAL = "meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2"
LEFT, RIGHT = "--dataset_name scale-lab/politune-left", "--dataset_name scale-lab/politune-right"
LORA = "--lora_r 16 --lora_alpha 32 --bf16 --gradient_checkpointing"
STEPS = "--num_train_epochs {} --per_device_train_batch_size {} --gradient_accumulation_steps {} --learning_rate {}"
RECIPE = f"{STEPS.format(4, 4, 16, '5e-4')} {LORA}"
# The command lines of the original README, their first words replaced.
ORIGINAL = [
    f"{DPO} {LLAMA} {LEFT} --output_dir outputs/llama3-8b-dpo-left {RECIPE}",
    f"{DPO} {LLAMA} {RIGHT} --output_dir outputs/llama3-8b-dpo-right {RECIPE}",
    f"{DPO} {MISTRAL} {LEFT} --output_dir outputs/mistral-7b-dpo-left {RECIPE}",
    f"{DPO} {MISTRAL} {RIGHT} --output_dir outputs/mistral-7b-dpo-right {RECIPE}",
    f"{SFT} {LLAMA} --dataset_name yahma/alpaca-cleaned --output_dir outputs/llama3-8b-sft "
    f"{STEPS.format(2, 8, 8, '3e-4')} {LORA}",
    f"{DPO} {LLAMA} {LEFT} --output_dir outputs/llama3-8b-dpo-left-qlora --use_4bit --bf16 --gradient_checkpointing",
    f"{DPO} {LLAMA} {LEFT} --output_dir outputs/llama3-8b-dpo-left --use_wandb --wandb_project politune "
    "--wandb_run_name llama3-dpo-left --bf16 --gradient_checkpointing",
]
PRESETS = {
    "dpo": ["llama3-left", "llama3-right", "mistral-left", "mistral-right", "demo-left", "demo-right"],
    "sft": ["llama3-sft", "mistral-sft", "demo-sft"],
}
# The seventh original command differs in its trackers only; the sixth in its base's bits.
LIGHT_COMMANDS = [
    "--help",
    "presets",
    "train dpo --help",
    "presets show llama3-left",
    "presets list --json",
    "data annotate --help",
    "presets schema",
    "presets export demo-left",
    "--version",
]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which every heavy import fails and no cache of this machine is seen."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "sitecustomize.py").write_text(GUARD.format(heavy=set(HEAVY)))
    home = folder / "home"
    home.mkdir()
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        "PYTHONDONTWRITEBYTECODE": "",
    }


def run(
    words: str | list[str], environment: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    arguments = words.split() if isinstance(words, str) else words
    return subprocess.run(
        [sys.executable, "-m", "politune", *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_guard_works(guarded: dict[str, str]) -> None:
    """The negative control: an import of numpy fails under the guard."""
    done = subprocess.run([sys.executable, "-c", "import numpy"], env=guarded, capture_output=True, text=True)
    assert "heavy import: numpy" in done.stderr


@pytest.mark.parametrize("words", LIGHT_COMMANDS)
def test_light_commands_import_nothing_heavy(words: str, guarded: dict[str, str]) -> None:
    done = run(words, guarded)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "words", ORIGINAL + [f"train {method} --preset {name}" for method, names in PRESETS.items() for name in names]
)
def test_dry_runs_need_no_network_and_nothing_heavy(words: str, guarded: dict[str, str], tmp_path: Path) -> None:
    done = run([*words.split(), "--dry-run", "--json"], guarded, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["steps"]["steps"] > 0
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize("name", PRESETS["dpo"][:4])
def test_qlora_form_of_a_preset(name: str, guarded: dict[str, str]) -> None:
    plain, quantised = (
        json.loads(run([*f"train dpo --preset {name} --dry-run --json".split(), *extra], guarded).stdout)
        for extra in ([], ["--use_4bit"])
    )
    assert quantised["memory"]["need"]["weights_bytes"] < 0.5 * plain["memory"]["need"]["weights_bytes"]


BAD_FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b" "rejected": "c"}\n',
    "columns.csv": "question,good,bad\na,b,c\n",
    "header.csv": "prompt,chosen,rejected\n",
    "null.jsonl": '{"prompt": "a", "chosen": null, "rejected": "c"}\n',
    "rows.zip": "PK",
    "good.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "lengths.toml": 'method = "dpo"\n[model]\nmodel_name_or_path = "demo"\n[train]\nnum_train_epochs = 3\nmax_steps = 5\n',
    "bad.toml": 'method = "dpo"\n[model]\nmodel_name_or_path = "demo"\n[train]\nlaerning_rate = 1e-4\n',
}
BAD = [
    ("train dpo --preset demo-lft", 2, "demo-left"),
    ("train dpo --preset demo-left --betta 1", 2, "betta"),
    ("train dpo --preset demo-left --beta -1", 2, "inverts the direction"),
    ("train dpo --preset demo-left --beta high", 2, "high"),
    ("train dpo", 2, "model_name_or_path"),
    ("train dpo --preset ./bad.toml", 2, "bad.toml:5"),
    ("train dpo --preset demo-left --max_prompt_length 512", 2, "max_length"),
    ("train dpo --preset demo-left --use_8bit", 2, "use_4bit"),
    ("train dpo --preset demo-left --resume_from_checkpoint x", 2, "--resume"),
    ("train dpo --preset demo-sft", 2, "train sft"),
    ("train dpo --preset demo-left --num_train_epochs 3 --max_steps 5", 2, "give one of them"),
    ("train dpo --preset ./lengths.toml", 2, "lengths.toml:6"),
    ("train dpo --preset demo-left --stop-after nan", 2, "'--stop-after': nan is no number of minutes from 0.1"),
    ("train dpo --preset demo-left --stop-after inf", 2, "'--stop-after': inf"),
    ("train dpo --preset demo-left --stop-after 1e12", 2, "'--stop-after': 1e12"),
    ("train dpo --preset demo-left --stop-after 0.05", 2, "'--stop-after': 0.05"),
    ("presets show nothing", 2, "unknown preset"),
    ("presets validate bad.toml", 2, "did you mean train.learning_rate"),
    ("merge", 2, "PATH"),
    ("trian dpo", 2, "trian"),
    ("inspect-data missing.jsonl", 3, "missing.jsonl"),
    ("inspect-data ./scale-lab/politune-left", 3, "politune-left"),
    ("train dpo --preset demo-left --dataset_name ./empty.jsonl", 3, "empty.jsonl"),
    ("train dpo --preset demo-left --dataset_name broken.jsonl", 3, "broken.jsonl:2"),
    ("train dpo --preset demo-left --dataset_name columns.csv", 3, "question"),
    ("train dpo --preset demo-left --dataset_name header.csv", 3, "header.csv"),
    ("train dpo --preset demo-left --dataset_name null.jsonl", 3, "chosen"),
    ("train dpo --preset demo-left --dataset_name rows.zip", 3, "rows.zip"),
    ("train dpo --preset demo-left --dataset_name good.jsonl --model_name_or_path ./nowhere", 4, "nowhere"),
    ("train dpo --preset demo-left --dataset_name good.jsonl --model_name_or_path ./", 4, "config.json"),
    ("merge ./nowhere", 4, "nowhere"),
    ("merge adapter", 4, "adapter"),
    ("data annotate good.jsonl", 2, "--endpoint"),
    ("data annotate good.jsonl --endpoint http://example.org/v1 --endpoint-model m --key-env HOME", 2, "not encrypted"),
    ("data annotate missing.jsonl --endpoint http://127.0.0.1:1/v1 --endpoint-model m", 3, "missing.jsonl"),
    ("data annotate good.jsonl --endpoint http://127.0.0.1:1/v1 --endpoint-model m --rubric bad.toml", 2, "bad.toml"),
    ("data annotate good.jsonl --model ./nowhere", 4, "nowhere"),
    ("data synth missing.txt -o a.jsonl --endpoint http://127.0.0.1:1/v1 --endpoint-model m", 3, "missing.txt"),
    ("data synth empty.jsonl -o a.txt --endpoint http://127.0.0.1:1/v1 --endpoint-model m", 2, "a.txt"),
    ("train dpo --preset demo-left --output_dir good.jsonl", 7, "good.jsonl"),
    ("train dpo --preset demo-left --output_dir .", 7, "is not empty"),
    ("train dpo --preset demo-left --resume --output_dir fresh", 7, "no run to resume"),
]


@pytest.mark.parametrize(("words", "code", "culprit"), BAD)
def test_errors_name_the_culprit_fast(
    words: str, code: int, culprit: str, guarded: dict[str, str], tmp_path: Path
) -> None:
    """Under the guard, so before anything heavy; one message, no traceback, and within a second of a processor."""
    for name, text in BAD_FILES.items():
        (tmp_path / name).write_text(text)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(words, guarded, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    assert culprit in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_both_spellings_and_lists(guarded: dict[str, str]) -> None:
    plain = "train dpo --preset demo-left --dry-run --json --lora_r 4 --lora_target_modules q_proj v_proj --max_seq_length 128"
    one = run(plain, guarded)
    other = run(
        plain.replace("_r ", "-r ").replace("lora_target", "lora-target").replace("max_seq", "max-seq"), guarded
    )
    assert one.returncode == other.returncode == 0
    kept = ("optimizer_steps", "steps", "tokens", "adapter")
    assert [json.loads(one.stdout).get(key) for key in kept] == [json.loads(other.stdout).get(key) for key in kept]
    assert json.loads(one.stdout)["adapter"]["trainable_parameters"] == 4 * 30 * (576 + 576 + 576 + 192)


@pytest.mark.parametrize("words", ["--max_steps 5", "--num_train_epochs 3 --max_steps -1", "--num_train_epochs 3"])
def test_one_length_of_a_run_is_enough(words: str, guarded: dict[str, str]) -> None:
    """Steps lie over the preset's epochs, which is how a short trial is made; -1 leaves them off."""
    done = run(f"train dpo --preset demo-left --dry-run --json --stop-after 86400 {words}", guarded)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["steps"]["steps"] == 5) == words.endswith("5")


def test_the_printed_command_of_a_short_run_gives_one_length(guarded: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text(BAD_FILES["lengths.toml"].replace("num_train_epochs = 3\n", ""))
    shown = run("presets show ./short.toml --json", guarded, tmp_path)
    words = json.loads(shown.stdout)["command"].split()[1:]
    done = run([*words, "--dataset_name", "stances", "--direction", "left", "--dry-run", "--json"], guarded, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"]["steps"] == 5


def test_a_closed_pipe_is_no_error(guarded: dict[str, str]) -> None:
    """`politune presets schema | head -1` ends without a traceback."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m politune presets schema | head -1"],
        env=guarded,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


def test_hostile_names_cannot_reach_the_terminal(guarded: dict[str, str]) -> None:
    done = run(["train", "dpo", "--preset", "\x1b]8;;http://x\x07[red]bold[/red]\u202e"], guarded)
    assert done.returncode == 2
    assert not any(character in done.stderr for character in "\x1b\x07\u202e")
    assert "[red]bold[/red]" in done.stderr


@pytest.mark.parametrize(("redirection", "code"), [(">&-", 0), ("2>&-", 0), ("<&-", 0), (">/dev/full", 7)])
def test_streams_that_are_not_there(redirection: str, code: int, guarded: dict[str, str]) -> None:
    line = f"{sys.executable} -m politune presets {redirection}"
    environment = {**guarded, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("presets", 0),
        ("presets show demo-left --json", 0),
        ("presets schema", 0),
        ("--version", 0),
        ("--help", 0),
        ("train --help", 0),
        ("instruments check twice.jsonl", 3),
        ("presets show nothing 2>&1", 2),
        ("frobnicate 2>&1", 2),
    ],
)
def test_a_reader_that_leaves_changes_no_exit_code(
    words: str, code: int, guarded: dict[str, str], tmp_path: Path
) -> None:
    about = dict.fromkeys(("name", "version", "license", "language", "attribution", "description"), "x")
    item = {"kind": "pair", "id": "i", "topic": "t", "axis": "a", "left": ["l"], "right": ["r"]}
    lines = map(json.dumps, [{**about, "axes": {"a": ["one", "two"]}}, item, item])
    (tmp_path / "twice.jsonl").write_text("\n".join(lines))
    line = f"{sys.executable} -m politune {words} | true; exit ${{PIPESTATUS[0]}}"
    for unbuffered in ("", "1"):
        environment = {**guarded, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(["bash", "-c", line], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")


def test_a_crash_without_room_for_its_log(guarded: dict[str, str], tmp_path: Path) -> None:
    """No file can be written anywhere, so that there is no temporary directory."""
    (tmp_path / "sitecustomize.py").write_text("from politune import presets\npresets.overview = lambda: 1 / 0\n")
    environment = {**guarded, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    line = f"ulimit -f 0; {sys.executable} -m politune presets"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "bug in politune: ZeroDivisionError" in done.stderr
    assert "traceback could not be written: No usable temporary directory" in done.stderr


def test_a_rank_without_a_world_is_refused(guarded: dict[str, str]) -> None:
    done = run("presets list", {**guarded, "RANK": "1"})
    assert done.returncode == 2
    assert "WORLD_SIZE" in done.stderr


@pytest.mark.parametrize(("name", "value"), [("LANG", "C"), ("HOME", "/nonexistent"), ("LC_ALL", "POSIX")])
def test_poor_environments(name: str, value: str, guarded: dict[str, str]) -> None:
    done = run("presets show mistral-right", {**guarded, name: value})
    assert (done.returncode, done.stderr) == (0, "")


BAD_PRESETS = [
    'method = ["dpo"]\n',
    'method = "dpo"\nmodel = "demo"\n',
    'method = "dpo"\n[model]\nmodel_name_or_path = 3\n',
    "x" * 70_000,
]


@pytest.mark.parametrize("text", BAD_PRESETS)
def test_presets_of_wrong_types(text: str, guarded: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    done = run("presets validate mine.toml", guarded, tmp_path)
    assert done.returncode == 2
    assert "mine.toml" in done.stderr
    assert "Traceback" not in done.stderr
