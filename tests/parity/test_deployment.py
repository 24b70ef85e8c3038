"""Sites end where the local engine does, to the bit, for every method: through the connector's and the trainer's own code,
their sockets, their memories on disk, the server's roster and its rounds. What HTTP and Flower add is tried in e2e."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.deployment.carving import carve
from fedpeft.deployment.serve import Job, serve_one
from fedpeft.deployment.site import Limits
from fedpeft.engines.flower.stock import StockSites
from fedpeft.experiment.build import build
from fedpeft.experiment.config import Config, from_tree, merge
from fedpeft.experiment.run import start
from fedpeft.federation import checkpoint
from fedpeft.ledger import MEASURED, ClientRow, EvaluationRow, read, to_json
from fedpeft.methods import METHODS
from fedpeft.types import State
from tests.contract.reference import PERSONAL, PHASES
from tests.e2e.builders import SMALL, Ground, assert_same, write_ground
from tests.parity.sockets import Behind, behind_sockets, grid_of, own_site

ROUNDS = 3
CASES: Mapping[str, Mapping[str, Any]] = {
    **{name: {"method": {"name": name, **SMALL.get(name, {})}} for name in METHODS},
    "federa, optimizer kept": {
        "method": {"name": "federa"},
        "training": {"keep_optimizer": True},
    },
    "lora, scored by the sites": {
        "method": {"name": "lora"},
        "evaluation": {"where": "sites"},
    },
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return write_ground(tmp_path_factory.mktemp("ground"))


def settings(ground: Ground, case: Mapping[str, Any]) -> Config:
    """Return the settings of a simulation of three clients, one after another."""
    shape = {
        "name": "parity",
        "engine": {"stack": 1},
        "partition": {"clients": 3},
        "federation": {"rounds": ROUNDS, "clients_per_round": 2},
        "data": {"labels": ["birds", "fish", "trees", "winds"]},
    }
    return ground.chosen(shape, case)


@pytest.fixture(scope="module")
def sites(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Behind]]:
    folders = carve(settings(ground, CASES["lora"]), tmp_path_factory.mktemp("sites"))
    held = [own_site(n, folder, {"bert": str(ground.model)}) for n, folder in enumerate(folders)]
    with behind_sockets(held) as behind:
        yield behind
    for site in held:
        shutil.rmtree(site.state)


@pytest.fixture(autouse=True)
def inside_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can be made here."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def last_state(folder: Path) -> State:
    path = max((folder / "checkpoints").glob("*.state"))
    return checkpoint.unpack(path.read_bytes())


def rows(folder: Path, *others: type) -> list[dict[str, object]]:
    """Return a ledger's rows of clients, and of other kinds, what is measured left out."""
    kept = [row for row in read(folder / "ledger.jsonl") if isinstance(row, (ClientRow, *others))]
    return [{k: v for k, v in to_json(row).items() if k not in MEASURED} for row in kept]


def of_sites(config: Config, test: Path, runs: Path) -> Config:
    """Return the same settings as the server has them: test texts, and no training texts."""
    tree = merge(
        json.loads(config.to_json()),
        {
            "engine": {"kind": "sites"},
            "data": {
                "train": None,
                "test": str(test) if config.evaluation.where == "server" else None,
            },
            "server": {"state": str(runs / "state"), "min_sites": 3, "joining": 30.0},
        },
    )
    return from_tree(tree)


@pytest.mark.parametrize("name", CASES)
def test_sites_end_where_the_local_engine_does(
    name: str, ground: Ground, sites: list[Behind], tmp_path: Path
) -> None:
    config = settings(ground, CASES[name])
    federation = build(config)
    here = start(federation, tmp_path / "here")
    test = tmp_path / "test.jsonl"
    write_test(federation, test)
    server = of_sites(config, test, tmp_path)
    (tmp_path / "state").mkdir()
    said: list[str] = []
    folder = tmp_path / "there"
    folder.mkdir()
    serve_one(
        Job(server, folder),
        lambda: nullcontext(StockSites(grid_of(sites))),
        lambda: None,
        None,
        said.append,
    )
    lost = [row["lost"] for row in rows(folder) if "lost" in row]
    assert lost == [None] * 2 * ROUNDS * PHASES.get(name, 1), said
    # A method that keeps parts with its clients is scored on its clients' own texts where these are
    # elsewhere; all else is equal.
    scored = () if name in PERSONAL else (EvaluationRow,)
    assert rows(folder, *scored) == rows(tmp_path / "here", *scored)
    assert_same(last_state(folder), here)


def test_a_site_that_trains_seldom_answers_all_exchanges_of_a_round(
    ground: Ground, tmp_path: Path
) -> None:
    one_round = {
        "federation": {"rounds": 1, "clients_per_round": 3},
        "wrap": [{"name": "secagg"}],
    }
    config = settings(ground, one_round)
    federation = build(config)
    test, folder = tmp_path / "test.jsonl", tmp_path / "there"
    write_test(federation, test)
    server = of_sites(config, test, tmp_path)
    (tmp_path / "state").mkdir()
    folder.mkdir()
    folders = carve(config, tmp_path / "sites")
    seldom = Limits(interval=1000.0)
    held = [
        own_site(n, one, {"bert": str(ground.model)}, limits=seldom)
        for n, one in enumerate(folders)
    ]
    said: list[str] = []
    with behind_sockets(held) as behind:
        serve_one(
            Job(server, folder),
            lambda: nullcontext(StockSites(grid_of(behind))),
            lambda: None,
            None,
            said.append,
        )
    for site in held:
        shutil.rmtree(site.state)
    lost = [row["lost"] for row in rows(folder) if "lost" in row]
    assert lost == [None] * 3 * 4, said


def write_test(federation: Any, path: Path) -> None:
    """Write the simulation's test texts as the server's own."""
    held = federation.dataset.test
    lines = [
        json.dumps({"text": text, "label": label})
        for text, label in zip(held.texts, held.labels, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
