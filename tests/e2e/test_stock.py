"""Flower's own SuperLink and SuperNodes, by its public interface alone, end in the same bits with the same trainers.

The commands are those of docs/deploy.md, "Flower's own programs": with TLS, and nodes that are let in by their keys.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import tomli_w

from fedpeft.deployment.demo import state_digest
from fedpeft.engines.flower.superlink import free_port

from .builders import Ground, cli_call
from .sites import ROOT, Deployment, deployed, fedpeft
from .test_deployment import chosen, write_test_texts

pytestmark = pytest.mark.slow
ROUNDS = 2


@pytest.fixture
def short() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(home: Path) -> dict[str, str]:
    """Return the surroundings of Flower's programs: offline, with a home of their own."""
    programs = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "PATH": os.pathsep.join([os.environ["PATH"], programs]),
        "OMP_NUM_THREADS": "1",
    }


def test_flowers_own_programs_end_in_the_same_bits(ground: Ground, short: Path) -> None:
    here = write_test_texts(ground, chosen(ground, ROUNDS), short / "test.jsonl")
    made = deployed(ground, short, chosen(ground, ROUNDS), {"joining": 120.0})
    home, port = short / "home", free_port()
    home.mkdir()
    link = {"address": f"localhost:{port}", "root-certificates": str(made.folder / "ca" / "ca.crt")}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"fl": link}}))
    assert cli_call("flower-app", short / "app").code == 0
    with ExitStack() as stack:

        def start(name: str, command: list[str]) -> None:
            log = stack.enter_context((made.folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment(home), cwd=short
            )
            made.processes[name] = process

        stack.callback(made.stop)
        start("superlink", superlink(made, port))
        for number in range(3):
            start(f"trainer-{number}", fedpeft("trainer", made.site(number)))
        made.wait_for(lambda: answers(port), 60.0)
        for number in range(3):
            key = made.server.parent / "sites" / f"site-{number}.pub"
            flwr(home, "supernode", "register", key, "fl")
        for number in range(3):
            start(f"supernode-{number}", supernode(made, number, port))
        made.wait_for(made.says("supernode-2", "Starting Flower SuperNode"), 60.0)
        time.sleep(3.0)
        settings = f"config='{made.server}' runs='{short / 'runs'}'"
        flwr(home, "run", short / "app", "fl", "-c", settings)
        name = tomllib.loads(made.server.read_text())["name"]
        last = short / "runs" / name / "checkpoints" / f"{ROUNDS:06d}.json"
        made.wait_for(last.exists, 240.0)
    assert state_digest(short / "runs" / name) == here


def flwr(home: Path, *arguments: str | Path) -> None:
    """Let Flower's own command do something, and fail where it does."""
    done = subprocess.run(
        ["flwr", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(home),
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def answers(port: int) -> bool:
    """Return whether somebody listens at a port of this machine."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def superlink(made: Deployment, port: int) -> list[str]:
    """Return the command of Flower's own server."""
    server = made.server.parent
    return [
        "flower-superlink",
        f"--port={port}",
        "--enable-supernode-auth",
        f"--ssl-certfile={server / 'server.crt'}",
        f"--ssl-keyfile={server / 'server.key'}",
        f"--ssl-ca-certfile={made.folder / 'ca' / 'ca.crt'}",
    ]


def supernode(made: Deployment, number: int, port: int) -> list[str]:
    """Return the command of Flower's own node of a site."""
    site = made.site(number).parent
    return [
        "flower-supernode",
        f"--port={free_port()}",
        f"--superlink=localhost:{port}",
        f"--root-certificates={site / 'ca.crt'}",
        f"--auth-supernode-private-key={site / 'site.key'}",
        f"--node-config=trainer='{site / 'state' / 'trainer.sock'}'",
    ]
