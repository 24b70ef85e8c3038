"""Faults between a server and its sites, each injected: what a site that was killed at any moment, a reply that went astray,
a full disk or a server that was killed at any step of a round costs. Where nothing may be lost, the end is that of an
undisturbed run in one process, to the bit. See docs/reliability.md.

All is the product's own code but for HTTP: sites keep their state on disk, and are killed by an exception that nobody
catches, after which all but the disk is gone. The server is a forked process, killed by SIGKILL.
"""

import errno
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final
from unittest import mock

import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.deployment import memories, replies, serve, server
from fedpeft.deployment.carving import carve
from fedpeft.deployment.join import Answering
from fedpeft.deployment.own import OwnRun
from fedpeft.deployment.replies import LastReply
from fedpeft.deployment.serve import Job, resumed, serve_one
from fedpeft.deployment.server import SitesRun
from fedpeft.deployment.site import Site
from fedpeft.deployment.trainer import Trainer
from fedpeft.engines.flower import engine, sites
from fedpeft.engines.flower.connector import replied
from fedpeft.engines.flower.engine import FlowerEngine
from fedpeft.engines.flower.grid import FAILED
from fedpeft.engines.flower.stock import StockSites
from fedpeft.engines.local import LocalEngine
from fedpeft.errors import BadInput, WireError
from fedpeft.experiment import rounds
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.claim import claimed
from fedpeft.experiment.config import Config, from_tree, merge
from fedpeft.experiment.recorder import Recorder
from fedpeft.experiment.rounds import run_rounds
from fedpeft.experiment.run import begin_in, start
from fedpeft.federation import checkpoint, client
from fedpeft.federation import server as loop
from fedpeft.federation.memory import Memories
from fedpeft.ledger import ClientRow, Ledger, Row
from fedpeft.training.optimizer import Optimizer
from fedpeft.types import Client, State
from fedpeft.wire import durable
from fedpeft.wire.frames import Frame
from tests.e2e.builders import LABELS, Ground, assert_same, write_ground
from tests.parity.here import Here
from tests.parity.sockets import Behind, behind_sockets, grid_of, own_site
from tests.parity.test_deployment import last_state, of_sites, rows, write_test

ROUNDS = 3
VICTIM = 1
NODE = 100 + VICTIM
GONE = 5
"""Flower's code for a node that has left."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return write_ground(tmp_path_factory.mktemp("ground"))


def settings(ground: Ground, *changes: Mapping[str, Any]) -> Config:
    """Return the settings of three clients that remember an anchor for good, and an optimizer from round to round."""
    return ground.chosen(
        {"method": {"name": "federa", "rank": 1}, "name": "faults", "engine": {"stack": 1}},
        {"partition": {"clients": 3}, "data": {"labels": list(LABELS)}},
        {"federation": {"rounds": ROUNDS, "clients_per_round": 3, "min_replies": 1}},
        {"training": {"steps": 1, "batch_size": 4, "keep_optimizer": True}},
        {"evaluation": {"every": 1, "limit": 8}},
        *changes,
    )


@dataclass(frozen=True)
class Undisturbed:
    """A run in one process, and what it ends in."""

    federation: Federation
    folder: Path
    state: State


@pytest.fixture(scope="module")
def undisturbed(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    federation = build(settings(ground))
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return Undisturbed(federation, folder, start(federation, folder))


@pytest.fixture(scope="module")
def without_victim(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> State:
    """The end of the same run where the victim is not asked in the second round."""
    federation = undisturbed.federation
    folder = tmp_path_factory.mktemp("without") / "run"

    def cohort(round_number: int, _tries: int) -> Sequence[Client]:
        away = {VICTIM} if round_number == 1 else set()
        return [one for one in federation.clients if one.id not in away]

    kept = Memories()
    here = LocalEngine(federation.worker, kept)
    with claimed(folder):
        begin = begin_in(folder, federation, kept)
        return run_rounds(federation, here, folder, begin, lambda _: None, cohort)


@pytest.fixture(scope="module")
def folders(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return carve(undisturbed.federation.config, tmp_path_factory.mktemp("sites"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can be made here, and nobody waits long between two looks."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(sites, "POLL", 0.002)
    monkeypatch.setattr(engine, "LOOK", 0.01)


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it, and nobody finishes what he was at."""


