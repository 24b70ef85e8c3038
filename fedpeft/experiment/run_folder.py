"""What a run's folder holds, whether a run may begin there, and how it is cleared for a new one.

::

    runs/mine/
      config.json            the settings, with every default, as they were when the run was started
      hardware.json          what was resolved automatically for the machine
      labels.json            the names of the labels, in their order
      sites.json             of a run on sites, what the server knows of them
      now.json               of a run on sites, who is there and who has answered, as of now
      ledger.jsonl           the run, then every reply and every evaluation: a row a line
      checkpoints/           the last two of them
        000012.json          after 12 rounds: digests of its files, and how long the ledger was
        000012.state         what the server keeps: tensors, and the version of each client's memory
        client-3-000011.memory    what client 3 keeps for itself, as round 11 left it
      report/                the run's own report
        summary.csv, runs.csv, curves.csv, and devices.csv with a fleet
        accuracy_over_rounds.png, ..._megabytes.png, ..._time.png, called after the metric
      writer.lock            while a command writes the folder; see claim.py
      process.lock           while a process of ``--jobs`` does

A file that ends in ``.tmp`` was being written when a crash came. A folder is a run's if it has both
``config.json`` and ``hardware.json``: an exported model has a ``config.json``, too.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fedpeft.errors import BadInput
from fedpeft.experiment.claim import LOCKS, claimed, never_begun
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG
from fedpeft.federation import checkpoint
from fedpeft.ledger import FILE

HARDWARE: Final = "hardware.json"
"""What was resolved automatically for the machine."""
LABELS: Final = "labels.json"
"""The names of the labels, in their order."""
SITES: Final = "sites.json"
"""What the server knows of its sites, in a run on sites."""
NOW: Final = "now.json"
"""Who is there and who has answered, in a run on sites, for those who watch it."""
REPORT: Final = "report"
"""The folder of the run's own report."""

_FILES: Final = frozenset({CONFIG, HARDWARE, LABELS, SITES, NOW, FILE, *LOCKS})
_REPORTED: Final = re.compile(
    r"(summary|runs|curves|devices)\.csv|[\w-]+_over_(rounds|megabytes|time)\.png"
)


@contextmanager
def beginning(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Claim ``folder`` for a run that is about to begin, before anything slow is done for it.

    Raises BadInput where ``refuse_existing`` does, and where another process writes the folder.
    Where no run begins in the end, no folder is left behind.
    """
    # First without a claim, so that not even a lock gets into a folder of the user's;
    # and again with it, as the folder may have become a run in between.
    refuse_existing(folder, overwrite)
    with claimed(folder):
        refuse_existing(folder, overwrite)
        yield


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise BadInput where ``folder`` exists; with ``overwrite``, where it holds foreign files.

    A folder with nothing but the locks of a killed command counts as none.
    """
    if not folder.exists() or never_begun(folder):
        return
    if not overwrite:
        raise BadInput(f"{folder}: exists; resume it, choose another name, or give --overwrite")
    if not folder.is_dir():
        raise BadInput(f"{folder}: is a file; choose another name")
    with suppress(FileNotFoundError):  # removed this very moment, by a start that has failed
        for path in _contents(folder):
            if not _is_ours(path, folder):
                raise BadInput(
                    f"{folder}: holds {str(path.relative_to(folder))!r}, which no run has put "
                    "there, and is not overwritten; move that away, or choose another name"
                )


def clear(folder: Path) -> None:
    """Remove what runs have put into ``folder``; what is not ours stays.

    Raises OSError as the disk gives it.
    """

    def order(path: Path) -> int:
        # The settings, which make it a run, go first; the file that tells they are ours goes last.
        return {CONFIG: 0, HARDWARE: 2}.get(path.name, 1)

    ours: list[Path] = []
    for path in _contents(folder):
        if _is_ours(path, folder) and path.name not in LOCKS:  # the locks guard it still
            ours.append(path)
    for path in sorted(ours, key=order):
        path.unlink()
    for name in (CHECKPOINTS, REPORT):
        with suppress(OSError):  # not there, or a hidden file is still in it
            (folder / name).rmdir()


def check_is_run(folder: Path) -> None:
    """Raise BadInput, which names the runs that are near, where ``folder`` holds none."""
    if (folder / CONFIG).exists():
        return
    inside = _list_of_runs(folder)
    beside = _list_of_runs(folder.parent)
    near = f"runs in it: {inside}" if inside else f"runs beside it: {beside or 'none'}"
    raise BadInput(f"{folder}: holds no run; {near}")


def _list_of_runs(parent: Path) -> str:
    """Return the folders in ``parent`` that hold a run, as a list to print."""
    return ", ".join(sorted(str(path.parent) for path in parent.glob(f"*/{HARDWARE}")))


def runs_in(folder: Path) -> list[Path]:
    """Return the run folders that ``folder`` is or holds, sorted.

    The folder itself where there is none, for an error to name.
    """
    if (folder / FILE).exists():
        return [folder]
    runs = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    return runs or [folder]


def _contents(folder: Path) -> Iterator[Path]:
    """Yield what is in a run's folder, its checkpoints and its report, without hidden files."""
    for path in _visible(folder):
        if path.name in (CHECKPOINTS, REPORT) and path.is_dir():
            yield from _visible(path)
        else:
            yield path


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_ours(path: Path, folder: Path) -> bool:
    """Return whether a file in a run's folder has a name that runs give."""
    if path.parent != folder:  # in one of the two folders inside
        if path.parent.name == CHECKPOINTS:
            return checkpoint.is_ours(path.name)
        return _REPORTED.fullmatch(path.name) is not None
    if path.name == CONFIG:  # an exported model has one, too, but knows no hardware
        return (folder / HARDWARE).exists()
    return path.name.removesuffix(".tmp") in _FILES
