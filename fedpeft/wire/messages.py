"""Messages as bytes: a 16-byte digest of the content, then a safetensors file without metadata.

Messages with equal names, shapes and dtypes therefore have equal lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_digest

from fedpeft.errors import Forgotten, WireError
from fedpeft.ledger import COUNTS, REALS, Measured
from fedpeft.types import NO_MEMORY, Payload
from fedpeft.wire import tensors as codec
from fedpeft.wire.versions import PHASES, ROUNDS, carried, stamp

DIGEST = 16
"""Bytes of every digest in a message."""

Form = tuple[tuple[str, str, tuple[int, ...], bytes], ...]
"""(name, dtype, shape, value of a whole number) of every tensor in a message."""


# Stands for a field that is missing: no field has this shape, so it fails the check of the form.
_NOTHING = torch.zeros(0, 0)


class Kind(IntEnum):
    """What a request asks for."""

    TRAIN = 0
    EVALUATE = 1


def digest(content: bytes | memoryview) -> bytes:
    """Return the 128-bit XXH3 of ``content``.

    It tells damage, not intent: who can change a message can change its digest, too.
    """
    return xxh3_128_digest(content)


def encode(payload: Payload) -> bytes:
    """Return ``payload`` as bytes; equal names, shapes and dtypes give equal lengths.

    >>> blob = encode({"b": torch.ones(2), "a": torch.tensor(7)})
    >>> decode(blob)
    {'a': tensor(7), 'b': tensor([1., 1.])}
    >>> len(blob) == len(encode({"b": torch.zeros(2), "a": torch.tensor(8)}))
    True
    """
    body = codec.buffers(payload)
    # Piece by piece, so that the tensors are copied only once, by the join.
    hashed = xxh3_128()
    for piece in body:
        hashed.update(piece)
    return b"".join([hashed.digest(), *body])


def is_whole(blob: bytes) -> bool:
    """Return whether ``blob`` begins with the digest of the rest, as all that is encoded does.

    >>> is_whole(encode({"w": torch.ones(2)})), is_whole(b"something else entirely")
    (True, False)
    """
    return digest(memoryview(blob)[DIGEST:]) == blob[:DIGEST]


def decode(blob: bytes) -> dict[str, Tensor]:
    """Return the payload that ``encode`` turned into ``blob``, in order of names.

    The tensors are views of ``blob``, for reading only. Anything else raises WireError.

    >>> decode(b"something else entirely")
    Traceback (most recent call last):
    fedpeft.errors.WireError: damaged message: 23 bytes do not match their digest
    """
    if not is_whole(blob):
        raise WireError(f"damaged message: {len(blob)} bytes do not match their digest")
    return codec.tensors(blob, DIGEST)


def form(blob: bytes) -> Form:
    """Return what must be equal in the messages of clients that train side by side.

    That is the names, dtypes and shapes, and the values of the whole numbers: 0-d int64 tensors of
    the payload, such as a seed. An empty ``blob`` has the empty form. A message without a header
    raises WireError.

    >>> form(encode({"w": torch.ones(2, 3), "b": torch.ones(2)}))
    (('b', 'F32', (2,), b''), ('w', 'F32', (2, 3), b''))
    """
    if not blob:
        return ()
    body = memoryview(blob)[DIGEST:]
    # The digest is not checked here: ``decode`` does that, once.
    tensors: list[tuple[str, str, tuple[int, ...], bytes]] = []
    for name, place in sorted(codec.places(body).items()):
        # Clients side by side share one value of a whole number, so it is part of the form.
        value = b""
        if _is_whole_number(name, place):
            value = bytes(body[place.start : place.stop])
        tensors.append((name, place.format, place.shape, value))
    return tuple(tensors)


def _is_whole_number(name: str, place: codec.Place) -> bool:
    """Return whether a tensor is a whole number of the method's payload (no name with ``@``)."""
    return (place.format, place.shape) == ("I64", ()) and not name.startswith("@")


