"""Thirty rounds in which each client drops out with a chance of 30 %: nothing is counted twice, and nothing goes unsaid."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final
from unittest import mock

import pytest
import torch

from fedpeft.experiment.build import build
from fedpeft.experiment.claim import claimed
from fedpeft.experiment.rounds import drawn, run_rounds
from fedpeft.experiment.run import begin_in
from fedpeft.federation.memory import Memories
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, Measured, read
from fedpeft.types import Client, Lost, Method, Payload, Reply, State
from fedpeft.wire.messages import Request, Response
from tests.e2e.builders import Ground

ROUNDS, COHORT, CHANCE = 30, 4, 0.3


@final
@dataclass
class Scripted:
    """An engine whose clients answer what their method expects, moved a little; of each some chance is that it does not.

    ``state``: what was sent last. ``gone``: (round, client) of those that did not answer, and how.
    """

    method: Method
    agreed: bytes
    state: State
    draw: random.Random = field(default_factory=lambda: random.Random(5))
    gone: dict[tuple[int, int], str] = field(default_factory=dict)

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        order = list(clients)
        self.draw.shuffle(order)
        for client in order:
            asked = Request.decode(request(client), self.agreed)
            if self.draw.random() > CHANCE:
                yield Reply(client, self.answer(asked, client))
                continue
            # It says nothing at all, or Flower says that it is gone, or half of its answer arrives.
            how = self.draw.choice(["no answer", "the node is unavailable", "damaged message"])
            self.gone[asked.round, client.id] = how
            if how == "damaged message":
                yield Reply(client, self.answer(asked, client)[:-40])
            elif how != "no answer":
                yield Lost(client, how)

    def answer(self, asked: Request, client: Client) -> bytes:
        """Return a reply of the form that is expected: what was sent, moved by a little noise."""
        noise = torch.Generator().manual_seed(client.id)
        up: dict[str, torch.Tensor] = {}
        for name, form in self.method.expects(self.state, asked.payload).items():
            sent = asked.payload.get(name, torch.zeros(form.shape, dtype=form.dtype))
            up[name] = sent
            if form.dtype.is_floating_point:
                up[name] = sent + 0.01 * torch.randn(form.shape, generator=noise)
        measured = Measured(examples=client.examples, steps=1, loss=0.5)
        return Response(asked.round, up, measured, asked.memory).encode()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the state whenever something of it is sent."""
        kind: Any = type(self.method)
        real = kind.send

        def send(method: Method, state: State, client: Client) -> Payload:
            self.state = state
            payload: Payload = real(method, state, client)
            return payload

        with mock.patch.object(kind, "send", send):
            yield


@pytest.mark.parametrize("name", ["lora", "slora", "fedara"])
def test_a_third_of_all_replies_may_be_lost_for_thirty_rounds(
    name: str, ground: Ground, tmp_path: Path
) -> None:
    config = ground.chosen(
        {"method": {"name": name}, "engine": {"stack": 1}, "partition": {"clients": 5}},
        {"federation": {"rounds": ROUNDS, "clients_per_round": COHORT, "min_replies": 2}},
        {"evaluation": {"every": 10, "limit": 8}},
    )
    federation = build(config)
    folder, cohort = tmp_path / "run", drawn(federation)
    engine = Scripted(federation.method, federation.agreed, federation.first_state())
    with claimed(folder), engine.listening():
        begin = begin_in(folder, federation, Memories())
        last = run_rounds(federation, engine, folder, begin, lambda _: None, cohort)

    # 1. The end is a state like any other.
    assert last.round == ROUNDS
    for tensor in (*last.shared.values(), *last.server.values()):
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    # 2. Everyone who was asked has a row, once, in the order of asking; those who are lost say why.
    rows = [row for row in read(folder / FILE) if isinstance(row, ClientRow)]
    asked = [(number, one.id) for number in range(ROUNDS) for one in cohort(number, 0)]
    assert [(row.round, row.client) for row in rows] == asked
    usable = Counter(row.round for row in rows if (row.round, row.client) not in engine.gone)
    for row in rows:
        how = engine.gone.get((row.round, row.client))
        if how is not None:
            assert row.lost is not None
            assert row.lost.startswith(how)
        elif usable[row.round] < 2:
            assert row.lost == f"only {usable[row.round]} usable replies, 2 needed"
        else:
            assert row.lost is None
    # 3. It was a third indeed, some rounds were silent, and the scores are there.
    assert 0.2 < len(engine.gone) / len(rows) < 0.4
    assert min(usable[number] for number in range(ROUNDS)) < 2
    scored = [row.round for row in read(folder / FILE) if isinstance(row, EvaluationRow)]
    assert scored == [10, 20, 30]
