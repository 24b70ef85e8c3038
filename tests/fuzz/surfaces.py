"""What is fuzzed: each surface has seeds, made by the code itself, and a target that one input is given to.

A target returns ``REFUSED`` where an input was refused with an error of ours, ``TAKEN`` where it was decoded and encodes to
an equal payload, and raises anything else: that is a finding.
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import struct
import tempfile
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, final
from unittest import mock

import httpx
import safetensors.torch
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from torch import Tensor
from uvicorn.config import Config as UvicornConfig
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from fedpeft.deployment import trainer as trainers
from fedpeft.deployment.offer import Offer, Refusal, accepted, offer_of, read_offer
from fedpeft.deployment.site import Limits, Site
from fedpeft.engines.flower import gate as gates
from fedpeft.engines.flower.reach import KEY_ROUTE, OFFER_ROUTE
from fedpeft.errors import BadInput, WireError
from fedpeft.experiment.config import from_tree
from fedpeft.experiment.watching import Summed
from fedpeft.federation import checkpoint
from fedpeft.federation.memory import Memories
from fedpeft.ledger import (
    FILE,
    Follower,
    Ledger,
    Row,
    stream,
    to_json,
)
from fedpeft.training.evaluation import FULL_CLIENT
from fedpeft.types import State
from fedpeft.wire import tensors as codec
from fedpeft.wire.frames import Frame, receive, send
from fedpeft.wire.messages import (
    DIGEST,
    Kind,
    Request,
    Response,
    Status,
    check,
    decode,
    digest,
    encode,
    forgotten,
    form,
)
from tests import tiny
from tests.strategies import bits

REFUSED: Final = "refused"
TAKEN: Final = "taken"
CONFIG: Final = tiny.CONFIG
RUN: Final = "0123456789abcdef"
MARK: Final = "PLANTED"
LONGEST: Final = 1000
"""Characters of a refusal at most: whoever sends megabytes gets a line."""


@final
@dataclass(frozen=True)
class Surface:
    """A surface: ``target`` is given one input. ``seeds``: valid inputs.

    ``fixed`` and ``each``: an input of n bytes may take ``fixed + each * n`` bytes of Python's memory. ``quick``: how many
    mutations the normal tests try.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    target: Callable[[bytes], str]
    fixed: int
    each: int
    quick: int

    def bound(self, length: int) -> int:
        """Return how many bytes of memory an input of ``length`` bytes may take."""
        return self.fixed + self.each * length


