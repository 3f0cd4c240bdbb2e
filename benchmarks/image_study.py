"""The image classifier of the reference at 8, 4, 3 and 2 bits: uniform widths, and the default plan at the same bytes.

Writes docs/results/images.md. Calibrated on reference/image/calib, measured on reference/image/test, which no fit sees.
"""

import argparse
import shutil
from pathlib import Path

import moqa
from moqa.evaluation import Evaluation

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "reference" / "image"
WIDTHS = (8, 4, 3, 2)
METHODS = ("rtn", "gptq")
TEXT = """
# Image classification

The reference's ResNet (1.09 M parameters, CIFAR-10) with its convolutions packed;
`python benchmarks/image_study.py`. Calibrated on the 512 images of `reference/image/calib`, measured on the 1,000 of
`reference/image/test`. KL is from the original's predictions, in nats per image; size is that of all weight files on
disk, headers included. The stem, the classifier and all norms stay as they are.

| weights | size on disk, bytes | bits per weight of the units | top-1 | KL from the original | same first class |
|---|---:|---:|---:|---:|---:|
"""


def rows(runs: Path) -> list[tuple[str, Evaluation]]:
    """Name and quality of the original and of every checkpoint."""
    model, test = IMAGES / "model", {"test": IMAGES / "test"}
    profile = moqa.profile(model, {"calib": IMAGES / "calib"}, runs / "profile", samples=512)
    found = [("original, bfloat16", moqa.evaluate(model, test, windows=None))]
    for width in WIDTHS:
        uniform = moqa.plan(profile, strategy="uniform", widths=[width])
        plans = [(f"uniform {width}, {method}", uniform, method) for method in METHODS]
        widths = range(1, 9)
        plans.append((f"budget at its bytes, {METHODS[-1]}", moqa.plan(
            profile, f"{uniform.account.checkpoint}B", widths=widths), METHODS[-1],
        ))  # fmt: skip
        for number, (name, plan, method) in enumerate(plans):
            out = moqa.quantize(model, plan, runs / f"{width}-{number}", method=method, profile=profile)
            found.append((name, moqa.evaluate(out, test, against=model, windows=None)))
            print(name, found[-1][1].distributions["test"], flush=True)
    return found


def page(found: list[tuple[str, Evaluation]]) -> str:
    lines = TEXT.strip().splitlines()
    for name, one in found:
        q = one.distributions["test"]
        divergence = "" if one.strategy is None else f"{q.kl_divergence:.4f}"
        agreement = "" if one.strategy is None else f"{q.top1_agreement:.1%}"
        lines.append(
            f"| {name} | {one.bytes:,} | {one.bits_per_weight:.2f} | {q.accuracy:.1%} | {divergence} | {agreement} |"
        )
    by = {(width, kind): found[1 + 3 * index + kind][1].distributions["test"] for index, width in enumerate(WIDTHS)
          for kind in range(3)}  # fmt: skip
    lines += ["", "| bytes of uniform | KL of the default plan / KL of uniform gptq |", "|---:|---:|"]
    for width in WIDTHS:
        ratio = by[width, 2].kl_divergence / by[width, 1].kl_divergence
        lines.append(f"| {width} bits | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "image-study")
    options = parser.parse_args()
    shutil.rmtree(options.runs, ignore_errors=True)
    (ROOT / "docs" / "results" / "images.md").write_text(page(rows(options.runs)))
