"""What a type checker knows of the public functions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moqa

ROOT = Path(__file__).parents[1]
SNIPPET = ROOT / "tests" / "typing" / "public.py"
CONFIG = """
[mypy]
strict = True
plugins = pydantic.mypy
[mypy-moqa.*]
ignore_errors = True
[mypy-transformers.*,scipy.*,datasets.*,pyarrow.*,safetensors.*,huggingface_hub.*,triton.*,ray.*]
ignore_missing_imports = True
follow_imports = skip
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Line of the snippet -> what mypy says there."""
    pytest.importorskip("mypy")
    config = tmp_path_factory.mktemp("mypy") / "mypy.ini"
    config.write_text(CONFIG)
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", ROOT / ".mypy_cache" / "typing",
            "--no-error-summary", "--no-pretty", "--hide-error-context", SNIPPET.relative_to(ROOT),
        ],
        cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    found: dict[int, list[str]] = {}
    for line in done.stdout.splitlines():
        path, number, message = line.split(":", 2)
        assert path.endswith("public.py"), line
        found.setdefault(int(number), []).append(message.strip())
    return found


def test_every_public_name_is_typed(told):
    lines = SNIPPET.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        expected, said = line.partition("  # ")[2], told.get(number, [])
        if "reveal_type" in line and expected:
            assert said == [f'note: Revealed type is "{expected}"'], line
        elif expected == "error":
            assert any(message.startswith("error: ") for message in said), line
        else:
            assert not said, line


def test_the_snippet_uses_every_public_name():
    used = set(re.findall(r"\bmoqa\.(\w+)", SNIPPET.read_text()))
    assert set(moqa.__all__) <= used
