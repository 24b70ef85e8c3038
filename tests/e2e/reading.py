"""What a run's folder and a report on_warning, read back."""

import csv
from pathlib import Path

from fedpeft.ledger import EvaluationRow, Row, RunRow
from fedpeft.ledger import read as ledger

PNG = b"\x89PNG\r\n\x1a\n"
SHEETS = ("summary.csv", "runs.csv", "curves.csv")
FIGURES = ("accuracy_over_rounds.png", "accuracy_over_megabytes.png", "accuracy_over_time.png")
SHORT = ("--set", "federation.rounds=2", "--set", "training.steps=1")


def rows_of(folder: Path) -> list[Row]:
    return ledger(folder / "ledger.jsonl")


def evaluations(folder: Path) -> list[EvaluationRow]:
    return [row for row in rows_of(folder) if isinstance(row, EvaluationRow)]


def about(folder: Path) -> RunRow:
    first = rows_of(folder)[0]
    assert isinstance(first, RunRow)
    return first


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_reported(folder: Path) -> None:
    """Assert that the CSV files have lines and the figures are figures."""
    for name in SHEETS:
        assert table(folder / name), name
    for name in FIGURES:
        assert (folder / name).read_bytes().startswith(PNG), name
