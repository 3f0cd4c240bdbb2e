"""A profile on disk: one JSON table of contents and one safetensors file per distribution."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moqa.calibration.outputs import Gradients
from moqa.errors import MoqaError
from moqa.format.scheme import DEFAULT_ENCODING, Scheme
from moqa.profiling.record import FORMAT, SELF, ProfileRecord
from moqa.profiling.significance import expert_significance
from moqa.storage.artifact import check_format, check_seal, file_hash, read_json, write_sealed
from moqa.storage.files import check_file
from moqa.storage.paths import found

RECORD = "profile.json"
WEIGHTS = "weights"


@dataclass(frozen=True)
class Profile:
    """All statistics of a model on some distributions.

    >>> profile = read_profile("runs/profile")
    >>> profile.names
    ('novels', 'wiki')
    >>> profile.sensitivity("wiki").shape
    torch.Size([312, 8])

    Attributes:
        record: the table of contents.
        folder: of the profile.
        statistics: distribution -> name -> tensor.
        weights: statistics of the weights alone: `rounding` [units, widths], `compared` [units, others] and
            `layer.N.similarity`.
    """

    record: ProfileRecord
    folder: Path
    statistics: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor]

    def __repr__(self) -> str:
        """One line; `record` says what was measured."""
        texts, units = ", ".join(self.names), len(self.record.units)
        return f"<Profile of {self.record.model} at {self.folder}: {units} units on {texts}>"

    @property
    def names(self) -> tuple[str, ...]:
        """Distributions given by the user, without the model's own text."""
        return tuple(name for name in self.statistics if name != SELF)

    @property
    def original(self) -> str:
        """Where the model was found, or its Hub id."""
        return found(self.record.model, self.folder)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Blocks with routed experts."""
        return tuple(sorted({unit.layer for unit in self.record.units if unit.role == "expert"}))

    def sensitivity(self, name: str) -> Tensor:
        """[units, widths] expected rise of the KL divergence per token, in nats, float32.

        Raises:
            MoqaError: if it was not measured.
        """
        if not self.record.settings.sensitivity:
            raise MoqaError(f"profile {self.folder} has no sensitivity", "make one without --no-sensitivity")
        return self.statistics[name]["sensitivity"]

    def folds(self, name: str) -> Tensor:
        """[folds, units, widths] what each fold of the samples adds to the sensitivity; one if not recorded."""
        whole = self.sensitivity(name)
        return self.statistics[name].get("folds", whole[None])

    def compared(self, scheme: Scheme) -> Tensor:
        """[units] rounding error of a scheme over that of the settings' own scheme at the same width, float32.

        Raises:
            MoqaError: if it was not measured.
        """
        if scheme.is_unquantized or scheme == self.record.settings.scheme(scheme.width):
            return torch.ones(len(self.record.units))
        if scheme not in self.record.others:
            raise MoqaError(
                f"profile {self.folder} has no errors of {scheme.encoding} of {scheme.width} bits in groups of "
                f"{scheme.group_size}", "profile again",
            )  # fmt: skip
        return self.weights["compared"][:, self.record.others.index(scheme)]

    @property
    def encodings(self) -> tuple[str, ...]:
        """Encodings whose errors were measured, that of the settings first."""
        return tuple(dict.fromkeys((DEFAULT_ENCODING, *(scheme.encoding for scheme in self.record.others))))

    @property
    def groups(self) -> tuple[int, ...]:
        """Group sizes whose errors were measured, that of the settings first."""
        measured = sorted({scheme.group_size for scheme in self.record.others})
        return tuple(dict.fromkeys((self.record.settings.group_size, *measured)))

    def significance(self, name: str, layer: int) -> Tensor:
        """[experts] share of the block's output that each expert contributes, float32."""
        return expert_significance(self.statistics[name][f"layer.{layer}.channel"])

    def layer(self, name: str, layer: int, statistic: str) -> Tensor:
        """A statistic of one block: `tokens`, `gate_mass`, `channel` or `coactivation`."""
        return self.statistics[name][f"layer.{layer}.{statistic}"]

    def gradients(self, layer: int, mixture: Mapping[str, float]) -> Gradients | None:
        """Gradients at a block's output on a mixture, distribution -> share; None if they were not measured."""
        found = []
        for name, share in sorted(mixture.items()):
            rows, rest = (self.statistics[name].get(f"layer.{layer}.gradient_{part}") for part in ("rows", "rest"))
            if rows is None or rest is None:
                return None
            found.append((Gradients(rows, rest), share))
        return Gradients.mixed(found)

    def samples(self, name: str) -> Tensor:
        """Inputs of the model: [windows, context] token ids, int64, or pixels of images, float32."""
        stored = self.statistics[name]["samples"]
        return stored if stored.is_floating_point() else stored.long()

    def digest(self, names: Iterable[str]) -> str:
        """Hash of the samples of some distributions."""
        digest = hashlib.sha256()
        for name in sorted(names):
            samples = self.statistics[name]["samples"].contiguous()
            digest.update(f"{name} {tuple(samples.shape)}\n".encode() + samples.numpy().tobytes())
        return digest.hexdigest()

    def starved(self) -> list[str]:
        """Experts that got no token of any distribution given by the user."""
        found = []
        for layer in self.expert_layers:
            total = torch.stack([self.layer(name, layer, "tokens") for name in self.names]).sum(0)
            found += [f"layer {layer} expert {e}" for e in (total == 0).nonzero().flatten().tolist()]
        return found


