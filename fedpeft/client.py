"""A machine that can play clients: bytes in, bytes out, no I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from fedpeft.activations import Activations
from fedpeft.evaluation import score
from fedpeft.hardware import Hardware
from fedpeft.ledger import measured
from fedpeft.tasks import Classification, Encoded
from fedpeft.training import Share, Training, fit, own_randomness, plan
from fedpeft.types import Context, Method, Payload, WireError
from fedpeft.wire import Answer, Kind, Request, decode, encode


@final
@dataclass(frozen=True)
class Holding:
    """What one client holds: its training examples and, for scores of its own, its part of the test set."""

    train: Encoded
    test: Encoded


@final
@dataclass(frozen=True)
class Worker:
    """Plays the clients in ``holdings`` with one method on one frozen model.

    ``head``: names of the head's parameters. ``config``: digest of what server and client must
    agree on; a request for anything else raises WireError. ``activations``: what is kept of frozen blocks between rounds.
    """

    method: Method
    model: nn.Module
    task: Classification
    holdings: Mapping[int, Holding]
    training: Training
    hardware: Hardware
    head: frozenset[str]
    seed: int
    config: bytes
    activations: Activations = field(default_factory=Activations)

    def handle(
        self, clients: Sequence[int], requests: Sequence[bytes], memories: Sequence[bytes]
    ) -> Sequence[tuple[bytes, bytes]]:
        """Answer one request for each of ``clients``, which train side by side as one cohort.

        ``memories``: what each client holds as of the version its request assumes, empty for none. Returns (answer, new
        memory) for each, the memory empty where it stays as it was. Requests of different kinds or rounds, or for
        clients that are not held here, raise WireError.
        """
        asked = [Request.decode(blob, self.config) for blob in requests]
        if len({(request.kind, request.round) for request in asked}) != 1:
            raise WireError("the requests of one cohort differ in kind or round")
        for client in clients:
            if client not in self.holdings:
                raise WireError(f"client {client} is not held here")
        held = [decode(blob) if blob else {} for blob in memories]
        play = {Kind.TRAIN: self._train, Kind.EVALUATE: self._evaluate}[asked[0].kind]
        return play(clients, asked, held)

    def _train(self, clients: Sequence[int], asked: Sequence[Request], held: Sequence[Payload]) -> list[tuple[bytes, bytes]]:
        number = asked[0].round
        shares = [self._share(client, number) for client in clients]
        order = sorted(range(len(clients)), key=lambda k: -len(shares[k].steps))
        self.activations.learn(self.model, self._forward, shares[0].examples.take([0]))
        context = Context([clients[k] for k in order], number, self.seed)
        down, memory = self._stack([asked[k].payload for k in order]), self._stack([held[k] for k in order])
        with measured(self.hardware.torch_device) as meter, own_randomness(self.seed, context.clients[0], number):  # noqa: SIM117
            with self.method.mount(self.model, down, memory, context) as local:
                losses = fit(
                    self.model,
                    local,
                    self.task,
                    self._with_states([clients[k] for k in order], [shares[k] for k in order]),
                    self.training,
                    self.head,
                    self.hardware,
                    self.activations,
                )
                up, stays = local.reply()
                trained = sum(parameter[0].numel() for parameter in local.trainable.values())
        answers: list[tuple[bytes, bytes]] = [(b"", b"")] * len(clients)
        for row, k in enumerate(order):
            answer = Answer(
                number,
                {name: tensor[row] for name, tensor in up.items()},
                examples=len(shares[k].examples),
                steps=len(shares[k].steps),
                trained=trained,
                loss=float(losses[row]),
                seconds=meter.seconds * len(shares[k].steps) / sum(len(share.steps) for share in shares),
                peak_memory=meter.peak_memory,
                shared_by=len(clients),
                memory=number if stays else asked[k].memory,
            )
            kept = encode({name: tensor[row] for name, tensor in stays.items()}) if stays else b""
            answers[k] = (answer.encode(), kept)
        return answers

    def _evaluate(self, clients: Sequence[int], asked: Sequence[Request], held: Sequence[Payload]) -> list[tuple[bytes, bytes]]:
        answers = []
        for client, request, own in zip(clients, asked, held, strict=True):
            context = Context([client], request.round, self.seed)
            with (
                measured(self.hardware.torch_device) as meter,
                self.method.mount(self.model, self._stack([request.payload]), self._stack([own]), context),
            ):
                found = score(self.model, self.task, self.holdings[client].test, self.hardware)
            answer = Answer(
                request.round,
                {"counts": found.counts},
                examples=found.examples,
                loss=found.loss_sum,
                seconds=meter.seconds,
                peak_memory=meter.peak_memory,
                memory=request.memory,
            )
            answers.append((answer.encode(), b""))
        return answers

    def _share(self, client: int, number: int) -> Share:
        examples = self.holdings[client].train
        return Share(examples, plan(len(examples), self.training, self.seed, client, number))

    def _with_states(self, clients: Sequence[int], shares: Sequence[Share]) -> list[Share]:
        """Return the shares with what is known of their examples, if it is of all: a part begins at one block."""
        if not all(self.activations.keeps(client) for client in clients):
            return list(shares)
        states = (
            self.activations.of(client, self.model, self._forward, share.examples)
            for client, share in zip(clients, shares, strict=True)
        )
        return [replace(share, states=own) for share, own in zip(shares, states, strict=True)]

    def _forward(self, texts: Encoded) -> None:
        with self.hardware.computing(self.model), self.hardware.autocast():
            self.task.logits(self.model, self.task.collate(texts, self.hardware.torch_device))

    def _stack(self, payloads: Sequence[Payload]) -> dict[str, Tensor]:
        """Return K payloads as one with a client axis, on the worker's device; unequal names or shapes raise WireError."""
        names = sorted(set().union(*payloads))
        try:
            stacks = {name: _stacked([payload[name] for payload in payloads]) for name in names}
        except (KeyError, RuntimeError) as error:
            raise WireError(f"the messages of one cohort differ in names or shapes: {error}") from error
        return {name: stack.to(self.hardware.torch_device) for name, stack in stacks.items()}


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return K tensors with a client axis; one alone is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
