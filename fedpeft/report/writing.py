"""The whole report in one call: ledgers in; tables to print, CSV files and figures out."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from fedpeft.errors import BadInput
from fedpeft.report import csv_files, figures, tables
from fedpeft.report.comparison import Comparison, compare
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

    ``target``: a score to reach in the runs' metric, such as an accuracy as a share of 1;
    ``bandwidth``: bytes per second; ``budget``: bytes of the equal-bytes view; their defaults are
    those of ``fedpeft.report.terms.agree``. ``plots`` asks for the figures, which need matplotlib.
    Raises BadInput before anything is written when a ledger is missing or damaged, when the runs do
    not compare, or when matplotlib is asked for and missing.
    """
    if plots:
        figures.check()
    summaries = [summarise(folder) for folder in dict.fromkeys(runs)]
    # All that can be refused is refused before the first file is written.
    compared = compare(summaries, target, bandwidth, budget)
    written = _save(compared, out, plots)
    files = ", ".join(path.name for path in written)
    shown: list[RenderableType] = [tables.comparison(compared)]
    if len(compared.lines) > 1:
        shown += [Text(), tables.equal_terms(compared)]
    devices = tables.devices(compared)
    if devices is not None:
        shown += [Text(), devices]
    return Group(*shown, Text(f"{out}: {files}"))


def _save(compared: Comparison, out: Path, plots: bool) -> list[Path]:
    """Write the CSV files and, if asked for, the figures; errors of the disk raise BadInput."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = csv_files.save(compared, out)
        if plots:
            written += figures.save(compared, out)
    except FileExistsError as error:
        raise BadInput(f"{out}: is a file; the report needs a folder") from error
    except OSError as error:
        advice = "make room, or choose another folder: fedpeft report --to"
        raise BadInput(
            f"{out}: the report cannot be written ({error.strerror}); {advice}"
        ) from error
    return written
