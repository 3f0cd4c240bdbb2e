"""The measurement of many clients (`benchmarks/clients.py`), short: nothing is lost, wrong or logged."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def clients(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "clients", raising=False)
    import clients

    return clients


def test_loses_nothing(clients, tiny_model):
    found = clients.measure(tiny_model, minutes=0.05, clients=12)
    assert found.lost == []
    assert found.wrong == 0
    assert len(found.waits) >= 4 * 6, "each good client got all its answers"
    assert found.log == 0
    assert found.exit_code == 0
    assert {"huge: 413", "strange: 400"} <= found.answers.keys()
    text = clients.section(found, tiny_model)
    assert "| lost, wrong | 0, 0 |" in text


def test_replaces_its_section_only(clients, tmp_path):
    page = tmp_path / "page.md"
    for heading, text in (("Clients", "old"), ("Kills", "other"), ("Clients", "new")):
        clients.write_section(f"## {heading}", text, page)
    assert page.read_text() == "# Robustness\n\n## Clients\nnew\n\n## Kills\nother\n"
