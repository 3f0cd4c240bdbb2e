"""The README's commands and Python, as they stand there."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import typer

import moqa
from moqa.cli.main import application
from moqa.planning import STRATEGIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of every block: console and Python are run, shell is on models that no test has."""
    return re.findall(r"```(console|shell|python)\n(.*?)```", page, re.DOTALL)


def typed(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


def commands(page: str, *languages: str) -> list[list[str]]:
    return [command for language, text in blocks(page) if language in languages for command in typed(text)]


@pytest.mark.slow
def test_the_readme_runs_as_it_stands(tmp_path):
    (tmp_path / "reference").symlink_to(ROOT / "reference")
    steps = []
    for language, text in blocks(README):
        if language == "python":
            steps.append([sys.executable, "-c", text])
        if language == "console":
            steps += [[sys.executable, "-m", *command] for command in typed(text) if command[0] == "moqa"]
    assert len(steps) >= 7
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    for command in steps:
        if command[3:4] == ["serve"]:
            serves(command, tmp_path, environment)
            continue
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def serves(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """The server answers, and ends well when it is told to."""
    port = command[command.index("--port") + 1]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            time.sleep(0.5)
            with contextlib.suppress(httpx.TransportError):
                assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=120).status_code == 200
                break
        process.terminate()
        assert process.wait(120) == 0
    finally:
        process.kill()


def test_the_readme_names_targets_that_exist():
    targets = {command[1] for command in commands(README, "console") if command[0] == "make"}
    assert "demo" in targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("page", ["README.md", "docs/first-model.md", "docs/which-size.md"])
def test_the_commands_of_a_page_are_understood(page):
    found = [command for command in commands((ROOT / page).read_text(), "console", "shell") if command[0] == "moqa"]
    assert len(found) >= 3
    for _, name, *arguments in found:
        typer.main.get_command(application()).commands[name].make_context(name, arguments)


def test_the_table_of_the_readme_is_that_of_its_command():
    demo = (ROOT / "docs" / "results" / "main-job.md").read_text()
    rows = {
        "original": "the original", "uniform 3 gptq": "uniform 3 bits", "frequency 3": "bits by how often",
        "budget 3": r"\*\*moqa \(",
    }  # fmt: skip
    for name, row in rows.items():
        cells = re.search(rf"^\| {name} \|.*", demo, re.MULTILINE)[0].replace("0.0000", "0").split(" | ")
        shown = re.search(rf"^\| {row}.*", README, re.MULTILINE)[0].replace("*", "").strip("| ").split(" | ")
        assert shown[1:] == [cells[5], cells[7]]


def test_troubleshooting_quotes_messages_that_exist():
    source = "".join(path.read_text() for path in (ROOT / "src" / "moqa").rglob("*.py"))
    quoted = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    assert [message for message in quoted for part in message.split("...") if part.strip() not in source] == []


def test_every_link_in_the_documents_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_the_first_change_names_functions_that_exist():
    text = (ROOT / "docs" / "first-change.md").read_text()
    hops = re.findall(r"^\| \d+ \| \[`(\w+)`\]\(\.\./(\S+)\)", text, re.MULTILINE)
    assert len(hops) == 10
    for function, path in hops:
        assert re.search(rf"def {function}\(", (ROOT / path).read_text()), (function, path)


def test_the_strategy_of_the_first_change_works(tiny_profile):
    text = (ROOT / "docs" / "first-change.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@strategy" in block)
    exec(code, {})
    try:
        plan = moqa.plan(tiny_profile, "5bpw", strategy="first-blocks")
    finally:
        del STRATEGIES["first-blocks"]
    widths = [[s.width for name, s in plan.units.items() if f".layers.{layer}." in name] for layer in (0, 2)]
    assert sum(widths[0]) > sum(widths[1])
