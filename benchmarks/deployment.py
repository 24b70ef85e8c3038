"""What a deployment costs beside its work: seconds of a round, idle sites, how many sites one machine serves.

    python -m benchmarks.deployment             # all figures
    python -m benchmarks.deployment rounds      # seconds of a round alone; or: sites
    python -m benchmarks.deployment --quick

Server, SuperLink, gate and sites are processes of this machine, with keys and TLS. A round's work is what the slowest site
trained, as the ledger has it; all else, from one checkpoint to the next, is what the deployment costs. The ways are measured
in turn: fedpeft's own, the same with the SuperLink's database, and Flower's own programs with `fedpeft flower-app`. For the
other figures many connectors share a process, and answer at once with what they were sent.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Final, Never

import tomli_w
import typer

from benchmarks.common import Figure, interleaved, ratio, report
from benchmarks.deployed import (
    InVain,
    Place,
    Processes,
    Round,
    cpu_seconds,
    fedpeft,
    means,
    played,
    prepare,
)
from fedpeft.engines.flower.app_folder import write_app
from fedpeft.engines.flower.claim import register
from fedpeft.engines.flower.sites import numbers_of
from fedpeft.engines.flower.superlink import Link, free_port

SITES: Final = 2
"""That train."""
DEADLINE: Final = 120.0
"""Seconds in which a round of many sites has to end, and each of them to answer."""
SETTLING: Final = 10.0
"""Seconds until sites that have nothing to do ask as seldom as they ever do."""
HOLDS: Final = 50
"""Sites that share a process."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    ``rounds`` of fedpeft's own way, ``stock`` of Flower's programs, ``idle`` seconds of idle sites, rounds with so many
    sites each of ``crowds``.
    """

    repeats: int = 2
    rounds: int = 12
    stock: int = 4
    idle: float = 20.0
    crowds: tuple[int, ...] = (50, 100)
    crowd_rounds: int = 2


QUICK: Final = Plan(repeats=1, rounds=6, stock=3, idle=10.0, crowds=(50,))


@dataclass(frozen=True)
class Goal:
    """What a figure is held against, its ``floor`` and ``stretch``; ``more``: whether more is better."""

    floor: float
    stretch: float | None = None
    more: bool = False

    def met(self, value: float) -> str:
        """Return which of both a value reaches.

        >>> Goal(1.5, 0.7).met(0.8), Goal(5, 10, more=True).met(4.0)
        ('floor', 'missed')
        """
        sign = -1.0 if self.more else 1.0
        if self.stretch is not None and sign * value <= sign * self.stretch:
            return "stretch"
        return "floor" if sign * value <= sign * self.floor else "missed"


def warm(rounds: int, *, database: bool) -> dict[str, float]:
    """Return a round's seconds by fedpeft's own way: TLS, keys, the gate, two sites that train."""
    with _folder() as folder:
        place = prepare(folder, SITES, rounds, database=database, joining=120.0)
        with Processes(place) as running:
            running.start("server", fedpeft("serve", place.server, "--runs", place.runs))
            for number in range(SITES):
                running.start(f"site-{number}", fedpeft("join", place.site(number)))
            return means(played(place, running, rounds, 240.0))


def stock(rounds: int) -> dict[str, float]:
    """Return a round's seconds by Flower's own programs, with TLS and keys, in front of the same trainers."""
    with _folder() as folder:
        place = prepare(folder, SITES, rounds, joining=120.0)
        port = free_port()
        connection = {"address": f"127.0.0.1:{port}", "root-certificates": str(place.ca)}
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            tomli_w.dumps({"superlink": {"link": connection}})
        )
        write_app(folder / "app")
        with Processes(place) as running:
            running.start("superlink", _superlink(place, port))
            for number in range(SITES):
                running.start(f"trainer-{number}", fedpeft("trainer", place.site(number)))
            for number in range(SITES):
                running.wait_for(place.trainer(number).exists, "a trainer")
            keys = numbers_of(place.server.parent / "sites")
            link = Link(port, place.ca.read_bytes(), b"")
            register(link, {key: f"site {number}" for key, number in keys.items()})
            for number in range(SITES):
                running.start(f"supernode-{number}", _supernode(place, number, port))
            settings = f"config='{place.server}' runs='{place.runs}'"
            running.start("run", ["flwr", "run", str(folder / "app"), "link", "-c", settings])
            return means(played(place, running, rounds, 360.0))


def _superlink(place: Place, port: int) -> list[str]:
    """Return the command of Flower's own server."""
    server = place.server.parent
    return [
        "flower-superlink",
        f"--ssl-certfile={server / 'server.crt'}",
        f"--ssl-keyfile={server / 'server.key'}",
        f"--ssl-ca-certfile={place.ca}",
        "--enable-supernode-auth",
        "--host=127.0.0.1",
        f"--port={port}",
    ]


def _supernode(place: Place, number: int, port: int) -> list[str]:
    """Return the command of Flower's own node of a site."""
    return [
        "flower-supernode",
        f"--superlink=127.0.0.1:{port}",
        f"--root-certificates={place.ca}",
        f"--auth-supernode-private-key={place.site(number).parent / 'site.key'}",
        f"--port={free_port()}",
        f"--node-config=trainer='{place.trainer(number)}'",
    ]


@dataclass(frozen=True)
class Crowd:
    """A server, whose process has the number ``server``, that waits for the last of ``sites`` sites that do not train."""

    place: Place
    running: Processes
    sites: int
    server: int
    rounds: int


