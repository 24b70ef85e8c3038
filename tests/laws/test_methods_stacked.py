"""FLoRA and FedEx-LoRA add exactly sum p_k B_k A_k, and LoRA does not; who comes late is sent all that was added."""

import pytest
import torch
from torch import Tensor

from fedpeft.algebra.increments import held, missing, nothing_added, with_factors
from fedpeft.algebra.svd import rank_of_energy
from fedpeft.types import Client, State
from fedpeft.wire.messages import decode
from tests.products import LAYERS, SCALE, STRONG, added, fleet, mean_product, off, shares
from tests.tiny import TinyFederation, assert_same, close, federation, small


def told(playing: TinyFederation, exchange: int, client: int) -> dict[str, Tensor]:
    """Return what a client was sent, without the fields of the request."""
    sent = decode(playing.engine.talks[exchange][client][0])
    return {name: tensor for name, tensor in sent.items() if not name.startswith("@")}


def test_fedex_adds_exactly_the_mean_product_and_lora_does_not() -> None:
    """In every round what the clients hold becomes the mean of what they had made of it."""
    playing = federation(small("fedex_lora"), training=STRONG)
    before = playing.start
    base = {module: torch.zeros(32, 32, dtype=torch.float64) for module in LAYERS}
    errors = []
    for number in range(4):
        after = playing.play(1, before)
        answers = list(playing.answers(number).values())
        moved = added(playing, after)
        for module in LAYERS:
            mean = mean_product(answers, module)
            exact = base[module] + SCALE * mean
            assert off(moved[module], exact) < 1e-5
            plain = after.shared[f"{module}:B"].double() @ after.shared[f"{module}:A"].double()
            errors.append(off(plain, mean))
            # From here on the residual is part of every client's base.
            base[module] = base[module] + SCALE * (mean - plain)
        before = after
    assert min(errors) > 1e-3, "the product of the means, which is LoRA's merge, is another"


def test_fedex_averages_the_factors_as_lora_does() -> None:
    ours, theirs = federation(small("fedex_lora")), federation(small("lora"))
    assert_same(ours.play(1).shared, theirs.play(1).shared)


@pytest.mark.parametrize("capacities", [{0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 0.67, 2: 0.34}])
def test_flora_adds_exactly_the_mean_product_of_clients_of_any_rank(
    capacities: dict[int, float],
) -> None:
    playing = federation(small("flora"))
    clients = fleet(capacities)
    state = playing.start
    exact = {module: torch.zeros(32, 32, dtype=torch.float64) for module in LAYERS}
    for number in range(3):
        state = playing.play(1, state, cohort=lambda _: clients)
        answers = list(playing.answers(number).values())
        moved = added(playing, state)
        for module in LAYERS:
            exact[module] += SCALE * mean_product(answers, module)
            assert off(moved[module], exact[module]) < 1e-5


def test_flora_stacks_b_as_it_is_and_a_by_weight() -> None:
    playing = federation(small("flora"))
    playing.play(2)
    answers = list(playing.answers(0).values())
    sent = told(playing, 1, 0)
    for module in LAYERS:
        B = torch.cat([a.payload[f"{module}:B"] for a in answers], dim=1)
        A = torch.cat(
            [
                p * a.payload[f"{module}:A"].double()
                for p, a in zip(shares(answers), answers, strict=True)
            ]
        )
        assert torch.equal(sent[f"{module}:B+"], B)
        torch.testing.assert_close(sent[f"{module}:A+"].double(), A, rtol=1e-6, atol=1e-9)


def test_flora_starts_every_client_and_round_afresh() -> None:
    playing = federation(small("flora"))
    playing.play(2)
    begun = [
        answer.payload[f"{LAYERS[0]}:A"]
        for exchange in (0, 1)
        for answer in playing.answers(exchange).values()
    ]
    for place, tensor in enumerate(begun):
        for other in begun[:place]:
            assert (tensor - other).abs().max() > 0.1


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "florist"])
def test_a_late_joiner_is_sent_all_that_it_missed_and_then_holds_what_the_others_do(
    name: str,
) -> None:
    playing = federation(small(name))
    early = playing.clients()[:2]
    state = playing.play(3, cohort=lambda number: early if number < 2 else playing.clients())
    sent = [told(playing, 2, client) for client in (0, 2)]
    module = LAYERS[0]
    stacks = [payload[f"{module}:B+"].shape[1] for payload in sent]
    assert stacks[1] > stacks[0] > 0, "two rounds' stacks, and the last one's"
    kept = [decode(playing.memories.get(client, 2)) for client in (0, 1, 2)]
    close(kept[0], kept[2], 1e-6)
    assert_same(kept[0], kept[1])
    for client in (0, 2):
        memory = decode(playing.memories.get(client, 2))
        known = added(playing, state, Client(client, memory=2), memory)
        close(known, added(playing, state), 1e-5)


