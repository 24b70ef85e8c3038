"""The local engine with stacks of one and Flower's simulation end in the same state, to the bit.

The simulation needs Ray, and a process of its own. What nodes and servers may do wrong is played
without either: there a grid in this process calls the app of the clients.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # flwr reads it once, when it is imported

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.engines.flower import app, simulation
from fedpeft.engines.flower.engine import FlowerEngine, connect
from fedpeft.engines.flower.grid import BYTES, blob, record
from fedpeft.engines.flower.nodes import Nodes
from fedpeft.engines.local import LocalEngine
from fedpeft.engines.pool import ClientPool
from fedpeft.errors import BadInput
from fedpeft.federation.fleet import Device, Fleet, Outing
from fedpeft.federation.server import federate
from fedpeft.ledger import ClientRow
from fedpeft.methods import METHODS
from fedpeft.training.loop import Training
from fedpeft.types import NO_MEMORY, Client, Engine, Method, Payload, State
from fedpeft.wire.messages import Kind, Request, Response, Status, decode
from fedpeft.wrappers import Quantise, Scaffold, SecAgg
from tests.parity.here import Answering, Here, Node, grid
from tests.tiny import CONFIG, SEED, assert_same_state, base_of, bert, small, worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What ``flower_runs.py`` printed; Ray leaves warnings and processes behind, so it runs outside."""
    folder = tmp_path_factory.mktemp("ground")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.parity.flower_runs", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_fleet_fares_alike_in_flowers_simulation(told: dict[str, dict[str, Any]]) -> None:
    """Its devices have fewer ranks and steps, drop out and are late; the processes of Ray know them, too."""
    assert told["fleet"]["differences"] == []
    assert told["fleet"]["rows"] == 6
    assert None in told["fleet"]["lost"]
    assert len(set(told["fleet"]["lost"])) > 1
    assert told["fleet"]["scored"] == 5


@pytest.mark.parametrize(
    "name",
    [
        *METHODS,
        "lora, optimizer kept",
        "federa, optimizer kept",
        "tagging",
        "qa",
        "causal_lm",
    ],
)
def test_flower_ends_where_the_local_engine_does(
    name: str, told: dict[str, dict[str, Any]]
) -> None:
    assert told[name]["differences"] == []
    assert told[name]["rows"] == 6
    assert told[name]["lost"] == [None] * 6
    assert told[name]["scored"] == 5


CLIENTS = [Client(0, examples=7), Client(1, examples=11), Client(2, examples=9)]
VICTIM = 1


@pytest.fixture(autouse=True)
def inside_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can be made here, and no worker is left from another test."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(app, "_workers", {})


def engine(here: Here, joining: float = 0.05, patience: float = 60.0) -> FlowerEngine:
    """Return the engine that reaches three clients through ``here``."""
    found = connect(here, threading.Event(), 3, "a configuration", joining)
    return replace(found, patience=patience, poll=0.001)


def play(
    through: Engine,
    clients: Sequence[Client] = CLIENTS,
    rounds: int = 2,
    method: Method | None = None,
) -> tuple[State, list[ClientRow]]:
    """Return the state after so many rounds with ``clients``, and the ledger's rows."""
    method = method or small("lora")
    rows: list[ClientRow] = []
    states = federate(
        method,
        method.init(base_of(bert()), SEED),
        through,
        lambda _: clients,
        range(rounds),
        config=CONFIG,
        min_replies=1,
        record=rows.append,
    )
    return list(states)[-1], rows


@cache
def alone(without: int | None = None, rounds: int = 2) -> State:
    """Return the state that the local engine ends in, with all clients but one."""
    clients = [client for client in CLIENTS if client.id != without]
    return play(LocalEngine(worker(small("lora"), bert())), clients, rounds)[0]


def assert_lost(here: Here, why: str, patience: float = 60.0) -> None:
    """Assert that a run through ``here`` loses the victim, for that reason, and nothing else."""
    state, rows = play(engine(here, patience=patience))
    reasons = {(row.round, row.client): row.lost for row in rows}
    for (number, client), reason in reasons.items():
        if client == VICTIM:
            assert reason is not None, number
            assert why in reason
            assert reason.isprintable()
            assert len(reason) < 400
        else:
            assert reason is None, (number, client)
    assert len(rows) == 6
    assert_same_state(state, alone(without=VICTIM))


def test_a_grid_in_this_process_is_as_good_as_the_local_engine() -> None:
    state, rows = play(engine(grid()))
    assert [row.lost for row in rows] == [None] * 6
    assert_same_state(state, alone())


