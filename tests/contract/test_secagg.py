"""Every method under secure aggregation is what it is without: the same sums, whoever drops out, and nothing else told."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.engines.local import LocalEngine
from fedpeft.errors import BadInput
from fedpeft.experiment.config import from_tree
from fedpeft.federation import checkpoint
from fedpeft.method_kit import WireError
from fedpeft.methods import METHODS
from fedpeft.secagg.keys import private_key, public_bytes
from fedpeft.secagg.summands import as_bytes, rows_of
from fedpeft.types import Client, Lost, Method, Reply, State
from fedpeft.wire.messages import Kind, Request, Response, Status, decode, encode
from fedpeft.wire.versions import as_told, once, stamp
from fedpeft.wrappers import FedAvgM, FedProx, SecAgg
from fedpeft.wrappers.secagg import MASK, SHARE_KEYS, TRAIN, UNMASK, Secure
from tests.contract.reference import (
    BEGINS,
    NOT_MEANS,
    close_or_counted,
    reference,
    rows,
    unmeasured,
)
from tests.tiny import (
    CONFIG,
    TinyFederation,
    assert_same_state,
    close,
    federation,
    small,
)

TEN = dict.fromkeys(range(10), 6)
"""Ten clients with as many examples as one step takes."""
OWNER = "0.secagg"
Change = Callable[[int, Reply | Lost], Reply | Lost]


def secure(method: Method | str = "lora", **settings: Any) -> Method:
    """Return a method under secure aggregation of two clients or more, in steps far below those of float32."""
    inner = small(method) if isinstance(method, str) else method
    return SecAgg(**{"bits": 56, "smallest": 2, **settings}).around(inner, OWNER)


def losing(lost: Mapping[int, Sequence[int]]) -> Change:
    """Return what loses, in some exchanges, the replies of some clients."""

    def change(exchange: int, outcome: Reply | Lost) -> Reply | Lost:
        gone = outcome.client.id in lost.get(exchange, ())
        return Lost(outcome.client, "gone") if gone else outcome

    return change


def lost_rows(playing: TinyFederation) -> dict[tuple[int, int], str | None]:
    """Return why replies were lost, by phase and client."""
    return {(row.phase, row.client): row.lost for row in playing.rows if row.lost}


@pytest.mark.parametrize(("name", "begin"), rows(BEGINS, without=NOT_MEANS))
def test_a_round_is_that_of_the_method_inside(name: str, begin: int) -> None:
    """Within the rounding of float32: the step of 56 bits is far below it. Counts of votes are exact."""
    found = reference(name)
    playing = federation(secure(name), memories=deepcopy(found.memories[begin]))
    before, due = found.states[begin], found.states[begin + 1]
    after = playing.play(1, before)
    assert not lost_rows(playing)
    close(after.shared, due.shared, 1e-6)
    close_or_counted(after.server, due.server, 1e-6)
    assert (after.round, after.phase) == (due.round, due.phase)
    # The method inside is told the same of its clients' memories.
    for client in playing.clients():
        under = as_told(replace(client, memory=after.memories[client.id])).memory
        assert under == due.memories.get(client.id, -1)
        kept = decode(playing.memories.get(client.id, after.memories[client.id]))
        assert once(kept).keys() == {"!when"}, "no secret outlives its round"


@pytest.mark.parametrize("name", rows(without=NOT_MEANS))
def test_what_goes_down_for_training_is_what_the_method_inside_sends(name: str) -> None:
    playing = federation(secure(name))
    playing.play(1)
    for client, (request, _) in reference(name).playing.engine.talks[0].items():
        assert playing.engine.talks[0][client][0] == request


def test_no_bit_of_the_sum_depends_on_the_masks() -> None:
    first, second = federation(secure()), federation(secure())
    assert_same_state(first.play(2), second.play(2))
    for exchange, name in ((0, "secagg.keys"), (1, "secagg.boxes"), (2, "secagg.masked")):
        for client in range(3):
            one, other = (f.answers(exchange)[client].payload[name] for f in (first, second))
            assert not torch.equal(one, other)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_clients_side_by_side_are_clients_one_by_one(weighting: str) -> None:
    method = secure(small("lora", weighting=weighting))
    alone, beside = federation(method), federation(method)
    beside.engine.engine = LocalEngine(beside.worker, beside.memories, stack=3)
    due = alone.play(2)
    last = beside.play(2)
    assert [row.measured.shared_by for row in beside.rows] == [3] * 24
    close(last.shared, due.shared, 1e-5)
    assert last.memories == due.memories


def test_a_run_that_is_resumed_ends_as_one_that_went_on(tmp_path: Path) -> None:
    method = FedProx(mu=0.1).around(
        FedAvgM(momentum=0.5).around(
            SecAgg(smallest=2).around(
                FedAvgM(momentum=0.5).around(small("federa"), "3.fedavgm"), "2.secagg"
            ),
            "1.fedavgm",
        ),
        "0.fedprox",
    )
    playing = federation(method)
    half = playing.play(1)
    checkpoint.save(tmp_path, half, deepcopy(playing.memories), 0, "c")
    last = playing.play(1, half)
    found = checkpoint.load(tmp_path, ["c"], pytest.fail)
    assert found is not None
    resumed = federation(method, memories=found.memories)
    assert_same_state(resumed.play(1, found.state), last)
    assert unmeasured(resumed.rows) == unmeasured(playing.rows[12:])


# Who drops out.

DROPS: Mapping[str, Mapping[int, Sequence[int]]] = {
    "nobody": {},
    "before masking": {SHARE_KEYS: [1, 4, 9]},
    "after sharing keys": {MASK: [0, 4, 7]},
    "after masking": {UNMASK: [2, 3, 8]},
    "in every phase": {TRAIN: [3], SHARE_KEYS: [5], MASK: [0], UNMASK: [8]},
}


@pytest.mark.parametrize("drop", DROPS)
def test_the_sum_is_that_of_the_clients_that_sent(drop: str) -> None:
    """30 % drop out. A client that is lost after it has sent is in the sum, one that is lost before is not."""
    lost = DROPS[drop]
    playing = federation(secure(bits=40), losing(lost), sizes=TEN)
    after = playing.play(1)
    assert lost_rows(playing) == {
        (phase, client): "gone" for phase, clients in lost.items() for client in clients
    }
    not_in_sum = [client for phase in (TRAIN, SHARE_KEYS, MASK) for client in lost.get(phase, [])]
    plain = federation(small("lora"), losing({0: not_in_sum}), sizes=TEN)
    due = plain.play(1)
    # The step of the mean: one of the sum's, half of it for each term, over all weights.
    members = 10 - len(lost.get(TRAIN, []))
    method = playing.method
    assert isinstance(method, Secure)
    step = method._fixed_point(0, members).step
    most = step / 2 / 6  # each client has 6 examples
    for name, tensor in due.shared.items():
        rounding = 2.0**-23 * tensor.abs().max()
        assert (after.shared[name] - tensor).abs().max() <= most + rounding, name


@pytest.mark.parametrize("phase", [TRAIN, SHARE_KEYS, MASK, UNMASK])
def test_a_round_with_too_few_clients_is_silent_and_the_next_one_is_not(phase: int) -> None:
    """6 of 10 members can open a sum; in the first phase there are no members yet, and 7 are asked for at least."""
    playing = federation(secure(smallest=7), losing({phase: [0, 2, 4, 6]}), sizes=TEN)
    before = playing.start
    after = playing.play(1, before)
    assert_same_state(after, replace(before, round=1))
    whys = {row.lost for row in playing.rows if row.phase == phase}
    assert len(whys) == 2
    assert any("6 clients" in why and "7 needed" in why for why in whys if why)
    after = playing.play(1, after)
    assert not [row for row in playing.rows if row.round == 1 and row.lost]
    assert not torch.equal(after.shared["classifier.weight"], before.shared["classifier.weight"])


def test_a_silent_round_leaves_everything_as_it_is() -> None:
    method = secure("fedara")
    state = reference("fedara").states[1]
    assert_same_state(method.receive(state, ()), replace(state, round=2))


@pytest.mark.parametrize(
    "phase", [TRAIN, *(pytest.param(p, marks=pytest.mark.slow) for p in (SHARE_KEYS, MASK, UNMASK))]
)
def test_clients_that_were_lost_are_there_again_with_their_memory(phase: int) -> None:
    """FeDeRA's anchor is kept through rounds that a client did not end."""
    playing = federation(secure("federa"), losing({4 + phase: [3]}), sizes=TEN)
    last = playing.play(3)
    assert lost_rows(playing) == {(phase, 3): "gone"}
    plain = federation(small("federa"), losing({1: [3]} if phase < UNMASK else {}), sizes=TEN)
    close(last.shared, plain.play(3).shared, 1e-4)
    # The anchor goes down once: all later requests for training are as long as everybody's.
    sizes = {row.down for row in playing.rows if row.phase == TRAIN and row.round > 0}
    assert len(sizes) == 1


