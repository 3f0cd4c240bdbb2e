"""`make proof`: run every study that a results page depends on, and collect the claims anew; hours.

A study whose inputs are as when it last succeeded is not run again: the code, the reference, the study's own files.
"""

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from claims import COMMAND, RESULTS, ROOT
from claims import main as collect

DONE = ROOT / "runs" / "proof.json"
INPUTS = ("src/moqa", "benchmarks", "recipes", "reference", "constraints.txt", "pyproject.toml")
SELF = "benchmarks/claims.py"


def content() -> str:
    """Hash of all that studies depend on."""
    digest = hashlib.sha256()
    for name in INPUTS:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            if "__pycache__" not in file.parts and file.suffix != ".so":
                digest.update(file.relative_to(ROOT).as_posix().encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def commands() -> list[str]:
    """The first command of every results page, each once, in the order of their names; `make demo` comes first."""
    found: dict[str, None] = {"make demo": None}
    for page in sorted(RESULTS.glob("*.md")):
        command = COMMAND.search(page.read_text(encoding="utf-8"))
        if command and SELF not in command[1] and command[1] != "make proof":
            found[re.sub(r"\s+", " ", command[1])] = None
    return list(found)


def main() -> int:
    done = json.loads(DONE.read_text()) if DONE.is_file() else {}
    inputs, failed = content(), []
    for command in commands():
        if done.get(command) == inputs:
            print(f"{command}: as before", flush=True)
            continue
        began = time.perf_counter()
        words = command.split()
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        code = subprocess.run(words, cwd=ROOT, check=False).returncode
        print(f"{command}: exit {code} after {time.perf_counter() - began:.0f} s", flush=True)
        if code:
            failed.append(command)
        else:
            done[command] = inputs
            DONE.parent.mkdir(exist_ok=True)
            DONE.write_text(json.dumps(done, indent=1) + "\n")
    collect()
    print(
        f"{len(failed)} failed: {', '.join(failed)}" if failed else "all claims are collected in docs/results/claims.md"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
