"""Reports: what runs reached, and what it cost them, from their ledgers alone."""

from fedpeft.report.metric import Metric
from fedpeft.report.terms import check
from fedpeft.report.writing import write

__all__ = ["Metric", "check", "write"]
