"""Rows in buckets: every row once, as cheap as can be, shapes that come again, no lane left waiting for long."""

from dataclasses import replace
from itertools import pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.training.bucketing import Buckets

BUCKETS = st.builds(
    Buckets,
    max_tokens=st.integers(1, 200),
    overhead_tokens=st.integers(0, 100),
    pad_to_multiple_of=st.integers(1, 4),
)


def size(lengths: list[int], buckets: Buckets) -> int:
    """Return the tokens of a bucket, each text padded to the longest, and that to the pad_to_multiple_of."""
    return (
        len(lengths)
        * buckets.pad_to_multiple_of
        * ((max(lengths) + buckets.pad_to_multiple_of - 1) // buckets.pad_to_multiple_of)
    )


def cost(found: list[list[int]], buckets: Buckets) -> int:
    """Return what buckets with such lengths cost together."""
    return sum(size(lengths, buckets) + buckets.overhead_tokens for lengths in found)


@given(lengths=st.lists(st.integers(1, 50), max_size=9), buckets=BUCKETS)
@settings(deadline=None, max_examples=300)
def test_rows_go_once_into_the_cheapest_buckets_by_length(
    lengths: list[int], buckets: Buckets
) -> None:
    rows = buckets.cheapest(lengths)
    assert sorted(row for bucket in rows for row in bucket) == list(range(len(lengths)))
    found = [[lengths[row] for row in bucket] for bucket in rows]
    sizes = [size(bucket, buckets) for bucket in found]
    assert sizes == sorted(sizes, reverse=True)

    def allowed(bucket: list[int]) -> bool:
        return size(bucket, buckets) <= buckets.max_tokens or len(bucket) == 1

    assert all(map(allowed, found))
    order = sorted(lengths)
    short = sum(
        size([length] * buckets.pad_to_multiple_of, buckets) <= buckets.max_tokens
        for length in order
    )
    every = []
    for cuts in product([False, True], repeat=max(0, len(order) - 1)):
        edges = [0, *(number for number, cut in enumerate(cuts, start=1) if cut), len(order)]
        if any((short - edge) % buckets.pad_to_multiple_of for edge in edges[1:] if edge < short):
            continue
        own = [order[a:b] for a, b in pairwise(edges) if b > a]
        if all(map(allowed, own)):
            every.append(cost(own, buckets))
    assert cost(found, buckets) == min(every)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), buckets=BUCKETS)
@settings(deadline=None)
def test_shapes_come_in_grains(lengths: list[int], buckets: Buckets) -> None:
    assert all(
        length <= buckets.padded(length) < length + buckets.pad_to_multiple_of for length in lengths
    )
    assert all(buckets.padded(length) % buckets.pad_to_multiple_of == 0 for length in lengths)
    found = sorted(
        ([lengths[row] for row in bucket] for bucket in buckets.cheapest(lengths)),
        key=lambda bucket: (
            max(bucket),
            min(bucket),
            len(bucket) % buckets.pad_to_multiple_of == 0,
        ),
    )
    assert all(min(b) >= max(a) for a, b in pairwise(found))
    fit = [
        len(bucket)
        for bucket in found
        if buckets.pad_to_multiple_of * buckets.padded(max(bucket)) <= buckets.max_tokens
    ]
    assert all(count % buckets.pad_to_multiple_of == 0 for count in fit[1:])


def longest(lengths: list[int], rows: list[list[int]], buckets: Buckets, lanes: int) -> int:
    """Return when the last of ``lanes`` is done with buckets of ``rows``, each begun by the lane that is free first."""
    busy = [0] * lanes
    for bucket in rows:
        busy.sort()
        busy[0] += size([lengths[row] for row in bucket], buckets) + buckets.overhead_tokens
    return max(busy)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    buckets=BUCKETS,
    lanes=st.integers(1, 4),
)
@settings(deadline=None)
def test_lanes_are_done_no_later_than_with_the_cheapest_buckets(
    lengths: list[int], buckets: Buckets, lanes: int
) -> None:
    rows, cheapest = buckets.dealt(lengths, lanes), buckets.cheapest(lengths)
    assert sorted(row for bucket in rows for row in bucket) == list(range(len(lengths)))
    assert all(
        size([lengths[row] for row in bucket], buckets) <= buckets.max_tokens or len(bucket) == 1
        for bucket in rows
    )
    assert longest(lengths, rows, buckets, lanes) <= longest(lengths, cheapest, buckets, lanes)
    if lanes == 1:
        assert rows == cheapest


def test_lanes_are_done_sooner_where_smaller_buckets_are_dealt_more_evenly() -> None:
    buckets = Buckets(80, 1)
    assert len(buckets.cheapest([10] * 24)) == 3
    assert [len(bucket) for bucket in buckets.dealt([10] * 24, 2)] == [6, 6, 6, 6]


def test_few_rows_go_together_at_any_grain() -> None:
    buckets = Buckets(100, 100)
    for pad_to_multiple_of in (1, 4, 8):
        assert replace(buckets, pad_to_multiple_of=pad_to_multiple_of).cheapest([3, 9, 5]) == [
            [0, 2, 1]
        ]
