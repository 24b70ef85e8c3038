"""The ledger's bytes are the bytes that crossed, and a message's length follows from its shapes alone."""

from pathlib import Path

import pytest

from fedpeft.methods import METHODS
from fedpeft.wire.messages import decode
from tests.contract.reference import ROUNDS, reference, rows
from tests.products import numbers

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"

CONSTANT = [
    *("full", "bitfit", "lora", "ffa_lora", "sparse"),
    *("flexlora", "fedsvd", "raflora", "lora_fair", "ravan", "fedrot_lora", "adalora", "adapters"),
]
"""Methods that say the same things every round; the others' messages change with stages, memories and dying ranks."""


LAYERS, OUT, IN, HEAD = 4, 32, 32, 3 * 32 + 3
"""Adapted layers and their size, and the numbers of the head, in ``tests/tiny.py``."""
K = 3
ADAPTER = 3 * (OUT + IN) * LAYERS
"""Numbers of A and B of rank 3 in all layers."""
HALF = 3 * OUT * LAYERS
"""Those of B alone, or of A alone: the layers are square."""

NUMBERS = {
    "lora": (ADAPTER + HEAD, ADAPTER + HEAD),
    "ffa_lora": (HALF + HEAD, HALF + HEAD),
    "federa": (ADAPTER + HEAD, ADAPTER + HEAD),
    "local_only": (0, 0),
    "rolora": (ADAPTER + HEAD, HALF + HEAD),
    "fedsa_lora": (HALF, HALF),
    "flexlora": (ADAPTER + HEAD, ADAPTER + HEAD),
    "fedsvd": (ADAPTER + HEAD, HALF + HEAD),
    # The residual of the round before has the ranks of all clients.
    "fedex_lora": (ADAPTER + HEAD + K * ADAPTER, ADAPTER + HEAD),
    "flora": (HEAD + K * ADAPTER, ADAPTER + HEAD),
    # Going up, the rank that is left; nothing is pruned here.
    "hetlora": (ADAPTER + HEAD, ADAPTER + HEAD + 1),
    "raflora": (ADAPTER + HEAD, ADAPTER + HEAD),
    "lora_fair": (ADAPTER + HEAD, ADAPTER + HEAD),
    "fed_sb": (3 * 3 * LAYERS + HEAD, 3 * 3 * LAYERS + HEAD),
    # Two heads of 3 x 3, and going down their numbers.
    "ravan": ((2 * 3 * 3 + 2) * LAYERS + HEAD, 2 * 3 * 3 * LAYERS + HEAD),
    "fedrot_lora": (ADAPTER + HEAD, ADAPTER + HEAD),
    "adalora": (4 * (OUT + IN + 1) * LAYERS + HEAD, 4 * (OUT + IN + 2) * LAYERS + HEAD),
    # Two adapters of width 3 in each of two blocks, behind layers of width 32.
    "adapters": ((2 * 3 * OUT + 3 + OUT) * 4 + HEAD, (2 * 3 * OUT + 3 + OUT) * 4 + HEAD),
}
"""How many numbers go down and up in the third round, worked out from ranks and widths."""

UNCOUNTED = {"full", "bitfit", "sparse", "slora", "fedara", "florist", "peft"}
"""Methods of which they do not follow from these: whole models, masks, votes, energies."""


def test_every_method_has_its_numbers() -> None:
    lacking = ", ".join(METHODS.keys() - NUMBERS.keys() - UNCOUNTED)
    assert not lacking, f"work out NUMBERS in tests/contract/test_bytes.py for {lacking}"


def test_every_method_has_its_row_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("\n## ")[0].splitlines()
    lacking = [name for name in METHODS if not any(row.startswith(f"| `{name}`") for row in table)]
    assert not lacking, f"write a row of the first table in docs/methods.md for {lacking}"


@pytest.mark.parametrize("name", NUMBERS)
def test_what_travels_is_what_ranks_and_widths_say(name: str) -> None:
    """The bytes of a message follow from these by the test at the end of this file."""
    down, up = NUMBERS[name]
    for request, reply in reference(name).playing.engine.talks[2].values():
        assert (numbers(decode(request)), numbers(decode(reply))) == (down, up)


@pytest.mark.parametrize("name", rows())
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
