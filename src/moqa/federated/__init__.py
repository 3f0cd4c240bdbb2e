"""Federated training in which every client rounds after training or while it trains, whichever suits it (FedHQ).

It runs on Flower (`pip install 'moqa[federated]'`), which is imported when a name here is first used.
"""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.federated.client import local, measured, mod
    from moqa.federated.driver import run
    from moqa.federated.modes import LocalMode, in_mode
    from moqa.federated.settings import Experiment
    from moqa.federated.strategy import FedHQ
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["Experiment", "FedHQ", "LocalMode", "in_mode", "local", "measured", "mod", "run"]
