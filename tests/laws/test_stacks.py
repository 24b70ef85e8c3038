"""Side by side equals one by one in every family that is promised to work, whatever the parts a step is cut into."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from fedpeft.experiment import stacking as stacks
from fedpeft.experiment.stacking import apart, widest
from fedpeft.federation.client import ClientData, Worker
from fedpeft.ledger import Measured, Measurement
from fedpeft.methods import METHODS
from fedpeft.mounting import describe
from fedpeft.seeds import generator
from fedpeft.tasks import Encoded
from fedpeft.training.evaluation import predictions
from fedpeft.training.loop import Training
from fedpeft.types import NO_MEMORY, Base, Client, Method, Payload, State
from fedpeft.wire.messages import Kind, Request, Response
from tests.families import FAMILIES, played
from tests.tiny import CONFIG, CPU, SEED, TASK, close, encoded, shaken

SIZES = {0: 6, 1: 11, 2: 9}
"""With batches of 4: 2, 3 and 3 steps, the last of which have 2, 3 and 1 rows."""

SGD = Training(optimizer="sgd", lr=0.2, momentum=0.9, weight_decay=0.1, batch_size=4, clip=0.3)

SETTINGS = {
    "bitfit": {},
    "lora": {"targets": "all-linear", "rank": 2},
    "ffa_lora": {"targets": "attention", "rank": 2},
    "federa": {"targets": "attention", "rank": 2},
    "slora": {"targets": "attention", "rank": 2, "rounds": 1, "stage1": 0.0},
    "fedara": {"targets": "all-linear", "rank": 2, "deviation": 0.5},
}
"""SLoRA in its second stage."""

FORMS = ("lora", "fedara")
"""Every family is always tried with these, on all its dense layers; with the others in ``make test-all``."""


def tried(families: Iterable[str], without: tuple[str, str]) -> list[Any]:
    """Return every family with every method but one pair, of a family that has no biases for BitFit."""
    pairs: list[Any] = []
    for pair in product(families, SETTINGS):
        if pair != without:
            marks = () if pair[1] in FORMS or pair[0] == "bert" else pytest.mark.slow
            pairs.append(pytest.param(*pair, marks=marks))
    return pairs


PAIRS = tried(FAMILIES, without=("llama", "bitfit"))


def requests(method: Method, base: Base) -> tuple[bytes, State]:
    state = method.init(base, SEED)
    return Request(Kind.TRAIN, 0, CONFIG, method.send(state, Client(0)), NO_MEMORY).encode(), state


def answers(playing: Worker, stack: list[int], blob: bytes) -> dict[int, Response]:
    found = playing.handle(stack, [blob] * len(stack), [b""] * len(stack))
    return {
        client: Response.decode(answer) for client, (answer, _) in zip(stack, found, strict=True)
    }


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_k_clients_at_once_equal_k_one_by_one_in_every_family(family: str, name: str) -> None:
    """Unequal steps, ragged batches, and parts of a few tokens in which clients mix unevenly, one or two at once."""
    method: Method = METHODS[name](**SETTINGS[name])
    playing = played(family, method, SIZES, SGD)
    blob, state = requests(method, describe(playing.model, FAMILIES[family].head))
    alone = {client: answers(playing, [client], blob)[client] for client in SIZES}
    assert max(_moved(state, answer.payload) for answer in alone.values()) > 0.01
    for hardware in (
        CPU,
        replace(CPU, tokens=40),
        replace(CPU, tokens=60, threads=2, pad_to_multiple_of=4),
    ):
        together = answers(replace(playing, hardware=hardware), [0, 1, 2], blob)
        for client in SIZES:
            close(together[client].payload, alone[client].payload, 2e-5)
            ours, theirs = together[client].measured, alone[client].measured
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.steps == theirs.steps


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_what_is_scored_together(family: str) -> None:
    """Nor on padding: in parts of a few tokens, two at once, in grains."""
    playing = played(family, METHODS["bitfit"](), {0: 23}, SGD)
    texts = playing.client_data[0].test
    alone = [
        predictions(playing.model, TASK, texts.take([row]), CPU)[0] for row in range(len(texts))
    ]
    for hardware in (CPU, replace(CPU, tokens=60, threads=2, pad_to_multiple_of=4)):
        together = predictions(playing.model, TASK, texts, hardware)
        for ours, theirs in zip(together, alone, strict=True):
            close(ours, theirs, 1e-5)


def test_a_client_that_diverges_takes_nobody_along() -> None:
    """Its numbers leave the number format; its neighbours' stay to the last digit that rows side by side allow."""
    method: Method = METHODS["lora"](**SETTINGS["lora"])
    playing = played("bert", method, SIZES, SGD)
    blob, state = requests(method, describe(playing.model, FAMILIES["bert"].head))
    spoilt = {name: torch.full_like(tensor, torch.inf) for name, tensor in state.shared.items()}
    bad = Request(Kind.TRAIN, 0, CONFIG, spoilt, NO_MEMORY).encode()
    alone = {client: answers(playing, [client], blob)[client] for client in (0, 2)}
    for tokens in (1024, 40):
        mixed = replace(playing, hardware=replace(CPU, tokens=tokens))
        found = mixed.handle([0, 1, 2], [blob, bad, blob], [b""] * 3)
        assert not _finite(Response.decode(found[1][0]).payload)
        for client in (0, 2):
            close(Response.decode(found[client][0]).payload, alone[client].payload, 2e-5)


