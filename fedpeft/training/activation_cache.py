"""Cached hidden states: the output of the frozen blocks below the lowest mounted one.

It is computed once for each text.
"""

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
    """A model's blocks, each of which hands its output to the next.

    ``order``: all modules of the model in the order in which they are called. ``behind``: what each
    block returns behind its hidden states, nothing but None; it is None itself where the block
    returns no tuple.
    """

    blocks: tuple[nn.Module, ...] = ()
    order: tuple[nn.Module, ...] = ()
    behind: tuple[tuple[None, ...] | None, ...] = ()

    def lowest(self, mounted: Collection[nn.Module]) -> int:
        """Return the index of the last block that begins no later than the first of ``mounted``.

        It is 0 where none does. It is also 0 where one of ``mounted`` was never called: nobody
        knows what uses that module.
        """
        if not set(mounted) <= set(self.order):
            return 0
        index = 0
        # A block is called before the modules inside it, so a mounted layer belongs to the block
        # that was seen last. Embeddings are called before any block: nothing can be saved then.
        for module in self.order:
            if module in self.blocks:
                index = self.blocks.index(module)
            if module in mounted:
                break
        return index


@final
class ActivationCache:
    """Caches the hidden states that enter the lowest mounted block, so that passes can begin there.

    Exact where the frozen blocks are deterministic, that is without dropout. A client's states are
    computed from its texts alone, in batches of their own: they do not depend on what ran before,
    and a resumed run sees the same bits.

    ``clients``: whose states are cached. ``rows``: texts in such a batch. Nothing is cached for a
    model whose blocks form no chain (ALBERT uses one block many times), nor for one that somebody
    has changed in a way that this package does not know.
    """

    def __init__(self, clients: Collection[int] = (), rows: int = 32) -> None:
        self._clients, self._rows = frozenset(clients), rows
        self._unmounted: Trace | None = None  # the model before anything is mounted
        self._chain = Chain()
        self._is_located = False  # whether _lowest is that of what is mounted now
        self._lowest = 0  # index of the lowest mounted block; 0: nothing can be saved
        self._states: dict[int, tuple[Encoded, Sequence[Tensor]]] = {}

    def keeps(self, client: int) -> bool:
        """Return whether the states of ``client`` are cached."""
        return client in self._clients

    def trace(self, model: nn.Module, forward: Forward, text: Encoded) -> None:
        """Find the chain of blocks of ``model``, unless the model is as it was.

        To be called before anything is mounted, in the first exchange of every round.
        """
        if not self._clients:
            return
        self._is_located = False
        if self._unmounted is not None and not changes(self._unmounted, trace(model)):
            return
        # The model has changed: states of the old one are wrong for this one.
        self._states.clear()
        length = len(text[0])
        rows = 2 if length != 2 else 3  # another number than the length, to tell these axes apart
        with _recorded(model) as calls, torch.no_grad():
            forward(text.take([0] * rows))
        self._chain = _chain(model, calls, torch.Size([rows, length]))
        # Traced again: a first pass may itself set attributes of a model's modules.
        self._unmounted = trace(model)

    def relocate(self) -> None:
        """Look anew for the lowest mounted block, of the model as it was last traced.

        Instead of ``trace``, in later exchanges of a round. A change by others since then is seen
        when the block is looked for, and nothing is cached then.
        """
        self._is_located = False

    def get(
        self, client: int, model: nn.Module, forward: Forward, texts: Encoded
    ) -> Sequence[Tensor] | None:
        """Return the hidden states of each of the client's ``texts``, (length, width).

        They are computed where they are not cached yet. None where the states of this client are
        not to be cached, or of this model cannot be.
        """
        if self._unmounted is None or client not in self._clients:
            return None
        if not self._is_located:
            self._locate(model, self._unmounted)
        if self._lowest == 0:
            return None
        cached_texts, states = self._states.get(client, (None, ()))
        # Compared by identity: a client's encoded texts are one object for the length of a run.
        if cached_texts is not texts:
            states = _hidden_states(self._chain.blocks[self._lowest], forward, texts, self._rows)
            self._states[client] = texts, states
        return states

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let passes in the ``with`` begin at the lowest mounted block if they are ``entering``."""
        with ExitStack() as undo:
            # Blocks below hand on what they get, and the lowest mounted one takes the cached states
            # instead. Whether a pass does so is decided as it runs, by its thread's ``entering``.
            if self._is_located and self._lowest > 0:
                below = slice(0, self._lowest)
                blocks, behind = self._chain.blocks[below], self._chain.behind[below]
                for block, nones in zip(blocks, behind, strict=True):
                    skipping = partial(_skip_or_run, block.forward, nones)
                    undo.enter_context(overridden(block, skipping))
                lowest = self._chain.blocks[self._lowest]
                undo.callback(_change_input(lowest, _cached_or_computed))
            yield

    def _locate(self, model: nn.Module, unmounted: Trace) -> None:
        """Find the lowest mounted block; if it is another one, forget all cached states."""
        mounted = touched(model, unmounted)
        lowest = 0 if mounted is None else self._chain.lowest(mounted)
        if lowest != self._lowest:
            self._states.clear()
        self._lowest, self._is_located = lowest, True


_ENTERING: ContextVar[Sequence[Tensor] | None] = ContextVar("entering", default=None)


@contextmanager
def entering(states: Sequence[Tensor] | None) -> Iterator[None]:
    """Let a pass in the ``with`` begin with cached hidden states.

    ``states``: those of each of its texts, (length, width); None to begin at the first block.
    """
    token = _ENTERING.set(states)
    try:
        yield
    finally:
        _ENTERING.reset(token)


def _skip_or_run(
    forward: Callable[..., object],
    nones: tuple[None, ...] | None,
    hidden_states: Tensor,
    *args: object,
    **kwargs: object,
) -> object:
    """Run a block below the lowest mounted one, unless the pass begins above it.

    ``nones``: what the block returns behind its hidden states (see ``Chain``).
    """
    if _ENTERING.get() is None:
        return forward(hidden_states, *args, **kwargs)
    return hidden_states if nones is None else (hidden_states, *nones)


def _cached_or_computed(computed: Tensor) -> Tensor:
    """Return the hidden states that enter the lowest mounted block, (n, L, width).

    They are the cached ones, padded to the shape of ``computed``. A pass without cached states has
    ``computed`` themselves.
    """
    states = _ENTERING.get()
    if states is None:
        return computed
    # Skipped blocks hand on the embeddings: these have the shape that is wanted. What padding holds
    # does not matter, as attention masks it.
    padded = states[0].new_zeros(len(states), *computed.shape[1:])
    for row, text_states in zip(padded, states, strict=True):
        row[: len(text_states)] = text_states
    return padded


def fitting(texts: Mapping[int, Encoded], bytes_per_token: int, limit: int) -> list[int]:
    """Return clients whose states for all their ``texts`` fit into ``limit`` bytes together.

    Clients are taken in order, and one that does not fit is skipped: the choice depends on nothing
    that happens in a run.

    >>> from fedpeft.tasks import Example
    >>> def one_text(length):
    ...     return Encoded([Example(torch.zeros(length), labels=torch.tensor(0))])
    >>> short, long = one_text(10), one_text(90)
    >>> fitting({0: short, 1: long, 2: short}, bytes_per_token=4, limit=100)
    [0, 2]
    """
    left = limit
    clients: list[int] = []
    for client, client_texts in sorted(texts.items()):
        size = bytes_per_token * sum(client_texts.lengths)
        if size <= left:
            clients.append(client)
            left -= size
    return clients


class _Stop(Exception):
    """Ends a pass once the hidden states are known."""


def _hidden_states(
    block: nn.Module, forward: Forward, texts: Encoded, rows: int
) -> Sequence[Tensor]:
    """Return the hidden states that enter ``block`` for each of ``texts``, (length, width).

    ``block`` and those above it are not computed. ``rows``: texts in a batch.
    """
    # By length: little padding. The batches are the same whenever these texts come.
    by_length = sorted(range(len(texts)), key=texts.lengths.__getitem__)
    states_of: dict[int, Tensor] = {}

    def record(hidden: Tensor) -> Tensor:
        """Note what enters ``block``, (rows, L, width), and end the pass."""
        for row, padded in zip(batch, hidden, strict=True):
            length = texts.lengths[row]
            states_of[row] = padded[:length].clone()  # a view would keep the whole batch
        raise _Stop

    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.callback(_change_input(block, record))
        for start in range(0, len(by_length), rows):
            batch = by_length[start : start + rows]
            with suppress(_Stop):
                forward(texts.take(batch))
    return [states_of[row] for row in range(len(texts))]


def _change_input(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Give ``block`` the result of ``change`` instead of its input; return what undoes this."""

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Families differ in whether hidden states are passed by position or by name.
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return block.register_forward_pre_hook(before, with_kwargs=True).remove


