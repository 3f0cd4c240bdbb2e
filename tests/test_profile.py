"""Profiles of the reference model against plain hooks, and their reuse on a tiny one."""

import dataclasses
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from moqa.errors import MoqaError
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.methods.grid import fit_grid
from moqa.models.precision import in_stored_precision
from moqa.models.products import fast_dtype
from moqa.models.view import open_model
from moqa.planning import plan
from moqa.profiling import SELF, profile, read_profile
from moqa.profiling.passes import parts
from moqa.profiling.run import quiet
from moqa.profiling.sensitivity import squared_errors

MODEL = Path(__file__).parents[1] / "reference" / "model"
SAMPLES, CONTEXT, LAYERS = 32, 64, range(6)
TINY = {"samples": 3, "context": 32, "self_samples": 2}


@pytest.fixture(scope="module")
def view():
    return open_model(MODEL)


@pytest.fixture(scope="module")
def measured(view, texts, tmp_path_factory):
    """The reference model on wiki, and on what it writes itself; the errors are those of plain rounding."""
    out = tmp_path_factory.mktemp("profile") / "reference"
    windows = {"samples": SAMPLES, "context": CONTEXT, "self_samples": SAMPLES}
    return profile(MODEL, [texts["wiki"]], out, method="rtn", view=view, **windows)


