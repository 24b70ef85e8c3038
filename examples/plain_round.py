"""FedAvg of LoRA in one page, without engine, wire or stack; it ends where ``fedpeft run`` does.

    python -m examples.plain_round

Source: FedIT (Zhang et al. 2023, arXiv 2305.05644), which is FedAvg (McMahan et al. 2017) of the
factors of LoRA (Hu et al. 2021).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.data import dirichlet, pydocs
from fedpeft.federation.server import sample
from fedpeft.method_kit import Client, select, uniform
from fedpeft.models import Loaded, ModelSection, load
from fedpeft.tasks import Classification, Encoded, Task
from fedpeft.training.evaluation import score
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Training, plan

Adapter = Mapping[str, Tensor]
"""``<layer>:A``, (r, in), and ``<layer>:B``, (out, r), and the head's parameters by their names."""


def start(loaded: Loaded, targets: str, rank: int, seed: int) -> dict[str, Tensor]:
    """Return the first adapter: A drawn from the seed, B zero, so the model starts unchanged."""
    adapter = dict(loaded.base.heads())
    for layer, weight in select(loaded.base, targets).items():
        adapter[f"{layer}:A"] = uniform(rank, weight.shape[1], seed, layer)
        adapter[f"{layer}:B"] = torch.zeros(weight.shape[0], rank)
    return adapter


@contextmanager
def adapted(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Let the adapted layers return W x + B A x, and the head be the adapter's, in the ``with``."""
    handles = []
    heads: dict[str, nn.Parameter] = {}
    for name, tensor in adapter.items():
        layer, colon, factor = name.partition(":")
        if factor == "A":
            branch = _branch(tensor, adapter[f"{layer}:B"])
            handles.append(model.get_submodule(layer).register_forward_hook(branch))
        elif not colon:
            heads[name] = model.get_parameter(name)
            _put(model, name, tensor)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in heads.items():
            _put(model, name, parameter)


def _branch(A: Tensor, B: Tensor) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.add(output, inputs[0] @ A.T @ B.T)

    return add


def _put(model: nn.Module, name: str, tensor: Any) -> None:
    layer, _, attribute = name.rpartition(".")
    model.get_submodule(layer)._parameters[attribute] = tensor


def train(
    model: nn.Module,
    task: Task,
    adapter: Adapter,
    examples: Encoded,
    steps: Sequence[Sequence[int]],
    training: Training,
    heads: frozenset[str],
) -> dict[str, Tensor]:
    """Return the adapter as one client has trained it on the rows of every step."""
    own = {name: nn.Parameter(tensor.clone()) for name, tensor in adapter.items()}
    head_lr = training.lr if training.head_lr is None else training.head_lr
    groups = [
        {"params": [own[name] for name in own if name not in heads], "lr": training.lr},
        {"params": [own[name] for name in own if name in heads], "lr": head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    model.train()
    with adapted(model, own):
        for rows in steps:
            batch = task.collate(examples.take(rows), torch.device("cpu"))
            optimizer.zero_grad()
            torch.autograd.backward(task.losses(model, batch).mean())
            if training.clip is not None:
                nn.utils.clip_grad_norm_(own.values(), training.clip)
            optimizer.step()
    return {name: parameter.detach() for name, parameter in own.items()}


def mean(adapters: Sequence[Adapter], examples: Sequence[int]) -> dict[str, Tensor]:
    """Return the mean of what the clients have trained, weighted by their examples."""
    merged: dict[str, Tensor] = {}
    for name in adapters[0]:
        total = torch.zeros(adapters[0][name].shape, dtype=torch.float64)
        for adapter, count in zip(adapters, examples, strict=True):
            total += adapter[name].double() * count
        merged[name] = (total / sum(examples)).float()
    return merged


def federated(
    loaded: Loaded,
    task: Task,
    clients: Sequence[Encoded],
    adapter: Adapter,
    training: Training,
    *,
    rounds: int,
    clients_per_round: int,
    seed: int,
) -> Iterator[Adapter]:
    """Yield the adapter after each round; ``clients[k]`` are the examples of client k."""
    everyone = [Client(number) for number in range(len(clients))]
    for round_number in range(rounds):
        trained: list[Adapter] = []
        counts: list[int] = []
        for client in sample(everyone, clients_per_round, seed, round_number):
            own = clients[client.id]
            steps = plan(len(own), training, seed, client.id, round_number)
            heads = loaded.base.head
            trained.append(train(loaded.model, task, adapter, own, steps, training, heads))
            counts.append(len(own))
        adapter = mean(trained, counts)
        yield adapter


def main() -> None:
    """Tune MiniLM on the docstrings of the running Python, spread over 20 clients."""
    seed, hardware = 0, Hardware("cpu", "fp32", "eager", torch.get_num_threads())
    dataset = pydocs()
    partition = dirichlet(dataset, clients=20, seed=seed, alpha=0.1, min_examples=8)
    untokenised = Classification(dataset.labels, max_length=16)
    loaded = load(ModelSection("minilm", max_length=16), untokenised, hardware, seed)
    task = untokenised.with_tokenizer(loaded.tokenizer)
    texts, test = task.encode(dataset.train), task.encode(dataset.test)
    clients = [texts.take(rows.tolist()) for rows in partition.train]
    adapter: Adapter = start(loaded, "query|value", rank=8, seed=seed)
    training = Training(lr=1e-2, head_lr=3e-2, steps=4)
    rounds = federated(
        loaded, task, clients, adapter, training, rounds=20, clients_per_round=4, seed=seed
    )
    for round_number, adapter in enumerate(rounds, start=1):
        if round_number % 5 == 0:
            with adapted(loaded.model, adapter):
                counts = score(loaded.model, task, test, hardware)
            print(f"round {round_number}: accuracy {task.metrics(counts)['accuracy']:.3f}")


if __name__ == "__main__":
    main()
