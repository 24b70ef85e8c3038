"""A run's folder has one writer: the second is refused in one line at once; readers do not wait."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedpeft import api
from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation
from fedpeft.experiment.claim import COMMAND, LOCKS, claimed, on_behalf
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG
from fedpeft.experiment.run import resume, start
from fedpeft.experiment.run_folder import clear, refuse_existing
from fedpeft.federation.checkpoint import manifest

from .builders import Ground, cli_call, refused
from .crashing import ROUNDS, Outcome, assert_resumes, unmeasured
from .reading import SHORT

pytestmark = pytest.mark.usefixtures("no_figures")

PROCESS = f"process {os.getpid()} is writing"


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the files under ``folder``, without locks, and what is in them."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in LOCKS]
    return {path: path.read_bytes() for path in files}


def with_run(undisturbed: Outcome, folder: Path) -> Path:
    """Put a copy of the finished run there, without its last checkpoint."""
    shutil.copytree(undisturbed.folder, folder)
    manifest(folder / CHECKPOINTS, ROUNDS).unlink()
    return folder


def test_whoever_would_write_a_run_that_is_written_is_refused(
    ground: Ground,
    undisturbed: Outcome,
    runs: Path,
) -> None:
    folder = with_run(undisturbed, runs / "tiny")
    before = contents(runs)
    with claimed(folder):
        refused(cli_call("resume", folder), f"{folder}: {PROCESS}")
        again = ("run", ground.config, "--runs", runs, "--overwrite")
        refused(cli_call(*again), f"{folder}: {PROCESS}")
        with pytest.raises(BadInput, match=PROCESS):
            resume(folder)
        with pytest.raises(BadInput, match=PROCESS):
            api.train(ground.tree(), folder, overwrite=True)
    assert contents(runs) == before


def test_a_run_that_is_written_can_be_read(
    undisturbed: Outcome,
    runs: Path,
    tmp_path: Path,
) -> None:
    folder = with_run(undisturbed, runs / "tiny")
    with claimed(folder):
        for arguments in (
            ("predict", folder, "text"),
            ("export", folder, tmp_path / "adapter"),
            ("report", folder, "--to", tmp_path / "report"),
        ):
            outcome = cli_call(*arguments)
            assert outcome.code == 0, outcome


def test_a_comparison_is_refused_while_any_of_its_runs_is_written(
    ground: Ground,
    runs: Path,
) -> None:
    arguments = ("compare", ground.config, "--runs", runs, "--methods", "lora,bitfit", *SHORT)
    assert cli_call(*arguments).code == 0
    written = runs / "tiny-compare" / "lora-s0"
    manifest(written / CHECKPOINTS, 2).unlink()
    shutil.rmtree(runs / "tiny-compare" / "bitfit-s0")
    before = contents(runs)
    with claimed(written):
        for option in ("--resume", "--overwrite"):
            refused(cli_call(*arguments, option), f"{written}: {PROCESS}")
    with on_behalf(written):  # the process of a comparison that has just been killed
        refused(cli_call(*arguments, "--resume"), f"{written}: {PROCESS}")
    assert contents(runs) == before
    assert not (runs / "tiny-compare" / "bitfit-s0").exists()
    assert cli_call(*arguments, "--resume").code == 0


@pytest.mark.parametrize("command", ["run", "compare", "sweep", "train"])
def test_of_two_starts_at_once_the_second_is_refused_before_anything_slow(
    ground: Ground,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    """The second start comes while the first one is loading its model."""
    from fedpeft.experiment import batch
    from fedpeft.experiment import build as assembly

    arguments: dict[str, tuple[str | Path, ...]] = {
        "run": ("run", ground.config, "--runs", runs, *SHORT),
        "compare": ("compare", ground.config, "--methods", "lora,federa", "--runs", runs, *SHORT),
        "sweep": ("sweep", ground.config, "training.lr=0.01,0.02", "--runs", runs, *SHORT),
    }

    def begin() -> str:
        if command == "train":
            with pytest.raises(BadInput) as caught:
                api.train(ground.tree(), runs / "tiny")
            return str(caught.value)
        return refused(cli_call(*arguments[command]))

    tried: list[str] = []

    def slow(*_: object, **__: object) -> Federation:
        if not tried:
            tried.append("")
            tried.append(begin())
        raise BadInput("the first one fails, too")

    for module in (assembly, batch, api):
        monkeypatch.setattr(module, "build", slow)
    assert "the first one fails" in begin()
    assert PROCESS in tried[1]
    assert not runs.exists()


def test_a_start_that_fails_leaves_the_run_that_it_would_have_replaced(
    ground: Ground,
    undisturbed: Outcome,
    runs: Path,
) -> None:
    folder = with_run(undisturbed, runs / "tiny")
    before = contents(runs)
    wrong = ("--set", "method.rank=33")
    refused(
        cli_call("run", ground.config, "--runs", runs, "--overwrite", *wrong),
        "method.rank = 33",
    )
    assert contents(runs) == before
    assert not (folder / COMMAND).exists()


def test_a_start_that_was_killed_before_it_wrote_anything_can_be_repeated(
    assembly: Federation,
    undisturbed: Outcome,
    runs: Path,
) -> None:
    runs.mkdir()
    (runs / COMMAND).write_text(" 4711 here")
    undisturbed.assert_equal(assembly, runs, start(assembly, runs))
    assert not (runs / COMMAND).exists()


COMMAND_LINE = """
from fedpeft.cli.app import main
main()
"""


def in_process(*arguments: str | Path) -> "subprocess.Popen[str]":
    """Start a command as a process of a group of its own."""
    words = [sys.executable, "-c", COMMAND_LINE, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@contextmanager
def frozen_once(
    happened: Callable[[], bool],
    *arguments: str | Path,
) -> Iterator["subprocess.Popen[str]"]:
    """Start a command, freeze it and its processes once something has happened; kill it in the end.

    Its processes are left to notice that.
    """
    process = in_process(*arguments)
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        os.killpg(process.pid, signal.SIGCONT)
        process.communicate()  # returns when its processes have ended, too: they hold its stdout


def test_a_killed_run_is_resumed_and_one_at_work_is_not(
    assembly: Federation,
    undisturbed: Outcome,
    runs: Path,
) -> None:
    folder = with_run(undisturbed, runs)
    with frozen_once((folder / COMMAND).exists, "resume", folder) as process:
        refused(cli_call("resume", folder), f"{folder}: process {process.pid} is writing")
    assert_resumes(folder, assembly, undisturbed)


@pytest.mark.slow
def test_a_comparison_in_processes_holds_all_its_folders_and_is_resumed_when_killed(
    ground: Ground,
    runs: Path,
) -> None:
    rounds = ("--set", "federation.rounds=12", "--set", "training.steps=1")
    arguments = ("compare", ground.config, "--methods", "lora,bitfit,ffa_lora", *rounds)
    names = ("lora-s0", "bitfit-s0", "ffa_lora-s0")
    root = runs / "tiny-compare"

    def at_work() -> bool:
        return any((root / "lora-s0" / CHECKPOINTS).glob("*.json"))

    with frozen_once(at_work, *arguments, "--jobs", "2", "--runs", runs) as process:
        assert not (root / "ffa_lora-s0" / CONFIG).exists(), "it waits for its turn"
        for name in names:
            with pytest.raises(BadInput, match=f"process {process.pid}"), claimed(root / name):
                pass
        again = cli_call(*arguments, "--runs", runs, "--resume")
        refused(again, f"process {process.pid} is writing")
    assert cli_call(*arguments, "--runs", runs, "--resume").code == 0
    assert cli_call(*arguments, "--runs", runs / "whole").code == 0
    for name in names:
        assert unmeasured(root / name) == unmeasured(runs / "whole" / "tiny-compare" / name)
        with claimed(root / name):
            pass  # a run that was finished before the kill keeps its lock's file, but no lock


@pytest.mark.parametrize(
    "foreign",
    ["notes.txt", "checkpoints/notes.json", "report/mine.csv", "adapter/x", "model.tmp"],
)
def test_what_the_user_has_put_into_a_run_folder_is_never_deleted(
    ground: Ground,
    undisturbed: Outcome,
    runs: Path,
    foreign: str,
) -> None:
    folder = with_run(undisturbed, runs / "tiny")
    (folder / foreign).parent.mkdir(exist_ok=True)
    (folder / foreign).write_text("mine")
    before = contents(runs)
    outcome = cli_call("run", ground.config, "--runs", runs, "--overwrite", *SHORT)
    refused(outcome, str(folder), foreign.removesuffix("/x"), "no run has put there")
    assert contents(runs) == before
    assert cli_call("resume", folder).code == 0
    assert (folder / foreign).read_text() == "mine"


def test_overwriting_replaces_all_that_a_run_has_written_and_leaves_hidden_files(
    ground: Ground,
    runs: Path,
) -> None:
    once = ("run", ground.config, "--runs", runs, *SHORT)
    assert cli_call(*once).code == 0
    folder = runs / "tiny"
    for hidden in (".DS_Store", "checkpoints/.DS_Store", "report/.DS_Store"):
        (folder / hidden).write_text("mine")
    assert cli_call(*once, "--overwrite", "--set", "federation.rounds=1").code == 0
    for hidden in (".DS_Store", "checkpoints/.DS_Store", "report/.DS_Store"):
        assert (folder / hidden).read_text() == "mine"
    assert {path.name for path in (folder / CHECKPOINTS).glob("*.json")} == {
        "000000.json",
        "000001.json",
    }
    assert json.loads((folder / CONFIG).read_text())["federation"]["rounds"] == 1


def test_all_that_a_run_writes_with_its_figures_can_be_overwritten(
    ground: Ground,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # with matplotlib, if it is installed
    once = (
        "run",
        ground.config,
        "--runs",
        runs,
        "--set",
        "federation.rounds=1",
        "--set",
        "training.steps=1",
    )
    assert cli_call(*once).code == 0
    refuse_existing(runs / "tiny", overwrite=True)
    clear(runs / "tiny")
    assert not [*(runs / "tiny").iterdir()]
