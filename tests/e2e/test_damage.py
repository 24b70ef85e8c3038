"""Damaged run folders: the last good state is found, and a resumed run ends in the very bits it would have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fedpeft.experiment import run as playing
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG
from fedpeft.experiment.run_folder import HARDWARE, LABELS
from fedpeft.federation.checkpoint import manifest
from fedpeft.ledger import FILE

from .builders import Ground, cli_call, refused
from .crashing import ROUNDS, Outcome, assert_resumes

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def run(undisturbed: Outcome, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(undisturbed.folder, tmp_path / "run"))


def _state(number: int) -> str:
    return f"{number:06d}.state"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name", [f"{ROUNDS:06d}.json", f"{ROUNDS:06d}.state"], ids=["manifest", "state"]
)
@pytest.mark.parametrize(
    "damage",
    [_truncate, lambda path: path.write_bytes(b""), Path.unlink],
    ids=["half", "empty", "gone"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    assembly: Federation,
    undisturbed: Outcome,
    run: Path,
    name: str,
    damage: Callable[[Path], object],
) -> None:
    damage(run / CHECKPOINTS / name)
    gone = damage is Path.unlink and name.endswith(
        ".json"
    )  # without a manifest there is no checkpoint to speak of
    assert_resumes(run, assembly, undisturbed, [] if gone else ["falling back to the one before"])


def test_a_damaged_memory_falls_back_and_is_written_anew(ground: Ground, tmp_path: Path) -> None:
    """Clients that exchange nothing remember all they learn, so every round writes new memories."""
    alone = build(
        ground.chosen(
            {"method": {"name": "local_only", "rank": 1}, "federation": {"rounds": ROUNDS}},
            {
                "training": {"steps": 1, "batch_size": 4},
                "evaluation": {"every": ROUNDS, "limit": 8},
            },
        )
    )
    folder = tmp_path / "alone"
    undisturbed = Outcome.of(alone, folder)
    last, before = (
        json.loads(manifest(folder / CHECKPOINTS, number).read_text())["files"]
        for number in (ROUNDS, ROUNDS - 1)
    )
    new = sorted(name for name in last.keys() - before.keys() if name.endswith(".memory"))
    _truncate(folder / CHECKPOINTS / new[0])
    assert_resumes(folder, alone, undisturbed, ["falling back to the one before"])


def test_the_resume_command_says_that_it_fell_back(run: Path) -> None:
    _truncate(run / CHECKPOINTS / _state(ROUNDS))
    outcome = cli_call("resume", run)
    assert outcome.code == 0, outcome
    [line] = [line for line in (outcome.out + outcome.err).splitlines() if "damaged" in line]
    assert str(manifest(run / CHECKPOINTS, ROUNDS)) in line
    assert "falling back to the one before" in line


def test_reading_a_run_whose_last_checkpoint_is_damaged_says_so_and_deletes_nothing(
    run: Path, tmp_path: Path
) -> None:
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
    refused(
        cli_call("resume", run),
        str(run / CHECKPOINTS),
        "every checkpoint is damaged",
        "--overwrite",
    )


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_checkpoints_of_another_configuration_are_refused_and_kept(
    run: Path, tmp_path: Path
) -> None:
    _edit(run / CONFIG, lambda settings: settings["training"].update(lr=0.5))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments in (
        ("resume", run),
        ("predict", run, "text"),
        ("export", run, tmp_path / "made"),
    ):
        refused(cli_call(*arguments), str(run), "configuration", "--overwrite")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_unknown_key_in_a_run_folder_is_named_with_its_file(run: Path) -> None:
    _edit(run / CONFIG, lambda settings: settings["training"].update(lrr=0.5))
    refused(cli_call("resume", run), str(run / CONFIG), "'training.lrr'", "did you mean 'lr'")


@pytest.mark.parametrize("name", [CONFIG, HARDWARE, LABELS])
def test_a_run_folder_with_a_damaged_description_is_refused_by_that_files_name(
    run: Path, name: str
) -> None:
    _truncate(run / name)
    refused(cli_call("resume", run), str(run / name))


def test_a_ledger_shorter_than_its_checkpoint_says_is_refused(run: Path) -> None:
    _truncate(run / FILE)
    refused(cli_call("resume", run), str(run / FILE), "bytes")


def test_data_that_changed_under_a_run_is_refused(
    ground: Ground, runs: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copy(ground.data, tmp_path / "mine.jsonl"))
    short = (
        "--set",
        f"federation.rounds={ROUNDS}",
        "--set",
        "training.steps=1",
        "--set",
        f"data.train={data}",
    )
    assert cli_call("run", ground.config, "--runs", runs, *short).code == 0
    manifest(runs / "tiny" / CHECKPOINTS, ROUNDS).unlink()
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:20] + lines[21:]))
    refused(cli_call("resume", runs / "tiny"), str(runs / "tiny"), "data")


def test_a_run_does_not_go_on_with_another_partition_or_other_weights(
    ground: Ground, tmp_path: Path
) -> None:
    who, model = tmp_path / "who.json", tmp_path / "model"
    who.write_text(json.dumps({"anna": [*range(40)], "ben": [*range(40, 80)]}))
    shutil.copytree(ground.model, model)
    config = ground.chosen(
        {"model": {"name": str(model)}, "partition": {"kind": "file", "file": str(who)}},
        {"federation": {"rounds": 1}, "training": {"steps": 1}, "evaluation": {"limit": 8}},
    )
    folder = tmp_path / "run"
    playing.start(build(config), folder)
    assert cli_call("resume", folder).code == 0
    who.write_text(json.dumps({"anna": [0, 1, 2], "ben": [*range(40, 80)]}))
    refused(cli_call("resume", folder), str(folder), "the partition had digest")
    who.write_text(json.dumps({"anna": [*range(40)], "ben": [*range(40, 80)]}))
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: tensor + 0.5 for name, tensor in weights.items()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    refused(cli_call("resume", folder), str(folder), "the weights of the model had digest")
    refused(cli_call("predict", folder, "a text"), str(folder), "the weights of")
