"""Norm clipping: no reply moves the model further than a bound (Sun et al. 2019, section 4.2)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

from annotated_types import Gt
from torch import Tensor, nn

from fedpeft.algebra.norms import l2_norm
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update
from fedpeft.wire.versions import as_told
from fedpeft.wrappers.differences import check_differences, is_difference


@final
@dataclass(frozen=True)
class NormClip:
    """Scale a reply down whose difference to what was sent is longer than `norm`.

    The server does so, before it merges: a client's own word would not bind it.
    """

    paper: ClassVar[str] = "norm thresholding: Sun et al. 2019, arXiv 1911.07963"
    norm: Annotated[float, Gt(0)] = 1.0
    """Longest difference of a reply, over all that was trained: a Euclidean norm."""

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with replies of bounded length."""
        del owner  # nothing is kept on the server
        return Clipped(method, self.norm)


@final
@dataclass(frozen=True)
class Clipped:
    """A method that merges replies no longer than ``norm``."""

    paper: ClassVar[str] = NormClip.paper
    inner: Method
    norm: float

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does; BadInput where its replies are no differences."""
        state = self.inner.init(base, seed)
        down = self.inner.send(state, Client(0))
        check_differences("norm_clip", self.inner, self.inner.expects(state, down), down)
        return state

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends."""
        return self.inner.send(state, client)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount as the method inside does."""
        return self.inner.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects."""
        return self.inner.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Clip every reply, and merge as the method inside does."""
        return self.inner.receive(state, (self._clipped(state, update) for update in updates))

    def _clipped(self, state: State, update: Update) -> Update:
        """Return an update whose difference to what was sent is no longer than the bound."""
        down = self.inner.send(state, as_told(update.client))
        differences: dict[str, Tensor] = {}
        for name, tensor in update.payload.items():
            if is_difference(name, tensor, down):
                differences[name] = tensor - down[name]
        length = l2_norm(differences.values())
        if length <= self.norm:
            return update
        payload = dict(update.payload)
        for name, difference in differences.items():
            payload[name] = down[name] + difference * (self.norm / length)
        return replace(update, payload=payload)
