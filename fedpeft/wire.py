"""Messages as bytes: a 16-byte content digest, then a safetensors file without metadata, so equal shapes give equal lengths."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_digest

from fedpeft import codec
from fedpeft.types import NEVER, Payload, WireError

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
        (name, place.format, place.shape, bytes(body[place.start : place.stop]) if _is_whole(name, place) else b"")
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
    memory: int = NEVER

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
            raise WireError(f"the request is for configuration {theirs.hex()}, this client has {config.hex()}")
        kind, number, memory = (int(found[name]) for name in ("@kind", "@round", "@memory"))
        if kind not in set(Kind) or number < 0 or memory < NEVER:
            raise WireError(f"not a request: kind {kind}, round {number}, memory of round {memory}")
        return Request(Kind(kind), number, theirs, fields, memory)


@dataclass(frozen=True)
class Answer:
    """What a client says back: the payload and, measured where it trained, the figures for the ledger.

    ``examples``, ``steps``, ``trained`` (parameters), ``loss`` (mean over the steps), ``seconds`` of wall time,
    ``peak_memory`` in bytes; ``shared_by``: how many clients trained side by side: ``seconds`` is the client's share of
    what they took, by steps, and ``peak_memory`` that of all at once;
    ``memory``: the version of the memory that the client holds now.
    """

    round: int
    payload: Payload
    examples: int
    steps: int = 0
    trained: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0
    shared_by: int = 1
    memory: int = NEVER

    def encode(self) -> bytes:
        """Return the answer as bytes; its length depends on the payload's names and shapes alone."""
        numbers = (self.round, self.examples, self.steps, self.trained, self.peak_memory, self.shared_by, self.memory)
        return encode(
            {
                **self.payload,
                "@counts": torch.tensor(numbers, dtype=torch.int64),
                "@measures": torch.tensor((self.loss, self.seconds), dtype=torch.float64),
            }
        )

    @staticmethod
    def decode(blob: bytes) -> "Answer":
        """Read an answer; a message that is none raises WireError."""
        fields = decode(blob)
        counts, measures = (fields.pop(name, _NOTHING) for name in ("@counts", "@measures"))
        if (counts.shape, counts.dtype, measures.shape, measures.dtype) != ((7,), torch.int64, (2,), torch.float64):
            raise WireError("not an answer: its 7 counts or 2 measures are missing or of another form")
        number, examples, steps, trained, peak, shared, memory = counts.tolist()
        loss, seconds = measures.tolist()
        return Answer(number, fields, examples, steps, trained, loss, seconds, peak, shared, memory)


def check(answer: Answer, round_number: int, expected: Payload) -> None:
    """Raise WireError unless ``answer`` is of this round, has the expected names, shapes and dtypes only, and is finite."""
    if answer.round != round_number:
        raise WireError(f"stale: the reply is for round {answer.round}, this is round {round_number}")
    if answer.examples <= 0:
        raise WireError(f"examples = {answer.examples}: a reply must come from at least one example")
    for name in expected.keys() - answer.payload.keys():
        raise WireError(f"missing tensor {name!r}")
    for name in answer.payload.keys() - expected.keys():
        raise WireError(f"unexpected tensor {name!r}")
    for name, tensor in answer.payload.items():
        given, due = ((tuple(t.shape), t.dtype) for t in (tensor, expected[name]))
        if given != due:
            raise WireError(f"tensor {name!r} has shape {given[0]} of {given[1]}, expected {due[0]} of {due[1]}")
        if not _finite(tensor):
            raise WireError(f"tensor {name!r} is not finite")


def _finite(tensor: Tensor) -> bool:
    """Return whether no value is infinite or not a number, in one pass without a copy: either would be the extreme one."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
