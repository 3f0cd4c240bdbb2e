"""What work has on the disk at its fullest moment."""

from collections.abc import Mapping

from moqa.format.scheme import Scheme
from moqa.models.view import ModelView


def profile_disk_bytes(view: ModelView, tokens: int, distributions: int) -> int:
    """Bytes on the disk at the fullest moment: hidden states of all layers, gradients, and what is measured.

    >>> profile_disk_bytes(view, tokens=32768, distributions=2)
    288358400

    Args:
        view: the original model.
        tokens: of all samples.
        distributions: how many are measured.
    """
    hidden = 4 * tokens * view.stream
    measured = similar = 0
    for layer in range(len(view.blocks)):
        down = [unit for unit in view.block_units(layer) if unit.role == "expert" and unit.projection == "down_proj"]
        # of each expert its channels, and of every two how often they are chosen together and how alike they are
        measured += 4 * sum(unit.shape[1] for unit in down) + 4 * len(down) ** 2
        similar += 4 * len(down) ** 2
    measured = measured * distributions + similar
    # behind the last layer there are the hidden states too; half of the windows have gradients, before and behind a
    # layer, and what its experts are called with is there of the other half
    return max(hidden * len(view.blocks) + 5 * hidden // 2 + measured, 2 * (hidden + measured))


def quantization_disk_bytes(view: ModelView, checkpoint: int, tokens: int, cached: float) -> int:
    """Bytes of a run of `moqa.quantize`: checkpoint, cache and what is put aside.

    >>> quantization_disk_bytes(view, checkpoint=12_922_880, tokens=16384, cached=0.0)
    63254528

    Args:
        view: the original model.
        checkpoint: bytes of its weight files.
        tokens: of samples; 0 for a method that needs none.
        cached: share of the original's weights that is kept beside the checkpoint.
    """
    kept = round(sum(view.stored_bytes(unit) for unit in view.units.values()) * cached)
    # hidden states before and behind a layer, and what its experts are called with
    put_aside = 3 * tokens * view.stream * 4
    return checkpoint + kept + put_aside


def largest_block_bytes(view: ModelView, schemes: Mapping[str, Scheme]) -> int:
    """Bytes of the largest decoder layer as a plan stores it.

    >>> largest_block_bytes(view, plan.units)
    2097152
    """
    found = [0] * len(view.blocks)
    for unit in view.units.values():
        found[unit.layer] += schemes[unit.name].stored_bytes(unit.shape)
    return max(found)
