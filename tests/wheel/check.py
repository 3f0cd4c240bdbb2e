"""Check that a wheel is complete and works without a compiler: `python check.py WHEEL [REQUIREMENTS...]`.

Checks its tag and files, installs it into a new environment in an empty folder, with no compiler on PATH, and runs
smoke.py there. REQUIREMENTS are installed first.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
NAME = re.compile(r"moqa-(?P<version>[^-]+)-(?P<python>cp3\d+)-(?P=python)-(?P<platform>[^-]+)\.whl")
SOURCES = (".cpp", ".h", ".cmake", ".c")


def main(wheel: Path, requirements: list[str]) -> None:
    """All of it."""
    version = check_name(wheel)
    check_files(wheel)
    with tempfile.TemporaryDirectory(prefix="moqa-wheel-") as folder:
        smoke(wheel, requirements, version, Path(folder))
    print(f"{wheel.name}: sound")


def check_name(wheel: Path) -> str:
    """The version, if the tag states one Python and the glibc that is needed."""
    match = NAME.fullmatch(wheel.name)
    assert match, f"{wheel.name} is not named as a wheel for one Python and one platform"
    assert match["python"] == f"cp3{sys.version_info.minor}", f"{wheel.name} is for another Python"
    assert all(tag.startswith("manylinux") for tag in match["platform"].split(".")), (
        f"{wheel.name} does not state the glibc it needs"
    )
    return match["version"]


def check_files(wheel: Path) -> None:
    """One extension, built; none of its sources, and nothing beside the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    extensions = [name for name in names if name.endswith(".so")]
    assert len(extensions) == 1, f"extensions in {wheel.name}: {extensions}"
    assert Path(extensions[0]).name.startswith("_native."), extensions
    sources = [name for name in names if name.endswith(SOURCES)]
    assert not sources, f"{wheel.name} holds sources: {sources}"
    tops = {name.split("/")[0] for name in names}
    assert all(top == "moqa" or top.endswith(".dist-info") for top in tops), f"{wheel.name} holds {tops}"
    assert any(name.endswith("/templates/report.html.j2") for name in names), "the report's template is missing"


def smoke(wheel: Path, requirements: list[str], version: str, folder: Path) -> None:
    """Install it without a compiler, and run smoke.py."""
    venv.create(folder / "venv", with_pip=True)
    binaries, work = folder / "venv" / "bin", folder / "work"
    work.mkdir()
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = hidden | {"PATH": str(binaries), "CC": "/bin/false", "CXX": "/bin/false"}
    pip = [binaries / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    if requirements:
        subprocess.run([*pip, *requirements], cwd=work, env=environment, check=True)
    # what has no wheel of its own would need a compiler
    subprocess.run(
        [*pip, "--only-binary", ":all:", "-c", CONSTRAINTS.resolve(), wheel.resolve()],
        cwd=work, env=environment, check=True,
    )  # fmt: skip
    subprocess.run(
        [binaries / "python", "-I", (HERE / "smoke.py").resolve(), version], cwd=work, env=environment, check=True
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
