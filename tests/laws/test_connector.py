"""What a site's session bears: a gate or a SuperLink that is restarted, a session that is lost, a clock that is wrong, a key
that is online elsewhere; and what its gate says meanwhile."""

import asyncio
import base64
import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import RecordDict
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import Message, ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import sign_message

from fedpeft.deployment.certificates import authority, site_key
from fedpeft.deployment.join import gate_of
from fedpeft.engines.flower import claim, connector, reach
from fedpeft.engines.flower.connector import Asked, RunOver, Session, SessionLost, forever
from fedpeft.engines.flower.gate import gate, is_signed
from fedpeft.engines.flower.reach import AGAIN, NOT_ACTIVATED, Gate, public_bytes, refused
from fedpeft.engines.flower.sites import numbers_of, write_taken_in
from fedpeft.engines.flower.superlink import Link
from fedpeft.errors import BadInput
from tests.parity.sockets import own_site

USUAL = connector.SOONEST, connector.LATEST


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long before trying again."""
    monkeypatch.setattr(connector, "SOONEST", 0.001)
    monkeypatch.setattr(connector, "LATEST", 0.002)


def status(code: int, content: object = None, **headers: str) -> httpx.HTTPStatusError:
    """Return the error of an answer with this status."""
    request = httpx.Request("POST", "https://localhost/v1/fleet/x")
    response = httpx.Response(code, json=content, headers=headers, request=request)
    return httpx.HTTPStatusError(str(code), request=request, response=response)


DOWN = [httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.ReadTimeout("slow")]


def session(said: list[str], client: Any = None) -> Session:
    return Session(client, 7, said.append)


def answering(*answers: Any) -> Callable[[object], Any]:
    """Return a call that raises or returns one of ``answers`` after the other."""
    left = list(answers)

    def call(_: object) -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


def test_a_site_tries_again_while_gate_or_superlink_are_restarted_and_says_so_once() -> None:
    """Connections are refused or cut off; the gate is there and what is behind it is not."""
    said: list[str] = []
    trouble = [*DOWN, *(status(code) for code in (502, 503, 504, 500))]
    assert session(said)._call(answering(*trouble, "there"), object()) == "there"
    assert said == ["the server is out of reach (ConnectError); trying again"]


@pytest.mark.parametrize(
    ("answer", "raised"),
    [(status(401), SessionLost), (status(412), SessionLost), (status(403), RunOver)],
)
def test_what_does_not_pass_is_not_waited_for(answer: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised):
        session([])._call(answering(answer), object())


class Clock:
    """Stands for a session's event: takes note of how long it is waited for; after so many times the session is lost."""

    def __init__(self, times: int) -> None:
        self.times, self.waits = times, list[float]()

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return len(self.waits) == self.times


def test_an_idle_site_asks_less_and_less_often_and_after_a_message_at_once_and_often_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connector, "SOONEST", USUAL[0])
    monkeypatch.setattr(connector, "LATEST", USUAL[1])
    came = iter([*[False] * 9, True, True, *[False] * 3])
    monkeypatch.setattr(Session, "_one", lambda *_: next(came))
    clock, running = Clock(12), session([])
    monkeypatch.setattr(running, "_lost", clock)
    with pytest.raises(SessionLost):
        running.work(answering(b""), 1)
    idle = [0.2, 0.3, 0.45, 0.675, 1.0125, 1.51875, 2.0, 2.0, 2.0]
    assert clock.waits == pytest.approx([*idle, 0.2, 0.3, 0.45])
    assert next(came, None) is None


def test_an_error_inside_the_server_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "AGAIN", 0.01)
    with pytest.raises(SessionLost, match="status 500"):
        session([])._call(answering(status(500)), object())


class Idle:
    """A server with no message for the site."""

    def __init__(self, *answers: Any) -> None:
        self.PullMessages = answering(*answers, PullMessagesResponse())


