"""Is every check tested? Each is deleted, one at a time, and then at least one test must fail.

A check is a `raise` (deleted; behind `except` the exception itself passes on), a constraint of a field, a choice of words, or a
predicate of the adapter's allow-list. The changed module is made from its syntax tree when it is imported: no file is touched.
Tests run in children of a process that has imported what they need but politune.
"""

import ast
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import bad_inputs
from faults.figures import WORKERS, Figure, count, side_by_side
from faults.lab import Lab

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src" / "politune"
MODULES: dict[str, tuple[str, ...]] = {
    "config.py": ("test_presets.py",),
    "presets/__init__.py": ("test_presets.py",),
    "flags.py": ("test_presets.py",),
    "data/format.py": ("test_format.py",),
    "data/files.py": ("test_sources.py",),
    "data/sources.py": ("test_sources.py",),
    "models/adapter.py": ("test_adapter.py",),
}
"""Where checks stand, and the unit tests of them; the command lines of `bad_inputs` come on top."""
SLOW = "not damaged_files and not printed_command and not shipped_stances"
CONSTRAINTS = ("ge", "gt", "le", "lt", "min_length", "extra", "strict", "allow_inf_nan", "frozen")
LIMIT_SECONDS = 60
MOST_BYTES = 6 * 2**30
SURVIVES, DIES = 0, 1