# What a client refuses.


def asked_again(playing: TinyFederation, phase: int, state: State, down: dict[str, Any]) -> str:
    """Return why client 0 refuses a request of a past ``phase`` of round 0."""
    version = stamp(0, phase - 1)
    # Where the version is that of the loop's part, the client says so by itself.
    held = [one for one in playing.memories._versions[0] if one % 2**32 == version]
    client = Client(0, memory=held[0] if held else -1)
    request = Request(Kind.TRAIN, 0, CONFIG, down, client.memory, phase).encode()
    [outcome] = playing.engine.engine.exchange([client], lambda _: request)
    assert isinstance(outcome, Lost), "it must not answer"
    return outcome.reason


def test_no_share_is_told_twice() -> None:
    """With both kinds of shares of one client, the server could take all masks off that client's numbers."""
    playing = federation(secure(), sizes=TEN)
    playing.play(1)
    down = decode(playing.engine.talks[UNMASK][0][0])
    down = {name: tensor.clone() for name, tensor in down.items() if not name.startswith("@")}
    down["secagg.sent"][7] = False  # "client 7 was lost": its other share, please
    why = asked_again(playing, UNMASK, playing.start, down)
    assert "holds no secrets for phase 3 of round 0: they are used once" in why
    assert not [blob for blob in playing.memories._versions[0].values() if b"!own_shares" in blob]


