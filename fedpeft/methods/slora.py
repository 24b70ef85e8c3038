"""SLoRA: a first stage, sparse or full, whose SVD starts LoRA (Babakniya et al. 2023)."""

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal, final

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting
from fedpeft.algebra.lowrank import check_ranks, uniform
from fedpeft.algebra.svd import Split, principal
from fedpeft.errors import BadInput
from fedpeft.methods.full import FullStage
from fedpeft.methods.lora import LoRA
from fedpeft.methods.sparse import Sparse
from fedpeft.mounting import Targets, select
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update, WorthTuning
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
    """Which dense layers are adapted, in both stages: `attention`, `all-linear`, a pattern or a
    list of endings."""
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
    """Where the singular values go: `left` all to B, the paper's B = U S, A = V^T; `right` all to
    A; `sqrt` gives half each."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r; the paper's 1."""
    weighting: Weighting = "uniform"
    """How clients are averaged: all alike, the paper's plain mean, or by their examples."""
    stage1_rate: Annotated[float, Gt(0), WorthTuning((0.1, 0.3, 1.0))] = 1.0
    """What learning rates are multiplied by in stage 1; reconstruction, as no rate was printed."""
    stage1_method: Literal["sparse", "full"] = "sparse"
    """How stage 1 trains: SLoRA's `sparse` tuning, or `full` fine-tuning of every parameter, the
    paper's upper variant. Of that, what is in adapted layers starts LoRA, the head goes on, and all
    else is as it was pre-trained again (reconstruction)."""

    @cached_property
    def stages(self) -> Staged:
        """Return the two stages and the bridge between them."""
        methods: Mapping[str, Sparse | FullStage] = {
            "sparse": Sparse(self.targets, self.density, self.weighting),
            "full": FullStage(self.targets, self.weighting),
        }
        first = methods[self.stage1_method]
        lora = LoRA(self.targets, self.rank, self.scale, self.weighting)

        def bridge(state: State) -> State:
            """Return the first state of stage 2 (appendix A): one SVD a matrix, on the server."""
            seed = int(state.server["seed"])
            factors: dict[str, Tensor] = {}
            # dW = W_R1 - W_0 becomes B_0 A_0 on the base W_0. Nothing is subtracted from the base:
            # what stage 1 learnt is in the factors, up to rank r, and nowhere else.
            for name, difference in first.differences(state).items():
                B, A = self._start(name, difference, seed)
                factors |= {f"{name}:B": B, f"{name}:A": A}
            return State(state.round, factors | first.head(state), memories=state.memories)

        return Staged(first, lora, bridge, self._sparse_rounds(), (self.stage1_rate, 1.0))

    def init(self, base: Base, seed: int) -> State:
        """Start with the first stage, at no difference to the base."""
        try:
            re.compile(self.pre_classifier)
        except re.error as error:
            setting = f"method.pre_classifier = {self.pre_classifier!r}"
            raise BadInput(f"{setting} is not a regular expression: {error}") from error
        # Ranks are for stage 2, but a rank that is too large should not cost stage 1 first.
        for name, weight in select(base, self.targets).items():
            rank = self._rank(name)
            field = "rank" if rank == self.rank else "pre_classifier_rank"
            check_ranks({name: weight}, rank, f"method.{field}")
        return self.stages.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send what stage 1 trains, or the factors in stage 2, and the head."""
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

    def mean_merge(self, round_number: int) -> MeanMerge | None:
        """Return ``receive`` as a merge of means: both stages average."""
        return self.stages.mean_merge(round_number)

    def _sparse_rounds(self) -> int:
        """Return how many rounds stage 1 has, R1 in the paper."""
        # A share that rounds to 0 rounds still asks for a first stage; a run of one round has none
        # to spare.
        least = 1 if self.stage1 > 0 and self.rounds > 1 else 0
        return max(least, round(self.stage1 * self.rounds))

    def _start(self, module: str, difference: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the (B, A) with which stage 2 begins in ``module``, (out, r) and (r, in).

        ``difference``: what stage 1 learnt there, (out, in).
        """
        rank = self._rank(module)
        if difference.any():
            # Appendix A: dW = U S V^T, B_0 = U_r S_r and A_0 = V_r^T. Divided by the scale first,
            # so that scale * B_0 A_0 is the best approximation of dW of rank r (Eckart-Young).
            return principal(difference / self.scale, rank, self.split)
        # The SVD of 0 gives B = 0 with some arbitrary A: LoRA's random one is as good, and known.
        out, width = difference.shape
        B = difference.new_zeros(out, rank)
        A = uniform(rank, width, seed, module).to(difference)
        return B, A

    def _rank(self, module: str) -> int:
        """Return r for one layer: the one before the classifier has its own."""
        return self.pre_classifier_rank if re.search(self.pre_classifier, module) else self.rank
