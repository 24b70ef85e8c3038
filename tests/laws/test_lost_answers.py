"""A SuperLink does what it is asked, and is killed before its answer arrives; or the gate is, or the network breaks.

Whoever has asked asks again, but a SuperLink that has handed out a message does not do it twice. The SuperLink here is
Flower's own, its database and the functions behind its routes, without HTTP; what it knows is in its database, so that one
that was killed and started again is the same one. The site's session, its grid and its engine are the product's.
"""

import contextlib
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import NOOP_FLWR_AID
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from fedpeft.deployment.certificates import authority, site_key
from fedpeft.engines.flower import connector, engine, sites
from fedpeft.engines.flower.connector import Asked, Session, forever
from fedpeft.engines.flower.engine import FlowerEngine
from fedpeft.engines.flower.reach import Gate, public_bytes
from fedpeft.types import Client, Lost, Reply

Call = tuple[str, str]
"""Who calls the SuperLink, ``server`` or ``site``, and what."""
Loss = tuple[str, str, int]
"""Whose call, and which one of that name, counted from 1, does not get its answer."""
MISSING = 10.0
PATIENCE = 20.0
"""Seconds, so long that only what waits in vain sees their end."""
IDLE = frozenset({"GetNodes", "SendNodeHeartbeat"})


@final
@dataclass
class Link:
    """Flower's SuperLink with one site's key and a run.

    ``loss``: the call whose answer is lost, once; None for none. ``calls``: those since it was set that carry a message, or
    a part of one, and those with which a session begins and ends.
    """

    state: LinkState
    loss: Loss | None = None
    calls: list[Call] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.run = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
        )
        [self.task] = self.state.get_tasks(run_ids=[self.run])
        assert self.state.claim_task(self.task.task_id)
        assert self.state.activate_task(self.task.task_id)

    def lose(self, loss: Loss | None) -> None:
        """Let an answer be lost from now on."""
        with self.lock:
            self.loss = loss
            self.calls.clear()

    def call(self, who: str, name: str, do: Callable[[], Any]) -> Any:
        """Do what is asked; the answer arrives, or it does not."""
        try:
            answer = do()
        except FlowerError as error:
            request = httpx.Request("POST", "https://localhost/")
            response = httpx.Response(412, json={"code": error.code}, request=request)
            raise httpx.HTTPStatusError("412", request=request, response=response) from error
        # Nobody misses an answer that says that there is nothing, or nothing yet.
        nothing = name == "PullMessages" and not answer.messages_list
        not_yet = name == "PullObject" and not answer.object_available
        if name in IDLE or nothing or not_yet:
            return answer
        with self.lock:
            self.calls.append((who, name))
            if (who, name, self.calls.count((who, name))) == self.loss:
                self.loss = None
                raise httpx.ReadError("reset")
        return answer


class AsServer:
    """What a run's server has of the SuperLink: Flower's own client asks again where the network fails."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        do = getattr(runtime_handlers, HANDLERS[name])
        link = self._link

        def called(request: Any) -> Any:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    return link.call(
                        "server", name, lambda: do(request, state=link.state, task=link.task)
                    )

        return called


class AsSite:
    """What a site has of the SuperLink."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        do = getattr(fleet_handlers, HANDLERS[name])
        state = self._link.state
        store = {"store": state.object_store} if name in STORED else {}
        return lambda request: self._link.call("site", name, lambda: do(request, state, **store))


STORED = frozenset({"PullMessages", "ConfirmMessageReceived"})
HANDLERS = {
    "ActivateNode": "activate_node",
    "ConfirmMessageReceived": "confirm_message_received",
    "DeactivateNode": "deactivate_node",
    "GetNodes": "get_nodes",
    "PullMessages": "pull_messages",
    "PullObject": "pull_object",
    "PushMessages": "push_messages",
    "PushObject": "push_object",
    "SendNodeHeartbeat": "send_node_heartbeat",
}


@final
@dataclass
class There:
    """A site that is online, and the engine that reaches it.

    ``asked``: the requests that have reached the site. ``said``: what it said. ``missed``: the
    messages of which Flower has waited in vain for a part.
    """

    link: Link
    engine: FlowerEngine
    asked: list[bytes]
    said: list[str]
    missed: list[str]

    def exchange(self) -> list[Reply | Lost]:
        """Ask the site what no other test has asked: Flower keeps what is alike once."""
        return list(self.engine.exchange([SITE], lambda _: b"%d" % self.link.run))

    @property
    def due(self) -> list[Reply | Lost]:
        return [Reply(SITE, b"answer to %d" % self.link.run)]

    def settle(self) -> None:
        """Wait until the server knows the site, for ``MISSING`` seconds at most."""
        deadline = time.monotonic() + MISSING
        while 0 not in self.engine.nodes.online():
            assert time.monotonic() < deadline
            self.engine.nodes.look()
            time.sleep(0.005)


