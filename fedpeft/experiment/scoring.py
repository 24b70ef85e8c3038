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

    Where a method keeps parts of its model with the clients there is no global model: the score is
    the mean over the clients' own models, each on the server's texts (on the client's own where the
    memories are elsewhere), and ``clients_scored`` says how many.
    """
    began = time.perf_counter()
    counts = score_global(federation, state)
    if counts is not None:
        row = _row(federation, state, [counts])
    else:
        each = _own_models(federation, state, memories)
        if not each:
            each = list(_own_counts(federation, state, engine).values())
        row = replace(_row(federation, state, each), clients_scored=len(each))
    if federation.config.evaluation.per_client:
        row = _with_clients(row, federation, _own_counts(federation, state, engine).values())
    return replace(row, seconds=time.perf_counter() - began)


def score_global(federation: Federation, state: State) -> Counts | None:
    """Return the counts of the global model, as a client of full capacity would hold it.

    None where there is none: the method keeps parts of it with clients that have trained them.
    """
    model, hardware = federation.loaded.model, federation.hardware
    mounted = mounted_state(federation.method, state, model, hardware, federation.config.seed)
    with mounted as local:
        if local.personal and state.memories:
            return None
        return score(model, federation.task, federation.scored, hardware)


def _own_counts(federation: Federation, state: State, engine: Engine) -> dict[int, Counts]:
    """Return what every client counts of its own model on its own texts."""
    return poll(
        federation.method,
        state,
        engine,
        federation.clients,
        config=federation.worker.config,
        task=federation.task,
    )


def _own_models(federation: Federation, state: State, memories: Memories) -> list[Counts]:
    """Return the counts of each client's own model on the server's texts.

    Of clients whose memories are elsewhere there are none.
    """
    model, hardware, seed = federation.loaded.model, federation.hardware, federation.config.seed
    found: list[Counts] = []
    for client in federation.clients:
        version = state.memories.get(client.id, NO_MEMORY)
        if not memories.holds(client.id, version):
            continue
        known = replace(client, memory=version)
        memory = decode(memories.get(client.id, version))
        with mounted_state(federation.method, state, model, hardware, seed, known, memory):
            found.append(score(model, federation.task, federation.scored, hardware))
    return found


def _row(federation: Federation, state: State, each: Sequence[Counts]) -> EvaluationRow:
    """Return the row of one model, or of the mean over the models of several clients."""
    scored = [federation.task.metrics(counts) for counts in each]
    names = scored[0]
    return EvaluationRow(
        round=state.round,
        split=federation.config.evaluation.split,
        examples=examples_in(each[0]),
        metrics={name: fmean(metrics[name] for metrics in scored) for name in names},
    )


def _with_clients(
    row: EvaluationRow, federation: Federation, each: Iterable[Counts]
) -> EvaluationRow:
    """Return ``row`` with the mean of the primary metric over the clients, and over its worst tenth."""
    metric = federation.task.metric
    own = [federation.task.metrics(counts)[metric.name] for counts in each]
    own.sort(reverse=not metric.higher_is_better)
    worst = own[: max(1, len(own) // 10)]
    return replace(
        row,
        client_mean=fmean(own or [0.0]),
        client_worst_tenth=fmean(worst or [0.0]),
        clients_scored=len(own),
    )
