"""Every method plays two rounds of every task on a tiny model, without an exception, and is another model afterwards."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch

from fedpeft.engines.local import LocalEngine
from fedpeft.federation.client import ClientData, Worker
from fedpeft.federation.memory import Memories
from fedpeft.mounting import describe
from fedpeft.tasks import TASKS
from fedpeft.training.evaluation import mounted_state, predictions, score
from fedpeft.types import NO_MEMORY, Client, Method, State
from fedpeft.wire.messages import decode
from tests import causal_lms
from tests.contract.reference import PERSONAL, PHASES
from tests.tiny import CONFIG, CPU, FIELDS, NAMES, SEED, SGD, Tapped, TinyFederation, small
from tests.tiny_tasks import TASK_CASES, Ground

SIZES = {0: 3, 1: 5}
"""Client -> rows; a step each."""

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "slora": {"rounds": 2},
    "slora_full": {"rounds": 2},
    "fedara": {"rounds": 2},
    "adalora": {"rounds": 2},
}
"""Settings with which both stages are played, or ranks die, in two rounds."""


@cache
def ground(kind: str) -> Ground:
    """Return a task on a model that all tests share: mounting leaves no trace on it."""
    if kind != "causal_lm":
        return TASK_CASES[kind].ground()
    task, model = causal_lms.task(), causal_lms.causal_lm("gpt2")
    output: Any = model
    base = describe(model, (), without=output.get_output_embeddings())
    return Ground(task, model, base, causal_lms.rows)


@cache
def held(kind: str) -> dict[int, ClientData]:
    """Return what every client holds."""
    here = ground(kind)
    data: dict[int, ClientData] = {}
    for client, size in SIZES.items():
        rows = here.task.encode(here.rows(size, client))
        data[client] = ClientData(rows, rows)
    return data


def settings(name: str) -> Method:
    """Return a method with small settings for models of any family."""
    targets = {"targets": "attention"} if "targets" in FIELDS[name] else {}
    return small(name, **targets, **CHANGES.get(name, {}))


def playing(method: Method, kind: str) -> TinyFederation:
    """Return a federation of clients that have some rows of a task."""
    here, memories = ground(kind), Memories()
    worker = Worker(
        method=method,
        model=here.model,
        task=here.task,
        client_data=held(kind),
        training=SGD,
        hardware=CPU,
        head=here.base.head,
        seed=SEED,
        config=CONFIG,
    )
    return TinyFederation(method, worker, memories, Tapped(LocalEngine(worker, memories)))


def said(trying: TinyFederation, state: State, kind: str, client: Client) -> torch.Tensor:
    """Return what the model of a state, or a client's own one, says of the client's rows, as one vector."""
    here, rows = ground(kind), held(kind)[0].test
    known = client.memory != NO_MEMORY
    memory = decode(trying.memories.get(client.id, client.memory)) if known else {}
    with mounted_state(trying.method, state, here.model, CPU, SEED, client, memory):
        counts = score(here.model, here.task, rows, CPU)
        told = predictions(here.model, here.task, rows, CPU)
    assert here.task.fault(counts) == ""
    assert all(torch.isfinite(tensor).all() for tensor in counts.values())
    return torch.cat([tensor.float().flatten() for one in told for tensor in one.values()])


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_two_rounds_make_another_model(name: str, kind: str) -> None:
    """Nobody is lost, and every number is finite."""
    trying = playing(settings(name), kind)
    begin = trying.method.init(ground(kind).base, SEED)
    last = trying.play(2, begin)
    assert {row.lost for row in trying.rows} == {None}
    assert len(trying.rows) == 2 * PHASES.get(name, 1) * len(SIZES)
    assert last.round == 2
    for part in (last.shared, last.server):
        assert all(torch.isfinite(tensor).all() for tensor in part.values())
    memory = last.memories[0] if name in PERSONAL else NO_MEMORY
    before, after = (
        said(trying, begin, kind, Client(0)),
        said(trying, last, kind, Client(0, memory=memory)),
    )
    assert (after - before).abs().max() > 1e-4
