"""Mounted factors equal merged weights in every family; tied parameters move everywhere; what cannot be kept apart refuses."""

import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fedpeft.mounting import (
    Targets,
    dense_layer,
    describe,
    mounted,
    oriented,
    replaced,
    rows_of,
    select,
    trainable,
    values,
)
from fedpeft.seeds import generator
from fedpeft.types import BadInput, Base, WireError
from fedpeft.wire import Answer, Kind, Request
from tests.families import FAMILIES, GPT2, GPT2_PLAIN, family, says, texts
from tests.tiny import CONFIG, HEAD, SEED, base_of, bert, deberta, shaken, small, worker

K = 3
SCALE = 0.5


def factors(model: nn.Module, head: frozenset[str], triplet: bool, clients: int = K) -> dict[str, Tensor]:
    """Return random B, A and perhaps e, (K, ...), for every dense layer outside the head; ranks differ."""
    draw = generator(1, "factors")
    found: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(select(describe(model, head), "all-linear").items()):
        rank = 1 + number % 3
        found[f"{name}:A"] = 0.3 * torch.randn(clients, rank, weight.shape[1], generator=draw)
        found[f"{name}:B"] = 0.3 * torch.randn(clients, weight.shape[0], rank, generator=draw)
        if triplet:
            found[f"{name}:e"] = torch.randn(clients, rank, generator=draw)
    return found


def merged(model: nn.Module, tensors: dict[str, Tensor], client: int) -> nn.Module:
    """Return a copy whose weights hold scale * B diag(e) A of one client, each layer turned as it is stored."""
    other = deepcopy(model)
    for name in {part.partition(":")[0] for part in tensors}:
        B, A = (tensors[f"{name}:{part}"][client] for part in "BA")
        e = tensors.get(f"{name}:e", torch.ones(K, len(A)))[client]
        difference = SCALE * B @ e.diag() @ A
        module = other.get_submodule(name)
        with torch.no_grad():
            getattr(module, "weight").add_(difference.t() if isinstance(module, Conv1D) else difference)  # noqa: B009
    return other


