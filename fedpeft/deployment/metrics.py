"""``/metrics``: runs that are served, in Prometheus' text format, on this machine's loopback.

What is shown is what the runs' folders say at the moment of the question, as for ``fedpeft watch``:
sums of the ledger, and who is online. There is nothing of any text or label in it.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedpeft.errors import BadInput
from fedpeft.experiment.watching import Stage, Standing, Watch

LOOPBACK: Final = "127.0.0.1"


@final
class Runs(Collector):
    """The metrics of runs; each question looks at their folders anew, and reads what is new."""

    def __init__(self, folders: Sequence[Path], on_fault: Callable[[str], None]) -> None:
        self._watches = [Watch(folder) for folder in folders]
        self._on_fault = on_fault
        self._lock = threading.Lock()  # each question comes in a thread of its own

    def describe(self) -> Iterable[Metric]:
        """Return no metrics, so that nothing is read when this is registered."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all runs that have begun."""
        with self._lock:
            standings: list[Standing] = []
            for watch in self._watches:
                try:
                    standings.append(watch.look())
                except BadInput as error:
                    self._on_fault(str(error))
            # A list, so that all of it is of one moment.
            families = _families([one for one in standings if one.summed.run is not None])
        yield from families


def _families(standings: Sequence[Standing]) -> list[Metric]:
    """Return every metric with a sample for each run."""
    rounds = CounterMetricFamily("fedpeft_rounds", "Rounds that are done.", labels=["run"])
    planned = GaugeMetricFamily("fedpeft_rounds_planned", "Rounds in all.", labels=["run"])
    replies = CounterMetricFamily(
        "fedpeft_replies",
        "Requests by what became of them: accepted, lost, or late, that is lost for not in time.",
        labels=["run", "outcome"],
    )
    sizes = CounterMetricFamily(
        "fedpeft_bytes", "Bytes of requests (down) and replies (up).", labels=["run", "direction"]
    )
    seconds = GaugeMetricFamily(
        "fedpeft_round_seconds", "Seconds from the checkpoint before to the last.", labels=["run"]
    )
    score = GaugeMetricFamily(
        "fedpeft_score", "The run's metric as last scored.", labels=["run", "metric"]
    )
    online = GaugeMetricFamily("fedpeft_sites_online", "Sites that are online.", labels=["run"])
    for standing in standings:
        name, total = standing.folder.name, standing.summed.total
        rounds.add_metric([name], standing.done)
        planned.add_metric([name], standing.rounds or 0)
        replies.add_metric([name, "accepted"], total.replied)
        replies.add_metric([name, "lost"], total.lost - total.late)
        replies.add_metric([name, "late"], total.late)
        sizes.add_metric([name, "down"], total.down)
        sizes.add_metric([name, "up"], total.up)
        seconds.add_metric([name], standing.round_seconds)
        if standing.metric is not None:
            metric, value = standing.metric
            score.add_metric([name, metric], value)
        # What a run that is over said last of its sites is not so any more.
        there = standing.now.online if standing.now and standing.stage is Stage.RUNNING else ()
        online.add_metric([name], len(there))
    return [rounds, planned, replies, sizes, seconds, score, online]


@contextmanager
def metrics_endpoint(
    port: int, folders: Sequence[Path], on_fault: Callable[[str], None]
) -> Iterator[int]:
    """Answer ``/metrics`` on ``port`` of the loopback for the length of a ``with``; yield the port.

    ``port``: 0 for one that is free. ``on_fault`` is told of a ledger that cannot be read.
    BadInput where the port is taken.
    """
    # A registry of its own: the library's global one would add what other packages put there.
    registry = CollectorRegistry()
    registry.register(Runs(folders, on_fault))
    with ExitStack() as stack:
        try:
            server, thread = start_http_server(port, LOOPBACK, registry)
        except OSError as error:
            raise BadInput(
                f"server.metrics = {port}: cannot be listened on ({error.strerror})"
            ) from error
        stack.callback(thread.join)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        yield server.server_port
