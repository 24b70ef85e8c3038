"""``fedpeft serve``: the server of runs whose clients are sites."""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol, final

from fedpeft.deployment.certificates import loopback_tls
from fedpeft.deployment.metrics import LOOPBACK, metrics_endpoint
from fedpeft.deployment.now import Announced
from fedpeft.deployment.offer import Offer, offer_of
from fedpeft.deployment.server import Known, Roster, SitesRun, read_roster, sites_run
from fedpeft.deployment.telling import Tell, in_lines
from fedpeft.engines.flower.engine import FlowerEngine
from fedpeft.engines.flower.sites import OFFER, Door, serving
from fedpeft.errors import BadInput, WireError
from fedpeft.experiment.claim import claimed
from fedpeft.experiment.config import Config
from fedpeft.experiment.pieces import visits_per_text
from fedpeft.experiment.privacy import drawn_in_secret, draws_in_secret
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG, OnProgress, settings_digests
from fedpeft.experiment.rounds import run_rounds
from fedpeft.experiment.run import begin_in, finished, read_settings, run_row
from fedpeft.experiment.run_folder import SITES, beginning
from fedpeft.federation import checkpoint
from fedpeft.federation.checkpoint import Checkpoint
from fedpeft.federation.cohort import SAMPLERS
from fedpeft.federation.memory import Memories
from fedpeft.seeds import derive
from fedpeft.training.hardware import Hardware
from fedpeft.types import Client
from fedpeft.wire.durable import write
from fedpeft.wire.frames import check_private

Say = Callable[[str], None]
LOOK: Final = 0.3
"""Seconds between two looks for sites that join."""
RETURN: Final = 60.0
"""Seconds for which a run that is gone on with waits for all sites that it knows: after a crash of
the server they try again for as long, and not all in the same moment."""


@final
@dataclass(frozen=True)
class Job:
    """One run to serve: its settings, its folder, whether it is gone on with."""

    config: Config
    folder: Path
    resume: bool = False


def job_of(config: Config, folder: Path, *, resume: bool) -> Job:
    """Return the run of ``config`` in ``folder``; gone on with where ``resume`` and it is there."""
    return Job(config, folder, resume=resume and (folder / CONFIG).exists())


def resumed(folder: Path, say: Say) -> Job:
    """Return the run in ``folder``, to be gone on with."""
    config, _, _ = read_settings(folder, say)
    return Job(config, folder, resume=True)


def door_of(config: Config) -> Door:
    """Return how sites reach the server of ``config``; BadInput where something is missing."""
    choice = config.server
    for name in ("certificate", "key", "sites", "state"):
        if getattr(choice, name) is None:
            raise BadInput(f"server.{name} is missing; make all of them with: fedpeft deploy init")
    assert choice.certificate is not None
    assert choice.key is not None
    assert choice.sites is not None
    assert choice.state is not None
    if not choice.sites.is_dir():
        raise BadInput(f"server.sites = {str(choice.sites)!r}: is no folder")
    if not choice.certificate.is_file():
        raise BadInput(f"server.certificate = {str(choice.certificate)!r}: is no file")
    check_private(choice.key, "the private key of the server's certificate")
    return Door(
        host=choice.host,
        port=choice.port,
        certificate=choice.certificate,
        key=choice.key,
        sites=choice.sites,
        state=choice.state,
        database=choice.database,
        embedded=choice.gate,
        link_port=choice.link_port,
    )


def serve(
    jobs: Sequence[Job],
    *,
    overwrite: bool = False,
    say: Say = lambda _: None,
    on_progress: Callable[[Job], OnProgress] = lambda _: lambda _: None,
    on_open: Callable[[], None] = lambda: None,
    tell: Tell | None = None,
) -> list[Path]:
    """Serve runs, one after another, with the same sites, and return their folders.

    Each run's folder is what ``fedpeft run`` would make of it. ``on_open`` is called once sites can
    join. ``tell`` gets events with their fields; left out, ``say`` gets their lines. Raises
    BadInput before anything is started where settings, keys or folders are of no use.
    """
    tell = tell or in_lines(say)
    with ExitStack() as claims:
        for job in sorted(jobs, key=lambda job: job.folder):
            claims.enter_context(_claim(job, overwrite=overwrite))
        door = door_of(jobs[0].config)
        server = claims.enter_context(serving(door, loopback_tls, say))
        # Without the embedded gate it is the SuperLink's port, which the loopback alone reaches.
        host = door.host if door.embedded else LOOPBACK
        way = "at" if door.embedded else "through the proxy in front of"
        tell("open", f"sites can join {way} {host}:{server.port}", host=host, port=server.port)
        if (wanted := jobs[0].config.server.metrics) is not None:
            folders = [job.folder for job in jobs]
            port = claims.enter_context(metrics_endpoint(wanted, folders, say))
            tell("metrics", f"metrics are at http://{LOOPBACK}:{port}/metrics", port=port)
        on_open()
        run: SitesRun | None = None
        for job in jobs:
            if not (job.resume and finished(job.folder, job.config)):
                run = serve_one(
                    job, server.run, server.admit_new, run, say, on_progress(job), tell=tell
                )
    return [job.folder for job in jobs]


