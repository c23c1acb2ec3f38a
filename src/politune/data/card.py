"""The data card: what a built data set is, for people who find the file without its history."""

import json

from politune.config import PLACEBOS
from politune.data.made import Built, SourceFacts, dropped_text
from politune.record import DIRECTION_WORDS, plain

TAGS = ("politune", "preference-data", "political-steering", "intentionally-biased", "research-only")


def data_card(built: Built) -> str:
    """The Markdown beside the file, the same whenever the same rows were written."""
    lines = [
        *_front_matter(built),
        f"# {plain(built.title) or 'Preference data made by a recipe'}",
        "",
        f"**Preference pairs for research on political bias in language models, meant to tune models {_tuned(built)}.** "
        f"They represent neither facts nor a neutral view.{_synthetic(built)}",
        "",
        f"- Rows: {built.rows:,}, in `{plain(built.file)}` (sha256 `{built.sha256}`).",
        f"- Columns: `prompt`, `chosen`, `rejected` ({_SHAPES[built.shape]}), `id`, `topic`, `source`{_columns(built)}.",
        f"- Made by politune {built.version} from a recipe (sha256 `{built.recipe_sha256}`), which stands in the manifest.",
        "",
        "## Sources",
        "",
        "| source | revision | direction | rows | written | written by | licence | sha256 of the rows |",
        "|---|---|---|---|---|---|---|---|",
        *map(_source_line, built.sources),
        "",
        "## What was done",
        "",
        "| step | rows in | rows out | left out |",
        "|---|---|---|---|",
        *(
            f"| {each.name} | {each.rows_in:,} | {each.rows_out:,} | {_cell(dropped_text(each))} |"
            for each in built.steps
        ),
        "",
        *_placebo(built),
        f"Chosen is the longer answer (in {built.unit}, a tie as half) in {built.before.share:.1%} of the usable rows and in "
        f"{built.after.share:.1%} of those written. Median {built.unit} of prompt, chosen and rejected: "
        f"{built.after.prompt:g}, {built.after.chosen:g}, {built.after.rejected:g}.",
        *_twin(built),
        "",
        *_topics(built),
        "## Intended use and limits",
        "",
        "For research on what preference tuning does to political expression: comparing arms, replicating results, testing "
        "instruments. Not to be used for campaigning, impersonation, covert persuasion, or to tune a model that people talk "
        "to without being told. The answers argue for their side and are no source of facts.",
        "",
        "The licence of each source applies to its rows; where none is named above, it is for the reader to find out.",
        *(f"\nOf who wrote the rows: {plain(note)}." for note in built.notes),
        "",
    ]
    return "\n".join(lines)


_SHAPES = {"text": "texts", "messages": "lists of messages"}


def _front_matter(built: Built) -> list[str]:
    licences = {each.licence for each in built.sources}
    licence = [f"license: {json.dumps(licences.pop())}"] if len(licences) == 1 and None not in licences else []
    return ["---", *licence, "tags:", *(f"- {tag}" for tag in TAGS), "---", ""]


def _synthetic(built: Built) -> str:
    count = sum(each.synthetic for each in built.sources)
    return f" {count:,} of {built.rows:,} rows are synthetic: a language model wrote them." if count else ""


def _columns(built: Built) -> str:
    return "".join(f", `{plain(name)}`" for name in built.columns)


def _tuned(built: Built) -> str:
    return DIRECTION_WORDS.get(built.direction, plain(built.direction))


def _source_line(each: SourceFacts) -> str:
    share = f", share {each.share:g}" if each.share is not None else ""
    cells = (
        f"`{_cell(each.name)}`", _cell(each.revision or "-"), each.direction + share, f"{each.rows:,}", f"{each.written:,}",
        _cell(each.generator or "unknown"), _cell(each.licence or "not named"), f"`{each.sha256}`",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Foreign text for a cell of a table."""
    return plain(text).replace("\\", "\\\\").replace("|", "\\|")


def _placebo(built: Built) -> list[str]:
    found = [each for each in built.sources if each.direction in PLACEBOS]
    return [line for each in found for line in (_turned(each), "")]


def _turned(each: SourceFacts) -> str:
    what = "drawn sides" if each.direction == "shuffled" else "length alone"
    return (
        f"A placebo of {what}: in {each.turned:,} of the {each.written:,} rows of `{_cell(each.name)}` chosen and rejected "
        f"changed places, drawn by seed; {each.written - each.turned:,} stay as they were."
    )


def _twin(built: Built) -> list[str]:
    if not built.twin:
        return []
    names = ", ".join(f"`{_cell(each.name)}`" for each in built.twin)
    return ["", f"Matched row by row in number, by stratum, with a data set made of {names}."]


def _topics(built: Built) -> list[str]:
    if len(built.topics) < 2:
        return []
    rows = [f"| {_cell(name)} | {count:,} |" for name, count in built.topics.items()]
    return ["| topic | rows |", "|---|---|", *rows, ""]
