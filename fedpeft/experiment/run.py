"""One run in one folder: start it, run its rounds, evaluate, save, and resume it after a crash."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from fedpeft.engines import launch
from fedpeft.engines.pool import ClientPool
from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.claim import claimed
from fedpeft.experiment.config import Config, from_json
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG, OnProgress, settings_digests
from fedpeft.experiment.rounds import drawn, run_rounds
from fedpeft.experiment.run_folder import HARDWARE, LABELS, beginning, check_is_run, clear
from fedpeft.experiment.server_side import ServerSide
from fedpeft.federation import checkpoint
from fedpeft.federation.checkpoint import Checkpoint
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import Memories
from fedpeft.ledger import FILE, ClientRow, RunRow, stream
from fedpeft.training.evaluation import FULL_CLIENT
from fedpeft.training.hardware import Hardware
from fedpeft.types import Engine, State
from fedpeft.wire.durable import write

T = TypeVar("T")
OnWarning = Callable[[str], None]


def start(
    federation: Federation,
    folder: Path,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> State:
    """Run ``federation`` from its beginning in ``folder`` and return the last state.

    A folder that exists raises BadInput unless ``overwrite``, and one that another process writes
    raises it always; nothing is written before all input has been checked.
    """
    with beginning(folder, overwrite=overwrite):
        return run_from_start(federation, folder, on_progress)


def run_from_start(
    federation: Federation, folder: Path, on_progress: OnProgress, *, until: int | None = None
) -> State:
    """Do what ``start`` does in a folder that is claimed; an older run there is removed.

    ``until``: the round after which to stop, where that is not the last one.
    """
    begin = begin_in(folder, federation, Memories())
    return _run_rounds(federation, folder, begin, on_progress, until)


def begin_in(
    folder: Path,
    side: ServerSide,
    memories: Memories,
    others: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Make a run of a claimed ``folder``, and return where it begins; an older run is removed.

    ``memories``: what its clients will keep here. ``others``: by name, what further files of the
    run hold, as JSON. BadInput where the disk is full.
    """
    first_state = side.first_state()
    files = {
        **(others or {}),
        HARDWARE: side.hardware.describe(),
        LABELS: list(side.task.labels),
        CONFIG: json.loads(side.config.to_json()),
    }
    with ExitStack() as undo:
        try:
            clear(folder)
            # Should a file not be written, no half-made run is left behind.
            undo.callback(clear, folder)
            # CONFIG comes last: with it the folder is a run, and then it needs all three.
            for name, content in files.items():
                write(folder / name, json.dumps(content, indent=1).encode())
        except OSError as error:
            remedy = "make room and start again"
            raise BadInput(f"{folder}: cannot be written ({error.strerror}); {remedy}") from error
        undo.pop_all()  # all is written: keep it
    return Checkpoint(first_state, memories, ledger=0)


def resume(
    folder: Path | str,
    *,
    reuse: Federation | None = None,
    on_progress: OnProgress = lambda _: None,
    on_warning: OnWarning = lambda _: None,
) -> State:
    """Go on with the run in ``folder`` from its last whole checkpoint and return the last state.

    The hardware choices are those it was started with. ``reuse``: a federation whose data and model
    are taken over where the settings agree. Raises BadInput where there is no run, and where
    another process is writing it.
    """
    folder = Path(folder)
    check_is_run(folder)
    with claimed(folder):
        return run_from_checkpoint(
            folder, reuse=reuse, on_progress=on_progress, on_warning=on_warning
        )


def run_from_checkpoint(
    folder: Path,
    *,
    reuse: Federation | None,
    on_progress: OnProgress,
    on_warning: OnWarning,
    until: int | None = None,
) -> State:
    """Do what ``resume`` does in a folder that is claimed.

    ``until``: the round after which to stop, where that is not the last one.
    """
    config, hardware, labels = read_settings(folder, on_warning)
    # Before the model is loaded, which takes seconds: a damaged checkpoint is told of at once.
    begin = checkpoint.load(folder / CHECKPOINTS, settings_digests(folder), on_warning)
    federation = build(config, hardware, reuse)
    _check_same(folder, federation, labels)
    if begin is None:  # killed before the first checkpoint
        begin = Checkpoint(federation.first_state(), Memories(), ledger=0)
    else:
        _check_memories(folder, federation, begin.state)
    return _run_rounds(federation, folder, begin, on_progress, until)


def read_settings(
    folder: Path, on_warning: OnWarning = lambda _: None
) -> tuple[Config, Hardware, tuple[str, ...]]:
    """Return a run's settings, its hardware choices and its label names.

    ``on_warning`` is told of settings by an old name. Raises BadInput for a folder that holds no
    run, and for a file in it that cannot be read.
    """
    check_is_run(folder)

    # Of several folders, the user should know which one has the old name.
    def warn(line: str) -> None:
        on_warning(f"{folder / CONFIG}: {line}")

    labels = _parsed(folder / LABELS, _parse_labels)
    config = _parsed(folder / CONFIG, partial(from_json, on_warning=warn))
    hardware = _parsed(folder / HARDWARE, Hardware.from_json)
    return config, hardware, labels


