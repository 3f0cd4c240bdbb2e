"""A model's weights piece by piece: each block, and both ends, read from disk when they are used."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moqa.errors import MoqaError, UnreadableError
from moqa.memory.process import give_back
from moqa.memory.reused import ReusedMemory
from moqa.models.building import BUILDING, quiet
from moqa.models.load import difference
from moqa.originals import OriginalReader
from moqa.originals import folder as original
from moqa.originals.reader import LazyTensor
from moqa.tasks.names import is_mtp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# number of the piece that holds the embedding and the head; blocks have their index
ENDS = -1
# one reads from the disk while others check what they have read
_READERS = 3


class BlockLoader:
    """Reads parameters of a model that was built without memory for them.

    >>> from moqa.models.building import empty_model
    >>> model, name = empty_model(view.model.config, torch.float32), "model.layers.3.self_attn.q_proj.weight"
    >>> pieces = BlockLoader(model, OriginalReader(view.folder), {name: 3}, False, ())
    >>> pieces.need(3)
    >>> model.get_parameter(name).is_meta
    False

    What no piece owns is read at once and stays. A block or an end reads its piece when it is called. Blocks are used
    in order, forwards or backwards: meanwhile the operating system is asked to read the next one.

    Args:
        model: with parameters on the meta device, in the dtypes that they should get.
        stored: tensors of the original.
        owners: parameter -> number of its piece.
        keep: whether pieces stay once they are read; else one is freed when another is needed.
        narrow: parameters that keep the dtype in which they are stored.

    Attributes:
        keep: whether pieces stay.
        ahead: whether the next block is read into memory while one is used, see `read_ahead`.
        left_out: parts of the folder that become nothing in the model: prefix of their names -> number of values.

    Raises:
        MoqaError: if the tensors of the folder are not those of the model, or a value is NaN or infinite.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        stored: OriginalReader,
        owners: Mapping[str, int],
        keep: bool,
        narrow: Collection[str],
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model, self._folder, self.keep, self.ahead = model, stored.folder, keep, False
        self._mapping = get_model_conversion_mapping(model)
        self._stored, headers = stored, stored.headers
        self._names: dict[int | None, list[str]] = {None: []}
        self._stacks: dict[int | None, list[_Stack]] = {}
        stacks: dict[str, _Stack] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        mixed: set[str] = set()
        names: dict[str, str] = {}
        wanted, targets = model.state_dict(), _targets(model, self._mapping, list(headers))
        self.left_out = _parts(headers, targets.keys())
        for name, (target, pattern, converter) in targets.items():
            dtype = _dtype(headers[name])
            if pattern is None and names.setdefault(target, name) != name:
                raise MoqaError(f"{stored.folder} holds {target} twice", f"as {names[target]} and as {name}")
            if wanted[target].is_floating_point() and not dtype.is_floating_point:
                kind = headers[name]["dtype"]
                raise MoqaError(
                    f"{stored.folder}: tensor {name} holds {kind}", "weights must be floating-point numbers"
                )
            if self._dtypes.setdefault(target, dtype) != dtype:
                mixed.add(target)
                self._dtypes[target] = torch.promote_types(self._dtypes[target], dtype)
            if target in narrow and pattern is not None:
                stacks.setdefault(target, _Stack(target, converter)).add(name, pattern)
            self._names.setdefault(owners.get(target), []).append(name)
        for target in (self._dtypes.keys() & set(narrow)) - mixed:
            _empty(model, target, self._dtypes[target])
        for target, stack in stacks.items():
            if stack.is_plain(model, headers):
                self._stacks.setdefault(owners.get(target), []).append(stack)
        self._there: dict[int, list[str]] = {}
        self._without: int | None = None
        self._last = ENDS
        self._memory = ReusedMemory()
        self._fetcher = ThreadPoolExecutor(1, "moqa-fetcher")
        self._readers = ThreadPoolExecutor(_READERS, "moqa-reader")
        self._fetching: tuple[int, Future[_Fetched]] | None = None
        self._absent = _check(model, stored.folder, self._mapping, headers)
        self._read(None)
        self._settle_ties(names)

    def need(self, piece: int) -> None:
        """Make sure that a piece is in memory."""
        if piece in self._there or piece not in self._names or piece == self._without:
            return
        if not self.keep:
            self.forget()
        step, self._last = 1 if piece >= self._last else -1, piece
        try:
            self._there[piece] = self._read(piece)
            if self.keep or self._names.get(following := piece + step) is None or following < 0:
                return
            if self.ahead:
                self.read_ahead(following)
            else:
                self._stored.ahead(self._names[following])
        except (OSError, SafetensorError) as error:
            raise self._lost(error) from None

    def read_ahead(self, piece: int) -> None:
        """Read the piece that is needed next in the background, and from now on always the one that follows."""
        self.ahead = True
        if piece not in self._there and (self._fetching is None or self._fetching[0] != piece):
            self._fetching = piece, self._fetcher.submit(self._fetch, piece)

    def stored_dtype(self, target: str) -> torch.dtype:
        """Dtype of a parameter on disk; if its parts differ, one that holds all of them."""
        # of a tensor that becomes several parameters, only the first is recorded
        return self._dtypes.get(target) or self._model.get_parameter(target).dtype

    def forget(self) -> None:
        """Free the memory of all pieces."""
        for names in self._there.values():
            for name in names:
                _empty(self._model, name)
        if ENDS in self._there:
            self._tie()
        self._there = {}
        if not self.ahead:
            self._memory.free()
        # also returns the memory of what was computed from a piece
        give_back()

    @contextmanager
    def without(self, piece: int) -> Iterator[None]:
        """A `with` block in which a piece is not read, even when it is called."""
        if not self.keep:
            self.forget()
        self._without = piece
        try:
            yield
        finally:
            self._without = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A `with` block in which pieces stay once they are read."""
        before, self.keep = self.keep, True
        try:
            yield
        finally:
            self.keep = before
            if not before:
                self.forget()

    def read_when_called(self, module: nn.Module, piece: int) -> None:
        """Read a piece whenever a module is called."""

        def read(called: nn.Module, *_: object) -> None:
            # a module whose forward is replaced (`LayerwiseModel`) does not use its weights
            if "forward" not in vars(called):
                self.need(piece)

        module.register_forward_pre_hook(read)

    def _lost(self, error: Exception) -> UnreadableError:
        """The error for files that changed after they were opened."""
        try:
            original.headers(self._folder)
        except MoqaError as reason:
            error = reason
        return UnreadableError(f"the original can no longer be read: {error}")

    def _read(self, piece: int | None) -> list[str]:
        """Read a piece's tensors into the model; returns the names of the parameters that they became."""
        before = {name: id(parameter) for name, parameter in self._model.named_parameters(remove_duplicate=False)}
        if self._fetching is not None and self._fetching[0] == piece:
            fetched = self._fetching[1].result()
            self._fetching = None
            result = self._put(fetched)
        else:
            with self._stored.opened(once=self.ahead) as on_disk:
                result = self._put(self._collected(piece, on_disk))
        if result.conversion_errors:
            name, error = next(iter(result.conversion_errors.items()))
            raise MoqaError(f"{self._folder}: {name} cannot be read", error.strip().splitlines()[-1])
        if piece in (None, ENDS):
            self._tie()
        self._model.requires_grad_(False)
        return [name for name, p in self._model.named_parameters(remove_duplicate=False) if id(p) != before[name]]

    def _tie(self) -> None:
        """Tie what the configuration ties, in either direction, except two tensors of the folder that differ."""
        with BUILDING, quiet():
            self._model.tie_weights(missing_keys=set(self._absent), recompute_mapping=False)

    def _settle_ties(self, names: Mapping[str, str]) -> None:
        """Find out once which parameters are tied; `names` are those on disk."""
        ties = self._model.all_tied_weights_keys
        twice = {target: source for target, source in ties.items() if not self._absent & {target, source}}
        if twice:
            self.need(ENDS)  # compares them
            for target in twice.keys() & ties.keys():  # the same values: reading one is enough
                self._absent.add(target)
                self._names = {p: [n for n in found if n != names[target]] for p, found in self._names.items()}
            if not self.keep:
                self.forget()
        for target, source in ties.items():
            if source in self._absent and target in self._dtypes:
                self._dtypes[source] = self._dtypes[target]

    def _fetch(self, piece: int) -> "_Fetched":
        """Read a piece's tensors, for a later `_put`."""
        with self._stored.opened(once=True) as on_disk:
            fetched = self._collected(piece, on_disk)
            self._memory.free()
            return _Fetched(fetched.stacks, {name: tensor[...] for name, tensor in fetched.rest.items()})

    def _collected(self, piece: int | None, on_disk: Callable[[str], LazyTensor]) -> "_Fetched":
        stacks = self._stacks.get(piece, [])
        stacked = {name for stack in stacks for name in stack.names}
        read = {stack.target: stack.read(self._model, on_disk, self._memory, self._readers) for stack in stacks}
        return _Fetched(read, {name: on_disk(name) for name in self._names[piece] if name not in stacked})

    def _put(self, fetched: "_Fetched") -> Any:
        for target, stack in fetched.stacks.items():
            _put(self._model, target, stack)
        return _convert(self._model, fetched.rest, self._mapping, "cpu")


