"""What clients learn shows in the merge, whoever answers first; who does not answer changes nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedpeft.methods import METHODS
from fedpeft.types import Client, Lost, Reply, State
from fedpeft.wire import decode
from tests.tiny import CONFIG, HEAD, Federation, federation, same, same_state, small, weighted

EXCHANGING = [name for name in METHODS if name != "local_only"]
SOFTMAX_BLIND = "key.bias"
"""A bias of all keys shifts a row of attention scores by a constant, so its gradient is 0 but for rounding."""


def live(before: State, name: str, tensor: Tensor) -> Tensor:
    """Return the part of a shared tensor that was sent when ``before`` was the state: FedARA's dead ranks are not."""
    module, _, part = name.partition(":")
    alive = before.server.get(f"{module}:alive")
    if alive is None:
        return tensor
    return tensor[:, alive] if part == "B" else tensor[alive]


def asked(federation: Federation, exchange: int, client: int) -> dict[str, Tensor]:
    """Return what a client was sent, without the fields of the request."""
    fields = decode(federation.engine.talks[exchange][client][0])
    return {name: tensor for name, tensor in fields.items() if not name.startswith("@")}


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("name", EXCHANGING)
def test_every_client_moves_every_tensor_of_the_adapter(name: str, begin: int) -> None:
    playing = federation(small(name))
    playing.play(begin + 1)
    for client, answer in playing.answers(begin).items():
        down = asked(playing, begin, client)
        moving = [part for part in answer.payload if part in down and not part.endswith(SOFTMAX_BLIND)]
        assert any(part not in HEAD for part in moving)
        for part in moving:
            assert not torch.equal(answer.payload[part], down[part]), f"client {client} did not move {part}"


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("name", EXCHANGING)
def test_the_merge_is_the_weighted_mean_of_all_replies(name: str, begin: int) -> None:
    method = small(name)
    playing = federation(method)
    before = playing.play(begin)
    after = playing.play(1, before)
    answers = list(playing.answers(begin).values())
    uniform = getattr(method, "weighting") == "uniform"  # noqa: B009
    weights = [1.0 if uniform else float(answer.examples) for answer in answers]
    assert sorted(answer.examples for answer in answers) == [6, 9, 11]
    expected = weighted([answer.payload for answer in answers], weights)
    expected.pop("votes", None)
    assert any(part not in HEAD for part in expected)
    for part, value in expected.items():
        merged = live(before, part, after.shared[part])
        torch.testing.assert_close(merged.double(), value, rtol=1e-6, atol=1e-7, msg=part)
        if part.endswith(SOFTMAX_BLIND):
            continue
        for left_out in range(len(answers)):
            rest = [k for k in range(len(answers)) if k != left_out]
            without = weighted([{part: answers[k].payload[part]} for k in rest], [weights[k] for k in rest])[part]
            assert not torch.allclose(merged.double(), without, rtol=1e-6, atol=1e-7), f"reply {left_out} is not in {part}"


def test_local_only_shares_nothing_and_each_client_keeps_what_it_learnt() -> None:
    playing = federation(small("local_only"))
    start = playing.start
    after = playing.play(2)
    assert same(after.shared, start.shared)
    assert after.memories == {0: 1, 1: 1, 2: 1}
    for exchange in (0, 1):
        assert all(answer.payload == {} for answer in playing.answers(exchange).values())
    own = [decode(playing.memories.get(client, 1)) for client in (0, 1, 2)]
    for part, value in start.shared.items():
        for k, mine in enumerate(own):
            assert not torch.equal(mine[part], value)
            assert not torch.equal(mine[part], own[k - 1][part])
    assert asked(playing, 1, 0) == {}, "the start is sent once"


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_replies_does_not_matter(name: str) -> None:
    forwards, backwards = federation(small(name)), federation(small(name), backwards=True)
    assert same_state(forwards.play(3), backwards.play(3))
    ours, theirs = ([replace(row, seconds=0.0, peak_memory=0) for row in f.rows] for f in (forwards, backwards))
    assert ours == theirs


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_silent_round_changes_no_tensor_and_counts(name: str, begin: int) -> None:
    playing = federation(small(name), lambda number, outcome: outcome if number < begin else Lost(outcome.client, "silence"))
    before = playing.play(begin)
    after = playing.play(1, before)
    assert same_state(after, replace(before, round=begin + 1))
    assert [row.lost for row in playing.rows[3 * begin :]] == ["silence"] * 3


@pytest.mark.parametrize("name", METHODS)
def test_a_round_with_too_few_replies_is_silent(name: str) -> None:
    def change(number: int, outcome: Reply | Lost) -> Reply | Lost:
        return Lost(outcome.client, "silence") if number == 1 and outcome.client.id == 2 else outcome

    playing = federation(small(name, rounds=8) if name == "slora" else small(name), change)
    before = playing.play(1, min_replies=3)
    after = playing.play(1, before, min_replies=3)
    assert same_state(after, replace(before, round=2))
    reasons = [row.lost for row in playing.rows[3:]]
    assert reasons == ["only 2 usable replies, 3 needed"] * 2 + ["silence"]
    assert same_state(playing.play(1, after, min_replies=2), federation(small(name, rounds=8) if name == "slora" else small(name)).play(1, after))


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_lost_reply_is_as_though_the_client_had_not_been_asked(name: str, when: int) -> None:
    """Two more rounds follow: a client that stored a memory with the lost reply goes on from the one before."""

    def cut(number: int, outcome: Reply | Lost) -> Reply | Lost:
        return Lost(outcome.client, "the cable was cut") if (number, outcome.client.id) == (when, 1) else outcome

    losing, never_asked = federation(small(name), cut), federation(small(name))

    def others(number: int) -> list[Client]:
        return [client for client in never_asked.clients() if (number, client.id) != (when, 1)]

    assert same_state(losing.play(when + 2), never_asked.play(when + 2, cohort=others))
    lost = [row for row in losing.rows if row.lost]
    assert [(row.round, row.client, row.lost) for row in lost] == [(when, 1, "the cable was cut")]
    assert lost[0].down == len(losing.engine.talks[when][1][0])
    for client in (0, 1, 2):
        ours, theirs = (f.answers(when + 1)[client] for f in (losing, never_asked))
        assert same(ours.payload, theirs.payload)
        if ours.memory >= 0:
            assert losing.memories.get(client, ours.memory) == never_asked.memories.get(client, theirs.memory)


def test_clients_of_another_configuration_refuse_and_the_round_is_silent() -> None:
    playing = federation(small("lora"))
    stranger = replace(playing.worker, config=b"\x01" * 16)
    playing.engine.engine = replace(playing.engine.engine, worker=stranger)  # type: ignore[type-var]
    after = playing.play(1)
    assert same_state(after, replace(playing.start, round=1))
    for row in playing.rows:
        assert row.lost is not None
        assert CONFIG.hex() in row.lost
        assert stranger.config.hex() in row.lost
