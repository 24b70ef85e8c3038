"""What is kept of frozen blocks changes nothing but the work: against the run without, in every family."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedpeft.federation.client import Worker
from fedpeft.methods import METHODS
from fedpeft.models import spare_last_block
from fedpeft.mounting import describe, detached, mounted, trainable
from fedpeft.training.activation_cache import ActivationCache, fitting
from fedpeft.training.loop import Training
from fedpeft.types import Client, Context, LocalTask, Method, Payload
from fedpeft.wire.messages import Kind, Request, Response
from tests.families import BERT, COMMON, DISTIL, FAMILIES, GPT2, GPT2_PLAIN, NO_DROPOUT, played
from tests.laws.test_stacks import ENCODER_DECODERS, HEADS, encoder_decoder
from tests.tiny import CONFIG, CPU, SEED, TASK, close, examples, shaken

SIZES = {0: 6, 1: 11, 2: 9}
SGD = Training(optimizer="sgd", lr=0.2, batch_size=4, epochs=2)
FOUR: dict[str, Any] = {**BERT, "num_hidden_layers": 4}
_LLAMA: Callable[[LlamaConfig], nn.Module] = (
    LlamaForSequenceClassification  # its __init__ is untyped
)

DEEP: Mapping[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**FOUR, **COMMON, **NO_DROPOUT)),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(**FOUR, **COMMON, **NO_DROPOUT)
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**{**DISTIL, "n_layers": 4}, **COMMON, seq_classif_dropout=0.0)
    ),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(**{**GPT2, "n_layer": 4}, **GPT2_PLAIN)
    ),
    "llama": lambda: _LLAMA(LlamaConfig(**FOUR, **COMMON, num_key_value_heads=1, pad_token_id=0)),
}
"""Of every family whose blocks form a chain, a model with four of them."""


def four_blocks(family: str) -> nn.Module:
    """Return a frozen model with four blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = shaken(DEEP[family]())
    spare_last_block(model)
    return model


def from_block(number: int) -> Method:
    """Return LoRA on the dense layers of block ``number``, counted from 0, and of those above."""
    blocks = "|".join(str(block) for block in range(number, 4))
    return METHODS["lora"](targets=rf"(layer|h|layers)\.({blocks})\.", rank=2)  # type: ignore[call-arg]


def working(method: Method, model: nn.Module, family: str = "bert") -> Worker:
    """Return a worker without a cache on ``model``."""
    return replace(played(family, method, SIZES, SGD), model=model)


def request(playing: Worker, method: Method, family: str, phase: int = 0) -> bytes:
    state = method.init(describe(playing.model, FAMILIES[family].head), SEED)
    down = method.send(state, Client(0))
    return Request(Kind.TRAIN, 0, CONFIG, down, phase=phase).encode()


def trained(
    playing: Worker, blob: bytes, stack: tuple[int, ...] = (0, 1, 2)
) -> dict[int, Mapping[str, Tensor]]:
    found = playing.handle(stack, [blob] * len(stack), [b""] * len(stack))
    return {
        client: Response.decode(answer).payload
        for client, (answer, _) in zip(stack, found, strict=True)
    }


def assert_like(
    playing: Worker, plain: Worker, blob: bytes, stack: tuple[int, ...] = (0, 1, 2)
) -> None:
    """Assert that a stack ends in what it ends in without anything kept."""
    expected = trained(plain, blob, stack)
    for client, payload in trained(playing, blob, stack).items():
        close(payload, expected[client], 1e-6)


class Calls:
    """Counts the rows that go into a module; made before anything is learnt of the model."""

    def __init__(self, module: nn.Module) -> None:
        self.rows = 0
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.rows += len(args[0] if args else kwargs["hidden_states"])


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def part_of(model: nn.Module, block: int) -> nn.Module:
    """Return a dense layer inside a block."""
    return next(
        module for module in blocks_of(model)[block].modules() if not list(module.children())
    )


