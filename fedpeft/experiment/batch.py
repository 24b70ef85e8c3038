"""Many runs in one command: folders are claimed and settings tried before the first one trains."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from fedpeft.errors import BadInput
from fedpeft.experiment import parallel
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.claim import claimed
from fedpeft.experiment.compare import Planned
from fedpeft.experiment.config import differences
from fedpeft.experiment.parallel import Job, processes
from fedpeft.experiment.recorder import CONFIG, OnProgress
from fedpeft.experiment.run import (
    OnWarning,
    finished,
    read_settings,
    run_from_checkpoint,
    run_from_start,
)
from fedpeft.experiment.run_folder import beginning
from fedpeft.training.hardware import Hardware


def play(
    runs: Sequence[Planned],
    root: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Callable[[Planned], OnProgress] = lambda _: lambda _: None,
    on_warning: OnWarning = lambda _: None,
    jobs: int = 1,
) -> list[Path]:
    """Play every run in its folder under ``root`` and return the folders.

    ``resume`` resumes what is there; without it, and without ``overwrite``, a folder that exists
    raises BadInput before anything starts, and so does any that another process writes. All are
    claimed until the end. ``say`` is told of a damaged checkpoint that is passed over. ``jobs``:
    how many run at once, each on its share of the cores; 0 for as many as the machine has cores.
    """
    with ExitStack() as claims:
        # All commands claim in one order, so that of two that come at once one gets all it wants.
        for run in sorted(runs, key=lambda run: run.folder(root)):
            claims.enter_context(_claim(run, run.folder(root), overwrite=overwrite, resume=resume))
        last, hardware = _at_the_door(runs, root, on_warning, resume=resume)
        left = [run for run in runs if _is_left(run, run.folder(root), hardware)]
        planned = [_job(run, run.folder(root), hardware) for run in left]
        _play_jobs(left, planned, last, jobs, on_progress, on_warning)
    return [run.folder(root) for run in runs]


def _is_left(run: Planned, folder: Path, anew: Mapping[Path, Hardware]) -> bool:
    """Return whether ``run`` is to be played: ``anew``, or on from where it ended."""
    return folder in anew or not finished(folder, run.config)


def _job(run: Planned, folder: Path, anew: Mapping[Path, Hardware]) -> Job:
    return Job(run.config.to_json(), folder, anew.get(folder))


def _play_jobs(
    left: Sequence[Planned],
    planned: Sequence[Job],
    last: Federation | None,
    asked: int,
    on_progress: Callable[[Planned], OnProgress],
    on_warning: OnWarning,
) -> None:
    """Play the runs that are ``left``, as ``planned``: one after another, or ``asked`` at once."""
    fixed = any(run.config.machine.threads for run in left)
    count = processes(planned, asked, last and last.hardware, fixed)
    if count > 1:
        shares = [_shared(job, count) for job in planned]
        watches = [on_progress(run) for run in left]
        parallel.play(shares, count, lambda number, progress: watches[number](progress), on_warning)
        return
    for run, job in zip(left, planned, strict=True):
        if job.hardware is None:
            run_from_checkpoint(
                job.folder, reuse=last, on_progress=on_progress(run), on_warning=on_warning
            )
        else:
            last = build(run.config, job.hardware, last)
            run_from_start(last, job.folder, on_progress(run))


def _shared(job: Job, count: int) -> Job:
    """Return ``job`` with its share of the threads; what is resumed keeps those that it had."""
    if job.hardware is None:
        return job
    return replace(job, hardware=job.hardware.shared_by(count))


def _claim(
    run: Planned,
    folder: Path,
    *,
    overwrite: bool,
    resume: bool,
) -> AbstractContextManager[None]:
    """Return the claim on the folder of ``run``; none where it is finished and left as it is."""
    if not (resume and (folder / CONFIG).exists()):
        return beginning(folder, overwrite=overwrite or resume)
    found = json.loads(read_settings(folder)[0].to_json())
    now = json.loads(run.config.to_json())
    if found != now:
        apart = next(differences(found, now))
        remedy = "remove it, or choose another name"
        raise BadInput(f"{folder}: was made with other settings ({apart}); {remedy}")
    return nullcontext() if finished(folder, run.config) else claimed(folder)


def _at_the_door(
    runs: Sequence[Planned],
    root: Path,
    on_warning: OnWarning,
    *,
    resume: bool,
) -> tuple[Federation | None, dict[Path, Hardware]]:
    """Raise BadInput for what would stop any of ``runs`` after others have trained.

    ``say`` is told, once each, what the user should know of data and models. The folders are
    claimed. Returns the last that was assembled, and by folder the choices for this machine of all
    that begin anew.
    """
    assembly: Federation | None = None
    hardware: dict[Path, Hardware] = {}
    fitting: set[str] = set()
    said: set[str] = set()
    for run in runs:
        if resume and (run.folder(root) / CONFIG).exists():
            continue
        assembly = build(run.config, reuse=assembly)
        hardware[run.folder(root)] = assembly.hardware
        for note in assembly.notes:
            if note not in said:
                on_warning(note)
                said.add(note)
        if run.label not in fitting:
            assembly.first_state()  # fails where the method does not fit the model
            fitting.add(run.label)
    return assembly, hardware
