"""Adjustments of a model that vLLM serves: methods of its worker processes, called through its collective RPC.

vllm serve OUT --worker-extension-cls moqa.integrations.vllm.worker.AdjustedWorker
"""

from pathlib import Path
from typing import Any

from moqa.errors import MoqaError
from moqa.integrations.vllm.source import UnitSource


class AdjustedWorker:
    """What each worker process can do more.

    >>> llm.collective_rpc("apply_adjustment", args=("runs/german",))  # doctest: +SKIP
    >>> llm.reset_prefix_cache()  # doctest: +SKIP
    """

    vllm_config: Any

    def apply_adjustment(self, folder: str) -> str:
        """Compute with an adjustment from the next step on; returns its name.

        vLLM's prefix cache still holds what was computed before: reset it, too.

        Raises:
            MoqaError: if it is damaged or for another checkpoint, one is applied already, or this vLLM cannot use it.
        """
        source, parallel = self._source(), self.vllm_config.parallel_config
        if parallel.tensor_parallel_size > 1 or parallel.data_parallel_size > 1:
            raise MoqaError("adjustments need all experts in one process", "serve without --tensor-parallel-size")
        if self.vllm_config.device_config.device_type != "cpu":
            raise MoqaError("vLLM applies adjustments on the CPU only", "`moqa serve` applies them on GPUs, too")
        source.adjustments.apply(Path(folder))
        return str(source.adjustments.current)

    def revert_adjustment(self) -> None:
        """Compute with the checkpoint as it is from the next step on.

        Raises:
            MoqaError: if none is applied.
        """
        self._source().adjustments.revert()

    def current_adjustment(self) -> str | None:
        """Name of the adjustment in use."""
        return self._source().adjustments.current

    def _source(self) -> UnitSource:
        source: UnitSource | None = getattr(self.vllm_config.quant_config, "source", None)
        if source is None:
            raise MoqaError("this vLLM serves no checkpoint of moqa", "adjustments are made for one")
        return source
