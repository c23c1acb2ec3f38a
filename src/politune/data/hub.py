"""A data set on the Hub: which of its files make the split, at one commit, and what went wrong in fetching them."""

import difflib
import errno
import fnmatch
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from politune import fetching
from politune.config import KNOWN_DIRECTIONS, SHIPPED_DATA, DataSpec
from politune.data.files import is_readable, kind_of
from politune.data.parquet import holds_text
from politune.data.parts import READ_COLUMNS, Budget, Read
from politune.errors import DataError, HubError, MachineError, OutputError, PolituneError, safe

HUB_TIMEOUT_SECONDS = 10.0

CARD = "README.md"
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.\w+")
SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def fetch(spec: DataSpec, offline: bool) -> tuple[list[tuple[Path, str]], str]:
    """The files of `spec.dataset_split` on this disk with their names for messages, and the commit that they are of.

    They are csv, json, jsonl or parquet files, to be read like local ones. There is none where the layout does not tell which
    files make a split (several configurations, loose files of several kinds, other file types): see `read_with_datasets`.

    Raises DataError for a data set, revision or split that is not there, MachineError where a login is asked for,
    OutputError where the cache cannot be written, HubError for everything that may pass.
    """
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    with _hub_errors(spec, offline):
        snapshot = _cached(spec) if offline else _online(spec)
        names = snapshot.files_of(spec)
        return [(snapshot.fetch(name), f"{spec.dataset_name}/{name}") for name in names], snapshot.commit


@dataclass(frozen=True)
class _Snapshot:
    """One commit of a repository: its file names, and how to get one of them onto this disk."""

    commit: str
    files: tuple[str, ...]
    fetch: Callable[[str], Path]

    def files_of(self, spec: DataSpec) -> list[str]:
        """The data files of the split, sorted; empty where the layout does not tell."""
        data = [name for name in self.files if _is_data(name)]
        configs = _declared_configs(self.fetch(CARD)) if CARD in self.files else []
        chosen = _declared_files(spec, data, configs) if configs else _files_by_name(spec.dataset_split, data)
        if len({kind_of(Path(name)) for name in chosen}) != 1:
            return []
        _require_all_shards(spec, chosen)
        return sorted(chosen)


def _online(spec: DataSpec) -> _Snapshot:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    repo, revision = spec.dataset_name, spec.dataset_revision
    info = HfApi().dataset_info(repo, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    if not info.sha:
        raise ValueError("an answer without a commit")
    commit, files = str(info.sha), tuple(sibling.rfilename for sibling in info.siblings or ())
    # Whether or not there is a card: the cache remembers the listing, by which a run offline tells half a split from a whole.
    snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=CARD)

    def download(name: str) -> Path:
        # Asked for by the name of the revision, not by its commit, so that the cache knows that name when offline.
        path = Path(
            hf_hub_download(repo, name, repo_type="dataset", revision=revision, etag_timeout=HUB_TIMEOUT_SECONDS)
        )
        if commit not in path.parts:
            raise HubError(f"{repo} changed on the Hub while it was being fetched", fix="run the same command again")
        return path

    return _Snapshot(commit, files, lambda name: fetching.sound(lambda: download(name), repo, offline=False))


def _cached(spec: DataSpec) -> _Snapshot:
    """What an earlier run left in the Hub's cache at this revision; the cache may lack files that nobody asked for.

    Raises HubError where it does not know which files there are.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    repo, place = spec.dataset_name, {"repo_type": "dataset", "revision": spec.dataset_revision}
    folder = Path(snapshot_download(repo, **place, allow_patterns=CARD, local_files_only=True))
    try:
        files = tuple(entry.path for entry in get_cached_repo_tree(repo, **place))
    except CachedRepoTreeNotFoundError:
        raise HubError(
            f"the cache does not say which files {repo} has, so a part of them could be taken for all",
            where="data.dataset_name",
            fix="run once without --offline, or name one of its files here by its path",
        ) from None

    def find(name: str) -> Path:
        if not (folder / name).exists():
            raise LocalEntryNotFoundError(name)
        return folder / name

    return _Snapshot(folder.name, files, lambda name: fetching.sound(lambda: find(name), repo, offline=True))


def _is_data(name: str) -> bool:
    path = Path(name)
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return is_readable(path) and not hidden and path.name != "dataset_infos.json"


def _declared_configs(readme: Path) -> list[dict[str, Any]]:
    """The configurations in the data card's metadata that name their files."""
    from huggingface_hub import DatasetCard

    try:
        configs = DatasetCard.load(readme, ignore_metadata_errors=True).data.to_dict().get("configs")
    except (OSError, ValueError):  # a card without readable metadata declares nothing
        return []
    return [config for config in configs or [] if isinstance(config, dict) and config.get("data_files")]


def _declared_files(spec: DataSpec, data: Sequence[str], configs: Sequence[dict[str, Any]]) -> list[str]:
    default = [
        config for config in configs if config.get("default") or config.get("config_name") == "default"
    ] or configs
    if len(default) != 1:
        return []
    files = default[0]["data_files"]
    if isinstance(files, str) or not all(isinstance(entry, dict) for entry in files):
        files = [{"split": "train", "path": files}]
    by_split = {str(entry.get("split")): entry.get("path") for entry in files}
    if spec.dataset_split not in by_split:
        raise _no_split(spec, sorted(by_split))
    patterns = by_split[spec.dataset_split]
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
    return [name for name in data if any(fnmatch.fnmatch(name, str(pattern)) for pattern in patterns)]