@pytest.fixture
def tiny(tiny_model, texts, tmp_path):
    """A function that profiles the tiny model into one folder and tells what it measured."""

    def make(*names, model=tiny_model, **options):
        steps = []

        def report(step, done, total, **_):
            steps.append(step)

        chosen = [texts[name] for name in names]
        return profile(model, chosen, tmp_path / "tiny", report=report, **(TINY | options)), steps

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestActivation:
    @pytest.mark.parametrize("name", ["wiki", SELF])
    def test_significance_is_shares(self, measured, name):
        for layer in LAYERS:
            shares = measured.significance(name, layer)
            assert shares.shape == (16,)
            assert float(shares.sum()) == pytest.approx(1, abs=1e-5)
            assert (shares >= 0).all()

    @pytest.mark.parametrize("name", ["wiki", SELF])
    def test_every_token_reaches_top_k_experts(self, measured, name):
        for layer in LAYERS:
            tokens = measured.layer(name, layer, "tokens")
            assert int(tokens.sum()) == measured.record.top_k * SAMPLES * CONTEXT
            pairs = measured.layer(name, layer, "coactivation")
            assert torch.equal(pairs.diagonal().long(), tokens)
            assert torch.equal(pairs, pairs.T)
            # each token of two experts is one pair
            assert int(pairs.sum() - pairs.diagonal().sum()) == 2 * SAMPLES * CONTEXT
            assert float(measured.layer(name, layer, "gate_mass").sum()) == pytest.approx(SAMPLES * CONTEXT, rel=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("layer", [0, 4])
    def test_statistics_are_those_of_plain_hooks(self, measured, view, layer):
        experts, seen = view.experts(layer), []
        # the reference model is stored in bfloat16
        dtype = fast_dtype(torch.bfloat16) or torch.float32
        with ExitStack() as stack:
            for index in LAYERS:
                stack.enter_context(in_stored_precision(view, index))
            stack.enter_context(experts.register_forward_pre_hook(lambda _, args: seen.append(args)))
            view.model(measured.samples("wiki"))
        (hidden, index, gates), *_ = seen
        tokens, mass, channel = torch.zeros(16), torch.zeros(16), torch.zeros(16, 256)
        for x, chosen, weights in zip(hidden, index, gates, strict=True):
            for expert, gate in zip(chosen.tolist(), weights.tolist(), strict=True):
                up_gate, up = (experts.gate_up_proj[expert].to(dtype) @ x.to(dtype)).float().chunk(2)
                inner = torch.nn.functional.silu(up_gate) * up
                tokens[expert] += 1
                mass[expert] += gate
                channel[expert] += gate * inner.abs() * experts.down_proj[expert].norm(dim=0)
        assert torch.equal(measured.layer("wiki", layer, "tokens"), tokens.long())
        assert torch.allclose(measured.layer("wiki", layer, "gate_mass"), mass, rtol=1e-4)
        assert torch.allclose(measured.layer("wiki", layer, "channel"), channel, rtol=1e-3, atol=1e-5)
        expected = channel.sum(1) / channel.sum()
        assert torch.allclose(measured.significance("wiki", layer), expected, rtol=1e-3)

    def test_similarity_is_a_cosine(self, measured, view):
        table = measured.weights["layer.2.similarity"]
        first, second = (
            torch.cat([view.weight(u).flatten() for u in view.block_units(2) if u.expert == expert])
            for expert in (3, 11)
        )
        assert float(table[3, 11]) == pytest.approx(float(torch.cosine_similarity(first, second, dim=0)), abs=1e-5)
        assert torch.allclose(table.diagonal(), torch.ones(16), atol=1e-5)

    def test_starved_experts_are_named(self, measured):
        found = measured.starved()
        silent = [(i, e) for i in LAYERS for e in range(16) if measured.layer("wiki", i, "tokens")[e] == 0]
        assert found == [f"layer {layer} expert {expert}" for layer, expert in silent]


class TestWithoutSensitivity:
    def test_serves_uniform_plans_only(self, tiny_model, texts, tmp_path):
        found = profile(tiny_model, [texts["wiki"]], tmp_path / "p", samples=3, context=32, self_samples=0,
                        sensitivity=False)  # fmt: skip
        assert read_profile(tmp_path / "p").significance("wiki", 0).shape == found.significance("wiki", 0).shape
        assert not plan(found, None, strategy="uniform", widths=[3]).predicted
        with pytest.raises(MoqaError, match="has no sensitivity"):
            plan(found, "6bpw", hedge=0)
        with pytest.raises(MoqaError, match="was made with"):
            profile(tiny_model, [texts["wiki"]], tmp_path / "p", samples=3, context=32, self_samples=0)

    def test_a_profile_that_has_it_serves_as_well(self, tiny_model, texts, tmp_path):
        options = {"samples": 3, "context": 32, "self_samples": 0}
        profile(tiny_model, [texts["wiki"]], tmp_path / "p", **options)
        before = contents(tmp_path / "p")
        profile(tiny_model, [texts["wiki"]], tmp_path / "p", sensitivity=False, **options)
        assert contents(tmp_path / "p") == before


class TestSensitivity:
    @pytest.mark.parametrize("name", ["wiki", SELF])
    def test_is_positive_and_falls_with_the_width(self, measured, name):
        table = measured.sensitivity(name)
        assert table.shape == (len(measured.record.units), len(WIDTHS))
        assert table.isfinite().all()
        reached = table[table.sum(1) > 0]
        assert len(reached) > 0.8 * len(table)
        assert (reached > 0).all()
        # one draw of labels is noisy at a single unit; over all units every bit takes three quarters of the error
        assert (reached[:, 2:] < reached[:, :-2]).float().mean() > 0.99
        ratios = table.sum(0)[1:-1] / table.sum(0)[2:]
        assert ((ratios > 3) & (ratios < 7)).all()

    def test_an_expert_that_no_token_reached_has_none(self, measured):
        for row, unit in enumerate(measured.record.units):
            if unit.expert is not None and measured.layer("wiki", unit.layer, "tokens")[unit.expert] == 0:
                assert not measured.sensitivity("wiki")[row].any()

    def test_rounding_falls_by_four_per_bit(self, measured):
        table = measured.weights["rounding"]
        assert ((table[:, 1:-1] / table[:, 2:]).mean(0) - 4.3).abs().max() < 1

    @pytest.mark.parametrize("encoding", ["int", "table", "trellis"])
    def test_widths_together_have_the_errors_of_each(self, encoding):
        weight, scheme = (
            torch.randn(40, 100, generator=torch.Generator().manual_seed(0)),
            Scheme(width=2, encoding=encoding),
        )
        together = squared_errors(weight, scheme, (1, 2, 3))
        assert torch.equal(together, torch.cat([squared_errors(weight, scheme, (width,)) for width in (1, 2, 3)]))
        assert (together.diff() < 0).all()

    @torch.no_grad()
    def test_predicts_what_rounding_really_costs(self, measured, view):
        tokens = parts(measured.samples("wiki"))[1]  # the windows that errors are measured on
        original = view.model(tokens).logits.log_softmax(-1)
        predicted = measured.sensitivity("wiki")[:, WIDTHS.index(2)]
        order = predicted.argsort()
        # sixteen units over the range of what is not nothing
        rows = order[torch.linspace(len(order) // 4, len(order) - 1, 16).long()].tolist()
        real, units = [], list(view.units.values())
        for row in rows:
            kept = view.weight(units[row]).clone()
            grid = fit_grid(kept, Scheme(width=2)).grid
            view.set_weight(units[row], grid.decode(grid.encode(kept)))
            logp = view.model(tokens).logits.log_softmax(-1)
            view.set_weight(units[row], kept)
            real.append(float((original.exp() * (original - logp)).sum(-1).mean()))
        expected = predicted[rows].tolist()
        assert spearmanr(real, expected).statistic > 0.8
        # and in the same unit: nats per token
        assert np.exp(np.abs(np.log(np.array(real) / np.array(expected))).mean()) < 4


@pytest.mark.parametrize("count", range(1, 10))
def test_samples_that_are_measured_were_not_fitted(count):
    fitted, measured, others = (set(part.tolist()) for part in parts(torch.arange(count)))
    assert fitted | measured | others == set(range(count))
    assert measured
    assert count == 1 or not fitted & measured


class TestFolder:
    def test_comes_back_from_disk(self, measured):
        again = read_profile(measured.folder)
        assert again.record == measured.record
        assert again.names == ("wiki",)
        for name, tensors in measured.statistics.items():
            assert again.statistics[name].keys() == tensors.keys()
            assert all(torch.equal(again.statistics[name][key], tensor) for key, tensor in tensors.items())

    def test_records_what_it_saw(self, measured, texts):
        record = measured.record.distributions
        assert (record["wiki"].samples, record["wiki"].tokens) == (SAMPLES, SAMPLES * CONTEXT)
        assert record["wiki"].fitted.digest == texts["wiki"].digest
        assert record[SELF].fitted is None
        assert measured.samples("wiki").shape == measured.samples(SELF).shape == (SAMPLES, CONTEXT)

    def test_the_model_is_as_it_was(self, measured, view):
        assert not any(hasattr(view.experts(layer), "moqa_observer") for layer in LAYERS)
        assert not any(parameter.requires_grad for parameter in view.model.parameters())

    @pytest.mark.parametrize("name", ["data.wiki.safetensors", "weights.safetensors"])
    @pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
    def test_a_damaged_file_is_named(self, tiny, name, damage):
        made, _ = tiny("wiki")
        path = made.folder / name
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:100] if damage == "truncated" else b"")
        with pytest.raises(MoqaError, match=name.replace(".", r"\.")):
            read_profile(made.folder)

    def test_a_newer_format_says_so(self, tiny):
        made, _ = tiny("wiki")
        path = made.folder / "profile.json"
        path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
        with pytest.raises(MoqaError, match="upgrade moqa"):
            read_profile(made.folder)


class TestReuse:
    def test_the_second_time_nothing_is_measured(self, tiny):
        first, steps = tiny("wiki", "novels")
        assert {"self-sampling", "activation", "sensitivity"} <= set(steps)
        before = contents(first.folder)
        again, steps = tiny("wiki", "novels")
        assert steps == []
        assert again.record == first.record
        assert contents(first.folder) == before

    def test_a_part_of_what_is_there_is_there(self, tiny):
        tiny("wiki", "novels")
        assert tiny("novels")[1] == []

    def test_more_of_the_models_own_text_is_written_anew(self, tiny):
        first, _ = tiny("wiki")
        before = contents(first.folder)
        more, steps = tiny("wiki", self_samples=4)
        assert "self-sampling" in steps
        assert len(more.samples(SELF)) == 4
        assert contents(first.folder)["data.wiki.safetensors"] == before["data.wiki.safetensors"]

    def test_another_distribution_is_added(self, tiny):
        first, _ = tiny("wiki")
        before = contents(first.folder)
        both, steps = tiny("wiki", "python")
        assert "self-sampling" not in steps
        assert set(both.names) == {"wiki", "python"}
        after = contents(first.folder)
        assert after.keys() - before.keys() == {"data.python.safetensors"}
        del before["profile.json"]
        assert all(after[name] == content for name, content in before.items())

    def test_the_same_call_gives_the_same_bytes(self, tiny):
        first, _ = tiny("wiki")
        before = contents(first.folder)
        shutil.rmtree(first.folder)
        tiny("wiki")
        assert contents(first.folder) == before

    @pytest.mark.parametrize(
        "options", [{"samples": 4}, {"context": 16}, {"seed": 1}, {"group_size": 32}, {"method": "rtn"}]
    )
    def test_other_settings_are_refused(self, tiny, options):
        first, _ = tiny("wiki")
        before = contents(first.folder)
        with pytest.raises(MoqaError, match="was made with context 32, samples 3, seed 0, group_size 64"):
            tiny("wiki", **options)
        assert contents(first.folder) == before

    def test_another_model_is_refused(self, tiny):
        tiny("wiki")
        with pytest.raises(MoqaError, match="another model"):
            tiny("wiki", model=MODEL)

    def test_a_folder_of_something_else_is_refused(self, tiny, tmp_path):
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "photo").touch()
        with pytest.raises(MoqaError, match="exists and is not a profile"):
            tiny("wiki")

    def test_a_failure_leaves_no_folder(self, tiny, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("moqa.profiling.store.write_sealed", fail)
        with pytest.raises(KeyboardInterrupt):
            tiny("wiki")
        assert not (tmp_path / "tiny").exists()

    @pytest.mark.parametrize("name", [SELF, "weights"])
    def test_names_that_moqa_needs_itself(self, tiny_model, texts, tmp_path, name):
        with pytest.raises(MoqaError, match="a name that moqa needs itself"):
            profile(tiny_model, [dataclasses.replace(texts["wiki"], name=name)], tmp_path / "p", **TINY)

    def test_without_the_models_own_text(self, tiny):
        made, _ = tiny("wiki", self_samples=0)
        assert set(made.statistics) == {"wiki"}

    def test_symmetric_rounding_has_no_width_of_one(self, tiny):
        made, _ = tiny("wiki", symmetric=True)
        assert made.record.widths == WIDTHS[1:]


def test_quiet_reports_nothing(capsys):
    quiet("step", 0, 1)
    assert capsys.readouterr().out == ""
