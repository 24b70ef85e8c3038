"""Compression: what the server reads, what a client owes, and how many bytes cross, each worked out by hand."""

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.engines.local import LocalEngine
from fedpeft.errors import BadInput
from fedpeft.types import Lost, Method, Payload, Reply, State
from fedpeft.wire.messages import Response, decode
from fedpeft.wire.versions import slice_of
from fedpeft.wrappers import WRAPPERS, FedAvgM, Quantise, SecAgg, TopK
from fedpeft.wrappers.wrapper import Wrapper
from tests.drifting import SHAPES, Drifting, drawn
from tests.tiny import TinyFederation, assert_same, base_of, bert, close, federation, small

Numbers = np.ndarray[Any, Any]
Form = tuple[str, int, tuple[int, ...]]
"""Of a tensor in a message: its dtype, the bytes of one number, its shape."""
OWNER = "0.it"
SETTINGS: Mapping[str, Wrapper] = {
    "bf16": Quantise(up="bf16"),
    "int8": Quantise(),
    "int4": Quantise(up="int4"),
    "top_k": TopK(density=0.2),
    "top_1": TopK(density=1e-6),
    "all": TopK(density=1.0),
}
NUMBERS = sum(math.prod(shape) for shape in SHAPES.values())


def by_rows(values: Numbers, levels: int) -> Numbers:
    """Return what whole numbers of steps, one step for each of the longer rows, make of a tensor."""
    if values.ndim == 2 and values.shape[0] > values.shape[1]:
        return by_rows(values.T, levels).T
    rows = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
    steps = np.abs(rows).max(axis=1, keepdims=True) / levels
    rounded: Numbers = (np.round(rows / steps) * steps).reshape(values.shape)
    return rounded


def largest_only(values: Numbers, density: float) -> Numbers:
    """Return a tensor's largest numbers, and 0 elsewhere."""
    flat = values.reshape(-1)
    chosen = max(1, round(density * flat.size))
    kept = np.zeros_like(flat)
    order = np.argsort(-np.abs(flat))[:chosen]
    kept[order] = flat[order]
    return kept.reshape(values.shape)


READ: Mapping[str, Callable[[Numbers], Numbers]] = {
    "bf16": lambda values: torch.as_tensor(values).float().bfloat16().double().numpy(),
    "int8": lambda values: by_rows(values, 127),
    "int4": lambda values: by_rows(values, 7),
    "top_k": lambda values: largest_only(values, 0.2),
    "top_1": lambda values: largest_only(values, 1e-6),
    "all": lambda values: values,
}
"""What the server reads of a client's numbers, by the description alone."""


def owed(playing: TinyFederation, state: State, client: int) -> dict[str, Tensor]:
    """Return what a client still owes."""
    return slice_of(decode(playing.memories.get(client, state.memories[client])), OWNER)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("feedback", [True, False])
def test_the_server_reads_rounded_differences_and_the_client_owes_the_rest(
    kind: str, feedback: bool
) -> None:
    """Three rounds of error feedback, e <- d + e - Q(d + e), worked out in float64."""
    method = Drifting(drawn())
    setting = replace(SETTINGS[kind], feedback=feedback)  # type: ignore[type-var]
    playing = federation(setting.around(method, OWNER))
    state = playing.start
    debts = {client: {n: np.zeros(s) for n, s in SHAPES.items()} for client in range(3)}
    for round_number in range(3):
        before, state = state, playing.play(1, state)
        for client, debt in debts.items():
            for name, move in method.moves(round_number, client).items():
                due = move.double().numpy() + debt[name] * feedback
                told = method.told[round_number][client][name].double() - before.shared[name]
                # What w + move - w is off in float32 may turn one bf16 into the next.
                near = 2**-7 if kind == "bf16" else 1e-7
                np.testing.assert_allclose(told.numpy(), READ[kind](due), atol=2e-6, rtol=near)
                debt[name] = due - told.numpy()
            if feedback:
                left = owed(playing, state, client)
                for name, tensor in left.items():
                    np.testing.assert_allclose(tensor.numpy(), debt[name], atol=2e-6)
                assert left.keys() == SHAPES.keys()
    assert not [row.lost for row in playing.rows if row.lost]
    if not feedback:
        assert not state.memories


