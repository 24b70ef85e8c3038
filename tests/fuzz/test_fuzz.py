"""No input crashes, hangs, or takes more memory than its surface declares; what is taken is equal to what was meant."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .mutate import mutated
from .surfaces import SURFACES, TAKEN, Surface
from .trying import Tally, found_inputs, try_mutations, try_one, warmed

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FULL = 10_000
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
"""Of Hypothesis, for each surface; ``make fuzz`` asks for more."""
FOUND = found_inputs()


@pytest.mark.parametrize("name", SURFACES)
def test_valid_messages_are_taken(name: str) -> None:
    surface, seeds = warmed(name)
    outcomes = [surface.target(seed) for seed in seeds]
    assert TAKEN in outcomes
    if name not in ("gate", "socket"):
        assert set(outcomes) == {TAKEN}
    assert seeds == surface.seeds(), "the same seeds every time"


@pytest.mark.parametrize("name", SURFACES)
def test_mutations_are_refused_or_decoded_to_an_equal_payload(name: str) -> None:
    tally = try_mutations(name, SURFACES[name].quick)
    assert tally.outcomes.total() == SURFACES[name].quick
    assert tally.outcomes["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SURFACES)
def test_ten_thousand_mutations_are_refused_or_decoded_to_an_equal_payload(name: str) -> None:
    assert try_mutations(name, FULL, seed=1).outcomes.total() == FULL


@pytest.mark.parametrize("name", SURFACES)
def test_what_hypothesis_draws_is_refused_or_decoded_to_an_equal_payload(name: str) -> None:
    surface, seeds = warmed(name)

    @settings(deadline=None, max_examples=EXAMPLES)
    @given(st.one_of(st.binary(max_size=300), edited(surface, list(seeds))))
    def law(content: bytes) -> None:
        try_one(surface, content, Tally())

    law()


def edited(surface: Surface, seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Return edits of valid inputs that Hypothesis can make smaller: a piece of a seed, other bytes, another piece."""

    @st.composite
    def drawn(draw: st.DrawFn) -> bytes:
        seed = draw(st.sampled_from(seeds))
        begin = draw(st.integers(0, len(seed)))
        end = draw(st.integers(begin, min(len(seed), begin + 64)))
        return seed[:begin] + draw(st.binary(max_size=16)) + seed[end:]

    return drawn()


@pytest.mark.parametrize(
    ("name", "path"), FOUND, ids=[f"{name}-{path.name}" for name, path in FOUND]
)
def test_what_once_broke_something_no_longer_does(name: str, path: Path) -> None:
    warmed(name)
    try_one(SURFACES[name], path.read_bytes(), Tally())


def test_the_same_mutations_come_for_the_same_seed() -> None:
    seeds = SURFACES["wire"].seeds()
    one, other = random.Random(3), random.Random(3)
    assert [mutated(one, seeds) for _ in range(50)] == [mutated(other, seeds) for _ in range(50)]