Death = Callable[[], Any]
"""Gives a context in which a site dies at some moment of its work, once."""


@final
@dataclass
class Mortal:
    """A site that may be killed: what it has on disk stays, all else is gone.

    ``asked``: how often it was asked to train. ``fates``: that number -> what happens to it meanwhile.
    ``spare``: what sites of other tests have built, of which data and model are taken over: reading them takes its time.
    """

    site: Site
    fates: Mapping[int, Death] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    asked: int = 0
    trainer: Trainer | None = None
    spare: dict[int, OwnRun] = field(default_factory=dict)

    def ask(self, frame: Frame) -> Frame:
        """Answer as the trainer's process does; a dead one is started again."""
        if self.trainer is None:
            self.trainer = Trainer(self.site, self.errors.append)
            self.trainer._run = self.spare.get(self.site.client)
        answer = self.trainer.answer(frame)
        if self.trainer._run is not None:
            self.spare[self.site.client] = self.trainer._run
        return answer

    def answer(self, message: Message) -> Message:
        """Answer as the connector does; of one that dies Flower says that it has left."""
        asker: Any = self
        answering = Answering(self.site, asker, self.said.append)
        self.asked += message.metadata.message_type == MessageType.TRAIN
        content: RecordDict | Error
        try:
            with self.fates.get(self.asked, nullcontext)():
                content = replied(answering, message.metadata.message_type, message.content)
        except WireError as error:
            content = Error(FAILED, str(error))
        except Killed:
            self.trainer = None
            content = Error(GONE, "the node is unavailable")
        return Message(content, reply_to=message)


@pytest.fixture(scope="module")
def spare() -> dict[int, OwnRun]:
    return {}


@pytest.fixture
def held(ground: Ground, folders: list[Path], spare: dict[int, OwnRun]) -> Iterator[list[Mortal]]:
    """Three sites, fresh."""
    made: list[Mortal] = []
    for number, path in enumerate(folders):
        site = own_site(number, path, {"bert": str(ground.model)})
        made.append(Mortal(site, spare=spare))
    yield made
    for one in made:
        shutil.rmtree(one.site.state)


@final
@dataclass
class Served:
    """Runs of the server's, one after another, in a folder of their own."""

    config: Config
    folder: Path
    built: list[SitesRun]
    said: list[str] = field(default_factory=list)

    def play(self, grid: Here, *, resume: bool = False) -> None:
        """Serve the run to the sites of ``grid``, or go on with it."""
        job = resumed(self.folder, self.said.append) if resume else Job(self.config, self.folder)
        there = StockSites(grid)
        with claimed(self.folder):
            reuse = self.built[-1] if self.built else None
            self.built.append(
                serve_one(job, lambda: nullcontext(there), lambda: None, reuse, self.said.append)
            )

    def lost(self) -> dict[tuple[int, int], str]:
        """Return (round, client) -> reason of all rows of lost clients."""
        found: dict[tuple[int, int], str] = {}
        for row in rows(self.folder):
            if row["lost"] is not None:
                found[int(str(row["round"])), int(str(row["client"]))] = str(row["lost"])
        return found


Serving = Callable[..., Served]


@pytest.fixture(scope="module")
def built() -> list[SitesRun]:
    """What servers of this module have built, for the next one to take over."""
    return []


@pytest.fixture
def serving(undisturbed: Undisturbed, built: list[SitesRun], tmp_path: Path) -> Serving:
    """Gives a server of the undisturbed run's settings, with changes."""

    def make(*changes: Mapping[str, Any]) -> Served:
        test = tmp_path / "test.jsonl"
        write_test(undisturbed.federation, test)
        (tmp_path / "state").mkdir(exist_ok=True)
        plain = of_sites(undisturbed.federation.config, test, tmp_path)
        config = from_tree(merge(json.loads(plain.to_json()), *changes))
        return Served(config, tmp_path / "served", built)

    return make


