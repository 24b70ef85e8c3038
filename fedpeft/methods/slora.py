"""SLoRA: a sparse first stage whose SVD starts LoRA (Babakniya et al. 2023)."""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import Weighting
from fedpeft.algebra.lowrank import Split, check_ranks, principal, uniform
from fedpeft.errors import BadInput
from fedpeft.methods.lora import LoRA
from fedpeft.methods.sparse import Sparse
from fedpeft.mounting import Targets, select
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update
from fedpeft.wrappers.staged import Staged


@final
@dataclass(frozen=True)
class SLoRA:
    """Sparse tuning under one mask, then LoRA from the SVD of its difference; the base stays W_0.

    A layer in which stage 1 found no difference, for want of rounds or of replies, has no SVD to
    start from: it starts as in LoRA, A random and B = 0 (reconstruction). With ``stage1`` = 0 that
    is every layer, and the run is LoRA's.
    """

    paper: ClassVar[str] = "SLoRA: Babakniya et al. 2023, arXiv 2308.06522"
    rounds: Annotated[int, Ge(1)] = 20
    """Rounds of the whole run; where it is left out, `federation.rounds`."""
    targets: Targets = "all-linear"
    """Which dense layers are adapted, in both stages: `attention`, `all-linear`, a pattern or a list
    of endings."""
    density: Annotated[float, Gt(0), Le(1)] = 0.10
    """Share of each matrix that stage 1 trains; the paper's 10 %."""
    stage1: Annotated[float, Ge(0), Le(1)] = 0.2
    """Share of the rounds spent in stage 1, rounded to whole rounds; above 0 it is at least one, of
    two rounds or more. Reconstruction: the paper prints 100 rounds."""
    rank: Annotated[int, Ge(1)] = 10
    """Rank r of the adapters; the paper's 10."""
    pre_classifier_rank: Annotated[int, Ge(1)] = 18
    """Rank of adapted layers whose name matches `pre_classifier`; the paper's 18."""
    pre_classifier: str = r"pooler\.dense$|pre_classifier$|classifier\.dense$"
    """Pattern that is searched in the names of layers, to find the one before the classifier."""
    split: Split = "left"
    """Where the singular values go: `left` all to B, the paper's B = U S, A = V^T; `right` all to A;
    `sqrt` gives half each."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r; the paper's 1."""
    weighting: Weighting = "uniform"
    """How clients are averaged: all alike, the paper's plain mean, or by their examples."""
    stage1_rate: Annotated[float, Gt(0)] = 1.0
    """What learning rates are multiplied by in stage 1; reconstruction, as no rate was printed."""

    @cached_property
    def stages(self) -> Staged:
        """Return the two stages and the bridge between them."""
        sparse = Sparse(self.targets, self.density, self.weighting)
        lora = LoRA(self.targets, self.rank, self.scale, self.weighting)

        def bridge(state: State) -> State:
            seed = int(state.server["seed"])
            factors: dict[str, Tensor] = {}
            for name, difference in sparse.differences(state).items():
                B, A = self._start(name, difference, seed)
                factors |= {f"{name}:B": B, f"{name}:A": A}
            head = {name: tensor for name, tensor in state.shared.items() if ":" not in name}
            return State(state.round, factors | head, memories=state.memories)

        return Staged(sparse, lora, bridge, self._sparse_rounds(), (self.stage1_rate, 1.0))

    def init(self, base: Base, seed: int) -> State:
        """Start with the sparse stage, at no difference to the base."""
        try:
            re.compile(self.pre_classifier)
        except re.error as error:
            given = f"method.pre_classifier = {self.pre_classifier!r}"
            raise BadInput(f"{given} is not a regular expression: {error}") from error
        for name, weight in select(base, self.targets).items():
            field = "rank" if self._rank(name) == self.rank else "pre_classifier_rank"
            check_ranks({name: weight}, self._rank(name), f"method.{field}")
        return self.stages.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send the masked values in stage 1, the factors in stage 2, and the head."""
        return self.stages.send(state, client)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount as the stage under way does."""
        return self.stages.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect back what went down."""
        return self.stages.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average, and after the last round of stage 1 factorise the difference."""
        return self.stages.receive(state, updates)

    def _sparse_rounds(self) -> int:
        """Return how many rounds stage 1 has."""
        least = 1 if self.stage1 > 0 and self.rounds > 1 else 0
        return max(least, round(self.stage1 * self.rounds))

    def _start(self, module: str, difference: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the (B, A) with which stage 2 begins in ``module``, whose (out, in) difference stage 1 found."""
        rank = self._rank(module)
        if difference.any():
            return principal(difference / self.scale, rank, self.split)
        out, width = difference.shape
        return difference.new_zeros(out, rank), uniform(rank, width, seed, module).to(difference)

    def _rank(self, module: str) -> int:
        return self.pre_classifier_rank if re.search(self.pre_classifier, module) else self.rank
