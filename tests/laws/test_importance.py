"""Scores are AdaLoRA's recursion, votes are one bit a rank, and the select_ranks are who the rule says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean
from fedpeft.algebra.importance import (
    Importance,
    Score,
    counted,
    pack,
    select_ranks,
    survivors,
    unpack,
)

CLIENTS, STEPS, BETA1, BETA2 = 2, 4, 0.8, 0.6


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def triplets() -> dict[str, nn.Parameter]:
    """Two modules of 3 and 2 ranks, of K = 2 clients, and a head that has no ranks; not in alphabetical order."""
    sizes = {
        "n:A": (2, 5),
        "n:B": (4, 2),
        "n:e": (2,),
        "m:A": (3, 5),
        "m:B": (6, 3),
        "m:e": (3,),
        "classifier.bias": (3,),
    }
    return {
        name: nn.Parameter(drawn(CLIENTS, *size, seed=k))
        for k, (name, size) in enumerate(sizes.items())
    }


def gradient(name: str, like: Tensor, step: int) -> Tensor:
    return drawn(*like.shape, seed=100 * step + sum(map(ord, name)))


def trained(score: Score, stops: int = STEPS) -> tuple[Importance, dict[str, nn.Parameter]]:
    """Return the scores after ``STEPS`` backward passes, the second client stopping after ``stops`` of them."""
    parameters = triplets()
    importance = Importance(parameters, CLIENTS, score, BETA1, BETA2)
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradient(name, parameter, step)
        importance.update(slice(0, 2 if step < stops else 1))
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(0.9)  # an optimizer step
    return importance, parameters


def adalora(client: int, steps: int) -> Tensor:
    """Return AdaLoRA's score of every rank by its recursion, written out entry by entry, modules in alphabetical order."""
    scores = {}
    for name, start in triplets().items():
        smooth = spread = torch.zeros(start.shape[1:], dtype=torch.float64)
        value = start.detach()[client].double()
        for step in range(steps):
            now = (value * gradient(name, start, step)[client]).abs()
            smooth = BETA1 * smooth + (1 - BETA1) * now
            spread = BETA2 * spread + (1 - BETA2) * (now - smooth).abs()
            value = value * 0.9
        scores[name] = smooth * spread
    ranks = []
    for module, size in (("m", 3), ("n", 2)):
        for i in range(size):
            ranks.append(
                scores[f"{module}:e"][i]
                + scores[f"{module}:B"][:, i].mean()
                + scores[f"{module}:A"][i].mean()
            )
    return torch.stack(ranks)


@pytest.mark.parametrize("stops", [STEPS, 2])
def test_sensitivity_is_adaloras_recursion_for_every_client(stops: int) -> None:
    """A client that has stopped keeps the scores that it had."""
    importance, _ = trained("sensitivity", stops)
    expected = torch.stack([adalora(0, STEPS), adalora(1, stops)])
    torch.testing.assert_close(importance.scores().double(), expected, rtol=1e-5, atol=1e-7)


def test_gradient_is_smoothed_sensitivity_alone_and_magnitude_needs_no_gradient() -> None:
    importance, _ = trained("gradient")
    smooth = {name: torch.zeros_like(start) for name, start in triplets().items()}
    for name, start in triplets().items():
        for step in range(STEPS):
            now = (start.detach() * 0.9**step * gradient(name, start, step)).abs()
            smooth[name] = BETA1 * smooth[name] + (1 - BETA1) * now
    magnitude, parameters = trained("magnitude")
    plain = {name: parameter.detach().abs() for name, parameter in parameters.items()}
    for found, parts in ((importance, smooth), (magnitude, plain)):
        expected = [
            parts[f"{m}:e"] + parts[f"{m}:B"].mean(1) + parts[f"{m}:A"].mean(2) for m in ("m", "n")
        ]
        torch.testing.assert_close(found.scores(), torch.cat(expected, dim=1))


@pytest.mark.parametrize("budget", [1, 3, 5, 9])
def test_a_client_votes_for_its_best_ranks_over_all_modules(budget: int) -> None:
    importance, _ = trained("sensitivity")
    votes = importance.votes(budget)
    assert (votes.shape, votes.dtype) == ((CLIENTS, 1), torch.uint8)
    for scores, ballot in zip(importance.scores(), votes, strict=True):
        best = sorted(range(5), key=lambda rank: -float(scores[rank]))[:budget]
        assert unpack(ballot, 5).nonzero().flatten().tolist() == sorted(best)


def test_a_stack_without_any_rank_left_votes_with_empty_ballots() -> None:
    """One for each client: the reply has a client axis whatever is in it, be it nothing."""
    head = {"classifier.bias": nn.Parameter(torch.zeros(CLIENTS, 3))}
    for trained in (head, dict[str, nn.Parameter]()):
        assert Importance(trained, CLIENTS, "sensitivity", 0.85, 0.85).votes(4).shape == (
            CLIENTS,
            0,
        )


