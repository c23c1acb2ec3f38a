"""Data from the Hub: which files are read, at which commit, and what every way of failing is called.

The Hub is a stand-in on this machine that speaks the few requests of its protocol. Its address is read when
`huggingface_hub` is imported, so all questions are put to it by one other process, and the tests look at the answers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from politune.config import DataSpec
from politune.data import hub
from politune.errors import DataError, HubError

COMMIT = "c0ffee" + "0" * 34
CSV = "prompt,chosen,rejected\np,None,NA\n"
LINE = '{"prompt": "%s", "chosen": "c", "rejected": "r"}\n'
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/a-*
  - split: test
    path: data/b.jsonl
---
"""
REPOSITORIES: dict[str, dict[str, str]] = {
    "scale-lab/politune-left": {"README.md": "# A card\n", "train.csv": CSV},
    "owner/one": {"anything.json": "[" + LINE % "q" + "]"},
    "owner/splits": {"train.jsonl": LINE % "train", "test.jsonl": LINE % "test"},
    "owner/column": {"train.jsonl": LINE.replace("}", ', "split": "x"}') % "p"},
    "owner/shards": {f"data/train-0000{i}-of-00002.jsonl": LINE % i for i in range(2)},
    "owner/card": {"README.md": CARD, "data/a-1.jsonl": LINE % "a1", "data/a-2.jsonl": LINE % "a2"}
    | {"data/b.jsonl": LINE % "b", "notes.csv": "x\n1\n"},
    "owner/broken": {"train.csv": "prompt,chosen\np\n"},
    "owner/gated": {"train.csv": CSV},
    "owner/vanished": {"train.csv": CSV},
    "owner/cut": {"train.csv": CSV},
    "owner/moving": {"train.csv": CSV},
}


