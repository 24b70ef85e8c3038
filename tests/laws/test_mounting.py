"""Mounted factors equal merged weights in every family; tied parameters move everywhere; what cannot be kept apart refuses."""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import BadInput, NotStackable, WireError
from fedpeft.mounting import (
    Targets,
    cast_once,
    dense_layer,
    describe,
    detached,
    mounted,
    mounted_deltas,
    oriented,
    overridden,
    replaced,
    row_owners,
    select,
    trainable,
)
from fedpeft.mounting.deltas import Total
from fedpeft.seeds import generator
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.loop import Training, fit
from fedpeft.training.micro_batches import Share
from fedpeft.types import Base, LocalTask
from fedpeft.wire.messages import Kind, Request, Response
from tests.families import FAMILIES, GPT2, GPT2_PLAIN, family, says, texts
from tests.tiny import (
    CONFIG,
    CPU,
    HEAD,
    SEED,
    TASK,
    base_of,
    bert,
    deberta,
    examples,
    shaken,
    small,
    worker,
)

K = 3
SCALE = 0.5


def factors(
    model: nn.Module, head: frozenset[str], triplet: bool, clients: int = K
) -> dict[str, Tensor]:
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
        module: Any = other.get_submodule(name)
        with torch.no_grad():
            module.weight.add_(difference.t() if isinstance(module, Conv1D) else difference)
    return other


