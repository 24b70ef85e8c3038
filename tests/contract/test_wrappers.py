"""Wrappers go around every method: at rest they change nothing, at work they do what is written, and none sees another's."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from fedpeft.errors import BadInput
from fedpeft.experiment.config import from_tree
from fedpeft.federation import checkpoint
from fedpeft.methods import METHODS
from fedpeft.types import Client, Method, State, Update
from fedpeft.wrappers import (
    WRAPPERS,
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedProx,
    FedYogi,
    Krum,
    Median,
    NormClip,
    Quantise,
    Scaffold,
    TopK,
    TrimmedMean,
)
from fedpeft.wrappers.fedprox import pull
from fedpeft.wrappers.wrapper import Wrapper
from tests.contract.reference import (
    NOT_MEANS,
    PHASES,
    ROUNDS,
    core_rows,
    is_mean,
    reference,
    unmeasured,
)
from tests.tiny import (
    NAMES,
    TinyFederation,
    assert_same,
    assert_same_state,
    base_of,
    bert,
    close,
    federation,
    small,
)

ON_CLIENTS: Mapping[str, Wrapper] = {
    "scaffold": Scaffold(),
    "quantise": Quantise(),
    "quantise, both ways": Quantise(up="int4", down="bf16"),
    "top_k": TopK(density=0.3),
}
"""Wrappers that change what clients do, beside FedProx."""
ON_SERVER: Mapping[str, Wrapper] = {
    "fedadam": FedAdam(),
    "fedyogi": FedYogi(),
    "fedadagrad": FedAdagrad(),
    "norm_clip": NormClip(norm=0.5),
    "median": Median(),
    "trimmed_mean": TrimmedMean(share=0.4),
    "krum": Krum(malicious=0, keep=2),
    "bulyan": Bulyan(malicious=0),
}
"""Wrappers that change what the server does with replies, beside FedAvgM."""
OF_MEANS = ("scaffold", "median", "trimmed_mean", "krum", "bulyan")
"""Wrappers that go around methods of means alone."""
REFUSED = {
    **{("local_only", kind): "sends no real numbers up" for kind in ("quantise", "top_k")},
    ("local_only", "quantise, both ways"): "sends no real numbers up",
    ("local_only", "norm_clip"): "sends no real numbers up",
    **dict.fromkeys(
        product(["flora", "florist", "fed_sb", "adalora"], ["top_k", "norm_clip"]), "sends up"
    ),
    **{("lora_a2", kind): "sends no real numbers up" for kind in ("top_k", "norm_clip")},
    **dict.fromkeys(product(NOT_MEANS, OF_MEANS), "does not merge by a weighted mean"),
}
"""(method, wrapper) that do not go together, and why."""
ROWS = core_rows(ON_CLIENTS, without=REFUSED)
SERVER_ROWS = core_rows(ON_SERVER, without=REFUSED)

BASE = base_of(bert())

EXCHANGING = [name for name in NAMES if name != "local_only"]
IN_ONE_STAGE = [name for name in EXCHANGING if name not in {"slora", "slora_full"}]


def twice(method: Method, momentum: float) -> Method:
    """Return ``method`` inside two wrappers of one kind, whose velocities must not meet."""
    inside = FedAvgM(momentum=momentum).around(method, "1.fedavgm")
    return FedAvgM(momentum=momentum).around(inside, "0.fedavgm")


def bare(state: State) -> State:
    """Return the state as the method inside ``twice`` knows it."""
    return state.without("0.fedavgm").without("1.fedavgm")


@pytest.mark.parametrize("name", core_rows())
def test_a_term_of_weight_nothing_changes_no_bit(name: str) -> None:
    around = federation(FedProx(mu=0.0).around(small(name), "0.fedprox"))
    assert_same_state(around.play(ROUNDS), reference(name).states[ROUNDS])


@pytest.mark.parametrize("name", core_rows())
def test_wrappers_at_rest_leave_every_method_as_it_is(name: str) -> None:
    """Masks, anchors, seeds and stages are there as ever, and nothing of the wrappers' travels."""
    around = federation(twice(small(name), momentum=0.0))
    due = reference(name).states[ROUNDS]
    last = around.play(ROUNDS)
    close(bare(last).shared, due.shared, 1e-5)
    assert bare(last).server.keys() == due.server.keys()
    assert (last.round, last.memories) == (due.round, due.memories)
    plain = reference(name).playing.rows
    assert [(row.down, row.up) for row in around.rows] == [(row.down, row.up) for row in plain]


