"""A timed trial of comparing a quantized layer with the original."""

import numpy as np
import torch
from torch import Tensor

from moqa.calibration.hidden import HiddenStates
from moqa.data import Windows
from moqa.data.images import ImageSamples
from moqa.evaluation.measure import quality
from moqa.forecast.rates import ComparisonRates, TokenCost
from moqa.forecast.samples import states_in_front
from moqa.forecast.stopwatch import Stopwatch
from moqa.kernels import find_kernels
from moqa.models.building import empty_model
from moqa.models.layerwise import LayerwiseModel
from moqa.models.load import read_config
from moqa.models.view import ModelView
from moqa.quantization.layer import quantized
from moqa.quantization.trial import TrialLayer, TrialResult
from moqa.runtime.packed import unpacked
from moqa.storage.in_memory import InMemoryRun
from moqa.tasks import Samples


@torch.no_grad()
def try_comparison(
    tried: TrialLayer, result: TrialResult, hidden: Tensor, whole: bool, watch: Stopwatch
) -> ComparisonRates:
    """Rates of a layer.

    Args:
        tried: the layer.
        result: of quantizing it.
        hidden: one batch of samples as inputs of the layer.
        whole: whether the whole original is in memory.
        watch: times the work.
    """
    workspace, layer, tokens = tried.workspace, tried.layer, len(hidden) * tried.predictions
    with workspace.view.held([layer] if whole else []):
        workspace.view.need(layer)
        original = watch.seconds(lambda: workspace.stages.run_block(layer, hidden))
    reference = find_kernels("reference")
    with quantized(workspace.view, layer, result.done, result.schemes, reference):
        unpacking = watch.seconds(lambda: _unpack(workspace.view, layer))
        with unpacked(workspace.view.blocks[layer]):
            packed = watch.seconds(lambda: workspace.stages.run_block(layer, hidden))
    return ComparisonRates(TokenCost(0.0, original / tokens), TokenCost(unpacking, packed / tokens))


@torch.no_grad()
def try_scoring(stages: LayerwiseModel, inputs: Tensor, watch: Stopwatch) -> TokenCost:
    """Cost of comparing predictions, from a batch of inputs."""
    hashes, task = np.zeros(0, np.uint64), stages.task
    if inputs.is_floating_point():
        samples: Samples = ImageSamples("trial", inputs, torch.zeros(len(inputs), dtype=torch.long), hashes)
    else:
        samples = Windows("trial", inputs, inputs.numel(), hashes)
    hidden, other = HiddenStates(stages, InMemoryRun(), "trial", [inputs]), LayerwiseModel(stages.model)
    hidden.put(stages.depth, 0, states_in_front(stages, inputs, (stages.depth,))[stages.depth])
    return TokenCost(0.0, watch.seconds(lambda: quality(samples, hidden, stages, hidden, other)) / task.count(inputs))


def try_opening(view: ModelView, watch: Stopwatch) -> float:
    """Seconds to open a checkpoint: an empty model, and its tokenizer or image processor."""
    folder = view.folder
    assert folder is not None
    return watch.seconds(lambda: (empty_model(read_config(folder), torch.float32), view.task.reader(folder)))


def _unpack(view: ModelView, layer: int) -> None:
    with unpacked(view.blocks[layer]):
        pass