def test_the_private_key_of_boxes_is_forgotten_as_they_are_sent() -> None:
    """What a client keeps opens the boxes that it is sent, and none of those that it has sent."""
    playing = federation(secure(), losing({SHARE_KEYS: [0]}), sizes=TEN)
    playing.play(1)
    [held] = [v for v in playing.memories._versions[0] if v % 2**32 == stamp(0, SHARE_KEYS)]
    kept = decode(playing.memories.get(0, held))
    mask_key, box_key = rows_of(playing.answers(TRAIN)[0].payload["secagg.keys"])
    # Whatever it is called and beside whatever it lies: all 32 bytes in a row that are kept.
    publics = set()
    for tensor in kept.values():
        if tensor.dtype == torch.uint8:
            content = as_bytes(tensor)
            for begin in range(len(content) - 31):
                publics.add(public_bytes(private_key(content[begin : begin + 32])))
    assert mask_key in publics
    assert box_key not in publics
    assert not [blob for blob in playing.memories._versions[0].values() if b"!own_keys" in blob]


def test_nothing_is_masked_twice() -> None:
    playing = federation(secure(), losing({MASK: [0]}), sizes=TEN)
    playing.play(1)
    assert stamp(0, SHARE_KEYS) in {one % 2**32 for one in playing.memories._versions[0]}
    alive = torch.tensor([True] * 9 + [False])
    why = asked_again(playing, MASK, playing.start, {"secagg.alive": alive})
    assert "holds no secrets for phase 2 of round 0: they are used once" in why


@pytest.mark.parametrize(
    ("phase", "change", "words"),
    [
        (SHARE_KEYS, {"secagg.members": torch.zeros(10, dtype=torch.int64)}, "there twice"),
        (SHARE_KEYS, {"secagg.keys": torch.ones(10, 2, 32, dtype=torch.uint8)}, "are the same"),
        (MASK, {"secagg.alive": torch.arange(10) < 5}, "5 of 10 members are left, 6 needed"),
        (UNMASK, {"secagg.sent": torch.arange(10) < 5}, "5 of 10 members are left, 6 needed"),
        (UNMASK, {"secagg.boxes": torch.zeros(10, 82, dtype=torch.uint8)}, "box with shares"),
    ],
)
def test_a_client_refuses_what_would_uncover_it(
    phase: int, change: dict[str, torch.Tensor], words: str
) -> None:
    assert words in refusal(phase, change)


def refusal(phase: int, change: dict[str, torch.Tensor]) -> str:
    """Return why all of ten clients refuse what a server has changed in the requests of a phase."""

    class Changed:
        """The method with a server that sends something else."""

        def __init__(self, method: Method) -> None:
            self.method = method

        def send(self, state: State, client: Client) -> Any:
            down = self.method.send(state, client)
            return {**down, **change} if state.phase == phase else down

        def __getattr__(self, name: str) -> Any:
            return getattr(self.method, name)

    playing = federation(secure(), sizes=TEN)
    playing.method = Changed(playing.method)  # type: ignore[assignment]
    playing.play(1)
    [reason] = {row.lost for row in playing.rows if row.phase == phase}
    assert reason is not None, "they must not answer"
    return reason


