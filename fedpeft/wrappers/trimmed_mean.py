"""The coordinate-wise trimmed mean of replies (Yin et al. 2018, definition 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Lt
from torch import Tensor

from fedpeft.types import Method
from fedpeft.wrappers.robust import Summand, around, sorted_stacks


@final
@dataclass(frozen=True)
class TrimmedMean:
    """Leave each number's largest and smallest replies out of its mean.

    All clients count alike, whatever `weighting` says: a weight is one more thing to lie about.
    """

    paper: ClassVar[str] = "coordinate-wise trimmed mean: Yin et al. 2018, arXiv 1803.01498"
    name: ClassVar[str] = "trimmed_mean"
    share: Annotated[float, Ge(0), Lt(0.5)] = 0.2
    """Share of the replies that is left out at either end, rounded down to whole replies."""

    @property
    def least(self) -> int:
        """Return 1."""
        return 1

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with a trimmed mean as its merge; BadInput for a merge of no means."""
        del owner  # nothing is kept on the server
        return around(method, self)

    def merged(self, summands: Sequence[Summand]) -> dict[str, Tensor]:
        """Return the trimmed means."""
        count = len(summands)
        cut = int(self.share * count)
        means: dict[str, Tensor] = {}
        for name, stack in sorted_stacks(summands).items():
            means[name] = stack[cut : count - cut].mean(dim=0)
        return means
