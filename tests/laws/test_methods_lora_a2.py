"""LoRA-A2: each client's own ranks by equation 4, trained as under a mask, and merged exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from fedpeft.algebra.choice import contributions
from fedpeft.algebra.importance import unpack
from fedpeft.engines.local import LocalEngine
from fedpeft.errors import BadInput
from fedpeft.experiment.config import from_tree
from fedpeft.experiment.privacy import trainings
from fedpeft.methods.ffa_lora import FFALoRA
from fedpeft.methods.lora_a2 import LoRAA2
from fedpeft.methods.rolora import RoLoRA
from fedpeft.training.evaluation import mounted_state
from fedpeft.training.loop import Training
from fedpeft.types import Client, Context, LocalTask, Lost, Method, Payload, Reply, State
from fedpeft.wire.messages import Response, decode, encode
from fedpeft.wrappers import FedAvgM, Quantise
from tests.products import LAYERS, SCALE, added, fleet, shares
from tests.tiny import (
    CPU,
    HEAD,
    SEED,
    SGD,
    TARGETS,
    TinyFederation,
    assert_same,
    assert_same_state,
    base_of,
    bert,
    close,
    federation,
)

RANK = 4
CHOSEN = 2
ADAMW = Training(lr=3e-2, weight_decay=0.1, batch_size=6)


def method(**changes: Any) -> LoRAA2:
    """Return LoRA-A2 with small settings, at one learning rate."""
    settings: dict[str, Any] = {"rank": RANK, "chosen": CHOSEN, "scale": SCALE, "b_rate": 1.0}
    return LoRAA2(**{"targets": TARGETS, **settings, **changes})


def chosen(playing: TinyFederation, exchange: int) -> dict[int, dict[str, Tensor]]:
    """Return which ranks of each module every client has chosen, (r,) of bool."""
    found: dict[int, dict[str, Tensor]] = {}
    for client, answer in playing.answers(exchange).items():
        whole = unpack(answer.payload["chosen"], RANK * len(LAYERS)).view(len(LAYERS), RANK)
        found[client] = dict(zip(sorted(LAYERS), whole, strict=True))
    return found


def test_a_client_chooses_the_ranks_whose_products_have_moved_the_most() -> None:
    """Its probing pass is a round of FFA-LoRA; each rank's change is worked out as a matrix."""
    playing, probing = federation(method()), federation(FFALoRA(TARGETS, RANK, SCALE))
    start = playing.start.shared
    playing.play(1)
    probing.play(1)
    choices = chosen(playing, 0)
    for client, answer in probing.answers(0).items():
        norms: dict[tuple[str, int], float] = {}
        for module in LAYERS:
            dB = answer.payload[f"{module}:B"] - start[f"{module}:B"]
            for i in range(RANK):
                change = torch.outer(dB[:, i], start[f"{module}:A"][i])
                norms[module, i] = float(torch.linalg.matrix_norm(change))
        best = sorted(norms, key=lambda rank: -norms[rank])[: CHOSEN * len(LAYERS)]
        for module in LAYERS:
            due = [(module, i) in best for i in range(RANK)]
            assert choices[client][module].tolist() == due


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_ranks_score_is_the_norm_of_its_change_of_the_product(part: str) -> None:
    """Equation 4, of clients and modules of unequal sizes, with norms of the factor at rest far apart."""
    draw = torch.Generator().manual_seed(0)
    before: dict[str, Tensor] = {}
    for module, (out, width) in {"key": (5, 7), "value": (6, 4)}.items():
        sizes = 10.0 ** torch.randn(2, 3, generator=draw)
        before[f"{module}:A"] = torch.randn(2, 3, width, generator=draw) * sizes.unsqueeze(2)
        before[f"{module}:B"] = torch.randn(2, out, 3, generator=draw) * sizes.unsqueeze(1)
    after: dict[str, Tensor] = {}
    for name, tensor in before.items():
        if name.endswith(part):
            after[name] = tensor + torch.randn(tensor.shape, generator=draw)
    found = contributions(before, after, part)
    for client in range(2):
        due: list[float] = []
        for module in ("key", "value"):
            now = {**before, **after}
            for i in range(3):
                was = torch.outer(
                    before[f"{module}:B"][client, :, i], before[f"{module}:A"][client, i]
                )
                new = torch.outer(now[f"{module}:B"][client, :, i], now[f"{module}:A"][client, i])
                due.append(float(torch.linalg.matrix_norm(new - was)))
        torch.testing.assert_close(found[client], torch.tensor(due), rtol=1e-4, atol=1e-4)