@dataclass
class StandIn:
    """The Hub's answers to the look-up of a repository and to the request for one of its files."""

    requests: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(path)
        if status := re.search(r"owner/status-(\d+)", path):
            return int(status[1]), {}, b""
        if look_up := re.fullmatch(r"/api/datasets/([^/]+(?:/[^/]+)?)(?:/revision/([^/]+))?", path):
            return self.repository(look_up[1], look_up[2] or "main")
        if listing := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+", path):
            files = REPOSITORIES[listing[1]]
            entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            return 200, {}, json.dumps(entries).encode()
        if file := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(file[1], file[3])
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def repository(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        if repo not in REPOSITORIES:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        siblings = [{"rfilename": name} for name in REPOSITORIES[repo]]
        return 200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()

    def file(self, repo: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if repo == "owner/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repo == "owner/vanished":
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = REPOSITORIES[repo][name].encode()
        commit = "d" * 40 if repo == "owner/moving" else COMMIT
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{repo}{name}"'.replace("/", "-")}, body


@pytest.fixture(scope="module")
def stand_in() -> Iterator[tuple[StandIn, str]]:
    hub_itself = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub_itself.answer(self.path.split("?")[0])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:10] if "owner/cut/resolve" in self.path else body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub_itself, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


QUESTIONS: dict[str, dict[str, Any]] = {
    name: {"dataset_name": name} for name in (*REPOSITORIES, "owner/nothing", "stance", "owner/status-500", "owner/status-429")
} | {
    "test split": {"dataset_name": "owner/splits", "dataset_split": "test"},
    "test split of card": {"dataset_name": "owner/card", "dataset_split": "test"},
    "no such split": {"dataset_name": "owner/card", "dataset_split": "dev"},
    "at commit": {"dataset_name": "owner/one", "dataset_revision": COMMIT},
    "no such revision": {"dataset_name": "owner/one", "dataset_revision": "v9"},
    "cached": {"dataset_name": "scale-lab/politune-left", "offline": True},
    "cached at commit": {"dataset_name": "scale-lab/politune-left", "dataset_revision": COMMIT, "offline": True},
    "cached by card": {"dataset_name": "owner/card", "offline": True},
    "not cached": {"dataset_name": "owner/never", "offline": True},
}  # fmt: skip
ASK = """
import json, sys, time
time.sleep = lambda seconds: None  # the client waits between its retries
from politune.config import DataSpec
from politune.data import sources
from politune.errors import PolituneError
answers = {}
for name, fields in json.load(sys.stdin).items():
    offline = fields.pop("offline", False)
    try:
        table = sources.load(DataSpec(**fields), offline=offline)
        answers[name] = {"rows": table.rows, "revision": table.revision, "generator": table.generator, "lines": table.lines}
    except PolituneError as error:
        answers[name] = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(answers))
"""


def ask(endpoint: str, home: Path, questions: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(questions),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def answers(stand_in: tuple[StandIn, str], home: Path) -> dict[str, dict[str, Any]]:
    return ask(stand_in[1], home, QUESTIONS)


def prompts(answer: dict[str, Any]) -> list[str]:
    assert "error" not in answer, answer
    return [row["prompt"] for row in answer["rows"]]


def test_the_text_none_survives_a_csv_on_the_hub(answers: dict[str, dict[str, Any]]) -> None:
    answer = answers["scale-lab/politune-left"]
    assert answer["rows"] == [{"prompt": "p", "chosen": "None", "rejected": "NA"}]
    assert (answer["revision"], answer["generator"], answer["lines"]) == (COMMIT, "Llama3-70B", [2])


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("owner/one", ["q"]),
        ("at commit", ["q"]),
        ("owner/splits", ["train"]),
        ("test split", ["test"]),
        ("owner/column", ["p"]),
        ("owner/shards", ["0", "1"]),
        ("owner/card", ["a1", "a2"]),
        ("test split of card", ["b"]),
        ("cached", ["p"]),
        ("cached at commit", ["p"]),
        ("cached by card", ["a1", "a2"]),
    ],
)
def test_the_files_of_the_split_are_read(answers: dict[str, dict[str, Any]], question: str, found: list[str]) -> None:
    assert prompts(answers[question]) == found
    assert answers[question]["revision"] == COMMIT


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        ("owner/gated", "MachineError", r"gated.*https://huggingface.co/datasets/owner/gated.*hf auth login"),
        ("owner/nothing", "DataError", r"knows no data set owner/nothing, or it is private.*hf auth login.*\./name"),
        ("stance", "DataError", "did you mean stances"),
        ("no such revision", "DataError", "data.dataset_revision: owner/one has no revision 'v9'"),
        ("no such split", "DataError", "owner/card has no split 'dev'; it has test, train"),
        ("owner/broken", "DataError", "owner/broken/train.csv:2: 1 cells in a row of 2 columns"),
        ("owner/vanished", "DataError", "a file of owner/vanished is gone"),
        ("owner/status-500", "HubError", "answered 500.*--offline"),
        ("owner/status-429", "HubError", "answered 429.*try again"),
        ("owner/moving", "HubError", "owner/moving changed on the Hub while it was being fetched"),
        ("owner/cut", "HubError", "the Hub did not deliver"),
        ("not cached", "HubError", "owner/never .revision main. is not in the cache"),
    ],
)
def test_every_failure_says_what_to_do(
    answers: dict[str, dict[str, Any]], question: str, error: str, message: str
) -> None:
    assert answers[question].get("error") == error, answers[question]
    assert re.search(message, answers[question]["message"]), answers[question]["message"]


def test_offline_asks_nobody(stand_in: tuple[StandIn, str], home: Path, answers: dict[str, dict[str, Any]]) -> None:
    del answers  # it filled the cache
    hub_itself, endpoint = stand_in
    before = len(hub_itself.requests)
    again = ask(endpoint, home, {"one": {"dataset_name": "owner/one", "offline": True}})
    assert prompts(again["one"]) == ["q"]
    assert len(hub_itself.requests) == before