def test_a_fleet_loses_the_same_replies_on_either_engine_and_ends_in_the_same_state() -> None:
    """FeDeRA, as its clients remember something; a third of requests is not answered, a third of the rest is late."""
    device = Device(1.0, dropout=0.35, straggling=0.35)
    fleet = Fleet(
        {"one": device},
        dict.fromkeys(range(3), "one"),
        dict.fromkeys(range(3), 2),
        seed=1,
        deadline=10.0,
    )

    def play_in(through: Engine) -> tuple[State, list[tuple[object, ...]]]:
        method = small("federa")
        state, rows = method.init(base_of(bert()), SEED), list[ClientRow]()
        for number in range(4):
            outing = Outing(through, fleet, number)
            [state] = federate(
                method,
                state,
                outing,
                lambda _: CLIENTS,
                range(number, number + 1),
                config=CONFIG,
                min_replies=1,
                record=outing.noting(rows.append),
            )
        told: list[tuple[object, ...]] = []
        for row in rows:
            told.append((row.round, row.client, row.down, row.up, row.lost, row.modelled))
        return state, told

    here = grid()
    here._app = app.client_app(lambda _: worker(small("federa"), bert()))
    state, rows = play_in(engine(here))
    due, due_rows = play_in(LocalEngine(worker(small("federa"), bert())))
    assert rows == due_rows
    assert_same_state(state, due)
    assert len({lost for *_, lost, _ in rows}) == 3, "used, dropped out and late"


def test_a_round_of_several_exchanges_is_that_of_the_local_engine_and_leaves_no_secret() -> None:
    """Secure aggregation of FeDeRA: secrets go from one exchange to the next in the nodes' states, the anchor stays."""
    secure = SecAgg(bits=56).around(small("federa"), "0.secagg")
    here = grid()
    here._app = app.client_app(lambda _: worker(secure, bert()))
    state, rows = play(engine(here), method=secure)
    assert [row.lost for row in rows] == [None] * 2 * 4 * 3
    due, _ = play(LocalEngine(worker(secure, bert())), method=secure)
    assert_same_state(state, due)
    for node in here.nodes.values():
        [kept] = node.context.state.array_records.values()
        for array in kept.values():
            names = set(decode(array.data))
            assert any(name.endswith(":A0") for name in names)
            assert {name for name in names if name.startswith("!")} <= {"!when"}


def test_what_wrappers_keep_with_a_client_lies_in_its_nodes_state_beside_the_methods() -> None:
    around = Scaffold().around(small("federa"), "1.scaffold")
    packed = Quantise(up="int4").around(around, "0.quantise")
    here = grid()
    here._app = app.client_app(lambda _: worker(packed, bert()))
    state, rows = play(engine(here), method=packed)
    assert [row.lost for row in rows] == [None] * 2 * 3
    due, _ = play(LocalEngine(worker(packed, bert())), method=packed)
    assert_same_state(state, due)
    for node in here.nodes.values():
        # The second round's, in which the method had nothing new.
        kept = [
            set(decode(array.data))
            for record in node.context.state.array_records.values()
            for array in record.values()
        ][-1]
        assert any(name.endswith(":A0") for name in kept)
        assert {name.partition("/")[0] for name in kept if name.startswith("~")} == {
            "~0.quantise",
            "~1.scaffold",
        }


def holding(records: Mapping[str, Any]) -> Answering:
    """Return what answers with these records."""
    return lambda answer: [_instead(answer, RecordDict(dict(records)))]


def _instead(answer: Message, content: RecordDict | Error) -> Message:
    """Return a message with the metadata of ``answer`` and another content."""
    number = answer.metadata.reply_to_message_id
    asked = Message(RecordDict(), answer.metadata.src_node_id, answer.metadata.message_type)
    asked.metadata.__dict__["_message_id"] = number
    return Message(content, reply_to=asked)


def array(dtype: str = "uint8", shape: tuple[int, ...] = (3,), stype: str = BYTES) -> Array:
    """Return three bytes that say of themselves what they like."""
    return Array(dtype, shape, stype, b"abc")


def error(reason: str | None, code: int = 2) -> Answering:
    """Return what answers with an error."""
    return lambda answer: [_instead(answer, Error(code, reason))]


