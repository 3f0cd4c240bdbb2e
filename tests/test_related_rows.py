"""Rows of the related methods' study: what was measured with the same inputs is not measured again."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOUT = {"system": "uncurl", "model": "reference", "setting": "8 experts", "seed": 0}


@pytest.fixture
def modules(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import related_rows
    import related_tables

    monkeypatch.setattr(related_tables, "ROWS", tmp_path / "related.json")
    return related_rows, related_tables


def refuse():
    raise AssertionError("measured again")


def test_a_row_is_measured_once_and_again_when_what_it_depends_on_is_another(modules, tmp_path):
    rows = modules[0].Rows(tmp_path / "rows")
    made = rows.row(ABOUT, [8], lambda: {"kl_known": 0.5})
    assert made == ABOUT | {"kl_known": 0.5, "content": made["content"]}
    assert modules[0].Rows(tmp_path / "rows").row(ABOUT, [8], refuse) == made
    assert rows.row(ABOUT, [16], lambda: {"kl_known": 0.25})["kl_known"] == 0.25
    assert rows.row(ABOUT | {"seed": 1}, [8], lambda: {"kl_known": 0.75})["kl_known"] == 0.75


def test_a_row_of_the_tree_counts_where_nothing_was_measured(modules, tmp_path):
    related_rows, tables = modules
    made = related_rows.Rows(tmp_path / "rows").row(ABOUT, [8], lambda: {"kl_known": 0.5})
    tables.ROWS.write_text(json.dumps({"rows": [made, {"system": "uncurl", "setting": "without content"}]}))
    fresh = related_rows.Rows(tmp_path / "another")
    assert fresh.row(ABOUT, [8], refuse) == made
    assert not list((tmp_path / "another").iterdir())
    with pytest.raises(AssertionError, match="measured again"):
        fresh.row(ABOUT, [16], refuse)


def test_every_row_depends_on_the_model_and_the_texts(modules, tmp_path, monkeypatch):
    related_rows, _ = modules
    made = related_rows.Rows(tmp_path / "rows").row(ABOUT, [8], lambda: {"kl_known": 0.5})
    monkeypatch.setattr(related_rows, "inputs", lambda: "of another model")
    assert related_rows.Rows(tmp_path / "rows").row(ABOUT, [8], lambda: {"kl_known": 2.0}) != made


def test_new_rows_take_the_place_of_kept_ones_and_others_stay(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from related_study import with_kept

    kept = [ABOUT | {"kl_known": 1.0}, ABOUT | {"seed": 1, "kl_known": 1.0}]
    new = [ABOUT | {"seed": 2, "kl_known": 3.0}, ABOUT | {"seed": 1, "kl_known": 2.0}]
    assert [(row["seed"], row["kl_known"]) for row in with_kept(new, kept)] == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_a_mean_over_seeds_shows_its_range_and_who_wins(modules):
    tables = modules[1]
    ours = [ABOUT | {"seed": seed, "kl_known": value} for seed, value in ((1, 0.3), (0, 0.1), (2, 0.2))]
    theirs = [row | {"setting": "theirs", "kl_known": 0.25} for row in ours]
    mean, other = (tables.one([*ours, *theirs], name) for name in ("8 experts", "theirs"))
    assert tables.kl(mean, "known") == "0.2000 ± 0.0000 (0.1000 to 0.3000)"
    assert tables.in_seeds(mean, other, "kl_known") == " (less in 2 of 3 seeds)"
    alone = tables.one(ours[:1], "8 experts")
    assert (tables.kl(alone, "known"), tables.in_seeds(alone, other, "kl_known")) == ("0.3000 ± 0.0000", "")
    assert tables.one(ours, "another") is None


def test_a_seed_counts_at_a_budget_when_it_is_measured_whole(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from related_placement_page import MIXED, compared

    def row(seed, strategy, known):
        return {
            "seed": seed, "strategy": strategy, "setting": f"{strategy} at 3", "budget": 3.0, "kl_known": known,
            "kl_novel": known, "bits_per_weight": 3.0,
        }  # fmt: skip

    rows = [row(0, "auto", 0.2), row(0, "uniform", 0.3), row(0, MIXED, 0.1), row(1, "auto", 0.5)]
    lines, shown = compared(rows, 3.0, "3 bits")
    assert lines[0] == "- holds  3 bits: the default's known KL is the least of all placements: 0.2000"
    assert shown.startswith("## 3 bits, 1 seed\n")
    rows += [row(1, "uniform", 0.1), row(1, MIXED, 0.1)]
    lines, shown = compared(rows, 3.0, "3 bits")
    assert lines[0] == (
        "- MISS   3 bits: the default's known KL is the least of all placements in 1 of 2 seeds: 0.3500; "
        "uniform has 0.2000"
    )
    assert "| **uniform** |" in shown
    assert "| auto |" in shown
    assert compared(rows, 2.5, "2.5 bits") == ([], "")


@pytest.mark.parametrize("name", ["experts", "merge", "calibration", "components"])
def test_rows_of_the_tree_are_those_of_the_studies_as_they_are(name, monkeypatch, tmp_path):
    """A study whose constants were changed is to be measured again; one that was not costs nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from related_rows import Rows

    class Known(Rows):
        def row(self, about, depends, make):
            return super().row(about, depends, refuse)

    assert importlib.import_module(f"related_{name}").study(Known(tmp_path), (0,))
