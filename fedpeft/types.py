"""The vocabulary that every other file speaks: payloads, clients, states, methods, engines."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from torch import Tensor, nn

Payload = Mapping[str, Tensor]
"""Named tensors: what crosses the wire either way, and what a client remembers.

A plain name (``classifier.weight``) is a parameter of the model; ``<module>:<factor>`` is a factor
of an adapter branch on that module, such as ``encoder.layer.0.attention.self.query:A``. Names that
begin with ``@`` are those of the loop and the wire. Scalars are 0-d int64 or float64.
"""

NO_MEMORY = -1
"""The version of a memory that does not exist."""


@dataclass(frozen=True)
class Client:
    """A member of the federation as the server knows it.

    ``capacity`` is the share of a full adapter that it can train, ``examples`` its number of
    training examples (0: unknown), ``memory`` the round in which it last stored a memory that the
    server agrees with (``NO_MEMORY``: none).

    >>> Client(3).memory == NO_MEMORY
    True
    """

    id: int
    capacity: float = 1.0
    examples: int = 0
    memory: int = NO_MEMORY


@dataclass(frozen=True)
class Update:
    """One client's valid reply to a training request; ``payload`` has no client axis any more.

    >>> Update(Client(0), examples=12, payload={}).examples
    12
    """

    client: Client
    examples: int
    payload: Payload


@dataclass(frozen=True)
class Context:
    """What ``mount`` may know beside the messages: whom it mounts, the round, and the run's seed.

    >>> len(Context(clients=[4, 7], round=0, seed=0).clients)  # K
    2
    """

    clients: Sequence[int]
    round: int
    seed: int


class Delta(Protocol):
    """What an adapter adds to one dense layer's matrix, stacked over the K clients that are mounted."""

    def dense(self) -> Tensor:
        """Return the difference to the pre-trained matrix, (K, out, in)."""
        ...

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (B, A) with B @ A = the difference, (K, out, r) and (K, r, in); None without."""
        ...


def _nothing(_: slice) -> None: ...


@dataclass(frozen=True)
class LocalTask:
    """What a stack of K clients trains in one round and what it says afterwards.

    ``trainable``: every tensor has the client axis first, (K, ...).
    ``reply``: gives (what goes up, what stays with the client), stacked over K.
    ``deltas``: what the mounted branches add, by module; read by merge and export.
    ``after_backward``: called after every backward pass with the clients that are still training;
    gradients are in ``.grad``.
    ``rate``: multiplies the configured learning rates (a stage of a method may have its own).
    ``personal``: names of what of ``trainable`` stays with the client; with any of it there is no
    global model, and scores are those of the clients' own.

    >>> import torch
    >>> bias = nn.Parameter(torch.zeros(2, 3))  # of two clients
    >>> task = LocalTask({"bias": bias}, reply=lambda: ({"bias": bias.detach()}, {}))
    >>> up, stays = task.reply()
    >>> up["bias"].shape, stays
    (torch.Size([2, 3]), {})
    """

    trainable: Mapping[str, nn.Parameter]
    reply: Callable[[], tuple[Payload, Payload]]
    deltas: Callable[[], Mapping[str, Delta]] = dict
    after_backward: Callable[[slice], None] = _nothing
    rate: float = 1.0
    personal: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Base:
    """The pre-trained model as a method's server half sees it: tensors and names, no code.

    ``parameters``: every parameter under its own name. ``layers``: the matrix of every dense layer,
    (out, in), by module name, whatever way round the model stores it. ``head``: names of the
    parameters of the task's output module, and of what else the checkpoint lacks.

    >>> import torch
    >>> base = Base({"w": torch.ones(2), "head.bias": torch.ones(3)}, {}, frozenset({"head.bias"}))
    >>> list(base.heads())
    ['head.bias']
    """

    parameters: Payload
    layers: Mapping[str, Tensor]
    head: frozenset[str]

    def heads(self) -> dict[str, Tensor]:
        """Return the parameters of the head; every method trains and sends them in full."""
        return {name: tensor for name, tensor in self.parameters.items() if name in self.head}


@dataclass(frozen=True)
class State:
    """The server's side of a federation as a value: saved, resumed, compared, printed as it is.

    ``round``: rounds done. ``shared``: what the federation trains, without client axis. ``server``:
    what the method keeps for itself. ``memories``: client -> version of the memory it is known to
    hold (see ``memory``).

    >>> State(0, shared={}).server
    {}
    """

    round: int
    shared: Payload
    server: Payload = field(default_factory=dict)
    memories: Mapping[int, int] = field(default_factory=dict)

    def slice_of(self, owner: str) -> dict[str, Tensor]:
        """Return what ``owner`` keeps in ``server``, under its own names.

        >>> import torch
        >>> state = State(0, {}, {"mask": torch.ones(1)})
        >>> state = state.with_slice("0.fedavgm", {"w": torch.ones(2)})
        >>> list(state.server), list(state.slice_of("0.fedavgm"))
        (['mask', '0.fedavgm/w'], ['w'])
        """
        prefix = f"{owner}/"
        own = {name: tensor for name, tensor in self.server.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in own.items()}

    def without(self, owner: str) -> "State":
        """Return the state as a method inside the wrapper ``owner`` knows it."""
        prefix = f"{owner}/"
        rest = {name: tensor for name, tensor in self.server.items() if not name.startswith(prefix)}
        return replace(self, server=rest)

    def with_slice(self, owner: str, entries: Payload) -> "State":
        """Return the state with ``entries`` as all that ``owner`` keeps in ``server``."""
        own = {f"{owner}/{name}": tensor for name, tensor in entries.items()}
        return replace(self, server={**self.without(owner).server, **own})


class Method(Protocol):
    """A federated fine-tuning method: a frozen dataclass whose fields are its configuration.

    ``init``, ``send``, ``expects`` and ``receive`` are pure and run on the server; ``mount`` runs
    on the client and undoes itself.
    """

    paper: ClassVar[str]

    def init(self, base: Base, seed: int) -> State:
        """Return the state before the first round."""
        ...

    def send(self, state: State, client: Client) -> Payload:
        """Return what goes down to ``client``."""
        ...

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount ``down`` and ``memory``, both stacked over K, on ``model`` for the length of a ``with``.

        Both are for reading: they may be views of a message that other clients get, too. What is
        mounted may be called by several threads at once.
        """
        ...

    def expects(self, state: State, down: Payload) -> Payload:
        """Return, as meta tensors, the names, shapes and dtypes of a valid reply to ``down``, which ``state`` sent."""
        ...

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Return the next state.

        ``updates`` is streamed in client order and can be read once; its payloads are for reading.
        What is left unread is asked for, checked and recorded all the same, once this has returned.
        """
        ...


@dataclass(frozen=True)
class Reply:
    """The bytes that came back from a client."""

    client: Client
    blob: bytes


@dataclass(frozen=True)
class Lost:
    """A client that was asked and did not answer; ``blob`` is what came back of it, if anything."""

    client: Client
    reason: str
    blob: bytes = b""


class Engine(Protocol):
    """How bytes travel between the server and its clients."""

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Send every client its request (built when it is needed) and yield each one's answer, in any order."""
        ...
