"""Many runs in one command: all folders are claimed and all settings tried before one trains."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.claim import claimed
from fedpeft.experiment.compare import Planned
from fedpeft.experiment.config import differences
from fedpeft.experiment.parallel import Job, processes, run_job, run_jobs
from fedpeft.experiment.recorder import CONFIG, OnProgress, Progress
from fedpeft.experiment.run import OnWarning, finished, read_settings
from fedpeft.experiment.run_folder import beginning
from fedpeft.training.hardware import Hardware


def run_all(
    runs: Sequence[Planned],
    root: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Callable[[Planned], OnProgress] = lambda _: lambda _: None,
    on_warning: OnWarning = lambda _: None,
    jobs: int = 1,
) -> list[Path]:
    """Train every run in its folder under ``root`` and return the folders.

    All folders are claimed until the end. A folder that exists raises BadInput before anything
    starts, unless ``resume``, which goes on with it, or ``overwrite``; so does one that another
    process writes. ``on_progress`` takes a run and returns what is called after each of its rounds.
    ``on_warning`` is told what the user should know of data and models, and of a damaged checkpoint
    that is passed over. ``jobs``: how many run at once, each on its share of the cores; 0 for as
    many as there are cores.
    """
    with ExitStack() as claims:
        # In one order: of two commands that want the same folders, one gets them all.
        for run in sorted(runs, key=lambda run: run.folder(root)):
            claim = _claim(run, run.folder(root), overwrite=overwrite, resume=resume)
            claims.enter_context(claim)
        federation, hardware = _check_all(runs, root, on_warning, resume=resume)
        unfinished: list[Planned] = []
        queue: list[Job] = []
        for run in runs:
            folder = run.folder(root)
            # What begins anew has hardware here. With ``overwrite`` its folder may hold an older
            # run, which is finished; that one does not count.
            if folder in hardware or not finished(folder, run.config, run.until):
                unfinished.append(run)
                queue.append(Job(run.config.to_json(), folder, hardware.get(folder), run.until))
        _run_unfinished(
            unfinished, queue, federation, jobs, on_progress, on_warning, planned=len(runs)
        )
    return [run.folder(root) for run in runs]


def _run_unfinished(
    runs: Sequence[Planned],
    queue: Sequence[Job],
    federation: Federation | None,
    asked: int,
    on_progress: Callable[[Planned], OnProgress],
    on_warning: OnWarning,
    *,
    planned: int,
) -> None:
    """Train ``runs``, each of which has its job in ``queue``: in turn, or ``asked`` at once.

    ``federation``: one that has been built, whose data and model are taken over. ``planned``: how
    many runs there are with those that are finished.
    """
    hardware = None if federation is None else federation.hardware
    threads_are_fixed = any(run.config.machine.threads for run in runs)  # 0 leaves them open
    count = processes(len(queue), asked, hardware, threads_are_fixed)
    # Threads as if nothing were finished: so a command that is resumed ends in the same bits.
    among = processes(planned, asked, hardware, threads_are_fixed)
    shares = [job.shared_by(among) for job in queue]
    if count == 1:
        # In this process each run takes over the data and the model of the one before.
        for run, job in zip(runs, shares, strict=True):
            federation = run_job(job, federation, on_progress(run), on_warning)
        return

    watchers = [on_progress(run) for run in runs]

    def pass_on(index: int, progress: Progress) -> None:
        watchers[index](progress)

    run_jobs(shares, count, pass_on, on_warning)


def _claim(
    run: Planned,
    folder: Path,
    *,
    overwrite: bool,
    resume: bool,
) -> AbstractContextManager[None]:
    """Return the claim on the folder of ``run``; none where it is finished and left as it is.

    Raises BadInput where a run that is to be resumed was made with other settings.
    """
    if not (resume and (folder / CONFIG).exists()):
        return beginning(folder, overwrite=overwrite or resume)
    recorded = json.loads(read_settings(folder)[0].to_json())
    now = json.loads(run.config.to_json())
    if recorded != now:
        # The first is enough: with another method or version there may be dozens.
        difference = next(differences(recorded, now))
        raise BadInput(
            f"{folder}: was made with other settings ({difference}); "
            "remove it, or choose another name"
        )
    return nullcontext() if finished(folder, run.config, run.until) else claimed(folder)


def _check_all(
    runs: Sequence[Planned], root: Path, on_warning: OnWarning, *, resume: bool
) -> tuple[Federation | None, dict[Path, Hardware]]:
    """Raise BadInput now for what would stop any of ``runs`` after others have trained.

    Their folders are claimed. ``on_warning`` is told, once each, what the user should know of data
    and models. Returns the federation that was built last, and the hardware choices by folder of
    all runs that begin anew.
    """
    federation: Federation | None = None
    hardware: dict[Path, Hardware] = {}
    fitting_labels: set[str] = set()  # labels of runs whose method is known to fit the model
    told_notes: set[str] = set()
    for run in runs:
        folder = run.folder(root)
        if resume and (folder / CONFIG).exists():
            continue  # it was checked when it was started, and brings its hardware choices
        federation = build(run.config, reuse=federation)
        hardware[folder] = federation.hardware
        for note in federation.notes:
            if note not in told_notes:
                on_warning(note)
                told_notes.add(note)
        # Once a label, not once a seed: the start of some methods takes an SVD of every layer.
        if run.label not in fitting_labels:
            federation.first_state()  # fails where the method does not fit the model
            fitting_labels.add(run.label)
    return federation, hardware
