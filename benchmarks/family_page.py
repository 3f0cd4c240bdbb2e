"""Which model families of the installed transformers moqa understands, in their default shapes: docs/families.md.

`make families` writes it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from moqa.errors import MoqaError, one_line
from moqa.models.building import empty_model
from moqa.models.experts import Experts, is_experts
from moqa.models.layerwise import LayerwiseModel
from moqa.models.units import ROLES
from moqa.models.view import ModelView
from moqa.tasks import find_task

_GEMMA = {
    "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# what a default leaves open, so that transformers itself cannot build or run it; and a dense default of a family whose
# published mixture of experts has other values
COMPLETED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "gemma4": {"text_config": _GEMMA},
    "gemma4_text": _GEMMA,
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
}

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


_PAGE = """# Model families

Made by `make families` from transformers {transformers}: every family of causal language models, and of models of text
with towers that see or hear, in its default shape, without memory for its weights. A family is understood if every
matrix of its layers is a unit or kept on purpose, its configuration says how many experts a token is sent to, and its
layers can be run one at a time. Where a default leaves values open, or is dense although a mixture is published, they
are those of `COMPLETED` in `benchmarks/family_page.py` (marked *).

Understood: {mixtures} mixtures of experts, {dense} dense families. Refused by name, before any work: {refused}.

## Mixtures of experts

{of_text}

## Mixtures of experts with towers

The text is quantized; towers and projectors are kept as stored, and transformers' own class loads the result.

{with_towers}

## Dense

{dense_names}.

## Refused

{reasons}
"""


@dataclass(frozen=True)
class Family:
    """What moqa finds in a family's default shape.

    Attributes:
        model_type: as `config.json` names it.
        kind: class of transformers.
        refused: why moqa refuses it; None if it is understood.
        layers: number of blocks.
        experts: routed experts of a layer, where layers differ the most; 0 in a dense model.
        top_k: experts per token.
        units: number of units by role.
    """

    model_type: str
    kind: str
    refused: str | None = None
    layers: int = 0
    experts: int = 0
    top_k: int = 0
    units: tuple[tuple[str, int], ...] = ()


class _Routes:
    """Stands in for the experts of a layer, and counts how many a token is sent to."""

    def __init__(self) -> None:
        self.top_k = 0

    def run(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        """See `moqa.models.experts.ExpertWeights`."""
        self.top_k = index.shape[1]
        return torch.empty_like(hidden)


class _Valueless(TorchFunctionMode):
    """Where a forward asks for a number that a tensor on the meta device does not have, it is 0."""

    _asking = frozenset(
        {Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.tolist}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._asking and args[0].is_meta:
            args = (torch.zeros(args[0].shape, dtype=args[0].dtype, device="cpu"),)
        return func(*args, **(kwargs or {}))


def survey() -> Iterator[Family]:
    """All families of causal language models, then those with parts that see or hear as they are published."""
    for model_type, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        yield look(model_type, kind)
    for model_type, kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items():
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) != kind:
            yield look(model_type, kind)


def look(model_type: str, kind: str) -> Family:
    """View a family's default model on the meta device, without memory for its weights."""
    try:
        config = CONFIG_MAPPING[model_type](**COMPLETED.get(model_type, {}))
        config.architectures = [kind]
    except Exception as error:  # any kind
        return Family(model_type, kind, f"transformers has no default shape: {one_line(error)}")
    if not find_task("causal_lm").accepts(config):
        return Family(model_type, kind, "not a model of text that reads text alone")
    try:
        with torch.device("meta"):
            model = empty_model(config, torch.bfloat16)
    except Exception as error:  # any kind
        return Family(model_type, kind, f"transformers cannot build its default shape: {one_line(error)}")
    try:
        return _described(model_type, kind, model)
    except MoqaError as error:
        return Family(model_type, kind, str(error))


def _described(model_type: str, kind: str, model: Any) -> Family:
    view = ModelView(model)
    view.check_complete()
    stacks: list[Any] = [module for block in view.blocks for module in block.modules() if is_experts(module)]
    for module in stacks:
        module.moqa_weights = _Routes()
    with torch.device("meta"), _Valueless():
        LayerwiseModel(model)
    routed = max((module.moqa_weights.top_k for module in stacks), default=0)
    if routed and routed > view.top_k:
        raise MoqaError(f"{kind} sends a token to {routed} experts", f"its configuration says {view.top_k}")
    roles = Counter(unit.role for unit in view.units.values())
    return Family(
        model_type, kind, None, len(view.blocks), max((module.num_experts for module in stacks), default=0), view.top_k,
        tuple((role, roles[role]) for role in ROLES if roles[role]),
    )  # fmt: skip


def page(families: Iterable[Family]) -> str:
    """The page, in Markdown."""
    found = list(families)
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    understood = [family for family in found if family.refused is None]
    mixtures = [family for family in understood if family.experts]
    dense = [family for family in understood if not family.experts]
    heads = ["model type", "class", "layers", "experts", "per token", "units"]
    text = [_cells(family) for family in mixtures if (family.model_type, family.kind) in causal]
    towers = [_cells(family) for family in mixtures if (family.model_type, family.kind) not in causal]
    refused = [[f"`{f.model_type}`", f.kind, str(f.refused).replace("|", "\\|")] for f in found if f.refused]
    dense_names = ", ".join(f"`{family.model_type}` ({family.kind})" for family in dense)
    return _PAGE.format(
        transformers=transformers.__version__, mixtures=len(mixtures), dense=len(dense), refused=len(refused),
        of_text=_table(heads, text), with_towers=_table(heads, towers), dense_names=dense_names,
        reasons=_table(["model type", "class", "why"], refused),
    )  # fmt: skip


def _cells(family: Family) -> list[str]:
    units = ", ".join(f"{count} {role}" for role, count in family.units)
    name = f"`{family.model_type}`{'*' * (family.model_type in COMPLETED)}"
    return [name, family.kind, str(family.layers), str(family.experts), str(family.top_k), units]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    PAGE.write_text(page(survey()), encoding="utf-8")
