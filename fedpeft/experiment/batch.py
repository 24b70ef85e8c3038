"""Many runs in one command: all their folders are claimed and all settings tried before the first of them trains."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from fedpeft.experiment import parallel
from fedpeft.experiment.build import Assembly, assemble
from fedpeft.experiment.claim import claimed
from fedpeft.experiment.compare import Planned
from fedpeft.experiment.config import differences
from fedpeft.experiment.parallel import Job, processes
from fedpeft.experiment.recorder import CONFIG, Watch
from fedpeft.experiment.run import Say, finished, read_settings, run_from_checkpoint, run_from_start
from fedpeft.experiment.run_folder import beginning
from fedpeft.training.hardware import Hardware
from fedpeft.types import BadInput


def play(
    runs: Sequence[Planned],
    root: Path,
    *,
    overwrite: bool = False,
    go_on: bool = False,
    watch: Callable[[Planned], Watch] = lambda _: lambda _: None,
    say: Say = lambda _: None,
    jobs: int = 1,
) -> list[Path]:
    """Play every run in its folder under ``root`` and return the folders.

    ``go_on`` resumes what is there; without it, and without ``overwrite``, a folder that exists raises BadInput before
    anything starts, and so does any that another process writes. All are claimed until the end. ``say`` is told of a
    damaged checkpoint that is passed over. ``jobs``: how many run at once, each on its share of the cores; 0 for as many
    as the machine has cores.
    """
    with ExitStack() as claims:
        for run in sorted(runs, key=lambda run: run.folder(root)):  # in one order: of two commands one gets them all
            claims.enter_context(_claim(run, run.folder(root), overwrite=overwrite, go_on=go_on))
        last, hardware = _at_the_door(runs, root, say, go_on=go_on)
        left = [run for run in runs if _is_left(run, run.folder(root), hardware)]
        planned = [Job(run.config.to_json(), run.folder(root), hardware.get(run.folder(root))) for run in left]
        _play_jobs(left, planned, last, jobs, watch, say)
    return [run.folder(root) for run in runs]


def _is_left(run: Planned, folder: Path, anew: Mapping[Path, Hardware]) -> bool:
    """Return whether ``run`` is still to be played: from its beginning (``anew``), or on from where it ended."""
    return folder in anew or not finished(folder, run.config)


def _play_jobs(
    left: Sequence[Planned],
    planned: Sequence[Job],
    last: Assembly | None,
    asked: int,
    watch: Callable[[Planned], Watch],
    say: Say,
) -> None:
    """Play the runs that are ``left``, as ``planned``: one after another, or ``asked`` at once."""
    fixed = any(run.config.machine.threads for run in left)
    count = processes(planned, asked, last and last.hardware, fixed)
    if count > 1:
        shares = [replace(job, hardware=job.hardware and job.hardware.shared_by(count)) for job in planned]
        watches = [watch(run) for run in left]
        parallel.play(shares, count, lambda number, progress: watches[number](progress), say)
        return
    for run, job in zip(left, planned, strict=True):
        if job.hardware is None:
            run_from_checkpoint(job.folder, like=last, watch=watch(run), say=say)
        else:
            last = assemble(run.config, job.hardware, last)
            run_from_start(last, job.folder, watch(run))


def _claim(run: Planned, folder: Path, *, overwrite: bool, go_on: bool) -> AbstractContextManager[None]:
    """Return the claim on the folder of ``run``; none where it is finished already and left as it is."""
    if not (go_on and (folder / CONFIG).exists()):
        return beginning(folder, overwrite=overwrite or go_on)
    found = json.loads(read_settings(folder)[0].to_json())
    now = json.loads(run.config.to_json())
    if found != now:
        apart = next(differences(found, now))
        raise BadInput(f"{folder}: was made with other settings ({apart}); remove it, or choose another name")
    return nullcontext() if finished(folder, run.config) else claimed(folder)


def _at_the_door(
    runs: Sequence[Planned], root: Path, say: Say, *, go_on: bool
) -> tuple[Assembly | None, dict[Path, Hardware]]:
    """Raise BadInput for what would stop any of ``runs``, whose folders are claimed, after others have trained.

    ``say`` is told, once each, what the user should know of data and models.

    Returns the last that was assembled, and the choices for this machine by folder of all that begin anew.
    """
    assembly: Assembly | None = None
    hardware: dict[Path, Hardware] = {}
    fitting: set[str] = set()
    said: set[str] = set()
    for run in runs:
        if go_on and (run.folder(root) / CONFIG).exists():
            continue
        assembly = assemble(run.config, like=assembly)
        hardware[run.folder(root)] = assembly.hardware
        for note in assembly.notes:
            if note not in said:
                say(note)
                said.add(note)
        if run.label not in fitting:
            assembly.first_state()  # fails where the method does not fit the model
            fitting.add(run.label)
    return assembly, hardware
