"""Full disks and damaged run folders: the last good state stays, and a resumed run ends in the very bits it would have."""

import errno
import json
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

from fedpeft import runs as playing
from fedpeft.assembly import Assembly, assemble
from fedpeft.checkpoint import manifest
from fedpeft.journal import CHECKPOINTS
from fedpeft.ledger import FILE, Ledger

from .builders import Ground, cli_call, refused
from .crashing import Instants, Outcome, watched

pytestmark = pytest.mark.usefixtures("no_figures")

ROUNDS = 4


@pytest.fixture(scope="module")
def assembly(ground: Ground) -> Assembly:
    """A run of FeDeRA, whose clients remember something, with small states, so that the ledger outgrows them."""
    return assemble(
        ground.chosen(
            {"method": {"name": "federa", "rank": 1, "targets": "0.attention.self.query"}},
            {"federation": {"rounds": ROUNDS}, "training": {"steps": 1, "batch_size": 4}},
            {"evaluation": {"every": 1, "limit": 8}},
        )
    )


@pytest.fixture(scope="module")
def undisturbed(assembly: Assembly, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """What the run ends in undisturbed, and the folder of that."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return Outcome.of(assembly, folder), folder


@pytest.fixture
def run(undisturbed: tuple[Outcome, Path], tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(undisturbed[1], tmp_path / "run"))


def resumed(run: Path, assembly: Assembly, undisturbed: tuple[Outcome, Path], says: list[str] | None = None) -> None:
    """Resume the run in ``run`` and assert that it ends as the undisturbed one; ``says``: what it must say meanwhile."""
    told: list[str] = []
    with watched(Instants()):
        state = playing.resume(run, like=assembly, say=told.append)
    undisturbed[0].assert_equal(assembly, run, state)
    assert len(told) == len(says or [])
    for line, part in zip(told, says or [], strict=True):
        assert part in line


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow past ``size`` bytes: a disk that is full, as far as the process can tell."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


# ---- the disk is full


def sizes(undisturbed: tuple[Outcome, Path]) -> tuple[int, int, int]:
    """Return the sizes of the largest settings file, of the largest file of a checkpoint, and of the ledger's first row."""
    folder = undisturbed[1]
    settings = max((folder / name).stat().st_size for name in (playing.CONFIG, playing.HARDWARE, playing.LABELS))
    saved = max(path.stat().st_size for path in (folder / CHECKPOINTS).iterdir())
    return settings, saved, len((folder / FILE).read_bytes().splitlines(keepends=True)[0])


def test_a_disk_that_fills_up_half_way_ends_a_run_with_its_last_good_state(
    ground: Ground, assembly: Assembly, undisturbed: tuple[Outcome, Path], runs: Path
) -> None:
    settings, saved, first_row = sizes(undisturbed)
    room = first_row + ((undisturbed[1] / FILE).stat().st_size - first_row) // 2
    assert room > max(settings, saved), "the ledger must be what does not fit"
    with file_limit(room):
        outcome = cli_call("run", ground.config, "--runs", runs, *_options(assembly))
    line = refused(outcome, str(runs / "tiny"), "fedpeft resume")
    assert "File too large" in line or "No space left" in line
    assert 0 < max(int(path.stem) for path in (runs / "tiny" / CHECKPOINTS).glob("*.json")) < ROUNDS
    resumed(runs / "tiny", assembly, undisturbed)


def test_a_disk_full_at_the_first_checkpoint_ends_a_run_that_can_be_resumed(
    ground: Ground, assembly: Assembly, undisturbed: tuple[Outcome, Path], runs: Path
) -> None:
    settings, saved, first_row = sizes(undisturbed)
    room = max(settings, 1) + 1
    assert room < max(saved, first_row)
    with file_limit(room):
        refused(cli_call("run", ground.config, "--runs", runs, *_options(assembly)), str(runs / "tiny"), "fedpeft resume")
    resumed(runs / "tiny", assembly, undisturbed)


def test_a_disk_full_from_the_start_leaves_no_half_made_run(ground: Ground, assembly: Assembly, runs: Path) -> None:
    with file_limit(300):
        refused(cli_call("run", ground.config, "--runs", runs, *_options(assembly)), str(runs / "tiny"))
    assert not (runs / "tiny").exists()


@pytest.mark.parametrize("part", range(6))
def test_a_disk_full_at_any_instant_ends_a_run_that_resumes_to_the_same_end(
    ground: Ground, assembly: Assembly, undisturbed: tuple[Outcome, Path], runs: Path, part: int
) -> None:
    """At six random instants, one from each sixth of the run's own: a write fails, and so does every later one."""
    first, last = undisturbed[0].instants.configured + 1, undisturbed[0].instants.count
    width = (last + 1 - first) // 6
    fatal = random.Random(part).randrange(first + part * width, first + (part + 1) * width)
    with full_disk_from(fatal):
        outcome = cli_call("run", ground.config, "--runs", runs, *_options(assembly))
    refused(outcome, str(runs / "tiny"), "No space left", "fedpeft resume")
    resumed(runs / "tiny", assembly, undisturbed)


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


# ---- a checkpoint is damaged


def _state(number: int) -> str:
    return f"{number:06d}.state"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", [f"{ROUNDS:06d}.json", f"{ROUNDS:06d}.state"], ids=["manifest", "state"])
@pytest.mark.parametrize("damage", [_truncate, lambda path: path.write_bytes(b""), Path.unlink], ids=["half", "empty", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    assembly: Assembly, undisturbed: tuple[Outcome, Path], run: Path, name: str, damage: Callable[[Path], object]
) -> None:
    damage(run / CHECKPOINTS / name)
    gone = damage is Path.unlink and name.endswith(".json")  # without a manifest there is no checkpoint to speak of
    resumed(run, assembly, undisturbed, [] if gone else ["falling back to the one before"])


def test_a_damaged_memory_falls_back_and_is_written_anew(ground: Ground, tmp_path: Path) -> None:
    """Clients that exchange nothing remember all they learn, so every round writes new memories."""
    alone = assemble(
        ground.chosen(
            {"method": {"name": "local_only", "rank": 1}, "federation": {"rounds": ROUNDS}},
            {"training": {"steps": 1, "batch_size": 4}, "evaluation": {"every": ROUNDS, "limit": 8}},
        )
    )
    folder = tmp_path / "alone"
    undisturbed = Outcome.of(alone, folder), folder
    last, before = (json.loads(manifest(folder / CHECKPOINTS, number).read_text())["files"] for number in (ROUNDS, ROUNDS - 1))
    new = sorted(name for name in last.keys() - before.keys() if name.endswith(".memory"))
    _truncate(folder / CHECKPOINTS / new[0])
    resumed(folder, alone, undisturbed, ["falling back to the one before"])


def test_the_resume_command_says_that_it_fell_back(run: Path) -> None:
    _truncate(run / CHECKPOINTS / _state(ROUNDS))
    outcome = cli_call("resume", run)
    assert outcome.code == 0, outcome
    [line] = [line for line in (outcome.out + outcome.err).splitlines() if "damaged" in line]
    assert str(manifest(run / CHECKPOINTS, ROUNDS)) in line
    assert "falling back to the one before" in line


def test_reading_a_run_whose_last_checkpoint_is_damaged_says_so_and_deletes_nothing(run: Path, tmp_path: Path) -> None:
    _truncate(run / CHECKPOINTS / _state(ROUNDS))
    before = sorted(run.rglob("*"))
    for arguments in (("predict", run, "text"), ("export", run, tmp_path / "made")):
        outcome = cli_call(*arguments)
        assert outcome.code == 0, outcome
        assert "falling back to the one before" in outcome.out + outcome.err
    assert sorted(run.rglob("*")) == before


def test_a_run_all_of_whose_checkpoints_are_damaged_is_refused(run: Path) -> None:
    for path in (run / CHECKPOINTS).glob("*.state"):
        _truncate(path)
    refused(cli_call("resume", run), str(run / CHECKPOINTS), "every checkpoint is damaged", "--overwrite")


# ---- the folder is another run's


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_checkpoints_of_another_configuration_are_refused_and_kept(run: Path, tmp_path: Path) -> None:
    _edit(run / playing.CONFIG, lambda settings: settings["training"].update(lr=0.5))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments in (("resume", run), ("predict", run, "text"), ("export", run, tmp_path / "made")):
        refused(cli_call(*arguments), str(run), "configuration", "--overwrite")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_unknown_key_in_a_run_folder_is_named_with_its_file(run: Path) -> None:
    _edit(run / playing.CONFIG, lambda settings: settings["training"].update(lrr=0.5))
    refused(cli_call("resume", run), str(run / playing.CONFIG), "'training.lrr'", "did you mean 'lr'")


@pytest.mark.parametrize("name", [playing.CONFIG, playing.HARDWARE, playing.LABELS])
def test_a_run_folder_with_a_damaged_description_is_refused_by_that_files_name(run: Path, name: str) -> None:
    _truncate(run / name)
    refused(cli_call("resume", run), str(run / name))


def test_a_ledger_shorter_than_its_checkpoint_says_is_refused(run: Path) -> None:
    _truncate(run / FILE)
    refused(cli_call("resume", run), str(run / FILE), "bytes")


def test_data_that_changed_under_a_run_is_refused(ground: Ground, runs: Path, tmp_path: Path) -> None:
    data = Path(shutil.copy(ground.data, tmp_path / "mine.jsonl"))
    short = ("--set", f"federation.rounds={ROUNDS}", "--set", "training.steps=1", "--set", f"data.train={data}")
    assert cli_call("run", ground.config, "--runs", runs, *short).code == 0
    manifest(runs / "tiny" / CHECKPOINTS, ROUNDS).unlink()
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:20] + lines[21:]))
    refused(cli_call("resume", runs / "tiny"), str(runs / "tiny"), "data")


def _options(assembly: Assembly) -> list[str]:
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
