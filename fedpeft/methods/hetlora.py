"""HetLoRA: clients of unequal ranks, padded with zeros and weighted by norm (Cho et al. 2024)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean
from fedpeft.algebra.lowrank import by_module
from fedpeft.algebra.products import product_norm
from fedpeft.algebra.ranks import cut, ranks_in, share_of
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import Targets, specs
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class HetLoRA:
    """Send each client the first ranks of A and B, and average with zeros for those it lacks.

    A client counts by the norm of its product B A. Ranks of which it makes little are pruned: it is
    sent fewer from then on.
    """

    paper: ClassVar[str] = "HetLoRA: Cho et al. 2024, arXiv 2401.06432"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of a client of full capacity; others have their capacity's share of it."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    weighting: Literal["norm", "examples", "uniform"] = "norm"
    """What a client counts by: the Frobenius norm of its product B A over all layers (the paper's
    appendix), its examples (another reading, in code), or all alike."""
    decay: Annotated[float, Gt(0), Le(1)] = 0.99
    """Share of a client's ranks that is not held back by the penalty; 1 never prunes.
    Reconstruction."""
    penalty: Annotated[float, Ge(0)] = 0.005
    """Weight in the loss of |B'| |A'|, the norms of the ranks beyond that share; 0 never prunes.
    Reconstruction."""

    @cached_property
    def lora(self) -> LoRA:
        """Return the method that each client runs at its own rank."""
        return LoRA(self.targets, self.rank, self.scale)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does: A random, B = 0."""
        return self.lora.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send as many ranks of A and B as the client has left, and the head."""
        most = share_of(client, self.rank)
        left = state.server.get(_pruned(client.id))  # 0-d; missing as long as nothing was pruned
        return cut(state.shared, most if left is None else min(most, int(left)))

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as LoRA does; hold back the last ranks, and say in the end how many are left."""
        rank, clients = ranks_in({n: t[0] for n, t in down.items()}), len(context.clients)
        first = self._first_held_back(rank)
        with self.lora.mount(model, down, memory, context) as task:
            before = _tail_norms(task.trainable, first, clients)

            def after_backward(active: slice) -> None:
                if first < rank and self.penalty > 0:
                    # The gradient of the term is added to that of the loss, of active clients only.
                    norms = _tail_norms(task.trainable, first, clients)
                    torch.autograd.backward(self.penalty * norms[active].sum())

            def reply() -> tuple[Payload, Payload]:
                up, stays = task.reply()
                after = _tail_norms(task.trainable, first, clients).detach()
                # Reconstruction: the tail is pruned where training has made it smaller.
                prunes = (after < before.detach()) & (first < rank)
                left = torch.where(prunes, first, rank).to(torch.int64)  # (K,)
                return {**up, "rank": left.cpu()}, stays

            yield replace(task, reply=reply, after_backward=after_backward)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A and B of the client's rank and the head back, and the rank that is left."""
        del state
        return {**specs(down), "rank": torch.empty((), dtype=torch.int64, device="meta")}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Pad every client's factors with zeros, average them, and note what was pruned."""
        means = Mean()
        server = dict(state.server)
        for update in updates:
            payload = dict(update.payload)
            left = int(payload.pop("rank"))
            had = ranks_in(payload)
            # The head has no ranks; it is averaged with the same weight.
            means.add(_padded(payload, state.shared), self._weight(update, payload))
            if 1 <= left < had:
                server[_pruned(update.client.id)] = torch.tensor(left)
        shared = {**state.shared, **means.result()}
        return replace(state, round=state.round + 1, shared=shared, server=server)

    def _first_held_back(self, rank: int) -> int:
        """Return the first of ``rank`` ranks that the penalty holds back; ``rank`` for none."""
        return max(1, int(self.decay * rank)) if self.penalty > 0 else rank

    def _weight(self, update: Update, payload: Payload) -> float:
        """Return what a client counts for, before the weights are divided by their sum."""
        match self.weighting:
            case "norm":
                # One that has learnt nothing counts nearly nothing, but the sum is never 0.
                return max(product_norm(payload), 1e-12)
            case "examples":
                return float(update.examples)
            case "uniform":
                return 1.0


def _pruned(client: int) -> str:
    """Return the name under which the server keeps the rank that is left to a client."""
    return f"rank of client {client}"


def _tail_norms(tensors: Payload, first: int, clients: int) -> Tensor:
    """Return the sum over layers of |B'| |A'|, of ranks from ``first`` on, by client: (K,)."""
    total = torch.zeros(clients)
    for factors in by_module(tensors).values():
        rows = factors["A"][:, first:].flatten(1).norm(dim=1)  # A is (K, r, in)
        columns = factors["B"][:, :, first:].flatten(1).norm(dim=1)  # B is (K, out, r)
        total = total.to(rows) + rows * columns
    return total


def _padded(payload: Payload, full: Payload) -> dict[str, Tensor]:
    """Return ``payload`` with zeros in the ranks that its factors lack of those in ``full``."""
    padded: dict[str, Tensor] = {}
    for name, tensor in payload.items():
        whole = torch.zeros_like(full[name])
        if name.endswith(":B"):
            whole[:, : tensor.shape[1]] = tensor
        else:
            whole[: len(tensor)] = tensor
        padded[name] = whole
    return padded
