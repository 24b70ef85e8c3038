"""What the server sees of a round of secure aggregation: bytes that are as good as random, and one sum."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray

from fedpeft.secagg import shamir
from fedpeft.secagg.client import pair_mask_key
from fedpeft.secagg.fixed_point import FixedPoint
from fedpeft.secagg.keys import private_key, public_bytes
from fedpeft.secagg.masks import Words, add_stream
from fedpeft.secagg.summands import as_bytes, joined, weighted
from fedpeft.types import Lost, Reply, State
from fedpeft.wire.messages import Response
from fedpeft.wrappers import SecAgg
from fedpeft.wrappers.secagg import MASK, SHARE_KEYS, TRAIN, UNMASK
from tests.tiny import Tapped, federation, small

LEVEL = 4.75
"""Standard deviations: a test of what is truly random fails once in a million times."""
SIZES = dict.fromkeys(range(10), 6)
BITS: Literal[40] = 40


def chi_square(values: ArrayLike, cells: int) -> float:
    """Return how far the counts of ``values`` are from equal ones, in standard deviations of a normal variable.

    Wilson and Hilferty: the cube root of chi-square over its degrees of freedom k is normal, with mean 1 - 2 / 9k
    and variance 2 / 9k.
    """
    counts = np.bincount(np.asarray(values), minlength=cells)
    expected = counts.sum() / cells
    statistic = float(((counts - expected) ** 2).sum()) / expected
    k = cells - 1
    return (math.cbrt(statistic / k) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


@dataclass(frozen=True)
class Played:
    """What crossed the engine, what was answered in each exchange, and the state in the end."""

    engine: Tapped
    answers: Callable[[int], dict[int, Response]]
    last: State


def played(lost: Sequence[int] = (), rounds: int = 1, during: int = MASK) -> Played:
    """Play rounds in which clients are lost, by default once they have shared their keys."""

    def change(exchange: int, outcome: Reply | Lost) -> Reply | Lost:
        if exchange == during and outcome.client.id in lost:
            return Lost(outcome.client, "too late", outcome.blob)
        return outcome

    method = SecAgg(bits=BITS).around(small("lora"), "0.secagg")
    playing = federation(method, change, sizes=SIZES)
    last = playing.play(rounds)
    return Played(playing.engine, playing.answers, last)


def masked(playing: Played) -> dict[int, NDArray[np.uint8]]:
    """Return what every client sent under masks, byte by byte, also what came too late."""
    found = {}
    for client, (_, reply) in playing.engine.talks[MASK].items():
        found[client] = Response.decode(reply).payload["secagg.masked"].numpy()
    return found


def plain_numbers() -> dict[int, Words]:
    """Return what the clients of ``played`` would have sent without any masks: training is the same."""
    plain = federation(small("lora"), sizes=SIZES)
    plain.play(1)
    form = FixedPoint.fitting(BITS, len(SIZES), 16.0 * 65536)
    return {
        client: form.encode(weighted(joined(response.payload), response.measured.examples))
        for client, response in plain.answers(0).items()
    }


@pytest.mark.parametrize(
    ("lost", "during"),
    [((), MASK), ((1, 4, 7), SHARE_KEYS), ((1, 4, 7), MASK)],
    ids=["nobody is lost", "30 % share no keys", "30 % come too late"],
)
def test_masked_bytes_are_as_often_there_as_each_other(lost: tuple[int, ...], during: int) -> None:
    """Each of the 5 bytes of a number by itself, for every client, and all together; plain numbers fail at once.

    Also where clients are lost; the server may see what comes too late, so this is counted, too.
    """
    size = BITS // 8
    playing = played(lost, during=during)
    stayed = SIZES.keys() - set(lost)
    assert playing.engine.talks[MASK].keys() == (stayed if during < MASK else SIZES.keys())
    assert playing.engine.talks[UNMASK].keys() == stayed
    pieces = masked(playing)
    together = np.concatenate(list(pieces.values()))
    assert abs(chi_square(together, 256)) < LEVEL
    for byte in range(size):
        assert abs(chi_square(together[byte::size], 256)) < LEVEL
    for piece in pieces.values():
        assert abs(chi_square(piece, 256)) < LEVEL
    form = FixedPoint(BITS, 14)
    unmasked = np.concatenate([form.pack(words) for words in plain_numbers().values()])
    assert chi_square(unmasked, 256) > 100


def test_masked_numbers_of_two_clients_have_nothing_in_common() -> None:
    """Nor has what one of them sends in two runs: differences are as good as random, too."""
    first, second = masked(played()), masked(played())
    for one, other in ((first[0], first[1]), (first[0], second[0]), (first[4], first[9])):
        assert not np.array_equal(one, other)
        assert abs(chi_square(one - other, 256)) < LEVEL
        assert abs(chi_square(one ^ other, 256)) < LEVEL


def test_keys_and_boxes_differ_from_round_to_round() -> None:
    playing = played(rounds=2)
    for exchange, name in (
        (TRAIN, "secagg.keys"),
        (SHARE_KEYS, "secagg.boxes"),
        (MASK, "secagg.masked"),
    ):
        before, after = playing.answers(exchange), playing.answers(exchange + 4)
        assert not torch.equal(before[3].payload[name], after[3].payload[name])


def shares_told(playing: Played, of: int) -> dict[int, int]:
    """Return the shares of a client's secret that the server was told, by point."""
    found = {}
    for client, response in playing.answers(UNMASK).items():
        found[client + 1] = int.from_bytes(as_bytes(response.payload["secagg.shares"][of]))
    return found


