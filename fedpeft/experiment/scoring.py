"""What a state is worth: the row that an evaluation adds to the ledger."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from fedpeft.experiment.build import Federation
from fedpeft.federation.memory import Memories
from fedpeft.federation.server import poll
from fedpeft.ledger import EvaluationRow
from fedpeft.tasks import Counts, examples_in
from fedpeft.training.evaluation import mounted_state, score
from fedpeft.types import NO_MEMORY, Engine, State
from fedpeft.wire.messages import decode


def evaluation_row(
    federation: Federation, state: State, engine: Engine, memories: Memories
) -> EvaluationRow:
    """Score ``state`` on the server's texts, and on the clients' own where the settings ask for it.

    A method that keeps parts of its model with the clients has no global model. Then the score is
    the mean over the clients' own models, each on the server's texts (or on the client's own, where
    the memories are elsewhere), and ``clients_scored`` says how many there were.
    """
    began = time.perf_counter()
    counts = score_global(federation, state)
    if counts is not None:
        row = _row(federation, state, [counts])
    else:
        client_counts = _client_models(federation, state, memories)
        # The server has no memories under Flower, where it can only ask the clients.
        if not client_counts:
            client_counts = list(_poll_clients(federation, state, engine).values())
        row = _row(federation, state, client_counts)
        row = replace(row, clients_scored=len(client_counts))
    if federation.config.evaluation.per_client:
        row = _with_clients(row, federation, _poll_clients(federation, state, engine).values())
    return replace(row, seconds=time.perf_counter() - began)


def score_global(federation: Federation, state: State) -> Counts | None:
    """Return the counts of the global model, as a client of full capacity would hold it.

    None where there is none, as the method keeps parts of it with clients that have trained them.
    """
    model, hardware = federation.loaded.model, federation.hardware
    mounted = mounted_state(federation.method, state, model, hardware, federation.config.seed)
    with mounted as local:
        # Before any client has trained, all of them hold what the server sends: one model.
        if local.personal and state.memories:
            return None
        return score(model, federation.task, federation.scored, hardware)


def _poll_clients(federation: Federation, state: State, engine: Engine) -> dict[int, Counts]:
    """Return what every client counts of its own model on its own texts."""
    return poll(
        federation.method,
        state,
        engine,
        federation.clients,
        config=federation.worker.config,
        task=federation.task,
    )


def _client_models(federation: Federation, state: State, memories: Memories) -> list[Counts]:
    """Return the counts of each client's own model on the server's texts.

    Of clients whose memories are elsewhere there are none.
    """
    model, hardware, seed = federation.loaded.model, federation.hardware, federation.config.seed
    counts: list[Counts] = []
    for client in federation.clients:
        version = state.memories.get(client.id, NO_MEMORY)
        if not memories.holds(client.id, version):
            continue
        with_version = replace(client, memory=version)
        memory = decode(memories.get(client.id, version))
        with mounted_state(federation.method, state, model, hardware, seed, with_version, memory):
            counts.append(score(model, federation.task, federation.scored, hardware))
    return counts


def _row(federation: Federation, state: State, each: Sequence[Counts]) -> EvaluationRow:
    """Return the row of one model, or of the mean over the models of several clients."""
    values: dict[str, list[float]] = {}  # name of a metric -> its value for each model
    for counts in each:
        for name, value in federation.task.metrics(counts).items():
            values.setdefault(name, []).append(value)
    return EvaluationRow(
        round=state.round,
        split=federation.config.evaluation.split,
        examples=examples_in(each[0]),
        metrics={name: fmean(per_model) for name, per_model in values.items()},
    )


def _with_clients(
    row: EvaluationRow, federation: Federation, each: Iterable[Counts]
) -> EvaluationRow:
    """Return ``row`` with the mean of the primary metric over clients, and over its worst tenth."""
    metric = federation.task.metric
    scores = [federation.task.metrics(counts)[metric.name] for counts in each]
    scores.sort(reverse=not metric.higher_is_better)  # the worst first
    worst = scores[: max(1, len(scores) // 10)]  # of fewer than ten clients, one
    return replace(
        row,
        # 0 where no client could answer: fmean of nothing would end the run.
        client_mean=fmean(scores or [0.0]),
        client_worst_tenth=fmean(worst or [0.0]),
        clients_scored=len(scores),
    )