def _parsed(path: Path, parse: Callable[[str], T]) -> T:
    """Return what ``parse`` makes of a file of a run; BadInput with its name where it cannot."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    # ValueError for what is no JSON, the last two for JSON of another form, such as a list.
    except (BadInput, OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); start again with --overwrite") from error


def _parse_labels(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _check_same(folder: Path, federation: Federation, labels: tuple[str, ...]) -> None:
    """Raise BadInput where data, weights or partition are not those that the run was started on.

    ``labels``: those of the run, in the order of the model's outputs.
    """
    row = run_row(folder)
    if row is not None:
        _check_digests(folder, federation, row)
    # zip_longest: one label more or less is a difference, too, for which one side has None.
    for output, (then, today) in enumerate(zip_longest(labels, federation.task.labels)):
        if then != today:
            raise BadInput(
                f"{folder / LABELS}: output {output} of the model stands for {then!r} in this run, "
                f"and for {today!r} in the data, so texts would be learnt as others of their "
                "labels; bring back what it was started on, or start again with --overwrite"
            )


def _check_digests(folder: Path, federation: Federation, row: RunRow) -> None:
    """Raise BadInput where a digest differs from that in the run's first row."""
    for what, recorded, now in (
        ("the texts", row.data_digest, federation.dataset.digest()),
        ("the weights of the model", row.model_digest, federation.loaded.digest),
        ("the partition", row.partition_digest, federation.partition.digest()),
        ("the trace of clients", row.trace_digest, federation.trace_digest),
    ):
        if recorded and recorded != now:  # an older version recorded fewer digests
            raise BadInput(
                f"{folder}: {what} had digest {recorded} when the run was started, and now {now}; "
                "bring back what it was started on, or start again with --overwrite"
            )


def _check_memories(folder: Path, federation: Federation, state: State) -> None:
    """Raise BadInput where all that was trained was kept by clients, which have ended with the run.

    Checkpoints hold the clients' memories of engine ``local`` alone; other engines keep their own.
    """
    config, method = federation.config, federation.method
    if config.engine.kind == "local":
        return
    # A method that expects no tensor back has nothing on the server to go on from.
    if not method.expects(state, method.send(state, FULL_CLIENT)):
        raise BadInput(
            f"{folder}: what method {config.method['name']!r} trains is kept by the clients of "
            f"engine {config.engine.kind!r} alone, and they are gone; start again with --overwrite"
        )


def run_row(folder: Path) -> RunRow | None:
    """Return the first row of a run's ledger; None where the run ended before it was written."""
    ledger = folder / FILE
    if not ledger.exists():
        return None
    row = next(stream(ledger), None)
    return row if isinstance(row, RunRow) else None


def check_learnt(folder: Path) -> None:
    """Raise BadInput where no reply of a run was of any use."""
    losses: list[str | None] = []  # why a reply was of no use; None where it was used
    for row in stream(folder / FILE):
        if isinstance(row, ClientRow):
            losses.append(row.lost)
    if losses and None not in losses:
        raise BadInput(
            f"{folder}: nothing was learnt, as none of {len(losses)} replies could be used; "
            f"the last one: {losses[-1]}"
        )


def finished(folder: Path, config: Config, until: int | None = None) -> bool:
    """Return whether the run in ``folder`` has done all its rounds, or those ``until`` a round."""
    rounds = config.federation.rounds
    # A manifest is written last, so where that of the last round is, everything is. Older ones go,
    # so a run that has got further than asked has that of a later round.
    for done in range(rounds if until is None else until, rounds + 1):
        if checkpoint.manifest(folder / CHECKPOINTS, done).exists():
            return True
    return False


def _run_rounds(
    federation: Federation,
    folder: Path,
    begin: Checkpoint,
    on_progress: OnProgress,
    until: int | None = None,
) -> State:
    """Run the rounds that are left; after each, ledger and checkpoint are on the disk."""
    config = federation.config

    def body(engine: Engine) -> State:
        return run_rounds(
            federation,
            engine,
            folder,
            begin,
            on_progress,
            drawn(federation, federation.trace),
            until=until,
            fleet=federation.fleet,
        )

    # Engines whose clients are processes of their own build the worker there, from these settings.
    settings = json.dumps({"config": config.to_json(), "hardware": federation.hardware.describe()})
    pool = ClientPool(len(federation.clients), federation.worker, settings, rebuild, begin.memories)
    return launch(config.engine.kind, pool, body)


def rebuild(settings: str) -> Worker:
    """Return, in another process, the worker of a run: ``settings`` are a ``ClientPool``'s."""
    fields = json.loads(settings)
    config = from_json(fields["config"])
    hardware = Hardware(**fields["hardware"])
    return build(config, hardware).worker
