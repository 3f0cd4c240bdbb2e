"""Training of checkpoints: what is stored beside integers and codes learns to answer as the original."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.training.run import Recovered, check_trainable, recover
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["Recovered", "check_trainable", "recover"]
