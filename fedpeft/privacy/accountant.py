"""What releases with Gaussian noise cost: epsilon at a delta, by the package dp-accounting."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Final, Literal, final

from fedpeft.errors import BadInput

Unit = Literal["client", "example"]
"""Whose presence in the data is hidden: a client with all it holds, or a single row of one."""

EVERYBODY: Final = 1.0
"""The sampling probability of a release that all who may be in it are in."""
_ORDERS: Final = (*range(2, 64), 80, 96, 128, 192, 256, 512, 1024)
"""Orders of the Renyi divergence that are tried; any choice gives a bound that holds. Whole ones
are computed in closed form (Mironov et al. 2019, section 3.3)."""


@final
@dataclass(frozen=True)
class Promise:
    """What a wrapper adds to a sum, and for whom.

    ``noise``: the noise multiplier z, standard deviation over sensitivity, of one release.
    ``delta``: for which epsilon is told. ``sampled``: whether who is in a release is drawn in
    secret, each by itself (Poisson).
    """

    unit: Unit
    noise: float
    delta: float
    sampled: bool


def check_installed() -> None:
    """Raise BadInput where the package is missing."""
    if find_spec("dp_accounting") is None:
        raise BadInput(
            "differential privacy is accounted for by the package dp-accounting, which is not "
            "installed; install it with: pip install 'fedpeft[privacy]'"
        )


def epsilon(noise: float, delta: float, releases: Mapping[float, int]) -> float:
    """Return the epsilon, at ``delta``, of releases with noise multiplier ``noise``.

    ``releases``: sampling probability -> number of releases. Neighbours are data sets with and
    without the unit. Where nothing is sampled, the result is exact: so many Gaussian mechanisms are
    one with noise / sqrt(count) (Balle and Wang 2018). Otherwise it is an upper bound by Renyi
    differential privacy (Mironov 2017; Mironov, Talwar and Zhang 2019).
    """
    counts = {rate: count for rate, count in releases.items() if count}
    if not counts:
        return 0.0
    # Imported here: it takes a second or two, and brings SciPy along.
    import dp_accounting  # noqa: PLC0415

    if set(counts) == {EVERYBODY}:
        alone = noise / math.sqrt(counts[EVERYBODY])
        return float(dp_accounting.get_epsilon_gaussian(alone, delta))
    accountant = dp_accounting.rdp.RdpAccountant(orders=_ORDERS)
    gaussian = dp_accounting.GaussianDpEvent(noise)
    for rate, count in sorted(counts.items()):
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), count)
    return float(accountant.get_epsilon(delta))


@cache
def epsilon_of_one_rate(noise: float, delta: float, rate: float, count: int) -> float:
    """Return ``epsilon`` of ``count`` releases with one sampling probability; kept for next time.

    >>> round(epsilon_of_one_rate(4.0, 1e-5, 0.01, 10000), 2)  # Abadi et al. 2016: 1.26
    1.04
    """
    return epsilon(noise, delta, {rate: count})


def left_over(noise: float, taken: float) -> float:
    """Return the noise multiplier that is left for the rest of a release of multiplier ``noise``.

    ``taken``: that of a part. 1 / noise^2 = 1 / taken^2 + 1 / rest^2, as the parts together are one
    vector with noise (Andrew et al. 2021, theorem 1). ValueError where nothing is left.

    >>> left_over(3.0, taken=5.0)
    3.75
    """
    if taken <= noise:
        raise ValueError(f"a part with noise multiplier {taken:g} takes all of {noise:g}")
    return 1 / math.sqrt(noise**-2 - taken**-2)
