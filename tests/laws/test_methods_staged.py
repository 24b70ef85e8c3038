"""Two methods in a row: the second starts as though the first had never stored a memory."""

import torch

from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.local_only import LocalOnly
from fedpeft.types import State
from fedpeft.wire.messages import Response, decode
from fedpeft.wrappers.staged import Staged
from tests.tiny import SEED, TARGETS, assert_same, base_of, bert, federation

FEDERA = FeDeRA(TARGETS, 2)


def crossing(state: State) -> State:
    """Start FeDeRA afresh where the first stage ends."""
    begun = FEDERA.init(base_of(bert()), SEED)
    return State(state.round, begun.shared, begun.server, state.memories)


def test_a_memory_belongs_to_the_stage_that_wrote_it() -> None:
    """Clients that keep their models in stage 1 are sent FeDeRA's anchor in stage 2, once, as new ones are."""
    playing = federation(Staged(LocalOnly(TARGETS, 2), FEDERA, crossing, 2))
    last = playing.play(4)
    assert not [row.lost for row in playing.rows if row.lost]
    sent = [
        any(name.endswith(":A0") for name in decode(talk[0][0])) for talk in playing.engine.talks
    ]
    assert sent == [False, False, True, False]
    assert last.memories == {0: 2, 1: 2, 2: 2}
    alone = federation(FEDERA)
    start = crossing(State(2, {}))
    assert_same(alone.play(2, start).shared, last.shared)


def test_the_first_stages_memory_is_seen_by_the_first_stage() -> None:
    staged = federation(Staged(LocalOnly(TARGETS, 2), FEDERA, crossing, 3))
    plain = federation(LocalOnly(TARGETS, 2))
    staged.play(3)
    plain.play(3)
    for client in (0, 1, 2):
        ours, theirs = (decode(f.memories.get(client, 2)) for f in (staged, plain))
        assert int(ours.pop("stage")) == 0
        assert_same(ours, theirs)


def test_a_reply_is_that_of_the_stage_under_way() -> None:
    playing = federation(Staged(LocalOnly(TARGETS, 2), FEDERA, crossing, 1))
    playing.play(2)
    first, second = (
        Response.decode(playing.engine.talks[exchange][1][1]).payload for exchange in (0, 1)
    )
    assert first == {}
    assert any(name.endswith(":A") for name in second)
    assert all(torch.isfinite(tensor).all() for tensor in second.values())