def test_where_stacks_would_be_larger_the_total_is_sent() -> None:
    """A layer of 6 x 4 has 24 entries; increments of rank 1 have 10: two of them fit, three do not."""
    layers = {"q": torch.zeros(6, 4)}
    state = State(0, {}, server=nothing_added(layers))
    assert missing(state, -1) == {}
    exact = torch.zeros(6, 4)
    for number in range(4):
        B, A = torch.full((6, 1), number + 1.0), torch.arange(4.0).unsqueeze(0)
        exact = exact + B @ A
        state = State(
            number + 1, {}, server=with_factors(State(number, {}, state.server), {"q": (B, A)})
        )
        torch.testing.assert_close(state.server["q:total"], exact)
        new = missing(state, -1)
        assert set(new) == ({"q:total"} if number > 1 else {"q:B+", "q:A+"})
        for memory in range(-1, number + 1):
            had = torch.zeros(1, 6, 4)
            for older in range(max(memory, 0)):
                had += (older + 1.0) * torch.arange(4.0)
            lacking = {part: tensor.unsqueeze(0) for part, tensor in missing(state, memory).items()}
            totals, is_new = held(lacking, {"q:total": had} if memory >= 0 else {})
            assert is_new
            torch.testing.assert_close(totals["q:total"][0], exact)
        assert missing(state, number + 1) == {}
    assert {part for part in state.server if "+" in part} == {"q:B+2", "q:A+2", "q:B+3", "q:A+3"}


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_stacks_larger_than_a_layer_are_added_as_matrices_and_stay_exact(name: str) -> None:
    """Three clients of rank 8 have 3 * 8 * 64 numbers a layer of 32 x 32."""
    playing = federation(small(name, rank=8))
    after = playing.play(1)
    assert not any("+" in part for part in after.server)
    answers = list(playing.answers(0).values())
    moved = added(playing, after)
    for module in LAYERS:
        assert off(moved[module], SCALE * mean_product(answers, module)) < 1e-5
    playing.play(1, after)
    sent = told(playing, 1, 0)
    assert torch.equal(sent[f"{LAYERS[0]}:total"], after.server[f"{LAYERS[0]}:total"])


def test_a_client_keeps_its_total_through_rounds_in_which_nothing_was_added() -> None:
    playing = federation(small("flora"))
    first = playing.play(1)
    silent = playing.play(1, first, min_replies=4)
    playing.play(1, silent)
    assert all(row.lost is None for row in playing.rows[6:])
    assert told(playing, 2, 0).keys() == told(playing, 1, 0).keys()


def test_florist_adds_the_components_that_hold_the_energy() -> None:
    playing = federation(small("florist", energy=0.8))
    after = playing.play(1)
    answers = list(playing.answers(0).values())
    moved = added(playing, after)
    cut = 0
    for module in LAYERS:
        exact = SCALE * mean_product(answers, module)
        values = torch.linalg.svdvals(exact)
        squares = values.square() / values.square().sum()
        kept = next(n for n in range(1, 33) if float(squares[:n].sum()) >= 0.8)
        error = float((moved[module] - exact).norm())
        assert error == pytest.approx(float(values[kept:].norm()), rel=1e-4)
        assert after.server[f"{module}:B+0"].shape == (32, kept)
        cut += kept
    assert cut < 9 * len(LAYERS), "less travels than with FLoRA"


def test_florist_that_keeps_all_energy_is_flora() -> None:
    ours, theirs = federation(small("florist", energy=1.0)), federation(small("flora"))
    one, other = ours.play(1), theirs.play(1)
    close(added(ours, one), added(theirs, other), 1e-6)


def test_energy_counts_squares_and_never_what_is_nothing() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])
    ranks = [rank_of_energy(values, share, 6.0) for share in (0.5, 0.7, 0.8, 0.9, 1.0)]
    assert ranks == [1, 2, 2, 3, 3]
    assert rank_of_energy(torch.zeros(4), 0.9, 0.0) == 1
