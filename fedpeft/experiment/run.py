"""One run in one folder: start it, play its rounds, evaluate, keep ledger and checkpoints, and resume it after a crash."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from fedpeft.engines import ClientPool, launch
from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.claim import claimed
from fedpeft.experiment.config import Config, from_json
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG, OnProgress, Recorder, settings_digests
from fedpeft.experiment.run_folder import HARDWARE, LABELS, beginning, check_is_run, clear
from fedpeft.experiment.scoring import evaluation_row
from fedpeft.federation import checkpoint
from fedpeft.federation.checkpoint import Checkpoint
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import Memories
from fedpeft.federation.server import federate, sample
from fedpeft.ledger import FILE, ClientRow, RunRow, stream
from fedpeft.training.evaluation import FULL_CLIENT
from fedpeft.training.hardware import Hardware
from fedpeft.types import Engine, State
from fedpeft.wire.durable import write

T = TypeVar("T")
OnWarning = Callable[[str], None]


def start(
    assembly: Federation,
    folder: Path,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> State:
    """Run ``assembly`` from its beginning in ``folder`` and return the last state.

    A folder that exists raises BadInput unless ``overwrite``, and one that another process writes
    raises it always; nothing is written before all input has been checked.
    """
    with beginning(folder, overwrite=overwrite):
        return run_from_start(assembly, folder, on_progress)


def run_from_start(assembly: Federation, folder: Path, on_progress: OnProgress) -> State:
    """Do what ``start`` does in a folder that is claimed; what an older run left is removed."""
    first = assembly.first_state()
    about = {
        HARDWARE: assembly.hardware.describe(),
        LABELS: assembly.dataset.labels,
        CONFIG: json.loads(assembly.config.to_json()),
    }
    with ExitStack() as undo:
        try:
            clear(folder)
            undo.callback(clear, folder)
            for name, content in about.items():
                write(folder / name, json.dumps(content, indent=1).encode())
        except OSError as error:
            remedy = "make room and start again"
            raise BadInput(f"{folder}: cannot be written ({error.strerror}); {remedy}") from error
        undo.pop_all()
    return _play(assembly, folder, Checkpoint(first, Memories(), 0), on_progress)


def resume(
    folder: Path | str,
    *,
    reuse: Federation | None = None,
    on_progress: OnProgress = lambda _: None,
    on_warning: OnWarning = lambda _: None,
) -> State:
    """Go on with the run in ``folder`` from its last whole checkpoint, with its hardware choices.

    Raises BadInput where there is no run, and where another process is writing it.
    """
    folder = Path(folder)
    check_is_run(folder)
    with claimed(folder):
        return run_from_checkpoint(
            folder, reuse=reuse, on_progress=on_progress, on_warning=on_warning
        )


def run_from_checkpoint(
    folder: Path, *, reuse: Federation | None, on_progress: OnProgress, on_warning: OnWarning
) -> State:
    """Do what ``resume`` does in a folder that is claimed."""
    config, hardware, labels = read_settings(folder, on_warning)
    found = checkpoint.load(folder / CHECKPOINTS, settings_digests(folder), on_warning)
    assembly = build(config, hardware, reuse)
    _check_same(folder, assembly, labels)
    method = assembly.method
    if (
        found
        and config.engine.kind != "local"
        and not method.expects(found.state, method.send(found.state, FULL_CLIENT))
    ):
        raise BadInput(
            f"{folder}: what method {config.method['name']!r} trains is kept by the clients of engine "
            f"{config.engine.kind!r} alone, and they are gone; start again with --overwrite"
        )
    return _play(
        assembly, folder, found or Checkpoint(assembly.first_state(), Memories(), 0), on_progress
    )


def read_settings(
    folder: Path, on_warning: OnWarning = lambda _: None
) -> tuple[Config, Hardware, tuple[str, ...]]:
    """Return a run's settings, its hardware choices and its label names.

    ``on_warning`` is told of settings by an old name. A folder that holds no run raises BadInput.
    """
    check_is_run(folder)

    def content(name: str, read: Callable[[str], T]) -> T:
        try:
            return read((folder / name).read_text(encoding="utf-8"))
        except (BadInput, OSError, ValueError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{folder / name}: cannot be read ({error}); start again with --overwrite"
            ) from error

    labels = content(LABELS, lambda text: tuple(json.loads(text)))

    def warn(line: str) -> None:
        on_warning(f"{folder / CONFIG}: {line}")

    config = content(CONFIG, partial(from_json, on_warning=warn))
    return config, content(HARDWARE, Hardware.from_json), labels


def _check_same(folder: Path, assembly: Federation, labels: tuple[str, ...]) -> None:
    """Raise BadInput where data, weights or partition are not those that the run was started on.

    ``labels``: those of the run, in the order of the model's outputs.
    """
    first = run_row(folder)
    for what, given, now in (
        ("the texts", first and first.data_digest, assembly.dataset.digest()),
        ("the weights of the model", first and first.model_digest, assembly.loaded.digest),
        ("the partition", first and first.partition_digest, assembly.partition.digest()),
    ):
        if given and given != now:
            raise BadInput(
                f"{folder}: {what} had digest {given} when the run was started, and now {now}; "
                "bring back what it was started on, or start again with --overwrite"
            )
    for number, (then, today) in enumerate(zip_longest(labels, assembly.dataset.labels)):
        if then != today:
            raise BadInput(
                f"{folder / LABELS}: output {number} of the model stands for {then!r} in this run, and "
                f"for {today!r} in the data, so texts would be learnt as others of their labels; "
                "bring back what it was started on, or start again with --overwrite"
            )


def run_row(folder: Path) -> RunRow | None:
    """Return the first row of a run's ledger; None where the run ended before it was written."""
    first = next(stream(folder / FILE), None) if (folder / FILE).exists() else None
    return first if isinstance(first, RunRow) else None


