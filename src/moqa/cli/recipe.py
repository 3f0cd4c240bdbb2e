"""`--config`: options of a command from a file, or from a checkpoint that was made with them."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moqa.errors import MoqaError, one_line

if TYPE_CHECKING:
    from moqa.format.manifest import Manifest

BUDGETS = ("bpw", "size", "fit")
# fields of a manifest -> options, where the names differ
_OPTIONS = {"fixed": "set", "floors": "floor"}
_FORMS = "give a file of options such as `bpw: 3`, or the folder or moqa.json of a checkpoint"


def read_recipe(path: Path) -> dict[str, Any]:
    """Options by name, from a file in YAML or JSON, or from the manifest of a checkpoint.

    >>> read_recipe(Path("runs/out"))["bpw"]
    '3'

    Raises:
        MoqaError: if it cannot be read, or holds no options by name.
    """
    import yaml

    path = path / "moqa.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise MoqaError(f"--config {path} cannot be read: {reason}", _FORMS) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise MoqaError(f"--config {path} holds no options by name", _FORMS)
    if {"fingerprint", "units", "kept"} <= found.keys():
        return _of_checkpoint(path)
    return {name.replace("-", "_"): value for name, value in found.items() if value is not None}


def _of_checkpoint(path: Path) -> dict[str, Any]:
    """The options that a checkpoint was made with, as far as its manifest records them."""
    from moqa.format.manifest import Candidates, Manifest
    from moqa.storage.artifact import read_json
    from moqa.storage.paths import found

    manifest = read_json(Manifest, path)
    candidates = manifest.model_dump(include=set(Candidates.model_fields))
    if manifest.group_size is None:
        candidates |= _of_one_group(manifest)
    if candidates.get("floors") == {}:
        candidates["floors"] = "none"
    options = {"hedge": None, "objective": None, "scope": None, **manifest.options}
    recipe = {
        "model": found(manifest.model, path.parent), "strategy": manifest.strategy, "ties": manifest.ties,
        "method": manifest.method, "seed": manifest.seed,
        **{_OPTIONS.get(name, name): value for name, value in candidates.items()},
        **{name: options[name] for name in ("hedge", "objective", "scope")},
        # as it was typed, e.g. --fit 8GiB --context 8192 --batch 4
        **dict(re.findall(r"--(\w+) ([^\s(]+)", manifest.budget or "")),
        "widths_nested": sorted({*manifest.nested, *(manifest.widths or ())}) if manifest.nested else None,
    }  # fmt: skip
    return {name: value for name, value in recipe.items() if value is not None}


def _of_one_group(manifest: "Manifest") -> dict[str, Any]:
    """The candidates of a checkpoint from before plans mixed encodings and group sizes: it has one of each."""
    from moqa.format.scheme import DEFAULT_ENCODING, Scheme
    from moqa.planning.candidates import smallest_widths

    scheme = next((unit.scheme for unit in manifest.units.values() if not unit.scheme.is_unquantized), Scheme(width=8))
    return {
        "group_size": scheme.group_size, "groups": (scheme.group_size,), "symmetric": scheme.symmetric,
        "encodings": (DEFAULT_ENCODING,), "widths": manifest.widths or (2, 3, 4, 5, 6, 8),
        "floors": smallest_widths(None, 4, any(unit.role == "expert" for unit in manifest.units.values())),
    }  # fmt: skip


def _take(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the options of a recipe the defaults of a command."""
    if path is None:
        return None
    given = read_recipe(path)
    # `restart`, `overwrite` and the like are decisions of one run
    known = {str(param.name): param for param in ctx.command.params if param.name not in ("config", "help")}
    names = {_typed(param): name for name, param in known.items()}
    for name in given:
        if name not in names:
            listed = ", ".join(sorted(names))
            raise MoqaError(f"--config {path}: {ctx.command.name} has no option {name}", f"there are {listed}")
    ctx.default_map = {names[name]: _value(value, known[names[name]]) for name, value in given.items()}
    return path


def _typed(param: Any) -> str:
    """The name of an option as users type it, e.g. `set` and not that of the function's parameter."""
    return str(max(param.opts, key=len)).removeprefix("--").replace("-", "_").lower()


def _value(value: Any, param: Any) -> Any:
    """A value as the command line would have it."""
    if isinstance(value, dict):
        value = [f"{name}={text}" for name, text in value.items()]
    if param.multiple:
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def prefer_typed(ctx: Any) -> None:
    """Forget the budget of a recipe if another kind of budget was typed."""
    source = {name: getattr(ctx.get_parameter_source(name), "name", "") for name in BUDGETS if name in ctx.params}
    if "COMMANDLINE" in source.values():
        for name, where in source.items():
            if where == "DEFAULT_MAP":
                ctx.params[name] = None


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", is_eager=True, callback=_take,
        help="take options from a file (YAML or JSON), or from a checkpoint; those that are typed win",
    ),
]  # fmt: skip
