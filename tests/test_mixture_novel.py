"""Routers and inputs unlike all that they were trained on: left to the best single variant."""

import pytest
import torch

from moqa.mixture.familiar import Familiarity
from moqa.mixture.router import ROUTERS, restored, stored
from moqa.mixture.threshold import train
from moqa.mixture.train import RouterSamples, chosen, confidences
from moqa.progress import quiet

FEATURES, EACH, TOKENS = 16, 16, 64


def windows(direction, seed, count=EACH, tokens=TOKENS):
    """[count, tokens, FEATURES] noise around one direction."""
    found = torch.randn(count, tokens, FEATURES, generator=torch.Generator().manual_seed(seed))
    found[..., direction] += 2.0
    return found


def losses(best, count=EACH, variants=4):
    """[variants, count, TOKENS - 1]: the first variant is good everywhere, one is better, and all others are bad."""
    found = torch.full((variants, count, TOKENS - 1), 0.3)
    found[0], found[best] = 0.12, 0.1
    return found


@pytest.fixture(scope="module")
def trained():
    """A router for three texts, of which each has a variant of its own."""
    features = torch.cat([windows(direction, direction) for direction in range(3)])
    samples = RouterSamples.of(features, torch.cat([losses(1 + n) for n in range(3)], 1), [EACH] * 3)
    held = torch.arange(3 * EACH) % 4 == 3
    return train("linear", samples.some(~held), samples.some(held), default=0, seed=0, report=quiet)


class TestFamiliarity:
    @pytest.fixture
    def known(self):
        found = Familiarity(3, FEATURES)
        found.see(torch.cat([windows(direction, direction) for direction in range(3)]), torch.arange(48) // EACH)
        return found

    @pytest.mark.parametrize("tokens", [8, 64])
    def test_a_known_text_is_familiar_however_short_the_prompt(self, known, tokens):
        means = windows(1, 9, count=64, tokens=tokens).mean(1)
        assert float(known(means, tokens).mean()) > 0.85

    def test_a_text_in_a_direction_of_its_own_is_not(self, known):
        assert float(known(windows(9, 9, count=64).mean(1), TOKENS).mean()) < 0.3

    def test_a_text_opposite_to_all_is_not(self, known):
        away = 2 * known.centre - windows(1, 9, count=8).mean(1)
        assert float(known(away, TOKENS).max()) < 0.7

    def test_with_one_known_text_nothing_tells(self):
        alone = Familiarity(1, FEATURES)
        alone.see(windows(0, 0), torch.zeros(EACH, dtype=torch.int64))
        assert known_of(alone) == [1.0] * 8


def known_of(familiar):
    return familiar(windows(9, 9, count=8).mean(1), TOKENS).tolist()


class TestNovelTexts:
    @pytest.fixture
    def novel(self):
        """A text with a direction of its own, and a little of a known one."""
        features = windows(9, 9)
        features[..., 0] += 1.0
        return RouterSamples.of(features, losses(0), [EACH])

    def test_are_left_to_the_best_single_variant(self, trained, novel):
        assert (chosen(confidences(trained.router, novel), trained.threshold, 0)[:, 20:] == 0).float().mean() > 0.95

    def test_without_familiarity_would_be_routed(self, trained, novel):
        with torch.no_grad():
            probable = trained.router(novel.features)[:, 20:].softmax(-1)
        assert (chosen(probable, trained.threshold, 0) != 0).float().mean() > 0.3

    def test_cost_known_ones_little(self, trained):
        assert 0.1 <= trained.loss < 0.5 * (trained.single + trained.oracle)

    def test_a_left_out_text_never_loses_beyond_its_interval(self, trained):
        assert set(trained.left_out) == {0, 1, 2}
        assert max(trained.left_out.values()) < 0.05

    def test_of_which_all_lose_leave_nothing_to_the_router(self):
        """Two texts alike but for their best variants: a router of the one is sure of, and wrong about, the other."""
        features = torch.cat([windows(0, 1), windows(0, 2)])
        samples = RouterSamples.of(features, torch.cat([losses(1), losses(2)], 1), [EACH] * 2)
        held = torch.arange(2 * EACH) % 4 == 3
        found = train("linear", samples.some(~held), samples.some(held), default=0, seed=0, report=quiet)
        assert found.usage[0] == 1.0


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_file_holds_what_is_familiar(kind):
    torch.manual_seed(0)
    shape = (3, 32, 32) if ROUTERS.find(kind).reads == "pixels" else (FEATURES,)
    router, features = ROUTERS.find(kind)(shape[0], 2).eval(), torch.randn(6, 1 if len(shape) > 1 else 9, *shape)
    plain = restored(kind, shape[0], 2, stored(router))
    assert plain.familiar is None  # as in a file of an older version
    with torch.no_grad():
        evidence = router.evidence(features, router.encode(features))
        router.familiar = Familiarity(2, evidence.shape[-1])
        router.familiar.see(evidence, torch.arange(6) % 2)
        again = restored(kind, shape[0], 2, stored(router))
        assert torch.allclose(again.after(features), router.after(features), atol=0.02)
        assert torch.all(again.after(features) <= plain.after(features) + 1e-6)
        assert torch.allclose(again.confidences(features)[:, -1], again.after(features), atol=1e-5)
