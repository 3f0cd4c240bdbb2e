"""What a run of `moqa.profile` has on the disk."""

from moqa.models.view import ModelView


def disk_bytes(view: ModelView, tokens: int, distributions: int) -> int:
    """Bytes on the disk at the fullest moment: hidden states of all layers, gradients, and what is measured.

    >>> disk_bytes(view, tokens=32768, distributions=2)
    288358400

    Args:
        view: the original model.
        tokens: of all samples.
        distributions: how many are measured.
    """
    hidden = 4 * tokens * view.stream
    measured = similar = 0
    for layer in range(len(view.layers)):
        down = [unit for unit in view.layer_units(layer) if unit.role == "expert" and unit.projection == "down_proj"]
        # of each expert its channels, and of every two how often they are chosen together and how alike they are
        measured += 4 * sum(unit.shape[1] for unit in down) + 4 * len(down) ** 2
        similar += 4 * len(down) ** 2
    measured = measured * distributions + similar
    # behind the last layer there are the hidden states too; half of the windows have gradients, before and behind a
    # layer, and what its experts are called with is there of the other half
    return max(hidden * len(view.layers) + 5 * hidden // 2 + measured, 2 * (hidden + measured))
