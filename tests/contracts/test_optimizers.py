"""What every optimizer of trainings must do, whoever adds it."""

import copy
import json

import pytest
import torch
from torch import nn

from moqa.errors import MoqaError, Stopped
from moqa.storage.resumable import resumable
from moqa.training.loop import Training
from moqa.training.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS
from moqa.training.optimizers.state import put_together, taken_apart

each = pytest.mark.parametrize("name", sorted(OPTIMIZERS))
RATE = 0.02


def problem(seed=0, size=1.0):
    """Parameters of all shapes that a student has, and a loss of a given size that they can take to zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 4), (300, 2), (7,), (5, 1), ())
    wanted = [0.2 * torch.randn(shape, generator=generator) for shape in shapes]
    noise = [torch.randn(shape, generator=generator) for shape in shapes]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]

    def loss(step):
        pairs = zip(parameters, wanted, noise, strict=True)
        return size * sum((p - w - 0.01 * (step % 3 - 1) * n).square().sum() for p, w, n in pairs)

    return parameters, loss


def trained(name, folder, stop=None):
    parameters, loss = problem()

    def report(step, done, total, **_):
        if done == stop:
            raise Stopped("enough")

    with resumable(folder, {"optimizer": name}) as work:
        Training(parameters, loss, 25, RATE, optimizer=name).run(work, report)
    return parameters, float(loss(1).detach())


def take(optimizers, loss, numbers):
    for number in numbers:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(number).backward()
        for optimizer in optimizers:
            optimizer.step()


@each
class TestEveryOptimizer:
    def test_the_loss_falls(self, name, tmp_path):
        _, loss = problem()
        assert trained(name, tmp_path / "out")[1] < 0.6 * float(loss(1).detach())

    def test_a_killed_training_goes_on_to_the_same_bytes(self, name, tmp_path):
        whole, _ = trained(name, tmp_path / "whole")
        for stop in (10, 14, 21):
            with pytest.raises(Stopped):
                trained(name, tmp_path / "out", stop=stop)
        parts, _ = trained(name, tmp_path / "out")
        assert all(torch.equal(mine, its) for mine, its in zip(parts, whole, strict=True))

    def test_goes_on_from_its_state_alone(self, name):
        """The next steps follow from values and state, not from anything else that an optimizer keeps."""
        parameters, loss = problem()
        first = OPTIMIZERS[name].make(parameters, RATE)
        take(first, loss, range(13))
        others, other_loss = problem()
        with torch.no_grad():
            for mine, its in zip(others, parameters, strict=True):
                mine.copy_(its)
        second = OPTIMIZERS[name].make(others, RATE)
        tensors, rest = taken_apart(first)
        put_together(second, copy.deepcopy(tensors), copy.deepcopy(rest))
        take(first, loss, range(13, 20))
        take(second, other_loss, range(13, 20))
        assert all(torch.equal(mine, its) for mine, its in zip(others, parameters, strict=True))

    @pytest.mark.parametrize("size", [1e-6, 1e3])
    def test_one_rate_suits_losses_of_any_size(self, name, size):
        """The first steps are no longer than the rate, and not a thousandth of it either."""
        parameters, loss = problem(size=size)
        take(OPTIMIZERS[name].make(parameters, RATE), loss, range(3))
        moved = torch.cat([parameter.detach().flatten() for parameter in parameters]).square().mean().sqrt()
        assert 0.05 * RATE < moved < 10 * RATE


def test_the_default_is_one_of_them():
    assert DEFAULT_OPTIMIZER in OPTIMIZERS


def test_an_unknown_one_is_refused_by_name():
    with pytest.raises(MoqaError, match="--optimizer adam is unknown: there are adamw, muon, sgd, soap"):
        OPTIMIZERS.find("adam")


def test_a_state_survives_its_way_through_json():
    parameters, loss = problem()
    first = OPTIMIZERS["soap"].make(parameters, RATE)
    take(first, loss, range(12))
    tensors, rest = taken_apart(first)
    assert json.loads(json.dumps(rest)) == rest
    assert len({value.data_ptr() for value in tensors.values() if value.numel()}) == sum(
        bool(value.numel()) for value in tensors.values()
    )
