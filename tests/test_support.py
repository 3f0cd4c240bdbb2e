"""Where moqa runs, and what it says elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from moqa.cli.main import main
from moqa.errors import MoqaError
from moqa.support import check_system, unsupported

PAGE = Path(__file__).parents[1] / "docs" / "platforms.md"
REMEDY = "it needs Linux on a little-endian processor, e.g. a container"


def elsewhere(statement: str, system: str = "darwin") -> subprocess.CompletedProcess:
    """Run a statement where Python says that it is on another system."""
    script = f"import sys; sys.platform = {system!r}\n{statement}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_runs_here():
    assert unsupported() is None
    check_system()


@pytest.mark.parametrize(
    ("system", "name"), [("darwin", "macOS"), ("win32", "Windows"), ("cygwin", "Cygwin"), ("freebsd15", "freebsd15")]
)
def test_other_systems_are_refused_by_name(monkeypatch, system, name):
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(MoqaError) as error:
        check_system()
    assert str(error.value) == f"moqa does not run on {name}: {REMEDY}"


def test_other_orders_of_bytes_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(MoqaError, match="a big-endian processor"):
        check_system()


def test_the_command_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["moqa", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"moqa: moqa does not run on macOS: {REMEDY}\n")


def test_a_new_process_of_the_command_says_so_too():
    done = elsewhere("from moqa.cli.main import main; main()")
    assert (done.returncode, done.stderr) == (2, f"moqa: moqa does not run on macOS: {REMEDY}\n")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_importing_moqa_works_everywhere(system):
    done = elsewhere("import moqa, json; print(moqa.__version__ > '', moqa.MoqaError.__name__)", system)
    assert (done.stdout.split(), done.stderr) == (["True", "MoqaError"], "")


@pytest.mark.parametrize(
    "use",
    [
        "import moqa; moqa.quantize", "import moqa; moqa.load", "from moqa.planning import Plan", "import moqa.kernels",
        "import moqa.storage.resumable",
    ],
)  # fmt: skip
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_using_it_is_refused_before_anything_fails(use, system):
    done = elsewhere(use, system)
    assert done.returncode == 1
    name = {"darwin": "macOS", "win32": "Windows"}[system]
    assert done.stderr.splitlines()[-1] == f"moqa.errors.MoqaError: moqa does not run on {name}: {REMEDY}"


def test_transformers_is_left_alone_elsewhere():
    watchers = "[type(finder).__name__ for finder in sys.meta_path if type(finder).__module__.startswith('moqa.')]"
    assert elsewhere(f"import moqa; print({watchers})").stdout.strip() == "['Refusal']"
    assert elsewhere(f"import moqa; print({watchers})", "linux").stdout.strip() == "['_Watcher', '_Watcher']"


def test_the_page_names_every_system_that_is_refused():
    page = PAGE.read_text()
    assert all(name in page for name in ("Linux", "macOS", "Windows", "big-endian"))
    assert f"moqa does not run on macOS: {REMEDY}" in page
