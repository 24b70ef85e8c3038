"""What clients learn shows in the merge, whoever answers first; who does not answer changes nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedpeft.engines.local import LocalEngine
from fedpeft.types import Lost, Payload, Reply, State
from fedpeft.wire.messages import Response, decode
from tests.contract.reference import (
    BEGINS,
    asked,
    going_on,
    is_mean,
    merging,
    reference,
    replayed,
    rows,
    updates,
)
from tests.tiny import (
    CONFIG,
    HEAD,
    NAMES,
    SOFTMAX_BLIND,
    assert_same,
    assert_same_state,
    federation,
    small,
    weighted,
)

EXCHANGING = [name for name in NAMES if name != "local_only"]
ONLY_HEAD = "the head alone goes up; this contract is for methods that adapt more than that"
NO_MEAN = (
    "the next state does not hold the mean of the replies; if it should not, name the method in "
    "MEANS_MOVED_ON or NOT_MEANS of tests/contract/reference.py"
)


def live(before: State, name: str, tensor: Tensor) -> Tensor:
    """Return the part of a shared tensor that was sent when ``before`` was the state: FedARA's dead ranks are not."""
    module, _, part = name.partition(":")
    alive = before.server.get(f"{module}:alive")
    if alive is None:
        return tensor
    return tensor[:, alive] if part == "B" else tensor[alive]


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("name", EXCHANGING)
def test_every_client_moves_every_tensor_of_the_adapter(name: str, begin: int) -> None:
    playing, exchange = reference(name).playing, merging(name, begin)
    for client, answer in playing.answers(exchange).items():
        down = asked(playing, exchange, client)
        moving = [part for part in answer.payload if not part.endswith(SOFTMAX_BLIND)]
        assert any(part not in HEAD for part in moving), ONLY_HEAD
        for part in moving:
            # What is not sent begins anew, B at 0.
            begun = down.get(part, torch.zeros_like(answer.payload[part]))
            assert not torch.equal(answer.payload[part], begun), (
                f"client {client} did not move {part}"
            )


@pytest.mark.parametrize(
    ("name", "begin"), [(n, b) for n in EXCHANGING for b in BEGINS if is_mean(n, b)]
)
def test_the_merge_is_the_weighted_mean_of_all_replies(name: str, begin: int) -> None:
    method, played = small(name), reference(name)
    before, after = played.states[begin : begin + 2]
    answers = list(played.playing.answers(begin).values())
    weights = [weight_of(answer, method.weighting) for answer in answers]  # type: ignore[attr-defined]
    assert sorted(answer.measured.examples for answer in answers) == [7, 9, 11]
    payloads = [trained_part(answer.payload) for answer in answers]
    expected = weighted(payloads, weights)
    assert any(part not in HEAD for part in expected), ONLY_HEAD
    for part, value in expected.items():
        merged = live(before, part, after.shared[part]).double()
        torch.testing.assert_close(merged, value, rtol=1e-6, atol=1e-8, msg=f"{part}: {NO_MEAN}")
        for left_out in range(len(answers) * (not part.endswith(SOFTMAX_BLIND))):
            rest = [k for k in range(len(answers)) if k != left_out]
            without = weighted(
                [{part: payloads[k][part]} for k in rest], [weights[k] for k in rest]
            )[part]
            assert (merged - without).norm() > 30 * (merged - value).norm(), (
                f"reply {left_out} does not show in {part}"
            )


@pytest.mark.parametrize(
    ("name", "begin"), [(n, b) for n in EXCHANGING for b in BEGINS if not is_mean(n, b)]
)
def test_every_reply_shows_in_a_merge_that_is_no_mean(name: str, begin: int) -> None:
    method, played = small(name), reference(name)
    exchange = merging(name, begin)
    before, after = played.begins[exchange], played.states[begin + 1]
    replies = updates(played.playing, exchange)
    whole = method.receive(before, replies)
    assert_same(whole.shared, after.shared)
    assert_same(whole.server, after.server)
    for left_out in range(len(replies)):
        rest = [update for place, update in enumerate(replies) if place != left_out]
        without = method.receive(before, rest)
        changes = [
            float((tensor - merged[part]).norm() / tensor.norm().clamp(min=1e-9))
            for merged, state in ((without.shared, whole.shared), (without.server, whole.server))
            for part, tensor in state.items()
            if tensor.is_floating_point()
            and part not in HEAD
            and part in merged
            and merged[part].shape == tensor.shape
        ]
        assert max(changes) > 1e-3, f"reply {left_out} does not show"


