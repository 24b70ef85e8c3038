"""Messages as bytes: a 16-byte content digest, then a safetensors file without metadata, so equal shapes give equal lengths."""

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
from fedpeft.wire.versions import carried

DIGEST = 16
"""Bytes of every digest in a message."""

Form = tuple[tuple[str, str, tuple[int, ...], bytes], ...]
"""(name, dtype, shape, value of a whole number) of every tensor in a message."""


_NOTHING = torch.zeros(0, 0)


class Kind(IntEnum):
    """What a request asks for."""

    TRAIN = 0
    EVALUATE = 1


def digest(content: bytes | memoryview) -> bytes:
    """Return the 128-bit XXH3 of ``content``, which tells damage, not intent: who can change a message can its digest, too."""
    return xxh3_128_digest(content)


def encode(payload: Payload) -> bytes:
    """Return ``payload`` as bytes; equal names, shapes and dtypes give equal lengths."""
    body = codec.buffers(payload)
    whole = xxh3_128()
    for part in body:
        whole.update(part)
    return b"".join([whole.digest(), *body])


def decode(blob: bytes) -> dict[str, Tensor]:
    """Return the payload that ``encode`` turned into ``blob``, in order of names; anything else raises WireError.

    The tensors are views of ``blob``, for reading only.
    """
    if digest(memoryview(blob)[DIGEST:]) != blob[:DIGEST]:
        raise WireError(f"damaged message: {len(blob)} bytes do not match their digest")
    return codec.tensors(blob, DIGEST)


def form(blob: bytes) -> Form:
    """Return what the messages of clients that train side by side have in common: names, dtypes, shapes, whole numbers.

    Whole numbers are the 0-d int64 tensors of the payload, such as a seed; of an empty ``blob`` the form is empty. A
    message without a header raises WireError.
    """
    body = memoryview(blob)[DIGEST:]
    return tuple(
        (
            name,
            place.format,
            place.shape,
            bytes(body[place.start : place.stop]) if _is_whole(name, place) else b"",
        )
        for name, place in sorted(codec.places(body).items() if blob else ())
    )


def _is_whole(name: str, place: codec.Place) -> bool:
    return (place.format, place.shape) == ("I64", ()) and not name.startswith("@")


@dataclass(frozen=True)
class Request:
    """What the server asks one client; ``memory`` is the version of the client's memory that it assumes."""

    kind: Kind
    round: int
    config: bytes
    payload: Payload
    memory: int = NO_MEMORY

    def encode(self) -> bytes:
        """Return the request as bytes."""
        return encode(
            {
                **self.payload,
                "@kind": torch.tensor(int(self.kind)),
                "@round": torch.tensor(self.round),
                "@memory": torch.tensor(self.memory),
                "@config": torch.tensor(list(self.config), dtype=torch.uint8),
            }
        )

    @staticmethod
    def decode(blob: bytes, config: bytes) -> "Request":
        """Read a request; what is none, or is for another configuration, raises WireError."""
        fields = decode(blob)
        whole = torch.empty((), dtype=torch.int64)
        bytes_ = torch.empty(DIGEST, dtype=torch.uint8)
        due = {"@kind": whole, "@round": whole, "@memory": whole, "@config": bytes_}
        found = {name: fields.pop(name, _NOTHING) for name in due}
        for name, like in due.items():
            if (found[name].shape, found[name].dtype) != (like.shape, like.dtype):
                raise WireError(f"not a request: field {name} is missing or of another form")
        theirs = bytes(found["@config"].tolist())
        if theirs != config:
            raise WireError(
                f"the request is for configuration {theirs.hex()}, this client has {config.hex()}"
            )
        kind, number, memory = (int(found[name]) for name in ("@kind", "@round", "@memory"))
        if kind not in set(Kind) or number < 0 or memory < NO_MEMORY:
            raise WireError(f"not a request: kind {kind}, round {number}, memory of round {memory}")
        return Request(Kind(kind), number, theirs, fields, memory)


class Status(IntEnum):
    """What became of a request."""

    DONE = 0
    FORGOTTEN = 1
    """The client holds no memory of the version that the request assumes, and has done nothing."""


