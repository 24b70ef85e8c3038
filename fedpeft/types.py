"""The vocabulary that every other file speaks: payloads, clients, states, methods, engines."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

Payload = Mapping[str, Tensor]
"""Named tensors: what crosses the wire either way, and what a client remembers.

A plain name (``classifier.weight``) is a parameter of the model; ``<module>:<factor>`` is a factor
of an adapter branch on that module, such as ``encoder.layer.0.attention.self.query:A``. Names that
begin with ``@`` belong to the training loop and the wire. Scalars are 0-d int64 or float64.
"""

NO_MEMORY = -1
"""The version of a memory that does not exist."""


@dataclass(frozen=True)
class Client:
    """A member of the federation as the server knows it.

    ``capacity``: the share of a full adapter that it can train. ``examples``: its number of
    training examples (0: unknown). ``memory``: the version of the memory that the server believes
    it to hold (``NO_MEMORY``: none).

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
    """What ``mount`` knows beside the messages: its clients' ids, the round and the run's seed.

    ``phase``: exchanges of this round that are done (see ``State``). ``examples``: how many each
    client trains on, which are its weight in a mean; empty where nobody trains.

    >>> len(Context(clients=[4, 7], round=0, seed=0).clients)  # K
    2
    """

    clients: Sequence[int]
    round: int
    seed: int
    phase: int = 0
    examples: Sequence[int] = ()


class Delta(Protocol):
    """What an adapter adds to one dense layer's matrix, for the K clients that are mounted."""

    def dense(self) -> Tensor:
        """Return the difference to the pre-trained matrix, (K, out, in)."""
        ...

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (B, A), (K, out, r) and (K, r, in), with B @ A = the difference.

        None where the difference has no low-rank form.
        """
        ...


def _nothing(_: slice) -> None: ...


@dataclass(frozen=True)
class RowNoise:
    """How a client's steps hide each row of its data (DP-SGD).

    ``clip``: largest L2 norm of a row's gradient. ``noise``: standard deviation of the noise in
    their sum over ``clip``.
    """

    clip: float
    noise: float


@dataclass(frozen=True)
class LocalTask:
    """What a stack of K clients trains in one round, and what it replies afterwards.

    ``trainable``: every tensor has the client axis first, (K, ...).
    ``reply``: returns (payload that goes up, memory that stays with the client), stacked over K.
    ``deltas``: what the mounted branches add, by module; read by merge and export.
    ``after_backward``: called after every backward pass with the slice of the clients that are
    still training; gradients are in ``.grad``.
    ``rate``: multiplies the configured learning rates (a stage of a method may have its own).
    ``steps``: the most optimizer steps that a client takes, None for all that are configured; 0
    trains nothing, as in a phase that only exchanges keys.
    ``discreet``: the reply does not tell on how many examples the client trained, in how many
    steps, and with what loss.
    ``rows``: how each step hides the rows that it is made of; None for plain steps. The reply then
    tells no loss.
    ``copies``: whether every row of a pass may have copies of its own of ``trainable``, so that the
    pass gives the gradients of its rows one by one (see ``mounting.Copies``).
    ``personal``: names of the tensors in ``trainable`` that never leave the client. Where there
    are any, there is no global model, and scores are those of each client's own model.

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
    steps: int | None = None
    discreet: bool = False
    rows: RowNoise | None = None
    copies: bool = False


@dataclass(frozen=True)
class Base:
    """The pre-trained model as a method's server half sees it: tensors and names, no code.

    ``parameters``: every parameter under its own name. ``layers``: the matrix of every dense layer,
    (out, in), by module name, also where the model stores the transpose. ``head``: names of the
    parameters of the task's output module, and of all others that the checkpoint lacks. ``packed``:
    the dense layers of which the matrix is kept in a few bits: it can be read, and no more.
    ``twin``: returns a copy of the model's modules with the very same parameters, for methods that
    let another library change modules; None where there is none.

    >>> import torch
    >>> base = Base({"w": torch.ones(2), "head.bias": torch.ones(3)}, {}, frozenset({"head.bias"}))
    >>> list(base.heads())
    ['head.bias']
    """

    parameters: Payload
    layers: Mapping[str, Tensor]
    head: frozenset[str]
    packed: frozenset[str] = frozenset()
    twin: Callable[[], nn.Module] | None = None

    def heads(self) -> dict[str, Tensor]:
        """Return the parameters of the head; every method trains and sends them in full."""
        return {name: tensor for name, tensor in self.parameters.items() if name in self.head}


