"""Optimizers and robust merges on the server: Flower's own are the yardstick, on numbers that the test draws."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAdagrad as TheirAdagrad
from flwr.server.strategy import FedAdam as TheirAdam
from flwr.server.strategy import FedAvgM as TheirAvgM
from flwr.server.strategy import FedYogi as TheirYogi
from flwr.server.strategy.aggregate import (
    aggregate_bulyan,
    aggregate_krum,
    aggregate_median,
    aggregate_trimmed_avg,
)
from torch import Tensor

from fedpeft.algebra.averaging import Weighting
from fedpeft.errors import BadInput
from fedpeft.experiment.compare import plan
from fedpeft.experiment.config import from_tree
from fedpeft.experiment.wrapping import check_replies
from fedpeft.federation import checkpoint
from fedpeft.methods import METHODS
from fedpeft.types import Client, State, Update
from fedpeft.wrappers import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    Krum,
    Median,
    NormClip,
    Scaffold,
    TrimmedMean,
)
from fedpeft.wrappers.robust import Summand, around
from fedpeft.wrappers.wrapper import Wrapper
from tests.contract.reference import NOT_MEANS, reference
from tests.drifting import SHAPES, Drifting, drawn
from tests.tiny import assert_same_state, base_of, bert, close, federation, small

NAMES = list(SHAPES)
# Flower says that its older strategies will go one day.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:flwr")


def arrays(payload: Mapping[str, Tensor]) -> list[np.ndarray[Any, Any]]:
    """Return tensors as Flower has them."""
    return [payload[name].numpy() for name in NAMES]


def replies(state: State, round_number: int, count: int) -> list[Update]:
    """Return what clients reply to a state: it, moved by numbers that are drawn."""
    moves = drawn(seed=3)
    updates = []
    for client in range(count):
        moved = moves(round_number, client)
        payload = {name: state.shared[name] + moved[name] for name in NAMES}
        votes = torch.tensor(client)
        updates.append(Update(Client(client), 3 + 2 * client, {**payload, "votes": votes}))
    return updates


def fit_results(updates: Sequence[Update]) -> list[Any]:
    """Return replies as Flower's strategies take them."""
    status = Status(Code.OK, "")
    results = []
    for update in updates:
        parameters = ndarrays_to_parameters(arrays(update.payload))
        results.append((None, FitRes(status, parameters, update.examples, {})))
    return results


