"""AdaLoRA in federation: averaged triplets, of which the most important ones count.

Zhang et al. 2023.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, MeanMerge, Weighting
from fedpeft.algebra.importance import Importance, cubic_budget
from fedpeft.algebra.lowrank import by_module, check_ranks, deltas, orthogonality
from fedpeft.mounting import Targets, detached, mounted, select, specs, trainable
from fedpeft.seeds import generator
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class AdaLoRA:
    """Average B, e and A of W + B diag(e) A, and let fewer and fewer e be other than 0.

    Clients send the scores of their ranks, too. The server sets e to 0 in all but the highest mean
    scores. Every rank goes on being trained and sent, so it may come back: unlike FedARA's it never
    dies. That scores are averaged and cut on the server is a reconstruction.
    """

    paper: ClassVar[str] = "AdaLoRA: Zhang et al. 2023, arXiv 2303.10512"
    rounds: Annotated[int, Ge(1)] = 20
    """Rounds of the whole run; where it is left out, `federation.rounds`."""
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 12
    """Rank r of every adapter; the 12 with which peft's AdaLoRA starts."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B E A is multiplied by."""
    kept: Annotated[float, Gt(0), Le(1)] = 0.66
    """Share of all ranks that count at the end; peft's 8 of 12."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the rounds before the cubic decay of the number of ranks; reconstruction."""
    settled: Annotated[float, Ge(0), Le(1)] = 0.3
    """Share of the rounds after the cubic decay; reconstruction."""
    beta1: Annotated[float, Ge(0), Le(1)] = 0.85
    """Smoothing of the sensitivity over steps, peft's 0.85."""
    beta2: Annotated[float, Ge(0), Le(1)] = 0.85
    """Smoothing of its uncertainty over steps, peft's 0.85."""
    deviation: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of the normal draw of A and B, peft's 0.02."""
    orthogonality: Annotated[float, Ge(0)] = 0.5
    """Weight in the loss of |A A^T - I| + |B^T B - I|; peft's 0.5."""
    weighting: Weighting = "examples"
    """How clients' factors and scores are averaged: by their examples, or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Draw A and B from N(0, deviation^2) and set e to 0, so that the model is unchanged."""
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        start: dict[str, Tensor] = {}
        for name, weight in layers.items():
            out, width = weight.shape
            draw = generator(seed, "adalora", name)
            start[f"{name}:A"] = self.deviation * torch.randn(self.rank, width, generator=draw)
            start[f"{name}:B"] = self.deviation * torch.randn(out, self.rank, generator=draw)
            start[f"{name}:e"] = torch.zeros(self.rank)
        return State(0, start | base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send all triplets and the head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount a branch on every module; score its ranks as they train."""
        del memory
        trained = trainable(down)  # A (K, r, in), B (K, out, r), e (K, r); head
        clients = len(context.clients)
        importance = Importance(trained, clients, "sensitivity", self.beta1, self.beta2)

        def after_backward(active: slice) -> None:
            if self.orthogonality > 0:
                # AdaLoRA, equation 4, its gradient added to that of the loss.
                factors = {n: tensor[active] for n, tensor in trained.items() if ":" in n}
                torch.autograd.backward(self.orthogonality * orthogonality(factors))
            importance.update(active)

        def reply() -> tuple[Payload, Payload]:
            return {**detached(trained), "scores": importance.scores()}, {}

        difference = partial(deltas, trained, self.scale)
        with mounted(model, trained, self.scale):
            yield LocalTask(trained, reply, difference, after_backward)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect all triplets and the head back, and a score of every rank."""
        del state
        count = self.rank * len(by_module(down))
        return {**specs(down), "scores": torch.empty(count, device="meta")}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average triplets, head and scores; set e to 0 where the score is low."""
        return self.mean_merge(state.round).receive(state, updates)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means: scores are averaged, too."""
        del round_number
        return MeanMerge(self.weighting, lambda payload: payload, self._merge)

    def _merge(self, state: State, total: Mean) -> State:
        """Return the next state from the sums of all that goes up."""
        merged = total.result()
        if not merged:
            return replace(state, round=state.round + 1)
        scores = merged.pop("scores")
        shared = {**state.shared, **self._pruned(merged, scores, state.round)}
        return replace(state, round=state.round + 1, shared=shared)

    def _pruned(self, merged: Payload, scores: Tensor, round_number: int) -> dict[str, Tensor]:
        """Return ``merged`` with e = 0 in all ranks but those of the budget's highest scores.

        ``scores``: (n,), of the ranks of all modules in alphabetical order.
        """
        budget = cubic_budget(
            round_number + 1,
            len(scores),
            rounds=self.rounds,
            kept=self.kept,
            warmup=self.warmup,
            settled=self.settled,
        )
        counts = torch.zeros(len(scores), dtype=torch.bool)
        counts[scores.argsort(descending=True, stable=True)[:budget]] = True
        if not scores.any():  # as after one step from e = 0: nothing is known of any rank
            counts[:] = True
        pruned = dict(merged)
        modules = sorted(by_module(merged))
        for module, keeps in zip(modules, counts.view(-1, self.rank), strict=True):
            pruned[f"{module}:e"] = merged[f"{module}:e"] * keeps
        return pruned
