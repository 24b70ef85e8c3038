"""FedARA: W + B E A whose ranks are allocated and pruned by the clients' votes (Wu et al. 2025)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import Weighting, mean, weight_of
from fedpeft.algebra.importance import Importance, Score, Tally, rank_norms
from fedpeft.algebra.lowrank import by_module, check_ranks, deltas, orthogonality
from fedpeft.mounting import Targets, detached, mounted, select, specs, trainable
from fedpeft.seeds import generator
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FedARA:
    """Adapters B diag(e) A; clients score their ranks and vote, and dead ranks leave for good.

    The form W + B E A and its three ideas are the paper's; every number and the scoring are a
    reconstruction after AdaLoRA's code. A client without any score, as after one step from e = 0,
    abstains.
    """

    paper: ClassVar[str] = "FedARA: Wu et al. 2025, arXiv 2501.14406"
    rounds: Annotated[int, Ge(1)] = 20
    """Rounds of the whole run; where it is left out, `federation.rounds`."""
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings.
    Reconstruction."""
    rank: Annotated[int, Ge(1)] = 12
    """Rank r of every adapter at the start; reconstruction."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B E A is multiplied by: alpha / r, kept when ranks drop; reconstruction."""
    kept: Annotated[float, Gt(0), Le(1)] = 0.25
    """Share of all ranks alive at the end; reconstruction."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the rounds before the cubic decay of the number of ranks; reconstruction."""
    settled: Annotated[float, Ge(0), Le(1)] = 0.3
    """Share of the rounds after the cubic decay; reconstruction."""
    threshold: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of the votes that keeps a rank; reconstruction."""
    score: Score = "sensitivity"
    """What ranks are scored by: AdaLoRA's smoothed sensitivity, plain gradient |p * grad|, or
    magnitude |p|. Reconstruction."""
    beta1: Annotated[float, Ge(0), Le(1)] = 0.85
    """Smoothing of the sensitivity over steps; reconstruction, AdaLoRA's 0.85."""
    beta2: Annotated[float, Ge(0), Le(1)] = 0.85
    """Smoothing of its uncertainty over steps; reconstruction, AdaLoRA's 0.85."""
    deviation: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of the normal draw of A and B; reconstruction."""
    orthogonality: Annotated[float, Ge(0)] = 0.0
    """Weight in the loss of |A A^T - I| + |B^T B - I|; reconstruction."""
    weighting: Weighting = "examples"
    """How clients' factors and votes are averaged: by their examples, or all alike. Reconstruction."""

    def init(self, base: Base, seed: int) -> State:
        """Draw A and B from N(0, deviation^2) and set e to 0, so the model starts unchanged; all ranks are alive."""
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        start: dict[str, Tensor] = {}
        for name, (out, width) in {name: weight.shape for name, weight in layers.items()}.items():
            draw = generator(seed, "fedara", name)
            start[f"{name}:A"] = self.deviation * torch.randn(self.rank, width, generator=draw)
            start[f"{name}:B"] = self.deviation * torch.randn(out, self.rank, generator=draw)
            start[f"{name}:e"] = torch.zeros(self.rank)
        alive = {f"{name}:alive": torch.ones(self.rank, dtype=torch.bool) for name in layers}
        return State(0, start | base.heads(), server=alive)

    def budget(self, number: int, total: int) -> int:
        """Return how many of ``total`` ranks may live after round ``number``: AdaLoRA's cubic schedule, in rounds."""
        begin, end = self.warmup * self.rounds, (1 - self.settled) * self.rounds
        last = max(1, round(self.kept * total))
        left = (
            min(1.0, max(0.0, 1 - (number + 1 - begin) / (end - begin)))
            if end > begin
            else float(number + 1 < begin)
        )
        return last + round((total - last) * left**3)

    def send(self, state: State, client: Client) -> Payload:
        """Send the live triplets of every module that has any, the head, and how many ranks the client may vote for."""
        del client
        budget = torch.tensor(
            self.budget(state.round, sum(len(alive) for alive in state.server.values()))
        )
        live = {name: _take(state, name) for name in state.shared}
        return {
            **{name: tensor for name, tensor in live.items() if tensor.numel()},
            "budget": budget,
        }

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount a branch on every module that is still alive; score its ranks as they train, and vote."""
        del memory
        tensors = dict(down)
        budget = int(tensors.pop("budget").max())
        trained = trainable(tensors)
        importance = Importance(trained, len(context.clients), self.score, self.beta1, self.beta2)

        def after_backward(active: slice) -> None:
            if self.orthogonality > 0 and by_module(trained):
                torch.autograd.backward(self.orthogonality * orthogonality(trained))
            importance.update(active)

        def reply() -> tuple[Payload, Payload]:
            return {**detached(trained), "votes": importance.votes(budget)}, {}

        with mounted(model, trained, self.scale):
            yield LocalTask(trained, reply, partial(deltas, trained, self.scale), after_backward)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect the live triplets and the head back, and one bit per live rank, packed into bytes."""
        expected = specs(down)
        del expected["budget"]
        return {
            **expected,
            "votes": torch.empty(-(-_count(state) // 8), dtype=torch.uint8, device="meta"),
        }

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the live triplets and the head; a rank dies when too few clients voted for it, and stays dead."""
        tally = Tally(_count(state))

        def read(update: Update) -> Payload:
            tally.add(update.payload["votes"], weight_of(update, self.weighting))
            return {name: part for name, part in update.payload.items() if name != "votes"}

        merged = mean(updates, self.weighting, read)
        if not merged:
            return replace(state, round=state.round + 1)
        shared = {name: _put(state, name, merged.get(name)) for name in state.shared}
        strengths = [rank_norms(parts) for _, parts in sorted(by_module(merged).items())]
        budget = self.budget(state.round, sum(len(alive) for alive in state.server.values()))
        living = tally.select_ranks(torch.cat([torch.zeros(0), *strengths]), self.threshold, budget)
        server, begin = dict(state.server), 0
        for name, alive in sorted(state.server.items(), key=lambda item: item[0].partition(":")[0]):
            end = begin + int(alive.sum())
            server[name] = alive.masked_scatter(alive, living[begin:end])
            begin = end
        return replace(state, round=state.round + 1, shared=shared, server=server)


def _count(state: State) -> int:
    """Return the number of live ranks over all modules."""
    return sum(int(alive.sum()) for alive in state.server.values())


def _alive(state: State, name: str) -> Tensor | slice:
    """Return the index of what lives along the rank axis of tensor ``name``: all of it, for the head."""
    return (
        state.server.get(f"{name.partition(':')[0]}:alive", slice(None))
        if ":" in name
        else slice(None)
    )


def _take(state: State, name: str) -> Tensor:
    """Return the live part of shared tensor ``name``; the rank is B's last axis and the first of all others."""
    alive, tensor = _alive(state, name), state.shared[name]
    return tensor[:, alive] if name.endswith(":B") else tensor[alive]


def _put(state: State, name: str, live: Tensor | None) -> Tensor:
    """Return shared tensor ``name`` with ``live`` in the place of its live part; unchanged where the module is dead."""
    if live is None:
        return state.shared[name]
    alive, tensor = _alive(state, name), state.shared[name].clone()
    tensor[(slice(None), alive) if name.endswith(":B") else (alive,)] = live
    return tensor
