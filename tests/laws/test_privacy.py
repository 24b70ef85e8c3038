"""Differential privacy without a federation: epsilons against published ones, noise against its law, bounds, DP-SGD against a loop."""

import math
from collections import Counter
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpeft.algebra.norms import l2_norm
from fedpeft.errors import BadInput
from fedpeft.experiment.privacy import drawn_in_secret, worst
from fedpeft.mounting import mounted, trainable
from fedpeft.privacy import accountant
from fedpeft.privacy.accountant import epsilon, left_over
from fedpeft.privacy.clipping import clipped, next_bound
from fedpeft.privacy.noise import gaussian, uniform
from fedpeft.tasks import Encoded, Example
from fedpeft.training import private
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.loop import Training, fit
from fedpeft.training.micro_batches import Share
from fedpeft.types import Client, LocalTask, RowNoise
from tests.tiny import CPU, HEAD, TARGETS, TASK, base_of, bert, examples, small

# What releases cost.


def delta_of_gaussian(sigma: float, eps: float) -> float:
    """Balle and Wang 2018, theorem 8: the exact delta of one Gaussian mechanism of sensitivity 1."""
    cdf = NormalDist().cdf
    return cdf(1 / (2 * sigma) - eps * sigma) - math.exp(eps) * cdf(-1 / (2 * sigma) - eps * sigma)


@pytest.mark.parametrize(("sigma", "count"), [(0.8, 1), (1.0, 1), (3.0, 10), (8.0, 100)])
def test_releases_that_all_are_in_cost_what_one_gaussian_does(sigma: float, count: int) -> None:
    """So many of them are one with sigma / sqrt(count)."""
    eps = epsilon(sigma, 1e-5, {1.0: count})
    assert delta_of_gaussian(sigma / math.sqrt(count), eps) == pytest.approx(1e-5, rel=1e-6)


def test_a_gaussian_for_epsilon_1_is_that_of_google_s_own_tests() -> None:
    """dp_accounting 0.6.0, rdp_privacy_accountant_test.py, test_compute_epsilon_delta_gaussian: sigma for (1, 1e-6) by Renyi.

    The exact epsilon is smaller, by little.
    """
    assert 0.9 < epsilon(4.530877117, 1e-6, {1.0: 1}) < 1


