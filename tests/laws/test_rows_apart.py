"""Gradients of several rows in one pass are those of one row after another, for every method, whatever a row is made of."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpeft.errors import WireError
from fedpeft.mounting import describe, mounted, trainable
from fedpeft.tasks import Classification, Encoded, Example, Task
from fedpeft.tasks.qa import QuestionAnswering
from fedpeft.training import private
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.bucketing import Buckets
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Training, fit
from fedpeft.training.micro_batches import Share
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, RowNoise
from fedpeft.wrappers import DPSGD
from tests.contract.reference import LIKE, SINGLE
from tests.laws.test_stacks import Logits, Turned
from tests.tiny import (
    CPU,
    HEAD,
    NAMES,
    SEED,
    TASK,
    base_of,
    bert,
    deberta,
    encoded,
    examples,
    small,
)
from tests.tiny_tasks import TASK_CASES

ROWS = 6
STEP = Training(optimizer="sgd", lr=1.0, batch_size=4)


@pytest.fixture(autouse=True)
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sums be seen."""
    monkeypatch.setattr(private, "gaussian", lambda shape, _: torch.zeros(shape))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the examples in each pass that is to come."""
    sizes: list[int] = []
    for kind in (Classification, QuestionAnswering):

        def counting(
            self: Any, model: nn.Module, batch: Any, losses: Callable[..., Tensor] = kind.losses
        ) -> Tensor:
            sizes.append(len(batch["labels"]))
            return losses(self, model, batch)

        monkeypatch.setattr(kind, "losses", counting)
    return sizes


def shaken_down(method: Method, base: Base, clients: int) -> dict[str, Tensor]:
    """Return what each client is sent before the first round, (K, ...), moved away from its start by numbers of its own."""
    draw = torch.Generator().manual_seed(5)
    state = method.init(base, SEED)
    found: dict[str, list[Tensor]] = {}
    for client in range(clients):
        for name, tensor in method.send(state, Client(client, examples=ROWS)).items():
            moved = tensor
            if tensor.is_floating_point() and tensor.ndim:
                moved = tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
            found.setdefault(name, []).append(moved)
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return all numbers in one vector; those of what is None are 0."""
    parts = [
        torch.zeros(one.shape) if tensor is None else tensor
        for tensor, one in zip(tensors, like, strict=True)
    ]
    return torch.cat([part.flatten() for part in parts]).double()


def rows_of(
    method: Method, model: nn.Module, task: Task, down: Payload, client: int, held: Encoded
) -> list[Tensor]:
    """Return the gradient of each row's mean loss, flat: one row after another, mounted as one client, with nothing of the loop."""
    found = []
    of_client = {name: tensor[client : client + 1] for name, tensor in down.items()}
    with method.mount(model, of_client, {}, Context([client], 0, SEED)) as local:
        trained = list(local.trainable.values())
        for row in dict.fromkeys(example.row for example in held):
            of_row = held.of_rows([row])
            weights = torch.tensor([example.weight for example in of_row], dtype=torch.float32)
            losses = task.losses(model, task.collate(of_row, CPU.torch_device))
            loss = (losses * weights / weights.sum()).sum()
            found.append(flat(torch.autograd.grad(loss, trained, allow_unused=True), trained))
    return found


