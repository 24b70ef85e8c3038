"""A method without training: every client adds numbers that the test chooses, so that the test knows what goes up."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update

Moves = Callable[[int, int], Mapping[str, Tensor]]
"""(round, client) -> what the client adds to the tensors of these names."""

SHAPES: Mapping[str, tuple[int, ...]] = {"wide": (3, 40), "tall": (40, 3), "bias": (7,), "one": ()}


def drawn(seed: int = 0, scale: float = 0.1) -> Moves:
    """Return moves of normal numbers in all tensors."""

    def moves(round_number: int, client: int) -> Mapping[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 * seed + 10 * round_number + client)
        return {name: scale * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}

    return moves


@final
@dataclass(frozen=True)
class Drifting:
    """Send what is shared; get it back moved, and averaged; ``told`` has what the server was told, round by round.

    Beside it a whole number goes up, which nobody may touch.
    """

    paper: ClassVar[str] = "a toy"
    moves: Moves
    weighting: Weighting = "examples"
    told: list[dict[int, Payload]] = field(default_factory=list)

    def init(self, base: Base, seed: int) -> State:
        draw = torch.Generator().manual_seed(5)
        return State(
            0, {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        )

    def send(self, state: State, client: Client) -> Payload:
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        assert not memory, "a wrapper's memory is none of the method's"

        def reply() -> tuple[Payload, Payload]:
            up = {
                name: tensor.clone() for name, tensor in self._moving(down, context.round).items()
            }
            for row, client in enumerate(context.clients):
                for name, move in self.moves(context.round, client).items():
                    up[name][row] += move
            up["votes"] = torch.tensor(context.clients, dtype=torch.int64)
            return up, {}

        yield LocalTask({}, reply, steps=0)

    def _moving(self, down: Payload, round_number: int) -> dict[str, Tensor]:
        names = self.moves(round_number, 0).keys()
        return {name: tensor for name, tensor in down.items() if name in names}

    def expects(self, state: State, down: Payload) -> Mapping[str, Any]:
        moving = self._moving(down, state.round)
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in moving.items()}
        return {**meta, "votes": torch.empty((), dtype=torch.int64, device="meta")}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        self.told.append({})

        def noted() -> Iterator[Update]:
            for update in updates:
                payload = dict(update.payload)
                assert int(payload.pop("votes")) == update.client.id
                self.told[-1][update.client.id] = payload
                yield Update(update.client, update.examples, payload)

        return averaged(state, noted(), self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        def contribution(payload: Payload) -> Payload:
            return {name: tensor for name, tensor in payload.items() if name != "votes"}

        merge = plain_mean(self.weighting)
        return MeanMerge(self.weighting, contribution, merge.merge)
