"""A server and three sites as processes, with keys, TLS and the gate: what they end in, what others see of them, and that
they go on after the server was killed."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedpeft.deployment.demo import state_digest
from fedpeft.experiment.build import build
from fedpeft.experiment.config import Config
from fedpeft.experiment.run import start

from .builders import LABELS, OWN_WORDS, Ground
from .sites import Deployment, deployed

pytestmark = pytest.mark.slow


def chosen(ground: Ground, rounds: int) -> Config:
    """Return a simulation of three clients; FeDeRA's remember an anchor."""
    return ground.chosen(
        {"method": {"name": "federa"}},
        {"name": "sites", "engine": {"stack": 1}, "partition": {"clients": 3}},
        {"federation": {"rounds": rounds, "clients_per_round": 3, "min_replies": 2}},
        {"data": {"labels": list(LABELS)}},
    )


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, as sockets need one."""
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def write_test_texts(ground: Ground, config: Config, path: Path) -> str:
    """Write the simulation's test texts, run it, and return the digest of its end."""
    federation = build(config)
    held = federation.dataset.test
    lines = [
        json.dumps({"text": t, "label": n}) for t, n in zip(held.texts, held.labels, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    start(federation, path.parent / "here")
    return state_digest(path.parent / "here")


@pytest.fixture
def deployment(ground: Ground, short: Path) -> Iterator[Deployment]:
    config = chosen(ground, 4)
    made = deployed(ground, short, config, {})
    yield made
    made.stop()


def gate_of(deployment: Deployment) -> str:
    return f"https://localhost:{tomllib.loads(deployment.server.read_text())['server']['port']}"


def test_sites_end_in_the_bits_of_a_run_in_one_process_and_others_see_one_port_and_no_secret(
    ground: Ground, short: Path, deployment: Deployment
) -> None:
    here = write_test_texts(ground, chosen(ground, 4), short / "test.jsonl")
    runs = short / "runs"
    form = ("--log", "json")
    metrics = ("--set", "server.metrics=0")
    server = deployment.start("server", "serve", deployment.server, "--runs", runs, *metrics, *form)
    deployment.wait_for(deployment.says("server", "sites can join"))
    for number in range(3):
        deployment.join(number, *form)
    deployment.wait_for(deployment.says("server", "site 2 has joined"))
    watch = deployment.start("watch", "watch", runs / "sites")
    assert_guarded(deployment)
    assert "fedpeft_bytes_total" in scraped(deployment)
    deployment.wait_for(lambda: server.poll() is not None, 120.0)
    assert watch.wait(30.0) == 0
    assert "sites: round 4 of 4" in deployment.log("watch")
    assert deployment.log("watch").strip().endswith("finished")
    assert_logs_without_data(deployment)
    assert server.returncode == 0, deployment.log("server")
    assert state_digest(runs / "sites") == here
    assert (runs / "sites" / "report" / "summary.csv").exists()
    # The sites stay, and leave when they are told to.
    assert [deployment.processes[f"site-{n}"].poll() for n in range(3)] == [None] * 3
    deployment.stop()
    assert [deployment.processes[f"site-{n}"].returncode for n in range(3)] == [0] * 3


def events(deployment: Deployment, name: str) -> list[dict[str, Any]]:
    """Return what a process has told, each line of it one object of JSON."""
    return [json.loads(line) for line in deployment.log(name).splitlines()]


def scraped(deployment: Deployment) -> str:
    """Return what ``/metrics`` says."""
    [port] = [one["port"] for one in events(deployment, "server") if one["event"] == "metrics"]
    return httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text


def assert_logs_without_data(deployment: Deployment) -> None:
    """Assert that logs tell of every round and every answer, and of no text, no label and no path of a site."""
    told = events(deployment, "server")
    assert [one["round"] for one in told if one["event"] == "round"] == [0, 1, 2, 3, 4]
    assert {one["site"] for one in told if one["event"] == "joined"} == {0, 1, 2}
    planted = [
        str(deployment.folder),
        *LABELS,
        *(word for own in OWN_WORDS.values() for word in own),
    ]
    for number in range(3):
        name = f"site-{number}"
        answered = [one for one in events(deployment, name) if one["event"] == "answered"]
        assert len(answered) == 4
        assert all(one["down"] > 0 and one["up"] > 0 for one in answered)
        for mark in planted:
            assert mark not in deployment.log(name)
        private = deployment.site(number).parent / "state" / "trainer.log"
        assert private.stat().st_mode & 0o077 == 0
    for mark in planted[1:]:
        assert mark not in deployment.log("server")


def assert_guarded(deployment: Deployment) -> None:
    """Assert that strangers get nowhere, while the server is up."""
    ca = ssl.create_default_context(cafile=str(deployment.folder / "ca" / "ca.crt"))
    with httpx.Client(base_url=gate_of(deployment), verify=ca, trust_env=False) as stranger:
        for path in (
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/x",
            "/",
        ):
            assert stranger.post(path).status_code == 403, path
        assert stranger.post("/v1/fleet/pull-messages").status_code >= 400
        assert stranger.get("/v1/fedpeft/offer").status_code == 403
    with pytest.raises(httpx.ConnectError):
        httpx.get(gate_of(deployment), trust_env=False)  # another CA
    told = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    secret = (deployment.server.parent / "server-state" / "secret").read_bytes()
    for hidden in (secret.hex(), "PRIVATE KEY"):
        assert hidden not in told
    for file in deployment.folder.rglob("*"):
        if file.name in ("site.key", "server.key", "ca.key", "link.key", "secret", "trainer.sock"):
            assert file.stat().st_mode & 0o077 == 0, file
    outside = own_address()
    if outside:
        port = link_port(deployment)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((outside, port), 1.0)


def own_address() -> str | None:
    """Return an address of this machine that is not the loopback's."""
    found = [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return next((str(address) for address in found if not str(address).startswith("127.")), None)


def link_port(deployment: Deployment) -> int:
    """Return the SuperLink's port, as its command line has it."""
    told = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    state = str(deployment.server.parent / "server-state")
    [line] = {line for line in told.splitlines() if "flower_superlink" in line and state in line}
    return int(line.partition("--port=")[2].split()[0])


def test_a_killed_server_goes_on_with_the_same_sites_and_ends_in_the_same_bits(
    ground: Ground, short: Path, deployment: Deployment
) -> None:
    here = write_test_texts(ground, chosen(ground, 4), short / "test.jsonl")
    runs = short / "runs"
    server = deployment.start("server", "serve", deployment.server, "--runs", runs)
    for number in range(3):
        deployment.join(number)
    second = runs / "sites" / "checkpoints" / "000002.json"
    deployment.wait_for(second.exists, 120.0)
    server.send_signal(signal.SIGKILL)
    server.wait()
    del deployment.processes["server"]
    resumed = deployment.start("resumed", "resume", runs / "sites")
    deployment.wait_for(lambda: resumed.poll() is not None, 180.0)
    assert resumed.returncode == 0, deployment.log("resumed")
    assert state_digest(runs / "sites") == here


def test_a_site_whose_key_is_unknown_or_whose_ca_is_another_is_refused_in_one_line(
    ground: Ground, short: Path, deployment: Deployment
) -> None:
    write_test_texts(ground, chosen(ground, 1), short / "test.jsonl")
    deployment.start("server", "serve", deployment.server, "--runs", short / "runs")
    deployment.wait_for(deployment.says("server", "sites can join"))
    unknown = deployment.server.parent / "sites" / "site-2.pub"
    unknown.unlink()
    for name, change, told in (
        ("unknown", None, "does not know this site's key"),
        (
            "wrong-ca",
            deployment.server.parent / "server-state" / "link-ca.crt",
            "not signed by the CA",
        ),
    ):
        if change is not None:
            shutil.copyfile(change, deployment.site(2).parent / "ca.crt")
        intruder = deployment.start(name, "join", deployment.site(2))
        assert intruder.wait(60.0) == 2, deployment.log(name)
        assert told in deployment.log(name)
        del deployment.processes[name]
    os.chmod(deployment.site(1).parent / "site.key", 0o644)
    careless = deployment.start("careless", "join", deployment.site(1))
    assert careless.wait(60.0) == 2
    assert "can be read by others" in deployment.log("careless")
    del deployment.processes["careless"]
