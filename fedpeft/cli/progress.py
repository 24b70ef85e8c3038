"""Progress on a terminal: a bar per run with round, score, megabytes and the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bars(out: Console) -> Iterator[Callable[[str], Callable[[Any], None]]]:
    """Show one progress bar per run on a terminal, and nothing elsewhere.

    Yields a function that takes the name of a run, adds its bar, and returns what is to be called
    with the run's ``Progress`` after every round.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stand]}"),
        TimeRemainingColumn(),
    )
    # In a file or a pipe, bars would be line after line of control characters.
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:

        def watcher(name: str) -> Callable[[Any], None]:
            task = bar.add_task(name, total=None, stand="")  # the number of rounds comes later

            def watch(progress: Any) -> None:
                stand = f"{progress.bytes / 1e6:.1f} MB"
                if progress.score is not None:
                    stand = f"{progress.metric} {progress.score:.3f}  {stand}"
                bar.update(task, completed=progress.round, total=progress.rounds, stand=stand)

            return watch

        yield watcher