class _Fetched(NamedTuple):
    """A piece on its way into the model.

    Attributes:
        stacks: parameter -> its values.
        rest: name on disk -> tensor, for the conversion.
    """

    stacks: dict[str, Tensor]
    rest: Mapping[str, LazyTensor | Tensor]


class _Stack:
    """A stack of experts that are stored one by one; each is read to its place in the stack, without a copy.

    Args:
        target: parameter that they become.
        converter: transformers' own description of how.
    """

    def __init__(self, target: str, converter: Any) -> None:
        self.target, self._converter = target, converter
        self._sources: dict[str, list[str]] = {}

    @property
    def names(self) -> list[str]:
        """Tensors on disk."""
        return [name for names in self._sources.values() for name in names]

    def add(self, name: str, pattern: str) -> None:
        """Add the next expert's tensor of one kind."""
        self._sources.setdefault(pattern, []).append(name)

    def is_plain(self, model: "PreTrainedModel", headers: Mapping[str, dict]) -> bool:
        """Whether every expert has one matrix of each kind, and the stack holds an expert's matrices in a row."""
        experts, *whole = model.get_parameter(self.target).shape
        shapes = {tuple(headers[name]["shape"]) for name in self.names}
        if {len(names) for names in self._sources.values()} != {experts} or len(shapes) > 1:
            return False
        rows, *columns = shapes.pop()
        return whole == [len(self._sources) * rows, *columns] and len(columns) == 1 and self._in_order(model)

    def _in_order(self, model: "PreTrainedModel") -> bool:
        """Whether the conversion only concatenates the rows of an expert's matrices, tried on small ones."""
        converter = deepcopy(self._converter)
        matrices = list(torch.arange(6 * len(self._sources)).view(-1, 2, 3))
        for (pattern, names), matrix in zip(self._sources.items(), matrices, strict=True):
            converter.add_tensor(self.target, names[0], pattern, matrix)
        converted = converter.convert(self.target, model=model, config=model.config)[self.target]
        return torch.equal(converted[0] if isinstance(converted, list) else converted, torch.cat(matrices)[None])

    def read(
        self, model: "PreTrainedModel", on_disk: Callable[[str], LazyTensor], memory: ReusedMemory, readers: Executor
    ) -> Tensor:
        """All experts."""
        empty = model.get_parameter(self.target)
        whole = memory.take(empty.shape, empty.dtype)
        places: list[LazyTensor] = []
        parts: list[Tensor] = []
        for expert, names in zip(whole, zip(*self._sources.values(), strict=True), strict=True):
            places += map(on_disk, names)
            parts += expert.chunk(len(names))
        for _ in readers.map(LazyTensor.read_into, places, parts):
            pass
        return whole


