"""Where low-rank methods start: at LoRA's random A, or at FeDeRA's principal components."""

from typing import Literal

from fedpeft.algebra.averaging import Weighting
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import Targets

Start = Literal["random", "orthogonal", "principal"]
"""``random``: LoRA's. ``orthogonal``: A with orthonormal rows. ``principal``: FeDeRA's."""


def begun(
    start: Start, targets: Targets, rank: int, scale: float, weighting: Weighting
) -> LoRA | FeDeRA:
    """Return the method that trains A and B from ``start`` and averages each of them."""
    if start == "principal":
        return FeDeRA(targets, rank, scale, weighting=weighting)
    return LoRA(targets, rank, scale, weighting, start)
