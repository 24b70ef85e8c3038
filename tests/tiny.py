"""What contract, law and parity tests stand on: a tiny encoder, a task without tokenizer, a worker, an engine that listens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from fedpeft.engines.local import LocalEngine
from fedpeft.federation.client import ClientData, Worker
from fedpeft.federation.memory import Memories
from fedpeft.federation.server import federate
from fedpeft.ledger import ClientRow
from fedpeft.methods import METHODS
from fedpeft.mounting import describe
from fedpeft.seeds import generator
from fedpeft.tasks import Classification, Encoded, Example
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Training
from fedpeft.types import Base, Client, Engine, Lost, Method, Payload, Reply, State
from fedpeft.wire.messages import Response, digest

SEED = 7
CPU = Hardware("cpu", "fp32", "eager", 1)
CONFIG = digest(b"tiny")
HEAD = frozenset({"classifier.weight", "classifier.bias"})
TARGETS = "query|value"
SOFTMAX_BLIND = "key.bias"
"""A bias of all keys shifts a row of attention scores by a constant, so its gradient is 0 but for rounding."""
SIZES: Mapping[int, int] = {0: 7, 1: 11, 2: 9}
"""Client -> examples; with batches of 6 all take 2 steps an epoch, the second one ragged."""

SGD = Training(optimizer="sgd", lr=0.5, momentum=0.9, batch_size=6)

FIELDS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "bitfit": {},
    "lora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "ffa_lora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "federa": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "sparse": {"targets": TARGETS, "density": 0.2},
    "slora": {"targets": TARGETS, "rank": 3, "density": 0.2, "rounds": 4, "stage1": 0.5},
    "fedara": {
        "targets": TARGETS,
        "rank": 4,
        "scale": 2.0,
        "rounds": 5,
        "warmup": 0.0,
        "settled": 0.2,
        "deviation": 0.5,
    },
    "local_only": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "rolora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "fedsa_lora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "flexlora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "fedsvd": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "fedex_lora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "flora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "hetlora": {"targets": TARGETS, "rank": 3, "scale": 2.0, "penalty": 0.5},
    "raflora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "lora_fair": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "fed_sb": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "ravan": {"targets": TARGETS, "heads": 2, "rank": 3, "scale": 2.0},
    "fedrot_lora": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "florist": {"targets": TARGETS, "rank": 3, "scale": 2.0},
    "adalora": {
        "targets": TARGETS,
        "rank": 4,
        "scale": 2.0,
        "rounds": 5,
        "warmup": 0.0,
        "deviation": 0.5,
        "orthogonality": 0.01,
    },
    "adapters": {"targets": "output.dense", "width": 3},
    "peft": {"tuner": "ia3"},
    "lora_a2": {"targets": TARGETS, "rank": 4, "chosen": 2, "scale": 2.0, "b_rate": 2.0},
    "slora_full": {
        "targets": TARGETS,
        "rank": 3,
        "rounds": 4,
        "stage1": 0.5,
        "stage1_method": "full",
    },
}
"""Small settings for every row of METHODS and VARIANTS; a new method needs a row here."""

VARIANTS: Mapping[str, str] = {"slora_full": "slora"}
"""Names of settings of a method that mount and train otherwise, and the method's name."""

NAMES = (*METHODS, *VARIANTS)
"""The rows of the contract table."""

if lacking := ", ".join(METHODS.keys() - FIELDS.keys()):
    raise LookupError(f"{lacking}: add small settings to FIELDS of tests/tiny.py")


def small(name: str, **changes: Any) -> Method:
    """Return the method ``name`` with small settings."""
    constructor: Callable[..., Method] = METHODS[VARIANTS.get(name, name)]
    return constructor(**{**FIELDS[name], **changes})


