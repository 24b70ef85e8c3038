"""FedARA's ranks keep to the budget, die by vote and for good, and a module without any is neither sent nor mounted."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedpeft.algebra.importance import pack
from fedpeft.methods.fedara import FedARA
from fedpeft.mounting import describe
from fedpeft.training.evaluation import mounted_state
from fedpeft.training.loop import Training
from fedpeft.types import Client, State, Update
from fedpeft.wire.messages import Response
from tests.tiny import (
    CPU,
    SEED,
    SGD,
    TARGETS,
    assert_same_state,
    base_of,
    bert,
    federation,
    logits,
    weighted,
)

LAYERS = sorted(
    f"bert.encoder.layer.{layer}.attention.self.{part}"
    for layer in (0, 1)
    for part in ("query", "value")
)
RANK = 4
METHOD = FedARA(8, TARGETS, RANK, 2.0, kept=0.25, warmup=0.125, settled=0.25, deviation=0.5)
TOTAL = RANK * len(LAYERS)


def alive(state: State) -> Tensor:
    """Return the mask over all ranks, modules in alphabetical order."""
    return torch.cat([state.server[f"{name}:alive"] for name in LAYERS])


def budgets(rounds: int, total: int, kept: float, first: int, last: int) -> list[int]:
    """Return AdaLoRA's cubic schedule: all up to round ``first``, the end's number in the ``last`` rounds."""
    end = round(kept * total)
    found = []
    for done in range(1, rounds + 1):
        left = 1 - (done - first) / (rounds - last - first)
        found.append(
            total
            if done <= first
            else end
            if done >= rounds - last
            else end + round((total - end) * left**3)
        )
    return found


def test_the_budget_is_cubic_between_warm_up_and_end() -> None:
    """By hand: 16 ranks to 4; after round 1 all, then 4 + 12 (4/5)^3, (3/5)^3, ... = 10.1, 6.6, 4.8, 4.1, and 4."""
    assert [METHOD.budget(number, TOTAL) for number in range(8)] == [16, 10, 7, 5, 4, 4, 4, 4]
    assert budgets(8, TOTAL, 0.25, 1, 2) == [16, 10, 7, 5, 4, 4, 4, 4]
    long = FedARA(100, kept=0.1, warmup=0.1, settled=0.3)
    assert [long.budget(number, 950) for number in range(100)] == budgets(100, 950, 0.1, 10, 30)


@pytest.mark.parametrize(
    ("warmup", "settled"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.9, 0.9)]
)
def test_the_budget_only_falls_and_ends_where_it_should_whatever_the_shares(
    warmup: float, settled: float
) -> None:
    method = FedARA(10, kept=0.25, warmup=warmup, settled=settled)
    numbers = [method.budget(number, 40) for number in range(10)]
    assert numbers == sorted(numbers, reverse=True)
    assert all(10 <= number <= 40 for number in numbers)
    assert numbers[-1] == 10
    assert FedARA(10, kept=0.001).budget(9, 40) == 1, "one rank is left at least"


def test_live_ranks_keep_to_the_budget_die_for_good_and_bytes_fall() -> None:
    playing = federation(METHOD)
    states = [playing.start]
    for _ in range(8):
        states.append(playing.play(1, states[-1]))
    counts = [int(alive(state).sum()) for state in states]
    assert counts[0] == TOTAL
    assert all(
        count <= limit
        for count, limit in zip(counts[1:], budgets(8, TOTAL, 0.25, 1, 2), strict=True)
    )
    assert 0 < counts[-1] <= 4 < counts[1]
    for before, after in zip(states, states[1:], strict=False):
        assert not bool((alive(after) & ~alive(before)).any()), "dead stays dead"
        for name in LAYERS:
            dead = ~before.server[f"{name}:alive"]
            assert torch.equal(after.shared[f"{name}:A"][dead], before.shared[f"{name}:A"][dead])
            assert torch.equal(
                after.shared[f"{name}:B"][:, dead], before.shared[f"{name}:B"][:, dead]
            )
    down, up = (
        [getattr(row, way) for row in playing.rows if row.client == 0] for way in ("down", "up")
    )
    assert down == sorted(down, reverse=True)
    assert up == sorted(up, reverse=True)
    lost = 4 * (TOTAL - counts[-2]) * (32 + 32 + 1)
    assert down[0] - down[-1] >= lost, (
        "each dead rank takes its row of A, its column of B and its e with it"
    )


def test_what_is_sent_are_the_live_triplets_the_head_and_the_budget() -> None:
    playing = federation(METHOD)
    state = playing.play(4)
    down = METHOD.send(state, Client(0))
    for name in LAYERS:
        living = [rank for rank in range(RANK) if state.server[f"{name}:alive"][rank]]
        if not living:
            assert not any(part.startswith(f"{name}:") for part in down)
            continue
        assert torch.equal(
            down[f"{name}:A"], torch.stack([state.shared[f"{name}:A"][rank] for rank in living])
        )
        assert torch.equal(
            down[f"{name}:B"],
            torch.stack([state.shared[f"{name}:B"][:, rank] for rank in living], 1),
        )
        assert torch.equal(
            down[f"{name}:e"], torch.stack([state.shared[f"{name}:e"][rank] for rank in living])
        )
    assert int(down["budget"]) == budgets(8, TOTAL, 0.25, 1, 2)[4]
    assert {part for part in down if ":" not in part} == {
        "budget",
        "classifier.weight",
        "classifier.bias",
    }


def test_a_vote_is_one_bit_a_live_rank() -> None:
    playing = federation(METHOD)
    state = playing.start
    for exchange in range(4):
        count = int(alive(state).sum())
        state = playing.play(1, state)
        for answer in playing.answers(exchange).values():
            votes = answer.payload["votes"]
            assert (votes.dtype, votes.shape) == (torch.uint8, (-(-count // 8),))
            bits = "".join(f"{byte:08b}" for byte in votes.tolist())
            assert bits.count("1") == min(count, budgets(8, TOTAL, 0.25, 1, 2)[exchange])
            assert "1" not in bits[count:]


def killed(state: State, *names: str) -> State:
    """Return ``state`` with all ranks of some modules dead."""
    return replace(
        state,
        server={
            **state.server,
            **{f"{name}:alive": torch.zeros(RANK, dtype=torch.bool) for name in names},
        },
    )


EARLY = replace(METHOD, warmup=0.0)
"""Of 16 ranks 12 may live after its first round."""


def early(training: Training) -> tuple[State, list[list[int]]]:
    """Return the state after one round of ``EARLY``, and for which ranks each client voted."""
    playing = federation(EARLY, training=training)
    after = playing.play(1)
    return after, [
        [i for i, bit in enumerate(bin_of(answer)) if bit == "1"]
        for answer in playing.answers(0).values()
    ]


def test_where_nobody_has_a_score_yet_the_strongest_ranks_live() -> None:
    """After one step from e = 0. By number the last module of the alphabet would have been gone for good."""
    after, votes = early(replace(SGD, steps=1))
    assert votes == [list(range(TOTAL))] * 3, "all abstain"
    limit = EARLY.budget(0, TOTAL)
    assert limit < TOTAL
    norms: list[float] = []
    for name in LAYERS:
        A, B, e = (after.shared[f"{name}:{part}"] for part in "ABe")
        norms += [float(e[i].abs() * A[i].norm() * B[:, i].norm()) for i in range(RANK)]
    strongest = sorted(range(TOTAL), key=lambda i: -norms[i])[:limit]
    assert alive(after).nonzero().flatten().tolist() == sorted(strongest) != list(range(limit))


def test_who_takes_one_step_abstains_and_the_others_decide() -> None:
    """Client 0 has one batch, the others two: the budget's ranks are theirs by 11 and 9 examples."""
    playing = federation(EARLY, training=replace(SGD, batch_size=7))
    after = playing.play(1)
    bits = [bin_of(answer) for answer in playing.answers(0).values()]
    assert [answer.measured.steps for answer in playing.answers(0).values()] == [1, 2, 2]
    limit = EARLY.budget(0, TOTAL)
    assert [row.count("1") for row in bits] == [TOTAL, limit, limit]
    expected = [i for i in range(TOTAL) if 11 * int(bits[1][i]) + 9 * int(bits[2][i]) >= 0.5 * 20]
    assert len(expected) == limit, "none is at a tie"
    assert alive(after).nonzero().flatten().tolist() == expected