@final
@dataclass(frozen=True)
class UnderMasks:
    """RoLoRA with gradients of 0 in all ranks but those that each client has chosen (equation 6)."""

    inner: RoLoRA
    choices: dict[int, dict[str, Tensor]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        [client] = context.clients

        def after_backward(active: slice) -> None:
            del active
            for name, parameter in task.trainable.items():
                module, _, part = name.partition(":")
                if part and parameter.grad is not None:
                    keeps = self.choices[client][module].float()
                    parameter.grad *= keeps if part == "B" else keeps.unsqueeze(1)

        with self.inner.mount(model, down, memory, context) as task:
            yield replace(task, after_backward=after_backward)


def masked(playing: TinyFederation, number: int) -> dict[int, Response]:
    """Return what clients reply who train under masks of what they have chosen in round ``number``."""
    inner: Any = UnderMasks(RoLoRA(TARGETS, RANK, SCALE), chosen(playing, 2 * number))
    other = federation(inner)
    start = state_of(playing, number)
    other.play(1, State(number, start.shared))
    return other.answers(0)


def state_of(playing: TinyFederation, number: int) -> State:
    """Return the state before round ``number``."""
    again = federation(playing.method)
    return again.play(number) if number else again.start


@pytest.mark.parametrize(("number", "part"), [(0, "B"), (1, "A")])
def test_chosen_ranks_are_trained_as_under_a_mask_and_their_differences_go_up(
    number: int, part: str
) -> None:
    playing = federation(method())
    playing.play(number + 1)
    begin = state_of(playing, number).shared
    answers = playing.answers(2 * number + 1)
    choices = chosen(playing, 2 * number)
    for client, due in masked(playing, number).items():
        up = answers[client].payload
        assert up.keys() == {"chosen.32"} | HEAD
        rows: list[Tensor] = []
        for module in sorted(LAYERS):
            moved = due.payload[f"{module}:{part}"] - begin[f"{module}:{part}"]
            vectors = moved.T if part == "B" else moved
            keeps = choices[client][module]
            assert not vectors[~keeps].any(), "the mask of the reference works"
            rows.append(vectors[keeps])
        torch.testing.assert_close(up["chosen.32"], torch.cat(rows), rtol=1e-4, atol=1e-6)
        for name in HEAD:
            torch.testing.assert_close(
                up[name], due.payload[name] - begin[name], rtol=1e-4, atol=1e-6
            )


def test_the_merge_is_exact_and_what_is_not_chosen_counts_as_no_difference() -> None:
    playing = federation(method())
    states = [playing.start]
    for number, part in enumerate("BABA"):
        states.append(playing.play(1, states[-1]))
        before, after = states[number].shared, states[number + 1].shared
        answers = masked(playing, number)
        moved, was = added(playing, states[number + 1]), added(playing, states[number])
        resting = {"A": "B", "B": "A"}[part]
        for module in LAYERS:
            assert torch.equal(after[f"{module}:{resting}"], before[f"{module}:{resting}"])
            exact = torch.zeros(32, 32, dtype=torch.float64)
            for share, answer in zip(shares(answers.values()), answers.values(), strict=True):
                whole = {**before, **answer.payload}
                exact += share * whole[f"{module}:B"].double() @ whole[f"{module}:A"].double()
            change = SCALE * exact - was[module]
            error = (moved[module] - was[module] - change).norm()
            assert error < 1e-3 * change.norm() + 1e-7  # of some module nobody has chosen anything
        for name in HEAD:
            mean = sum(
                share * answer.payload[name].double()
                for share, answer in zip(shares(answers.values()), answers.values(), strict=True)
            )
            torch.testing.assert_close(after[name].double(), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_with_all_ranks_chosen_it_is_rolora(training: Training) -> None:
    """Also with weight decay, which pulls at what is chosen and at nothing else."""
    ours = federation(method(chosen=RANK), training=training).play(4)
    theirs = federation(RoLoRA(TARGETS, RANK, SCALE), training=training).play(4)
    close(ours.shared, theirs.shared, 2e-4 if training is ADAMW else 1e-5)


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_k_clients_at_once_equal_k_one_by_one(targets: str) -> None:
    """In both exchanges; where vectors have unequal lengths, those whose choice has one form."""
    trying = method(targets=targets, b_rate=5.0)
    alone, beside = federation(trying), federation(trying)
    beside.engine.engine = LocalEngine(beside.worker, beside.memories, stack=3)
    last, together = alone.play(3), beside.play(3)
    close(together.shared, last.shared, 1e-4)
    assert together.memories == last.memories
    for row in beside.rows:
        if row.phase == 0 or targets == TARGETS:
            assert row.measured.shared_by == 3
    assert not [row.lost for row in (*alone.rows, *beside.rows) if row.lost]
    if targets == TARGETS:
        ranks = [tuple(int(m.sum()) for m in one.values()) for one in chosen(alone, 0).values()]
        assert len(set(ranks)) > 1, "clients choose unequal numbers of ranks of a module"
        trained = {row.measured.trained for row in alone.rows if row.phase}
        assert trained == {CHOSEN * len(LAYERS) * 32 + 99}


def test_no_number_goes_down_a_second_time_and_no_client_keeps_what_it_was_sent() -> None:
    playing = federation(method())
    last = playing.play(2)
    for exchange, talk in enumerate(playing.engine.talks):
        for request, _ in talk.values():
            down = {n: t for n, t in decode(request).items() if not n.startswith("@")}
            assert bool(sum(tensor.numel() for tensor in down.values())) == (exchange % 2 == 0)
    for client, version in last.memories.items():
        assert list(decode(playing.memories.get(client, version))) == ["!done"]
    assert not last.server


def test_a_client_of_lower_capacity_chooses_its_share_over_all_layers() -> None:
    playing = federation(method())
    playing.play(1, cohort=lambda _: fleet({0: 1.0, 1: 0.5, 2: 0.13}))
    counts = {k: sum(int(m.sum()) for m in one.values()) for k, one in chosen(playing, 0).items()}
    assert counts == {0: 8, 1: 4, 2: 1}
    assert not [row.lost for row in playing.rows if row.lost]
    with pytest.raises(BadInput, match=r"less than one of method.chosen \* layers = 8"):
        playing.play(1, cohort=lambda _: fleet({0: 0.1}))


def test_a_choice_that_is_not_the_clients_own_costs_it_the_round() -> None:
    """Its reply has the form of what it has chosen, and the server asks for that of what came up."""

    def forge(exchange: int, outcome: Reply | Lost) -> Reply | Lost:
        if exchange or outcome.client.id != 1:
            return outcome
        fields = decode(outcome.blob)
        none = torch.zeros_like(fields["chosen"])
        return Reply(outcome.client, encode({**fields, "chosen": none}))

    playing, others = federation(method(), forge), federation(method())
    after = playing.play(1)
    without = others.play(1, cohort=lambda _: [c for c in others.clients() if c.id != 1])
    assert_same(after.shared, without.shared)
    [lost] = [row for row in playing.rows if row.lost]
    assert (lost.client, lost.phase) == (1, 1)


def test_after_a_silent_round_nothing_has_moved_and_a_still_chooses() -> None:
    """Without any B no rank of A matters; the first ones are as good as others, and the head goes on."""
    playing = federation(method())
    silent = playing.play(1, min_replies=4)
    assert_same_state(silent, replace(playing.start, round=1))
    after = playing.play(1, silent)
    assert not [row.lost for row in playing.rows if row.lost and row.round]
    for name, tensor in after.shared.items():
        assert torch.equal(tensor, silent.shared[name]) == (name not in HEAD)


def test_probing_takes_no_more_steps_than_it_may() -> None:
    playing = federation(method(probe_steps=1))
    playing.play(1)
    assert [row.measured.steps for row in playing.rows] == [1, 1, 1, 2, 2, 2]


def test_b_is_trained_at_a_rate_of_its_own() -> None:
    """The paper's 5 times that of A."""
    trying = LoRAA2(TARGETS, RANK, CHOSEN)
    for number, rate in ((0, 5.0), (1, 1.0)):
        state = replace(trying.init(base_of(bert()), SEED), round=number)
        with mounted_state(trying, state, bert(), CPU, SEED, Client(0)) as local:
            assert local.rate == rate


def test_there_are_no_more_ranks_to_choose_than_an_adapter_has() -> None:
    with pytest.raises(BadInput, match=r"method.chosen = 5: choose 1 to method.rank = 4"):
        method(chosen=5).init(base_of(bert()), SEED)


@pytest.mark.parametrize("optimizer", [False, True])
def test_chosen_ranks_travel_in_8_bits(optimizer: bool) -> None:
    """n / 4 of the bytes and a scale a row, and the merge is off by what 255 steps leave."""
    inside: Method = method()
    if optimizer:  # at rest: it takes the step to the mean
        inside = FedAvgM(momentum=0.0).around(inside, "1.fedavgm")
    plain, coded = federation(method()), federation(Quantise().around(inside, "0.quantise"))
    due, found = plain.play(1), coded.play(1)
    for name, tensor in due.shared.items():
        torch.testing.assert_close(found.shared[name], tensor, rtol=0, atol=3e-3)
    ups = [[row.up for row in one.rows if row.phase] for one in (plain, coded)]
    assert all(small < large / 2 for large, small in zip(*ups, strict=True))


@pytest.mark.parametrize("modules", [1, 4])
def test_chosen_ranks_alone_are_something_to_compress(modules: int) -> None:
    """A language model has no head that is sent; nor do few ranks fill a byte."""
    base = replace(base_of(bert()), head=frozenset())
    targets = sorted(LAYERS)[:modules]
    state = Quantise().around(method(targets=targets), "0.quantise").init(base, SEED)
    assert len(state.shared) == 2 * modules


def test_dp_sgd_counts_both_of_its_trainings() -> None:
    for name, count in (("lora_a2", 2), ("lora", 1)):
        assert (
            trainings(from_tree({"method": {"name": name}, "wrap": [{"name": "dpsgd"}]})) == count
        )