T5: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "num_labels": 3,
    "attn_implementation": "eager",
}
BART: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 24,
    "dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
    "num_labels": 3,
    "attn_implementation": "eager",
}


def t5(blocks: int) -> nn.Module:
    """Return T5 with ``blocks`` in the encoder and as many in the decoder; its end mark is 1."""
    return T5ForSequenceClassification(T5Config(num_layers=blocks, **T5))


def bart(blocks: int) -> nn.Module:
    """Return BART with ``blocks`` in the encoder and as many in the decoder; its end mark is 1."""
    return BartForSequenceClassification(
        BartConfig(encoder_layers=blocks, decoder_layers=blocks, **BART)
    )


ENCODER_DECODERS: Mapping[str, Callable[[int], nn.Module]] = {"t5": t5, "bart": bart}
"""Models that read a text at its last end mark and refuse one that has none."""
HEADS = frozenset(
    f"classification_head.{layer}.{part}"
    for layer in ("dense", "out_proj")
    for part in ("weight", "bias")
)


def ended(count: int, seed: int, longest: int = 10) -> Encoded:
    """Return ``count`` texts of up to ``longest`` tokens, the first so long, each with an end mark."""
    draw = generator(SEED, "ended", seed)
    lengths = [longest, *torch.randint(2, longest + 1, (count - 1,), generator=draw).tolist()]
    end = torch.tensor([1])
    ids = [
        torch.cat([torch.randint(2, 60, (length - 1,), generator=draw), end]) for length in lengths
    ]
    return encoded(ids, torch.randint(0, 3, (count,), generator=draw).tolist())