def test_half_of_a_split_in_the_cache_is_not_the_split(
    home: Path, answers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The card says which files make the split; a fetch that was killed left one of the two."""
    del answers  # it filled the cache
    shutil.copytree(home, tmp_path / "hf", symlinks=True)
    next(tmp_path.glob("hf/hub/datasets--owner--card/snapshots/*/data/a-2.jsonl")).unlink()
    answer = ask("http://127.0.0.1:9", tmp_path / "hf", {"one": {"dataset_name": "owner/card", "offline": True}})["one"]
    assert (answer.get("error"), "is not in the cache" in answer.get("message", "")) == ("HubError", True), answer


def test_nobody_answers(home: Path) -> None:
    """Port 9 of this machine refuses the connection at once."""
    answer = ask("http://127.0.0.1:9", home, {"one": {"dataset_name": "owner/one"}})["one"]
    assert (answer["error"], "--offline" in answer["message"]) == ("HubError", True)


# --- which files -----------------------------------------------------------------------------------------------------


def chosen(split: str, *files: str) -> list[str]:
    spec = DataSpec(dataset_name="owner/name", dataset_split=split)
    return hub._Snapshot(COMMIT, files, Path).files_of(spec)


@pytest.mark.parametrize(
    ("split", "files", "found"),
    [
        ("train", ["train.csv", "test.csv", ".hidden.csv", "dataset_infos.json"], ["train.csv"]),
        ("train", ["data/train-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"], None),
        ("train_sft", ["data/train-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"], None),
        ("train", ["pretraining.csv", "constraints.csv"], ["constraints.csv", "pretraining.csv"]),
        ("train", ["en/train/a.json", "en/validation/a.json"], ["en/train/a.json"]),
        ("test", ["anything.csv"], []),
        ("train", ["a.csv", "b.json"], []),
        ("train", ["test.csv"], []),
        ("train", ["pictures.zip"], []),
    ],
)
def test_files_are_chosen_by_their_names(split: str, files: list[str], found: list[str] | None) -> None:
    """None: the one shard whose name is exactly the split."""
    expected = [f"data/{split}-00000-of-00001.parquet"] if found is None else found
    assert chosen(split, *files) == expected


def test_half_of_the_shards_are_not_the_data() -> None:
    with pytest.raises(HubError, match="only 1 of 2 files of owner/name are in the cache"):
        chosen("train", "train-00001-of-00002.csv")


def test_other_layouts_are_left_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of text files: `datasets` is asked at the commit, and its rows are taken as they are."""
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(name: str, **options: Any) -> datasets.Dataset:
        asked.update(options, name=name)
        return datasets.Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r", "score": 1.0}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = hub.read_with_datasets(DataSpec(dataset_name="owner/name"), COMMIT)
    assert asked == {"name": "owner/name", "revision": COMMIT, "split": "train"}
    assert read.columns == ("prompt", "chosen", "rejected", "score")
    assert read.rows == [{"prompt": "p", "chosen": "c", "rejected": "r"}]


def test_all_texts_are_those_within_lists_and_objects_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    row = {"question": "q", "choices": ["a", "b"], "of": {"turns": [{"content": "c"}]}, "score": 1.0, "picture": b"x"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row]))
    read = hub.read_with_datasets(DataSpec(dataset_name="owner/name"), COMMIT, all_texts=True)
    assert [list(each) for each in read.rows] == [["question", "choices", "of"]]


def test_what_datasets_cannot_read_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ValueError("Config name is missing")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="cannot be read: Config name is missing"):
        hub.read_with_datasets(DataSpec(dataset_name="owner/name"), COMMIT)


# --- in this process -------------------------------------------------------------------------------------------------

SPEC = DataSpec(dataset_name="owner/name")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the Hub's client gives, to be changed."""
    given = {"commit": COMMIT, "listing": ["train.csv"]}

    def tree(*_: Any, **__: Any) -> list[SimpleNamespace]:
        if given["listing"] is None:
            raise CachedRepoTreeNotFoundError
        return [SimpleNamespace(path=name) for name in given["listing"]]

    def info(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(sha=given["commit"], siblings=[SimpleNamespace(rfilename="train.csv")])

    (tmp_path / "train.csv").write_text(CSV)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "train.csv"))
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", tree)
    return given


def test_an_answer_without_a_commit_is_not_the_hubs(client: dict[str, Any]) -> None:
    client["commit"] = None
    with pytest.raises(HubError, match="what answers for owner/name is not the Hub"):
        hub.fetch(SPEC, offline=False)


def test_a_commit_that_is_made_meanwhile_is_said(client: dict[str, Any]) -> None:
    with pytest.raises(HubError, match="changed on the Hub while it was being fetched"):
        hub.fetch(SPEC, offline=False)


def test_a_cache_without_a_listing_could_be_a_part(client: dict[str, Any]) -> None:
    client["listing"] = None
    with pytest.raises(HubError, match="does not say which files owner/name has"):
        hub.fetch(SPEC, offline=True)


def test_a_file_that_only_the_listing_has_is_not_cached(client: dict[str, Any]) -> None:
    client["listing"] = ["train.jsonl"]
    with pytest.raises(HubError, match="is not in the cache"):
        hub.fetch(SPEC, offline=True)


def test_a_network_that_fails_is_said() -> None:
    with pytest.raises(HubError, match="the Hub did not deliver"), hub._hub_errors(SPEC, False):
        raise ConnectionResetError


def test_a_split_that_the_card_does_not_have() -> None:
    declared = [{"config_name": "default", "data_files": [{"split": "test", "path": "b.jsonl"}]}]
    with pytest.raises(DataError, match="has no split 'train'; it has test"):
        hub._declared_files(SPEC, ["b.jsonl"], declared)
