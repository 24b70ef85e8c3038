"""LoRA-A2: A and B take turns, and each client trains the ranks that it finds to matter.

Koo et al. 2025.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, ClassVar, Final, final

import torch
from annotated_types import Ge, Gt
from torch import nn

from fedpeft.algebra import choice
from fedpeft.algebra.averaging import Mean, Weighting, weight_of
from fedpeft.algebra.importance import pack
from fedpeft.algebra.lowrank import by_module, deltas
from fedpeft.algebra.ranks import share_of
from fedpeft.errors import BadInput
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import Targets, mounted, plain_parameters, specs, summed, trainable
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update

PROBE: Final = 0
"""The phase in which clients find out which ranks matter; in the next one they train these."""
_SENT: Final = "!sent/"  # "!": for the next exchange alone (``wire/versions.py``)
_CHOSEN: Final = "!chosen"


@final
@dataclass(frozen=True)
class LoRAA2:
    """Train B in one round and A in the next, each client the ranks that matter most to it.

    A round has two exchanges. First a client trains the whole factor, to say which ranks change
    its product B A the most, over all layers. Then it trains these from where the round began, and
    sends their differences; all others count as 0. The factor at rest is everybody's, so the
    average is exact. Reconstruction: the head, which the paper freezes, is trained in both.
    """

    paper: ClassVar[str] = "LoRA-A2: Koo et al. 2025, arXiv 2410.22815"
    trainings: ClassVar[int] = 2
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 16
    """Rank r_G of every adapter, of which clients choose; the 16 of the paper's figure 3."""
    chosen: Annotated[int, Ge(1)] = 2
    """Ranks r_i that a client trains and sends, as a mean over the layers; the paper tries 1 to 8.
    One of lower capacity has its share of them."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    b_rate: Annotated[float, Gt(0)] = 5.0
    """What learning rates are multiplied by in rounds that train B, the paper's 5; that of the head
    as well (reconstruction)."""
    probe_steps: Annotated[int, Ge(1)] | None = None
    """Most optimizer steps in which a client finds its ranks; left out: as many as it trains with.
    The paper takes one of its five epochs."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples, as in the paper, or all alike."""

    @cached_property
    def lora(self) -> LoRA:
        """Return the method that trains both factors in full."""
        return LoRA(self.targets, self.rank, self.scale)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does: A random, B = 0."""
        if self.chosen > self.rank:
            raise BadInput(f"method.chosen = {self.chosen}: choose 1 to method.rank = {self.rank}")
        return self.lora.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head, and how many ranks to choose; then the form of the reply."""
        # Both are told by shapes, without any number in them.
        if state.phase == PROBE:
            ranks = self.chosen * len(by_module(state.shared))
            count = share_of(client, ranks, "method.chosen * layers")
            return {**state.shared, "budget": torch.empty(count, 0)}
        forms = choice.forms(state, client, choice.turn(state.round)[0])
        return {name: torch.empty(*form, 0) for name, form in forms.items()}

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount both factors; train the whole of one to choose ranks, or the chosen ones."""
        part, _ = choice.turn(context.round)
        probing, training = self._probing(model, down, part), self._training(model, memory, part)
        with probing if context.phase == PROBE else training as task:
            yield replace(task, rate=self.b_rate if part == "B" else 1.0)

    @contextmanager
    def _probing(self, model: nn.Module, down: Payload, part: str) -> Iterator[LocalTask]:
        """Train one factor and the head, and reply with the ranks that have moved the most."""
        sent = dict(down)
        count = sent.pop("budget").shape[1]  # (K, count, 0)
        trained = trainable({n: t for n, t in sent.items() if n.endswith(f":{part}")})
        trained |= trainable(plain_parameters(sent))
        whole = {**sent, **trained}

        def reply() -> tuple[Payload, Payload]:
            chosen = choice.highest(choice.contributions(sent, trained, part), count)  # (K, n)
            stays = {f"{_SENT}{name}": tensor for name, tensor in sent.items()}
            return {"chosen": pack(chosen)}, {**stays, _CHOSEN: chosen}

        difference = partial(deltas, whole, self.scale)
        with mounted(model, whole, self.scale):
            yield LocalTask(trained, reply, difference, steps=self.probe_steps)

    @contextmanager
    def _training(self, model: nn.Module, memory: Payload, part: str) -> Iterator[LocalTask]:
        """Train the chosen ranks of one factor and the head, and reply with their differences."""
        sent = {n.removeprefix(_SENT): t for n, t in memory.items() if n.startswith(_SENT)}
        split = choice.Split.of(sent, memory[_CHOSEN], part)
        begin = split.moving | plain_parameters(sent)
        trained = trainable(begin)
        branches = trained | split.frozen

        def reply() -> tuple[Payload, Payload]:
            moved = {name: tensor.detach() - begin[name] for name, tensor in trained.items()}
            # A newer memory, with nothing in it, is what frees the client of what it was sent.
            done = torch.zeros(len(memory[_CHOSEN]), 0)
            return split.gathered(moved) | plain_parameters(moved), {"!done": done}

        difference = partial(summed, [branches, split.resting], self.scale)
        with mounted(model, branches, self.scale), mounted(model, split.resting, self.scale):
            yield LocalTask(trained, reply, difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect one bit a rank; then the differences of the chosen ranks and of the head."""
        if state.phase == PROBE:
            size = (choice.num_ranks(state.shared) + 7) // 8
            return {"chosen": torch.empty(size, dtype=torch.uint8, device="meta")}
        forms = {name: torch.empty(form.shape[:2], device="meta") for name, form in down.items()}
        return {**forms, **specs(plain_parameters(state.shared))}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Note what each client has chosen; then add the mean difference."""
        if state.phase == PROBE and (chosen := choice.noted(state, updates)):
            return replace(state, phase=PROBE + 1, server=chosen)
        # Algorithm 1: B <- B + sum_k p_k dB_k, over all that have answered.
        (part, _), total = choice.turn(state.round), Mean()
        for update in updates:
            total.add(choice.scattered(state, update, part), weight_of(update, self.weighting))
        shared = dict(state.shared)
        for name, difference in total.result().items():
            shared[name] = shared[name] + difference
        return State(state.round + 1, shared, memories=state.memories)
