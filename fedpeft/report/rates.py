"""Which learning rates were compared, where they are from, and whether all were tuned alike."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from fedpeft.ledger import RunRow
from fedpeft.report.summary import Summary


@final
@dataclass(frozen=True)
class Rate:
    """The learning rate of a run: ``trials`` among which it was picked, 0 for none, and its origin.

    ``source``: a file of picks, or the sweep that proposes it; empty where the settings give it.
    ``other``: fields that were others when it was picked.
    """

    lr: float
    trials: int
    source: str
    other: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """Return where the rate is from, in words.

        >>> Rate(0.01, 0, "").origin, Rate(0.01, 4, "a-tune/rates.toml").origin
        ('as configured', 'a-tune/rates.toml, 4 trials')
        >>> Rate(0.01, 0, "docs/log.md").origin
        'proposed: docs/log.md'
        """
        if self.trials:
            return f"{self.source or 'as configured'}, {_counted(self.trials)}"
        return f"proposed: {self.source}" if self.source else "as configured"


def rate_of(run: RunRow) -> Rate | None:
    """Return the rate of a run; None where its settings have none."""
    lr = _section(run, "training").get("lr")
    tuned = _section(run, "tuned")  # not there in runs of older versions
    trials, source = tuned.get("trials", 0), tuned.get("source", "")
    if not isinstance(lr, float | int) or not isinstance(trials, int):
        return None
    other = tuned.get("other", [])
    fields = tuple(map(str, other)) if isinstance(other, list | tuple) else ()
    return Rate(float(lr), trials, str(source), fields)


def named(runs: Iterable[Summary]) -> str:
    """Return which row has which rate, and where each is from; empty where no run knows."""
    by_origin: dict[str, dict[str, None]] = {}  # the inner ones are sets that keep their order
    for run in runs:
        rate = rate_of(run.run)
        if rate is not None:
            entry = f"{run.run.method} {rate.lr:g}"
            by_origin.setdefault(rate.origin, {})[entry] = None
    parts = [f"{', '.join(entries)} ({origin})" for origin, entries in by_origin.items()]
    return f"learning rates: {'; '.join(parts)}" if parts else ""


def warning(runs: Sequence[Summary]) -> str:
    """Return a line a warning of a comparison whose rates do not compare; empty where all do."""
    return "\n".join(filter(None, (_of_effort(runs), _of_other_work(runs))))


def _of_other_work(runs: Sequence[Summary]) -> str:
    """Return a line that warns of rates that were picked for other work; empty otherwise."""
    other: set[str] = set()
    for run in runs:
        rate = rate_of(run.run)
        if rate is not None:
            other.update(rate.other)
    if not other:
        return ""
    names = ", ".join(sorted(other))
    return f"warning: rates were tuned with other values of {names}; see fedpeft tune"


def _of_effort(runs: Sequence[Summary]) -> str:
    """Return a line that warns of a comparison whose rates were not tuned alike; empty otherwise.

    Tuned alike are methods whose rates were picked among equally many trials, and methods that
    stand there with equally many rates each, as in a sweep. Nothing is compared where there is one
    method alone, and nothing is known where no run has a rate in its settings.
    """
    efforts = _efforts(runs)
    if len(efforts) < 2:
        return ""
    counts = set(efforts.values())
    if counts == {0}:
        return "warning: no rate was tuned, so differences may be those of rates; see fedpeft tune"
    if len(counts) == 1:
        return ""
    by_count: dict[int, list[str]] = {}
    for name, count in efforts.items():
        by_count.setdefault(count, []).append(name)
    parts: list[str] = []
    for count in sorted(by_count, reverse=True):
        parts.append(f"{_counted(count)}: {', '.join(by_count[count])}")
    return f"warning: rates were not tuned alike ({'; '.join(parts)}); see fedpeft tune"


def _efforts(runs: Sequence[Summary]) -> dict[str, int]:
    """Return by method, and by yardstick, among how many trials or rates a choice was made."""
    rates: dict[str, list[Rate]] = {}
    for run in runs:
        rate = rate_of(run.run)
        if rate is not None:
            rates.setdefault(_whose(run.run), []).append(rate)
    efforts: dict[str, int] = {}
    for name, each in rates.items():
        trials = min(rate.trials for rate in each)
        shown = len({rate.lr for rate in each})
        # Several rates of one method side by side are a sweep, from which one may be chosen.
        efforts[name] = trials if trials or shown == 1 else shown
    return efforts


def _whose(run: RunRow) -> str:
    """Return the method of a run, or its label where it has none in its settings.

    A yardstick is told from the method that it plays.
    """
    name = str(_section(run, "method").get("name", run.method))
    return f"{name} as a reference" if run.reference else name


def _section(run: RunRow, name: str) -> Mapping[str, object]:
    section = run.settings.get(name)
    return section if isinstance(section, Mapping) else {}


def _counted(trials: int) -> str:
    """Return a number of trials in words.

    >>> _counted(4), _counted(1), _counted(0)
    ('4 trials', '1 trial', 'none')
    """
    if not trials:
        return "none"
    return f"{trials} trial" if trials == 1 else f"{trials} trials"