NO_ANSWERS: Mapping[str, tuple[Answering, str]] = {
    "nothing": (holding({}), "record 'answer'"),
    "another record": (holding({"other": record(b"abc")}), "record 'answer'"),
    "a record of settings": (holding({"answer": ConfigRecord({"blob": b"abc"})}), "hold arrays"),
    "no array": (holding({"answer": ArrayRecord()}), "'blob'"),
    "another array": (holding({"answer": ArrayRecord({"x": array()})}), "'blob'"),
    "two arrays": (holding({"answer": ArrayRecord({"blob": array(), "x": array()})}), "'blob'"),
    "a saved array": (
        holding({"answer": ArrayRecord({"blob": array(stype="numpy.ndarray")})}),
        BYTES,
    ),
    "floats": (holding({"answer": ArrayRecord({"blob": array(dtype="float32")})}), "uint8"),
    "a table": (holding({"answer": ArrayRecord({"blob": array(shape=(1, 3))})}), "flat"),
    "a wrong length": (holding({"answer": ArrayRecord({"blob": array(shape=(2**62,))})}), "flat"),
    "no bytes": (holding({"answer": record(b"")}), "damaged"),
    "bytes that are no message": (holding({"answer": record(b"abc")}), "damaged"),
    "an error": (error("ValueError: no"), "ValueError: no"),
    "an error without a reason": (error(None, 7), "error 7"),
    "an error with an empty reason": (error(" \n", 7), "error 7"),
    "an error of many lines": (error("a\nb\x1b[2J" + "c" * 10**6), "a b?[2J"),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_costs_the_client_that_sent_it_and_no_other(name: str) -> None:
    answering, why = NO_ANSWERS[name]
    here = grid()
    here.spoil[100 + VICTIM] = answering
    assert_lost(here, why)


def _raising() -> list[str | None]:
    raise ValueError("Invalid message")


@pytest.mark.parametrize("said", [lambda: [None], lambda: [], lambda: [""], _raising])
def test_a_request_that_flower_refuses_costs_its_client_and_no_other(
    said: Callable[[], list[str | None]],
) -> None:
    here = grid()
    here.refused[100 + VICTIM] = said
    assert_lost(here, "Flower refused the message")


def test_an_answer_that_flower_cannot_read_costs_its_client_and_no_other() -> None:
    here = grid()
    here.torn.add(100 + VICTIM)
    assert_lost(here, "cannot be read (ValueError: Unexpected set")


def test_a_client_that_never_answers_is_lost_after_the_patience() -> None:
    here = grid()
    here.spoil[100 + VICTIM] = lambda _: []
    assert_lost(here, "no answer within 0.2 s", patience=0.2)


def test_an_answer_that_comes_twice_counts_once_and_one_to_no_question_not_at_all() -> None:
    def twice(answer: Message) -> list[Message]:
        stray = _instead(answer, RecordDict({"answer": record(b"abc")}))
        stray.metadata.__dict__["_reply_to_message_id"] = "a message of another day"
        return [stray, answer, answer, _instead(answer, Error(2, "too late"))]

    here = grid()
    here.spoil = dict.fromkeys(here.nodes, twice)
    state, rows = play(engine(here))
    assert [row.lost for row in rows] == [None] * 6
    assert_same_state(state, alone())


@pytest.mark.parametrize("last", [None, 0, 2])
def test_a_grid_out_of_reach_is_no_fault_of_a_client(last: int | None) -> None:
    """Before anyone is asked; when the next client is asked; when answers are looked for."""
    here = grid()
    through = engine(here)

    def unplugged(answer: Message) -> list[Message]:
        here.gone = True
        return [answer]

    if last is None:
        here.gone = True
    else:
        here.spoil[100 + last] = unplugged
    with pytest.raises(ConnectionError):
        play(through, rounds=1)


def test_the_end_of_the_simulation_ends_the_run() -> None:
    here, ended = grid(), threading.Event()
    through = connect(here, ended, 3, "a configuration")
    ended.set()
    with pytest.raises(RuntimeError, match="ended while clients were at work"):
        play(through)
    with pytest.raises(RuntimeError, match="ended with 2 of 3 nodes"):
        connect(grid([0, 1]), ended, 3, "a configuration")


def test_a_simulation_that_ends_before_the_run_begins_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulation, "run_simulation", lambda *_, **__: None)
    playing = worker(small("lora"), bert())
    with pytest.raises(RuntimeError, match="before the run began"):
        simulation.launch(
            ClientPool(3, playing, "a configuration", lambda _: playing), lambda _: None
        )


@pytest.mark.parametrize("held", [None, "1", "one", 7, -1, 0, 2.0, b"1", [1]])
def test_a_node_that_is_missing_or_holds_nothing_of_ours_costs_one_client(held: object) -> None:
    partitions = [0, 2] if held is None else [0, held, 2]
    assert_lost(grid(partitions), "no node has joined")


