"""FeDeRA starts from the principal components, on the base without them; its anchor is sent once."""

import pytest
import torch
from torch import Tensor

from fedpeft.algebra.svd import Split
from fedpeft.mounting import dense_layer
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import NO_MEMORY, Client, Payload, State
from fedpeft.wire.messages import decode
from tests.tiny import CPU, SEED, base_of, bert, federation, logits, small

SCALE = 2.0
LAYERS = [
    f"bert.encoder.layer.{layer}.attention.self.{part}"
    for layer in (0, 1)
    for part in ("query", "value")
]


def started(split: Split = "sqrt") -> State:
    return small("federa", split=split).init(base_of(bert()), SEED)


@pytest.mark.parametrize("split", ["sqrt", "left", "right"])
def test_the_start_is_the_best_approximation_of_the_pre_trained_matrix(split: Split) -> None:
    """scale * B_0 A_0 leaves of W_0 exactly the singular values after the first r."""
    shared, model = started(split).shared, bert()
    for name in LAYERS:
        W = dense_layer(model, name)
        B, A = shared[f"{name}:B"], shared[f"{name}:A"]
        values = torch.linalg.svdvals(W)
        residual = torch.linalg.svdvals(W - SCALE * B @ A)
        torch.testing.assert_close(residual[: len(values) - 3], values[3:], rtol=1e-4, atol=1e-5)
        assert float(residual[len(values) - 3 :].max()) < 1e-5
        power = {"sqrt": (0.5, 0.5), "left": (1.0, 0.0), "right": (0.0, 1.0)}[split]
        torch.testing.assert_close(
            B.norm(dim=0), (values[:3] / SCALE) ** power[0], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            A.norm(dim=1), (values[:3] / SCALE) ** power[1], rtol=1e-4, atol=1e-5
        )


def test_the_anchor_is_the_start_and_never_changes() -> None:
    playing = federation(small("federa"))
    start, after = playing.start, playing.play(2)
    for state in (start, after):
        assert state.server.keys() == {f"{name}:{part}0" for name in LAYERS for part in "AB"}
        for name, tensor in state.server.items():
            assert torch.equal(tensor, start.shared[name.removesuffix("0")])
    assert not any(
        torch.equal(after.shared[f"{name}:B"], start.shared[f"{name}:B"]) for name in LAYERS
    )


def anchors(blob: bytes) -> set[str]:
    return {name for name in decode(blob) if name.endswith(("A0", "B0"))}


def test_the_anchor_is_sent_once_to_every_client_and_kept_there() -> None:
    """Client 2 comes late: it alone is sent the anchor in its first round."""
    playing = federation(small("federa"))
    after = playing.play(3, cohort=lambda number: playing.clients()[: 2 if number < 1 else 3])
    sent = [
        {client: bool(anchors(request)) for client, (request, _) in talk.items()}
        for talk in playing.engine.talks
    ]
    assert sent == [
        {0: True, 1: True},
        {0: False, 1: False, 2: True},
        {0: False, 1: False, 2: False},
    ]
    assert not any(anchors(reply) for talk in playing.engine.talks for _, reply in talk.values())
    assert after.memories == {0: 0, 1: 0, 2: 1}
    for client, version in after.memories.items():
        kept = decode(playing.memories.get(client, version))
        assert kept.keys() == after.server.keys()
        assert all(torch.equal(kept[name], after.server[name]) for name in kept)
    first, second = (len(playing.engine.talks[exchange][0][0]) for exchange in (0, 1))
    assert first - second > sum(tensor.numel() * 4 for tensor in after.server.values())


def changed(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return, by layer, s (B A - B_0 A_0) worked out, and W_0 plus it."""
    differences = {
        name: SCALE
        * (
            state.shared[f"{name}:B"].double() @ state.shared[f"{name}:A"].double()
            - state.server[f"{name}:B0"].double() @ state.server[f"{name}:A0"].double()
        )
        for name in LAYERS
    }
    return differences, {
        name: dense_layer(bert(), name).double() + differences[name] for name in LAYERS
    }


def test_the_deltas_are_the_difference_to_the_pre_trained_matrix() -> None:
    """As factors of rank 2 r, which is what peft's folder holds, and dense."""
    playing = federation(small("federa"))
    after = playing.play(1)
    differences, _ = changed(after)
    with mounted_state(playing.method, after, playing.worker.model, CPU, SEED) as local:
        deltas = local.deltas()
        said = logits(playing.worker.model)
    assert sorted(deltas) == LAYERS
    merged = bert()
    for name in LAYERS:
        factors = deltas[name].factors()
        assert factors is not None
        assert (factors[0].shape, factors[1].shape) == ((1, 32, 6), (1, 6, 32))
        for found in (deltas[name].dense()[0], (factors[0] @ factors[1])[0]):
            torch.testing.assert_close(found.double(), differences[name], rtol=1e-4, atol=1e-6)
        merged.get_parameter(f"{name}.weight").add_(differences[name].float())
    for name, parameter in merged.named_parameters():
        if name in after.shared:
            parameter.copy_(after.shared[name])
    torch.testing.assert_close(said, logits(merged), rtol=1e-5, atol=1e-5)


def test_a_client_that_has_the_anchor_trains_as_one_that_is_sent_it() -> None:
    method = small("federa")
    state = federation(method).play(1)
    knowing, new = Client(0, memory=0), Client(0, memory=NO_MEMORY)
    model = bert()

    def said(client: Client, memory: Payload) -> Tensor:
        with mounted_state(method, state, model, CPU, SEED, client, memory):
            return logits(model)

    assert torch.equal(said(knowing, state.server), said(new, {}))
    assert (
        method.send(state, new).keys() - method.send(state, knowing).keys() == state.server.keys()
    )


def test_the_svd_needs_no_seed() -> None:
    method = small("federa")
    first, second = (method.init(base_of(bert()), seed).shared for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
