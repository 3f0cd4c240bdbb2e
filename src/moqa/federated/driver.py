"""`moqa.federated.run`: an experiment from start to end, which goes on after a kill."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from moqa.errors import MoqaError
from moqa.federated.clients import samples_of
from moqa.federated.flower import ArrayRecord, Context, Grid, ServerApp
from moqa.federated.local_grid import LocalGrid
from moqa.federated.order import record_of, state_of
from moqa.federated.page import render
from moqa.federated.records import FederatedRecord, RoundRecord
from moqa.federated.settings import Experiment
from moqa.federated.simulation import app_of, clock_of, evaluated, model_of
from moqa.federated.strategy import FedHQ
from moqa.progress import Report, quiet
from moqa.storage.artifact import write_json
from moqa.storage.resumable import ResumableRun, resumable

# on skewed splits the accuracy swings by several points from round to round
_LAST = 5
RECORD, MODEL, PAGE = "federated.json", "model.safetensors", "report.html"


def run(
    experiment: Experiment, out: Path, *, overwrite: bool = False, restart: bool = False, report: Report = quiet
) -> FederatedRecord:
    """Train on simulated clients, and write model, record and report to a folder.

    >>> run(Experiment(data="fashion-mnist", rounds=2), Path("runs/federated/one")).final_accuracy  # doctest: +SKIP
    0.61

    Args:
        experiment: what to do.
        out: folder to make.
        overwrite: replace an existing one.
        restart: discard the rounds that an interrupted run has finished.
        report: called after every round.

    Raises:
        MoqaError: if data are missing, the model cannot be rounded, or no client can take part.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)  # progress is reported
    samples_of(experiment)
    with resumable(out, {"experiment": experiment.model_dump(mode="json")}, overwrite, restart) as work:
        record, arrays = _trained(experiment, work, report)
        save_file(state_of(arrays), work.result / MODEL)
        write_json(record, work.result / RECORD)
        (work.result / PAGE).write_text(render(record), encoding="utf-8")
    return record


def summarized(experiment: Experiment, rounds: list[RoundRecord]) -> FederatedRecord:
    """The record of finished rounds."""
    seconds, reached, above = 0.0, None, False
    for one in rounds:
        seconds += one.seconds
        was, above = above, experiment.target is not None and one.metrics["accuracy"] >= experiment.target
        if reached is None and was and above:
            reached = seconds
    final = float(np.mean([one.metrics["accuracy"] for one in rounds[-_LAST:]]))
    return FederatedRecord(
        experiment=experiment, rounds=rounds, final_accuracy=final, seconds=seconds,
        seconds_to_target=reached, uplink_bytes=sum(one.uplink_bytes for one in rounds),
        downlink_bytes=sum(one.downlink_bytes for one in rounds),
        allocator_seconds=sum(one.allocator_seconds for one in rounds),
    )  # fmt: skip


def strategy_of(experiment: Experiment) -> FedHQ:
    """The strategy of an experiment, on its simulated clock."""
    return FedHQ(
        experiment.bits, allocation=experiment.allocation, round_seconds=experiment.round_seconds,
        round_bytes=experiment.round_bytes, download_bits=experiment.download_bits, keep=experiment.keep,
        trim=experiment.trim, epsilon=experiment.epsilon, secure=experiment.secure,
        clock=clock_of(experiment), link=experiment.link, seed=experiment.seed,
        min_available_nodes=experiment.clients, fraction_evaluate=0.0,
    )  # fmt: skip


def _trained(experiment: Experiment, work: ResumableRun, report: Report) -> tuple[FederatedRecord, ArrayRecord]:
    strategy, arrays = strategy_of(experiment), record_of(model_of(experiment).state_dict())
    last, found = -1, dict[str, Tensor]()
    while (state := work.done(f"round-{last + 1}")) is not None:
        last += 1
        strategy.restore(state)
    if last >= 0:
        found = work.load(f"state-{last}")
        arrays = record_of({name.removeprefix("model."): found[name] for name in found if name.startswith("model.")})
    report("federated", last + 1, experiment.rounds + 1)

    def train(grid: Grid) -> None:
        nonlocal arrays

        def finished(one: RoundRecord, now: ArrayRecord) -> bool:
            nonlocal arrays
            arrays = now
            tensors = {f"model.{name}": tensor for name, tensor in state_of(now).items()}
            if isinstance(grid, LocalGrid):
                tensors |= grid.residuals()
            work.save(f"state-{one.round}", tensors)
            work.mark_done(f"round-{one.round}", strategy.state())
            work.remove(f"state-{one.round - 1}")
            report("federated", one.round + 1, experiment.rounds + 1, accuracy=one.metrics["accuracy"])
            return False

        strategy.start(
            grid, arrays, experiment.rounds, evaluate_fn=lambda _, now: evaluated(experiment, now), on_round=finished
        )

    if experiment.engine == "local":
        grid = LocalGrid(app_of(experiment), experiment.clients)
        grid.restore({name: tensor for name, tensor in found.items() if not name.startswith("model.")})
        train(grid)
    else:
        on_ray(experiment, train)
    return summarized(experiment, strategy.rounds), arrays


def on_ray(experiment: Experiment, train: Callable[[Grid], None]) -> None:
    """Run clients in Flower's simulation: processes of Ray, one at a time for each core.

    Raises:
        MoqaError: if Ray is missing, or a client app cannot be run.
    """
    from flwr.simulation import run_simulation

    app, failed = ServerApp(), list[BaseException]()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        try:
            train(grid)
        except BaseException as error:  # Flower would print it and raise another
            failed.append(error)
            raise

    try:
        run_simulation(
            app, app_of(experiment), experiment.clients,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )  # fmt: skip
    except Exception as error:
        raise failed[0] if failed else MoqaError("Flower's simulation failed", str(error)) from None
