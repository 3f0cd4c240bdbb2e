"""What the package says of itself: one version, bounds that are tested and stated alike, targets that are described."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import moqa

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {found.name: found for found in map(Requirement, PROJECT["dependencies"])}
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def page(name: str) -> str:
    return (ROOT / name).read_text()


def limits(bound: SpecifierSet) -> tuple[tuple[int, int], tuple[int, int]]:
    """(3, 11), (3, 14) of >=3.11,<3.14."""
    found = {one.operator: tuple(int(part) for part in one.version.split(".")[:2]) for one in bound}
    assert set(found) == {">=", "<"}, bound
    return found[">="], found["<"]


class TestVersion:
    def test_is_that_of_the_project(self):
        assert moqa.__version__ == PROJECT["version"], "moqa was installed before pyproject.toml changed: make setup"

    def test_is_nowhere_else(self):
        for path in (ROOT / "src").rglob("*.py"):
            assert not re.search(r"__version__ *=", path.read_text()), path

    def test_has_its_section_in_the_changelog(self):
        titles = re.findall(r"^## (.*)$", page("CHANGELOG.md"), re.MULTILINE)
        assert titles[0] == "Unreleased"
        dated = [re.fullmatch(r"(\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d", title) for title in titles[1:]]
        assert all(dated), titles
        assert dated[0][1] == PROJECT["version"]

    def test_costs_nothing_until_it_is_asked_for(self):
        script = (
            "import sys, moqa; early = 'importlib.metadata' in sys.modules\n"
            "print(early, moqa.__version__, 'importlib.metadata' in sys.modules)"
        )
        # without site-packages' own start-up code, which may import it
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == ["False", PROJECT["version"], "True"]


class TestBounds:
    @pytest.mark.parametrize("name", sorted(REQUIREMENTS))
    def test_hold_for_what_is_installed_and_pinned(self, name):
        assert version(name) in REQUIREMENTS[name].specifier
        assert PINNED[name] in REQUIREMENTS[name].specifier

    def test_of_transformers_end_behind_the_minor_version_that_is_tested(self):
        _, end = limits(REQUIREMENTS["transformers"].specifier)
        major, minor = map(int, PINNED["transformers"].split(".")[:2])
        assert end == (major, minor + 1)

    def test_of_python_hold_here_and_in_the_makefile(self):
        bound = SpecifierSet(PROJECT["requires-python"])
        assert ".".join(map(str, sys.version_info[:3])) in bound
        start, end = limits(bound)
        assert f"not {start} <= sys.version_info < {end}" in page("Makefile")
        classified = [entry for entry in PROJECT["classifiers"] if "Python ::" in entry]
        assert classified == [f"Programming Language :: Python :: 3.{minor}" for minor in range(start[1], end[1])]

    def test_are_stated_as_they_are(self):
        stated = {SpecifierSet(one) for one in re.findall(r"`(>=[\d.]+,<[\d.]+)`", page("docs/platforms.md"))}
        assert stated == {SpecifierSet(PROJECT["requires-python"]), REQUIREMENTS["transformers"].specifier}

    def test_are_stated_in_the_readme(self):
        start, end = limits(SpecifierSet(PROJECT["requires-python"]))
        first, behind = limits(REQUIREMENTS["transformers"].specifier)
        python = f"Python 3.{start[1]} to 3.{end[1] - 1}"
        assert f"{python} and transformers 5.{first[1]} to 5.{behind[1] - 1}" in page("README.md")


class TestTools:
    def test_hooks_run_what_make_lint_runs(self):
        lint = page("Makefile").split("\nlint:")[1].split("\n\n")[0]
        for repository in yaml.safe_load(page(".pre-commit-config.yaml"))["repos"]:
            assert repository["repo"] == "local", "hooks are fetched from nowhere"
            for hook in repository["hooks"]:
                tool, *words = hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "").split()
                assert " ".join([f"$(BIN)/{tool}", *words]) in lint

    def test_every_target_for_a_contributor_is_described(self):
        described = set(re.findall(r"^\$ make ([\w-]+)", page("CONTRIBUTING.md"), re.MULTILINE))
        phony = set(re.search(r"^\.PHONY: (.*)$", page("Makefile"), re.MULTILINE)[1].split())
        assert described <= phony
        assert {"test", "test-slow", "test-next", "lint", "hooks", "sanitize", "wheel"} <= described

    def test_kernels_are_not_built_for_the_machine_that_builds(self):
        for name in ("CMakeLists.txt", "pyproject.toml", "src/moqa/kernels/native/sources.cmake"):
            assert not re.search(r"-m(arch|tune|cpu)=", page(name)), name
