"""Every method on every task: side by side as one by one, kept states as none, scores that add up."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedpeft.federation.client import ClientData, Worker
from fedpeft.mounting import mounted, trainable
from fedpeft.tasks import Counts, Encoded, Task
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.evaluation import mounted_state, score
from fedpeft.training.loop import Training, fit
from fedpeft.training.micro_batches import Share
from fedpeft.types import Client, LocalTask, Method, Payload, State
from fedpeft.wire.messages import Kind, Request, Response, decode
from tests import causal_lms
from tests.contract import reference
from tests.contract.reference import core_rows
from tests.tiny import CONFIG, CPU, FIELDS, SEED, close, small
from tests.tiny_tasks import TASK_CASES, Ground

SIZES = {0: 5, 1: 9, 2: 7}
"""Client -> rows of training; batches of 4 are ragged, and clients have unequal numbers of steps."""
SGD = Training(optimizer="sgd", lr=0.2, momentum=0.9, batch_size=4, clip=0.3)
SINGLE = {name for name, begin in reference.SINGLE if begin > 0}
"""Methods that train parameters of any kind, or whole matrices: a model carries one client."""
TABLE = core_rows(TASK_CASES)


class Played:
    """A worker of a method on some ground, and what its clients are asked at the start."""

    def __init__(
        self, name: str, ground: Ground, sizes: Mapping[int, int] = SIZES, **fields: Any
    ) -> None:
        if name in {"slora", "slora_full"}:
            fields["stage1"] = 0.0  # its first stage is that of ``sparse``, or of ``full``
        self.task: Task = ground.task
        self.method: Method = small(name, **fields)
        held: dict[int, ClientData] = {}
        for client, size in sizes.items():
            train = self.task.encode(ground.rows(size, client))
            held[client] = ClientData(train, self.task.encode(ground.rows(6, client + 50)))
        self.state: State = self.method.init(ground.base, SEED)
        self.worker = Worker(
            method=self.method,
            model=ground.model,
            task=self.task,
            client_data=held,
            training=SGD,
            hardware=CPU,
            head=ground.base.head,
            seed=SEED,
            config=CONFIG,
            step_alone=None,
        )

    def asked(self, kind: Kind, client: int) -> bytes:
        down = self.method.send(self.state, Client(client))
        return Request(kind, self.state.round, CONFIG, down).encode()

    def handled(self, stack: list[int], kind: Kind = Kind.TRAIN, **changes: Any) -> list[Payload]:
        """Return what each client of ``stack`` replies and remembers, under different names."""
        worker = replace(self.worker, **changes)
        blobs = [self.asked(kind, client) for client in stack]
        replies: list[Payload] = []
        for reply, memory in worker.handle(stack, blobs, [b""] * len(stack)):
            response = Response.decode(reply)
            kept = {
                f"memory {name}": tensor
                for name, tensor in (decode(memory) if memory else {}).items()
            }
            loss = torch.tensor(response.measured.loss)
            replies.append({**response.payload, **kept, "its loss": loss})
        return replies


def assert_equal(one: Counts, other: Counts) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("name", "kind"), core_rows(TASK_CASES, without=SINGLE))
def test_k_clients_at_once_equal_k_one_by_one(name: str, kind: str) -> None:
    played = Played(name, TASK_CASES[kind].ground())
    together = played.handled([0, 1, 2])
    for client in SIZES:
        close(together[client], played.handled([client])[0], 2e-5)


@pytest.mark.parametrize(("name", "kind"), core_rows(TASK_CASES))
def test_kept_hidden_states_change_nothing(name: str, kind: str) -> None:
    """Methods that choose their layers adapt the last block, so that the first is never run again."""
    chosen: dict[str, Any] = (
        {"targets": r"layer\.1\..*(query|value)"} if "targets" in FIELDS[name] else {}
    )
    played = Played(name, TASK_CASES[kind].ground(), **chosen)
    passed: list[int] = []  # rows that go through the first block, pass by pass
    first = played.worker.model.get_submodule("bert.encoder.layer.0.attention.self.key")
    first.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    cache = ActivationCache(SIZES, rows=4)
    for stack in [[0], [1], [2]] if name in SINGLE else [[0, 1, 2]]:
        plain, kept = played.handled(stack), played.handled(stack, cache=cache)
        passed.clear()
        again = played.handled(stack, cache=cache)
        for one, other, once_more in zip(plain, kept, again, strict=True):
            close(one, other, 1e-5)
            close(one, once_more, 1e-5)
        if chosen:
            assert (
                sum(passed) <= 3
            )  # no more than the trial that shows whether the model has changed


@pytest.mark.parametrize(("name", "kind"), TABLE)
def test_scores_of_a_client_add_up(name: str, kind: str) -> None:
    """What a client counts is what its mounted model scores, and the halves of its rows add up to it."""
    assert_scores_add_up(Played(name, TASK_CASES[kind].ground()))


def assert_scores_add_up(played: Played) -> None:
    test = played.worker.client_data[1].test
    [said] = played.handled([1], Kind.EVALUATE)
    counts = {part: tensor for part, tensor in said.items() if part != "its loss"}
    rows = sorted({example.row for example in test})
    halves: list[Counts] = []
    for half in (rows[:2], rows[2:]):
        with mounted_state(played.method, played.state, played.worker.model, CPU, SEED, Client(1)):
            halves.append(score(played.worker.model, played.task, test.of_rows(half), CPU))
    assert_equal(_added(*halves), counts)
    assert_equal(_added(played.task.no_counts(), counts), counts)
    assert int(counts["examples"]) == len(rows) == 6
    assert played.task.fault(counts) == ""
    assert next(iter(played.task.metrics(counts))) == played.task.metric.name


def _added(one: Counts, other: Counts) -> dict[str, Tensor]:
    assert one.keys() == other.keys()
    return {name: tensor + other[name] for name, tensor in one.items()}


@pytest.mark.parametrize("kind", TASK_CASES)
def test_an_empty_split_is_nothing(kind: str) -> None:
    case = TASK_CASES[kind]
    task = case.task()
    assert len(task.encode(case.rows(3, 0).take([]))) == 0
    assert_equal(task.score([], Encoded([])), task.no_counts())
    assert set(task.metrics(task.no_counts()).values()) == {0.0}


def _tagging() -> tuple[Task, nn.Module, Encoded, dict[str, Tensor]]:
    """Return a task, a model, sentences of 1 to 6 words, and these as one batch of transformers."""
    case = TASK_CASES["tagging"]
    task = case.task()
    examples = task.encode(case.rows(9, 3))
    return task, case.make(), examples, dict(task.collate(examples, CPU.torch_device))


def _causal_lm() -> tuple[Task, nn.Module, Encoded, dict[str, Tensor]]:
    """Return the same of responses of 1 to 6 tokens."""
    task = causal_lms.task()
    examples = task.encode(causal_lms.rows(9, 3))
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    for example in examples:
        whole = torch.cat([example.ids, example.labels[-1:]])
        prompt = torch.full((len(whole) - len(example.labels),), -100)
        ids.append(whole)
        labels.append(torch.cat([prompt, example.labels]))
    lengths = torch.tensor([len(one) for one in ids]).unsqueeze(1)
    mask = (torch.arange(int(lengths.max())) < lengths).long()
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    return task, causal_lms.causal_lm("llama"), examples, batch


@pytest.mark.parametrize("make", [_tagging, _causal_lm])
def test_a_step_in_micro_batches_has_the_gradient_of_transformers(
    make: Callable[[], tuple[Task, nn.Module, Encoded, dict[str, Tensor]]],
) -> None:
    """Its loss is the mean over all tokens with a label, not over rows or micro-batches."""
    task, model, examples, batch = make()
    assert len({example.weight for example in examples}) > 3
    # 1. The gradient of the whole batch, by transformers.
    model.requires_grad_(True)
    theirs: Any = model
    loss = theirs(**batch).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, parameters)
    model.requires_grad_(False)
    # 2. That of a step, of which no pass sees more than two rows or so.
    trained = trainable({name: value.unsqueeze(0) for name, value in model.named_parameters()})
    found: dict[str, Tensor] = {}

    def look(_: slice) -> None:
        for name, parameter in trained.items():
            assert parameter.grad is not None
            found[name] = parameter.grad[0].clone()

    sizes: list[int] = []
    model.register_forward_hook(
        lambda _, __, read, ___: sizes.append(len(read["input_ids"])), with_kwargs=True
    )
    with mounted(model, trained):
        losses = fit(
            model,
            LocalTask(trained, lambda: ({}, {}), after_backward=look),
            task,
            [Share(examples, [list(range(len(examples)))])],
            Training(optimizer="sgd", clip=None),
            frozenset(),
            replace(CPU, tokens=24),
            ActivationCache(),
        )
    assert max(sizes) < len(examples) / 2
    torch.testing.assert_close(losses[0].float(), loss.detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