@pytest.mark.parametrize(
    ("lowest", "pad_to_multiple_of"),
    [(1, 8), (2, 1), (3, 1), pytest.param(3, 8, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("family", DEEP)
def test_a_run_with_kept_states_equals_the_run_without(
    family: str, lowest: int, pad_to_multiple_of: int
) -> None:
    method = from_block(lowest)
    plain = working(method, four_blocks(family), family)
    plain = replace(plain, hardware=replace(CPU, pad_to_multiple_of=pad_to_multiple_of))
    kept = replace(plain, cache=ActivationCache(SIZES, rows=4))
    below, first = (Calls(part_of(plain.model, block)) for block in (lowest - 1, lowest))
    blob = request(plain, method, family)
    expected = trained(plain, blob)
    for client, payload in trained(kept, blob).items():
        close(payload, expected[client], 1e-6)
    below.rows = first.rows = 0
    for client, payload in trained(kept, blob).items():
        close(payload, expected[client], 1e-6)
    assert below.rows == 0, "a block below the lowest was computed again"
    assert first.rows == 2 * sum(SIZES.values())


def test_only_the_clients_named_are_kept_and_one_stranger_makes_its_stack_begin_at_the_bottom() -> (
    None
):
    method = from_block(2)
    plain = working(method, four_blocks("bert"))
    kept = replace(plain, cache=ActivationCache([0, 1]))
    calls = Calls(part_of(kept.model, 0))
    blob = request(plain, method, "bert")
    expected = trained(plain, blob)
    trained(kept, blob, (0, 1))
    calls.rows = 0
    trained(kept, blob, (0, 1))
    assert calls.rows == 0
    for client, payload in trained(kept, blob).items():
        close(payload, expected[client], 1e-6)
    assert calls.rows == 2 * sum(SIZES.values())


def test_states_do_not_depend_on_what_ran_before() -> None:
    """So a resumed run, which has none, ends in the same bits."""
    method = from_block(2)
    one, other = (
        replace(working(method, four_blocks("bert")), cache=ActivationCache(SIZES))
        for _ in range(2)
    )
    blob = request(one, method, "bert")
    for client in SIZES:
        trained(one, blob, (client,))
    for client, payload in trained(one, blob).items():
        assert all(
            torch.equal(payload[name], tensor)
            for name, tensor in trained(other, blob)[client].items()
        )


def test_what_is_mounted_lower_or_higher_than_before_is_computed_again() -> None:
    """What entered one block is not what enters another."""
    plain = working(from_block(3), four_blocks("bert"))
    kept = replace(plain, cache=ActivationCache(SIZES))
    for lowest in (3, 2, 3, 1, 0, 1):
        method = from_block(lowest)
        blob = request(plain, method, "bert")
        assert_like(replace(kept, method=method), replace(plain, method=method), blob)


@pytest.mark.parametrize("phase", [0, 1])
def test_what_is_kept_of_a_base_or_of_texts_that_have_changed_is_forgotten(phase: int) -> None:
    """Also between two exchanges of one round."""
    method = from_block(2)
    plain = working(method, four_blocks("bert"))
    kept = replace(plain, cache=ActivationCache(SIZES))
    blob = request(plain, method, "bert")
    trained(kept, blob)
    blob = request(plain, method, "bert", phase)
    first = blocks_of(plain.model)[0]
    changes: list[Callable[[], object]] = [
        lambda: first.get_parameter("output.dense.weight").mul_(-1),
        lambda: setattr(first.get_parameter("output.dense.bias"), "data", torch.ones(16)),
        lambda: setattr(first.get_submodule("output"), "dense", shaken(nn.Linear(24, 16))),
        lambda: first.register_forward_hook(lambda _module, _args, output: output * 1.5),
    ]
    before = trained(plain, blob)[0]
    for change in changes:
        with torch.no_grad():
            change()
        after = trained(plain, blob)[0]
        assert any((after[name] - before[name]).abs().max() > 1e-3 for name in after)
        assert_like(kept, plain, blob)
        before = after
    others = {client: plain.client_data[(client + 1) % 3] for client in SIZES}
    assert_like(replace(kept, client_data=others), replace(plain, client_data=others), blob)


@pytest.mark.parametrize("block", ["first", "lowest"])
def test_a_forward_that_others_gave_a_block_is_used_and_is_there_afterwards(block: str) -> None:
    method = from_block(2)
    plain = working(method, four_blocks("bert"))
    kept = replace(plain, cache=ActivationCache(SIZES))
    module = blocks_of(plain.model)[0 if block == "first" else 2]
    blob = request(plain, method, "bert")
    before = trained(plain, blob)[0]

    def louder(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs) * 1.5

    theirs = partial(louder, module.forward)
    module.forward = theirs
    after = trained(plain, blob)[0]
    assert any((after[name] - before[name]).abs().max() > 1e-3 for name in before)
    for _ in range(2):
        assert_like(kept, plain, blob)
        assert vars(module).get("forward") is theirs
    assert all(
        "forward" not in vars(other) for other in blocks_of(plain.model) if other is not module
    )


@pytest.mark.parametrize(
    "targets", [r"encoder\.(layers|block)\.3\.", r"decoder\.(layers|block)\.[23]\."]
)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_a_model_with_two_stacks_of_blocks_comes_out_the_same(name: str, targets: str) -> None:
    """Whichever of them is taken for the chain (BART), or none (T5)."""
    method: Method = METHODS["lora"](targets=targets, rank=2)  # type: ignore[call-arg]
    plain = encoder_decoder(name, method, 4)
    kept = replace(plain, cache=ActivationCache(SIZES))
    state = method.init(describe(plain.model, HEADS), SEED)
    blob = Request(Kind.TRAIN, 0, CONFIG, method.send(state, Client(0))).encode()
    for _ in range(2):
        for stack in ((0,), (0, 1, 2)):
            assert_like(kept, plain, blob, stack)


class Lifted(nn.Module):
    """A dense layer with a buffer that multiplies and a parameter that is added: places for strange mounts."""

    gain: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.lift = inner, nn.Parameter(torch.zeros(1, 16))
        self.register_buffer("gain", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) * self.gain + self.lift)


class Swapped(nn.Module):
    """A dense layer whose output is moved by what is trained."""

    def __init__(self, inner: nn.Module, own: nn.Parameter) -> None:
        super().__init__()
        self.inner, self.own = inner, [own]

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) + self.own[0])