def _targets(
    model: "PreTrainedModel", mapping: Sequence[Any], names: Sequence[str]
) -> dict[str, tuple[str, str | None, Any]]:
    """For each tensor on disk, in transformers' order: the parameter or buffer that it becomes (the first, if several),
    and the pattern and converter that apply to it, if any. Tensors that the model ignores are left out."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target in wanted:
            found[name] = (target, pattern, by_pattern.get(pattern))
    return found


def _check(model: "PreTrainedModel", folder: Path, mapping: Sequence[Any], headers: Mapping[str, dict]) -> set[str]:
    """Convert all tensors without their values, and refuse a checkpoint whose result does not fit the model; returns
    the parameters that only a tie provides."""
    state = {name: torch.empty(entry["shape"], dtype=_dtype(entry), device="meta") for name, entry in headers.items()}
    found = _convert(model, state, mapping, "meta")
    absent = set(found.missing_keys)
    with BUILDING, quiet():
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    absent -= found.missing_keys
    # transformers would fill these with random numbers; some families only silence its warning
    random = found.missing_keys & dict(model.named_parameters(remove_duplicate=False)).keys()
    model._adjust_missing_and_unexpected_keys(found)
    missing = found.missing_keys | random
    wrong = [*sorted(found.conversion_errors), *sorted(str(key) for key in found.mismatched_keys), *sorted(missing)]
    wrong += sorted(key for key in found.unexpected_keys if not is_mtp(model.config, key))
    if wrong:
        problem = difference(folder, model.config) or f"{len(wrong)} tensors do not fit, e.g. {wrong[0]}"
        raise MoqaError(f"{folder} is not what its config.json says", problem)
    return absent


def _parts(headers: Mapping[str, dict], used: Collection[str]) -> dict[str, int]:
    """Number of values in tensors that are not used, by the shortest beginning of a name that no used tensor has."""
    common = {name[:end] for name in used for end in _ends(name)}
    parts: dict[str, int] = {}
    for name in sorted(headers.keys() - set(used)):
        part = next((name[:end] for end in _ends(name) if name[:end] not in common), name)
        parts[part] = parts.get(part, 0) + math.prod(headers[name]["shape"])
    return parts


def _ends(name: str) -> list[int]:
    """Where the beginnings of a name end: before each dot, and after the last word."""
    return [*(place for place, letter in enumerate(name) if letter == "."), len(name)]


def _convert(model: "PreTrainedModel", state: Mapping[str, Any], mapping: Sequence[Any], device: str) -> Any:
    """Let transformers turn tensors of a checkpoint into a model's parameters."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with quiet():
        config = LoadStateDictConfig(weight_mapping=list(mapping), device_map={"": device})
        return convert_and_load_state_dict_in_model(model, dict(state), config)[0]


def _dtype(entry: Mapping[str, Any]) -> torch.dtype:
    return original.DTYPES[entry["dtype"]]


def _empty(model: "PreTrainedModel", name: str, dtype: torch.dtype | None = None) -> None:
    """Replace a parameter by one without memory."""
    old = model.get_parameter(name)
    _put(model, name, torch.empty(old.shape, dtype=dtype or old.dtype, device="meta"))


def _put(model: "PreTrainedModel", name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._parameters[child] = nn.Parameter(value, requires_grad=False)
