"""Sensitivity: how much the model's output suffers when one unit loses precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqa.calibration.inputs import InputStatistics
from moqa.calibration.stacks import stacks
from moqa.format.encodings import ENCODINGS
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.methods import Method, SolveBatch
from moqa.methods.ggml import rounded_as
from moqa.methods.grid import fit_grid
from moqa.methods.levels import fit_levels, nearest_codes
from moqa.models.experts import ExpertRun, projection_rows
from moqa.models.products import product
from moqa.models.units import Unit
from moqa.models.view import ModelView
from moqa.profiling.record import Settings

# the errors need most of a profile's memory and time; bfloat16 changes a sensitivity by less than 1 %
_DTYPE = torch.bfloat16
# weights of a unit from which its relative rounding errors are computed: enough for an accuracy of a percent
_SAMPLED_WEIGHTS = 2**15
# columns and rows of a unit that are rounded in every scheme, and group sizes of these; the ends of a trellis meet,
# which costs a short one more than the long ones of whole units
_COMPARED, _COMPARED_ROWS = 256, {"int": 64, "table": 64, "trellis": 256}
GROUPS = (32, 64, 128, 256)

# Widths whose errors are really made and measured. The sensitivity at other widths is extrapolated from the nearest of
# them by the ratio of the weights' rounding errors.
PROBES = (1, 2, 3, 4)


@dataclass(frozen=True)
class ErrorSettings:
    """How errors are made and measured.

    Attributes:
        scheme: group size, symmetry and scale dtype of the quantization.
        widths: candidate widths, ascending.
        probes: widths whose errors are really made; none if no sensitivity is measured.
        method: the quantization method.
        experts: number of experts whose errors are held together.
        others: schemes whose errors are compared with those of `scheme`.
    """

    scheme: Scheme
    widths: tuple[int, ...]
    probes: tuple[int, ...]
    method: Method
    experts: int
    others: tuple[Scheme, ...] = ()

    @classmethod
    def of(cls, settings: Settings, method: Method, experts: int) -> "ErrorSettings":
        """Of a profile with some settings."""
        widths = tuple(w for w in WIDTHS if not (settings.symmetric and w == 1))
        probes = tuple(width for width in PROBES if width in widths and settings.sensitivity)
        others = other_schemes(settings) if settings.sensitivity else ()
        return cls(settings.scheme(8), widths, probes, method, experts, others)


def relative_errors(view: ModelView, layer: int, how: ErrorSettings) -> Tensor:
    """[units, widths] squared error of rounding over squared weights, float32; large units are sampled by rows."""
    rows = []
    for unit in view.block_units(layer):
        weight = view.weight(unit)
        weight = weight[:: max(1, weight.numel() // _SAMPLED_WEIGHTS)].float()
        stacked = weight.expand(len(how.widths), -1, -1)
        error = fit_grid(stacked, how.scheme, torch.tensor(how.widths)).error
        rows.append(error.sum((1, 2)) / weight.square().sum().clamp_min(1e-30))
    return torch.stack(rows)


def other_schemes(settings: Settings) -> tuple[Scheme, ...]:
    """Schemes whose errors are compared with those of the settings' own scheme.

    >>> Scheme(width=2, group_size=128, encoding="trellis") in other_schemes(profile.record.settings)
    True
    """
    return tuple(
        Scheme(width=width, group_size=group, symmetric=symmetric, encoding=name)
        for group in GROUPS
        for name, symmetric in (("int", settings.symmetric), ("table", False), ("trellis", False))
        for width in ENCODINGS[name].widths
        # a symmetric grid of 1 bit, with which codes of 1 bit would be compared, does not exist
        if not (settings.symmetric and width == 1) and not (name == "int" and group == settings.group_size)
    )


def compared_errors(view: ModelView, layer: int, own: Scheme, others: Sequence[Scheme]) -> Tensor:
    """[units, others] squared error of rounding over that at the same width in a profile's own scheme, float32.

    Units of a layer that differ only in their expert have about the same: one of them is rounded.
    """
    units, found = view.block_units(layer), dict[tuple, Tensor]()
    for unit in units:
        if _kind(unit) not in found:
            alike = [other for other in units if _kind(other) == _kind(unit)]
            weight = view.weight(alike[len(alike) // 2])[:, :_COMPARED]
            found[_kind(unit)] = _compared(weight, own, others)
    return torch.stack([found[_kind(unit)] for unit in units])


def _kind(unit: Unit) -> tuple:
    """The same for units of a layer that differ only in their expert."""
    return unit.role, unit.projection, unit.shape


def _compared(weight: Tensor, own: Scheme, others: Sequence[Scheme]) -> Tensor:
    """[others] errors of a matrix, those that differ only in the width together."""
    alike: dict[tuple, list[int]] = {}
    for index, other in enumerate(others):
        alike.setdefault((other.encoding, other.group_size, other.symmetric), []).append(index)
    ratios = torch.empty(len(others))
    for (encoding, *_), same in alike.items():
        rows = _COMPARED_ROWS.get(encoding, _COMPARED_ROWS["int"])
        part, widths = weight[:rows].float(), [others[index].width for index in same]
        ratios[same] = squared_errors(part, others[same[0]], widths) / squared_errors(part, own, widths).clamp_min(
            1e-30
        )
    return ratios


def squared_errors(weight: Tensor, scheme: Scheme, widths: Sequence[int]) -> Tensor:
    """[widths] squared errors of rounding a matrix in a scheme at some widths.

    >>> bool(squared_errors(torch.randn(16, 64), Scheme(width=2), (2, 3)).diff() < 0)
    True
    """
    stack = weight.expand(len(widths), -1, -1)
    if scheme.is_foreign:
        rounded = rounded_as(weight, scheme.encoding)
        return (rounded - weight).square_().sum().expand(len(widths))
    if not scheme.is_coded:
        return fit_grid(stack, scheme, torch.tensor(widths)).error.sum((1, 2))
    bits = torch.tensor(widths)[:, None].expand(-1, len(weight))
    grid = fit_levels(stack, scheme, bits, weight.shape[:1])
    return (grid.decode(nearest_codes(stack, grid)) - stack).square_().sum((1, 2))


def all_widths(probed: Tensor, relative: Tensor, probes: Sequence[int], widths: Sequence[int]) -> Tensor:
    """Sensitivities at all widths from the measured ones.

    >>> all_widths(torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.2, 0.05]]), (2, 3), (2, 3, 4))
    tensor([[4.0000, 1.0000, 0.2500]])

    Args:
        probed: [units, probes] measured sensitivities.
        relative: [units, widths] rounding errors of the weights.
        probes: widths that were measured.
        widths: ascending; includes all probes.

    Returns:
        [units, widths], never rising with the width.
    """
    columns = [min(range(len(probes)), key=lambda i: abs(probes[i] - width)) for width in widths]
    anchors = relative[:, [widths.index(probes[i]) for i in columns]]
    found = probed[:, columns] * relative / anchors.clamp_min(1e-30)
    return found.cummin(1).values


class Sensitivity:
    """Expected rise of the KL divergence for some units of a block at each probed width: a sum over tokens.

    >>> from moqa.methods import METHODS
    >>> how = ErrorSettings.of(profile.record.settings, METHODS["rtn"], experts=16)
    >>> Sensitivity(view, 0, view.block_units(0), how, {}).errors["model.layers.0.self_attn.q_proj"].shape
    torch.Size([4, 256, 256])

    Sums are kept for each fold of the samples, so that one can see how far a result depends on them.

    For a unit with input x_t, output gradient g_t and rounding error E it is half the sum of (g_t . E x_t)^2. That is
    the second-order term of the KL divergence between the predictions of the original and of the quantized model, if g
    comes from labels drawn from the model's own predictions (the true Fisher matrix) and tokens are independent.
    Our design; the sum over single weights (squared gradient x squared error) predicts less well, see
    docs/results/ablations.md.

    Args:
        view: the model.
        layer: index of the block.
        units: some of its units.
        how: how errors are made.
        inputs: input space -> statistics on one distribution, which the errors are fitted on.
        folds: number of folds.

    Attributes:
        errors: unit name -> [probes, out, in] stored minus original weights, bfloat16.
        sums: unit name -> [folds, probes] the sums so far, float32.
        fold: that is added to.
    """

    def __init__(
        self,
        view: ModelView,
        layer: int,
        units: Sequence[Unit],
        how: ErrorSettings,
        inputs: Mapping[str, InputStatistics],
        folds: int = 1,
    ) -> None:
        self.fold = 0
        self.errors: dict[str, Tensor] = {}
        schemes = dict.fromkeys((unit.name for unit in units), how.scheme)
        for stack in stacks(view, units, schemes, inputs, copies=len(how.probes)):
            rows = stack.weights.shape[1]
            weights = stack.weights.repeat(1, len(how.probes), 1)
            widths = torch.tensor(how.probes).repeat_interleave(rows).expand(len(weights), -1)
            seen = stack.inputs if how.method.needs_data else []
            parts = stack.parts * len(how.probes)
            stored = how.method.run(SolveBatch(weights, widths, seen, how.scheme, parts)).decode()
            error = (stored - weights).to(_DTYPE).unflatten(1, (len(how.probes), rows))
            for unit, entry, place in stack.places():
                self.errors[unit.name] = error[entry, :, place]
        self.sums = {name: torch.zeros(folds, len(how.probes)) for name in self.errors}
        self._path = view.experts_path(layer)
        self._rows = {} if self._path is None else projection_rows(view.module(self._path))

    def add(self, name: str, x: Tensor, gradient: Tensor, samples: int | None = None) -> None:
        """Add [tokens, in] inputs and [tokens, out] gradients of the log-likelihood of drawn labels.

        Args:
            name: of the unit.
            x: inputs.
            gradient: of its outputs.
            samples: number of samples, if all rows of a sample share one label: their effects on it are added before
                they are squared.
        """
        error = self.errors[name]
        widths, out, features = error.shape
        shift = product(x, error.reshape(widths * out, features).T, _DTYPE).unflatten(-1, (widths, out))
        effect = (shift * gradient[:, None]).sum(-1)
        if samples is not None:
            effect = effect.unflatten(0, (samples, -1)).sum(1)
        self.sums[name][self.fold] += 0.5 * effect.square().sum(0)

    def routed(self, index: Tensor, weights: Tensor) -> None:
        """See `ExpertsObserver`: routing does not matter here."""

    def expert(self, run: ExpertRun) -> None:
        """Register hooks for the gradients of one expert's two products."""
        name = f"{self._path}.{run.expert}"
        if f"{name}.down_proj" in self.sums:
            run.on_gradients(self._rows, lambda projection, *pair: self.add(f"{name}.{projection}", *pair))
