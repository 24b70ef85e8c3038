"""The words around tables and figures: the setting in titles, the lines of captions."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath

from fedpeft.report.comparison import Line
from fedpeft.report.metric import Metric
from fedpeft.report.rates import rate_of
from fedpeft.report.summary import Summary
from fedpeft.report.terms import SHARE_OF_MEDIAN, Terms

REASONS = 3
"""How many reasons of lost replies are named: a caption is small, and ``runs.csv`` has them all."""


def setting(runs: Sequence[Summary]) -> str:
    """Return data, model, federation and, if the settings have it, the partition.

    Paths are shortened to their last part. References are left out where there are federated runs:
    they may have another federation, such as one client with all data.
    """
    described = _federated(runs) or runs
    data: list[object] = []
    models: list[object] = []
    clients: list[object] = []
    sampled: list[object] = []
    partitions: list[object] = []
    for run in described:
        row = run.run
        data.append(PurePath(row.data).name)
        models.append(PurePath(row.model).name)
        clients.append(row.clients)
        sampled.append(row.clients_per_round)
        partitions.extend(_partitions(row.settings))
    federation = f"{_listed(clients)} clients, {_listed(sampled)} a round"
    parts = [_listed(data), _listed(models), federation]
    if partitions:
        parts.append(f"partition {_listed(partitions)}")
    return " · ".join(parts)


def _federated(runs: Iterable[Summary]) -> list[Summary]:
    """Return the runs that are no references."""
    return [run for run in runs if run.federated]


def provenance(runs: Sequence[Summary]) -> str:
    """Return the data's digest, the runs' lengths, their seeds and what they were scored on."""
    digests: list[str] = []
    rounds: list[int] = []
    seeds: list[int] = []
    splits: list[str] = []
    for run in runs:
        digests.append(run.run.data_digest[:12])  # 48 bits tell data sets apart
        rounds.append(run.rounds)
        seeds.append(run.run.seed)
        if run.split is not None:
            splits.append(run.split)
    parts = [
        f"data digest {_listed(digests)}",
        f"{_listed(sorted(rounds))} rounds",
        f"seeds {_listed(sorted(seeds))}",
    ]
    if splits:
        parts.append(f"scored on {_listed(splits)}")
    return " · ".join(parts)


def target(terms: Terms, metric: Metric) -> str:
    """Return which score 'to target' means, and where it comes from."""
    if terms.target is None:
        return "no target: nothing was evaluated"
    # The same three cases as in `terms.agree`: given, a share of a score, a score over a share.
    final = f"the median method's final {metric.label}"
    if terms.given:
        source = "as asked"
    elif metric.easier_towards_zero(terms.target):
        source = f"{100 * SHARE_OF_MEDIAN:.0f} % of {final}"
    else:
        source = f"{final} / {SHARE_OF_MEDIAN:g}"
    bound = "" if metric.higher_is_better else "at most "
    return f"target: {metric.label} {bound}{metric.with_unit(terms.target)} ({source})"


def losses(runs: Iterable[Summary]) -> str:
    """Return how many replies were lost for which of the commonest reasons; empty without any."""
    reasons: Counter[str] = Counter()
    for run in runs:
        reasons.update(run.lost)
    if not reasons:
        return ""
    shares: list[str] = []
    others = reasons.total()
    for reason, count in reasons.most_common(REASONS):
        shares.append(f"{count} x {reason}")
        others -= count
    if others:
        shares.append(f"{others} x other (runs.csv)")
    return "lost replies: " + ", ".join(shares)


def privacy(runs: Iterable[Summary]) -> str:
    """Return at which delta, and under which sampling, epsilons are told; empty without any.

    Where a rate was tuned, that the trials are not in them.
    """
    terms: list[str] = []
    tuned = False
    for run in runs:
        rate = rate_of(run.run)
        tuned = tuned or (bool(run.privacy) and rate is not None and rate.trials > 0)
        for row in run.privacy.values():
            amplified = "without" if row.sampling is None else "with"
            whose = "clients" if row.unit == "client" else "rows of a client"
            terms.append(f"{whose} at δ {row.delta:g}, {amplified} amplification by sampling")
    if not terms:
        return ""
    apart = ", without the trials of fedpeft tune" if tuned else ""
    return f"ε: differential privacy of {_listed(terms)}{apart} (docs/security.md)"


def personal(lines: Iterable[Line]) -> str:
    """Return which methods have no global model, and what their score is; empty without any."""
    names = [line.label for line in lines if line.personal]
    if not names:
        return ""
    return f"no global model, but the mean of the clients' own: {', '.join(names)}"


def unfinished(runs: Iterable[Summary]) -> str:
    """Return which runs did fewer rounds than planned; empty when all are complete."""
    short: list[str] = []
    for run in runs:
        planned = run.run.rounds
        if run.rounds < planned:
            short.append(f"{run.run.name} ({run.rounds} of {planned} rounds)")
    return "unfinished: " + ", ".join(short) if short else ""


def stacks(runs: Iterable[Summary]) -> str:
    """Return how to read the figures of clients that trained side by side; empty without any."""
    largest = max(run.side_by_side for run in runs)
    if largest == 1:
        return ""
    return (
        f"up to {largest} clients trained side by side: "
        "seconds are shared out by steps, peak MB is that of all at once"
    )


def _listed(values: Iterable[object]) -> str:
    """Return the different values in their order, each once.

    >>> _listed([20, 30, 20])
    '20, 30'
    """
    return ", ".join(dict.fromkeys(map(str, values)))


def _partitions(settings: Mapping[str, object]) -> Iterator[object]:
    """Yield what is to be said of every table named ``partition``, at any depth.

    That is ``alpha`` of a Dirichlet law over labels, and otherwise its kind, with ``alpha`` where
    that kind uses it.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            if name == "partition" and "alpha" in value:
                yield _partition(value)
            yield from _partitions(value)


def _partition(section: Mapping[str, object]) -> str:
    """Return what is to be said of one section ``partition``.

    >>> _partition({"alpha": 0.1}), _partition({"kind": "iid", "alpha": 0.1})
    ('alpha 0.1', 'iid')
    """
    kind, alpha = section.get("kind", "dirichlet"), f"alpha {section['alpha']}"
    if kind == "dirichlet":
        return alpha
    return f"{kind} {alpha}" if kind in ("label_skew", "cluster") else str(kind)
