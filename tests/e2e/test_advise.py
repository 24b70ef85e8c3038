"""`fedpeft advise`: its bytes are those of the ledger, its limits hold, and what it leaves out it explains."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedpeft.experiment.advise import Advice, Judged, advise
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.compare import plan
from fedpeft.experiment.config import from_tree, merge
from fedpeft.experiment.limits import Limits
from fedpeft.experiment.rehearsal import ROUNDS, shortened
from fedpeft.experiment.run import start
from fedpeft.ledger import ClientRow, read
from fedpeft.methods import METHODS

from .builders import Ground, cli_call, refused

SAME = ("full", "lora", "federa", "slora", "rolora", "fedex_lora", "fed_sb")
"""Methods whose messages follow from rounds and shapes, not from what was learnt."""
SMALL: Mapping[str, Any] = {"compare": {"rank": 4, "targets": "query|value"}}


@pytest.fixture(scope="module")
def advice(ground: Ground) -> Advice:
    """What is said of some methods in the tiny federation."""
    return advise(merge(ground.tree(), SMALL), SAME)


@pytest.fixture(scope="module")
def base(ground: Ground) -> Federation:
    """Data and model for real runs, whose clients train side by side."""
    return build(ground.chosen())


def of(advice: Advice, method: str) -> Judged:
    [one] = [one for one in advice.methods if one.method == method]
    return one


@pytest.mark.parametrize("method", SAME)
def test_its_bytes_are_those_of_a_runs_ledger(
    ground: Ground, advice: Advice, base: Federation, tmp_path: Path, method: str
) -> None:
    """Of a run that is as long as a rehearsal, with all its steps and clients side by side."""
    own = {"federation": {"rounds": ROUNDS}, "compare": {"methods": [method]}}
    [planned] = plan(merge(ground.tree(), SMALL, own, {"evaluation": {"limit": 1}}))
    start(build(planned.config, base.hardware, base), tmp_path / "run")
    rows = [row for row in read(tmp_path / "run" / "ledger.jsonl") if isinstance(row, ClientRow)]
    rounds = [[row for row in rows if row.round == number] for number in range(ROUNDS)]
    cost = of(advice, method).cost
    assert cost is not None
    assert cost.down == tuple(max(row.down for row in of_round) for of_round in rounds)
    assert cost.up == tuple(max(row.up for row in of_round) for of_round in rounds)
    assert of(advice, method).moved == max(row.down + row.up for row in rows)
    trained = [max(row.measured.trained for row in of_round) for of_round in rounds]
    assert cost.trained == (trained[0], trained[-1])


def test_phases_of_a_round_count_together(ground: Ground, base: Federation, tmp_path: Path) -> None:
    secagg = {"wrap": [{"name": "secagg"}], "federation": {"clients_per_round": 3, "rounds": 1}}
    tree = merge(ground.tree(), SMALL, secagg, {"evaluation": {"limit": 1}})
    [planned] = plan(merge(tree, {"compare": {"methods": ["lora"]}}))
    start(build(planned.config, base.hardware, base), tmp_path / "run")
    sums: dict[int, int] = {}
    for row in read(tmp_path / "run" / "ledger.jsonl"):
        if isinstance(row, ClientRow):
            sums[row.client] = sums.get(row.client, 0) + row.down + row.up
    assert of(advise(tree, ["lora"]), "lora").moved == max(sums.values())


def test_a_round_is_modelled_from_steps_and_bytes(ground: Ground, advice: Advice) -> None:
    lora = of(advice, "lora")
    assert lora.cost is not None
    [group] = lora.cost.groups
    assert (group.name, group.steps) == ("", 2)  # training.steps
    assert lora.seconds == (2 * lora.cost.step,)
    assert lora.cost.timed_steps == 2 * (ROUNDS - 1)
    assert lora.cost.peak_memory > 0
    linked = of(advise(merge(ground.tree(), SMALL), ["lora"], Limits(rate=1e3)), "lora")
    assert linked.cost is not None
    assert linked.seconds == (2 * linked.cost.step + lora.moved / 1e3,)


def test_epochs_are_as_many_steps_as_the_largest_client_takes(ground: Ground) -> None:
    tree = merge(ground.tree(), SMALL, {"training": {"epochs": 3}})
    del tree["training"]["steps"]
    said = advise(tree, ["bitfit"])
    cost = of(said, "bitfit").cost
    assert cost is not None
    assert cost.groups[0].steps == 3 * -(-said.skew.sizes.max // 8)


def test_limits_leave_out_what_breaks_them(ground: Ground, advice: Advice) -> None:
    between = (of(advice, "lora").moved + of(advice, "full").moved) / 2
    some = advise(merge(ground.tree(), SMALL), ["full", "lora"], Limits(traffic=between))
    assert [one.method for one in some.fitting] == ["lora"]
    [full] = some.left_out
    assert full.method == "full"
    assert "MB in a round, counted" in (full.out or "")


def test_methods_that_cannot_train_are_named_with_the_reason(ground: Ground) -> None:
    said = advise(merge(ground.tree(), {"compare": {"rank": 33}}), ["lora", "bitfit"])
    assert [one.method for one in said.fitting] == ["bitfit"]
    [lora] = said.left_out
    assert lora.method == "lora"
    assert lora.cost is None
    assert "cannot train: method.rank = 33" in (lora.out or "")


def test_how_unlike_clients_are_is_worked_out_by_hand(ground: Ground, tmp_path: Path) -> None:
    """Two clients, of one label, and of that and another in equal parts: 1/2 (|1 - 1/2| + |0 - 1/2|)."""
    labels = [json.loads(line)["label"] for line in ground.data.read_text().splitlines()]
    held = Ground(tmp_path)
    rows = ground.data.read_text().splitlines()
    birds = [row for row, label in zip(rows, labels, strict=True) if label == "birds"]
    fish = [row for row, label in zip(rows, labels, strict=True) if label == "fish"]
    held.data.write_text("\n".join([*birds[:30], *fish[:10]]) + "\n")
    (tmp_path / "test.jsonl").write_text("\n".join([birds[-1], fish[-1]]) + "\n")
    (tmp_path / "own.json").write_text(
        json.dumps({"one": list(range(20)), "both": list(range(20, 40))})
    )
    tree = merge(
        ground.tree(),
        {"data": {"train": str(held.data), "test": str(tmp_path / "test.jsonl")}},
        {"data": {"validation": str(tmp_path / "test.jsonl")}},
        {"partition": {"kind": "file", "file": str(tmp_path / "own.json")}},
    )
    said = advise(tree, ["bitfit"]).to_json()["heterogeneity"]
    assert said["label"]["total_variation"] == 0.5
    assert said["label"]["entropy"] == 0.5  # 0 and 1 bit
    assert said["sizes"]["gini"] == 0.0


FLEET: Mapping[str, Any] = {
    "federation": {
        "clients_per_round": 5,
        "deadline": 100.0,
        "fleet": {
            "phone": {
                "share": 0.4,
                "capacity": 0.5,
                "steps": 0.5,
                "step_seconds": 3.0,
                "bandwidth": 1e3,
            },
            "desk": {"share": 0.6, "step_seconds": 0.5, "bandwidth": 1e6},
        },
    }
}


def test_a_fleet_is_judged_by_class(ground: Ground) -> None:
    said = advise(merge(ground.tree(), SMALL, FLEET), ["flexlora", "lora"])
    flexlora, lora = of(said, "flexlora"), of(said, "lora")
    assert flexlora.cost is not None
    assert lora.cost is not None
    phone, desk = flexlora.cost.groups
    assert (phone.name, desk.name) == ("phone", "desk")
    assert phone.moved is not None
    assert desk.moved is not None
    assert phone.moved < desk.moved
    assert lora.cost.groups[0].moved == lora.cost.groups[1].moved
    assert (flexlora.levels, lora.levels) == (False, True)
    assert flexlora.seconds == (1 * 3.0 + phone.moved / 1e3, 2 * 0.5 + desk.moved / 1e6)
    slow = merge(ground.tree(), SMALL, FLEET, {"federation": {"deadline": 6.5}})
    out = advise(slow, ["lora"]).left_out
    assert (out[0].out or "").startswith("phone: a round takes ")
    assert "the deadline is 6.5 s" in (out[0].out or "")
    # What is typed goes before what the fleet says.
    typed = advise(slow, ["lora"], Limits(rate=1e9, deadline=7.0))
    assert of(typed, "lora").out is None


@pytest.mark.parametrize(("probe", "due"), [(None, 6), (5, 10), (3, 8), (1, 6)])
def test_a_round_that_trains_twice_has_the_steps_of_both(
    ground: Ground, probe: int | None, due: int
) -> None:
    steps = 3 if probe is None else 5
    own = {"compare": {"settings": {"lora_a2": {"method": {"probe_steps": probe}}}}}
    tree = merge(ground.tree(), SMALL, {"training": {"steps": steps}}, own if probe else {})
    said = of(advise(tree, ["lora_a2"]), "lora_a2")
    assert said.cost is not None
    [group] = said.cost.groups
    assert group.steps == due
    assert [one.steps for one in group.exchanges] == [due - steps, steps]
    assert said.seconds == (due * said.cost.step,)
    assert said.cost.timed_steps == (2 + min(2, probe or 2)) * (ROUNDS - 1)


def test_a_fleets_deadline_is_for_each_exchange_and_a_typed_one_for_the_round(
    ground: Ground,
) -> None:
    tree = merge(ground.tree(), SMALL, FLEET)
    said = of(advise(tree, ["lora_a2"]), "lora_a2")
    assert said.cost is not None
    phone, _ = said.cost.groups
    # One step in each of its two exchanges.
    parts = [3.0 + one.moved / 1e3 for one in phone.exchanges]
    assert len(parts) == 2
    assert said.seconds[0] == pytest.approx(sum(parts))

    def left_out(deadline: float, limits: Limits) -> str | None:
        timed = merge(tree, {"federation": {"deadline": deadline}})
        return of(advise(timed, ["lora_a2"], limits), "lora_a2").out

    assert left_out(max(parts) + 0.01, Limits()) is None
    late = left_out(max(parts) - 0.01, Limits())
    assert (late or "").startswith("phone: an exchange of a round takes ")
    typed = left_out(1.0, Limits(deadline=sum(parts) - 0.01))
    assert (typed or "").startswith("phone: a round takes ")
    assert left_out(1.0, Limits(deadline=sum(parts) + 0.01)) is None


def test_exchanges_without_training_take_no_steps(ground: Ground) -> None:
    """Masked clients tell no steps; the first of four exchanges trains."""
    secagg = {"wrap": [{"name": "secagg"}], "federation": {"clients_per_round": 3, "rounds": 1}}
    cost = of(advise(merge(ground.tree(), SMALL, secagg), ["lora"]), "lora").cost
    assert cost is not None
    assert [one.steps for one in cost.groups[0].exchanges] == [2, 0, 0, 0]
    assert cost.timed_steps == 2


@pytest.mark.parametrize(("written", "due"), [(None, None), (20, 4), (10, 2), (1, 1)])
def test_a_schedule_that_is_written_out_is_shortened_with_the_run(
    written: int | None, due: int | None
) -> None:
    length = {} if written is None else {"rounds": written}
    tree = {"federation": {"rounds": 20}, "method": {"name": "fedara", **length}}
    short = shortened(from_tree(tree))
    assert short.federation.rounds == ROUNDS
    assert short.method.get("rounds") == due


def test_by_default_every_method_is_tried_that_exchanges_anything(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr("fedpeft.experiment.advise._judged", lambda name, *_: Judged(name))
    advise(ground.tree(), on_method=tried.append)
    assert set(tried) == METHODS.keys() - {"local_only"}


def test_the_command_prints_methods_reasons_and_sources(ground: Ground) -> None:
    outcome = cli_call(
        *("advise", ground.config, "--methods", "full,lora", "--set", "method.rank=4"),
        *("--bandwidth", "60kB", "--deadline", "2min", "--set", "partition.alpha=0.1"),
    )
    assert (outcome.code, outcome.err) == (0, "")
    words = " ".join(outcome.out.split())
    for said in ("total variation", "counted", "measured here", "modelled", "Left out", "full: a"):
        assert said in words
    as_json = cli_call("advise", ground.config, "--methods", "lora", "--json")
    assert (as_json.code, as_json.err) == (0, "")
    [lora] = json.loads(as_json.out)["methods"]
    assert lora["left_out"] is None
    assert lora["counted"]["moved"] > 0


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        (("--methods", "lorra"), ("--methods: 'lorra'", "did you mean 'lora'")),
        (("--methods", "lora,lora"), ("name each once",)),
        (("--bandwidth", "10Mb"), ("--bandwidth 10Mb", "10Mbit/s")),
        (("--memory", "much"), ("--memory much", "4GB")),
        (("--deadline", "-3"), ("--deadline -3", "30s")),
        (("--set", "training.lrr=1"), ("'training.lrr'",)),
    ],
)
def test_bad_input_is_one_line(
    ground: Ground, options: tuple[str, ...], needles: tuple[str, ...]
) -> None:
    refused(cli_call("advise", ground.config, *options), *needles)