def shaken(model: nn.Module, seed: int = SEED) -> nn.Module:
    """Freeze ``model`` and move every parameter off its round starting value (zero biases hide mistakes)."""
    draw = generator(seed, "tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.requires_grad_(False).eval()


def bert(seed: int = SEED, **changes: Any) -> nn.Module:
    """Return a frozen BERT classifier for 3 labels: 2 layers of width 32, no dropout."""
    settings = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shaken(BertForSequenceClassification(BertConfig(**{**settings, **changes})), seed)


def deberta() -> nn.Module:
    """Return a frozen DeBERTa classifier for 3 labels, which sends its relative positions through query and key, too."""
    settings: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 24,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
        "share_att_key": True,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return shaken(DebertaV2ForSequenceClassification(DebertaV2Config(**settings)))


def base_of(model: nn.Module) -> Base:
    """Return the server's view of ``bert()``."""
    return describe(model, HEAD)


@final
@dataclass(frozen=True)
class Padding:
    """All that the task asks of a tokenizer once texts are numbers."""

    pad_token_id: int = 0


TASK = Classification(("a", "b", "c"), 16, tokenizer=Padding())


def encoded(ids: Sequence[Tensor], labels: Sequence[int]) -> Encoded:
    """Return texts, as token ids, with one label each."""
    rows = enumerate(zip(ids, labels, strict=True))
    return Encoded([Example(text, torch.tensor(label), row) for row, (text, label) in rows])


def examples(count: int, seed: int = SEED) -> Encoded:
    """Return ``count`` random texts of 3 to 10 tokens with random labels."""
    draw = generator(seed, "examples", count)
    lengths = torch.randint(3, 11, (count,), generator=draw).tolist()
    ids = [torch.randint(1, 100, (length,), generator=draw) for length in lengths]
    return encoded(ids, torch.randint(0, 3, (count,), generator=draw).tolist())


def logits(model: nn.Module, rows: Encoded | None = None) -> Tensor:
    """Return what ``model`` says now about a fixed batch."""
    with torch.no_grad():
        return TASK.logits(model, TASK.collate(rows or examples(8), CPU.torch_device))


def worker(
    method: Method, model: nn.Module, training: Training = SGD, sizes: Mapping[int, int] = SIZES
) -> Worker:
    """Return a worker that holds ``sizes`` random examples for every client."""
    held = {
        client: ClientData(examples(size, client), examples(4, client + 100))
        for client, size in sizes.items()
    }
    return Worker(
        method=method,
        model=model,
        task=TASK,
        client_data=held,
        training=training,
        hardware=CPU,
        head=HEAD,
        seed=SEED,
        config=CONFIG,
    )


def unchanged(_: int, outcome: Reply | Lost) -> Reply | Lost:
    """Let an outcome through."""
    return outcome


@final
@dataclass
class Tapped:
    """An engine that keeps what crosses it: ``talks`` has one client -> (request, reply) for every exchange.

    ``change`` may do something to what comes back, told the number of the exchange; ``backwards`` turns the order round.
    """

    engine: Engine
    change: Callable[[int, Reply | Lost], Reply | Lost] = unchanged
    backwards: bool = False
    talks: list[dict[int, tuple[bytes, bytes]]] = field(default_factory=list)

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Pass on requests and replies."""
        sent: dict[int, bytes] = {}

        def listening(client: Client) -> bytes:
            sent[client.id] = request(client)
            return sent[client.id]

        number, talk = len(self.talks), dict[int, tuple[bytes, bytes]]()
        self.talks.append(talk)
        outcomes = [
            self.change(number, outcome) for outcome in self.engine.exchange(clients, listening)
        ]
        talk.update(
            {
                outcome.client.id: (sent.get(outcome.client.id, b""), outcome.blob)
                for outcome in outcomes
            }
        )
        yield from reversed(outcomes) if self.backwards else outcomes


@final
@dataclass
class TinyFederation:
    """Clients, their memories and the server's records, all in this process."""

    method: Method
    worker: Worker
    memories: Memories
    engine: Tapped
    rows: list[ClientRow] = field(default_factory=list)

    @property
    def start(self) -> State:
        """Return the state before the first round."""
        return self.method.init(base_of(self.worker.model), SEED)

    def clients(self, _: int = 0) -> list[Client]:
        """Return everyone."""
        return [
            Client(number, examples=len(holding.train))
            for number, holding in self.worker.client_data.items()
        ]

    def play(
        self,
        rounds: int,
        state: State | None = None,
        cohort: Callable[[int], Sequence[Client]] | None = None,
        min_replies: int = 1,
        largest_update: float | None = None,
    ) -> State:
        """Return the state after so many more rounds."""
        begin = state or self.start
        states = federate(
            self.method,
            begin,
            self.engine,
            cohort or self.clients,
            range(begin.round, begin.round + rounds),
            config=CONFIG,
            min_replies=min_replies,
            record=self.rows.append,
            largest_update=largest_update,
        )
        return [begin, *states][-1]

    def answers(self, exchange: int) -> dict[int, Response]:
        """Return what every client said in exchange number ``exchange``."""
        return {
            client: Response.decode(reply)
            for client, (_, reply) in self.engine.talks[exchange].items()
        }


def federation(
    method: Method,
    change: Callable[[int, Reply | Lost], Reply | Lost] = unchanged,
    *,
    backwards: bool = False,
    training: Training = SGD,
    memories: Memories | None = None,
    sizes: Mapping[int, int] = SIZES,
) -> TinyFederation:
    """Return a federation on a fresh tiny encoder."""
    playing, kept = worker(method, bert(), training, sizes), memories or Memories()
    return TinyFederation(
        method, playing, kept, Tapped(LocalEngine(playing, kept), change, backwards)
    )


def weighted(payloads: Sequence[Payload], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean in float64 by plain torch: what every average is compared with."""
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    stacks = {
        name: torch.stack([payload[name].double() for payload in payloads]) for name in payloads[0]
    }
    return {name: torch.tensordot(share, stack, dims=1) for name, stack in stacks.items()}


def assert_same(left: Payload, right: Payload) -> None:
    """Assert that two payloads have the same names, dtypes and values to the bit, naming the tensor that is off."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        equal = torch.equal(left[name], right[name])
        assert equal, f"{name} differs"


def assert_same_state(left: State, right: State) -> None:
    """Assert that two states are equal to the bit."""
    assert (left.round, dict(left.memories)) == (right.round, dict(right.memories))
    assert_same(left.shared, right.shared)
    assert_same(left.server, right.server)


def close(left: Payload, right: Payload, tolerance: float) -> None:
    """Assert that two payloads have the same names and values within ``tolerance``, naming the tensor that is off."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name].double(), right[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )
