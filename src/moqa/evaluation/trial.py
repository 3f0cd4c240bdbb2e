"""A timed trial of comparing a quantized layer with the original."""

import numpy as np
import torch
from torch import Tensor

from moqa.calibration.hidden import HiddenStates
from moqa.data import Windows
from moqa.data.images import ImageSamples
from moqa.evaluation.measure import quality
from moqa.forecast.rates import TokenCost
from moqa.forecast.trial import Stopwatch, states_in_front
from moqa.kernels import find_kernels
from moqa.models.building import empty_model
from moqa.models.layerwise import LayerwiseModel
from moqa.models.load import read_config
from moqa.models.view import ModelView
from moqa.quantization.layer import quantized
from moqa.quantization.trial import TrialLayer
from moqa.runtime.packed import unpacked
from moqa.storage.in_memory import InMemoryRun
from moqa.tasks import Samples


@torch.no_grad()
def try_comparison(tried: TrialLayer, hidden: Tensor, whole: bool) -> None:
    """Time a layer and its quantized version.

    Args:
        tried: the layer, already quantized; gets its rates.
        hidden: one batch of samples as inputs of the layer.
        whole: whether the whole original is in memory.
    """
    workspace, layer, tokens = tried.workspace, tried.layer, len(hidden) * tried.predictions
    with workspace.view.held([layer] if whole else []):
        workspace.view.need(layer)
        original = tried.watch.seconds(lambda: workspace.stages.run_block(layer, hidden))
    with quantized(workspace.view, layer, tried.done, tried.stored, find_kernels("reference")):
        unpacking = tried.watch.seconds(lambda: _unpack(workspace.view, layer))
        with unpacked(workspace.view.blocks[layer]):
            packed = tried.watch.seconds(lambda: workspace.stages.run_block(layer, hidden))
    tried.rates.original = TokenCost(0.0, original / tokens)
    tried.rates.packed = TokenCost(unpacking, packed / tokens)


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
