"""What a client's link, memory and time allow: texts with units -> limits, and what breaks them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from fedpeft.errors import BadInput

SIZES: Final[Mapping[str, float]] = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
"""Bytes of a unit."""
RATES: Final[Mapping[str, float]] = {
    "B/s": 1,
    "kB/s": 1e3,
    "MB/s": 1e6,
    "GB/s": 1e9,
    "bit/s": 1 / 8,
    "kbit/s": 1e3 / 8,
    "Mbit/s": 1e6 / 8,
    "Gbit/s": 1e9 / 8,
}
"""Bytes per second of a unit."""
TIMES: Final[Mapping[str, float]] = {"s": 1, "min": 60, "h": 3600}
"""Seconds of a unit."""


@final
@dataclass(frozen=True)
class Limits:
    """What one client can bear in one round; None where nothing is said.

    ``rate``: bytes per second of its link, down and up. ``traffic``: bytes, down and up.
    ``memory``: bytes. ``deadline``: seconds for training and transfers together.

    >>> limits = Limits(rate=1e6, memory=2e9, deadline=10.0)
    >>> limits.seconds(moved=4_000_000, training=3.0)
    7.0
    >>> print(limits.broken(moved=4_000_000, training=3.0, memory=10**9))
    None
    >>> limits.broken(moved=8_000_000, training=3.0, memory=10**9)
    'a round takes 11 s, modelled (3 s of training, 8 s for 8 MB); the deadline is 10 s'
    """

    rate: float | None = None
    traffic: float | None = None
    memory: float | None = None
    deadline: float | None = None

    def seconds(self, moved: int, training: float) -> float:
        """Return the modelled seconds of a round: training, and ``moved`` bytes over the link.

        Without a known rate transfers take no time.
        """
        return training + (moved / self.rate if self.rate is not None else 0.0)

    def broken(self, moved: int, training: float, memory: int, what: str = "a round") -> str | None:
        """Return the first limit that a client breaks, in words; None where it keeps all.

        ``moved``: bytes, down and up, of a round. ``training``: its seconds. ``memory``: bytes at
        the peak, 0 where the system does not tell. ``what``: whose seconds these are, for messages.
        """
        seconds, mb = self.seconds(moved, training), moved / 1e6
        if self.traffic is not None and moved > self.traffic:
            return (
                f"a client moves {mb:.3g} MB in a round, counted; "
                f"the limit is {self.traffic / 1e6:.3g} MB"
            )
        if self.memory is not None and memory > self.memory:
            return (
                f"a client's process takes {memory / 1e9:.3g} GB, measured; "
                f"the limit is {self.memory / 1e9:.3g} GB"
            )
        if self.deadline is not None and seconds > self.deadline:
            parts = f"{training:.3g} s of training"
            if self.rate is not None:
                parts += f", {seconds - training:.3g} s for {mb:.3g} MB"
            return (
                f"{what} takes {seconds:.3g} s, modelled ({parts}); "
                f"the deadline is {self.deadline:.3g} s"
            )
        return None


def limits(bandwidth: str = "", memory: str = "", deadline: str = "") -> Limits:
    """Return the limits that three texts say; empty ones say nothing.

    ``bandwidth``: a rate, plain numbers in bytes per second, or what a client may move in a round.
    ``memory``: plain numbers in GB (10^9 bytes). ``deadline``: plain numbers in seconds. Anything
    else raises BadInput.

    >>> limits("10Mbit/s", "4", "2min")
    Limits(rate=1250000.0, traffic=None, memory=4000000000.0, deadline=120.0)
    >>> limits("20 MB").traffic
    20000000.0
    """
    rate = traffic = bytes_of_memory = seconds = None
    if bandwidth:
        says = (
            "write a rate, such as 10Mbit/s or 1MB/s (plain: bytes per second), or what a client "
            "may move in a round, such as 20MB"
        )
        amount, unit = _amount(bandwidth, "--bandwidth", {**RATES, **SIZES}, "B/s", says)
        if unit in SIZES:
            traffic = amount
        else:
            rate = amount
    if memory:
        says = "write a size, such as 4GB or 512MB (plain: GB)"
        bytes_of_memory, _ = _amount(memory, "--memory", SIZES, "GB", says)
    if deadline:
        says = "write a time, such as 30s or 2min (plain: seconds)"
        seconds, _ = _amount(deadline, "--deadline", TIMES, "s", says)
    return Limits(rate, traffic, bytes_of_memory, seconds)


def _amount(
    text: str, option: str, units: Mapping[str, float], plain: str, says: str
) -> tuple[float, str]:
    """Return what ``text`` says, above 0, in bytes, seconds or bytes per second; and its unit.

    ``plain``: the unit of a number without one. BadInput, with ``says``, for any other text.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*", text)
    if found is None or (found[2] and found[2] not in units):
        raise BadInput(f"{option} {text}: {says}")
    number, unit = float(found[1]), found[2] or plain
    if not 0 < number < math.inf:
        raise BadInput(f"{option} {text}: must be greater than 0, and finite")
    return number * units[unit], unit
