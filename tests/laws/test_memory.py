"""A client keeps the newest memory and the one it was started from, so a lost reply leaves both sides agreeing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.memory import Forgotten, Memories
from fedpeft.types import NEVER


def test_no_memory_is_empty_and_a_version_that_is_not_there_is_refused() -> None:
    memories = Memories()
    assert memories.get(3, NEVER) == b""
    with pytest.raises(Forgotten, match="client 3 holds no memory of round 0, only of none"):
        memories.get(3, 0)
    memories.put(3, 2, b"two")
    with pytest.raises(Forgotten, match=r"round 0, only of \[2\]"):
        memories.get(3, 0)
    assert memories.get(3, NEVER) == b""
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
    memories, server, made_from = Memories(), NEVER, b""
    for number, arrives in enumerate(arrivals):
        assert memories.get(1, server) == made_from
        blob = made_from + bytes([number])
        memories.put(1, number, blob, server)
        if arrives:
            server, made_from = number, blob
    assert memories.get(1, server) == made_from