def compare(
    method: Method,
    model: nn.Module,
    task: Task,
    base: Base,
    held: Sequence[Encoded],
    passes: list[int],
    *,
    hardware: Hardware = CPU,
    cached: bool = False,
) -> list[int]:
    """Compare a step of the loop with a sum over rows that were computed one by one; return the examples of each pass.

    About half of the rows are longer than the bound.
    """
    clients = list(range(len(held)))
    down = shaken_down(method, base, len(held))
    gradients = [rows_of(method, model, task, down, client, held[client]) for client in clients]
    bound = float(torch.stack([row.norm() for rows in gradients for row in rows]).median())
    cache = ActivationCache(clients if cached else ())

    def forward(texts: Encoded) -> None:
        task.predict(model, task.collate(texts, CPU.torch_device))

    cache.trace(model, forward, held[0].take([0]))
    noisy = DPSGD(clip=bound).around(method, "0.dpsgd")
    context = Context(clients, 0, SEED, examples=[own.num_rows for own in held])
    passes.clear()
    with noisy.mount(model, down, {}, context) as local:
        begin = {name: tensor.detach().clone() for name, tensor in local.trainable.items()}
        shares = [
            Share(own, [list(range(len(own)))], cache.get(client, model, forward, own))
            for client, own in enumerate(held)
        ]
        assert cached == (shares[0].states is not None)
        of_loss = replace(local, after_backward=lambda _: None)  # without penalties
        passes.clear()
        fit(model, of_loss, task, shares, STEP, HEAD, hardware, cache)
        for client, rows in enumerate(gradients):
            due = torch.stack([row * min(1.0, bound / float(row.norm())) for row in rows]).sum(0)
            steps = [
                (begin[name] - tensor.detach())[client] / local.rate
                for name, tensor in local.trainable.items()
            ]
            step = torch.cat([one.flatten() for one in steps]).double()
            assert due.any()
            torch.testing.assert_close(step, due / STEP.batch_size, rtol=1e-4, atol=2e-6)
    return list(passes)


def in_windows(rows: int, seed: int) -> Encoded:
    """Return rows of one, two or three examples of unequal weights, not in the order of rows."""
    plain = examples(2 * rows, seed)
    found = [
        Example(
            one.ids, one.labels, [0, 1, 2, 2, 3, 4, 4, 5, 0, 4, 1, 5][index], weight=1 + index % 3
        )
        for index, one in enumerate(plain)
    ]
    return Encoded(found)


def table() -> list[Any]:
    """Return every method with one client and, where it can carry them, two."""
    found: list[Any] = []
    for name in NAMES:
        marks = pytest.mark.slow if name in LIKE else ()
        for clients in (1,) if (name, 0) in SINGLE else (1, 2):
            found.append(pytest.param(name, clients, marks=marks))
    return found


@pytest.mark.parametrize(("name", "clients"), table())
def test_rows_of_one_pass_count_as_rows_one_by_one(
    name: str, clients: int, passes: list[int]
) -> None:
    """One pass a client for methods whose tensors can be stacked, one a row for others."""
    model = bert()
    held = [examples(ROWS, SEED + client) for client in range(clients)]
    found = compare(small(name), model, TASK, base_of(model), held, passes)
    alone = (name, 0) in SINGLE
    assert found == ([1] * ROWS if alone else [ROWS] * clients)


CORE = {
    "lora": {"targets": r"layer\.1\..*(query|value)"},
    "fedara": {"targets": r"layer\.1\..*(query|value)"},
    "ffa_lora": {"targets": r"layer\.1\..*(query|value)"},
    "adapters": {"targets": r"layer\.1\.output\.dense"},
}
"""Methods on the upper block, so that there are hidden states below it to be kept."""


@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
@pytest.mark.parametrize("name", CORE)
def test_windows_of_a_row_are_bounded_together(name: str, cached: bool, passes: list[int]) -> None:
    model = bert()
    held = [in_windows(ROWS, 1), in_windows(ROWS, 2)]
    method = small(name, **CORE[name])
    found = compare(method, model, TASK, base_of(model), held, passes, cached=cached)
    # Of each client one row of one example, four of two, and one of three.
    assert sum(found) == 2 * len(held[0])
    assert 2 * 3 <= len(found) < 2 * ROWS


@pytest.mark.parametrize("name", CORE)
def test_questions_with_windows_count_once(name: str, passes: list[int]) -> None:
    case = TASK_CASES["qa"]
    ground = case.ground()
    held = [ground.task.encode(ground.rows(8, seed)) for seed in (1, 2)]
    assert all(len(own) > own.num_rows for own in held)
    found = compare(small(name, **CORE[name]), ground.model, ground.task, ground.base, held, passes)
    assert len(found) < sum(own.num_rows for own in held) == 16


