"""What is frozen is not computed twice: the hidden states below the lowest mounted block, kept per client."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from fedpeft.mounting import Trace, changes, overridden, touched, trace
from fedpeft.tasks import Encoded

Forward = Callable[[Encoded], object]
"""Runs the model over some texts."""


@final
@dataclass(frozen=True)
class Chain:
    """A model's blocks, each of which hands its output to the next, and all modules in the order in which they are called."""

    blocks: tuple[nn.Module, ...] = ()
    order: tuple[nn.Module, ...] = ()

    def lowest(self, mounted: Collection[nn.Module]) -> int:
        """Return the number of the last block that begins no later than the first of ``mounted``.

        0 where none does, and where one of ``mounted`` was never called: what uses it is not known then.
        """
        if not set(mounted) <= set(self.order):
            return 0
        number = 0
        for module in self.order:
            if module in self.blocks:
                number = self.blocks.index(module)
            if module in mounted:
                break
        return number


@final
class ActivationCache:
    """Keeps, for some clients, what enters the lowest block on which anything is mounted, and lets passes begin there.

    Exact where the frozen part is deterministic, that is without dropout. A client's states are computed from its texts
    alone, in batches of their own, so they do not depend on what ran before and a resumed run sees the same bits.
    ``clients``: whose states are kept. ``rows``: texts of a batch. A model whose blocks form no chain (ALBERT uses one
    many times) is left alone, and so is one on which anything is mounted in a way that this package does not know.
    """

    def __init__(self, clients: Collection[int] = (), rows: int = 32) -> None:
        self._clients, self._rows = frozenset(clients), rows
        self._bare: Trace | None = None  # the model before anything is mounted
        self._chain = Chain()
        self._looked = False  # at what is mounted now
        self._lowest = 0
        self._kept: dict[int, tuple[Encoded, Sequence[Tensor]]] = {}

    def keeps(self, client: int) -> bool:
        """Return whether the states of ``client`` are kept."""
        return client in self._clients

    def trace(self, model: nn.Module, forward: Forward, text: Encoded) -> None:
        """Find out how ``model`` is built, unless it is as it was; called each time before anything is mounted."""
        if not self._clients:
            return
        self._looked = False
        if self._bare is not None and not changes(self._bare, trace(model)):
            return
        self._kept.clear()
        length = len(text.ids[0])
        rows = 2 if length != 2 else 3  # another number than the length, to tell these axes apart
        with _recorded(model) as calls, torch.no_grad():
            forward(text.take([0] * rows))
        self._chain = _chain(model, calls, torch.Size([rows, length]))
        self._bare = trace(model)

    def get(
        self, client: int, model: nn.Module, forward: Forward, texts: Encoded
    ) -> Sequence[Tensor] | None:
        """Return what enters the lowest block for each of the client's ``texts``, (length, width); None where not kept."""
        if self._bare is None or client not in self._clients:
            return None
        if not self._looked:
            self._look(model, self._bare)
        if self._lowest == 0:
            return None
        known, states = self._kept.get(client, (None, ()))
        if known is not texts:
            states = _states(self._chain.blocks[self._lowest], forward, texts, self._rows)
            self._kept[client] = texts, states
        return states

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let passes in the ``with`` begin at the lowest block if they are given what enters it (see ``entering``)."""
        with ExitStack() as undo:
            if self._looked and self._lowest > 0:
                for block in self._chain.blocks[: self._lowest]:
                    undo.enter_context(overridden(block, partial(_unless_known, block.forward)))
                undo.callback(_change_input(self._chain.blocks[self._lowest], _known_or))
            yield

    def _look(self, model: nn.Module, bare: Trace) -> None:
        """Find out where the lowest block is; what enters another one than before is forgotten."""
        mounted = touched(model, bare)
        lowest = 0 if mounted is None else self._chain.lowest(mounted)
        if lowest != self._lowest:
            self._kept.clear()
        self._lowest, self._looked = lowest, True


_ENTERING: ContextVar[Sequence[Tensor] | None] = ContextVar("entering", default=None)


@contextmanager
def entering(states: Sequence[Tensor] | None) -> Iterator[None]:
    """OnWarning, for a pass in the ``with``, what enters the lowest block for each of its texts, (length, width), if known."""
    token = _ENTERING.set(states)
    try:
        yield
    finally:
        _ENTERING.reset(token)


def _unless_known(
    forward: Callable[..., object], hidden_states: Tensor, *args: object, **kwargs: object
) -> object:
    """Compute a block below the lowest, unless the pass begins above it."""
    return forward(hidden_states, *args, **kwargs) if _ENTERING.get() is None else hidden_states


def _known_or(hidden: Tensor) -> Tensor:
    """Return what enters the lowest block: what is known, padded as ``hidden``, (n, L, width), or what was computed."""
    if (states := _ENTERING.get()) is None:
        return hidden
    known = states[0].new_zeros(len(states), *hidden.shape[1:])
    for row, own in zip(known, states, strict=True):
        row[: len(own)] = own
    return known


def fitting(texts: Mapping[int, Encoded], bytes_per_token: int, limit: int) -> list[int]:
    """Return the clients, in order, whose states for all their ``texts`` fit into ``limit`` bytes together."""
    left, found = limit, list[int]()
    for client, own in sorted(texts.items()):
        size = bytes_per_token * sum(len(text) for text in own.ids)
        if size <= left:
            found.append(client)
            left -= size
    return found


class _Enough(Exception):
    """Ends a pass that has told what was to be known."""


def _states(block: nn.Module, forward: Forward, texts: Encoded, rows: int) -> Sequence[Tensor]:
    """Return what enters ``block`` for each of ``texts``; what is above is not computed."""
    order = sorted(range(len(texts)), key=lambda row: len(texts.ids[row]))
    found: dict[int, Tensor] = {}

    def take(hidden: Tensor) -> Tensor:
        for row, states in zip(batch, hidden, strict=True):
            found[row] = states[: len(texts.ids[row])].clone()
        raise _Enough

    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.callback(_change_input(block, take))
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            with suppress(_Enough):
                forward(texts.take(batch))
    return [found[row] for row in range(len(texts))]


def _change_input(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Let ``change`` make the first argument of ``block`` from the one given; return what undoes that."""

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return block.register_forward_pre_hook(before, with_kwargs=True).remove


