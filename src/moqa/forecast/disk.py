"""The most disk space that work needs at any time."""

from collections.abc import Mapping

from moqa.format.scheme import Scheme
from moqa.models.view import ModelView


def profile_disk_bytes(view: ModelView, tokens: int, distributions: int) -> int:
    """Most bytes that `moqa.profile` has on the disk: hidden states of all blocks, gradients and statistics.

    >>> profile_disk_bytes(view, tokens=32768, distributions=2)
    268650496

    Args:
        view: the original model.
        tokens: of all samples.
        distributions: number of distributions.
    """
    hidden = 4 * tokens * view.stream
    measured = similar = 0
    for layer in range(len(view.blocks)):
        down = [unit for unit in view.block_units(layer) if unit.role == "expert" and unit.projection == "down_proj"]
        # the channels of each expert, and for every two experts their coactivation and their similarity
        measured += 4 * sum(unit.shape[1] for unit in down) + 4 * len(down) ** 2
        similar += 4 * len(down) ** 2
    measured = measured * distributions + similar
    # there are also hidden states after the last block; a quarter of the windows have gradients at the input and output
    # of a block, and half of them the calls of its experts
    return max(hidden * len(view.blocks) + 2 * hidden + measured, 2 * (hidden + measured))


def quantization_disk_bytes(view: ModelView, checkpoint: int, tokens: int, cached: float) -> int:
    """Most bytes that `moqa.quantize` has on the disk: checkpoint, cache and hidden states.

    >>> quantization_disk_bytes(view, checkpoint=12_922_880, tokens=16384, cached=0.0)
    63254528

    Args:
        view: the original model.
        checkpoint: bytes of its weight files.
        tokens: of all samples; 0 for a method that needs none.
        cached: share of the original's weights that is kept next to the checkpoint.
    """
    kept = round(sum(view.stored_bytes(unit) for unit in view.units.values()) * cached)
    # hidden states at the input and output of a block, and the calls of its experts
    states = 3 * tokens * view.stream * 4
    return checkpoint + kept + states


def largest_block_bytes(view: ModelView, schemes: Mapping[str, Scheme]) -> int:
    """Bytes of the largest block as a plan stores it.

    >>> largest_block_bytes(view, dict.fromkeys(view.units, Scheme(width=4)))
    1827840
    """
    sizes = [0] * len(view.blocks)
    for unit in view.units.values():
        sizes[unit.layer] += schemes[unit.name].stored_bytes(unit.shape)
    return max(sizes)
