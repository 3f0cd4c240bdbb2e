"""The result of a forecast."""

from pydantic import BaseModel, Field


class Estimate(BaseModel, frozen=True):
    """Estimated cost of a run."""

    checkpoint_bytes: int = Field(description="of the weight files, exactly")
    peak_bytes: int = Field(description="largest resident memory of the process")
    disk_bytes: int = Field(description="checkpoint, cache and what is put aside, at the fullest moment")
    seconds: float = Field(description="on this machine, from the start of the command; by a trial of a few seconds")