def test_where_nothing_was_learnt_no_rank_dies() -> None:
    """A head of 0 sends no gradient to the adapters: e stays 0, and no rank is better than another."""
    playing = federation(EARLY, training=replace(SGD, steps=1))
    start = playing.start
    blank = replace(start, shared={**start.shared, "classifier.weight": torch.zeros(3, 32)})
    after = playing.play(1, blank)
    assert not any(after.shared[f"{name}:e"].any() for name in LAYERS)
    assert bool(alive(after).all())
    assert int(alive(playing.play(2, after)).sum()) == EARLY.budget(2, TOTAL), (
        "later rounds make up for it"
    )


def test_a_dead_module_is_neither_sent_nor_mounted_nor_expected() -> None:
    model, dead = bert(), LAYERS[1]
    state = killed(federation(METHOD).play(1), dead)
    down = METHOD.send(state, Client(0))
    assert {part.partition(":")[0] for part in down if ":" in part} == set(LAYERS) - {dead}
    assert METHOD.expects(state, down).keys() == down.keys() - {"budget"} | {"votes"}
    with mounted_state(METHOD, state, model, CPU, SEED) as local:
        hooked = {name for name, module in model.named_modules() if module._forward_hooks}
        assert hooked == set(LAYERS) - {dead}
        assert not any(part.startswith(dead) for part in local.trainable)
        assert dead not in local.deltas()


