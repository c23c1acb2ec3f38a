"""Is every check tested? Each is deleted, one at a time, and then at least one test must fail.

A check is a `raise` (deleted; behind `except` the exception itself passes on), a constraint of a field, a choice of words, a
predicate of the adapter's allow-list, or a flaw of a checkpoint that is told in words. The changed module is made from its
syntax tree when it is imported: no file is touched.
Tests run in children of a process that has imported what they need but politune.

A chance must not stand for a test: hypothesis draws the same examples each time, and tests that do not end in time are run once
more, alone and for longer.
"""

import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import bad_inputs
from faults.figures import Figure, count, side_by_side
from faults.lab import Lab

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src" / "politune"
MODULES: dict[str, tuple[str, ...]] = {
    "config.py": ("unit/test_presets.py", "unit/test_recipe.py"),
    "presets/__init__.py": ("unit/test_presets.py", "unit/test_recipe.py"),
    "flags.py": ("unit/test_presets.py",),
    "data/format.py": ("unit/test_format.py",),
    "data/files.py": ("unit/test_sources.py",),
    "data/parquet.py": ("unit/test_sources.py",),
    "data/parts.py": ("unit/test_sources.py", "unit/test_hub.py"),
    "data/sources.py": ("unit/test_sources.py",),
    "data/hub.py": ("unit/test_hub.py",),
    "inspection/scan.py": (
        "unit/test_scan.py::test_what_changed_since_is_refused",
        "unit/test_scan.py::test_what_grew_since_is_refused",
        "unit/test_scan.py::test_splits",
        "unit/test_scan.py::test_what_changes_before_it_is_held_against_other_splits_is_refused",
        "unit/test_scan.py::test_data_of_which_no_row_can_be_read_are_refused",
        "unit/test_scan.py::test_parts_of_another_shape_are_refused",
    ),
    "fetching.py": ("unit/test_fetching.py",),
    "locks.py": ("unit/test_study.py",),
    "study/spec.py": ("unit/test_study.py",),
    "lean/instruments.py": ("unit/test_instruments.py",),
    "lean/importers.py": ("unit/test_importers.py",),
    "study/work.py": ("unit/test_study.py",),
    "training/directory.py": (),
    "training/checkpoints.py": ("unit/test_checkpoints.py",),
    "models/seal.py": ("unit/test_checkpoints.py", "unit/test_adapter.py"),
    "models/adapter.py": ("unit/test_adapter.py",),
    "models/files.py": (
        "tiny/test_load.py::test_a_damaged_checkpoint_is_refused_before_loading",
        "tiny/test_load.py::test_weights_that_cannot_be_opened",
        "tiny/test_merge.py::test_a_disk_that_fills_up_leaves_nothing",
        "tiny/test_merge.py::test_too_little_memory_and_too_little_disk",
        "tiny/test_merge.py::test_the_output_is_new_or_empty",
    ),
    "models/load.py": ("tiny/test_load.py",),
    "models/merge.py": ("tiny/test_merge.py",),
    "training/identity.py": ("unit/test_record.py",),
    "training/session.py": (
        "tiny/test_train.py::test_training_that_ended_early_is_not_exported",
        "tiny/test_train.py::test_what_must_not_be_exported",
        "tiny/test_train.py::test_a_model_of_unknown_shape_is_asked_itself",
        "tiny/test_train.py::test_a_scaler_in_a_checkpoint_is_nobodys",
        "tiny/test_train.py::test_a_model_that_is_shared_out_is_not_measured_on_the_way",
        "tiny/test_train.py::test_a_signal_in_training_exports_nothing",
    ),
}
"""Where checks stand, and the tests of them. Where no test needs torch, the command lines of `bad_inputs` come on top."""
SOME = (("config.py", 7), ("config.py", 50), ("data/files.py", 3), ("models/adapter.py", 5), ("models/adapter.py", 20))
COMMANDS = {
    "models": ("merge", "measure", "ask"),
    "lean": ("instruments", "measure", "compare"),
    "study": ("study",),
}
"""Those that a package's checks are asked for by; of the others it is what reads presets and data."""
PLAIN_COMMANDS = ("train", "presets", "inspect-data")
SLOW = "not damaged_files and not printed_command and not shipped_stances and not four_bits and not demo_answers"
CONSTRAINTS = ("ge", "gt", "le", "lt", "min_length", "extra", "strict", "allow_inf_nan", "frozen")
LIMIT_SECONDS = 60
ALONE_SECONDS = 240
MOST_BYTES = 6 * 2**30
SHARE, LINES_NEAR, NEAREST = 60, 3, 6
SURVIVES, DIES, ENDLESS = 0, 1, -signal.SIGKILL
NOTHING_CHOSEN = 5
"""Pytest's exit code where all tests that were named are among the slow ones."""


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
    checks = {module: checks_of(module) for module in MODULES}
    if not whole:
        checks = {module: [checks[module][number] for name, number in SOME if name == module] for module, _ in SOME}
    shares = [each[start : start + SHARE] for each in checks.values() for start in range(0, len(each), SHARE)]
    largest_first = sorted(shares, key=len, reverse=True)
    with lab.place("validators") as place:
        parts = side_by_side(lambda share: _part(lab, place, share), largest_first)
        ended: dict[Check, int | str] = {}
        for share, part in zip(largest_first, parts, strict=True):
            ended |= dict(zip(share, part if isinstance(part, list) else [part] * len(share), strict=True))
        late = [check for check, code in ended.items() if code == ENDLESS]
        for check in late:
            (ended[check],) = side_by_side(lambda share: _part(lab, place, share, ALONE_SECONDS)[0], [[check]])
    endless = [str(check) for check in late if ended[check] == ENDLESS]
    yield count(
        f"one check deleted, of those in {', '.join(checks)}: a test fails",
        [_survivor(check, code) for check, code in ended.items()],
        beside=f"tests that did not end: {', '.join(endless) or 'none'}",
        at_least=280 if whole else len(SOME),
    )


