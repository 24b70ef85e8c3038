"""A server and its sites on this machine, as the benchmark of deployments has them: files, processes, clocks."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Final, Self, final

import tomli_w

from fedpeft.deployment.init import Wanted, deploy_init
from fedpeft.engines.flower.superlink import free_port, surroundings
from fedpeft.experiment.recorder import CHECKPOINTS
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, Row, read

NAME: Final = "sites"
"""What the run is called."""
LABELS: Final = ("air", "earth", "fire", "water")
PROGRAM: Final = "from fedpeft.cli import main; main()"
TEXTS: Final = 32
"""Texts of a site, and of the server."""
LOOK: Final = 0.05
"""Seconds between two looks at what is waited for."""
TICKS: Final = os.sysconf("SC_CLK_TCK")
"""Of the clock in which the system counts a process's CPU time, a second."""


@final
@dataclass(frozen=True)
class Place:
    """Where a deployment lies: ``folder`` holds those of ``fedpeft deploy init`` and the run's."""

    folder: Path

    @property
    def server(self) -> Path:
        """Return the server's settings."""
        return self.folder / "d" / "server" / "server.toml"

    @property
    def ca(self) -> Path:
        """Return the certificate of the CA."""
        return self.folder / "d" / "ca" / "ca.crt"

    @property
    def runs(self) -> Path:
        """Return the folder in which the run's folder goes."""
        return self.folder / "runs"

    def site(self, number: int) -> Path:
        """Return the settings of a site."""
        return self.folder / "d" / f"site-{number}" / "site.toml"

    def trainer(self, number: int) -> Path:
        """Return the socket of a site's trainer."""
        return self.site(number).parent / "state" / "trainer.sock"


def prepare(folder: Path, sites: int, rounds: int, **server: object) -> Place:
    """Write keys, certificates, settings and texts for a server and ``sites`` sites.

    LoRA of rank 8 on MiniLM, 0.33 MB each way, two short steps a round, in fp32 with one thread. ``server``: what is laid
    over the server's section. ``folder`` must be short, as sockets lie in it.
    """
    place = Place(folder)
    test = folder / "test.jsonl"
    write_texts(test, 0)
    machine = {"device": "cpu", "precision": "fp32", "attention": "eager", "threads": 1}
    tree = {
        "name": NAME,
        "model": {"name": "minilm", "max_length": 16},
        "machine": machine,
        "data": {"source": "files", "labels": list(LABELS), "test": str(test)},
        "federation": {"rounds": rounds, "clients_per_round": sites, "min_replies": sites},
        "training": {"lr": 1e-3, "steps": 2, "batch_size": 8},
        "method": {"name": "lora", "targets": "query|value", "rank": 8},
        "evaluation": {"every": rounds, "limit": TEXTS},
    }
    settings = folder / "config.toml"
    settings.write_text(tomli_w.dumps(tree))
    deploy_init(folder / "d", Wanted(sites, "localhost", free_port(), settings))
    for number in range(sites):
        _lay_over(place.site(number), {"machine": machine})
        write_texts(place.site(number).parent / "train.jsonl", number)
    section = tomllib.loads(place.server.read_text())["server"]
    _lay_over(place.server, {"server": {**section, "host": "127.0.0.1", **server}})
    return place


def _lay_over(path: Path, changes: Mapping[str, Any]) -> None:
    """Lay whole sections over a TOML file."""
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), **changes}))


def write_texts(path: Path, site: int) -> None:
    """Write a site's texts, all of the same length."""
    lines: list[str] = []
    for number in range(TEXTS):
        label = LABELS[number % len(LABELS)]
        text = f"number {number} of site {site} tells of {label} and of nothing else"
        lines.append(f'{{"text": "{text}", "label": "{label}"}}\n')
    path.write_text("".join(lines))


def fedpeft(*arguments: str | Path) -> list[str]:
    """Return the command line of ``fedpeft`` with this Python."""
    return [sys.executable, "-c", PROGRAM, *map(str, arguments)]


@final
class InVain(SystemExit):
    """Something was waited for and did not come."""