def _files_by_name(split: str, data: Sequence[str]) -> list[str]:
    """The files whose path holds the split as a word; all of them are `train` where no path holds any split."""
    named = [name for name in data if _names_split(name, split)]
    others = any(_names_split(name, word) for name in data for word in SPLIT_WORDS)
    return named or (list(data) if split == "train" and not others else [])


def _names_split(name: str, split: str) -> bool:
    # `train_sft-00000-of-00002` is a split of its own, not a part of `train`.
    if shard := SHARD.fullmatch(Path(name).name):
        return shard[1] == split
    return re.search(rf"(^|[^a-z0-9]){re.escape(split.lower())}([^a-z0-9]|$)", name.lower()) is not None


def _require_all_shards(spec: DataSpec, names: Sequence[str]) -> None:
    """A cache that an interrupted download left holds a part of the shards, which would train on a part of the data."""
    for name in names:
        if shard := SHARD.fullmatch(Path(name).name):
            have, need = sum(SHARD.sub(r"\1 \3", other) == SHARD.sub(r"\1 \3", name) for other in names), int(shard[3])
            if have < need:
                raise HubError(
                    f"only {have} of {need} files of {spec.dataset_name} are in the cache",
                    fix="run once without --offline",
                )


def _no_split(spec: DataSpec, found: Sequence[str]) -> DataError:
    return DataError(
        f"{spec.dataset_name} has no split {safe(spec.dataset_split)!r}; it has {', '.join(safe(name, 40) for name in found)}",
        where="data.dataset_split",
    )


def read_with_datasets(
    spec: DataSpec, commit: str, offline: bool = False, all_texts: bool = False, more: Collection[str] = ()
) -> Read:
    """The rows of a layout that is not resolved here, by `datasets.load_dataset`, which reads the text "None" in a CSV file as
    a missing value. Raises as `fetch`."""
    import datasets
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    with _hub_errors(spec, offline):
        try:
            data = datasets.load_dataset(spec.dataset_name, revision=commit, split=spec.dataset_split)
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            if isinstance(error, datasets.exceptions.DatasetNotFoundError):
                raise
            raise DataError(
                f"{spec.dataset_name} (split {safe(spec.dataset_split)}) cannot be read: {safe(error)}",
                where="data.dataset_name",
            ) from None
    columns = tuple(data.column_names)
    budget = Budget(spec.dataset_name)
    texts = [column for column, kind in data.features.items() if all_texts and holds_text(kind)]
    wanted = {*READ_COLUMNS, *texts, *more}
    known = data.select_columns([column for column in columns if column in wanted])
    return Read(columns, [budget.spend(dict(row)) for row in known])


@contextmanager
def _hub_errors(spec: DataSpec, offline: bool) -> Iterator[None]:
    """What the Hub's client raises, as what the user can do about it."""
    from huggingface_hub import errors

    try:
        with fetching.asking(spec.dataset_name, offline=offline):
            yield
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError, RuntimeError) as error:
        # RuntimeError: hf_xet, the Hub's transfer library, has no error class of its own.
        raise _explain_hub_error(error, spec) from error
    except (ValueError, TypeError, KeyError, AssertionError) as error:  # the client takes an answer's shape for granted
        raise HubError(
            f"what answers for {spec.dataset_name} is not the Hub",
            where="data.dataset_name",
            fix="check the network and HF_ENDPOINT",
        ) from error


def _explain_hub_error(error: Exception, spec: DataSpec) -> PolituneError:
    from huggingface_hub import errors

    repo, revision = spec.dataset_name, spec.dataset_revision or "main"
    url, where = f"https://huggingface.co/datasets/{repo}", "data.dataset_name"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        fix = f"accept its terms at {url}, then run `hf auth login`"
        return MachineError(
            f"{repo} is gated and you have no access yet", line=fetching.HUB_LOGIN, where=where, fix=fix
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DataError(
            f"{repo} has no revision {safe(revision)!r}", where="data.dataset_revision", fix=f"see {url}/commits/main"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(repo)
    if isinstance(error, errors.HFValidationError):
        return DataError(f"{safe(repo)!r} is no name of a data set on the Hub", where=where, fix="a name is owner/name")
    if status in (401, 403):
        return MachineError(
            f"the Hub refuses access to {repo} ({status})",
            line=fetching.HUB_LOGIN,
            where=where,
            fix=f"run `hf auth login`, and see {url}",
        )
    if status == 404:
        return DataError(
            f"a file of {repo} is gone at revision {safe(revision)}", where=where, fix=f"see {url}/tree/main"
        )
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EDQUOT,
    ):
        return OutputError(
            f"the Hub's cache cannot be written: {error.strerror}", fix="free some space, or set HF_HOME"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        what = f"{repo} (revision {safe(revision)}) is not in the cache, and the Hub was not reached"
        return HubError(what, where=where, fix="run once with a connection and without --offline")
    said = f"answered {status}" if status else f"did not deliver ({type(error).__name__})"
    return HubError(
        f"the Hub {said} for {repo}",
        where=where,
        fix="try again in a while; --offline uses what an earlier run fetched",
    )


def _not_found(repo: str) -> DataError:
    near = difflib.get_close_matches(repo, [*SHIPPED_DATA, *KNOWN_DIRECTIONS], n=1, cutoff=0.75)
    return DataError(
        f"the Hub knows no data set {repo}, or it is private",
        where="data.dataset_name",
        why=f"did you mean {near[0]}?" if near else None,
        fix="check the name; for a private one run `hf auth login`; a local file is written ./name",
    )