@pytest.mark.parametrize(("phase", "name"), [(MASK, "secagg.alive"), (UNMASK, "secagg.sent")])
@pytest.mark.parametrize(
    ("dtype", "mark"),
    [(torch.int64, 10), (torch.uint8, 10), (torch.float32, 10.0), (torch.float32, float("nan"))],
)
def test_a_mark_that_counts_for_all_members_opens_no_update(
    phase: int, name: str, dtype: torch.dtype, mark: float
) -> None:
    """With marks of one member that sum up to enough, the server would have that one's masks taken off alone."""
    marks = torch.zeros(10, dtype=dtype)
    marks[3] = mark
    due = f"'{name}' of a request of secagg is {dtype} of the shape (10,), not torch.bool of (10,)"
    assert due in refusal(phase, {name: marks})


@pytest.mark.parametrize(
    ("phase", "name", "tensor"),
    [
        (SHARE_KEYS, "secagg.members", torch.tensor(10)),
        (SHARE_KEYS, "secagg.members", torch.arange(10.0)),
        (SHARE_KEYS, "secagg.members", torch.arange(10).view(10, 1)),
        (SHARE_KEYS, "secagg.keys", torch.tensor(1, dtype=torch.uint8)),
        (SHARE_KEYS, "secagg.keys", torch.ones(9, 2, 32, dtype=torch.uint8)),
        (SHARE_KEYS, "secagg.keys", torch.ones(10, 1, 32, dtype=torch.uint8)),
        (SHARE_KEYS, "secagg.keys", torch.ones(10, 2, 31, dtype=torch.uint8)),
        (SHARE_KEYS, "secagg.keys", torch.ones(10, 2, 32, dtype=torch.bfloat16)),
        (MASK, "secagg.alive", torch.tensor(True)),
        (MASK, "secagg.alive", torch.ones(10, 1, dtype=torch.bool)),
        (MASK, "secagg.alive", torch.ones(11, dtype=torch.bool)),
        (UNMASK, "secagg.sent", torch.tensor(True)),
        (UNMASK, "secagg.sent", torch.ones(9, dtype=torch.bool)),
        (UNMASK, "secagg.boxes", torch.tensor(1, dtype=torch.uint8)),
        (UNMASK, "secagg.boxes", torch.zeros(11, 82, dtype=torch.uint8)),
        (UNMASK, "secagg.boxes", torch.zeros(10, 81, dtype=torch.uint8)),
        (UNMASK, "secagg.boxes", torch.zeros(10, 82, dtype=torch.bfloat16)),
    ],
)
def test_a_client_refuses_a_request_of_another_form(
    phase: int, name: str, tensor: torch.Tensor
) -> None:
    form = f"{tensor.dtype} of the shape {tuple(tensor.shape)}"
    assert f"'{name}' of a request of secagg is {form}, not " in refusal(phase, {name: tensor})


def test_a_request_that_lacks_something_loses_a_client_and_ends_nothing() -> None:
    worker = federation(secure()).worker
    request = Request(Kind.TRAIN, 0, CONFIG, {}, phase=SHARE_KEYS).encode()
    when = encode({"!when": torch.tensor([0, TRAIN])})
    with pytest.raises(WireError, match="lacks 'secagg.members'"):
        worker.handle([0], [request], [when])
    with pytest.raises(WireError, match="holds no secrets"):
        worker.handle([0], [request], [b""])
    beyond = Request(Kind.TRAIN, 0, CONFIG, {}, phase=4).encode()
    with pytest.raises(WireError, match="has no phase 4"):
        worker.handle([0], [beyond], [when])


# What is out of range.


def test_a_value_out_of_range_is_named_and_costs_its_client_the_round() -> None:
    """Nothing is clipped: one weight of the head starts beyond the range, and so no client can take part."""
    playing = federation(secure(range=2.0))
    state = playing.start
    head = state.shared["classifier.weight"].clone()
    head[1, 2] = 40.0
    beyond = replace(state, shared={**state.shared, "classifier.weight": head})
    after = playing.play(1, beyond)
    assert_same_state(after, replace(beyond, round=1))
    for row in playing.rows:
        assert row.phase == TRAIN
        assert row.lost is not None
        assert row.lost.startswith(
            f"client {row.client}: tensor 'classifier.weight' has the value "
        )
        assert row.lost.endswith("outside of wrap.range = 2 of secagg; declare a larger one")


def test_a_client_with_too_many_examples_is_told_so() -> None:
    playing = federation(secure(examples=9))
    playing.play(1)
    assert lost_rows(playing)[TRAIN, 1] == (
        "client 1: holds 11 examples, more than wrap.examples = 9 of secagg"
    )
    assert len([row for row in playing.rows if row.phase == UNMASK and not row.lost]) == 2


