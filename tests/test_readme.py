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

import moqa
from moqa.planning import STRATEGIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("console")).replace("\\\n", " ")
    typed = [line.removeprefix("$ ").split("#")[0] for line in text.splitlines() if line.startswith("$ ")]
    return [shlex.split(line) for line in typed]


@pytest.mark.slow
def test_the_readme_runs_as_it_stands(tmp_path):
    (tmp_path / "reference").symlink_to(ROOT / "reference")
    ours = [command for command in commands() if command[0] == "moqa"]
    assert len(ours) >= 6
    scripts = [[sys.executable, "-c", code] for code in blocks("python")]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    for command in [[sys.executable, "-m", *command] for command in ours] + scripts:
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
    targets = {command[1] for command in commands() if command[0] == "make"}
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


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
