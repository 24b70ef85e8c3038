"""A run of a fleet from its settings to its report: reproducible, resumable, and refused in one line where it makes no sense."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import BadInput
from fedpeft.experiment.build import build
from fedpeft.experiment.compare import plan
from fedpeft.experiment.config import Config, from_json, from_tree, merge
from fedpeft.experiment.run import resume, start
from fedpeft.ledger import FILE, MEASURED, ClientRow, Row, RunRow, read, to_json

from .builders import Ground, assert_same, cli_call, refused

FLEET: dict[str, Any] = {
    "desk": {"share": 0.4},
    "phone": {
        "share": 0.6,
        "capacity": 0.5,
        "steps": 0.5,
        "dropout": 0.3,
        "straggling": 0.4,
        "step_seconds": 2.0,
    },
}
TRACE = "client,from,to\n0,0,9\n1,0,9\nclient 2,0,9\n3,2,4\n4,0,3\n"
"""Client 3 is there in rounds 2 to 4, client 4 until round 3, the others always."""


def configured(ground: Ground, folder: Path, *trees: dict[str, Any]) -> Config:
    trace = folder / "trace.csv"
    trace.write_text(TRACE)
    federation: dict[str, Any] = {
        "clients_per_round": 3,
        "fleet": FLEET,
        "deadline": 10.0,
        "sampling": "size",
        "trace": str(trace),
    }
    method = {"name": "flexlora", "rank": 4}
    return ground.chosen(
        {"federation": federation, "method": method, "evaluation": {"limit": 8}}, *trees
    )


def rows_of(folder: Path) -> list[Row]:
    return read(folder / FILE)


def unmeasured(rows: list[Row]) -> list[dict[str, object]]:
    return [{k: v for k, v in to_json(row).items() if k not in MEASURED} for row in rows]


@pytest.mark.usefixtures("no_figures")
def test_a_fleet_run_that_was_stopped_resumes_to_the_same_bits_and_its_report_counts_by_class(
    ground: Ground, tmp_path: Path
) -> None:
    assembly = build(configured(ground, tmp_path))
    undisturbed = start(assembly, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_at_three(progress: Any) -> None:
        if progress.round == 3:
            raise Stop

    with pytest.raises(Stop):
        start(assembly, tmp_path / "stopped", on_progress=stop_at_three)
    assert_same(resume(tmp_path / "stopped"), undisturbed)
    rows = rows_of(tmp_path / "whole")
    assert unmeasured(rows_of(tmp_path / "stopped")) == unmeasured(rows)

    # The ledger knows who has which device, and the rows follow from that.
    opening = rows[0]
    assert isinstance(opening, RunRow)
    assert {name: len(held) for name, held in opening.devices.items()} == {"desk": 2, "phone": 3}
    asked = [row for row in rows if isinstance(row, ClientRow)]
    assert {row.client for row in asked if row.round in (0, 1)} <= {0, 1, 2, 4}
    assert {row.client for row in asked if row.round in (4, 5)} <= {0, 1, 2, 3}
    counts: Counter[tuple[str, str]] = Counter()
    for row in asked:
        assert row.client in opening.devices[row.device]
        became = "dropped_out" if row.dropped else "late" if row.late else "used"
        assert (row.lost is None) == (became == "used")
        counts[row.device, became] += 1
        if not row.dropped:
            # Of 2 steps a phone takes 1, which takes it 2 s, and 20 s where it is slow.
            steps, seconds = (1, {2.0, 20.0}) if row.device == "phone" else (2, {2.0})
            assert row.measured.steps in (steps, 0 if row.lost else steps)
            assert row.modelled is not None
            assert row.modelled in seconds
            assert row.late == (row.modelled > 10)
    assert counts["desk", "used"]
    assert counts["phone", "used"]
    assert counts["phone", "dropped_out"] + counts["phone", "late"]
    # Half the ranks are about half the bytes.
    down = {(row.device, row.down) for row in asked}
    assert len(down) == 2

    done = cli_call("report", tmp_path / "whole", "--to", tmp_path / "report")
    assert done.code == 0, done
    assert "Requests by class of devices" in done.out
    with (tmp_path / "report" / "devices.csv").open(newline="") as file:
        told = {line["device"]: line for line in csv.DictReader(file)}
    for name in FLEET:
        assert told[name]["clients"] == str(len(opening.devices[name]))
        for became in ("used", "dropped_out", "late"):
            assert told[name][became] == str(counts[name, became])
        assert told[name]["lost_otherwise"] == "0"


def test_a_trace_that_has_changed_is_noticed_when_a_run_is_resumed(
    ground: Ground, tmp_path: Path
) -> None:
    config = configured(ground, tmp_path, {"federation": {"rounds": 1}})
    start(build(config), tmp_path / "run")
    (tmp_path / "trace.csv").write_text(TRACE + "3,0,9\n")
    with pytest.raises(BadInput, match="the trace of clients had digest"):
        resume(tmp_path / "run")


def test_settings_of_a_fleet_come_back_from_a_runs_folder(ground: Ground, tmp_path: Path) -> None:
    config = configured(ground, tmp_path)
    assert from_json(config.to_json()) == config


def test_a_method_without_ranks_says_that_it_takes_no_account_of_capacity(
    ground: Ground, tmp_path: Path
) -> None:
    plain = {"method": {"name": "lora", "rank": 4}}
    notes = build(configured(ground, tmp_path, plain)).fleet_notes
    assert len(notes) == 1
    assert "federation.fleet.phone.capacity = 0.5: method 'lora' sends the same" in notes[0]
    assert build(configured(ground, tmp_path)).fleet_notes == ()
    full = {"federation": {"fleet": {"phone": {"capacity": 1.0}}}}
    assert build(configured(ground, tmp_path, plain, full)).fleet_notes == ()


def test_the_centralised_yardstick_is_no_device(ground: Ground, tmp_path: Path) -> None:
    tree = merge(
        json.loads(configured(ground, tmp_path).to_json()),
        {"compare": {"methods": ["lora"], "references": ["centralised", "local-only"]}},
    )
    by_label = {run.label: run.config.federation for run in plan(tree)}
    alone = by_label["centralised"]
    assert (alone.fleet, alone.deadline, alone.trace, alone.sampling) == ({}, None, None, "uniform")
    assert (
        by_label["local-only"].fleet == by_label["lora"].fleet == from_tree(tree).federation.fleet
    )


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shares that do not add to 1": (
        ("federation.fleet.phone.share=0.5", "federation.fleet.desk.share=0.3"),
        ("federation.fleet: the shares phone 0.5, desk 0.3 add to 0.8", "that add to 1"),
    ),
    "a class without clients": (
        ("federation.fleet.phone.share=0.99", "federation.fleet.desk.share=0.01"),
        ("federation.fleet.desk.share = 0.01", "of 5 clients", "at least 0.2"),
    ),
    "a capacity below one rank": (
        ("method.name=flexlora", "method.rank=4", "federation.fleet.phone.capacity=0.2"),
        ("federation.fleet.phone: client 0 has capacity 0.2", "method.rank = 4", "least 0.25"),
    ),
    "no capacity": (
        ("federation.fleet.phone.capacity=0",),
        ("federation.fleet.phone.capacity = 0: must be greater than 0",),
    ),
    "a probability above 1": (
        ("federation.fleet.phone.dropout=1.5",),
        ("federation.fleet.phone.dropout = 1.5: must be at most 1",),
    ),
    "a probability below 0": (
        ("federation.fleet.phone.straggling=-0.5",),
        ("federation.fleet.phone.straggling = -0.5: must be at least 0",),
    ),
    "a field of a class mistyped": (
        ("federation.fleet.phone.dropuot=0.5",),
        ("unknown key 'federation.fleet.phone.dropuot'", "did you mean 'dropout'"),
    ),
    "a word for a class": (
        ("federation.fleet.phone=0.5",),
        ("federation.fleet.phone = 0.5: is a section", "federation.fleet.phone.field=value"),
    ),
    "true for a share": (
        ("federation.fleet.phone.share=true",),
        ("federation.fleet.phone.share = true",),
    ),
    "a number for the fleet": (("federation.fleet=3",), ("federation.fleet = 3",)),
    "a deadline without a clock": (
        ("federation.deadline=5",),
        ("federation.deadline = 5", "[federation.fleet.phone]"),
    ),
    "a deadline of no time": (
        ("federation.fleet.phone.share=1", "federation.deadline=0"),
        ("federation.deadline = 0: must be greater than 0",),
    ),
    "a way to draw mistyped": (
        ("federation.sampling=sizes",),
        ("federation.sampling = 'sizes'", "'uniform' or 'size'"),
    ),
    "a trace that is not there": (
        ("federation.trace=nowhere.csv",),
        ("federation.trace = ", "nowhere.csv", "cannot be read"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fleets_that_make_no_sense_are_refused_before_anything_is_written(
    ground: Ground, runs: Path, name: str
) -> None:
    sets, says = REFUSED[name]
    options = [part for one in sets for part in ("--set", one)]
    refused(cli_call("run", ground.config, "--runs", runs, *options), *says)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("federation", "says"),
    [
        ({"fleet": {"phone": {}}}, "federation.fleet: is for simulations, not for sites"),
        ({"fleet": {"phone": {}}, "deadline": 3.0}, "federation.fleet: is for simulations"),
        ({"deadline": 3.0}, "federation.deadline: .* set server.deadline"),
        ({"trace": "trace.csv"}, "federation.trace: .* drawn that are online"),
    ],
)
def test_real_sites_are_no_simulated_fleet(
    ground: Ground, federation: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        ground.chosen({"federation": federation, "engine": {"kind": "sites"}})
    sized = ground.chosen({"federation": {"sampling": "size"}, "engine": {"kind": "sites"}})
    assert replace(sized.federation, sampling="uniform") == ground.chosen().federation