def encoder_decoder(name: str, method: Method, blocks: int = 2) -> Worker:
    """Return a worker on a model that wants whole texts; the clients hold ``SIZES`` of them."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = shaken(ENCODER_DECODERS[name](blocks))
    held = {k: ClientData(ended(size, k), ended(4, 10 + k)) for k, size in SIZES.items()}
    return Worker(
        method=method,
        model=model,
        task=TASK,
        client_data=held,
        training=SGD,
        hardware=CPU,
        head=HEADS,
        seed=SEED,
        config=CONFIG,
    )


def clients_of(playing: Worker) -> list[Client]:
    return [Client(k, examples=len(held.train)) for k, held in playing.client_data.items()]


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_models_that_want_whole_texts_are_known_to_keep_rows_apart(name: str) -> None:
    """T5 and BART, whose every text must have its end mark, however long the first one is."""
    playing = encoder_decoder(name, METHODS["lora"](**SETTINGS["lora"]))
    base = describe(playing.model, HEADS)
    for longest in (2, 3, 5, 6, 10, 16):
        held = ClientData(ended(6, longest, longest), ended(1, 0))
        assert apart(replace(playing, client_data={4: held}), base)
    assert widest(playing, base, clients_of(playing), 3) in (1, 2, 3)


TRIED = tried(ENCODER_DECODERS, without=("t5", "bitfit"))


@pytest.mark.parametrize(("name", "chosen"), TRIED)
def test_k_clients_at_once_equal_k_one_by_one_in_models_that_want_whole_texts(
    name: str, chosen: str
) -> None:
    method: Method = METHODS[chosen](**SETTINGS[chosen])
    playing = encoder_decoder(name, method)
    blob, state = requests(method, describe(playing.model, HEADS))
    alone = {client: answers(playing, [client], blob)[client] for client in SIZES}
    assert max(_moved(state, answer.payload) for answer in alone.values()) > 0.01
    for hardware in (CPU, replace(CPU, tokens=40)):
        together = answers(replace(playing, hardware=hardware), [0, 1, 2], blob)
        for client in SIZES:
            close(together[client].payload, alone[client].payload, 2e-5)
            ours, theirs = together[client].measured, alone[client].measured
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


def test_a_model_that_cannot_be_probed_trains_one_client_at_a_time() -> None:
    """It raises what it likes; the reason shows again where a client trains."""
    method: Method = METHODS["lora"](**SETTINGS["lora"])
    playing = encoder_decoder("t5", method)
    base = describe(playing.model, HEADS)
    endless = encoded([torch.tensor([5, 6, 7])], [0])
    broken = replace(playing, client_data={0: ClientData(endless, endless)})
    assert not apart(broken, base)
    with pytest.raises(ValueError, match="eos"):
        answers(broken, [0], requests(method, base)[0])
    nothing = Encoded([])
    assert not apart(replace(playing, client_data={0: ClientData(nothing, nothing)}), base)


def test_a_text_is_as_long_as_no_batch_has_rows() -> None:
    """A model that turns rows and length round would else look as though it kept rows apart."""
    turned = replace(
        played("bert", METHODS["lora"](**SETTINGS["lora"]), SIZES, SGD),
        model=Turned(),
        head=frozenset(),
    )
    base = describe(turned.model, [])
    for length in (2, 3, 4, 5, 6, 7, 8, 12):
        text = torch.arange(1, length + 1)
        own = encoded([text] * 9, [0] * 9)
        for size in (1, 2, 3, 4, 16):
            training = replace(SGD, batch_size=size)
            held = {0: ClientData(own, own)}
            assert not apart(replace(turned, client_data=held, training=training), base)


@dataclass(frozen=True)
class Logits:
    """What a model returns."""

    logits: Tensor


class Turned(nn.Module):
    """A classifier that computes with the length first and the rows second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dense = nn.Embedding(60, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Logits:
        hidden = self.dense(self.embed(input_ids).transpose(0, 1))
        return Logits(hidden.transpose(0, 1)[:, 0])


def test_a_size_for_which_the_memory_does_not_suffice_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU says so by an error of its own, in the middle of the trial."""
    playing = played("bert", METHODS["lora"](**SETTINGS["lora"]), dict.fromkeys(range(8), 6), SGD)
    clock = [0.0]

    class Small:
        hardware = CPU

        def handle(
            self, clients: Sequence[int], asked: Sequence[bytes], held: Sequence[bytes]
        ) -> list[tuple[bytes, bytes]]:
            if len(clients) > 4:
                raise RuntimeError("out of memory")
            clock[0] += 0.1
            return [(Response(0, {}, Measured(examples=1)).encode(), b"")] * len(clients)

    monkeypatch.setattr(stacks, "_trial", lambda *_: (Small(), b""))
    monkeypatch.setattr(stacks, "measured", lambda _: nullcontext(Measurement()))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert widest(playing, describe(playing.model, []), clients_of(playing), 8) == 4


def _moved(state: State, payload: Payload) -> float:
    return max(
        float((payload[name] - tensor).abs().max())
        for name, tensor in state.shared.items()
        if name in payload
    )


def _finite(payload: Payload) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for tensor in payload.values()
        if tensor.is_floating_point()
    )
