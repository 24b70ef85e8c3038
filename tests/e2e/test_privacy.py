"""Differential privacy in whole runs: epsilon in the ledger and the report, after a resume as without, and refusals in one line."""

from pathlib import Path

import pytest

from fedpeft.experiment.build import build
from fedpeft.experiment.recorder import CHECKPOINTS
from fedpeft.experiment.run import resume, start
from fedpeft.federation.checkpoint import manifest
from fedpeft.ledger import ClientRow, PrivacyRow, read
from fedpeft.privacy.accountant import epsilon
from fedpeft.report.comparison import compare
from fedpeft.report.summary import summarise

from .builders import Ground, cli_call, refused

SHORT = {
    "federation": {"rounds": 4, "clients_per_round": 2},
    "training": {"steps": 1, "batch_size": 4},
    "evaluation": {"every": 4, "limit": 8},
}
POISSON = {"wrap": [{"name": "dp", "noise": 1.5, "sampling": "poisson", "quantile": 0.5}]}


def promised(run: Path) -> list[PrivacyRow]:
    """Return the rows of what was promised."""
    return [row for row in read(run / "ledger.jsonl") if isinstance(row, PrivacyRow)]


def test_epsilon_goes_on_where_a_run_is_resumed(ground: Ground, tmp_path: Path) -> None:
    """Killed after its second round, a run counts four rounds in the end, and no round twice."""
    federation = build(ground.chosen(SHORT, POISSON))
    run = tmp_path / "run"
    start(federation, run)
    whole = promised(run)
    assert [row.round for row in whole] == [1, 2, 3, 4]
    for row in whole:
        due = epsilon(1.5, 1e-5, {2 / 5: row.round})
        assert (row.epsilon, row.sampling, row.releases) == (due, 0.4, row.round)
    # Back to what a kill in the last round leaves.
    manifest(run / CHECKPOINTS, 4).unlink()
    resume(run, reuse=federation)
    again = promised(run)
    assert [row.epsilon for row in again] == [row.epsilon for row in whole]
    assert [row.clip for row in again[:3]] == [row.clip for row in whole[:3]]


def test_reports_name_epsilon_and_its_terms(ground: Ground, runs: Path, no_figures: None) -> None:
    wraps = {"wrap": [{"name": "dp", "noise": 2.0}, {"name": "dpsgd", "noise": 1.0}]}
    run = runs / "run"
    start(build(ground.chosen(SHORT, wraps)), run)
    rows = promised(run)
    assert [row.unit for row in rows] == ["client", "example"] * 4
    most = max(
        [row.client for row in read(run / "ledger.jsonl") if isinstance(row, ClientRow)].count(k)
        for k in range(5)
    )
    assert rows[-2].epsilon == epsilon(2.0, 1e-5, {1.0: most})
    [line] = compare([summarise(run)]).lines
    assert line.mean.epsilon_clients == rows[-2].epsilon
    assert line.mean.epsilon_examples == rows[-1].epsilon
    outcome = cli_call("report", run, "--to", runs / "report")
    assert outcome.code == 0
    shown = " ".join(outcome.out.split())  # a caption may be broken into lines
    assert "ε of" in shown
    assert "clients at δ 1e-05, without amplification" in shown
    assert "rows of a client at δ 1e-05, with amplification" in shown
    assert "fedpeft tune" not in shown
    picked = {"tuned": {"trials": 4, "source": "a-tune/rates.toml"}}
    start(build(ground.chosen(SHORT, wraps, picked)), runs / "picked")
    outcome = cli_call("report", runs / "picked", "--to", runs / "report")
    assert "without the trials of fedpeft tune" in " ".join(outcome.out.split())


def test_a_delta_that_gives_somebody_away_is_told(ground: Ground) -> None:
    wraps = {"wrap": [{"name": "dp", "delta": 0.3}, {"name": "dpsgd", "delta": 0.15}]}
    notes = build(ground.chosen(SHORT, wraps)).notes
    told = [note for note in notes if note.startswith("wrap.delta = ")]
    assert [note[:18] for note in told] == ["wrap.delta = 0.3: ", "wrap.delta = 0.15:"]
    assert "one of 5 clients" in told[0]
    assert "rows of the smallest client" in told[1]


def test_ledger_of_a_plain_run_promises_nothing(ground: Ground, runs: Path) -> None:
    run = runs / "run"
    start(build(ground.chosen(SHORT)), run)
    assert not promised(run)
    assert summarise(run).privacy == {}


def test_what_cannot_be_promised_is_refused_before_anything_is_written(
    ground: Ground, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = "wrap=[{name='dp', sampling='poisson'}]"
    outcome = cli_call(
        "run", ground.config, "--runs", runs, "--set", table, "--set", "federation.min_replies=2"
    )
    refused(outcome, "federation.min_replies = 2", "choose 1")
    monkeypatch.setattr("fedpeft.privacy.accountant.find_spec", lambda _: None)
    outcome = cli_call("run", ground.config, "--runs", runs, "--set", "wrap=[{name='dp'}]")
    refused(outcome, "pip install 'fedpeft[privacy]'")
    assert not runs.exists()