@dataclass(frozen=True)
class Check:
    """One check: its module, the line that it stands on, what it is, and its number in the module."""

    module: str
    number: int
    line: int
    what: str

    def __str__(self) -> str:
        return f"src/politune/{self.module}:{self.line}: {self.what}"


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    checks = [check for module in MODULES for check in checks_of(module)]
    chosen = checks if whole else checks[7 :: len(checks) // 5][:5]
    with lab.place("validators") as place:
        bad_inputs.lay_out(place, lab.base)
        shares = [chosen[start::WORKERS] for start in range(WORKERS)]
        parts = side_by_side(lambda share: _part(place, share), shares)
    lines = [line for part in parts for line in (part if isinstance(part, list) else [part])]
    yield count(f"one of {len(checks)} checks of input deleted: a test fails", lines)


def _part(place: Path, share: list[Check]) -> Any:
    """Of each check of a share, what is wrong; in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HYPOTHESIS_STORAGE_DIRECTORY": str(place / "hypothesis")}
    asked = json.dumps([[check.module, check.number] for check in share])
    words = [sys.executable, "-m", "faults.validators", str(place), asked]
    done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])
    return json.loads(done.stdout)


def main() -> None:
    """`python -m faults.validators PLACE '[["config.py", 3]]'`."""
    for name in ("pytest", "hypothesis", "pydantic", "typer.testing", "rich.table", "pyarrow.parquet", "jinja2"):
        importlib.import_module(name)
    place, found = Path(sys.argv[1]), list[str | None]()
    asked = [tuple(each) for each in json.loads(sys.argv[2])]
    for module in {module for module, _ in asked}:
        if (ended := _in_a_child(place, module, None)) != SURVIVES:
            raise RuntimeError(f"{module}: the tests fail with nothing deleted ({ended})")
    for module, number in asked:
        ended = _in_a_child(place, module, number)
        good = ended in (DIES, -signal.SIGALRM)
        found.append(None if good else f"{checks_of(module)[number]} is deleted, and no test fails ({ended})")
    sys.stdout.write(json.dumps(found))


def _in_a_child(place: Path, module: str, number: int | None) -> int:
    """The exit code of the tests without a check, or the signal that ended them."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os._exit(_run_tests(place, module, number))
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_tests(place: Path, module: str, number: int | None) -> int:
    signal.alarm(LIMIT_SECONDS)  # without its check a file may be waited for, for ever
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    log = os.open(place / f"log-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    name = ".".join(["politune", *Path(module).with_suffix("").parts]).removesuffix(".__init__")
    if number is not None:
        sys.meta_path.insert(0, _Without(name, SOURCE / module, _tree_without(module, number)))
    import pytest

    tests = [str(TESTS / "unit" / test) for test in MODULES[module]]
    plain = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "-k", SLOW]
    code = int(pytest.main([*plain, *tests]))
    code = code or _run_cases(place, module)
    if number is not None:
        assert getattr(sys.modules[name], "check_deleted", False)
    return code


def _run_cases(place: Path, module: str) -> int:
    from faults.in_process import run_here

    os.chdir(place)
    os.environ |= bad_inputs.HOME
    sys.meta_path.insert(0, _Refuse())
    commands = ("merge", "measure", "ask") if module.startswith("models") else ("train", "presets", "inspect-data")
    cases = [case for case in bad_inputs.CASES if case.light and not case.before and case.words[0] in commands]
    for case in cases:
        if wrong := bad_inputs.complaint(case, run_here(case.words)):
            sys.stdout.write(f"{wrong}\n")  # into the log
            sys.stdout.flush()
            return DIES
    return SURVIVES


class _Refuse(importlib.abc.MetaPathFinder):
    """No library that a refused command needs not: what a missing check lets through goes no further."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] in bad_inputs.HEAVY:
            raise AssertionError(f"heavy import: {name}")


class _Without(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Imports one module from a syntax tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        super().__init__(name, str(path))
        self.tree = tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, fullname: str) -> Any:
        return compile(self.tree, self.path, "exec")


# --- checks and their deletion ---------------------------------------------------------------------------------------


def checks_of(module: str) -> list[Check]:
    """Every check of a module, in the order of its file."""
    tree = ast.parse((SOURCE / module).read_text(encoding="utf-8"))
    return [Check(module, number, line, what) for number, (line, what, _) in enumerate(_deletions(tree, module))]


def _tree_without(module: str, number: int) -> ast.Module:
    tree = ast.parse((SOURCE / module).read_text(encoding="utf-8"))
    _deletions(tree, module)[number][2]()
    tree.body.append(ast.parse("check_deleted = True").body[0])
    return ast.fix_missing_locations(tree)


Deletion = tuple[int, str, Callable[[], None]]


def _deletions(tree: ast.Module, module: str) -> list[Deletion]:
    """(line, what, how it is deleted) of each check."""
    found = [*_raises(tree), *_constraints(tree)]
    found += _choices(tree) if module == "config.py" else []
    found += _predicates(tree) if module == "models/adapter.py" else []
    return sorted(found, key=lambda each: each[:2])


def _raises(tree: ast.Module) -> Iterator[Deletion]:
    """Every `raise` but those of what cannot happen."""
    for node in ast.walk(tree):
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for place, statement in enumerate(body if isinstance(body, list) else []):
                if (
                    isinstance(statement, ast.Raise)
                    and statement.exc
                    and "AssertionError" not in ast.unparse(statement)
                ):
                    instead = ast.Raise() if isinstance(node, ast.ExceptHandler) else ast.Pass()
                    yield statement.lineno, ast.unparse(statement)[:80], _replaced(body, place, instead)


def _replaced(body: Any, place: int, instead: ast.stmt) -> Callable[[], None]:
    def delete() -> None:
        body[place] = instead

    return delete


def _constraints(tree: ast.Module) -> Iterator[Deletion]:
    """Bounds, lengths and functions of a field, and what the schema as a whole refuses."""
    for node in ast.walk(tree):
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if name in ("because", "Field", "ConfigDict"):
            assert isinstance(node, ast.Call)
            for keyword in node.keywords:
                if keyword.arg in CONSTRAINTS:
                    yield keyword.value.lineno, ast.unparse(keyword), _without_keyword(node, keyword)
        elif name == "AfterValidator":
            assert isinstance(node, ast.Call)
            yield node.lineno, ast.unparse(node), _as_plain_field(node)


def _without_keyword(call: ast.Call, keyword: ast.keyword) -> Callable[[], None]:
    return lambda: call.keywords.remove(keyword)


def _as_plain_field(call: ast.Call) -> Callable[[], None]:
    def delete() -> None:
        call.func, call.args = ast.Name("Field", ast.Load()), []

    return delete


def _choices(tree: ast.Module) -> Iterator[Deletion]:
    """`Literal[...]` becomes `str`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
            yield node.lineno, ast.unparse(node)[:80], _as_text(tree, node)


def _as_text(tree: ast.Module, choice: ast.Subscript) -> Callable[[], None]:
    class Text(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            return ast.Name("str", ast.Load()) if node is choice else self.generic_visit(node)

    return lambda: Text().visit(tree)


def _predicates(tree: ast.Module) -> Iterator[Deletion]:
    """Functions that say whether a setting is of its kind agree to everything."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("_is_", "_are_", "_one_of")):
            yield node.lineno, f"def {node.name}", _agreeing(node)


def _agreeing(function: ast.FunctionDef) -> Callable[[], None]:
    def delete() -> None:
        text = "return lambda value: True" if function.name == "_one_of" else "return True"
        function.body[-1] = ast.parse(f"def f():\n    {text}").body[0].body[0]  # type: ignore[attr-defined]

    return delete


if __name__ == "__main__":
    main()
