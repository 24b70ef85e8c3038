"""The coordinate-wise median of replies (Yin et al. 2018, definition 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fedpeft.types import Method
from fedpeft.wrappers.robust import Summand, around, sorted_stacks


@final
@dataclass(frozen=True)
class Median:
    """Take each number's median over the replies instead of its mean.

    All clients count alike, whatever `weighting` says: a weight is one more thing to lie about.
    """

    paper: ClassVar[str] = "coordinate-wise median: Yin et al. 2018, arXiv 1803.01498"
    name: ClassVar[str] = "median"

    @property
    def least(self) -> int:
        """Return 1."""
        return 1

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with a median as its merge; BadInput where it is no method of means."""
        del owner  # nothing is kept on the server
        return around(method, self)

    def merged(self, summands: Sequence[Summand]) -> dict[str, Tensor]:
        """Return the medians; of an even number of replies the mean of the middle two."""
        count = len(summands)
        medians: dict[str, Tensor] = {}
        for name, stack in sorted_stacks(summands).items():
            medians[name] = (stack[(count - 1) // 2] + stack[count // 2]) / 2
        return medians
