"""The package: dependencies, bounds, wheel, papers."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import politune

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {Requirement(text).name: Requirement(text) for text in PROJECT["dependencies"]}
# Needed at run time without an import of ours, and by whom.
NEEDED_BY_OTHERS = {
    "bitsandbytes": "transformers' 4-bit loading",
    "gguf": "transformers' GGUF loading (the demo model)",
    "tensorboard": "torch.utils.tensorboard",
}
IMPORT_NAMES = {"huggingface-hub": "huggingface_hub", "scikit-learn": "sklearn"}


def imported() -> set[str]:
    """Top-level names of third-party modules that the package imports anywhere."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"politune"}


def test_dependencies_are_what_is_imported() -> None:
    declared = {IMPORT_NAMES.get(name, name) for name in REQUIREMENTS} - set(NEEDED_BY_OTHERS)
    assert declared == imported()


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_the_installed_version_is_within_its_bounds(name: str) -> None:
    assert REQUIREMENTS[name].specifier.contains(importlib.metadata.version(name), prereleases=True)


@pytest.mark.parametrize("name", ["trl", "transformers", "peft", "accelerate"])
def test_private_behaviour_has_an_upper_bound_on_the_minor_version(name: str) -> None:
    major, minor, *_ = map(int, re.findall(r"\d+", importlib.metadata.version(name)))
    assert not REQUIREMENTS[name].specifier.contains(f"{major}.{minor + 1}.0")


def test_the_constraints_pin_every_dependency_within_its_bounds() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    for name, requirement in REQUIREMENTS.items():
        assert requirement.specifier.contains(pinned[name], prereleases=True), name


def test_python_versions_are_the_ones_of_the_dependencies() -> None:
    """No dependency allows an older Python than the package says, and 3.11 to 3.14 are allowed by all."""
    own = SpecifierSet(PROJECT["requires-python"])
    for version in ("3.11", "3.12", "3.13", "3.14"):
        assert own.contains(version)
        for name in REQUIREMENTS:
            needed = importlib.metadata.metadata(name).get("Requires-Python")
            assert needed is None or SpecifierSet(needed).contains(version), name
    assert not own.contains("3.10")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_presets_and_data(wheel: Path, tmp_path: Path) -> None:
    """Installed from the wheel into an empty folder, the package lists its presets and reads its data."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel)],
        check=True,
        capture_output=True,
    )
    code = (
        "import politune, politune.presets as p, politune.data.sources as s; from politune.config import DataSpec;"
        "t = s.load(DataSpec(dataset_name='stances', direction='left'));"
        "print(politune.__file__); print(len(p.shipped_names()), len(t.rows), politune.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    place, figures = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path)
    assert figures.split()[0] == "9"
    assert int(figures.split()[1]) >= 104
    assert figures.split()[2] == politune.__version__


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("politune/", f"politune-{politune.__version__}.dist-info/")) for name in names)
    assert wheel.stat().st_size < 1_000_000


def test_the_citation_names_the_paper() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    for part in ("Agiza", "Mostagir", "Reda", "2404.08699", "2024"):
        assert part in text
