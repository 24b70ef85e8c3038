"""Bulyan: Krum's choice, then what is nearest to the median (El Mhamdi et al. 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge
from torch import Tensor

from fedpeft.types import Method
from fedpeft.wrappers.krum import krum_scores
from fedpeft.wrappers.robust import Summand, around, sorted_stacks, squared_distances


@final
@dataclass(frozen=True)
class Bulyan:
    """Choose n - 2 f of n replies by Krum; of each number, average the n - 4 f near the median.

    All clients count alike, whatever `weighting` says: a weight is one more thing to lie about.
    """

    paper: ClassVar[str] = "Bulyan: El Mhamdi et al. 2018, arXiv 1802.07927"
    name: ClassVar[str] = "bulyan"
    malicious: Annotated[int, Ge(0)] = 1
    """Replies of a round that may be forged, f. With fewer than 4 f + 3 replies a round changes
    nothing."""

    @property
    def least(self) -> int:
        """Return 4 f + 3, below which the paper promises nothing."""
        return 4 * self.malicious + 3

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with Bulyan as its merge; BadInput where it is no method of means."""
        del owner  # nothing is kept on the server
        return around(method, self)

    def merged(self, summands: Sequence[Summand]) -> dict[str, Tensor]:
        """Return the means of the numbers nearest to the medians of the chosen replies."""
        chosen = [summands[index] for index in self._chosen(squared_distances(summands))]
        count = len(chosen)
        near = count - 2 * self.malicious
        means: dict[str, Tensor] = {}
        for name, stack in sorted_stacks(chosen).items():
            middle = (stack[(count - 1) // 2] + stack[count // 2]) / 2
            nearest = (stack - middle).abs().argsort(dim=0, stable=True)[:near]
            means[name] = stack.gather(0, nearest).mean(dim=0)
        return means

    def _chosen(self, distances: Tensor) -> list[int]:
        """Return n - 2 f replies: Krum's first among all, then among those that are left, ..."""
        left = list(range(len(distances)))
        chosen: list[int] = []
        for _ in range(len(distances) - 2 * self.malicious):
            among = torch.tensor(left)
            scores = krum_scores(distances[among][:, among], self.malicious)
            chosen.append(left.pop(int(scores.argmin())))
        return chosen
