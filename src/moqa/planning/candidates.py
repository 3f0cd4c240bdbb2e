"""Candidates: the schemes that a plan may choose from, and the smallest widths of some roles."""

from collections.abc import Mapping, Sequence

from moqa.errors import MoqaError
from moqa.format.encodings import ENCODINGS
from moqa.format.scheme import DEFAULT_ENCODING, Scheme
from moqa.format.tiles import KEEP_WIDTH, WIDTHS, check_group_size
from moqa.models.units import ROLES

_LARGE = (2**12, 2**12)


def candidates(
    widths: Sequence[int], encodings: Sequence[str], groups: Sequence[int], symmetric: bool, mixed: bool
) -> tuple[Scheme, ...]:
    """Schemes with some widths, by rising bytes.

    >>> [scheme.width for scheme in candidates((3, 2), ("int",), (64,), symmetric=False, mixed=True)]
    [2, 3]

    Args:
        widths: 1 to 8, and 16 for no quantization.
        encodings: names, the preferred one first.
        groups: numbers of weights that share a scale, the preferred one first.
        symmetric: whether integers are on a grid without a zero-point.
        mixed: whether a width may occur in every encoding and group; else only in the first of each that there are.

    Raises:
        MoqaError: if a width is in none of the encodings.
    """
    found: list[Scheme] = []
    for width in sorted(set(widths)):
        having = [name for name in encodings if width in ENCODINGS[name].widths and _has(name, width, symmetric)]
        if width == KEEP_WIDTH:
            found.append(Scheme(width=width, group_size=groups[0], symmetric=symmetric))
        elif not having:
            there = {name: [w for w in ENCODINGS[name].widths if _has(name, w, symmetric)] for name in encodings}
            lists = "; ".join(f"{name} has {', '.join(map(str, some))}" for name, some in there.items())
            raise MoqaError(f"--encodings {','.join(encodings)} has no width {width}", lists)
        else:
            pairs = [(name, group) for name in having for group in groups]
            found += [
                Scheme(width=width, group_size=group, symmetric=symmetric and name == DEFAULT_ENCODING, encoding=name)
                for name, group in (dict.fromkeys(pairs) if mixed else pairs[:1])
            ]
    return tuple(sorted(found, key=lambda scheme: scheme.stored_bytes(_LARGE)))


def _has(encoding: str, width: int, symmetric: bool) -> bool:
    return width in WIDTHS and not (symmetric and encoding == DEFAULT_ENCODING and width == 1)


def check_encodings(names: Sequence[str], measured: Sequence[str]) -> tuple[str, ...]:
    """Encodings of a plan.

    >>> check_encodings(["int", "trellis"], measured=["int", "table", "trellis"])
    ('int', 'trellis')

    Raises:
        MoqaError: if one is unknown, or its errors were not measured.
    """
    bad = [name for name in names if name not in measured]
    if bad or not names:
        raise MoqaError(f"--encodings {','.join(names)} cannot be planned", f"this profile has {', '.join(measured)}")
    return tuple(dict.fromkeys(names))


def check_groups(sizes: Sequence[int], measured: Sequence[int]) -> tuple[int, ...]:
    """Group sizes of a plan.

    Raises:
        MoqaError: if one does not exist, or its errors were not measured.
    """
    for size in sizes:
        check_group_size(size, "--groups")
    bad = [size for size in sizes if size not in measured]
    if bad or not sizes:
        raise MoqaError(
            f"--groups {','.join(map(str, sizes))} cannot be planned",
            f"this profile has {', '.join(map(str, sorted(measured)))}",
        )
    return tuple(dict.fromkeys(sizes))


def smallest_widths(floors: Mapping[str, int] | None, usual: int, has_experts: bool) -> dict[str, int]:
    """Role -> smallest width.

    >>> smallest_widths(None, 4, has_experts=True)["attention"]
    4

    Args:
        floors: that the user gave; None means the usual ones.
        usual: smallest width of all units but experts, where there are experts; 0 for none.
        has_experts: whether the model has any.

    Raises:
        MoqaError: if a role or width is unknown.
    """
    if floors is None:
        return {role: usual for role in ROLES if role != "expert"} if has_experts and usual else {}
    for role, width in floors.items():
        if role not in ROLES:
            raise MoqaError(f"--floor {role}={width} names no role", f"there are {', '.join(ROLES)}")
        if width not in (*WIDTHS, KEEP_WIDTH):
            there = ", ".join(map(str, (*WIDTHS, KEEP_WIDTH)))
            raise MoqaError(f"--floor {role}={width} is no width", f"there are {there}")
    return dict(floors)