def check_learnt(folder: Path) -> None:
    """Raise BadInput where no reply of a run was of any use."""
    lost = [row.lost for row in stream(folder / FILE) if isinstance(row, ClientRow)]
    if lost and None not in lost:
        none = f"none of {len(lost)} replies could be used; the last one: {lost[-1]}"
        raise BadInput(f"{folder}: nothing was learnt, as {none}")


def finished(folder: Path, config: Config) -> bool:
    """Return whether the run in ``folder`` has played all its rounds."""
    return checkpoint.manifest(folder / CHECKPOINTS, config.federation.rounds).exists()


def _play(assembly: Federation, folder: Path, begin: Checkpoint, on_progress: OnProgress) -> State:
    """Play the rounds that are left; after each of them ledger and checkpoint are on the disk."""
    config, federation = assembly.config, assembly.config.federation

    def body(engine: Engine) -> State:
        state = begin.state
        with Recorder(assembly, folder, begin, on_progress) as journal:
            for state in federate(
                assembly.method,
                begin.state,
                engine,
                partial(sample, assembly.clients, federation.clients_per_round, config.seed),
                range(begin.state.round, federation.rounds),
                config=assembly.worker.config,
                min_replies=federation.min_replies,
                record=journal.record,
            ):
                if state.round % config.evaluation.every == 0 or state.round == federation.rounds:
                    journal.record(evaluation_row(assembly, state, engine, begin.memories))
                journal.save(state)
        return state

    settings = json.dumps({"config": config.to_json(), "hardware": assembly.hardware.describe()})
    return launch(
        config.engine.kind,
        ClientPool(len(assembly.clients), assembly.worker, settings, rebuild, begin.memories),
        body,
    )


def rebuild(settings: str) -> Worker:
    """Return, in another process, the worker that ``_play`` describes by ``settings``."""
    fields = json.loads(settings)
    return build(from_json(fields["config"]), Hardware(**fields["hardware"])).worker
