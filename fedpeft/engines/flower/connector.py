"""A site's session with the server, in one long-lived process that does not load torch.

Flower's own SuperNode starts a process for every message. This speaks the same Fleet API, through
Flower's own client: its TLS, its signatures by the site's key, its heartbeats. What is here instead
of the SuperNode is its loop: it asks for messages, gives them to a trainer that is there already,
and sends the answers. No code from the server is executed: the app that Flower hands out is not
even fetched.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, final

import httpx
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedpeft.engines.flower.grid import FAILED, blob, record
from fedpeft.engines.flower.reach import (
    AGAIN,
    NOT_ACTIVATED,
    NOT_SENT,
    UNREACHED,
    Gate,
    error_code,
    is_down,
    public_bytes,
    refused,
    tls_fault,
)
from fedpeft.errors import BadInput, WireError

T = TypeVar("T")
SOONEST, LATEST, GROWTH = 0.2, 2.0, 1.5
"""Seconds between two questions for messages: after an answer, at most, and how they grow."""
REST = 30.0
"""Seconds at most between two sessions in which nothing is answered; they double up to it."""


Say = Callable[[str], None]


class SessionLost(Exception):
    """The server knows this session no more; a new one may be begun."""


class RunOver(Exception):
    """The message belongs to a run that has ended."""


@final
@dataclass(frozen=True)
class Asked:
    """What the server asks: ``kind`` is a ``MessageType``, ``to`` says who is asked for what."""

    kind: str
    to: Mapping[str, Any]
    request: bytes


Answer = Callable[[Asked], "bytes | Mapping[str, Any]"]
"""Answers with bytes, or with plain values for a question; WireError goes to the server."""


@final
class Session:
    """An active session: messages come in, answers go out, heartbeats go on in a thread.

    ``served``: whether an answer to a request has arrived. What a site says of itself, as it does
    in every session, is none.
    """

    def __init__(self, client: FleetHttpClient, node: int, say: Say) -> None:
        self.node = node
        self._client = client
        self._say = say
        self._lost = threading.Event()
        self._unsure = False  # whether a message may have been handed out that has not come
        self.ended = False
        self.served = False

    def beat(self) -> bool:
        """Send a heartbeat; False where it should be sent again soon."""
        request = SendNodeHeartbeatRequest(
            node=Node(node_id=self.node), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        try:
            known = self._client.SendNodeHeartbeat(request).success
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            if is_down(error.response.status_code):
                return False
            known = False
        if not known:
            self._lost.set()
        return True

    def end(self) -> None:
        """Let ``work`` end, in whatever thread it is."""
        self.ended = True
        self._lost.set()

    def work(self, answer: Answer, most: int) -> None:
        """Answer what comes, for ever; SessionLost where the server knows the session no more.

        ``end`` ends it, too.

        ``most``: bytes of a message at most.
        """
        wait = SOONEST
        while True:
            came = self._one(answer, most)
            if self._unsure:
                # Flower delivers no message twice. The server asks again whoever is in a new
                # session; where nothing was lost, it gets the last reply once more.
                raise SessionLost("an answer of the server was lost, and perhaps a request with it")
            if came:
                wait = SOONEST
                continue
            # Many idle sites cost the server 8 ms of CPU each time they ask.
            if self._lost.wait(wait):
                raise SessionLost("the server knows this session no more")
            wait = min(LATEST, wait * GROWTH)

    def _one(self, answer: Answer, most: int) -> bool:
        """Answer one message, and return whether there was one."""
        request = PullMessagesRequest(node=self._self())
        try:
            response, self._unsure = self._answered(self._client.PullMessages, request)
        except RunOver as error:
            # This names no run. If a proxy, say, refuses it, a new session is begun.
            raise SessionLost("the server refuses this site (status 403)") from error
        if not response.messages_list:
            return False
        head = message_from_proto(response.messages_list[0])
        reply: RecordDict | Error
        try:
            try:
                content = self._content(head, response.message_object_trees[0], most)
                reply = replied(answer, head.metadata.message_type, content)
            except WireError as error:
                reply = Error(FAILED, str(error))
            self._send(head, reply)
            self.served |= head.metadata.message_type != MessageType.QUERY
        except RunOver:
            self._say("a message of a run that is over is left")
        return True

    def _content(self, head: Message, tree: ObjectTree, most: int) -> RecordDict:
        """Fetch the content of a message; WireError where it is too large, or cannot be read."""
        run, room = head.metadata.run_id, _Room(most)

        def fetch(object_id: str) -> bytes:
            request = PullObjectRequest(node=self._self(), run_id=run, object_id=object_id)
            response = self._call(self._client.PullObject, request)
            if not response.object_found:
                raise ObjectPullError(object_id, "the object could not be found")
            if not response.object_available:  # announced, and still on its way
                raise ObjectUnavailableError(object_id)
            room.take(len(response.object_content))
            return response.object_content

        number = head.metadata.message_id
        try:
            contents = pull_objects(
                [part.object_id for part in iterate_object_tree(tree)],
                fetch,
                max_time=600.0,
                initial_backoff=0.05,
                backoff_cap=1.0,
            )
            self._call(
                self._client.ConfirmMessageReceived,
                ConfirmMessageReceivedRequest(
                    node=self._self(), run_id=run, message_object_id=number
                ),
            )
            message = inflate_object_from_contents(number, contents)
        except (SessionLost, RunOver, WireError):
            raise
        except Exception as error:
            raise WireError(f"the message cannot be read ({type(error).__name__})") from error
        if not isinstance(message, Message) or not message.has_content():
            raise WireError("the message is empty")
        return message.content

    def _send(self, head: Message, reply: RecordDict | Error) -> None:
        """Send the answer to a message, and what it is made of.

        Where the server's answer to a part of it was lost, the server may have that part, and wait
        for the others.
        """
        message = Message(reply, reply_to=head)
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            objects = get_all_nested_objects(message)
            tree = get_object_tree(message)
            outside = remove_content_from_message(message) if message.has_content() else message
            response, unsure = self._answered(
                self._client.PushMessages,
                PushMessagesRequest(
                    node=self._self(),
                    messages_list=[message_to_proto(outside)],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.0],
                ),
            )
            # What was lost has named the parts that are due, and the session in which they come.
            # Without one the server looks for the session that waits for the part.
            due = list(objects) if unsure else list(response.objects_to_push)
            session_id = "" if unsure else response.session_id
            for object_id in due:
                taken, lost = self._answered(
                    self._client.PushObject,
                    PushObjectRequest(
                        node=self._self(),
                        run_id=head.metadata.run_id,
                        object_id=object_id,
                        object_content=objects[object_id].deflate(),
                        session_id=session_id,
                    ),
                )
                if not (taken.stored or lost or unsure):
                    self._say("the server no longer waits for this answer")
                    return

    def _call(self, method: Callable[[Any], T], request: object) -> T:
        """Call the server; wait and try again while it is out of reach."""
        return self._answered(method, request)[0]

    def _answered(self, method: Callable[[Any], T], request: object) -> tuple[T, bool]:
        """Call the server as ``_call`` does, and return whether an answer may have been lost.

        Then the server may have done before what it was asked.
        """
        began, wait, lost = time.monotonic(), SOONEST, False
        while True:
            try:
                return method(request), lost
            except NOT_SENT as error:
                reason = type(error).__name__
            except httpx.TransportError as error:
                reason, lost = type(error).__name__, True
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status == httpx.codes.FORBIDDEN:
                    raise RunOver from error
                # An error inside the server may come of this very request: not tried for ever.
                inside = status == httpx.codes.INTERNAL_SERVER_ERROR
                if not is_down(status) or (inside and time.monotonic() - began > AGAIN):
                    raise SessionLost(f"the server answers with status {status}") from error
                reason, lost = f"status {status}", lost or status != UNREACHED
            if wait == SOONEST:
                self._say(f"the server is out of reach ({reason}); trying again")
            if self._lost.wait(wait):
                raise SessionLost("the server knows this session no more")
            wait = min(10.0, 2 * wait)

    def _self(self) -> Node:
        return Node(node_id=self.node)


@final
class _Room:
    """How many bytes of a message may still come; objects come in several threads."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Take note of ``count`` more bytes; WireError where they are too many."""
        with self._lock:
            self._left -= count
            if self._left < 0:
                raise WireError(f"this site takes messages of at most {self._most} bytes")


