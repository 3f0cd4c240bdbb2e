"""A checkpoint whose units have every width and encoding in turns, rounded to nearest: to measure and test engines.

benchmarks/mixed_checkpoint.py MODEL FOLDER
"""

import argparse
import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

from demo import texts

import moqa
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.planning.account import account_of

CODES = (("trellis", 2), ("table", 3), ("trellis", 1), ("table", 4), ("trellis", 3), ("table", 2))
# of each unit after the other, so that an expert's three projections differ, and experts do from one another
SCHEMES = (*(Scheme(width=w) for w in WIDTHS), *(Scheme(width=w, encoding=name) for name, w in CODES), Scheme(width=16))


def mixed_checkpoint(model: Path, out: Path, schemes: tuple[Scheme, ...] = SCHEMES, **options: str) -> Path:
    """Quantize a model with such a plan; of a profile, only the names of units are used."""
    with TemporaryDirectory() as folder:
        profile = moqa.profile(
            model,
            texts("calib", ("wiki",)),
            Path(folder) / "profile",
            samples=2,
            context=32,
            self_samples=0,
            method="rtn",
        )
        plan = moqa.plan(profile, strategy="uniform", widths=(4,))
        units = dict(zip(plan.units, itertools.cycle(schemes), strict=False))
        plan = plan.model_copy(update={"units": units, "account": account_of(profile, units)})
        moqa.quantize(model, plan, out, method="rtn", profile=profile, overwrite=True, restart=True, **options)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(mixed_checkpoint(options.model, options.folder))
