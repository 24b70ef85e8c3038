"""Several passes at once: the same results in the same order."""

import subprocess
import sys
import threading

import pytest
import torch

from fedpeft.training.threads import thread_map


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

    with thread_map(2) as at_once:
        assert list(at_once(late, range(5))) == [0, 1, 4, 9, 16]


def test_one_lane_is_the_calling_thread() -> None:
    with thread_map(1) as at_once:
        assert set(at_once(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}


def test_lanes_share_torchs_threads_and_leave_them_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with thread_map(2) as at_once:
            assert set(at_once(_threads, range(8))) == {2}
        assert torch.get_num_threads() == 4
        with thread_map(8) as at_once:
            assert set(at_once(_threads, range(8))) == {1}
        assert in_a_new_thread() == 4
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_lane_is_raised_and_torchs_threads_are_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with pytest.raises(ZeroDivisionError), thread_map(2) as at_once:
            list(at_once(lambda number: 1 // number, [1, 0, 1]))
        assert in_a_new_thread() == 4
    finally:
        torch.set_num_threads(before)


PASSES = """
import torch
from fedpeft.training.threads import thread_map

leaves = [torch.nn.Parameter(torch.ones(4, 8)) for _ in range(50)]
rows = torch.tensor([0, 1, 2])


def play(number):
    return torch.autograd.grad(sum((leaf[:2] if number % 2 else leaf.index_select(0, rows)).sum() for leaf in leaves), leaves)


with thread_map(2, leaves) as at_once:
    assert all(float(gradients[0].sum()) == (24, 16)[number % 2] for number, gradients in enumerate(at_once(play, range(2000))))
"""


def test_lanes_that_differentiate_by_the_same_leaves_never_wait_for_one_another_for_good() -> None:
    subprocess.run([sys.executable, "-c", PASSES], check=True, timeout=120)
