"""The server: FedHQ in the place of FedAvg."""

import json
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from digits.task import Net, accuracy, load_data
from moqa.federated import FedHQ
from moqa.federated.modes import LocalMode, rounded

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedHQ(
        bits=3, fraction_evaluate=0.0, min_available_nodes=int(context.run_config["min-nodes"]),
        secure=bool(context.run_config["secure"]),
    )  # fmt: skip
    everything = load_data(0, 1)

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        model = Net()
        model.load_state_dict(arrays.to_torch_state_dict())
        with rounded(model, LocalMode("ptq", strategy.bits)):
            return MetricRecord({"accuracy": accuracy(model, everything)})

    def write(_: object, arrays: ArrayRecord) -> bool:
        if context.run_config["out"]:
            rounds = [one.model_dump(mode="json") for one in strategy.rounds]
            Path(str(context.run_config["out"])).write_text(json.dumps(rounds))
        return False

    strategy.start(
        grid=grid, initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]), evaluate_fn=evaluate,
        timeout=float(context.run_config["timeout"]), on_round=write,
        kept=Path(str(context.run_config["kept"])) if context.run_config["kept"] else None,
    )  # fmt: skip
