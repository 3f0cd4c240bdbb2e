"""vLLM serves checkpoints as they are: `vllm serve OUT`, where moqa is installed beside it.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`; a checkpoint's
`config.json` then selects `ServedCheckpoint`, which answers for each of the model's layers how it is computed.
"""


def register() -> None:
    """Let vLLM know checkpoints of moqa; it may be called several times.

    >>> register()  # doctest: +SKIP
    """
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config

    from moqa.integrations.vllm.version import is_tested

    select = register_quantization_config("moqa")
    if is_tested(vllm.__version__):
        from moqa.integrations.vllm.checkpoint import ServedCheckpoint

        select(ServedCheckpoint)
    else:
        from moqa.integrations.vllm.untested import UntestedEngine

        select(UntestedEngine)
