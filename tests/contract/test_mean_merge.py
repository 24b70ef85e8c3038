"""Where a method merges by weighted sums, what the server needs of its replies can be summed before it sees them."""

import pytest
import torch

from fedpeft.algebra.averaging import Mean, mean_merge, weight_of
from fedpeft.types import Method, Update
from fedpeft.wrappers import FedAvgM, FedProx
from tests.contract.reference import BEGINS, NOT_MEANS, merging, reference, rows
from tests.contract.reference import updates as come_up
from tests.tiny import assert_same_state, close, small

UNSAID = (
    "it says nothing of its merge: give it mean_merge, such as plain_mean(self.weighting), or name "
    "it in NOT_MEANS of tests/contract/reference.py"
)


def updates(name: str, begin: int) -> list[Update]:
    """Return what the clients of the reference replied in a round."""
    return come_up(reference(name).playing, merging(name, begin))


def wrapped(method: Method) -> Method:
    """Return ``method`` inside wrappers that leave its merge one of means."""
    return FedProx(mu=0.1).around(FedAvgM(momentum=0.5).around(method, "1.fedavgm"), "0.fedprox")


@pytest.mark.parametrize(("name", "begin"), rows(BEGINS, without=NOT_MEANS))
@pytest.mark.parametrize("around", [lambda method: method, wrapped], ids=["bare", "wrapped"])
def test_receive_is_the_merge_of_weighted_sums(name: str, begin: int, around: object) -> None:
    method = around(small(name))  # type: ignore[operator]
    state, replies = reference(name).states[begin], updates(name, begin)
    merge = mean_merge(method, begin)
    assert merge is not None, UNSAID
    total = Mean()
    for reply in replies:
        contribution = merge.contribution(reply.payload)
        assert all(tensor.is_floating_point() for tensor in contribution.values())
        total.add(contribution, weight_of(reply, merge.weighting))
    assert_same_state(merge.merge(state, total), method.receive(state, replies))
    assert_same_state(merge.merge(state, Mean()), method.receive(state, ()))


@pytest.mark.parametrize(("name", "begin"), rows(BEGINS, without=NOT_MEANS))
def test_it_makes_no_difference_who_sums(name: str, begin: int) -> None:
    """Two clients' sum as one reply of their common weight gives what both replies give."""
    method, state, replies = small(name), reference(name).states[begin], updates(name, begin)
    merge = mean_merge(method, begin)
    assert merge is not None, UNSAID
    weights = [weight_of(reply, merge.weighting) for reply in replies]
    first, second, third = [merge.contribution(reply.payload) for reply in replies]
    both = {}
    for entry, tensor in first.items():
        together = weights[0] * tensor.double() + weights[1] * second[entry].double()
        both[entry] = (together / (weights[0] + weights[1])).to(tensor.dtype)
    total = Mean()
    total.add(both, weights[0] + weights[1])
    total.add(third, weights[2])
    due = method.receive(state, replies)
    merged = merge.merge(state, total)
    close(merged.shared, due.shared, 1e-6)
    close(
        {k: v.double() for k, v in merged.server.items()},
        {k: v.double() for k, v in due.server.items()},
        1e-6,
    )


@pytest.mark.parametrize("name", NOT_MEANS)
def test_methods_whose_merge_is_no_mean_say_so(name: str) -> None:
    assert mean_merge(small(name), 0) is None
    assert mean_merge(wrapped(small(name)), 0) is None


@pytest.mark.parametrize("name", rows(without=NOT_MEANS))
def test_an_empty_merge_is_a_silent_round(name: str) -> None:
    state = reference(name).states[1]
    merge = mean_merge(small(name), 1)
    assert merge is not None, UNSAID
    after = merge.merge(state, Mean())
    assert after.round == 2
    for entry, tensor in state.shared.items():
        if entry in after.shared:
            assert torch.equal(after.shared[entry], tensor)
