"""Reports: pictures and pages made from artifacts only."""

from moqa.reports.write import report

__all__ = ["report"]
