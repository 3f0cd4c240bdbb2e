"""Packed modules that are copied, moved, cast or loaded: no kernel may use what a matrix was before."""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from exact import (
    BFLOAT,
    FLOAT,
    MIXED,
    Runner,
    each_runner,
    make_bias,
    make_layer,
    make_matrix,
    make_rows,
    make_tokens,
)
from torch import Tensor
from torch.nn.functional import silu

from moqa.format.scheme import Scheme
from moqa.runtime.packed import PackedExperts, PackedLinear

pytestmark = pytest.mark.usefixtures("one_thread")


@each_runner
class TestModules:
    """A kernel may remember where a matrix lies: nothing that a user does to a module may make that a lie."""

    x = make_rows(5, 100, FLOAT, 3)

    def used(self, runner: Runner, seed: int = 0) -> tuple[PackedLinear, Tensor]:
        """A module that has computed once, and what."""
        matrix = make_matrix(Scheme(width=3), (40, 100), seed).matrix
        module = PackedLinear(matrix, make_bias(40, seed), runner.kernels)
        return module, module(self.x)

    def test_another_dtype_keeps_what_is_stored(self, runner):
        module, before = self.used(runner)
        stored = {name: tensor.clone() for name, tensor in module.matrix.state_dict().items()}
        for dtype in (torch.float64, torch.float16, BFLOAT, FLOAT):
            module.to(dtype)
            for name, tensor in module.matrix.state_dict().items():
                assert tensor.dtype == stored[name].dtype
                assert torch.equal(tensor, stored[name])
        assert torch.allclose(module(self.x), before, atol=0.1)  # the bias was rounded

    def test_a_copy_has_memory_of_its_own(self, runner):
        module, before = self.used(runner)
        twin = copy.deepcopy(module)
        for tensor in module.matrix.buffers():
            tensor.zero_()
        assert torch.equal(twin(self.x), before)
        assert torch.equal(module(self.x), module.bias.expand(5, 40))

    def test_a_copy_outlives_its_original(self, runner):
        module, before = self.used(runner)
        twin = copy.deepcopy(module)
        del module
        filler = [torch.full((3 * 4 * 128,), 255, dtype=torch.uint8) for _ in range(50)]
        assert torch.equal(twin(self.x), before)
        del filler

    def test_pickled(self, runner):
        module, before = self.used(runner)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(self.x), before)

    @pytest.mark.parametrize("assign", [False, True])
    def test_other_weights_are_used(self, runner, assign):
        module, before = self.used(runner)
        other, wanted = self.used(runner, seed=1)
        old = list(module.matrix.buffers())  # stays in memory: what was there would be read, not garbage
        module.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=assign)
        assert torch.equal(module(self.x), wanted)
        assert not torch.equal(wanted, before)
        del old

    def test_moved_tensors_are_used(self, runner):
        module, before = self.used(runner)
        old = list(module.matrix.buffers())
        module._apply(torch.clone)
        for tensor in old:
            tensor.zero_()
        assert torch.equal(module(self.x), before)
        module.share_memory()
        assert torch.equal(module(self.x), before)

    def test_a_replaced_buffer_is_used(self, runner):
        module, _ = self.used(runner)
        other, wanted = self.used(runner, seed=1)
        old = list(module.matrix.buffers())
        for name, tensor in other.matrix.named_buffers():
            setattr(module.matrix, name, tensor.clone())
        module.bias = other.bias
        assert torch.equal(module(self.x), wanted)
        del old

    def test_experts_follow_their_matrices(self, runner):
        def used(seed: int) -> tuple[PackedExperts, Callable[[], Tensor]]:
            layer = make_layer(MIXED, 72, 40, seed=seed)
            owner = SimpleNamespace(
                num_experts=5, is_transposed=False, is_concatenated=True, has_bias=False,
                gate_up_proj=torch.empty(5, 80, 72),
                _apply_gate=lambda both: silu(both[..., : both.shape[-1] // 2]) * both[..., both.shape[-1] // 2 :],
            )  # fmt: skip
            matrices = {
                (expert, f"{name}_proj"): known.matrix
                for name in ("gate", "up", "down")
                for expert, known in enumerate(getattr(layer, name))
            }
            module = PackedExperts(owner, matrices, runner.kernels)
            tokens = make_tokens(layer, 5, 2)
            return module, lambda: module.run(owner, *tokens)

        (module, run), (other, run_other) = used(0), used(100)
        before, wanted = run(), run_other()
        assert not torch.equal(before, wanted)
        old = list(module.buffers())
        module._apply(torch.clone)
        assert torch.equal(run(), before)
        module.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)
        assert torch.equal(run(), wanted)
        del old
