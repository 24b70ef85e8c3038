"""Label shares from a symmetric Dirichlet law, given that every client gets enough examples.

The textbook redraws until every client has enough. With many clients, few labels and a small alpha,
that never ends (100 clients of 100 examples on average, 2 labels, alpha 0.1: not one draw in 10^15
gives everybody an example). So most of the rejection is done client by client, under the same law:

- Label l has n_l examples. Its shares are p_l = g_l / S_l. Here g_lk are independent Gamma(alpha)
  numbers, one per client k, and S_l is their sum. It is known that p_l is independent of S_l.
- Condition 1, the one that is wanted: every client gets enough, sum_l n_l p_lk >= m for each k.
- Condition 2: every S_l >= s, for a fixed level s. As p_l is independent of S_l, adding this
  condition does not change the law of p.
- Condition 3: sum_l n_l g_lk / s >= m for each k. It follows from 1 and 2, and it concerns one
  client at a time.

So: draw each client's g_lk until 3 holds; then start again unless 1 and 2 hold, too.
"""

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import BadInput
from fedpeft.seeds import derive

ATTEMPTS = 10_000
"""Draws of all clients' shares before giving up; usual settings need a few."""


def shares(
    sizes: NDArray[np.int64],
    clients: int,
    alpha: float,
    min_examples: int,
    seed: int,
    field: str = "alpha",
) -> NDArray[np.float64]:
    """Return each client's share of each label, (labels, clients); rows sum to 1.

    The rows are independent draws from Dir(alpha, ..., alpha), given that each client gets at least
    ``min_examples`` of the ``sizes`` (labels,) examples, before and after rounding. ``field``: the
    setting that ``alpha`` is from. Raises BadInput after 10,000 attempts.
    """
    rng = np.random.default_rng(derive(seed, "dirichlet"))
    # The level s: a sum that all labels reach together in about half of the draws. Any other level
    # gives the same law, only slower. With this one, about one vector in 2 * clients or more is
    # kept, so the inner loop ends. A sum of Gamma(alpha) numbers is Gamma(alpha * clients).
    level = np.quantile(rng.gamma(alpha * clients, size=1001), 1 - 0.5 ** (1 / len(sizes)))
    level = max(float(level), 1e-200)  # a tiny alpha may give 0, which cannot divide
    for _ in range(ATTEMPTS):
        gammas = _gammas(rng, alpha, sizes / level, clients, min_examples)  # condition 3
        sums = gammas.sum(axis=0)  # S_l, (labels,)
        if (sums < level).any():  # condition 2 fails
            continue
        share: NDArray[np.float64] = (gammas / sums).T
        # Condition 1, both in fractions of examples and in whole ones.
        if min((sizes @ share).min(), counts(share, sizes).sum(axis=0).min()) >= min_examples:
            return share
    raise BadInput(
        f"partition.{field} = {alpha}: {ATTEMPTS} draws of shares for "
        f"partition.clients = {clients} left some client with less than "
        f"partition.min_examples = {min_examples} "
        f"of {sizes.sum()}; raise {field} or lower the other two"
    )


def counts(share: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``share`` (labels, clients) of ``sizes`` (labels,) in whole examples.

    The result has the shape of ``share``; its row l sums to ``sizes[l]``.
    """
    # Rounds the running sums, not the shares: then the rounding errors do not add up.
    ends = np.rint(np.cumsum(share, axis=1) * sizes[:, None]).astype(np.int64)
    ends[:, -1] = sizes  # exact, whatever the sum of the shares is rounded to
    return np.diff(ends, axis=1, prepend=0)


def _gammas(
    rng: np.random.Generator, alpha: float, worth: NDArray[np.float64], clients: int, least: float
) -> NDArray[np.float64]:
    """Return independent vectors of Gamma(alpha) numbers, (clients, labels).

    Each has ``vector @ worth >= least``; ``worth`` is (labels,).
    """
    accepted = np.empty((0, len(worth)))
    while len(accepted) < clients:
        # Rejection sampling of many vectors at once; those beyond ``clients`` are thrown away.
        candidates = rng.gamma(alpha, size=(2 * clients, len(worth)))
        accepted = np.concatenate([accepted, candidates[candidates @ worth >= least]])
    return accepted[:clients]
