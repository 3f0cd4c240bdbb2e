"""The client: `moqa` names the five lines that FedHQ needs."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits.task import Net, load_data, train
from moqa.federated import local, measured, mod

app = ClientApp(mods=[mod])


def of(message: Message, context: Context):
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model, load_data(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))


@app.train()
def fit(message: Message, context: Context) -> Message:
    model, loader = of(message, context)
    with local(model, message, probe=next(iter(loader))):
        train(model, loader, float(context.run_config["learning-rate"]))
    metrics = MetricRecord({"num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.query("moqa")
def measure(message: Message, context: Context) -> Message:
    return measured(message, *of(message, context))