@pytest.mark.parametrize("name", core_rows())
def test_a_wrapped_run_that_is_resumed_ends_as_one_that_went_on(name: str, tmp_path: Path) -> None:
    method = FedProx(mu=0.1).around(twice(small(name), momentum=0.5), "2.fedprox")
    playing = federation(method)
    half = playing.play(2)
    checkpoint.save(tmp_path, half, deepcopy(playing.memories), 0, "c")
    last = playing.play(2, half)
    found = checkpoint.load(tmp_path, ["c"], pytest.fail)
    assert found is not None
    resumed = federation(method, memories=found.memories)
    assert_same_state(resumed.play(2, found.state), last)
    assert unmeasured(resumed.rows) == [row for row in unmeasured(playing.rows) if row.round >= 2]


def test_every_wrapper_is_tried_around_every_method() -> None:
    tried = {kind.partition(",")[0] for kind in (*ON_CLIENTS, *ON_SERVER)}
    elsewhere = {"fedprox", "fedavgm", "secagg", "dp", "dpsgd"}
    assert tried | elsewhere >= WRAPPERS.keys()


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_does_not_go_together_is_refused_by_name(name: str, kind: str) -> None:
    wrapper = {**ON_CLIENTS, **ON_SERVER}[kind]
    with pytest.raises(BadInput) as refused:
        wrapper.around(small(name), "0.it").init(BASE, 0)
    wrapper_name = kind.partition(",")[0]
    says = f"wrap.name = '{wrapper_name}': {type(small(name)).__name__} {REFUSED[name, kind]}"
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_two_rounds_are_played_and_resumed_to_the_bit(name: str, kind: str, tmp_path: Path) -> None:
    method = ON_CLIENTS[kind].around(small(name), "0.it")
    playing = federation(method)
    half = playing.play(1)
    checkpoint.save(tmp_path, half, deepcopy(playing.memories), 0, "c")
    last = playing.play(1, half)
    assert not [row.lost for row in playing.rows if row.lost]
    assert all(tensor.isfinite().all() for tensor in last.shared.values())
    found = checkpoint.load(tmp_path, ["c"], pytest.fail)
    assert found is not None
    resumed = federation(method, memories=found.memories)
    assert_same_state(resumed.play(1, found.state), last)
    assert unmeasured(resumed.rows) == [row for row in unmeasured(playing.rows) if row.round]
    for client, version in last.memories.items():
        assert resumed.memories.get(client, version) == playing.memories.get(client, version)
    check_travel(name, kind, playing)


def check_travel(name: str, kind: str, playing: TinyFederation) -> None:
    """Assert that what a wrapper keeps in a memory is no news of the method, and that few bytes travel."""
    plain = reference(name).rows_of(0, 2)
    if kind in ("quantise", "top_k") and name != "fedara":  # whose dying ranks depend on replies
        assert [row.down for row in playing.rows] == [row.down for row in plain]
    if kind != "scaffold":
        last = PHASES.get(name, 1) - 1
        for row, due in zip(playing.rows, plain, strict=True):
            assert row.up < due.up or row.phase < last


@pytest.mark.parametrize(("name", "kind"), SERVER_ROWS)
def test_two_rounds_are_merged_and_resumed_to_the_bit(name: str, kind: str) -> None:
    method = ON_SERVER[kind].around(small(name), "0.it")
    # The form of FedARA's second round depends on how the first one was merged, and LoRA-A2's
    # second exchange on what clients have chosen in the first.
    if name in {"fedara", "lora_a2"}:
        playing = federation(method)
        assert_same_state(playing.play(1, playing.play(1)), federation(method).play(2))
        assert not [row.lost for row in playing.rows if row.lost]
        return
    state = saved = method.init(BASE, 0)
    for begin in range(2):
        updates: list[Update] = []
        for client, response in reference(name).playing.answers(begin).items():
            updates.append(Update(Client(client), response.measured.examples, response.payload))
        merged = method.receive(state, updates)
        if name != "local_only":
            both = state.shared.keys() & merged.shared.keys()  # not all, across SLoRA's bridge
            assert any(not torch.equal(merged.shared[part], state.shared[part]) for part in both)
        again = method.receive(saved, updates)
        assert_same_state(again, merged)
        state, saved = merged, checkpoint.unpack(checkpoint.pack(again))
    assert state.round == 2
    assert_same(method.receive(state, ()).shared, state.shared)


@pytest.mark.parametrize("name", [name for name in EXCHANGING if is_mean(name, 0)])
def test_the_pull_keeps_clients_nearer_to_where_they_began(name: str) -> None:
    def moved(method: Method) -> float:
        playing = federation(method)
        first = playing.start
        last = playing.play(1)
        distances = [
            float((last.shared[part] - tensor).double().square().sum())
            for part, tensor in first.shared.items()
            if part in last.shared and last.shared[part].shape == tensor.shape
        ]
        return sum(distances)

    free, held = moved(small(name)), moved(FedProx(mu=1.0).around(small(name), "0.fedprox"))
    assert 0 < held < free


