"""Imports point downwards only, and nothing heavy is imported below the training package."""

import ast
import subprocess
import sys
from pathlib import Path

import politune

ROOT = Path(politune.__file__).parent
# Lowest first; a module may import from its own layer's package and from the ones before it.
LAYERS = [
    ["errors"],
    ["cache", "chance", "hashes", "interrupts", "locks", "progress", "writing"],
    ["config", "fetching"],
    ["report"],
    ["plan", "record"],
    ["presets"],
    ["flags"],
    ["models"],
    ["data"],
    ["preview", "doctor"],
    ["lean"],
    ["inspection"],
    ["selection"],
    ["training"],
    ["study"],
    ["cli"],
    ["__main__"],
]
HEAVY = {"scoring.py", "fused.py"}  # in models: imported by what computes with a loaded model
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """The politune packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "politune":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("politune."):
            found.add(str(node.module).split(".")[1])
    return found - {"__version__"}


def own_package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_downwards() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        own = own_package(path)
        if own == "__init__":
            continue
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in imports_of(path)
            if name != own and RANK[name] >= RANK[own]
        ]
    assert wrong == []


def test_every_package_has_its_place() -> None:
    assert {own_package(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(RANK)


def test_only_the_factory_imports_trl() -> None:
    importers = [path for path in ROOT.rglob("*.py") if "trl" in {name.split(".")[0] for name in modules_of(path)}]
    assert [path.name for path in importers] == ["trainer_factory.py"]


def modules_of(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = set()
    for node in tree:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


def test_light_modules_import_nothing_heavy() -> None:
    """Every module below preview, imported in a fresh interpreter, leaves the heavy libraries out."""
    light = [name for names in LAYERS[:8] for name in names] + ["cli"]
    modules = [
        "politune." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in ROOT.rglob("*.py")
        if own_package(path) in light and path.name not in HEAVY
    ]
    heavy = [
        "torch",
        "transformers",
        "trl",
        "peft",
        "datasets",
        "wandb",
        "accelerate",
        "numpy",
        "pyarrow",
        "huggingface_hub",
        "safetensors",
        "httpx",
    ]
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
