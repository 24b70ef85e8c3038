"""A client keeps the newest memory and the one it was started from, so a lost reply leaves both sides agreeing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import Forgotten
from fedpeft.federation.memory import Memories
from fedpeft.types import NO_MEMORY, Client
from fedpeft.wire.messages import decode, encode
from fedpeft.wire.versions import (
    as_told,
    carried,
    joined,
    lasting,
    once,
    own,
    parted,
    slice_of,
    stamp,
    with_slice,
    without,
    written,
    written_by_method,
)


def test_no_memory_is_empty_and_a_version_that_is_not_there_is_refused() -> None:
    memories = Memories()
    assert memories.get(3, NO_MEMORY) == b""
    with pytest.raises(Forgotten, match="client 3 holds no memory of round 0, only of none"):
        memories.get(3, 0)
    memories.put(3, 2, b"two")
    with pytest.raises(Forgotten, match=r"round 0, only of \[2\]"):
        memories.get(3, 0)
    assert memories.get(3, NO_MEMORY) == b""
    assert memories.holds(3, 2)
    assert not memories.holds(3, 0)
    assert not memories.holds(4, 2)


def test_a_new_memory_leaves_the_one_it_was_made_from_and_no_other() -> None:
    memories = Memories()
    memories.put(1, 0, b"zero")
    memories.put(1, 1, b"one", assumed=0)
    memories.put(1, 4, b"four", assumed=0)
    assert [memories.holds(1, version) for version in (0, 1, 4)] == [True, False, True]
    assert (memories.get(1, 0), memories.get(1, 4)) == (b"zero", b"four")


def test_the_same_round_again_replaces_its_memory() -> None:
    memories = Memories()
    memories.put(1, 0, b"zero")
    memories.put(1, 1, b"first try", assumed=0)
    memories.put(1, 1, b"second try", assumed=0)
    assert (memories.get(1, 0), memories.get(1, 1)) == (b"zero", b"second try")


def test_clients_do_not_see_each_others_memories() -> None:
    memories = Memories()
    memories.put(1, 0, b"one's")
    memories.put(2, 0, b"two's")
    memories.put(2, 1, b"two's next", assumed=0)
    assert memories.get(1, 0) == b"one's"


@given(st.lists(st.booleans(), max_size=30))
def test_whichever_replies_are_lost_the_server_and_the_client_agree(arrivals: list[bool]) -> None:
    """The client stores a memory in every round; the server knows of those whose reply arrived."""
    memories, server, made_from = Memories(), NO_MEMORY, b""
    for number, arrives in enumerate(arrivals):
        assert memories.get(1, server) == made_from
        blob = made_from + bytes([number])
        memories.put(1, number, blob, server)
        if arrives:
            server, made_from = number, blob
    assert memories.get(1, server) == made_from


ROUNDS = st.integers(0, 2**24 - 1)


@given(ROUNDS, st.lists(st.tuples(ROUNDS, st.booleans()), max_size=5))
def test_a_version_tells_when_a_memory_was_written_and_when_the_methods_part_was(
    first: int, later: list[tuple[int, bool]]
) -> None:
    version, methods = NO_MEMORY, NO_MEMORY
    for number, news in [(first, False), *later]:
        version = number if news else carried(number, version)
        methods = number if news else methods
        assert (written(version), written_by_method(version)) == (number, methods)
        assert as_told(Client(3, memory=version)) == Client(3, memory=methods)
        assert 0 <= version < 2**63, "it travels as one int64"


def test_a_round_alone_is_a_version_whose_rounds_are_the_same() -> None:
    for version in (NO_MEMORY, 0, 7, 2**24 - 1):
        assert written(version) == written_by_method(version) == version
    assert carried(7, 3) == carried(7, carried(5, 3))
    assert len({carried(7, NO_MEMORY), carried(7, 3), carried(8, 3), 7, 3}) == 5


def test_the_methods_part_is_carried_along_unless_it_is_new() -> None:
    anchor, other, steps = (
        {"anchor": torch.tensor(1.0)},
        {"anchor": torch.tensor(2.0)},
        {"@steps": torch.tensor(4)},
    )
    assert joined({}, anchor, steps) == {**anchor, **steps}
    assert joined(other, anchor, steps) == {**other, **steps}
    assert joined(other, anchor, {}) == other
    assert joined({}, anchor, {}) == {}, "the memory stays as it was"
    assert parted({**anchor, **steps}) == (anchor, steps)


def test_what_is_for_one_exchange_is_news_of_nobody_and_written_with_everything() -> None:
    anchor, other = {"anchor": torch.tensor(1.0)}, {"anchor": torch.tensor(2.0)}
    key, old_key = {"!key": torch.tensor(3)}, {"!key": torch.tensor(4)}
    steps = {"@steps": torch.tensor(4)}
    assert joined(key, {**anchor, **old_key}, {}) == {**anchor, **key}
    assert joined({**other, **key}, {**anchor, **old_key}, steps) == {**other, **key, **steps}
    assert joined({}, {**anchor, **old_key}, steps) == {**anchor, **steps}
    assert joined({}, {**anchor, **old_key}, {}) == {}, "the memory stays as it was"
    assert (lasting({**anchor, **key}), once({**anchor, **key})) == (anchor, key)


def test_what_wrappers_keep_is_no_news_of_the_method_and_outlives_what_others_write() -> None:
    anchor, other = {"anchor": torch.tensor(1.0)}, {"anchor": torch.tensor(2.0)}
    owed, old = (
        {"~0.top_k/w": torch.tensor(3)},
        {"~0.top_k/w": torch.tensor(4), "~0.top_k/v": torch.tensor(5)},
    )
    beside, key = {"~1.scaffold/w": torch.tensor(6)}, {"!key": torch.tensor(7)}
    steps = {"@steps": torch.tensor(8)}
    assert own({**anchor, **owed, **key, **steps}) == anchor
    assert joined(owed, {**anchor, **old, **beside}, {}) == {**anchor, **owed, **beside}
    assert joined(other, {**anchor, **old}, {}) == {**other, **old}
    assert joined({**other, **owed}, {**anchor, **old, **beside}, steps) == {
        **other,
        **owed,
        **beside,
        **steps,
    }
    assert joined(key, {**anchor, **owed}, {}) == {**anchor, **owed, **key}
    assert joined({}, {**anchor, **owed}, steps) == {**anchor, **owed, **steps}
    assert joined({}, {**anchor, **owed}, {}) == {}
    memory = with_slice(anchor, "0.top_k", {"w": torch.tensor(3)})
    assert memory == {**anchor, **owed}
    assert slice_of({**memory, **beside}, "0.top_k") == {"w": torch.tensor(3)}
    assert without({**memory, **beside}, "0.top_k") == {**anchor, **beside}


def test_what_was_for_one_exchange_leaves_older_versions_once_there_is_a_newer_one() -> None:
    anchor, key = {"anchor": torch.tensor(1.0)}, {"!key": torch.tensor(3)}
    memories = Memories()
    for phase in range(3):
        memories.put(1, stamp(5, phase), encode({**anchor, **key}), assumed=stamp(5, phase - 1))
        assert decode(memories.get(1, stamp(5, phase))) == {**anchor, **key}
        if phase:
            assert decode(memories.get(1, stamp(5, phase - 1))) == anchor


def test_a_version_that_is_not_there_is_told_by_its_round() -> None:
    memories = Memories()
    memories.put(1, carried(6, 2), b"")
    with pytest.raises(Forgotten, match=r"client 1 holds no memory of round 5, only of \[6\]"):
        memories.get(1, carried(5, 2))
