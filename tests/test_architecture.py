"""Imports point one way, so that each file can be read with what stands below it."""

import ast
import importlib
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dpo_kit

PACKAGE = Path(dpo_kit.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
LAYERS = [
    {
        "words",
        "chats",
        "errors",
        "history",
        "metrics",
        "run",
        "secrets",
        "lock",
        "processes",
        "interrupt",
        "toy",
        "toy.domain",
        "toy.build",
        "toy.ideal",
    },
    {
        "trl_schema",
        "settings",
        "config",
        "help",
        "hardware",
        "tokens",
        "control_tokens",
        "turns",
        "template",
        "render",
        "origin",
        "sampling",
        "tracking",
        "tool",
        "dashboard",
        "quiet",
        "checkpoints",
        "carried",
        "nonfinite",
        "journal",
        "votes",
        "selection",
        "limits",
        "markdown",
        "own",
    },
    {"server", "verdicts", "reward_model"},
    {"llm_judge", "generation"},
    {"review"},
    {"judges"},
    {
        "data",
        "data.files",
        "data.read",
        "data.context",
        "data.rows",
        "places",
        "env",
        "data.control",
        "data.interleave",
        "arguments",
        "model",
        "head",
        "scoring",
        "scores",
        "prefix",
        "grouping",
        "given_tokens",
    },
    {
        "data.gather",
        "data.spelling",
        "data.forms",
        "data.ids",
        "data.shape",
        "data.signal",
        "data.figures",
        "data.duplicates",
        "data.leaks",
        "data.shortcuts",
        "data.advice",
        "data.fresh",
    },
    {"data.inspect", "data.prepare", "data.options"},
    {"data.prompts", "data.pairing"},
    {"data.rated"},
    {"data.build"},
    {"identity", "reference", "safekeeping", "speed", "data.preference", "online"},
    {"start"},
    {"probe", "drift", "recorder", "manifest", "gold", "report", "diagnosis"},
    {"card", "published"},
    {"page"},
    {"callbacks", "preview"},
    {"measure", "finish", "held_out", "resume"},
    {"training", "memory"},
    {"plan"},
    {"sweep", "sweep.runs", "sweep.evidence", "sweep.labels", "sweep.plan", "sweep.devices", "sweep.record"},
    {"sweep.quality", "sweep.rows", "sweep.progress", "sweep.job"},
    {"sweep.choice", "sweep.curves", "sweep.processes", "sweep.table"},
    {"sweep.advice", "sweep.frontier"},
    {"sweep.summary", "sweep.warm"},
    {"sweep.launcher", "sweep.conclude"},
    {"evaluate", "evaluate.benchmark_options", "evaluate.candidate", "evaluate.picture", "evaluate.preferences"},
    {"evaluate.options", "evaluate.rates", "evaluate.gate", "evaluate.dialogue"},
    {"evaluate.plan", "evaluate.samples", "evaluate.alpaca", "evaluate.domain", "evaluate.harness"},
    {"evaluate.answers", "evaluate.held_pairs", "evaluate.failures", "evaluate.mt_bench", "evaluate.part"},
    {"evaluate.comparison", "evaluate.hacking", "evaluate.benchmarks"},
    {"evaluate.after"},
    {"evaluate.parts"},
    {"evaluate.evaluation"},
    {"export", "export.serving", "export.merge"},
    {"export.folder", "export.script"},
    {"sweep.__main__", "evaluate.__main__", "export.__main__"},
    {"data.curate", "data.convert", "data.picture", "data.table"},
    {"data.modes"},
    {"data.__main__"},
    {"cli", "__main__", "__init__"},
]
FILES = sorted(PACKAGE.rglob("*.py"))


def _name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def _imports(file: Path) -> set[str]:
    """Modules of dpo_kit that `file` imports when it is imported (not inside functions, not for types only)."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dpo_kit":
            module = (node.module or "").removeprefix("dpo_kit").removeprefix(".")
            names = {_name(path) for path in FILES}
            found |= {
                f"{module}.{a.name}".lstrip(".") if f"{module}.{a.name}".lstrip(".") in names else module
                for a in node.names
            }
    return found - {""}


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_a_file_imports_only_from_its_own_layer_or_below(file):
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    assert _name(file) in layer, "say in LAYERS where the new file stands"
    assert {name for name in _imports(file) if layer[name] > layer[_name(file)]} == set()


def test_no_imports_go_round_in_a_circle():
    TopologicalSorter({_name(file): _imports(file) for file in FILES}).prepare()


def test_only_tracking_and_dashboard_import_wandb_and_its_packages():
    importers = {
        _name(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        for name in _imported(node)
        if name.startswith("wandb")
    }
    assert importers == {"tracking", "dashboard"}


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


PRIVATE = re.findall(r"^\| `([\w.]+):(\w+)` \| (.*?) \| `(\w+\.py)` \|$", CONTRIBUTING.read_text(), re.M)


def test_private_names_of_others_are_those_that_contributing_lists():
    """A name that a new version of a library has dropped is seen here first."""
    assert len(PRIVATE) > 10
    for home, name, users, guard in PRIVATE:
        module, _, last = home.rpartition(".")
        place = getattr(importlib.import_module(module), last, None) or importlib.import_module(home)
        assert hasattr(place, name), f"{home} has no {name} any more"
        assert all(name in (PACKAGE / user).read_text() for user in re.findall(r"`(.*?)`", users)), name
        assert (Path(__file__).parent / guard).exists(), guard


def test_the_map_in_contributing_names_every_file_once():
    rows = re.findall(r"^\| (`\w+\.py`.*?) \|", CONTRIBUTING.read_text(), re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+\.py)`", row)]
    assert sorted(named) == sorted(file.name for file in PACKAGE.glob("[!_]*.py"))


def test_functions_stay_short():
    lengths = [
        (node.end_lineno - node.lineno + 1, f"{_name(file)}:{node.name}")
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(lengths) <= (45, ""), max(lengths)


def test_the_public_names_are_explicit_and_documented():
    for name in dpo_kit.__all__:
        public = getattr(dpo_kit, name)
        own = vars(public) if isinstance(public, type) else {}
        methods = [getattr(public, key) for key, value in own.items() if callable(value) and key[0] != "_"]
        for described in (public, *methods):
            assert (inspect.getdoc(described) or "").strip(), described
