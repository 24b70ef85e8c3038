"""What a state is worth: the row that an evaluation adds to the ledger."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from fedpeft.experiment.server_side import ServerSide
from fedpeft.federation.memory import Memories
from fedpeft.federation.server import poll
from fedpeft.ledger import EvaluationRow
from fedpeft.tasks import Counts, examples_in
from fedpeft.training.evaluation import mounted_state, score
from fedpeft.types import NO_MEMORY, Engine, LocalTask, State
from fedpeft.wire.messages import decode


def evaluation_row(
    side: ServerSide, state: State, engine: Engine, memories: Memories
) -> EvaluationRow | None:
    """Score ``state`` on the server's texts, and on the clients' own where the settings ask for it.

    With ``evaluation.where = "sites"`` the clients score, each on its own texts, and what they
    count is added up; None where none of them could.

    A method that keeps parts of its model with the clients has no global model. Then the score is
    the mean over the clients' own models, each on the server's texts (or on the client's own, where
    the memories are elsewhere), ``clients_scored`` says how many there were, and the row that it is
    ``personal``.
    """
    began = time.perf_counter()
    if side.config.evaluation.where == "sites":
        polled = list(_poll_clients(side, state, engine).values())
        if not polled:
            return None
        row = replace(_row(side, state, [added(polled)]), personal=not has_global(side, state))
        return replace(_with_clients(row, side, polled), seconds=time.perf_counter() - began)
    counts = score_global(side, state)
    if counts is not None:
        row = _row(side, state, [counts])
    else:
        client_counts = _client_models(side, state, memories)
        # The server has no memories under Flower, where it can only ask the clients.
        if not client_counts:
            client_counts = list(_poll_clients(side, state, engine).values())
        if not client_counts:
            return None
        row = _row(side, state, client_counts)
        row = replace(row, clients_scored=len(client_counts), personal=True)
    if side.config.evaluation.per_client:
        row = _with_clients(row, side, _poll_clients(side, state, engine).values())
    return replace(row, seconds=time.perf_counter() - began)


def added(each: Sequence[Counts]) -> Counts:
    """Return the counts of all examples together: they are sums, which add up.

    >>> one = {"right": torch.tensor(2), "loss": torch.tensor(1.5)}
    >>> added([one, one])
    {'right': tensor(4), 'loss': tensor(3.)}
    """
    return {name: torch.stack([counts[name] for counts in each]).sum(0) for name in each[0]}


def score_global(side: ServerSide, state: State) -> Counts | None:
    """Return the counts of the global model, as a client of full capacity would hold it.

    None where there is none, as the method keeps parts of it with clients that have trained them.
    """
    model, hardware = side.loaded.model, side.hardware
    mounted = mounted_state(side.method, state, model, hardware, side.config.seed)
    with mounted as local:
        if _is_personal(local, state):
            return None
        return score(model, side.task, side.scored, hardware)


def has_global(side: ServerSide, state: State) -> bool:
    """Return whether there is a global model, as no client has trained parts of its own."""
    model, hardware = side.loaded.model, side.hardware
    with mounted_state(side.method, state, model, hardware, side.config.seed) as local:
        return not _is_personal(local, state)


def _is_personal(local: LocalTask, state: State) -> bool:
    # Before any client has trained, all of them hold what the server sends: one model.
    return bool(local.personal) and bool(state.memories)


def _poll_clients(side: ServerSide, state: State, engine: Engine) -> dict[int, Counts]:
    """Return what every client counts of its own model on its own texts."""
    return poll(
        side.method,
        state,
        engine,
        side.clients,
        config=side.agreed,
        task=side.task,
    )


def _client_models(side: ServerSide, state: State, memories: Memories) -> list[Counts]:
    """Return the counts of each client's own model on the server's texts.

    Of clients whose memories are elsewhere there are none.
    """
    model, hardware, seed = side.loaded.model, side.hardware, side.config.seed
    counts: list[Counts] = []
    for client in side.clients:
        version = state.memories.get(client.id, NO_MEMORY)
        if not memories.holds(client.id, version):
            continue
        with_version = replace(client, memory=version)
        memory = decode(memories.get(client.id, version))
        with mounted_state(side.method, state, model, hardware, seed, with_version, memory):
            counts.append(score(model, side.task, side.scored, hardware))
    return counts


def _row(side: ServerSide, state: State, each: Sequence[Counts]) -> EvaluationRow:
    """Return the row of one model, or of the mean over the models of several clients."""
    values: dict[str, list[float]] = {}  # name of a metric -> its value for each model
    for counts in each:
        for name, value in side.task.metrics(counts).items():
            values.setdefault(name, []).append(value)
    return EvaluationRow(
        round=state.round,
        split=side.config.evaluation.split,
        examples=examples_in(each[0]),
        metrics={name: fmean(per_model) for name, per_model in values.items()},
    )


def _with_clients(row: EvaluationRow, side: ServerSide, each: Iterable[Counts]) -> EvaluationRow:
    """Return ``row`` with the mean of the primary metric over clients, and over its worst tenth."""
    metric = side.task.metric
    scores = [side.task.metrics(counts)[metric.name] for counts in each]
    scores.sort(reverse=not metric.higher_is_better)  # the worst first
    worst = scores[: max(1, len(scores) // 10)]  # of fewer than ten clients, one
    return replace(
        row,
        # 0 where no client could answer: fmean of nothing would end the run.
        client_mean=fmean(scores or [0.0]),
        client_worst_tenth=fmean(worst or [0.0]),
        clients_scored=len(scores),
    )
