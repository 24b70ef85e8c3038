"""Cores between frozen factors: Fed-SB's r x r, RAVAN's heads; both merge exactly."""

import pytest
import torch
from torch import Tensor

from fedpeft.algebra.heads import factors
from fedpeft.algebra.lowrank import LowRank
from fedpeft.errors import BadInput, WireError
from fedpeft.mounting import mounted, mounted_deltas
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import Client
from fedpeft.wire.messages import decode
from tests.products import LAYERS, SCALE, added, fleet, mean_product, off, shares
from tests.tiny import CPU, HEAD, SEED, SIZES, base_of, bert, federation, logits, small

QUERY = LAYERS[0]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_branch_with_cores_adds_the_sum_of_its_heads(heads: int, weighted: bool) -> None:
    """sum_i s_i B_i H_i A_i, worked out head by head; as factors, as a matrix, and in the model."""
    A, B, H = (
        drawn(1, 6, 32),
        drawn(1, 32, 6, seed=1),
        drawn(1, heads, 6 // heads, 6 // heads, seed=2),
    )
    s = drawn(1, heads, seed=3) if weighted else torch.ones(1, heads)
    size = 6 // heads
    exact = torch.zeros(32, 32)
    for i in range(heads):
        rows = slice(i * size, (i + 1) * size)
        exact += 0.5 * s[0, i] * B[0][:, rows] @ H[0, i] @ A[0][rows]
    parts = {f"{QUERY}:A": A, f"{QUERY}:B": B, f"{QUERY}:H": H}
    if weighted:
        parts[f"{QUERY}:s"] = s
    [delta] = mounted_deltas(parts, 0.5).values()
    torch.testing.assert_close(delta.dense()[0], exact, rtol=1e-4, atol=1e-4)
    model, merged = bert(), bert()
    merged.get_parameter(f"{QUERY}.weight").add_(exact)
    with mounted(model, parts, 0.5):
        torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)


def test_cores_that_do_not_fit_the_ranks_are_refused() -> None:
    A, B = drawn(1, 6, 32), drawn(1, 32, 6)
    for H in (drawn(1, 2, 2, 2), drawn(1, 4, 1, 1), drawn(6, 6), drawn(1, 2, 3, 2)):
        with (
            pytest.raises(WireError, match=r":H is "),
            mounted(bert(), {f"{QUERY}:A": A, f"{QUERY}:B": B, f"{QUERY}:H": H}),
        ):
            pass
    assert LowRank(A, B, 1.0).factors()[1] is not None


