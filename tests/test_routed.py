"""An expert's inputs: every token that it got, once, with its gate; in few different numbers of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqa.calibration import routed as module
from moqa.calibration.routed import routed
from moqa.models.products import in_blocks, product


def call_of(tokens, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    x, gate = torch.randn(tokens, 5, generator=generator), torch.rand(tokens, 2, generator=generator)
    return {"x": x, "index": index, "gate": gate}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(2, 6), st.integers(0, 10**6))
def test_every_token_of_an_expert_counts_once(sizes, experts, seed):
    calls = [(0.5 + number, call_of(tokens, experts, seed + number)) for number, tokens in enumerate(sizes)]
    for expert in range(experts):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "GATHERED_ROWS", 64)
            found = list(routed(expert, calls))
        wanted = torch.zeros(5, 5, dtype=torch.float64)
        for share, call in calls:
            rows, choice = (call["index"] == expert).nonzero(as_tuple=True)
            x = (call["x"][rows] * call["gate"][rows, choice, None]).double()
            wanted += share * x.T @ x
        scaled = [(x * gate).double() for x, gate, _ in found]
        # rows and gates are rounded to float32, so every product is off by a share of the largest sum at most
        bound = 2e-6 * float(wanted.abs().max())
        assert torch.allclose(sum((x.T @ x for x in scaled), torch.zeros(5, 5).double()), wanted, rtol=0, atol=bound)
        assert sum(tokens for *_, tokens in found) == sum(int((call["index"] == expert).sum()) for _, call in calls)
        for x, gate, tokens in found:
            assert 0 < tokens <= len(x) == len(gate) < tokens + 64
            assert tokens <= max(64, *sizes)
            assert not x[tokens:].any()
            assert not gate[tokens:].any()


def test_an_expert_that_got_nothing_gives_nothing():
    assert list(routed(9, [(1.0, call_of(20, 4, 0))])) == []


def test_shapes_are_few():
    counts = {
        len(x)
        for tokens in range(1, 3000, 7)
        for x, *_ in routed(0, [(1.0, {"x": torch.ones(tokens, 1), "index": torch.zeros(tokens, 1, dtype=torch.int64),
                                       "gate": torch.ones(tokens, 1)})])
    }  # fmt: skip
    assert counts == {64, 128, 256, 512, 1024, 2048}


@given(st.integers(0, 10**4))
def test_blocks_cover_all_rows(rows):
    blocks = list(in_blocks(rows))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    assert all(block.stop - block.start in (64, 128, 256, 512, 1024, 2048) for block in blocks[:-1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300))
def test_a_product_does_not_depend_on_its_blocks(rows):
    generator = torch.Generator().manual_seed(rows)
    x, matrix = torch.randn(2, rows, 40, generator=generator), torch.randn(40, 24, generator=generator)
    found = product(x.requires_grad_(), matrix, torch.bfloat16)
    wanted = (x.detach().bfloat16().double() @ matrix.bfloat16().double()).float()
    assert found.shape == (2, rows, 24)
    assert torch.allclose(found, wanted, rtol=2**-8, atol=1e-2)
    (found * wanted).sum().backward()
    gradient = (wanted.bfloat16().double() @ matrix.bfloat16().double().T).float()
    assert torch.allclose(x.grad, gradient, rtol=2**-7, atol=5e-2)