@dataclass
class _Call:
    """One call of a module: its first input and its output."""

    module: nn.Module
    given: object
    output: object = None


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Call]]:
    """Yield a list that fills with the calls of all modules inside ``model``, in the order in which they begin."""
    calls: list[_Call] = []
    open_calls: list[_Call] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(module, args[0] if args else kwargs.get("hidden_states")))
        open_calls.append(calls[-1])

    def after(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
        open_calls.pop().output = output

    with ExitStack() as undo:
        for module in list(model.modules())[1:]:
            undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(after).remove)
        yield calls


def _chain(model: nn.Module, calls: Sequence[_Call], tokens: torch.Size) -> Chain:
    """Return the longest list of blocks that were called once each, every one with the output of the one before.

    ``tokens``: (rows, length) of the batch; what enters a block is one vector for each of them.
    """
    chains = [Chain()]
    for blocks in (
        tuple(module) for module in model.modules() if isinstance(module, nn.ModuleList)
    ):
        passed = [call for call in calls if call.module in blocks]
        joined = all(
            isinstance(a.output, Tensor) and a.output is b.given for a, b in pairwise(passed)
        )
        whole = all(
            isinstance(call.given, Tensor)
            and call.given.ndim == 3
            and call.given.shape[:2] == tokens
            for call in passed
        )
        if tuple(call.module for call in passed) == blocks and joined and whole:
            chains.append(Chain(blocks, tuple(call.module for call in calls)))
    return max(chains, key=lambda chain: len(chain.blocks))