@dataclass(frozen=True)
class Request:
    """What the server asks one client.

    ``round``: rounds done so far. ``config``: digest of what both must agree on, 16 bytes.
    ``memory``: the version of the client's memory that the request assumes. ``phase``: exchanges
    of this round that are done.

    >>> config = digest(b"the configuration")
    >>> blob = Request(Kind.TRAIN, 3, config, {"w": torch.ones(2)}).encode()
    >>> request = Request.decode(blob, config)
    >>> request.kind.name, request.round, request.payload
    ('TRAIN', 3, {'w': tensor([1., 1.])})
    """

    kind: Kind
    round: int
    config: bytes
    payload: Payload
    memory: int = NO_MEMORY
    phase: int = 0

    def encode(self) -> bytes:
        """Return the request as bytes."""
        return encode(
            {
                **self.payload,
                "@kind": torch.tensor(int(self.kind)),
                "@round": torch.tensor(self.round),
                "@phase": torch.tensor(self.phase),
                "@memory": torch.tensor(self.memory),
                "@config": torch.tensor(list(self.config), dtype=torch.uint8),
            }
        )

    @staticmethod
    def decode(blob: bytes, config: bytes) -> "Request":
        """Read a request; WireError for other bytes and for another configuration."""
        fields = decode(blob)
        # Each field is taken out; what is left in the end is the method's payload.
        kind = _whole_number(fields, "@kind")
        round_number = _whole_number(fields, "@round")
        phase = _whole_number(fields, "@phase")
        memory = _whole_number(fields, "@memory")
        asked_config = bytes(_field(fields, "@config", (DIGEST,), torch.uint8).tolist())
        if asked_config != config:
            raise WireError(
                f"the request is for configuration {asked_config.hex()}, "
                f"this client has {config.hex()}"
            )
        in_range = round_number in range(ROUNDS) and phase in range(PHASES)
        if kind not in set(Kind) or not in_range or memory < NO_MEMORY:
            raise WireError(
                f"not a request: kind {kind}, round {round_number}, phase {phase}, "
                f"memory of round {memory}"
            )
        return Request(Kind(kind), round_number, config, fields, memory, phase)


def _whole_number(fields: dict[str, Tensor], name: str) -> int:
    """Take a whole number out of the fields of a request; WireError for anything else."""
    return int(_field(fields, name, (), torch.int64))


