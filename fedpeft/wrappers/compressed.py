"""Replies in fewer bytes, with what was left out made good in the next round.

Seide et al. 2014; Stich et al. 2018, "Sparsified SGD with memory".
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from fedpeft.errors import BadInput, WireError
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update
from fedpeft.wire.versions import as_told, slice_of, with_slice, without
from fedpeft.wrappers.differences import check_differences, is_difference

Read = Callable[[], dict[str, Tensor]]


class Code(Protocol):
    """How real numbers are written."""

    name: ClassVar[str]
    """The wrapper, as a configuration calls it."""

    @property
    def largest(self) -> float:
        """Return the largest absolute value that can be written."""
        ...

    @property
    def differences_only(self) -> bool:
        """Return whether all else goes up as it is, and there should be nothing else."""
        ...

    def forms(self, values: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return names, shapes and dtypes of what ``encode`` writes, as meta tensors.

        ``values``: the shapes of one client's numbers.
        """
        ...

    def encode(self, values: Payload) -> tuple[dict[str, Tensor], Read]:
        """Return float32 numbers, (K, ...), as they are written, and what reads them back."""
        ...

    def decode(self, written: Payload, values: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the numbers of one client, of the shapes ``values``.

        They are finite whatever of the right form was ``written``.
        """
        ...


@final
@dataclass(frozen=True)
class Compressed:
    """A method whose replies are written in a ``code``.

    What came down under the same name and shape goes up as the difference to that. With
    ``feedback``, what such a difference lost is kept in the client's memory and added to the next.
    """

    paper: ClassVar[str] = "error feedback: Stich et al. 2018, arXiv 1809.07599"
    inner: Method
    owner: str
    code: Code
    feedback: bool

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does; BadInput where its replies are nothing to compress."""
        state = self.inner.init(base, seed)
        down = self.inner.send(state, Client(0))
        expected = self.inner.expects(state, down)
        if self.code.differences_only:
            check_differences(self.code.name, self.inner, expected, down)
        if not self._coded(expected, down) and not self._follows(state, expected):
            raise BadInput(
                f"wrap.name = {self.code.name!r}: {type(self.inner).__name__} sends no real "
                "numbers up that it could write in fewer bytes; choose another method, such as "
                "'lora', or leave the wrapper out"
            )
        return state

    def _follows(self, state: State, expected: Payload) -> bool:
        """Return whether real numbers come up in the second exchange of a round.

        ``expected``: the form of a reply in the first one, such as what a client chooses.
        """
        # Every bit is set: the form of the second reply follows from all that a client may choose.
        all_chosen: dict[str, Tensor] = {}
        for name, spec in expected.items():
            all_chosen[name] = torch.full(spec.shape, 255).to(spec.dtype)
        try:
            after = self.inner.receive(state, [Update(Client(0), 1, all_chosen)])
        except WireError:  # one reply is too few for masks, which are no numbers to compress either
            return False
        if after.phase == state.phase:
            return False
        down = self.inner.send(after, Client(0))
        return bool(self._coded(self.inner.expects(after, down), down))

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends."""
        return self.inner.send(state, client)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as the method inside does; compress what goes up."""
        owed = slice_of(memory, self.owner) if self.feedback else {}
        with self.inner.mount(model, down, without(memory, self.owner), context) as task:
            yield replace(task, reply=partial(self._reply, task, down, owed, context))

    def _reply(
        self, task: LocalTask, down: Payload, owed: Payload, context: Context
    ) -> tuple[Payload, Payload]:
        """Return the reply of the method inside in few bytes, and its memory with what is owed."""
        up, stays = task.reply()
        # 1. What is written: differences, each with what earlier ones have lost, and other numbers.
        values: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for name, tensor in up.items():
            difference = is_difference(name, tensor, down)
            if not self._takes(tensor, difference):
                others[name] = tensor
                continue
            values[name] = tensor - down[name] if difference else tensor
            if difference and name in owed and owed[name].shape == tensor.shape:
                values[name] += owed[name]
        if not values:
            return up, stays
        self._check_range(values, context)
        written, read = self.code.encode(values)
        if not self.feedback:
            return {**others, **written}, stays
        # 2. What is owed from now on. A tensor that goes up in some rounds only, as one factor of
        # two that take turns, is owed what it was until its next turn.
        remains: dict[str, Tensor] = {}
        for name, tensor in owed.items():
            if name not in values and is_difference(name, tensor, down):
                remains[name] = tensor
        for name, tensor in read().items():
            if is_difference(name, tensor, down):
                remains[name] = values[name] - tensor
        return {**others, **written}, with_slice(stays, self.owner, remains)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects, written in the code."""
        expected = self.inner.expects(state, down)
        coded = self._coded(expected, down)
        others = {name: spec for name, spec in expected.items() if name not in coded}
        return {**others, **(self.code.forms(coded) if coded else {})}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Read every reply, and merge as the method inside does."""
        return self.inner.receive(state, (self._read(state, update) for update in updates))

    def _read(self, state: State, update: Update) -> Update:
        """Return an update as the method inside expects it."""
        down = self.inner.send(state, as_told(update.client))
        expected = self.inner.expects(state, down)
        coded = self._coded(expected, down)
        payload: dict[str, Tensor] = {}
        for name in expected.keys() - coded.keys():
            payload[name] = update.payload[name]
        if not coded:
            return replace(update, payload=payload)
        for name, value in self.code.decode(update.payload, coded).items():
            payload[name] = down[name] + value if is_difference(name, value, down) else value
        return replace(update, payload=payload)

    def _coded(self, expected: Payload, down: Payload) -> dict[str, torch.Size]:
        """Return the shapes of the tensors of a reply that are compressed."""
        coded: dict[str, torch.Size] = {}
        for name, spec in expected.items():
            if self._takes(spec, is_difference(name, spec, down)):
                coded[name] = spec.shape
        return coded

    def _takes(self, tensor: Tensor, difference: bool) -> bool:
        """Return whether a tensor of a reply is compressed."""
        # What is not float32 says something of its own: votes, counts, keys, other codes.
        if tensor.dtype != torch.float32 or tensor.numel() == 0:
            return False
        return difference or not self.code.differences_only

    def _check_range(self, values: Payload, context: Context) -> None:
        """Raise WireError where a client's numbers, (K, ...), are beyond what can be written."""
        for name, stack in values.items():
            flat = stack.reshape(len(stack), -1)
            least, most = flat.aminmax(dim=1)  # (K,) each, NaN where there is one
            fits = (least >= -self.code.largest) & (most <= self.code.largest)
            for row in (~fits).nonzero().flatten().tolist():
                numbers = flat[row]
                beyond = numbers[~(numbers.abs() <= self.code.largest)]
                raise WireError(
                    f"client {context.clients[row]}: {self.code.name} cannot write "
                    f"{float(beyond[0]):g}, which has come into tensor {name!r}"
                )
