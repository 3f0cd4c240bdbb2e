"""One family-independent view of a transformers model: blocks, experts, units and kept tensors."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from moqa.errors import MoqaError, one_line
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import give_back
from moqa.models.adapt import adapt
from moqa.models.building import empty_model
from moqa.models.coverage import (
    SMALLEST_SIDE,
    check_nothing_skipped,
    has_experts,
    is_matrix,
    kept_paths,
    router_paths,
    within,
)
from moqa.models.experts import (
    IMPLEMENTATION,
    PROJECTIONS,
    Experts,
    check_supported,
    expert_matrix,
    is_experts,
    parameter_of,
    register_experts,
)
from moqa.models.layerwise import largest_stream
from moqa.models.layout import is_convolution
from moqa.models.loader import ENDS, BlockLoader
from moqa.models.parts import LinearPart
from moqa.models.stored import open_stored
from moqa.models.units import Role, Unit
from moqa.originals import OriginalReader
from moqa.originals import folder as original
from moqa.tasks import task_of
from moqa.tasks.names import experts_per_token, residual_streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "shared_mlp", "block_sparse_moe")


class ModelView:
    """A model seen as blocks, units and kept tensors.

    >>> view = open_model("reference/model")
    >>> len(view.blocks), len(view.units), view.experts(0).num_experts
    (6, 312, 16)

    Every parameter is either covered by units, completely, or kept: `units` and `kept` never overlap.

    Attributes:
        model: the model of transformers.
        folder: of the original.
        blocks: its decoder layers, or stages.
        units: by name.
        top_k: experts per token, where layers differ the most; 0 for a dense model.
    """

    def __init__(self, model: "PreTrainedModel", folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder
        self.task = task_of(model.config)
        self._paths = self.task.blocks(model)
        self.blocks = [model.get_submodule(path) for path in self._paths]
        adapt(model)
        self._modules = dict(model.named_modules())
        self._pieces: BlockLoader | None = None
        self.units: dict[str, Unit] = {unit.name: unit for unit in self._find_units()}
        if not self.units:
            looked_at = sorted({type(module).__name__ for module in self.blocks[0].modules()})
            raise MoqaError(f"no units found in {type(model).__name__}", f"looked at {', '.join(looked_at)}")
        if self.has_experts:
            register_experts()
            model.set_experts_implementation(IMPLEMENTATION)
        self.top_k = experts_per_token(model.config) if self.has_experts else 0

    @property
    def has_experts(self) -> bool:
        """Whether any block routes tokens to experts."""
        return any(unit.role == "expert" for unit in self.units.values())

    @cached_property
    def stream(self) -> int:
        """Values between two blocks for each prediction: the features of all residual streams."""
        if self.task.predicts_each:
            width = self.model.get_input_embeddings().weight.shape[1]
            return int(width) * residual_streams(self.model.config)
        if not self.task.is_chain:
            return self.task.probe(self.model).shape[1]
        return largest_stream(self.model, self.task)

    @property
    def classes(self) -> int:
        """Number of classes of a prediction: words of the vocabulary, or labels."""
        if self.task.predicts_each:
            return int(self.model.get_input_embeddings().weight.shape[0])
        return int(self.model.config.num_labels)

    def missing(self, memory: MemoryLimit) -> int:
        """Additional bytes of the whole original in float32; 0 if it is in memory or the memory is too small."""
        assert self.folder is not None
        whole, values = self._pieces is not None and self._pieces.keep, OriginalReader(self.folder).values
        return 0 if whole or not memory.holds(values) else 4 * values

    def module(self, path: str) -> nn.Module:
        """Module at a path of the model."""
        return self._modules[path]

    def experts_path(self, layer: int) -> str | None:
        """Path of a block's stack of routed experts, None in a dense block."""
        return next((u.module for u in self.block_units(layer) if u.role == "expert"), None)

    def experts(self, layer: int) -> Experts:
        """A block's stack of routed experts."""
        path = self.experts_path(layer)
        if path is None:
            raise KeyError(f"layer {layer} has no routed experts")
        return self.module(path)

    def block_units(self, layer: int) -> list[Unit]:
        """Units of one block, in the model's order."""
        return [unit for unit in self.units.values() if unit.layer == layer]

    def weight(self, unit: Unit) -> Tensor:
        """View of a unit's matrix, [out, in]; writing to it changes the model."""
        self.need(unit.layer)
        module: Any = self.module(unit.module)
        if unit.expert is not None:
            return expert_matrix(module, unit.expert, unit.projection)
        return module.weight.detach().flatten(1)

    def set_weight(self, unit: Unit, matrix: Tensor) -> None:
        """Overwrite a unit's matrix with [out, in] values."""
        self.weight(unit).copy_(matrix)

    def itemsize(self, unit: Unit) -> int:
        """Bytes of one weight of a unit in memory."""
        return self.model.get_parameter(unit.parameter).dtype.itemsize

    def stored_dtype(self, unit: Unit) -> torch.dtype:
        """Dtype of a unit on disk, or in memory if the model was not read from disk."""
        if self._pieces is None:
            return self.model.get_parameter(unit.parameter).dtype
        return self._pieces.stored_dtype(unit.parameter)

    def stored_bytes(self, unit: Unit) -> int:
        """Bytes of a unit's weights in the original's own dtype, counted as two or four per weight."""
        return unit.weights * (2 if self.stored_dtype(unit).itemsize <= 2 else 4)

    def ends_bytes(self) -> int:
        """Bytes of the embedding and the head in memory."""
        # tied ends have one weight
        weights = {id(end.weight): end.weight for end in self.task.ends(self.model)}.values()
        return sum(weight.numel() * weight.dtype.itemsize for weight in weights)

    def need(self, piece: int) -> None:
        """Make sure that the weights of a block, or of both `ENDS`, are in memory."""
        if self._pieces is not None:
            self._pieces.need(piece)

    def read_ahead(self, layer: int) -> None:
        """From now on, read the next block in the background while one is used; begins with this one."""
        if self._pieces is not None:
            self._pieces.read_ahead(layer)

    def without(self, layer: int) -> AbstractContextManager[None]:
        """A `with` block that does not use a block's own weights; weights that can be read again are freed."""
        return nullcontext() if self._pieces is None else self._pieces.without(layer)

    @contextmanager
    def held(self, layers: Sequence[int]) -> Iterator[None]:
        """A `with` block in which the ends and some blocks are in memory, as if the whole model were read."""
        if self._pieces is None:
            yield
            return
        with self._pieces.kept(), ExitStack() as stack:
            for piece in (ENDS, *layers):
                self.need(piece)
            for layer in layers:
                for parameter in self.blocks[layer].parameters():
                    # experts that are read on use keep the dtype of the file, and must have it again afterwards
                    stack.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = parameter.data.float()
            yield

    def read_from_disk(self, stored: OriginalReader, keep: bool) -> None:
        """Read the weights of an empty model from its folder: all of them now, or each piece when it is used.

        Args:
            stored: tensors of the folder.
            keep: whether all weights are read now, and stay; those of a model whose blocks are no chain always are, as
                each block is run by running the model, and some call the layers of a block without the block.
        """
        keep = keep or not self.task.is_chain
        paths = {id(module): path for path, module in self._modules.items()}
        owners = {f"{paths[id(end)]}.weight": ENDS for end in self.task.ends(self.model)}
        owners |= {unit.parameter: unit.layer for unit in self.units.values()}
        experts = {unit.parameter for unit in self.units.values() if unit.expert is not None}
        self._pieces = BlockLoader(self.model, stored, owners, keep, set() if keep else experts)
        # the model too: some families ask for the device of their embedding before they call it
        for caller in (self.model, *self.task.ends(self.model)):
            self._pieces.read_when_called(caller, ENDS)
        for index, layer in enumerate(self.blocks):
            self._pieces.read_when_called(layer, index)
        if keep:
            for piece in (ENDS, *range(len(self.blocks))):
                self.need(piece)
            give_back()  # the buffers of reading

    def unit_parameters(self) -> set[str]:
        """Names of the parameters that are covered by units."""
        return {unit.parameter for unit in self.units.values()}

    def kept(self) -> dict[str, Tensor]:
        """State-dict entries that no unit covers, without tied copies: what a checkpoint stores unchanged."""
        self.need(ENDS)
        return self._uncovered()

    def kept_on_disk(self) -> dict[str, Tensor]:
        """Kept tensors as a checkpoint stores them: floating point in the narrowest lossless dtype."""
        return {name: self._narrowest(name, tensor) for name, tensor in self.kept().items()}

    def _narrowest(self, name: str, tensor: Tensor) -> Tensor:
        # what was stored in bfloat16 fits bfloat16: no need to check
        if self._pieces is not None and self._pieces.stored_dtype(name) == torch.bfloat16:
            return tensor.to(torch.bfloat16)
        return narrowest(tensor)

    def kept_entries(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of `kept_on_disk` without reading the ends, which keep the dtype of the original."""
        assert self._pieces is not None
        return {
            name: (self._pieces.stored_dtype(name) if tensor.is_meta else narrowest(tensor).dtype, tuple(tensor.shape))
            for name, tensor in self._uncovered().items()
        }

    def check_complete(self) -> None:
        """Assert that units cover their parameters completely and exactly once.

        Raises:
            MoqaError: naming a parameter that is covered in part or twice.
        """
        covered: dict[str, int] = {}
        for unit in self.units.values():
            covered[unit.parameter] = covered.get(unit.parameter, 0) + unit.weights
        names: dict[int, str] = {}
        for name, count in covered.items():
            parameter = self.model.get_parameter(name)
            if count != parameter.numel():
                raise MoqaError(f"{name} has {parameter.numel()} weights, units cover {count}")
            if names.setdefault(id(parameter), name) != name:
                raise MoqaError(f"{name} and {names[id(parameter)]} are one parameter", "shared weights are not units")

    def left_out(self) -> dict[str, int]:
        """Parts of the original that its model does not have, such as MTP layers: prefix of their tensors -> values."""
        return self._pieces.left_out if self._pieces is not None else {}

    def _uncovered(self) -> dict[str, Tensor]:
        """Kept tensors; those of the ends may be on the meta device."""
        covered, tied = self.unit_parameters(), set(getattr(self.model, "all_tied_weights_keys", None) or {})
        return {k: v for k, v in self.model.state_dict().items() if k not in covered and k not in tied}

    def _find_units(self) -> Iterator[Unit]:
        routers, roles = router_paths(self.model, self.blocks), self.task.roles(self.model)
        for index, (root, layer) in enumerate(zip(self._paths, self.blocks, strict=True)):
            kept = [*(routers if has_experts(layer) else ()), *kept_paths(self.model, layer)]
            units = list(_layer_units(root, index, layer, kept, roles.get(root)))
            covered = {unit.parameter.removeprefix(f"{root}.") for unit in units}
            check_nothing_skipped(root, layer, covered, kept)
            yield from units


def _layer_units(
    root: str, index: int, layer: nn.Module, kept: list[str], of_block: str | None
) -> Iterator[Unit]:  # fmt: skip
    stacks = [path for path, module in layer.named_modules() if is_experts(module)]
    paths = {id(parameter): f"{root}.{name}" for name, parameter in layer.named_parameters()}
    for path, module in layer.named_modules():
        full = f"{root}.{path}" if path else root
        if is_experts(module):
            check_supported(full, module)
            places = [(name, paths[id(getattr(module, parameter_of(name)))]) for name in PROJECTIONS]
            stacked = [(*place, _sides(expert_matrix(module, 0, place[0]))) for place in places]
            for expert in range(module.num_experts):
                for projection, parameter, shape in stacked:
                    yield Unit(
                        f"{full}.{expert}.{projection}", index, "expert", projection, expert, shape, full, parameter
                    )
        elif is_matrix(module) and not within(path, kept) and min(module.weight.flatten(1).shape) >= SMALLEST_SIDE:
            parameter = paths[id(module.parameter if isinstance(module, LinearPart) else module.weight)]
            projection = parameter.split(".")[-2]
            own: Role = "convolution" if is_convolution(module) else _role(path, stacks)
            role = own if of_block is None else cast(Role, of_block)
            shape = _sides(module.weight.flatten(1))
            yield Unit(full, index, role, projection, None, shape, full, parameter)


def narrowest(tensor: Tensor) -> Tensor:
    """A floating-point tensor in the first of bfloat16, float16 and float32 that keeps every value.

    >>> narrowest(torch.ones(3)).dtype, narrowest(torch.tensor([1 + 2**-10])).dtype
    (torch.bfloat16, torch.float16)
    """
    if tensor.is_floating_point():
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return tensor.to(dtype)
    return tensor


def _sides(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def _role(path: str, stacks: list[str]) -> Role:
    parent = path.split(".")[0]
    if parent in _FEED_FORWARD or any(stack.split(".")[0] == parent for stack in stacks):
        return "shared" if stacks else "mlp"
    return "attention"


def open_model(
    model: str | Path, dtype: torch.dtype = torch.float32, keep: bool = True, imported: bool = False
) -> ModelView:
    """Open a model folder or Hub id as a view of its blocks and units.

    >>> open_model("reference/model").model.config.model_type
    'qwen3_moe'

    Args:
        model: folder or Hub id of a model in safetensors: plain, or in a format of `moqa.originals`.
        dtype: dtype to compute in.
        keep: whether the whole model is read; else a block is read when it is used, its experts in the dtype in which
            they are stored, and freed when another block is used.
        imported: whether models that another tool has quantized are read, too, see `open_stored`.

    Raises:
        MoqaError: if it is missing, corrupted, has NaN or infinite weights, or its tensors are not those of its
            architecture.
    """
    folder = original.locate(model)
    if (folder / "moqa.json").is_file():
        raise MoqaError(f"{model} is already a moqa checkpoint", "give the original model")
    config, stored = open_stored(folder, imported)
    try:
        empty = empty_model(config, dtype)
    except Exception as error:  # transformers raises many kinds of errors for a wrong configuration
        raise MoqaError(f"{folder} cannot be loaded as {config.model_type}", one_line(error)) from None
    view = ModelView(empty, folder)
    view.check_complete()
    view.read_from_disk(stored, keep)
    return view
