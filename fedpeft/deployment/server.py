"""The server's half of a run on sites: model, method and test texts; no training data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, final

from fedpeft import data
from fedpeft.errors import BadInput
from fedpeft.experiment.agreement import agreement
from fedpeft.experiment.config import Config
from fedpeft.experiment.pieces import hardware_for, row_of, to_score, tokenised
from fedpeft.experiment.privacy import check_privacy
from fedpeft.experiment.reading import read_test
from fedpeft.experiment.run_folder import SITES
from fedpeft.experiment.wrapping import check_replies
from fedpeft.ledger import RunRow
from fedpeft.models import Loaded
from fedpeft.tasks import TASKS, Encoded, Task, make_task
from fedpeft.training.hardware import Hardware, use
from fedpeft.types import Client, Method, State
from fedpeft.wire.durable import write


@final
@dataclass(frozen=True)
class Known:
    """What the server knows of a site: how many examples it trains on, as texts, and for tests."""

    examples: int
    texts: int
    tests: int


@final
@dataclass
class Roster:
    """The sites of a run, by their client's number.

    ``run``: what the run is called among sites. ``visits``: see ``Offer``. ``online``: which of
    them are there now. It is kept in the run's folder, so that a run is resumed with the same.
    """

    run: str
    visits: float | None = None
    known: dict[int, Known] = field(default_factory=dict)
    online: tuple[int, ...] = ()

    @property
    def clients(self) -> list[Client]:
        """Return the clients that are online, in their order."""
        return [
            Client(number, examples=self.known[number].examples)
            for number in self.online
            if number in self.known
        ]

    def content(self) -> dict[str, Any]:
        """Return what is kept of it, as JSON has it."""
        sites: dict[str, Any] = {}
        for number, site in sorted(self.known.items()):
            sites[str(number)] = {
                "examples": site.examples,
                "texts": site.texts,
                "tests": site.tests,
            }
        return {"run": self.run, "visits": self.visits, "sites": sites}

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        write(folder / SITES, json.dumps(self.content(), indent=1).encode())

    def digest(self) -> str:
        """Return 16 hex digits of who holds how much."""
        return sha256(json.dumps(self.content()["sites"]).encode()).hexdigest()[:16]


def read_roster(folder: Path) -> Roster:
    """Return the roster in a run's folder; BadInput where it cannot be read."""
    try:
        content: Mapping[str, Any] = json.loads((folder / SITES).read_bytes())
        roster = Roster(str(content["run"]), content["visits"])
        for number, site in content["sites"].items():
            roster.known[int(number)] = Known(**site)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(
            f"{folder / SITES}: cannot be read ({error}); start again with --overwrite"
        ) from error
    return roster


@final
@dataclass(frozen=True)
class SitesRun:
    """A run on sites as its server sees it; ``names`` are those of the possible answers."""

    config: Config
    dataset: data.Dataset
    hardware: Hardware
    loaded: Loaded
    task: Task
    train: Encoded
    test: Encoded
    method: Method
    names: Sequence[str]
    roster: Roster

    @cached_property
    def agreed(self) -> bytes:
        """Return the digest of what server and sites must agree on."""
        return agreement(self.config, self.method, self.names, self.loaded.digest)

    @cached_property
    def scored(self) -> Encoded:
        """Return the texts that the server scores; none where the sites do."""
        return to_score(self.config.evaluation, self.test, len(self.dataset.test))

    @property
    def clients(self) -> list[Client]:
        """Return the clients whose sites are online."""
        return self.roster.clients

    def first_state(self) -> State:
        """Return the state before the first round."""
        return self.method.init(self.loaded.base, self.config.seed)

    def run_row(self) -> RunRow:
        """Return the first row of the ledger."""
        row = row_of(
            self.config,
            self.task,
            self.loaded,
            self.hardware,
            data=self.dataset.name,
            data_digest=self.dataset.digest(),  # of the server's own texts: it knows no others
            clients=len(self.roster.known),
            majority=None,
            partition_digest=self.roster.digest(),
        )
        # Who holds what is the sites' affair: what the settings say of it is not what was run.
        settings = {name: value for name, value in row.settings.items() if name != "partition"}
        return replace(row, settings=settings)


def sites_run(
    config: Config, roster: Roster, hardware: Hardware | None, reuse: SitesRun | None
) -> SitesRun:
    """Build the server's half of what ``config`` describes.

    ``hardware``: as an earlier start of the same run resolved it. ``reuse``: a run whose data and
    model are taken over where the settings agree. BadInput for settings that do not work together.
    """
    check_replies(config.wrap, config.federation.clients_per_round)
    check_privacy(config)
    same_data = reuse is not None and (
        (reuse.config.data, reuse.config.task) == (config.data, config.task)
    )
    dataset = reuse.dataset if reuse is not None and same_data else read_test(config)
    names = _names(config, dataset)
    task = make_task(config.task, names, config.model.max_length)
    chosen = hardware or hardware_for(config, task, reuse)
    use(chosen)
    model = tokenised(config, dataset, task, chosen, reuse)
    return SitesRun(
        config=config,
        dataset=dataset,
        hardware=chosen,
        loaded=model.loaded,
        task=model.task,
        train=model.train,
        test=model.test,
        method=config.build_method(),
        names=names,
        roster=roster,
    )


def _names(config: Config, dataset: data.Dataset) -> tuple[str, ...]:
    """Return the names of the possible answers, without any training text."""
    # Tasks look at train; what they look for must be in the test texts just as well.
    stand_in = data.Dataset(dataset.name, dataset.test, dataset.test, dataset.test, dataset.listed)
    try:
        return TASKS[config.task.kind].names(stand_in)
    except (KeyError, IndexError) as error:
        raise BadInput(
            f"task.kind = {config.task.kind!r}: the server needs test texts of its own; "
            "name a file in data.test"
        ) from error
