"""Several passes at once: the same results in the same order, every row once, no lane left waiting for long."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.lanes import by_length, dealt, lanes


def _threads(_: int) -> int:
    return torch.get_num_threads()


def in_a_new_thread() -> int:
    """Return with how many threads torch computes in a thread that begins now."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_results_come_in_order_however_long_each_takes() -> None:
    first = threading.Event()

    def late(number: int) -> int:
        if number == 0:
            assert first.wait(10)
        else:
            first.set()
        return number * number

    with lanes(2) as at_once:
        assert list(at_once(late, range(5))) == [0, 1, 4, 9, 16]


def test_one_lane_is_the_calling_thread() -> None:
    with lanes(1) as at_once:
        assert set(at_once(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}


def test_lanes_share_torchs_threads_and_leave_them_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with lanes(2) as at_once:
            assert set(at_once(_threads, range(8))) == {2}
        assert torch.get_num_threads() == 4
        with lanes(8) as at_once:
            assert set(at_once(_threads, range(8))) == {1}
        assert in_a_new_thread() == 4
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_lane_is_raised_and_torchs_threads_are_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with pytest.raises(ZeroDivisionError), lanes(2) as at_once:
            list(at_once(lambda number: 1 // number, [1, 0, 1]))
        assert in_a_new_thread() == 4
    finally:
        torch.set_num_threads(before)


PASSES = """
import torch
from fedpeft.lanes import lanes

leaves = [torch.nn.Parameter(torch.ones(4, 8)) for _ in range(50)]
rows = torch.tensor([0, 1, 2])


def play(number):
    return torch.autograd.grad(sum((leaf[:2] if number % 2 else leaf.index_select(0, rows)).sum() for leaf in leaves), leaves)


with lanes(2, leaves) as at_once:
    assert all(float(gradients[0].sum()) == (24, 16)[number % 2] for number, gradients in enumerate(at_once(play, range(2000))))
"""


def test_lanes_that_differentiate_by_the_same_leaves_never_wait_for_one_another_for_good() -> None:
    subprocess.run([sys.executable, "-c", PASSES], check=True, timeout=120)


def _cost(runs: list[list[int]], overhead: int) -> int:
    return sum(len(run) * max(run) + overhead for run in runs)


@given(
    lengths=st.lists(st.integers(1, 50), max_size=9),
    most=st.integers(1, 200),
    overhead=st.integers(0, 100),
)
@settings(deadline=None)
def test_rows_are_dealt_once_in_the_cheapest_runs_by_length(lengths: list[int], most: int, overhead: int) -> None:
    runs = by_length(lengths, most, overhead)
    assert sorted(row for run in runs for row in run) == list(range(len(lengths)))
    found = [[lengths[row] for row in run] for run in runs]
    sizes = [len(run) * max(run) for run in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= most or len(run) == 1 for size, run in zip(sizes, found, strict=True))
    order = sorted(lengths)
    every = []
    for cuts in itertools.product([False, True], repeat=max(0, len(order) - 1)):
        edges = [0, *(number for number, cut in enumerate(cuts, start=1) if cut), len(order)]
        own = [order[a:b] for a, b in itertools.pairwise(edges) if b > a]
        if all(len(run) * max(run) <= most or len(run) == 1 for run in own):
            every.append(_cost(own, overhead))
    assert _cost(found, overhead) == min(every)


def _longest(lengths: list[int], runs: list[list[int]], overhead: int, count: int) -> int:
    """Return when the last of ``count`` lanes is done with ``runs``, each begun by the lane that is free first."""
    lanes = [0] * count
    for run in runs:
        lanes.sort()
        lanes[0] += len(run) * max(lengths[row] for row in run) + overhead
    return max(lanes)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    most=st.integers(1, 400),
    overhead=st.integers(0, 100),
    count=st.integers(1, 4),
)
@settings(deadline=None)
def test_lanes_are_done_no_later_than_with_the_cheapest_runs(lengths: list[int], most: int, overhead: int, count: int) -> None:
    runs, cheapest = dealt(lengths, most, overhead, count), by_length(lengths, most, overhead)
    assert sorted(row for run in runs for row in run) == list(range(len(lengths)))
    assert all(len(run) * max(lengths[row] for row in run) <= most or len(run) == 1 for run in runs)
    assert _longest(lengths, runs, overhead, count) <= _longest(lengths, cheapest, overhead, count)
    if count == 1:
        assert runs == cheapest


def test_lanes_are_done_sooner_where_smaller_runs_are_dealt_more_evenly() -> None:
    lengths = [10] * 24
    assert len(by_length(lengths, 80, 1)) == 3
    assert [len(run) for run in dealt(lengths, 80, 1, 2)] == [6, 6, 6, 6]