def _claim(job: Job, *, overwrite: bool) -> AbstractContextManager[None]:
    """Return the claim on a run's folder."""
    return claimed(job.folder) if job.resume else beginning(job.folder, overwrite=overwrite)


class Reach(Protocol):
    """What reaches the sites of a run."""

    def number_of(self, node: int, said: Mapping[str, Any]) -> int:
        """Return which client a node is; WireError where it is none."""
        ...

    def engine(
        self,
        question: Mapping[str, str],
        admit: Callable[[int, Mapping[str, Any]], int],
        on_fault: Say,
        deadline: float,
        window: int,
    ) -> FlowerEngine:
        """Return an engine whose sites are asked the question first."""
        ...


def serve_one(
    job: Job,
    enter: Callable[[], AbstractContextManager[Reach]],
    admit_new: Callable[[], None],
    reuse: SitesRun | None,
    say: Say,
    on_progress: OnProgress = lambda _: None,
    tell: Tell | None = None,
) -> SitesRun:
    """Serve one run, whose folder is claimed, and return what was built for it.

    ``enter``: begins the run of Flower's. ``admit_new``: lets in sites whose keys are new. ``tell``
    as in ``serve``.
    """
    # 1. What the server needs itself, and where the run stands.
    hardware: Hardware | None = None
    begin: Checkpoint | None = None
    roster = Roster(secrets.token_hex(8))
    if job.resume:
        _, hardware, labels = read_settings(job.folder, say)
        roster = read_roster(job.folder)
        begin = checkpoint.load(job.folder / CHECKPOINTS, settings_digests(job.folder), say)
        run = sites_run(job.config, roster, hardware, reuse)
        _check_same(job.folder, run, labels)
    else:
        run = sites_run(job.config, roster, hardware, reuse)

    # 2. The sites: they are asked what they have, and the run begins with those that are there.
    with enter() as sites:
        tell = tell or in_lines(say)
        gathering = _Gathering(run, sites, admit_new, job.folder, tell)
        engine = gathering.first()
        memories = Memories(elsewhere=True)
        if not job.resume:
            begin = begin_in(job.folder, run, memories, {SITES: roster.content()})
        elif begin is None:  # killed before the first checkpoint
            begin = Checkpoint(run.first_state(), memories, ledger=0)
        # 3. The rounds.
        assert begin is not None
        run_rounds(
            run,
            Announced(engine, job.folder),
            job.folder,
            begin,
            on_progress,
            gathering.cohort,
            tries=job.config.server.tries,
        )
    return run


def _check_same(folder: Path, run: SitesRun, labels: Sequence[str]) -> None:
    """Raise BadInput where labels or weights are not those that the run was started on."""
    row = run_row(folder)
    if row is not None and row.model_digest != run.loaded.digest:
        raise BadInput(
            f"{folder}: the weights of the model had digest {row.model_digest} when the run was "
            f"started, and now {run.loaded.digest}; bring back what it was started on"
        )
    if tuple(labels) != tuple(run.task.labels):
        raise BadInput(
            f"{folder}: the labels were {', '.join(labels)} when the run was started, and now "
            f"{', '.join(run.task.labels)}; bring back what it was started on"
        )