class Plus(nn.Module):
    """A parametrization that adds what is trained."""

    def __init__(self, own: nn.Parameter) -> None:
        super().__init__()
        self.own = [own]

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.own[0].t()  # to each output its own, or a norm would take it out


Mount = Callable[[nn.Module, nn.Parameter], AbstractContextManager[object]]


def lifted(model: nn.Module) -> Any:
    """Return the ``Lifted`` layer in the first block."""
    return model.get_submodule("bert.encoder.layer.0.attention.output.dense")


@contextmanager
def with_attribute(target: Any, name: str, value: object) -> Iterator[None]:
    """Let an object have another attribute for a while."""
    before = getattr(target, name)
    is_object = not isinstance(target, type)
    of_class = is_object and name not in vars(target) and name in dir(type(target))
    setattr(target, name, value)
    try:
        yield
    finally:
        if of_class:
            delattr(target, name)
        else:
            setattr(target, name, before)  # a submodule, too, which lies in no attribute


@contextmanager
def hooked(register: Callable[..., Any], hook: Callable[..., object]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def parametrized(model: nn.Module, own: nn.Parameter) -> Iterator[None]:
    inner = lifted(model).inner
    parametrize.register_parametrization(inner, "weight", Plus(own))
    try:
        yield
    finally:
        parametrize.remove_parametrizations(inner, "weight", leave_parametrized=False)


@contextmanager
def replaced_in(where: dict[str, Any], name: str, value: Tensor) -> Iterator[None]:
    before = where[name]
    where[name] = value
    try:
        yield
    finally:
        where[name] = before


@contextmanager
def globally(model: nn.Module, own: nn.Parameter) -> Iterator[None]:
    target = lifted(model)
    with hooked(
        register_module_forward_hook,
        lambda module, _args, output: output + own if module is target else None,
    ):
        yield


def on_parent(model: nn.Module, own: nn.Parameter) -> AbstractContextManager[object]:
    parent = model.get_submodule("bert.encoder.layer.0.attention.output")
    forward = parent.forward
    return with_attribute(parent, "forward", lambda *args: forward(*args) + own)


def on_class(_: nn.Module, own: nn.Parameter) -> AbstractContextManager[object]:
    forward = Lifted.forward
    return with_attribute(Lifted, "forward", lambda self, x: forward(self, x) + own)


def on_whole_model(model: nn.Module, own: nn.Parameter) -> AbstractContextManager[object]:
    """Texts go in as embeddings that are moved."""
    embed = model.get_submodule("bert.embeddings.word_embeddings")

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.pop("input_ids")
        return args, {**kwargs, "inputs_embeds": embed(ids) + own}

    return hooked(partial(model.register_forward_pre_hook, with_kwargs=True), before)


STRANGE: Mapping[str, Mount] = {
    "a forward hook": lambda model, own: hooked(
        lifted(model).inner.register_forward_hook, lambda _module, _args, output: output + own
    ),
    "a forward pre-hook": lambda model, own: hooked(
        lifted(model).register_forward_pre_hook, lambda _module, args: (args[0] + own,)
    ),
    "a pre-hook on a block": lambda model, own: hooked(
        blocks_of(model)[1].register_forward_pre_hook,
        lambda _module, args: (args[0] + own, *args[1:]),
    ),
    "a hook on the embedding": lambda model, own: hooked(
        model.get_submodule("bert.embeddings.word_embeddings").register_forward_hook,
        lambda _module, _args, output: output + own,
    ),
    "a pre-hook on the whole model": on_whole_model,
    "a hook on every module there is": globally,
    "a forward on a parent": on_parent,
    "a forward of a class": on_class,
    "another submodule": lambda model, own: with_attribute(
        model.get_submodule("bert.encoder.layer.0.attention.output"),
        "dense",
        Swapped(lifted(model), own),
    ),
    "a parametrization": parametrized,
    "another buffer": lambda model, own: replaced_in(lifted(model)._buffers, "gain", 1 + own),
    "another parameter": lambda model, own: replaced_in(
        lifted(model)._parameters, "lift", own + 0.0
    ),
    "an attribute": lambda model, own: with_attribute(
        model.get_submodule("bert.encoder.layer.0.attention.self"), "scaling", 0.3 + own.sum()
    ),
}


@dataclass(frozen=True)
class Strange:
    """LoRA on the last block, and ``own``, (16,), which enters low down in a way of its own."""

    kind: str
    paper: ClassVar[str] = "none"

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        trained = trainable(down)
        usual = {name: tensor for name, tensor in trained.items() if name != "own"}
        with STRANGE[self.kind](model, trained["own"]), mounted(model, usual):
            yield LocalTask(trained, lambda: (detached(trained), {}))


def strange_bert() -> nn.Module:
    model: Any = four_blocks("bert")
    output = model.bert.encoder.layer[0].attention.output
    output.dense = Lifted(output.dense)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_mounted_in_a_way_that_is_not_known_is_trained_all_the_same(kind: str) -> None:
    """After rounds in which something was kept, and before others."""
    usual, strange = from_block(3), Strange(kind)
    plain = working(usual, strange_bert())
    blob = request(plain, usual, "bert")
    down = Request.decode(blob, CONFIG).payload
    asked = Request(Kind.TRAIN, 0, CONFIG, {**down, "own": torch.zeros(16)}).encode()
    other: Any = replace(plain, method=strange)  # type: ignore[arg-type]
    clients = (0, 1)
    expected_usual = {client: trained(plain, blob, (client,))[client] for client in clients}
    expected = {client: trained(other, asked, (client,))[client] for client in clients}
    activations = ActivationCache(clients)
    for _ in range(2):
        for client in clients:
            usual_again = trained(replace(plain, cache=activations), blob, (client,))[client]
            close(usual_again, expected_usual[client], 1e-6)
            found = trained(replace(other, cache=activations), asked, (client,))[client]
            assert found["own"].abs().max() > 1e-6, "what is trained moves"
            close(found, expected[client], 1e-6)


@dataclass(frozen=True)
class InPlace:
    """Trains a parameter of the base where it lies, in the first block, and puts back its value."""

    paper: ClassVar[str] = "none"

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        lift = lifted(model).lift
        before = lift.detach().clone()
        lift.requires_grad_(True)
        try:
            yield LocalTask({"own": lift}, lambda: ({"own": lift.detach().clone()}, {}))
        finally:
            lift.requires_grad_(False).copy_(before)
            lift.grad = None


def test_a_parameter_of_the_base_that_is_trained_where_it_lies_moves() -> None:
    plain: Any = replace(working(from_block(3), strange_bert()), method=InPlace())  # type: ignore[arg-type]
    blob = Request(Kind.TRAIN, 0, CONFIG, {}).encode()
    activations = ActivationCache(SIZES)
    for _ in range(2):
        expected = trained(plain, blob, (0,))[0]
        found = trained(replace(plain, cache=activations), blob, (0,))[0]
        assert found["own"].abs().max() > 1e-6
        close(found, expected, 1e-6)


@dataclass(frozen=True)
class AsSent:
    """Mounts and trains what is sent, whatever it is."""

    paper: ClassVar[str] = "none"

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        trained = trainable(down)
        with mounted(model, trained):
            yield LocalTask(trained, lambda: (detached(trained), {}))


THIRD = "bert.encoder.layer.2.output.dense"
KNOWN: Mapping[str, Payload] = {
    "a bias": {f"{THIRD}.bias": torch.zeros(16)},
    "a norm": {"bert.encoder.layer.2.output.LayerNorm.weight": torch.ones(16)},
    "a dense difference": {f"{THIRD}:dense": torch.zeros(16, 24)},
    "factors": {f"{THIRD}:A": torch.ones(1, 24), f"{THIRD}:B": torch.zeros(16, 1)},
    "a head alone": {"classifier.bias": torch.zeros(3)},
}


@pytest.mark.parametrize("stack", [(1,), (0, 1, 2)], ids=["alone", "three at once"])
@pytest.mark.parametrize("kind", KNOWN)
def test_what_this_package_mounts_is_known_and_blocks_below_are_not_computed(
    kind: str, stack: tuple[int, ...]
) -> None:
    plain: Any = replace(working(from_block(3), four_blocks("bert")), method=AsSent())  # type: ignore[arg-type]
    kept = replace(plain, cache=ActivationCache(SIZES))
    calls = Calls(part_of(plain.model, 1))
    blob = Request(Kind.TRAIN, 0, CONFIG, KNOWN[kind]).encode()
    assert_like(kept, plain, blob, stack)
    calls.rows = 0
    trained(kept, blob, stack)
    assert calls.rows == 0
    assert_like(kept, plain, blob, stack)


class Mixing(nn.Module):
    """A block that mixes the texts' tokens, and reads a matrix of a module that it does not call."""

    def __init__(self, table: nn.Linear | None, length_axis: int) -> None:
        super().__init__()
        self.dense, self.table, self.axis = nn.Linear(16, 16), [table], length_axis

    def forward(self, hidden: Tensor) -> Tensor:
        mean = hidden.mean(self.axis, keepdim=True)
        if self.table[0] is not None:
            mean = mean @ self.table[0].weight
        return torch.tanh(self.dense(hidden) + mean)


class Toy(nn.Module):
    """Four blocks in a row, on (rows, length, width) or with the first two axes turned round."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.embed, self.table, self.head = (
            nn.Embedding(60, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )
        axis = 0 if turned else 1
        self.blocks = nn.ModuleList(
            Mixing(None if number else self.table, axis) for number in range(4)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        hidden = hidden.transpose(0, 1).contiguous() if self.turned else hidden
        for block in self.blocks:
            hidden = block(hidden)
        hidden = hidden.transpose(0, 1) if self.turned else hidden
        return SimpleNamespace(logits=self.head(hidden[:, 0]))


def toy(turned: bool) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = shaken(Toy(turned))
    alone = Training(optimizer="sgd", lr=0.2, batch_size=1, epochs=2)  # the toy knows of no padding
    held = played("bert", AsSent(), SIZES, alone).client_data  # type: ignore[arg-type]
    head = frozenset({"head.weight", "head.bias"})
    return Worker(
        method=AsSent(),  # type: ignore[arg-type]
        model=model,
        task=TASK,
        client_data=held,
        training=alone,
        hardware=CPU,
        head=head,
        seed=SEED,
        config=CONFIG,
    )


@pytest.mark.parametrize("turned", [False, True], ids=["rows first", "length first"])
def test_blocks_into_which_other_than_a_vector_a_token_goes_form_no_chain(turned: bool) -> None:
    plain = toy(turned)
    kept = replace(plain, cache=ActivationCache(SIZES, rows=1))
    calls = Calls(part_of(plain.model, 0))
    blob = Request(Kind.TRAIN, 0, CONFIG, {"blocks.2.dense.bias": torch.zeros(16)}).encode()
    trained(kept, blob, (0,))
    calls.rows = 0
    trained(kept, blob, (0,))
    assert (calls.rows > 0) is turned
    for _ in range(2):
        assert_like(kept, plain, blob, (0,))


def test_what_is_mounted_on_a_module_that_is_never_called_may_be_used_anywhere() -> None:
    plain = toy(turned=False)
    kept = replace(plain, cache=ActivationCache(SIZES, rows=1))
    weight = plain.model.table.weight.detach()
    blob = Request(Kind.TRAIN, 0, CONFIG, {"table.weight": weight}).encode()
    for _ in range(2):
        assert_like(kept, plain, blob, (0,))
        assert not torch.equal(trained(kept, blob, (0,))[0]["table.weight"], weight)


def test_blocks_that_are_used_many_times_form_no_chain() -> None:
    method: Method = METHODS["lora"](targets="all-linear", rank=2)  # type: ignore[call-arg]
    plain = played("albert", method, SIZES, SGD)
    kept = replace(plain, cache=ActivationCache(SIZES))
    blob = request(plain, method, "albert")
    expected = trained(plain, blob)
    for client, payload in trained(kept, blob).items():
        assert all(torch.equal(payload[name], tensor) for name, tensor in expected[client].items())


def test_clients_are_kept_in_order_as_far_as_the_memory_goes() -> None:
    texts = {client: examples(size, client) for client, size in SIZES.items()}
    size = {client: 8 * sum(own.lengths) for client, own in texts.items()}
    assert fitting(texts, 8, sum(size.values())) == [0, 1, 2]
    assert fitting(texts, 8, size[0] + size[2]) == [0, 2]
    assert fitting(texts, 8, 0) == []