def _survivor(check: Check, ended: int | str) -> str | None:
    """What is wrong where its tests ended in that way; a text where they were not run at all."""
    if ended in (DIES, ENDLESS):
        return None
    return f"{check} is deleted, and " + (
        f"no test fails ({ended})" if isinstance(ended, int) else f"not tried: {ended}"
    )


def _part(lab: Lab, place: Path, share: list[Check], limit: float = LIMIT_SECONDS) -> list[int]:
    """Of each check of one module, how its tests end; in a process of its own."""
    files = Path(tempfile.mkdtemp(dir=place)) / "files"
    files.mkdir()
    bad_inputs.lay_out(files, lab.base)
    environment = {
        **os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{SOURCE.parent}", "OMP_NUM_THREADS": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(files.parent / "hypothesis"), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    words = [sys.executable, "-m", "faults.validators", str(files), str(limit), share[0].module]
    words += [str(check.number) for check in share]
    done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])
    found: list[int] = json.loads(done.stdout)
    return found


def main() -> None:
    """`python -m faults.validators FILES 60 config.py 3`."""
    files, limit, module = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    for name in ("pytest", "hypothesis", "pydantic", "typer.testing", "rich.table", "pyarrow.parquet", "jinja2"):
        importlib.import_module(name)
    if _needs_torch(module):
        for name in ("torch", "transformers", "peft", "trl", "datasets"):
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "politune"]:
        del sys.modules[name]  # `bad_inputs` brought it along; each child imports its own
    gc.freeze()  # a child looks for garbage among what is its own
    files.rename(_whole(files))
    twice = [str(TESTS / test) for test in MODULES[module]]
    if (ended := _in_a_child(files, module, None, ALONE_SECONDS, twice)) != SURVIVES:
        raise RuntimeError(f"{module}: the tests fail with nothing deleted ({ended})")
    found, failed = list[int](), list[str]()
    for number in map(int, sys.argv[4:]):
        # Often what finds a check speaks of what its lines speak of, or found the one before.
        first = dict.fromkeys([*_tests_near(module, number)[:NEAREST], *failed[:NEAREST]])
        found.append(_in_a_child(files, module, number, limit, list(first)))
        failed = list(dict.fromkeys([*_failed_in(_log(files, number)), *failed]))
    sys.stdout.write(json.dumps(found))


def _log(files: Path, number: int | None) -> Path:
    return files.parent / f"{number}.log"