def known(payload: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    """Return a payload as something that is equal for equal bits only."""
    return {name: bits(tensor) for name, tensor in payload.items()}


def short(error: Exception) -> str:
    """Assert that a refusal is of a readable length."""
    assert len(str(error)) < LONGEST, "a refusal is a line, whatever was sent"
    return REFUSED


# Tensors ---------------------------------------------------------------------------------------


def payloads() -> list[dict[str, Tensor]]:
    """Return payloads of every number format, 0-d and empty ones included."""
    every = {name: torch.ones(2, 3).to(dtype) for name, dtype in codec.FORMATS.items()}
    return [
        {},
        {
            "layer.query:A": torch.linspace(-1, 1, 24).view(3, 8),
            "layer.query:B": torch.zeros(8, 3),
            "head.bias": torch.ones(3),
        },
        every,
        {"empty": torch.zeros(0, 4), "seed": torch.tensor(7), 'ä"\\': torch.tensor(0.5)},
        {f"layer.{k}:e": torch.ones(k) for k in range(20)},
    ]


def codec_seeds() -> list[bytes]:
    return [b"".join(codec.buffers(payload)) for payload in payloads()]


def codec_target(file: bytes) -> str:
    """A file that is read is read alike by the format's own library, and written again the same."""
    try:
        found = codec.tensors(file, 0)
    except WireError as error:
        return short(error)
    assert sum(tensor.nbytes for tensor in found.values()) <= len(file)
    assert known(codec.tensors(b"".join(codec.buffers(found)), 0)) == known(found)
    assert known(safetensors.torch.load(file)) == known(found)
    return TAKEN


# Messages --------------------------------------------------------------------------------------

EXPECTED: Final = {
    "layer.query:A": torch.zeros(3, 8),
    "layer.query:B": torch.zeros(8, 3),
    "head.bias": torch.zeros(3),
}


def wire_seeds() -> list[bytes]:
    seeds: list[bytes] = []
    for payload in payloads():
        seeds.append(Request(Kind.TRAIN, 3, CONFIG, payload, memory=2).encode())
        seeds.append(Response(3, payload, tiny_measured(), memory=3).encode())
    seeds.append(Request(Kind.EVALUATE, 0, CONFIG, {}, phase=2).encode())
    seeds.append(Response(3, {}, status=Status.FORGOTTEN).encode())
    seeds.append(
        encode({"anchor": torch.arange(5.0), "@steps": torch.tensor(3), "!key": torch.ones(2)})
    )
    return seeds


def tiny_measured() -> Any:
    from tests.laws.test_ledger import FIGURES

    return FIGURES


def wire_target(blob: bytes) -> str:
    """As it is, a message is refused or its digest is right; under a true digest its fields are read."""
    try:
        decode(blob)
    except WireError as error:
        short(error)
    else:
        assert digest(blob[DIGEST:]) == blob[:DIGEST]
    signed = digest(blob[DIGEST:]) + blob[DIGEST:]
    outcomes = [read(signed) for read in (_request, _response, _plain)]
    return TAKEN if TAKEN in outcomes else REFUSED


def _request(blob: bytes) -> str:
    try:
        request = Request.decode(blob, CONFIG)
    except WireError as error:
        with contextlib.suppress(WireError):
            forgotten(blob, CONFIG)
            raise AssertionError("what is no request cannot be answered") from error
        return short(error)
    again = Request.decode(request.encode(), CONFIG)
    assert known(again.payload) == known(request.payload)
    assert replace(again, payload={}) == replace(request, payload={})
    assert Response.decode(forgotten(blob, CONFIG)).round == request.round
    return TAKEN


def _response(blob: bytes) -> str:
    try:
        response = Response.decode(blob)
    except WireError as error:
        return short(error)
    again = Response.decode(response.encode())
    assert known(again.payload) == known(response.payload)
    assert repr(again.measured) == repr(response.measured)  # NaN is not equal to itself
    with contextlib.suppress(WireError):
        check(response, 3, EXPECTED, memory=2, examples=5)
        assert all(bool(torch.isfinite(one).all()) for one in response.payload.values())
    response.measured.sound(5)
    return TAKEN


def _plain(blob: bytes) -> str:
    try:
        found = decode(blob)
    except WireError as error:
        return short(error)
    assert form(blob) is not None
    assert known(decode(encode(found))) == known(found)
    return TAKEN


# Checkpoints -----------------------------------------------------------------------------------

SETTINGS: Final = "c0ffee"
_PARTS: Final = struct.Struct("<II")


def _state(number: int) -> State:
    known_memories = {1: number - 1, 2: 0}
    return State(
        number,
        {"x:A": torch.full((2, 2), float(number))},
        {"alive": torch.tensor([True, False])},
        known_memories,
    )


def _memories(number: int) -> Memories:
    memories = Memories()
    memories.put(1, number - 1, encode({"m": torch.tensor(number)}))
    memories.put(2, 0, encode({"anchor": torch.arange(5.0)}))
    return memories


@cache
def _whole() -> dict[str, bytes]:
    """Return the files of a folder of checkpoints: name -> content, after rounds 2 and 3."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        written = checkpoint.Written()
        for number in (2, 3):
            checkpoint.save(
                folder, _state(number), _memories(number), 10 * number, SETTINGS, written
            )
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def checkpoint_seeds() -> list[bytes]:
    files = _whole()
    manifest, state = files["000003.json"], files["000003.state"]
    return [
        _PARTS.pack(len(manifest), len(state)) + manifest + state + files["client-1-000002.memory"]
    ]


@cache
def _folder() -> Path:
    """Return a folder to write checkpoints into, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fp", dir=memory if memory.is_dir() else None))


def checkpoint_target(content: bytes) -> str:
    """What is loaded is the checkpoint as it was saved, or the one before; a state is read back or refused."""
    lengths = content[: _PARTS.size].ljust(_PARTS.size, b"\0")
    first, second = _PARTS.unpack(lengths)
    body = content[_PARTS.size :]
    parts = {
        "000003.json": body[:first],
        "000003.state": body[first : first + second],
        "client-1-000002.memory": body[first + second :],
    }
    for name, blob in {**_whole(), **parts}.items():
        (_folder() / name).write_bytes(blob)
    outcome = REFUSED
    try:
        found = checkpoint.load(_folder(), [SETTINGS], lambda _: None, mend=False)
    except BadInput:
        pass
    else:
        assert found is not None
        number = found.state.round
        assert number in (2, 3)
        assert checkpoint.pack(found.state) == checkpoint.pack(_state(number))
        # A manifest of version 0.1 has no digest, and so could say anything.
        assert found.ledger == 10 * number or b'"digest"' not in parts["000003.json"]
        for client, version in found.state.memories.items():
            assert found.memories.get(client, version) == _memories(number).get(client, version)
        outcome = TAKEN if number == 3 else REFUSED
    _unpacked(parts["000003.state"])
    return outcome


def _unpacked(blob: bytes) -> None:
    """Read a state under a true digest, as whoever can write the folder can make it."""
    try:
        state = checkpoint.unpack(digest(blob[DIGEST:]) + blob[DIGEST:])
    except WireError as error:
        short(error)
    else:
        assert checkpoint.pack(checkpoint.unpack(checkpoint.pack(state))) == checkpoint.pack(state)


# The ledger ------------------------------------------------------------------------------------


def ledger_seeds() -> list[bytes]:
    from tests.laws.test_ledger import ROWS

    path = _folder() / FILE
    path.unlink(missing_ok=True)
    with Ledger(path) as ledger:
        for row in ROWS:
            ledger.append(row)
    return [path.read_bytes()]


def ledger_target(content: bytes) -> str:
    """Rows are read, by a report and by a watcher alike, or the line that is none is named."""
    path = _folder() / FILE
    path.write_bytes(content)
    read: list[Row] = []
    followed: list[Row] = []
    refusals: list[str] = []
    try:
        read += stream(path)
    except BadInput as error:
        refusals.append(str(error))
    try:
        Follower(path).look(followed.append, followed.clear)
    except BadInput as error:
        refusals.append(str(error))
    if refusals:
        assert len(refusals) == 2
        assert refusals[0] == refusals[1]
        return REFUSED
    summed = Summed()
    with Ledger(path) as ledger:
        ledger.cut(0)
        for row in followed:
            ledger.append(row)
            summed.add(row)
    again = [repr(to_json(row)) for row in stream(path)]
    assert again == [repr(to_json(row)) for row in followed] == [repr(to_json(row)) for row in read]
    return TAKEN


# A site: its socket, and what it makes of offers -----------------------------------------------


@cache
def _site() -> Site:
    """Return a site that agrees to little, with a mark in all its paths."""
    state = Path(tempfile.mkdtemp(prefix=f"fp{MARK}"))
    return Site(
        client=0,
        server="localhost:1",
        ca=state / "ca.crt",
        key=state / "site.key",
        data={"train": str(state / "train.jsonl")},
        models={"bert": str(state / "bert")},
        machine={"device": "cpu", "precision": "fp32", "attention": "eager", "threads": 1},
        limits=Limits(steps=4, methods=("lora", "fedara")),
        state=state,
    )


@cache
def _offer() -> Offer:
    tree = {
        "task": {"kind": "classification"},
        "model": {"name": "bert", "max_length": 16},
        "method": {"name": "lora", "rank": 3},
        "training": {"steps": 2},
        "federation": {"rounds": 5},
    }
    return offer_of(from_tree(tree), RUN, "0", ("a", "b", "c"))


def offer_seeds() -> list[bytes]:
    offer = _offer()
    wrapped = replace(offer, method={"name": "fedara"}, wrap=({"name": "secagg"},), labels=None)
    return [offer.to_json().encode(), wrapped.to_json().encode()]


def offer_target(content: bytes) -> str:
    """An offer is refused, or read as it would be written."""
    try:
        offer = read_offer(content.decode("utf-8", "replace"))
    except Refusal:
        return REFUSED
    assert read_offer(offer.to_json()) == offer
    try:
        config = accepted(offer, _site())
    except BadInput:
        return REFUSED
    assert config.model.name == _site().models["bert"]
    assert str(config.data.train) == _site().data["train"]
    assert (config.training.steps or config.training.epochs) <= 4
    return TAKEN


class _Over(Exception):
    """All connections have been served."""


@final
@dataclass
class _Connection:
    """A connection whose other side has sent ``content`` and then gone."""

    content: io.BytesIO
    answers: bytearray = field(default_factory=bytearray)

    def recv(self, most: int) -> bytes:
        return self.content.read(most)

    def sendall(self, content: bytes) -> None:
        self.answers += content

    def getsockopt(self, *_: object) -> bytes:
        return struct.pack("3i", os.getpid(), os.getuid(), os.getgid())

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None: ...


@final
@dataclass
class _Listener:
    """A socket that one connection comes to."""

    waiting: list[_Connection]

    def accept(self) -> tuple[_Connection, None]:
        if not self.waiting:
            raise _Over
        return self.waiting.pop(), None


@cache
def _trainer() -> trainers.Trainer:
    """Return a trainer with a built run for the seeds' offer; of others it says no more than whether it agrees."""
    trainer = trainers.Trainer(_site())
    ready = SimpleNamespace(
        config=accepted(_offer(), _site()),
        worker=tiny.worker(tiny.small("lora"), tiny.bert(), sizes={0: 7}),
        dataset=SimpleNamespace(train=[0] * 7),
        train=[0] * 7,
        test=[0] * 4,
        loaded=SimpleNamespace(digest="d1"),
    )

    trainer._offer, trainer._run = _offer(), ready  # type: ignore[assignment]
    return trainer


def _built(offer: Offer, site: Site, _: object) -> Any:
    """Take the place of ``own_run``: whether the site agrees is found out, and no other run is built."""
    accepted(offer, site)
    raise Refusal("a run of its own would be built here")


def socket_seeds() -> list[bytes]:
    config = _offer().to_json()
    worker = tiny.worker(tiny.small("lora"), tiny.bert(), sizes={0: 7})
    state = worker.method.init(tiny.base_of(worker.model), tiny.SEED)
    down = worker.method.send(state, FULL_CLIENT)
    asked = {"kind": "handle", "config": config, "client": 0, "memory": -1, "run": 1, "round": 0}
    frames = [
        Frame({"kind": "about", "config": config}),
        Frame(asked, Request(Kind.TRAIN, 0, CONFIG, down).encode()),
        Frame({**asked, "memory": 3}, Request(Kind.TRAIN, 4, CONFIG, down, memory=3).encode()),
        Frame(asked, Request(Kind.EVALUATE, 0, CONFIG, down).encode()),
    ]
    seeds: list[bytes] = []
    for chosen in (frames[:1], frames[1:2], frames[2:3], frames[3:], frames[:2]):
        one: Any = _Connection(io.BytesIO())
        for frame in chosen:
            send(one, frame)
        seeds.append(bytes(one.answers))
    return seeds


def socket_target(content: bytes) -> str:
    """Whatever comes, the trainer goes on listening, answers in frames, and tells nothing of its paths."""
    connection = _Connection(io.BytesIO(content))
    listener: Any = _Listener([connection])
    with contextlib.suppress(_Over), mock.patch.object(trainers, "own_run", _built):
        trainers.serve(_trainer(), listener, 1 << 20)
    answers: Any = _Connection(io.BytesIO(bytes(connection.answers)))
    outcome = REFUSED
    while answers.content.tell() < len(connection.answers):
        answer = receive(answers)
        assert MARK not in json.dumps(answer.header)
        error = str(answer.header.get("error", ""))
        assert len(error) < LONGEST
        if not error:
            outcome = TAKEN
    return outcome


# What a worker is asked --------------------------------------------------------------------------

METHODS: Final = (
    "lora",
    "ffa_lora",
    "federa",
    "slora",
    "fedara",
    "bitfit",
    "full",
    "sparse",
    "local_only",
)


@cache
def _worker(name: str) -> Any:
    return tiny.worker(tiny.small(name), tiny.bert(), sizes={0: 7})


def worker_seeds() -> list[bytes]:
    """Return a byte for the method, then a request without its digest."""
    seeds: list[bytes] = []
    for number, name in enumerate(METHODS):
        worker = _worker(name)
        state = worker.method.init(tiny.base_of(worker.model), tiny.SEED)
        down = worker.method.send(state, FULL_CLIENT)
        seeds.append(bytes([number]) + Request(Kind.TRAIN, 0, CONFIG, down).encode()[DIGEST:])
    return seeds


def worker_target(content: bytes) -> str:
    """A request that a worker takes is answered; another one is refused before it costs more than it weighs."""
    worker = _worker(METHODS[content[0] % len(METHODS)] if content else "lora")
    blob = digest(content[1:]) + content[1:]
    try:
        [(reply, memory)] = worker.handle([0], [blob], [b""])
    except WireError as error:
        return short(error)
    Response.decode(reply)
    if memory:
        decode(memory)
    return TAKEN


# The gate ----------------------------------------------------------------------------------------

NOON: Final = datetime(2026, 1, 2, 12, tzinfo=UTC)
KEY: Final = 4711
"""What the private key of the one site is made from, so that inputs that were found stay signed by it."""


@final
class _Upstream:
    """What stands for the SuperLink: it writes down what comes to it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, dict[str, str]]] = []

    async def post(self, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        self.asked.append((path, content, headers))
        return httpx.Response(
            200, content=b"from inside", headers={"content-type": "x/y", "secret": MARK}
        )


@final
class _Transport(asyncio.Transport):
    """What stands for a TCP connection."""

    def __init__(self) -> None:
        super().__init__()
        self.content = bytearray()
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {
            "sockname": ("127.0.0.1", 9443),
            "peername": ("127.0.0.1", 1),
            "sslcontext": True,
        }.get(name, default)

    def write(self, data: Any) -> None:
        self.content += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...


@final
class _Faults(logging.Handler):
    """Keeps what uvicorn reports as errors: an exception of the app's."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@final
class _Gate:
    """The gate behind its parser of HTTP."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fp"))
        key = ec.derive_private_key(KEY, ec.SECP384R1())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (self.folder / "site-0.pub").write_bytes(public)
        (self.folder / "offer.json").write_text('{"offer": 1}')
        self.upstream = _Upstream()
        app = gates.gate("127.0.0.1:1", "none", self.folder, self.folder / "offer.json")
        app.state.client = self.upstream
        self.config = UvicornConfig(
            app, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False
        )
        self.config.load()
        self.loop = asyncio.new_event_loop()
        self.faults = _Faults()
        logging.getLogger("uvicorn.error").addHandler(self.faults)
        logging.getLogger("uvicorn.error").propagate = False
        said = NOON.isoformat()
        self.signed = {
            "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
            "flwr-timestamp": said,
            "flwr-signature": b64encode(sign_message(key, said.encode())).decode(),
        }

    def ask(self, content: bytes) -> bytes:
        """Return what comes back for what is sent over one connection, which then ends."""
        return self.loop.run_until_complete(self._asked(content))

    async def _asked(self, content: bytes) -> bytes:
        state = ServerState()
        protocol = HttpToolsProtocol(
            config=self.config, server_state=state, app_state={}, _loop=self.loop
        )
        transport = _Transport()
        protocol.connection_made(transport)
        if content:  # asyncio never hands over nothing
            protocol.data_received(content)
        for _ in range(5):  # what is complete is answered by now
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        if state.tasks:
            await asyncio.wait(set(state.tasks), timeout=5.0)
        assert not any(not task.done() for task in state.tasks), "a request that hangs"
        return bytes(transport.content)


@cache
def _gate() -> _Gate:
    return _Gate()


def gate_seeds() -> list[bytes]:
    signed = "".join(f"{name}: {value}\r\n" for name, value in _gate().signed.items())
    flower = "flwr-component-name: SuperNode\r\ncontent-type: application/protobuf\r\ncookie: x\r\n"
    seeds: list[bytes] = []
    for path in sorted(gates.FLEET)[:4]:
        body = b"\x0a\x04abcd"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost:9443\r\n{flower}{signed}content-length: {len(body)}\r\n\r\n"
        seeds.append(head.encode() + body)
    chunked = f"POST /v1/fleet/push-messages HTTP/1.1\r\nHost: localhost\r\n{flower}transfer-encoding: chunked\r\n\r\n"
    seeds.append(chunked.encode() + b"4\r\nabcd\r\n0\r\n\r\n")
    for path in (KEY_ROUTE, OFFER_ROUTE, "/v1/control/start-run", "/v1/fleet/../control/x"):
        seeds.append(f"GET {path} HTTP/1.1\r\nHost: localhost:9443\r\n{signed}\r\n".encode())
    return seeds


STATUSES: Final = frozenset({200, 307, 400, 403, 404, 405, 413, 421, 431, 501, 503})


def gate_target(content: bytes) -> str:
    """Nothing but the Fleet API's calls goes on, no header but its own, and no request makes the gate fail."""
    gate, outcome = _gate(), REFUSED
    gate.upstream.asked.clear()
    gate.faults.records.clear()
    with mock.patch.object(gates, "now", return_value=NOON):
        answer = gate.ask(content)
    for record in gate.faults.records:
        raise AssertionError(record.getMessage()) from (record.exc_info or [None, None])[1]
    for path, body, headers in gate.upstream.asked:
        assert path in gates.FLEET
        assert len(body) <= len(content)
        assert headers.keys() <= gates.HEADERS
    assert MARK.encode() not in answer
    if answer:
        status = int(answer.split(b" ", 2)[1])
        assert status in STATUSES, answer[:200]
        outcome = TAKEN if status == 200 else outcome
        if b"from inside" in answer:
            assert gate.upstream.asked
    return outcome


SURFACES: Final[Mapping[str, Surface]] = {
    one.name: one
    for one in (
        Surface("codec", codec_seeds, codec_target, fixed=100_000, each=20, quick=1000),
        Surface("wire", wire_seeds, wire_target, fixed=100_000, each=20, quick=600),
        Surface(
            "checkpoint", checkpoint_seeds, checkpoint_target, fixed=200_000, each=20, quick=150
        ),
        Surface("ledger", ledger_seeds, ledger_target, fixed=400_000, each=40, quick=300),
        Surface("offer", offer_seeds, offer_target, fixed=400_000, each=40, quick=80),
        Surface("socket", socket_seeds, socket_target, fixed=2_000_000, each=40, quick=150),
        Surface("worker", worker_seeds, worker_target, fixed=2_000_000, each=20, quick=60),
        Surface("gate", gate_seeds, gate_target, fixed=400_000, each=40, quick=300),
    )
}
"""All of them, by name."""
