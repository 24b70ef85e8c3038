"""Other starts under other methods: FeDeRA's principal components on the residual base, orthonormal factors."""

import pytest
import torch

from fedpeft.errors import BadInput
from fedpeft.mounting import dense_layer
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import Client
from fedpeft.wire.messages import Kind, Request, Response, decode
from tests.contract.test_stacks import SGD, handled
from tests.products import LAYERS, SCALE, added, mean_product, off, shares, total
from tests.tiny import (
    CONFIG,
    CPU,
    HEAD,
    SEED,
    SIZES,
    base_of,
    bert,
    close,
    federation,
    logits,
    small,
    worker,
)

CROSSED = ["ffa_lora", "rolora", "flexlora"]


@pytest.mark.parametrize("name", CROSSED)
def test_from_principal_components_the_model_starts_unchanged_on_a_residual_base(name: str) -> None:
    method = small(name, start="principal")
    state = method.init(base_of(bert()), SEED)
    federa = small("federa").init(base_of(bert()), SEED)
    assert state.server.keys() == federa.server.keys()
    for part, tensor in state.shared.items():
        assert torch.equal(tensor, federa.shared[part])
    model = bert()
    said = logits(model)
    with mounted_state(method, state, model, CPU, SEED) as local:
        torch.testing.assert_close(logits(model), said, rtol=1e-5, atol=1e-5)
        for module in LAYERS:
            factors = local.deltas()[module].factors()
            assert factors is not None
            B, A = (
                factor[0][..., :3] if k == 0 else factor[0][:3] for k, factor in enumerate(factors)
            )
            values = torch.linalg.svdvals(dense_layer(bert(), module))
            torch.testing.assert_close(
                torch.linalg.svdvals(B @ A)[:3], values[:3], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", CROSSED)
def test_the_components_travel_once_and_stay_with_the_client(name: str) -> None:
    playing = federation(small(name, start="principal"))
    last = playing.play(3)
    assert [row.lost for row in playing.rows] == [None] * 9
    sent = [
        {part for part in decode(talk[0][0]) if part.endswith(("A0", "B0"))}
        for talk in playing.engine.talks
    ]
    assert sent == [set(last.server), set(), set()]
    assert last.memories == {0: 0, 1: 0, 2: 0}
    if name == "ffa_lora":
        for talk in playing.engine.talks:
            for _, reply in talk.values():
                back = {part for part in decode(reply) if not part.startswith("@")}
                assert back == {f"{module}:B" for module in LAYERS} | HEAD


def test_ffa_lora_from_principal_components_merges_exactly_with_a_at_rest() -> None:
    playing = federation(small("ffa_lora", start="principal"))
    last = playing.play(2)
    answers = list(playing.answers(1).values())
    moved = added(playing, last)
    for module in LAYERS:
        A, B = (last.server[f"{module}:{part}0"].double() for part in "AB")
        mean = total(
            share * answer.payload[f"{module}:B"].double()
            for share, answer in zip(shares(answers), answers, strict=True)
        )
        assert off(moved[module], SCALE * (mean - B) @ A) < 1e-5


def test_flexlora_from_principal_components_sends_the_best_part_of_the_mean_product() -> None:
    playing = federation(small("flexlora", start="principal"))
    last = playing.play(2)
    for module in LAYERS:
        exact = mean_product(list(playing.answers(1).values()), module)
        found = last.shared[f"{module}:B"].double() @ last.shared[f"{module}:A"].double()
        best = float(torch.linalg.svdvals(exact)[3:].norm())
        assert float((found - exact).norm()) == pytest.approx(best, rel=1e-3, abs=1e-5)


def test_a_weak_client_cannot_stand_on_the_residual_base() -> None:
    playing = federation(small("flexlora", start="principal"))
    start = playing.start
    with pytest.raises(BadInput, match="client 1 has capacity 0.5, but on the residual base"):
        playing.method.send(start, Client(1, capacity=0.5))


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("start", ["orthogonal", "principal"])
def test_k_clients_at_once_equal_k_one_by_one(name: str, start: str) -> None:
    method = small(name, start=start)
    state = method.init(base_of(bert()), SEED)
    playing = worker(method, bert(), SGD, SIZES)
    asked = {
        client: (Request(Kind.TRAIN, 0, CONFIG, method.send(state, Client(client))).encode(), b"")
        for client in SIZES
    }
    together = handled(playing, asked, [0, 1, 2])
    for client in SIZES:
        alone = handled(playing, asked, [client])[client]
        close(Response.decode(together[client][0]).payload, Response.decode(alone[0]).payload, 2e-5)


@pytest.mark.parametrize("name", ["lora", "rolora", "flexlora", "ffa_lora"])
def test_an_orthogonal_start_has_orthonormal_rows_and_an_unchanged_model(name: str) -> None:
    method = small(name, start="orthogonal")
    state = method.init(base_of(bert()), SEED)
    model, said = bert(), logits(bert())
    with mounted_state(method, state, model, CPU, SEED) as local:
        assert torch.equal(logits(model), said)
        rows = []
        for module in LAYERS:
            factors = local.deltas()[module].factors()
            assert factors is not None
            A = factors[1][0]
            torch.testing.assert_close(A @ A.T, torch.eye(3), rtol=1e-5, atol=1e-5)
            rows.append(A)
    assert (rows[0] - rows[1]).abs().max() > 0.1, "each layer has its own"


def test_fedaras_orthogonal_start_is_where_its_penalty_is_nothing() -> None:
    state = small("fedara", start="orthogonal").init(base_of(bert()), SEED)
    for module in LAYERS:
        A, B = state.shared[f"{module}:A"], state.shared[f"{module}:B"]
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=1e-5, atol=1e-5)
        assert not state.shared[f"{module}:e"].any()
