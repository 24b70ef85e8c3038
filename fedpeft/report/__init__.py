"""Reports: what runs reached, and what it cost them, from their ledgers alone."""

from fedpeft.report.terms import check
from fedpeft.report.writing import write

__all__ = ["check", "write"]
