"""What a set of runs says about itself in words: the setting for titles, the small print for captions."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath

from fedpeft.report.summary import Summary
from fedpeft.report.terms import SHARE_OF_MEDIAN, Terms


def setting(runs: Sequence[Summary]) -> str:
    """Return data and model (of a path its last part), federation and, if the settings have it, the partition's alpha.

    Of references, which have a federation of their own, only where there is nothing else.
    """
    rows = [run.run for run in runs if run.federated] or [run.run for run in runs]
    parts = [
        _listed(PurePath(row.data).name for row in rows),
        _listed(PurePath(row.model).name for row in rows),
        f"{_listed(row.clients for row in rows)} clients, {_listed(row.clients_per_round for row in rows)} a round",
    ]
    alphas = [alpha for row in rows for alpha in _alphas(row.settings)]
    return " · ".join([*parts, f"partition alpha {_listed(alphas)}"] if alphas else parts)


def provenance(runs: Sequence[Summary]) -> str:
    """Return the digest of the data, how long the runs were, their seeds and what they were scored on: one line."""
    seeds = _listed(sorted(run.run.seed for run in runs))
    splits = _listed(run.split for run in runs if run.split is not None)
    parts = [
        f"data digest {_listed(run.run.data_digest[:12] for run in runs)}",
        f"{_listed(sorted(run.rounds for run in runs))} rounds",
        f"seeds {seeds}",
    ]
    return " · ".join([*parts, f"scored on {splits}"] if splits else parts)


def target(terms: Terms) -> str:
    """Return which accuracy 'to target' means, and where it comes from."""
    if terms.target is None:
        return "no target: nothing was evaluated"
    source = (
        "as asked"
        if terms.given
        else f"{100 * SHARE_OF_MEDIAN:.0f} % of the median method's final accuracy"
    )
    return f"target: accuracy {100 * terms.target:.1f} % ({source})"


def losses(runs: Sequence[Summary]) -> str:
    """Return how many replies were lost for which of the commonest reasons; empty when none was."""
    reasons = sum((Counter(run.lost) for run in runs), Counter[str]())
    if not reasons:
        return ""
    named = reasons.most_common(3)
    rest = reasons.total() - sum(count for _, count in named)
    shares = [f"{count} x {reason}" for reason, count in named] + (
        [f"{rest} x other (runs.csv)"] if rest else []
    )
    return "lost replies: " + ", ".join(shares)


def unfinished(runs: Sequence[Summary]) -> str:
    """Return which runs did fewer rounds than they set out to; empty when all are complete."""
    short = [
        f"{run.run.name} ({run.rounds} of {run.run.rounds} rounds)"
        for run in runs
        if run.rounds < run.run.rounds
    ]
    return "unfinished: " + ", ".join(short) if short else ""


def stacks(runs: Sequence[Summary]) -> str:
    """Return how measured figures of clients that trained side by side are to be read; empty when none did."""
    most = max(run.side_by_side for run in runs)
    if most == 1:
        return ""
    return f"up to {most} clients trained side by side: seconds are shared out by steps, peak MB is that of all at once"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _alphas(settings: Mapping[str, object]) -> Iterator[object]:
    """Yield ``alpha`` of every table named ``partition``, at any depth; an adapter's alpha is another thing."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            if name == "partition" and "alpha" in value:
                yield value["alpha"]
            yield from _alphas(value)
