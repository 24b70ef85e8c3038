"""``--log``: how long-lived commands write what happens."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, final

from fedpeft.deployment.telling import JsonLog, Say, Tell, in_lines


class Log(Protocol):
    """Where a command says lines and tells of events."""

    @property
    def say(self) -> Say:
        """Return what takes a line."""
        ...

    @property
    def tell(self) -> Tell:
        """Return what takes an event with its fields."""
        ...


@final
@dataclass(frozen=True)
class _Lines:
    """Lines alone."""

    say: Say
    tell: Tell


def log_of(form: str, program: str, say: Say) -> Log:
    """Return the log of a ``program`` in a ``form``: ``lines``, which ``say`` gets, or ``json``."""
    forms: dict[str, Callable[[], Log]] = {
        "lines": lambda: _Lines(say, in_lines(say)),
        "json": lambda: JsonLog(program, _write),
    }
    return forms[form]()


def _write(line: str) -> None:
    # Not through rich, which would break long lines; at once, as others read it as it comes.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def round_lines(tell: Tell) -> Callable[[str], Callable[[Any], None]]:
    """Return what takes the name of a run, and gives what tells of each of its rounds."""

    def watcher(name: str) -> Callable[[Any], None]:
        def watch(progress: Any) -> None:
            score = "" if progress.score is None else f", {progress.metric} {progress.score:.3f}"
            size = f"{progress.bytes / 1e6:.1f} MB"
            tell(
                "round",
                f"{name}: round {progress.round} of {progress.rounds}{score}, {size}",
                run=name,
                round=progress.round,
                rounds=progress.rounds,
                metric=progress.metric,
                score=progress.score,
                bytes=progress.bytes,
            )

        return watch

    return watcher
