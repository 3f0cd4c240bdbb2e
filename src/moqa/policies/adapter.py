"""How the parts of a policy are found and how it is run: one adapter for each kind of policies."""

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from torch import Tensor, nn

from moqa.errors import MoqaError
from moqa.policies.observation import Fields, PolicyInputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# vision encoder, projector, language model, action head: in the order in which an observation passes them
Part = Literal["vision", "projector", "language", "action"]
PARTS: tuple[Part, ...] = get_args(Part)
# names of the module lists that hold a part's blocks
_LISTS = ("layers", "layer", "blocks", "h", "resblocks", "stages", "stem", "down_modules", "mid_modules", "up_modules")


@dataclass(frozen=True)
class Meeting:
    """Where vision meets language.

    Attributes:
        projected: path of the module whose output are the projected tokens, [batch, tokens, features].
        words: path of the embedding of words; empty for a policy that is told nothing.
    """

    projected: str
    words: str


class PolicyAdapter(Protocol):
    """What moqa needs to know of a kind of policies.

    >>> from moqa.policies.members import adapter_of
    >>> from moqa.policies.small import SmallPolicyConfig
    >>> adapter_of(SmallPolicyConfig()).name
    'small'

    Attributes:
        name: of the kind.
        places: part -> paths at which it is looked for; the first that there is counts, and all that fit it if it is a
            pattern with `*`.
    """

    name: str
    places: dict[Part, tuple[str, ...]]

    def accepts(self, config: "PretrainedConfig") -> bool:
        """Whether a configuration is of this kind."""

    def auto_class(self, config: "PretrainedConfig") -> Any:
        """Builds the policy: has `from_config`."""

    def fields(self, config: "PretrainedConfig") -> Fields:
        """What the policy sees."""

    def robot(self, config: "PretrainedConfig") -> str:
        """The robot that it was made for; empty if it does not say."""

    def actions(self, config: "PretrainedConfig") -> tuple[int, int]:
        """How many actions it predicts at once, and numbers of an action."""

    def meeting(self, model: nn.Module) -> Meeting:
        """Where vision meets language."""

    def ids(self, config: "PretrainedConfig", instruction: str) -> Tensor:
        """[words] of an instruction.

        Raises:
            MoqaError: if the policy does not know it.
        """

    def act(self, model: nn.Module, seen: PolicyInputs) -> Tensor:
        """[batch, chunk, action]."""


def parts_of(adapter: PolicyAdapter, model: nn.Module) -> dict[Part, list[str]]:
    """Paths of each part that a policy has: one, or one for each of its cameras.

    Raises:
        MoqaError: if there is no vision encoder or no action head; lists what was looked at.
    """
    modules = [name for name, _ in model.named_modules()]
    fitting = {part: [fnmatch.filter(modules, path) for path in paths] for part, paths in adapter.places.items()}
    found = {part: next(filter(None, paths)) for part, paths in fitting.items() if any(paths)}
    lack = next((part for part in ("vision", "action") if part not in found), None)
    if lack is not None:
        looked = ", ".join(path for paths in adapter.places.values() for path in paths)
        there = ", ".join(name for name, _ in model.named_children())
        raise MoqaError(f"{type(model).__name__} has no {lack} part", f"looked for {looked}; it has {there}")
    return found


def blocks_of(model: nn.Module, path: str) -> list[str]:
    """Paths of the blocks of a part: the modules of its outermost lists, or itself if it has none."""
    part = model.get_submodule(path)
    lists = [
        f"{path}.{name}" for name, module in part.named_modules()
        if name.rpartition(".")[2] in _LISTS and isinstance(module, nn.ModuleList) and len(module)
    ]  # fmt: skip
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    return [f"{name}.{index}" for name in outermost for index in range(len(_at(model, name)))] or [path]


def _at(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)