@pytest.mark.parametrize(
    ("trouble", "lost"),
    [
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("slow"), False),
        (status(503), False),
        (httpx.ReadError("reset"), True),
        (httpx.ReadTimeout("slow"), True),
        (httpx.RemoteProtocolError("left"), True),
        (status(502), True),
        (status(504), True),
        (status(500), True),
    ],
)
def test_only_where_a_request_may_be_lost_a_session_is_begun_anew(
    trouble: Exception, lost: bool
) -> None:
    """A new session costs the server little, but a thousand of them at once are not little."""
    running = session([], Idle(trouble))
    clock = Clock(5)
    running._lost = clock  # type: ignore[assignment]
    told = "perhaps a request with it" if lost else "knows this session no more"
    with pytest.raises(SessionLost, match=told):
        running.work(answering(b""), 1)
    assert len(clock.waits) == (1 if lost else 5)


def test_a_proxy_that_refuses_the_site_ends_the_session_in_one_line() -> None:
    """Status 403 to a part of a message says that its run is over; here there is no message yet."""
    with pytest.raises(SessionLost, match="refuses this site"):
        session([], Idle(status(403))).work(answering(b""), 1)


@pytest.mark.parametrize(
    ("kind", "fault", "served"),
    [
        ("train", None, True),
        ("query", None, False),
        ("train", RunOver(), False),
        ("train", SessionLost("status 413"), False),
    ],
)
def test_a_session_was_of_use_once_the_answer_to_a_request_has_arrived(
    kind: str, fault: Exception | None, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site tells of itself in every session; a proxy may refuse what is larger."""
    head = SimpleNamespace(metadata=SimpleNamespace(message_type=kind))
    pulled = PullMessagesResponse(messages_list=[Message()], message_object_trees=[ObjectTree()])
    running = session([], Idle(pulled))
    monkeypatch.setattr(connector, "message_from_proto", lambda _: head)
    monkeypatch.setattr(running, "_content", lambda *_: None)
    monkeypatch.setattr(connector, "replied", lambda *_: RecordDict())

    def send(*_: object) -> None:
        if fault is not None:
            raise fault

    monkeypatch.setattr(running, "_send", send)
    with contextlib.suppress(SessionLost):
        running._one(never, 1)
    assert running.served == served


class Beating:
    """A server that answers heartbeats one after another."""

    def __init__(self, *answers: Any) -> None:
        self.SendNodeHeartbeat = answering(*answers)


def test_a_heartbeat_that_does_not_arrive_is_sent_again_and_a_refused_one_ends_the_session() -> (
    None
):
    beaten = SendNodeHeartbeatResponse(success=True)
    running = session([], Beating(*DOWN, status(503), beaten, status(401)))
    assert [running.beat() for _ in range(5)] == [False] * 4 + [True]
    assert not running._lost.is_set()
    assert running.beat()
    with pytest.raises(SessionLost):
        running._call(answering(*DOWN), object())


class Scripted:
    """A session whose work ends in an error."""

    def __init__(self, error: Exception, *, ended: bool = False, served: bool = False) -> None:
        self.error, self.ended, self.served = error, ended, served

    def work(self, answer: object, most: int) -> None:
        raise self.error


def test_a_lost_session_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = [Scripted(SessionLost("gone")), Scripted(SessionLost("end"), ended=True)]
    online, said = list[object](), list[str]()
    play(scripted, monkeypatch, said, online)
    assert online == scripted
    assert said == ["gone; joining anew"]


def never(_: Asked) -> bytes:
    raise AssertionError


def play(
    scripted: list[Scripted],
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    online: list[object],
) -> None:
    """Be a site in these sessions, one after the other."""
    left: list[Any] = list(scripted)

    @contextlib.contextmanager
    def begun(*_: object) -> Iterator[Any]:
        yield left.pop(0)

    monkeypatch.setattr(connector, "session", begun)
    ours: Any = None
    forever(ours, never, 1, said.append, online.append)


class Time:
    """Stands for the module: its clock is moved by sleep alone, and every sleep is noted."""

    def __init__(self) -> None:
        self.sleeps = list[float]()

    def monotonic(self) -> float:
        return sum(self.sleeps)

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)


def test_a_site_rests_longer_and_longer_between_sessions_that_are_of_no_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As behind a proxy that fails for a while: a thousand sites shall not add to its trouble."""
    useless = [Scripted(SessionLost("gone")) for _ in range(10)]
    useful = Scripted(SessionLost("gone"), served=True)
    end = Scripted(SessionLost("end"), ended=True)
    monkeypatch.setattr(connector, "SOONEST", USUAL[0])
    passing = Time()
    monkeypatch.setattr(connector, "time", passing)
    play([*useless, useful, useless[0], end], monkeypatch, [], [])
    doubling = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert passing.sleeps == pytest.approx([*doubling, 0.2, 0.4])


@pytest.fixture
def ours(tmp_path: Path) -> Gate:
    """How a site reaches a server."""
    private, _ = site_key()
    site = own_site(0, tmp_path, {"bert": "bert"})
    site.key.write_bytes(private)
    site.key.chmod(0o600)
    site.ca.write_bytes(authority("tests").pem)
    return gate_of(site)


def answer(error: httpx.HTTPStatusError) -> httpx.Response:
    return error.response


@pytest.mark.parametrize(
    ("ahead", "told"),
    [(60.0, "s ahead of its own"), (-400.0, "s behind its own"), (0.0, "must agree within 5 s")],
)
def test_a_site_whose_clock_is_wrong_is_told_by_how_much(
    ahead: float, told: str, ours: Gate
) -> None:
    response = answer(status(401, date=formatdate(time.time() - ahead, usegmt=True)))
    with pytest.raises(BadInput) as refusal:
        refused(response, ours, 0.0)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_key_that_is_online_is_waited_for_and_then_taken_for_a_second_site(
    ours: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it may be the ghost of a site that was killed."""
    monkeypatch.setattr(reach, "key_is_known", lambda _: True)
    response = answer(status(412, {"code": NOT_ACTIVATED}))
    assert "takes this site for online still" in refused(response, ours, AGAIN - 1)
    with pytest.raises(BadInput, match="is the site running twice?"):
        refused(response, ours, AGAIN + 1)
    monkeypatch.setattr(reach, "key_is_known", lambda _: False)
    with pytest.raises(BadInput, match="does not know this site's key"):
        refused(response, ours, 0.0)


class Activating:
    """A server that answers one activation after another."""

    def __init__(self, *answers: Any) -> None:
        self.ActivateNode = answering(*answers)


def test_a_site_that_may_be_its_own_ghost_is_not_taken_for_a_second_one(
    ours: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has waited for the server for hours, is taken in, and the answer that says so is lost."""
    monkeypatch.setattr(reach, "key_is_known", lambda _: True)
    passing = Time()
    monkeypatch.setattr(connector, "time", passing)
    online = status(412, {"code": NOT_ACTIVATED})
    for trouble in (httpx.ReadError("reset"), status(504)):
        hours = [httpx.ConnectError("refused")] * 1000
        client: Any = Activating(*hours, trouble, *[online] * 10, ActivateNodeResponse(node_id=7))
        assert connector._activated(client, ours, lambda _: None) == 7
    assert passing.monotonic() > 2 * 1000


@pytest.mark.parametrize("taken_in", [False, True])
def test_a_key_that_is_new_is_waited_for_until_the_round_is_over_however_long_that_takes(
    taken_in: bool, ours: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round may take hours, and keys are taken in between two of them."""
    (tmp_path / "state").mkdir()
    (tmp_path / "site-3.pub").write_bytes(
        ours.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    )
    (tmp_path / "ca.crt").write_bytes(authority("tests").pem)
    write_taken_in(tmp_path / "state", [public_bytes(ours.key)] if taken_in else [b"of another"])
    app = gate("127.0.0.1:1", str(tmp_path / "ca.crt"), tmp_path, tmp_path / "state" / "offer.json")

    def asked(_: Gate, route: str) -> Any:
        key = base64.b64encode(public_bytes(ours.key)).decode("ascii")
        return asyncio.run(got(app, route, {"flwr-public-key": key})).json()

    monkeypatch.setattr(reach, "_asked", asked)
    response = answer(status(412, {"code": NOT_ACTIVATED}))
    if taken_in:
        with pytest.raises(BadInput, match="is the site running twice?"):
            refused(response, ours, AGAIN + 1)
    else:
        assert "before its next round" in refused(response, ours, AGAIN + 1)


async def got(app: Any, route: str, headers: dict[str, str]) -> httpx.Response:
    """Return what the gate answers."""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="https://gate"
    ) as site:
        return await site.get(route, headers=headers)


def test_one_key_is_not_registered_for_two_sites(tmp_path: Path) -> None:
    _, public = site_key()
    _, other = site_key()
    (tmp_path / "site-0.pub").write_bytes(public)
    (tmp_path / "site-1.pub").write_bytes(public)
    with pytest.raises(BadInput, match="site-1.pub: its key, or its number 1, is that of another"):
        numbers_of(tmp_path)
    (tmp_path / "site-1.pub").write_bytes(other)
    assert sorted(numbers_of(tmp_path).values()) == [0, 1]


def test_a_site_that_was_let_out_before_a_restart_does_not_keep_the_server_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The SuperLink's database lists it still, and answers 404 to letting it out again."""
    tried: list[int] = []

    class Control:
        def ListNodes(self, _: Any) -> Any:
            return ListNodesResponse(nodes_info=[NodeInfo(node_id=5, public_key=b"gone")])

        def UnregisterNode(self, request: Any) -> None:
            tried.append(request.node_id)
            raise status(404)

    monkeypatch.setattr(claim, "_client", lambda *_: contextlib.nullcontext(Control()))
    claim.register(Link(1, b"", b""), {})
    assert tried == [5]


@pytest.mark.parametrize(
    ("off", "taken"), [(0.0, True), (250.0, True), (-250.0, True), (400.0, False), (-400.0, False)]
)
def test_the_gate_takes_a_signed_time_for_now_within_five_minutes(
    off: float, taken: bool, ours: Gate
) -> None:
    said = (now() + timedelta(seconds=off)).isoformat()
    key = base64.b64encode(public_bytes(ours.key)).decode("ascii")
    signature = base64.b64encode(sign_message(ours.key, said.encode("ascii"))).decode("ascii")
    headers = {"flwr-public-key": key, "flwr-timestamp": said, "flwr-signature": signature}
    assert is_signed(headers, {key}) == taken
    assert not is_signed(headers, set())


class Cut:
    """Stands for the gate's client: the connection to the SuperLink breaks before the answer comes."""

    async def post(self, *_: object, **__: object) -> httpx.Response:
        raise httpx.ReadError("reset")


@pytest.mark.parametrize(
    ("client", "told"), [(None, reach.UNREACHED), (Cut(), reach.UNANSWERED)], ids=["away", "cut"]
)
def test_a_gate_without_a_superlink_says_so_and_sites_wait(
    client: Cut | None, told: int, tmp_path: Path
) -> None:
    """It says whether the SuperLink may have been reached."""
    (tmp_path / "ca.crt").write_bytes(authority("tests").pem)
    app = gate("127.0.0.1:1", str(tmp_path / "ca.crt"), tmp_path, tmp_path / "offer.json")

    async def asked() -> int:
        there = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=there, base_url="https://gate") as site,
        ):
            app.state.client = client or app.state.client
            return (await site.post("/v1/fleet/pull-messages", content=b"x")).status_code

    status_code = asyncio.run(asked())
    assert status_code == told
    assert reach.is_down(status_code)
