"""The driver: the same bytes every time, exactly the planned ones, and a model that computes what is stored."""

import dataclasses
import hashlib
import json

import pytest
import torch
from exact import CODED

from moqa.errors import MoqaError
from moqa.execution.background import background
from moqa.format.manifest import MANIFEST
from moqa.format.reader import open_checkpoint
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix
from moqa.models.view import open_model
from moqa.planning import Budget, plan
from moqa.planning.account import account_of
from moqa.profiling import profile
from moqa.quantization import METHODS, quantize
from moqa.runtime.load import load

each_method = pytest.mark.parametrize("method", sorted(METHODS))


@pytest.fixture(scope="module")
def profiled(tiny_model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("profile") / "tiny"
    return profile(tiny_model, [texts["wiki"], texts["novels"]], out, samples=12, context=64, self_samples=4)


@pytest.fixture(scope="module")
def planned(profiled):
    """Every width from 1 to 8 and 16 somewhere."""
    found = plan(profiled, Budget.parse(bpw=9), strategy="random", widths=(1, 2, 3, 4, 5, 6, 7, 8, 16), seed=1)
    assert {scheme.width for scheme in found.units.values()} == {1, 2, 3, 4, 5, 6, 7, 8, 16}
    return found


@pytest.fixture(scope="module")
def coded(planned, profiled):
    """The same with every kind of code for the narrowest units."""
    narrow = sorted(planned.units, key=lambda name: planned.units[name].width)[: 2 * len(CODED)]
    units = planned.units | dict(zip(narrow, CODED * 2, strict=True))
    return planned.model_copy(update={"units": units, "account": account_of(profiled, units)})


@pytest.fixture(scope="module")
def view(tiny_model):
    return open_model(tiny_model)


@pytest.fixture(scope="module", params=["planned", "coded"])
def given(request):
    """A plan of integers, and one with codes."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=sorted(METHODS))
def made(request, tiny_model, given, tmp_path_factory):
    """The tiny model's checkpoint by every method."""
    return quantize(tiny_model, given, tmp_path_factory.mktemp("made") / "out", method=request.param)


def hashes(folder):
    """Hashes of all files but the card for people, which names the folder."""
    files = (path for path in sorted(folder.iterdir()) if path.name != "README.md")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def dense_weight(checkpoint, name):
    unit = checkpoint.manifest.units[name]
    tensors = checkpoint.layer(unit.layer)
    return PackedMatrix(
        unit.scheme, unit.shape, {suffix: tensors[f"{name}.{suffix}"] for suffix in unit.scheme.tensors(unit.shape)}
    ).dense()


class TestCheckpoint:
    def test_is_the_same_every_time(self, made, tiny_model, given, profiled, view, tmp_path):
        method = open_checkpoint(made).manifest.method
        again = quantize(tiny_model, given, tmp_path / "again", method=method, profile=profiled, view=view)
        assert hashes(again) == hashes(made)

    def test_is_what_was_planned(self, made, given):
        opened = open_checkpoint(made)
        assert {name: unit.scheme for name, unit in opened.manifest.units.items()} == given.units
        # versions that know no codes read all else
        assert opened.manifest.format == 1 + any(scheme.is_coded for scheme in given.units.values())
        assert opened.bytes == given.account.checkpoint
        assert opened.bytes == sum(path.stat().st_size for path in made.glob("*.safetensors"))
        assert opened.bits_per_weight == given.account.bits_per_weight
        assert opened.model_bits_per_weight == given.account.model_bits_per_weight

    def test_says_what_it_was_fitted_on(self, made, profiled, given):
        manifest = open_checkpoint(made).manifest
        assert manifest.fitted.keys() == {"wiki", "novels"}
        for name, text in manifest.fitted.items():
            assert text.model_dump() == profiled.record.distributions[name].fitted.model_dump()
        assert (manifest.mixture, manifest.fingerprint) == (given.mixture, given.fingerprint)

    def test_only_methods_that_see_data_know_their_error(self, made):
        manifest = open_checkpoint(made).manifest
        quantized = [unit for unit in manifest.units.values() if not unit.scheme.is_unquantized]
        if METHODS[manifest.method].needs_data:
            assert all(unit.error is not None and 0 <= unit.error < 2 for unit in quantized)
            assert {unit.method for unit in quantized} <= {manifest.method, "rtn"}
        else:
            assert {unit.error for unit in quantized} == {None}
            assert {unit.method for unit in quantized} == {manifest.method}

    def test_what_a_tokenizer_and_a_config_need_is_there(self, made, tiny_model):
        assert (made / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
        config = json.loads((made / "config.json").read_text())
        assert config.pop("quantization_config")["quant_method"] == "moqa"
        del config["transformers_weights"]
        assert config == json.loads((tiny_model / "config.json").read_text())

    def test_weights_are_close_to_the_original(self, made, view):
        opened = open_checkpoint(made)
        for name, unit in view.units.items():
            weight, width = view.weight(unit), opened.manifest.units[name].scheme.width
            error = (dense_weight(opened, name) - weight).square().sum() / weight.square().sum()
            assert error < (2.0 if width <= 2 else 0.3 if width <= 4 else 0.02)
            if width == 16:
                assert error == 0

    @torch.no_grad()
    def test_the_loaded_model_computes_with_the_stored_weights(self, made, tiny_model):
        opened, dense = open_checkpoint(made), open_model(tiny_model)
        for name, unit in dense.units.items():
            dense.set_weight(unit, dense_weight(opened, name))
        model, tokenizer = load(made, kernels="reference")
        tokens = torch.tensor([tokenizer("The history of the city is a long one, and")["input_ids"]])
        assert torch.allclose(model(tokens).logits, dense.model(tokens).logits, atol=1e-4)

    def test_is_verified(self, made, moqa_command):
        assert moqa_command("verify", made)[::2] == (0, "")

    def test_the_original_is_refused_as_a_model(self, made):
        with pytest.raises(MoqaError, match="already a moqa checkpoint"):
            open_model(made)


@torch.no_grad()
def test_at_eight_bits_the_model_answers_as_before(tiny_model, profiled, view, tmp_path):
    wide = plan(profiled, strategy="uniform", widths=(8,))
    model, _ = load(quantize(tiny_model, wide, tmp_path / "out", method="rtn", view=view))
    tokens = profiled.samples("wiki")
    ours, original = model(tokens).logits.log_softmax(-1), view.model(tokens).logits.log_softmax(-1)
    assert float((original.exp() * (original - ours)).sum(-1).mean()) < 3e-3


@each_method
class TestFailures:
    def test_a_failed_run_leaves_nothing_but_the_model_as_it_was(
        self, method, tiny_model, planned, profiled, view, tmp_path
    ):
        before = {name: view.weight(unit).clone() for name, unit in view.units.items()}

        def report(step, done, total, **_):
            if done == 1:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            quantize(tiny_model, planned, tmp_path / "out", method=method, report=report, profile=profiled, view=view)
        assert list(tmp_path.iterdir()) == []
        assert all(torch.equal(view.weight(unit), before[name]) for name, unit in view.units.items())

    def test_what_is_there_is_kept_unless_told_otherwise(self, method, tiny_model, planned, profiled, view, tmp_path):
        out = quantize(tiny_model, planned, tmp_path / "out", method="rtn", profile=profiled, view=view)
        before = hashes(out)
        with pytest.raises(MoqaError, match="--overwrite"):
            quantize(tiny_model, planned, out, method=method, profile=profiled, view=view)
        assert hashes(out) == before
        quantize(tiny_model, planned, out, method=method, overwrite=True, profile=profiled, view=view)
        assert json.loads((out / MANIFEST).read_text())["method"] == method


class TestMistakes:
    def test_a_plan_for_another_model(self, tiny_model, planned, tmp_path):
        other = planned.model_copy(update={"fingerprint": "0" * 64, "model": "other/model"})
        with pytest.raises(MoqaError, match=r"the plan is for other/model .* is another model"):
            quantize(tiny_model, other, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_an_unknown_method(self, tiny_model, planned, tmp_path):
        with pytest.raises(MoqaError, match=r"--method magic is unknown: there are gptq.*rtn"):
            quantize(tiny_model, planned, tmp_path / "out", method="magic")

    def test_a_lost_profile(self, tiny_model, planned, tmp_path):
        lost = planned.model_copy(update={"profile": str(tmp_path / "gone")})
        with pytest.raises(MoqaError, match="samples are missing"):
            quantize(tiny_model, lost, tmp_path / "out")

    @pytest.mark.parametrize("given", [False, True], ids=["read", "given"])
    def test_a_profile_without_the_plans_distributions(self, tiny_model, planned, profiled, tmp_path, given):
        other = planned.model_copy(update={"known": ("wiki", "german"), "mixture": {"wiki": 0.5, "german": 0.5}})
        with pytest.raises(MoqaError, match="lacks german"):
            quantize(tiny_model, other, tmp_path / "out", profile=profiled if given else None)

    def test_a_profile_of_another_model(self, tiny_model, planned, profiled, tmp_path):
        record = profiled.record.model_copy(update={"fingerprint": "0" * 64, "model": "other/model"})
        with pytest.raises(MoqaError, match=r"is of other/model: it is not the one that the plan was made from"):
            quantize(tiny_model, planned, tmp_path / "out", profile=dataclasses.replace(profiled, record=record))

    @pytest.mark.parametrize("change", ["one less", "one more"])
    def test_a_plan_of_other_units(self, tiny_model, planned, profiled, view, tmp_path, change):
        units = dict(planned.units)
        if change == "one less":
            units.pop(next(iter(units)))
        else:
            units["model.layers.9.extra"] = Scheme(width=4)
        with pytest.raises(MoqaError, match="differ in unit"):
            quantize(
                tiny_model, planned.model_copy(update={"units": units}), tmp_path / "out", profile=profiled, view=view
            )
        assert list(tmp_path.iterdir()) == []

    def test_a_wrong_account_is_never_written(self, tiny_model, planned, profiled, view, tmp_path):
        units = dict(planned.units)
        name = next(name for name, scheme in units.items() if scheme.width == 2)
        changed = planned.model_copy(update={"units": units | {name: Scheme(width=4)}})
        with pytest.raises((MoqaError, RuntimeError), match="bytes"):
            quantize(tiny_model, changed, tmp_path / "out", method="rtn", profile=profiled, view=view)
        assert list(tmp_path.iterdir()) == []


def test_few_samples_still_decide_between_methods():
    from moqa.quantization.samples import held_out

    assert held_out(1).tolist() == [False]
    assert held_out(2).tolist() == [False, True]
    assert held_out(4).tolist() == [False] * 3 + [True]
    assert held_out(16).nonzero().flatten().tolist() == [7, 15]


class TestBackground:
    @pytest.mark.parametrize("aside", [True, False])
    def test_does_one_thing_after_the_other_and_waits_for_the_last(self, aside):
        done = []
        with background(aside) as do:
            for number in range(20):
                do(done.append, number)
        assert done == list(range(20))

    @pytest.mark.parametrize("aside", [True, False])
    def test_raises_what_the_work_raised_and_does_nothing_after_it(self, aside):
        done = []

        def fail():
            raise OSError("disk full")

        def run():
            with background(aside) as do:
                do(fail)
                do(done.append, 1)

        with pytest.raises(OSError, match="disk full"):
            run()
        assert not done

    def test_the_last_failure_is_raised_when_the_block_ends(self):
        with pytest.raises(ZeroDivisionError), background() as do:
            do(lambda: 1 // 0)

    def test_a_failure_of_the_block_itself_comes_first(self):
        def run():
            with background() as do:
                do(lambda: 1 // 0)
                raise KeyError

        with pytest.raises(KeyError):
            run()