@pytest.mark.parametrize("name", ["nothing", "another record", "an error", "a saved array"])
def test_a_node_that_does_not_say_what_it_holds_costs_its_client_alone(name: str) -> None:
    here = grid()
    here.spoilt = MessageType.QUERY
    here.spoil[100 + VICTIM] = NO_ANSWERS[name][0]
    assert_lost(here, "no node has joined")


@pytest.mark.parametrize("fault", ["refused", "torn"])
def test_a_node_that_cannot_be_asked_what_it_holds_costs_its_client_alone(fault: str) -> None:
    here = grid()
    here.spoilt = MessageType.QUERY
    here.refused = {100 + VICTIM: lambda: [None]} if fault == "refused" else {}
    here.torn = {100 + VICTIM} if fault == "torn" else set()
    assert_lost(here, "no node has joined")


def test_a_node_whose_word_was_lost_is_asked_once_more() -> None:
    """As when it was out of reach for a moment, and is still the same session."""
    here = grid()
    here.spoilt = MessageType.QUERY
    lost = [error("the node is unavailable", 5)]
    here.spoil[100 + VICTIM] = lambda answer: lost.pop()(answer) if lost else [answer]
    state, rows = play(engine(here))
    assert [row.lost for row in rows] == [None] * 6
    assert_same_state(state, alone())
    assert here.asked.count((100 + VICTIM, MessageType.QUERY)) == 2


def test_a_run_without_any_node_ends_in_one_line() -> None:
    for here in (grid([]), grid(["x"])):
        with pytest.raises(BadInput, match="no node joined within 0.05 s") as refusal:
            engine(here)
        assert "\n" not in str(refusal.value)


def test_a_node_that_joins_late_takes_part_from_the_next_exchange_on() -> None:
    here = grid([0, 2])
    through = engine(here)
    first, rows = play(through, rounds=1)
    assert {row.client: row.lost is None for row in rows} == {0: True, VICTIM: False, 2: True}
    assert_same_state(first, alone(without=VICTIM, rounds=1))
    here.nodes[105] = Node.holding(VICTIM)
    _, rows = play(through)
    assert [row.lost for row in rows] == [None] * 6
    assert here.asked.count((105, MessageType.QUERY)) == 1


def test_a_node_takes_the_place_of_one_that_has_left_but_of_none_that_is_there() -> None:
    here = grid()
    through = engine(here)
    here.nodes[105] = Node.holding(VICTIM)
    play(through, rounds=1)
    assert (105, MessageType.TRAIN) not in here.asked
    del here.nodes[100 + VICTIM], here.nodes[105]
    here.nodes[106] = Node.holding(VICTIM)
    _, rows = play(through, rounds=1)
    assert [row.lost for row in rows] == [None] * 3
    assert (106, MessageType.TRAIN) in here.asked


def address(**changes: Any) -> ConfigRecord:
    """Return for whom a request is, with changes."""
    return ConfigRecord({"config": "a configuration", "client": 1, "memory": NO_MEMORY, **changes})


def request(**changes: Any) -> RecordDict:
    """Return what a client is asked, with changes to its records; None leaves one out."""
    records = {"to": address(), "request": record(b"abc"), **changes}
    return RecordDict({name: content for name, content in records.items() if content is not None})


LAYER = "bert.encoder.layer.0.attention.self.query"


def factors(A: tuple[int, int], B: tuple[int, int]) -> Payload:
    """Return factors of one layer, of these shapes."""
    return {f"{LAYER}:A": torch.ones(A), f"{LAYER}:B": torch.ones(B)}


def asked(payload: Payload) -> RecordDict:
    """Return a request to train on ``payload``."""
    return request(request=record(Request(Kind.TRAIN, 0, CONFIG, payload).encode()))


