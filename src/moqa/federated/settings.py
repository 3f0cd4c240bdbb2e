"""What an experiment is, as a file in TOML."""

import math
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from moqa.errors import MoqaError
from moqa.federated.modes import Allocation
from moqa.storage.files import read_text
from moqa.training.optimizers import OPTIMIZERS


class Experiment(BaseModel, frozen=True, extra="forbid"):
    """Federated training of a shipped model on simulated clients.

    >>> Experiment(data="fashion-mnist", bits=3).clients
    10
    """

    data: Literal["fashion-mnist", "cifar10", "text"] = Field(description="images, or text with a language per client")
    folder: Path | None = Field(None, description="of the data, if they are not where their package puts them")
    split: float = Field(
        math.inf, gt=0, description="alpha of a Dirichlet distribution of labels; inf for equal shares"
    )
    clients: int = Field(10, ge=2)
    heterogeneity: float = Field(1.0, ge=1, description="how much slower the slowest client computes than the fastest")
    link: float = Field(1e6, gt=0, description="bytes per second of every client")
    flops: float = Field(2e10, gt=0, description="floating-point operations per second of the fastest client")
    bandwidth: float = Field(1e10, gt=0, description="of its memory, bytes per second")
    qat_cost: float | None = Field(
        None,
        ge=1,
        description="seconds of a training step with rounding over those without; None counts its operations",
    )
    depth: int = Field(1, ge=1, description="of the model for images: convolutions at each of its three sizes")
    bits: Literal[8, 4, 3, 2] = 3
    allocation: Allocation = "coarse+fine"
    round_seconds: float | None = Field(None, gt=0)
    round_bytes: int | None = Field(None, gt=0)
    download_bits: Literal[32, 8, 4, 3, 2] = 8
    keep: tuple[str, ...] = ()
    rounds: int = Field(30, ge=1)
    target: float | None = Field(None, gt=0, lt=1, description="accuracy whose time is reported")
    samples: int = Field(6000, ge=1, description="of training, all clients together")
    test_samples: int = Field(2000, ge=1)
    epochs: int = Field(1, ge=1)
    batch: int = Field(32, ge=1)
    rate: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    optimizer: str | None = Field(
        None, description="of clients: adamw, muon, sgd or soap of `moqa.training`; None is plain SGD with `momentum`"
    )
    attackers: float = Field(0.0, ge=0, lt=1, description="share of clients that send scaled noise")
    trim: float = Field(0.0, ge=0, lt=0.5, description="share of bad clients that aggregation resists")
    epsilon: float | None = Field(None, gt=0, description="of differential privacy of the histograms")
    secure: bool = Field(False, description="the server sees the sum of the updates and none of them")
    engine: Literal["local", "ray"] = Field("local", description="this process, or Flower's simulation on Ray")
    seed: int = 0

    @field_validator("optimizer")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in OPTIMIZERS:
            raise ValueError(f"{name} is unknown: there are {', '.join(OPTIMIZERS)}")
        return name


def read_experiment(path: Path) -> Experiment:
    """Read an experiment.

    >>> read_experiment(Path("nowhere.toml"))
    Traceback (most recent call last):
    moqa.errors.MoqaError: nowhere.toml cannot be read: No such file or directory

    Raises:
        MoqaError: if the file cannot be read, or has a key or value that is not known.
    """
    try:
        fields: dict[str, Any] = tomllib.loads(read_text(path))
    except OSError as error:
        raise MoqaError(f"{path} cannot be read", error.strerror or str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MoqaError(f"{path} is not TOML", str(error)) from None
    unknown = sorted(fields.keys() - Experiment.model_fields.keys())
    if unknown:
        raise MoqaError(f"{path}: {unknown[0]} is unknown", f"known are {', '.join(Experiment.model_fields)}")
    try:
        return Experiment.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MoqaError(f"{path}: {where}", f"{first['msg'][0].lower()}{first['msg'][1:]}") from None
