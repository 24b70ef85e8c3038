"""A server and three sites as processes, with keys, TLS and the gate: what they end in, what others see of them, and that
they go on after the server was killed."""

import json
import os
import shutil
import signal
import socket
import ssl
import tempfile
import tomllib
from ast import literal_eval
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tomli_w

from fedpeft.deployment.certificates import site_key
from fedpeft.deployment.demo import state_digest
from fedpeft.experiment.build import build
from fedpeft.experiment.config import Config
from fedpeft.experiment.run import start

from .builders import LABELS, OWN_WORDS, VOCABULARY, Ground
from .outside import (
    PROC,
    environments,
    found,
    key_lines,
    listeners,
    sent,
    shown_by_ps,
    tree_of,
    watched,
)
from .sites import Deployment, deployed

pytestmark = pytest.mark.slow
HAS_PROC = (PROC / "net" / "tcp").exists()
JOINED = tuple(f"site-{number}" for number in range(4))
"""Three sites and one whose data cannot be read."""
DATA = "train.jsonl"
MARK = "PLANTED"


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


def gate_port(deployment: Deployment) -> int:
    return int(tomllib.loads(deployment.server.read_text())["server"]["port"])


def gate_of(deployment: Deployment) -> str:
    return f"https://localhost:{gate_port(deployment)}"


def test_sites_end_in_the_bits_of_a_run_in_one_process_and_others_see_one_port_and_no_secret(
    ground: Ground, short: Path
) -> None:
    with ExitStack() as stack:
        deployment = deployed(ground, short, chosen(ground, 4), {"host": "0.0.0.0"})
        stack.callback(deployment.stop)
        run_watched(ground, short, deployment)
    if not HAS_PROC:
        pytest.skip("no /proc/net/tcp here: sockets and environments were not looked at")


def run_watched(ground: Ground, short: Path, deployment: Deployment) -> None:
    add_a_site_with_a_bad_row(deployment)
    here = write_test_texts(ground, chosen(ground, 4), short / "test.jsonl")
    runs = short / "runs"
    form = ("--log", "json")
    metrics = ("--set", "server.metrics=0")
    server = deployment.start("server", "serve", deployment.server, "--runs", runs, *metrics, *form)
    deployment.wait_for(deployment.says("server", "sites can join"))
    program = watched(short / "sent")
    deployment.start("site-3", "join", deployment.site(3), *form, program=program)
    deployment.wait_for(deployment.says("server", "a site is not taken"))
    for number in range(3):
        site = deployment.site(number)
        deployment.start(f"site-{number}", "join", site, *form, program=program)
    deployment.wait_for(deployment.says("server", "site 2 has joined"))
    watch = deployment.start("watch", "watch", runs / "sites")
    assert_guarded(deployment)
    if HAS_PROC:
        assert_one_port(deployment)
        assert_no_secret_is_shown(deployment)
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
    assert [deployment.processes[name].poll() for name in JOINED] == [None] * 4
    deployment.stop()
    assert [deployment.processes[name].returncode for name in JOINED] == [0] * 4
    assert_nothing_leaves(deployment, ground, short / "sent")


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
    for file in deployment.folder.rglob("*"):
        if file.name in ("site.key", "server.key", "ca.key", "link.key", "secret", "trainer.sock"):
            assert file.stat().st_mode & 0o077 == 0, file


def assert_one_port(deployment: Deployment) -> None:
    """Assert that sites listen nowhere, and of the server's programs the gate alone off the loopback."""
    for name in JOINED:
        assert listeners(tree_of(deployment.processes[name].pid)) == set(), name
    held = listeners(tree_of(deployment.processes["server"].pid))
    outside = {one for one in held if not one.address.is_loopback}
    assert {one.port for one in outside} == {gate_port(deployment)}
    # Beside it the SuperLink and the metrics. Another address of this machine does not reach them.
    ports = {one.port for one in held}
    assert len(ports) > 2
    reached = {port for port in ports if is_open("127.0.0.2", port)}
    assert reached == {gate_port(deployment)}


def is_open(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 5.0).close()
    except ConnectionRefusedError:
        return False
    return True


def assert_no_secret_is_shown(deployment: Deployment) -> None:
    """Assert that command lines and environments, which others may read, hold neither the link's secret nor a key."""
    secret = (deployment.server.parent / "server-state" / "secret").read_bytes()
    lines = [line for path in deployment.folder.rglob("*.key") for line in key_lines(path)]
    assert len(lines) > 10
    running = [one for process in deployment.processes.values() for one in tree_of(process.pid)]
    told, around = shown_by_ps(), environments(running)
    assert b"--superexec-auth-secret-file=" in told
    assert b"PYTHONPATH=" in around
    assert found([secret, *lines], told + around) == []


def add_a_site_with_a_bad_row(deployment: Deployment) -> None:
    """Add a fourth site, with a key that the server knows, whose data cannot be read."""
    folder = deployment.site(3).parent
    shutil.copytree(deployment.site(2).parent, folder)
    settings = tomllib.loads(deployment.site(3).read_text())
    deployment.site(3).write_text(tomli_w.dumps({**settings, "client": 3}))
    private, public = site_key()
    (folder / "site.key").write_bytes(private)
    (deployment.server.parent / "sites" / "site-3.pub").write_bytes(public)
    with (folder / DATA).open("a") as file:
        file.write(json.dumps({"text": [f"{MARK} text"], "label": f"{MARK} label"}) + "\n")


def assert_nothing_leaves(deployment: Deployment, ground: Ground, folder: Path) -> None:
    """Assert that no byte that a site has sent is of its texts, labels, tokens, paths or files; ``folder``: what was sent."""
    content = sent(folder)
    # 1. What has to leave is there: who the site is, tensors by name, the bad site's error.
    for needed in (b"partition-id", b"classifier.weight", b"do not fit; see its log"):
        assert needed in content
    trainers = (folder / "programs").read_text().count("fedpeft.deployment.trainer")
    assert trainers == len(JOINED)
    # 2. What is private is not.
    planted = [*LABELS, *(word for own in OWN_WORDS.values() for word in own)]
    planted += [MARK, DATA, str(deployment.folder), str(ground.folder)]
    marks = [mark.encode() for mark in planted]
    for number in range(3):
        for line in (deployment.site(number).parent / DATA).read_text().splitlines():
            text = json.loads(line)["text"]
            words = [VOCABULARY.index(word) for word in text.split()]
            kinds = ("int64", "int32", "uint16")
            marks += [text.encode(), *(np.array(words, kind).tobytes() for kind in kinds)]
    assert len(marks) > 4 * 100
    assert found(marks, content) == []
    assert MARK in (deployment.site(3).parent / "state" / "trainer.log").read_text()
    # 3. Nor is a pickle of an array or a tensor.
    assert found([b"multiarray", b"torch._utils", b"_rebuild"], content) == []
    # 4. Nobody but the gate and the site's own trainer was spoken to.
    spoken_to = {literal_eval(line) for line in (folder / "addresses").read_text().splitlines()}
    own = {str(deployment.site(number).parent / "state" / "trainer.sock") for number in range(4)}
    others = spoken_to - own
    assert {(ip_address(one[0]).is_loopback, one[1]) for one in others} == {
        (True, gate_port(deployment))
    }
    names = {literal_eval(line) for line in (folder / "names").read_text().splitlines()}
    assert names == {"localhost"}


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
