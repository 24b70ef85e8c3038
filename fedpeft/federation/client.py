"""A machine that can play clients: bytes in, bytes out, no I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from fedpeft.errors import WireError
from fedpeft.ledger import Measured, measured
from fedpeft.tasks import Encoded, Task, examples_in
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.evaluation import score
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Share, Training, fit, optimizer_of, own_randomness, plan
from fedpeft.types import Context, LocalTask, Method, Payload
from fedpeft.wire.messages import Kind, Request, Response, decode, encode
from fedpeft.wire.versions import carried, joined, parted


@final
@dataclass(frozen=True)
class ClientData:
    """What one client holds: its training examples and, for scores of its own, its part of the test set."""

    train: Encoded
    test: Encoded


MountedForm = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
"""(name, shape, dtype) of every tensor that is mounted for one client."""


@final
@dataclass(frozen=True, kw_only=True)
class Worker:
    """Plays the clients in ``client_data`` with one method on one frozen model.

    ``head``: names of the head's parameters. ``config``: digest of what server and client must
    agree on; a request for anything else raises WireError. ``cache``: what is kept of frozen
    blocks between rounds. ``step_alone``: seconds of one step of a client alone, by what is mounted,
    found out when clients first train side by side with it; None where nobody wants to know.
    """

    method: Method
    model: nn.Module
    task: Task
    client_data: Mapping[int, ClientData]
    training: Training
    hardware: Hardware
    head: frozenset[str]
    seed: int
    config: bytes
    cache: ActivationCache = field(default_factory=ActivationCache)
    step_alone: dict[MountedForm, float] | None = field(default_factory=dict)

    def handle(
        self, clients: Sequence[int], requests: Sequence[bytes], memories: Sequence[bytes]
    ) -> Sequence[tuple[bytes, bytes]]:
        """Answer one request for each of ``clients``, which train side by side as one stack.

        ``memories``: what each client holds as of the version its request assumes, empty for none. Returns (answer, new
        memory) for each, the memory empty where it stays as it was. Requests of different kinds or rounds, or for
        clients that are not held here, raise WireError. An error of any kind comes with a note that
        names clients and round.
        """
        asked = [Request.decode(blob, self.config) for blob in requests]
        if len({(request.kind, request.round) for request in asked}) != 1:
            raise WireError("the requests of one stack differ in kind or round")
        for client in clients:
            if client not in self.client_data:
                raise WireError(f"client {client} is not held here")
        held = [decode(blob) if blob else {} for blob in memories]
        play = {Kind.TRAIN: self._train, Kind.EVALUATE: self._evaluate}[asked[0].kind]
        try:
            return play(clients, asked, held)
        except Exception as error:
            whose = ", ".join(str(client) for client in clients)
            error.add_note(f"raised by the work of client {whose} in round {asked[0].round}")
            raise

    def _train(
        self, clients: Sequence[int], asked: Sequence[Request], held: Sequence[Payload]
    ) -> list[tuple[bytes, bytes]]:
        number = asked[0].round
        shares = [self._share(client, number) for client in clients]
        for client, share in zip(clients, shares, strict=True):
            if not share.steps:
                raise WireError(f"client {client} holds no examples to train on")
        order = sorted(range(len(clients)), key=lambda k: -len(shares[k].steps))
        self.cache.trace(self.model, self._forward, shares[0].examples.take([0]))
        context = Context([clients[k] for k in order], number, self.seed)
        down, memory = (
            self._stack([asked[k].payload for k in order]),
            self._stack([held[k] for k in order]),
        )
        own, kept = parted(memory)
        with (  # noqa: SIM117  # what is mounted is measured, too
            measured(self.hardware.torch_device) as meter,
            own_randomness(self.seed, context.clients[0], number),
        ):
            with self.method.mount(self.model, down, own, context) as local:
                ready = self._with_states(context.clients, [shares[k] for k in order])
                losses, kept = self._fit(local, ready, kept)
                up, stays = local.reply()
                remembered = joined(stays, own, kept)
                trained = sum(parameter[0].numel() for parameter in local.trainable.values())
        a_step = self._seconds_alone(down, own, context, ready[0]) if len(clients) > 1 else None
        all_steps = sum(len(share.steps) for share in shares)
        answers: list[tuple[bytes, bytes]] = [(b"", b"")] * len(clients)
        for row, k in enumerate(order):
            steps = len(shares[k].steps)
            seconds = meter.seconds * steps / all_steps
            figures = Measured(
                examples=len(shares[k].examples),
                steps=steps,
                trained=trained,
                loss=float(losses[row]),
                seconds=seconds,
                seconds_alone=seconds if a_step is None else steps * a_step,
                peak_memory=meter.peak_memory,
                shared_by=len(clients),
            )
            version = _version(number, asked[k].memory, stays, remembered)
            answer = Response(number, _row(up, row), figures, memory=version)
            answers[k] = answer.encode(), encode(_row(remembered, row)) if remembered else b""
        return answers

    def _fit(
        self,
        local: LocalTask,
        shares: Sequence[Share],
        kept: Payload,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train ``local``; return the losses, (K,), and what is kept of the optimizer, if anything.

        ``kept``: the same from the rounds before, stacked over K.
        """
        optimizer = optimizer_of(local, self.training, self.head, kept)
        losses = fit(
            self.model,
            local,
            self.task,
            shares,
            self.training,
            self.head,
            self.hardware,
            self.cache,
            optimizer,
        )
        return losses, optimizer.state() if self.training.keep_optimizer else {}

    def _seconds_alone(
        self,
        down: Payload,
        memory: Payload,
        context: Context,
        share: Share,
    ) -> float | None:
        """Return the seconds that a step takes one client alone; None where nobody wants to know.

        Found out once for what is mounted, (K, ...), by a step of the first client whose outcome is
        thrown away: nothing that is computed elsewhere depends on it.
        """
        if self.step_alone is None:
            return None
        form = _form_of_one({**memory, **down})
        if form not in self.step_alone:
            one = replace(context, clients=context.clients[:1])
            first = replace(share, steps=share.steps[:1])
            with (
                own_randomness(self.seed, one.clients[0], one.round),
                self.method.mount(self.model, _first(down), _first(memory), one) as local,
                measured(self.hardware.torch_device) as meter,
            ):
                self._fit(local, [first], {})
            self.step_alone[form] = meter.seconds
        return self.step_alone[form]

    def _evaluate(
        self, clients: Sequence[int], asked: Sequence[Request], held: Sequence[Payload]
    ) -> list[tuple[bytes, bytes]]:
        answers = []
        for client, request, own in zip(clients, asked, held, strict=True):
            context = Context([client], request.round, self.seed)
            down, (memory, _) = self._stack([request.payload]), parted(self._stack([own]))
            with (
                measured(self.hardware.torch_device) as meter,
                self.method.mount(self.model, down, memory, context),
            ):
                counts = score(self.model, self.task, self.client_data[client].test, self.hardware)
            figures = Measured(
                examples=examples_in(counts),
                loss=float(counts["loss"]),
                seconds=meter.seconds,
                seconds_alone=meter.seconds,
                peak_memory=meter.peak_memory,
            )
            answer = Response(request.round, counts, figures, memory=request.memory)
            answers.append((answer.encode(), b""))
        return answers

    def _share(self, client: int, number: int) -> Share:
        examples = self.client_data[client].train
        return Share(examples, plan(len(examples), self.training, self.seed, client, number))

    def _with_states(self, clients: Sequence[int], shares: Sequence[Share]) -> list[Share]:
        """Return the shares with what is known of their examples, if it is of all: a part begins at one block."""
        if not all(self.cache.keeps(client) for client in clients):
            return list(shares)
        states = (
            self.cache.get(client, self.model, self._forward, share.examples)
            for client, share in zip(clients, shares, strict=True)
        )
        return [replace(share, states=own) for share, own in zip(shares, states, strict=True)]

    def _forward(self, texts: Encoded) -> None:
        with self.hardware.computing(self.model), self.hardware.autocast():
            self.task.predict(self.model, self.task.collate(texts, self.hardware.torch_device))

    def _stack(self, payloads: Sequence[Payload]) -> dict[str, Tensor]:
        """Return K payloads as one with a client axis, on the worker's device; unequal names or shapes raise WireError."""
        names = sorted(set().union(*payloads))
        try:
            stacks = {name: _stacked([payload[name] for payload in payloads]) for name in names}
        except (KeyError, RuntimeError) as error:
            raise WireError(
                f"the messages of one stack differ in names or shapes: {error}"
            ) from error
        return {name: stack.to(self.hardware.torch_device) for name, stack in stacks.items()}


def _version(number: int, before: int, stays: Payload, remembered: Payload) -> int:
    """Return the version of a client's memory after round ``number``, told that ``before``."""
    if stays:
        return number
    return carried(number, before) if remembered else before


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return K tensors with a client axis; one alone is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _row(stacks: Payload, row: int) -> dict[str, Tensor]:
    """Return one client's part of tensors with a client axis, without it."""
    return {name: stack[row] for name, stack in stacks.items()}


def _first(stacks: Payload) -> dict[str, Tensor]:
    """Return the first client's part of tensors with a client axis, which it keeps."""
    return {name: stack[:1] for name, stack in stacks.items()}


def _form_of_one(stacks: Payload) -> MountedForm:
    """Return the form of one client's part of tensors with a client axis, in order of names."""
    named = sorted(stacks.items())
    return tuple((name, tuple(stack.shape[1:]), stack.dtype) for name, stack in named)
