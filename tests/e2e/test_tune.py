"""Rates picked on the validation split by successive halving, by command, and what compares with them."""

import json
import math
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedpeft.experiment import recorder
from fedpeft.experiment.build import build
from fedpeft.experiment.config import from_json
from fedpeft.experiment.run import start
from fedpeft.federation import checkpoint
from fedpeft.types import State

from .builders import Ground, Outcome, assert_same, cli_call, refused
from .reading import SHORT, about, evaluations, table

METHODS = ("lora", "bitfit")
TRIALS = 3
"""Rungs end after 1 and 2 of 2 rounds; 2 trials of each method play the second."""


def arguments(ground: Ground, runs: Path, *more: str) -> tuple[str | Path, ...]:
    asked = ("--methods", ",".join(METHODS), "--trials", str(TRIALS))
    return ("tune", ground.config, "--runs", runs, *asked, *SHORT, *more)


@pytest.fixture(scope="module")
def tuned(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The folder of an uninterrupted tuning, and what the command printed."""
    runs = tmp_path_factory.mktemp("tune")
    return runs / "tiny-tune", cli_call(*arguments(ground, runs))


def last_state(run: Path) -> State:
    found = checkpoint.load(run / "checkpoints", recorder.settings_digests(run), pytest.fail)
    assert found is not None
    return found.state


def trials_in(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/ledger.jsonl"))


def method_of(run: Path) -> str:
    settings: Any = about(run).settings
    return str(settings["method"]["name"])


def scores(run: Path) -> dict[int, float]:
    return {row.round: row.metrics["accuracy"] for row in evaluations(run)}


def test_the_better_half_of_equally_many_trials_plays_on_and_the_best_is_picked(
    tuned: tuple[Path, Outcome],
) -> None:
    root, outcome = tuned
    assert outcome.code == 0, outcome
    picks = tomllib.loads((root / "rates.toml").read_text())
    assert (picks["task"], picks["optimizer"], picks["metric"]) == (
        "classification",
        "adamw",
        "accuracy",
    )
    assert picks["rates"].keys() == set(METHODS)
    for method in METHODS:
        runs = [run for run in trials_in(root) if method_of(run) == method]
        assert len(runs) == TRIALS
        assert {row.split for run in runs for row in evaluations(run)} == {"validation"}
        first = {run: scores(run)[1] for run in runs}
        went_on = [run for run in runs if last_state(run).round == 2]
        assert len(went_on) == 2
        stopped = [run for run in runs if run not in went_on]
        assert max(first[run] for run in stopped) <= min(first[run] for run in went_on)
        best = max(scores(run)[2] for run in went_on)
        picked = picks["rates"][method]
        assert (picked["score"], picked["trials"], picked["rounds"]) == (best, TRIALS, 2)
        settings: list[Any] = [about(run).settings for run in went_on if scores(run)[2] == best]
        assert picked["training"]["lr"] in [each["training"]["lr"] for each in settings]
        assert f"training.lr = {picked['training']['lr']}" in outcome.out
    assert f"--rates {root / 'rates.toml'}" in outcome.out.replace("\n", " ")


def test_a_trial_that_went_on_ends_in_the_bits_of_a_run_without_a_stop(
    tuned: tuple[Path, Outcome], tmp_path: Path
) -> None:
    root, _ = tuned
    run = next(run for run in trials_in(root) if last_state(run).round == 2)
    whole = start(build(from_json((run / "config.json").read_text())), tmp_path / "whole")
    assert_same(last_state(run), whole)
    assert scores(run) == scores(tmp_path / "whole")


@pytest.mark.parametrize("saves", [5, 13])
def test_a_tuning_that_is_stopped_anywhere_ends_as_one_that_is_not(
    ground: Ground,
    tuned: tuple[Path, Outcome],
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    saves: int,
) -> None:
    """The first rung saves twice in each of 6 trials: at the start, and after its round."""
    save, done = checkpoint.save, 0

    def save_or_stop(*given: Any) -> None:
        nonlocal done
        if done == saves:
            raise KeyboardInterrupt
        done += 1
        save(*given)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save_or_stop)
        assert cli_call(*arguments(ground, runs)).code == 130
    root, _ = tuned
    assert not (runs / root.name / "rates.toml").exists()
    outcome = cli_call(*arguments(ground, runs, "--resume"))
    assert outcome.code == 0, outcome
    again = runs / root.name
    assert (again / "rates.toml").read_bytes() == (root / "rates.toml").read_bytes()
    assert [run.name for run in trials_in(again)] == [run.name for run in trials_in(root)]
    for run in trials_in(root):
        assert_same(last_state(again / run.name), last_state(run))


def test_resume_refuses_another_number_of_trials_and_plays_nothing_anew(
    ground: Ground, tuned: tuple[Path, Outcome], runs: Path
) -> None:
    root, _ = tuned
    shutil.copytree(root, runs / root.name)
    before = {run: (run / "ledger.jsonl").read_bytes() for run in trials_in(runs / root.name)}
    assert cli_call(*arguments(ground, runs, "--resume")).code == 0
    assert {run: (run / "ledger.jsonl").read_bytes() for run in before} == before
    refused(cli_call(*arguments(ground, runs)), "exists")
    other = arguments(ground, runs, "--resume", "--trials", "4")
    refused(cli_call(*other), "other settings", "trials")


@pytest.mark.usefixtures("no_figures")
def test_compare_takes_the_picks_names_them_and_warns_where_a_method_has_none(
    ground: Ground, tuned: tuple[Path, Outcome], runs: Path
) -> None:
    root, _ = tuned
    file = root / "rates.toml"
    picks = tomllib.loads(file.read_text())["rates"]
    compare = ("compare", ground.config, "--runs", runs, "--rates", file, *SHORT)
    outcome = cli_call(*compare, "--methods", ",".join(METHODS))
    assert outcome.code == 0, outcome
    assert "warning" not in outcome.out
    assert f"({root.name}/rates.toml, {TRIALS} trials)" in " ".join(outcome.out.split())
    for method in METHODS:
        settings: Any = about(runs / "tiny-compare" / f"{method}-s0").settings
        assert settings["training"]["lr"] == picks[method]["training"]["lr"]
        assert settings["evaluation"]["split"] == "test"
    lines = {row["method"]: row for row in table(runs / "tiny-compare" / "report" / "runs.csv")}
    assert {line["rate_from"] for line in lines.values()} == {
        f"{root.name}/rates.toml, {TRIALS} trials"
    }
    more = cli_call(*compare, "--methods", ",".join((*METHODS, "ffa_lora")), "--resume")
    assert more.code == 0, more
    text = " ".join(more.out.split())
    assert "warning: rates were not tuned alike (3 trials: " in text
    assert "none: ffa_lora" in text


@pytest.mark.usefixtures("no_figures")
def test_compare_tunes_first_where_it_is_asked_to(ground: Ground, runs: Path) -> None:
    asked = ("--methods", "lora,bitfit", "--tune", "--trials", "1", *SHORT)
    outcome = cli_call("compare", ground.config, "--runs", runs, *asked)
    assert outcome.code == 0, outcome
    assert len(trials_in(runs / "tiny-tune")) == 2
    assert "(tiny-tune/rates.toml, 1 trial)" in " ".join(outcome.out.split())
    config = json.loads((runs / "tiny-compare" / "lora-s0" / "config.json").read_text())
    assert config["tuned"] == {"trials": 1, "source": "tiny-tune/rates.toml", "other": []}
    assert math.isclose(config["training"]["lr"], 0.01)  # what the file says: the only trial


@pytest.mark.parametrize(
    ("command", "options", "needles"),
    {
        "trials": ("tune", ("--trials", "0"), ("trials = 0",)),
        "method": ("tune", ("--methods", "lorra"), ("'lorra'", "'lora'")),
        "sites score": ("tune", ("--set", "evaluation.where=sites"), ("evaluation.where",)),
        "no file": ("compare", ("--rates", "nowhere.toml"), ("nowhere.toml", "no such file")),
        "both": ("compare", ("--rates", "a.toml", "--tune"), ("--rates a.toml", "--tune")),
        "trials alone": ("compare", ("--trials", "3"), ("--trials 3", "--tune")),
    }.values(),
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_trained(
    ground: Ground, runs: Path, command: str, options: tuple[str, ...], needles: tuple[str, ...]
) -> None:
    refused(cli_call(command, ground.config, "--runs", runs, *options), *needles)
    assert not runs.exists() or not list(runs.iterdir())


def test_tuning_without_validation_texts_is_refused(ground: Ground, runs: Path) -> None:
    """Of a label with a single text none can be held out; here every text is its own label."""
    texts = ("--set", "data.label=text", "--set", f"data.test={ground.data}")
    outcome = cli_call("tune", ground.config, "--methods", "lora", "--runs", runs, *texts)
    refused(outcome, "data.validation", "name a file for validation")
