"""What a run writes down about itself: its rows, the file that holds them, and the meter that fills them in."""

from fedpeft.ledger.file import FILE, Ledger, read, stream
from fedpeft.ledger.meter import Measurement, measured
from fedpeft.ledger.rows import (
    COUNTS,
    MEASURED,
    REALS,
    ClientRow,
    EvaluationRow,
    Measured,
    Row,
    RunRow,
    to_json,
)

__all__ = [
    "COUNTS",
    "FILE",
    "MEASURED",
    "REALS",
    "ClientRow",
    "EvaluationRow",
    "Ledger",
    "Measured",
    "Measurement",
    "Row",
    "RunRow",
    "measured",
    "read",
    "stream",
    "to_json",
]
