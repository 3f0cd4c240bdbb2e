"""Reports: HTML pages and charts, made only from artifacts."""

from moqa.reports.write import report

__all__ = ["report"]