HOSTILE: Mapping[str, RecordDict] = {
    "no address": request(to=None),
    "an address of arrays": request(to=record(b"abc")),
    "an empty address": request(to=ConfigRecord()),
    "a client in words": request(to=address(client="one")),
    "a memory that is not there": request(to=address(memory=5)),
    "no request": request(request=None),
    "a request of settings": request(request=ConfigRecord()),
    "a request of floats": request(request=ArrayRecord({"blob": array(dtype="float32")})),
    "a damaged request": request(),
    "of one factor": asked({f"{LAYER}:A": torch.ones(3, 32)}),
    "of factors of other sizes": asked(factors((3, 32), (5, 2))),
    "of empty factors": asked(factors((0, 4096), (4096, 0))),
    "of whole numbers": asked({"classifier.bias": torch.ones(3, dtype=torch.int64)}),
    "of a parameter of its own": asked({"@x": torch.ones(3)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_server_sends_is_at_most_refused_and_leaves_no_trace(name: str) -> None:
    here = grid()
    [sent] = here.push_messages([Message(HOSTILE[name], 100 + VICTIM, MessageType.TRAIN)])
    [answer] = here.pull_messages([sent])
    assert answer.has_error()
    assert len(here.nodes[100 + VICTIM].context.state) == 0
    state, _ = play(engine(here))
    assert_same_state(state, alone())


def test_a_request_of_no_tensor_trains_nothing() -> None:
    """As a client whose whole adapter is pruned: it is scored, and nothing comes back."""
    here = grid()
    [sent] = here.push_messages([Message(asked({}), 100 + VICTIM, MessageType.TRAIN)])
    [answer] = here.pull_messages([sent])
    response = Response.decode(blob(answer.content, "answer"))
    assert response.payload == {}
    assert response.measured.trained == 0
    assert len(here.nodes[100 + VICTIM].context.state) == 0


def handled(node: Node, memory: int, config: bytes = CONFIG) -> Message:
    """Return the answer of ``node`` to a training request that assumes this memory."""
    here = grid([])
    here.nodes[100] = node
    sent = Request(Kind.TRAIN, 7, config, small("lora").init(base_of(bert()), SEED).shared, memory)
    content = request(to=address(memory=memory), request=record(sent.encode()))
    [number] = here.push_messages([Message(content, 100, MessageType.TRAIN)])
    [answer] = here.pull_messages([number])
    return answer


def test_a_node_that_lacks_the_memory_says_so_in_an_answer_of_its_own_kind() -> None:
    node = Node.holding(VICTIM)
    response = Response.decode(blob(handled(node, memory=5).content, "answer"))
    assert (response.status, response.round, response.payload) == (Status.FORGOTTEN, 7, {})
    assert len(node.context.state) == 0
    refusal = handled(node, memory=5, config=b"x" * 16)
    assert refusal.has_error()
    assert "is for configuration" in str(refusal.error.reason)


def test_a_node_that_has_lost_its_memory_is_lost_once_and_then_begins_anew() -> None:
    """As one that was set up again: the server's belief in its memory is reset."""
    here = grid()
    keeping = Training(steps=1, keep_optimizer=True)
    here._app = app.client_app(lambda _: worker(small("lora"), bert(), keeping))
    through, method, rows = engine(here), small("lora"), list[ClientRow]()
    states = federate(
        method,
        method.init(base_of(bert()), SEED),
        through,
        lambda _: CLIENTS,
        range(3),
        config=CONFIG,
        min_replies=1,
        record=rows.append,
    )
    assert VICTIM in next(states).memories
    here.nodes[100 + VICTIM].context.state.clear()
    assert VICTIM not in next(states).memories
    assert VICTIM in next(states).memories
    [lost] = [row for row in rows if row.lost is not None]
    assert (lost.round, lost.client) == (1, VICTIM)
    assert str(lost.lost).startswith("forgotten")


def test_a_node_that_has_left_is_asked_again_when_it_is_back() -> None:
    """Over a network: Flower says that the node is gone, which costs nothing but a moment."""
    here = grid()
    left = [error("the node is unavailable", 5)]

    def away_once(answer: Message) -> list[Message]:
        return left.pop()(answer) if left else [answer]

    here.spoil[100 + VICTIM] = away_once
    state, rows = play(replace(engine(here), away=20.0))
    assert [row.lost for row in rows] == [None] * 6
    assert_same_state(state, alone())
    here.spoil[100 + VICTIM] = error("the node is unavailable", 5)
    _, rows = play(replace(engine(here), away=0.5), rounds=1)
    assert {row.client: row.lost for row in rows}[VICTIM] == "the node is unavailable"


def test_a_node_that_has_restarted_is_asked_again_though_flower_says_nothing() -> None:
    """A message to a site that was restarted is never delivered, and is told of when its time is over."""
    here = grid()
    since = dict.fromkeys(here.nodes, "first")
    silent = [True]

    def restarting(answer: Message) -> list[Message]:
        if not silent:
            return [answer]
        silent.clear()
        since[100 + VICTIM] = "second"
        return []

    here.spoil[100 + VICTIM] = restarting
    through = engine(here)
    nodes = Nodes(here, 3, sessions=lambda: dict(since))
    state, rows = play(replace(through, nodes=nodes, away=20.0))
    assert [row.lost for row in rows] == [None] * 6
    assert_same_state(state, alone())