@pytest.mark.parametrize("triplet", [False, True], ids=["B A", "B E A"])
@pytest.mark.parametrize("name", FAMILIES)
def test_branches_equal_weights_with_the_difference_merged_in(name: str, triplet: bool) -> None:
    """For K clients at once, for one, and for those of K that are still training."""
    model, ids = family(name), texts(2 * K)
    tensors = factors(model, FAMILIES[name].head, triplet)
    expected = torch.cat([says(merged(model, tensors, k), ids[2 * k : 2 * k + 2]) for k in range(K)])
    assert (expected - says(model, ids)).abs().max() > 0.02, "the difference shows"
    with mounted(model, tensors, SCALE):
        torch.testing.assert_close(says(model, ids), expected, rtol=1e-5, atol=1e-5)
        with rows_of(slice(0, 2)):
            torch.testing.assert_close(says(model, ids[:4]), expected[:4], rtol=1e-5, atol=1e-5)
    with mounted(model, {part: tensor[1:2] for part, tensor in tensors.items()}, SCALE):
        torch.testing.assert_close(says(model, ids[2:4]), expected[2:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_words_choose_dense_layers_by_type_and_leave_the_head_out(name: str) -> None:
    model, described = family(name), FAMILIES[name]
    base = describe(model, described.head)
    attention, everything = select(base, "attention"), select(base, "all-linear")
    assert (len(attention), len(everything)) == (described.attention, described.linear)
    dense = {part for part, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert everything.keys() == {part for part in dense if f"{part}.weight" not in described.head}
    assert attention.keys() < everything.keys()
    for part, matrix in everything.items():
        assert torch.equal(oriented(model, part, matrix), model.get_parameter(f"{part}.weight"))
        assert torch.equal(dense_layer(model, part), matrix)
        probe = torch.randn(2, matrix.shape[1])
        bias = getattr(model.get_submodule(part), "bias", None)
        torch.testing.assert_close(model.get_submodule(part)(probe), functional.linear(probe, matrix, bias))


@pytest.mark.parametrize("part", ["SelfAttention.q", "self_attn.q_proj", "attn.c_attn", "rel_attn.q", "attention.self.query"])
def test_attention_is_found_whatever_a_family_calls_it(part: str) -> None:
    """T5 writes it with a capital letter."""
    base = Base({}, {f"block.0.{part}": torch.ones(2, 2), "block.0.mlp": torch.ones(2, 2)}, frozenset())
    assert select(base, "attention").keys() == {f"block.0.{part}"}


def test_a_pattern_is_searched_and_one_that_matches_nothing_names_the_nearest(model: nn.Module) -> None:
    base = base_of(model)
    assert select(base, r"layer\.1\..*(query|value)$").keys() == {
        f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "value")
    }
    with pytest.raises(BadInput, match="method.targets = 'qery' matches no dense layer .* did you mean 'query'"):
        select(base, "qery")
    with pytest.raises(BadInput, match="classifier"):
        select(base, "^classifier")
    with pytest.raises(BadInput, match="did you mean 'attention'"):
        select(base, "atention")
    with pytest.raises(BadInput, match=r"method.targets = '\(' is not a regular expression"):
        select(base, "(")
    with pytest.raises(BadInput, match="the model's head has all its dense layers"):
        select(describe(model, dict(model.named_parameters())), "all-linear")


SELF = "bert.encoder.layer.{}.attention.self.{}"
QUERY_VALUE = [
    SELF.format(0, "query"),
    SELF.format(0, "value"),
    SELF.format(1, "query"),
    SELF.format(1, "value"),
]
KEYS = [SELF.format(0, "key"), SELF.format(1, "key")]
LISTS: dict[str, tuple[Targets, list[str]]] = {
    "endings": (("query", "value"), QUERY_VALUE),
    "in the model's order": (("value", "query", "query"), QUERY_VALUE),
    "commas in a text": ("query,value", QUERY_VALUE),
    "commas and blanks": (" query , value ", QUERY_VALUE),
    "an ending of several parts": (
        ("attention.output.dense",),
        [f"bert.encoder.layer.{layer}.attention.output.dense" for layer in (0, 1)],
    ),
    "a whole name": (("bert.pooler.dense",), ["bert.pooler.dense"]),
    "with a number": (("1.output.dense",), ["bert.encoder.layer.1.output.dense"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_one_of_endings_as_in_peft(kind: str, model: nn.Module) -> None:
    targets, names = LISTS[kind]
    assert list(select(base_of(model), targets)) == names


def test_an_ending_begins_after_a_dot() -> None:
    names = ["query", "block.query", "block.my_query", "query.block"]
    base = Base({}, {name: torch.ones(2, 2) for name in names}, frozenset())
    assert list(select(base, ("query",))) == ["query", "block.query"]
    assert list(select(base, "query")) == names


@pytest.mark.parametrize("targets", [r"\.\d{1,2}\.attention\..*key", r"self\.(key|a,b)$", "key"])
def test_a_pattern_with_a_comma_in_it_stays_a_pattern(targets: str, model: nn.Module) -> None:
    assert list(select(base_of(model), targets)) == KEYS


MISTAKEN: dict[str, tuple[Targets, str]] = {
    "another family's names": ("q_proj|v_proj", r"did you mean 'query\|value'\?"),
    "another family's, listed": (
        ("q_proj", "v_proj"),
        r"\['q_proj', 'v_proj'\]: .* in 'q_proj', 'v_proj'; did you mean 'query', 'value'\?",
    ),
    "another family's, with commas": ("q_lin,k_lin", "did you mean 'query', 'key'"),
    "three in one": ("c_attn", r"did you mean 'query\|key\|value'"),
    "one of them only": (("query", "vlaue"), "ends in 'vlaue'; did you mean 'value'"),
    "a pattern in a list": (("que.*",), r"ends in 'que\.\*'"),
    "a word in a list": (("attention", "key"), "write 'attention' alone, not in a list"),
    "no name": ((), r"method.targets = \[\]: name layers, or choose from: attention, all-linear"),
    "an empty name": (("",), "ends in ''"),
    "the head": (("classifier",), "ends in 'classifier'.*query"),
    "a name in a longer pattern": (r"layer\.1\..*\.qery$", "did you mean 'query'"),
}


@pytest.mark.parametrize("kind", MISTAKEN)
def test_the_nearest_names_of_this_model_are_offered(kind: str, model: nn.Module) -> None:
    targets, says = MISTAKEN[kind]
    with pytest.raises(BadInput, match=says) as refusal:
        select(base_of(model), targets)
    assert "\n" not in str(refusal.value)


NEAR = {"gpt2": "c_attn", "llama": "q_proj|v_proj", "distilbert": "q_lin|v_lin"}


@pytest.mark.parametrize("name", NEAR)
def test_what_a_family_calls_query_and_value_is_offered(name: str) -> None:
    with pytest.raises(BadInput, match=re.escape(f"did you mean '{NEAR[name]}'")):
        select(describe(family(name), FAMILIES[name].head), "query|value")


def test_the_servers_view_has_every_parameter_and_the_head_apart(model: nn.Module) -> None:
    base = describe(model, ["classifier.bias"])
    assert base.parameters.keys() == dict(model.named_parameters()).keys()
    assert base.heads().keys() == {"classifier.bias"}
    assert not any(tensor.requires_grad for tensor in [*base.parameters.values(), *base.layers.values()])


def test_a_tied_parameter_is_replaced_wherever_it_is_used() -> None:
    """GPT-2's embedding is its output layer too."""
    model, ids = shaken(GPT2LMHeadModel(GPT2Config(**{**GPT2, **GPT2_PLAIN, "num_labels": 2}))), texts(2)
    name = "transformer.wte.weight"
    assert model.get_parameter("lm_head.weight") is model.get_parameter(name)
    new = model.get_parameter(name) + 0.3 * torch.randn(60, 16, generator=generator(2, "new"))
    other = deepcopy(model)
    other.get_parameter(name).data.copy_(new)
    assert other.get_parameter("lm_head.weight") is other.get_parameter(name)
    trained = trainable({name: new.unsqueeze(0)})
    with mounted(model, trained):
        torch.testing.assert_close(says(model, ids), says(other, ids))
        assert dict(model.named_parameters()).keys() == dict(other.named_parameters()).keys()
    with replaced(model, {"lm_head.weight": lambda weight: weight + 1}):
        held = dict(model.named_parameters(remove_duplicate=False))
        assert held[name] is held["lm_head.weight"]
    assert model.get_parameter("lm_head.weight") is model.get_parameter(name)


class Twins(nn.Module):
    """Two dense layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(torch.tanh(self.first(x))))


def test_a_tied_parameter_of_several_clients_is_each_ones_own_in_every_place() -> None:
    model = shaken(Twins())
    weight, x = torch.randn(2, 4, 4, generator=generator(4, "w")), torch.randn(6, 4, generator=generator(4, "x"))
    expected = []
    for k in range(2):
        other = deepcopy(model)
        other.get_parameter("first.weight").data.copy_(weight[k])
        expected.append(other(x[3 * k : 3 * k + 3]))
    with mounted(model, {"first.weight": weight}):
        torch.testing.assert_close(model(x), torch.cat(expected))


MODULES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a dense layer": (lambda: nn.Linear(4, 3), ["weight", "bias"]),
    "a dense layer's weight": (lambda: nn.Linear(4, 3), ["weight"]),
    "a dense layer's bias": (lambda: nn.Linear(4, 3), ["bias"]),
    "a dense layer without bias": (lambda: nn.Linear(4, 3, bias=False), ["weight"]),
    "GPT-2's dense layer": (partial(Conv1D, 3, 4), ["weight", "bias"]),
    "a layer norm": (lambda: nn.LayerNorm(4), ["weight", "bias"]),
    "a layer norm's bias": (lambda: nn.LayerNorm(4), ["bias"]),
}


@pytest.mark.parametrize("kind", MODULES)
def test_parameters_of_k_clients_act_on_their_own_rows(kind: str) -> None:
    build, names = MODULES[kind]
    model = shaken(nn.Sequential(build()))
    x = torch.randn(2 * K, 5, 4, generator=generator(5, "x"))
    draw = generator(5, "own")
    own = {f"0.{name}": torch.randn(K, *model.get_parameter(f"0.{name}").shape, generator=draw) for name in names}
    expected = []
    for k in range(K):
        other = deepcopy(model)
        for name, stack in own.items():
            other.get_parameter(name).data.copy_(stack[k])
        expected.append(other(x[2 * k : 2 * k + 2]))
    with mounted(model, own):
        torch.testing.assert_close(model(x), torch.cat(expected))
        with rows_of(slice(0, 2)):
            torch.testing.assert_close(model(x[:4]), torch.cat(expected[:2]))
        torch.testing.assert_close(model(x[:, 0]), torch.cat(expected)[:, 0])


def test_a_parameter_that_cannot_carry_several_clients_is_refused(model: nn.Module) -> None:
    for name in ("bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"):
        stack = torch.stack([model.get_parameter(name)] * 2)
        with pytest.raises(WireError, match="cannot carry several clients"), mounted(model, {name: stack}):
            pass


def test_a_layer_whose_rows_are_not_the_batchs_refuses_several_clients() -> None:
    """DeBERTa sends its relative positions, a batch of their own, through query and key: whose rows would these be?"""
    model, ids = deberta(), texts(4)
    tensors = factors(model, HEAD, triplet=False)
    expected = says(merged(model, tensors, 0), ids)
    with mounted(model, {part: tensor[:1] for part, tensor in tensors.items()}, SCALE):
        torch.testing.assert_close(says(model, ids), expected, rtol=1e-5, atol=1e-5)
    lora = small("lora", targets="query|key|value")
    playing = worker(lora, model)
    blob = Request(Kind.TRAIN, 0, CONFIG, lora.init(base_of(model), SEED).shared).encode()
    assert Answer.decode(playing.handle([0], [blob], [b""])[0][0]).measured.steps == 2
    with pytest.raises(WireError, match="cohorts of 1"):
        playing.handle([0, 1], [blob, blob], [b"", b""])


LACKING = ["bert.nowhere.weight", "nowhere:A", "bert.encoder.layer.0.attention.self.query.weights", "bert.embeddings:A"]


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("name", LACKING)
def test_what_the_model_lacks_is_refused_and_what_was_mounted_before_is_undone(
    name: str, clients: int, model: nn.Module
) -> None:
    """Adapters belong on dense layers; an embedding block is none."""
    head, ids = model.get_parameter("classifier.bias"), texts(2)
    before = says(model, ids)
    tensors = {"classifier.bias": torch.ones(clients, 3), name: torch.ones(clients, 2, 2)}
    if ":" in name:
        tensors[name.replace(":A", ":B")] = torch.ones(clients, 2, 2)
    query = "bert.encoder.layer.0.attention.self.query"
    tensors |= {f"{query}:A": torch.ones(clients, 1, 32), f"{query}:B": torch.ones(clients, 32, 1)}
    with pytest.raises(WireError), mounted(model, tensors):
        pass
    assert model.get_parameter("classifier.bias") is head
    assert torch.equal(says(model, ids), before)


def test_trainable_copies_and_values_detach() -> None:
    tensors = {"x": torch.ones(1, 2)}
    parameters = trainable(tensors)
    parameters["x"].data.add_(1)
    assert tensors["x"].tolist() == [[1.0, 1.0]]
    assert parameters["x"].requires_grad
    found = values(parameters)["x"]
    assert found.tolist() == [[2.0, 2.0]]
    assert not found.requires_grad


def test_gradients_reach_the_mounted_factors_and_nothing_else() -> None:
    model, ids = bert(), texts(4)
    trained = trainable(factors(model, HEAD, triplet=True, clients=2) | {"classifier.bias": torch.zeros(2, 3)})
    with mounted(model, trained, SCALE):
        loss: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum()
        torch.autograd.backward(loss)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.flatten(1).any(1).all()), f"a client has no gradient for {name}"
    assert all(parameter.grad is None for parameter in model.parameters())
