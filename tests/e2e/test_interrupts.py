"""Ctrl-C ends a command with a line that says how to go on and code 130; a crash is a traceback."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.experiment import trained
from fedpeft.experiment.build import Federation
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG
from fedpeft.federation.client import Worker

from .builders import Ground, Outcome, cli_call
from .crashing import Outcome as Ended
from .crashing import assert_resumes

pytestmark = pytest.mark.usefixtures("no_figures")

COMMAND_LINE = "from fedpeft.cli.app import main; main()"


def interrupted(outcome: Outcome, *needles: str) -> str:
    """Assert that Ctrl-C ended a command with one line that holds ``needles``; return the line."""
    assert outcome.code == 130, outcome
    [line] = outcome.err.splitlines()
    assert line.startswith("fedpeft: stopped")
    for needle in needles:
        assert needle in line
    return line


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Let ``owner.name`` be interrupted by Ctrl-C when it is called for the ``call``-th time."""
    act, calls = getattr(owner, name), [0]

    def acting(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return act(*arguments, **named)

    monkeypatch.setattr(owner, name, acting)


def typed(line: str) -> list[str]:
    """Return the words of the command that a line offers, without the program's name."""
    return shlex.split(line.split("go on with: fedpeft ")[1])


def test_a_run_and_its_resumption_say_how_to_go_on_and_can_be_gone_on_with(
    assembly: Federation,
    undisturbed: Ended,
    ground: Ground,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from .test_full_disk import _options

    folder = runs / "my runs"
    options = [str(option) for option in _options(assembly)]
    start: list[str | Path] = ["run", ground.config, "--runs", folder, *options]
    with monkeypatch.context() as patched:
        interrupt_at(patched, Worker, "handle", 2)
        line = interrupted(cli_call(*start), str(folder / "tiny"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, Worker, "handle", 2)
        again = interrupted(cli_call(*typed(line)))
    assert again == line
    assert_resumes(folder / "tiny", assembly, undisturbed)


def test_a_run_that_is_stopped_before_it_began_leaves_nothing(
    ground: Ground,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt_at(monkeypatch, Federation, "first_state", 1)
    interrupted(cli_call("run", ground.config, "--runs", runs), "nothing was written")
    assert not runs.exists()


def test_many_runs_go_on_with_the_same_command(
    ground: Ground,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = ("--set", "federation.rounds=2", "--set", "training.steps=1", "--runs", runs)
    for command, folder in (
        (("compare", ground.config, "--methods", "lora,bitfit"), runs / "tiny-compare"),
        (("sweep", ground.config, "training.lr=0.01,0.02"), runs / "tiny-sweep"),
    ):
        with monkeypatch.context() as patched:
            interrupt_at(patched, Worker, "handle", 4)  # two runs of two rounds: in the last one
            line = interrupted(cli_call(*command, *short, "--overwrite"))
        assert typed(line) == [*map(str, (*command, *short)), "--resume"]
        outcome = cli_call(*typed(line))
        assert outcome.code == 0, outcome
        assert len([*folder.glob(f"*/{CHECKPOINTS}/000002.json")]) == 2


def test_other_commands_just_stop(
    undisturbed: Ended,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    interrupt_at(monkeypatch, trained, "open_run", 1)
    interrupted(cli_call("predict", undisturbed.folder, "a text"))


def test_a_crash_stays_a_traceback(
    ground: Ground,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Worker, "handle", crash)
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        cli_call("run", ground.config, "--runs", runs)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("when", ["while its processes start", "while they train"])
def test_a_comparison_in_processes_ends_with_all_of_them_in_one_line(
    ground: Ground,
    runs: Path,
    when: str,
) -> None:
    """A terminal sends Ctrl-C to every process of the command."""
    rounds = ("--set", "federation.rounds=100000", "--set", "evaluation.every=100000")
    arguments = (
        "compare",
        ground.config,
        "--methods",
        "lora,bitfit",
        "--jobs",
        "2",
        *rounds,
        "--runs",
        runs,
    )
    words = [sys.executable, "-c", COMMAND_LINE, *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    folder = runs / "tiny-compare" / "lora-s0"
    happened: dict[str, Callable[[], bool]] = {
        "while its processes start": lambda: len(_spawned_by(process.pid)) >= 2,
        "while they train": lambda: any((folder / CHECKPOINTS).glob("*.json")),
    }
    while not happened[when]():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()  # returns when all processes that hold the pipes have ended
    interrupted(Outcome(process.returncode, out, err), "--jobs 2", "--resume")
    assert not [*runs.rglob("*.lock")]
    assert (folder / CONFIG).exists() == (when == "while they train")


def _spawned_by(process: int) -> list[Path]:
    """Return the processes that ``process`` has started to train in, from the system's table."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            words = (place / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if parent == process and b"spawn_main" in words:
            found.append(place)
    return found
