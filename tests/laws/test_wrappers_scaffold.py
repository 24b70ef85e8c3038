"""SCAFFOLD's control variates, worked out from the messages alone by the paper's option II."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedpeft.engines.local import LocalEngine
from fedpeft.training.loop import Training
from fedpeft.types import Client, State
from fedpeft.wire.messages import decode
from fedpeft.wire.versions import slice_of
from fedpeft.wrappers import FedProx, Scaffold
from tests.contract.reference import asked
from tests.tiny import SIZES, TinyFederation, close, federation, small

RATE = 0.3
PLAIN = Training(optimizer="sgd", lr=RATE, batch_size=6, clip=None)
"""SGD as in the paper, with one rate and nothing beside it."""
OWNER = "0.scaffold"


def scaffold(training: Training = PLAIN, clients: int | None = None) -> TinyFederation:
    """Return LoRA's clients with control variates."""
    method = Scaffold(clients=clients).around(small("lora"), OWNER)
    return federation(method, training=training)


def controls(payload: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a message is about control variates, by the tensors' own names."""
    found: dict[str, Tensor] = {}
    for name, tensor in payload.items():
        for prefix in (f"{OWNER}/c/", f"{OWNER}/change/"):
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = tensor
    return found


def variate(playing: TinyFederation, state: State, client: int) -> dict[str, Tensor]:
    """Return c_i as a client keeps it."""
    return slice_of(decode(playing.memories.get(client, state.memories[client])), OWNER)


def due_variate(
    down: Mapping[str, Tensor], up: Mapping[str, Tensor], own: Mapping[str, Tensor], steps: int
) -> dict[str, Tensor]:
    """Return c_i - c + (x - y_i) / (steps * rate), option II of line 12."""
    common = controls(down)
    found: dict[str, Tensor] = {}
    for name, begin in down.items():
        if name.startswith(OWNER):
            continue
        rest = torch.zeros_like(begin)
        moved = (begin.double() - up[name].double()) / (steps * RATE)
        found[name] = own.get(name, rest).double() - common.get(name, rest).double() + moved
    return found


def test_control_variates_are_those_of_option_two_and_the_servers_is_their_mean() -> None:
    playing = scaffold()
    state = playing.start
    own: dict[int, dict[str, Tensor]] = {client: {} for client in SIZES}
    for round_number in range(3):
        before, state = state, playing.play(1, state)
        rows = playing.rows[-3:]
        for client, row in zip(SIZES, rows, strict=True):
            down = asked(playing, round_number, client)
            up = playing.answers(round_number)[client].payload
            due = due_variate(down, up, own[client], row.measured.steps)
            kept = variate(playing, state, client)
            close(kept, due, 1e-5)
            changes = controls(up)
            for name, tensor in kept.items():
                last = own[client].get(name, torch.zeros_like(tensor))
                torch.testing.assert_close(changes[name], tensor - last)
            own[client] = kept
        # c is the mean of all c_i, and this is what goes down next.
        told = controls(playing.method.send(state, Client(0)))
        for name, tensor in told.items():
            mean = torch.stack([own[client][name] for client in SIZES]).mean(0)
            torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-6)
        assert told.keys() == before.shared.keys()


def test_a_step_is_corrected_by_c_minus_c_i() -> None:
    """Of one step from one state: y = x - rate (g + c - c_i), g being the gradient without the wrapper."""
    one = replace(PLAIN, steps=1)
    playing = scaffold(one)
    first = playing.play(1)
    own = {client: variate(playing, first, client) for client in SIZES}
    playing.play(1, first)
    plain = federation(small("lora"), training=one)
    plain.play(1, replace(first.without(OWNER), memories={}))
    for client, c_i in own.items():
        common = controls(asked(playing, 1, client))
        y, free = playing.answers(1)[client].payload, plain.answers(0)[client].payload
        for name, tensor in free.items():
            due = tensor - RATE * (common[name] - c_i[name])
            torch.testing.assert_close(y[name], due, rtol=1e-5, atol=1e-7)
            if client == 0 and name.endswith("classifier.weight"):
                assert not torch.equal(y[name], tensor)


@pytest.mark.parametrize("clients", [None, 5])
def test_of_few_that_take_part_each_adds_its_share(clients: int | None) -> None:
    """c = 1 / N sum_i c_i, those who never took part at 0; without N, the mean of those who did."""
    playing = scaffold(clients=clients)
    everyone = playing.clients()
    state = playing.play(1, cohort=lambda _: everyone[:2])
    state = playing.play(1, state, cohort=lambda _: everyone[1:2])
    assert sorted(state.slice_of(OWNER)["seen"].tolist()) == [0, 1]
    told = controls(playing.method.send(state, Client(2)))
    for name, tensor in told.items():
        total = sum(variate(playing, state, client)[name] for client in (0, 1))
        torch.testing.assert_close(tensor, total / (clients or 2), rtol=1e-4, atol=1e-6)


def test_clients_side_by_side_correct_as_each_alone() -> None:
    """Also where their numbers of steps differ."""
    sizes = {0: 7, 1: 25, 2: 13}
    method = Scaffold().around(small("lora"), OWNER)
    alone = federation(method, training=PLAIN, sizes=sizes)
    beside = federation(method, training=PLAIN, sizes=sizes)
    beside.engine.engine = LocalEngine(beside.worker, beside.memories, stack=3)
    first, second = alone.play(2), beside.play(2)
    assert [row.measured.shared_by for row in beside.rows] == [3] * 6
    assert len({row.measured.steps for row in beside.rows}) == 3
    close(second.shared, first.shared, 1e-5)
    close(second.server, first.server, 1e-5)
    for client in sizes:
        close(variate(beside, second, client), variate(alone, first, client), 1e-5)


def test_a_silent_round_changes_no_control_variate() -> None:
    playing = scaffold()
    state = playing.play(1)
    after = playing.method.receive(state, ())
    close(after.server, state.server, 0.0)
    close(after.shared, state.shared, 0.0)


def test_a_method_hears_of_gradients_before_they_are_corrected() -> None:
    """FedARA scores its ranks by them; a proximal term inside is part of them, one outside too."""
    heard: dict[str, list[Tensor]] = {}
    for kind, inner in (
        ("free", small("lora")),
        ("held", FedProx(mu=0.5).around(small("lora"), "1")),
    ):
        method = Scaffold().around(inner, OWNER)
        playing = federation(method, training=PLAIN)
        state = playing.play(1)
        heard[kind] = [t for _, t in sorted(variate(playing, state, 0).items())]
    # In the first step w = w_0, so with more steps only does the term show.
    assert any(not torch.equal(a, b) for a, b in zip(heard["free"], heard["held"], strict=True))


def test_ranks_that_die_begin_anew() -> None:
    method = Scaffold().around(small("fedara"), OWNER)
    playing = federation(method)
    state = playing.play(1)
    for _ in range(3):
        before = deepcopy(state)
        state = playing.play(1, state)
        down = method.send(state, Client(0))
        for name, tensor in controls(down).items():
            assert tensor.shape == down[name].shape
    assert not [row.lost for row in playing.rows if row.lost]
    assert before.round == 3
