"""Units whose width the user chose, by patterns of their names."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from moqa.errors import MoqaError
from moqa.format.tiles import KEEP_WIDTH
from moqa.planning.ties import Group
from moqa.profiling import Profile


def fixed_widths(profile: Profile, groups: Sequence[Group], patterns: Mapping[str, int]) -> dict[int, int]:
    """Index of each group whose width was chosen -> its width.

    >>> from moqa.planning.ties import tie_groups
    >>> fixed_widths(profile, tie_groups(profile.record.units, "layer"), {"*.layers.0.*": 16})
    {0: 16, 1: 16}

    Args:
        profile: of the model.
        groups: units that share a width.
        patterns: pattern of unit names -> width; the last one that matches a unit counts.

    Raises:
        MoqaError: if a pattern matches no unit, or only some of the units that share a width, or a width was not
            measured.
    """
    widths: dict[str, int] = {}
    for pattern, width in patterns.items():
        typed = f"--ignore {pattern}" if width == KEEP_WIDTH else f"--set {pattern}={width}"
        known = (*profile.record.widths, KEEP_WIDTH)
        if width not in known:
            raise MoqaError(f"{typed} cannot be planned", f"this profile has {', '.join(map(str, known))}")
        matched = [unit.name for unit in profile.record.units if fnmatchcase(unit.name, pattern)]
        if not matched:
            raise MoqaError(f"{typed} matches no unit", f"they have names like {profile.record.units[0].name}")
        widths |= dict.fromkeys(matched, width)
    fixed: dict[int, int] = {}
    for index, group in enumerate(groups):
        found: dict[str, int | None] = {unit.name: widths.get(unit.name) for unit in group.units}
        if len(set(found.values())) > 1:
            one = next(name for name in found if found[name] is not None)
            other = next(name for name in found if found[name] != found[one])
            raise MoqaError(
                f"--ignore and --set give {one} {found[one]} bits, but not {other}",
                "--ties makes them share a width: let the patterns match both, or plan with --ties unit",
            )
        if (shared := found[group.units[0].name]) is not None:
            fixed[index] = shared
    return fixed
