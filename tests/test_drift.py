"""Drift: counting the experts' tokens, what a checkpoint says about its known texts, and the detector."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

import moqa
from moqa.adjustment.drift import INTERVAL, MIN_TOKENS, WINDOW, DriftDetector, padded
from moqa.errors import MoqaError
from moqa.format.reader import open_checkpoint
from moqa.format.routing import ROUTING, Routing, read_routing, write_routing
from moqa.planning import plan
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.packed import PackedExperts
from moqa.runtime.routing import RoutingCounts
from moqa.storage.artifact import read_json, write_json

LAYERS, EXPERTS, TOP_K = 4, 16, 2


@pytest.fixture(scope="module")
def made(tiny_model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    given = [texts["wiki"], texts["novels"]]
    measured = profile(tiny_model, given, folder / "profile", samples=4, context=32, self_samples=1)
    planned = plan(measured, "4.5bpw", strategy="random")
    return measured, quantize(tiny_model, planned, folder / "out", method="rtn", profile=measured)


@pytest.fixture
def model(made):
    return moqa.load(made[1])[0]


def ids(tokens, seed=0):
    return torch.randint(8192, (1, tokens), generator=torch.Generator().manual_seed(seed))


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def count_routed(model, run):
    """What the routers chose while something ran, by their own outputs."""
    found = []

    def note(router, _, out):
        found.append(torch.bincount(out[2].flatten(), minlength=router.num_experts))

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    run()
    for hook in hooks:
        hook.remove()
    layers = len(model.model.layers)
    return np.array([sum(found[layer::layers]).numpy() for layer in range(layers)])


class TestCounts:
    def test_are_off_until_they_are_asked_for(self, model):
        counts = RoutingCounts(model)
        assert all(packed.counts is None for packed in experts_of(model))
        model(ids(8))
        assert counts.take().sum() == 0
        counts.start()
        model(ids(8))
        assert (counts.take().sum(1) == 16).all()
        counts.stop()
        model(ids(8))
        assert counts.take().sum() == 0

    @pytest.mark.parametrize("whole", [True, False], ids=["in one call", "product by product"])
    def test_of_prompts_are_what_the_routers_chose(self, model, whole):
        counts = RoutingCounts(model)
        counts.start()
        if not whole:
            for packed in experts_of(model):
                packed.activation = None
        expected = count_routed(model, lambda: [model(ids(50, seed)) for seed in range(3)])
        assert (counts.take() == expected).all()
        assert counts.take().sum() == 0

    def test_of_written_tokens_are_what_the_routers_choose(self, model):
        decoder, counts = FusedDecoder.of(model), RoutingCounts(model)
        prompt, written = ids(4), ids(60, 1)[0].tolist()
        cache, other = decoder.cache(), decoder.cache()
        for past in (cache, other):
            model(prompt, past_key_values=past, use_cache=True)
        counts.start()
        for token in written:
            decoder.step(token, cache)
        found = counts.take()
        counts.stop()

        def run():
            for token in written:
                model(torch.tensor([[token]]), past_key_values=other, use_cache=True)

        expected = count_routed(model, run)
        assert (found.sum(1) == 2 * len(written)).all()
        # another order of sums may turn a router whose experts are nearly even
        assert np.abs(found - expected).sum() <= 4

    def test_change_no_output(self, made):
        logits = []
        for watched in (False, True):
            model, _ = moqa.load(made[1])
            decoder, cache = FusedDecoder.of(model), FusedDecoder.of(model).cache()
            if watched:
                RoutingCounts(model).start()
            with torch.inference_mode():
                logits.append(model(ids(20), past_key_values=cache, use_cache=True).logits)
            logits.append(torch.stack([decoder.step(token, cache) for token in ids(9, 1)[0].tolist()]))
        assert torch.equal(logits[0], logits[2])
        assert torch.equal(logits[1], logits[3])

    def test_leave_the_trial_of_a_decoder_out(self, model):
        counts = RoutingCounts(model)
        counts.start()
        before = FusedDecoder.of(model)
        # matrices that have moved need another decoder, which is tried
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        assert FusedDecoder.of(model) not in (None, before)
        assert counts.take().sum() == 0
        model(ids(8))
        assert (counts.take().sum(1) == 16).all()

    def test_need_packed_experts(self):
        with pytest.raises(MoqaError, match="no packed experts"):
            RoutingCounts(torch.nn.Linear(2, 2))


class TestRouting:
    def test_is_that_of_the_profile(self, made):
        measured, out = made
        found = read_routing(out, measured.record.fingerprint)
        assert (found.top_k, found.layers, set(found.known)) == (2, (0, 1), {"wiki", "novels"})
        for name, shares in found.known.items():
            for layer, share in zip(found.layers, shares, strict=True):
                tokens = measured.layer(name, layer, "tokens").double()
                assert np.allclose(share, tokens / tokens.sum(), atol=1e-6)
        assert open_checkpoint(out)
        assert "0." in (out / ROUTING).read_text()

    @pytest.fixture
    def copied(self, made, tmp_path):
        return shutil.copytree(made[1], tmp_path / "out")

    def test_that_is_missing_is_said(self, copied):
        (copied / ROUTING).unlink()
        with pytest.raises(MoqaError, match=r"routing.json is missing.*quantize"):
            read_routing(copied, "f" * 64)

    def test_of_another_model_is_refused(self, copied):
        with pytest.raises(MoqaError, match="another model"):
            read_routing(copied, "f" * 64)

    def test_that_was_changed_is_refused(self, copied, made):
        data = json.loads((copied / ROUTING).read_text())
        data["top_k"] = 3
        write_json(data, copied / ROUTING)
        with pytest.raises(MoqaError, match="changed"):
            read_routing(copied, made[0].record.fingerprint)

    @pytest.mark.parametrize(
        "known", [{}, {"a": [[0.5, 0.4]]}, {"a": [[0.5, 0.5], [0.5, 0.5]]}, {"a": [[1.5, -0.5]]},
                  {"a": [[0.5, 0.5]], "b": [[0.5, 0.25, 0.25]]}],
    )  # fmt: skip
    def test_that_is_none_is_refused(self, tmp_path, known):
        data = {"fingerprint": "f", "top_k": 2, "layers": [0], "known": known, "checksum": ""}
        write_json(data, tmp_path / ROUTING)
        with pytest.raises(MoqaError, match="is not a routing"):
            read_json(Routing, tmp_path / ROUTING)

    def test_survives_a_file(self, tmp_path):
        routing = make_routing()
        write_routing(tmp_path, routing)
        assert read_routing(tmp_path, routing.fingerprint).known == routing.known


def make_routing(seed=0, names=("wiki", "novels"), concentration=0.5):
    rng = np.random.default_rng(seed)
    shares = {name: rng.dirichlet([concentration] * EXPERTS, LAYERS).tolist() for name in names}
    return Routing(fingerprint="f", top_k=TOP_K, layers=tuple(range(LAYERS)), known=shares)


def draw(shares, tokens, rng):
    """[tokens, layers, experts] of independent tokens."""
    return np.stack([rng.multinomial(TOP_K, np.array(layer) / sum(layer), tokens) for layer in shares], 1)


def read(detector, rows):
    return [detector.add(counts) for counts in rows]


seeds = st.integers(0, 2**32 - 1)


class TestDetector:
    @settings(max_examples=20)
    @given(seeds, st.floats(0, 1))
    def test_any_mixture_of_known_text_is_known(self, seed, share):
        routing, rng = make_routing(seed), np.random.default_rng(seed)
        a, b = padded(routing.known)
        states = read(DriftDetector(routing), draw(share * a + (1 - share) * b, 1500, rng))
        assert set(states[300:]) == {"known"}

    @settings(max_examples=20)
    @given(seeds)
    def test_other_text_is_novel_within_two_windows_and_known_text_known_again(self, seed):
        routing, other = make_routing(seed), make_routing(seed + 1, ("math",))
        rng, detector = np.random.default_rng(seed), DriftDetector(routing)
        read(detector, draw(routing.known["wiki"], 1000, rng))
        states = read(detector, draw(other.known["math"], 2 * WINDOW, rng))
        assert states[0] == "known"
        assert states[-1] == "novel"
        assert read(detector, draw(routing.known["novels"], 6 * WINDOW, rng))[-1] == "known"

    def test_says_what_the_text_is_made_of(self):
        routing, rng = make_routing(), np.random.default_rng(0)
        a, b = padded(routing.known)
        detector = DriftDetector(routing, window=2000)
        read(detector, draw(0.8 * a + 0.2 * b, 6000, rng))
        assert detector.mixture == pytest.approx([0.8, 0.2], abs=0.05)

    @given(nps.arrays(np.int64, (5, LAYERS, EXPERTS), elements=st.integers(0, 50)))
    def test_a_divergence_is_between_0_and_1(self, rows):
        detector = DriftDetector(make_routing())
        read(detector, rows)
        assert 0 <= detector.divergence <= 1
        assert detector.mixture.sum() == pytest.approx(1)

    @settings(max_examples=20)
    @given(seeds, st.integers(1, 64))
    def test_steps_of_any_size_give_about_the_same(self, seed, size):
        routing, rng = make_routing(), np.random.default_rng(seed)
        rows = draw(routing.known["wiki"], 640, rng)
        one, other = DriftDetector(routing), DriftDetector(routing)
        read(one, rows)
        read(other, [rows[at : at + size].sum(0) for at in range(0, len(rows), size)])
        assert one.divergence == pytest.approx(other.divergence, abs=0.03)

    def test_says_nothing_of_a_phrase(self):
        routing, other = make_routing(), make_routing(9, ("math",))
        detector = DriftDetector(routing)
        states = read(detector, draw(other.known["math"], MIN_TOKENS - 1, np.random.default_rng(0)))
        assert set(states) == {"known"}

    def test_nothing_changes_nothing(self):
        detector = DriftDetector(make_routing())
        assert detector.add(np.zeros((LAYERS, EXPERTS), np.int64)) == "known"
        assert detector.divergence == detector.judgements == 0

    def test_a_state_is_kept_around_its_threshold(self, monkeypatch):
        detector = DriftDetector(make_routing(), threshold=0.1)
        values = iter([0.07, 0.08, 0.07, 0.1, 0.09, 0.086, 0.08, 0.07, 0.06])
        monkeypatch.setattr(detector, "_divergence", lambda *_: next(values))
        rows = draw(make_routing().known["wiki"], INTERVAL * 10, np.random.default_rng(0))
        states = read(detector, [rows[at : at + INTERVAL].sum(0) for at in range(0, len(rows), INTERVAL)])
        a, b, c = "known", "drifting", "novel"
        assert states[1:] == [a, b, b, c, c, c, b, b, a]

    def test_knows_how_far_other_text_is(self):
        routing, other = make_routing(), make_routing(9, ("math",))
        detector = DriftDetector(routing)
        read(detector, draw(other.known["math"], 1000, np.random.default_rng(0)))
        assert detector.distance(np.array(other.known["math"])) < 0.02
        assert detector.distance(np.array(routing.known["wiki"])) > 0.2

    def test_layers_may_differ_in_their_experts(self):
        shares = padded({"a": [[0.5, 0.5], [0.2, 0.3, 0.5]]})
        assert shares.tolist() == [[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]

    @pytest.mark.parametrize("options", [{"threshold": 0}, {"threshold": 1.5}, {"window": 8}])
    def test_what_makes_no_sense_is_refused(self, options):
        with pytest.raises(MoqaError, match="drift"):
            DriftDetector(make_routing(), **options)
