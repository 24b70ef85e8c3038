"""SLoRA: one mask for all that never travels, then factors that are the best the mask's difference allows."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.algebra.masks import positions, scatter
from fedpeft.algebra.svd import Split
from fedpeft.errors import BadInput
from fedpeft.methods.full import Full, FullStage
from fedpeft.methods.lora import LoRA
from fedpeft.methods.slora import SLoRA
from fedpeft.methods.sparse import Sparse
from fedpeft.mounting import dense_layer, describe, select
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import Client
from fedpeft.wire.messages import Request, Response
from tests.families import FAMILIES, family, says, texts
from tests.tiny import (
    CONFIG,
    CPU,
    HEAD,
    SEED,
    TARGETS,
    assert_same,
    base_of,
    bert,
    federation,
    logits,
    small,
)

LAYERS = [
    f"bert.encoder.layer.{layer}.attention.self.{part}"
    for layer in (0, 1)
    for part in ("query", "value")
]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.001, 1.0), st.integers(0, 99))
def test_a_mask_has_exactly_its_share_of_every_matrix(
    out: int, width: int, density: float, seed: int
) -> None:
    where = positions((out, width), density, seed, "m")
    assert len(where) == max(1, round(density * out * width))
    assert where.tolist() == sorted(set(where.tolist()))
    assert int(where[0]) >= 0
    assert int(where[-1]) < out * width


def test_a_mask_is_the_seeds_and_the_layers_own_and_spread_evenly() -> None:
    one = set(positions((40, 50), 0.1, 1, "m").tolist())
    assert one == set(positions((40, 50), 0.1, 1, "m").tolist())
    for seed, module in ((2, "m"), (1, "n")):
        other = set(positions((40, 50), 0.1, seed, module).tolist())
        assert len(one & other) < 40, "two masks of 200 share about 20 by chance"
    quarters = torch.bincount(torch.tensor(sorted(one)) // 500, minlength=4)
    assert int(quarters.min()) > 30, "50 entries are expected in each quarter of the rows"


def test_values_are_scattered_row_by_row_and_gradients_come_back() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    dense = scatter(values, torch.tensor([0, 4, 5]), (2, 3))
    assert dense.tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 3.0]]
    weights = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
    assert torch.autograd.grad((dense * weights).sum(), values)[0].tolist() == [10.0, 50.0, 60.0]


@pytest.mark.parametrize("name", FAMILIES)
def test_sparse_values_change_their_entries_of_the_matrix_and_nothing_else(name: str) -> None:
    """Whichever way round the layer stores it: an entry is a row of (out, in)."""
    model, ids = family(name), texts(3)
    base = describe(model, FAMILIES[name].head)
    method = Sparse("all-linear", 0.3)
    start = method.init(base, SEED)
    state = replace(start, shared={k: v + 0.1 if ":" in k else v for k, v in start.shared.items()})
    expected = family(name)
    for layer, difference in method.differences(state).items():
        out, width = base.layers[layer].shape
        where = positions((out, width), 0.3, SEED, layer)
        for flat in where.tolist():
            dense_layer(expected, layer)[flat // width, flat % width] += 0.1
        assert int((difference != 0).sum()) == len(where) == round(0.3 * out * width)
    with mounted_state(method, state, model, CPU, SEED) as local:
        torch.testing.assert_close(says(model, ids), says(expected, ids), rtol=1e-5, atol=1e-5)
        for layer, delta in local.deltas().items():
            assert delta.factors() is None
            torch.testing.assert_close(
                delta.dense()[0], dense_layer(expected, layer) - dense_layer(family(name), layer)
            )
    assert local.deltas().keys() == base.layers.keys() - {
        part.removesuffix(".weight") for part in FAMILIES[name].head
    }


def test_no_position_travels() -> None:
    """A message has the values, as many as the mask has entries, the head and nothing else, in either direction."""
    playing = federation(small("sparse"))
    playing.play(2)
    for talk in playing.engine.talks:
        for request, reply in talk.values():
            for payload in (
                Request.decode(request, CONFIG).payload,
                Response.decode(reply).payload,
            ):
                assert payload.keys() == {f"{name}:values" for name in LAYERS} | HEAD
                for name in LAYERS:
                    values = payload[f"{name}:values"]
                    assert (values.shape, values.dtype) == ((round(0.2 * 32 * 32),), torch.float32)


STAGES = [(4, 0.5, 2), (5, 0.2, 1), (20, 0.2, 4), (7, 0.5, 4), (3, 0.0, 0), (2, 1.0, 2)]
STAGES += [(2, 0.2, 1), (10, 0.05, 1), (100, 0.001, 1)]  # some of stage 1 is a round of it at least
STAGES += [(1, 0.2, 0), (1, 0.8, 1)]  # but a run of one round has one stage


@pytest.mark.parametrize(("rounds", "share", "until"), STAGES)
def test_the_first_stage_lasts_its_share_of_the_rounds(
    rounds: int, share: float, until: int
) -> None:
    """On the server's side and, told by the round alone, on the clients'."""
    method = small("slora", rounds=rounds, stage1=share)
    state = method.init(base_of(bert()), SEED)
    for number in range(rounds + 1):
        kinds = {part.partition(":")[2] for part in method.send(state, Client(0)) if ":" in part}
        assert kinds == ({"values"} if number < until else {"A", "B"})
        with mounted_state(method, state, bert(), CPU, SEED) as local:
            assert local.trainable.keys() == state.shared.keys()
        state = method.receive(state, ())


def difference(answers: Iterable[Response], name: str) -> Tensor:
    """Return the (out, in) difference that the plain mean of the clients' values stands for, in float64."""
    flat = torch.zeros(32 * 32, dtype=torch.float64)
    values = [answer.payload[f"{name}:values"].double() for answer in answers]
    flat[positions((32, 32), 0.2, SEED, name)] = (values[0] + values[1] + values[2]) / 3
    return flat.view(32, 32)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_bridge_is_the_eckart_young_optimum_with_all_of_s_in_b(scale: float) -> None:
    """No matrix of rank r is nearer to the difference: the error is the norm of the singular values left out."""
    playing = federation(small("slora", scale=scale))
    bridged = playing.play(2)
    for name in LAYERS:
        B, A = bridged.shared[f"{name}:B"], bridged.shared[f"{name}:A"]
        found = difference(playing.answers(1).values(), name)
        assert (B.shape, A.shape) == ((32, 3), (3, 32))
        values = torch.linalg.svdvals(found)
        best = float(values[3:].norm())
        error = float((found - scale * B.double() @ A.double()).norm())
        assert error == pytest.approx(best, rel=1e-5)
        assert error < 0.999 * float(values.norm()), "the difference is not lost"
        torch.testing.assert_close(A @ A.T, torch.eye(3), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            B.T @ B, (values[:3] / scale).square().diag().float(), rtol=1e-4, atol=1e-7
        )


