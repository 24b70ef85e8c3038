"""What a state is worth: the row that an evaluation adds to the ledger."""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from fedpeft.experiment.build import Federation
from fedpeft.federation.memory import Memories
from fedpeft.federation.server import poll
from fedpeft.ledger import EvaluationRow
from fedpeft.tasks import Scores
from fedpeft.training.evaluation import FULL_CLIENT, mounted_state, score
from fedpeft.types import NO_MEMORY, Engine, State
from fedpeft.wire.messages import decode


def evaluation_row(
    assembly: Federation, state: State, engine: Engine, memories: Memories
) -> EvaluationRow:
    """Score ``state`` on the server's texts, and on the clients' own where the settings ask for it.

    A method to which nothing goes up has no global model: its score is the mean over the clients' own models, each on
    the server's texts (on the client's own where the memories are elsewhere), and ``clients_scored`` says how many.
    """
    began = time.perf_counter()
    if (
        assembly.method.expects(state, assembly.method.send(state, FULL_CLIENT))
        or not state.memories
    ):
        row = _row(assembly, state, [score_whole(assembly, state)])
    else:
        each = _own_models(assembly, state, memories) or list(
            _own_scores(assembly, state, engine).values()
        )
        row = replace(_row(assembly, state, each), clients_scored=len(each))
    if assembly.config.evaluation.per_client:
        own = sorted(scores.accuracy for scores in _own_scores(assembly, state, engine).values())
        worst = own[: max(1, len(own) // 10)]
        row = replace(
            row,
            client_mean=fmean(own or [0.0]),
            client_worst_tenth=fmean(worst or [0.0]),
            clients_scored=len(own),
        )
    return replace(row, seconds=time.perf_counter() - began)


def score_whole(assembly: Federation, state: State) -> Scores:
    """Return the scores of ``state``, as a client of full capacity would hold it, on the server's texts."""
    model, hardware = assembly.loaded.model, assembly.hardware
    with mounted_state(assembly.method, state, model, hardware, assembly.config.seed):
        return score(model, assembly.task, assembly.scored, hardware)


def _own_scores(assembly: Federation, state: State, engine: Engine) -> dict[int, Scores]:
    """Return every client's scores of its own model on its own texts."""
    labels, config = len(assembly.task.labels), assembly.worker.config
    return poll(assembly.method, state, engine, assembly.clients, config=config, labels=labels)


def _own_models(assembly: Federation, state: State, memories: Memories) -> list[Scores]:
    """Return the scores, on the server's texts, of each client's own model, as far as the memories are here."""
    model, hardware, seed = assembly.loaded.model, assembly.hardware, assembly.config.seed
    found = []
    for client in assembly.clients:
        if memories.holds(client.id, state.memories.get(client.id, NO_MEMORY)):
            known = replace(client, memory=state.memories[client.id])
            memory = decode(memories.get(client.id, known.memory))
            with mounted_state(assembly.method, state, model, hardware, seed, known, memory):
                found.append(score(model, assembly.task, assembly.scored, hardware))
    return found


def _row(assembly: Federation, state: State, each: Sequence[Scores]) -> EvaluationRow:
    return EvaluationRow(
        state.round,
        assembly.config.evaluation.split,
        each[0].examples,
        fmean(scores.loss for scores in each),
        fmean(scores.accuracy for scores in each),
        fmean(scores.macro_f1 for scores in each),
    )
