"""Rows of the federated study: what is kept in the tree is enough to go on from."""

import sys
from pathlib import Path

import pytest

from moqa.federated.driver import summarized
from moqa.federated.records import FederatedRecord, RoundRecord
from moqa.federated.settings import Experiment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import federated_grid
        import federated_page
        import federated_rows

        yield federated_grid, federated_rows, federated_page
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def finished(allocation: str, kind: str, **fields) -> FederatedRecord:
    """A run of three rounds that nobody has trained."""
    options = {"heterogeneity": 8, "qat_cost": 2.0, "target": 0.5, "samples": 320, "test_samples": 4, "batch": 4}
    folder = ROOT / "reference" / "text"
    experiment = Experiment(data="text", folder=folder, allocation=allocation, **{**options, **fields})
    rounds = [
        RoundRecord(
            round=number, modes=dict.fromkeys(range(10), kind) if number else {}, seconds=2.0 * (number > 0),
            real_seconds=7.25, allocator_seconds=0.125, uplink_bytes=1000, downlink_bytes=2000,
            metrics={"accuracy": 0.3 + number / 8, "accuracy-exact": 0.5},
            changes=["round 2: client 1"] if number == 2 else [],
        )
        for number in range(4)
    ]  # fmt: skip
    return summarized(experiment, rounds)


def test_a_run_comes_back_from_its_row(study):
    _, rows, _ = study
    one = finished("coarse", "qat")
    row = rows.row(one)
    back = rows.record(row)
    assert rows.row(back) | {"said": row["said"]} == row
    assert (back.experiment, back.seconds_to_target) == (one.experiment, 6.0)
    assert [each.modes for each in back.rounds] == [each.modes for each in one.rounds]
    assert row["said"] == ["round 2: client 1"]


def test_rows_stay_in_the_tree(study, tmp_path, monkeypatch):
    _, rows, _ = study
    monkeypatch.setattr(rows, "ROWS", tmp_path / "federated.json")
    assert (rows.read(), rows.processes()) == ([], {})
    found = [rows.row(finished(name, "qat")) for name in ("coarse", "qat")]
    rows.write(found, {"rounds": []})
    assert (rows.read(), rows.processes()) == (found, {"rounds": []})


def test_another_target_needs_no_other_run(study):
    _, rows, _ = study
    row = rows.row(finished("coarse", "qat"))
    assert rows.known(finished("coarse", "qat").experiment, [row]) == row
    assert rows.known(finished("coarse", "qat", target=0.9).experiment, [row])["seconds_to_target"] is None
    assert rows.known(finished("coarse", "qat", target=0.4).experiment, [row])["seconds_to_target"] == 4.0
    assert rows.known(finished("coarse", "qat", seed=1).experiment, [row]) is None


def test_another_clock_needs_no_other_run_where_all_clients_do_the_same(study):
    _, rows, _ = study
    equal = rows.known(finished("qat", "qat", heterogeneity=1).experiment, [rows.row(finished("qat", "qat"))])
    slowed = rows.known(finished("qat", "qat").experiment, [rows.row(finished("qat", "qat", heterogeneity=1))])
    assert 1 < slowed["seconds"] / equal["seconds"] < 8
    assert (
        rows.known(finished("coarse", "qat", heterogeneity=1).experiment, [rows.row(finished("coarse", "qat"))]) is None
    )


def test_the_grid_has_every_cell_once(study):
    grid, _, _ = study
    wanted = dict(grid.experiments())
    cells = {
        (one.data, one.clients, one.heterogeneity, one.allocation, one.seed)
        for name, one in wanted.items()
        if not name.startswith(("slow", "secure", "attack"))
    }
    assert len(cells) == 3 * 2 * 2 * 6 * 3


def test_a_page_says_what_the_rows_say(study):
    grid, rows, page = study
    found = {}
    for name, one in grid.part("fashion", 8, 0):
        kind = {"fp": "fp", "ptq": "ptq"}.get(one.allocation, "qat")
        rounds = finished("qat", kind).rounds
        for each in rounds:
            each.seconds *= 2 if one.allocation == "qat" else 1
            each.metrics["accuracy"] -= 0.1 if one.allocation == "ptq" else 0.0
        found[name] = rows.row(summarized(one, rounds))
    lines = page.claims(found).splitlines()
    where = "Fashion-MNIST, 10 clients, 8x"
    assert lines[0] == f"- holds {where}, time of as many rounds, all-QAT over the hybrid, one seed: 2.00; wanted 1.5"
    assert any(line.startswith("- holds") and "above all-PTQ, one seed: 10.0; wanted 3" in line for line in lines)
    assert any(
        line.startswith("- MISS") and "allocator takes, at most, one seed: 1.72; wanted 1" in line for line in lines
    )
    assert "| fashion, 8x | 6 | 18 |" in page.missing(found)
    assert "| qat | 1 | 48.8 | 0 of 1 reach it | 12.0 |" in page.table(list(found.values()))
