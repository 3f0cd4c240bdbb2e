"""Memory that a served model needs in addition to its weight files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moqa.errors import MoqaError, one_line
from moqa.forecast.dry_run import LARGE, dry_run
from moqa.generation.loop import CHUNK
from moqa.models.building import BUILDING
from moqa.models.view import ModelView
from moqa.originals.folder import locate
from moqa.runtime.decoder import decodes_natively
from moqa.runtime.growing import SMALLEST, GrowingCache
from moqa.tasks import check_language_model
from moqa.tasks.configuration import read_configuration

# Measured on the most resident memory of `moqa serve` (CPython 3.11, PyTorch 2.13 for CPUs, glibc 2.36), for 15 models
# of 7 families, minus their weight files and the dry run's cache and buffers. They fit the worst of 37 processes,
# because a memory budget must hold. The processes took 75 to 99 % of the forecast.
PROCESS = 490 * 2**20  # interpreter, libraries and server: 485 MiB without a model
PER_WORD = 1100  # for each word of the vocabulary, tokenizer and sampling: 1041 bytes with 152 k words
PER_UNIT = 11 * 2**10  # for each unit, modules, tensors and manifest entries: 10.7 KiB with 6208 units
# Freed memory that glibc keeps of blocks below `LARGE` (fragmentation), as a share
HOLES = 2.5  # of the buffers of reading a chunk: 0 to 2.3
HOLES_GROWN = 0.2  # of a cache that doubles its capacity (`GrowingCache`), in addition to the capacity: 0.12 to 0.2
HOLES_JOINED = 1.0  # of transformers' own caches, which are copied for every token: 0.3 to 0.84


@dataclass(frozen=True)
class Needs:
    """Bytes that a served model needs in addition to its weight files.

    Attributes:
        cache: cache of one conversation at full context.
        around: memory that the allocator loses for each cache.
        fixed: everything else, independent of the number of conversations.
    """

    cache: int
    around: int
    fixed: int

    def overhead(self, batch: int) -> int:
        """Bytes that are neither weights nor caches, for a number of conversations."""
        return self.fixed + batch * self.around


class ServedModel:
    """A model as the runtime will hold it, built from its configuration: its tensors have shapes but no memory.

    >>> ServedModel("reference/model").needs(2048).cache
    12582912

    Args:
        model: folder or Hub id of the original model.

    Raises:
        MoqaError: if it is missing, or moqa cannot build a model from its configuration.
    """

    def __init__(self, model: str | Path) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        folder = locate(model)
        # not the meta device, where attention uses other kernels, with other buffers, than on the CPU
        self._mode = FakeTensorMode()
        try:
            config = read_configuration(folder)
            auto = check_language_model(config, model).auto_class(config)
            self._stored, self._text = config.dtype, config.get_text_config()
            with BUILDING, self._mode:
                self._model: Any = auto.from_config(config, dtype=torch.float32).eval()
        except MoqaError:
            raise
        except Exception as error:  # transformers raises many kinds of errors here
            raise MoqaError(f"{folder} has no usable config.json", one_line(error)) from None
        self._grows = decodes_natively(config)
        self.view = ModelView(self._model)

    @property
    def context(self) -> int | None:
        """Longest context of the model in tokens; None if there is no limit."""
        return getattr(self._text, "max_position_embeddings", None)

    def needs(self, context: int) -> Needs:
        """Bytes for conversations of `context` tokens, one or more.

        Raises:
            MoqaError: if the model has no cache of the usual kind.
        """
        with self._mode:
            run = dry_run(self._model, context, GrowingCache(len(self.view.blocks)) if self._grows else None)
        # the dry run of a growing cache has its full capacity
        room = max(SMALLEST, 1 << (context - 1).bit_length()) if self._grows else context
        filled = [size * context // room for size in run.cache]
        around = sum(self._around(size, used) for size, used in zip(run.cache, filled, strict=True))
        fixed = PROCESS + PER_WORD * self._text.vocab_size + PER_UNIT * len(self.view.units) + self._widened()
        buffers = run.large + int((1 + HOLES) * (run.small + self._scratch(min(context, CHUNK))))
        return Needs(sum(filled), around, fixed + buffers)

    def _around(self, size: int, used: int) -> int:
        """Bytes that are lost for one tensor of a cache; unused pages of a large one take no memory."""
        share = HOLES_GROWN if self._grows else HOLES_JOINED
        return int(size - used + share * used) if size < LARGE else int(share * LARGE)

    def _widened(self) -> int:
        """Bytes of float32 copies that the runtime makes: of everything but units and bfloat16 embedding tables."""
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        mapped = {id(end.weight) for end in ends} if self._stored == torch.bfloat16 else set()
        units = self.view.unit_parameters()
        parameters = self._model.named_parameters()
        return sum(4 * p.numel() for name, p in parameters if name not in units and id(p) not in mapped)

    def _scratch(self, tokens: int) -> int:
        """Bytes of the scratch memory of the native kernels for the experts of a block."""
        sides = [sum(unit.shape) for unit in self.view.units.values() if unit.role == "expert"]
        # for each row, float32 results of both products, and integers and scales with reserve for other routings
        return 6 * tokens * self.view.top_k * max(sides, default=0)
