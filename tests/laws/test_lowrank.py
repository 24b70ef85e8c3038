"""The algebra of factors, against torch's dense arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.algebra import svd
from fedpeft.algebra.lowrank import LowRank, by_module, check_ranks, deltas, orthogonality, uniform
from fedpeft.algebra.svd import Split, largest, leading, principal
from fedpeft.errors import BadInput

SPLITS: list[Split] = ["sqrt", "left", "right"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_principal_is_the_best_approximation_of_its_rank(
    out: int, width: int, data: st.DataObject
) -> None:
    """Eckart-Young: the error is the norm of the singular values left out; and there is no smaller one."""
    rank = data.draw(st.integers(1, min(out, width)))
    matrix = drawn(out, width, seed=data.draw(st.integers(0, 99)))
    left_out = torch.linalg.svdvals(matrix.double())[rank:]
    for split in SPLITS:
        B, A = principal(matrix, rank, split)
        assert (B.shape, A.shape) == ((out, rank), (rank, width))
        assert (B.dtype, A.dtype) == (torch.float32, torch.float32)
        error = torch.linalg.matrix_norm((matrix - B @ A).double())
        assert float(error) == pytest.approx(
            float(left_out.norm()), abs=2e-6 * (1 + float(matrix.norm()))
        )


@pytest.mark.parametrize("split", SPLITS)
def test_the_split_says_where_the_singular_values_go(split: Split) -> None:
    matrix = drawn(7, 5)
    values = torch.linalg.svdvals(matrix)[:3]
    B, A = principal(matrix, 3, split)
    left, right = {
        "sqrt": (values, values),
        "left": (values**2, torch.ones(3)),
        "right": (torch.ones(3), values**2),
    }[split]
    torch.testing.assert_close(B.T @ B, left.diag(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(A @ A.T, right.diag(), rtol=1e-5, atol=1e-5)


def test_principal_of_nothing_is_nothing_and_keeps_orthonormal_rows() -> None:
    """B = 0, and A can still be trained through."""
    for split in ("left", "sqrt"):
        B, A = principal(torch.zeros(6, 4), 2, split)
        assert not B.any()
        torch.testing.assert_close(A @ A.T, torch.eye(2))


@pytest.mark.parametrize("split", SPLITS)
def test_no_direction_of_a_matrix_of_lower_rank_loses_both_factors(split: Split) -> None:
    """Where b and a are both 0, neither has a gradient; FeDeRA's split of a dead layer would never train."""
    matrix = drawn(7, 1) @ drawn(1, 5, seed=1)
    B, A = principal(matrix, 3, split)
    torch.testing.assert_close(B @ A, matrix)
    assert (torch.maximum(B.norm(dim=0), A.norm(dim=1)) > 0.1).all()


def test_the_largest_components_of_every_matrix_and_none_of_what_diverged() -> None:
    """A client whose matrices are NaN must not cost those beside it their reply."""
    matrices = torch.stack([drawn(6, 4), drawn(6, 4, seed=1), drawn(6, 4, seed=2)])
    matrices[1, 2, 3] = math.nan
    B, A = largest(matrices, rank=2)
    assert (B.shape, A.shape) == ((3, 6, 2), (3, 2, 4))
    for k in (0, 2):
        due = principal(matrices[k], 2, "left")
        assert torch.equal(B[k], due[0])
        assert torch.equal(A[k], due[1])
    assert B[1].isnan().all()
    assert A[1].isnan().all()


def test_a_difference_is_scale_times_b_e_a_for_every_client() -> None:
    A, B, e = drawn(3, 2, 5, seed=1), drawn(3, 4, 2, seed=2), drawn(3, 2, seed=3)
    for weights, delta in ((e, LowRank(A, B, 0.5, e)), (torch.ones(3, 2), LowRank(A, B, 0.5))):
        expected = torch.stack([0.5 * B[k] @ weights[k].diag() @ A[k] for k in range(3)])
        torch.testing.assert_close(delta.dense(), expected)
        left, right = delta.factors()
        assert (left.shape, right.shape) == ((3, 4, 2), (3, 2, 5))
        torch.testing.assert_close(left @ right, expected)


def test_differences_are_found_by_module_and_need_no_gradient() -> None:
    tensors = {
        "m:A": drawn(1, 2, 5).requires_grad_(),
        "m:B": drawn(1, 4, 2),
        "n:A": drawn(1, 1, 5),
        "n:B": drawn(1, 4, 1),
    }
    tensors |= {"n:e": drawn(1, 1), "head.bias": drawn(1, 3), "o:values": drawn(1, 9)}
    found = deltas(tensors, 2.0)
    assert found.keys() == {"m", "n"}
    assert not found["m"].dense().requires_grad
    torch.testing.assert_close(
        found["n"].dense(), 2.0 * tensors["n:e"] * (tensors["n:B"] @ tensors["n:A"])
    )


