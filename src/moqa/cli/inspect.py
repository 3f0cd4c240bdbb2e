"""`moqa inspect`: show the content of an artifact or a model."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqa.cli import options
from moqa.cli.app import app
from moqa.cli.common import mib, print_table, warn_left_out, write_result
from moqa.errors import MoqaError
from moqa.planning.registry import STRATEGIES

if TYPE_CHECKING:
    from moqa.profiling import Profile


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT", help="profile, plan, checkpoint, adjustment or model: file, folder or Hub id"
        ),
    ],
    json: options.Json = None,
) -> None:
    """Show the content of a profile, plan, checkpoint, adjustment or original model."""
    from moqa.originals.hub import is_id, on_disk

    if is_id(path):
        path = on_disk(path)
    if path.is_file():
        from moqa.cli.plan import print_plan
        from moqa.planning import read_plan

        plan = read_plan(path)
        print_plan(plan)
        write_result(plan, json)
    elif (path / "profile.json").is_file():
        from moqa.cli.profile import print_profile
        from moqa.profiling import read_profile

        profile = read_profile(path)
        print_profile(profile)
        _drift(profile)
        write_result(profile.record, json)
    elif (path / "moqa.json").is_file():
        _checkpoint(path, json)
    elif (path / "adjustment.json").is_file():
        _adjustment(path, json)
    elif path.is_dir():
        _model(path, json)
    else:
        raise MoqaError(f"there is nothing at {path}", "give a profile, plan, checkpoint, adjustment or model folder")


def _drift(profile: "Profile") -> None:
    """Print how much every two distributions differ, and in which experts and channels most."""
    from moqa.reports import drift

    if not profile.expert_layers:
        return
    rows = []
    for a, b in drift.pairs(profile):
        routing = drift.routing_divergence(profile, a, b)
        experts = ", ".join(f"{n}/{e} {x:+.2f}" for n, e, x in drift.expert_changes(profile, a, b)[:3])
        channels = ", ".join(f"{n}/{e}/{c} {x:+.3f}" for n, e, c, x in drift.channel_changes(profile, a, b, 2))
        numbers = (drift.rank_correlation(profile, a, b), sum(routing) / len(routing))
        top = drift.drift_concentration(profile, a, b)[0.01]
        rows.append([f"{a} to {b}", *(f"{x:.2f}" for x in numbers), f"{top:.0%}", experts, channels])
    headings = ["drift", "rank correlation", "routing JS, bits", "in top 1 % of channels"]
    print_table([*headings, "layer/expert", "layer/expert/channel"], rows)


def _checkpoint(path: Path, json: Path | None) -> None:
    from moqa.format.reader import open_checkpoint

    checkpoint = open_checkpoint(path, verify=False)
    manifest = checkpoint.manifest
    widths = sorted({unit.scheme.width for unit in manifest.units.values()})
    rows = []
    for layer in range(manifest.layers):
        units = [unit for unit in manifest.units.values() if unit.layer == layer]
        counts = Counter(unit.scheme.width for unit in units)
        size = sum(unit.scheme.stored_bytes(unit.shape) for unit in units)
        rows.append([str(layer), *(str(counts[w] or "") for w in widths), mib(size)])
    title = (
        f"{path}: {manifest.model} ({manifest.model_type}) by {STRATEGIES.current(manifest.strategy)}, "
        f"{manifest.method}; "
        f"{mib(checkpoint.bytes)}, {checkpoint.bits_per_weight:.3f} bits/weight; fitted on {', '.join(manifest.fitted)}"
    )
    if manifest.nested:
        nested = ", ".join(map(str, sorted(manifest.nested)))
        title += f"; nested widths {nested} in {mib(checkpoint.nested_bytes)} more"
    print_table(["layer", *(f"{w} bits" for w in widths), "units"], rows, title)
    warn_left_out(manifest.left_out)
    write_result(manifest, json)


def _adjustment(path: Path, json: Path | None) -> None:
    """Print adjusted rows and columns by layer and width, and the experts with most of them."""
    from moqa.format.adjustment import read_adjustment

    adjustment = read_adjustment(path)
    record = adjustment.record
    widths = sorted({part.scheme.width for part in record.channels})
    rows = []
    for layer in range(len(record.channels[0].counts) if record.channels else 0):
        counts, experts = Counter[int](), Counter[int]()
        for channels in adjustment.layer(layer):
            counts[channels.part.scheme.width] += len(channels.channel)
            experts.update(channels.expert.tolist())
        units = sum(f".layers.{layer}." in name for name in record.units)
        most = ", ".join(f"{expert} ({count})" for expert, count in experts.most_common(5))
        rows.append([str(layer), *(str(counts[w] or "") for w in widths), str(units or ""), most])
    title = (
        f"{path}: {record.mode} for {record.name}, by {record.rule}; {record.extra_bytes:+,} bytes; "
        f"for checkpoint {record.checkpoint[:8]}"
    )
    headings = ["layer", *(f"{w} bits" for w in widths), "units with fewer", "experts with most rows and columns"]
    print_table(headings, rows, title)
    write_result(record, json)


def _model(path: Path, json: Path | None) -> None:
    from moqa.models.units import ROLES
    from moqa.models.view import open_model

    view = open_model(path)
    rows = []
    for role in ROLES:
        units = [unit for unit in view.units.values() if unit.role == role]
        if units:
            shapes = Counter(unit.shape for unit in units)
            text = ", ".join(f"{count} x {out}x{features}" for (out, features), count in shapes.items())
            rows.append([role, str(len(units)), f"{sum(u.weights for u in units):,}", text])
    kept = sum(tensor.numel() for tensor in view.kept().values())
    rows.append(["kept", str(len(view.kept())), f"{kept:,}", "embeddings, norms, routers, biases"])
    print_table(["role", "units", "weights", "shapes"], rows, f"{path}: {view.model.config.model_type}")
    warn_left_out(view.left_out())
    write_result(
        {name: {"role": u.role, "layer": u.layer, "shape": list(u.shape)} for name, u in view.units.items()}, json
    )
