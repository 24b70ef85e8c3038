"""Programs that are started again when they die: a site's trainer, the server's SuperLink and gate."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.deployment import child
from fedpeft.deployment.child import TrainerProcess, trainer_process
from fedpeft.engines.flower import superlink
from fedpeft.engines.flower.superlink import Program, free_port, wait_for, watched
from fedpeft.errors import BadInput, WireError
from fedpeft.wire import frames
from fedpeft.wire.frames import Frame, connected, listening

ROOT = Path(__file__).parents[2]

TRAINER = """
import os, sys, time
from pathlib import Path
from fedpeft.wire.frames import Frame, listening, receive, send
from fedpeft.wire.lifeline import end_with_parent
end_with_parent()
with listening(Path(sys.argv[1])) as server:
    while True:
        connection, _ = server.accept()
        with connection:
            try:
                while True:
                    frame = receive(connection)
                    dies = frame.header["dies"]
                    if dies == "always" or dies == "once" and not os.path.exists(sys.argv[1] + ".died"):
                        open(sys.argv[1] + ".died", "w").close()
                        os.kill(os.getpid(), 9)
                    send(connection, Frame({"process": os.getpid()}, frame.body))
            except Exception:
                pass
"""
"""A trainer without a model, which dies when it is told to."""


@pytest.fixture
def path() -> Iterator[Path]:
    """The path of a socket, a short one."""
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    yield folder / "trainer.sock"
    shutil.rmtree(folder)


@pytest.fixture
def light(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the trainer without a model be started, and give the path of its socket."""
    real = subprocess.Popen

    def popen(command: list[str], **others: Any) -> Any:
        assert command[1:3] == ["-m", "fedpeft.deployment.trainer"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return real([sys.executable, "-c", TRAINER, str(path)], env=environment, **others)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return path


def ask(trainer: TrainerProcess, dies: str = "never") -> int:
    """Return the process that answers."""
    answer = trainer.ask(Frame({"dies": dies}, b"request"))
    assert answer.body == b"request"
    return int(answer.header["process"])


def test_a_trainer_that_dies_over_a_request_is_started_again_and_asked_again(light: Path) -> None:
    said: list[str] = []
    with trainer_process(light.parent / "site.toml", light, said.append) as trainer:
        first = ask(trainer)
        assert ask(trainer) == first
        second = ask(trainer, "once")
        assert second != first
        assert said == ["the trainer has ended (code -9); starting it again"]
        # Killed while nobody asks, as by a system that is out of memory.
        os.kill(second, signal.SIGKILL)
        third = ask(trainer)
        assert third not in (first, second)
        # What always kills it is refused, and the connector lives.
        with pytest.raises(WireError, match="died over this request, twice"):
            ask(trainer, "always")
        assert ask(trainer) != third


def test_a_second_trainer_at_the_same_place_is_refused_and_the_first_one_stays(
    light: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a site that is started twice in one folder."""
    monkeypatch.setattr(child, "LEAVING", 0.2)
    with trainer_process(light.parent / "site.toml", light, lambda _: None) as trainer:
        first = ask(trainer)
        second = TrainerProcess(light.parent / "site.toml", light, lambda _: None)
        with pytest.raises(BadInput, match="is the site running twice?"):
            second.start()
        second.stop()
        assert ask(trainer) == first
        connected(light).close()


def test_a_socket_is_left_to_its_owner(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LEAVING", 0.1)
    with listening(path):
        with pytest.raises(BadInput, match="another process listens"), listening(path):
            pass
        connected(path).close()
    # One that was killed leaves its socket, and no lock.
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening(path):
        connected(path).close()


def test_who_comes_a_moment_too_soon_waits_for_the_other_to_leave(path: Path) -> None:
    """As a site that is started again at once after it was killed, while its trainer is about to end."""
    leaving = threading.Event()

    def other() -> None:
        with listening(path):
            leaving.wait()
            time.sleep(0.2)

    thread = threading.Thread(target=other)
    thread.start()
    while not path.exists():
        time.sleep(0.005)
    leaving.set()
    with listening(path):
        thread.join()
        connected(path).close()


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when this process is told to end as by Ctrl-C."""
    event = threading.Event()
    monkeypatch.setattr(signal, "raise_signal", lambda _: event.set())
    monkeypatch.setattr(superlink, "WAITS", (0.0,) * 5)
    return event


LISTENING = """
import socket, sys, time
from pathlib import Path
if Path(sys.argv[2]).exists():
    sys.exit(3)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    server.accept()
"""


def program(port: int, broken: Path) -> list[str]:
    """Return a program that listens on ``port``, and ends at once where a file says that it is broken."""
    return [sys.executable, "-S", "-c", LISTENING, str(port), str(broken)]


def kill(it: Program) -> None:
    """Kill a program that is watched."""
    assert it._process is not None
    it._process.kill()


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_that_is_killed_is_started_again_and_one_that_does_not_come_up_is_given_up(
    interrupted: threading.Event, path: Path
) -> None:
    """As the SuperLink and the gate: a server that nobody can reach any more ends and can be resumed."""
    port, said, broken = free_port(), list[str](), path.parent / "broken"
    command = program(port, broken)
    with watched(command, path.parent / "log", dict(os.environ), "gate", said.append) as it:
        wait_for(port, it, path.parent / "log")
        for times in (1, 2):
            kill(it)
            until(lambda: len(said) == times)  # noqa: B023
            wait_for(port, it, path.parent / "log")
        assert set(said) == {"the gate has ended (code -9); starting it again"}
        assert not interrupted.is_set()
        broken.touch()
        kill(it)
        until(interrupted.is_set)
    assert said[-1].startswith("the gate ends at once (code 3); see ")


def test_a_program_that_never_comes_up_is_soon_given_up(
    interrupted: threading.Event, path: Path
) -> None:
    port, said = free_port(), list[str]()
    path.touch()
    command = program(port, path)
    with (
        watched(command, path.parent / "log", dict(os.environ), "gate", said.append) as it,
        pytest.raises(BadInput, match=f"port {port}"),
    ):
        wait_for(port, it, path.parent / "log")
    assert len(said) == 1 + superlink.FIRST
    assert "ends at once" in said[-1]
    assert not interrupted.is_set()
