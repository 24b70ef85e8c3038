"""Every method on every task: side by side as one by one, kept states as none, scores that add up."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpeft.federation.client import ClientData, Worker
from fedpeft.methods import METHODS
from fedpeft.mounting import describe
from fedpeft.tasks import Counts, Encoded, Task
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.evaluation import mounted_state, score
from fedpeft.training.loop import Training
from fedpeft.types import Client, Method, Payload, State
from fedpeft.wire.messages import Kind, Request, Response, decode
from tests.contract.reference import rows
from tests.tiny import CONFIG, CPU, FIELDS, SEED, close, small
from tests.tiny_tasks import TASK_CASES

SIZES = {0: 5, 1: 9, 2: 7}
"""Client -> rows of training; batches of 4 are ragged, and clients have unequal numbers of steps."""
SGD = Training(optimizer="sgd", lr=0.2, momentum=0.9, batch_size=4, clip=0.3)
SINGLE = {"full", "sparse", "peft"}
"""Methods that train parameters of any kind, or whole matrices: a model carries one client."""
TABLE = [(name, kind) for name in METHODS for kind in TASK_CASES]


class Played:
    """A worker of a method on a task, and what its clients are asked at the start."""

    def __init__(self, name: str, kind: str, **fields: Any) -> None:
        case = TASK_CASES[kind]
        if name == "slora":
            fields["stage1"] = 0.0  # its first stage is that of ``sparse``
        self.task: Task = case.task()
        self.method: Method = small(name, **fields)
        held: dict[int, ClientData] = {}
        for client, size in SIZES.items():
            train = self.task.encode(case.rows(size, client))
            held[client] = ClientData(train, self.task.encode(case.rows(6, client + 50)))
        model = case.make()
        self.state: State = self.method.init(describe(model, case.head), SEED)
        self.worker = Worker(
            method=self.method,
            model=model,
            task=self.task,
            client_data=held,
            training=SGD,
            hardware=CPU,
            head=case.head,
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


@pytest.mark.parametrize(("name", "kind"), rows(TASK_CASES, without=SINGLE))
def test_k_clients_at_once_equal_k_one_by_one(name: str, kind: str) -> None:
    played = Played(name, kind)
    together = played.handled([0, 1, 2])
    for client in SIZES:
        close(together[client], played.handled([client])[0], 2e-5)


@pytest.mark.parametrize(("name", "kind"), rows(TASK_CASES))
def test_kept_hidden_states_change_nothing(name: str, kind: str) -> None:
    """Methods that choose their layers adapt the last block, so that the first is never run again."""
    chosen = {"targets": r"layer\.1\..*(query|value)"} if "targets" in FIELDS[name] else {}
    played = Played(name, kind, **chosen)
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
    played = Played(name, kind)
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
