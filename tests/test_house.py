"""The rules of the house, checked: imports point downwards, names and files are clear, nothing heavy loads at start."""

import ast
import importlib
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "moqa"
# top to bottom; a folder may import from itself and from what comes later
FLOORS = [
    "cli", "serve", "speed", "compression", "federated", "vla", "reports", "exports", "mixture", "adjustment",
    "training", "qat", "evaluation", "quantization", "reduction", "planning", "profiling", "execution", "forecast",
    "methods", "calibration", "generation", "integrations", "runtime", "kernels", "format", "models", "originals",
    "gguf", "tasks", "policies", "storage", "memory", "data",
]  # fmt: skip
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = {
    ".".join(("moqa", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}
MOST_POSITIONAL, MOST_LINES = 6, 500


def imported(module: str) -> set[str]:
    """Modules of moqa that a module imports, anywhere in it, type-checking imports counted."""
    found = set()
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & MODULES.keys()) - {module}


def folder_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    folder = folder_of(module)
    if folder in FLOORS:
        above = {
            name
            for name in imported(module)
            if folder_of(name) in FLOORS and FLOORS.index(folder_of(name)) < FLOORS.index(folder)
        }
        assert not above


def test_every_folder_has_its_floor():
    folders = {path.parent.relative_to(SOURCE).parts[0] for path in FILES if path.parent != SOURCE}
    assert folders == set(FLOORS)


def test_no_circle_of_files_inside_a_folder():
    graph = {name: {other for other in imported(name) if folder_of(other) == folder_of(name)} for name in MODULES}
    while graph:
        leaves = {name for name, others in graph.items() if not others & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in leaves}


def test_few_positional_parameters():
    found = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_generated(node):
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                names = names[1:] if names[:1] in (["self"], ["cls"]) else names
                if len(names) > MOST_POSITIONAL:
                    found[f"{path.relative_to(SOURCE)}:{node.name}"] = len(names)
    assert not found


def _is_generated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether nobody calls it with positions: a command's options are named, and Triton's compiler knows no others."""
    decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
    return bool(decorators & {"app.command", "group.command", "triton.jit"})


def test_class_names_have_one_meaning():
    found = defaultdict(list)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].append(str(path.relative_to(SOURCE)))
    assert not {name: places for name, places in found.items() if len(places) > 1}


def test_files_stay_small():
    tests = [path for folder in ("tests", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (*FILES, *tests)}
    assert not {path: lines for path, lines in lengths.items() if lines > MOST_LINES}
    source = sorted(lengths[str(path.relative_to(ROOT))] for path in FILES)
    assert source[len(source) // 2] <= 150


@pytest.mark.parametrize("statement", ["import moqa", "import moqa.cli.main, moqa.cli.common"])
def test_nothing_heavy_is_imported_at_start(statement):
    heavy = "{'torch', 'transformers', 'scipy', 'datasets'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {statement}; print({heavy} or 'light')"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "light"


@pytest.mark.parametrize("package", ["moqa", "moqa.planning", "moqa.methods", "moqa.execution"])
def test_every_public_name_is_there(package):
    found = importlib.import_module(package)
    assert all(getattr(found, name) is not None for name in found.__all__)
    assert set(found.__all__) <= set(dir(found))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = found.nonsense


def test_the_schema_in_the_docs_is_the_manifest():
    from moqa.format.manifest import Manifest

    written = json.loads((ROOT / "docs" / "manifest.schema.json").read_text())
    assert written == Manifest.model_json_schema()


def test_the_schema_of_mixtures_in_the_docs_is_their_record():
    from moqa.mixture.record import MixtureRecord

    written = json.loads((ROOT / "docs" / "mixture.schema.json").read_text())
    assert written == MixtureRecord.model_json_schema()


def test_every_command_has_its_page():
    pages = {path.stem for path in (ROOT / "docs" / "commands").glob("*.md")} - {"README"}
    commands = set(importlib.import_module("moqa.cli.examples").EXAMPLES)
    assert pages == commands