PUBLISHED = [
    (0.01, 4.0, 10_000, 1.26, "Abadi et al. 2016, section 3.2, by the moments accountant"),
    (256 / 60_000, 1.1, 60 * 60_000 // 256, 3.01, "TensorFlow Privacy, tutorials/README.md"),
    (256 / 60_000, 1.3, 20 * 60_000 // 256, 1.34, "Bu et al. 2020, figure 4, moments accountant"),
]
"""Sampling probability, noise multiplier, steps -> epsilon at delta 1e-5."""


@pytest.mark.parametrize(("q", "sigma", "steps", "published", "source"), PUBLISHED)
def test_sampled_releases_cost_no_more_than_was_published(
    q: float, sigma: float, steps: int, published: float, source: str
) -> None:
    """These are older, and go from Renyi divergences to epsilon by Mironov 2017, proposition 3, which loses some."""
    as_then = min(
        steps * renyi(q, sigma, order) + math.log(1e5) / (order - 1) for order in range(2, 64)
    )
    assert as_then == pytest.approx(published, rel=0.015), source
    assert 0.75 * as_then < epsilon(sigma, 1e-5, {q: steps}) < as_then


def test_renyi_divergences_are_those_of_google_s_own_tests() -> None:
    """dp_accounting 0.6.0, rdp_privacy_accountant_test.py, test_compute_rdp_poisson_sampled_gaussian, orders 5 and 50.

    They are computed here by the binomial sum of Mironov, Talwar and Zhang 2019, section 3.3, not by the package.
    """
    published = {5: 2.18075656e-03, 50: 2.38460375e-02}
    for order, due in published.items():
        assert 50 * renyi(0.01, 2.5, order) == pytest.approx(due, rel=1e-6)


def renyi(q: float, sigma: float, order: int) -> float:
    """Return the Renyi divergence of one sampled Gaussian, of a whole order."""
    logs = []
    for k in range(order + 1):
        chosen = math.log(math.comb(order, k))
        logs.append(
            chosen + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
        )
    return float(torch.tensor(logs, dtype=torch.float64).logsumexp(0)) / (order - 1)


def test_sampled_releases_cost_what_their_renyi_divergences_say() -> None:
    """By the conversion of Canonne, Kamath and Steinke 2020, proposition 12, minimised over orders here."""
    q, sigma, count, delta = 0.05, 1.2, 200, 1e-6
    due = min(
        count * renyi(q, sigma, order)
        + math.log1p(-1 / order)
        - math.log(delta * order) / (order - 1)
        for order in range(2, 64)
    )
    assert epsilon(sigma, delta, {q: count}) == pytest.approx(due, rel=1e-4)


def test_releases_of_several_rates_add_up() -> None:
    parts = {0.1: 20, 0.2: 5, 1.0: 1}
    whole = epsilon(2.0, 1e-5, parts)
    assert whole > max(epsilon(2.0, 1e-5, {rate: count}) for rate, count in parts.items())
    assert whole < epsilon(2.0, 1e-5, {1.0: 26})
    assert epsilon(2.0, 1e-5, {}) == epsilon(2.0, 1e-5, {0.1: 0}) == 0


@given(st.floats(0.3, 50), st.floats(1.01, 20))
def test_parts_of_a_release_cost_together_what_the_whole_does(z: float, more: float) -> None:
    """Andrew et al. 2021, theorem 1: 1/z^2 = 1/z_1^2 + 1/z_2^2."""
    rest = left_over(z, taken=z * more)
    assert (z * more) ** -2 + rest**-2 == pytest.approx(z**-2)


def test_a_part_that_takes_everything_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="takes all of 2"):
        left_over(2.0, taken=2.0)


def test_without_the_package_a_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match=r"pip install 'fedpeft\[privacy\]'"):
        accountant.check_installed()


# Noise.


