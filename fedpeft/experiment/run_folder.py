"""What a run's folder holds: what of it is ours, may a run begin there, how is it cleared."""

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
REPORT: Final = "report"
"""The folder of the run's own report."""

_FILES: Final = frozenset({CONFIG, HARDWARE, LABELS, FILE, *LOCKS})
_REPORTED: Final = frozenset(
    {
        "summary.csv",
        "runs.csv",
        "curves.csv",
        "accuracy_over_rounds.png",
        "accuracy_over_megabytes.png",
        "accuracy_over_time.png",
    }
)


@contextmanager
def beginning(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Claim ``folder`` for a run that is about to begin, before anything slow is done for it.

    Raises BadInput where ``refuse_existing`` does, and where another process writes the folder.
    Where no run begins in the end, no folder is left behind.
    """
    refuse_existing(folder, overwrite)  # first: not even a lock gets into a folder of the user's
    with claimed(folder):
        refuse_existing(folder, overwrite)  # and again, as it may have become a run in between
        yield


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise BadInput where ``folder`` exists; with ``overwrite``, where it holds what is no run's.

    What a command left that was killed before it wrote anything does not count as a folder.
    """
    if not folder.exists() or never_begun(folder):
        return
    if not overwrite:
        raise BadInput(f"{folder}: exists; resume it, choose another name, or give --overwrite")
    if not folder.is_dir():
        raise BadInput(f"{folder}: is a file; choose another name")
    foreign: list[Path] = []
    with suppress(FileNotFoundError):  # removed this very moment, by a start that has failed
        foreign = [path for path in _contents(folder) if not _is_ours(path, folder)]
    if foreign:
        raise BadInput(
            f"{folder}: holds {str(foreign[0].relative_to(folder))!r}, which no run has put there, "
            "and is not overwritten; move that away, or choose another name"
        )


def clear(folder: Path) -> None:
    """Remove what a run has put into ``folder``, and nothing else. OSError as the disk gives it."""
    ours = [path for path in _contents(folder) if _is_ours(path, folder) and path.name not in LOCKS]
    # First the settings, which make it a run; last hardware.json, which tells that they are ours.
    for path in sorted(ours, key=lambda path: (path.name != CONFIG, path.name == HARDWARE)):
        path.unlink()
    for name in (CHECKPOINTS, REPORT):
        with suppress(OSError):  # not there, or a hidden file is still in it
            (folder / name).rmdir()


def check_is_run(folder: Path) -> None:
    """Raise BadInput, which names the runs that are near, where ``folder`` holds none."""
    if (folder / CONFIG).exists():
        return
    inside, beside = _named(folder), _named(folder.parent)
    near = f"runs in it: {inside}" if inside else f"runs beside it: {beside or 'none'}"
    raise BadInput(f"{folder}: holds no run; {near}")


def _named(place: Path) -> str:
    """Return the folders in ``place`` that hold a run, as a list to print."""
    return ", ".join(sorted(str(path.parent) for path in place.glob(f"*/{HARDWARE}")))


def runs_in(folder: Path) -> list[Path]:
    """Return the run folders that ``folder`` is or holds; itself if there is none, for errors."""
    if (folder / FILE).exists():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{FILE}")) or [folder]


def _contents(folder: Path) -> Iterator[Path]:
    """Yield what is in a run's folder and in its checkpoints and report, but hidden files."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.name in (CHECKPOINTS, REPORT) and path.is_dir():
            yield from (inner for inner in sorted(path.iterdir()) if not inner.name.startswith("."))
        else:
            yield path


def _is_ours(path: Path, folder: Path) -> bool:
    """Return whether a file in a run's folder has a name that runs give."""
    if path.parent != folder:
        inside = checkpoint.is_ours if path.parent.name == CHECKPOINTS else _REPORTED.__contains__
        return inside(path.name)
    if path.name == CONFIG:  # an exported model has one, too, but knows no hardware
        return (folder / HARDWARE).exists()
    return path.name.removesuffix(".tmp") in _FILES
