"""The streaming mean is the weighted mean of float64 arithmetic, linear, and cast once."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.algebra.averaging import Mean, Weighting, averaged, mean
from fedpeft.types import Client, State, Update
from tests.tiny import assert_same, weighted

ENTRIES = st.floats(-1e6, 1e6, width=32)


@st.composite
def updates(draw: st.DrawFn) -> list[Update]:
    """Return one to five replies of equal names and shapes."""
    shapes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    found = []
    for client in range(draw(st.integers(1, 5))):
        vectors = [draw(st.lists(ENTRIES, min_size=size, max_size=size)) for size in shapes]
        payload = {
            str(k): torch.tensor(vector, dtype=torch.float32) for k, vector in enumerate(vectors)
        }
        found.append(Update(Client(client), draw(st.integers(1, 10**6)), payload))
    return found


@settings(deadline=None)
@given(updates(), st.sampled_from(["examples", "uniform"]))
def test_the_mean_is_torchs_in_float64_cast_once(
    replies: list[Update], weighting: Weighting
) -> None:
    weights = [float(reply.examples) if weighting == "examples" else 1.0 for reply in replies]
    expected = weighted([reply.payload for reply in replies], weights)
    found = mean(iter(replies), weighting)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value.float(), rtol=2e-7, atol=1e-12 + 1e-15 * 1e6)


@settings(deadline=None)
@given(updates(), ENTRIES, ENTRIES)
def test_the_mean_is_linear_and_keeps_a_constant(
    replies: list[Update], factor: float, shift: float
) -> None:
    """mean(a x + b) = a mean(x) + b, in float64."""
    doubled = [
        Update(r.client, r.examples, {n: t.double() for n, t in r.payload.items()}) for r in replies
    ]
    moved = [
        Update(r.client, r.examples, {n: factor * t + shift for n, t in r.payload.items()})
        for r in doubled
    ]
    plain, other = mean(doubled, "examples"), mean(moved, "examples")
    for name, value in plain.items():
        torch.testing.assert_close(
            other[name], factor * value + shift, rtol=1e-9, atol=1e-2 * 1e-6 * (1 + abs(factor))
        )


@settings(deadline=None)
@given(updates())
def test_one_reply_is_its_own_mean_and_copies_change_nothing(replies: list[Update]) -> None:
    assert_same(mean(replies[:1], "examples"), replies[0].payload)
    assert_same(mean([replies[0]] * 4, "uniform"), replies[0].payload)


def test_a_reply_of_twice_the_examples_counts_twice() -> None:
    """Worked by hand: (1 * 0 + 3 * 8) / 4 = 6 by examples, (0 + 8) / 2 = 4 plain."""
    replies = [
        Update(Client(0), 1, {"x": torch.tensor([0.0])}),
        Update(Client(1), 3, {"x": torch.tensor([8.0])}),
    ]
    assert mean(replies, "examples")["x"].tolist() == [6.0]
    assert mean(replies, "uniform")["x"].tolist() == [4.0]


def test_sums_do_not_lose_small_numbers_beside_large_ones() -> None:
    """In float32, 2**24 + 1 = 2**24: a sum that is not float64 would give 0."""
    numbers = [2.0**24, 1.0, 1.0, 2.0, -(2.0**24)]
    total = Mean()
    for number in numbers:
        total.add({"x": torch.tensor([number])}, 1.0)
    assert total.result()["x"].tolist() == [pytest.approx(4.0 / 5.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_mean_comes_in_the_dtype_that_was_added(dtype: torch.dtype) -> None:
    total = Mean()
    for number in (1.0, 2.0):
        total.add(
            {"x": torch.tensor([number], dtype=dtype), "zero-d": torch.tensor(number, dtype=dtype)},
            1.0,
        )
    assert {tensor.dtype for tensor in total.result().values()} == {dtype}
    assert total.result()["zero-d"] == 1.5


def test_replies_are_read_one_at_a_time_and_left_as_they_were() -> None:
    held: list[int] = []

    def stream() -> Iterator[Update]:
        for client in range(3):
            held.append(client)
            assert held == list(range(client + 1))
            yield Update(Client(client), 1, {"x": torch.full((2,), float(client))})

    assert mean(stream(), "uniform")["x"].tolist() == [1.0, 1.0]
    first = Update(Client(0), 2, {"x": torch.ones(2)})
    mean([first, first], "examples")["x"].add_(5)
    assert first.payload["x"].tolist() == [1.0, 1.0]


def test_the_next_state_has_what_came_back_and_keeps_the_rest() -> None:
    state = State(4, {"x": torch.zeros(2), "kept": torch.ones(1)}, {"own": torch.ones(1)}, {3: 1})
    after = averaged(state, [Update(Client(0), 5, {"x": torch.ones(2)})], "examples")
    assert (after.round, after.memories) == (5, {3: 1})
    assert_same(after.shared, {"x": torch.ones(2), "kept": torch.ones(1)})
    assert_same(after.server, state.server)
    assert_same(averaged(state, [], "examples").shared, state.shared)
    assert state.shared["x"].tolist() == [0.0, 0.0], "states are values"


def test_what_weighs_nothing_is_not_added() -> None:
    assert mean([Update(Client(0), 0, {"w": torch.ones(2)})], "examples") == {}
    total = Mean()
    total.add({"w": torch.tensor([1.0, 2.0])}, 3.0)
    total.add({"w": torch.tensor([9.0, 9.0])}, 0.0)
    assert torch.equal(total.result()["w"], torch.tensor([1.0, 2.0]))


@settings(deadline=None)
@given(updates())
def test_a_mean_of_sums_is_that_of_what_was_summed(replies: list[Update]) -> None:
    total = Mean()
    for reply in replies:
        total.add(reply.payload, reply.examples)
    weight = float(sum(reply.examples for reply in replies))
    dtypes = {name: tensor.dtype for name, tensor in replies[0].payload.items()}
    assert_same(Mean.of(total.sums(), weight, dtypes).result(), total.result())