def test_noise_is_normal_with_the_deviation_that_is_asked_for() -> None:
    """Moments and a Kolmogorov distance of 200,000 numbers, within 5 standard errors."""
    count = 200_000
    values = gaussian(torch.Size([count]), 3.0) / 3
    assert abs(float(values.mean())) < 5 / math.sqrt(count)
    assert abs(float(values.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(values.pow(4).mean()) - 3) < 5 * math.sqrt(96 / count)
    due = torch.special.ndtr(values.sort().values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((due - steps).abs().max()) < 3 / math.sqrt(count)
    # Neighbours, and both halves of a pair of Box and Muller's, have nothing to do with each other.
    for lag in (1, count // 2):
        assert abs(float((values[lag:] * values[:-lag]).mean())) < 5 / math.sqrt(count - lag)


def test_noise_does_not_follow_from_any_seed() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(gaussian(torch.Size([4, 3]), 1.0))
    assert draws[0].shape == (4, 3)
    assert not (draws[0] == draws[1]).any()


def test_uniform_numbers_are_below_one_and_use_all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, due in ((b"\xff", 1 - 2**-53), (b"\x00", 0.0)):
        monkeypatch.setattr("os.urandom", lambda size, word=word: word * size)
        assert float(uniform(1)[0]) == due
        assert torch.isfinite(gaussian(torch.Size([3]), 1.0)).all()


# Bounds.

TENSORS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


@given(TENSORS, TENSORS, st.floats(1e-3, 1e3))
def test_what_is_clipped_is_no_longer_than_the_bound_and_points_the_same_way(
    one: list[float], two: list[float], bound: float
) -> None:
    update = {"a": torch.tensor(one), "b": torch.tensor(two)}
    flat = torch.cat([update["a"], update["b"]]).double()
    length = float(torch.linalg.vector_norm(flat))
    shorter, within = clipped(update, bound)
    assert within == (length <= bound)
    # As it is sent: in float32.
    assert l2_norm(tensor.float() for tensor in shorter.values()) <= bound * (1 + 1e-12)
    due = flat * min(1.0, bound / length) if length else flat
    torch.testing.assert_close(
        torch.cat([shorter["a"], shorter["b"]]), due, rtol=2e-6, atol=1e-12 * bound
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_left_out_whole(wrong: float) -> None:
    shorter, within = clipped({"a": torch.tensor([1.0, wrong]), "b": torch.ones(2)}, 1.0)
    assert not within
    assert all(not tensor.any() for tensor in shorter.values())


def test_what_is_longer_than_any_number_is_left_out_whole() -> None:
    """Each square is a number, 1e308, and their sum is none."""
    far = torch.tensor([1e154], dtype=torch.float64)
    shorter, within = clipped({"a": far, "b": far}, 1.0)
    assert not within
    assert all(not tensor.any() for tensor in shorter.values())


def test_a_bound_finds_the_quantile() -> None:
    """Andrew et al. 2021, section 2: C <- C exp(-0.2 (b - 0.5)) goes to the median from afar."""
    norms = torch.linspace(3, 5, 101)
    bound = 0.1
    for _ in range(200):
        share = float((norms <= bound).double().mean())
        bound = next_bound(bound, share, quantile=0.5, rate=0.2)
    assert bound == pytest.approx(4.0, abs=0.1)


# Who takes part.


def test_each_client_is_drawn_by_itself() -> None:
    clients = [Client(number) for number in range(50)]
    counts: Counter[int] = Counter()
    sizes = []
    for _ in range(400):
        cohort = drawn_in_secret(clients, 10)
        assert cohort == sorted(cohort, key=lambda client: client.id)
        sizes.append(float(len(cohort)))
        counts.update(client.id for client in cohort)
    drawn_sizes = torch.tensor(sizes)
    # Binomial(50, 0.2): mean 10, variance 8.
    assert abs(float(drawn_sizes.mean()) - 10) < 5 * math.sqrt(8 / 400)
    assert 5 < float(drawn_sizes.var()) < 12
    assert len(counts) == 50
    assert max(counts.values()) < 80 + 5 * 8
    assert drawn_in_secret(clients[:3], 10) == clients[:3]


def test_the_worst_pairs_are_those_that_nothing_exceeds() -> None:
    pairs = {(0.1, 10): 0, (0.2, 5): 0, (0.2, 10): 0, (0.05, 40): 0, (0.3, 1): 0}
    assert worst(pairs) == [(0.3, 1), (0.2, 10), (0.05, 40)]
    assert worst({}) == []


# DP-SGD.


def in_windows(rows: int, each: int) -> Encoded:
    """Return examples, so many from each row."""
    plain = examples(rows * each)
    found = [
        Example(one.ids, one.labels, index // each, weight=1 + index % 3)
        for index, one in enumerate(plain)
    ]
    return Encoded(found)


def test_every_row_is_in_every_step_by_itself_with_all_its_examples() -> None:
    held = in_windows(40, 3)
    steps = private.drawn(held, 500, batch_size=10)
    assert len(steps) == 500
    sizes, counts = [], Counter[int]()
    for step in steps:
        rows = Counter(index // 3 for index in step)
        assert set(rows.values()) <= {3}
        counts.update(rows.keys())
        sizes.append(float(len(rows)))
    # Binomial(40, 1/4): mean 10, variance 7.5.
    assert abs(float(torch.tensor(sizes).mean()) - 10) < 5 * math.sqrt(7.5 / 500)
    assert len(counts) == 40
    assert max(counts.values()) < 125 + 5 * 10
    assert private.drawn(held, 1, batch_size=100) == [list(range(120))]


def gradients_of_rows(model: nn.Module, down: dict[str, Tensor], held: Encoded) -> list[Tensor]:
    """Return the gradient of every row's mean loss, flat, computed with nothing of the loop."""
    found = []
    for row in sorted({example.row for example in held}):
        of_row = held.of_rows([row])
        trained = trainable(down)
        weights = torch.tensor([example.weight for example in of_row], dtype=torch.float32)
        with mounted(model, trained, 2.0):
            losses = TASK.losses(model, TASK.collate(of_row, CPU.torch_device))
        torch.autograd.backward((losses * weights / weights.sum()).sum())
        parts = [trained[name].grad for name in trained]
        found.append(torch.cat([part.flatten() for part in parts if part is not None]).double())
    return found


def sent(model: nn.Module, clients: int) -> dict[str, Tensor]:
    """Return LoRA's tensors, away from B = 0, for so many clients."""
    state = small("lora").init(base_of(model), 0)
    draw = torch.Generator().manual_seed(5)
    return {
        name: torch.stack([tensor + 0.1 * torch.randn(tensor.shape, generator=draw)] * clients)
        for name, tensor in state.shared.items()
    }


@pytest.mark.parametrize("each", [1, 2], ids=["rows", "windows"])
@pytest.mark.parametrize("clients", [1, 2])
def test_a_step_is_the_sum_of_bounded_gradients(
    monkeypatch: pytest.MonkeyPatch, clients: int, each: int
) -> None:
    """Abadi et al. 2016, algorithm 1, without its noise: half of the rows are longer than the bound."""
    monkeypatch.setattr(private, "gaussian", lambda shape, _: torch.zeros(shape))
    model, held = bert(), in_windows(6, each)
    down = sent(model, clients)
    rows = gradients_of_rows(model, {name: t[:1] for name, t in down.items()}, held)
    lengths = sorted(float(row.norm()) for row in rows)
    bound = (lengths[2] + lengths[3]) / 2
    due = sum(row * min(1.0, bound / float(row.norm())) for row in rows) / 4

    trained = trainable(down)
    local = LocalTask(trained, lambda: ({}, {}), rows=RowNoise(bound, 1.0))
    plan = Training(optimizer="sgd", lr=1.0, batch_size=4, clip=1e-9)
    shares = [Share(held, [list(range(len(held)))])] * clients
    with mounted(model, trained, 2.0):
        fit(model, local, TASK, shares, plan, HEAD, CPU, ActivationCache())
    for client in range(clients):
        step = [(down[name] - trained[name].detach())[client].flatten() for name in trained]
        torch.testing.assert_close(torch.cat(step).double(), due, rtol=1e-4, atol=1e-6)


def test_noise_of_a_step_is_what_was_asked_for_also_where_nobody_was_drawn() -> None:
    """An empty step moves every trained number by noise of deviation z C lr / batch, each client by its own."""
    model = bert()
    down = sent(model, 2)
    trained = trainable(down)
    local = LocalTask(trained, lambda: ({}, {}), rows=RowNoise(clip=0.5, noise=3.0))
    plan = Training(optimizer="sgd", lr=2.0, batch_size=4)
    with mounted(model, trained, 2.0):
        fit(model, local, TASK, [Share(examples(6), [[]])] * 2, plan, HEAD, CPU, ActivationCache())
    moved = torch.cat([(down[name] - trained[name].detach()).flatten(1) for name in trained], dim=1)
    count = moved.shape[1]
    assert count > 700
    due = 3.0 * 0.5 * 2.0 / 4
    for client in range(2):
        assert float(moved[client].std()) == pytest.approx(due, rel=5 / math.sqrt(2 * count))
    assert not torch.equal(moved[0], moved[1])
    assert TARGETS


def test_a_row_whose_gradient_is_no_number_adds_nothing() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    private.begin({"w": weight})
    private.add_bounded({"w": weight}, [torch.full((2, 3), math.nan)], client=1, bound=1.0)
    private.add_bounded({"w": weight}, [None], client=1, bound=1.0)
    assert weight.grad is not None
    assert not weight.grad.any()