def assert_undisturbed(served: Served, undisturbed: Undisturbed) -> None:
    """Assert that nothing was lost: state and rows are those of the undisturbed run."""
    assert rows(served.folder) == rows(undisturbed.folder)
    assert_same(last_state(served.folder), undisturbed.state)


@contextmanager
def dying(owner: Any, name: str, *, call: int = 1, after: bool = False) -> Iterator[None]:
    """Let whoever calls ``owner.name`` for the ``call``-th time die, before or after it has done its work."""
    real, calls = getattr(owner, name), [0]

    def fatal(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] != call:
            return real(*arguments, **named)
        if after:
            real(*arguments, **named)
        raise Killed

    with mock.patch.object(owner, name, fatal):
        yield


DEATHS: Mapping[str, Death] = {
    "before it reads what it is asked": partial(dying, Answering, "__call__"),
    "before it trains": partial(dying, client, "fit"),
    "in the middle of its training": partial(dying, Optimizer, "step", call=2),
    "when it has trained": partial(dying, client, "fit", after=True),
    "before it writes its memory": partial(dying, memories, "write"),
    "half-way through writing its memory": partial(dying, Path, "replace"),
    "before it forgets older memories": partial(dying, memories, "still_needed"),
    "before it keeps its reply": partial(dying, LastReply, "put"),
    "before it sends its reply": partial(dying, LastReply, "put", after=True),
}


def test_a_site_killed_at_any_moment_costs_no_bit(
    ground: Ground, serving: Serving, held: list[Mortal], tmp_path: Path
) -> None:
    """One death a round, each time while the request is answered for the first time."""
    # Two steps, so that there is a moment between them.
    longer = {"federation": {"rounds": 1 + len(DEATHS)}, "training": {"steps": 2}}
    federation = build(settings(ground, longer))
    due = Undisturbed(federation, tmp_path / "due", start(federation, tmp_path / "due"))
    victim, killed_at = held[VICTIM], list[str]()

    @contextmanager
    def noted(moment: str) -> Iterator[None]:
        with DEATHS[moment]():
            try:
                yield
            except Killed:
                killed_at.append(moment)
                raise

    # Round 0 goes well; from then on every second request is one that was asked before.
    victim.fates = {2 + 2 * number: partial(noted, one) for number, one in enumerate(DEATHS)}
    served = serving(longer)
    served.play(grid_of(held))
    assert killed_at == list(DEATHS)
    assert_undisturbed(served, due)
    # What had been kept was not worked on again.
    assert len([line for line in victim.said if "answered as before" in line]) == 1
    assert not [*victim.site.state.rglob("*.tmp")]


def astray(answer: Message) -> list[Message]:
    """Lose an answer of which the site believes that it has arrived."""
    del answer
    return []


def once(answering: Callable[[Message], list[Message]]) -> Callable[[Message], list[Message]]:
    """Return what becomes of answers if this happens to the second one alone."""
    count = [0]

    def become(answer: Message) -> list[Message]:
        count[0] += 1
        return answering(answer) if count[0] == 2 else [answer]

    return become


def test_a_reply_that_is_lost_costs_its_client_the_round_and_no_more(
    serving: Serving, held: list[Mortal], without_victim: State
) -> None:
    """The site has stored a new memory and the server assumes the old one, which the site has still."""
    grid = grid_of(held)
    grid.spoil[NODE] = once(astray)
    served = serving({"server": {"deadline": 0.3}})
    served.play(grid)
    assert served.lost() == {(1, VICTIM): "no answer within 0.3 s"}
    assert_same(last_state(served.folder), without_victim)


def test_a_reply_beyond_the_deadline_is_not_counted_when_it_comes(
    serving: Serving, held: list[Mortal], without_victim: State
) -> None:
    """A slow site: its answer arrives a round later, before the answer to what it was asked then."""
    grid, late = grid_of(held), list[Message]()

    def overtaken(answer: Message) -> list[Message]:
        if held[VICTIM].asked == 2:
            late.append(answer)
            return []
        # Under the number of the first question, and once more as if it were an answer to this one.
        for one in late:
            grid._answers[one.metadata.reply_to_message_id] = [one]
        return [*late, answer]

    grid.spoil[NODE] = overtaken
    served = serving({"server": {"deadline": 0.3}})
    served.play(grid)
    assert len(late) == 1
    assert served.lost() == {(1, VICTIM): "no answer within 0.3 s"}
    assert_same(last_state(served.folder), without_victim)


