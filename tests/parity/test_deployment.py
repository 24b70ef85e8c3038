"""Sites end where the local engine does, to the bit, for every method: through the connector's and the trainer's own code,
their sockets, their memories on disk, the server's roster and its rounds. What HTTP and Flower add is tried in e2e."""

import json
import math
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedpeft.deployment import serve
from fedpeft.deployment.carving import carve
from fedpeft.deployment.serve import Job, serve_one
from fedpeft.deployment.site import Limits
from fedpeft.engines.flower.stock import StockSites
from fedpeft.experiment import rounds
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.config import Config, from_tree, merge
from fedpeft.experiment.run import start
from fedpeft.federation import checkpoint
from fedpeft.ledger import MEASURED, ClientRow, EvaluationRow, PrivacyRow, read, to_json
from fedpeft.methods import METHODS
from fedpeft.tasks import Encoded
from fedpeft.training import private
from fedpeft.types import Client, State
from fedpeft.wrappers import dp
from tests.contract.reference import CORE, PERSONAL, PHASES
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


QUICK = {name for name in CASES if name in CORE or name not in METHODS}
"""Cases of ``make test``; the others are played in ``make test-all``."""
LONG = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


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


def play_with_sites(
    federation: Federation, sites: list[Behind], place: Path
) -> tuple[Path, list[str]]:
    """Serve a simulation's settings to ``sites``; return the run's folder and what the server said."""
    test = place / "test.jsonl"
    write_test(federation, test)
    server = of_sites(federation.config, test, place)
    (place / "state").mkdir()
    said: list[str] = []
    folder = place / "there"
    folder.mkdir()
    serve_one(
        Job(server, folder),
        lambda: nullcontext(StockSites(grid_of(sites))),
        lambda: None,
        None,
        said.append,
    )
    return folder, said


@pytest.mark.parametrize("name", LONG)
def test_sites_end_where_the_local_engine_does(
    name: str, ground: Ground, sites: list[Behind], tmp_path: Path
) -> None:
    config = settings(ground, CASES[name])
    federation = build(config)
    here = start(federation, tmp_path / "here")
    folder, said = play_with_sites(federation, sites, tmp_path)
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


WRAPS: Mapping[str, list[Mapping[str, Any]]] = {
    "secagg": [{"name": "secagg", "bits": 56}],
    "dp": [{"name": "dp", "noise": 2.0, "clip": 0.5}],
    "dpsgd": [{"name": "dpsgd", "noise": 1.5, "clip": 0.5}],
    "secagg around dp": [
        {"name": "secagg"},
        {"name": "dp", "noise": 2.0, "clip": 0.5, "sharers": 3},
    ],
    "dp of clients drawn in secret": [
        {"name": "dp", "noise": 2.0, "clip": 0.5, "sampling": "poisson"}
    ],
}
IN_SECRET = "dp of clients drawn in secret"
ALL = (0, 1, 2)
NOISY: Mapping[str, set[tuple[str, float]]] = {
    "secagg": set(),
    "dp": {("server", 2.0 * 0.5)},
    "dpsgd": {("sites", 1.5 * 0.5)},
    "secagg around dp": {("sites", 2.0 * 0.5 / math.sqrt(3))},
    IN_SECRET: {("server", 2.0 * 0.5)},
}
"""Who makes noise, and its standard deviation: z C in a sum, and, by n clients, z C / sqrt(n) each."""
EXCHANGES = {"secagg": 4, "secagg around dp": 4}
"""Exchanges of a round, where it is not one."""


class Chance:
    """Takes the place of all that is drawn from the operating system and changes the last state.

    ``noise``: who made noise, and of which standard deviation. ``cohorts``: from how many clients each cohort was drawn, and
    how many were to be expected in it.
    """

    def __init__(self) -> None:
        self.noise: set[tuple[str, float]] = set()
        self.cohorts: list[tuple[int, int]] = []

    def gaussian(self, shape: torch.Size, deviation: float) -> Tensor:
        """Return no noise, and note who wanted it."""
        # Sites are threads of this process, the server is the main one.
        here = threading.current_thread() is threading.main_thread()
        self.noise.add(("server" if here else "sites", deviation))
        return torch.zeros(shape, dtype=torch.float64)

    def rows(self, examples: Encoded, steps: int, batch_size: int) -> list[list[int]]:
        """Return the same rows for every client, others in each step, and none in the last one."""
        rows = private.by_row(examples, range(len(examples)))
        found: list[list[int]] = []
        for step in range(steps):
            found.append([index for row in rows[step::5][:batch_size] for index in row])
        return [*found[:-1], []]

    def cohort(self, clients: Sequence[Client], count: int) -> list[Client]:
        """Return two clients, nobody, and one."""
        drawn = [(0, 2), (), (1,)][len(self.cohorts)]
        self.cohorts.append((len(clients), count))
        return [client for client in clients if client.id in drawn]


@pytest.fixture
def chance(monkeypatch: pytest.MonkeyPatch) -> Chance:
    found = Chance()
    monkeypatch.setattr(dp, "gaussian", found.gaussian)
    monkeypatch.setattr(private, "gaussian", found.gaussian)
    monkeypatch.setattr(private, "drawn", found.rows)
    monkeypatch.setattr(serve, "drawn_in_secret", found.cohort)
    monkeypatch.setattr(rounds, "drawn_in_secret", found.cohort)
    return found


@pytest.mark.parametrize("name", WRAPS)
def test_sites_keep_secrets_as_the_local_engine_does(
    name: str, ground: Ground, sites: list[Behind], chance: Chance, tmp_path: Path
) -> None:
    """Updates under masks and under differential privacy: equal states, equal epsilons, and noise where it has to be made."""
    in_secret = name == IN_SECRET
    case = {
        "method": {"name": "lora", "rank": 4},
        "wrap": WRAPS[name],
        "federation": {
            "clients_per_round": 2 if in_secret else 3,
            "min_replies": 1 if in_secret else 3,
        },
        "training": {"steps": 2},
    }
    federation = build(settings(ground, case))
    here = start(federation, tmp_path / "here")
    drawn_here = list(chance.cohorts)
    assert {deviation for _, deviation in NOISY[name]} == {one for _, one in chance.noise}
    chance.noise.clear()
    chance.cohorts.clear()

    folder, said = play_with_sites(federation, sites, tmp_path)

    found = rows(folder, EvaluationRow, PrivacyRow)
    assert found == rows(tmp_path / "here", EvaluationRow, PrivacyRow)
    asked = [row["client"] for row in found if row["kind"] == "client"]
    expected = [0, 2, 1] if in_secret else [*ALL] * ROUNDS * EXCHANGES.get(name, 1)
    assert asked == expected, said
    assert [row["lost"] for row in found if row["kind"] == "client"] == [None] * len(asked), said
    told = [row["round"] for row in found if row["kind"] == "privacy"]
    assert told == ([] if name == "secagg" else [1, 2, 3])
    assert chance.noise == NOISY[name]
    assert chance.cohorts == drawn_here == ([(3, 2)] * ROUNDS if in_secret else [])
    assert_same(last_state(folder), here)


def write_test(federation: Federation, path: Path) -> None:
    """Write the simulation's test texts as the server's own."""
    held = federation.dataset.test
    lines = [
        json.dumps({"text": text, "label": label})
        for text, label in zip(held.texts, held.labels, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
