"""The small files of an original: what a transformers model needs in addition to its weights, and the licence."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from moqa.errors import MoqaError
from moqa.originals.hub import INDEX
from moqa.storage.files import check_inside

_PATTERNS = (
    "*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "LICENCE*", "NOTICE*",
    "policy_*processor*.safetensors",  # by how much a policy of lerobot scales what it sees and does
)  # fmt: skip


def companions_of(folder: Path) -> list[Path]:
    """The small files of an original.

    >>> [path.name for path in companions_of(Path("reference/model"))][:2]
    ['config.json', 'generation_config.json']

    Raises:
        MoqaError: if one cannot be copied.
    """
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.name != INDEX}
    for path in sorted(found):
        try:
            check_inside(path, folder)
        except OSError as error:
            raise MoqaError(f"{path} cannot be copied", error.strerror or str(error)) from None
    return sorted(found)


def copy_companions(folder: Path, companions: Iterable[Path], target: Path) -> None:
    """Copy them to another folder."""
    for path in companions:
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
