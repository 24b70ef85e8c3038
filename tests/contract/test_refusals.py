"""A reply that is not exactly what was asked for is refused, counted with its bytes, and has no effect at all."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpeft.errors import WireError
from fedpeft.federation.server import update_norm
from fedpeft.ledger import COUNTS, Measured
from fedpeft.types import Lost, Payload, Reply, State
from fedpeft.wire.messages import Response, decode, encode
from tests.contract.reference import (
    CORE,
    PHASES,
    asked,
    core_rows,
    merging,
    reference,
    replayed,
    rows,
)
from tests.tiny import SIZES, assert_same_state

BEGIN = 1
VICTIM = 1


def altered(change: Callable[[str, Tensor], Mapping[str, Tensor]]) -> Callable[[bytes], bytes]:
    """Return a damage: ``change`` says what stands in the place of the reply's first floating tensor."""

    def damage(blob: bytes) -> bytes:
        answer = Response.decode(blob)
        payload = dict(answer.payload)
        name = min(name for name, tensor in payload.items() if tensor.is_floating_point())
        stands = change(name, payload.pop(name))
        return replace(answer, payload={**payload, **stands}).encode()

    return damage


def poisoned(value: float) -> Callable[[bytes], bytes]:
    """Return a damage: one entry becomes ``value``."""

    def change(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        bad = tensor.clone()
        bad.view(-1)[-1] = value
        return {name: bad}

    return altered(change)


def recoded(changes: Payload) -> Callable[[bytes], bytes]:
    """Return a damage: ``changes`` are laid over all fields of the message."""
    return lambda blob: encode({**decode(blob), **changes})


def measuring(**figures: Any) -> Callable[[bytes], bytes]:
    """Return a damage: the client says ``figures`` of itself."""

    def damage(blob: bytes) -> bytes:
        answer = Response.decode(blob)
        return replace(answer, measured=replace(answer.measured, **figures)).encode()

    return damage


TENSORS: Mapping[str, tuple[Callable[[bytes], bytes], str]] = {
    "missing": (altered(lambda name, tensor: {}), "missing"),
    "renamed": (altered(lambda name, tensor: {f"{name}x": tensor}), "missing"),
    "of one more row": (
        altered(lambda name, tensor: {name: torch.cat([tensor, tensor[:1]])}),
        "shape",
    ),
    "flat": (altered(lambda name, tensor: {name: tensor.reshape(1, -1)}), "shape"),
    "in float64": (altered(lambda name, tensor: {name: tensor.double()}), "float64"),
    "in whole numbers": (altered(lambda name, tensor: {name: tensor.long()}), "int64"),
    "not a number": (poisoned(float("nan")), "not finite"),
    "infinite": (poisoned(float("-inf")), "not finite"),
}
MESSAGES: Mapping[str, tuple[Callable[[bytes], bytes], str]] = {
    "one tensor too many": (recoded({"x": torch.ones(1)}), "unexpected"),
    "stale": (lambda b: replace(Response.decode(b), round=BEGIN - 1).encode(), "stale"),
    "of the future": (lambda b: replace(Response.decode(b), round=BEGIN + 1).encode(), "stale"),
    "from no example": (measuring(examples=0), "examples = 0"),
    "from more examples than there are": (measuring(examples=2**62), f"examples = {2**62}"),
    "of a loss that is no number": (measuring(loss=math.nan), "diverged"),
    "of less than no time": (measuring(seconds=-1.0), "seconds = -1.0"),
    "with a memory of another round": (
        lambda b: replace(Response.decode(b), memory=BEGIN + 7).encode(),
        f"memory of round {BEGIN + 7}",
    ),
    "empty": (lambda _: b"", "damaged"),
    "cut short": (lambda b: b[:-1], "damaged"),
    "one bit off": (lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], "damaged"),
    "no answer": (lambda _: encode({"x": torch.ones(1)}), "answer"),
    "with one count": (recoded({"@counts": torch.tensor(1)}), "answer"),
    "with counts in a table": (recoded({"@counts": torch.full((len(COUNTS), 1), 1)}), "answer"),
    "with fractions of steps": (recoded({"@counts": torch.full((len(COUNTS),), 1.0)}), "answer"),
    "with fractions of rounds": (recoded({"@about": torch.full((3,), BEGIN + 0.0)}), "answer"),
    "with measures in words": (recoded({"@measures": torch.ones(2, 2)}), "answer"),
}


