"""What moqa makes of kills and damage: each part writes its section of docs/results/robustness.md.

    benchmarks/robustness.py             # all parts
    benchmarks/robustness.py kills --every 5 --damaged-every 50

Sections are written as far as they have come; one that is not run stays as it is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "robustness.md"
KILLS = ROOT / "tests" / "hostile" / "kills.py"
JOBS = (
    "quantize-gptq", "quantize-rtn", "quantize-again", "profile", "profile-more", "compress", "adjust", "adjust-again",
    "plan", "report",
)  # fmt: skip
DAMAGES = {"none": "killed", "power": "killed by a loss of power", "flip": "one bit flipped", "cut": "a file cut off"}


def kills(options: argparse.Namespace) -> Iterator[str]:
    """Kills at every call that changes the disk; then the same job on what is left."""
    rows = list[tuple[str, str, Counter[str]]]()
    with tempfile.TemporaryDirectory() as folder:
        for job in options.jobs:
            for damage, name in DAMAGES.items():
                every = options.damaged_every if damage in ("flip", "cut") else options.every
                command = [sys.executable, KILLS, folder, f"{job}:{damage}:{every}"]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                *wrong, last = printed.splitlines()
                for line in wrong:
                    print(line, file=sys.stderr, flush=True)
                rows.append((job, name, Counter(json.loads(last))))
                print(_row(*rows[-1]), file=sys.stderr, flush=True)
            yield kills_section(rows, options)


def _row(job: str, name: str, seen: Counter[str]) -> str:
    tried = sum(seen.values())
    wrong = tried - seen["harmless"] - seen["found"]
    return f"| {job} | {name} | {tried} | {seen['harmless']} | {seen['found']} | {wrong} |"


def kills_section(rows: list[tuple[str, str, Counter[str]]], options: argparse.Namespace) -> str:
    """Explanation and table."""
    table, every, damaged = "\n".join(_row(*row) for row in rows if row[2]), options.every, options.damaged_every
    done = " ".join(dict.fromkeys(job for job, _, _ in rows))
    typed = f"kills --every {every} --damaged-every {damaged} --jobs {done}"
    total = _row("**all**", "", sum((seen for _, _, seen in rows), Counter[str]()))
    return f"""Made by `python benchmarks/robustness.py {typed}`.

A process of its own does each job on a tiny model, and is killed right before its n-th call of `fsync`, `rename`,
`replace`, `unlink`, `rmdir` or `mkdir`, for every n that is a multiple of {every}. A loss of power leaves only what was
synced: of a folder the entries, of a file the bytes that it had when it was; all else is gone or empty. In unfinished
work (for every n that is a multiple of {damaged}) a bit is flipped, or the end cut off, in one file after the other;
jobs with fewer calls have no such row. Then the same job runs again.

- harmless: exit 0, the folder is byte for byte that of an undisturbed run, and nothing lies beside it.
- found: the same, after a line that unfinished work starts over, or after one line and exit 2 and the same job again.
- wrong: anything else: another byte, a file left behind, a raw error, or something half-written where other commands
  look before the job has run again.

| job | what happened | tries | harmless | found | wrong |
|---|---|---:|---:|---:|---:|
{table}
{total}
"""


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[str]]]] = {
    "kills": ("Kills and damaged unfinished work", kills),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--jobs", nargs="+", default=JOBS, choices=JOBS, help="of the kills")
    parser.add_argument("--every", type=int, default=1, help="distance of two kills, in calls")
    parser.add_argument("--damaged-every", type=int, default=20, help="the same where files are damaged, too")
    options = parser.parse_args()
    for part in options.parts or PARTS:
        title, run = PARTS[part]
        for text in run(options):
            write_section(f"## {title}", text)


def write_section(heading: str, text: str, path: Path = PAGE) -> None:
    """Replace a section of the page, or add it at the end."""
    page = path.read_text(encoding="utf-8") if path.exists() else "# Robustness\n"
    before, found, rest = page.partition(f"\n{heading}\n")
    after = "\n## " + rest.partition("\n## ")[2] if found and "\n## " in rest else ""
    path.write_text(f"{before.rstrip()}\n\n{heading}\n{text.rstrip()}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
