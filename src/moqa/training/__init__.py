"""Training of checkpoints: what is stored beside integers and codes learns to answer as the original."""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.training.memory import trains_whole
    from moqa.training.run import Recovered, recover
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["Recovered", "recover", "trains_whole"]
