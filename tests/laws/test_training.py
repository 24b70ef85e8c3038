"""The local loop: torch's optimizers for every client by itself, clipping by itself, batches of its own, streams of its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpeft.mounting import mounted, replaced
from fedpeft.seeds import derive
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.bucketing import Buckets
from fedpeft.training.loop import Training, fit, own_randomness, plan
from fedpeft.training.micro_batches import Share, micro_batches
from fedpeft.training.optimizer import Optimizer, clip
from fedpeft.types import LocalTask, Payload
from fedpeft.wire.messages import Kind, Request, Response
from tests.tiny import (
    CONFIG,
    CPU,
    HEAD,
    SEED,
    TASK,
    assert_same,
    base_of,
    bert,
    encoded,
    examples,
    small,
    worker,
)

K = 3
STOPS = (4, 3, 1)
"""Steps that each of the K clients takes."""
SIZES_OF = {"matrix": (2, 3), "vector": (4,), "scalar": ()}


def start() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(K, *size, generator=draw) for name, size in SIZES_OF.items()}


def gradient(name: str, step: int) -> Tensor:
    return torch.randn(
        K, *SIZES_OF[name], generator=torch.Generator().manual_seed(100 * step + len(name))
    )


OPTIMIZERS: Mapping[str, tuple[Any, dict[str, float], dict[str, float]]] = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}, {"weight_decay": 0.1, "momentum": 0.9}),
    "sgd": (
        torch.optim.SGD,
        {"weight_decay": 0.1, "momentum": 0.9},
        {"weight_decay": 0.1, "momentum": 0.9},
    ),
    "plain sgd": (torch.optim.SGD, {}, {"weight_decay": 0.0, "momentum": 0.0}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_stacked_steps_are_torchs_steps_for_each_client(kind: str) -> None:
    """With a rate per tensor, warm-up, decay and momentum; and who has stopped does not move at all."""
    constructor, theirs, ours = OPTIMIZERS[kind]
    rates = {"matrix": 0.1, "vector": 0.01, "scalar": 0.1}
    stacked = {name: nn.Parameter(value.clone()) for name, value in start().items()}
    alone = [
        {name: nn.Parameter(value[k].clone()) for name, value in start().items()} for k in range(K)
    ]
    optimizer = Optimizer(
        "adamw" if kind == "adamw" else "sgd",
        stacked,
        rates,
        weight_decay=ours["weight_decay"],
        momentum=ours["momentum"],
        warmup=2,
    )
    reference = [
        constructor([{"params": [p], "lr": rates[name]} for name, p in own.items()], **theirs)
        for own in alone
    ]
    for step in range(max(STOPS)):
        active = slice(0, sum(step < stop for stop in STOPS))
        lr_factor = min(1.0, (step + 1) / 3)
        for name, parameter in stacked.items():
            parameter.grad = gradient(name, step)
        before = {name: parameter.detach().clone() for name, parameter in stacked.items()}
        optimizer.step(active)
        for k in range(K)[active]:
            for group, (name, parameter) in zip(
                reference[k].param_groups, alone[k].items(), strict=True
            ):
                group["lr"] = rates[name] * lr_factor
                parameter.grad = gradient(name, step)[k].clone()
            reference[k].step()
        for name, parameter in stacked.items():
            assert torch.equal(parameter[active.stop :], before[name][active.stop :])
            for k in range(K):
                torch.testing.assert_close(
                    parameter[k], alone[k][name], rtol=1e-6, atol=1e-7, msg=f"{name} of {k}"
                )


AGAIN = (3, 2, 2)
"""Steps that each of the clients takes in a second round."""


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_that_go_on_from_a_state_are_torchs_steps_for_each_client(kind: str) -> None:
    """With 4, 3 and 1 steps behind them, in another order, and a warm-up of 5 steps that lasts into the second round."""
    constructor, theirs, ours = OPTIMIZERS[kind]
    alone = [
        {name: nn.Parameter(value[k].clone()) for name, value in start().items()} for k in range(K)
    ]
    reference = [constructor(own.values(), lr=0.1, **theirs) for own in alone]
    stacked = {name: nn.Parameter(value.clone()) for name, value in start().items()}
    kept: dict[str, Tensor] | None = None
    taken = [0] * K
    for stops, order in ((STOPS, [0, 1, 2]), (AGAIN, [2, 0, 1])):
        rows = {name: parameter.detach()[order] for name, parameter in stacked.items()}
        mine = {name: nn.Parameter(row.clone()) for name, row in rows.items()}
        optimizer = Optimizer(
            "adamw" if kind == "adamw" else "sgd",
            mine,
            dict.fromkeys(mine, 0.1),
            weight_decay=ours["weight_decay"],
            momentum=ours["momentum"],
            warmup=5,
            kept=kept and {name: tensor[order] for name, tensor in kept.items()},
        )
        for step in range(max(stops)):
            active = slice(0, sum(step < stop for stop in stops))
            for name, parameter in mine.items():
                parameter.grad = gradient(name, step)
            optimizer.step(active)
            for row, k in enumerate(order[active]):
                taken[k] += 1
                for group in reference[k].param_groups:
                    group["lr"] = 0.1 * min(1.0, taken[k] / 6)
                for name, parameter in alone[k].items():
                    parameter.grad = gradient(name, step)[row].clone()
                reference[k].step()
        back = [order.index(k) for k in range(K)]
        kept = {name: tensor[back] for name, tensor in optimizer.state().items()}
        stacked = {name: nn.Parameter(parameter.detach()[back]) for name, parameter in mine.items()}
        for name, parameter in stacked.items():
            for k in range(K):
                torch.testing.assert_close(
                    parameter[k], alone[k][name], rtol=1e-6, atol=1e-7, msg=f"{name} of {k}"
                )
    assert kept is not None
    assert kept["@steps"].tolist() == taken == [6, 5, 4]


def test_a_tensor_of_another_shape_starts_anew_and_the_others_go_on() -> None:
    def optimizer(parameters: Mapping[str, nn.Parameter], kept: Payload | None = None) -> Optimizer:
        rates = dict.fromkeys(parameters, 0.1)
        return Optimizer("adamw", parameters, rates, weight_decay=0.0, momentum=0.0, kept=kept)

    def step(
        kept: Payload | None, names: Sequence[str]
    ) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        parameters = {name: nn.Parameter(start()[name]) for name in names}
        for name, parameter in parameters.items():
            parameter.grad = gradient(name, 0)
        moving = optimizer(parameters, kept)
        moving.step(slice(0, K))
        return parameters, moving.state()

    fresh, kept = step(None, ["matrix", "vector"])
    torn = {**kept, "@moment1/matrix": kept["@moment1/matrix"][:, :1]}
    again, after = step(torn, ["matrix", "vector", "scalar"])
    whole, _ = step(kept, ["matrix", "vector"])
    assert torch.equal(again["matrix"], fresh["matrix"])
    assert torch.equal(again["vector"], whole["vector"])
    assert not torch.equal(again["vector"], fresh["vector"])
    assert [after[f"@moves/{name}"].tolist() for name in ("matrix", "vector", "scalar")] == [
        [1] * K,
        [2] * K,
        [1] * K,
    ]
    assert after["@steps"].tolist() == [2] * K


def test_nothing_is_clipped_where_nothing_has_a_gradient() -> None:
    clip({name: nn.Parameter(value) for name, value in start().items()}, slice(0, K), 1.0)


def test_a_tensor_without_gradient_is_left_alone_as_torch_does() -> None:
    stacked = {name: nn.Parameter(value) for name, value in start().items()}
    stacked["matrix"].grad = gradient("matrix", 0)
    Optimizer("adamw", stacked, dict.fromkeys(stacked, 0.1), weight_decay=0.5, momentum=0.0).step(
        slice(0, K)
    )
    assert not torch.equal(stacked["matrix"], start()["matrix"])
    assert torch.equal(stacked["vector"], start()["vector"])


@pytest.mark.parametrize("limit", [0.5, 3.0, 1e6])
def test_gradients_are_clipped_by_each_clients_own_norm(limit: float) -> None:
    """As torch's clip_grad_norm_ does for one model; a client that has stopped is not touched."""
    stacked = {name: nn.Parameter(value) for name, value in start().items()}
    factor = torch.tensor([1.0, 10.0, 1.0])
    for name, parameter in stacked.items():
        parameter.grad = gradient(name, 0) * factor.view(K, *[1] * (parameter.ndim - 1))
    whole = {
        name: parameter.grad.clone()
        for name, parameter in stacked.items()
        if parameter.grad is not None
    }
    clip(stacked, slice(0, 2), limit)
    for k in range(K):
        alone = [nn.Parameter(value[k]) for value in start().values()]
        for name, parameter in zip(stacked, alone, strict=True):
            parameter.grad = whole[name][k].clone()
        if k < 2:
            torch.nn.utils.clip_grad_norm_(alone, limit)
        for name, parameter in zip(stacked, alone, strict=True):
            grad = stacked[name].grad
            assert grad is not None
            torch.testing.assert_close(grad[k], parameter.grad, msg=f"{name} of {k}")