@pytest.mark.parametrize("name", NOT_MEANS)
def test_methods_that_merge_otherwise_are_refused_by_name(name: str) -> None:
    tree = {"method": {"name": name}, "wrap": [{"name": "secagg"}]}
    kind = METHODS[name].__name__
    with pytest.raises(BadInput, match=rf"^wrap.name = 'secagg': {kind} does not merge by a .*"):
        from_tree(tree)


def test_it_does_not_go_around_itself() -> None:
    nested = [{"name": "secagg"}, {"name": "secagg"}]
    with pytest.raises(BadInput, match=r"^wrap.name = 'secagg': Secure does not merge by a .*"):
        from_tree({"method": {"name": "lora"}, "wrap": nested})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("threshold", 0.5, r"wrap\[0\].threshold = 0.5: must be greater than 0.5"),
        ("bits", 33, r"wrap\[0\].bits = 33: "),
        ("smallest", 1, r"wrap\[0\].smallest = 1: must be at least 2"),
        ("range", 0.5, r"wrap\[0\].range = 0.5: must be at least 1"),
    ],
)
def test_settings_that_protect_nobody_are_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        from_tree({"wrap": [{"name": "secagg", field: value}]})


# What it costs, and what is told.


def test_bytes_are_those_of_the_formula() -> None:
    """n members, d numbers of b bytes: 64; 82 n + 32; b (d + 1); 33 n up, beside the messages' own fields."""
    playing = federation(secure(bits=40), sizes=TEN)
    start = playing.start
    playing.play(1)
    n, d = 10, sum(tensor.numel() for tensor in start.shared.values())
    due: dict[int, dict[str, tuple[int, ...]]] = {
        TRAIN: {"secagg.keys": (2, 32)},
        SHARE_KEYS: {"secagg.boxes": (n, 82), "secagg.seal": (32,)},
        MASK: {"secagg.masked": (5 * (d + 1),)},
        UNMASK: {"secagg.shares": (n, 33)},
    }
    for row in playing.rows:
        shapes = due[row.phase].items()
        payload = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in shapes}
        assert row.up == len(Response(0, payload).encode())


def test_what_is_sent_to_all_members_is_encoded_once() -> None:
    playing = federation(secure(), sizes=TEN)
    playing.play(1)
    for phase in (TRAIN, SHARE_KEYS, MASK):
        first, *others = [request for request, _ in playing.engine.talks[phase].values()]
        assert all(other is first for other in others)


def test_lora_on_minilm_costs_less_than_1_4_times_the_bytes() -> None:
    """LoRA of rank 8 on query and value of 6 layers of width 384, a head for 20 labels, 20 clients: no model is needed."""
    shared = {"classifier.weight": torch.zeros(20, 384), "classifier.bias": torch.zeros(20)}
    for layer in range(6):
        for part in ("query", "value"):
            name = f"bert.encoder.layer.{layer}.attention.self.{part}"
            shared |= {f"{name}:A": torch.zeros(8, 384), f"{name}:B": torch.zeros(384, 8)}
    n, d = 20, sum(tensor.numel() for tensor in shared.values())

    def request(payload: Any) -> int:
        return len(Request(Kind.TRAIN, 0, CONFIG, payload).encode())

    def reply(payload: Any) -> int:
        return len(Response(0, payload).encode())

    def raw(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    ids, marks = torch.arange(n), torch.ones(n, dtype=torch.bool)
    plain = request(shared) + reply(shared)
    down = [
        request(shared),
        request({"secagg.members": ids, "secagg.keys": raw(n, 2, 32)}),
        request({"secagg.alive": marks}),
        request({"secagg.sent": marks, "secagg.boxes": raw(n, 82)}),
    ]
    up = [
        reply({"secagg.keys": raw(2, 32)}),
        reply({"secagg.boxes": raw(n, 82), "secagg.seal": raw(32)}),
        reply({"secagg.masked": raw(5 * (d + 1))}),
        reply({"secagg.shares": raw(n, 33)}),
    ]
    ratio = (sum(down) + sum(up)) / plain
    print(f"{sum(down) + sum(up)} bytes over {plain}: {ratio:.3f}")
    assert 1 < ratio < 1.4


def test_replies_do_not_tell_how_many_examples_they_are_of() -> None:
    playing = federation(secure())
    playing.play(1)
    for exchange in range(4):
        for response in playing.answers(exchange).values():
            told = response.measured
            assert response.status is Status.DISCREET
            assert (told.examples, told.steps, told.loss) == (0, 0, None)
    assert not [row for row in playing.rows if row.lost or row.measured.examples]
