"""Memory that tensors get one after another: never while a part of one, or anything made from it, is there."""

import pytest
import torch

from moqa.memory.reused import ReusedMemory

SHAPE = torch.Size([4, 8, 16])


@pytest.fixture
def memory():
    return ReusedMemory()


def take(memory, dtype=torch.bfloat16):
    return memory.take(SHAPE, dtype)


def test_is_of_the_shape_and_dtype(memory):
    found = take(memory)
    assert (found.shape, found.dtype) == (SHAPE, torch.bfloat16)


def test_is_used_again_when_it_is_free(memory):
    first = take(memory)
    place = first.data_ptr()
    assert take(memory).data_ptr() != place, "the first is still there"
    del first
    assert take(memory).data_ptr() == place
    assert take(memory, torch.float32).data_ptr() != place, "of another size"


HOLDERS = {
    "a part": lambda t: t[2],
    "a reshaped part": lambda t: t.view(8, 64)[3:],
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "another dtype": lambda t: t.view(torch.int16),
    "detached": lambda t: t.detach(),
    "numpy": lambda t: t.view(torch.int16).numpy(),
    "storage": lambda t: t.untyped_storage(),
    "chunks": lambda t: list(t[0].chunk(2)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_is_not_free_while_anything_holds_it(memory, holder):
    first = take(memory)
    place, held = first.data_ptr(), HOLDERS[holder](first)
    del first
    assert take(memory).data_ptr() != place
    del held
    assert take(memory).data_ptr() == place


def test_what_is_free_is_given_back(memory):
    held, free = take(memory), take(memory)
    held.fill_(1)
    free.fill_(2)
    del free
    memory.free()
    assert (held == 1).all()
    assert take(memory).data_ptr() != held.data_ptr()