def replied(answer: Answer, kind: str, content: RecordDict) -> RecordDict:
    """Return the content of the answer to a message with this ``content``; WireError for none."""
    to = content.get("to", ConfigRecord())
    if not isinstance(to, ConfigRecord):
        raise WireError("record 'to' of a Flower message should hold settings")
    request = b"" if kind == MessageType.QUERY else blob(content, "request")
    said = answer(Asked(kind, dict(to), request))
    if isinstance(said, bytes):
        return RecordDict({"answer": record(said)})
    return RecordDict({"node": ConfigRecord(dict(said))})


@contextlib.contextmanager
def session(gate: Gate, say: Say) -> Iterator[Session]:
    """Be online as the site with the gate's key for the length of a ``with``.

    At its end, by whatever way, the server is told, so that it does not wait for this site. Raises
    BadInput where the server is not the right one or does not know the key; a server that is out of
    reach is waited for.
    """
    with _client(gate) as client:
        node = _activated(client, gate, say)
        running = Session(client, node, say)
        heart = HeartbeatSender(running.beat)
        heart.start()
        try:
            yield running
        finally:
            if heart.is_running:
                heart.stop()
            with contextlib.suppress(httpx.HTTPError, RuntimeError):
                client.DeactivateNode(DeactivateNodeRequest(node_id=node))


