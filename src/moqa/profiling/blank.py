"""A profile without measurements, to compute the size of a plan before there is a real profile."""

from collections.abc import Sequence
from pathlib import Path

import torch

from moqa import __version__
from moqa.calibration.outputs import SKETCHED, adds_to_output
from moqa.format.tiles import WIDTHS
from moqa.models.view import ModelView
from moqa.profiling.record import SELF, DistributionRecord, ProfileRecord, Settings, UnitRecord
from moqa.profiling.sensitivity import other_schemes
from moqa.profiling.significance import LayerStatistics
from moqa.profiling.store import Profile


def blank_profile(view: ModelView, model: str, names: Sequence[str], settings: Settings, own: int) -> Profile:
    """A profile in which all weights matter equally.

    A plan from it is as large as one from a real profile: exactly so if widths are uniform, else within the same
    budget.

    Args:
        view: the model; its units are not read.
        model: as the user typed it.
        names: of the distributions.
        settings: of the profile that will be made.
        own: number of windows that the model will write itself.
    """
    units = list(view.units.values())
    widths = tuple(w for w in WIDTHS if not (settings.symmetric and w == 1))
    rounding = torch.tensor([4.0**-width for width in widths]).expand(len(units), -1).contiguous()
    sensitivity = rounding * torch.tensor([float(unit.weights) for unit in units])[:, None]
    windows = dict.fromkeys(names, settings.samples) | ({SELF: own} if own else {})
    others = other_schemes(settings) if settings.sensitivity else ()
    statistics, records = {}, {}
    # also what strategies would measure themselves
    weights = {"rounding": rounding, "outliers": torch.ones(len(units)), "spectrum": torch.ones(len(units), 2)}
    if others:
        # a code of levels leaves less error than a grid, a large group more than a small one
        ratio = [(0.6 if s.encoding == "trellis" else 1.0) * s.group_size**0.1 for s in others]
        weights["compared"] = torch.tensor(ratio).expand(len(units), -1).contiguous()
    for name, count in windows.items():
        tables = {"sensitivity": sensitivity, "samples": torch.zeros(count, settings.context, dtype=torch.int32)}
        tables |= {"divergence": sensitivity, "similarity": torch.ones(len(view.blocks), 2)}
        for layer in range(len(view.blocks)):
            down = [u for u in view.block_units(layer) if u.role == "expert" and u.projection == "down_proj"]
            if down:
                weights[f"layer.{layer}.similarity"] = torch.eye(len(down))
                sums = LayerStatistics(torch.ones(len(down), down[0].shape[1])).sums
                tables |= {f"layer.{layer}.{key}": torch.ones_like(value) for key, value in sums.items()}
            if settings.sensitivity and any(adds_to_output(unit, view.stream) for unit in view.block_units(layer)):
                # views of one number: nothing is measured, but solving takes as long as with what will be
                rows, one = (min(view.stream, SKETCHED), view.stream), torch.ones(1, dtype=torch.bfloat16)
                tables[f"layer.{layer}.gradient_rows"] = torch.zeros_like(one).expand(rows)
                tables[f"layer.{layer}.gradient_rest"] = one.expand(view.stream)
        statistics[name] = tables
        records[name] = DistributionRecord(
            origin="not read", samples=count, tokens=count * settings.context, fitted=None
        )
    record = ProfileRecord(
        moqa=__version__, task=view.task.name, model=model, model_type=view.model.config.model_type,
        fingerprint="",
        kept={name: (str(dtype).removeprefix("torch."), shape) for name, (dtype, shape) in view.kept_entries().items()},
        layers=len(view.blocks), top_k=view.top_k, settings=settings, widths=widths, others=others,
        units=tuple(UnitRecord.of(unit) for unit in units), distributions=records,
    )  # fmt: skip
    return Profile(record, Path(), statistics, weights)
