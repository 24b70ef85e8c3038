"""Label shares from a symmetric Dirichlet law, given that no client comes away with too little.

Textbook: redraw until every client has enough. With many clients, few labels and a small alpha that
never ends (100 clients of 100 examples on average, 2 labels, alpha 0.1: not one draw in 10^15 gives
everybody an example). So most of the rejecting is done client by client, under the same law.

Label l has n_l examples. Its shares are p_l = g_l / S_l: independent Gamma(alpha) numbers g_lk, one
per client k, over their sum S_l, of which p_l is independent. To draw p given that every client
gets enough, sum_l n_l p_lk >= m for each k, one may therefore draw it given also that every S_l >=
s, for any s. These two conditions imply a third, that sum_l n_l g_lk / s >= m for each k, which
concerns one client at a time. So: draw each client's g_lk until the third holds, and start again
unless then the other two do.
"""

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import BadInput
from fedpeft.seeds import derive

ATTEMPTS = 10_000


def shares(
    sizes: NDArray[np.int64], clients: int, alpha: float, min_examples: int, seed: int
) -> NDArray[np.float64]:
    """Return each client's share of each label, (labels, clients); rows sum to 1.

    The rows are independent draws from Dir(alpha, ..., alpha), given that each client gets at least
    ``min_examples`` of the ``sizes`` (labels,) examples, before and after rounding. Raises BadInput
    after 10,000 attempts.
    """
    rng = np.random.default_rng(derive(seed, "dirichlet"))
    # A sum that all labels reach together in about half of the draws. Any other level gives the same law, only slower;
    # with this one, about one vector in 2 * clients or more is kept, so the inner loop ends.
    level = np.quantile(rng.gamma(alpha * clients, size=1001), 1 - 0.5 ** (1 / len(sizes)))
    level = max(float(level), 1e-200)
    for _ in range(ATTEMPTS):
        gammas = _gammas(rng, alpha, sizes / level, clients, min_examples)
        sums = gammas.sum(axis=0)
        if (sums < level).any():
            continue
        share: NDArray[np.float64] = (gammas / sums).T
        if min((sizes @ share).min(), counts(share, sizes).sum(axis=0).min()) >= min_examples:
            return share
    raise BadInput(
        f"partition.alpha = {alpha}: {ATTEMPTS} draws of shares for partition.clients = {clients} left some client "
        f"with less than partition.min_examples = {min_examples} of {sizes.sum()}; raise alpha or lower the other two"
    )


def counts(share: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``share`` (labels, clients) of ``sizes`` (labels,) in whole examples; row l sums to ``sizes[l]``."""
    ends = np.rint(np.cumsum(share, axis=1) * sizes[:, None]).astype(np.int64)
    ends[:, -1] = sizes
    return np.diff(ends, axis=1, prepend=0)


def _gammas(
    rng: np.random.Generator, alpha: float, worth: NDArray[np.float64], clients: int, least: float
) -> NDArray[np.float64]:
    """Return independent vectors of Gamma(alpha) numbers, (clients, labels), each with ``vector @ worth >= least``."""
    found = np.empty((0, len(worth)))
    while len(found) < clients:
        tried = rng.gamma(alpha, size=(2 * clients, len(worth)))
        found = np.concatenate([found, tried[tried @ worth >= least]])
    return found[:clients]
