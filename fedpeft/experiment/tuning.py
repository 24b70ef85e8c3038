"""Rates picked alike for every method: equally many trials, halved on the validation texts.

Successive halving (Jamieson and Talwalkar 2016), with rounds as the resource. Every trial is a run
of the whole length in a folder of its own. It stops after the rounds of its rung; the better half
of a method's trials goes on from there, and the last two play all rounds. So a schedule that ends
with the run, as FedARA's, is what it will be in the comparison, and a promoted trial ends in the
bits that an uninterrupted run ends in. (On Flower's simulation its clients begin anew, as those of
any run do that is resumed there.)
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, final, get_type_hints

from fedpeft.errors import BadInput
from fedpeft.experiment.batch import run_all
from fedpeft.experiment.checking import Tree
from fedpeft.experiment.compare import Planned, metric_of, rows_of, swept
from fedpeft.experiment.config import Config, from_tree
from fedpeft.experiment.parallel import MOST
from fedpeft.experiment.privacy import promises
from fedpeft.experiment.rates import FILE, Picked, Rates, read_rates, work_of, write_rates
from fedpeft.experiment.recorder import OnProgress
from fedpeft.experiment.run import OnWarning, read_settings
from fedpeft.ledger import FILE as LEDGER
from fedpeft.ledger import EvaluationRow, stream
from fedpeft.methods import constructors
from fedpeft.seeds import derive
from fedpeft.tasks import Metric
from fedpeft.types import WorthTuning

TRIALS: Final = 4
"""Trials of each method where nothing says otherwise."""
MOST_TRIALS: Final = 100
"""Trials of each method at most: with more, rates would be the same in three digits."""
STEP: Final = 0.5
"""Decades between two rates, 1-3-10 as the sweeps have it, where a method has few trials."""
SPAN: Final = 2.0
"""Decades that all rates of a method span at most."""
RATE: Final = "training.lr"
"""The field that every method tries."""
SOURCE: Final = "a trial of fedpeft tune"
"""Where the rate of a trial is from."""


@final
@dataclass(frozen=True)
class Trial:
    """One trial: whose it is, the fields that it tries by dotted key, and its run."""

    row: str
    tried: Mapping[str, Any]
    run: Planned


def tuning_folder(tree: Tree, runs: Path) -> Path:
    """Return the folder among ``runs`` that holds the trials of the comparison in ``tree``."""
    return runs / f"{from_tree(tree).name}-tune"


def rates_file(root: Path) -> Path:
    """Return the file of what was picked among the trials under ``root``."""
    return root / FILE


def tune(
    tree: Tree,
    root: Path,
    trials: int = TRIALS,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Callable[[Planned], OnProgress] = lambda _: lambda _: None,
    on_warning: OnWarning = lambda _: None,
    jobs: int = 1,
) -> Rates:
    """Pick the rate of every row of the comparison in ``tree``, and write them to ``root``.

    ``trials``: how many each row gets. They are runs in folders under ``root``, which exist,
    ``resume`` and ``overwrite`` as those of ``run_all`` do, as are the other arguments. A command
    that was killed ends, with ``resume``, in what it would have ended in. Raises BadInput for
    settings that do not work, before anything is trained.
    """
    path = rates_file(root)
    if path.exists():
        read_rates(path)  # it is read again at the end; a damaged one is refused before the trials
    tree = without_own_rates(tree, path)
    planned = plan_trials(tree, trials)
    for trial in planned:
        _check_validation(trial.run.config)
    _warn_of_privacy(planned, on_warning)
    left, scores = planned, dict[str, float]()
    for rung in range(len(rung_rounds(trials, 1))):
        left = [_stopping_at(trial, trials, rung) for trial in left]
        runs = [trial.run for trial in left]
        folders = run_all(
            runs,
            root,
            # What the first rung has begun the others go on with.
            overwrite=overwrite and rung == 0,
            resume=resume or rung > 0,
            on_progress=on_progress,
            on_warning=on_warning,
            jobs=jobs if rung == 0 else _jobs(jobs, root, runs),
        )
        metric = metric_of(runs[0].config)
        for run, folder in zip(runs, folders, strict=True):
            scores[run.label] = _score(folder, run, metric)
        left = promoted(left, scores, metric)
    rates = _picked(left, scores, trials, from_tree(tree))
    for line in _notes(left, planned, rates):
        on_warning(line)
    write_rates(path, with_earlier(rates, path))
    return rates


def without_own_rates(tree: Tree, path: Path) -> Tree:
    """Return ``tree`` without ``compare.rates`` where that is ``path``, the file to be written.

    Otherwise a tuning that is repeated would begin elsewhere than the first time.
    """
    choice = from_tree(tree).compare
    if choice.rates is None or choice.rates.resolve() != path.resolve():
        return tree
    compared = {key: value for key, value in tree["compare"].items() if key != "rates"}
    return {**tree, "compare": compared}


def with_earlier(rates: Rates, path: Path) -> Rates:
    """Return ``rates`` with what an earlier tuning of the same work has picked for other rows."""
    if not path.exists():
        return rates
    earlier = read_rates(path)
    if replace(earlier, rates={}) != replace(rates, rates={}):
        return rates
    return replace(rates, rates={**earlier.rates, **rates.rates})


def plan_trials(tree: Tree, trials: int) -> list[Trial]:
    """Return the trials of every row of the comparison in ``tree``, ``trials`` of each.

    The first of a row tries what the row would be run with; the others move the rate away from
    that step by step, and draw from the values at which a field of the method is worth tuning.

    >>> asked = {"compare": {"methods": ["lora"]}}
    >>> [trial.run.config.training.lr for trial in plan_trials(asked, 4)]
    [0.01, 0.0032, 0.032, 0.001]
    """
    if not 1 <= trials <= MOST_TRIALS:
        raise BadInput(f"trials = {trials}: give every method 1 to {MOST_TRIALS}, such as 4")
    planned: list[Trial] = []
    for label, settings in rows_of(tree):
        config = from_tree(settings)
        for number, rate in enumerate(rates_around(config.training.lr, trials)):
            tried = {RATE: rate, **_drawn(config, label, number)}
            planned.append(_trial(label, settings, tried, trials))
    return planned


def rates_around(rate: float, count: int) -> list[float]:
    """Return ``count`` learning rates, evenly spaced in the logarithm.

    ``rate`` is the first, then come those nearest to it. Of an even number, one more is below it
    than above.

    >>> rates_around(0.01, 3)
    [0.01, 0.0032, 0.032]
    """
    step = min(STEP, SPAN / max(1, count - 1))
    offsets = range(-(count // 2), count - count // 2)
    nearest_first = sorted(offsets, key=lambda offset: (abs(offset), offset))
    rates: list[float] = []
    for offset in nearest_first:
        # Two digits, which stand in names of folders; one more where rates are close.
        digits = 2 if step == STEP else 3
        rates.append(float(f"{rate * 10 ** (offset * step):.{digits}g}") if offset else rate)
    return rates


def rung_rounds(trials: int, rounds: int) -> list[int]:
    """Return the round after which each rung ends; as many rungs as leave one of ``trials``.

    All but the last are multiples of the first, so that evaluations every so many rounds meet all.

    >>> rung_rounds(8, 20), rung_rounds(4, 15), rung_rounds(1, 15)
    ([5, 10, 20], [8, 15], [15])
    """
    rungs = max(1, (trials - 1).bit_length())  # the logarithm to base 2, rounded up
    first = math.ceil(rounds / 2 ** (rungs - 1))
    return [min(rounds, first * 2**rung) for rung in range(rungs)]


def promoted(trials: Sequence[Trial], scores: Mapping[str, float], metric: Metric) -> list[Trial]:
    """Return the better half of each row's ``trials``, rounded up, in their order.

    ``scores``: by the label of the run. Of equal scores the earlier trial counts as better; NaN
    comes last.
    """
    rows: dict[str, list[Trial]] = {}
    for trial in trials:
        rows.setdefault(trial.row, []).append(trial)
    kept: list[Trial] = []
    for of_row in rows.values():
        # Sorting is stable, so equals keep their order.
        best_first = sorted(of_row, key=lambda trial: _rank(scores[trial.run.label], metric))
        better = best_first[: (len(of_row) + 1) // 2]
        kept += [trial for trial in of_row if trial in better]
    return kept


def _rank(score: float, metric: Metric) -> float:
    """Return a number that is smaller the better ``score`` is."""
    if math.isnan(score):
        return math.inf
    return -score if metric.higher_is_better else score


def _drawn(config: Config, label: str, number: int) -> dict[str, Any]:
    """Return what trial ``number`` of a row tries of the fields worth tuning, by dotted key.

    The first trial tries what the settings say, others a draw that follows from the run's seed.
    """
    constructor: Any = constructors()[config.method["name"]]
    hints = get_type_hints(constructor, include_extras=True)
    tried: dict[str, Any] = {}
    for field in fields(constructor):
        name, values = field.name, _worth_tuning(hints[field.name])
        if not values:
            continue
        draw = derive(config.seed, "tune", label, name, number) % len(values)
        usual = config.method.get(name, field.default)
        tried[f"method.{name}"] = values[draw] if number else usual
    return tried


def _worth_tuning(hint: Any) -> Sequence[Any]:
    """Return the values at which a field with the annotation ``hint`` is tried; mostly none."""
    for mark in getattr(hint, "__metadata__", ()):
        match mark:
            case WorthTuning(values):
                return values
    return ()


def _trial(label: str, settings: Tree, tried: Mapping[str, Any], trials: int) -> Trial:
    """Return a trial of row ``label``: scored on validation texts, as every rung ends."""
    rounds = from_tree(settings).federation.rounds
    every = rung_rounds(trials, rounds)[0]
    # The number of trials belongs to the settings: with another one, rungs and rates are others.
    own = {
        "evaluation": {"every": every, "start": False, "per_client": False},
        "tuned": {"trials": trials, "source": SOURCE},
    }
    return Trial(label, tried, swept(label, settings, tried, own))


def _check_validation(config: Config) -> None:
    """Raise BadInput where no server scores validation texts."""
    for key, value in (
        ("evaluation.where", config.evaluation.where),
        ("engine.kind", config.engine.kind),
    ):
        if value == "sites":
            raise BadInput(
                f"{key} = 'sites': tuning picks by the validation split, which sites do not have; "
                "tune in a simulation, and give its file to compare.rates"
            )


def _warn_of_privacy(planned: Sequence[Trial], on_warning: OnWarning) -> None:
    """Tell that trials use up privacy, where any of them promises some."""
    if any(promises(trial.run.config) for trial in planned):
        on_warning(
            "differential privacy: every trial trains on the clients' data, and its epsilon is "
            "not in that of the run that takes its rate; add them up, or tune on public data"
        )


def _stopping_at(trial: Trial, trials: int, rung: int) -> Trial:
    """Return ``trial`` with a run that stops at the end of a rung."""
    rounds = rung_rounds(trials, trial.run.config.federation.rounds)
    return replace(trial, run=replace(trial.run, until=rounds[rung]))


def _score(folder: Path, run: Planned, metric: Metric) -> float:
    """Return the score of a trial where its rung ends; NaN where there is none."""
    score = math.nan
    for row in stream(folder / LEDGER):
        if isinstance(row, EvaluationRow) and row.round == run.until:
            score = row.metrics.get(metric.name, math.nan)
    return score


def _jobs(asked: int, root: Path, runs: Sequence[Planned]) -> int:
    """Return how many trials go on at once: ``asked``, or where that is 0 what the cores allow.

    They keep the threads that they began with, each on its share of the cores.
    """
    if asked:
        return asked
    hardware = read_settings(runs[0].folder(root))[1]
    if hardware.device != "cpu" or runs[0].config.machine.threads:
        return 1
    return max(1, min(MOST, (os.cpu_count() or 1) // max(1, hardware.threads)))


def _picked(
    best: Sequence[Trial], scores: Mapping[str, float], trials: int, config: Config
) -> Rates:
    """Return what the ``best`` trial of each row tried; rows without a score are left out."""
    picked: dict[str, Picked] = {}
    for trial in best:
        score, rounds = scores[trial.run.label], trial.run.until
        if math.isnan(score) or rounds is None:
            continue
        sections: dict[str, dict[str, Any]] = {"training": {}, "method": {}}
        for key, value in trial.tried.items():
            section, _, name = key.partition(".")
            sections[section][name] = value
        picked[trial.row] = Picked(trials, rounds, score, **sections)
    metric = metric_of(config).name
    optimizer = config.training.optimizer
    return Rates(config.task.kind, optimizer, metric, picked, work_of(config))


def _notes(best: Sequence[Trial], planned: Sequence[Trial], rates: Rates) -> list[str]:
    """Return what the user should know of the picks, a line each."""
    lines: list[str] = []
    for trial in best:
        if trial.row not in rates.rates:
            lines.append(f"{trial.row}: none of its trials has a score, so nothing was picked")
            continue
        tried = [other.tried[RATE] for other in planned if other.row == trial.row]
        rate = trial.tried[RATE]
        if len(tried) > 1 and rate in (min(tried), max(tried)):
            which = "lowest" if rate == min(tried) else "highest"
            lines.append(
                f"{trial.row}: {rate:g} is the {which} rate that was tried; "
                "a better one may lie beyond it"
            )
    return lines
