"""Integrations: moqa's checkpoints in other libraries."""


def torch_backend() -> None:
    """Called by `import torch`, through the entry point `torch.backends`, so that no program has to import moqa itself.

    >>> torch_backend()

    There is nothing left to do: the import of `moqa` has registered it with transformers.
    """
