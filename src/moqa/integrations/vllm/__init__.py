"""vLLM serves checkpoints as they are: `vllm serve OUT`, where moqa is installed beside it.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`; a checkpoint's
`config.json` then selects `ServedCheckpoint`, which answers for each of the model's layers how it is computed.
"""


def register() -> None:
    """Let vLLM know checkpoints of moqa; it may be called several times.

    >>> register()  # doctest: +SKIP
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from moqa.integrations.vllm.checkpoint import METHOD, ServedCheckpoint

    register_quantization_config(METHOD)(ServedCheckpoint)
