"""Krum and multi-Krum: the replies nearest to others (Blanchard et al. 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from annotated_types import Ge
from torch import Tensor

from fedpeft.types import Method
from fedpeft.wrappers.robust import Summand, around, squared_distances, weighted_mean


@final
@dataclass(frozen=True)
class Krum:
    """Average the replies that are nearest to their neighbours, and leave all others out.

    A reply's score is the sum of its squared distances to its nearest n - malicious - 2 of n.
    """

    paper: ClassVar[str] = "Krum: Blanchard et al. 2017, NeurIPS 30"
    name: ClassVar[str] = "krum"
    malicious: Annotated[int, Ge(0)] = 1
    """Replies of a round that may be forged, f. With fewer than 2 f + 3 replies, or than `keep`, a
    round changes nothing."""
    keep: Annotated[int, Ge(1)] = 1
    """Replies that are averaged, by the method's `weighting`: 1 is Krum, more multi-Krum."""

    @property
    def least(self) -> int:
        """Return 2 f + 3, below which the paper promises nothing, or as many as are kept."""
        return max(2 * self.malicious + 3, self.keep)

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with Krum as its merge; BadInput where it is no method of means."""
        del owner  # nothing is kept on the server
        return around(method, self)

    def merged(self, summands: Sequence[Summand]) -> dict[str, Tensor]:
        """Return the mean of the replies with the lowest scores."""
        scores = krum_scores(squared_distances(summands), self.malicious)
        nearest = scores.argsort(stable=True)[: self.keep].tolist()
        # In the order of clients, in which sums are always taken.
        return weighted_mean([summands[index] for index in sorted(nearest)])


def krum_scores(distances: Tensor, malicious: int) -> Tensor:
    """Return the sum of each reply's squared distances to its nearest, (n, n) -> (n,).

    >>> import torch
    >>> krum_scores(torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]]), malicious=0)
    tensor([1., 1., 4.])
    """
    neighbours = max(1, len(distances) - malicious - 2)
    # The nearest of all, at distance 0, is the reply itself.
    return distances.sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)
