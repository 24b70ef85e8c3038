"""Run folders of older versions: fields that are added or renamed do not part us from them."""

import json
import shutil
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fedpeft.experiment import config
from fedpeft.experiment.build import Federation
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG, settings_digests
from fedpeft.experiment.run_folder import HARDWARE
from fedpeft.federation.checkpoint import manifest

from .builders import cli_call, refused
from .crashing import ROUNDS, Outcome, assert_resumes

pytestmark = pytest.mark.usefixtures("no_figures")


def old_digest(settings: Mapping[str, Any]) -> str:
    """Return the digest that version 0.1 wrote: that of its settings as pydantic prints them."""
    text = TypeAdapter(dict[str, Any]).dump_json(dict(settings), indent=1)
    return blake2b(text, digest_size=16).hexdigest()


def as_of_old(run: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, and their digest in every manifest, as version 0.1 did."""
    (run / CONFIG).write_text(json.dumps(settings, indent=1))
    for path in (run / CHECKPOINTS).glob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "config": old_digest(settings)}, indent=1))


@pytest.fixture
def run(undisturbed: Outcome, tmp_path: Path) -> Path:
    """A copy of the finished run, without its last checkpoint."""
    folder = Path(shutil.copytree(undisturbed.folder, tmp_path / "run"))
    manifest(folder / CHECKPOINTS, ROUNDS).unlink()
    return folder


def settings_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / CONFIG).read_text()))


def test_the_digest_here_is_the_one_that_the_old_version_took(assembly: Federation) -> None:
    text = assembly.config.to_json()
    assert old_digest(json.loads(text)) == blake2b(text.encode(), digest_size=16).hexdigest()


def test_a_run_of_the_old_version_ends_as_it_would_have(
    run: Path,
    assembly: Federation,
    undisturbed: Outcome,
) -> None:
    as_of_old(run, settings_of(run))
    assert_resumes(run, assembly, undisturbed)


def test_a_field_that_the_old_version_did_not_know_takes_its_default(
    run: Path,
    assembly: Federation,
    undisturbed: Outcome,
) -> None:
    settings = settings_of(run)
    del settings["machine"]["cache"], settings["training"]["momentum"], settings["reference"]
    del settings["engine"]["kind"]
    as_of_old(run, settings)
    hardware = json.loads((run / HARDWARE).read_text())
    del hardware["pad_to_multiple_of"]
    (run / HARDWARE).write_text(json.dumps(hardware))
    assert_resumes(run, assembly, undisturbed)


def test_a_field_that_had_another_name_or_is_gone_is_read(
    run: Path,
    assembly: Federation,
    undisturbed: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"training.rate": "training.lr", "stack": "engine.stack", "training.old": None}
    monkeypatch.setattr(config, "RENAMED", {**names, "hardware.parts": "hardware.tokens"})
    settings = settings_of(run)
    settings["training"] |= {"rate": settings["training"].pop("lr"), "old": 3}
    settings["stack"] = settings["engine"].pop("cohort")
    as_of_old(run, settings)
    hardware = json.loads((run / HARDWARE).read_text())
    (run / HARDWARE).write_text(json.dumps({**hardware, "parts": hardware.pop("tokens")}))
    assert_resumes(run, assembly, undisturbed)


def test_reading_a_run_of_the_old_version_changes_nothing(run: Path, tmp_path: Path) -> None:
    as_of_old(run, settings_of(run))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments in (("predict", run, "a text"), ("export", run, tmp_path / "adapter")):
        outcome = cli_call(*arguments)
        assert outcome.code == 0, outcome
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_settings_that_were_changed_by_hand_are_still_refused(run: Path) -> None:
    settings = settings_of(run)
    as_of_old(run, settings)
    settings["training"]["lr"] = 0.5
    (run / CONFIG).write_text(json.dumps(settings, indent=1))
    refused(cli_call("resume", run), str(run), "configuration", "--overwrite")


def test_the_form_of_the_file_does_not_matter(
    run: Path,
    assembly: Federation,
    undisturbed: Outcome,
) -> None:
    settings = settings_of(run)
    upside_down = dict(reversed(settings.items()))
    (run / CONFIG).write_text(
        json.dumps(upside_down, separators=(",", ":"), ensure_ascii=False),
        encoding="utf-8",
    )
    assert_resumes(run, assembly, undisturbed)


OLD = (
    '{"name": "na\\u00efve", "seed": 9007199254740993, "reference": false, '
    '"data": {"train": "/donn\\u00e9es/x.jsonl", "key": null}, "partition": {"alpha": 1e+16}, '
    '"training": {"lr": 1e-05, "clip": 1.0, "weight_decay": 0.0}, '
    '"method": {"name": "slora", "scale": 2, "targets": "a\\u2192b|query"}, '
    '"compare": {"seeds": [0, 1], "references": [], '
    '"settings": {"lora": {"training": {"lr": 0.003}}, "full": {}}}}'
)


def test_digests_are_those_that_have_been_written(tmp_path: Path) -> None:
    """Printed once and for all: neither a new pydantic nor a new Python may change them."""
    (tmp_path / CONFIG).write_text(OLD)
    assert settings_digests(tmp_path) == (
        "fa70c4b728dfba49eb741a6112707fc9",
        "b0f1491478b809f96e88e430c344c855",
    )
