"""What a run records about itself: the ledger's rows, its file, and the meter that measures."""

from fedpeft.ledger.file import FILE, Ledger, read, stream
from fedpeft.ledger.meter import Measurement, measured
from fedpeft.ledger.rows import (
    COUNTS,
    MEASURED,
    REALS,
    ClientRow,
    EvaluationRow,
    Measured,
    PrivacyRow,
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
    "PrivacyRow",
    "Row",
    "RunRow",
    "measured",
    "read",
    "stream",
    "to_json",
]