@settings(deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_a_plan_goes_over_all_rows_in_every_epoch(
    count: int, size: int, epochs: int, steps: int | None
) -> None:
    training = Training(batch_size=size, epochs=epochs, steps=steps)
    rows = plan(count, training, SEED, 3, 5)
    length = -(-count // size)
    assert len(rows) == (epochs * length if steps is None else steps)
    for begin in range(0, len(rows), length):
        epoch = rows[begin : begin + length]
        flat = [row for batch in epoch for row in batch]
        assert len(set(flat)) == len(flat), "no row twice in an epoch"
        assert all(len(batch) == size for batch in epoch[: count // size])
        if len(epoch) == length:
            assert sorted(flat) == list(range(count))


def test_an_order_of_rows_is_a_clients_own_in_every_round_and_epoch() -> None:
    training = Training(batch_size=100, epochs=2)
    plans = [
        plan(50, training, seed, client, number)
        for seed, client, number in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))
    ]
    orders = {tuple(batch) for rows in plans for batch in rows}
    assert len(orders) == 8
    assert plan(50, training, 1, 0, 0) == plans[0]


@given(
    batches=st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=9), min_size=1, max_size=5),
    buckets=st.builds(
        Buckets,
        max_tokens=st.integers(1, 100),
        overhead_tokens=st.integers(0, 100),
        pad_to_multiple_of=st.sampled_from((1, 4)),
    ),
    lanes=st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_parts_deal_out_every_row_once_by_length_with_a_clients_rows_together(
    batches: list[list[int]], buckets: Buckets, lanes: int
) -> None:
    own = [examples(12, seed=k) for k in range(len(batches))]
    found = list(
        micro_batches(
            [(Share(mine, []), batch) for mine, batch in zip(own, batches, strict=True)],
            buckets,
            lanes,
        )
    )
    dealt = [
        (k, example.ids.tolist(), int(example.labels))
        for part in found
        for k, example in zip(part.clients.tolist(), part.examples, strict=True)
    ]
    due = [
        (k, own[k][row].ids.tolist(), int(own[k][row].labels))
        for k, batch in enumerate(batches)
        for row in batch
    ]
    assert sorted(dealt) == sorted(due)
    lengths = [part.examples.lengths for part in found]
    assert all(
        len(part) * buckets.padded(max(part)) <= buckets.max_tokens or len(part) == 1
        for part in lengths
    )
    assert all(
        max(a) <= min(b)
        for a, b in pairwise(sorted(lengths, key=lambda part: (min(part), max(part))))
    )
    for part in found:
        assert part.clients.tolist() == sorted(part.clients.tolist())
        each = torch.tensor([1 / len(batches[k]) for k in part.clients.tolist()])
        torch.testing.assert_close(part.weights, each)
        if isinstance(part.owners, slice):
            repeated = len(part.clients) // (part.owners.stop - part.owners.start)
            assert part.clients.tolist() == [
                k for k in range(part.owners.start, part.owners.stop) for _ in range(repeated)
            ]
        else:
            assert torch.equal(part.owners, part.clients)


@pytest.mark.parametrize(("pad_to_multiple_of", "length"), [(1, 5), (4, 8), (5, 5), (64, 16)])
def test_a_batch_is_padded_to_a_grain_and_no_further_than_texts_may_be_long(
    pad_to_multiple_of: int, length: int
) -> None:
    ids = [torch.arange(1, 4), torch.arange(1, 6)]
    batch = TASK.collate(encoded(ids, [0, 1]), CPU.torch_device, pad_to_multiple_of)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, length)
    for row, mask, own in zip(batch["input_ids"], batch["attention_mask"], ids, strict=True):
        assert row.tolist() == own.tolist() + [TASK.tokenizer.pad_token_id] * (length - len(own))
        assert mask.tolist() == [1] * len(own) + [0] * (length - len(own))


