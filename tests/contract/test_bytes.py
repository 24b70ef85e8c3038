"""The ledger's bytes are the bytes that crossed, and a message's length follows from its shapes alone."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from fedpeft.methods import METHODS
from fedpeft.wire.messages import decode
from fedpeft.wrappers import (
    DP,
    DPSGD,
    WRAPPERS,
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedProx,
    FedYogi,
    Krum,
    Median,
    NormClip,
    Scaffold,
    SecAgg,
    TrimmedMean,
    Wrapper,
)
from tests.contract.reference import ROUNDS, exchanges, reference, rows
from tests.products import numbers
from tests.tiny import NAMES, SGD, SIZES, bert, federation, small

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

VALUES = round(0.2 * OUT * IN) * LAYERS
"""A fifth of the numbers of every layer."""
PARAMETERS = dict(bert().named_parameters())

NUMBERS = {
    "full": 2 * (sum(parameter.numel() for parameter in PARAMETERS.values()),),
    "bitfit": 2 * (sum(p.numel() for n, p in PARAMETERS.items() if n.endswith("bias")) + 3 * 32,),
    "sparse": (VALUES + HEAD, VALUES + HEAD),
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
    # Going up also the rank that is left.
    "hetlora": (ADAPTER + HEAD, ADAPTER + HEAD + 1),
    "raflora": (ADAPTER + HEAD, ADAPTER + HEAD),
    "lora_fair": (ADAPTER + HEAD, ADAPTER + HEAD),
    "fed_sb": (3 * 3 * LAYERS + HEAD, 3 * 3 * LAYERS + HEAD),
    # Two heads of 3 x 3, and going down their numbers.
    "ravan": ((2 * 3 * 3 + 2) * LAYERS + HEAD, 2 * 3 * 3 * LAYERS + HEAD),
    "fedrot_lora": (ADAPTER + HEAD, ADAPTER + HEAD),
    "adalora": (4 * (OUT + IN + 1) * LAYERS + HEAD, 4 * (OUT + IN + 2) * LAYERS + HEAD),
    # The first stage is over by then.
    "slora": (ADAPTER + HEAD, ADAPTER + HEAD),
    "slora_full": (ADAPTER + HEAD, ADAPTER + HEAD),
    # A choice of 2 of 4 ranks, as bits in 2 bytes, and the rows or columns of what was chosen.
    "lora_a2": (4 * (OUT + IN) * LAYERS + HEAD, 2 + 2 * OUT * LAYERS + HEAD),
    # IA3 scales keys, values, and what goes into two dense layers, in each of two blocks.
    "peft": 2 * (2 * (32 + 32 + 32 + 64) + HEAD,),
    # Two adapters of width 3 in each of two blocks, behind layers of width 32.
    "adapters": ((2 * 3 * OUT + 3 + OUT) * 4 + HEAD, (2 * 3 * OUT + 3 + OUT) * 4 + HEAD),
}
"""How many numbers go down and up in the third round, in all its exchanges, worked out from ranks and widths."""

BY_RANKS = {"fedara", "florist"}
"""Methods of which they follow from the ranks that are alive, and from those that hold the energy."""


def test_every_method_has_its_numbers() -> None:
    lacking = ", ".join(METHODS.keys() - NUMBERS.keys() - BY_RANKS)
    assert not lacking, f"work out NUMBERS in tests/contract/test_bytes.py for {lacking}"


def test_every_method_has_its_row_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("\n## ")[0].splitlines()
    lacking = [name for name in METHODS if not any(row.startswith(f"| `{name}`") for row in table)]
    assert not lacking, f"write a row of the first table in docs/methods.md for {lacking}"


@pytest.mark.parametrize("name", NUMBERS)
def test_what_travels_is_what_ranks_and_widths_say(name: str) -> None:
    """The bytes of a message follow from these by the test at the end of this file."""
    talks = [reference(name).playing.engine.talks[exchange] for exchange in exchanges(name, 2)]
    for client in SIZES:
        down = sum(numbers(decode(talk[client][0])) for talk in talks)
        up = sum(numbers(decode(talk[client][1])) for talk in talks)
        assert (down, up) == NUMBERS[name]


def ranks(message: Mapping[str, Tensor], factor: str) -> int:
    """Return the ranks of all layers together, which are the rows of each ``factor`` in a message."""
    return sum(len(tensor) for name, tensor in message.items() if name.partition(":")[2] == factor)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_what_travels_with_fedara_is_what_its_living_ranks_say(number: int) -> None:
    """Each rank has a column of B, a row of A and a number of E; a vote is a bit."""
    talks = reference("fedara").playing.engine.talks[number].values()
    for down, up in (map(decode, talk) for talk in talks):
        alive = ranks(down, "A")
        triple = alive * (OUT + IN + 1)
        assert numbers(down) == triple + HEAD + 1  # the bits that votes are asked for, as a number
        assert numbers(up) == triple + HEAD + math.ceil(alive / 8)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_what_travels_with_florist_is_what_its_kept_ranks_say(number: int) -> None:
    for down, up in (
        map(decode, talk) for talk in reference("florist").playing.engine.talks[number].values()
    ):
        kept = ranks(down, "A+")
        assert numbers(down) == kept * (OUT + IN) + HEAD
        assert numbers(up) == ADAPTER + HEAD


LORA = ADAPTER + HEAD
BOX, SHARE, KEY = 2 * 33 + 16, 33, 32
"""Bytes of secure aggregation: two shares and a tag, a share of 33 bytes, a key."""
WRAPPED: Mapping[str, tuple[Wrapper, int, int]] = {
    "fedprox": (FedProx(mu=0.1), LORA, LORA),
    "fedavgm": (FedAvgM(momentum=0.5), LORA, LORA),
    "fedadam": (FedAdam(), LORA, LORA),
    "fedyogi": (FedYogi(), LORA, LORA),
    "fedadagrad": (FedAdagrad(), LORA, LORA),
    "norm_clip": (NormClip(norm=0.5), LORA, LORA),
    "median": (Median(), LORA, LORA),
    "trimmed_mean": (TrimmedMean(share=0.4), LORA, LORA),
    "krum": (Krum(malicious=0, keep=2), LORA, LORA),
    "bulyan": (Bulyan(malicious=0), LORA, LORA),
    "dpsgd": (DPSGD(), LORA, LORA),
    "dp": (DP(), LORA + 1, LORA),  # the bound goes down
    "dp, adaptive": (DP(quantile=0.5), LORA + 1, LORA + 1),  # and up, whether it was kept
    # c goes down, and what has changed of c_i up.
    "scaffold": (Scaffold(), 2 * LORA, 2 * LORA),
    "secagg": (
        SecAgg(),
        # Who takes part and two keys of each; who has shared; who has sent, and boxes.
        LORA + (K + 2 * KEY * K) + K + (K + BOX * K),
        # Two keys; boxes and a seal; masked numbers of 5 bytes, the weight one of them; shares.
        2 * KEY + (BOX * K + KEY) + 5 * (LORA + 1) + SHARE * K,
    ),
}
"""Wrappers around LoRA, and how many numbers go down and up in the second round, in all its exchanges.