@pytest.mark.parametrize("triplet", [False, True], ids=["B A", "B E A"])
@pytest.mark.parametrize("name", FAMILIES)
def test_branches_equal_weights_with_the_difference_merged_in(name: str, triplet: bool) -> None:
    """For K clients at once, for one, and for those of K that are still training."""
    model, ids = family(name), texts(2 * K)
    tensors = factors(model, FAMILIES[name].head, triplet)
    expected = torch.cat(
        [says(merged(model, tensors, k), ids[2 * k : 2 * k + 2]) for k in range(K)]
    )
    assert (expected - says(model, ids)).abs().max() > 0.02, "the difference shows"
    with mounted(model, tensors, SCALE):
        torch.testing.assert_close(says(model, ids), expected, rtol=1e-5, atol=1e-5)
        with row_owners(slice(0, 2)):
            torch.testing.assert_close(says(model, ids[:4]), expected[:4], rtol=1e-5, atol=1e-5)
    with mounted(model, {part: tensor[1:2] for part, tensor in tensors.items()}, SCALE):
        torch.testing.assert_close(says(model, ids[2:4]), expected[2:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_words_choose_dense_layers_by_type_and_leave_the_head_out(name: str) -> None:
    model, described = family(name), FAMILIES[name]
    base = describe(model, described.head)
    attention, everything = select(base, "attention"), select(base, "all-linear")
    assert (len(attention), len(everything)) == (described.attention, described.linear)
    dense = {
        part for part, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    assert everything.keys() == {part for part in dense if f"{part}.weight" not in described.head}
    assert attention.keys() < everything.keys()
    for part, matrix in everything.items():
        assert torch.equal(oriented(model, part, matrix), model.get_parameter(f"{part}.weight"))
        assert torch.equal(dense_layer(model, part), matrix)
        probe = torch.randn(2, matrix.shape[1])
        bias = getattr(model.get_submodule(part), "bias", None)
        torch.testing.assert_close(
            model.get_submodule(part)(probe), functional.linear(probe, matrix, bias)
        )


@pytest.mark.parametrize(
    "part",
    ["SelfAttention.q", "self_attn.q_proj", "attn.c_attn", "rel_attn.q", "attention.self.query"],
)
def test_attention_is_found_whatever_a_family_calls_it(part: str) -> None:
    """T5 writes it with a capital letter."""
    base = Base(
        {}, {f"block.0.{part}": torch.ones(2, 2), "block.0.mlp": torch.ones(2, 2)}, frozenset()
    )
    assert select(base, "attention").keys() == {f"block.0.{part}"}


def test_a_pattern_is_searched_and_one_that_matches_nothing_names_the_nearest(
    model: nn.Module,
) -> None:
    base = base_of(model)
    assert select(base, r"layer\.1\..*(query|value)$").keys() == {
        f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "value")
    }
    with pytest.raises(
        BadInput, match="method.targets = 'qery' matches no dense layer .* did you mean 'query'"
    ):
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
    assert not any(
        tensor.requires_grad for tensor in [*base.parameters.values(), *base.layers.values()]
    )


def test_a_tied_parameter_is_replaced_wherever_it_is_used() -> None:
    """GPT-2's embedding is its output layer too."""
    model, ids = (
        shaken(GPT2LMHeadModel(GPT2Config(**{**GPT2, **GPT2_PLAIN, "num_labels": 2}))),
        texts(2),
    )
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
    weight, x = (
        torch.randn(2, 4, 4, generator=generator(4, "w")),
        torch.randn(6, 4, generator=generator(4, "x")),
    )
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
    own = {
        f"0.{name}": torch.randn(K, *model.get_parameter(f"0.{name}").shape, generator=draw)
        for name in names
    }
    expected = []
    for k in range(K):
        other = deepcopy(model)
        for name, stack in own.items():
            other.get_parameter(name).data.copy_(stack[k])
        expected.append(other(x[2 * k : 2 * k + 2]))
    with mounted(model, own):
        torch.testing.assert_close(model(x), torch.cat(expected))
        with row_owners(slice(0, 2)):
            torch.testing.assert_close(model(x[:4]), torch.cat(expected[:2]))
        torch.testing.assert_close(model(x[:, 0]), torch.cat(expected)[:, 0])


def test_a_parameter_that_cannot_carry_several_clients_is_refused(model: nn.Module) -> None:
    for name in (
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
    ):
        stack = torch.stack([model.get_parameter(name)] * 2)
        with (
            pytest.raises(WireError, match="cannot carry several clients"),
            mounted(model, {name: stack}),
        ):
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
    assert Response.decode(playing.handle([0], [blob], [b""])[0][0]).measured.steps == 2
    with pytest.raises(WireError, match="a stack of 1"):
        playing.handle([0, 1], [blob, blob], [b"", b""])


LACKING = [
    "bert.nowhere.weight",
    "nowhere:A",
    "bert.encoder.layer.0.attention.self.query.weights",
    "bert.embeddings:A",
]


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


def test_what_is_trained_lies_in_memory_as_its_gradient_does() -> None:
    """Fused optimizers step both in the order of their memory, as if one were not turned round."""
    trained = trainable({"w": torch.arange(6.0).view(1, 2, 3).mT})["w"]
    assert trained.is_contiguous()
    gradient = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    due = trained.detach() - 0.5 * gradient
    trained.grad = gradient
    torch.optim.SGD([trained], lr=0.5, fused=True).step()
    assert torch.equal(trained, due)


def test_trainable_copies_and_values_detach() -> None:
    tensors = {"x": torch.ones(1, 2)}
    parameters = trainable(tensors)
    parameters["x"].data.add_(1)
    assert tensors["x"].tolist() == [[1.0, 1.0]]
    assert parameters["x"].requires_grad
    found = detached(parameters)["x"]
    assert found.tolist() == [[2.0, 2.0]]
    assert not found.requires_grad


def test_gradients_reach_the_mounted_factors_and_nothing_else() -> None:
    model, ids = bert(), texts(4)
    trained = trainable(
        factors(model, HEAD, triplet=True, clients=2) | {"classifier.bias": torch.zeros(2, 3)}
    )
    with mounted(model, trained, SCALE):
        loss: Tensor = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum()
        )
        torch.autograd.backward(loss)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.flatten(1).any(1).all()), f"a client has no gradient for {name}"
    assert all(parameter.grad is None for parameter in model.parameters())


BRANCHES = {
    "dense": ("dense",),
    "dense beside factors": ("dense", "A", "B"),
    "everyone's dense": ("shared dense",),
    "everyone's dense beside factors": ("shared dense", "A", "B"),
    "everyone's factors": ("shared A", "shared B"),
    "everyone's triplets": ("shared A", "shared B", "shared e"),
    "everyone's factors beside a dense one": ("shared A", "shared B", "dense"),
}


def branch_tensors(model: nn.Module, head: frozenset[str], kind: str) -> dict[str, Tensor]:
    """Return random branches for every dense layer outside the head; ``shared`` ones have no client axis."""
    draw = generator(6, "branches", kind)
    found: dict[str, Tensor] = {}
    for name, weight in select(describe(model, head), "all-linear").items():
        shapes = {
            "A": (2, weight.shape[1]),
            "B": (weight.shape[0], 2),
            "e": (2,),
            "dense": weight.shape,
        }
        for words in BRANCHES[kind]:
            part = words.removeprefix("shared ")
            clients = () if part != words else (K,)
            found[f"{name}:{part}"] = 0.3 * torch.randn(*clients, *shapes[part], generator=draw)
    return found