def test_the_pull_is_the_gradient_of_the_proximal_term() -> None:
    """mu / 2 * |w - w_0|^2, for the clients still at work and nobody else."""
    draw = torch.Generator().manual_seed(0)
    begin = torch.randn(3, 2, 4, generator=draw)
    parameter = nn.Parameter(torch.randn(3, 2, 4, generator=draw))
    term = 0.7 / 2 * (parameter[:2] - begin[:2]).square().sum()
    [due] = torch.autograd.grad(term, [parameter])
    own = torch.randn(3, 2, 4, generator=draw)
    parameter.grad = own.clone()
    unused = nn.Parameter(torch.ones(3, 1))
    trainable = {"w": parameter, "unused": unused}
    pull(trainable, {"w": begin, "unused": torch.zeros(3, 1)}, slice(0, 2), 0.7)
    torch.testing.assert_close(parameter.grad, own + due)
    assert unused.grad is None


@pytest.mark.parametrize("name", IN_ONE_STAGE)
def test_the_server_steps_along_its_velocity(name: str) -> None:
    """v <- 0.5 v + (mean - w), w <- w + 0.25 v, worked out from the means that the method inside gives."""
    method = FedAvgM(momentum=0.5, rate=0.25).around(small(name), "0.fedavgm")
    playing = federation(method)
    before = playing.play(1)
    inside = federation(small(name), memories=deepcopy(playing.memories))
    after = playing.play(1, before)
    mean = inside.play(1, before.without("0.fedavgm"))
    velocity = before.slice_of("0.fedavgm")
    assert velocity
    for part, tensor in velocity.items():
        due = 0.5 * tensor + (mean.shared[part] - before.shared[part])
        torch.testing.assert_close(after.slice_of("0.fedavgm")[part], due)
        torch.testing.assert_close(after.shared[part], before.shared[part] + 0.25 * due)


@pytest.mark.parametrize("name", IN_ONE_STAGE)
def test_a_silent_round_changes_neither_the_state_nor_the_velocity(name: str) -> None:
    method = twice(small(name), momentum=0.9)
    before = federation(method).play(1)
    after = method.receive(before, ())
    assert_same_state(after, replace(before, round=2))


def test_what_a_wrapper_keeps_is_not_sent() -> None:
    """FeDeRA sends all that it keeps on the server to a client that is new."""
    method = twice(small("federa"), momentum=0.9)
    state = federation(method).play(1)
    assert state.slice_of("0.fedavgm")
    sent = method.send(state, Client(9))
    assert sent.keys() == small("federa").send(bare(state), Client(9)).keys()


def test_a_bridge_between_stages_begins_at_rest() -> None:
    """SLoRA's factors are no continuation of its sparse values."""
    playing = federation(FedAvgM(momentum=0.9).around(small("slora"), "0.fedavgm"))
    sparse = playing.play(1)
    assert any(part.endswith(":values") for part in sparse.slice_of("0.fedavgm"))
    bridged = playing.play(1, sparse)
    assert not any(":" in part for part in bridged.slice_of("0.fedavgm"))
    assert not any(part.endswith(":values") for part in bridged.shared)


def test_wrap_tables_are_read_outermost_first() -> None:
    tables = [{"name": "fedavgm", "momentum": 0.5}, {"name": "fedprox", "mu": 0.2}]
    method = from_tree({"method": {"name": "lora"}, "wrap": tables}).build_method()
    inside = FedProx(mu=0.2).around(METHODS["lora"](), "1.fedprox")
    assert method == FedAvgM(momentum=0.5).around(inside, "0.fedavgm")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"name": "fedprx"}, r"wrap\[0\].name = 'fedprx' is not a wrapper; did you mean 'fedprox'"),
        ({"mu": 1.0}, r"wrap\[0\].name = None is not a wrapper; choose from: fedprox, fedavgm"),
        ({"name": "fedprox", "nu": 1.0}, r"unknown key 'wrap\[0\].nu'; did you mean 'mu'"),
        ({"name": "fedprox", "mu": -1.0}, r"wrap\[0\].mu = -1.0: must be at least 0"),
        (
            {"name": "quantise", "up": "int2"},
            r"wrap\[0\].up = 'int2': input should be 'bf16', 'int8'",
        ),
        ({"name": "top_k", "density": 0.0}, r"wrap\[0\].density = 0.0: must be greater than 0"),
        ({"name": "trimmed_mean", "share": 0.5}, r"wrap\[0\].share = 0.5: must be less than 0.5"),
        ({"name": "krum", "keep": 0}, r"wrap\[0\].keep = 0: must be at least 1"),
        ({"name": "scaffold", "clients": 0}, r"wrap\[0\].clients = 0: must be at least 1"),
    ],
)
def test_a_table_that_is_no_wrapper_is_refused_in_one_line(
    table: dict[str, object], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        from_tree({"wrap": [table]})
