"""The rules of the house, checked: imports point downwards, files stay small, nothing heavy loads at start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "moqa"
# top to bottom; a folder may import from itself and from what comes later
FLOORS = [
    "cli", "serve", "bench", "report", "adjust", "evaluate", "quantize", "plan", "profile", "methods", "generate",
    "runtime", "engine", "kernels", "format", "models", "data",
]  # fmt: skip
FILES = sorted(SOURCE.rglob("*.py"))


def imported_folders(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("moqa.")} & set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downwards(path):
    folder = path.relative_to(SOURCE).parts[0]
    if folder in FLOORS:
        above = {name for name in imported_folders(path) if FLOORS.index(name) < FLOORS.index(folder)}
        assert not above


def test_files_stay_small():
    lengths = {path.relative_to(SOURCE): len(path.read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 500
    assert sorted(lengths.values())[len(lengths) // 2] <= 150


@pytest.mark.parametrize("statement", ["import moqa", "import moqa.cli, moqa.cli.common"])
def test_nothing_heavy_is_imported_at_start(statement):
    heavy = "{'torch', 'transformers', 'scipy', 'plotly', 'datasets'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {statement}; print({heavy} or 'light')"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "light"


def test_functions_and_folders_share_their_names():
    script = (
        "import moqa, moqa.plan.run\n"
        "from moqa.profile import Profile\n"
        "print(callable(moqa.plan), callable(moqa.profile), moqa.plan.Plan.__name__, callable(moqa.load))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "Plan", "True"]


def test_the_schema_in_the_docs_is_the_manifest():
    import json

    from moqa.format.manifest import Manifest

    written = json.loads((SOURCE.parents[1] / "docs" / "manifest.schema.json").read_text())
    assert written == Manifest.model_json_schema()


def test_every_command_has_its_page():
    pages = {path.stem for path in (SOURCE.parents[1] / "docs" / "commands").glob("*.md")} - {"README"}
    commands = {p.stem for p in (SOURCE / "cli").glob("*.py")} - {"__init__", "common", "oneshot"}
    assert pages == commands