def test_the_loss_is_the_mean_over_a_clients_steps_of_the_mean_over_rows() -> None:
    """At a rate too small to move anything it is worked out from the untrained model."""
    model, own = (
        bert(),
        {
            "classifier.weight": nn.Parameter(
                bert().get_parameter("classifier.weight").unsqueeze(0).clone()
            )
        },
    )
    share = Share(examples(7), [[0, 1, 2], [3], [4, 5, 6]])
    local = LocalTask(own, lambda: ({}, {}))
    with mounted(model, own):
        found = fit(model, local, TASK, [share], Training(lr=1e-12), HEAD, CPU, ActivationCache())
    losses = []
    with torch.no_grad():
        for rows in share.steps:
            batch = TASK.collate(share.examples.take(rows), CPU.torch_device)
            losses.append(
                float(nn.functional.cross_entropy(TASK.logits(model, batch), batch["labels"]))
            )
    assert found.tolist() == pytest.approx([sum(losses) / 3], rel=1e-5)


TURNS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda tensor: tensor,
    lambda tensor: tensor.t().contiguous(),
)


def _turned(turn: Callable[[Tensor], Tensor], own: Tensor, parameter: Tensor) -> Tensor:
    del parameter
    return turn(own.squeeze(0))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_tensor_that_is_used_transposed_moves_as_one_that_is_not(
    optimizer: Literal["adamw", "sgd"],
) -> None:
    """Its gradient comes transposed, and torch's fused optimizers read gradients as if they were contiguous."""
    weight, share = (
        bert().get_parameter("classifier.weight").detach(),
        Share(examples(6), [[0, 1, 2], [3, 4, 5]]),
    )
    ended = []
    for turn in TURNS:
        own, model = nn.Parameter(turn(weight).clone().unsqueeze(0)), bert()
        with replaced(model, {"classifier.weight": partial(_turned, turn, own)}):
            local = LocalTask({"own": own}, lambda: ({}, {}))
            fit(
                model,
                local,
                TASK,
                [share],
                Training(optimizer, lr=0.1),
                HEAD,
                CPU,
                ActivationCache(),
            )
        ended.append(turn(own.detach().squeeze(0)))
    assert (ended[0] - weight).abs().max() > 0.05
    torch.testing.assert_close(ended[0], ended[1])


