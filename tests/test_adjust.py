"""Adjustments on a tiny random model: made, applied, reverted, refused."""

import copy
import json
import shutil

import pytest
import torch
from conftest import REFERENCE
from safetensors.torch import load_file

import moqa
from moqa.adjustment.choose import RULES
from moqa.adjustment.modes import MODES
from moqa.adjustment.residuals import round_columns
from moqa.data import Distribution
from moqa.errors import MoqaError
from moqa.format.adjustment import MIDDLE, RECORD, WEIGHTS, read_adjustment
from moqa.format.cache import open_cache
from moqa.format.reader import open_checkpoint
from moqa.runtime.packed import PackedExperts

IDS = torch.tensor([[5, 17, 400, 3, 99, 1024, 7]])
SHARE = "20%"  # of a tiny model whose headers weigh much


@pytest.fixture(scope="module")
def made(tiny_model, texts, tmp_path_factory):
    """A profile, and checkpoints at 2 and 3 bits with the whole original, a part of it, and nothing."""
    folder = tmp_path_factory.mktemp("adjust")
    profile = moqa.profile(
        tiny_model, [texts["wiki"], texts["novels"]], folder / "profile", samples=4, context=32, self_samples=1
    )
    plan = moqa.plan(profile, None, strategy="uniform", widths=(2,), floors={"attention": 4})
    for name, cache in (("full", "full"), ("part", "30%"), ("none", None)):
        moqa.quantize(tiny_model, plan, folder / name, method="rtn", profile=profile, cache=cache)
    wider = moqa.plan(profile, None, strategy="uniform", widths=(3,), floors={"attention": 4})
    moqa.quantize(tiny_model, wider, folder / "wider", method="rtn", profile=profile, cache="full")
    return folder


@pytest.fixture(scope="module")
def python(made, texts):
    """An adjustment of the whole checkpoint to Python."""
    moqa.adjust(made / "full", [texts["python"]], made / "python", samples=8, budget=SHARE)
    return made / "python"


@pytest.fixture(params=["native", "reference"])
def model(request, made):
    from moqa.kernels import find_kernels

    if find_kernels("auto").name != "native" and request.param == "native":
        pytest.skip("the native kernels were not built")
    return moqa.load(made / "full", kernels=request.param)[0]


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