_ABOUT = ("round", "memory", "status")
"""The fields of an answer that travel beside its payload and what was measured, in their order."""


@dataclass(frozen=True)
class Response:
    """What a client says back: the payload and, for the ledger, what it ``measured``.

    ``memory``: the version of the memory that the client holds now.
    """

    round: int
    payload: Payload
    measured: Measured = field(default_factory=Measured)
    memory: int = NO_MEMORY
    status: Status = Status.DONE

    def encode(self) -> bytes:
        """Return the answer as bytes; its length depends on the payload's names and shapes alone."""
        about = [int(getattr(self, name)) for name in _ABOUT]
        counts = [getattr(self.measured, name) for name in COUNTS]
        reals = [getattr(self.measured, name) for name in REALS]
        return encode(
            {
                **self.payload,
                "@about": torch.tensor(about, dtype=torch.int64),
                "@counts": torch.tensor(counts, dtype=torch.int64),
                "@measures": torch.tensor([_or_nan(real) for real in reals], dtype=torch.float64),
            }
        )

    @staticmethod
    def decode(blob: bytes) -> "Response":
        """Read an answer; a message that is none raises WireError. What it says is not checked."""
        fields = decode(blob)
        about = _numbers(fields, "@about", _ABOUT, torch.int64)
        counts = _numbers(fields, "@counts", COUNTS, torch.int64)
        reals = _numbers(fields, "@measures", REALS, torch.float64)
        loss = None if math.isnan(reals["loss"]) else reals["loss"]
        try:
            status = Status(about["status"])
        except ValueError as error:
            raise WireError(f"not an answer: {error}") from error
        measured = Measured(**{**counts, **reals, "loss": loss})
        return Response(about["round"], fields, measured, about["memory"], status)


def _or_nan(real: float | None) -> float:
    """Return what travels for a number that may be missing."""
    return math.nan if real is None else real


def _numbers(
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


def forgotten(request: bytes, config: bytes) -> bytes:
    """Return what a client answers that holds no memory of the version which ``request`` assumes.

    The server then assumes none in its next request to that client. ``config`` is the client's own;
    a request that cannot be read, or is for another one, raises WireError.
    """
    asked = Request.decode(request, config)
    return Response(asked.round, {}, status=Status.FORGOTTEN).encode()


def check(
    answer: Response,
    round_number: int,
    expected: Payload,
    *,
    memory: int,
    examples: int = 0,
) -> None:
    """Raise WireError unless ``answer`` can be used, Forgotten where its client lacked the memory.

    It is of this round; what it measured can be true, with no more ``examples`` than the client is
    known to hold (0: unknown); its memory is of the version that the request assumed, ``memory``,
    or of this round; it has the expected names, shapes and dtypes only, and is finite.
    """
    number = answer.round
    if number != round_number:
        raise WireError(f"stale: the reply is for round {number}, this is round {round_number}")
    if answer.status is Status.FORGOTTEN:
        raise Forgotten(f"forgotten: the client holds no memory of round {memory}; it is sent anew")
    if faults := answer.measured.faults(examples):
        raise WireError("; ".join(faults.values()))
    if answer.memory not in {memory, number, carried(number, memory)}:
        others = f"the request assumed that of {memory}, this is round {number}"
        raise WireError(f"the reply claims a memory of round {answer.memory}; {others}")
    for name in expected.keys() - answer.payload.keys():
        raise WireError(f"missing tensor {name!r}")
    for name in answer.payload.keys() - expected.keys():
        raise WireError(f"unexpected tensor {name!r}")
    for name, tensor in answer.payload.items():
        given, due = ((tuple(t.shape), t.dtype) for t in (tensor, expected[name]))
        if given != due:
            raise WireError(
                f"tensor {name!r} has shape {given[0]} of {given[1]}, expected {due[0]} of {due[1]}"
            )
        if not _finite(tensor):
            raise WireError(f"tensor {name!r} is not finite")


def _finite(tensor: Tensor) -> bool:
    """Return whether no value is infinite or not a number, in one pass without a copy: either would be the extreme one."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