SITE = Client(0, examples=1)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> LinkState:
    database = str(tmp_path_factory.mktemp("link") / "link.db")
    factory = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's way with its migrations
        return factory.state()


@pytest.fixture
def there(state: LinkState, monkeypatch: pytest.MonkeyPatch) -> Iterator[There]:
    monkeypatch.setattr(connector, "SOONEST", 0.005)
    monkeypatch.setattr(connector, "LATEST", 0.01)
    monkeypatch.setattr(engine, "LOOK", 0.02)
    monkeypatch.setattr(sites, "POLL", 0.005)
    # For so long, 3 minutes by default, Flower waits for what is missing of a message.
    monkeypatch.setattr(sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", MISSING)
    kept: Any = inflatable_utils.pull_objects.__kwdefaults__
    monkeypatch.setitem(kept, "initial_backoff", 0.01)
    link = Link(state)
    for name, value in {"_task_id": link.task.task_id, "_run_id": link.run, "_node_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)
    private, _ = site_key()
    key = load_ssh_private_key(private, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    gate = Gate("localhost", 1, authority("tests").pem, key)
    state.create_node(NOOP_FLWR_AID, "none", public_bytes(key), 0)
    monkeypatch.setattr(connector, "_client", lambda _: contextlib.nullcontext(AsSite(link)))
    asked, said, sessions = list[bytes](), list[str](), list[Session]()
    missed = list[str]()
    expired = state._on_push_session_expired

    def noted(messages: set[str]) -> None:
        missed.extend(messages)
        expired(messages)

    monkeypatch.setattr(state, "_on_push_session_expired", noted)

    def answer(what: Asked) -> "bytes | dict[str, Any]":
        if what.kind == "query":
            return {"partition-id": 0}
        asked.append(what.request)
        return b"answer to " + what.request

    def be_a_site() -> None:
        forever(gate, answer, 10**6, said.append, sessions.append)

    site = threading.Thread(target=be_a_site, daemon=True)
    site.start()
    grid = HttpGrid(insecure=True, token="none")
    client: Any = AsServer(link)
    grid._client = client
    grid.set_run(Run.create_empty(link.run))
    server: Any = None
    reached = sites.Sites(grid, server)

    def admit(_node: int, about: Any) -> int:
        return int(about["partition-id"])

    through = reached.engine({"config": str(link.run)}, admit, said.append, PATIENCE, 1)
    yield There(link, through, asked, said, missed)
    while site.is_alive():  # in whichever session it is
        for one in sessions:
            one.end()
        site.join(0.05)


PARTS: dict[Call, int] = {
    ("server", "PushMessages"): 1,
    ("server", "PushObject"): 6,
    ("site", "PullMessages"): 1,
    ("site", "PullObject"): 6,
    ("site", "ConfirmMessageReceived"): 1,
    ("site", "PushMessages"): 1,
    ("site", "PushObject"): 5,
    ("server", "PullMessages"): 1,
    ("server", "PullObject"): 5,
    ("server", "ConfirmMessageReceived"): 1,
}
"""All calls of an exchange: a request comes in six parts, itself, two records, and an array's; an answer has a record less."""
LOSSES: list[Loss] = [
    (who, name, part)
    for (who, name), count in PARTS.items()
    for part in ({1, count} if name == "PullObject" else range(1, count + 1))
]
"""Those that the tests lose: what is asked for is asked for again, whichever part it is."""


def test_these_are_the_calls_of_an_exchange(there: There) -> None:
    there.settle()
    there.link.lose(None)
    assert there.exchange() == there.due
    assert Counter(there.link.calls) == PARTS


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: " ".join(map(str, loss)))
def test_whichever_call_of_an_exchange_gets_no_answer_the_reply_comes_at_once(
    loss: Loss, there: There
) -> None:
    """The site is asked once, but for one case: the reply was handed out to the server, and is asked for again."""
    there.settle()
    there.link.lose(loss)
    assert there.exchange() == there.due
    assert there.link.loss is None, "the answer was lost"
    assert there.missed == []
    assert len(there.asked) == (2 if loss == ("server", "PullMessages", 1) else 1)


def test_a_site_whose_first_question_is_lost_is_asked_again(there: There) -> None:
    """Otherwise it would never be known as a site."""
    there.link.lose(("site", "PullMessages", 1))
    there.settle()
    assert there.link.loss is None, "the answer was lost"
    assert there.exchange() == there.due
    assert [line for line in there.said if "joining anew" in line]
