"""A worker does the work of clients: bytes in, bytes out, no I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from fedpeft.errors import WireError
from fedpeft.ledger import Measured, Measurement, measured
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
    """What one client holds: training examples and, for scores of its own, test examples."""

    train: Encoded
    test: Encoded


MountedForm = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
"""(name, shape, dtype) of every tensor that is mounted for one client."""


@final
@dataclass(frozen=True, kw_only=True)
class Worker:
    """Trains and scores the clients in ``client_data`` with one method on one frozen model.

    ``head``: names of the head's parameters. ``config``: digest of what server and client must
    agree on; a request for anything else raises WireError. ``cache``: hidden states of frozen
    blocks, kept between rounds. ``step_alone``: seconds of one step of a client alone, by what is
    mounted, found out when clients first train side by side with it; None where nobody asks.
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
        """Handle one request for each of ``clients``, which train side by side as one stack.

        ``memories``: what each client holds as of the version its request assumes, empty for none.
        Returns (reply, new memory) for each, the memory empty where it stays as it was. Requests of
        different kinds or rounds, or for clients that are not held here, raise WireError. An error
        of any kind comes with a note that names clients and round.
        """
        decoded = [Request.decode(blob, self.config) for blob in requests]
        if len({(request.kind, request.round) for request in decoded}) != 1:
            raise WireError("the requests of one stack differ in kind or round")
        kind, round_number = decoded[0].kind, decoded[0].round
        for client in clients:
            if client not in self.client_data:
                raise WireError(f"client {client} is not held here")
        held = [decode(blob) if blob else {} for blob in memories]
        handlers = {Kind.TRAIN: self._train, Kind.EVALUATE: self._evaluate}
        try:
            return handlers[kind](clients, decoded, held)
        except Exception as error:
            names = ", ".join(str(client) for client in clients)
            error.add_note(f"raised by the work of client {names} in round {round_number}")
            raise

    def _train(
        self, clients: Sequence[int], requests: Sequence[Request], memories: Sequence[Payload]
    ) -> list[tuple[bytes, bytes]]:
        """Train ``clients`` side by side; return (reply, new memory) of each, in their order."""
        stack = self._prepare(clients, requests, memories)
        trained = self._train_stack(stack)
        results: list[tuple[bytes, bytes]] = [(b"", b"")] * len(clients)
        for row, place in enumerate(stack.places):
            results[place] = self._reply(stack, trained, row)
        return results

    def _prepare(
        self, clients: Sequence[int], requests: Sequence[Request], memories: Sequence[Payload]
    ) -> "_Stack":
        """Put what was sent and what is held into one stack, the client with most steps first."""
        round_number = requests[0].round
        shares = [self._share(client, round_number) for client in clients]
        for client, share in zip(clients, shares, strict=True):
            if not share.steps:
                raise WireError(f"client {client} holds no examples to train on")
        longest_first = sorted(range(len(clients)), key=lambda k: -len(shares[k].steps))
        down = self._stack([requests[k].payload for k in longest_first])
        memory = self._stack([memories[k] for k in longest_first])
        methods_part, optimizer_state = parted(memory)
        return _Stack(
            places=longest_first,
            context=Context([clients[k] for k in longest_first], round_number, self.seed),
            shares=[shares[k] for k in longest_first],
            versions=[requests[k].memory for k in longest_first],
            down=down,
            methods_part=methods_part,
            optimizer_state=optimizer_state,
        )

    def _train_stack(self, stack: "_Stack") -> "_Trained":
        """Mount the stack, train it, and return what goes up and what stays, with its measures."""
        context = stack.context
        self.cache.trace(self.model, self._forward, stack.shares[0].examples.take([0]))
        with (
            measured(self.hardware.torch_device) as meter,
            own_randomness(self.seed, context.clients[0], context.round),
            self.method.mount(self.model, stack.down, stack.methods_part, context) as local,
        ):
            shares = self._with_states(context.clients, stack.shares)
            losses, optimizer_state = self._fit(local, shares, stack.optimizer_state)
            up, stays = local.reply()
            remembered = joined(stays, stack.methods_part, optimizer_state)
            num_trained = sum(parameter[0].numel() for parameter in local.trainable.values())
        step_alone = None
        if len(shares) > 1:
            step_alone = self._seconds_alone(stack, shares[0])
        return _Trained(
            up=up,
            remembered=remembered,
            news=bool(stays),
            losses=losses,
            num_trained=num_trained,
            meter=meter,
            step_alone=step_alone,
        )

    def _reply(self, stack: "_Stack", trained: "_Trained", row: int) -> tuple[bytes, bytes]:
        """Return the reply and the new memory of the client in ``row`` of a trained stack.

        The seconds of the stack are shared out by steps.
        """
        share = stack.shares[row]
        steps = len(share.steps)
        all_steps = sum(len(other.steps) for other in stack.shares)
        seconds = trained.meter.seconds * steps / all_steps
        seconds_alone = seconds
        if trained.step_alone is not None:
            seconds_alone = steps * trained.step_alone
        figures = Measured(
            examples=share.examples.num_rows,
            steps=steps,
            trained=trained.num_trained,
            loss=float(trained.losses[row]),
            seconds=seconds,
            seconds_alone=seconds_alone,
            peak_memory=trained.meter.peak_memory,
            shared_by=len(stack.shares),
        )
        round_number, before = stack.context.round, stack.versions[row]
        version = _version(round_number, before, trained.news, trained.remembered)
        response = Response(round_number, _row(trained.up, row), figures, memory=version)
        memory = b""
        if trained.remembered:
            memory = encode(_row(trained.remembered, row))
        return response.encode(), memory

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
        if not self.training.keep_optimizer:
            return losses, {}
        return losses, optimizer.state()

    def _seconds_alone(self, stack: "_Stack", share: Share) -> float | None:
        """Return the seconds that a step takes one client alone; None where nobody wants to know.

        Found out once for what is mounted, by a step of the first client, with its ``share``. Its
        outcome is thrown away: nothing that is computed elsewhere depends on it.
        """
        if self.step_alone is None:
            return None
        form = _form_of_one({**stack.methods_part, **stack.down})
        if form not in self.step_alone:
            context = replace(stack.context, clients=stack.context.clients[:1])
            down, methods_part = _first(stack.down), _first(stack.methods_part)
            one_step = replace(share, steps=share.steps[:1])
            with (
                own_randomness(self.seed, context.clients[0], context.round),
                self.method.mount(self.model, down, methods_part, context) as local,
                measured(self.hardware.torch_device) as meter,
            ):
                self._fit(local, [one_step], {})
            self.step_alone[form] = meter.seconds
        return self.step_alone[form]

    def _evaluate(
        self, clients: Sequence[int], requests: Sequence[Request], memories: Sequence[Payload]
    ) -> list[tuple[bytes, bytes]]:
        """Score what each of ``clients`` was sent on its own test examples, one after another."""
        results: list[tuple[bytes, bytes]] = []
        for client, request, memory in zip(clients, requests, memories, strict=True):
            context = Context([client], request.round, self.seed)
            down = self._stack([request.payload])
            methods_part, _ = parted(self._stack([memory]))
            with (
                measured(self.hardware.torch_device) as meter,
                self.method.mount(self.model, down, methods_part, context),
            ):
                counts = score(self.model, self.task, self.client_data[client].test, self.hardware)
            figures = Measured(
                examples=examples_in(counts),
                loss=float(counts["loss"]),
                seconds=meter.seconds,
                seconds_alone=meter.seconds,
                peak_memory=meter.peak_memory,
            )
            response = Response(request.round, counts, figures, memory=request.memory)
            results.append((response.encode(), b""))
        return results

    def _share(self, client: int, round_number: int) -> Share:
        """Return the examples of ``client`` and the rows of its steps in a round."""
        examples = self.client_data[client].train
        steps = plan(len(examples), self.training, self.seed, client, round_number)
        return Share(examples, steps)

    def _with_states(self, clients: Sequence[int], shares: Sequence[Share]) -> list[Share]:
        """Return the shares with cached hidden states, if all ``clients`` have them.

        The rows of a micro-batch begin at one block, whosever they are.
        """
        if not all(self.cache.keeps(client) for client in clients):
            return list(shares)
        with_states: list[Share] = []
        for client, share in zip(clients, shares, strict=True):
            states = self.cache.get(client, self.model, self._forward, share.examples)
            with_states.append(replace(share, states=states))
        return with_states

    def _forward(self, texts: Encoded) -> None:
        """Run the model over ``texts``, for the sake of what happens on the way."""
        with self.hardware.computing(self.model), self.hardware.autocast():
            self.task.predict(self.model, self.task.collate(texts, self.hardware.torch_device))

    def _stack(self, payloads: Sequence[Payload]) -> dict[str, Tensor]:
        """Return K payloads as one with a client axis, (K, ...), on the worker's device.

        Unequal names or shapes raise WireError.
        """
        names = sorted(set().union(*payloads))
        try:
            stacks = {name: _stacked([payload[name] for payload in payloads]) for name in names}
        except (KeyError, RuntimeError) as error:
            raise WireError(
                f"the messages of one stack differ in names or shapes: {error}"
            ) from error
        return {name: stack.to(self.hardware.torch_device) for name, stack in stacks.items()}


