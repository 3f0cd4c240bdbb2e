"""`rtn`: round to nearest on the grid with the least squared error. Needs no data."""

from moqa.methods.grid import fit_grid
from moqa.methods.registry import Job, Result, method


@method("rtn", needs_data=False)
def rtn(job: Job) -> Result:
    """Clip-searched, least-squares refitted grid per group, then plain rounding."""
    found = fit_grid(job.weights, job.scheme, job.widths)
    return Result(found.integers, found.grid)
