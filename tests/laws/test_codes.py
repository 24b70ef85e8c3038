"""Numbers in few bits: rows of whole numbers, and places that take as many bits as a formula says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.algebra.codes import (
    dequantised,
    from_halves,
    from_rows,
    in_halves,
    place_bits,
    places_as_bits,
    places_from_bits,
    quantised,
    row_shape,
    to_rows,
)

SHAPES = [(8, 40), (40, 8), (5,), (), (4, 3, 3), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_another_view_of_the_same_numbers(shape: tuple[int, ...]) -> None:
    stack = torch.randn(3, *shape)
    rows = to_rows(stack)
    assert rows.shape[1:] == row_shape(shape)
    assert torch.equal(from_rows(rows, shape), stack)
    if shape == (40, 8):
        assert torch.equal(rows[1, 2], stack[1, :, 2]), "of a tall matrix the columns"


@pytest.mark.parametrize("levels", [127, 7])
def test_a_number_is_off_by_half_a_step_of_its_row_at_most(levels: int) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(4, 6, 50, generator=draw) * torch.logspace(-20, 20, 6)[:, None]
    codes, largest = quantised(rows, levels)
    assert torch.equal(largest, rows.abs().amax(-1))
    assert int(codes.abs().max()) == levels
    off = (dequantised(codes, largest, levels) - rows).abs()
    assert (off <= largest[..., None] / levels * 0.5001).all()
    # Against whole numbers worked out one by one.
    row, step = rows[2, 3], float(largest[2, 3]) / levels
    assert codes[2, 3].tolist() == [round(float(x) / step) for x in row]


def test_clients_side_by_side_are_written_as_each_alone() -> None:
    stack = torch.randn(5, 3, 17)
    codes, largest = quantised(stack, 127)
    for client in range(5):
        alone, scale = quantised(stack[client : client + 1], 127)
        assert torch.equal(alone[0], codes[client])
        assert torch.equal(scale[0], largest[client])


def test_a_row_of_nothing_stays_one_and_a_huge_one_stays_finite() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-38, -1e-40], [3.4e38, -3.4e38]])
    codes, largest = quantised(rows, 127)
    assert codes.tolist() == [[0, 0], [0, 0], [127, -127]]
    assert dequantised(codes, largest, 127).isfinite().all()


def test_any_codes_give_finite_numbers() -> None:
    codes = torch.arange(-128, 128).to(torch.int8)[None]
    largest = torch.tensor([torch.finfo(torch.float32).max])
    for levels in (127, 7):
        numbers = dequantised(codes, largest, levels)
        assert numbers.isfinite().all()
        assert numbers.abs().max() <= largest[0]


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_two_codes_share_a_byte(count: int) -> None:
    codes = torch.randint(-7, 8, (3, count)).to(torch.int8)
    packed = in_halves(codes)
    assert packed.shape == (3, math.ceil(count / 2))
    assert torch.equal(from_halves(packed, count), codes)


@given(st.data())
def test_places_come_back_from_as_many_bits_as_the_formula_says(data: st.DataObject) -> None:
    numbers = data.draw(st.integers(1, 3000))
    chosen = data.draw(st.integers(1, numbers))
    clients = data.draw(st.integers(1, 3))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = [torch.randperm(numbers, generator=draw)[:chosen].sort().values for _ in range(clients)]
    places = torch.stack(rows)
    bits = places_as_bits(places, numbers)
    low = int(math.log2(numbers // chosen))
    assert bits.shape == (clients, chosen * low + chosen + (numbers - 1) // 2**low)
    assert bits.shape[1] == place_bits(numbers, chosen)
    for client in range(clients):
        assert torch.equal(places_from_bits(bits[client], numbers, chosen), places[client])


def test_a_place_takes_two_bits_more_than_the_logarithm_of_the_gap() -> None:
    for density in (0.5, 0.1, 0.01, 0.001):
        chosen = int(density * 100_000)
        assert place_bits(100_000, chosen) / chosen < math.log2(1 / density) + 2


@given(st.integers(1, 300), st.integers(0, 2**31))
def test_any_bits_give_places_that_exist(numbers: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    chosen = int(torch.randint(1, numbers + 1, (), generator=draw))
    bits = torch.rand(place_bits(numbers, chosen), generator=draw) < 0.5
    for strange in (bits, torch.zeros_like(bits), torch.ones_like(bits)):
        places = places_from_bits(strange, numbers, chosen)
        assert places.shape == (chosen,)
        assert int(places.min()) >= 0
        assert int(places.max()) < numbers
