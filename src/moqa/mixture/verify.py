"""Check every byte of a mixture."""

from pathlib import Path

from moqa.errors import MoqaError
from moqa.format.adjustment import check_fits, read_adjustment
from moqa.format.reader import read_checkpoint
from moqa.mixture.load import open_mixture
from moqa.mixture.record import MixtureRecord, check_router, read_mixture
from moqa.runtime.verify import verify


def verify_mixture(folder: str | Path) -> tuple[MixtureRecord, list[str]]:
    """Compare all files of a mixture with their recorded hashes, and load it.

    >>> record, faults = verify_mixture("runs/mix")  # doctest: +SKIP

    Returns:
        Its manifest, and one line for everything that is wrong.

    Raises:
        MoqaError: if it has no readable manifest.
    """
    folder = Path(folder)
    record, faults = read_mixture(folder), list[str]()
    try:
        check_router(folder, record)
    except MoqaError as error:
        faults.append(str(error))
    for name, variant in record.variants.items():
        try:
            if variant.of is None:
                found = verify(folder / name)
                faults += found.faults
                checksum = found.checkpoint.manifest.checksum
            else:
                adjustment = read_adjustment(folder / name)
                check_fits(adjustment, read_checkpoint(folder / variant.of))
                checksum = adjustment.record.checksum
            if checksum != variant.checksum:
                faults.append(f"{folder / name} is not the variant that the router was trained for")
        except MoqaError as error:
            faults.append(str(error))
    if not faults:
        open_mixture(folder, kernels="reference")
    return record, faults
