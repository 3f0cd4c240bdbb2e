"""Experiments of the federated study: the grid, and single questions beside it, what decides most first."""

from collections.abc import Iterator, Sequence
from typing import Any

from moqa.federated import Experiment

ALLOCATIONS = ("qat", "ptq", "coarse+fine", "random-hybrid", "coarse", "fp")
SEEDS = range(3)
# seconds of a step with rounding over one without, as `federated_study.py --costs` measures them
COSTS = {"fashion-mnist": 2.0, "cifar10": 1.85, "text": 1.8}
FASHION: dict[str, Any] = {
    "data": "fashion-mnist", "split": 0.1, "samples": 4000, "test_samples": 1000, "rounds": 20, "rate": 0.01,
    "depth": 2, "target": 0.6,
}  # fmt: skip
CIFAR = {**FASHION, "data": "cifar10", "samples": 2500, "rounds": 15, "target": 0.25}
TEXT: dict[str, Any] = {
    "data": "text", "samples": 800, "test_samples": 150, "rounds": 20, "batch": 16, "optimizer": "adamw",
    "rate": 0.003, "target": 0.22,
}  # fmt: skip
# with 0.1 every draw leaves some of 100 clients without data
MANY = {"clients": 100, "split": 0.5, "samples": 6000, "rounds": 10}
PARTS = {
    "fashion": FASHION, "cifar10": CIFAR, "text": TEXT, "fashion-100": {**FASHION, **MANY, "target": 0.5},
    "cifar10-100": {**CIFAR, **MANY}, "text-100": {**TEXT, **MANY, "split": float("inf")},
}  # fmt: skip
HETEROGENEITIES = (8, 1)
# whose links bound a round of full precision: bytes per second
SLOW_LINK = 5e4


def experiments() -> Iterator[tuple[str, Experiment]]:
    """Name and experiment."""
    for seed in SEEDS:
        yield from part("fashion", 8, seed, ("qat", "coarse+fine", "ptq"))
    for seed in SEEDS:
        yield from part("fashion", 8, seed)
    for allocation in ("coarse+fine", "fp", "qat"):
        yield f"slow-link-{allocation}", experiment("fashion", 8, 0, allocation, link=SLOW_LINK)
    for name in ("cifar10", "text"):
        for seed in SEEDS:
            yield from part(name, 8, seed)
    for allocation in ("coarse+fine", "qat"):
        yield f"secure-{allocation}", experiment("fashion", 8, 0, allocation, secure=True)
    for trim in (0.0, 0.2):
        for share in (0.0, 0.2):
            fields = {"split": 0.5, "rounds": 12, "attackers": share, "trim": trim}
            yield f"attack-{share}-trim-{trim}", experiment("fashion", 1, 0, "qat", **fields)
    for heterogeneity in HETEROGENEITIES:
        for seed in SEEDS:
            for name in PARTS:
                yield from part(name, heterogeneity, seed)


def part(
    name: str, heterogeneity: int, seed: int, allocations: Sequence[str] = ALLOCATIONS
) -> Iterator[tuple[str, Experiment]]:
    """One seed of a part of the grid."""
    for allocation in allocations:
        found = experiment(name, heterogeneity, seed, allocation)
        yield f"{name}-{heterogeneity}x-{allocation}-{seed}", found


def experiment(name: str, heterogeneity: int, seed: int, allocation: str, **fields: Any) -> Experiment:
    """One of the grid, or one beside it."""
    own = PARTS[name] | {"bits": 2, "heterogeneity": heterogeneity, "seed": seed, "allocation": allocation}
    return Experiment(**{**own, "qat_cost": COSTS[own["data"]], **fields})