def moved(training: Training, name: str = "lora", rate: float = 1.0) -> dict[str, float]:
    """Return how far one SGD step moves head and adapter."""
    method = small(name)
    model = bert()
    down = {
        part: tensor.unsqueeze(0)
        for part, tensor in method.init(base_of(model), SEED).shared.items()
    }
    trained = {part: nn.Parameter(tensor.clone()) for part, tensor in down.items()}
    with mounted(model, trained, 2.0):
        fit(
            model,
            LocalTask(trained, lambda: ({}, {}), rate=rate),
            TASK,
            [Share(examples(4), [[0, 1, 2, 3]])],
            training,
            HEAD,
            CPU,
            ActivationCache(),
        )
    far = {part: float((trained[part] - down[part]).detach().norm()) for part in trained}
    return {
        "head": far["classifier.weight"],
        "adapter": sum(far[part] for part in far if ":" in part),
    }


def test_rates_of_head_stage_and_warm_up_multiply() -> None:
    """A step of plain SGD is as long as its rate; the first of w + 1 warm-up steps has 1 / (w + 1) of it."""
    plain = Training(optimizer="sgd", lr=0.01, clip=None, batch_size=4)
    base = moved(plain)
    for training, rate, head, adapter in (
        (replace(plain, lr=0.02), 1.0, 2.0, 2.0),
        (replace(plain, head_lr=0.05), 1.0, 5.0, 1.0),
        (plain, 3.0, 3.0, 3.0),
        (replace(plain, warmup=1), 1.0, 0.5, 0.5),
        (replace(plain, head_lr=0.05, warmup=4), 2.0, 2.0, 0.4),
    ):
        found = moved(training, rate=rate)
        assert found["head"] == pytest.approx(head * base["head"], rel=1e-3)
        assert found["adapter"] == pytest.approx(adapter * base["adapter"], rel=1e-3)