def test_a_round_below_its_quorum_is_played_again_and_sites_do_not_train_twice_for_it(
    serving: Serving, held: list[Mortal], undisturbed: Undisturbed
) -> None:
    grid = grid_of(held)
    grid.spoil[NODE] = once(astray)
    quorum = {"federation": {"min_replies": 3}, "server": {"deadline": 0.3, "tries": 2}}
    served = serving(quorum)
    served.play(grid)
    assert_same(last_state(served.folder), undisturbed.state)
    lost = served.lost()
    assert lost.keys() == {(1, 0), (1, 1), (1, 2)}
    assert lost[1, VICTIM] == "no answer within 0.3 s"
    assert lost[1, 0] == "only 2 usable replies, 3 needed"
    for one in held:
        assert len([line for line in one.said if "answered as before" in line]) == 1
        assert len([line for line in one.said if "trained" in line]) == ROUNDS


def test_replies_that_come_twice_count_once(
    serving: Serving, held: list[Mortal], undisturbed: Undisturbed
) -> None:
    grid = grid_of(held)
    grid.spoil = dict.fromkeys(grid.nodes, lambda answer: [answer, answer])
    served = serving()
    served.play(grid)
    assert_undisturbed(served, undisturbed)


def full(*_: object, **__: object) -> None:
    """Write nothing: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")


def test_a_site_whose_disk_is_full_is_lost_for_the_round_and_says_why(
    serving: Serving, held: list[Mortal], without_victim: State
) -> None:
    """It could not remember what its reply makes the server believe, so there is no reply."""
    held[VICTIM].fates = {2: partial(mock.patch.object, memories, "write", full)}
    served = serving()
    served.play(grid_of(held))
    assert served.lost() == {(1, VICTIM): "OSError: No space left on device; see the site's log"}
    [error] = held[VICTIM].errors
    assert "No space left on device: '/somewhere'" in str(error)
    assert_same(last_state(served.folder), without_victim)


def test_a_site_that_cannot_keep_its_reply_sends_it_all_the_same(
    serving: Serving, held: list[Mortal], undisturbed: Undisturbed
) -> None:
    held[VICTIM].fates = {2: partial(mock.patch.object, replies, "write", full)}
    served = serving()
    served.play(grid_of(held))
    assert_undisturbed(served, undisturbed)
    [line] = [line for line in held[VICTIM].said if "No space left" in line]
    assert str(held[VICTIM].site.state) not in line


@contextmanager
def full_for(owner: Any, name: str, ending: str) -> Iterator[None]:
    """Let the disk be full for files whose names end in ``ending``."""
    real = getattr(owner, name)

    def writing(path: Path, content: bytes, **how: bool) -> None:
        if path.name.endswith(ending):
            full()
        real(path, content, **how)

    with mock.patch.object(owner, name, writing):
        yield


@pytest.mark.parametrize("ending", ["000002.state", "000002.json"])
def test_a_server_whose_disk_is_full_ends_in_one_line_and_goes_on_when_there_is_room(
    ending: str, serving: Serving, held: list[Mortal], undisturbed: Undisturbed
) -> None:
    served, grid = serving(), grid_of(held)
    with full_for(checkpoint, "write", ending), pytest.raises(BadInput) as refusal:
        served.play(grid)
    line = str(refusal.value)
    assert "\n" not in line
    assert "what came after round 1 cannot be saved (No space left on device)" in line
    assert f"fedpeft resume {served.folder}" in line
    assert not [*served.folder.rglob("*.tmp")]
    served.play(grid, resume=True)
    assert_undisturbed(served, undisturbed)


def test_a_server_without_room_for_what_it_offers_begins_no_run(
    serving: Serving, held: list[Mortal]
) -> None:
    served = serving()
    with full_for(serve, "write", "offer.json"), pytest.raises(BadInput, match="No space left"):
        served.play(grid_of(held))
    assert not served.folder.exists()


def test_a_server_without_room_for_a_site_that_joins_goes_on_with_it_later(
    serving: Serving, held: list[Mortal]
) -> None:
    served, grid = serving({"server": {"min_sites": 2}}), grid_of(held)
    late = grid.nodes.pop(102)

    def joining(answer: Message) -> list[Message]:
        grid.nodes[102] = late
        return [answer]

    grid.spoil[NODE] = joining
    with full_for(server, "write", "sites.json"), pytest.raises(BadInput) as refusal:
        served.play(grid)
    assert "No space left" in str(refusal.value)
    assert f"fedpeft resume {served.folder}" in str(refusal.value)
    served.play(grid, resume=True)
    found = [(row["round"], row["client"], row["lost"]) for row in rows(served.folder)]
    expected = [(0, 0, None), (0, 1, None)]
    expected += [(number, one, None) for number in (1, 2) for one in (0, 1, 2)]
    assert found == expected


@pytest.fixture(scope="module")
def behind(ground: Ground, folders: list[Path]) -> Iterator[list[Behind]]:
    """Three sites whose trainers listen in threads of this process: they outlive a server that is forked and killed."""
    made = [own_site(n, path, {"bert": str(ground.model)}) for n, path in enumerate(folders)]
    with behind_sockets(made) as found:
        yield found
    for site in made:
        shutil.rmtree(site.state)


def die() -> None:
    """Be killed, as a process."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def fatal(
    owner: Any, name: str, when: Callable[..., bool], *, count: int = 1, after: bool = False
) -> Iterator[None]:
    """Kill this process before (or ``after``) the ``count``-th call of ``owner.name`` with arguments that are meant."""
    real, calls = getattr(owner, name), [0]

    def calling(*arguments: Any, **named: Any) -> Any:
        calls[0] += bool(when(*arguments, **named))
        meant = calls[0] == count and when(*arguments, **named)
        if meant and not after:
            die()
        result = real(*arguments, **named)
        if meant:
            die()
        return result

    with mock.patch.object(owner, name, calling):
        yield


