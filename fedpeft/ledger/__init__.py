"""What a run writes down about itself: its rows, the file that holds them, and the meter that fills them in."""

from fedpeft.ledger.book import FILE, Ledger, read, stream
from fedpeft.ledger.meter import Measurement, measured
from fedpeft.ledger.rows import MEASURED, ClientRow, EvaluationRow, Row, RunRow

__all__ = [
    "FILE",
    "MEASURED",
    "ClientRow",
    "EvaluationRow",
    "Ledger",
    "Measurement",
    "Row",
    "RunRow",
    "measured",
    "read",
    "stream",
]