def test_the_hook_after_backward_sees_gradients_before_they_are_clipped_and_who_is_active() -> None:
    seen: list[tuple[slice, float]] = []
    weight = bert().get_parameter("classifier.weight")
    own = {"classifier.weight": nn.Parameter(torch.stack([weight, weight]))}

    def look(active: slice) -> None:
        grad = own["classifier.weight"].grad
        assert grad is not None
        seen.append((active, float(grad[active].norm())))
        grad.zero_()

    model = bert()
    shares = [Share(examples(4), [[0, 1], [2, 3]]), Share(examples(4, seed=1), [[0, 1]])]
    with mounted(model, own):
        local = LocalTask(own, lambda: ({}, {}), after_backward=look)
        fit(
            model,
            local,
            TASK,
            shares,
            Training(optimizer="sgd", lr=0.1, clip=1e-6),
            HEAD,
            CPU,
            ActivationCache(),
        )
    assert [active for active, _ in seen] == [slice(0, 2), slice(0, 1)]
    assert all(norm > 1e-3 for _, norm in seen)
    assert torch.equal(own["classifier.weight"].detach(), torch.stack([weight, weight])), (
        "what the hook did is what is stepped"
    )


def test_dropout_has_a_stream_of_its_own_and_torchs_goes_on_untouched() -> None:
    """A client's dropout depends on seed, client and round, not on who trained before."""
    torch.manual_seed(11)
    undisturbed = torch.rand(3)
    torch.manual_seed(11)
    with own_randomness(SEED, 2, 5):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), undisturbed)
    assert torch.equal(
        first, torch.rand(3, generator=torch.Generator().manual_seed(derive(SEED, "client", 2, 5)))
    )

    def answer(disturb: int, client: int = 1) -> Payload:
        method = small("lora")
        playing = worker(method, bert(hidden_dropout_prob=0.3))
        torch.rand(disturb)
        blob = Request(
            Kind.TRAIN, 0, CONFIG, method.init(base_of(playing.model), SEED).shared
        ).encode()
        return Response.decode(playing.handle([client], [blob], [b""])[0][0]).payload

    assert_same(answer(0), answer(5))


class Seen(Exception):
    """Ends a worker's work; no fault of a message raises it."""


@dataclass(frozen=True)
class Spy:
    """A method that notes in which order it is given the names of a message."""

    paper: ClassVar[str] = "none"

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Any
    ) -> AbstractContextManager[LocalTask]:
        raise Seen(list(down))


def test_a_method_sees_the_names_of_a_message_in_order() -> None:
    """Then the sums over them are the same in every process; a set's order is not."""
    playing = worker(small("bitfit"), bert())
    shared = small("bitfit").init(base_of(playing.model), SEED).shared
    blob = Request(Kind.TRAIN, 0, CONFIG, shared).encode()
    spying: Any = replace(playing, method=Spy())  # type: ignore[arg-type]
    with pytest.raises(Seen) as seen:
        spying.handle([1, 2], [blob, blob], [b"", b""])
    assert seen.value.args[0] == sorted(shared)
    assert len(shared) == 20
