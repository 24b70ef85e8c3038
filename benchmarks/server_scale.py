"""The server alone: time and peak memory of one round with 10 to 10,000 clients.

    python -m benchmarks.server_scale            # about 10 minutes on 2 cores
    python -m benchmarks.server_scale --quick    # up to 100 clients
    python -m benchmarks.server_scale --clients 1000 --most-full 0    # 2 minutes: the SVD methods over LoRA

Clients answer at once with what they were sent, a little moved, so all the time is the server's: building the request,
reading, checking and merging replies, writing the ledger. Every size runs in a process of its own.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import Figure, in_process, interleaved, ratio, report
from benchmarks.setting import Setting
from fedpeft.federation.server import federate
from fedpeft.ledger import FILE, ClientRow, Ledger, Measured, measured, stream
from fedpeft.types import Client, Payload, Reply, State
from fedpeft.wire.messages import Response

COUNTS = (10, 100, 1_000, 10_000)
METHODS = ("lora", "fedara", "flexlora", "raflora", "fedsvd", "florist", "full")


@dataclass
class Echo:
    """An engine whose clients answer at once, with values of their own."""

    answer: Callable[[Client], bytes]

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply]:
        """Build every client's request and yield its answer."""
        for client in clients:
            request(client)
            yield Reply(client, self.answer(client))


def play(method: str, count: int) -> dict[str, Any]:
    """Return seconds and peak memory of one round with ``count`` clients."""
    whole = replace(Setting(), method=method, precision="fp32", stack=1).assembly()
    state = whole.first_state()
    due = whole.method.expects(state, whole.method.send(state, Client(0)))
    answers = [_answer(due, state, number) for number in range(2)]
    clients = [Client(number, examples=2) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        with Ledger(Path(folder) / FILE) as ledger, measured() as meter:
            for _ in federate(
                whole.method,
                state,
                Echo(lambda client: answers[client.id % 2]),
                lambda _: clients,
                range(1),
                config=whole.worker.config,
                min_replies=1,
                record=ledger.append,
            ):
                ledger.sync()
        told = sum(
            isinstance(row, ClientRow) and not row.lost for row in stream(Path(folder) / FILE)
        )
    if told != count:
        raise SystemExit(f"{count - told} of {count} clients were lost")
    return {
        "seconds": meter.seconds,
        "peak": meter.peak_memory / 1e6,
        "message": len(answers[0]) / 1e6,
    }


def _answer(due: Payload, state: State, number: int) -> bytes:
    """Return a valid answer: what is shared, moved by ``number`` / 100, and ones elsewhere."""
    payload = {}
    for name, form in due.items():
        start = state.shared.get(name)
        same = start is not None and start.shape == form.shape
        payload[name] = (
            start + number / 100
            if same and start is not None
            else torch.ones(form.shape, dtype=form.dtype)
        )
    return Response(0, payload, Measured(examples=1 + number, loss=0.0)).encode()


def main(
    look: Annotated[bool, typer.Option("--quick", help="Up to 100 clients, once.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.")] = 5,
    clients: Annotated[int | None, typer.Option(help="This many clients alone.")] = None,
    most_full: Annotated[
        int, typer.Option(help="Clients of full fine-tuning at most: 91 MB each way.")
    ] = 1_000,
) -> None:
    """Print seconds and peak memory of a round over the number of clients."""
    counts: tuple[int, ...] = COUNTS
    if look:
        repeats, counts = 1, COUNTS[:2]
    if clients is not None:
        counts = (clients,)
    points = {
        f"{method} {count}": {"method": method, "count": count}
        for method in METHODS
        for count in counts
        if method != "full" or count <= most_full
    }
    found = interleaved(repeats, **{name: _measure(point) for name, point in points.items()})
    rows = []
    for name, one in found.items():
        method, _, count = name.partition(" ")
        first = found[f"{method} {counts[0]}"]
        more = one["peak"].median / first["peak"].median
        each = Figure(tuple(1000 * value / int(count) for value in one["seconds"].values))
        over = ratio(one["seconds"], found[f"lora {count}"]["seconds"])
        rows.append(
            (method, count, one["seconds"], each, over, f"{one['peak'].median:.0f}", f"{more:.2f}")
        )
    columns = (
        "method",
        "clients",
        "s",
        "ms per client",
        "over lora",
        "peak MB of the process",
        f"over {counts[0]} clients",
    )
    report("server_scale", columns, rows, setting=asdict(Setting()), repeats=repeats)


def _measure(point: dict[str, Any]) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        found = in_process("benchmarks.server_scale", point)
        return {"seconds": found["seconds"], "peak": found["peak"]}

    return measure


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(play(**json.loads(sys.argv[1]))))
    else:
        typer.run(main)