def test_parts_are_grouped_by_module_and_plain_names_left_out() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert by_module({"a.b:A": one, "a.b:B": two, "a.b.c:A": two, "a.b.bias": one}) == {
        "a.b": {"A": one, "B": two},
        "a.b.c": {"A": two},
    }


def test_orthogonality_is_adaloras_penalty_summed_over_modules_and_clients() -> None:
    tensors = {
        "m:A": drawn(2, 3, 5),
        "m:B": drawn(2, 4, 3),
        "m:e": drawn(2, 3),
        "n:A": drawn(2, 1, 6),
        "n:B": drawn(2, 4, 1),
    }
    expected = 0.0
    for module in ("m", "n"):
        for k in range(2):
            A, B = tensors[f"{module}:A"][k].double(), tensors[f"{module}:B"][k].double()
            for gram in (A @ A.T, B.T @ B):
                expected += math.sqrt(float(((gram - torch.eye(len(gram))) ** 2).sum()))
    assert float(orthogonality(tensors)) == pytest.approx(expected, rel=1e-5)
    straight = {
        "m:A": torch.eye(2, 5).unsqueeze(0).requires_grad_(),
        "m:B": torch.eye(4, 2).unsqueeze(0),
    }
    penalty = orthogonality(straight)
    assert float(penalty.detach()) == 0.0
    assert torch.isfinite(torch.autograd.grad(penalty, straight["m:A"])[0]).all(), (
        "no gradient is infinite at the optimum"
    )


def test_loras_draw_is_kaiming_uniform_and_named() -> None:
    """With a = sqrt(5) the bound is sqrt(6 / ((1 + 5) width)) = 1 / sqrt(width)."""
    A = uniform(8, 400, 3, "m")
    assert A.shape == (8, 400)
    assert 0.95 / 20 < float(A.abs().max()) <= 1 / 20
    assert abs(float(A.mean())) < 0.002
    assert torch.equal(A, uniform(8, 400, 3, "m"))
    assert not torch.equal(A, uniform(8, 400, 4, "m"))
    assert not torch.equal(A, uniform(8, 400, 3, "n"))


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_that_a_layer_cannot_hold_is_refused_with_both_numbers(rank: int) -> None:
    check_ranks({"m": torch.zeros(4, 9)}, 4)
    with pytest.raises(
        BadInput, match=rf"method.rank = {rank}: layer 'm' is 4 x 9; choose a rank from 1 to 4"
    ):
        check_ranks({"m": torch.zeros(4, 9)}, rank)


def falling(size: tuple[int, int], fall: float) -> Tensor:
    """Return a random matrix whose singular values are 1, ``fall``, ``fall``^2 and so on."""
    left, _, right = torch.linalg.svd(drawn(*size).double(), full_matrices=False)
    values = fall ** torch.arange(min(size), dtype=torch.float64)
    matrix: Tensor = (left * values) @ right
    return matrix


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(
    "matrix",
    [falling((320, 400), 0.9), falling((400, 320), 0.7)],
    ids=["wide", "high"],
)
@pytest.mark.parametrize("split", ["sqrt", "left", "right"])
def test_of_a_large_matrix_the_leading_part_is_that_of_the_whole_svd(
    matrix: Tensor, rank: int, split: Split
) -> None:
    exact = principal(matrix, rank, split)
    assert leading(matrix.double(), rank) is not None
    ours = principal(matrix, rank, split, large=64)
    for factor, other in zip(ours, exact, strict=True):
        assert factor.shape == other.shape
        assert factor.dtype == other.dtype
    torch.testing.assert_close(ours[0] @ ours[1], exact[0] @ exact[1], atol=1e-4, rtol=1e-4)
    again = principal(matrix, rank, split, large=64)
    assert torch.equal(again[0], ours[0])


@pytest.mark.parametrize("present", [0, 3])
def test_beyond_the_rank_of_a_large_matrix_rows_have_norm_1_and_can_be_trained(
    present: int,
) -> None:
    """A difference of a large layer may be of low rank, or nothing at all."""
    matrix = drawn(160, present) @ drawn(present, 120)
    B, A = principal(matrix, 6, "left", large=64)
    torch.testing.assert_close(A @ A.T, torch.eye(6), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(B @ A, matrix, atol=1e-4, rtol=1e-4)
    assert bool((B.norm(dim=0)[present:] < 1e-4).all())


def test_a_small_matrix_has_the_whole_svd_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = principal(drawn(60, 40), 4, "sqrt")
    monkeypatch.setattr(svd, "leading", lambda *_: pytest.fail("too small for that"))
    for factor, other in zip(principal(drawn(60, 40), 4, "sqrt"), small, strict=True):
        assert torch.equal(factor, other)


def test_values_that_cannot_be_told_apart_take_the_whole_svd() -> None:
    """All of an orthonormal matrix are 1, as those of nothing are 0: any directions do."""
    found = leading(torch.eye(200, dtype=torch.float64), 4)
    assert found is None or torch.allclose(found[1], torch.ones(4, dtype=torch.float64))
    assert leading(falling((80, 80), 0.999), 16) is None  # a basis would have more than a quarter
