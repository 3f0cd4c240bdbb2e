"""`make proof` runs what makes every page, no study twice with the same inputs, and says which failed."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# written by hand from runs of two versions
HISTORY = "restructuring.md"


@pytest.fixture
def proof(monkeypatch, tmp_path):
    """The program, with its memory and inputs in a folder of this test."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import proof

    (tmp_path / "input.txt").write_text("as it was")
    monkeypatch.setattr(proof, "DONE", tmp_path / "runs" / "proof.json")
    monkeypatch.setattr(proof, "INPUTS", ("input.txt",))
    monkeypatch.setattr(proof, "ROOT", tmp_path)
    monkeypatch.setattr(proof, "collect", lambda: None)
    monkeypatch.setattr(sys, "argv", ["proof.py"])
    return proof


def recipe(target):
    """What a target runs, and what it needs."""
    found = re.search(rf"^{target}:(.*\n(?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    return found[1] if found else None


def test_every_page_has_a_command_that_exists(proof):
    table = (RESULTS / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[([\w-]+\.md)\]\([\w-]+\.md\) \| ([^|]+) \|", table, re.MULTILINE))
    pages = {page.name for page in RESULTS.glob("*.md")} - {"README.md", "claims.md"}
    assert rows.keys() == pages
    commands = proof.commands()
    for page, cell in rows.items():
        own = re.findall(r"`((?:make|python) [^`]+)`", cell)
        assert (own and set(own) <= set(commands)) or page == HISTORY, page
    for command in commands:
        kind, name = command.split()[:2]
        assert recipe(name) if kind == "make" else (ROOT / name).is_file(), command


def test_what_a_page_says_made_it_is_run(proof):
    run = " ".join(f"{command} {recipe(command.split()[1]) or ''}" for command in proof.commands())
    pattern = re.compile(r"^(?:Command:|Made by) `(make [\w-]+|python benchmarks/\w+\.py)", re.MULTILINE)
    for page in RESULTS.glob("*.md"):
        for command in pattern.findall(page.read_text(encoding="utf-8")) if page.name != HISTORY else ():
            assert command.removeprefix("python ") in run or command == "make proof", f"{page.name}: {command}"


def test_a_study_runs_once_for_the_same_inputs(proof, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proof, "commands", lambda: ["python count.py"])
    (tmp_path / "count.py").write_text("open('count.txt', 'a').write('x')")
    for expected in ("x", "x"):
        assert proof.main() == 0
        assert (tmp_path / "count.txt").read_text() == expected
    assert "python count.py: as before" in capsys.readouterr().out
    (tmp_path / "input.txt").write_text("another")
    assert proof.main() == 0
    assert (tmp_path / "count.txt").read_text() == "xx"


def test_a_study_that_fails_is_named_and_does_not_stop_others(proof, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proof, "commands", lambda: ["python fails.py", "python works.py"])
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "works.py").write_text("")
    assert proof.main() == 1
    assert "python fails.py: exit 3" in (said := capsys.readouterr().out)
    assert said.splitlines()[-1] == "1 failed: python fails.py"
    assert json.loads(proof.DONE.read_text()).keys() == {"python works.py"}


def test_a_list_says_what_would_run_and_runs_nothing(proof, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proof, "commands", lambda: ["make this", "make that"])
    proof.DONE.parent.mkdir()
    proof.DONE.write_text(json.dumps({"make this": proof.content(), "make that": "older"}))
    monkeypatch.setattr(sys, "argv", ["proof.py", "--list"])
    assert proof.main() == 0
    assert capsys.readouterr().out == "as before make this\nto run    make that\n"