def test_without_rounding_nothing_is_changed() -> None:
    plain, whole = Drifting(drawn()), Drifting(drawn())
    last = federation(plain).play(2)
    packed = federation(SETTINGS["all"].around(whole, OWNER)).play(2)
    close(packed.shared, last.shared, 1e-6)


@pytest.mark.parametrize("kind", SETTINGS)
def test_clients_side_by_side_send_what_each_sends_alone(kind: str) -> None:
    alone = federation(SETTINGS[kind].around(Drifting(drawn()), OWNER))
    beside = federation(SETTINGS[kind].around(Drifting(drawn()), OWNER))
    beside.engine.engine = LocalEngine(beside.worker, beside.memories, stack=3)
    first, second = alone.play(2), beside.play(2)
    assert_same(first.shared, second.shared)
    assert [row.measured.shared_by for row in beside.rows] == [3] * 6
    for exchange in range(2):
        for client, response in alone.answers(exchange).items():
            assert_same(beside.answers(exchange)[client].payload, response.payload)


def message_bytes(tensors: Mapping[str, Form]) -> int:
    """Return the bytes of a message: digest, length of the header, header to a multiple of 8, numbers."""
    order = sorted(tensors, key=lambda name: (-tensors[name][1], name))
    header: dict[str, object] = {}
    end = 0
    for name in order:
        dtype, width, shape = tensors[name]
        begin, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 16 + 8 + math.ceil(text / 8) * 8 + end


OF_REPLY: Mapping[str, Form] = {
    "@about": ("I64", 8, (4,)),
    "@counts": ("I64", 8, (5,)),
    "@measures": ("F64", 8, (3,)),
    "votes": ("I64", 8, ()),
}


