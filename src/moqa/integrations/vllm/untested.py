"""What a checkpoint selects in a vLLM that was not tested: a refusal that says so, and not that moqa is unknown."""

from typing import Any

import vllm
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from moqa.integrations.vllm.version import check_version


class UntestedEngine(QuantizationConfig):  # type: ignore[misc]
    """Refuses every checkpoint; other models are served as ever."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "UntestedEngine":  # noqa: ARG003
        """Called before anything is loaded.

        Raises:
            MoqaError: always.
        """
        check_version(vllm.__version__)
        raise AssertionError
