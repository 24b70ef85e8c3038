"""The tables in docs/results.md whose ledgers are kept are what the ledgers say."""

import io
import tarfile
from pathlib import Path

from rich.console import Console

from fedpeft.experiment.run_folder import runs_in
from fedpeft.report import write

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_table_of_tuned_methods_is_what_its_ledgers_say(tmp_path: Path) -> None:
    with tarfile.open(ROOT / "docs" / "results" / "banking77_tuned.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    tables = write(runs_in(tmp_path / "banking77_tuned-compare"), tmp_path / "report", plots=False)
    printed = io.StringIO()
    Console(width=200, file=printed).print(tables)
    lines = [line.strip() for line in printed.getvalue().splitlines()]
    rows = [line for line in lines if " ± " in line]
    assert len(rows) >= 20  # ten methods in two tables
    for row in rows:
        assert row in PAGE
