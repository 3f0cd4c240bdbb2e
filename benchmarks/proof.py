"""`make proof`: run every study that a results page depends on, and collect the claims anew; hours.

A study whose inputs are as when it last succeeded is not run again: the code, the reference, the study's own files.
`python benchmarks/proof.py --list` says which would run.
"""

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from claims import RESULTS, ROOT
from claims import main as collect

DONE = ROOT / "runs" / "proof.json"
INPUTS = ("src/moqa", "benchmarks", "recipes", "reference", "constraints.txt", "pyproject.toml")
# of a page: the cell of its commands
ROW = re.compile(r"^\| \[[\w-]+\.md\]\([\w-]+\.md\) \| ([^|]+) \|", re.MULTILINE)


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
    """The commands of docs/results/README.md that make the pages, each once, in the order of its table.

    `make demo` comes first. What is no `make` or `python` command is history and cannot be run again.
    """
    found = {"make demo": None}
    for cell in ROW.findall((RESULTS / "README.md").read_text(encoding="utf-8")):
        found |= dict.fromkeys(re.findall(r"`((?:make|python) [^`]+)`", cell))
    return list(found)


def main() -> int:
    done = json.loads(DONE.read_text()) if DONE.is_file() else {}
    inputs, failed = content(), []
    if "--list" in sys.argv[1:]:
        print("\n".join(f"{'as before' if done.get(name) == inputs else 'to run':9s} {name}" for name in commands()))
        return 0
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
