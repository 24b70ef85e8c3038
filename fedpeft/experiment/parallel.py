"""Several runs at once, each in a process with its share of the cores, so that none waits for another's odd jobs."""

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as ended
from pathlib import Path
from typing import Any, Final, final

from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.claim import on_behalf
from fedpeft.experiment.config import from_json
from fedpeft.experiment.recorder import Progress
from fedpeft.experiment.run import OnWarning, run_from_checkpoint, run_from_start
from fedpeft.training.hardware import Hardware

MOST: Final = 4
"""Processes at most, as each holds a model of its own."""


@final
@dataclass(frozen=True)
class Job:
    """A run to be: its settings as JSON, its folder, and the choices for this machine; None goes on with what is there."""

    settings: str
    folder: Path
    hardware: Hardware | None


def processes(jobs: Sequence[Job], asked: int, hardware: Hardware | None, fixed: bool) -> int:
    """Return how many processes play ``jobs``: as many as ``asked``, or where that is 0 as many as there are cores.

    One on a GPU, which they would share, and where the number of threads was ``fixed`` by the user.
    """
    alone = hardware is None or hardware.device != "cpu" or fixed
    return max(1, min(asked or (1 if alone else min(MOST, os.cpu_count() or 1)), len(jobs)))


def play(
    jobs: Sequence[Job],
    count: int,
    on_progress: Callable[[int, Progress], None],
    on_warning: OnWarning,
) -> None:
    """Play ``jobs`` in ``count`` processes; ``on_progress`` is told of a job's number and progress.

    What fails is raised. The caller has claimed the folders. KeyboardInterrupt ends the processes
    at once; their runs can be resumed.
    """
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    stopped, stop = context.Pipe(duplex=False)
    with ProcessPoolExecutor(count, context, _begin, (told, stopped)) as pool:
        try:
            with _interrupts_held_back():
                tasks = [pool.submit(_play, number, job) for number, job in enumerate(jobs)]
            under_way: set[Future[None]] = set(tasks)
            while under_way:
                done, under_way = wait(under_way, timeout=0.1)
                _pass_on(told, on_progress, on_warning)
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise BadInput(
                f"--jobs {count}: a process was ended from outside, perhaps for memory; go on with --resume"
            ) from error
        except KeyboardInterrupt:
            stop.send(None)
            raise
        finally:
            _wait_for_the_rest(pool, stop)
        _pass_on(told, on_progress, on_warning)


def _wait_for_the_rest(pool: ProcessPoolExecutor, stop: Connection) -> None:
    """Wait until the jobs that are under way have ended, or Ctrl-C ends them; no other begins."""
    try:
        pool.shutdown(wait=True, cancel_futures=True)
    except KeyboardInterrupt:
        stop.send(None)
        raise


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Hold back Ctrl-C in this thread for a while, and for good in processes that it starts now.

    A terminal sends Ctrl-C to them, too, and it is for the parent to decide. On Windows they hear
    it while they start.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pass_on(
    told: Any, on_progress: Callable[[int, Progress], None], on_warning: OnWarning
) -> None:
    while True:
        try:
            number, news = told.get_nowait()
        except queue.Empty:
            return
        on_warning(news) if isinstance(news, str) else on_progress(number, news)


class _Here:
    """What a process keeps between its runs."""

    told: Any = None
    last: Federation | None = None


def _begin(told: Any, stopped: Connection) -> None:
    """Remember where to tell of progress; end with the parent, or when it says so by ``stopped``.

    A run that is resumed must have one writer. It can be left at any instant: nothing is tidied up.
    """
    _Here.told = told
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it as well
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        ended([parent.sentinel, stopped])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _play(number: int, job: Job) -> None:
    def on_progress(progress: Progress) -> None:
        _Here.told.put((number, progress))

    def on_warning(line: str) -> None:
        _Here.told.put((number, line))

    with on_behalf(job.folder):
        if job.hardware is None:
            run_from_checkpoint(
                job.folder, reuse=_Here.last, on_progress=on_progress, on_warning=on_warning
            )
        else:
            _Here.last = build(from_json(job.settings), job.hardware, _Here.last)
            run_from_start(_Here.last, job.folder, on_progress)
