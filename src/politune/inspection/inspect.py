"""`politune inspect-data`: data sets measured, judged and held against one another and against texts that they must not share."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from politune.config import SHIPPED_DATA, DataSpec, Run
from politune.data import build, leaks, sources
from politune.data import format as rows_format
from politune.data.files import Part, no_rows
from politune.data.texts import hash_texts, prompt_text
from politune.data.workers import in_order
from politune.errors import ConfigError, DataError, PolituneError, safe
from politune.inspection import arms, audit, scan
from politune.inspection.findings import QUESTIONS, DataAudit, Finding
from politune.lean import instruments
from politune.models import load
from politune.progress import Phase
from politune.report import Lines, Section, Table


@dataclass(frozen=True)
class InspectReport:
    """What there is to say of the data sets; `arms` where there are several."""

    datasets: tuple[DataAudit, ...]
    arms: arms.Arms | None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Those of all data sets and of the arms, the weightiest first."""
        found = [finding for each in self.datasets for finding in each.findings]
        found += self.arms.findings() if self.arms else ()
        return tuple(sorted(found, key=lambda finding: -finding.weight))

    @property
    def headline(self) -> str:
        first = self.datasets[0]
        if self.arms:
            names = " and ".join(safe(name, 60) for name in self.arms.names)
            return f"are {names} matched? {self.arms.verdict}"
        said = first.findings[0].text if first.findings else "nothing stands out"
        return f"{first.rows:,} {first.kind} in {safe(first.name)}: {said}"

    def sections(self) -> Sequence[Section]:
        return list(self._sections())

    def _sections(self) -> Iterator[Section]:
        yield self._verdicts()
        for each in self.datasets:
            texts = tuple(finding.text for finding in each.findings) or ("none",)
            yield Lines(f"Findings{self._of(each)}", texts)
        if self.arms:
            yield from self.arms.sections()
        for each in self.datasets:
            for section in each.evidence():
                yield _titled(section, self._of(each))

    def _of(self, each: DataAudit) -> str:
        """What tells the sections of several data sets apart."""
        if self.arms is None:
            return ""
        return f" · {self.arms.names[next(number for number, other in enumerate(self.datasets) if other is each)]}"

    def _verdicts(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for question, asked in QUESTIONS.items():
            if question == "arms":
                rows += [(asked, "", self.arms.verdict)] if self.arms else []
                continue
            for each in self.datasets:
                rows.append((asked, self._of(each).removeprefix(" · "), each.verdict(question)))
        if self.arms is None:
            return Table("Verdicts", ("question", "verdict"), tuple((asked, said) for asked, _, said in rows))
        return Table("Verdicts", ("question", "data", "verdict"), tuple(rows))


def _titled(section: Section, suffix: str) -> Section:
    return replace(section, title=f"{section.title}{suffix}") if suffix else section


def inspect(
    run: Run,
    names: Sequence[str],
    *,
    against: Sequence[str] = (),
    sample_rows: int = scan.SAMPLE_ROWS,
    tokenizer_asked_for: bool = False,
    offline: bool = False,
    say: Callable[[str], None],
) -> InspectReport:
    """The audit of data sets as a run's settings would train them, in tokens where the tokenizer of its model is at hand.

    Data that only the other method could train are shown as that method trains them, and a left and a right text
    without a direction as `left`; `say` is told of both.

    Args:
        names: of the data sets, as `data.dataset_name` takes them; without any the run's own, by its recipe where it has one.
        against: data files or instruments that the rows must share nothing with.
        sample_rows: how many rows are looked at as texts.
        tokenizer_asked_for: fetch the tokenizer, and fail where it cannot be had; otherwise take it only from this machine.

    Raises:
        PolituneError: the data cannot be had or read.
    """
    base = _base(run, tokenizer_asked_for, offline, say)
    scans: list[scan.Scan] = []
    specs: list[DataSpec] = []
    with tempfile.TemporaryDirectory(prefix="politune-against-") as place:
        indexes = [_index(name, number, Path(place), offline) for number, name in enumerate(against)]
        for name in names or [_own_data(run, offline)]:
            spec, source, method, columns = _opened(run, name, offline, say)
            told = Phase(f"reading {safe(source.name, 60)}", "rows", say)
            seed, paths = run.train.seed, [path for path, _ in indexes]
            scanned = scan.scan(
                source,
                method,
                spec.direction,
                seed,
                sample_rows=sample_rows,
                against=paths,
                columns=columns,
                told=told,
            )
            scans.append(scanned)
            specs.append(spec)
        # A tokenizer takes seconds and memory of its own: what is wrong with the data has been said by now.
        tokenizer = _tokenizer(base, tokenizer_asked_for, run, say)
        held = [(index.name, index.share) for _, index in indexes]
        name = run.model.model_name_or_path
        audits = [
            audit.audit(scanned, spec, tokenizer=tokenizer, base=name, against=held)
            for scanned, spec in zip(scans, specs, strict=True)
        ]
    if len({each.method for each in audits}) > 1:
        raise ConfigError("preference pairs and conversations are no arms of one study", fix="inspect them one by one")
    return InspectReport(tuple(audits), arms.compare(scans, audits) if len(audits) > 1 else None)


def _own_data(run: Run, offline: bool) -> str:
    if run.data.recipe is None:
        return run.data.dataset_name
    return str(build.cached(run.data.recipe, offline=offline)[0])


def _opened(
    run: Run, name: str, offline: bool, say: Callable[[str], None]
) -> tuple[DataSpec, sources.Stream, rows_format.Method, tuple[str, ...]]:
    """(how the data set is read, what it is read from, as which method's rows, the columns of its first part)."""
    spec = run.data.model_copy(update={"dataset_name": name, "recipe": None})
    if name in SHIPPED_DATA and spec.direction is None:
        spec = spec.model_copy(update={"direction": "left"})
    source = sources.stream(spec, offline=offline)
    first = next(iter(source.parts()), None)
    if first is None:
        raise no_rows(source.name, ())
    columns = first.read().columns
    shape = rows_format.Table(columns, [], source.name, "")
    method = _method(run, shape, say)
    return _with_direction(spec, shape, say), source, method, columns


def _method(run: Run, table: rows_format.Table, say: Callable[[str], None]) -> rows_format.Method:
    """The run's own method, where it can read the columns or none can."""
    fitting = rows_format.methods_of(table)
    if not fitting or run.method in fitting:
        return run.method
    say(f"{safe(table.name)} has the columns of `politune train {fitting[0]}`: showing it as {fitting[0]} trains it")
    return fitting[0]


def _with_direction(spec: DataSpec, table: rows_format.Table, say: Callable[[str], None]) -> DataSpec:
    if spec.direction is not None or not rows_format.needs_direction(table):
        return spec
    say(f"{safe(table.name)} holds a left and a right text per row: showing direction left (--direction chooses)")
    return spec.model_copy(update={"direction": "left"})


def _base(run: Run, asked_for: bool, offline: bool, say: Callable[[str], None]) -> load.ResolvedModel | None:
    """The model whose tokenizer counts, None where it is not on this machine and was not asked for."""
    try:
        return load.resolve(run.model, offline=offline or not asked_for, say=say)
    except PolituneError:
        if asked_for:
            raise
        return None


def _tokenizer(base: load.ResolvedModel | None, asked_for: bool, run: Run, say: Callable[[str], None]) -> Any:
    try:
        if base is not None:
            return load.load_tokenizer(base)
    except PolituneError:
        if asked_for:
            raise
    name = safe(run.model.model_name_or_path)
    say(f"counting words only: the tokenizer of {name} is not on this machine (--model {name} fetches it)")
    return None


# --- what the rows are held against ----------------------------------------------------------------------------------


def _index(name: str, number: int, place: Path, offline: bool) -> tuple[Path, leaks.Index]:
    """(the file of an index of the named texts, the index)."""
    index = leaks.build(name, _of_instrument(name) if name in instruments.shipped_names() else _of_data(name, offline))
    if not len(index.prompts) and not len(index.passages):
        raise DataError("holds no text to share", where=safe(name), fix="name a file whose rows hold texts")
    path = place / f"{number}.npz"
    index.save(path)
    return path, index


def _of_instrument(name: str) -> Iterator[tuple[Sequence[int], Sequence[str]]]:
    for item in instruments.load(name).items:
        prompts = getattr(item, "prompts", ()) or (getattr(item, "prompt", ""),)
        yield hash_texts(prompt.strip() for prompt in prompts if prompt), instruments.texts_of(item)


def _of_data(name: str, offline: bool) -> Iterator[tuple[Sequence[int], Sequence[str]]]:
    """All rows of the data set, of whichever split."""
    source = sources.stream(DataSpec(dataset_name=name, direction="left"), offline=offline, all_texts=True)
    for prompts, texts in in_order(_texts_of, source.parts()):
        yield hash_texts(prompts), texts


def _texts_of(part: Part) -> tuple[list[str], list[str]]:
    """(the prompts, all texts) of rows: prompts as a scan of such rows has them, and what is asked in their last turns.

    Of rows that no method trains, as those of most benchmarks, any text may be a prompt.
    """
    read = part.read()
    table = rows_format.Table(read.columns, read.rows, part.name, "")
    texts = [text for row in read.rows for text in _strings(row) if text.strip()]
    methods = rows_format.methods_of(table)
    rows = [row for method in methods for row in scan.readable(method, table, "left", seed=0)]
    asked = [scan.last_turn(row) for row in rows]
    prompts = [text for text in (*(prompt_text(row.prompt) for row in rows), *asked) if text]
    if not methods or len(rows) < len(methods) * len(read.rows):
        prompts += [text.strip() for text in texts]
    return prompts, [*texts, *asked]  # what is asked may be put together of several columns


def _strings(value: object) -> Iterator[str]:
    """Every text within a row."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list | tuple):  # tuples are a parquet file's maps
            left += each