class TestMaking:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("mode", sorted(MODES.keys() - {"swap"}))
    def test_every_mode_and_rule(self, made, texts, tmp_path, mode, rule):
        found = moqa.adjust(
            made / "wider", [texts["python"]], tmp_path / "adj", samples=8, budget=SHARE, mode=mode, rule=rule
        )
        packed = open_checkpoint(made / "wider")
        assert found.extra_bytes <= packed.bytes * 0.2
        adjustment = read_adjustment(tmp_path / "adj")
        assert adjustment.record.weights.bytes == (tmp_path / "adj" / WEIGHTS).stat().st_size
        assert found.channels == sum(sum(part.counts) for part in adjustment.record.channels) > 0
        model = moqa.load(made / "wider")[0]
        before = logits(model)
        model.apply(tmp_path / "adj")
        assert not torch.equal(logits(model), before)

    def test_swap_adds_no_byte(self, made, texts, tmp_path, monkeypatch):
        # experts of a random model are all alike, and so small that headers outweigh a few of them: let losing cost
        # nothing, and what half of them free move
        monkeypatch.setattr("moqa.adjustment.swap.ERROR_GROWTH", 1.0)
        monkeypatch.setattr("moqa.adjustment.swap.MOVED_SHARES", (0.005,))
        found = moqa.adjust(made / "wider", [texts["python"]], tmp_path / "adj", samples=8, mode="swap")
        assert found.extra_bytes <= 0 < found.units
        units, record = open_checkpoint(made / "wider").manifest.units, read_adjustment(tmp_path / "adj").record
        assert all(unit.scheme.width == units[name].scheme.width - 1 for name, unit in record.units.items())
        model = moqa.load(made / "wider")[0]
        before = logits(model)
        model.apply(tmp_path / "adj")
        changed = logits(model)
        assert not torch.equal(changed, before)
        model.revert()
        assert torch.equal(logits(model), before)

    def test_swap_that_would_not_help(self, made, texts, tmp_path):
        with pytest.raises(MoqaError, match="no swap of bits would help"):
            moqa.adjust(made / "wider", [texts["python"]], tmp_path / "adj", samples=8, mode="swap")
        assert not (tmp_path / "adj").exists()

    def test_from_a_part_of_the_channels(self, made, texts, tmp_path):
        cache = open_cache(made / "part", open_checkpoint(made / "part").manifest.fingerprint)
        cached = {
            (layer, *place)
            for layer in range(2)
            for place in cache.layer(layer).get("channel", torch.zeros(0)).tolist()
        }
        moqa.adjust(made / "part", [texts["python"]], tmp_path / "adj", samples=8, budget=SHARE)
        found = read_adjustment(tmp_path / "adj")
        chosen = {
            (layer, int(e), int(c))
            for layer in range(2)
            for part in found.layer(layer)
            for e, c in zip(part.expert, part.channel, strict=True)
        }
        assert chosen <= cached
        assert 0.25 < len(cached) / (2 * 6 * 40) < 0.35

    def test_twice_gives_the_same_bytes(self, made, texts, tmp_path, python):
        moqa.adjust(made / "full", [texts["python"]], tmp_path / "adj", samples=8, budget=SHARE)
        for name in (RECORD, WEIGHTS):
            assert (tmp_path / "adj" / name).read_bytes() == (python / name).read_bytes()

    def test_all_channels_at_16_bits_give_the_original_back(self, made, texts, tiny_model, tmp_path):
        moqa.adjust(made / "full", [texts["python"]], tmp_path / "adj", samples=8, budget="100%", mode="residual")
        held_out = Distribution("python", ((REFERENCE / "text" / "python.test.txt").read_text()[:20_000],), "python")
        plain, adjusted = (
            moqa.evaluate(made / "full", [held_out], against=tiny_model, context=64, windows=8, adjustment=adjustment)
            for adjustment in (None, tmp_path / "adj")
        )
        before, after = (found.distributions["python"].kl_divergence for found in (plain, adjusted))
        assert after < 0.7 * before
        assert adjusted.adjustment_bytes > 0 == plain.adjustment_bytes
        assert adjusted.cache_bytes == plain.cache_bytes > 0

    def test_a_safetensors_file(self, python):
        tensors = load_file(python / WEIGHTS)
        assert {"experts", "channel", "factor"} <= tensors.keys()

    @pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
    def test_columns_lose_less_with_more_bits(self, width):
        columns = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
        factor, integers = round_columns(columns, width)
        left = columns - factor.float()[:, None] * (integers - MIDDLE * (2**width - 1) / 255)
        # of a normal distribution the best grid of so many levels leaves 0.36, 0.12, 0.037, 0.011 of the energy
        allowed = {1: 0.4, 2: 0.14, 3: 0.045, 4: 0.015, 8: 1e-4}[width]
        assert float(left.square().sum() / columns.square().sum()) < allowed


class TestOnAModel:
    def test_apply_and_revert_are_exact(self, model, python):
        before = logits(model)
        model.apply(python)
        changed = logits(model)
        assert not torch.equal(changed, before)
        model.revert()
        assert torch.equal(logits(model), before)
        model.apply(read_adjustment(python))
        assert torch.equal(logits(model), changed)

    def test_kernels_agree(self, made, python):
        found = []
        for kernels in ("native", "reference"):
            loaded = moqa.load(made / "full", kernels=kernels)[0]
            loaded.apply(python)
            found.append(logits(loaded))
        assert torch.allclose(*found, atol=0.05 * float(found[1].abs().max()))

    def test_products_one_by_one_agree_with_the_call(self, model, python):
        model.apply(python)
        whole = logits(model)
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.run = lambda *_: None
        assert torch.allclose(logits(model), whole, atol=0.05 * float(whole.abs().max()))

    def test_several_side_by_side(self, made, model, python, texts, tmp_path):
        moqa.adjust(made / "full", [texts["novels"]], tmp_path / "novels", samples=8, budget=SHARE)
        names = [model.adjustments.hold(folder) for folder in (python, tmp_path / "novels")]
        assert names == model.adjustments.names == ["python", "novels"]
        found = {}
        for name in (None, *names, None, *names):
            model.adjustments.switch(name)
            assert torch.equal(found.setdefault(name, logits(model)), logits(model))
        assert not torch.equal(found["python"], found["novels"])
        with pytest.raises(MoqaError, match="in use"):
            model.adjustments.drop("novels")
        model.revert()
        model.adjustments.drop("novels")
        with pytest.raises(MoqaError, match="no adjustment named 'novels' is held"):
            model.adjustments.switch("novels")

    def test_generation_follows(self, model, python):
        from moqa.generation.prompt_cache import PromptCache

        def write() -> torch.Tensor:
            memory = PromptCache()
            memory.read(model, IDS)
            return torch.stack([memory.read(model, torch.tensor([[token]])) for token in (9, 11)])

        before = write()
        model.apply(python)
        changed = write()
        assert not torch.equal(changed, before)
        # the fused decoder and transformers' own forward say the same
        with torch.inference_mode():
            wanted = model(torch.cat([IDS, torch.tensor([[9, 11]])], 1)).logits[0, -2:]
        assert torch.allclose(changed, wanted.float(), atol=0.05 * float(wanted.abs().max()))
        model.revert()
        assert torch.equal(write(), before)

    def test_a_copy_has_adjustments_of_its_own(self, model, python):
        twin = copy.deepcopy(model)
        before = logits(model)
        twin.apply(python)
        assert torch.equal(logits(model), before)
        assert not torch.equal(logits(twin), before)

    def test_functions_are_applied_to_modules_as_before(self, model):
        seen = []
        assert model.apply(seen.append) is model
        assert len(seen) == len(list(model.modules()))

    def test_through_transformers(self, made, python):
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(made / "full")
        before = logits(loaded)
        loaded.apply(python)
        assert not torch.equal(logits(loaded), before)
        loaded.revert()
        assert torch.equal(logits(loaded), before)


