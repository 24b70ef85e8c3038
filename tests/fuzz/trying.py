"""One input, tried: what became of it, how much memory it took, and how long."""

import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, final

from .mutate import mutated
from .surfaces import SURFACES, Surface

FOUND: Final = Path(__file__).parent / "found"
"""Inputs that once broke something: a folder for each surface."""
SLOWEST: Final = 10.0
"""Seconds that an input may take."""


@final
@dataclass
class Tally:
    """What became of many inputs. ``peak``: bytes that one took at most; ``worst``: the largest share of its bound."""

    outcomes: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    worst: float = 0.0
    seconds: float = 0.0


def try_one(surface: Surface, content: bytes, tally: Tally) -> None:
    """Give an input to a surface; AssertionError, which names it, where it is not dealt with as it should be."""
    bound = surface.bound(len(content))
    outcome, peak, seconds = _tried(surface, content)
    if peak > bound:
        # Another thread, or a module that was imported meanwhile? An input that takes too much takes
        # it every time.
        outcome, peak, seconds = _tried(surface, content)
    assert peak <= bound, (
        f"{surface.name}: {peak} bytes of memory, {bound} allowed: {content!r:.2000}"
    )
    assert seconds <= SLOWEST, f"{surface.name}: {seconds:.1f} s: {content!r:.2000}"
    tally.outcomes[outcome] += 1
    tally.peak = max(tally.peak, peak)
    tally.worst = max(tally.worst, peak / bound)


def _tried(surface: Surface, content: bytes) -> tuple[str, int, float]:
    """Return what became of an input, the bytes of Python's memory that were taken meanwhile, and the seconds."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        outcome = surface.target(content)
        _, peak = tracemalloc.get_traced_memory()
    except Exception as error:
        raise AssertionError(f"{surface.name}: {content!r:.2000}") from error
    finally:
        tracemalloc.stop()
    return outcome, peak, time.monotonic() - began


@cache
def warmed(name: str) -> tuple[Surface, Sequence[bytes]]:
    """Return a surface and its seeds, each of which was tried, so that what is made once is not counted later."""
    surface = SURFACES[name]
    seeds = surface.seeds()
    for seed in seeds:
        surface.target(seed)
    return surface, seeds


def try_mutations(name: str, count: int, seed: int = 0) -> Tally:
    """Try so many mutations of a surface's seeds."""
    surface, seeds = warmed(name)
    tally, draw, began = Tally(), random.Random(seed), time.monotonic()
    for _ in range(count):
        try_one(surface, mutated(draw, seeds), tally)
    tally.seconds = time.monotonic() - began
    return tally


def found_inputs() -> list[tuple[str, Path]]:
    """Return (surface, file) of every input that once broke something."""
    return [(path.parent.name, path) for path in sorted(FOUND.glob("*/*"))]
