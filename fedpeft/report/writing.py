"""The whole report in one call: ledgers in; tables to print, CSV files and figures out."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.text import Text

from fedpeft.errors import BadInput
from fedpeft.report import csv_files as sheets
from fedpeft.report import figures, tables
from fedpeft.report.comparison import compare
from fedpeft.report.summary import summarise
from fedpeft.report.terms import FEDADAPTER_LINK


def write(
    runs: Sequence[Path],
    out: Path,
    target: float | None = None,
    bandwidth: float = FEDADAPTER_LINK,
    budget: int | None = None,
    plots: bool = True,
) -> Group:
    """Report on the run folders ``runs`` into the folder ``out`` and return what to print.

    ``target``: an accuracy (share of 1) to reach; ``bandwidth``: bytes per second; ``budget``: bytes of the equal-bytes
    view; their defaults are those of ``fedpeft.report.terms.agree``. ``plots`` asks for the figures, which need
    matplotlib. Raises BadInput before anything is written when a ledger is missing or damaged, when the runs do not
    compare, or when matplotlib is asked for and missing.
    """
    if plots:
        figures.check()
    summaries = [summarise(folder) for folder in dict.fromkeys(runs)]
    compared = compare(summaries, target, bandwidth, budget)
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = sheets.save(compared, out) + (figures.save(compared, out) if plots else [])
    except FileExistsError as error:
        raise BadInput(f"{out}: is a file; the report needs a folder") from error
    except OSError as error:
        room = "make room, or choose another folder: fedpeft report --to"
        raise BadInput(f"{out}: the report cannot be written ({error.strerror}); {room}") from error
    names = ", ".join(path.name for path in written)
    more = Group(Text(), tables.equal_terms(compared)) if len(compared.lines) > 1 else Group()
    return Group(tables.comparison(compared), more, Text(f"{out}: {names}"))