class TestRefused:
    def test_applied_twice_or_reverted_with_none(self, model, python):
        before = logits(model)
        with pytest.raises(MoqaError, match="no adjustment is applied"):
            model.revert()
        model.apply(python)
        changed = logits(model)
        with pytest.raises(MoqaError, match="python is already applied"):
            model.apply(python)
        assert torch.equal(logits(model), changed)
        model.revert()
        assert torch.equal(logits(model), before)

    def test_of_another_checkpoint(self, made, python):
        other = moqa.load(made / "wider")[0]
        before = logits(other)
        with pytest.raises(MoqaError, match="made for another checkpoint"):
            other.apply(python)
        assert torch.equal(logits(other), before)

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-64]), "bytes"),
            (lambda f: _flip(f / WEIGHTS), "corrupted"),
            (lambda f: (f / WEIGHTS).unlink(), "lacks"),
            (lambda f: (f / RECORD).write_text((f / RECORD).read_text().replace("residual", "swap")), "changed"),
            (lambda f: (f / RECORD).unlink(), "no adjustment"),
            (lambda f: (f / RECORD).write_text("{"), "is not a"),
        ],
    )
    def test_damaged(self, model, python, tmp_path, damage, said):
        folder = shutil.copytree(python, tmp_path / "adj")
        damage(folder)
        before = logits(model)
        with pytest.raises(MoqaError, match=said):
            model.apply(folder)
        assert torch.equal(logits(model), before)

    def test_evaluated_on_its_own_text(self, made, python, texts, tiny_model):
        with pytest.raises(MoqaError, match=r"is the text that .*python was fitted on"):
            moqa.evaluate(made / "full", [texts["python"]], against=tiny_model, context=64, adjustment=python)

    def test_evaluated_on_text_that_overlaps(self, made, python, texts, tiny_model):
        other = Distribution("mine", (texts["python"].texts[0][:9000] + "\n# the end",), "mine")
        with pytest.raises(MoqaError, match="already fitted on"):
            moqa.evaluate(made / "full", [other], against=tiny_model, context=64, adjustment=python)

    def test_an_adjustment_of_an_original(self, python, texts, tiny_model):
        with pytest.raises(MoqaError, match="is not a checkpoint"):
            moqa.evaluate(tiny_model, [texts["wiki"]], adjustment=python)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


PYTHON = f"python={REFERENCE / 'text' / 'python.calib.txt'}"


