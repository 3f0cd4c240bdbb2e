"""`moqa reduce`: merged experts are exact where they should be, and the result is a model that every command takes."""

import json
import shutil

import pytest
import torch

import moqa
from moqa.errors import MoqaError
from moqa.models.view import open_model
from moqa.reduction.merge import ExpertMatrices, alignment, merged
from moqa.reduction.record import read_reduction
from moqa.reduction.run import merged_rows

SMALL = {"samples": 4, "context": 32, "by": "uncurl"}


def expert(seed, width=8, features=5):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((width, features), (width, features), (features, width))
    return ExpertMatrices(*(torch.randn(shape, generator=generator) for shape in shapes))


class TestMerge:
    def test_a_permuted_twin_changes_nothing(self):
        one, order = expert(0), torch.randperm(8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(order[alignment(one, one.in_order(order))], torch.arange(8))
        same = merged([one, one.in_order(order)], torch.tensor([5, 2]))
        for name in ("gate", "up", "down"):
            assert torch.allclose(getattr(same, name), getattr(one, name), atol=1e-6)

    def test_the_order_of_neurons_does_not_change_an_expert(self):
        one, x = expert(0), torch.randn(3, 5)
        other = one.in_order(torch.randperm(8))

        def run(e):
            return (torch.nn.functional.silu(x @ e.gate.T) * (x @ e.up.T)) @ e.down.T

        assert torch.allclose(run(one), run(other), atol=1e-5)

    def test_tokens_are_the_weights(self):
        one, other = expert(0), expert(1)
        found = merged([one, other], torch.tensor([3, 1]))
        aligned = other.in_order(alignment(one, other))
        assert torch.allclose(found.up, 0.75 * one.up + 0.25 * aligned.up, atol=1e-6)

    def test_experts_without_tokens_weigh_the_same(self):
        rows = torch.tensor([[2.0], [4.0], [8.0]])
        assert merged_rows(rows, [0, 0, 1], torch.tensor([0, 0, 3])).tolist() == [[3.0], [8.0]]


@pytest.fixture(scope="module")
def reduced(tiny_model, texts, tmp_path_factory):
    return moqa.reduce(tiny_model, 3, [texts["wiki"]], tmp_path_factory.mktemp("reduced") / "three", **SMALL)


class TestReduced:
    def test_is_a_model_of_transformers(self, reduced, tiny_model):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(reduced, dtype="auto")
        assert model.config.num_experts == 3
        assert model.dtype == torch.bfloat16
        assert torch.isfinite(model(torch.arange(12)[None]).logits).all()
        before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto")
        q = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(model.get_parameter(q), before.get_parameter(q))
        assert model.model.layers[0].mlp.gate.weight.shape == (3, 72)

    def test_says_what_became_of_every_expert(self, reduced):
        record = read_reduction(reduced)
        assert (record.before, record.experts, record.by) == (6, 3, "uncurl")
        assert sorted(record.groups) == [0, 1]
        assert all(set(groups) == {0, 1, 2} for groups in record.groups.values())

    def test_quantizes_on_and_is_evaluated_against_the_original(self, reduced, tiny_model, texts, tmp_path):
        profile = moqa.profile(reduced, [texts["wiki"]], tmp_path / "profile", samples=4, context=32, self_samples=1)
        out = moqa.quantize(reduced, moqa.plan(profile, "5bpw"), tmp_path / "out", method="rtn", profile=profile)
        assert moqa.open_checkpoint(out).bytes < sum(p.stat().st_size for p in reduced.glob("*.safetensors"))
        found = moqa.evaluate(reduced, [texts["python"]], against=tiny_model, context=32, windows=2)
        assert found.distributions["python"].kl_divergence > 0

    def test_its_texts_are_refused(self, reduced, texts):
        with pytest.raises(MoqaError, match="wiki"):
            moqa.evaluate(reduced, [texts["wiki"]], context=32, windows=2)

    def test_frequency_keeps_experts_as_they_are(self, tiny_model, texts, tmp_path):
        out = moqa.reduce(tiny_model, 4, [texts["wiki"]], tmp_path / "four", **SMALL | {"by": "frequency"})
        groups = read_reduction(out).groups[0]
        before, after = open_model(tiny_model), open_model(out)
        for old, new in enumerate(groups):
            if new >= 0:
                name = "model.layers.0.mlp.experts.{}.down_proj"
                a, b = (v.weight(v.units[name.format(e)]) for v, e in ((before, old), (after, new)))
                assert torch.equal(a, b)
                router = [v.model.model.layers[0].mlp.gate.weight[e] for v, e in ((before, old), (after, new))]
                assert torch.equal(*router)

    def test_a_stopped_run_goes_on(self, tiny_model, texts, tmp_path, reduced):
        def stop(step, done, total):
            if done == 1:
                raise KeyboardInterrupt

        out = tmp_path / "three"
        with pytest.raises(KeyboardInterrupt):
            moqa.reduce(tiny_model, 3, [texts["wiki"]], out, report=stop, **SMALL)
        assert not out.exists()
        moqa.reduce(tiny_model, 3, [texts["wiki"]], out, **SMALL)
        assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == {
            p.name: p.read_bytes() for p in reduced.glob("*.safetensors")
        }


class TestRefused:
    @pytest.mark.parametrize(("experts", "message"), [
        (1, r"--experts 1 is fewer than the 2 experts that a token uses in .*: give 2 to 5$"),
        (6, r"--experts 6: .* has 6: give 2 to 5$"),
    ])  # fmt: skip
    def test_numbers_that_make_no_sense(self, tiny_model, texts, tmp_path, experts, message):
        with pytest.raises(MoqaError, match=message):
            moqa.reduce(tiny_model, experts, [texts["wiki"]], tmp_path / "out", **SMALL)
        assert list(tmp_path.iterdir()) == []

    def test_a_router_that_chooses_groups_first(self, tiny_model, texts, tmp_path):
        folder = shutil.copytree(tiny_model, tmp_path / "grouped")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"n_group": 2}))
        with pytest.raises(MoqaError, match="within groups"):
            moqa.reduce(folder, 3, [texts["wiki"]], tmp_path / "out", **SMALL)

    def test_the_command_says_it_in_one_line(self, tiny_model, moqa_command, tmp_path):
        (tmp_path / "wiki.txt").write_text("word " * 2000)
        given = ("reduce", tiny_model, "--data", f"wiki={tmp_path / 'wiki.txt'}", "-o", tmp_path / "out")
        code, _, stderr = moqa_command(*given, "--experts", 1)
        assert code == 2
        assert stderr.splitlines()[-1].startswith("moqa: --experts 1 is fewer than")
        code, stdout, _ = moqa_command(*given, "--experts", 3, "--samples", 2, "--context", 32, "--by", "uncurl")
        assert code == 0
        assert "6 experts of each block by uncurl to 3" in stdout