def test_the_bridge_keeps_the_head_and_the_base_stays_as_it_was() -> None:
    """Stage 2 goes on at W_0 + s B A with the head of stage 1: no residual is taken out of the base."""
    method = SLoRA(4, TARGETS, 1.0, 0.5, rank=32)
    playing = federation(method)
    last_of_first = method.stages.first
    state = playing.play(1)
    state = replace(state, round=1)
    merged = last_of_first.receive(state, ())
    bridged = method.receive(state, ())
    assert bridged.round == merged.round == 2
    for part in HEAD:
        assert torch.equal(bridged.shared[part], merged.shared[part])
    model = bert()
    with mounted_state(last_of_first, merged, model, CPU, SEED):
        before = logits(model)
    with mounted_state(method, bridged, model, CPU, SEED):
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


LORA = LoRA(TARGETS, 3, 2.0, weighting="uniform")


def as_lora(**changes: Any) -> SLoRA:
    """Return SLoRA with the second stage of ``LORA``."""
    return SLoRA(4, TARGETS, 0.2, **{"rank": 3, "scale": 2.0, **changes})


def test_without_a_first_stage_the_run_is_loras_to_the_bit() -> None:
    """The SVD of nothing would give every layer the first axes for its A, whatever the seed."""
    ours, theirs = federation(as_lora(stage1=0.0)), federation(LORA)
    assert_same(ours.start.shared, theirs.start.shared)
    assert_same(ours.play(3).shared, theirs.play(3).shared)