OPTIMIZERS: Mapping[str, tuple[Wrapper, Callable[[Any], Any]]] = {
    "fedavgm": (
        FedAvgM(momentum=0.8, rate=0.7),
        lambda first: TheirAvgM(
            initial_parameters=first, server_momentum=0.8, server_learning_rate=0.7
        ),
    ),
    "fedadam": (
        FedAdam(rate=0.05, beta1=0.8, beta2=0.95, tau=1e-2),
        lambda first: TheirAdam(
            initial_parameters=first, eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2
        ),
    ),
    "fedyogi": (
        FedYogi(rate=0.05, beta1=0.8, beta2=0.95, tau=1e-2),
        lambda first: TheirYogi(
            initial_parameters=first, eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2
        ),
    ),
    "fedadagrad": (
        FedAdagrad(rate=0.05, tau=1e-2),
        lambda first: TheirAdagrad(initial_parameters=first, eta=0.05, tau=1e-2),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_leaves_the_same_trace_as_flowers(name: str) -> None:
    ours, theirs = OPTIMIZERS[name]
    method = ours.around(Drifting(drawn()), "0.it")
    state = method.init(base_of(bert()), 0)
    strategy = theirs(ndarrays_to_parameters(arrays(state.shared)))
    for round_number in range(6):
        updates = replies(state, round_number, 4)
        state = method.receive(state, updates)
        parameters, _ = strategy.aggregate_fit(round_number + 1, fit_results(updates), [])
        for mine, due in zip(arrays(state.shared), parameters_to_ndarrays(parameters), strict=True):
            np.testing.assert_allclose(mine, due, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_its_state_to_the_bit_and_rests_when_all_are_silent(
    name: str,
) -> None:
    method = OPTIMIZERS[name][0].around(Drifting(drawn()), "0.it")
    state = method.init(base_of(bert()), 0)
    for round_number in range(2):
        state = method.receive(state, replies(state, round_number, 3))
    saved = checkpoint.unpack(checkpoint.pack(state))
    assert_same_state(saved, state)
    one = method.receive(state, replies(state, 2, 3))
    other = method.receive(saved, replies(saved, 2, 3))
    assert_same_state(one, other)
    assert one.slice_of("0.it")
    silent = method.receive(one, ())
    assert silent.round == 4
    close(silent.shared, one.shared, 0.0)
    close(silent.server, one.server, 0.0)


RULES: Mapping[str, tuple[Wrapper, Callable[[list[Any]], Any]]] = {
    "median": (Median(), aggregate_median),
    "trimmed": (TrimmedMean(share=0.2), lambda results: aggregate_trimmed_avg(results, 0.2)),
    "half": (TrimmedMean(share=0.45), lambda results: aggregate_trimmed_avg(results, 0.45)),
    "krum": (Krum(malicious=2), lambda results: aggregate_krum(results, 2, 0)),
    "multi-krum": (Krum(malicious=2, keep=4), lambda results: aggregate_krum(results, 2, 4)),
    "bulyan": (
        Bulyan(malicious=1),
        lambda results: aggregate_bulyan(results, 1, aggregate_krum, to_keep=0),
    ),
    "bulyan of all": (
        Bulyan(malicious=0),
        lambda results: aggregate_bulyan(results, 0, aggregate_krum, to_keep=0),
    ),
}


@pytest.mark.parametrize("count", [7, 8, 12])
@pytest.mark.parametrize("name", RULES)
def test_a_robust_merge_gives_what_flowers_gives(name: str, count: int) -> None:
    wrapper, theirs = RULES[name]
    method = wrapper.around(Drifting(drawn()), "0.it")
    state = method.init(base_of(bert()), 0)
    updates = replies(state, 0, count)
    due = theirs([(arrays(update.payload), update.examples) for update in updates])
    after = method.receive(state, updates)
    for mine, their in zip(arrays(after.shared), due, strict=True):
        np.testing.assert_allclose(mine, their, rtol=1e-6, atol=1e-6)
    assert after.round == 1


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_multi_krum_averages_by_the_methods_weights(weighting: Weighting) -> None:
    """With all replies kept it is the method's own mean."""
    plain = Drifting(drawn(), weighting)
    robust = Krum(malicious=0, keep=5).around(Drifting(drawn(), weighting), "0.krum")
    state = plain.init(base_of(bert()), 0)
    updates = replies(state, 0, 5)
    assert_same_state(robust.receive(state, updates), plain.receive(state, updates))


@pytest.mark.parametrize("name", [name for name in RULES if name != "bulyan of all"])
def test_a_forged_reply_moves_the_mean_and_not_a_robust_merge(name: str) -> None:
    wrapper, _ = RULES[name]
    plain = Drifting(drawn())
    state = plain.init(base_of(bert()), 0)
    honest = replies(state, 0, 8)
    forged = [*honest[:-1], Update(Client(7), 10**6, {**honest[-1].payload})]
    for part in NAMES:
        forged[-1].payload[part] = torch.full(SHAPES[part], 1e6)  # type: ignore[index]
    assert float(plain.receive(state, forged).shared["wide"].min()) > 1e5
    bent = wrapper.around(Drifting(drawn()), "0.it").receive(state, forged)
    for part in NAMES:
        stack = torch.stack([update.payload[part] for update in honest[:-1]])
        assert (bent.shared[part] >= stack.amin(0) - 1e-6).all()
        assert (bent.shared[part] <= stack.amax(0) + 1e-6).all()


def test_a_silent_round_changes_nothing() -> None:
    for wrapper, _ in RULES.values():
        method = wrapper.around(Drifting(drawn()), "0.it")
        state = method.init(base_of(bert()), 0)
        close(method.receive(state, ()).shared, state.shared, 0.0)


@pytest.mark.parametrize(
    ("wrapper", "says"),
    [
        (Krum(malicious=1), "krum: 3 replies, 5 needed"),
        (Krum(malicious=0, keep=4), "krum: 3 replies, 4 needed"),
        (Bulyan(malicious=1), "bulyan: 3 replies, 7 needed"),
    ],
)
def test_with_too_few_replies_a_round_is_silent_and_the_ledger_says_why(
    wrapper: Wrapper, says: str
) -> None:
    playing = federation(wrapper.around(Drifting(drawn()), "0.it"))
    start = playing.start
    last = playing.play(1)
    close(last.shared, start.shared, 0.0)
    assert {row.lost for row in playing.rows} == {says}


def test_more_replies_than_a_round_has_clients_are_refused_before_it_begins() -> None:
    tables: list[dict[str, Any]] = [{"name": "fedprox"}, {"name": "bulyan", "malicious": 2}]
    check_replies(tables, clients_per_round=11)
    says = (
        r"^wrap\[1\].name = 'bulyan' needs 11 replies, and federation.clients_per_round = 10 can "
        "never give them; choose at least 11$"
    )
    with pytest.raises(BadInput, match=says):
        check_replies(tables, clients_per_round=10)


def test_the_references_of_a_comparison_have_no_wrappers() -> None:
    compare = {"methods": ["lora"], "references": ["centralised", "local-only"]}
    runs = plan({"wrap": [{"name": "krum"}], "training": {"steps": 2}, "compare": compare})
    assert [(run.label, len(run.config.wrap)) for run in runs] == [
        ("lora", 1),
        ("centralised", 0),
        ("local-only", 0),
    ]


def test_replies_are_compared_by_what_went_down_and_not_by_votes() -> None:
    """FedARA's ballots of 0s and 1s would outweigh all differences between factors."""
    seen: list[Sequence[str]] = []

    class Spy:
        name: ClassVar[str] = "spy"
        least = 1

        def merged(self, summands: Sequence[Summand]) -> dict[str, Tensor]:
            seen.append(summands[0].compared)
            return dict(summands[0].numbers)

    method = around(small("fedara"), Spy())
    found = reference("fedara")
    updates = [
        Update(Client(client), response.measured.examples, response.payload)
        for client, response in found.playing.answers(0).items()
    ]
    method.receive(found.states[0], updates)
    assert {part.rpartition(":")[2] for part in seen[0]} == {
        "A",
        "B",
        "e",
        "classifier.weight",
        "classifier.bias",
    }


def test_no_reply_is_longer_than_the_bound() -> None:
    plain, method = Drifting(drawn()), Drifting(drawn())
    clipped = NormClip(norm=0.9).around(method, "0.norm_clip")
    state = plain.init(base_of(bert()), 0)
    updates = replies(state, 0, 3)
    updates[1] = Update(Client(1), 5, {n: state.shared[n] * 1.001 for n in NAMES})
    updates[1].payload["votes"] = torch.tensor(1)  # type: ignore[index]
    clipped.receive(state, updates)
    lengths = []
    for update in updates:
        before = np.concatenate([part.ravel() for part in arrays(state.shared)]).astype(float)
        sent = np.concatenate([part.ravel() for part in arrays(update.payload)]).astype(float)
        length = float(np.linalg.norm(sent - before))
        lengths.append(length)
        due = before + (sent - before) * min(1.0, 0.9 / length)
        told = method.told[-1][update.client.id]
        read = np.concatenate([part.ravel() for part in arrays(told)])
        np.testing.assert_allclose(read, due, atol=1e-6)
    assert lengths[1] < 0.9 < min(lengths[0], lengths[2])


@pytest.mark.parametrize("method", NOT_MEANS)
@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "bulyan", "scaffold"])
def test_methods_of_no_means_are_refused_with_those_that_can(name: str, method: str) -> None:
    kind = METHODS[method].__name__
    says = (
        rf"^wrap.name = '{name}': {kind} does not merge by a weighted mean.*; "
        "it goes around full, bitfit, lora, ffa_lora, federa, "
    )
    with pytest.raises(BadInput, match=says) as refused:
        from_tree({"method": {"name": method}, "wrap": [{"name": name}]})
    assert method not in str(refused.value).partition("; it goes around ")[2]
    assert "\n" not in str(refused.value)


def test_a_merge_around_what_changes_replies_is_refused() -> None:
    """Inside of it, it is given whole replies."""
    inside = [{"name": "quantise"}, {"name": "median"}]
    from_tree({"method": {"name": "lora"}, "wrap": inside})
    says = r"^wrap.name = 'median': Compressed does not merge by a weighted mean,"
    with pytest.raises(BadInput, match=says):
        from_tree({"method": {"name": "lora"}, "wrap": list(reversed(inside))})


def test_scaffold_is_no_sum_for_masks() -> None:
    tables = [{"name": "secagg"}, {"name": "scaffold"}]
    with pytest.raises(BadInput, match=r"^wrap.name = 'secagg': Controlled does not merge"):
        from_tree({"method": {"name": "lora"}, "wrap": tables})
    assert Scaffold().clients is None
