"""One run in one folder: start it, play its rounds, evaluate, keep ledger and checkpoints, and resume it after a crash."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from fedpeft import checkpoint
from fedpeft.assembly import Assembly, assemble
from fedpeft.checkpoint import Checkpoint
from fedpeft.client import Worker
from fedpeft.config import Config, from_json
from fedpeft.engines import Site, launch
from fedpeft.evaluation import WHOLE
from fedpeft.federation import federate, sample
from fedpeft.hardware import Hardware
from fedpeft.journal import CHECKPOINTS, Journal, Watch, settings_digest
from fedpeft.ledger import FILE, RunRow, stream
from fedpeft.memory import Memories
from fedpeft.scoring import evaluation_row
from fedpeft.types import BadInput, Engine, State

CONFIG, HARDWARE, LABELS = "config.json", "hardware.json", "labels.json"
OURS = {CONFIG, HARDWARE, LABELS, FILE, CHECKPOINTS, "report"}


T = TypeVar("T")
Say = Callable[[str], None]


def start(assembly: Assembly, folder: Path, *, overwrite: bool = False, watch: Watch = lambda _: None) -> State:
    """Run ``assembly`` from its beginning in ``folder`` and return the last state.

    A folder that exists raises BadInput unless ``overwrite``; nothing is written before all input has been checked.
    """
    refuse_existing(folder, overwrite)
    first = assembly.first_state()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made ({error.strerror}); choose another place with --runs") from error
    about = {
        HARDWARE: assembly.hardware.describe(),
        LABELS: assembly.dataset.labels,
        CONFIG: json.loads(assembly.config.to_json()),
    }
    try:
        for name, content in about.items():
            checkpoint.write(folder / name, json.dumps(content, indent=1).encode())
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise BadInput(f"{folder}: cannot be written ({error.strerror}); make room and start again") from error
    return _play(assembly, folder, Checkpoint(first, Memories(), 0), watch)


def resume(
    folder: Path | str, *, like: Assembly | None = None, watch: Watch = lambda _: None, say: Say = lambda _: None
) -> State:
    """Go on with the run in ``folder`` from its last whole checkpoint, with the hardware choices it was started with."""
    folder = Path(folder)
    config, hardware, _ = read_settings(folder)
    found = checkpoint.load(folder / CHECKPOINTS, settings_digest(config), say)
    assembly = assemble(config, hardware, like)
    _check_same(folder, assembly)
    method = assembly.method
    if found and config.engine.kind != "local" and not method.expects(found.state, method.send(found.state, WHOLE)):
        raise BadInput(
            f"{folder}: what method {config.method['name']!r} trains is kept by the clients of engine "
            f"{config.engine.kind!r} alone, and they are gone; start again with --overwrite"
        )
    return _play(assembly, folder, found or Checkpoint(assembly.first_state(), Memories(), 0), watch)


def read_settings(folder: Path) -> tuple[Config, Hardware, tuple[str, ...]]:
    """Return a run's settings, its hardware choices and its label names; a folder that holds no run raises BadInput."""
    if not (folder / CONFIG).exists():
        inside, beside = (sorted(str(path.parent) for path in place.glob(f"*/{HARDWARE}")) for place in (folder, folder.parent))
        near = f"runs in it: {', '.join(inside)}" if inside else f"runs beside it: {', '.join(beside) or 'none'}"
        raise BadInput(f"{folder}: holds no run; {near}")

    def content(name: str, read: Callable[[str], T]) -> T:
        try:
            return read((folder / name).read_text())
        except (BadInput, OSError, ValueError, TypeError) as error:
            raise BadInput(f"{folder / name}: cannot be read ({error}); start again with --overwrite") from error

    hardware = content(HARDWARE, lambda text: Hardware(**json.loads(text)))
    return content(CONFIG, from_json), hardware, content(LABELS, lambda text: tuple(json.loads(text)))


def _check_same(folder: Path, assembly: Assembly) -> None:
    """Raise BadInput where texts, weights or partition are not those that the run was started on."""
    first = begun(folder)
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


def begun(folder: Path) -> RunRow | None:
    """Return the first row of a run's ledger; None where the run ended before it was written."""
    first = next(stream(folder / FILE), None) if (folder / FILE).exists() else None
    return first if isinstance(first, RunRow) else None


def finished(folder: Path, config: Config) -> bool:
    """Return whether the run in ``folder`` has played all its rounds."""
    return checkpoint.manifest(folder / CHECKPOINTS, config.federation.rounds).exists()


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise BadInput where ``folder`` exists already."""
    if folder.exists() and not overwrite:
        raise BadInput(f"{folder}: exists; resume it, choose another name, or give --overwrite")
    foreign = [path.name for path in folder.glob("*") if path.name.removesuffix(".tmp") not in OURS]
    if foreign and not (folder / HARDWARE).exists():  # an exported model has a config.json, too
        raise BadInput(f"{folder}: is no run's folder, as it holds {foreign[0]!r}, and is not overwritten; choose another name")


def _play(assembly: Assembly, folder: Path, begin: Checkpoint, watch: Watch) -> State:
    """Play the rounds that are left; after each of them ledger and checkpoint are on the disk."""
    config, federation = assembly.config, assembly.config.federation

    def body(engine: Engine) -> State:
        state = begin.state
        with Journal(assembly, folder, begin, watch) as journal:
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
    return launch(config.engine.kind, Site(len(assembly.clients), assembly.worker, settings, rebuild, begin.memories), body)


def rebuild(settings: str) -> Worker:
    """Return, in another process, the worker that ``_play`` describes by ``settings``."""
    fields = json.loads(settings)
    return assemble(from_json(fields["config"]), Hardware(**fields["hardware"])).worker
