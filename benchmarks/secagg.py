"""What secure aggregation costs: a round without training and its bytes, over a plain round, by number of clients.

    python -m benchmarks.secagg            # about 3 minutes on 2 cores
    python -m benchmarks.secagg --quick    # 20 clients, 3 rounds

LoRA of rank 8 on query and value of MiniLM, all clients in this process, one after another. Nobody takes a step, so all the
time is that of messages, of mounting, and, with secure aggregation, of keys, shares and masks, the server's and all clients'.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar

import typer
from torch import nn

from benchmarks.common import interleaved, ratio, report
from benchmarks.setting import Setting
from fedpeft.algebra.averaging import MeanMerge, mean_merge
from fedpeft.engines.local import LocalEngine
from fedpeft.experiment.build import Federation
from fedpeft.federation.server import federate
from fedpeft.ledger import ClientRow
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update
from fedpeft.wrappers import SecAgg

COUNTS = (10, 20, 50)


@dataclass(frozen=True)
class Still:
    """A method whose clients send back what they got."""

    paper: ClassVar[str] = "a benchmark"
    inner: Method

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does."""
        return self.inner.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends."""
        return self.inner.send(state, client)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as the method inside does, and take no step."""
        with self.inner.mount(model, down, memory, context) as task:
            yield replace(task, steps=0)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects."""
        return self.inner.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the method inside does."""
        return self.inner.receive(state, updates)

    def mean_merge(self, round_number: int) -> MeanMerge | None:
        """Merge as the method inside does."""
        return mean_merge(self.inner, round_number)


def rounds(whole: Federation, method: Method) -> Callable[[], dict[str, float]]:
    """Return what plays one more round at a time, and tells its seconds, the processor's, its megabytes, and the kilobytes of a reply.

    The first round is left out.
    """
    worker = replace(whole.worker, method=method)
    engine, rows = LocalEngine(worker), list[ClientRow]()
    states = federate(
        method,
        whole.first_state(),
        engine,
        lambda _: whole.clients,
        range(10**6),
        config=worker.config,
        min_replies=1,
        record=rows.append,
    )

    def measure() -> dict[str, float]:
        rows.clear()
        began, cpu_began = time.perf_counter(), time.process_time()
        next(states)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        if any(row.lost for row in rows):
            raise SystemExit(f"a client was lost: {next(row for row in rows if row.lost)}")
        return {
            "seconds": seconds,
            "cpu": cpu,
            "MB": sum(row.down + row.up for row in rows) / 1e6,
            "up": rows[0].up / 1e3,
        }

    measure()
    return measure


def main(
    look: Annotated[bool, typer.Option("--quick", help="20 clients, 3 rounds.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9,
) -> None:
    """Print seconds and megabytes of a round, plain and under secure aggregation."""
    repeats, counts = (3, COUNTS[1:2]) if look else (repeats, COUNTS)
    lines = []
    for count in counts:
        setting = Setting(clients=count, precision="fp32", stack=1)
        whole = setting.assembly()
        still = Still(whole.method)
        found = interleaved(
            repeats,
            plain=rounds(whole, still),
            secagg=rounds(whole, SecAgg().around(still, "0.secagg")),
        )
        plain, secure = found["plain"], found["secagg"]
        lines.append(
            (
                count,
                plain["seconds"],
                secure["seconds"],
                ratio(secure["seconds"], plain["seconds"]),
                plain["MB"],
                secure["MB"],
                ratio(secure["MB"], plain["MB"]),
            )
        )
    columns = (
        "clients",
        "s plain",
        "s secagg",
        "over plain",
        "MB plain",
        "MB secagg",
        "over plain",
    )
    report("secagg", columns, lines, setting=asdict(Setting()), settings=asdict(SecAgg()))


if __name__ == "__main__":
    typer.run(main)