def scoring(*scores: list[float]) -> Importance:
    """Return an ``Importance`` whose K clients score one rank each for every number, in one module."""
    e = torch.tensor(scores)
    rest = {"m:A": torch.zeros(*e.shape, 2), "m:B": torch.zeros(len(e), 2, e.shape[1])}
    return Importance({"m:e": e, **rest}, len(e), "magnitude", 0.85, 0.85)


def test_a_rank_without_a_score_gets_no_vote_and_a_client_without_any_score_abstains() -> None:
    """By hand, 2 of 5 ranks may live: the best two, the only one that scores, and, of nobody, all."""
    scores = [1.0, 3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 7.0, 0.0], [0.0] * 5
    ballots = [unpack(ballot, 5).tolist() for ballot in scoring(*scores).votes(2)]
    assert ballots == [
        [False, True, False, True, False],
        [False, False, False, True, False],
        [True] * 5,
    ]
    for budget in (5, 9):
        assert unpack(scoring(scores[1]).votes(budget)[0], 5).all(), (
            "all may live: nobody is voted out"
        )


def test_after_one_step_from_e_of_nothing_no_rank_scores() -> None:
    """|p grad| is 0 for e, as e is, and for A and B, which have no gradient while e is 0."""
    parameters = triplets()
    importance = Importance(parameters, CLIENTS, "sensitivity", 0.85, 0.85)
    for name, parameter in parameters.items():
        parameter.grad = (
            gradient(name, parameter, 0) if name.endswith(":e") else torch.zeros_like(parameter)
        )
        if name.endswith(":e"):
            parameter.data.zero_()
    importance.update(slice(0, CLIENTS))
    assert not importance.scores().any()
    assert unpack(importance.votes(2)[0], 5).all()


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_votes_are_packed_eight_to_a_byte_and_come_back(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    text = "".join(str(int(bit)) for bit in bits).ljust(-(-len(bits) // 8) * 8, "0")
    assert packed.tolist() == [int(text[k : k + 8], 2) for k in range(0, len(text), 8)]
    assert torch.equal(unpack(packed, len(bits)), mask)


def test_every_client_of_a_stack_is_packed_by_itself() -> None:
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack(mask)
    assert packed.shape == (3, 2)
    for row, bits in zip(packed, mask, strict=True):
        assert torch.equal(unpack(row, 11), bits)


def tallied(*ballots: tuple[list[int], float]) -> dict[str, Tensor]:
    """Return the sums over the ballots on 4 ranks of (ranks voted for, weight)."""
    total = Mean()
    for ranks, weight in ballots:
        total.add(counted(pack(torch.tensor([rank in ranks for rank in range(4)])), 4), weight)
    return total.sums()


ALL = [0, 1, 2, 3]
RISING = torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_who_abstains_keeps_no_rank_alive_and_kills_none() -> None:
    """Of those with an opinion rank 1 has 3 of 4 and rank 0 has 1 of 4; with 6 more of 10 it would be 7 and 9."""
    opinions: list[tuple[list[int], float]] = [([1, 3], 3.0), ([0, 3], 1.0)]
    for ballots in (opinions, [([*ALL], 6.0), *opinions], [*opinions, ([*ALL], 6.0)]):
        assert survivors(tallied(*ballots), RISING, 0.5, 3).tolist() == [False, True, False, True]


def test_shares_of_those_with_an_opinion_are_exact() -> None:
    """3 of 4 are 0.75, whoever abstains; but 3/5 over 4/5 are less in float64."""
    assert (3 / 5) / (4 / 5) < 0.75 == 3 / 4
    tally = tallied(([0], 3.0), ([1], 1.0), (ALL, 1.0))
    assert survivors(tally, RISING, 0.75, 4).tolist() == [True, False, False, False]


def test_where_all_abstain_the_strongest_live_and_where_none_is_strong_all() -> None:
    """Never the first by number: that would be the first modules of the alphabet."""
    nobody = tallied((ALL, 2.0), (ALL, 1.0))
    assert survivors(nobody, RISING, 0.5, 2).tolist() == [False, False, True, True]
    assert survivors(nobody, torch.zeros(4), 0.5, 2).tolist() == [True] * 4
    nothing = counted(torch.zeros(0, dtype=torch.uint8), 0)
    assert survivors(nothing, torch.zeros(0), 0.5, 2).tolist() == []


COARSE = st.integers(0, 3).map(lambda part: part / 3)


@settings(deadline=None)
@given(st.lists(st.tuples(COARSE, COARSE), max_size=12), COARSE, st.integers(0, 14))
def test_survivors_are_the_most_voted_for_above_the_threshold(
    ranks: list[tuple[float, float]], threshold: float, budget: int
) -> None:
    """Few different numbers, so that ties are common: they go to the stronger rank, then to the earlier one."""
    order = sorted(range(len(ranks)), key=lambda rank: (-ranks[rank][0], -ranks[rank][1], rank))
    expected = {rank for rank in order[:budget] if ranks[rank][0] >= threshold}
    votes, rank_norms = torch.tensor(ranks, dtype=torch.float64).reshape(-1, 2).unbind(1)
    alive = select_ranks(votes, rank_norms, threshold, budget)
    assert alive.dtype == torch.bool
    assert set(alive.nonzero().flatten().tolist()) == expected
