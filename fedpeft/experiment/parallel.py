"""Several runs at once, each in a process with its share of the cores, so that none waits."""

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
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, Final, final

from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.claim import on_behalf
from fedpeft.experiment.config import from_json
from fedpeft.experiment.recorder import OnProgress, Progress
from fedpeft.experiment.run import OnWarning, run_from_checkpoint, run_from_start
from fedpeft.training.hardware import Hardware

MOST: Final = 4
"""Processes at most, as each holds a model of its own."""


@final
@dataclass(frozen=True)
class Job:
    """One run to train, in a form that another process can read.

    ``settings``: its configuration as JSON. ``hardware``: the choices for this machine; None where
    the run in ``folder`` is resumed, which brings its own. ``until``: the round after which to
    stop, where that is not the last one.

    >>> Job("{}", Path("runs/mine"), hardware=None).resumes
    True
    """

    settings: str
    folder: Path
    hardware: Hardware | None
    until: int | None = None

    @property
    def resumes(self) -> bool:
        """Return whether the run goes on from its last checkpoint, not from its beginning."""
        return self.hardware is None

    def shared_by(self, count: int) -> "Job":
        """Return the job for one of ``count`` processes, with its share of the threads.

        A run that is resumed keeps the threads that it was started with.
        """
        if self.hardware is None:
            return self
        return replace(self, hardware=self.hardware.shared_by(count))


def run_job(
    job: Job, reuse: Federation | None, on_progress: OnProgress, on_warning: OnWarning
) -> Federation | None:
    """Train one run, whose folder is claimed, and return a federation for the next job to reuse."""
    if job.resumes:
        run_from_checkpoint(
            job.folder,
            reuse=reuse,
            on_progress=on_progress,
            on_warning=on_warning,
            until=job.until,
        )
        return reuse
    federation = build(from_json(job.settings), job.hardware, reuse)
    run_from_start(federation, job.folder, on_progress, until=job.until)
    return federation


def processes(jobs: int, asked: int, hardware: Hardware | None, threads_are_fixed: bool) -> int:
    """Return how many processes train so many ``jobs``: ``asked``, or where that is 0 one per core.

    Never more than there are jobs. Where it is open, one on a GPU, which they would share, and one
    where the user has fixed the number of threads.

    >>> processes(3, 8, None, False), processes(3, 0, None, False)
    (3, 1)
    """
    if asked:
        count = asked
    elif hardware is None or hardware.device != "cpu" or threads_are_fixed:
        count = 1  # ``hardware`` is None where all runs are resumed, with the threads they had
    else:
        count = min(MOST, os.cpu_count() or 1)
    return max(1, min(count, jobs))


def run_jobs(
    jobs: Sequence[Job],
    count: int,
    on_progress: Callable[[int, Progress], None],
    on_warning: OnWarning,
) -> None:
    """Train ``jobs``, whose folders are claimed, in ``count`` processes.

    ``on_progress`` is told a job's index and where its run stands. What fails in a process is
    raised here. KeyboardInterrupt ends the processes at once; their runs can be resumed.
    """
    # Spawned, not forked: a fork of a process in which torch has threads may hang.
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    stopped, stop = context.Pipe(duplex=False)  # whatever arrives in it ends the processes
    with ProcessPoolExecutor(count, context, _begin, (messages, stopped)) as pool:
        pending: set[Future[None]] = set()
        try:
            # A pool starts its processes as jobs are submitted.
            with _interrupts_held_back():
                for index, job in enumerate(jobs):
                    pending.add(pool.submit(_run_here, index, job))
            while pending:
                # A tenth of a second: bars look alive, and Ctrl-C is heard.
                done, pending = wait(pending, timeout=0.1)
                _pass_on(messages, on_progress, on_warning)
                for future in done:
                    future.result()  # raises what the job has raised
        except BrokenProcessPool as error:
            raise BadInput(
                f"--jobs {count}: a process was ended from outside, perhaps for memory; "
                "go on with --resume"
            ) from error
        except KeyboardInterrupt:
            stop.send(None)
            raise
        finally:
            _wait_for_running_jobs(pool, stop)
        _pass_on(messages, on_progress, on_warning)  # what came after the last look


def _wait_for_running_jobs(pool: ProcessPoolExecutor, stop: Connection) -> None:
    """Wait until the jobs that are under way have ended, or Ctrl-C ends them; no other begins."""
    try:
        pool.shutdown(wait=True, cancel_futures=True)
    except KeyboardInterrupt:
        stop.send(None)
        raise


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Hold back Ctrl-C in this thread for a while, and for good in processes that it starts now.

    A terminal sends Ctrl-C to these processes, too, but the parent decides what it means. On
    Windows they hear it while they start.
    """
    if sys.platform == "win32":
        yield
        return
    # A process inherits the mask of the thread that starts it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pass_on(
    messages: Any, on_progress: Callable[[int, Progress], None], on_warning: OnWarning
) -> None:
    """Pass on all that the processes have told so far: progress, and lines of warning."""
    while True:
        try:
            index, news = messages.get_nowait()
        except queue.Empty:
            return
        if isinstance(news, str):  # a line; all else is a ``Progress``
            on_warning(news)
        else:
            on_progress(index, news)


class _Here:
    """What one process keeps between its jobs.

    A pool calls a plain function for each job, and nothing that it makes outlives the call. So
    these variables are kept here, and every process has its own. ``messages``: the queue to the
    parent, which can be inherited when a process starts, but not sent with a job. ``federation``:
    the last one, so that data and model are not loaded anew for every run.
    """

    messages: Any = None
    federation: Federation | None = None


def _begin(messages: Any, stopped: Connection) -> None:
    """Remember where to report progress, and end this process when its parent ends.

    It also ends when the parent writes to ``stopped``. A run that is resumed must have one writer,
    so no process may outlive its parent. A run can be left at any instant, so nothing is tidied up.
    """
    _Here.messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it as well
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for_any([parent.sentinel, stopped])
        os._exit(1)  # of the whole process; ``sys.exit`` would end this thread alone

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_here(index: int, job: Job) -> None:
    """Train one job in this process, and tell the parent how it stands."""

    def on_progress(progress: Progress) -> None:
        _Here.messages.put((index, progress))

    def on_warning(line: str) -> None:
        _Here.messages.put((index, line))

    # The parent holds the claim; should it be killed, this lock guards the folder to the end.
    with on_behalf(job.folder):
        _Here.federation = run_job(job, _Here.federation, on_progress, on_warning)
