"""What a model takes in memory while it is served, beside its weight files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moqa.errors import MoqaError, one_line
from moqa.forecast.dry_run import LARGE, dry_run
from moqa.generation.loop import CHUNK
from moqa.models.view import ModelView
from moqa.originals.folder import locate
from moqa.runtime.decoder import FAMILIES, ROPES
from moqa.runtime.growing import SMALLEST, GrowingCache
from moqa.tasks import check_language_model

# Measured on the most resident memory of `moqa serve` (CPython 3.11, PyTorch 2.13 for CPUs, glibc 2.36), for 15 models
# of 7 families, less their weight files and the dry run's cache and buffers. They are for the worst of 37 processes: a
# budget of memory must hold. These took 75 to 99 % of what is foreseen.
PROCESS = 490 * 2**20  # interpreter, libraries and server: 485 MiB without a model
PER_WORD = 1100  # of the vocabulary, for tokenizer and sampling: 1041 bytes of 152 k words
PER_UNIT = 11 * 2**10  # for modules, tensors and entries of the manifest: 10.7 KiB of 6208 units
# What glibc keeps for later of blocks below `LARGE`, between others and at the ends of its heaps, as a share
HOLES = 2.5  # of the buffers of reading a chunk: 0 to 2.3
HOLES_GROWN = 0.2  # of a cache that doubles its room (`GrowingCache`), beside that room: 0.12 to 0.2
HOLES_JOINED = 1.0  # of transformers' own caches, which are copied for every token: 0.3 to 0.84


@dataclass(frozen=True)
class Needs:
    """Bytes that a served model takes beside its weight files.

    Attributes:
        cache: of one conversation, when it is as long as its context.
        around: what the allocator loses around it.
        fixed: of all else, however many conversations there are.
    """

    cache: int
    around: int
    fixed: int

    def overhead(self, batch: int) -> int:
        """All that is neither weights nor caches, for so many conversations."""
        return self.fixed + batch * self.around


class ServedModel:
    """A model as the runtime will hold it, made from its configuration: its tensors have shapes and no memory.

    >>> ServedModel("reference/model").needs(2048).cache
    12582912

    Args:
        model: folder or Hub id of the original model.

    Raises:
        MoqaError: if it is missing, or no model that moqa understands can be built from its configuration.
    """

    def __init__(self, model: str | Path) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = locate(model)
        # not the meta device: there, attention runs on other kernels than on the CPU, which take other buffers
        self._mode = FakeTensorMode()
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            check_language_model(config, model)
            self._stored, self._text = config.dtype, config.get_text_config()
            with self._mode:
                self._model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except MoqaError:
            raise
        except Exception as error:  # transformers fails on a foreign configuration in any way
            raise MoqaError(f"{folder} has no usable config.json", one_line(error)) from None
        self._grows = _grows(config)
        self.view = ModelView(self._model)

    @property
    def context(self) -> int | None:
        """Tokens that the model can hold; None if there is no limit."""
        return getattr(self._text, "max_position_embeddings", None)

    def needs(self, context: int) -> Needs:
        """Bytes for conversations of so many tokens, one or more.

        Raises:
            MoqaError: if the model keeps no cache of the usual kind.
        """
        with self._mode:
            run = dry_run(self._model, context, GrowingCache(len(self.view.blocks)) if self._grows else None)
        # a cache that grows is dry-run with all its room
        room = max(SMALLEST, 1 << (context - 1).bit_length()) if self._grows else context
        filled = [size * context // room for size in run.cache]
        around = sum(self._around(size, used) for size, used in zip(run.cache, filled, strict=True))
        fixed = PROCESS + PER_WORD * self._text.vocab_size + PER_UNIT * len(self.view.units) + self._widened()
        buffers = run.large + int((1 + HOLES) * (run.small + self._scratch(min(context, CHUNK))))
        return Needs(sum(filled), around, fixed + buffers)

    def _around(self, size: int, used: int) -> int:
        """Bytes that are lost around a tensor of a cache; the unused pages of a large one take no memory."""
        share = HOLES_GROWN if self._grows else HOLES_JOINED
        return int(size - used + share * used) if size < LARGE else int(share * LARGE)

    def _widened(self) -> int:
        """Bytes of what the runtime copies to float32 beside the files: all but units, and tables in bfloat16."""
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        mapped = {id(end.weight) for end in ends} if self._stored == torch.bfloat16 else set()
        units = self.view.unit_parameters()
        parameters = self._model.named_parameters()
        return sum(4 * p.numel() for name, p in parameters if name not in units and id(p) not in mapped)

    def _scratch(self, tokens: int) -> int:
        """Bytes that the native kernels keep for the rows of a layer's experts."""
        sides = [sum(unit.shape) for unit in self.view.units.values() if unit.role == "expert"]
        # of each row float32 results of both products, and its integers and scales with room for other routings
        return 6 * tokens * self.view.top_k * max(sides, default=0)


def _grows(config: Any) -> bool:
    """Whether the runtime decodes a model natively, and so keeps its cache itself (`FusedDecoder`)."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    usual = config.model_type in FAMILIES and rope in ROPES and getattr(config, "clip_qkv", None) is None
    return usual and {type(layer) for layer in DynamicCache(config=config).layers} == {DynamicLayer}