@pytest.mark.parametrize("name", CORE)
def test_no_pass_has_more_than_its_tokens(name: str, passes: list[int]) -> None:
    """Texts of 3 to 10 tokens, padded: at most 24 in a pass."""
    model = bert()
    hardware = replace(CPU, tokens=24, threads=2, pad_to_multiple_of=2)
    held = [examples(9, client) for client in (1, 2)]
    found = compare(small(name), model, TASK, base_of(model), held, passes, hardware=hardware)
    assert max(found) > 1
    assert max(found) <= 24 // 4


def test_gradients_of_a_pass_have_no_more_numbers_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    model, method = bert(), small("lora")
    numbers = sum(tensor.numel() for tensor in method.init(base_of(model), SEED).shared.values())
    monkeypatch.setattr(private, "NUMBERS", 3 * numbers - 1)
    found = compare(method, model, TASK, base_of(model), [examples(ROWS)], passes)
    assert found == [2, 2, 2]


def test_a_model_that_sends_other_rows_through_a_layer_trains_row_by_row(
    passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeBERTa's relative positions: found out in the first pass, and the step is made anew."""
    model = deberta()
    base = describe(model, HEAD)
    noisy: list[slice] = []
    add_noise = private.add_noise

    def counting(trained: Any, active: slice, *others: Any) -> None:
        noisy.append(active)
        add_noise(trained, active, *others)

    monkeypatch.setattr(private, "add_noise", counting)
    found = compare(
        small("lora", targets="query_proj"), model, TASK, base, [examples(ROWS)], passes
    )
    assert found == [ROWS, *[1] * ROWS]
    assert noisy == [slice(0, 1)], "once a step"


def test_the_pass_that_failed_is_gone_when_its_step_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Turned().requires_grad_(False)
    held = encoded([torch.arange(1, 4) + row for row in range(5)], [0, 1, 2, 0, 1])
    of_passes: list[weakref.ref[Any]] = []
    alive: list[int] = []
    copied = private.copied

    def noting(trained: Any, client: int, rows: int) -> Any:
        copies = copied(trained, client, rows)
        of_passes.append(weakref.ref(copies))
        return copies

    def looking(*args: Any) -> None:
        alive.append(sum(copies() is not None for copies in of_passes))

    monkeypatch.setattr(private, "copied", noting)
    monkeypatch.setattr(private, "add_bounded", looking)
    noisy = DPSGD().around(small("lora", targets="dense", rank=2), "0.dpsgd")
    down = shaken_down(noisy, describe(model, []), 1)
    with noisy.mount(model, down, {}, Context([0], 0, SEED, examples=[5])) as local:
        shares = [Share(held, [list(range(5))])]
        fit(model, local, TASK, shares, STEP, frozenset(), CPU, ActivationCache())
    assert len(of_passes) == 1
    assert alive == [0] * 5


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7])
def test_a_model_that_turns_rows_and_length_round_is_found_out(
    length: int, passes: list[int]
) -> None:
    """Also where there are as many rows as tokens, which looks the same."""
    model = Turned().requires_grad_(False)
    held = encoded([torch.arange(1, length + 1) + row for row in range(5)], [0, 1, 2, 0, 1])
    base = describe(model, [])
    found = compare(small("lora", targets="dense", rank=2), model, TASK, base, [held], passes)
    assert found[-5:] == [1] * 5


