"""Reports: pictures and pages made from artifacts only."""

from moqa.report.write import write_report

__all__ = ["write_report"]