@pytest.mark.parametrize("split", ["left", "sqrt", "right"])
def test_after_a_first_stage_without_replies_the_second_starts_as_lora_does(split: Split) -> None:
    playing = federation(as_lora(stage1=0.5, split=split))
    bridged = playing.play(2, min_replies=4)
    assert all(row.lost for row in playing.rows)
    assert_same(bridged.shared, federation(LORA).start.shared)
    after = playing.play(1, bridged)
    for name in LAYERS:
        for part in "AB":
            moved = (after.shared[f"{name}:{part}"] - bridged.shared[f"{name}:{part}"]).norm(
                dim=1 if part == "A" else 0
            )
            assert (moved > 0).all(), f"every rank of {name}:{part} is trained"


def test_only_a_layer_without_a_difference_starts_as_lora_does() -> None:
    """By hand: one entry of 6 in the first layer is U S V^T = 6 / s at that place, of rank 1."""
    method, still = as_lora(stage1=0.5), LAYERS[1:]
    state = replace(method.init(base_of(bert()), SEED), round=1)
    values = torch.zeros_like(state.shared[f"{LAYERS[0]}:values"])
    values[0] = 6.0
    bridged = method.receive(
        replace(state, shared={**state.shared, f"{LAYERS[0]}:values": values}), ()
    ).shared
    expected = torch.zeros(32 * 32)
    expected[positions((32, 32), 0.2, SEED, LAYERS[0])[0]] = 6.0 / 2.0
    torch.testing.assert_close(
        bridged[f"{LAYERS[0]}:B"] @ bridged[f"{LAYERS[0]}:A"], expected.view(32, 32)
    )
    start = LORA.init(base_of(bert()), SEED).shared
    for name in still:
        for part in "AB":
            assert torch.equal(bridged[f"{name}:{part}"], start[f"{name}:{part}"])


def test_the_pre_classification_layer_has_a_rank_of_its_own() -> None:
    """The paper's 10 in attention and feed-forward layers, 18 in the pooler."""
    state = SLoRA(stage1=0.0).init(base_of(bert()), SEED)
    ranks = {
        part.removesuffix(":A"): len(tensor)
        for part, tensor in state.shared.items()
        if part.endswith(":A")
    }
    assert ranks.pop("bert.pooler.dense") == 18
    assert set(ranks.values()) == {10}
    assert len(ranks) == 12


def test_a_pattern_for_the_pre_classifier_that_is_none_is_refused_at_the_door() -> None:
    with pytest.raises(
        BadInput, match=r"method.pre_classifier = '\(' is not a regular expression: missing \)"
    ):
        SLoRA(pre_classifier="(").init(base_of(bert()), SEED)


def test_the_faithful_defaults_are_the_papers() -> None:
    method = SLoRA()
    assert (method.density, method.split, method.scale, method.weighting) == (
        0.10,
        "left",
        1.0,
        "uniform",
    )
    assert (method.rank, method.pre_classifier_rank, method.targets) == (10, 18, "all-linear")


# Its sibling, whose first stage is full fine-tuning.


def test_the_first_stage_of_the_sibling_is_full_fine_tuning() -> None:
    ours, theirs = federation(small("slora_full")), federation(Full("uniform"))
    assert_same(ours.play(1).shared, theirs.play(1).shared)


