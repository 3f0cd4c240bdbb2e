"""Merged variants on disk and loaded: a base, one vector for all variants, and a bit per weight of each."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from pydantic import BaseModel, Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moqa.errors import MoqaError
from moqa.format.manifest import StoredFile
from moqa.mixture.elect import restored_weights, unpacked_mask
from moqa.mixture.route import RoutedPrompt
from moqa.mixture.steps import steps_with
from moqa.models.building import empty_model
from moqa.models.load import read_config, read_generation_config
from moqa.models.view import ModelView
from moqa.registry import check_known
from moqa.storage.artifact import check_format, check_seal, file_hash, read_json
from moqa.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")

FORMAT, MERGED = 1, "merged.json"
BASE = "base"  # the variant that changes nothing


class MergedVariant(BaseModel, frozen=True):
    """One fine-tuned variant of the base."""

    model: str = Field(description="as the user gave it; an absolute path relative to the folder")
    fingerprint: str
    rescaler: float = Field(description="by which its part of the unified vector is multiplied")
    agreement: float = Field(description="share of its weights' changes that have the unified vector's sign")
    distance: float = Field(description="norm of its changes over the norm of the base")
    bytes: int = Field(description="of its masks")


class MergedAccount(BaseModel, frozen=True):
    """Bytes of merged variants."""

    base: int
    unified: int = Field(description="of the vector that all variants share")
    masks: int = Field(description="of all variants")
    total: int = Field(description="of all weight files")
    apart: int = Field(description="of the weight files of the variants themselves")


class MergedRecord(BaseModel, frozen=True):
    """The content of `merged.json`."""

    format: int = FORMAT
    moqa: str = Field(description="version that wrote it")
    model: str = Field(description="the base, as the user gave it; an absolute path relative to the folder")
    model_type: str
    fingerprint: str = Field(description="of the base")
    default: str = Field(BASE, description="variant of a prompt that names none")
    variants: dict[str, MergedVariant] = Field(min_length=1)
    files: dict[str, StoredFile]
    account: MergedAccount

    @model_validator(mode="after")
    def _are_names(self) -> Self:
        other = next((name for name in self.files if not re.fullmatch(r"merged-\d+-of-\d+\.safetensors", name)), None)
        if other is not None:
            raise ValueError(f"{other} is no name of a file of merged variants")
        return self


def is_merged(folder: str | Path) -> bool:
    """Whether a folder holds merged variants."""
    return (Path(folder) / MERGED).is_file()


def read_merged(folder: str | Path, verify: bool = True) -> MergedRecord:
    """Read the record of merged variants.

    Args:
        folder: of the merged variants.
        verify: compare the files' hashes.

    Raises:
        MoqaError: if there is none, or it or one of its files was changed.
    """
    path = Path(folder) / MERGED
    if not path.is_file():
        raise MoqaError(f"{folder} holds no merged variants", f"it has no {MERGED}")
    record = read_json(MergedRecord, path)
    check_format(f"{folder} has merged variants of", record.format, FORMAT)
    check_seal(path)
    for name, file in record.files.items():
        one = path.with_name(name)
        if not one.is_file() or one.stat().st_size != file.bytes or (verify and file_hash(one) != file.sha256):
            raise MoqaError(f"{one} is missing or was changed after it was written", f"{MERGED} has its hash")
    return record


class MergedVariants:
    """The variants that one model can become (`model.mixture`): its weights are rewritten when another one is used.

    >>> model, tokenizer = moqa.load("runs/merged")  # doctest: +SKIP
    >>> model.mixture.names  # doctest: +SKIP
    ['base', 'math', 'code']
    >>> model = model.mixture.use("math")  # doctest: +SKIP

    Args:
        folder: of the merged variants.
        record: its record.
        model: with the weights of the base.
    """

    def __init__(self, folder: Path, record: MergedRecord, model: "PreTrainedModel") -> None:
        self.folder, self.record, self._model = folder, record, model
        self.current = BASE

    @property
    def models(self) -> "list[PreTrainedModel]":
        """The one model."""
        return [self._model]

    @property
    def names(self) -> list[str]:
        """The base, and all variants."""
        return [BASE, *self.record.variants]

    def choose(self, ids: Sequence[int]) -> RoutedPrompt:
        """The base: nothing chooses among fine-tuned variants, a request names one.

        Raises:
            MoqaError: if there is no token.
        """
        if not len(ids):
            raise MoqaError("the prompt is empty", "give at least one token")
        return RoutedPrompt(self.record.default)

    def checked(self, route: RoutedPrompt) -> RoutedPrompt:
        """The same route: files that are mapped stay readable."""
        return route

    @torch.no_grad()
    def use(self, name: str) -> "PreTrainedModel":
        """The model, with the weights of a variant from now on.

        Raises:
            MoqaError: if there is no variant of that name, or a file cannot be read.
        """
        check_known("variant", name, self.names)
        if name != self.current:
            state = self._model.state_dict()
            self.current = ""  # an error on the way leaves no variant
            for key, weights in variant_tensors(self.folder, self.record, name):
                state[key].copy_(weights)
            self.current = name
        return self._model

    def model_of(self, name: str) -> "PreTrainedModel":
        """See `use`."""
        return self.use(name)

    def steps(self, name: str, make: "Callable[[PreTrainedModel], Iterator[_T]]") -> Iterator[_T]:
        """What the model yields step by step, with a variant in use in each; others may be used between them."""
        return steps_with(self.use, name, make)

    def rest(self, names: Sequence[str]) -> None:
        """Nothing: there is one model for all variants."""


def load_merged(folder: str | Path, verify: bool = True) -> "tuple[PreTrainedModel, Any]":
    """Load merged variants as their base in float32, see `moqa.load`.

    Args:
        folder: of the merged variants.
        verify: compare the files' hashes first.

    Raises:
        MoqaError: if it is damaged.
    """
    folder = Path(folder)
    record, config = read_merged(folder, verify), read_config(folder, packed=True)
    model = empty_model(config, torch.float32)
    ModelView(model)  # experts run by moqa's own function
    wanted = model.state_dict()
    state = {
        name: weights.to(wanted[name].dtype) if name in wanted else weights
        for name, weights in variant_tensors(folder, record, BASE)
    }
    report = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights(missing_keys=set(report.missing_keys), recompute_mapping=False)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if report.unexpected_keys or left:
        raise MoqaError(f"{folder}: {(report.unexpected_keys or left)[0]} does not fit config.json")
    if task_of(config).writes_samples:
        read_generation_config(model, folder)
    model.requires_grad_(False).eval()
    model.mixture = MergedVariants(folder, record, model)
    return model, task_of(config).processor(folder)


def variant_tensors(folder: Path, record: MergedRecord, name: str) -> Iterator[tuple[str, Tensor]]:
    """Name and weights of every tensor of a variant, one at a time.

    Raises:
        MoqaError: if a file cannot be read.
    """
    for file in record.files:
        try:
            with safe_open(folder / file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118  (not a mapping)
                    kind, _, parameter = key.partition(".")
                    if kind != BASE:
                        continue
                    weights = stored.get_tensor(key)
                    if name != BASE and weights.is_floating_point():
                        mask = unpacked_mask(stored.get_tensor(f"mask.{name}.{parameter}"), weights.shape)
                        unified = stored.get_tensor(f"unified.{parameter}")
                        weights = restored_weights(weights, unified, mask, record.variants[name].rescaler)
                    yield parameter, weights
        except (SafetensorError, OSError) as error:
            raise MoqaError(f"{folder / file} cannot be read", str(error)) from None
