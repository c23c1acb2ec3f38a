"""The README's commands and names exist; nothing of one machine stands in the project's text."""

import re
import subprocess
from pathlib import Path

import pytest

from politune import presets

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked_text() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a checkout")
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_path_of_one_machine_is_committed() -> None:
    pattern = re.compile(r"(?<![\w.])/(root|work|farm|home)/\w")
    found = [
        f"{path.name}:{n}"
        for path in tracked_text()
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_every_preset_stands_in_the_readme() -> None:
    for name in presets.shipped_names():
        short = name.rpartition("-")[2]
        assert name in README or f"-{short}`" in README


def test_relative_links_lead_somewhere() -> None:
    pages = [path for path in tracked_text() if path.suffix == ".md"]
    assert len(pages) > 5
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_counts_of_the_readme_are_those_that_were_counted() -> None:
    section = README.partition("## Reliability")[2].partition("\n## ")[0]
    rows = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    counts = re.findall(r"([\d,]+) of ([\d,]+)", section)
    assert len(counts) >= 8
    for good, of in counts:
        assert f"| {good.replace(',', '')} | {of.replace(',', '')} |" in rows, f"{good} of {of}"
