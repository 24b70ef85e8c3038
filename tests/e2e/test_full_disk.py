"""Full disks: a run ends in one line with its last good state intact, and resumes to the very bits it would have ended in."""

import errno
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fedpeft.experiment.build import Federation
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG
from fedpeft.experiment.run_folder import HARDWARE, LABELS
from fedpeft.federation.checkpoint import manifest
from fedpeft.ledger import FILE, Ledger

from .builders import Ground, cli_call, refused
from .crashing import ROUNDS, Instants, Outcome, assert_resumes, watched

pytestmark = pytest.mark.usefixtures("no_figures")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow past ``size`` bytes: a disk that is full, as far as the process can tell."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def sizes(undisturbed: Outcome) -> tuple[int, int, int]:
    """Return the sizes of the largest settings file, of the largest file of a checkpoint, and of the ledger's first row."""
    folder = undisturbed.folder
    settings = max((folder / name).stat().st_size for name in (CONFIG, HARDWARE, LABELS))
    saved = max(path.stat().st_size for path in (folder / CHECKPOINTS).iterdir())
    return settings, saved, len((folder / FILE).read_bytes().splitlines(keepends=True)[0])


def test_a_disk_that_fills_up_half_way_ends_a_run_with_its_last_good_state(
    ground: Ground, assembly: Federation, undisturbed: Outcome, runs: Path
) -> None:
    settings, saved, first_row = sizes(undisturbed)
    room = first_row + ((undisturbed.folder / FILE).stat().st_size - first_row) // 2
    assert room > max(settings, saved), "the ledger must be what does not fit"
    with file_limit(room):
        outcome = cli_call("run", ground.config, "--runs", runs, *_options(assembly))
    line = refused(outcome, str(runs / "tiny"), "fedpeft resume")
    assert "File too large" in line or "No space left" in line
    assert 0 < max(int(path.stem) for path in (runs / "tiny" / CHECKPOINTS).glob("*.json")) < ROUNDS
    assert_resumes(runs / "tiny", assembly, undisturbed)


def test_a_disk_full_at_the_first_checkpoint_ends_a_run_that_can_be_resumed(
    ground: Ground, assembly: Federation, undisturbed: Outcome, runs: Path
) -> None:
    settings, saved, first_row = sizes(undisturbed)
    room = max(settings, 1) + 1
    assert room < max(saved, first_row)
    with file_limit(room):
        refused(
            cli_call("run", ground.config, "--runs", runs, *_options(assembly)),
            str(runs / "tiny"),
            "fedpeft resume",
        )
    assert_resumes(runs / "tiny", assembly, undisturbed)


def test_a_disk_full_from_the_start_leaves_no_half_made_run(
    ground: Ground, assembly: Federation, runs: Path
) -> None:
    with file_limit(300):
        refused(
            cli_call("run", ground.config, "--runs", runs, *_options(assembly)), str(runs / "tiny")
        )
    assert not (runs / "tiny").exists()


@pytest.mark.parametrize("options", [(), ("--merge",)], ids=["adapter", "merged"])
@pytest.mark.parametrize("room", [100, 3000])
def test_a_disk_full_while_exporting_leaves_no_half_of_a_folder(
    undisturbed: Outcome,
    tmp_path: Path,
    options: tuple[str, ...],
    room: int,
) -> None:
    """Neither of the first small file nor of the weights."""
    with file_limit(room):
        outcome = cli_call("export", undisturbed.folder, tmp_path / "made", *options)
    refused(outcome, str(tmp_path / "made"), "cannot be written", "make room")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("part", range(6))
def test_a_disk_full_at_any_instant_ends_a_run_that_resumes_to_the_same_end(
    ground: Ground, assembly: Federation, undisturbed: Outcome, runs: Path, part: int
) -> None:
    """At six random instants, one from each sixth of the run's own: a write fails, and so does every later one."""
    first, last = undisturbed.instants.configured + 1, undisturbed.instants.count
    width = (last + 1 - first) // 6
    fatal = random.Random(part).randrange(first + part * width, first + (part + 1) * width)
    with full_disk_from(fatal):
        outcome = cli_call("run", ground.config, "--runs", runs, *_options(assembly))
    refused(outcome, str(runs / "tiny"), "No space left", "fedpeft resume")
    assert_resumes(runs / "tiny", assembly, undisturbed)


def test_a_folder_that_takes_no_ledger_any_more_is_named(
    assembly: Federation, undisturbed: Outcome, tmp_path: Path
) -> None:
    folder = shutil.copytree(undisturbed.folder, tmp_path / "run")
    manifest(folder / CHECKPOINTS, ROUNDS).unlink()
    with mock.patch.object(
        Ledger, "cut", side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS))
    ):
        refused(cli_call("resume", folder), str(folder), "Read-only file system", "fedpeft resume")
    assert_resumes(folder, assembly, undisturbed)


def test_a_report_that_finds_no_room_is_one_line(undisturbed: Outcome, tmp_path: Path) -> None:
    with file_limit(50):
        refused(
            cli_call("report", undisturbed.folder, "--to", tmp_path / "report"),
            str(tmp_path / "report"),
            "--to",
        )


@contextmanager
def full_disk_from(fatal: int) -> Iterator[None]:
    """Let every change of the disk fail with ENOSPC from instant ``fatal`` on; see ``crashing.Instants``."""

    class Full(Instants):
        def reached(self, damage: Callable[[], object] = lambda: None) -> None:
            del damage
            self.count += 1

    instants = Full()
    with watched(instants):
        fsync, append, replace = os.fsync, Ledger.append, Path.replace

        def unless_full(act: Callable[..., Any]) -> Callable[..., Any]:
            def acting(*arguments: Any) -> Any:
                if instants.count >= fatal:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return act(*arguments)

            return acting

        with (
            mock.patch.object(os, "fsync", unless_full(fsync)),
            mock.patch.object(Ledger, "append", unless_full(append)),
            mock.patch.object(Path, "replace", unless_full(replace)),
        ):
            yield


def _options(assembly: Federation) -> list[str]:
    """Return the ``--set`` options that lead from the ground's configuration to the assembly's."""
    config = assembly.config
    values = {
        **{f"method.{key}": value for key, value in config.method.items()},
        "federation.rounds": config.federation.rounds,
        "training.steps": config.training.steps,
        "training.batch_size": config.training.batch_size,
        "evaluation.every": config.evaluation.every,
        "evaluation.limit": config.evaluation.limit,
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