@dataclass(frozen=True)
class State:
    """The server's side of a federation as a value: it can be saved, resumed and compared.

    ``round``: rounds done. ``shared``: what the federation trains, without client axis. ``server``:
    what the method keeps for itself. ``memories``: client -> version of the memory that it is known
    to hold (see ``wire/versions.py``). ``phase``: exchanges of the round under way that are done;
    0 for most methods, whose rounds have one exchange each.

    >>> State(0, shared={}).server
    {}
    """

    round: int
    shared: Payload
    server: Payload = field(default_factory=dict)
    memories: Mapping[int, int] = field(default_factory=dict)
    phase: int = 0

    def slice_of(self, owner: str) -> dict[str, Tensor]:
        """Return what ``owner`` keeps in ``server``, under its own names.

        >>> import torch
        >>> state = State(0, {}, {"mask": torch.ones(1)})
        >>> state = state.with_slice("0.fedavgm", {"w": torch.ones(2)})
        >>> list(state.server), list(state.slice_of("0.fedavgm"))
        (['mask', '0.fedavgm/w'], ['w'])
        """
        prefix = f"{owner}/"
        entries: dict[str, Tensor] = {}
        for name, tensor in self.server.items():
            if name.startswith(prefix):
                entries[name.removeprefix(prefix)] = tensor
        return entries

    def without(self, owner: str) -> "State":
        """Return the state as a method inside the wrapper ``owner`` knows it."""
        prefix = f"{owner}/"
        server: dict[str, Tensor] = {}
        for name, tensor in self.server.items():
            if not name.startswith(prefix):
                server[name] = tensor
        return replace(self, server=server)

    def with_slice(self, owner: str, entries: Payload) -> "State":
        """Return the state with ``entries`` as all that ``owner`` keeps in ``server``."""
        # Entries of the slice that ``entries`` does not name again are dropped.
        server = dict(self.without(owner).server)
        for name, tensor in entries.items():
            server[f"{owner}/{name}"] = tensor
        return replace(self, server=server)


@dataclass(frozen=True)
class WorthTuning:
    """Marks a field of a method that tuning tries beside the learning rate, and at which values.

    Fields without the mark keep what the settings say.

    >>> from typing import Annotated
    >>> Share = Annotated[float, WorthTuning((0.1, 1.0))]
    """

    values: tuple[object, ...]


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
        """Mount ``down`` and ``memory``, both stacked over K, on ``model`` while a ``with`` lasts.

        Both are read-only: they may be views of a message that other clients get, too. Several
        threads may call the mounted model at once.
        """
        ...

    def expects(self, state: State, down: Payload) -> Payload:
        """Return the names, shapes and dtypes of a valid reply, as meta tensors.

        The reply is one to ``down``, which ``send`` returned for ``state``.
        """
        ...

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Return the next state.

        ``updates`` is a stream in client order. It can be read once, and its payloads are
        read-only. Updates that this leaves unread are still collected, checked and recorded after
        it has returned.

        The next state is that of the next round, in phase 0. A method whose round has several
        exchanges returns one of the same round in the next phase instead: then the clients that
        have answered are asked again. Without any updates, it returns that of the next round.
        WireError where nothing can be made of the updates: the whole round is then silent.
        """
        ...


@runtime_checkable
class TrainsRepeatedly(Method, Protocol):
    """A method whose clients train in several phases of a round.

    ``trainings``: in how many at most, by which the privacy of DP-SGD is accounted for.
    """

    trainings: ClassVar[int]


@dataclass(frozen=True)
class Reply:
    """The bytes that came back from a client."""

    client: Client
    blob: bytes


@dataclass(frozen=True)
class Lost:
    """A client that was asked and did not answer; ``blob`` holds what bytes came back, if any."""

    client: Client
    reason: str
    blob: bytes = b""


class Engine(Protocol):
    """How bytes travel between the server and its clients."""

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Send every client its request and yield each one's answer, in any order.

        ``request`` is called when the client's turn comes, so that not all messages are in memory
        at once.
        """
        ...
