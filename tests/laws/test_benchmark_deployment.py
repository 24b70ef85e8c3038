"""What the benchmark of deployments reads and reckons: rounds of a ledger, CPU time, and replies that a server takes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.deployed import (
    LABELS,
    TEXTS,
    Round,
    cpu_seconds,
    ends_in,
    means,
    parse_stat,
    prepare,
    rounds_of,
)
from benchmarks.deployment import Goal
from benchmarks.still_sites import EXAMPLES, Echo
from fedpeft.deployment.site import read_site
from fedpeft.experiment.config import read
from fedpeft.ledger import ClientRow, EvaluationRow, Measured, Row
from fedpeft.wire.messages import Kind, Request, Response, check, digest


def client(round_number: int, number: int, seconds: float, **others: object) -> ClientRow:
    measured = Measured(examples=4, loss=1.0, seconds=seconds)
    values = {"round": round_number, "client": number, "down": 1, "up": 1, "measured": measured}
    return ClientRow(**{**values, **others})  # type: ignore[arg-type]


def scored(rounds: int, seconds: float) -> EvaluationRow:
    return EvaluationRow(round=rounds, split="test", examples=4, metrics={}, seconds=seconds)


def test_a_round_is_the_time_between_checkpoints_and_its_work_that_of_the_slowest_client() -> None:
    rows = [client(0, 0, 1.0), client(0, 1, 2.5), client(1, 0, 0.5), client(1, 1, 0.25)]
    assert rounds_of(rows, {0: 100.0, 1: 104.0, 2: 105.5}) == [
        Round(0, 4.0, 2.5, 0),
        Round(1, 1.5, 0.5, 0),
    ]


def test_scoring_at_the_end_of_a_round_is_left_out() -> None:
    rows: list[Row] = [client(0, 0, 1.0), scored(1, 0.75)]
    assert rounds_of(rows, {0: 0.0, 1: 3.0}) == [Round(0, 2.25, 1.0, 0)]


def test_phases_of_a_client_add_up_and_lost_replies_are_counted() -> None:
    rows = [client(0, 0, 1.0), client(0, 1, 0.5), client(0, 0, 0.25, phase=1)]
    rows.append(client(0, 1, 0.0, phase=1, lost="no answer within 1 s"))
    assert rounds_of(rows, {0: 0.0, 1: 2.0}) == [Round(0, 2.0, 1.25, 1)]


def test_the_first_round_is_no_part_of_the_mean_and_a_lost_reply_ends_the_benchmark() -> None:
    rounds = [Round(0, 9.0, 8.0, 0), Round(1, 2.0, 0.5, 0), Round(2, 4.0, 1.5, 0)]
    assert means(rounds) == {"round": 3.0, "work": 1.0, "over": 2.0}
    with pytest.raises(SystemExit, match="a reply was lost"):
        means([*rounds, Round(3, 4.0, 1.5, 1)])


def test_a_round_ends_when_its_checkpoint_was_written(tmp_path: Path) -> None:
    for rounds, at in ((11, 5.0), (12, 7.5)):
        manifest = tmp_path / f"{rounds:06d}.json"
        manifest.write_text("{}")
        os.utime(manifest, (at, at))
        (tmp_path / f"{rounds:06d}.state").write_bytes(b"")
    assert ends_in(tmp_path) == {11: 5.0, 12: 7.5}


@pytest.mark.parametrize(
    ("goal", "value", "told"),
    [
        (Goal(1.5, 0.7), 0.7, "stretch"),
        (Goal(1.5, 0.7), 1.5, "floor"),
        (Goal(1.5, 0.7), 1.6, "missed"),
        (Goal(5.0, 10.0, more=True), 10.0, "stretch"),
        (Goal(5.0, 10.0, more=True), 5.0, "floor"),
        (Goal(5.0, 10.0, more=True), 4.9, "missed"),
        (Goal(1.0), 0.0, "floor"),
        (Goal(1.0), 1.1, "missed"),
    ],
)
def test_a_figure_is_held_against_its_goal(goal: Goal, value: float, told: str) -> None:
    assert goal.met(value) == told


def test_cpu_time_is_that_of_the_system() -> None:
    parent, seconds = parse_stat(Path("/proc/self/stat").read_text())
    assert parent == os.getppid()
    used = os.times()
    assert seconds == pytest.approx(used.user + used.system, abs=0.1)
    assert parse_stat("7 (a ) (b) S 3 7 7 0 -1 0 0 0 0 0 150 50 9 9 20")[0] == 3


def test_the_cpu_time_of_a_server_is_told_apart_by_process() -> None:
    busy = "import os, sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); sys.stdin.read()"
    gate = [sys.executable, "-c", f"# flower.gate\n{busy}"]
    with subprocess.Popen(gate, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        spent = cpu_seconds(os.getpid())
        assert child.stdin is not None
        child.stdin.close()
    assert spent["gate"] == pytest.approx(0.3, abs=0.15)
    assert spent["server"] == pytest.approx(time.process_time(), abs=1.0)
    assert "SuperLink" not in spent


def test_a_site_that_does_not_train_replies_what_a_server_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = digest(b"agreed")
    offer: Callable[[object], object] = lambda _: {"weights": "w", "agreed": config.hex()}  # noqa: E731
    monkeypatch.setattr("benchmarks.still_sites.offered", offer)
    echo = Echo()
    gate: object = None
    assert echo.about(gate)["agreed"] == config.hex()  # type: ignore[arg-type]
    for number in (3, 4):
        payload = {"w": torch.full((2, 3), float(number))}
        asked = Request(Kind.TRAIN, number, config, payload, memory=2, phase=1)
        response = Response.decode(echo.reply(asked.encode()))
        check(response, number, payload, memory=2, examples=EXAMPLES, phase=1)
        torch.testing.assert_close(response.payload, payload)


def test_what_is_measured_is_a_deployment_of_its_own_texts(tmp_path: Path) -> None:
    place = prepare(tmp_path, 2, 3, database=False)
    settings = read(place.server)
    assert settings["server"]["database"] is False
    assert settings["server"]["min_sites"] == settings["federation"]["min_replies"] == 2
    site = read_site(place.site(1))
    assert site.machine["threads"] == 1
    rows = Path(site.data["train"]).read_text().splitlines()
    assert len(rows) == TEXTS
    assert all(any(label in row for label in LABELS) for row in rows)
