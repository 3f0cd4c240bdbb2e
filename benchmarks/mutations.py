"""Mutated files: 10,000 changes of original, profile, plan, checkpoint and adjustment, and what came of each.

Each change flips bits, cuts, swaps or replaces files, or edits JSON, headers, schemes and tensors; for two of five,
whoever made it also made all checksums again. `--page` writes the table to docs/results/robustness.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from robustness import write_section

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

HEADING = "## Mutated files"
SECTION = """Made by `python benchmarks/mutations.py --count {count} --page` in {minutes:.0f} minutes.

One change is made to one artifact of a tiny model, whose units have the encodings `int`, `table` and `trellis` in turn:
bits are flipped, a file is cut, grows, is swapped with another or replaced by a pipe, a device, a socket or a link; a
value, a number, a key or the structure of JSON becomes another, or a unit's encoding, width or group size; names,
dtypes, shapes and places in headers lie; values of one tensor (codes, factors, scales, samples) become others. For two
of five, whoever made the change also made all checksums again: then the artifact may say something else, and is used as
it says. An original is opened and run, and `quantize` is asked to apply a plan to it; a profile is planned from; a plan
is compared with its profile; a checkpoint is loaded and run, and `moqa verify` asked where its output differs; an
adjustment is applied and reverted. A process that dies and a try that takes over a minute are counted as such.

{table}
"""


def main() -> None:
    """Make sound artifacts, try all mutations, and print the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation")
    parser.add_argument("--only", help="one kind of artifact")
    parser.add_argument("--page", action="store_true", help="write the section of the page")
    parser.add_argument("--show", action="store_true", help="print all tries, not only the bad ones")
    options = parser.parse_args()

    import torch
    from conftest import make_tiny_model, read_texts
    from hostile.artifacts import ADJUSTMENT, CHECKPOINT, MODEL, PLAN, PROFILE, make_all
    from hostile.tries import BAD, OUTCOMES, counted, run
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    kinds = [options.only] if options.only else [MODEL, PROFILE, PLAN, CHECKPOINT, ADJUSTMENT]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "tiny")
        sound = make_all(model, list(read_texts().values()), Path(folder) / "sound")
        seeds = [(kinds[n % len(kinds)], options.seed + n // len(kinds)) for n in range(options.count)]
        done = run(sound, seeds, options.workers)
    for _, outcome, what in sorted(done):
        if options.show or outcome in BAD:
            print(f"{outcome.upper()}: {what}")
    found, minutes = counted(done), (time.perf_counter() - began) / 60
    rows = [f"| {kind} | {' | '.join(str(found[kind][outcome]) for outcome in OUTCOMES)} |" for kind in kinds]
    table = "\n".join([f"| | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * len(OUTCOMES), *rows])
    print(f"\n{options.count:,} mutations, {minutes:.0f} minutes\n\n{table}")
    if options.page:
        write_section(HEADING, SECTION.format(count=options.count, minutes=minutes, table=table))
    sys.exit(any(outcome in BAD for _, outcome, _ in done))


if __name__ == "__main__":
    main()