class Processes:
    """Processes, started by name, that all end with the ``with``, and whatever they have started, too."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str]) -> int:
        """Start a process whose output goes into a log of that name; return its number."""
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**surroundings(self._place.folder), "PATH": _path(), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._running[name] = process
        return process.pid

    def says(self, name: str, text: str) -> Callable[[], bool]:
        """Return what tells whether a process has printed ``text``."""
        return lambda: text in self._log(name).read_text(errors="replace")

    def wait_for(self, there: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        """Wait until something is so; raise InVain where it does not come, or a process fails."""
        deadline = time.monotonic() + seconds
        while not there():
            failed = [name for name, one in self._running.items() if one.poll()]
            if failed or time.monotonic() > deadline:
                raise InVain(f"{what}: waited in vain; failed: {failed}\n{self._logs()}")
            time.sleep(LOOK)

    def _log(self, name: str) -> Path:
        return self._place.folder / f"{name}.log"

    def _logs(self) -> str:
        """Return the ends of all logs."""
        ends: list[str] = []
        for path in sorted(self._place.folder.rglob("*.log")):
            ends.append(f"== {path}\n{path.read_text(errors='replace')[-2000:]}")
        return "\n".join(ends)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for one in self._running.values():
            one.terminate()
        for one in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(20.0)
            # Flower's own programs start others, in the same session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def _path() -> str:
    """Return the search path of programs, with those beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@final
@dataclass(frozen=True)
class Round:
    """A round as it was played: its ``seconds`` without scoring, and the training of its slowest site."""

    number: int
    seconds: float
    work: float
    lost: int

    @property
    def over(self) -> float:
        """Return the seconds over the pure work."""
        return self.seconds - self.work


def played(place: Place, running: Processes, rounds: int, seconds: float) -> list[Round]:
    """Wait until all rounds are played, and return them."""
    folder = place.runs / NAME
    ends: dict[int, float] = {}

    def done() -> bool:
        # Old manifests are dropped: a look must come at least every other round.
        ends.update(ends_in(folder / CHECKPOINTS))
        return rounds in ends

    running.wait_for(done, f"{rounds} rounds", seconds)
    return rounds_of(read(folder / FILE), ends)


def ends_in(checkpoints: Path) -> dict[int, float]:
    """Return number of rounds -> when the checkpoint after them was written, for those that are there."""
    ends: dict[int, float] = {}
    for path in checkpoints.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # dropped since
            ends[int(path.stem)] = path.stat().st_mtime
    return ends


def rounds_of(rows: Iterable[Row], ends: Mapping[int, float]) -> list[Round]:
    """Return the rounds that a ledger tells of, and that ended when ``ends`` says.

    What the server takes to score a state at a round's end is left out.
    """
    work: dict[int, dict[int, float]] = {}  # round -> client -> seconds of all its phases
    lost: dict[int, int] = {}
    scoring: dict[int, float] = {}
    for row in rows:
        match row:
            case ClientRow():
                of_round = work.setdefault(row.round, {})
                of_round[row.client] = of_round.get(row.client, 0.0) + row.measured.seconds
                lost[row.round] = lost.get(row.round, 0) + (row.lost is not None)
            case EvaluationRow():
                scoring[row.round] = row.seconds
            case _:
                pass
    found: list[Round] = []
    for number, of_round in sorted(work.items()):
        # The ledger counts the rounds before this one, a checkpoint those after it.
        seconds = ends[number + 1] - ends[number] - scoring.get(number + 1, 0.0)
        found.append(Round(number, seconds, max(of_round.values()), lost[number]))
    return found


def means(rounds: Iterable[Round]) -> dict[str, float]:
    """Return a round's mean seconds, work, and seconds over it; of all rounds but the first, in which processes warm up.

    The benchmark ends where a reply was lost.
    """
    later = [one for one in rounds if one.number > 0]
    if any(one.lost for one in later):
        raise SystemExit(f"a reply was lost: {later}")
    return {
        "round": fmean(one.seconds for one in later),
        "work": fmean(one.work for one in later),
        "over": fmean(one.over for one in later),
    }


def cpu_seconds(parent: int) -> dict[str, float]:
    """Return the CPU time so far of a server's processes: its own, that of its SuperLink, of its gate."""
    names = {"flower_superlink": "SuperLink", "flower.gate": "gate"}
    spent: dict[str, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            above, seconds = parse_stat((folder / "stat").read_text())
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if int(folder.name) == parent:
            spent["server"] = seconds
        elif above == parent:
            name = next((name for part, name in names.items() if part in line), "other")
            spent[name] = spent.get(name, 0.0) + seconds
    return spent


def parse_stat(line: str) -> tuple[int, float]:
    """Return parent and CPU seconds of a process, of its line in ``/proc/<pid>/stat``.

    >>> parse_stat("7 (a (b) c) S 3 7 7 0 -1 0 0 0 0 0 150 50 9 9 20") == (3, 200 / TICKS)
    True
    """
    # Its name, in brackets, may hold anything: what follows the last bracket is counted (proc(5)).
    fields = line.rpartition(")")[2].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS
