"""Seeds: each is one mutation, tried with some loaders."""

import faulthandler
import json
import resource
import shutil
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hostile import beside, manifests, rebuilt, weights
from hostile.beside import config_edits
from hostile.victim import (
    TRANSFORMERS,
    UNVERIFIED,
    VERIFIED,
    Allowed,
    Victim,
)

CASE_SECONDS = 120  # what takes as long hangs, on any machine
MEMORY = 8 * 2**30  # beyond what is in use: a hostile size must not take the machine's
# a seed means the same as long as this order stays
MUTATIONS = [*weights.MUTATIONS, *manifests.MUTATIONS, *rebuilt.MUTATIONS, *beside.MUTATIONS]


def mutate(sound: Path, folder: Path, seed: str) -> tuple[str, Allowed]:
    """Make the checkpoint of a seed; its name says what was done."""
    kind, number = seed.split(":")
    function = config_edits if kind == "config" else MUTATIONS[int(number) % len(MUTATIONS)]
    return function.__name__, function(Victim(sound, folder, seed))


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(12)[None] * 531 % 8192).logits


def loaders() -> dict[str, Callable]:
    """By name: gives the model of a folder."""
    from transformers import AutoModelForCausalLM

    import moqa

    return {
        VERIFIED: lambda folder: moqa.load(folder)[0],
        UNVERIFIED: lambda folder: moqa.load(folder, verify=False)[0],
        TRANSFORMERS: AutoModelForCausalLM.from_pretrained,
    }


def problem(name: str, load: Callable, folder: Path, allowed: Allowed, sound) -> tuple[str, str | None]:
    """What came of loading a mutated checkpoint, and what is wrong with that."""
    import torch

    from moqa import MoqaError

    model = None
    try:
        model = load(folder)
        found = logits_of(model)
    except MoqaError as error:
        one_line = "\n" not in str(error) and len(str(error)) < 2000
        return "refused", None if one_line else f"a message of many lines: {error!r:.300}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        if name == TRANSFORMERS or (name in allowed.fail and model is not None):
            return "refused", None
        frames = traceback.extract_tb(error.__traceback__)
        at = next((frame for frame in reversed(frames) if "/moqa/" in frame.filename), frames[-1])
        text = " ".join(str(error).split())
        return "error", f"{type(error).__name__}: {text:.160} ({Path(at.filename).name}:{at.lineno} {at.line})"
    if not allowed.load and name != TRANSFORMERS:
        return "loaded", "it loaded"
    if not allowed.infinite and not bool(torch.isfinite(found).all()):
        return "loaded", "its logits are not finite"
    if name not in allowed.differ and not torch.equal(found, sound):
        return "loaded", "its logits differ"
    return "loaded", None


def run(sound: Path, names: list[str], seeds: list[str]) -> None:
    """Print a line per seed before it is tried, and one for each thing that is wrong; what happened at the end."""
    import torch
    from transformers.utils import logging

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    known, seen = loaders(), Counter()
    wanted = {name: logits_of(known[name](sound)) for name in names}
    with tempfile.TemporaryDirectory(dir=sound.parent) as parent:
        for seed in seeds:
            print(f"seed {seed}", flush=True)
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            folder = Path(parent) / "case"
            kind, allowed = mutate(sound, folder, seed)
            for name in names:
                torch.manual_seed(zlib.crc32(seed.encode()))  # what is left at random must not be right by chance
                outcome, wrong = problem(name, known[name], folder, allowed, wanted[name])
                seen[f"{name} {outcome}"] += 1
                if wrong is not None:
                    print(f"WRONG {kind}, {name}: {wrong}", flush=True)
            shutil.rmtree(folder)
            faulthandler.cancel_dump_traceback_later()
    print(f"seen {json.dumps(seen)}")


def show(sound: Path, seed: str) -> None:
    """Leave the checkpoint of a seed in a new folder, for a closer look."""
    folder = Path(tempfile.mkdtemp(dir=sound.parent)) / "case"
    print(*mutate(sound, folder, seed), folder)
