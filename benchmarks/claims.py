"""Every claim of the results pages and of the README in one index: docs/results/claims.json and claims.md.

A claim is a line `- holds TEXT` or `- MISS TEXT` of a page in docs/results, where its study put it, or one of the
README, whose number is computed from such a page here. Papers are named in a line as (arXiv NUMBER).
"""

import json
import re
from pathlib import Path
from typing import Any

from moqa.errors import MoqaError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
INDEX, PAGE = RESULTS / "claims.json", RESULTS / "claims.md"
LINE = re.compile(r"^- (holds|MISS) +(?:in (\d+) of (\d+): )?(.+)$", re.MULTILINE)
COMMAND = re.compile(r"^(?:Command:|Made by) `((?:make|python) [^`]+)`", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
# of the README: column of a table -> what it says of the smallest and the largest number there
ADJUSTED = {
    "1 %": "with 1 % more bytes the divergence falls by {} %",
    "3 %": "with 3 % more bytes the divergence falls by {} %",
}


def claim(holds: bool, text: str) -> str:
    """A line of a page that this index takes up.

    >>> claim(True, "it is smaller: 3 MiB; wanted 4")
    '- holds it is smaller: 3 MiB; wanted 4'
    """
    return f"- {'holds' if holds else 'MISS'} {text}"


def command_of(page: Path) -> str:
    """The command that makes a page.

    Raises:
        MoqaError: if it names none.
    """
    found = COMMAND.search(page.read_text(encoding="utf-8"))
    if found is None:
        raise MoqaError(f"{page.name} has claims and names no command", "begin a line with: Command: `make ...`")
    return found[1]


def claims_of(page: Path) -> list[dict[str, Any]]:
    """The claims of a results page, each with its number: the first after the last colon, or else the first."""
    found = []
    for word, shown, cases, text in LINE.findall(page.read_text(encoding="utf-8")):
        paper, interval = re.search(r"arXiv (\d{4}\.\d{5})", text), re.search(r"± (\d+\.\d+)", text)
        # what is wanted, or stands in the paper, is not the number that was measured
        measured = re.split(r"; wanted|\(arXiv", text)[0]
        numbers = NUMBER.findall(measured.rpartition(": ")[2]) or NUMBER.findall(measured)
        found.append({
            "text": text, "paper": paper[1] if paper else None,
            "number": float(shown) if shown else float(numbers[0]) if numbers else None,
            "interval": float(interval[1]) if interval else None, "command": command_of(page),
            "holds": word == "holds", "page": page.name,
            **({"cases": int(cases)} if cases else {}),
        })  # fmt: skip
    return found


def table_of(page: Path, heading: str) -> list[dict[str, str]]:
    """The rows of the first table of a page whose heading begins with some text."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    names = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        # of columns with one name, the first counts
        rows.append(dict(reversed(list(zip(names, cells, strict=True)))))
    return rows


def claims_of_readme() -> list[dict[str, Any]]:
    """What the README says in percent, where no page says it in these words: computed from their tables."""
    page = RESULTS / "main-job.md"
    sizes = {row["row"]: float(row["bytes"].replace(",", "")) for row in table_of(page, "row")}
    share = 100 * sizes["budget 3"] / sizes["original"]
    found = [(page, f"the default plan at 3 bits takes {share:.0f} % of the original", share)]
    page = RESULTS / "adjust.md"
    default = [row for row in table_of(page, "bits, hedge") if row["bits, hedge"] == "3, 0.3"]
    for column, text in ADJUSTED.items():
        falls = sorted(-float(row[column]) for row in default)
        found += [(page, text.format(f"{number:.1f}"), number) for number in (falls[0], falls[-1])]
    page = RESULTS / "speed.md"
    change = max(abs(float(row["change"].rstrip("%"))) for row in table_of(page, "text"))
    found.append((page, f"8 bits in inputs of kernels change the perplexity by at most {change:.3f} %", change))
    return [
        {
            "text": text, "paper": None, "number": round(number, 3), "interval": None, "command": command_of(page),
            "holds": True, "page": page.name,
        }
        for page, text, number in found
    ]  # fmt: skip


def index() -> dict[str, Any]:
    """All claims, those of the README first."""
    pages = sorted(path for path in RESULTS.glob("*.md") if path.name not in ("README.md", PAGE.name))
    return {"claims": [*claims_of_readme(), *(claim for page in pages for claim in claims_of(page))]}


def page(claims: list[dict[str, Any]]) -> str:
    """The index as a page."""
    lines = [
        f"| {claim['text'].replace('|', '/')} | {claim['paper'] or 'ours'} | {'yes' if claim['holds'] else '**no**'} | "
        f"[{claim['page']}]({claim['page']}) | `{claim['command']}` |"
        for claim in claims
    ]
    papers = [claim for claim in claims if claim["paper"]]
    return f"""# Claims

Every claim of the README and of the pages here, ours and those of papers, with the command that shows it again
(`make proof` runs all of them, and `python benchmarks/claims.py` collects this index, in
[claims.json](claims.json) for machines). {sum(c["holds"] for c in claims)} of {len(claims)} hold here; of {len(papers)}
claims of papers, {sum(c["holds"] for c in papers)} do. "No" means: not on this model, at this size, in this setting.

| claim | paper | holds | page | command |
|---|---|---|---|---|
{chr(10).join(lines)}
"""


def main() -> None:
    found = index()
    INDEX.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(found["claims"]), encoding="utf-8")


if __name__ == "__main__":
    main()
