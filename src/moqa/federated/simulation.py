"""Simulated clients: their models, their machines, and the Flower app that they run."""

from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moqa.federated.client import local, measured, mod
from moqa.federated.clients import CONTEXT, samples_of
from moqa.federated.flower import (
    ArrayRecord,
    ClientApp,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from moqa.federated.measure import batch_loss, train_steps
from moqa.federated.modes import FULL, Kind, LocalMode, in_mode, rounded
from moqa.federated.order import ARRAYS, FACTS, METRICS, state_of
from moqa.federated.roofline import Machine, SimulatedClock, work_of
from moqa.federated.settings import Experiment
from moqa.training.optimizers import OPTIMIZERS

_CHANNELS = {"fashion-mnist": 1, "cifar10": 3}
_NOISE = 100.0  # of attackers, in units of the weights' own size


def model_of(experiment: Experiment) -> nn.Module:
    """The model that is trained: convolutions of three sizes and a linear layer, or a small Llama that reads bytes.

    >>> sum(weight.numel() for weight in model_of(Experiment(data="fashion-mnist")).parameters())
    33770
    """
    torch.manual_seed(experiment.seed)
    if experiment.data == "text":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
            )
        )  # fmt: skip
    widths, layers = (_CHANNELS[experiment.data], 16, 32, 64), list[nn.Module]()
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
        for _ in range(experiment.depth - 1):
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 10))


@lru_cache(maxsize=2)
def clock_of(experiment: Experiment) -> SimulatedClock:
    """Machines from the fastest to the slowest, in equal ratios and in random order, and the work of each mode."""
    ranks = np.random.default_rng((experiment.seed, 2)).permutation(experiment.clients) / (experiment.clients - 1)
    fastest = Machine(experiment.flops, experiment.bandwidth, experiment.link)
    machines = [fastest.slower(experiment.heterogeneity**rank) for rank in ranks.tolist()]
    batch = samples_of(experiment).test(experiment.batch)[0]
    modes: dict[Kind, LocalMode] = {"fp": LocalMode("fp", FULL), "qat": LocalMode("qat", experiment.bits)}
    work = {}
    for kind, mode in modes.items():
        model = model_of(experiment)
        with in_mode(model, mode, experiment.keep):
            step = partial(train_steps, model, [batch], batch_loss, optimizers_of(experiment, model))
            step()  # the first one makes the optimizer's state
            work[kind] = work_of(step, experiment.batch).times(experiment.epochs)
    if experiment.qat_cost is not None:
        work["qat"] = work["fp"].times(experiment.qat_cost)
    return SimulatedClock(machines, {**work, "ptq": work["fp"]})


def optimizers_of(experiment: Experiment, model: nn.Module) -> list[Optimizer]:
    """What a client trains with, anew in every round."""
    parameters = list(model.parameters())
    if experiment.optimizer is None:
        return [torch.optim.SGD(parameters, experiment.rate, experiment.momentum)]
    return OPTIMIZERS.find(experiment.optimizer).make(parameters, experiment.rate)


def attackers_of(experiment: Experiment) -> set[int]:
    """Numbers of the clients that send noise."""
    count = round(experiment.attackers * experiment.clients)
    return set(np.random.default_rng((experiment.seed, 3)).permutation(experiment.clients)[:count].tolist())


def app_of(experiment: Experiment) -> ClientApp:
    """The app that every client runs; it says what the clock says of its machine."""
    app = ClientApp(mods=[mod])

    def loaded(message: Message) -> nn.Module:
        model = model_of(experiment)
        model.load_state_dict(message.content.array_records[ARRAYS].to_torch_state_dict())
        return model

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, model = int(context.node_config["partition-id"]), loaded(message)
        number = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        probe = samples_of(experiment).of(client, experiment.batch)[0]
        with local(model, message, probe=probe):
            batches = [
                batch
                for epoch in range(experiment.epochs)
                for batch in samples_of(experiment).of(
                    client, experiment.batch, (experiment.seed, number, client, epoch)
                )
            ]
            count = train_steps(model, batches, batch_loss, optimizers_of(experiment, model))
        if client in attackers_of(experiment):
            noise = torch.Generator().manual_seed(1000 * number + client)
            for weight in model.parameters():
                weight.data += _NOISE * weight.data.std().nan_to_num(1.0) * torch.randn(weight.shape, generator=noise)
        metrics = MetricRecord({"num-examples": count})
        return Message(RecordDict({ARRAYS: ArrayRecord(model.state_dict()), METRICS: metrics}), reply_to=message)

    @app.query("moqa")
    def measure(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        reply = measured(message, loaded(message), samples_of(experiment).of(client, experiment.batch))
        clock = clock_of(experiment)
        for kind in ("fp", "ptq", "qat"):
            reply.content.metric_records[FACTS][f"seconds.{kind}"] = clock.per_sample(client, kind)
        return reply

    return app


@torch.no_grad()
def accuracy(model: nn.Module, experiment: Experiment, mode: LocalMode) -> float:
    """Share of held-out labels, or next bytes, that a model predicts when it is stored in a mode."""
    right = total = 0
    model.eval()
    with rounded(model, mode, experiment.keep):
        for batch in samples_of(experiment).test():
            guess, labels = _guess(model, batch)
            right, total = right + int((guess == labels).sum()), total + labels.numel()
    return right / total


def evaluated(experiment: Experiment, arrays: ArrayRecord) -> MetricRecord:
    """Accuracy of a model as it will be stored, and as it is."""
    model = model_of(experiment)
    model.load_state_dict(state_of(arrays))
    stored = LocalMode("fp", FULL) if experiment.allocation == "fp" else LocalMode("ptq", experiment.bits)
    exact = accuracy(model, experiment, LocalMode("fp", FULL))
    return MetricRecord({
        "accuracy": exact if stored.kind == "fp" else accuracy(model, experiment, stored), "accuracy-exact": exact
    })  # fmt: skip


def _guess(model: nn.Module, batch: dict[str, Tensor] | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        return model(**batch).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
    return model(batch[0]).argmax(-1), batch[1]