class TurnedAndPadded(Turned):
    """It also pads texts itself, to six tokens: as many as there are rows."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Logits:
        padded = nn.functional.pad(input_ids, (0, ROWS - input_ids.shape[1]))
        return super().forward(padded, attention_mask)


def test_a_model_that_pads_to_as_many_tokens_as_rows_and_turns_them_round_is_found_out(
    passes: list[int],
) -> None:
    """Longformer pads to its window."""
    model = TurnedAndPadded().requires_grad_(False)
    held = encoded([torch.arange(1, 4) + row for row in range(ROWS)], [0, 1, 2, 0, 1, 2])
    base = describe(model, [])
    found = compare(small("lora", targets="dense", rank=2), model, TASK, base, [held], passes)
    assert found == [ROWS, *[1] * ROWS]


def test_a_tensor_that_is_used_without_its_copies_makes_rows_go_one_by_one(
    passes: list[int],
) -> None:
    """As where somebody mounts something by hooks of his own; the sum is right all the same."""
    model, held = bert(), examples(ROWS)
    down = shaken_down(small("lora"), base_of(model), 1)
    due = torch.stack(rows_of(small("lora"), model, TASK, down, 0, held)).sum(0)
    trained = trainable(down)
    local = LocalTask(trained, lambda: ({}, {}), rows=RowNoise(1e6, 1.0), copies=True)
    passes.clear()
    with mounted(model, trained, 2.0):  # the head stands in for the model's own
        fit(
            model,
            local,
            TASK,
            [Share(held, [list(range(ROWS))])],
            STEP,
            HEAD,
            CPU,
            ActivationCache(),
        )
    assert passes == [ROWS, *[1] * ROWS]
    step = torch.cat([(down[name] - trained[name].detach()).flatten() for name in trained])
    torch.testing.assert_close(step.double(), due / STEP.batch_size, rtol=1e-4, atol=2e-6)


def test_a_row_that_diverges_takes_nobody_along() -> None:
    """What is no number in one row's gradient is nothing in the sum, and the others count."""
    weight = nn.Parameter(torch.ones(2, 3))
    gradients = torch.tensor([[3.0, 0, 4], [torch.nan, 0, 0], [0, 0.5, 0], [torch.inf, 1, 1]])
    private.begin({"w": weight})
    private.add_bounded({"w": weight}, [gradients], client=1, bound=1.0)
    due = torch.tensor([[0, 0, 0], [0.6, 0.5, 0.8]])
    torch.testing.assert_close(weight.grad, due, rtol=0, atol=2e-6)


def test_a_number_that_is_trained_is_bounded_with_the_rest() -> None:
    number, vector = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    trained = {"n": number, "v": vector}
    private.begin(trained)
    gradients = [torch.tensor([3.0, 0.3]), torch.tensor([[0.0, 4.0], [0.0, 0.4]])]
    private.add_bounded(trained, gradients, client=1, bound=1.0)
    torch.testing.assert_close(number.grad, torch.tensor([0, 0.9]), rtol=0, atol=2e-6)
    torch.testing.assert_close(vector.grad, torch.tensor([[0, 0], [0, 1.2]]), rtol=0, atol=2e-6)


def test_what_is_trained_in_few_digits_is_refused() -> None:
    """Rounded to bf16 a row's gradient could exceed its bound, and noise would be rounded away."""
    method = DPSGD().around(small("lora"), "0.dpsgd")
    model = bert().bfloat16()
    state = small("lora").init(base_of(bert()), SEED)
    down = {name: tensor.bfloat16().unsqueeze(0) for name, tensor in state.shared.items()}
    context = Context(round=0, seed=SEED, clients=(0,), examples=(4,))
    with (
        pytest.raises(WireError, match="is torch.bfloat16; dpsgd trains in float32"),
        method.mount(model, down, {}, context),
    ):
        pass


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=40),
    st.sampled_from([1, 4]),
    st.integers(1, 8),
)
def test_rows_are_dealt_whole_and_once(
    texts: list[tuple[int, int]], pad: int, most_rows: int
) -> None:
    held = Encoded([Example(torch.ones(length), torch.tensor(0), row) for length, row in texts])
    buckets = Buckets(64, 5, pad)
    found: list[int] = []
    for together in private.alike(held, range(len(held)), buckets, most_rows):
        assert 1 <= len(together) <= most_rows
        counts = {len(of_row) for of_row in together}
        assert len(counts) == 1
        taken = [index for of_row in together for index in of_row]
        found += taken
        longest = max(held.lengths[index] for index in taken)
        if len(together) > 1:
            assert len(taken) * buckets.padded(longest) <= buckets.max_tokens
            assert not longest <= len(taken) <= buckets.padded(longest)
        for of_row in together:
            row = held[of_row[0]].row
            assert of_row == [index for index in range(len(held)) if held[index].row == row]
    assert sorted(found) == list(range(len(held)))
