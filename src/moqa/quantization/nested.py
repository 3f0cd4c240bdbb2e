"""What `--widths-nested` asks for: one checkpoint that can be used at several widths."""

from collections.abc import Sequence

from moqa.errors import MoqaError
from moqa.format.layout import Shard
from moqa.format.nested import nested_shards
from moqa.format.scheme import DEFAULT_ENCODING
from moqa.format.tiles import WIDTHS
from moqa.models.view import ModelView
from moqa.planning import Plan
from moqa.quantization.checkpoint import units_of


def check_widths(widths: Sequence[int]) -> str:
    """Refuse widths that no nested checkpoint has.

    >>> check_widths((2, 2))
    Traceback (most recent call last):
    moqa.errors.MoqaError: --widths-nested 2,2 names 2 twice: give each width once, such as 2,3,4,8

    Returns:
        The widths as they are typed.

    Raises:
        MoqaError: if one does not exist or is there twice, or there is only one.
    """
    typed = f"--widths-nested {','.join(map(str, widths))}"
    outside = [width for width in widths if width not in WIDTHS]
    if outside:
        raise MoqaError(f"{typed} has no width {outside[0]}", f"widths are {WIDTHS[0]} to {WIDTHS[-1]}")
    twice = [width for width in widths if widths.count(width) > 1]
    if twice:
        raise MoqaError(f"{typed} names {twice[0]} twice", "give each width once, such as 2,3,4,8")
    if len(widths) < 2:
        raise MoqaError(f"{typed} is a single width", "give two or more, such as 2,3,4,8")
    return typed


def narrower_widths(widths: Sequence[int], plan: Plan) -> list[int]:
    """The nested widths below that of a uniform plan, ascending; none if `widths` is empty.

    >>> from moqa.planning import plan
    >>> narrower_widths((8, 2, 4), plan(profile, strategy="uniform", widths=(8,), encodings=("int",)))
    [2, 4]

    Args:
        widths: all widths of the checkpoint; the largest is the plan's.
        plan: scheme of every unit.

    Raises:
        MoqaError: if they are none, or the plan cannot hold them.
    """
    if not widths:
        return []
    typed, (*narrower, widest) = check_widths(widths), sorted(widths)
    for name, scheme in plan.units.items():
        if scheme.is_unquantized:
            continue
        if scheme.encoding != DEFAULT_ENCODING:
            stored = f"the plan stores {name} as {scheme.encoding}"
            raise MoqaError(f"{typed} needs integers, {stored}", "plan with --encodings int")
        if scheme.width != widest:
            raise MoqaError(
                f"{typed} needs {widest} bits for all units, the plan gives {name} {scheme.width}",
                f"plan with --strategy uniform --widths {widest}",
            )
        if scheme.symmetric and 1 in narrower:
            raise MoqaError(f"{typed} cannot have 1 bit on symmetric grids", "leave out 1, or --symmetric")
    return narrower


def shards_of_narrower(view: ModelView, plan: Plan, narrower: Sequence[int]) -> dict[int, list[Shard]]:
    """Files of each narrower width, one for each layer.

    >>> {width: len(shards) for width, shards in shards_of_narrower(view, plan, [2, 4]).items()}
    {2: 6, 4: 6}
    """
    units = units_of(view, plan)
    return {width: nested_shards(width, len(view.blocks), units) for width in narrower}