def test_the_siblings_bridge_is_the_eckart_young_optimum_and_keeps_the_head_alone() -> None:
    playing = federation(small("slora_full", scale=4.0))
    bridged = playing.play(2)
    answers = list(playing.answers(1).values())
    assert bridged.shared.keys() == {f"{name}:{part}" for name in LAYERS for part in "AB"} | HEAD
    assert not bridged.server
    for name in LAYERS:
        weights = [answer.payload[f"{name}.weight"].double() for answer in answers]
        found = (weights[0] + weights[1] + weights[2]) / 3 - dense_layer(bert(), name).double()
        B, A = bridged.shared[f"{name}:B"], bridged.shared[f"{name}:A"]
        values = torch.linalg.svdvals(found)
        error = float((found - 4.0 * B.double() @ A.double()).norm())
        assert error == pytest.approx(float(values[3:].norm()), rel=1e-4)
        assert error < 0.999 * float(values.norm())
    for part in HEAD:
        heads = [answer.payload[part].double() for answer in answers]
        torch.testing.assert_close(
            bridged.shared[part].double(), (heads[0] + heads[1] + heads[2]) / 3
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sibling_knows_how_far_matrices_have_moved_whichever_way_round_they_lie(
    name: str,
) -> None:
    stage = FullStage("all-linear", "uniform")
    state = stage.init(describe(family(name), FAMILIES[name].head), SEED)
    draw = torch.Generator().manual_seed(0)
    moved, shared = family(name), dict[str, Tensor]()
    for part, tensor in state.shared.items():
        shared[part] = tensor + torch.randn(tensor.shape, generator=draw)
        moved.get_parameter(part).copy_(shared[part])
    state = replace(state, shared=shared)
    differences = stage.differences(state)
    assert differences.keys() == set(select(describe(moved, FAMILIES[name].head), "all-linear"))
    for layer, difference in differences.items():
        due = dense_layer(moved, layer) - dense_layer(family(name), layer)
        assert torch.equal(difference, due)
    assert stage.head(state).keys() == FAMILIES[name].head


def test_the_sibling_without_a_first_stage_is_lora_and_starts_like_it_after_a_silent_one() -> None:
    start = federation(LORA).start
    sibling = as_lora(stage1=0.0, stage1_method="full")
    assert_same(federation(sibling).start.shared, start.shared)
    silent = federation(as_lora(stage1=0.5, stage1_method="full")).play(2, min_replies=4)
    assert_same(silent.shared, start.shared)


def test_the_sibling_cannot_train_weights_of_a_few_bits() -> None:
    base = replace(base_of(bert()), packed=frozenset({LAYERS[0]}))
    with pytest.raises(BadInput, match="method.stage1_method = 'full' trains every weight"):
        small("slora_full").init(base, SEED)


def test_each_stage_trains_at_its_own_rate() -> None:
    method = small("slora", stage1_rate=5.0)
    state = method.init(base_of(bert()), SEED)
    for number, rate in ((0, 5.0), (2, 1.0)):
        while state.round < number:
            state = method.receive(state, ())
        with mounted_state(method, state, bert(), CPU, SEED) as local:
            assert math.isclose(local.rate, rate)


def test_all_clients_train_the_same_entries() -> None:
    """The mean of masked differences is masked: an entry outside the mask stays W_0 to the bit."""
    playing = federation(small("sparse"))
    after = playing.play(2)
    model = bert()
    with mounted_state(playing.method, after, model, CPU, SEED):
        for name in LAYERS:
            inside = torch.zeros(32 * 32, dtype=torch.bool)
            inside[positions((32, 32), 0.2, SEED, name)] = True
            same = dense_layer(model, name) == dense_layer(bert(), name)
            assert torch.equal(same.flatten(), ~inside)


def test_a_mask_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks first: training may read what an evaluation drew."""
    with torch.inference_mode():
        first = positions((4, 90), 0.5, 1, "drawn once")
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("drawn again"))
    assert positions((4, 90), 0.5, 1, "drawn once") is first
    assert not first.is_inference()