def stored_samples(inputs: Tensor) -> Tensor:
    """Samples as a profile stores them: token ids in 32 bits."""
    return inputs if inputs.is_floating_point() else inputs.int()


def write_profile(profile: Profile) -> None:
    """Write a profile to its folder; the table of contents comes last, so that an unfinished folder has none."""
    profile.folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, tensors in {**profile.statistics, WEIGHTS: profile.weights}.items():
        path = _file(profile.folder, name)
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        path.chmod(0o644)  # safetensors creates files that only the owner can read
        files[path.name] = file_hash(path)
    write_sealed(profile.record, profile.folder / RECORD, files=files)


def read_profile(folder: str | Path) -> Profile:
    """Read a profile folder.

    >>> read_profile("runs/profile").record.model_type
    'qwen3_moe'

    Raises:
        MoqaError: if it is not a profile, has a newer format, or one of its files is missing or was changed.
    """
    folder = Path(folder)
    record = read_json(ProfileRecord, folder / RECORD, "moqa profile")
    check_format(f"{folder} has profile", record.format, FORMAT)
    data = check_seal(folder / RECORD)
    loaded: dict[str, dict[str, Tensor]] = {}
    for name in (*record.distributions, WEIGHTS):
        path = _file(folder, name)
        try:
            check_file(path)
            loaded[name] = load_file(path)
            # a profile of an earlier moqa has no hashes
            changed = "files" in data and data["files"].get(path.name) != file_hash(path)
        except (SafetensorError, OSError, AttributeError) as error:
            raise MoqaError(f"profile {folder} lacks a readable {path.name}", str(error)) from None
        if changed:
            raise MoqaError(f"{path} was changed after it was written", f"its sha256 differs from that in {RECORD}")
    weights = loaded.pop(WEIGHTS)
    for name in record.distributions:
        _check_statistics(folder, record, name, loaded[name])
    measured = loaded if record.settings.sensitivity else {}
    for name, table in [*((n, loaded[n].get("sensitivity")) for n in measured), (WEIGHTS, weights.get("rounding"))]:
        if table is None or table.shape != (len(record.units), len(record.widths)):
            raise MoqaError(f"profile {folder}: the table in {name} does not match its {len(record.units)} units")
    for name, tables in measured.items():
        if "folds" in tables and tables["folds"].shape[1:] != tables["sensitivity"].shape:
            raise MoqaError(f"profile {folder}: the folds in {name} do not match its {len(record.units)} units")
    compared = weights.get("compared", torch.empty(0))
    fits = tuple(compared.shape) == (len(record.units), len(record.others)) and bool(torch.isfinite(compared).all())
    if record.others and not fits:
        raise MoqaError(f"profile {folder}: the table `compared` does not match its {len(record.units)} units")
    return Profile(record, folder, loaded, weights)


def _check_statistics(folder: Path, record: ProfileRecord, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse statistics that do not fit the units."""
    wanted: dict[str, tuple[int, ...]] = {}
    for unit in record.units:
        if unit.role == "expert" and unit.projection == "down_proj":
            layer, count = f"layer.{unit.layer}", (unit.expert or 0) + 1
            wanted |= {f"{layer}.tokens": (count,), f"{layer}.gate_mass": (count,),
                       f"{layer}.channel": (count, unit.shape[1]), f"{layer}.coactivation": (count, count)}  # fmt: skip
    wrong = [key for key, shape in wanted.items() if key not in tensors or tuple(tensors[key].shape) != shape]
    wrong += [] if "samples" in tensors and tensors["samples"].dim() > 1 else ["samples"]
    wrong += [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise MoqaError(f"profile {folder}: {wrong[0]} of {name} does not fit its {len(record.units)} units")


def _file(folder: Path, name: str) -> Path:
    return folder / (f"{name}.safetensors" if name == WEIGHTS else f"data.{name}.safetensors")
