"""Our federation equals FedAvg as anyone would write it down: a loop over clients with torch.optim, then a weighted mean."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from fedpeft.methods.full import Full
from fedpeft.methods.lora import LoRA
from fedpeft.seeds import generator
from fedpeft.tasks import Encoded
from fedpeft.training.loop import Training
from fedpeft.types import Method
from tests.tiny import SEED, SOFTMAX_BLIND, TARGETS, base_of, bert, federation

SIZES = {0: 5, 1: 11, 2: 8}
ROUNDS = 2
SCALE = 2.0


class WithLoRA(nn.Module):
    """A dense layer with LoRA as in its paper: W x + s B A x, A and B trained."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.A, self.B = nn.Parameter(torch.zeros(3, 32)), nn.Parameter(torch.zeros(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x)) + SCALE * functional.linear(
            functional.linear(x, self.A), self.B
        )


def with_lora(model: nn.Module) -> dict[str, nn.Parameter]:
    """Put LoRA on queries and values; return what is trained under the names that we send."""
    trained: dict[str, nn.Parameter] = {}
    for layer in (0, 1):
        for part in ("query", "value"):
            home = model.get_submodule(f"bert.encoder.layer.{layer}.attention.self")
            adapted = WithLoRA(home.get_submodule(part))
            setattr(home, part, adapted)
            name = f"bert.encoder.layer.{layer}.attention.self.{part}"
            trained |= {f"{name}:A": adapted.A, f"{name}:B": adapted.B}
    return trained | {
        name: model.get_parameter(name) for name in ("classifier.weight", "classifier.bias")
    }


def in_full(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


@dataclass(frozen=True)
class Case:
    """One way of training, in our words and in torch's.

    ``noisy``: share of a tensor's entries that may differ by more than 1e-6. AdamW divides a gradient by its own size, so
    one that is nearly nothing but rounding still makes a part of a step, of which 2 % are let through.
    """

    training: Training
    optimizer: Callable[..., torch.optim.Optimizer]
    arguments: Mapping[str, Any]
    noisy: float = 0.0


PLAIN = Training(batch_size=4, clip=None)
CASES = {
    "AdamW": Case(
        replace(PLAIN, lr=2e-3, weight_decay=0.1),
        torch.optim.AdamW,
        {"lr": 2e-3, "weight_decay": 0.1},
        0.002,
    ),
    "AdamW, clipped, warmed up": Case(
        replace(PLAIN, lr=2e-3, clip=0.5, warmup=2, epochs=2),
        torch.optim.AdamW,
        {"lr": 2e-3, "weight_decay": 0.0},
        0.002,
    ),
    "SGD": Case(replace(PLAIN, optimizer="sgd", lr=0.1), torch.optim.SGD, {"lr": 0.1}),
    "SGD, all of it": Case(
        replace(
            PLAIN,
            optimizer="sgd",
            lr=0.1,
            momentum=0.9,
            weight_decay=0.01,
            clip=0.5,
            warmup=1,
            steps=5,
        ),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    ),
}


def batches(count: int, training: Training, client: int, number: int) -> list[list[int]]:
    """Return the rows of each step: epochs in a random order each, from the named seeds, cut into batches."""
    found: list[list[int]] = []
    epoch = 0
    while epoch < training.epochs if training.steps is None else len(found) < training.steps:
        order = torch.randperm(
            count, generator=generator(SEED, "order", client, number, epoch)
        ).tolist()
        found += [
            order[begin : begin + training.batch_size]
            for begin in range(0, count, training.batch_size)
        ]
        epoch += 1
    return found[: training.steps]


def local_training(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    examples: Encoded,
    rows: list[list[int]],
    case: Case,
) -> None:
    """Train one client's model with torch's own optimizer, schedule and clipping."""
    optimizer = case.optimizer(list(trained.values()), **case.arguments)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (case.training.warmup + 1)))
    call: Any = model.train()
    for batch in rows:
        longest = max(examples.lengths[row] for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        for place, row in enumerate(batch):
            ids[place, : examples.lengths[row]] = examples[row].ids
            mask[place, : examples.lengths[row]] = 1
        loss = functional.cross_entropy(
            call(input_ids=ids, attention_mask=mask).logits,
            torch.stack([examples[row].labels for row in batch]),
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if case.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), case.training.clip)
        optimizer.step()
        schedule.step()


def fedavg(
    start: Mapping[str, Tensor],
    prepare: Callable[[nn.Module], dict[str, nn.Parameter]],
    client_data: Mapping[int, Encoded],
    case: Case,
) -> dict[str, Tensor]:
    """Return the parameters after two rounds of federated averaging, algorithm 1 of McMahan et al. 2017."""
    shared = dict(start)
    for number in range(ROUNDS):
        results = []
        for client, examples in client_data.items():
            model = bert()
            trained = prepare(model)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(shared[name]).requires_grad_()
            local_training(
                model,
                trained,
                examples,
                batches(len(examples), case.training, client, number),
                case,
            )
            results.append(
                {name: parameter.detach().clone() for name, parameter in trained.items()}
            )
        total = sum(len(examples) for examples in client_data.values())
        shared = {
            name: torch.stack(
                [
                    len(e) / total * r[name]
                    for e, r in zip(client_data.values(), results, strict=True)
                ]
            ).sum(0)
            for name in shared
        }
    return shared


METHODS: Mapping[str, tuple[Method, Callable[[nn.Module], dict[str, nn.Parameter]]]] = {
    "full": (Full(), in_full),
    "lora": (LoRA(TARGETS, 3, SCALE), with_lora),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_the_federation_equals_fedavg_written_out(name: str, kind: str) -> None:
    (method, prepare), case = METHODS[name], CASES[kind]
    playing = federation(method, training=case.training, sizes=SIZES)
    start = deepcopy(method.init(base_of(bert()), SEED).shared)
    ours = playing.play(ROUNDS).shared
    theirs = fedavg(
        start,
        prepare,
        {client: held.train for client, held in playing.worker.client_data.items()},
        case,
    )
    assert ours.keys() == theirs.keys()
    for part, tensor in theirs.items():
        if case.training.optimizer == "adamw" and part.endswith(SOFTMAX_BLIND):
            continue  # and of one that is rounding alone it makes whole steps
        off = (ours[part] - tensor).abs()
        assert float((off > 1e-6).float().mean()) <= case.noisy, part
        assert float(off.max()) <= max(1e-6, 0.02 * case.training.lr * (case.noisy > 0)), part
    assert (ours["classifier.weight"] - start["classifier.weight"]).abs().max() > 1e-3


def test_one_client_with_one_round_is_plain_training() -> None:
    """No federation at all: the mean over one client is its model."""
    case = CASES["SGD"]
    playing = federation(Full(), training=case.training, sizes={0: 11})
    model = bert()
    trained = in_full(model.requires_grad_())
    local_training(
        model, trained, playing.worker.client_data[0].train, batches(11, case.training, 0, 0), case
    )
    for part, tensor in playing.play(1).shared.items():
        torch.testing.assert_close(tensor, trained[part].detach(), rtol=1e-6, atol=1e-6, msg=part)
