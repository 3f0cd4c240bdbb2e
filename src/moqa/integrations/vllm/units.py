"""Which units of a checkpoint a layer of vLLM computes with: names differ, places in decoder layers do not."""

import re
from collections.abc import Mapping, Sequence

from moqa.errors import MoqaError
from moqa.format.manifest import Manifest, StoredUnit

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PLACE = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


def place_of(name: str) -> tuple[int, str] | None:
    """Decoder layer of a module, and its name in there; None for what is in no layer.

    >>> place_of("model.layers.3.self_attn.q_proj"), place_of("lm_head")
    ((3, 'self_attn.q_proj'), None)
    """
    found = _PLACE.search(name)
    return None if found is None else (int(found[1]), found[2])


class UnitNames:
    """Finds the units of a checkpoint by the names of vLLM's layers, and remembers which ones were found.

    Args:
        manifest: of the checkpoint.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._units: dict[str, StoredUnit] = manifest.units
        self._at = {place_of(name): name for name in manifest.units}
        self._kept = {place_of(name) for name in manifest.kept}
        self._found: set[str] = set()

    def linear(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str] | None:
        """Units whose outputs a linear layer returns side by side; None if the checkpoint keeps its weight as it is.

        Args:
            prefix: the layer's name.
            packed: end of a name -> ends of the names of the layers that it unites.

        Raises:
            MoqaError: if the checkpoint has no such units.
        """
        place = place_of(prefix)
        if place is None:
            return None
        layer, tail = place
        head, _, last = tail.rpartition(".")
        ends = packed.get(last, (last,)) if (layer, tail) not in self._at else (last,)
        wanted = [(layer, f"{head}.{end}" if head else end) for end in ends]
        if all((layer, f"{tail}.weight") in self._kept for layer, tail in wanted):
            return None
        for layer, tail in wanted:
            if (layer, tail) not in self._at:
                raise MoqaError(f"vLLM's layer {prefix} needs {tail} of layer {layer}", "the checkpoint lacks it")
        found = [self._at[one] for one in wanted]
        self._found |= set(found)
        return found

    def experts(self, prefix: str, count: int) -> dict[str, list[str]]:
        """By projection, the units of all routed experts of a layer.

        Args:
            prefix: the layer's name.
            count: experts that it has.

        Raises:
            MoqaError: if the checkpoint has others.
        """
        place = place_of(prefix)
        layer = -1 if place is None else place[0]
        names = {name for name, unit in self._units.items() if unit.layer == layer and unit.role == "expert"}
        heads = {name.rsplit(".", 2)[0] for name in names}
        head = next(iter(heads), prefix)
        found = {part: [f"{head}.{expert}.{part}" for expert in range(count)] for part in PROJECTIONS}
        wanted = {name for part in found.values() for name in part}
        if wanted != names:
            different = min(wanted ^ names)
            has = "lacks" if different in wanted else "has"
            raise MoqaError(f"vLLM's layer {prefix} has {count} experts", f"the checkpoint {has} {different}")
        self._found |= names
        return found

    def check_all_found(self, whole: bool) -> None:
        """Refuse to leave out units that no layer of vLLM asked for.

        Args:
            whole: whether this process has all decoder layers; else only those are compared of which it has a part.

        Raises:
            MoqaError: naming a unit.
        """
        layers = {self._units[name].layer for name in self._found}
        for name, unit in self._units.items():
            if name not in self._found and (whole or unit.layer in layers):
                raise MoqaError(f"vLLM has no layer for {name}", "moqa does not serve this family with vLLM")