def top(density: float) -> dict[str, Form]:
    """Return the tensors of a reply of ``top_k``: k numbers of each, Elias-Fano's bits of all places."""
    tensors: dict[str, Form] = {}
    bits = 0
    for name, shape in SHAPES.items():
        n = math.prod(shape)
        k = max(1, round(density * n))
        tensors[f"{name}/top"] = ("F32", 4, (k,))
        low = int(math.log2(n // k))
        bits += k * low + k + (n - 1) // 2**low
    return {**tensors, f"{OWNER}/places": ("U8", 1, (math.ceil(bits / 8),))}


ROWS = 3 + 3 + 1 + 1
"""Those of a wide matrix, the columns of a tall one, a vector, a number."""
SENT: Mapping[str, Mapping[str, Form]] = {
    "bf16": {name: ("BF16", 2, shape) for name, shape in SHAPES.items()},
    "int8": {f"{OWNER}/codes": ("I8", 1, (NUMBERS,)), f"{OWNER}/largest": ("F32", 4, (ROWS,))},
    "int4": {
        f"{OWNER}/codes": ("U8", 1, (math.ceil(NUMBERS / 2),)),
        f"{OWNER}/largest": ("F32", 4, (ROWS,)),
    },
    "top_k": top(0.2),
    "top_1": top(1e-6),
    "all": top(1.0),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_bytes_in_the_ledger_are_those_of_a_closed_formula(kind: str) -> None:
    playing = federation(SETTINGS[kind].around(Drifting(drawn()), OWNER))
    playing.play(2)
    due = message_bytes({**OF_REPLY, **SENT[kind]})
    assert {row.up for row in playing.rows} == {due}
    plain = federation(Drifting(drawn()))
    plain.play(1)
    whole = {name: ("F32", 4, shape) for name, shape in SHAPES.items()}
    assert {row.up for row in plain.rows} == {message_bytes({**OF_REPLY, **whole})}
    assert {row.down for row in playing.rows} == {row.down for row in plain.rows}


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_requests_are_rounded_and_the_servers_own_numbers_are_not(kind: str) -> None:
    """What a client moves is added to what the server has, not to what the client was told."""
    method = Drifting(drawn(scale=0.0))
    playing = federation(Quantise(up="int8", down=kind).around(method, OWNER))  # type: ignore[arg-type]
    start = playing.start
    last = playing.play(2)
    close(last.shared, start.shared, 1e-7)
    sent = decode(playing.engine.talks[0][1][0])
    for name, tensor in start.shared.items():
        values = tensor.double().numpy()
        told = sent[f"{name}/{kind}"]
        assert (tuple(told.shape), told.itemsize) == (SHAPES[name], 2 if kind == "bf16" else 1)
        if kind == "bf16":
            assert torch.equal(told, tensor.bfloat16())
        elif SHAPES[name] == (3, 40):
            steps = np.abs(values).max(axis=1, keepdims=True) / 127
            np.testing.assert_allclose(told.numpy(), np.round(values / steps), atol=0)
    plain = federation(Drifting(drawn()))
    plain.play(1)
    assert playing.rows[0].down < plain.rows[0].down


def test_clients_of_a_rounded_request_begin_at_rounded_values() -> None:
    """With bf16 both ways and no feedback, a client that adds nothing sends nothing but zeros."""
    method = Drifting(drawn(scale=0.0))
    playing = federation(Quantise(up="bf16", down="bf16", feedback=False).around(method, OWNER))
    playing.play(1)
    for response in playing.answers(0).values():
        assert all(not tensor.any() for n, tensor in response.payload.items() if n != "votes")


def test_one_of_two_tensors_that_take_turns_is_owed_until_its_next_turn() -> None:
    def turns(round_number: int, client: int) -> Mapping[str, Tensor]:
        names = {"wide"} if round_number % 2 == 0 else {"tall", "bias"}
        return {n: move for n, move in drawn()(round_number, client).items() if n in names}

    method = Drifting(turns)
    playing = federation(Quantise(up="int4").around(method, OWNER))
    first = playing.play(1)
    debt = owed(playing, first, 1)
    assert debt.keys() == {"wide"}
    second = playing.play(1, first)
    later = owed(playing, second, 1)
    assert later.keys() == {"wide", "tall", "bias"}
    assert torch.equal(later["wide"], debt["wide"])
    third = playing.play(1, second)
    told = method.told[2][1]["wide"] - second.shared["wide"]
    due = turns(2, 1)["wide"] + debt["wide"]
    torch.testing.assert_close(told + owed(playing, third, 1)["wide"], due)


def test_a_lost_reply_leaves_the_debt_as_it_was() -> None:
    """The server assumes the older memory, so the client owes what it did before its lost reply."""

    def lose(exchange: int, outcome: Reply | Lost) -> Reply | Lost:
        return Lost(outcome.client, "gone") if exchange == 1 else outcome

    method = Drifting(drawn())
    playing = federation(Quantise(up="int4").around(method, OWNER), lose)
    first = playing.play(1)
    debt = deepcopy(owed(playing, first, 2))
    playing.play(2, first)
    told = method.told[-1][2]["tall"] - first.shared["tall"]
    due = method.moves(2, 2)["tall"] + debt["tall"]
    torch.testing.assert_close(told, torch.from_numpy(by_rows(due.double().numpy(), 7)).float())


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (
            "bf16",
            3.4e38,
            "client 1: quantise cannot write 3.4e+38, which has come into tensor 'tall'",
        ),
        (
            "bf16",
            math.inf,
            "client 1: quantise cannot write inf, which has come into tensor 'tall'",
        ),
        (
            "int8",
            math.nan,
            "client 1: quantise cannot write nan, which has come into tensor 'tall'",
        ),
        (
            "int4",
            -math.inf,
            "client 1: quantise cannot write -inf, which has come into tensor 'tall'",
        ),
        ("top_k", math.nan, "client 1: top_k cannot write nan, which has come into tensor 'tall'"),
    ],
)
def test_a_number_that_cannot_be_written_costs_its_client_the_round(
    kind: str, value: float, says: str
) -> None:
    def moves(round_number: int, client: int) -> Mapping[str, Tensor]:
        found = dict(drawn()(round_number, client))
        if client == 1:
            found["tall"][3, 1] = value
        return found

    playing = federation(SETTINGS[kind].around(Drifting(moves), OWNER))
    playing.engine.engine = LocalEngine(playing.worker, playing.memories, stack=3)
    last = playing.play(1)
    assert [row.lost for row in playing.rows] == [None, says, None]
    assert all(tensor.isfinite().all() for tensor in last.shared.values())


@pytest.mark.parametrize("kind", SETTINGS)
def test_whatever_a_forger_writes_is_finite(kind: str) -> None:
    def forge(_: int, outcome: Reply | Lost) -> Reply | Lost:
        assert isinstance(outcome, Reply)
        response = Response.decode(outcome.blob)
        forged: dict[str, Tensor] = {}
        for name, tensor in response.payload.items():
            if tensor.dtype in (torch.int8, torch.uint8):
                draw = torch.Generator().manual_seed(outcome.client.id)
                noise = torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=draw)
                forged[name] = noise.view(tensor.dtype)
            elif tensor.is_floating_point():
                forged[name] = torch.full_like(tensor, 1e38)
        payload: Payload = {**response.payload, **forged}
        return Reply(outcome.client, replace(response, payload=payload).encode())

    playing = federation(SETTINGS[kind].around(Drifting(drawn()), OWNER), forge)
    last = playing.play(1)
    assert not [row.lost for row in playing.rows if row.lost]
    assert all(tensor.isfinite().all() for tensor in last.shared.values())


