"""Pieces of layers that are quantized independently, in this process or in another."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from moqa.calibration.inputs import BlockInputs, CalibrationBatch, InputStatistics, by_input, input_space
from moqa.calibration.outputs import Gradients, OutputGradients
from moqa.calibration.stacks import stacks
from moqa.execution import Executor, Workspace
from moqa.format.nested import StoredLayer
from moqa.format.scheme import Scheme
from moqa.methods import Method
from moqa.models.units import Unit
from moqa.progress import Report
from moqa.quantization.layer import QuantizedUnit, solve
from moqa.quantization.samples import CalibrationSamples

Item = TypeVar("Item")


@dataclass(frozen=True)
class BlockPiece:
    """Some units of a layer.

    Attributes:
        layer: index of the layer.
        method: how they are quantized.
        schemes: unit name -> scheme, of these units.
        experts: whose units are among them.
        parts: batches of the samples; the recorded inputs of the experts are in the work folder.
        linear: inputs of the units that do not belong to experts.
        gradients: at the layer's output, if they are known.
        wide: of a nested width: the units at the widest one, in the result of the work folder.
    """

    layer: int
    method: Method
    schemes: Mapping[str, Scheme]
    experts: tuple[int, ...] = ()
    parts: tuple[CalibrationBatch, ...] = ()
    linear: Mapping[str, InputStatistics] = field(default_factory=dict)
    gradients: Gradients | None = None
    wide: StoredLayer | None = None


@dataclass(frozen=True)
class BlockWork:
    """What a run does to every block.

    Attributes:
        workspace: the model and the work folder.
        schemes: unit name -> scheme.
        method: how units are quantized.
        executor: that does the work.
        together: largest number of experts in a piece.
        report: called with what is being waited for.
        wide: of a nested width: for the index of a layer, its units at the widest one.
    """

    workspace: Workspace
    schemes: Mapping[str, Scheme]
    method: Method
    executor: Executor
    together: int
    report: Report
    wide: Callable[[int], StoredLayer] | None = None


def quantized_layers(
    work: BlockWork, flow: CalibrationSamples | None, layers: Sequence[int]
) -> Generator[dict[str, QuantizedUnit], None, None]:
    """Unit name -> result, for one layer after the other.

    Args:
        work: what is done.
        flow: samples, moved past each layer before the next is requested; None for a method that needs none.
        layers: indices, ascending.
    """
    if flow is None:
        # layers do not depend on each other: an executor may work ahead
        pieces = [cut(work, layer, None) for layer in layers]
        with closing(
            work.executor.map(quantize_piece, work.workspace, (one for some in pieces for one in some))
        ) as results:
            for some in pieces:
                yield _collected(work, some, results)
        return
    for layer in layers:
        units = work.workspace.view.block_units(layer)
        # what keeps its precision needs no inputs
        kept = all(work.schemes[unit.name].is_unquantized for unit in units)
        inputs = None if kept else flow.inputs(layer)
        pieces_of_layer = cut(work, layer, inputs, flow.gradients(layer))
        with closing(work.executor.map(quantize_piece, work.workspace, pieces_of_layer)) as results:
            done = _collected(work, pieces_of_layer, results)
        if inputs is not None:
            inputs.drop()
        yield done


def cut(
    work: BlockWork, layer: int, inputs: BlockInputs | None, gradients: Gradients | None = None
) -> list[BlockPiece]:
    """A layer in pieces, so that all workers are busy; in a single piece if the method needs no samples.

    Args:
        work: what is done.
        layer: index of the layer.
        inputs: of the layer; None for a method that needs none, for which layers are independent.
        gradients: at its output, if they are known.
    """
    schemes, method, workers = work.schemes, work.method, work.executor.workers
    units = work.workspace.view.block_units(layer)
    wide = work.wide and work.wide(layer)
    if inputs is None:
        experts = tuple(sorted({unit.expert for unit in units if unit.expert is not None}))
        return [BlockPiece(layer, method, {unit.name: schemes[unit.name] for unit in units}, experts, wide=wide)]
    routed: dict[int, dict[str, Scheme]] = {}
    for unit in units:
        if unit.expert is not None:
            routed.setdefault(unit.expert, {})[unit.name] = schemes[unit.name]
    pieces = []
    for some in _slices(sorted(routed), work.together, workers):
        mine = {name: scheme for expert in some for name, scheme in routed[expert].items()}
        pieces.append(BlockPiece(layer, method, mine, tuple(some), inputs.parts, gradients=gradients, wide=wide))
    dense = list(by_input(unit for unit in units if unit.expert is None).items())
    for spaces in _slices(dense, len(dense), workers):
        mine = {unit.name: schemes[unit.name] for _, sharing in spaces for unit in sharing}
        seen = {space: inputs.linear[space] for space, _ in spaces if space in inputs.linear}
        pieces.append(BlockPiece(layer, method, mine, linear=seen, gradients=gradients, wide=wide))
    return pieces


@torch.no_grad()
def quantize_piece(workspace: Workspace, piece: BlockPiece) -> dict[str, QuantizedUnit]:
    """Unit name -> result, for all units of a piece.

    >>> from moqa.methods import METHODS
    >>> piece = BlockPiece(0, METHODS["rtn"], {"model.layers.0.self_attn.q_proj": Scheme(width=4)})
    >>> list(quantize_piece(workspace, piece))
    ['model.layers.0.self_attn.q_proj']
    """
    view, schemes, method = workspace.view, piece.schemes, piece.method
    inputs = dict(piece.linear)
    gradients = None if piece.gradients is None else OutputGradients(view, piece.layer, piece.gradients)
    if piece.parts:
        recorded = BlockInputs.recorded(
            view, piece.layer, piece.parts, workspace.work, with_slopes=gradients is not None,
            affinity=method.affinity,
        )  # fmt: skip
        inputs = recorded.experts(piece.experts)
    done, narrow = {}, list[Unit]()
    for unit in (unit for unit in view.block_units(piece.layer) if unit.name in schemes):
        scheme = schemes[unit.name]
        if scheme.is_unquantized:
            weights = view.weight(unit).to(torch.bfloat16).contiguous()
            done[unit.name] = QuantizedUnit({"weight": weights}, "none", None)
        elif method.store is not None and piece.wide is None:
            done[unit.name] = QuantizedUnit(method.store(view.weight(unit), scheme), method.name, None)
        else:
            narrow.append(unit)
    left = Counter(map(input_space, narrow))
    near = None if piece.wide is None else piece.wide.values(workspace.work.result)
    # next to wide values, each weight has a scale and an offset of its own
    for stack in stacks(view, narrow, schemes, inputs, copies=1 if near is None else 4):
        done |= solve(stack, schemes, method, gradients, near)
        # the inputs of a stack take more memory than the stack
        for sharing in stack.entries:
            space = input_space(sharing[0])
            left[space] -= len(sharing)
            if not left[space]:
                inputs.pop(space, None)
    return done


def _collected(
    work: BlockWork, pieces: Sequence[BlockPiece], results: Iterator[dict[str, QuantizedUnit]]
) -> dict[str, QuantizedUnit]:
    done: dict[str, QuantizedUnit] = {}
    depth = len(work.workspace.view.blocks)
    for piece in pieces:
        if piece.experts:
            errors = [result.error for result in done.values() if result.error is not None]
            # mean relative output error so far
            error = sum(errors) / max(len(errors), 1)
            work.report("quantize", piece.layer, depth, layer=piece.layer, expert=piece.experts[0], error=error)
        done |= next(results)
    return done


def _slices(items: Sequence[Item], together: int, workers: int) -> Iterator[Sequence[Item]]:
    size = max(1, min(together, -(-len(items) // workers)))
    return (items[begin : begin + size] for begin in range(0, len(items), size))
