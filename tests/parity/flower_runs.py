"""Run by ``test_flower.py`` in a process of its own: every method on both engines, all of Flower's in one simulation."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fedpeft.engines import ClientPool
from fedpeft.engines.flower import FlowerEngine, launch
from fedpeft.engines.local import LocalEngine
from fedpeft.experiment import run as runs
from fedpeft.experiment.build import Federation, build
from fedpeft.federation.server import federate, sample
from fedpeft.ledger import MEASURED, ClientRow, to_json
from fedpeft.methods import METHODS
from fedpeft.types import Engine, State
from tests.e2e.builders import Ground, write_ground

ROUNDS = 3
KEPT = ("lora", "federa")
"""Methods whose optimizers go on when they are played again: without a memory of its own, and with."""

SMALL: dict[str, dict[str, object]] = {
    "lora": {"rank": 4},
    "ravan": {"rank": 4},
}
"""Fields of methods whose defaults are for wider models."""

Ended = tuple[State, list[dict[str, object]]]


def play(assembly: Federation, engine: Engine) -> Ended:
    """Return the last state of a short run and its rows, what is measured left out."""
    rows: list[ClientRow] = []
    first = assembly.first_state()
    cohort = partial(sample, assembly.clients, 2, assembly.config.seed)
    state = first
    for state in federate(  # noqa: B007
        assembly.method,
        first,
        engine,
        cohort,
        range(ROUNDS),
        config=assembly.worker.config,
        min_replies=1,
        record=rows.append,
    ):
        pass
    return state, [{k: v for k, v in to_json(row).items() if k not in MEASURED} for row in rows]


def assemblies(ground: Ground) -> dict[str, Federation]:
    """Return a federation of five clients for every method, and two whose optimizers go on."""
    made: dict[str, Federation] = {}
    for name in METHODS:
        method = {"name": name, **SMALL.get(name, {})}
        made[name] = build(ground.chosen({"method": method, "federation": {"rounds": ROUNDS}}))
    for name in KEPT:
        settings = {"method": {"name": name}, "federation": {"rounds": ROUNDS}}
        kept = ground.chosen(settings, {"training": {"keep_optimizer": True}})
        made[f"{name}, optimizer kept"] = build(kept)
    return made


def differences(one: Ended, other: Ended) -> list[str]:
    """Return what differs between two ends, to the bit."""
    (mine, my_rows), (theirs, their_rows) = one, other
    found = [
        f"row {i}: {a} != {b}"
        for i, (a, b) in enumerate(zip(my_rows, their_rows, strict=True))
        if a != b
    ]
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
            "rows": len(local[1]),
            "lost": [r["lost"] for r in local[1]],
        }
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