def test_wrappers_of_wrappers_work_as_they_are_declared() -> None:
    """The largest differences are picked first and then rounded: 8 bits a number and its place."""
    method = Drifting(drawn())
    inside = TopK(density=0.2, feedback=False).around(method, "1.top_k")
    playing = federation(Quantise().around(inside, "0.quantise"))
    before = playing.start
    playing.play(1)
    for client in range(3):
        for name, move in method.moves(0, client).items():
            picked = largest_only(move.double().numpy(), 0.2)
            kept = picked[picked != 0]
            step = np.abs(kept).max() / 127
            due = np.round(picked / step) * step
            told = method.told[0][client][name] - before.shared[name]
            np.testing.assert_allclose(told.numpy(), due, atol=1e-6)
    sent = playing.answers(0)[0].payload
    places, *_ = [tensor for name, tensor in sent.items() if name == "1.top_k/places"]
    assert sent.keys() == {"votes", "0.quantise/codes", "0.quantise/largest", "1.top_k/places"}
    assert len(sent["0.quantise/codes"]) == sum(
        max(1, round(0.2 * math.prod(shape))) for shape in SHAPES.values()
    )
    assert places.dtype == torch.uint8


def refusal(method: Method) -> str:
    """Return what is said where a federation of ``method`` begins."""
    with pytest.raises(BadInput) as refused:
        method.init(base_of(bert()), 0)
    return str(refused.value)


def test_what_is_nothing_to_compress_is_refused_by_name() -> None:
    for name in ("quantise", "top_k", "norm_clip"):
        wrapper: Wrapper = WRAPPERS[name]()
        said = refusal(wrapper.around(small("local_only"), OWNER))
        assert said.startswith(f"wrap.name = '{name}': LocalOnly sends no real numbers up")
        said = refusal(wrapper.around(SecAgg().around(small("lora"), "1.secagg"), OWNER))
        assert said.startswith(f"wrap.name = '{name}': Secure sends no real numbers up")
    said = refusal(TopK().around(Quantise().around(small("lora"), "1.quantise"), OWNER))
    assert said == (
        "wrap.name = 'top_k': Compressed sends up '1.quantise/largest', which did not go down in "
        "that form, so that there is no difference to it; it goes around methods that send back "
        "what they got, such as 'lora'"
    )


def test_an_optimizer_on_the_server_steps_by_what_was_read() -> None:
    """Inside of a compression and around it, momentum sees the same means."""
    inside = FedAvgM().around(Drifting(drawn()), "1.fedavgm")
    one = federation(Quantise().around(inside, "0.quantise")).play(2)
    other = federation(
        FedAvgM().around(Quantise().around(Drifting(drawn()), "1.quantise"), "0.fedavgm")
    ).play(2)
    assert_same(one.shared, other.shared)
    assert_same(one.slice_of("1.fedavgm"), other.slice_of("0.fedavgm"))
