"""One run in one folder: start it, play its rounds, evaluate, keep ledger and checkpoints, and resume it after a crash."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedpeft import checkpoint
from fedpeft.assembly import Assembly, assemble
from fedpeft.checkpoint import Checkpoint
from fedpeft.client import Worker
from fedpeft.config import Config, from_json
from fedpeft.engines import Site, launch
from fedpeft.federation import federate, sample
from fedpeft.hardware import Hardware
from fedpeft.journal import CHECKPOINTS, Journal, Watch, settings_digest
from fedpeft.memory import Memories
from fedpeft.scoring import evaluation_row
from fedpeft.types import BadInput, Engine, State

CONFIG, HARDWARE = "config.json", "hardware.json"


Say = Callable[[str], None]


def start(config: Config, folder: Path, *, overwrite: bool = False, watch: Watch = lambda _: None) -> State:
    """Run ``config`` from its beginning in ``folder`` and return the last state.

    A folder that exists raises BadInput unless ``overwrite``; nothing is written before all input has been checked.
    """
    refuse_existing(folder, overwrite)
    assembly = assemble(config)
    first = assembly.first_state()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint.write(folder / HARDWARE, json.dumps(assembly.hardware.describe(), indent=1).encode())
    checkpoint.write(folder / CONFIG, config.to_json().encode())
    return _play(assembly, folder, Checkpoint(first, Memories(), 0), watch)


def resume(folder: Path, *, watch: Watch = lambda _: None, say: Say = lambda _: None) -> State:
    """Go on with the run in ``folder`` from its last whole checkpoint, with the hardware choices it was started with."""
    assembly = reopen(folder)
    found = checkpoint.load(folder / CHECKPOINTS, settings_digest(assembly.config), say)
    return _play(assembly, folder, found or Checkpoint(assembly.first_state(), Memories(), 0), watch)


def reopen(folder: Path) -> Assembly:
    """Return the assembly of the run in ``folder``; a folder that holds no run raises BadInput."""
    try:
        config = (folder / CONFIG).read_text()
        hardware = Hardware(**json.loads((folder / HARDWARE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        others = [path.name for path in folder.parent.glob("*") if (path / CONFIG).exists()]
        raise BadInput(f"{folder}: holds no run; runs in {folder.parent}: {', '.join(others) or 'none'}") from error
    return assemble(from_json(config), hardware)


def last_state(folder: Path, config: Config) -> State:
    """Return the state of the last whole checkpoint of a run; a run without any raises BadInput."""
    found = checkpoint.load(folder / CHECKPOINTS, settings_digest(config), lambda _: None)
    if found is None:
        raise BadInput(f"{folder}: has no checkpoint yet; resume the run first")
    return found.state


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise BadInput where ``folder`` exists already."""
    if folder.exists() and not overwrite:
        raise BadInput(f"{folder}: exists; resume it, choose another name, or give --overwrite")


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
