"""What every export does, whatever it writes."""

from pathlib import Path

import pytest
from long_work import contents, refusal

import moqa
from moqa.exports.registry import EXPORTS, FORMATS
from moqa.planning import ENGINES

PAGE = Path(__file__).parents[2] / "docs" / "commands" / "export.md"


@pytest.mark.parametrize("name", FORMATS)
class TestEveryExport:
    def test_it_registers_itself_under_its_name(self, name):
        assert EXPORTS.find(name).name == name

    def test_it_is_on_the_page(self, name):
        assert f"| `{name}` |" in PAGE.read_text()

    def test_a_missing_source_is_named_and_nothing_is_written(self, name, tmp_path):
        message = refusal(lambda: moqa.export(tmp_path / "absent", tmp_path / "out", to=name))
        assert "absent" in message
        assert not list(tmp_path.iterdir())

    def test_a_model_is_no_source(self, name, tiny_model, tmp_path):
        before = contents(tiny_model)
        assert tiny_model.name in refusal(lambda: moqa.export(tiny_model, tmp_path / "out", to=name))
        assert contents(tiny_model) == before
        assert not list(tmp_path.iterdir())


def test_every_engine_reads_checkpoints_or_an_export():
    assert {engine.export for engine in ENGINES.values()} <= {None, *FORMATS}