def differences(tensors: Mapping[str, Tensor], client: int) -> dict[str, Tensor]:
    """Return what one client's branches add to the (out, in) matrix of each layer, worked out by hand."""
    found: dict[str, Tensor] = {}
    axes = {"A": 2, "B": 2, "e": 1, "dense": 2}
    for name in {part.partition(":")[0] for part in tensors}:
        own: dict[str, Tensor] = {}
        for part, length in axes.items():
            if f"{name}:{part}" in tensors:
                tensor = tensors[f"{name}:{part}"]
                own[part] = tensor if tensor.ndim == length else tensor[client]
        total = own.get("dense", torch.zeros(()))
        if "A" in own:
            total = (
                total + own["B"] @ torch.diag(own.get("e", torch.ones(len(own["A"])))) @ own["A"]
            )
        found[name] = SCALE * total
    return found


def with_differences(model: nn.Module, found: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of ``model`` into whose weights differences, (out, in), are merged."""
    other = deepcopy(model)
    for name, difference in found.items():
        module = other.get_submodule(name)
        with torch.no_grad():
            other.get_parameter(f"{name}.weight").add_(
                difference.t() if isinstance(module, Conv1D) else difference
            )
    return other


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_branches_and_everyones_equal_weights_with_the_difference_merged_in(
    name: str, kind: str
) -> None:
    """For K clients at once, for each alone, for some of them, and for rows that mix unevenly."""
    model, ids = family(name), texts(2 * K)
    tensors = branch_tensors(model, FAMILIES[name].head, kind)
    each = [with_differences(model, differences(tensors, k)) for k in range(K)]
    expected = torch.cat([says(each[k], ids[2 * k : 2 * k + 2]) for k in range(K)])
    before = says(model, ids)
    assert (expected - before).abs().max() > 0.005, "the difference shows"
    with mounted(model, tensors, SCALE):
        torch.testing.assert_close(says(model, ids), expected, rtol=1e-5, atol=1e-5)
        with row_owners(slice(1, 3), 4):
            torch.testing.assert_close(says(model, ids[2:]), expected[2:], rtol=1e-5, atol=1e-5)
        owners = torch.tensor([0, 2, 2, 2, 0])
        mixed = torch.cat(
            [says(each[k], ids[row : row + 1]) for row, k in enumerate(owners.tolist())]
        )
        with row_owners(owners, 5):
            torch.testing.assert_close(says(model, ids[:5]), mixed, rtol=1e-5, atol=1e-5)
    one = {part: tensor[1:2] if len(tensor) == K else tensor for part, tensor in tensors.items()}
    with mounted(model, one, SCALE):
        torch.testing.assert_close(says(model, ids[2:4]), expected[2:4], rtol=1e-5, atol=1e-5)
    assert torch.equal(says(model, ids), before), "the base was not written to"


@pytest.mark.parametrize("kind", BRANCHES)
def test_what_branches_add_is_told_as_matrices_and_factors(kind: str) -> None:
    model = family("gpt2")
    tensors = branch_tensors(model, FAMILIES["gpt2"].head, kind)
    found = mounted_deltas(tensors, SCALE)
    for client in range(K):
        due = differences(tensors, client)
        assert found.keys() == due.keys()
        for name, difference in due.items():
            whole, factors = found[name].dense(), found[name].factors()
            own = min(client, len(whole) - 1)
            torch.testing.assert_close(whole[own], difference)
            assert (factors is None) == any("dense" in words for words in BRANCHES[kind])
            if factors is not None:
                torch.testing.assert_close(factors[0][own] @ factors[1][own], difference)


def test_factors_of_everyone_and_of_each_are_told_side_by_side() -> None:
    draw = generator(7, "factors")
    shapes = {"A": (4, 5), "B": (6, 4)}, {"A": (K, 2, 5), "B": (K, 6, 2)}
    sets = [
        {f"m:{part}": torch.randn(shape, generator=draw) for part, shape in own.items()}
        for own in shapes
    ]
    total = Total([mounted_deltas(own, SCALE)["m"] for own in sets])
    factors = total.factors()
    assert factors is not None
    assert factors[0].shape == (K, 6, 6)
    torch.testing.assert_close(factors[0] @ factors[1], total.dense())
    torch.testing.assert_close(
        total.dense()[1], differences(sets[0], 1)["m"] + differences(sets[1], 1)["m"]
    )


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products, and the copies of rows of a stack."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket.__name__
        self.count += kind in {"mm", "addmm", "bmm", "baddbmm", "matmul"}
        self.gathered += kind == "index_select"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("branch", "due"),
    [({"0:dense": torch.ones(3, 4)}, 1), ({"0:A": torch.ones(2, 4), "0:B": torch.ones(3, 2)}, 2)],
    ids=["dense", "factors"],
)
def test_what_is_everyones_takes_no_more_products_however_many_clients_there_are(
    branch: dict[str, Tensor], due: int
) -> None:
    model, x = shaken(nn.Sequential(nn.Linear(4, 3))), torch.randn(6, 5, 4)
    for owners in (slice(0, 1), slice(0, 3), torch.tensor([0, 0, 1, 2, 2, 2])):
        with Products() as plain:
            model(x)
        with mounted(model, branch), row_owners(owners, 6), Products() as found:
            model(x)
        assert found.count == plain.count + due
        assert found.gathered == 0


@pytest.mark.parametrize(
    "owners", [slice(None), torch.tensor([0, 1, 1, 0, 0, 1])], ids=["even", "mixed"]
)
def test_a_dense_branch_is_trained_by_its_own_clients_rows(owners: slice | Tensor) -> None:
    model, x = (
        shaken(nn.Sequential(nn.Linear(4, 3))),
        torch.randn(6, 5, 4, generator=generator(8, "x")),
    )
    own = trainable({"0:dense": torch.zeros(2, 3, 4)})["0:dense"]
    with mounted(model, {"0:dense": own}, SCALE), row_owners(owners, 6):
        torch.autograd.backward(model(x).square().sum())
    assert own.grad is not None
    of = torch.tensor([0, 0, 0, 1, 1, 1]) if isinstance(owners, slice) else owners
    for client in range(2):
        mine = x[of == client]
        output = model(mine)
        expected = SCALE * torch.einsum("rlo,rli->oi", 2 * output, mine)
        torch.testing.assert_close(own.grad[client], expected)


def test_a_dense_branch_whose_rows_are_not_the_batchs_refuses_several_clients_but_not_everyones() -> (
    None
):
    model, x = shaken(nn.Sequential(nn.Linear(4, 3))), torch.randn(5, 4)
    for owners in (slice(0, 2), torch.tensor([0, 0, 1, 1])):
        refused = pytest.raises(NotStackable, match="use a stack of 1")
        with refused, mounted(model, {"0:dense": torch.ones(2, 3, 4)}), row_owners(owners, 4):
            model(x)
        with mounted(model, {"0:dense": torch.ones(3, 4)}), row_owners(owners, 4):
            assert model(x).shape == (5, 3)


MISFITS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "A alone": ({"A": (2, 1, 4)}, "it needs A and B"),
    "B alone": ({"B": (2, 3, 1)}, "it needs A and B"),
    "e alone": ({"e": (2, 1)}, "it needs A and B"),
    "e beside a dense one": ({"e": (2, 1), "dense": (2, 3, 4)}, "it needs A and B"),
    "an unknown part": ({"A": (2, 1, 4), "B": (2, 3, 1), "C": (2, 1)}, "has A, B, C"),
    "a matrix turned round": ({"dense": (2, 4, 3)}, r"0:dense is \(2, 4, 3\); \(3, 4\) after"),
    "an axis too many": ({"dense": (1, 2, 3, 4)}, "after a client axis"),
    "a rank that differs": ({"A": (2, 1, 4), "B": (2, 3, 2)}, r"0:B is \(2, 3, 2\); \(3, 1\)"),
    "a width that differs": ({"A": (2, 1, 5), "B": (2, 3, 1)}, r"0:A is \(2, 1, 5\); \(1, 4\)"),
    "a vector for A": ({"A": (4,), "B": (2, 3, 1)}, "0:A is"),
    "a client axis on A alone": ({"A": (2, 1, 4), "B": (3, 1)}, "differ in their client axis"),
    "clients that differ": ({"A": (2, 1, 4), "B": (2, 3, 1), "dense": (3, 3, 4)}, r"\[2, 3\]"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_branch_that_does_not_fit_its_layer_is_refused(kind: str) -> None:
    shapes, words = MISFITS[kind]
    model = shaken(nn.Sequential(nn.Linear(4, 3)))
    tensors = {f"0:{part}": torch.ones(shape) for part, shape in shapes.items()}
    with pytest.raises(WireError, match=words), mounted(model, tensors):
        pass
    assert not model[0]._forward_hooks  # type: ignore[index]


def test_a_branch_and_a_parameter_for_other_numbers_of_clients_are_refused() -> None:
    """Not broadcast: one client's bias is not everybody's."""
    model = shaken(nn.Sequential(nn.Linear(4, 3)))
    tensors = {"0:dense": torch.ones(2, 3, 4), "0.bias": torch.ones(1, 3)}
    with (
        pytest.raises(WireError, match=r"different numbers of clients: \[1, 2\]"),
        mounted(model, tensors),
    ):
        pass


def test_a_forward_that_others_gave_a_module_is_neither_bypassed_nor_lost() -> None:
    """One client's parameters go through it; several clients' cannot, as nobody knows what it computes."""
    model, x = shaken(nn.Sequential(nn.Linear(4, 3))), torch.randn(2, 4)
    layer: Any = model[0]  # type: ignore[index]
    plain = layer.forward

    def theirs(rows: Tensor) -> Tensor:
        return torch.as_tensor(10 * plain(rows))

    layer.forward = theirs
    bias = torch.randn(2, 3)
    with mounted(model, {"0.bias": bias[:1]}):
        torch.testing.assert_close(model(x), 10 * functional.linear(x, layer.weight, bias[0]))
    with pytest.raises(NotStackable, match="use a stack of 1"), mounted(model, {"0.bias": bias}):
        pass
    assert vars(layer)["forward"] is theirs
    with overridden(layer, lambda rows: -theirs(rows)):
        torch.testing.assert_close(model(x), -theirs(x))
    assert vars(layer)["forward"] is theirs
    del layer.forward
    with overridden(layer, theirs):
        torch.testing.assert_close(model(x), theirs(x))
    assert "forward" not in vars(layer)


def test_a_second_mount_on_a_module_does_not_hide_the_first() -> None:
    model = shaken(nn.Sequential(nn.Linear(4, 3)))
    with mounted(model, {"0.bias": torch.ones(2, 3)}):
        with pytest.raises(NotStackable), mounted(model, {"0.weight": torch.ones(2, 3, 4)}):
            pass
        assert "forward" in vars(model[0])  # type: ignore[index]
    assert "forward" not in vars(model[0])  # type: ignore[index]


def test_copies_in_another_format_follow_the_base() -> None:
    model, x = shaken(nn.Sequential(nn.Linear(4, 3))), torch.randn(2, 4, dtype=torch.bfloat16)
    weight = model.get_parameter("0.weight")
    with cast_once(model, torch.bfloat16):
        first = model.get_parameter("0.weight")
    with cast_once(model, torch.bfloat16):
        assert model.get_parameter("0.weight") is first, "cast once"
    with torch.no_grad():
        weight.mul_(2)
    with cast_once(model, torch.bfloat16):
        bias = model.get_parameter("0.bias")
        torch.testing.assert_close(model(x), functional.linear(x, weight.bfloat16(), bias))
    assert model.get_parameter("0.weight") is weight


def test_two_parameters_that_enter_as_a_sum_move_as_each_would_alone() -> None:
    """Autograd gives both the same tensor as gradient, which is then changed in place twice."""
    model, share = bert(), Share(examples(6), [[0, 1, 2], [3, 4, 5]])
    bias = model.get_parameter("classifier.bias").detach()
    rates = Training("sgd", lr=0.1, clip=0.02, momentum=0.9)
    moved = []
    for count in (1, 2):
        own = {f"part {n}": nn.Parameter(bias.unsqueeze(0) / count) for n in range(count)}

        def together(_: Tensor, parts: tuple[nn.Parameter, ...] = tuple(own.values())) -> Tensor:
            total: Tensor = parts[0]
            for part in parts[1:]:
                total = total + part
            return total.squeeze(0)

        with replaced(model, {"classifier.bias": together}):
            local = LocalTask(own, lambda: ({}, {}))
            if count == 2:
                with torch.enable_grad():
                    loss = TASK.losses(model, TASK.collate(share.examples, CPU.torch_device)).sum()
                    one, other = torch.autograd.grad(loss, list(own.values()))
                assert one.data_ptr() == other.data_ptr(), "so it is"
            before = {name: tensor.detach().clone() for name, tensor in own.items()}
            fit(model, local, TASK, [share], rates, HEAD, CPU, ActivationCache())
        moved.append([own[name].detach() - before[name] for name in own])
    # Two equal gradients g have the norm sqrt(2) |g|, so each is clipped to the length 0.02 / sqrt(2).
    torch.testing.assert_close(moved[1][0], moved[1][1])
    torch.testing.assert_close(moved[1][0].norm(), moved[0][0].norm() / 2**0.5)
