"""Named randomness depends on seed and names alone, in every process and for ever."""

from hashlib import blake2b

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.seeds import derive, generator

PARTS = st.lists(
    st.one_of(st.integers(), st.text(st.characters(exclude_characters="\x1f", codec="utf-8"))),
    max_size=3,
)

GOLDEN: dict[tuple[int | str, ...], int] = {
    (0,): 4761921975702974394,
    (0, "head"): 7529542473631059979,
    (7, "client", 3, 12): 766748404526715111,
    (4611686018427387904, "mask", "encoder.layer.0"): 6156867119155139078,
    (-1, "order", 0, 0, 0): 8571706849332475338,
}


@pytest.mark.parametrize(("names", "value"), GOLDEN.items())
def test_seeds_are_what_they_were_when_runs_were_saved(
    names: tuple[int | str, ...], value: int
) -> None:
    """Another value would make every saved run another run."""
    seed, *rest = names
    assert derive(int(seed), *rest) == value


@given(st.integers(), PARTS)
def test_a_seed_is_the_upper_63_bits_of_a_digest_of_its_name(
    seed: int, names: list[int | str]
) -> None:
    text = "\x1f".join(map(str, [seed, *names]))
    expected = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") // 2
    assert derive(seed, *names) == expected
    assert 0 <= expected < 2**63


def test_other_names_give_other_seeds() -> None:
    names: list[tuple[int | str, ...]] = [
        ("a",),
        ("b",),
        ("a", "b"),
        ("ab",),
        ("a", 1),
        ("a", 11),
        ("a1", 1),
        ("a", 1, 1),
        (),
    ]
    assert len(
        {derive(0, *name) for name in names} | {derive(1, *name) for name in names}
    ) == 2 * len(names)


def test_a_generator_is_its_own_stream() -> None:
    torch.manual_seed(3)
    undisturbed = torch.rand(2)
    torch.manual_seed(3)
    first = torch.rand(4, generator=generator(5, "mask", "m"))
    assert torch.equal(torch.rand(2), undisturbed), "torch's own stream has not moved"
    assert torch.equal(first, torch.rand(4, generator=generator(5, "mask", "m")))
    assert not torch.equal(first, torch.rand(4, generator=generator(5, "mask", "n")))
    assert generator(5, "mask", "m").initial_seed() == derive(5, "mask", "m")
