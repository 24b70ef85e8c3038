"""Ctrl-C: a command ends with one line that says how to go on."""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

INTERRUPTED: Final = 130
"""The exit code of a command ended by Ctrl-C, as in shells: 128 and the number of the signal."""


class Stopped(Exception):
    """Ctrl-C has ended a command; one line that says how to go on."""


@contextmanager
def stoppable(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Raise ``Stopped`` where Ctrl-C ends what is in the ``with``."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped; {how_to_go_on()}") from error


@contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end what is in the ``with`` as Ctrl-C does, so that it is put in order."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def resume_one(run: Path) -> str:
    """Return how to go on with the run in a folder."""
    if not (run / "config.json").exists():  # by its name: importing it would take seconds
        return "nothing was written"
    return f"go on with: {shlex.join(['fedpeft', 'resume', str(run)])}"


def resume_all() -> str:
    """Return how to go on with a command of many runs: as it was typed, with ``--resume``."""
    # With ``--overwrite`` again, what has been trained so far would be lost.
    typed = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return f"go on with: {shlex.join(['fedpeft', *typed, '--resume'])}"