Those that compress have closed formulas in ``tests/laws/test_wrappers_compressed.py``."""


def test_every_wrapper_has_its_numbers() -> None:
    assert {name.partition(",")[0] for name in WRAPPED} == WRAPPERS.keys() - {"quantise", "top_k"}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_travels_with_a_wrapper_is_a_closed_formula(name: str) -> None:
    wrapper, down, up = WRAPPED[name]
    training = replace(SGD, steps=2, clip=None) if name == "dpsgd" else SGD
    playing = federation(wrapper.around(small("lora"), f"0.{name}"), training=training)
    playing.play(2)
    talks = playing.engine.talks[len(playing.engine.talks) // 2 :]
    for client in SIZES:
        assert sum(numbers(decode(talk[client][0])) for talk in talks) == down
        assert sum(numbers(decode(talk[client][1])) for talk in talks) == up


@pytest.mark.parametrize("number", [0, 1])
def test_full_fine_tuning_as_a_first_stage_sends_every_parameter(number: int) -> None:
    parameters = sum(parameter.numel() for parameter in bert().parameters())
    for request, reply in reference("slora_full").playing.engine.talks[number].values():
        assert numbers(decode(request)) == numbers(decode(reply)) == parameters


@pytest.mark.parametrize("name", rows())
def test_the_ledger_has_the_bytes_that_crossed(name: str) -> None:
    playing = reference(name).playing
    crossed = [(len(down), len(up)) for talk in playing.engine.talks for down, up in talk.values()]
    assert [(row.down, row.up) for row in playing.rows] == crossed
    due = [(n, k) for n in range(ROUNDS) for _ in exchanges(name, n) for k in (0, 1, 2)]
    assert [(row.round, row.client) for row in playing.rows] == due


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_a_message_are_those_of_its_tensors_and_a_header_of_names(name: str) -> None:
    """Nothing travels beside the tensors: no positions of a mask, no copy of the base."""
    for talk in reference(name).playing.engine.talks:
        for blob in (blob for pair in talk.values() for blob in pair):
            tensors = decode(blob)
            content = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            names = sum(len(part) for part in tensors)
            assert content <= len(blob) <= content + names + 80 * (len(tensors) + 1)