def test_a_federation_goes_on_when_every_rank_is_dead_and_there_is_no_head() -> None:
    """Nothing is trained, sent or voted on; the orthogonality of no factors pulls at none."""
    playing = federation(replace(METHOD, orthogonality=0.1))
    state = killed(playing.play(1), *LAYERS)
    headless = {part: tensor for part, tensor in state.shared.items() if ":" in part}
    after = playing.play(2, replace(state, shared=headless))
    assert [row.lost for row in playing.rows] == [None] * 9
    assert_same_state(after, replace(state, shared=headless, round=3))


def test_a_federation_goes_on_when_every_rank_is_dead() -> None:
    """Clients that never agree can vote all of them out; the head still learns."""
    playing = federation(METHOD)
    state = killed(playing.play(1), *LAYERS)
    after = playing.play(2, state)
    assert [row.lost for row in playing.rows] == [None] * 9
    assert not torch.equal(after.shared["classifier.weight"], state.shared["classifier.weight"])
    assert not bool(alive(after).any())


def ballot(state: State, votes: list[int]) -> dict[str, Tensor]:
    """Return an honest reply that changes nothing and votes for the ranks in ``votes``, numbered over live ones."""
    down = METHOD.send(state, Client(0))
    mask = torch.zeros(int(sum(mask.sum() for mask in state.server.values())), dtype=torch.bool)
    mask[votes] = True
    return {
        **{part: tensor for part, tensor in down.items() if part != "budget"},
        "votes": pack(mask),
    }


def test_a_rank_lives_by_the_weighted_votes_of_its_clients() -> None:
    """Threshold 0.5: rank 0 has 6 of 12 examples, rank 1 has 5, rank 2 has all; worked by hand."""
    state = replace(METHOD.init(base_of(bert()), SEED), round=3)
    updates = [
        Update(Client(0), 6, ballot(state, [0, 2, 9])),
        Update(Client(1), 5, ballot(state, [1, 2, 9])),
        Update(Client(2), 1, ballot(state, [2, 9])),
    ]
    after = METHOD.receive(state, updates)
    assert alive(after).nonzero().flatten().tolist() == [0, 2, 9]
    uniform = replace(METHOD, weighting="uniform").receive(state, updates)
    assert alive(uniform).nonzero().flatten().tolist() == [2, 9], "one of three is below a half"
    assert alive(
        replace(METHOD, threshold=0.4).receive(state, updates)
    ).nonzero().flatten().tolist() == [0, 1, 2, 9]


def test_where_too_many_are_voted_for_the_most_votes_win_then_the_strongest() -> None:
    """The budget after round 4 is 5. Seven ranks have a majority; ranks 3 and 8 have fewer votes than the others."""
    state = replace(METHOD.init(base_of(bert()), SEED), round=3)
    strong = {f"{name}:e": torch.full((RANK,), 1.0 + index) for index, name in enumerate(LAYERS)}
    state = replace(state, shared={**state.shared, **strong})
    everyone = [0, 1, 5, 9, 13]
    updates = [
        Update(Client(0), 3, ballot(state, [*everyone, 3, 8])),
        Update(Client(1), 1, ballot(state, everyone)),
    ]
    assert alive(METHOD.receive(state, updates)).nonzero().flatten().tolist() == everyone
    tied = [Update(Client(0), 1, ballot(state, [0, 1, 5, 6, 9, 10, 13]))]
    found = alive(METHOD.receive(state, tied)).nonzero().flatten().tolist()
    assert found == [5, 6, 9, 10, 13], "equal votes go to the larger |e| |a| |b|"


def test_a_client_votes_reach_their_own_module_where_one_name_begins_another() -> None:
    """``fc`` sorts before ``fc2``, but ``fc2:alive`` before ``fc:alive``."""
    model = nn.Sequential()
    for name in ("fc", "fc2"):
        model.add_module(name, nn.Linear(4, 4))
    method = FedARA(2, "fc", 2, kept=0.5, warmup=0.0, settled=0.5)
    state = method.init(describe(model, ()), SEED)
    down = method.send(state, Client(0))
    assert int(down["budget"]) == 2
    votes = pack(
        torch.tensor([True, True, False, False])
    )  # both for fc, modules in alphabetical order
    reply = {**{part: tensor for part, tensor in down.items() if part != "budget"}, "votes": votes}
    after = method.receive(state, [Update(Client(0), 1, reply)])
    assert {name: mask.tolist() for name, mask in after.server.items()} == {
        "fc:alive": [True] * 2,
        "fc2:alive": [False] * 2,
    }
    with mounted_state(method, state, model, CPU, SEED) as local:
        for part, parameter in local.trainable.items():
            parameter.grad = torch.full_like(parameter, 1.0 if part.startswith("fc2:") else 0.1)
            parameter.data.fill_(1.0)
        local.after_backward(slice(0, 1))
        said = local.reply()[0]["votes"][0]
    assert said.tolist() == pack(torch.tensor([False, False, True, True])).tolist(), (
        "the client, too, names them in order"
    )


def test_the_merge_is_that_of_the_replies_worked_out() -> None:
    """Means of live parts by examples; masks from the clients' bits by the rule, written out."""
    playing = federation(METHOD)
    before = playing.play(2)
    after = playing.play(1, before)
    answers = list(playing.answers(2).values())
    weights = [float(answer.measured.examples) for answer in answers]
    means = weighted(
        [{k: v for k, v in answer.payload.items() if k != "votes"} for answer in answers], weights
    )
    rank_norms: list[float] = []
    for name in LAYERS:
        if f"{name}:e" in means:
            A, B, e = (means[f"{name}:{part}"] for part in "ABe")
            rank_norms += [float(e[i].abs() * A[i].norm() * B[:, i].norm()) for i in range(len(e))]
    bits = [bin_of(answer) for answer in answers]
    votes = [
        sum(w for w, row in zip(weights, bits, strict=True) if row[i] == "1") / sum(weights)
        for i in range(len(rank_norms))
    ]
    order = sorted(range(len(votes)), key=lambda i: (-votes[i], -rank_norms[i]))[
        : budgets(8, TOTAL, 0.25, 1, 2)[2]
    ]
    living = {i for i in order if votes[i] >= 0.5}
    places = alive(before).nonzero().flatten().tolist()
    assert {places[i] for i in living} == set(alive(after).nonzero().flatten().tolist())


def bin_of(answer: Response) -> str:
    return "".join(f"{byte:08b}" for byte in answer.payload["votes"].tolist())


def test_the_scale_is_kept_when_ranks_drop() -> None:
    playing = federation(METHOD)
    after = playing.play(5)
    merged = bert()
    with mounted_state(METHOD, after, playing.worker.model, CPU, SEED) as local:
        said, deltas = logits(playing.worker.model), local.deltas()
    for name in LAYERS:
        mask = after.server[f"{name}:alive"]
        A, B, e = (after.shared[f"{name}:{part}"] for part in "ABe")
        expected = 2.0 * B[:, mask] @ e[mask].diag() @ A[mask]
        if mask.any():
            torch.testing.assert_close(deltas[name].dense()[0], expected)
        merged.get_parameter(f"{name}.weight").add_(expected)
    for name in ("classifier.weight", "classifier.bias"):
        merged.get_parameter(name).copy_(after.shared[name])
    torch.testing.assert_close(said, logits(merged), rtol=1e-5, atol=1e-5)


def test_the_orthogonality_term_pulls_a_and_b_before_the_step() -> None:
    weight = 0.7
    method = replace(METHOD, orthogonality=weight)
    state = method.init(base_of(bert()), SEED)
    with mounted_state(method, state, bert(), CPU, SEED) as local:
        for parameter in local.trainable.values():
            parameter.grad = torch.zeros_like(parameter)
        local.after_backward(slice(0, 1))
        for name in LAYERS:
            A = state.shared[f"{name}:A"].clone().requires_grad_()
            torch.autograd.backward(weight * torch.linalg.matrix_norm(A @ A.T - torch.eye(RANK)))
            grad = local.trainable[f"{name}:A"].grad
            assert grad is not None
            torch.testing.assert_close(grad[0], A.grad)


def test_a_silent_round_kills_nobody_though_the_budget_falls() -> None:
    state = METHOD.init(base_of(bert()), SEED)
    for number in range(1, 6):
        after = METHOD.receive(state, ())
        assert_same_state(after, replace(state, round=number))
        state = after
