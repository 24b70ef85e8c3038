"""Merges by SVD: the best approximation of the mean product, whatever ranks the clients have."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedpeft.algebra import products
from fedpeft.algebra.products import ProductMean, product_norm
from fedpeft.algebra.ranks import cut, share_of
from fedpeft.algebra.svd import thin_svd
from fedpeft.errors import BadInput
from fedpeft.types import Client, State, Update
from tests.products import (
    LAYERS,
    SCALE,
    STRONG,
    added,
    fleet,
    mean_product,
    off,
    product,
    shares,
    total,
)
from tests.tiny import HEAD, assert_same, close, federation, small, weighted


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [2, 9])
def test_a_thin_svd_is_that_of_the_product(rank: int) -> None:
    """Also where the factors have more columns than the product has rows."""
    B, A = drawn(7, rank), drawn(rank, 5, seed=1)
    left, values, right = thin_svd(B, A)
    matrix = B.double() @ A.double()
    torch.testing.assert_close((left * values) @ right, matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix)[: len(values)])
    for basis in (left.T @ left, right @ right.T):
        torch.testing.assert_close(basis, torch.eye(len(values), dtype=torch.float64))


@pytest.mark.parametrize("clients", [1, 2, 30])
def test_a_mean_of_products_is_exact_as_a_stack_and_as_a_matrix(clients: int) -> None:
    """Thirty stacks of rank 2 would be larger than the matrix of 12 x 10, which takes their place."""
    mean = ProductMean()
    exact, total = torch.zeros(12, 10, dtype=torch.float64), 0.0
    for client in range(clients):
        B, A = drawn(12, 2, seed=client), drawn(2, 10, seed=client + 100)
        mean.add(B, A, weight=client + 1.0)
        exact += (client + 1.0) * B.double() @ A.double()
        total += client + 1.0
    exact /= total
    stack = mean.factors()
    assert (stack is None) == (clients == 30)
    if stack is not None:
        assert (stack[0].shape, stack[1].shape) == ((12, 2 * clients), (2 * clients, 10))
        torch.testing.assert_close(
            stack[0].double() @ stack[1].double(), exact, atol=1e-6, rtol=1e-6
        )
    columns = drawn(10, 3, seed=7).double()
    torch.testing.assert_close(mean.times(columns), exact @ columns)
    values = torch.linalg.svdvals(exact)
    torch.testing.assert_close(mean.svd()[1][:2], values[:2], rtol=1e-5, atol=1e-6)
    B, A = mean.best(4)
    error = float((exact - B.double() @ A.double()).norm())
    assert error == pytest.approx(float(values[4:].norm()), abs=1e-5)
    torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.dense().double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.99], ids=["few hold it", "nearly all alike"])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.9999, 1.0])
def test_the_components_that_hold_an_energy_are_those_of_the_whole_svd(
    decay: float, energy: float
) -> None:
    """As a matrix, whose leading components are looked for; all of it where they do not suffice."""
    mean = ProductMean()
    size, terms = 128, 140
    left, right = (torch.linalg.qr(drawn(size, size, seed=seed)).Q for seed in (0, 1))
    for k in range(terms):
        i = k % size
        mean.add(decay**i * left[:, i : i + 1], right[i : i + 1], weight=1.0)
    assert mean.factors() is None
    exact = torch.linalg.svd(mean.dense().double(), full_matrices=False)
    squares = exact.S.square()
    held = squares.cumsum(0) / squares.sum()
    rank = next((n + 1 for n in range(size) if float(held[n]) >= energy - 1e-12), size)
    rank = min(rank, int((exact.S / exact.S[0] > 1e-7).sum()))
    B, values, A = mean.components(energy)
    assert (B.shape, A.shape) == ((size, rank), (rank, size))
    torch.testing.assert_close(values, exact.S[:rank], rtol=1e-6, atol=1e-9)
    whole = (exact.U * exact.S)[:, :rank] @ exact.Vh[:rank]
    torch.testing.assert_close((B * values) @ A, whole, rtol=1e-5, atol=1e-6)


def test_of_a_large_layer_the_largest_components_are_kept_and_no_matrix_is_formed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exact as long as all that was added has no more than ``KEPT`` ranks: here 6, of 20 clients."""
    for name, value in (("LARGE", 16), ("WIDE", 12), ("KEPT", 8)):
        monkeypatch.setattr(products, name, value)
    base_B, base_A = drawn(40, 6), drawn(6, 30, seed=1)
    mean = ProductMean(compress=True)
    exact = torch.zeros(40, 30, dtype=torch.float64)
    for client in range(20):
        B, A = base_B @ drawn(6, 3, seed=client), drawn(3, 6, seed=client + 50) @ base_A
        mean.add(B, A, weight=1.0)
        exact += B.double() @ A.double() / 20
        stack = mean.factors()
        assert stack is not None
        assert stack[0].shape[1] <= 12
    B, A = mean.best(6)
    torch.testing.assert_close(B.double() @ A.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_sum_of_means_is_their_sum() -> None:
    means, exact = [], torch.zeros(6, 5, dtype=torch.float64)
    for place, count in enumerate((1, 2, 9)):
        mean = ProductMean()
        own = torch.zeros(6, 5, dtype=torch.float64)
        for k in range(count):
            B, A = drawn(6, 1, seed=k + 10 * place), drawn(1, 5, seed=k + 10 * place + 500)
            mean.add(B, A, weight=2.0)
            own += B.double() @ A.double() / count
        means.append(mean)
        exact += own
    torch.testing.assert_close(
        ProductMean.total(means).dense().double(), exact, rtol=1e-5, atol=1e-6
    )


def test_the_norm_of_products_needs_no_product() -> None:
    payload = {
        "q:B": drawn(6, 2),
        "q:A": drawn(2, 5, seed=1),
        "v:B": drawn(4, 2),
        "v:A": drawn(2, 3),
    }
    exact = sum(float(product(payload, name).square().sum()) for name in "qv") ** 0.5
    assert product_norm({**payload, "head": drawn(3)}) == pytest.approx(exact)


def test_flexlora_sends_the_best_approximation_of_the_mean_product() -> None:
    playing = federation(small("flexlora"), training=STRONG)
    after = playing.play(2)
    answers = list(playing.answers(1).values())
    moved = added(playing, after)
    for module in LAYERS:
        exact = SCALE * mean_product(answers, module)
        values = torch.linalg.svdvals(exact)
        error = float((moved[module] - exact).norm())
        assert error == pytest.approx(float(values[3:].norm()), rel=1e-4)
        assert error > 1e-3 * float(exact.norm()), "three ranks are not all of it"
        A, B = after.shared[f"{module}:A"], after.shared[f"{module}:B"]
        torch.testing.assert_close(A @ A.T, torch.eye(3), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(B.norm(dim=0).double(), values[:3] / SCALE, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["flexlora", "raflora", "hetlora", "flora", "florist"])
def test_a_client_is_sent_its_own_rank_and_trains_it(name: str) -> None:
    """Capacities of 1, 2/3 and 1/3 of three ranks; for FLoRA it is what goes up."""
    playing = federation(small(name))
    clients = fleet({0: 1.0, 1: 0.67, 2: 0.34})
    playing.play(2, cohort=lambda _: clients)
    assert [row.lost for row in playing.rows] == [None] * 6
    for exchange in (0, 1):
        for client, answer in playing.answers(exchange).items():
            for module in LAYERS:
                A, B = answer.payload[f"{module}:A"], answer.payload[f"{module}:B"]
                assert (A.shape, B.shape) == ((3 - client, 32), (32, 3 - client))


def test_flexlora_of_unequal_ranks_is_the_best_approximation_too() -> None:
    playing = federation(small("flexlora"), training=STRONG)
    clients = fleet({0: 1.0, 1: 0.67, 2: 0.34})
    after = playing.play(2, cohort=lambda _: clients)
    moved = added(playing, after)
    for module in LAYERS:
        exact = SCALE * mean_product(list(playing.answers(1).values()), module)
        best = float(torch.linalg.svdvals(exact)[3:].norm())
        assert float((moved[module] - exact).norm()) == pytest.approx(best, rel=1e-4)


def test_raflora_with_one_level_of_ranks_is_flexlora() -> None:
    ours, theirs = federation(small("raflora")), federation(small("flexlora"))
    one, other = ours.play(2), theirs.play(2)
    close(added(ours, one), added(theirs, other), 1e-5)
    assert_same({part: one.shared[part] for part in HEAD}, {p: other.shared[p] for p in HEAD})


def test_raflora_averages_each_rank_over_the_clients_that_have_it() -> None:
    """Worked out: rank i of the sum is the mean of b_i a_i over clients with more than i ranks."""
    playing = federation(small("raflora"), training=STRONG)
    clients = fleet({0: 1.0, 1: 0.67, 2: 0.34})
    after = playing.play(2, cohort=lambda _: clients)
    answers = list(playing.answers(1).values())
    weights = [float(answer.measured.examples) for answer in answers]
    moved = added(playing, after)
    for module in LAYERS:
        exact = torch.zeros(32, 32, dtype=torch.float64)
        for i in range(3):
            has = [k for k in range(3) if i < 3 - k]
            for k in has:
                A, B = (answers[k].payload[f"{module}:{part}"].double() for part in "AB")
                exact += weights[k] / sum(weights[j] for j in has) * torch.outer(B[:, i], A[i])
        best = float(torch.linalg.svdvals(exact)[3:].norm())
        assert float((moved[module] / SCALE - exact).norm()) == pytest.approx(
            best, rel=1e-3, abs=1e-6
        )
    flex = federation(small("flexlora"), training=STRONG).play(2, cohort=lambda _: clients)
    assert off(added(playing, flex)[LAYERS[0]], moved[LAYERS[0]]) > 1e-2


def test_raflora_of_very_many_clients_is_that_of_few() -> None:
    """Two hundred replies of ranks 3, 2 and 1 in turn, against sums written out."""
    method = small("raflora")
    random = torch.Generator().manual_seed(0)
    updates: list[Update] = []
    for k in range(200):
        rank = 3 - k % 3
        B, A = (torch.randn(*form, generator=random) for form in ((48, rank), (rank, 40)))
        updates.append(Update(Client(k), 1 + k % 7, {"q:B": B, "q:A": A}))
    after = method.receive(State(0, {}), iter(updates))
    exact = torch.zeros(48, 40, dtype=torch.float64)
    for i in range(3):
        has = [update for update in updates if i < len(update.payload["q:A"])]
        total = sum(update.examples for update in has)
        for update in has:
            B, A = (update.payload[f"q:{part}"].double() for part in "BA")
            exact += update.examples / total * torch.outer(B[:, i], A[i])
    best = float(torch.linalg.svdvals(exact)[3:].norm())
    ours = after.shared["q:B"].double() @ after.shared["q:A"].double()
    assert float((ours - exact).norm()) == pytest.approx(best, rel=1e-6)


def test_fedsvd_keeps_the_product_and_renews_a() -> None:
    playing = federation(small("fedsvd"))
    before = playing.play(1)
    after = playing.play(1, before)
    answers = list(playing.answers(1).values())
    means = weighted([a.payload for a in answers], shares(answers))
    moved = added(playing, after)
    for module in LAYERS:
        kept = SCALE * means[f"{module}:B"] @ before.shared[f"{module}:A"].double()
        assert off(moved[module], kept) < 1e-6
        A, B = after.shared[f"{module}:A"], after.shared[f"{module}:B"]
        torch.testing.assert_close(A @ A.T, torch.eye(3), rtol=1e-5, atol=1e-5)
        gram = B.T @ B
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(A, before.shared[f"{module}:A"])
    for answer in answers:
        assert answer.payload.keys() == {f"{name}:B" for name in LAYERS} | HEAD
        # The average is exact: all clients share the A that was sent.
        exact = total(
            share * a.payload[f"{LAYERS[0]}:B"].double() @ before.shared[f"{LAYERS[0]}:A"].double()
            for share, a in zip(shares(answers), answers, strict=True)
        )
        assert off(moved[LAYERS[0]], SCALE * exact) < 1e-6


def test_fedsvd_keeps_its_a_where_nothing_was_learnt() -> None:
    method = small("fedsvd")
    start = federation(method).start
    reply = {part: tensor for part, tensor in start.shared.items() if not part.endswith(":A")}
    after = method.receive(start, [Update(Client(0), 3, reply)])
    assert_same(after.shared, start.shared)


def test_lora_fair_comes_nearer_to_the_mean_product_than_the_product_of_the_means() -> None:
    playing = federation(small("lora_fair"))
    after = playing.play(2)
    answers = list(playing.answers(1).values())
    means = weighted([a.payload for a in answers], shares(answers))
    moved = added(playing, after)
    for module in LAYERS:
        exact = mean_product(answers, module)
        A = means[f"{module}:A"]
        plain = float((means[f"{module}:B"] @ A - exact).norm())
        corrected = float((moved[module] / SCALE - exact).norm())
        assert corrected < plain
        # Ridge regression, worked out on the dense residual.
        weight = 0.01 * (A @ A.T).diagonal().mean() * torch.eye(3, dtype=torch.float64)
        step = (exact - means[f"{module}:B"] @ A) @ A.T @ torch.linalg.inv(A @ A.T + weight)
        torch.testing.assert_close(
            after.shared[f"{module}:B"].double(), means[f"{module}:B"] + step, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(after.shared[f"{module}:A"].double(), A, rtol=1e-6, atol=1e-8)


def test_a_share_of_ranks_is_rounded_down_and_below_one_refused() -> None:
    assert [share_of(Client(0, capacity=c), 10) for c in (1.0, 0.7, 0.19, 2.0)] == [10, 7, 1, 10]
    with pytest.raises(
        BadInput,
        match=r"client 3 has capacity 0.1, which is less than one of method.rank = 4; choose a "
        r"capacity of at least 0.25",
    ):
        share_of(Client(3, capacity=0.1), 4)


def test_what_has_no_more_ranks_is_not_copied() -> None:
    shared = federation(small("lora")).start.shared
    assert cut(shared, 3) is shared
    assert cut(shared, 5) is shared
    assert cut(shared, 2)["classifier.bias"] is shared["classifier.bias"]


def test_hetlora_of_equal_ranks_and_equal_weights_is_lora() -> None:
    """With equal norms every client counts alike, as in a uniform mean."""
    ours = federation(small("hetlora", penalty=0.0, weighting="uniform"))
    theirs = federation(small("lora", weighting="uniform"))
    assert_same(ours.play(2).shared, theirs.play(2).shared)
    by_examples = federation(small("hetlora", penalty=0.0, weighting="examples"))
    assert_same(by_examples.play(2).shared, federation(small("lora")).play(2).shared)
    method = small("hetlora")
    start = ours.start
    replies = []
    for client in range(2):
        turned = {part: tensor.clone() for part, tensor in start.shared.items()}
        for module in LAYERS:  # the same norm, other directions
            turned[f"{module}:B"] = torch.ones(32, 3).roll(client, 1) * torch.tensor(
                [1.0, -1.0, 1.0]
            )
            turned[f"{module}:A"] = torch.eye(32)[3 * client : 3 * client + 3]
        replies.append({**turned, "rank": torch.tensor(3)})
    updates = [Update(Client(k), 5 + k, reply) for k, reply in enumerate(replies)]
    merged = method.receive(start, updates).shared
    plain = small("lora", weighting="uniform").receive(
        start,
        [replace(u, payload={n: t for n, t in u.payload.items() if n != "rank"}) for u in updates],
    )
    close(merged, plain.shared, 1e-6)


def test_hetlora_pads_with_zeros_and_weighs_by_norm() -> None:
    playing = federation(small("hetlora", penalty=0.0))
    clients = fleet({0: 1.0, 1: 0.67, 2: 0.34})
    after = playing.play(2, cohort=lambda _: clients)
    answers = list(playing.answers(1).values())
    norms = [
        sum(float(product(a.payload, module).square().sum()) for module in LAYERS) ** 0.5
        for a in answers
    ]
    assert max(norms) > 1.01 * min(norms)
    for module in LAYERS:
        A, B = torch.zeros(3, 32).double(), torch.zeros(32, 3).double()
        for norm, answer in zip(norms, answers, strict=True):
            own_A, own_B = (answer.payload[f"{module}:{part}"].double() for part in "AB")
            A[: len(own_A)] += norm / sum(norms) * own_A
            B[:, : len(own_A)] += norm / sum(norms) * own_B
        torch.testing.assert_close(after.shared[f"{module}:A"].double(), A, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(after.shared[f"{module}:B"].double(), B, rtol=1e-5, atol=1e-7)


def test_hetlora_prunes_what_its_penalty_has_made_small() -> None:
    """A large penalty shrinks the last rank of three; that client is sent two from then on."""
    method = small("hetlora", penalty=5.0)
    playing = federation(method)
    states = [playing.start]
    for _ in range(3):
        states.append(playing.play(1, states[-1]))
    left = {name: int(tensor) for name, tensor in states[-1].server.items()}
    assert left, "somebody has pruned"
    for name, rank in left.items():
        client = int(name.removeprefix("rank of client "))
        assert rank < 3
        sent = method.send(states[-1], Client(client))
        assert {len(sent[f"{module}:A"]) for module in LAYERS} == {rank}
    free = federation(small("hetlora", penalty=0.0)).play(3)
    assert not free.server


def test_the_penalty_is_the_gradient_of_the_norms_of_the_last_ranks() -> None:
    """lambda |B'| |A'|, of active clients only, worked out for a decay that holds back one of three."""
    from fedpeft.types import Context
    from tests.tiny import SEED, bert

    method = small("hetlora", penalty=0.5, decay=0.7)
    state = federation(method).play(1)
    down = {name: torch.stack([t, t]) for name, t in method.send(state, Client(0)).items()}
    with method.mount(bert(), down, {}, Context([0, 1], 1, SEED)) as local:
        local.after_backward(slice(0, 1))
        for module in LAYERS:
            A = down[f"{module}:A"][0].clone().requires_grad_()
            B = down[f"{module}:B"][0].clone().requires_grad_()
            (0.5 * A[2:].norm() * B[:, 2:].norm()).backward()
            for part, due in (("A", A.grad), ("B", B.grad)):
                found = local.trainable[f"{module}:{part}"].grad
                assert found is not None
                assert due is not None
                torch.testing.assert_close(found[0], due)
                assert not found[1].any()
