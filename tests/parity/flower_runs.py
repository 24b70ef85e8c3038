"""Run by ``test_flower.py`` in a process of its own: every method and task on both engines, all of Flower's in one simulation."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fedpeft.engines.flower.engine import FlowerEngine
from fedpeft.engines.flower.simulation import launch
from fedpeft.engines.local import LocalEngine
from fedpeft.engines.pool import ClientPool
from fedpeft.experiment import run as runs
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.config import from_tree, merge
from fedpeft.federation.fleet import Outing
from fedpeft.federation.server import federate, poll, sample
from fedpeft.ledger import MEASURED, ClientRow, to_json
from fedpeft.methods import METHODS
from fedpeft.tasks import Counts
from fedpeft.types import Engine, State
from tests.e2e.builders import SMALL, Ground, write_ground
from tests.e2e.task_grounds import TASK_GROUNDS

ROUNDS = 3
KEPT = ("lora", "federa")
"""Methods whose optimizers go on when they are played again: without a memory of its own, and with."""

TASKS = ("tagging", "qa", "causal_lm")
"""Tasks beside classification, on which every method is played."""
LAYERS: Mapping[str, Mapping[str, str]] = {"causal_lm": {"targets": "q_proj|v_proj"}}
"""What is adapted where the model is no encoder."""


FLEET = {
    "desk": {"share": 0.4},
    "phone": {"share": 0.6, "capacity": 0.5, "steps": 0.5, "dropout": 0.3, "straggling": 0.3},
}
"""Devices of the five clients, in one more run; a straggler takes 10 modelled seconds."""


@dataclass(frozen=True)
class Ended:
    """The end of a short run: its last state, its rows without what is measured, each client's counts."""

    state: State
    rows: list[dict[str, object]]
    counts: dict[int, Counts]


def play(assembly: Federation, engine: Engine) -> Ended:
    """Return how a short run ends, after which every client scores its last state."""
    rows: list[ClientRow] = []
    state = assembly.first_state()
    cohort = partial(sample, assembly.clients, 2, assembly.config.seed)
    for number in range(ROUNDS):
        through, record = engine, rows.append
        if assembly.fleet.devices:
            outing = Outing(engine, assembly.fleet, number)
            through, record = outing, outing.noting(rows.append)
        [state] = federate(
            assembly.method,
            state,
            through,
            cohort,
            range(number, number + 1),
            config=assembly.worker.config,
            min_replies=1,
            record=record,
        )
    counts = poll(
        assembly.method,
        state,
        engine,
        assembly.clients,
        config=assembly.worker.config,
        task=assembly.task,
    )
    kept = [{k: v for k, v in to_json(row).items() if k not in MEASURED} for row in rows]
    return Ended(state, kept, counts)


def assemblies(ground: Ground) -> dict[str, Federation]:
    """Return a federation of five clients for every method, for two whose optimizers go on, in a fleet, and for every task."""
    made: dict[str, Federation] = {}
    for name in METHODS:
        method = {"name": name, **SMALL.get(name, {})}
        made[name] = build(ground.chosen({"method": method, "federation": {"rounds": ROUNDS}}))
    for name in KEPT:
        settings = {"method": {"name": name}, "federation": {"rounds": ROUNDS}}
        kept = ground.chosen(settings, {"training": {"keep_optimizer": True}})
        made[f"{name}, optimizer kept"] = build(kept)
    method = {"name": "flexlora", "rank": 4}
    federation = {"rounds": ROUNDS, "deadline": 5.0, "fleet": FLEET}
    made["fleet"] = build(ground.chosen({"method": method, "federation": federation}))
    for kind in TASKS:
        folder = ground.folder / kind
        folder.mkdir()
        settings = {"federation": {"rounds": ROUNDS}}
        tree = merge(ground.tree(), TASK_GROUNDS[kind].tree(folder), settings)
        tree["method"] = {"name": "lora", "rank": 2, **LAYERS.get(kind, {})}
        made[kind] = build(from_tree(tree))
    return made


def differences(one: Ended, other: Ended) -> list[str]:
    """Return what differs between two ends, to the bit."""
    mine, theirs = one.state, other.state
    found = [
        f"row {i}: {a} != {b}"
        for i, (a, b) in enumerate(zip(one.rows, other.rows, strict=True))
        if a != b
    ]
    if one.counts.keys() != other.counts.keys():
        found.append(f"scored {one.counts.keys()} != {other.counts.keys()}")
    for client in one.counts.keys() & other.counts.keys():
        my_counts, their_counts = one.counts[client], other.counts[client]
        for name, count in my_counts.items():
            if not torch.equal(count, their_counts[name]):
                found.append(f"client {client}: {name} {count} != {their_counts[name]}")
    if mine.memories != theirs.memories or mine.round != theirs.round:
        found.append(f"memories {mine.memories} != {theirs.memories}")
    for a, b in ((mine.shared, theirs.shared), (mine.server, theirs.server)):
        found += [f"names {a.keys() ^ b.keys()}"] if a.keys() != b.keys() else []
        found += [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return found


def main(folder: Path) -> None:
    """Print, per method, how many rows there were, how much the state moved and what differs between the engines."""
    made = assemblies(write_ground(folder))

    def settings(assembly: Federation) -> str:
        return json.dumps(
            {"config": assembly.config.to_json(), "hardware": assembly.hardware.describe()}
        )

    def body(engine: Engine) -> dict[str, Ended]:
        assert isinstance(engine, FlowerEngine)
        return {
            name: play(one, replace(engine, config=settings(one))) for name, one in made.items()
        }

    first = next(iter(made.values()))
    flower = launch(ClientPool(5, first.worker, settings(first), runs.rebuild), body)
    told = {}
    for name, one in made.items():
        local = play(one, LocalEngine(one.worker))
        told[name] = {
            "differences": differences(local, flower[name]),
            "rows": len(local.rows),
            "lost": [row["lost"] for row in local.rows],
            "scored": len(local.counts),
        }
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