class TestCommand:
    def test_adjust_and_evaluate(self, made, moqa_command, tmp_path, tiny_model):
        out = tmp_path / "adj"
        code, _, _ = moqa_command(
            "adjust", made / "full", "--data", PYTHON, "--bytes", SHARE, "--samples", "8", "-o", out,
            "--json", tmp_path / "adj.json",
        )  # fmt: skip
        assert code == 0
        found = json.loads((tmp_path / "adj.json").read_text())
        assert found["extra_bytes_percent"] <= 20
        held_out = f"python={REFERENCE / 'text' / 'python.test.txt'}"
        code, shown, _ = moqa_command(
            "evaluate", made / "full", "--adjustment", out, "--data", held_out, "--against", tiny_model,
            "--windows", "4", "--context", "64", "--json", tmp_path / "e.json",
        )  # fmt: skip
        assert code == 0
        assert json.loads((tmp_path / "e.json").read_text())["adjustment_bytes"] == found["extra_bytes"]
        assert "adjusted by" in shown

    @pytest.mark.parametrize(
        ("checkpoint", "options", "said"),
        [
            ("none", (), "has no channel cache"),
            ("part", ("--mode", "swap"), "needs the whole original"),
            ("full", ("--mode", "fp8"), "--mode fp8 is unknown"),
            ("full", ("--rule", "size"), "--rule size is unknown"),
            ("full", ("--bytes", "half"), "--bytes half is not a share"),
            ("full", ("--bytes", "0.01%"), "bytes are too few for a channel of this model: give at least"),
            ("full", ("--samples", "3"), "needs at least 8: 2048 tokens"),
            ("full", ("--data", PYTHON.replace("python", "math")), "2 distributions to adjust to"),
        ],
    )
    def test_one_line_for_every_mistake(self, made, moqa_command, tmp_path, checkpoint, options, said):
        code, _, err = moqa_command("adjust", made / checkpoint, "--data", PYTHON, *options, "-o", tmp_path / "adj")
        assert code == 2
        assert said in err
        assert err.strip().splitlines()[-1].startswith("moqa: ")
        assert not (tmp_path / "adj").exists()

    def test_a_short_text(self, made, moqa_command, tmp_path):
        (tmp_path / "short.txt").write_text("A few words. " * 100)
        code, _, err = moqa_command(
            "adjust", made / "full", "--data", f"short={tmp_path / 'short.txt'}", "-o", tmp_path / "adj"
        )
        assert code == 2
        assert "needs at least 8" in err

    def test_a_damaged_cache(self, made, moqa_command, tmp_path):
        folder = shutil.copytree(made / "part", tmp_path / "out")
        _flip(next((folder / "cache").glob("*.safetensors")))
        code, _, err = moqa_command("adjust", folder, "--data", PYTHON, "-o", tmp_path / "adj")
        assert code == 2
        assert "corrupted" in err

    def test_a_cache_of_another_model(self, made, moqa_command, tmp_path):
        folder = shutil.copytree(made / "full", tmp_path / "out")
        path = folder / "cache" / "cache.json"
        path.write_text(path.read_text().replace("fingerprint", "fingerprimt"))
        code, _, err = moqa_command("adjust", folder, "--data", PYTHON, "-o", tmp_path / "adj")
        assert code == 2
        assert "cache.json" in err

    @pytest.mark.parametrize("cache", ["half", "0%", "200%", "1"])
    def test_what_is_no_cache(self, tiny_model, made, moqa_command, tmp_path, cache):
        code, _, err = moqa_command(
            "quantize", tiny_model, "--profile", made / "profile", "--data", PYTHON, "--bpw", "3", "--cache", cache,
            "-o", tmp_path / "out",
        )  # fmt: skip
        assert code == 2
        assert f"--cache {cache} is not a share" in err
        assert not (tmp_path / "out").exists()


class TestShown:
    def test_inspect(self, python, moqa_command):
        code, shown, _ = moqa_command("inspect", python)
        assert code == 0
        assert "residual for python, by gain" in " ".join(shown.split())  # the path before it is of any length

    def test_report(self, made, python, moqa_command, tiny_model, tmp_path):
        held_out = f"python={REFERENCE / 'text' / 'python.test.txt'}"
        options = ("--data", held_out, "--against", tiny_model, "--windows", "2", "--context", "32")
        moqa_command("evaluate", made / "full", *options, "--json", tmp_path / "a.json")
        moqa_command("evaluate", made / "full", *options, "--adjustment", python, "--json", tmp_path / "b.json")
        shutil.copytree(python, tmp_path / "python")
        code, _, err = moqa_command("report", tmp_path, "-o", tmp_path / "page.html")
        assert code == 0, err
        page = (tmp_path / "page.html").read_text()
        assert "Adjustments to novel texts" in page
        assert "Before and after" in page
        assert page.count('id="adjustments"') == 1