def _failed_in(log: Path) -> list[str]:
    """The tests that failed, with all their parameters, as pytest takes them."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^FAILED (?:.*/)?tests/([^:]+::[^\s\[]+)", text, re.MULTILINE)
    return [str(TESTS / name) for name in found]


def _needs_torch(module: str) -> bool:
    return any(test.startswith("tiny/") for test in MODULES[module])


def _whole(files: Path) -> Path:
    """Where the files lie that each child gets a copy of; the copy has the one path that links among them name."""
    return files.with_name("whole")


def _in_a_child(files: Path, module: str, number: int | None, limit: float, first: Sequence[str]) -> int:
    """The exit code of the tests without a check, or the signal that ended them: ours, where they took too long.

    They get files of their own, because what a check would have stopped may write there. `first` names tests to begin with.
    """
    subprocess.run(["cp", "-a", str(_whole(files)), str(files)], check=True)
    child = os.fork()
    if not child:
        code = 3
        try:
            os.setsid()  # what its tests start ends with it
            code = _run_tests(files, module, number, first)
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    end = time.monotonic() + limit
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:  # without its check a file may be waited for, for ever
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    shutil.rmtree(files)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_tests(files: Path, module: str, number: int | None, first: Sequence[str]) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    log = os.open(_log(files, number), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    name = ".".join(["politune", *Path(module).with_suffix("").parts]).removesuffix(".__init__")
    if number is not None:
        sys.meta_path.insert(0, _Without(name, SOURCE / module, _tree_without(module, number)))
    import pytest

    tests = [str(TESTS / test) for test in MODULES[module]]
    plain = [
        "-x", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", "-k", SLOW,
    ]  # fmt: skip
    # What costs little and finds much comes first, in a process of its own, so that the tests find nothing of it.
    cases = _cases_near(module, number) if number is not None or _is_control(module) else []
    code = _forked(lambda: _run_cases(files, cases[:NEAREST])) if cases else SURVIVES
    for some in filter(None, (first, tests)):
        ended = code or int(pytest.main([*plain, *some]))
        code = SURVIVES if ended == NOTHING_CHOSEN else ended
    if cases:
        code = code or _run_cases(files, cases[NEAREST:])
    if number is not None:
        module_without = sys.modules.get(name) or importlib.import_module(name)
        assert getattr(module_without, "check_deleted", False)
    return code


def _forked(work: Callable[[], int]) -> int:
    child = os.fork()
    if not child:
        code = 3
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _is_control(module: str) -> bool:
    """Whether the cases are tried with nothing deleted, too: for one of the modules that share them."""
    first = next(each for each in MODULES if not _needs_torch(each) and _commands(each) == _commands(module))
    return first == module


def _commands(module: str) -> tuple[str, ...]:
    return COMMANDS.get(Path(module).parts[0], PLAIN_COMMANDS)


def _run_cases(files: Path, cases: Sequence[bad_inputs.Case]) -> int:
    from faults.in_process import run_here

    os.chdir(files)
    os.environ |= bad_inputs.HOME
    sys.meta_path.insert(0, _Refuse())
    for case in cases:
        if wrong := bad_inputs.complaint(case, run_here(case.words)):
            sys.stdout.write(f"{wrong}\n")  # into the log
            sys.stdout.flush()
            return DIES
    return SURVIVES


def _cases_near(module: str, number: int | None) -> list[bad_inputs.Case]:
    """Those that may meet a check of the module, and first those that speak of what its lines speak of."""
    if _needs_torch(module):
        return []
    cases = [case for case in bad_inputs.CASES if case.light and not case.before and case.words[0] in _commands(module)]
    near = set[str]() if number is None else _words_near(module, number)
    return sorted(cases, key=lambda case: -len(near & _words_of(" ".join((*case.words, *case.culprits)))))


def _tests_near(module: str, number: int) -> list[str]:
    """The tests of the module, first those that speak of what the check's lines speak of."""
    words = _words_near(module, number)
    found: dict[str, int] = {}
    for test in MODULES[module]:
        path, _, only = test.partition("::")
        text = (TESTS / path).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and only in ("", node.name):
                start = min(each.lineno for each in (node, *node.decorator_list))
                lines = text.splitlines()[start - 1 : node.end_lineno]
                found[f"{TESTS / path}::{node.name}"] = len(words & _words_of(" ".join(lines)))
    return sorted(found, key=lambda name: -found[name])


def _words_near(module: str, number: int) -> set[str]:
    """Of the lines where a check stands."""
    lines, line = (SOURCE / module).read_text(encoding="utf-8").splitlines(), checks_of(module)[number].line
    return _words_of(" ".join(lines[max(0, line - LINES_NEAR) : line + LINES_NEAR]))


def _words_of(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text.replace("-", "_").lower()))


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
    found += _flaws(tree) if module in ("training/checkpoints.py", "models/seal.py") else []
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


def _flaws(tree: ast.Module) -> Iterator[Deletion]:
    """What a function that looks for flaws returns in words."""
    for node in ast.walk(tree):
        for body in (getattr(node, name, None) for name in ("body", "orelse")):
            for place, statement in enumerate(body if isinstance(body, list) else []):
                value = statement.value if isinstance(statement, ast.Return) else None
                if isinstance(value, ast.JoinedStr) or (
                    isinstance(value, ast.Constant) and isinstance(value.value, str)
                ):
                    yield statement.lineno, ast.unparse(statement)[:80], _replaced(body, place, ast.Pass())


def _agreeing(function: ast.FunctionDef) -> Callable[[], None]:
    def delete() -> None:
        text = "return lambda value: True" if function.name == "_one_of" else "return True"
        function.body[-1] = ast.parse(f"def f():\n    {text}").body[0].body[0]  # type: ignore[attr-defined]

    return delete


if __name__ == "__main__":
    main()