def believed(blob: bytes) -> Measured:
    """Return what a ledger keeps of a refused reply: the figures that can be true."""
    try:
        answer = Response.decode(blob)
    except WireError:
        return Measured()
    return answer.measured.sound(SIZES[VICTIM]) if answer.round == BEGIN else Measured()


def check_refused(name: str, damage: Callable[[bytes], bytes], reason: str) -> None:
    """Assert that damage to one reply equals not asking its client, now and in the round after."""

    def spoil(number: int, outcome: Reply | Lost) -> Reply | Lost:
        assert isinstance(outcome, Reply)
        return (
            replace(outcome, blob=damage(outcome.blob))
            if (number, outcome.client.id) == (last, VICTIM)
            else outcome
        )

    last = PHASES.get(name, 1) - 1
    playing, state = replayed(name, BEGIN, spoil)
    spoilt = playing.play(1, state)
    [row] = [row for row in playing.rows if (row.phase, row.client) == (last, VICTIM)]
    assert row.lost is not None
    assert reason in row.lost
    request, reply = playing.engine.talks[last][VICTIM]
    assert (row.down, row.up) == (len(request), len(reply))
    assert row.measured == believed(reply)
    assert all(row.lost is None for row in playing.rows if row.client != VICTIM)

    untroubled, _ = replayed(name, BEGIN)
    others = [client for client in untroubled.clients() if client.id != VICTIM]
    assert_as_unasked(name, spoilt, untroubled.play(1, state, cohort=lambda _: others))


def assert_as_unasked(name: str, found: State, due: State) -> None:
    """Assert that a state is the ``due`` one, as if the victim had not been asked.

    Of several exchanges it is the last one from which it is missing: it has written a memory before.
    """
    if name in PHASES:
        due = replace(due, memories={**due.memories, VICTIM: found.memories[VICTIM]})
    assert_same_state(found, due)


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", rows(without={"local_only"}))
def test_a_reply_with_a_tensor_that_is_wrong_is_refused(name: str, kind: str) -> None:
    check_refused(name, *TENSORS[kind])


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("name", ["lora", "fedara", "local_only"])
def test_a_reply_that_is_wrong_as_a_whole_is_refused(name: str, kind: str) -> None:
    check_refused(name, *MESSAGES[kind])


def test_votes_of_another_length_are_refused() -> None:
    def longer(blob: bytes) -> bytes:
        answer = Response.decode(blob)
        votes = torch.cat([answer.payload["votes"], torch.zeros(1, dtype=torch.uint8)])
        return replace(answer, payload={**answer.payload, "votes": votes}).encode()

    check_refused("fedara", longer, "'votes' has shape")


def test_a_reply_that_nobody_asked_for_is_not_counted() -> None:
    """A client outside the cohort speaks up; its reply is valid in form."""
    playing, state = replayed("lora", BEGIN)
    others = [client for client in playing.clients() if client.id != VICTIM]
    untroubled, _ = replayed("lora", BEGIN)
    expected = untroubled.play(1, state, cohort=lambda _: others)

    def intrude(_: int, outcome: Reply | Lost) -> Reply | Lost:
        stranger = replace(outcome.client, id=99)
        return (
            Reply(stranger, outcome.blob)
            if outcome.client.id == VICTIM and isinstance(outcome, Reply)
            else outcome
        )

    intruded, _ = replayed("lora", BEGIN, intrude)
    assert_same_state(intruded.play(1, state), expected)
    assert {row.client: row.lost for row in intruded.rows} == {0: None, 1: "no answer", 2: None}


TRAINED = core_rows(without={"local_only"})
"""The methods of which something comes back."""


