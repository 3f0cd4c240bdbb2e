"""Rows of studies, kept by what they depend on: a row whose setting is known is not measured again."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from related_tables import ROOT, read_rows

from moqa.evaluation.measure import Reference, divergences
from moqa.models.view import open_model
from moqa.progress import quiet


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def content(*parts: Any) -> str:
    """Hash of what a row depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


@cache
def inputs() -> str:
    """Hash of the reference model and the texts, which every row depends on."""
    files = sorted(path for name in ("model", "text") for path in (ROOT / "reference" / name).iterdir())
    return content([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])


class Rows:
    """One JSON file per row in a folder; rows of related.json whose `content` is the same count as well."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept = {row["content"]: row for row in read_rows() if "content" in row}
        folder.mkdir(parents=True, exist_ok=True)

    def row(self, about: dict[str, Any], depends: Sequence[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row: what it is about, and what was measured, now or by an earlier run of the same content."""
        key = content(inputs(), about, *depends)
        if key in self._kept:
            return dict(self._kept[key])
        path = self._folder / f"{key}.json"
        if not path.is_file():
            say(" ".join(f"{value}" for value in about.values()))
            made = {**about, **make(), "content": key}
            path.with_suffix(".new").write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
            path.with_suffix(".new").rename(path)
        return json.loads(path.read_text())


class Scores:
    """Mean divergences of models on known and novel held-out windows, with their intervals."""

    def __init__(self, model: Path, texts: Sequence[Any], context: int, windows: int, known: Sequence[str]) -> None:
        self._model, self._texts, self._known = model, texts, known
        self._context, self._windows = context, windows

    @cached_property
    def reference(self) -> Reference:
        """The original's outputs, computed when the first model is measured: not if all rows are known."""
        view = open_model(self._model)
        reader = view.task.reader(self._model)
        cut = [view.task.cut(text, reader, self._context, self._windows) for text in self._texts]
        return Reference.of(view.model, list(cut), quiet)

    def of(self, model: Any) -> dict[str, float]:
        """`kl_known` and `kl_novel`, each with half of its interval (95 %, over windows)."""
        found = divergences(model, self.reference, quiet)
        result = {}
        for role in ("known", "novel"):
            values = [v for name, v in found.items() if (name in self._known) == (role == "known")]
            result[f"kl_{role}"] = float(torch.stack([v.mean() for v in values]).mean())
            spread = torch.stack([v.var() / len(v) for v in values]).sum().sqrt() / len(values)
            result[f"kl_{role}_interval"] = 1.96 * float(spread)
        return result | {f"kl_{name}": float(v.mean()) for name, v in found.items()}
