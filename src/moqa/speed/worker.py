"""The process in which one model is measured (`python -m moqa.speed.worker OPTIONS`)."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from moqa.errors import MoqaError
from moqa.format.reader import is_checkpoint, open_checkpoint
from moqa.generation import Sampling, tokens
from moqa.memory.process import used
from moqa.models.load import load_original, read_config
from moqa.models.stored import imported_format, open_stored, stored_files
from moqa.originals.folder import check_finite
from moqa.runtime.load import choose_kernels, load_packed
from moqa.tasks import check_language_model


def measure(
    folder: Path, *, threads: int, prompt_tokens: int, new_tokens: int, repeats: int, kernels: str
) -> dict[str, object]:
    """Measure a model: the fields of `Speed` except the model's name."""
    torch.set_num_threads(threads)
    packed = is_checkpoint(folder)
    check_language_model(read_config(folder, packed, imported=True), folder)
    # both checks read every byte into the page cache, so loading is measured without the disk
    if packed:
        files = [folder / name for name in open_checkpoint(folder).manifest.files]
        started = time.perf_counter()
        model = load_packed(open_checkpoint(folder), kernels=kernels)
    else:
        files = stored_files(folder)
        foreign = imported_format(folder) is not None
        if not foreign:
            check_finite(folder)
        started = time.perf_counter()
        model = load_original(folder, torch.bfloat16, open_stored(folder, imported=True)[1] if foreign else None)
    loaded = time.perf_counter() - started
    prefill, decode = [], []
    random = torch.Generator().manual_seed(0)
    model.generation_config.eos_token_id = None
    model.config.get_text_config().eos_token_id = None
    for repeat in range(repeats + 1):
        ids = torch.randint(model.config.get_text_config().vocab_size, (prompt_tokens,), generator=random).tolist()
        steps = tokens(model, ids, Sampling(max_tokens=new_tokens + 1, temperature=0))
        started = time.perf_counter()
        while next(steps) is None:
            pass
        first = time.perf_counter()
        written = sum(1 for _ in steps)
        if repeat:
            prefill.append(prompt_tokens / (first - started))
            decode.append(written / (time.perf_counter() - first))
    return {
        "engine": "moqa" if packed else "transformers",
        "kernels": choose_kernels(kernels).name if packed else None,
        "threads": threads, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "bytes": sum(path.stat().st_size for path in files),
        "load_seconds": loaded,
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode),
        "peak_bytes": used()[1],
    }  # fmt: skip


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    try:
        print(json.dumps(measure(Path(options.pop("folder")), **options)))
    except MoqaError as error:
        print(f"moqa: {error}", file=sys.stderr)
        sys.exit(2)