@final
class _Gathering:
    """Brings the sites of a run together, and draws its cohorts from those that are online."""

    def __init__(
        self,
        run: SitesRun,
        sites: Reach,
        admit_new: Callable[[], None],
        folder: Path,
        tell: Tell,
    ) -> None:
        self._run = run
        self._sites = sites
        self._admit_new = admit_new
        self._folder = folder
        self._tell = tell
        self._saved = 0  # sites that the run's folder knows
        labels = run.dataset.listed
        self._offer = offer_of(run.config, run.roster.run, version("fedpeft"), labels)
        self._engine = self._engine_for(replace(self._offer, visits=run.roster.visits))

    def first(self) -> FlowerEngine:
        """Wait for the sites that the first round needs, and return the engine that reaches them.

        BadInput where too few join in time.
        """
        run, roster = self._run, self._run.roster
        is_new = roster.visits is None
        plan = run.config
        if is_new:
            self._wait_for(plan.server.min_sites)
        else:
            # With all of them it ends as if it had never been stopped; but some may have left for
            # good.
            self._online_within(len(roster.known), RETURN)
            self._wait_for(plan.federation.min_replies)
        if is_new:
            texts = sum(site.texts for site in roster.known.values())
            roster.visits = visits_per_text(run.config, len(roster.known), texts)
            # From here on all sites are told whether hidden states are worth keeping.
            offer = replace(self._offer, visits=roster.visits).to_json()
            self._engine = replace(self._engine, config=offer)
            self._publish(offer)
        where, tests = run.config.evaluation.where, sum(s.tests for s in roster.known.values())
        if where == "sites" and not tests:
            raise BadInput("evaluation.where = 'sites': no site has test texts (data.test)")
        self._saved = len(roster.known)
        return self._engine

    def cohort(self, round_number: int, tries: int) -> Sequence[Client]:
        """Return the clients of a round: drawn from those that are online, with a quorum at least.

        ``tries``: how often the round was played before; each time the cohort is a fresh one.
        """
        config = self._run.config
        self._admit_new()
        self._wait_for(config.federation.min_replies)
        if len(self._run.roster.known) != self._saved:
            self._save_roster()
            self._saved = len(self._run.roster.known)
        if tries:
            self._tell(
                "again",
                f"round {round_number}: too few replies; played again with a fresh cohort",
                round=round_number,
                tries=tries,
            )
        if draws_in_secret(config):
            return drawn_in_secret(self._run.clients, config.federation.clients_per_round)
        seed = derive(config.seed, "again", tries) if tries else config.seed
        draw, count = SAMPLERS[config.federation.sampling], config.federation.clients_per_round
        return draw(self._run.clients, count, seed, round_number)

    def _save_roster(self) -> None:
        """Write down the sites that are known; BadInput where the disk is full."""
        try:
            self._run.roster.save(self._folder)
        except OSError as error:
            raise BadInput(
                f"{self._folder}: a site that has joined cannot be written down "
                f"({error.strerror}); make the folder writable, with room, "
                f"then: fedpeft resume {self._folder}"
            ) from error

    def _wait_for(self, count: int) -> None:
        """Wait until ``count`` sites are online; BadInput where they are not in time."""
        joining = self._run.config.server.joining
        online = self._online_within(count, joining)
        if online < count:
            raise BadInput(
                f"{online} of {count} sites are online after {joining:g} s; start the others "
                "with: fedpeft join site.toml, and try again"
            )

    def _online_within(self, count: int, seconds: float) -> int:
        """Wait until ``count`` sites are online, or so many seconds; return how many are."""
        roster, deadline, told = self._run.roster, time.monotonic() + seconds, -1
        while True:
            self._engine.nodes.look()
            roster.online = tuple(self._engine.nodes.online())
            online = len(roster.clients)
            if online >= count or time.monotonic() > deadline:
                return online
            if online != told:
                self._tell(
                    "waiting",
                    f"{online} of {count} sites are online; waiting for others",
                    online=online,
                    wanted=count,
                )
                told = online
            time.sleep(LOOK)
            self._admit_new()

    def _engine_for(self, offer: Offer) -> FlowerEngine:
        """Return the engine whose sites are asked what they have for ``offer``."""
        choice = self._run.config.server
        self._publish(offer.to_json())
        return self._sites.engine(
            {"config": offer.to_json()},
            self._admit,
            lambda reason: self._tell("refused", f"a site is not taken: {reason}", reason=reason),
            choice.deadline,
            choice.window,
        )

    def _publish(self, offer: str) -> None:
        """Write down what is offered, for sites that ask the gate before they join."""
        assert self._run.config.server.state is not None
        content = {
            "offer": offer,
            "weights": self._run.loaded.digest,
            "agreed": self._run.agreed.hex(),
            "flwr": version("flwr"),
        }
        path = self._run.config.server.state / OFFER
        try:
            write(path, json.dumps(content).encode())
        except OSError as error:
            raise BadInput(
                f"{path}: cannot be written ({error.strerror}); make room, and start again"
            ) from error

    def _admit(self, node: int, said: Mapping[str, Any]) -> int:
        """Return which client a node is; WireError where it is none of this run's."""
        number = self._sites.number_of(node, said)
        if said.get("agreed") != self._run.agreed.hex():
            raise WireError(self._disagreement(number, said))
        known = Known(*(_count(number, said, name) for name in ("examples", "texts", "tests")))
        if number not in self._run.roster.known:
            self._tell(
                "joined",
                f"site {number} has joined, with {known.examples} examples",
                site=number,
                examples=known.examples,
            )
        self._run.roster.known[number] = known
        return number

    def _disagreement(self, number: int, said: Mapping[str, Any]) -> str:
        """Return why a site's work would be another than the server's."""
        weights, own = said.get("weights"), self._run.loaded.digest
        if weights != own:
            return f"site {number} has other weights: digest {weights!r:.40}, here {own!r}"
        there, here = said.get("version"), version("fedpeft")
        return f"site {number} would train otherwise: fedpeft {there!r:.20} there, {here!r} here"


def _count(number: int, said: Mapping[str, Any], name: str) -> int:
    """Return a number that a site says; WireError for anything else."""
    value = said.get(name)
    least = 0 if name == "tests" else 1
    if type(value) is not int or not least <= value <= 10**12:
        raise WireError(f"site {number} says that it has {value!r:.20} {name}")
    return value
