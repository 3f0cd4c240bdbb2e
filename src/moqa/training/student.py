"""A model that is trained: the original's own modules, computing with the units of a checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.format.reader import Checkpoint
from moqa.kernels import PackedMatrix
from moqa.kernels.reference import ReferenceKernels
from moqa.models.view import ModelView
from moqa.qat.cache import rounded_cache
from moqa.qat.inputs import KERNEL_BITS, RoundingKernels
from moqa.qat.straight import through
from moqa.runtime.growing import check_cache
from moqa.runtime.packed import computing_with
from moqa.training.units import TrainedUnit, trained_unit


class KeptTensor:
    """A small tensor that is not a unit, such as a norm or a router, trained in the dtype in which it is stored.

    Args:
        owner: module of the original that has it as a parameter.
        name: of the parameter in its module.
        stored: its values in the checkpoint.
    """

    def __init__(self, owner: nn.Module, name: str, stored: Tensor) -> None:
        self.owner, self.name, self.stored = owner, name, stored
        self.size = float(stored.float().square().mean().sqrt())
        # relative to the size of its values
        self.change = nn.Parameter(torch.zeros(stored.shape))

    def __call__(self) -> Tensor:
        """The values that its file would hold now, with gradients, float32."""
        exact = self.stored.float() + self.change * self.size
        return through(exact, exact.detach().to(self.stored.dtype).float())


@dataclass(frozen=True)
class InTheLoop:
    """How a training differs from the usual one.

    >>> InTheLoop(weights=True, input_bits=8).kv_bits

    Attributes:
        weights: whether integers are trained, too.
        input_bits: 8: inputs of products are rounded as native kernels round them; None leaves them.
        kv_bits: 8: keys and values are rounded as a cache of so many bits does; None leaves them.
        rate: largest relative change of a scale in one step, about; None means the usual one.
    """

    weights: bool = False
    input_bits: int | None = None
    kv_bits: int | None = None
    rate: float | None = None

    def chosen(self) -> dict[str, bool | float]:
        """What differs from the usual, by name."""
        return {name: value for name, value in asdict(self).items() if value}

    def check(self, view: ModelView) -> None:
        """Refuse bits that nothing computes with.

        Raises:
            MoqaError: naming the option.
        """
        if self.input_bits not in (None, KERNEL_BITS):
            raise MoqaError(f"--input-bits {self.input_bits} is not what kernels round to", f"give {KERNEL_BITS}")
        if self.rate is not None and not 0 < self.rate < 1:
            raise MoqaError(f"--rate {self.rate} is not a rate", "give one such as 0.002")
        if self.kv_bits is not None:
            if not view.task.writes_samples:
                raise MoqaError(f"--kv-bits {self.kv_bits} is for language models", "leave it out")
            check_cache(view.model, self.kv_bits)


IN_THE_LOOP = InTheLoop()


class Student:
    """The units and small tensors of some blocks of a checkpoint, to be trained.

    >>> student = Student(view, checkpoint)
    >>> with student.in_place(), student.computing():
    ...     logits = student.view.model(tokens).logits

    Args:
        view: the original.
        checkpoint: made from it.
        block: index of the only block that is trained; None means all, and what is between and after them.
        loop: what else is trained or rounded.

    Attributes:
        units: name -> unit that is trained.
        kept: name -> small tensor that is trained: everything but the embedding and the head.
    """

    def __init__(
        self, view: ModelView, checkpoint: Checkpoint, block: int | None = None, loop: InTheLoop = IN_THE_LOOP
    ) -> None:  # fmt: skip
        self.view, self.checkpoint, self._loop = view, checkpoint, loop
        self.blocks: Sequence[int] = range(len(view.blocks)) if block is None else (block,)
        self.units: dict[str, TrainedUnit] = {}
        self._matrices: dict[int, dict[str, PackedMatrix]] = {}
        for number in self.blocks:
            stored, found = checkpoint.layer(number), dict[str, PackedMatrix]()
            for unit in view.block_units(number):
                scheme = checkpoint.manifest.units[unit.name].scheme
                found[unit.name] = PackedMatrix(scheme, unit.shape, scheme.among(stored, unit.name, unit.shape))
                trained = trained_unit(found[unit.name], view.weight(unit) if loop.weights else None)
                if trained is not None:
                    self.units[unit.name] = trained
            self._matrices[number] = found
        ends = {id(end.weight) for end in view.task.ends(view.model)}
        mine = {id(parameter) for parameter in (view.model if block is None else view.blocks[block]).parameters()}
        kept = checkpoint.layer(None)
        self.kept = {
            name: KeptTensor(view.module(path), last, kept[name])
            for name, parameter in view.model.named_parameters()
            if name in kept and id(parameter) in mine - ends and parameter.is_floating_point()
            for path, _, last in [name.rpartition(".")]
        }

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, relative to the values at the beginning."""
        of_units = (parameter for unit in self.units.values() for parameter in unit.parameters())
        return [*of_units, *(tensor.change for tensor in self.kept.values())]

    @torch.no_grad()
    def start_again(self) -> None:
        """Undo the training."""
        for parameter in self.parameters():
            parameter.zero_()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this context, the model's blocks compute with the checkpoint's units."""
        kernels = ReferenceKernels() if self._loop.input_bits is None else RoundingKernels()
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(computing_with(self.view, block, self._matrices[block], kernels))
            if self._loop.kv_bits is not None:
                for hook in rounded_cache(self.view.model, self._loop.kv_bits):
                    stack.callback(hook.remove)
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside this context, units and small tensors have the values that files would hold now, with gradients."""
        matrices = {name: matrix for found in self._matrices.values() for name, matrix in found.items()}
        with ExitStack() as stack:
            for name, unit in self.units.items():
                matrices[name].hold(unit())
                stack.callback(matrices[name].release)
            for tensor in self.kept.values():
                stack.enter_context(_replaced(tensor.owner, tensor.name, tensor()))
            yield

    def stored(self, block: int | None) -> dict[str, Tensor]:
        """Trained tensors of a block's units as they are now, or the kept ones if `block` is None, as a shard has them.

        >>> sorted(Student(view, checkpoint).stored(None))[0]
        'model.layers.0.input_layernorm.weight'
        """
        if block is None:
            with torch.no_grad():
                return {name: tensor().to(tensor.stored.dtype) for name, tensor in self.kept.items()}
        return {
            f"{unit.name}.{suffix}": found
            for unit in self.view.block_units(block)
            if unit.name in self.units
            for suffix, found in self.units[unit.name].stored().items()
        }


@contextmanager
def _replaced(owner: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """A `with` block in which a module computes with another tensor in place of a parameter."""
    parameter = owner._parameters.pop(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        object.__delattr__(owner, name)
        owner._parameters[name] = parameter
