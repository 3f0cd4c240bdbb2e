"""Models of the Hugging Face Hub: which of their files are used, and where they are."""

import json
from pathlib import Path

from moqa.errors import MoqaError, one_line

INDEX = "model.safetensors.index.json"
# Files in folders, and weights by other names, are further copies in formats that nothing here reads.
_USED = (
    "model*.safetensors", "width-*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*",
    "LICENCE*", "NOTICE*", "policy_*processor*.safetensors",
)  # fmt: skip
_FORMS = "give a folder with config.json and safetensors, or a Hub id (org/name or org/name@revision)"


def on_disk(model: str | Path, *more: str) -> Path:
    """The folder of a model or checkpoint; one that is given by its Hub id is downloaded first.

    >>> on_disk("reference/model")
    PosixPath('reference/model')

    Args:
        model: a folder, or an id such as `allenai/OLMoE-1B-7B-0924`, with `@` and a revision if it is not the newest.
        more: patterns of files in folders of the repository that are needed, too.

    Raises:
        MoqaError: if there is no such folder, and the Hub does not have it or cannot be reached.
    """
    folder, typed = Path(model), str(model)
    if not typed.strip():
        raise MoqaError("the model's name is empty", _FORMS)
    if folder.is_dir():
        return folder
    if not is_id(model):
        raise MoqaError(f"no model at {model}", _FORMS)
    try:
        snapshot = _download(typed, _USED, ["*/*"])
        templates = ("additional_chat_templates/*.jinja",) if (snapshot / "tokenizer_config.json").is_file() else ()
        if further := (*_unusual(snapshot), *templates, *more):
            _download(typed, further)
        return snapshot
    except Exception as error:
        raise MoqaError(f"no folder {model}, and it cannot be downloaded from the Hub", one_line(error)) from None


def is_id(model: str | Path) -> bool:
    """Whether a name has the form of a Hub id, and no file or folder has it.

    >>> is_id("allenai/OLMoE-1B-7B-0924"), is_id("./model"), is_id("reference/model")
    (True, False, False)
    """
    typed = str(model)
    return typed.count("/") == 1 and not typed.startswith((".", "/", "~")) and not Path(model).exists()


def _download(typed: str, patterns: tuple[str, ...], ignored: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = typed.partition("@")
    options = {"revision": revision} if revision else {}
    return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=ignored, **options))


def _unusual(snapshot: Path) -> tuple[str, ...]:
    """Files that the index names and that are not there, as they have other names than weights usually have."""
    if (snapshot / "model.safetensors").is_file() or not (snapshot / INDEX).is_file():
        return ()
    try:
        files = set(json.loads((snapshot / INDEX).read_bytes())["weight_map"].values())
        return tuple(sorted(file for file in files if Path(file).name == file and not (snapshot / file).is_file()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()  # refused where it is read
