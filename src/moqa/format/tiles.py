"""Sizes that every file of the format shares: tiles, planes and widths."""

from moqa.errors import MoqaError

# Kernels work on tiles of 16 rows by 32 inputs: a plane of p bits stores a tile in p vectors of 64 bytes.
TILE = 16
BLOCK = 32
# not quantized: 16-bit floating point
KEEP_WIDTH = 16
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
# sums of 8-bit products over a larger group would not fit in 32 bits
LARGEST_GROUP = 2**16


def check_group_size(size: int, option: str = "--group-size") -> None:
    """Refuse a number of weights that no group has; `option` is where the user typed it.

    >>> check_group_size(48)
    Traceback (most recent call last):
    moqa.errors.MoqaError: --group-size 48 does not exist: there are 32, 64, 96, 128 and so on up to 65536

    Raises:
        MoqaError: if it is no multiple of a block, or too large.
    """
    if size < BLOCK or size > LARGEST_GROUP or size % BLOCK:
        sizes = ", ".join(str(count * BLOCK) for count in range(1, 5))
        raise MoqaError(f"{option} {size} does not exist", f"there are {sizes} and so on up to {LARGEST_GROUP}")


# Most significant plane first, so that dropping planes from the end leaves a coarser version of the same weights.
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (4, 4),
}
