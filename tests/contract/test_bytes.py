"""The ledger's bytes are the bytes that crossed, and a message's length follows from its shapes alone."""

import pytest

from fedpeft.methods import METHODS
from fedpeft.wire.messages import decode
from tests.contract.reference import ROUNDS, reference

CONSTANT = ["full", "bitfit", "lora", "ffa_lora", "sparse"]
"""Methods that say the same things every round; the others' messages change with stages, memories and dying ranks."""


@pytest.mark.parametrize("name", METHODS)
def test_the_ledger_has_the_bytes_that_crossed(name: str) -> None:
    playing = reference(name).playing
    crossed = [(len(down), len(up)) for talk in playing.engine.talks for down, up in talk.values()]
    assert [(row.down, row.up) for row in playing.rows] == crossed
    assert [(row.round, row.client) for row in playing.rows] == [
        (n, k) for n in range(ROUNDS) for k in (0, 1, 2)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_equal_shapes_give_equal_lengths_whatever_the_values(name: str) -> None:
    lengths: dict[object, set[int]] = {}
    for talk in reference(name).playing.engine.talks:
        for blob in (blob for pair in talk.values() for blob in pair):
            form = tuple(
                (part, tensor.dtype, tensor.shape) for part, tensor in sorted(decode(blob).items())
            )
            lengths.setdefault(form, set()).add(len(blob))
    assert all(len(found) == 1 for found in lengths.values())
    assert len(lengths) < 2 * ROUNDS * 3, "some specs came more than once"


@pytest.mark.parametrize("name", CONSTANT)
def test_every_round_costs_the_same_bytes(name: str) -> None:
    assert len({(row.down, row.up) for row in reference(name).playing.rows}) == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_of_a_message_are_those_of_its_tensors_and_a_header_of_names(name: str) -> None:
    """Nothing travels beside the tensors: no positions of a mask, no copy of the base."""
    for talk in reference(name).playing.engine.talks:
        for blob in (blob for pair in talk.values() for blob in pair):
            tensors = decode(blob)
            content = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            names = sum(len(part) for part in tensors)
            assert content <= len(blob) <= content + names + 80 * (len(tensors) + 1)
