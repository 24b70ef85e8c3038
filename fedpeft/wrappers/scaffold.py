"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020, algorithm 1)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge
from torch import Tensor, nn

from fedpeft.algebra.averaging import mean_merge
from fedpeft.errors import BadInput
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update
from fedpeft.wire.versions import slice_of, with_slice, without
from fedpeft.wrappers.differences import is_difference


@final
@dataclass(frozen=True)
class Scaffold:
    """Add c - c_i to every gradient: by how much the client's own gradients are not all clients'.

    c_i is the mean of the client's gradients in its last round, c the mean of all c_i. With SGD
    without momentum, weight decay or clipping this is the paper's option II; other optimizers take
    the same gradients, which is a reconstruction. Messages double in size, both ways.
    """

    paper: ClassVar[str] = "SCAFFOLD: Karimireddy et al. 2020, arXiv 1910.06378"
    clients: Annotated[int, Ge(1)] | None = None
    """Clients of the whole federation, the paper's N. Left out: those that have taken part so far,
    which is the same once all have (reconstruction)."""

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with control variates; BadInput where it is no method of means."""
        if mean_merge(method, 0) is None:
            raise BadInput(
                f"wrap.name = 'scaffold': {type(method).__name__} does not merge by a weighted "
                "mean of what all clients train alike, and so has no mean gradient"
            )
        return Controlled(method, owner, self.clients)


@final
@dataclass(frozen=True)
class Controlled:
    """A method whose clients correct their gradients.

    The ``owner``'s slice of the state has the sum of all c_i, ``sum/<name>``, and the ids of the
    clients ``seen``. c goes down as ``<owner>/c/<name>``; by how much each c_i has changed comes up
    as ``<owner>/change/<name>``.
    """

    paper: ClassVar[str] = Scaffold.paper
    inner: Method
    owner: str
    clients: int | None

    # The server's half.

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does; all control variates are 0."""
        return self.inner.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends, and c as far as it is not 0."""
        down = self.inner.send(state.without(self.owner), client)
        kept = state.slice_of(self.owner)
        controls: dict[str, Tensor] = {}
        for name in down:
            total = kept.get(f"sum/{name}")
            # Of a tensor whose shape has changed, as where ranks die, c begins anew.
            if total is not None and is_difference(name, total, down):
                clients = self.clients or len(kept["seen"])
                controls[f"{self._common}{name}"] = total / clients
        return {**down, **controls} if controls else down

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects, and by how much each c_i has changed."""
        sent, _ = _parted(down, self._common)
        expected = dict(self.inner.expects(state.without(self.owner), sent))
        for name, spec in list(expected.items()):
            if is_difference(name, spec, sent):
                expected[f"{self._change}{name}"] = spec
        return expected

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the method inside does; add the changes up: c <- c + 1 / N sum_i dc_i."""
        kept = state.slice_of(self.owner)
        sums: dict[str, Tensor] = {}
        seen: set[int] = set()

        def inside() -> Iterator[Update]:
            """Pass on the updates without the changes, which are added up on the way."""
            for update in updates:
                payload, changes = _parted(update.payload, self._change)
                seen.add(update.client.id)
                for name, change in changes.items():
                    if name not in sums:
                        sums[name] = torch.zeros(change.shape, dtype=torch.float64)
                    sums[name] += change
                yield replace(update, payload=payload)

        merged = self.inner.receive(state.without(self.owner), inside())
        if not seen:
            return merged.with_slice(self.owner, kept)
        before: list[int] = kept["seen"].tolist() if kept else []
        now = {"seen": torch.tensor(sorted(seen.union(before)))}
        for name in merged.shared:  # what is left of it after a bridge between stages
            if f"sum/{name}" in kept:
                now[f"sum/{name}"] = kept[f"sum/{name}"]
        for name, change in sums.items():
            last = kept.get(f"sum/{name}")
            if last is None or last.shape != change.shape:
                last = torch.zeros_like(change)
            now[f"sum/{name}"] = (last + change).float()
        return merged.with_slice(self.owner, now)

    # The client's half.

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as the method inside does; correct the gradients of what comes back as it went."""
        sent, common = _parted(down, self._common)  # c
        held = slice_of(memory, self.owner)  # c_i, (K, ...) each
        with self.inner.mount(model, sent, without(memory, self.owner), context) as task:
            variates = _Variates(task, sent, common, held, len(context.clients))

            def after_backward(active: slice) -> None:
                # What the method adds to the loss is part of the gradient, so it comes first.
                task.after_backward(active)
                variates.correct(active)

            def reply() -> tuple[Payload, Payload]:
                up, stays = task.reply()
                changes, kept = variates.renewed(up)
                named = {f"{self._change}{name}": change for name, change in changes.items()}
                return {**up, **named}, with_slice(stays, self.owner, kept)

            yield replace(task, after_backward=after_backward, reply=reply)

    @property
    def _common(self) -> str:
        """Return what stands before the names of c."""
        return f"{self.owner}/c/"

    @property
    def _change(self) -> str:
        """Return what stands before the names of changes of c_i."""
        return f"{self.owner}/change/"


