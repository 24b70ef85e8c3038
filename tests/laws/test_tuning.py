"""Rates are picked alike for every method, and those that are proposed are the ones in the log."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import BadInput
from fedpeft.experiment import tuning
from fedpeft.experiment.compare import Planned, grid, plan, rows_of
from fedpeft.experiment.config import Config, from_json, from_tree, merge
from fedpeft.experiment.proposals import PROPOSALS
from fedpeft.experiment.rates import Picked, Rates, read_rates, work_of, write_rates
from fedpeft.experiment.sections import Reference
from fedpeft.experiment.tuning import (
    MOST_TRIALS,
    Trial,
    plan_trials,
    promoted,
    rates_around,
    rung_rounds,
    tune,
    with_earlier,
    without_own_rates,
)
from fedpeft.methods import constructors
from fedpeft.tasks import Metric

LOG = Path(__file__).parents[2] / "docs" / "log.md"
RATE = "training.lr"


# What is tried.


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 37, MOST_TRIALS])
def test_rates_are_evenly_spaced_around_the_one_that_comes_first(count: int) -> None:
    rates = rates_around(0.003, count)
    assert rates[0] == 0.003
    assert len(set(rates)) == count
    logarithms = sorted(math.log10(rate) for rate in rates)
    assert logarithms[-1] - logarithms[0] <= 2.05
    steps = [above - below for below, above in zip(logarithms, logarithms[1:], strict=False)]
    # Two digits, or three: a rate is rounded by five hundredths, or five thousandths, at most.
    rounding = 2 * math.log10(1.05 if count <= 5 else 1.005)
    assert max(steps, default=0) - min(steps, default=0) <= 2 * rounding
    distances = [abs(math.log10(rate / 0.003)) for rate in rates]
    assert distances == pytest.approx(sorted(distances), abs=rounding)


@pytest.mark.parametrize("trials", range(1, 20))
def test_rungs_leave_one_trial_and_the_last_has_all_rounds(trials: int) -> None:
    for rounds in range(1, 30):
        rungs = rung_rounds(trials, rounds)
        left = trials
        for _ in rungs:
            left = (left + 1) // 2
        assert left == 1
        assert len(rungs) == 1 or (1 << (len(rungs) - 1)) < trials, "no rung without a choice"
        assert rungs[-1] == rounds
        assert rungs == sorted(rungs)
        # So an evaluation every so many rounds, and after the last one, meets each rung.
        assert all(end % rungs[0] == 0 or end == rounds for end in rungs)


COMPARED: Mapping[str, Any] = {
    "compare": {
        "methods": ["lora", "slora", "full"],
        "references": ["centralised", "local-only"],
        "settings": {"full": {"training": {"lr": 0.005}}},
    }
}


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_every_row_gets_equally_many_trials_and_first_what_it_would_be_run_with(
    trials: int,
) -> None:
    compared = {one.label: one.config for one in plan(COMPARED)}
    planned = plan_trials(COMPARED, trials)
    by_row: dict[str, list[Trial]] = {}
    for trial in planned:
        by_row.setdefault(trial.row, []).append(trial)
    assert by_row.keys() == compared.keys()
    for label, of_row in by_row.items():
        assert len(of_row) == trials
        first = of_row[0].run.config
        assert first.training == compared[label].training
        assert first.build_method() == compared[label].build_method()
        assert len({trial.run.config.training.lr for trial in of_row}) == trials
        for trial in of_row:
            config = trial.run.config
            assert config.training.lr == trial.tried[RATE]
            assert config.evaluation.split == "validation"
            assert config.federation == compared[label].federation
            assert config.tuned.trials == trials
    folders = {trial.run.folder(Path()) for trial in planned}
    assert len(folders) == len(planned)


def test_a_field_that_a_method_marks_is_tried_at_its_values_and_follows_from_the_seed() -> None:
    asked = {"compare": {"methods": ["slora", "lora"]}}
    tried: dict[int, list[object]] = {}
    for seed in (0, 1):
        planned = plan_trials({**asked, "seed": seed}, 8)
        assert planned == plan_trials({**asked, "seed": seed}, 8)
        tried[seed] = []
        for trial in planned:
            if trial.row == "lora":
                assert trial.tried.keys() == {RATE}
                continue
            assert trial.run.config.method["stage1_rate"] == trial.tried["method.stage1_rate"]
            tried[seed].append(trial.tried["method.stage1_rate"])
        assert tried[seed][0] == 0.1, "what it would be run with"
        assert set(tried[seed]) == {0.1, 0.3, 1.0}
    assert tried[0] != tried[1]


def test_a_rate_that_is_swept_is_neither_proposed_nor_picked(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"compare": {"methods": ["lora", "full"]}}
    for one in grid(asked, {"seed": [0]}, methods=True):
        assert one.config.tuned.source.startswith("docs/log.md")
    write_rates(tmp_path / "rates.toml", PICKS)
    picked = merge(asked, {"compare": {"rates": str(tmp_path / "rates.toml")}})
    for tree in (asked, picked):
        for one in grid(tree, {"training.lr": [0.5]}, methods=True):
            assert one.config.training.lr == 0.5
            assert one.config.tuned == Config().tuned


@pytest.mark.parametrize("trials", [-1, 0, MOST_TRIALS + 1])
def test_a_number_of_trials_out_of_bounds_is_refused(trials: int) -> None:
    with pytest.raises(BadInput, match=f"trials = {trials}: "):
        plan_trials({}, trials)


@pytest.mark.parametrize(
    ("wrap", "told"),
    [([], 0), ([{"name": "fedprox"}], 0), ([{"name": "dp"}], 1), ([{"name": "dpsgd"}], 1)],
)
def test_what_trials_cost_of_privacy_is_told_before_they_train(
    monkeypatch: pytest.MonkeyPatch, wrap: list[dict[str, Any]], told: int
) -> None:
    class Begun(Exception):
        pass

    def begin(*_: object, **__: object) -> list[Path]:
        raise Begun

    monkeypatch.setattr(tuning, "run_all", begin)
    lines: list[str] = []
    tree = {"wrap": wrap, "compare": {"methods": ["lora"], "references": ["local-only"]}}
    with pytest.raises(Begun):
        tune(tree, Path("nowhere"), 1, on_warning=lines.append)
    assert len(lines) == told
    assert all(line.startswith("differential privacy: every trial") for line in lines)


# What goes on.


def trial_of(row: str, number: int) -> Trial:
    return Trial(row, {}, Planned(f"{row} {number}", Config()))


SCORES = st.one_of(st.floats(-2, 2), st.just(math.nan), st.sampled_from([0.25, 0.5]))


@given(st.lists(SCORES, min_size=1, max_size=9), st.lists(SCORES, max_size=9), st.booleans())
def test_the_better_half_of_each_row_goes_on_by_the_metrics_direction(
    one: list[float], other: list[float], higher: bool
) -> None:
    metric = Metric("score", higher_is_better=higher)

    def worth(score: float) -> float:
        """The larger the better; NaN is worth least."""
        if math.isnan(score):
            return -math.inf
        return score if higher else -score

    trials: list[Trial] = []
    scores: dict[str, float] = {}
    for row, of_row in (("one", one), ("other", other)):
        for number, score in enumerate(of_row):
            trials.append(trial_of(row, number))
            scores[trials[-1].run.label] = score
    kept = promoted(trials, scores, metric)
    assert kept == [trial for trial in trials if trial in kept], "in their order"
    for row, of_row in (("one", one), ("other", other)):
        mine = [trial for trial in trials if trial.row == row]
        best = [trial for trial in mine if trial in kept]
        assert len(best) == (len(of_row) + 1) // 2
        for index, trial in enumerate(mine):
            if trial in best:
                continue
            for better in best:
                this, that = (worth(scores[which.run.label]) for which in (trial, better))
                # Of equals the earlier one goes on.
                assert that > this or (that == this and mine.index(better) < index)


# What is proposed.


def chosen_in_the_log() -> dict[str, list[float]]:
    """Return what stands in bold in the sweeps: method -> its rate in each sweep that has it."""
    chosen: dict[str, list[float]] = {}
    rates: list[float] = []
    for line in LOG.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "method" and re.fullmatch(r"\d+e-\d+", cells[1]):
            rates = [float(cell) for cell in cells[1:]]
        elif rates and line.startswith("|---"):
            continue
        elif rates and line.startswith("|"):
            name = re.split(r"[,(]", cells[0])[0].strip()
            bold = [rate for rate, cell in zip(rates, cells[1:], strict=True) if "**" in cell]
            chosen.setdefault(name, []).extend(bold)
        else:
            rates = []
    return chosen


def test_proposed_rates_are_those_that_the_logs_sweeps_chose_and_the_lower_of_two() -> None:
    chosen = chosen_in_the_log()
    chosen["local_only"] = chosen.pop("local-only")
    assert len(chosen) == 9
    for name, rates in chosen.items():
        assert PROPOSALS[name].lr == min(rates), name
        assert "docs/log.md" in PROPOSALS[name].origin
        assert ("lower" in PROPOSALS[name].origin) == (len(set(rates)) == 2), name
    for name, proposal in PROPOSALS.items():
        if name not in chosen:
            relative = re.fullmatch(r"not swept; as (\w+) in docs/log\.md, .*", proposal.origin)
            assert relative, name
            assert proposal.lr == PROPOSALS[relative[1]].lr
    assert PROPOSALS.keys() <= {*constructors(), *get_args(Reference)}


def test_a_rate_is_proposed_where_none_is_given_and_nowhere_else() -> None:
    for name in constructors():
        method = {"method": {"name": name}}
        config = from_tree(method)
        proposal = PROPOSALS.get(name)
        assert config.training.lr == (proposal.lr if proposal else 1e-3)
        head = "; the head at the same rate, there at 0.03"
        assert config.tuned.source == (proposal.origin + head if proposal else "")
        for field, value in (proposal.method if proposal else {}).items():
            assert config.method[field] == value
        given_rate = from_tree({**method, "training": {"lr": 0.123}})
        assert (given_rate.training.lr, given_rate.tuned.source) == (0.123, "")
        assert from_json(config.to_json()) == config
    with_head = from_tree({"training": {"head_lr": 0.03}})
    assert with_head.tuned.source == PROPOSALS["lora"].origin
    for unswept in ({"training": {"optimizer": "sgd"}}, {"task": {"kind": "causal_lm"}}):
        config = from_tree({"method": {"name": "lora"}, **unswept})
        assert (config.training.lr, config.tuned.source) == (1e-3, "")
    assert from_tree({}).training.lr == PROPOSALS["lora"].lr, "LoRA is what a run plays by default"


def test_sloras_first_stage_has_the_share_of_the_rate_that_it_was_swept_with() -> None:
    assert from_tree({"method": {"name": "slora"}}).method["stage1_rate"] == 0.1
    own = {"name": "slora", "stage1_rate": 0.5}
    assert from_tree({"method": own}).method["stage1_rate"] == 0.5
    full = from_tree({"method": {"name": "slora", "stage1_method": "full"}})
    assert full.training.lr * full.method["stage1_rate"] == pytest.approx(PROPOSALS["full"].lr, 0.2)
    given_rate = from_tree({"method": {"name": "slora"}, "training": {"lr": 0.1}})
    assert "stage1_rate" not in given_rate.method
    # The first of a row's trials is what the row would be run with.
    first = plan_trials({"compare": {"methods": ["slora"]}}, 1)[0]
    assert first.tried == {RATE: 0.003, "method.stage1_rate": 0.1}


def test_a_variant_of_a_method_has_a_rate_of_its_own() -> None:
    for name, proposal in PROPOSALS.items():
        for (field, value), variant in proposal.variants.items():
            config = from_tree({"method": {"name": name, field: value}})
            assert config.method[field] == value
            assert config.training.lr == variant.lr
            assert config.tuned.source.startswith(variant.origin)
            assert config.method.items() >= variant.method.items()


def test_all_data_in_one_place_has_a_rate_of_its_own_unless_one_is_given() -> None:
    asked = {"compare": {"methods": ["lora"], "references": ["centralised", "local-only"]}}
    rates = {one.label: one.config.training.lr for one in plan(asked)}
    assert rates == {"lora": 0.01, "centralised": 0.003, "local-only": 0.003}
    own = {"compare": {"settings": {"lora": {"training": {"lr": 0.5}}}}}
    rates = {one.label: one.config.training.lr for one in plan(merge(asked, own))}
    assert rates == {"lora": 0.5, "centralised": 0.5, "local-only": 0.003}


# The file of picks.


PICKS = Rates(
    "classification",
    "adamw",
    "accuracy",
    {
        "lora": Picked(4, 15, 0.5, {"lr": 1e-05}),
        "slora": Picked(4, 15, 1 / 3, {"lr": 0.0032}, {"stage1_rate": 0.1}),
        "local-only": Picked(4, 15, -2.0, {"lr": 0.5}),
    },
)


def test_the_file_of_picks_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    odd = Picked(1, 1, 12.0, {"lr": 1.0}, {"a.b": 'a "word" \\ ü', "on": True, "number": 3})
    rates = replace(PICKS, rates={**PICKS.rates, "my.own": odd})
    write_rates(path, rates)
    assert read_rates(path) == rates


def test_a_comparison_runs_at_what_was_picked_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a-tune" / "rates.toml"
    path.parent.mkdir()
    write_rates(path, PICKS)
    settings = {
        "lora": {"training": {"lr": 0.9, "clip": 3.0}},
        "slora": {"method": {"density": 0.5}},
    }
    asked = {
        "compare": {
            "methods": ["lora", "slora", "full"],
            "references": ["local-only"],
            "settings": settings,
        }
    }
    before = {one.label: one.config for one in plan(asked)}
    after = {one.label: one.config for one in plan(merge(asked, {"compare": {"rates": str(path)}}))}
    assert after["full"] == before["full"]
    for label, picked in PICKS.rates.items():
        training = replace(before[label].training, **picked.training)
        assert after[label].training == training
        assert after[label].method == {**before[label].method, **picked.method}
        assert (after[label].tuned.trials, after[label].tuned.source) == (4, "a-tune/rates.toml")
    # A run keeps neither the path nor what else is compared.
    assert str(tmp_path) not in after["lora"].to_json()


def test_what_was_picked_is_where_the_next_tuning_begins(tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    write_rates(path, PICKS)
    asked = {"compare": {"methods": ["slora"], "rates": str(path)}}
    assert dict(rows_of(asked))["slora"]["training"]["lr"] == 0.0032
    assert plan_trials(asked, 2)[0].tried == {RATE: 0.0032, "method.stage1_rate": 0.1}


def test_a_tuning_that_is_repeated_begins_where_the_first_one_did(tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    asked = {"compare": {"methods": ["slora"], "rates": str(path)}}
    for _ in range(2):  # before there is a file, and with one
        own = without_own_rates(asked, path)
        assert plan_trials(own, 1)[0].tried[RATE] == 0.003
        write_rates(path, PICKS)
    elsewhere = tmp_path / "other.toml"
    assert without_own_rates(asked, elsewhere) == asked


def test_a_second_tuning_keeps_what_the_first_one_picked_for_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    now = replace(PICKS, rates={"lora": Picked(4, 15, 0.9, {"lr": 0.1})})
    assert with_earlier(now, path) == now
    write_rates(path, PICKS)
    assert with_earlier(now, path).rates == {**PICKS.rates, **now.rates}
    other_work = replace(now, work={"model.name": "another"})
    assert with_earlier(other_work, path) == other_work


def test_a_damaged_file_of_an_earlier_tuning_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rates.toml").write_text("task =")
    monkeypatch.setattr(tuning, "run_all", lambda *_, **__: pytest.fail("a trial was trained"))
    with pytest.raises(BadInput, match=r"rates\.toml"):
        tune({"compare": {"methods": ["lora"]}}, tmp_path, 1)


def test_rates_that_were_picked_for_other_work_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    asked = {"compare": {"methods": ["lora"], "rates": str(path)}, "federation": {"rounds": 15}}
    for changes, other in (
        ({}, []),
        ({"model": {"name": "a/b"}}, ["model.name"]),
        ({"training": {"head_lr": 0.1, "steps": 3}}, ["training.head_lr", "training.steps"]),
    ):
        write_rates(path, replace(PICKS, work=work_of(from_tree(merge(asked, changes)))))
        assert dict(rows_of(asked))["lora"]["tuned"]["other"] == other
    write_rates(path, PICKS)
    assert dict(rows_of(asked))["lora"]["tuned"]["other"] == [], "the file does not tell"


@pytest.mark.parametrize(
    ("change", "needles"),
    {
        "method": (("rates.slora", "rates.slorra"), ("rates.slorra is not", "'slora'")),
        "task": (('"classification"', '"qa"'), ("task.kind = 'qa'", "'classification'")),
        "optimizer": (('"adamw"', '"sgd"'), ("training.optimizer = 'sgd'", "'adamw'")),
        "field": (
            ("training.lr = 1e-05", "training.rl = 1"),
            ("rates.lora", "training.rl"),
        ),
        "value": (("training.lr = 1e-05", "training.lr = -1"), ("training.lr = -1", "greater")),
        "trials": (("trials = 4", "trials = 0"), ("rates.lora.trials = 0", "at least 1")),
        "key": (("trials = 4", "tries = 4"), ("rates.lora.tries", "'trials'")),
        "entry": (("[rates.lora]", "[rates]\nlora = 3\n[other]"), ("rates.lora = 3",)),
        "missing": (('task = "classification"', ""), ("task is missing",)),
        "form": (("task =", "task"), ("not a TOML file",)),
    }.values(),
)
def test_a_file_of_picks_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, change: tuple[str, str], needles: tuple[str, ...]
) -> None:
    path = tmp_path / "rates.toml"
    write_rates(path, PICKS)
    text = path.read_text(encoding="utf-8")
    assert change[0] in text
    path.write_text(text.replace(*change, 1), encoding="utf-8")
    asked = {"compare": {"methods": ["lora", "slora"], "rates": str(path)}}
    with pytest.raises(BadInput) as caught:
        plan(asked)
    line = str(caught.value)
    assert "\n" not in line
    for needle in (str(path), *needles):
        assert needle in line