def test_a_client_that_is_said_to_be_lost_stays_hidden() -> None:
    """The server says that client 4 was lost, though its numbers are there: it learns the pair masks, not the own one.

    So it can take all pair masks off, and what is left is still as good as random.
    """
    playing = played(lost=[4])
    secret = shamir.combine(dict(list(shares_told(playing, 4).items())[:6])).to_bytes(32)
    keys = {
        client: response.payload["secagg.keys"]
        for client, response in playing.answers(TRAIN).items()
    }
    private = private_key(secret)
    assert public_bytes(private) == as_bytes(keys[4][0]), "this is the key that it may learn"
    form = FixedPoint(BITS, 14)
    late = masked(playing)[4]
    words = np.zeros(len(late) // form.size, dtype=np.uint64)
    form.add_packed(words, late)
    for other in range(10):
        if other != 4:
            key = pair_mask_key(private, as_bytes(keys[other][0]))
            add_stream(words, key, negative=other > 4)
    left = form.pack(words)
    assert abs(chi_square(left, 256)) < LEVEL
    difference = form.pack(words - plain_numbers()[4])
    assert abs(chi_square(difference, 256)) < LEVEL


def test_the_sum_without_a_client_that_lies_about_being_lost_is_right() -> None:
    """Its numbers do not arrive, though it goes on living: the server takes its pair masks off, and it is asked no more."""
    playing = played(lost=[4])
    assert 4 not in playing.engine.talks[UNMASK]
    plain = plain_numbers()
    due = np.zeros_like(plain[0])
    for client, words in plain.items():
        if client != 4:
            due += words
    form = FixedPoint.fitting(BITS, 10, 16.0 * 65536)
    sums = form.decode(due)
    assert sums[-1] == 9 * 6, "the weights of nine clients"
    got = torch.cat([tensor.flatten() for _, tensor in sorted(playing.last.shared.items())])
    assert torch.equal(got, torch.from_numpy(sums[:-1] / sums[-1]).float())


def test_fewer_clients_than_the_threshold_learn_nothing_with_the_server() -> None:
    """5 shares of the seed of client 2 fit every seed that there is: some sixth share gives each of them."""
    told = list(shares_told(played(), 2).items())
    five, (sixth, _) = told[:5], told[5]
    weights = shamir.weights_at_zero([point for point, _ in told[:6]])
    so_far = sum(weight * share for weight, (_, share) in zip(weights, five, strict=False))
    for seed in (0, 1, 2**200 + 17, 2**256 - 1):
        share = (seed - so_far) * pow(weights[5], -1, shamir.PRIME) % shamir.PRIME
        assert shamir.combine({**dict(five), sixth: share}) == seed