def _parted(payload: Payload, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the part of the method inside, and what stands under ``prefix``, by tensors' names."""
    inside: dict[str, Tensor] = {}
    controls: dict[str, Tensor] = {}
    for name, tensor in payload.items():
        if name.startswith(prefix):
            controls[name.removeprefix(prefix)] = tensor
        else:
            inside[name] = tensor
    return inside, controls


@final
class _Variates:
    """The control variates of K clients while they train.

    ``sent``: what the method inside was sent. ``common``: c. ``held``: each client's c_i. All are
    (K, ...); what is missing is 0.
    """

    def __init__(
        self, task: LocalTask, sent: Payload, common: Payload, held: Payload, clients: int
    ) -> None:
        self._trainable, self._sent = task.trainable, sent
        self._common, self._held = common, held
        self._own: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}  # of the gradients so far
        self._steps = [0] * clients
        for name, parameter in task.trainable.items():
            if name not in task.personal and is_difference(name, parameter, sent):
                known = name in held and held[name].shape == parameter.shape
                self._own[name] = held[name] if known else torch.zeros_like(parameter)
                self._totals[name] = torch.zeros_like(parameter)

    def correct(self, active: slice) -> None:
        """Take note of the ``active`` clients' gradients, then add c - c_i to them."""
        for row in range(active.start, active.stop):
            self._steps[row] += 1
        for name, total in self._totals.items():
            gradient = self._trainable[name].grad
            if gradient is None:
                continue
            total[active] += gradient[active]
            gradient[active] -= self._own[name][active]
            if name in self._common:
                gradient[active] += self._common[name][active]

    def renewed(self, up: Payload) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return by how much c_i changes for what goes ``up``, and all c_i that are kept.

        c_i+ is the mean gradient: c_i - c + (x - y_i) / (steps * rate) of option II, as
        x - y_i is the rate times the sum of the gradients plus c - c_i.
        """
        changes: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for name, tensor in up.items():
            if not is_difference(name, tensor, self._sent):
                continue
            changes[name] = torch.zeros_like(tensor)  # of what comes back without being trained
            if name in self._totals:
                kept[name] = self._per_step(self._totals[name])
                changes[name] = kept[name] - self._own[name]
        # One factor of two that take turns keeps its c_i until its next turn.
        for name, tensor in self._held.items():
            if name not in kept and is_difference(name, tensor, self._sent):
                kept[name] = tensor
        return changes, kept

    def _per_step(self, total: Tensor) -> Tensor:
        """Return a sum over each client's steps, (K, ...), as a mean."""
        steps = torch.tensor(self._steps, device=total.device).clamp(min=1)
        one_axis_each = [1] * (total.dim() - 1)
        return total / steps.view(-1, *one_axis_each)