@final
@dataclass(frozen=True, kw_only=True)
class _Stack:
    """What K clients train on side by side, the one with most steps first.

    ``places``: the place of each among those that were asked. ``context``: names them.
    ``versions``: of the memory that each request assumes. ``down``, ``methods_part`` and
    ``optimizer_state``: what was sent and the two parts of what is held, (K, ...).
    """

    places: Sequence[int]
    context: Context
    shares: Sequence[Share]
    versions: Sequence[int]
    down: Payload
    methods_part: Payload
    optimizer_state: Payload


@final
@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What became of a stack.

    ``up`` and ``remembered``: what goes up and what is to be remembered, (K, ...). ``news``: if the
    method keeps anything new. ``losses``: (K,). ``num_trained``: numbers that each client
    trained. ``step_alone``: seconds of a step of one client alone, None if unknown.
    """

    up: Payload
    remembered: Payload
    news: bool
    losses: Tensor
    num_trained: int
    meter: Measurement
    step_alone: float | None


def _version(round_number: int, before: int, news: bool, remembered: Payload) -> int:
    """Return the version of a client's memory after a round.

    ``before``: that after the rounds before it. ``news``: whether the method keeps anything new.
    """
    if news:
        return round_number
    return carried(round_number, before) if remembered else before


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return K tensors with a client axis; one alone is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _row(stacks: Payload, row: int) -> dict[str, Tensor]:
    """Return the tensors of the client in ``row``, (K, ...) -> (...)."""
    return {name: stack[row] for name, stack in stacks.items()}


def _first(stacks: Payload) -> dict[str, Tensor]:
    """Return the stack of the first client alone, (K, ...) -> (1, ...)."""
    return {name: stack[:1] for name, stack in stacks.items()}


def _form_of_one(stacks: Payload) -> MountedForm:
    """Return the form of the tensors of one client of a stack, in order of names."""
    named = sorted(stacks.items())
    return tuple((name, tuple(stack.shape[1:]), stack.dtype) for name, stack in named)