def _field(
    fields: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Take a tensor out of the fields of a request.

    WireError where it is missing or has another shape or dtype.
    """
    tensor = fields.pop(name, _NOTHING)
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        raise WireError(f"not a request: field {name} is missing or of another form")
    return tensor


class Status(IntEnum):
    """What became of a request."""

    DONE = 0
    FORGOTTEN = 1
    """The client holds no memory of the version that the request assumes, and has done nothing."""
    DISCREET = 2
    """Done; the client does not tell with what loss, and maybe not on how many examples."""


_ABOUT = ("round", "phase", "memory", "status")
"""The fields of a response that travel beside its payload and its measurements, in this order."""


@dataclass(frozen=True)
class Response:
    """What a client replies: the payload and, for the ledger, what it ``measured``.

    ``memory``: the version of the memory that the client holds now. ``phase``: as in the request.

    >>> blob = Response(3, {"w": torch.ones(2)}, Measured(examples=9)).encode()
    >>> response = Response.decode(blob)
    >>> response.round, response.measured.examples, response.status.name
    (3, 9, 'DONE')
    """

    round: int
    payload: Payload
    measured: Measured = field(default_factory=Measured)
    memory: int = NO_MEMORY
    status: Status = Status.DONE
    phase: int = 0

    def encode(self) -> bytes:
        """Return the response as bytes; their number depends on the payload's form alone."""
        about = [int(getattr(self, name)) for name in _ABOUT]
        # Whole numbers and real ones in two tensors: a float64 cannot hold every int64.
        counts = [getattr(self.measured, name) for name in COUNTS]
        reals = [_or_nan(getattr(self.measured, name)) for name in REALS]
        return encode(
            {
                **self.payload,
                "@about": torch.tensor(about, dtype=torch.int64),
                "@counts": torch.tensor(counts, dtype=torch.int64),
                "@measures": torch.tensor(reals, dtype=torch.float64),
            }
        )

    @staticmethod
    def decode(blob: bytes) -> "Response":
        """Read a response; other bytes raise WireError. ``check`` tells whether it can be used."""
        fields = decode(blob)
        about = _by_name(fields, "@about", _ABOUT, torch.int64)
        counts = _by_name(fields, "@counts", COUNTS, torch.int64)
        reals = _by_name(fields, "@measures", REALS, torch.float64)
        # The loss is the one figure that may be missing; it then travels as NaN.
        loss = None if math.isnan(reals["loss"]) else reals["loss"]
        try:
            status = Status(about["status"])
        except ValueError as error:
            raise WireError(f"not an answer: {error}") from error
        measured = Measured(**{**counts, **reals, "loss": loss})
        return Response(about["round"], fields, measured, about["memory"], status, about["phase"])


def _or_nan(real: float | None) -> float:
    """Return ``real`` as it travels: NaN where there is none."""
    return math.nan if real is None else real


def _by_name(
    fields: dict[str, Tensor],
    key: str,
    names: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Take the tensor ``key`` out of ``fields`` and return its numbers by name.

    WireError where it is missing or of another form.
    """
    tensor = fields.pop(key, _NOTHING)
    if tuple(tensor.shape) != (len(names),) or tensor.dtype != dtype:
        raise WireError(f"not an answer: field {key} is missing or of another form")
    return dict(zip(names, tensor.tolist(), strict=True))


def memory_told(response: bytes) -> int:
    """Return the version of the memory that a response tells of, for the client that made it.

    It reads nothing else and checks nothing, as whoever receives the response does.

    >>> memory_told(Response(3, {"w": torch.ones(2)}, memory=2).encode())
    2
    """
    body = memoryview(response)[DIGEST:]
    place = codec.places(body)["@about"]
    about = body[place.start : place.stop].cast("q")
    return about[_ABOUT.index("memory")]


def forgotten(request: bytes, config: bytes) -> bytes:
    """Return the reply of a client that lacks the memory which ``request`` assumes.

    In its next request to that client, the server then assumes no memory. ``config`` is the
    client's own digest. A request that cannot be read, or has another digest, raises WireError.
    """
    asked = Request.decode(request, config)
    return Response(asked.round, {}, status=Status.FORGOTTEN, phase=asked.phase).encode()


def check(
    response: Response,
    round_number: int,
    expected: Payload,
    *,
    memory: int,
    examples: int = 0,
    phase: int = 0,
) -> None:
    """Raise WireError unless ``response`` can be used, Forgotten if its client lacked the memory.

    A response can be used if all of this holds:

    - It is for this round, and for this ``phase`` of it.
    - Its measurements can be true, with no more ``examples`` than the client is known to hold
      (0: unknown). A discreet one has no loss, and may have no examples.
    - Its memory has the version that the request assumed, ``memory``, or was written just now.
    - Its payload has exactly the expected names, shapes and dtypes, and every value is finite.
    """
    if response.round != round_number:
        raise WireError(
            f"stale: the reply is for round {response.round}, this is round {round_number}"
        )
    if response.phase != phase:
        raise WireError(f"stale: the reply is for phase {response.phase}, this is phase {phase}")
    if response.status is Status.FORGOTTEN:
        raise Forgotten(f"forgotten: the client holds no memory of round {memory}; it is sent anew")
    faults = response.measured.faults(examples)
    if response.status is Status.DISCREET:
        faults.pop("loss", None)
        if not response.measured.examples:
            faults.pop("examples", None)
    if faults:
        raise WireError("; ".join(faults.values()))
    # Unchanged, written anew, or written anew with the method's part carried along.
    now = stamp(round_number, phase)
    if response.memory not in {memory, now, carried(now, memory)}:
        others = f"the request assumed that of {memory}, this is round {round_number}"
        raise WireError(f"the reply claims a memory of round {response.memory}; {others}")
    _check_payload(response.payload, expected)


def _check_payload(payload: Payload, expected: Payload) -> None:
    """Raise WireError unless ``payload`` is finite, with the expected names, shapes and dtypes."""
    for name in expected.keys() - payload.keys():
        raise WireError(f"missing tensor {name!r}")
    for name in payload.keys() - expected.keys():
        raise WireError(f"unexpected tensor {name!r}")
    for name, tensor in payload.items():
        spec = expected[name]
        if (tensor.shape, tensor.dtype) != (spec.shape, spec.dtype):
            raise WireError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} of {tensor.dtype}, "
                f"expected {tuple(spec.shape)} of {spec.dtype}"
            )
        if not _is_finite(tensor):
            raise WireError(f"tensor {name!r} is not finite")


def _is_finite(tensor: Tensor) -> bool:
    """Return whether no value is infinite or not a number."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # An infinity is the least or the greatest value, and a NaN makes both NaN. So one pass is
    # enough, without the mask of the tensor's size that isfinite would allocate.
    least, greatest = torch.aminmax(tensor)
    return math.isfinite(least.item()) and math.isfinite(greatest.item())