def _client(gate: Gate) -> FleetHttpClient:
    """Return Flower's client of the Fleet API."""
    return FleetHttpClient.from_server_address(
        gate.address,
        False,  # never without TLS
        gate.ca,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(gate.key, gate.key.public_key()),
        ],
    )


def _activated(client: FleetHttpClient, gate: Gate, say: Say) -> int:
    """Return the number of the node that this site is now online as."""
    request = ActivateNodeRequest(
        public_key=public_bytes(gate.key), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
    )
    began, wait, told = time.monotonic(), 0.5, ""
    while True:
        try:
            return client.ActivateNode(request).node_id
        except httpx.TransportError as error:
            if fault := tls_fault(error):
                raise BadInput(f"server = {gate.address!r}: {fault}") from error
            # The server may have taken this site in, and not have been able to say so.
            began = time.monotonic()
            reason = f"waiting for the server at {gate.address} ({type(error).__name__})"
        except httpx.HTTPStatusError as error:
            if is_down(error.response.status_code):
                began = time.monotonic()
            reason = refused(error.response, gate, time.monotonic() - began)
        if reason != told:
            say(reason)
            told = reason
        time.sleep(wait)
        wait = min(5.0, 1.5 * wait)


def is_online(gate: Gate) -> bool:
    """Return whether a site with this key is online; if none is, this one is for a moment.

    BadInput where the key is refused for another reason.
    """
    request = ActivateNodeRequest(
        public_key=public_bytes(gate.key), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
    )
    with _client(gate) as client:
        try:
            node = client.ActivateNode(request).node_id
        except httpx.HTTPStatusError as error:
            if error_code(error.response) == NOT_ACTIVATED:
                return True
            refused(error.response, gate, AGAIN)
            raise
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    return False


def forever(
    gate: Gate, answer: Answer, most: int, say: Say, online: Callable[[Session], None]
) -> None:
    """Be a site of the server's until a signal or ``Session.end``; a lost session is begun anew.

    After a short session that was of no use, the next one waits for twice as long.
    """
    rest = SOONEST
    while True:
        began = time.monotonic()
        with session(gate, say) as running:
            online(running)
            try:
                running.work(answer, most)
            except SessionLost as error:
                if running.ended:
                    return
                say(f"{error}; joining anew")
        if running.served or time.monotonic() - began > REST:
            rest = SOONEST
        time.sleep(rest)
        rest = min(REST, 2 * rest)