@dataclass
class _Call:
    """One call of a module: its first input and its output."""

    module: nn.Module
    first_input: object
    output: object = None


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Call]]:
    """Yield a list that fills with the calls of all modules inside ``model``, as they begin."""
    calls: list[_Call] = []
    open_calls: list[_Call] = []  # a stack: the call that began last ends first

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first_input = args[0] if args else kwargs.get("hidden_states")
        call = _Call(module, first_input)
        calls.append(call)
        open_calls.append(call)

    def after(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
        open_calls.pop().output = output

    with ExitStack() as undo:
        inside = list(model.modules())[1:]  # the first is the model itself
        for module in inside:
            undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(after).remove)
        yield calls


def _chain(model: nn.Module, calls: Sequence[_Call], tokens: torch.Size) -> Chain:
    """Return the longest list of blocks of ``model`` that form a chain, an empty one if none do.

    Each is called once, with the output of the one before. ``tokens``: (rows, length) of the batch
    in which ``calls`` were recorded.
    """
    longest = Chain()
    order = tuple(call.module for call in calls)
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        blocks = tuple(module)
        block_calls = [call for call in calls if call.module in blocks]
        if len(blocks) > len(longest.blocks) and _form_chain(blocks, block_calls, tokens):
            behind = tuple(_behind(call.output) for call in block_calls)
            longest = Chain(blocks, order, behind)
    return longest


