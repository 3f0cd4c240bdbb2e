"""What every way to reduce experts must do, whoever adds it."""

import pytest
import torch

from moqa.reduction import REDUCTIONS, Routed

each = pytest.mark.parametrize("name", sorted(REDUCTIONS))
EXPERTS = 12


def seen(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(200, EXPERTS, generator=generator)
    logits[:, 6:] = logits[:, :6] + 0.1 * torch.randn(200, 6, generator=generator)
    return Routed(torch.randint(0, 50, (EXPERTS,), generator=generator), torch.corrcoef(logits.T))


@each
class TestEveryReduction:
    @pytest.mark.parametrize("count", [1, 2, 5, EXPERTS - 1])
    def test_fills_every_new_expert(self, name, count):
        groups = REDUCTIONS[name].rule(seen(), count, 0)
        assert groups.shape == (EXPERTS,)
        assert set(groups.tolist()) - {-1} == set(range(count))

    def test_is_deterministic(self, name):
        assert torch.equal(REDUCTIONS[name].rule(seen(), 5, 3), REDUCTIONS[name].rule(seen(), 5, 3))

    def test_works_without_any_token(self, name):
        quiet = Routed(torch.zeros(EXPERTS, dtype=torch.int64), torch.eye(EXPERTS))
        groups = REDUCTIONS[name].rule(quiet, 4, 0)
        assert set(groups.tolist()) - {-1} == set(range(4))

    def test_says_what_it_does(self, name):
        assert len(REDUCTIONS[name].help) > 20


def test_uncurl_merges_what_the_router_treats_alike():
    groups = REDUCTIONS["uncurl"].rule(seen(), 6, 0).tolist()
    assert groups[:6] == groups[6:] == [0, 1, 2, 3, 4, 5]


def test_frequency_keeps_the_most_used():
    routed = seen()
    kept = [e for e, group in enumerate(REDUCTIONS["frequency"].rule(routed, 4, 0).tolist()) if group >= 0]
    assert min(routed.tokens[kept]) >= routed.tokens.sort(descending=True).values[3]
