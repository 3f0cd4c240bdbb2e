"""Variants belong to one model: what another model does leaves its decoder and its output alone."""

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moqa
from moqa.format.adjustment import read_adjustment
from moqa.kernels import native
from moqa.planning import plan
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.routing import RoutingCounts
from moqa.runtime.variants import ExpertsVariant

FORMAT1 = Path(__file__).parent / "format1"
IDS = torch.arange(5, 25)[None]
PARTS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def packed(tiny_model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    measured = profile(tiny_model, [texts["wiki"]], folder / "profile", samples=2, context=32, self_samples=0)
    return quantize(tiny_model, plan(measured, strategy="uniform", widths=(3,)), folder / "out", method="rtn")


@pytest.fixture
def pair(packed):
    """Two models of one checkpoint, each with a variant that swaps its first two experts."""
    models = [moqa.load(packed)[0] for _ in range(2)]
    for model in models:
        experts = experts_of(model)
        first = {(1 - expert, name): experts.matrix(expert, name) for expert in (0, 1) for name in PARTS}
        experts.variants.hold("swapped", {0: ExpertsVariant(matrices=first)})
    return models


def experts_of(model):
    return model.model.layers[0].mlp.experts.moqa_weights


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


@torch.inference_mode()
def decoded(model, decoder):
    cache = decoder.cache()
    model(IDS, past_key_values=cache, use_cache=True)
    return torch.stack([decoder.step(token, cache) for token in (7, 8, 9)])


@pytest.fixture
def followed(monkeypatch):
    """The layers whose experts were handed to decoders, as they are handed over."""
    found, real = [], native.use_experts

    def noted(model, layer, *rest):
        found.append(layer)
        return real(model, layer, *rest)

    monkeypatch.setattr(native, "use_experts", noted)
    return found


class TestTwoModels:
    def test_a_switch_changes_one(self, pair):
        one, other = pair
        before = logits(one)
        experts_of(other).variants.switch("swapped")
        assert torch.equal(logits(one), before)
        assert not torch.equal(logits(other), before)
        experts_of(other).variants.switch(None)
        assert torch.equal(logits(other), before)

    def test_a_decoder_follows_its_own_model_only(self, pair, followed):
        one, other = pair
        ours, theirs = FusedDecoder.of(one), FusedDecoder.of(other)
        before = decoded(one, ours)
        assert torch.equal(decoded(other, theirs), before)
        followed.clear()
        experts_of(other).variants.switch("swapped")
        RoutingCounts(other).start()
        assert torch.equal(decoded(one, ours), before)
        assert not followed
        assert not torch.equal(decoded(other, theirs), before)
        assert followed == [0, 1]
        decoded(other, theirs)
        assert followed == [0, 1], "once for each change"

    def test_a_decoder_is_made_anew_for_its_own_model_only(self, pair):
        one, other = pair
        ours, theirs = FusedDecoder.of(one), FusedDecoder.of(other)
        before = decoded(other, theirs)
        other.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)
        assert FusedDecoder.of(one) is ours
        assert FusedDecoder.of(other) is not theirs
        assert torch.equal(decoded(other, FusedDecoder.of(other)), before)

    def test_a_copy_switches_by_itself(self, pair):
        one = pair[0]
        before = logits(one)
        twin = copy.deepcopy(one)
        experts_of(twin).variants.switch("swapped")
        assert torch.equal(logits(one), before)
        assert not torch.equal(logits(twin), before)
        assert torch.equal(decoded(one, FusedDecoder.of(one)), decoded(pair[1], FusedDecoder.of(pair[1])))


class TestVariants:
    def test_only_switches_are_changes(self, pair):
        variants = experts_of(pair[0]).variants
        found = []
        for name in (None, "swapped", "swapped", None):
            variants.switch(name)
            found.append(variants.generation)
        assert found == [0, 1, 1, 2]
        variants.drop("swapped")
        with pytest.raises(AssertionError):
            variants.switch("swapped")

    def test_all_layers_have_those_of_their_model(self, pair):
        one, other = ({id(layer.mlp.experts.moqa_weights.variants) for layer in m.model.layers} for m in pair)
        assert (len(one), len(other), len(one | other)) == (1, 1, 2)


class TestThreads:
    def test_a_forward_pass_keeps_the_variant_that_it_began_with(self, pair):
        model = pair[0]
        plain, variants = logits(model), experts_of(model).variants
        inside, switched = threading.Event(), threading.Event()

        def wait(*_):
            inside.set()
            assert switched.wait(120)

        # before the layer whose experts the variant swaps
        hook = model.model.layers[0].register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(logits, model)
            assert inside.wait(120)
            variants.switch("swapped")
            switched.set()
            assert torch.equal(running.result(), plain)
        hook.remove()
        assert not torch.equal(logits(model), plain)

    def test_a_forward_pass_that_fails_keeps_nothing(self, pair):
        model = pair[0]
        plain, variants = logits(model), experts_of(model).variants
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.tensor([[10**6]]))
        variants.switch("swapped")
        assert not torch.equal(logits(model), plain)

    def test_a_decoder_of_two_threads_writes_to_the_cache_of_each(self, pair):
        model = pair[0]
        decoder, start = FusedDecoder.of(model), threading.Barrier(2)
        texts = {1: [7, 8, 9] * 8, 2: [11, 12] * 12}

        @torch.inference_mode()
        def decode(number, barrier=None):
            cache, found = decoder.cache(), []
            model(IDS + number, past_key_values=cache, use_cache=True)
            for token in texts[number]:
                if barrier:
                    barrier.wait(120)
                found.append(decoder.step(token, cache))
            return torch.stack(found)

        alone = {number: decode(number) for number in texts}
        with ThreadPoolExecutor(2) as pool:
            for number, found in zip(texts, pool.map(lambda n: decode(n, start), texts), strict=True):
                assert torch.equal(found, alone[number])

    def test_of_two_that_apply_at_once_one_is_refused(self):
        model, _ = moqa.load(FORMAT1 / "checkpoint")
        read = read_adjustment(FORMAT1 / "adjustment")
        adjustments, start = (
            [replace(read, record=read.record.model_copy(update={"name": n})) for n in "ab"],
            threading.Barrier(2),
        )

        def apply(adjustment):
            start.wait(120)
            try:
                model.apply(adjustment)
            except moqa.MoqaError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(2) as pool:
            errors = list(pool.map(apply, adjustments))
        assert errors.count(None) == 1
        assert f"adjustment {model.adjustments.current} is already applied" in "".join(filter(None, errors))
        model.revert()
        assert set(model.adjustments.names) >= {"ab"[errors.index(None)]}

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_process_runs_adjusts_and_loads(self, pair, packed):
        model = pair[0]
        wanted = decoded(model, FusedDecoder.of(model))
        child = os.fork()
        if not child:
            try:
                again = decoded(model, FusedDecoder.of(model))
                experts_of(model).variants.switch("swapped")
                other, new = decoded(model, FusedDecoder.of(model)), moqa.load(packed)[0]
                good = torch.equal(again, wanted) and not torch.equal(other, wanted)
                os._exit(0 if good and torch.equal(decoded(new, FusedDecoder.of(new)), wanted) else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(decoded(model, FusedDecoder.of(model)), wanted)
