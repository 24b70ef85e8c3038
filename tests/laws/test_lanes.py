"""Several passes at once: the same results in the same order, every row once, no lane left waiting for long."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.lanes import by_length, lanes


def _threads(_: int) -> int:
    return torch.get_num_threads()


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
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(_threads(0)))
        thread.start()
        thread.join()
        assert later == [4]
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_lane_is_raised() -> None:
    with pytest.raises(ZeroDivisionError), lanes(2) as at_once:
        list(at_once(lambda number: 1 // number, [1, 0, 1]))


@given(lengths=st.lists(st.integers(1, 50), max_size=60), tokens=st.integers(1, 200), count=st.integers(1, 4))
def test_rows_are_dealt_once_in_even_runs_by_length(lengths: list[int], tokens: int, count: int) -> None:
    runs = by_length(lengths, tokens, count)
    dealt = [row for run in runs for row in run]
    assert sorted(dealt) == list(range(len(lengths)))
    assert [lengths[row] for row in dealt] == sorted(lengths)
    due = count * max(1, round(sum(lengths) / tokens / count))
    assert len(runs) <= due
    for run in runs:
        own = [lengths[row] for row in run]
        assert sum(own) <= sum(lengths) / due + 2 * max(own)