def weight_of(answer: Response, weighting: str) -> float:
    """Return what a reply counts in a mean."""
    return {"uniform": 1.0, "examples": float(answer.measured.examples)}[weighting]


def trained_part(payload: Payload) -> dict[str, Tensor]:
    """Return a reply without FedARA's votes, which are no mean of bytes."""
    return {name: tensor for name, tensor in payload.items() if name != "votes"}


def test_local_only_shares_nothing_and_each_client_keeps_what_it_learnt() -> None:
    played = reference("local_only")
    start = played.states[0]
    assert_same(played.states[2].shared, start.shared)
    assert played.states[2].memories == {0: 1, 1: 1, 2: 1}
    for exchange in (0, 1):
        assert all(answer.payload == {} for answer in played.playing.answers(exchange).values())
    own = [decode(played.memories[2].get(client, 1)) for client in (0, 1, 2)]
    for part, value in start.shared.items():
        for k, mine in enumerate(own):
            assert not torch.equal(mine[part], value), f"client {k} did not move {part}"
            assert not torch.equal(mine[part], own[k - 1][part])
    assert asked(played.playing, 0, 0).keys() == start.shared.keys()
    assert asked(played.playing, 1, 0) == {}, "the start is sent once"


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_replies_does_not_matter(name: str, begin: int) -> None:
    playing, state = replayed(name, begin, backwards=True)
    forwards = reference(name)
    assert_same_state(playing.play(1, state), forwards.states[begin + 1])
    assert playing.rows == forwards.rows_of(begin, begin + 1)


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("name", NAMES)
def test_a_silent_round_changes_no_tensor_and_counts(name: str, begin: int) -> None:
    playing, before = replayed(name, begin, lambda _, outcome: Lost(outcome.client, "silence"))
    after = playing.play(1, before)
    assert_same_state(after, replace(before, round=begin + 1))
    assert [row.lost for row in playing.rows] == ["silence"] * 3


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("name", rows())
def test_a_round_with_too_few_replies_is_silent(name: str, begin: int) -> None:
    def change(number: int, outcome: Reply | Lost) -> Reply | Lost:
        return Lost(outcome.client, "silence") if (number, outcome.client.id) == (0, 2) else outcome

    playing, before = going_on(name, begin, change)
    after = playing.play(1, before, min_replies=3)
    assert_same_state(after, replace(before, round=begin + 1))
    assert [row.lost for row in playing.rows] == ["only 2 usable replies, 3 needed"] * 2 + [
        "silence"
    ]
    assert all(row.down and row.up for row in playing.rows[:2]), "the bytes were spent all the same"
    playing.play(1, after, min_replies=3)
    lost = {row.lost for row in playing.rows[3:]}
    assert lost == {None}, "server and clients agree on the memories"


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("name", rows())
def test_a_lost_reply_is_as_though_the_client_had_not_been_asked(name: str, begin: int) -> None:
    """Another round follows: a client that stored a memory with the lost reply goes on from the one before."""

    def cut(number: int, outcome: Reply | Lost) -> Reply | Lost:
        return (
            Lost(outcome.client, "the cable was cut")
            if (number, outcome.client.id) == (0, 1)
            else outcome
        )

    losing, state = going_on(name, begin, cut)
    never_asked, _ = going_on(name, begin)
    without = never_asked.play(
        1, state, cohort=lambda _: [c for c in never_asked.clients() if c.id != 1]
    )
    assert_same_state(losing.play(2, state), never_asked.play(1, without))
    assert [(row.round, row.client, row.lost) for row in losing.rows if row.lost] == [
        (begin, 1, "the cable was cut")
    ]
    assert losing.rows[1].down == len(losing.engine.talks[0][1][0])
    for client, answer in losing.answers(1).items():
        theirs = never_asked.answers(1)[client]
        assert_same(answer.payload, theirs.payload)
        assert answer.memory == theirs.memory
        assert losing.memories.get(client, answer.memory) == never_asked.memories.get(
            client, answer.memory
        )


def test_clients_of_another_configuration_refuse_and_the_round_is_silent() -> None:
    playing = federation(small("lora"))
    stranger = replace(playing.worker, config=b"\x01" * 16)
    playing.engine.engine = LocalEngine(stranger)
    after = playing.play(1)
    assert_same_state(after, replace(playing.start, round=1))
    for row in playing.rows:
        assert row.lost is not None
        assert CONFIG.hex() in row.lost
        assert stranger.config.hex() in row.lost
