"""A deployment on this machine for tests: a server and sites as processes, with keys, TLS and the gate."""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import tomli_w

from fedpeft.deployment.carving import carve
from fedpeft.deployment.init import Wanted, deploy_init
from fedpeft.engines.flower.superlink import free_port
from fedpeft.experiment.config import Config

from .builders import LABELS, Ground, to_toml

PROGRAM = "from fedpeft.cli import main; main()"
ROOT = Path(__file__).parents[2]


def fedpeft(*arguments: str | Path, program: str = PROGRAM) -> list[str]:
    """Return the command line of ``fedpeft`` with this Python."""
    return [sys.executable, "-c", program, *map(str, arguments)]


def pids_of(*words: str) -> list[int]:
    """Return the processes whose command lines hold all ``words``."""
    told = subprocess.run(
        ["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True
    )
    lines = [line for line in told.stdout.splitlines() if all(word in line for word in words)]
    return [int(line.split()[0]) for line in lines]


@final
@dataclass
class Deployment:
    """A folder with a server and sites; processes are started by name and end with ``stop``."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        return self.folder / "server" / "server.toml"

    def site(self, number: int) -> Path:
        return self.folder / f"site-{number}" / "site.toml"

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def start(
        self, name: str, *arguments: str | Path, program: str = PROGRAM
    ) -> subprocess.Popen[bytes]:
        """Start ``fedpeft`` with ``arguments``; its output goes into a log of that name."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path])),
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                fedpeft(*arguments, program=program),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
            )
        return self.processes[name]

    def join(self, number: int, *options: str) -> None:
        self.start(f"site-{number}", "join", self.site(number), *options)

    def wait_for(self, there: Callable[[], bool], seconds: float = 300.0) -> None:
        """Wait until something is so; fail with all logs where it does not come."""
        deadline = time.monotonic() + seconds
        while not there():
            ended = {name: one.poll() for name, one in self.processes.items() if one.poll()}
            if time.monotonic() > deadline or ended:
                logs = "\n".join(
                    f"== {path.name}\n{path.read_text()[-3000:]}"
                    for path in sorted(self.folder.rglob("*.log"))
                )
                raise AssertionError(f"waited in vain; ended: {ended}\n{logs}")
            time.sleep(0.1)

    def says(self, name: str, text: str) -> Callable[[], bool]:
        return lambda: text in self.log(name)

    def stop(self) -> None:
        for one in self.processes.values():
            one.terminate()
        for one in self.processes.values():
            try:
                one.wait(20.0)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()


def deployed(
    ground: Ground, folder: Path, config: Config, changes: Mapping[str, Any]
) -> Deployment:
    """Write a deployment of the clients of ``config``, and lay ``changes`` over the server's settings."""
    test = folder / "test.jsonl"
    tree = ground.tree()
    del tree["engine"]
    tree["data"] = {"source": "files", "labels": list(LABELS), "test": str(test)}
    tree["name"] = config.name
    for section in ("federation", "training", "method", "evaluation"):
        fields = json.loads(config.to_json())[section]
        tree[section] = {name: value for name, value in fields.items() if value is not None}
    settings = folder / "config.toml"
    settings.write_text(to_toml(tree))
    deploy_init(folder / "d", Wanted(3, "localhost", free_port(), settings))
    made = Deployment(folder / "d")
    for number, site in enumerate(carve(config, made.folder)):
        own = tomllib.loads((site / "site.toml").read_text())
        own["models"] = {"bert": str(ground.model)}
        own["machine"] = ground.tree()["machine"]
        own["data"]["test"] = "test.jsonl"
        own["client"] = number
        (site / "site.toml").write_text(tomli_w.dumps(own))
    server = tomllib.loads(made.server.read_text())
    server["server"].update({"host": "127.0.0.1", "joining": 300.0, **changes})
    made.server.write_text(tomli_w.dumps(server))
    return made
