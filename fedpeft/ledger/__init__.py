"""What a run records about itself: the ledger's rows, its file, and the meter that measures."""

from fedpeft.ledger.file import FILE, Ledger, read, stream
from fedpeft.ledger.follow import Follower
from fedpeft.ledger.meter import Measurement, measured
from fedpeft.ledger.rows import (
    COUNTS,
    DROPPED,
    LATE,
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
    "DROPPED",
    "FILE",
    "LATE",
    "MEASURED",
    "REALS",
    "ClientRow",
    "EvaluationRow",
    "Follower",
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