def _behind(output: object) -> tuple[None, ...] | None:
    """Return what a block gives out behind its hidden states (see ``Chain``)."""
    return (None,) * (len(output) - 1) if isinstance(output, tuple) else None


def _form_chain(
    blocks: tuple[nn.Module, ...], block_calls: Sequence[_Call], tokens: torch.Size
) -> bool:
    """Return whether ``blocks`` form a chain; ``block_calls``: their calls, as they began."""
    # A block that is called twice, or not at all, could not be skipped.
    called = [call.module for call in block_calls]
    if called != list(blocks):
        return False
    for one, following in pairwise(block_calls):
        if not _hands_on(one, following):
            return False
    return all(_takes_vectors(call, tokens) for call in block_calls)


def _hands_on(call: _Call, following: _Call) -> bool:
    """Return whether the output of one call is the very input of another."""
    output = call.output
    # DeBERTa's blocks return a tuple, with nothing else in it that would be skipped with them.
    if isinstance(output, tuple) and all(other is None for other in output[1:]):
        output = output[0]
    # The very tensor: anything that is computed between two blocks would be skipped with them.
    return isinstance(output, Tensor) and output is following.first_input


def _takes_vectors(call: _Call, tokens: torch.Size) -> bool:
    """Return whether a call was given one vector for each of the ``tokens``, (rows, length)."""
    # Models that turn the axes round, (length, rows, width), cannot be cut by text.
    hidden = call.first_input
    return isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == tokens
