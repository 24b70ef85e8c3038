"""FFA-LoRA never sends A and merges exactly; LoRA does not; nothing of a local-only client leaves it."""

import pytest
import torch
from torch import Tensor

from fedpeft.algebra.lowrank import uniform
from fedpeft.errors import BadInput
from fedpeft.methods import METHODS
from fedpeft.mounting import select
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import Client, Payload
from fedpeft.wire.messages import decode
from tests.tiny import (
    CPU,
    FIELDS,
    SEED,
    TARGETS,
    assert_same,
    base_of,
    bert,
    examples,
    federation,
    logits,
    small,
    weighted,
)

SCALE = 2.0
LAYERS = [
    f"bert.encoder.layer.{layer}.attention.self.{part}"
    for layer in (0, 1)
    for part in ("query", "value")
]


def drawn_again(module: str) -> Tensor:
    """Return FFA-LoRA's A as anyone who knows the seed can draw it."""
    return uniform(3, 32, SEED, module)


def mean_of_products(
    payloads: list[Payload], weights: list[float], module: str, shared_a: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean of the clients' B_k A_k and what the means of the factors make of it."""
    products = []
    for payload in payloads:
        A = drawn_again(module) if shared_a else payload[f"{module}:A"]
        products.append({"x": payload[f"{module}:B"].double() @ A.double()})
    means = weighted(payloads, weights)
    A = drawn_again(module).double() if shared_a else means[f"{module}:A"]
    return weighted(products, weights)["x"], means[f"{module}:B"] @ A


@pytest.mark.parametrize(
    ("name", "number"), [("lora", 1), *(("ffa_lora", number) for number in range(4))]
)
def test_ffas_merge_is_exact_in_every_round_and_loras_is_not(name: str, number: int) -> None:
    playing = federation(small(name))
    after = playing.play(number + 1)
    answers = list(playing.answers(number).values())
    payloads = [answer.payload for answer in answers]
    weights = [float(answer.measured.examples) for answer in answers]
    with mounted_state(playing.method, after, playing.worker.model, CPU, SEED) as local:
        deltas = local.deltas()
    assert sorted(deltas) == LAYERS
    for module in LAYERS:
        exact, merged = mean_of_products(payloads, weights, module, name == "ffa_lora")
        torch.testing.assert_close(
            deltas[module].dense()[0].double(), SCALE * merged, rtol=1e-4, atol=1e-7
        )
        off = float((merged - exact).norm() / exact.norm())
        assert (off < 1e-6) == (name == "ffa_lora"), off


def test_ffa_never_sends_a_and_never_changes_it() -> None:
    playing = federation(small("ffa_lora"))
    after = playing.play(2)
    for talk in playing.engine.talks:
        for blob in (blob for pair in talk.values() for blob in pair):
            own = {name for name in decode(blob) if not name.startswith("@")}
            assert own == {f"{module}:B" for module in LAYERS} | {
                "classifier.weight",
                "classifier.bias",
            }
    with mounted_state(playing.method, after, playing.worker.model, CPU, SEED) as local:
        for module, delta in local.deltas().items():
            factors = delta.factors()
            assert factors is not None
            assert torch.equal(factors[1][0], drawn_again(module))


def test_ffas_a_is_the_seeds_own() -> None:
    """Another seed, another subspace; the same seed in every round and on every machine."""
    method, model = small("ffa_lora"), bert()
    state = federation(method).play(1)

    def factor(seed: int) -> Tensor:
        with mounted_state(method, state, model, CPU, seed) as local:
            factors = local.deltas()[LAYERS[0]].factors()
        assert factors is not None
        return factors[1]

    assert torch.equal(factor(SEED), factor(SEED))
    assert not torch.equal(factor(SEED), factor(SEED + 1))


def test_ffa_sends_half_of_loras_adapter() -> None:
    """Queries and values are square here, so A is as large as B."""
    base, client = base_of(bert()), Client(0)

    def content(name: str) -> int:
        method = small(name)
        down = method.send(method.init(base, SEED), client)
        return sum(tensor.numel() for part, tensor in down.items() if ":" in part)

    assert content("lora") == 2 * content("ffa_lora")


def test_lora_starts_from_a_drawn_by_name_and_b_of_nothing() -> None:
    """So a layer's start does not depend on which other layers are adapted."""
    base = base_of(bert())
    few, many = (
        small("lora").init(base, SEED).shared,
        small("lora", targets="all-linear").init(base, SEED).shared,
    )
    assert {part.partition(":")[0] for part in few if ":" in part} == set(LAYERS)
    for part, tensor in few.items():
        assert torch.equal(tensor, many[part])
        if part.endswith(":B"):
            assert not tensor.any()
        if part.endswith(":A"):
            assert torch.equal(tensor, uniform(3, 32, SEED, part.removesuffix(":A")))
    assert_same({part: few[part] for part in base.head}, base.heads())
    assert len(select(base, TARGETS)) == 4


RANKED = [name for name in METHODS if "rank" in FIELDS[name] and name != "ravan"]


@pytest.mark.parametrize("name", RANKED)
def test_a_rank_above_a_layers_size_is_refused_at_the_door(name: str) -> None:
    with pytest.raises(
        BadInput, match=r"method.rank = 33: layer .* is 32 x 32; choose a rank from 1 to 32"
    ):
        small(name, rank=33).init(base_of(bert()), SEED)


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(METHODS[name], "targets")])
def test_a_pattern_that_matches_nothing_is_refused_at_the_door(name: str) -> None:
    with pytest.raises(BadInput, match="method.targets = 'querry' matches no dense layer"):
        small(name, targets="querry").init(base_of(bert()), SEED)


def test_a_local_only_client_goes_on_from_its_own_and_hears_nothing_of_the_others() -> None:
    """Client 0's model is the same whether the others take part or not."""
    together, alone = federation(small("local_only")), federation(small("local_only"))
    together.play(3)
    alone.play(3, cohort=lambda _: alone.clients()[:1])
    assert together.memories.get(0, 2) == alone.memories.get(0, 2)
    state, rows = together.start, examples(6)
    said = []
    for client in (0, 1):
        memory = decode(together.memories.get(client, 2))
        with mounted_state(
            together.method,
            state,
            together.worker.model,
            CPU,
            SEED,
            Client(client, memory=2),
            memory,
        ):
            said.append(logits(together.worker.model, rows))
    assert (said[0] - said[1]).abs().max() > 1e-3
