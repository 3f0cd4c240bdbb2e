"""Engines: where the pieces of long work are done, in this process or on the machines of a Ray cluster."""

from moqa.engine.local import Engine, LocalEngine
from moqa.engine.registry import ENGINES, find_engine
from moqa.engine.site import Site

__all__ = ["ENGINES", "Engine", "LocalEngine", "Site", "find_engine"]
