"""One deployment of real processes that sees fault after fault: it ends in the bits of a run in one process all the same, and
where a deadline makes a fault cost something, the ledger says what. See docs/reliability.md."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pytest
import tomli_w

from fedpeft.deployment.demo import state_digest
from fedpeft.experiment.config import Config
from fedpeft.ledger import ClientRow, read

from .builders import LABELS, Ground
from .sites import Deployment, deployed, pids_of
from .test_deployment import write_test_texts

pytestmark = pytest.mark.slow
ROUNDS = 60
"""Of the first run: so many that it is not over before all faults have come."""
DOWN = 8.0
"""Seconds for which the SuperLink stays away."""
DEADLINE = 10.0
"""Seconds in which a site that is not slow answers on a busy machine, too."""
WAIT = 400.0
"""Seconds for anything that is waited for: most of it takes a few, but a site that is killed while its answer is on its way
holds up the round for 180, and what starts takes its time on a busy machine."""

AHEAD = """
import datetime, time
from flwr.supercore import date
real_now, real_time = date.now, time.time
date.now = lambda: real_now() + datetime.timedelta(seconds=60)
time.time = lambda: real_time() + 60
from fedpeft.cli import main
main()
"""
"""``fedpeft`` on a machine whose clock is a minute ahead."""


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, as sockets need one."""
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def chosen(ground: Ground) -> Config:
    """Return a simulation of three clients, all of which every round needs; FeDeRA's remember an anchor."""
    return ground.chosen(
        {"method": {"name": "federa"}, "name": "sites", "engine": {"stack": 1}},
        {"partition": {"clients": 3}, "data": {"labels": list(LABELS)}},
        {"federation": {"rounds": ROUNDS, "clients_per_round": 3, "min_replies": 3}},
        {"evaluation": {"every": ROUNDS}},
    )


def copied(made: Deployment, number: int, name: str) -> Path:
    """Copy a site's folder, its key with it but not its state; return the settings there."""
    folder = made.folder / name
    shutil.copytree(made.site(number).parent, folder, ignore=shutil.ignore_patterns("state"))
    return folder / "site.toml"


@final
@dataclass(frozen=True)
class UnderWay:
    """A run under way in a deployment."""

    made: Deployment
    folder: Path

    @property
    def done(self) -> int:
        """Return how many rounds are done."""
        manifests = (self.folder / "checkpoints").glob("*.json")
        return max((int(path.stem) for path in manifests), default=0)

    def go_on(self, rounds: int = 2) -> None:
        """Wait for further rounds."""
        due = self.done + rounds
        self.made.wait_for(lambda: self.done >= due, WAIT)


def test_fault_after_fault_costs_no_bit_and_a_slow_site_its_rounds_alone(
    ground: Ground, short: Path
) -> None:
    made = deployed(ground, short, chosen(ground), {"joining": WAIT})
    here = write_test_texts(ground, chosen(ground), short / "test.jsonl")
    run = UnderWay(made, short / "runs" / "sites")
    with ExitStack() as stack:
        stack.callback(made.stop)
        made.start("server", "serve", made.server, "--runs", short / "runs")
        made.wait_for(made.says("server", "sites can join"), WAIT)
        refuse_a_wrong_clock(made)
        for number in range(3):
            made.join(number)
        run.go_on()
        # It tries for as long as the first might be a ghost, while the others die.
        second = made.start("second", "join", copied(made, 0, "second"))
        del made.processes["second"]
        stack.callback(second.kill)
        let_sites_die(run)
        assert second.wait(WAIT) == 2
        assert "is the site running twice?" in made.log("second")
        let_the_links_die(run)
        let_the_server_die(run)
        assert state_digest(run.folder) == here
        assert not [row for row in client_rows(run.folder) if row.lost]
        let_a_site_be_slow(UnderWay(made, short / "runs" / "slow"))