def test_fed_sb_starts_from_the_svd_of_the_first_rounds_mean_update() -> None:
    playing = federation(small("fed_sb"))
    after = playing.play(1)
    answers = list(playing.answers(0).values())
    moved = added(playing, after)
    for module in LAYERS:
        exact = mean_product(
            answers, module
        )  # of updates of whole matrices: the scale is not in it
        best = float(torch.linalg.svdvals(exact)[3:].norm())
        assert float((moved[module] - exact).norm()) == pytest.approx(best, rel=1e-3, abs=1e-6)
        B, A = after.server[f"{module}:B"], after.server[f"{module}:A"]
        torch.testing.assert_close(B.T @ B, torch.eye(3), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(A @ A.T, torch.eye(3), rtol=1e-5, atol=1e-5)
        core = after.shared[f"{module}:H"]
        assert core.shape == (1, 3, 3)
        assert torch.equal(core[0], core[0].diagonal().diag())


def test_fed_sb_sends_r_by_r_and_merges_exactly() -> None:
    playing = federation(small("fed_sb"))
    before = playing.play(2)
    after = playing.play(1, before)
    for request, reply in playing.engine.talks[2].values():
        for blob in (request, reply):
            found = {n: tuple(t.shape) for n, t in decode(blob).items() if not n.startswith("@")}
            assert found.keys() == {f"{module}:H" for module in LAYERS} | HEAD
            assert {found[f"{module}:H"] for module in LAYERS} == {(1, 3, 3)}
    answers = list(playing.answers(2).values())
    moved = added(playing, after)
    for module in LAYERS:
        B, A = before.server[f"{module}:B"].double(), before.server[f"{module}:A"].double()
        exact = torch.zeros(32, 32, dtype=torch.float64)
        for share, answer in zip(shares(answers), answers, strict=True):
            exact += share * SCALE * B @ answer.payload[f"{module}:H"][0].double() @ A
        assert off(moved[module], exact) < 1e-5


def test_fed_sb_sends_its_frozen_factors_once() -> None:
    playing = federation(small("fed_sb"))
    last = playing.play(4, cohort=lambda number: playing.clients()[: 2 if number < 3 else 3])
    sent = [
        {client: any(n.endswith(":A") for n in decode(talk[client][0])) for client in talk}
        for talk in playing.engine.talks
    ]
    assert sent == [
        {0: False, 1: False},
        {0: True, 1: True},
        {0: False, 1: False},
        {0: False, 1: False, 2: True},
    ]
    for client, version in last.memories.items():
        memory = decode(playing.memories.get(client, version))
        assert all(torch.equal(memory[n], last.server[n]) for n in memory)
        assert memory.keys() == {f"{module}:{part}" for module in LAYERS for part in "AB"}


def test_a_first_round_without_replies_is_played_again() -> None:
    playing = federation(small("fed_sb"))
    silent = playing.play(1, min_replies=4)
    after = playing.play(1, silent)
    assert not any(":" in part for part in silent.shared)
    assert all(f"{module}:H" in after.shared for module in LAYERS)


def test_ravan_merges_exactly_and_sends_cores_alone() -> None:
    """All clients share B_i and A_i, which anyone draws from the seed."""
    playing = federation(small("ravan"))
    after = playing.play(2)
    answers = list(playing.answers(1).values())
    moved = added(playing, after)
    with mounted_state(playing.method, playing.start, bert(), CPU, SEED) as local:
        factors = {name: delta.factors() for name, delta in local.deltas().items()}
    for module in LAYERS:
        pair = factors[module]
        assert pair is not None
        A = pair[1][0].double()
        exact = torch.zeros(32, 32, dtype=torch.float64)
        B = frozen_B(module)
        for share, answer in zip(shares(answers), answers, strict=True):
            H = answer.payload[f"{module}:H"].double()
            for i in range(2):
                rows = slice(3 * i, 3 * i + 3)
                exact += share * SCALE * B[:, rows] @ H[i] @ A[rows]
        assert off(moved[module], exact) < 1e-5
        torch.testing.assert_close(A @ A.T, torch.eye(6).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(B.T @ B, torch.eye(6).double(), rtol=1e-5, atol=1e-5)
        rank = torch.linalg.matrix_rank(moved[module], rtol=1e-5)
        assert rank == 6, "two heads of rank 3"
    assert {n for a in answers for n in a.payload} == {f"{m}:H" for m in LAYERS} | HEAD


def frozen_B(module: str) -> Tensor:
    """Return RAVAN's B of a layer of 32 x 32, two heads of rank 3 side by side."""
    left, _ = factors(torch.Size((32, 32)), 2, 3, "orthonormal", SEED, module)
    return torch.cat(list(left), dim=1).double()


def test_a_weight_of_a_head_is_folded_into_what_goes_up_and_starts_at_one() -> None:
    playing = federation(small("ravan"))
    state = playing.play(1)
    with mounted_state(playing.method, state, bert(), CPU, SEED) as local:
        for module in LAYERS:
            assert torch.equal(local.trainable[f"{module}:s"], torch.ones(1, 2))
        local.trainable[f"{QUERY}:s"].data[0, 1] = 3.0
        up, _ = local.reply()
    begun = state.shared[f"{QUERY}:H"]
    torch.testing.assert_close(up[f"{QUERY}:H"][0], begun * torch.tensor([1.0, 3.0])[:, None, None])


@pytest.mark.parametrize("choice", ["random", "norm"])
def test_a_weak_client_trains_some_heads_and_each_is_averaged_over_those_that_did(
    choice: str,
) -> None:
    playing = federation(small("ravan", heads=4, rank=2, choice=choice))
    clients = fleet({0: 1.0, 1: 0.5, 2: 0.25})
    before = playing.play(1, cohort=lambda _: clients)
    after = playing.play(1, before, cohort=lambda _: clients)
    assert [row.lost for row in playing.rows] == [None] * 6
    for module in LAYERS:
        name = f"{module}:H"
        sums, weights = torch.zeros(4, 2, 2).double(), torch.zeros(4).double()
        for client, answer in playing.answers(1).items():
            sent = decode(playing.engine.talks[1][client][0])
            heads = sent[f"{module}:heads"].tolist()
            assert len(heads) == (4, 2, 1)[client]
            assert answer.payload[name].shape == (len(heads), 2, 2)
            if choice == "norm":
                norms = before.shared[name].flatten(1).norm(dim=1)
                assert set(heads) == set(norms.argsort(descending=True)[: len(heads)].tolist())
            for i, core in zip(heads, answer.payload[name], strict=True):
                sums[i] += SIZES[client] * core.double()
                weights[i] += SIZES[client]
        torch.testing.assert_close(after.shared[name].double(), sums / weights[:, None, None])


def test_heads_that_rest_are_mounted_all_the_same() -> None:
    """What a weak client starts from is the whole model, as a strong one does."""
    playing = federation(small("ravan", heads=4, rank=2))
    state = playing.play(2)
    weak = added(playing, state, Client(1, capacity=0.25))
    for module, whole in added(playing, state).items():
        torch.testing.assert_close(weak[module], whole, rtol=1e-5, atol=1e-7)


def test_heads_that_nobody_trained_stay() -> None:
    playing = federation(small("ravan", heads=4, rank=2))
    before = playing.play(1)
    weak = fleet({0: 0.25, 1: 0.25})
    after = playing.play(1, before, cohort=lambda _: weak)
    for module in LAYERS:
        name = f"{module}:H"
        same = [
            torch.equal(a, b) for a, b in zip(after.shared[name], before.shared[name], strict=True)
        ]
        assert sum(same) == 3


def test_more_ranks_than_a_layer_has_are_refused() -> None:
    with pytest.raises(BadInput, match=r"method.heads \* method.rank = 36: layer .* is 32 x 32"):
        small("ravan", heads=4, rank=9).init(base_of(bert()), SEED)
    playing = federation(small("ravan"))
    start = playing.start
    with pytest.raises(BadInput, match="less than one of method.heads = 2"):
        playing.method.send(start, Client(1, capacity=0.3))


def test_normal_vectors_have_norm_one_on_average() -> None:
    method = small("ravan", heads=4, rank=8, start="normal")
    with mounted_state(method, method.init(base_of(bert()), SEED), bert(), CPU, SEED) as local:
        pair = local.deltas()[QUERY].factors()
    assert pair is not None
    squares = pair[1][0].square().sum(1)
    assert float(squares.mean()) == pytest.approx(1.0, abs=0.15)
    assert float(squares.std()) > 0.05
