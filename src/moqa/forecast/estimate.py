"""The result of a forecast."""

from pydantic import BaseModel, Field


class Estimate(BaseModel, frozen=True):
    """Estimated cost of a run."""

    checkpoint_bytes: int = Field(description="exact size of the weight files")
    peak_bytes: int = Field(description="largest resident memory of the process")
    disk_bytes: int = Field(description="most disk space at any time: checkpoint, cache and hidden states")
    seconds: float = Field(description="on this machine, from the start of the command, from a trial of a few seconds")
