"""How moqa builds models that no auto class of transformers knows."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Builder:
    """What moqa uses of an auto class of transformers, for a class that no auto class knows.

    >>> from moqa.policies.small import SmallPolicy, SmallPolicyConfig
    >>> type(Builder(SmallPolicy).from_config(SmallPolicyConfig())).__name__
    'SmallPolicy'
    """

    def __init__(self, kind: Any) -> None:
        self._kind, self._model_mapping = kind, {kind.config_class: kind}

    def from_config(self, config: "PretrainedConfig", **options: Any) -> Any:
        """The model of a configuration."""
        return self._kind._from_config(config, **options)