@pytest.mark.parametrize("name", TRAINED)
def test_a_reply_of_another_method_is_refused_unless_it_has_the_very_same_form(name: str) -> None:
    """A site trains by no other method than that of the request, whose digest says which one it is. Here it is made to."""
    expected = reference(name).playing.answers(merging(name, BEGIN))[VICTIM].payload
    for other in sorted(CORE):
        theirs = reference(other).playing.answers(BEGIN)[VICTIM].payload
        forms = [
            {key: (tensor.shape, tensor.dtype) for key, tensor in payload.items()}
            for payload in (expected, theirs)
        ]
        if forms[0] != forms[1]:
            check_refused(name, partial(_with_payload, theirs), "tensor")


def _with_payload(payload: Payload, blob: bytes) -> bytes:
    return replace(Response.decode(blob), payload=payload).encode()


def moved(down: Payload, factor: float) -> Callable[[bytes], bytes]:
    """Return a damage: the client claims to have gone ``factor`` times as far from what it was sent."""

    def damage(blob: bytes) -> bytes:
        answer, payload = Response.decode(blob), dict[str, Tensor]()
        for name, tensor in answer.payload.items():
            payload[name] = tensor
            if tensor.is_floating_point():
                began = down.get(name, tensor)
                if began.shape != tensor.shape or name not in down:
                    began = torch.zeros_like(tensor)
                payload[name] = began + factor * (tensor - began)
        return replace(answer, payload=payload).encode()

    return damage


@pytest.mark.parametrize("name", TRAINED)
def test_an_update_of_a_thousand_times_the_norm_counts_unless_a_limit_is_declared(
    name: str,
) -> None:
    """Any finite number may be honest; who knows better says so, and the update is as if its client had not been asked."""
    playing, _ = replayed(name, BEGIN)
    found, exchange = reference(name).playing, merging(name, BEGIN)
    down = asked(found, exchange, VICTIM)
    norms = [
        update_norm(asked(found, exchange, k), one.payload)
        for k, one in found.answers(exchange).items()
    ]
    far = moved(down, 1000.0)

    def spoil(_: int, outcome: Reply | Lost) -> Reply | Lost:
        if outcome.client.id != VICTIM or not isinstance(outcome, Reply):
            return outcome
        return replace(outcome, blob=far(outcome.blob))

    # 1. Without a limit it is merged like any other.
    spoilt, state = replayed(name, BEGIN, spoil)
    after = spoilt.play(1, state)
    assert {row.lost for row in spoilt.rows} == {None}
    assert not all(
        torch.equal(tensor, reference(name).states[BEGIN + 1].shared[key])
        for key, tensor in after.shared.items()
    )
    # 2. A limit that no honest update reaches changes nothing.
    limit = 2 * max(norms)
    assert_same_state(
        playing.play(1, state, largest_update=limit), reference(name).states[BEGIN + 1]
    )
    # 3. With it the update is refused, in one line that names both numbers.
    limited, _ = replayed(name, BEGIN, spoil)
    refused = limited.play(1, state, largest_update=limit)
    row = [row for row in limited.rows if row.client == VICTIM][-1]
    assert row.lost == (
        f"its update has norm {1000 * norms[VICTIM]:.3g}, and federation.largest_update is {limit:g}"
    )
    others = [client for client in playing.clients() if client.id != VICTIM]
    untroubled, _ = replayed(name, BEGIN)
    assert_as_unasked(name, refused, untroubled.play(1, state, cohort=lambda _: others))


def test_the_norm_of_an_update_is_that_of_all_differences_as_one_vector() -> None:
    down = {"a": torch.tensor([1.0, 2.0]), "b": torch.full((2, 2), 3.0), "unchanged": torch.ones(5)}
    up = {
        "a": torch.tensor([1.0, 4.0]),
        "b": torch.full((2, 2), 4.0),
        "grown": torch.full((4,), 2.0),
        "votes": torch.full((9,), 200, dtype=torch.uint8),
    }
    vector = torch.cat([torch.tensor([0.0, 2.0]), torch.ones(4), torch.full((4,), 2.0)])
    assert update_norm(down, up) == pytest.approx(float(vector.norm()))
    assert update_norm({}, {"a": torch.tensor([3e38, 3e38])}) == pytest.approx(3e38 * 2**0.5)
