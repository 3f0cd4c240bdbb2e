"""The index of claims is what the pages say, every claim has a command, and the README's numbers stand in it."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from moqa.errors import MoqaError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import claims
        import related_page
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return claims, related_page


def written():
    return json.loads((ROOT / "docs" / "results" / "claims.json").read_text(encoding="utf-8"))["claims"]


def test_the_index_is_what_the_pages_say(benchmarks):
    claims, _ = benchmarks
    found = claims.index()["claims"]
    assert found == written(), "run `python benchmarks/claims.py`"
    assert claims.page(found) == claims.PAGE.read_text(encoding="utf-8"), "run `python benchmarks/claims.py`"


def test_every_claim_has_what_the_contract_says():
    found = written()
    assert len(found) > 30
    for claim in found:
        assert {"text", "paper", "number", "interval", "command", "holds"} <= claim.keys()
        assert isinstance(claim["number"], float)
        assert claim["paper"] is None or re.fullmatch(r"\d{4}\.\d{5}", claim["paper"])
        words = claim["command"].split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), claim["command"]
        else:
            assert (ROOT / words[1]).is_file(), claim["command"]


def test_the_number_of_a_claim_stands_in_its_page(benchmarks):
    claims, _ = benchmarks
    computed = {claim["text"] for claim in claims.claims_of_readme()}
    for claim in written():
        page = (ROOT / "docs" / "results" / claim["page"]).read_text(encoding="utf-8")
        numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", page)}
        if claim["text"] not in computed:
            assert abs(claim["number"]) in numbers, claim["text"]


def test_a_page_with_claims_and_no_command_is_an_error(benchmarks, tmp_path):
    claims, _ = benchmarks
    page = tmp_path / "page.md"
    page.write_text("# A page\n- holds  it is better: 0.5\n")
    with pytest.raises(MoqaError, match=r"^page.md has claims and names no command: begin a line with"):
        claims.claims_of(page)


def test_the_shares_of_the_readme_are_numbers_of_claims():
    claims = written()
    # as one rounds by hand
    rounded = {math.floor(abs(claim["number"]) + 0.5) for claim in claims}
    texts = " ".join(claim["text"] for claim in claims)
    for number in re.findall(r"([\d.]+) %", README):
        below = "under" in README[: README.index(f"{number} %")].rsplit("(", 1)[-1]
        known = float(number) in rounded or f"{number} %" in texts
        assert known or (below and any(c["number"] <= float(number) for c in claims)), number


def test_the_tables_of_the_readme_stand_in_the_pages_that_it_links_to():
    for section in re.split(r"^## ", README, flags=re.MULTILINE):
        pages = [ROOT / link for link in re.findall(r"\((docs/results/[\w-]+\.md)\)", section)]
        text = "".join(page.read_text(encoding="utf-8") for page in pages)
        cells = [cell for line in section.splitlines() if line.startswith("| ") for cell in line.split("|")[2:]]
        numbers = [number for cell in cells for number in re.findall(r"\d[\d.,]*", cell)]
        assert pages or not numbers, section[:40]
        known = set(re.findall(r"\d[\d.,]*", text)) | {"0"}
        assert [number for number in numbers if number not in known] == []


def test_the_pages_of_the_related_methods_are_made_from_their_rows(benchmarks):
    _, related = benchmarks
    rows = related.read_rows()
    needed = {
        "system",
        "setting",
        "control",
        "model",
        "seed",
        "bits_per_weight",
        "bytes",
        "kl_known",
        "kl_novel",
        "accuracy",
    }
    assert all(needed <= row.keys() for row in rows)
    for system, page in related.PAGES.items():
        path = ROOT / "docs" / "results" / f"{system}.md"
        if related.of(rows, system):
            assert path.read_text(encoding="utf-8") == page(rows), "run `python benchmarks/related_page.py`"
