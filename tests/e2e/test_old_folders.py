"""Run folders of older versions: fields that are added or renamed do not part us from them."""

import json
import shutil
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from fedpeft.errors import BadInput
from fedpeft.experiment import config
from fedpeft.experiment.build import Federation
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG, settings_digests
from fedpeft.experiment.run import resume
from fedpeft.experiment.run_folder import HARDWARE, LABELS
from fedpeft.federation.checkpoint import load, manifest, unpack
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, RunRow, read
from fedpeft.training import hardware as hardware_choice
from fedpeft.training.hardware import Hardware

from .builders import Ground, cli_call, refused
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
        del content["digest"]  # manifests had none
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
    monkeypatch.setattr(config, "RENAMED", names)
    monkeypatch.setattr(hardware_choice, "OLD_NAMES", {"parts": "tokens"})
    settings = settings_of(run)
    settings["training"] |= {"rate": settings["training"].pop("lr"), "old": 3}
    settings["stack"] = settings["engine"].pop("stack")
    as_of_old(run, settings)
    hardware = json.loads((run / HARDWARE).read_text())
    hardware["parts"] = hardware.pop("tokens")
    (run / HARDWARE).write_text(json.dumps(hardware))
    says = ["training.rate is called training.lr", "stack is called engine.stack", "training.old"]
    assert_resumes(run, assembly, undisturbed, says)


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


OLD_RUN = Path(__file__).parent / "old_run"
"""A run of FeDeRA as a version wrote it that said ``engine.cohort``, killed after round 3 of 4.

``@GROUND@`` stands for the folder of its model and data; ``end.state`` is what it ended in.
"""
OLD_NAME = "engine.cohort is called engine.stack now"


@pytest.fixture
def old_run(ground: Ground, tmp_path: Path) -> Path:
    """The old run as if it had been started on this session's model and data."""
    folder = tmp_path / "old"
    shutil.copytree(OLD_RUN / CHECKPOINTS, folder / CHECKPOINTS)
    for name in (HARDWARE, LABELS):
        shutil.copy(OLD_RUN / name, folder)
    settings = (OLD_RUN / "settings.json").read_text().replace("@GROUND@", str(ground.folder))
    (folder / CONFIG).write_text(json.dumps(json.loads(settings), indent=1))
    ledger = (OLD_RUN / FILE).read_text().replace("@GROUND@", str(ground.folder)).encode()
    (folder / FILE).write_bytes(ledger)
    whole = folder / CHECKPOINTS / "000003.json"
    content = json.loads(whole.read_text())
    content["config"] = blake2b(settings.encode(), digest_size=16).hexdigest()
    content["ledger"] = len(ledger)
    whole.write_text(json.dumps(content, indent=1))
    return folder


def test_a_run_that_an_old_version_wrote_ends_as_that_version_ended_it(old_run: Path) -> None:
    told: list[str] = []
    state = resume(old_run, on_warning=told.append)
    [line] = told
    assert OLD_NAME in line
    assert str(old_run / CONFIG) in line
    end = unpack((OLD_RUN / "end.state").read_bytes())
    assert state.round == end.round == 4
    assert dict(state.memories) == dict(end.memories)
    for mine, theirs in ((state.shared, end.shared), (state.server, end.server)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():  # sums differ in their last bits between machines
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)
    rows = list(read(old_run / FILE))
    assert isinstance(rows[0], RunRow)
    assert [row.round for row in rows if isinstance(row, ClientRow)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row.round for row in rows if isinstance(row, EvaluationRow)] == [1, 2, 3, 4]
    last = load(old_run / CHECKPOINTS, settings_digests(old_run), told.append)
    assert last is not None
    assert last.state.round == 4


def test_the_command_tells_the_old_name_when_it_resumes(old_run: Path) -> None:
    outcome = cli_call("resume", old_run)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert OLD_NAME in outcome.out


def test_classes_in_another_order_are_not_gone_on_with(old_run: Path) -> None:
    (old_run / LABELS).write_text(json.dumps(["birds", "trees", "fish", "winds"]))
    needles = (str(old_run / LABELS), "output 1", "'trees'", "'fish'", "--overwrite")
    refused(cli_call("resume", old_run), *needles)
    (old_run / LABELS).write_text(json.dumps(["birds", "fish", "trees"]))
    refused(cli_call("resume", old_run), "output 3", "None", "'winds'")


def test_hardware_by_old_names_is_read() -> None:
    found = Hardware.from_json((OLD_RUN / HARDWARE).read_text())
    assert (found.stack, found.pad_to_multiple_of, found.tokens) == (2, 1, 1280)
    assert Hardware.from_json(json.dumps(found.describe())) == found


def test_hardware_by_both_names_is_refused_in_a_line(old_run: Path) -> None:
    content = json.loads((old_run / HARDWARE).read_text())
    (old_run / HARDWARE).write_text(json.dumps({**content, "stack": 2}))
    refused(cli_call("resume", old_run), str(old_run / HARDWARE), "'stack'", "twice")


def test_settings_by_an_old_name_are_read_wherever_they_come_from(
    ground: Ground, tmp_path: Path
) -> None:
    tree = ground.tree()
    tree["engine"] = {"cohort": 3}
    told: list[str] = []
    assert config.from_tree(tree, told.append).engine.stack == 3
    assert len(told) == 1
    assert OLD_NAME in told[0]
    assert tree["engine"] == {"cohort": 3}, "what the caller holds is left alone"
    toml = tmp_path / "old.toml"
    without = ground.config.read_text().replace("stack = 2\n", "")
    toml.write_text(without.replace("[engine]\n", "[engine]\ncohort = 2\n"))
    for arguments in (
        (toml,),
        (ground.config.with_name("no_stack.toml"), "--set", "engine.cohort=2"),
    ):
        ground.config.with_name("no_stack.toml").write_text(without)
        outcome = cli_call("partition", *arguments, "--png", tmp_path / "who.png")
        assert (outcome.code, outcome.err) == (0, ""), outcome
        assert outcome.out.count(OLD_NAME) == 1


def test_old_names_of_single_rows_and_of_sweeps_are_read(ground: Ground, runs: Path) -> None:
    row = {"methods": ["lora"], "settings": {"lora": {"engine": {"cohort": 1}}}}
    told: list[str] = []
    chosen = config.from_tree({**ground.tree(), "compare": row}, told.append)
    assert chosen.compare.settings == {"lora": {"engine": {"stack": 1}}}
    [line] = told
    assert "compare.settings.lora.engine.cohort is called" in line
    short = ("--set", "federation.rounds=1", "--runs", runs)
    outcome = cli_call("sweep", ground.config, "engine.cohort=1,2", *short)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert OLD_NAME in outcome.out
    swept = {path.name for path in (runs / "tiny-sweep").iterdir()}
    assert {"engine.stack=1-s0", "engine.stack=2-s0"} <= swept


def test_a_field_by_both_names_is_refused_in_a_line(ground: Ground) -> None:
    outcome = cli_call("partition", ground.config, "--set", "engine.cohort=3")
    refused(outcome, "engine.cohort = 3", "engine.stack", "given as well")
    both = {"engine": {"cohort": 3, "stack": 3}}
    with pytest.raises(BadInput, match=r"compare\.settings\.lora\.engine\.cohort"):
        config.from_tree({"compare": {"settings": {"lora": both}}})