def refuse_a_wrong_clock(made: Deployment) -> None:
    late = made.start("ahead", "join", copied(made, 2, "ahead"), program=AHEAD)
    assert late.wait(WAIT) == 2
    assert "s ahead of its own" in made.log("ahead")
    del made.processes["ahead"]


def let_sites_die(run: UnderWay) -> None:
    """First a trainer alone, then a whole site, then one that leaves in order; all come back."""
    made = run.made
    kill(pids_of("deployment.trainer", str(made.site(0))))
    run.go_on()
    assert "the trainer has ended (code -9); starting it again" in made.log("site-0")
    made.processes["site-1"].kill()
    made.processes["site-1"].wait()
    made.join(1)
    run.go_on()
    assert "takes this site for online still" in made.log("site-1")
    made.processes["site-2"].terminate()
    assert made.processes["site-2"].wait(WAIT) == 0
    made.join(2)
    run.go_on()


def let_the_links_die(run: UnderWay) -> None:
    """First the gate, then the SuperLink, which stays away for a while."""
    made = run.made
    kill(gate_of(made))
    run.go_on()
    assert "the gate has ended (code -9); starting it again" in made.log("server")
    state = str(made.server.parent / "server-state")
    [old] = pids_of("flower_superlink", state)
    kill([old])
    made.wait_for(lambda: bool({*pids_of("flower_superlink", state)} - {old}), WAIT)
    [new] = {*pids_of("flower_superlink", state)} - {old}
    os.kill(new, signal.SIGSTOP)
    time.sleep(DOWN)
    os.kill(new, signal.SIGCONT)
    run.go_on()
    assert "the SuperLink has ended (code -9); starting it again" in made.log("server")


def let_the_server_die(run: UnderWay) -> None:
    made = run.made
    made.processes["server"].kill()
    made.processes["server"].wait()
    del made.processes["server"]
    assert run.done < ROUNDS, "all is over too early"
    resumed = made.start("resumed", "resume", run.folder)
    made.wait_for(lambda: resumed.poll() is not None, 2 * WAIT)
    assert resumed.returncode == 0, made.log("resumed")


def gate_of(made: Deployment) -> list[int]:
    """Return the gate's process, a child of the server; its command line is that of every gate."""
    server = made.processes["server"].pid
    told = subprocess.run(
        ["ps", "--ppid", str(server), "-ww", "-o", "pid,args"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in told.stdout.splitlines() if "fedpeft.engines.flower.gate" in line]
    return [int(line.split()[0]) for line in lines]


def kill(processes: list[int]) -> None:
    [process] = processes
    os.kill(process, signal.SIGKILL)


def client_rows(folder: Path) -> list[ClientRow]:
    return [row for row in read(folder / "ledger.jsonl") if isinstance(row, ClientRow)]


def let_a_site_be_slow(run: UnderWay) -> None:
    """Let the same sites play another run, in which one of them does not answer in time for a while."""
    made = run.made
    tree = tomllib.loads(made.server.read_text())
    tree["name"] = "slow"
    tree["federation"] = {"rounds": 8, "clients_per_round": 3, "min_replies": 2}
    tree["evaluation"]["every"] = 8
    tree["server"].update({"deadline": DEADLINE, "min_sites": 3})
    settings = made.server.with_name("slow.toml")
    settings.write_text(tomli_w.dumps(tree))
    server = made.start("slow", "serve", settings, "--runs", run.folder.parent)
    run.go_on(1)
    [trainer] = pids_of("deployment.trainer", str(made.site(0)))
    os.kill(trainer, signal.SIGSTOP)
    run.go_on(3)
    os.kill(trainer, signal.SIGCONT)
    made.wait_for(lambda: server.poll() is not None, WAIT)
    assert server.returncode == 0, made.log("slow")
    lost = {(row.round, row.client): row.lost for row in client_rows(run.folder) if row.lost}
    assert lost
    assert set(lost.values()) == {f"no answer within {DEADLINE:g} s"}
    assert {client for _, client in lost} == {0}
    assert 7 not in {number for number, _ in lost}, "it takes part again in the end"
