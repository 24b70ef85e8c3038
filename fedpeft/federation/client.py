"""A worker does the work of clients: bytes in, bytes out, no I/O."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar, final

import torch
from torch import Tensor, nn

from fedpeft.errors import WireError
from fedpeft.ledger import Measured, Measurement, measured
from fedpeft.tasks import Encoded, Task, examples_in
from fedpeft.training import private
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.evaluation import score
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Training, fit, optimizer_of, own_randomness, paced, plan
from fedpeft.training.micro_batches import Share
from fedpeft.types import Context, LocalTask, Method, Payload
from fedpeft.wire.messages import Kind, Request, Response, Status, decode, encode
from fedpeft.wire.versions import carried, joined, own, parted, stamp

Item = TypeVar("Item")


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
    blocks, kept between rounds. ``step_alone``: seconds of one step of a client alone, by the form
    of what is mounted. It is measured when clients first train side by side with that form; None
    switches the measurement off. ``paces``: the share of its local steps that a client takes, for
    those that do not take all.
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
    paces: Mapping[int, float] = field(default_factory=dict)

    def handle(
        self, clients: Sequence[int], requests: Sequence[bytes], memories: Sequence[bytes]
    ) -> Sequence[tuple[bytes, bytes]]:
        """Handle one request for each of ``clients``, which train side by side as one stack.

        ``memories``: each client's memory, in the version that its request assumes; empty for none.
        Returns (reply, new memory) of each client; an empty memory means that it has not changed.
        Requests of different kinds or rounds, for clients that are not held here, or with what the
        method cannot mount, raise WireError. An error of any kind carries a note that names clients
        and round.
        """
        # 1. Decode. What cannot be read is refused before anything touches the model.
        decoded = [Request.decode(blob, self.config) for blob in requests]
        kinds = {(request.kind, request.round, request.phase) for request in decoded}
        if len(kinds) != 1:
            raise WireError("the requests of one stack differ in kind, round or phase")
        [(kind, round_number, _)] = kinds
        for client in clients:
            if client not in self.client_data:
                raise WireError(f"client {client} is not held here")
        decoded_memories: list[Payload] = []
        for blob in memories:
            decoded_memories.append(decode(blob) if blob else {})
        # 2. Do the work. All of a stack fail together, so the note names every client of it.
        handlers = {Kind.TRAIN: self._train, Kind.EVALUATE: self._evaluate}
        try:
            return handlers[kind](clients, decoded, decoded_memories)
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
        # Back from the order of the stack's rows to that of the requests.
        results: list[tuple[bytes, bytes]] = [(b"", b"")] * len(clients)
        for row, index in enumerate(stack.order):
            results[index] = self._reply(stack, trained, row)
        return results

    def _prepare(
        self, clients: Sequence[int], requests: Sequence[Request], memories: Sequence[Payload]
    ) -> "_Stack":
        """Return requests and memories as one stack, the client with the most steps first."""
        round_number, phase = requests[0].round, requests[0].phase
        shares = [self._share(client, round_number) for client in clients]
        for client, share in zip(clients, shares, strict=True):
            if not share.steps:
                raise WireError(f"client {client} holds no examples to train on")
        # The clients that are still at work in some step are then the first rows of the stack.
        longest_first = sorted(range(len(clients)), key=lambda k: -len(shares[k].steps))
        sorted_requests = _reordered(requests, longest_first)
        down = self._stack([request.payload for request in sorted_requests])
        memory = self._stack(_reordered(memories, longest_first))
        methods_part, optimizer_state = parted(memory)
        sorted_shares = _reordered(shares, longest_first)
        return _Stack(
            order=longest_first,
            context=Context(
                clients=_reordered(clients, longest_first),
                round=round_number,
                seed=self.seed,
                phase=phase,
                examples=[share.examples.num_rows for share in sorted_shares],
            ),
            shares=sorted_shares,
            versions=[request.memory for request in sorted_requests],
            down=down,
            methods_part=methods_part,
            optimizer_state=optimizer_state,
        )

    def _train_stack(self, stack: "_Stack") -> "_Trained":
        """Mount and train the stack; return what goes up, what is remembered, and the figures."""
        context = stack.context
        if context.phase == 0:
            # The cache learns the order of the blocks from one text, before anything is mounted.
            self.cache.trace(self.model, self._forward, stack.shares[0].examples.take([0]))
        else:
            self.cache.relocate()
        with (
            measured(self.hardware.torch_device) as meter,
            own_randomness(self.seed, context.clients[0], context.round),
            self._mounted(stack.down, stack.methods_part, context) as local,
        ):
            shares = _cut(stack.shares, local.steps)
            if local.rows is not None:
                shares = _drawn(shares, self.training.batch_size)
            # Where nobody trains, nothing may be mounted, and other blocks' states would be kept.
            if shares[0].steps:
                shares = self._with_states(context.clients, shares)
            losses, optimizer_state = self._fit(local, shares, stack.optimizer_state)
            up, stays = local.reply()
            remembered = joined(stays, stack.methods_part, optimizer_state)
            num_trained = _num_trained(local.trainable)
        # Outside of `measured`: the trial step is no part of the stack's seconds.
        step_alone = None
        if len(shares) > 1 and shares[0].steps:
            step_alone = self._seconds_alone(stack, shares[0])
        return _Trained(
            steps=[len(share.steps) for share in shares],
            up=up,
            remembered=remembered,
            news=bool(own(stays)),
            discreet=local.discreet,
            lossless=local.discreet or local.rows is not None,
            losses=losses,
            num_trained=num_trained,
            meter=meter,
            step_alone=step_alone,
        )

    def _reply(self, stack: "_Stack", trained: "_Trained", row: int) -> tuple[bytes, bytes]:
        """Return the reply and the new memory of the client in ``row`` of a trained stack.

        The seconds of the stack are shared out by steps.
        """
        # 1. What was measured.
        share, steps = stack.shares[row], trained.steps
        # Without any steps, as in a phase that only exchanges keys, all have an equal part.
        part = steps[row] / sum(steps) if any(steps) else 1 / len(steps)
        seconds = seconds_alone = trained.meter.seconds * part
        if trained.step_alone is not None:
            seconds_alone = steps[row] * trained.step_alone
        figures = Measured(
            examples=share.examples.num_rows,
            steps=steps[row],
            trained=trained.num_trained,
            loss=float(trained.losses[row]),
            seconds=seconds,
            seconds_alone=seconds_alone,
            peak_memory=trained.meter.peak_memory,
            shared_by=len(stack.shares),
        )
        status = Status.DONE
        if trained.discreet:
            # The number of steps would tell the number of examples.
            figures = replace(figures, examples=0, steps=0)
        if trained.lossless:
            figures = replace(figures, loss=None)
            status = Status.DISCREET
        # 2. The reply, and the memory under the version that the reply tells the server.
        round_number, phase = stack.context.round, stack.context.phase
        now, before = stamp(round_number, phase), stack.versions[row]
        version = _version(now, before, trained.news, trained.remembered)
        response = Response(round_number, _row(trained.up, row), figures, version, status, phase)
        memory = b""  # nothing new to store
        if trained.remembered:
            memory = encode(_row(trained.remembered, row))
        return response.encode(), memory

    def _fit(
        self,
        local: LocalTask,
        shares: Sequence[Share],
        kept: Payload,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train ``local``; return the losses, (K,), and the optimizer's state where it is kept.

        ``kept``: that state from the rounds before, (K, ...); empty for none.
        """
        if not shares[0].steps:  # nobody trains in this phase
            return torch.zeros(len(shares), dtype=torch.float64), dict(kept)
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
        """Return the seconds of a step of one client alone; None where these are not measured.

        They are measured once for every form of what is mounted, by one step of the first client
        with its ``share``. The outcome of that step is thrown away and changes nothing else.
        """
        if self.step_alone is None:
            return None
        form = _form_of_one({**stack.methods_part, **stack.down})
        if form not in self.step_alone:
            first = stack.context
            context = replace(first, clients=first.clients[:1], examples=first.examples[:1])
            down, methods_part = _first(stack.down), _first(stack.methods_part)
            one_step = replace(share, steps=share.steps[:1])
            # Seeded as the client's own training, and the generators are put back afterwards.
            with (
                own_randomness(self.seed, context.clients[0], context.round),
                self._mounted(down, methods_part, context) as local,
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
            context = Context([client], request.round, self.seed, request.phase)
            down = self._stack([request.payload])
            methods_part, _ = parted(self._stack([memory]))
            # The loop's part of the memory plays no role here: no optimizer runs.
            with (
                measured(self.hardware.torch_device) as meter,
                self._mounted(down, methods_part, context),
            ):
                counts = score(self.model, self.task, self.client_data[client].test, self.hardware)
            figures = Measured(
                examples=examples_in(counts),
                loss=float(counts["loss"]),
                seconds=meter.seconds,
                seconds_alone=meter.seconds,
                peak_memory=meter.peak_memory,
            )
            # Nothing was learnt: the client keeps the memory that the request assumes.
            response = Response(
                request.round, counts, figures, memory=request.memory, phase=request.phase
            )
            results.append((response.encode(), b""))
        return results

    @contextmanager
    def _mounted(
        self, down: Payload, methods_part: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount what was sent and what is remembered, (K, ...), for the length of a ``with``.

        What cannot be mounted raises WireError: the bytes were whole, but a tensor is missing, or
        has another shape or dtype than the method works with. The error behind it says where.
        """
        with ExitStack() as undo:
            try:
                mount = self.method.mount(self.model, down, methods_part, context)
                local = undo.enter_context(mount)
            except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the message
                raise
            except (LookupError, RuntimeError, TypeError, ValueError) as error:
                name = type(self.method).__name__
                why = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise WireError(f"the message is none that {name} can mount: {why}") from error
            yield local

    def _share(self, client: int, round_number: int) -> Share:
        """Return the examples of ``client`` and the rows of its steps in a round."""
        examples = self.client_data[client].train
        steps = plan(len(examples), self.training, self.seed, client, round_number)
        return Share(examples, steps[: paced(len(steps), self.paces.get(client, 1.0))])

    def _with_states(self, clients: Sequence[int], shares: Sequence[Share]) -> list[Share]:
        """Return the shares with cached hidden states, if all ``clients`` have them."""
        # A micro-batch mixes rows of several clients, and its pass begins at one block for all.
        if not all(self.cache.keeps(client) for client in clients):
            return list(shares)
        with_states: list[Share] = []
        for client, share in zip(clients, shares, strict=True):
            states = self.cache.get(client, self.model, self._forward, share.examples)
            with_states.append(replace(share, states=states))
        return with_states

    def _forward(self, texts: Encoded) -> None:
        """Run the model over ``texts``; the caller's hooks read the hidden states on the way."""
        with self.hardware.computing(self.model), self.hardware.autocast():
            self.task.predict(self.model, self.task.collate(texts, self.hardware.torch_device))

    def _stack(self, payloads: Sequence[Payload]) -> dict[str, Tensor]:
        """Return K payloads as one with a client axis, (K, ...), on the worker's device.

        Unequal names or shapes raise WireError.
        """
        names = sorted(set().union(*payloads))
        stacks: dict[str, Tensor] = {}
        try:
            for name in names:
                stacks[name] = _stacked([payload[name] for payload in payloads])
        except (KeyError, RuntimeError) as error:
            raise WireError(
                f"the messages of one stack differ in names or shapes: {error}"
            ) from error
        # Outside of the `try`: a device without memory is not the messages' fault.
        return {name: stack.to(self.hardware.torch_device) for name, stack in stacks.items()}


@final
@dataclass(frozen=True, kw_only=True)
class _Stack:
    """What K clients train on side by side, the one with the most steps first.

    ``order``: for each row of the stack, the index of its client among those that were asked.
    ``context``: the clients, row by row. ``versions``: of the memory that each request assumes.
    ``down``: what was sent, (K, ...). ``methods_part`` and ``optimizer_state``: the two parts of
    the memories, (K, ...).
    """

    order: Sequence[int]
    context: Context
    shares: Sequence[Share]
    versions: Sequence[int]
    down: Payload
    methods_part: Payload
    optimizer_state: Payload


@final
@dataclass(frozen=True, kw_only=True)
class _Trained:
    """The outcome of training a stack.

    ``steps``: of each client. ``up`` and ``remembered``: what goes up and what is remembered,
    (K, ...). ``news``: whether the method keeps anything new. ``discreet``: whether figures that
    tell of the examples stay here. ``lossless``: whether the loss does. ``losses``: (K,).
    ``num_trained``: numbers that each client trained. ``step_alone``: seconds of a step of one
    client alone, None if unknown.
    """

    steps: Sequence[int]
    up: Payload
    remembered: Payload
    news: bool
    discreet: bool
    lossless: bool
    losses: Tensor
    num_trained: int
    meter: Measurement
    step_alone: float | None


def _cut(shares: Sequence[Share], steps: int | None) -> list[Share]:
    """Return the shares with at most so many ``steps`` each; None for all of them."""
    return [replace(share, steps=share.steps[:steps]) for share in shares]


def _drawn(shares: Sequence[Share], batch_size: int) -> list[Share]:
    """Return the shares with rows that are drawn in secret, in as many steps."""
    redrawn: list[Share] = []
    for share in shares:
        steps = private.drawn(share.examples, len(share.steps), batch_size)
        redrawn.append(replace(share, steps=steps))
    return redrawn


def _version(now: int, before: int, news: bool, remembered: Payload) -> int:
    """Return the version of a client's memory after an exchange with stamp ``now``.

    ``before``: the version after those before it. ``news``: whether the method keeps anything new.
    """
    if news:
        return now
    # Where only the loop wrote, the version holds the round of the method's older part, too.
    return carried(now, before) if remembered else before


def _num_trained(trainable: Mapping[str, Tensor]) -> int:
    """Return how many numbers one client trains; every parameter is (K, ...)."""
    count = 0
    for parameter in trainable.values():
        count += parameter[0].numel()
    return count


def _reordered(items: Sequence[Item], order: Sequence[int]) -> list[Item]:
    """Return the items with the indices ``order``, in this order."""
    return [items[index] for index in order]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return K tensors with a client axis; one alone is not copied."""
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0)
    return torch.stack(list(tensors))


def _row(stacks: Payload, row: int) -> dict[str, Tensor]:
    """Return the tensors of the client in ``row``, (K, ...) -> (...)."""
    return {name: stack[row] for name, stack in stacks.items()}


def _first(stacks: Payload) -> dict[str, Tensor]:
    """Return the stack of the first client alone, (K, ...) -> (1, ...)."""
    return {name: stack[:1] for name, stack in stacks.items()}


def _form_of_one(stacks: Payload) -> MountedForm:
    """Return the form of the tensors of one client of a stack, in order of names."""
    form: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, stack in sorted(stacks.items()):
        form.append((name, tuple(stack.shape[1:]), stack.dtype))  # without the client axis
    return tuple(form)