@contextmanager
def crowd(sites: int, rounds: int) -> Iterator[Crowd]:
    """Run a server and all of ``sites`` sites but one, for the length of a ``with``."""
    with _folder() as folder:
        place = prepare(
            folder, sites, rounds, database=False, joining=600.0, deadline=DEADLINE, tries=1
        )
        with Processes(place) as running:
            server = running.start("server", fedpeft("serve", place.server, "--runs", place.runs))
            running.wait_for(running.says("server", "sites can join"), "the server")
            for first in range(0, sites - 1, HOLDS):
                held = min(HOLDS, sites - 1 - first)
                running.start(f"sites-{first}", _still(place, first, held))
            there = f"{sites - 1} of {sites} sites are online"
            running.wait_for(running.says("server", there), there, 300.0)
            yield Crowd(place, running, sites, server, rounds)


def _still(place: Place, first: int, count: int) -> list[str]:
    """Return the command of sites that do not train."""
    module = "benchmarks.still_sites"
    return [sys.executable, "-m", module, str(place.folder / "d"), str(first), str(count)]


def idle_cost(there: Crowd, seconds: float) -> dict[str, float]:
    """Return the share of a core that each site costs the server while sites do nothing but ask, by process."""
    time.sleep(SETTLING)
    began, before = time.monotonic(), cpu_seconds(there.server)
    time.sleep(seconds)
    after = cpu_seconds(there.server)
    site_seconds = (time.monotonic() - began) * (there.sites - 1)
    return {name: (after[name] - before[name]) / site_seconds for name in after}


def sites_served(there: Crowd) -> list[Round]:
    """Let the last site join, and return the rounds in which all of them are served."""
    there.running.start("last", _still(there.place, there.sites - 1, 1))
    return played(there.place, there.running, there.rounds, 60.0 + there.rounds * DEADLINE)


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a folder for the length of a ``with``; its path is short, as sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="fp", ignore_cleanup_errors=True) as place:
        yield Path(place)


def row(name: str, figure: Figure, goal: Goal | None = None) -> tuple[object, ...]:
    """Return a figure beside its floor and stretch, and which of them it reaches."""
    if goal is None:
        return name, figure, "", "", ""
    stretch = "" if goal.stretch is None else goal.stretch
    return name, figure, goal.floor, stretch, goal.met(figure.median)


def of_rounds(plan: Plan, details: dict[str, object]) -> list[tuple[object, ...]]:
    """Return the rows of a round's seconds, by three ways in turn."""
    found = interleaved(
        plan.repeats,
        warm=partial(warm, plan.rounds, database=False),
        database=partial(warm, plan.rounds, database=True),
        stock=partial(stock, plan.stock),
    )
    details["ways"] = {
        way: {key: one.values for key, one in of.items()} for way, of in found.items()
    }
    own, database, flowers = (found[way]["over"] for way in ("warm", "database", "stock"))
    return [
        row("seconds a round over its work", own, Goal(1.5, 0.7)),
        row("the same, Flower's own programs", flowers),
        row("Flower's own programs over ours", ratio(flowers, own), Goal(5.0, 10.0, more=True)),
        row("seconds a round over its work, with the database", database, Goal(3.0, 1.5)),
    ]


def of_crowds(plan: Plan, details: dict[str, object]) -> list[tuple[object, ...]]:
    """Return the rows of many sites: what idle ones cost, and how many are served."""
    rows: list[tuple[object, ...]] = []
    served = 0
    for count in plan.crowds:
        name = f"seconds a round of {count} sites that do not train"
        try:
            with crowd(count, plan.crowd_rounds) as there:
                if not rows:
                    rows.append(_idle_row(there, plan, details))
                rounds = sites_served(there)
        except InVain as reason:
            print(reason, file=sys.stderr)
            rows.append((name, "not all were there in time", "", "", ""))
            break
        seconds = Figure(tuple(one.seconds for one in rounds))
        details[f"rounds of {count} sites"] = [asdict(one) for one in rounds]
        if not any(one.lost for one in rounds) and max(seconds.values) <= DEADLINE:
            served = count
        rows.append(row(name, seconds))
    goal = Goal(50, 200, more=True)
    return [*rows, row(f"sites served in a round of {DEADLINE:g} s", Figure((served,)), goal)]


def _idle_row(there: Crowd, plan: Plan, details: dict[str, object]) -> tuple[object, ...]:
    """Return the row of what sites cost that do nothing but ask."""
    idle = idle_cost(there, plan.idle)
    details["idle, share of a core a site"] = idle
    percent = Figure((100.0 * sum(idle.values()),))
    return row(f"% of a core a site, {there.sites - 1} that are idle", percent, Goal(1.0))


FIGURES: Final[Mapping[str, Callable[[Plan, dict[str, object]], list[tuple[object, ...]]]]] = {
    "rounds": of_rounds,
    "sites": of_crowds,
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(FIGURES)}.")] = None,
    look: Annotated[
        bool, typer.Option("--quick", help="Once, with fewer rounds and sites.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions, 0: as planned.")] = 0,
) -> None:
    """Print each figure beside its floor and stretch."""
    # So that whatever is started here is ended, also where this process is told to end, and that
    # it does not inherit a SIGINT that is ignored, as programs in the background do.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    plan = QUICK if look else Plan()
    if repeats:
        plan = replace(plan, repeats=repeats)
    details: dict[str, object] = {}
    rows: list[tuple[object, ...]] = []
    for name in names or FIGURES:
        rows += FIGURES[name](plan, details)
    columns = ("", "measured", "floor", "stretch", "reached")
    report("deployment", columns, rows, plan=asdict(plan), **details)


def _leave(_number: int, _frame: FrameType | None) -> Never:
    raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
