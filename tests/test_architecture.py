"""Imports point one way, so that each file can be read with what stands below it."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dpo_kit
from dpo_kit.run.measures import MEASURES
from dpo_kit.toy import MODEL, TRAIN

PACKAGE = Path(dpo_kit.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
LAYERS = (
    "errors",
    "toy",
    "run",
    "config",
    "model",
    "callbacks",
    "judge",
    "data",
    "trainer",
    "training",
    "sweep",
    "evaluate",
    "export",
    "cli",
    "__init__",
    "__main__",
)
LOADED = 8_100  # lines of ours in a plain run: what a run does not ask for must cost it nothing
TALLY = """
import atexit, runpy, sys
from pathlib import Path

def tally():
    ours = {n: m for n, m in sys.modules.items() if n.startswith(("dpo_kit", "hydra_plugins.dpo_kit"))}
    lines = {n: len(Path(m.__file__).read_text().splitlines()) for n, m in ours.items()}
    print(*sorted(((count, n) for n, count in lines.items()), reverse=True), sum(lines.values()), sep="\\n")

atexit.register(tally)
sys.argv[0] = "dpo_kit"
runpy.run_module("dpo_kit", run_name="__main__", alter_sys=True)
"""
FILES = sorted(PACKAGE.rglob("*.py"))


def _name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def _room(name: str) -> str:
    return name.split(".")[0] or "__init__"


def _imports(file: Path, nodes: Callable[[ast.Module], Iterable[ast.AST]]) -> set[str]:
    """Modules of dpo_kit that `file` imports in `nodes` of its tree."""
    found: set[str] = set()
    for node in nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dpo_kit":
            module = (node.module or "").removeprefix("dpo_kit").removeprefix(".")
            names = {_name(path) for path in FILES}
            found |= {
                f"{module}.{a.name}".lstrip(".") if f"{module}.{a.name}".lstrip(".") in names else module
                for a in node.names
            }
    return found - {""}


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_a_room_imports_only_from_rooms_below(file):
    """Inside functions too: what is loaded late must not reach up either."""
    floor = LAYERS.index(_room(_name(file)))
    assert {name for name in _imports(file, ast.walk) if LAYERS.index(_room(name)) > floor} == set()


def test_config_and_run_stand_without_the_reports_that_only_the_end_of_a_run_needs():
    below = [file for file in FILES if _room(_name(file)) in ("config", "run") and "report" not in file.parts]
    assert not [_name(file) for file in below for name in _imports(file, ast.walk) if name.startswith("run.report")]


def test_no_imports_go_round_in_a_circle():
    TopologicalSorter({_name(file): _imports(file, lambda tree: tree.body) for file in FILES}).prepare()


def test_only_tracking_and_dashboard_import_wandb_and_its_packages():
    importers = {
        _name(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        for name in _imported(node)
        if name.startswith("wandb")
    }
    assert importers == {"run.tracking", "cli.dashboard"}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_no_python_branches_on_a_method_s_name():
    methods = {file.stem for file in (PACKAGE.parent / "conf" / "method").glob("*.yaml")}
    hits = [
        f"{_name(file)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Compare)
        and any(isinstance(c, ast.Constant) and c.value in methods for c in [node.left, *node.comparators])
    ]
    assert hits == []


def test_names_of_measures_stand_in_one_table():
    """Tables, pages, pictures, the choice and the progress bar read them there."""
    every = {name for m in MEASURES for name in (m.label, m.row, m.short, m.column, m.title) if " " in name}
    spoken = {"held-out rows"}  # of rows, in a sentence
    again = {
        f"{_name(file)}: {node.value}"
        for file in FILES
        if _name(file) != "run.measures"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in every - spoken
    }
    assert again == set()


PRIVATE = re.findall(r"^\| `([\w.]+):(\w+)` \| (.*?) \| `([\w/]+\.py)` \|$", CONTRIBUTING.read_text(), re.M)


def test_private_names_of_others_are_those_that_contributing_lists():
    """A name that a new version of a library has dropped is seen here first."""
    assert len(PRIVATE) > 10
    for home, name, users, guard in PRIVATE:
        first, *rest = home.split(".")
        place = importlib.import_module(first)
        for part in rest:
            place = getattr(place, part, None) or importlib.import_module(f"{place.__name__}.{part}")
        assert hasattr(place, name) or name in inspect.getsource(place), f"{home} has no {name} any more"
        assert all(name in (PACKAGE / user).read_text() for user in re.findall(r"`(.*?)`", users)), name
        assert (Path(__file__).parent / guard).exists(), guard


def _private(tree: ast.Module) -> Iterator[str]:
    """Private names that `tree` may take from others: attributes, parts of a superclass, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dpo_kit"):
            hidden = (
                any(part.startswith("_") for part in (node.module or "").split(".")) and node.module != "__future__"
            )
            yield from (alias.name for alias in node.names if hidden or alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and ast.unparse(node.value) != "os":
            yield node.attr if ast.unparse(node.value) != "super()" else f"super {node.attr}"


def _own(tree: ast.Module) -> Iterator[str]:
    """Names that `tree` defines: functions, classes, variables, attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_contributing_lists_every_private_name_of_others_that_is_used():
    trees = [ast.parse(file.read_text()) for file in FILES]
    own, listed = {name for tree in trees for name in _own(tree)}, {name for _, name, _, _ in PRIVATE}
    used = {name for tree in trees for name in _private(tree) if not name.endswith("__")}
    assert {name.removeprefix("super ") for name in used - own} - listed == set()


def test_the_map_in_contributing_names_every_room():
    rows = re.findall(r"^\| `(\w+(?:/|\.py))` \|", CONTRIBUTING.read_text(), re.M)
    rooms = [f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py" for name in LAYERS if not name.startswith("_")]
    assert sorted(rows) == sorted(rooms)


def test_every_room_says_what_it_is():
    for folder in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        assert 5 < len((folder / "README.md").read_text().splitlines()) <= 60, folder


@pytest.mark.slow
def test_a_plain_run_loads_few_lines_of_ours(tmp_path):
    words = ["model=local", f"model.path={MODEL}", "data=jsonl", f"data.train={TRAIN}", "trl.max_steps=2"]
    plain = [sys.executable, "-c", TALLY, *words, "callbacks=none", "tracking=none"]
    said = subprocess.run(plain, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    *modules, total = said.stdout.splitlines()
    assert 0 < int(total) <= LOADED, modules


def test_functions_stay_short():
    lengths = [
        (node.end_lineno - node.lineno + 1, f"{_name(file)}:{node.name}")
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(lengths) <= (80, ""), max(lengths)


def test_the_public_names_are_explicit_and_documented():
    for name in dpo_kit.__all__:
        public = getattr(dpo_kit, name)
        own = vars(public) if isinstance(public, type) else {}
        methods = [getattr(public, key) for key, value in own.items() if callable(value) and key[0] != "_"]
        for described in (public, *methods):
            assert (inspect.getdoc(described) or "").strip(), described