def always(*_: object, **__: object) -> bool:
    return True


def of_second_round(_: object, round_number: int, _tries: int) -> bool:
    return round_number == 1


def row_of_second_round(_: Ledger, row: Row) -> bool:
    return isinstance(row, ClientRow) and row.round == 1


def state_after(rounds_done: int, *arguments: Any) -> bool:
    """Return whether one of the arguments is the state after so many rounds."""
    return any(isinstance(one, State) and one.round == rounds_done for one in arguments)


def named(ending: str, path: Path, _: bytes) -> bool:
    """Return whether a file of that name is written."""
    return path.name == ending


@contextmanager
def halved(ending: str) -> Iterator[None]:
    """Kill this process half-way through a file of that name."""

    def writing(path: Path, content: bytes) -> None:
        if path.name == ending:
            path.with_name(f"{path.name}.tmp").write_bytes(content[: len(content) // 2])
            die()
        durable.write(path, content)

    with mock.patch.object(checkpoint, "write", writing):
        yield


@contextmanager
def in_the_middle_of_a_row() -> Iterator[None]:
    """Kill this process when half of a row of the second round is in the ledger's file."""
    real = Ledger.append

    def appending(ledger: Ledger, row: Row) -> None:
        real(ledger, row)
        if row_of_second_round(ledger, row):
            ledger._file.flush()
            os.ftruncate(ledger._file.fileno(), ledger._path.stat().st_size - 20)
            die()

    with mock.patch.object(Ledger, "append", appending):
        yield


after_two, after_three = partial(state_after, 2), partial(state_after, 3)
manifest = partial(named, "000002.json")
STEPS: Mapping[str, tuple[int, Death]] = {
    "before the cohort is drawn": (1, partial(fatal, serve._Gathering, "cohort", of_second_round)),
    "before anyone is asked": (1, partial(fatal, FlowerEngine, "exchange", always)),
    "when one of three was asked": (1, partial(fatal, engine, "push", always, after=True)),
    "when one of three replies is in": (1, partial(fatal, loop, "_check_norm", always, count=2)),
    "when all replies are in, before they are merged": (
        1,
        partial(fatal, loop, "_check_norm", always, count=3, after=True),
    ),
    "when they are merged, before that is written down": (
        1,
        partial(fatal, Ledger, "append", row_of_second_round),
    ),
    "in the middle of a row": (1, in_the_middle_of_a_row),
    "before the score": (1, partial(fatal, rounds, "evaluation_row", after_two)),
    "before the ledger is on the disk": (1, partial(fatal, Recorder, "save", after_two)),
    "before the checkpoint": (1, partial(fatal, checkpoint, "save", after_two)),
    "in the middle of the state's file": (1, partial(halved, "000002.state")),
    "when the state is there, before its manifest": (
        1,
        partial(fatal, checkpoint, "write", manifest),
    ),
    "in the middle of the manifest": (1, partial(halved, "000002.json")),
    "when the manifest is there, before older files go": (
        2,
        partial(fatal, checkpoint, "write", manifest, after=True),
    ),
    "when the last checkpoint is made, before anyone is told": (
        3,
        partial(fatal, checkpoint, "save", after_three, after=True),
    ),
}
"""The steps of a round in their order, each with the rounds that are on the disk when the server is killed there. All but the
last are of the second round, which is begun again and again; all but the first are met by a server that goes on."""


def killed(served: Served, grid: Here, death: Death, *, resume: bool) -> None:
    """Serve the run, or go on with it, in a forked process that is killed on the way."""
    process = os.fork()
    if process == 0:
        try:
            with death():
                served.play(grid, resume=resume)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), "the server has not been killed"
    assert os.WTERMSIG(status) == signal.SIGKILL


def last_round(folder: Path) -> int:
    return max(int(path.stem) for path in (folder / "checkpoints").glob("*.json"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the server is a forked process")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_server_killed_at_any_step_of_a_round_loses_that_round_at_most(
    serving: Serving, behind: list[Behind], undisturbed: Undisturbed
) -> None:
    """Again and again, at the next step each time."""
    served, grid = serving(), grid_of(behind)
    for number, (step, (left, death)) in enumerate(STEPS.items()):
        killed(served, grid, death, resume=number > 0)
        assert last_round(served.folder) == left, step
    served.play(grid, resume=True)
    assert_undisturbed(served, undisturbed)
    assert not [*served.folder.rglob("*.tmp")]


SECURE = {"wrap": [{"name": "secagg", "bits": 56}], "training": {"keep_optimizer": False}}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the server is a forked process")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.slow
def test_a_server_killed_between_the_exchanges_of_secure_aggregation_begins_the_round_anew(
    ground: Ground, serving: Serving, behind: list[Behind], tmp_path: Path
) -> None:
    """In each exchange of the second round, when one of three has been asked; what sites have kept for the next exchange is
    of no use any more."""
    changes = {**SECURE, "federation": {"rounds": 2}}
    due = start(build(settings(ground, changes)), tmp_path / "due")
    served, grid = serving(changes), grid_of(behind)
    for exchange in range(4):
        asked = 3 * exchange + 1 + (0 if exchange else 3 * 4)  # the first server plays round 0, too
        death = partial(fatal, engine, "push", always, count=asked, after=True)
        killed(served, grid, death, resume=exchange > 0)
        assert last_round(served.folder) == 1
    served.play(grid, resume=True)
    assert served.lost() == {}
    assert_same(last_state(served.folder), due)


def test_the_servers_clock_may_be_set_during_a_run(
    serving: Serving, held: list[Mortal], undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days forwards and back; deadlines and waits are those of a clock that nobody sets."""
    real, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return real() + (86400.0 if looks[0] % 2 else -86400.0)

    monkeypatch.setattr(time, "time", jumping)
    served = serving({"server": {"deadline": 30.0}})
    served.play(grid_of(held))
    assert looks[0]
    assert_undisturbed(served, undisturbed)
