"""Every command does what its help says, on data so easy that learning must show."""

import csv
import gzip
import io
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

import fedpeft
from fedpeft.cli import parsing as arguments
from fedpeft.cli import running
from fedpeft.experiment.compare import plan
from fedpeft.experiment.config import from_tree
from fedpeft.experiment.reading import read_data
from fedpeft.experiment.trained import open_run
from fedpeft.ledger import ClientRow
from fedpeft.methods import METHODS
from fedpeft.training.evaluation import predictions

from .builders import LABELS, OWN_WORDS, Ground, Outcome, cli_call, examples, refused, to_toml
from .reading import PNG, SHEETS, SHORT, about, assert_reported, evaluations, rows_of, table

LEARNING = (
    "--set",
    "federation.clients_per_round=3",
    "--set",
    "training.steps=4",
    "--set",
    "training.batch_size=16",
)
Finished = tuple[Path, Outcome]


@pytest.fixture(scope="module")
def trained(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run long enough to learn something, and what the command said."""
    runs = tmp_path_factory.mktemp("run") / "runs"
    outcome = cli_call("run", ground.config, "--runs", runs, "--set", "name=mine", *LEARNING)
    return runs / "mine", outcome


def test_run_learns_what_the_majority_class_does_not_tell(trained: Finished) -> None:
    folder, outcome = trained
    assert outcome.code == 0, outcome
    assert [row.round for row in evaluations(folder)] == [3, 6]
    majority = about(folder).majority
    assert majority is not None
    assert evaluations(folder)[-1].metrics["accuracy"] >= majority + 0.2


def test_run_prints_its_table_and_writes_sheets_and_figures(trained: Finished) -> None:
    folder, outcome = trained
    assert "lora" in outcome.out
    assert "majority class" in outcome.out
    assert_reported(folder / "report")
    [line] = table(folder / "report" / "summary.csv")
    assert float(line["accuracy"]) == evaluations(folder)[-1].metrics["accuracy"]
    clients = [row for row in rows_of(folder) if isinstance(row, ClientRow)]
    assert float(line["down_bytes"]) == sum(row.down for row in clients)
    assert float(line["up_bytes"]) == sum(row.up for row in clients)


def test_without_a_terminal_nothing_is_animated(trained: Finished) -> None:
    _, outcome = trained
    assert outcome.err == ""
    assert "\x1b" not in outcome.out
    assert "\r" not in outcome.out
    assert "6/6" not in outcome.out


@pytest.mark.usefixtures("no_figures")
def test_on_a_terminal_a_bar_shows_rounds_accuracy_and_megabytes(
    ground: Ground, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        running, "out", Console(file=screen, force_terminal=True, width=120, color_system=None)
    )
    assert cli_call("run", ground.config, "--runs", runs, *SHORT).code == 0
    for shown in ("tiny", "2/2", "accuracy 0.", "MB"):
        assert shown in screen.getvalue()


def test_the_version_is_the_installed_ones() -> None:
    outcome = cli_call("--version")
    assert (outcome.code, outcome.out) == (0, f"fedpeft {version('fedpeft')}\n")


@pytest.mark.usefixtures("no_figures")
def test_without_matplotlib_a_run_still_ends_with_its_sheets(ground: Ground, runs: Path) -> None:
    outcome = cli_call("run", ground.config, "--runs", runs, *SHORT)
    assert outcome.code == 0, outcome
    assert sorted(path.name for path in (runs / "tiny" / "report").iterdir()) == sorted(SHEETS)


def test_set_overrides_any_field_and_the_run_folder_says_so(trained: Finished) -> None:
    folder, _ = trained
    settings = json.loads((folder / "config.json").read_text())
    assert settings["name"] == "mine"
    assert settings["training"]["steps"] == 4
    assert settings["training"]["lr"] == 0.01  # from the file
    assert about(folder).settings == settings
    assert about(folder).clients_per_round == 3


def test_the_first_row_holds_all_that_was_resolved(trained: Finished) -> None:
    folder, _ = trained
    resolved = json.loads((folder / "hardware.json").read_text())
    assert resolved == {
        "device": "cpu",
        "precision": "fp32",
        "attention": "eager",
        "threads": 1,
        "tokens": 1280,
        "pad_to_multiple_of": 1,
        "stack": 2,
    }
    assert resolved.items() <= about(folder).resolved.items()


def test_resume_of_a_finished_run_changes_nothing(trained: Finished) -> None:
    folder, _ = trained
    files = [*folder.glob("checkpoints/*"), folder / "ledger.jsonl"]
    before = {path: path.read_bytes() for path in files}
    outcome = cli_call("resume", folder)
    assert outcome.code == 0, outcome
    assert "majority class" in outcome.out
    assert {
        path: path.read_bytes() for path in [*folder.glob("checkpoints/*"), folder / "ledger.jsonl"]
    } == before


def test_predict_labels_texts_with_what_was_learnt(trained: Finished) -> None:
    folder, _ = trained
    texts = [" ".join(OWN_WORDS[label] * 3) for label in LABELS]
    outcome = cli_call("predict", folder, *texts)
    assert outcome.code == 0, outcome
    lines = [
        line
        for line in outcome.out.splitlines()
        if any(word in line for own in OWN_WORDS.values() for word in own)
    ]
    said = [line.split()[0] for line in lines if line.split()[0] in LABELS]
    assert len(said) == len(LABELS)
    assert sum(one == label for one, label in zip(said, LABELS, strict=True)) >= 3


def test_predict_also_tells_what_the_model_said_before(trained: Finished) -> None:
    """Adapters start at nothing: before is what the model says with nothing mounted."""
    folder, _ = trained
    texts = [" ".join(OWN_WORDS[label] * 3) for label in LABELS]
    opened = open_run(folder)
    examples = opened.task.encode(opened.task.unanswered(texts))
    said = predictions(opened.loaded.model, opened.task, examples, opened.hardware)
    plain = opened.task.answers(said, examples)
    before = opened.untuned().predict(texts)
    assert [label for label, _ in before] == [label for label, _ in plain]
    shares = [share for _, share in plain]
    assert [share for _, share in before] == pytest.approx(shares, abs=1e-3)
    outcome = cli_call("predict", folder, "--before", *texts)
    assert outcome.code == 0, outcome
    assert "before" in outcome.out
    for _, share in [*opened.predict(texts), *before]:
        assert f"{share:.3f}" in outcome.out


def test_the_start_is_scored_where_the_settings_ask_for_it(ground: Ground, tmp_path: Path) -> None:
    outcome = cli_call(
        *("run", ground.config, "--runs", tmp_path, "--set", "name=mine", *SHORT),
        *("--set", "evaluation.start=true", "--set", "evaluation.every=1"),
    )
    assert outcome.code == 0, outcome
    scored = evaluations(tmp_path / "mine")
    assert [row.round for row in scored] == [0, 1, 2]
    assert "start" in outcome.out
    [line] = table(tmp_path / "mine" / "report" / "summary.csv")
    assert float(line["start_accuracy"]) == scored[0].metrics["accuracy"]


def test_a_demo_is_run_instead_of_a_file(ground: Ground) -> None:
    refused(cli_call("compare", ground.config, "--demo", "llm"), "--demo llm", "leave out")
    for name in running.DEMOS.values():
        planned = plan(arguments.tree(Path(fedpeft.__file__).parent / name, []))
        assert len(planned) >= 3


def test_predict_takes_a_text_as_it_is(trained: Finished) -> None:
    folder, _ = trained
    outcome = cli_call("predict", folder, "[/bold] word1", "[red]word2[/red]", "")
    assert outcome.code == 0, outcome
    assert "[/bold] word1" in outcome.out
    assert "[red]word2[/red]" in outcome.out


def test_export_writes_a_peft_folder_with_tokenizer_and_label_names(
    trained: Finished, tmp_path: Path
) -> None:
    folder, _ = trained
    made = tmp_path / "deep" / f"adapter{'-of-a-long-name' * 8}"
    outcome = cli_call("export", folder, made)
    assert (outcome.code, outcome.out) == (0, f"{made}\n")
    written = {path.name for path in made.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= written
    assert "config.json" not in written, "transformers would take it for a whole model"
    names = json.loads((made / "labels" / "config.json").read_text())["id2label"]
    assert tuple(names.values()) == LABELS


def test_export_merge_writes_a_whole_model(
    trained: Finished, ground: Ground, tmp_path: Path
) -> None:
    folder, _ = trained
    assert cli_call("export", folder, tmp_path / "whole", "--merge").code == 0
    written = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written
    assert "adapter_config.json" not in written
    merged, base = (
        load_file(tmp_path / "whole" / "model.safetensors"),
        load_file(ground.model / "model.safetensors"),
    )
    moved = [
        name for name, tensor in base.items() if not bool((merged[f"bert.{name}"] == tensor).all())
    ]
    assert moved
    assert all("attention" in name and name.endswith(".weight") for name in moved)


def test_methods_lists_every_method_with_what_it_does_and_its_paper() -> None:
    outcome = cli_call("methods")
    assert (outcome.code, outcome.err) == (0, "")
    words = " ".join(outcome.out.split())
    for name, method in METHODS.items():
        assert any(line.split()[:1] == [name] for line in outcome.out.splitlines()), name
        assert method.__doc__
        assert method.__doc__.split()[0] in words
        if "arXiv" in method.paper:
            assert method.paper.split("arXiv ")[1].split(";")[0] in words


def test_partition_shows_who_holds_what_as_table_and_picture(
    ground: Ground, tmp_path: Path
) -> None:
    outcome = cli_call("partition", ground.config, "--png", tmp_path / "who.png")
    assert outcome.code == 0, outcome
    assert (tmp_path / "who.png").read_bytes().startswith(PNG)
    lines = [
        line.split()
        for line in outcome.out.splitlines()
        if line.split()[:1] == ["client"] and len(line.split()) > 5
    ]
    held = [int(line[2]) for line in lines if line[1].isdigit()]
    assert len(held) == 5
    assert sum(held) == len(read_data(ground.chosen()).train)
    assert min(held) >= 8


@pytest.mark.parametrize(
    "kind",
    ["iid", "quantity", "label_skew", "shards", "cluster", "by_key", "file", "flower"],
)
def test_partition_of_every_kind(ground: Ground, tmp_path: Path, kind: str) -> None:
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps({f"hospital [/{k}]": list(range(20 * k, 20 * k + 20)) for k in range(5)})
    )
    sets = (
        "--set",
        f"partition.kind={kind}",
        "--set",
        "data.key=site",
        "--set",
        f"partition.file={own}",
        "--set",
        "partition.flower={name='ShardPartitioner', partition_by='label', num_shards_per_partition=2}",
    )
    outcome = cli_call("partition", ground.config, *sets, "--png", tmp_path / "who.png")
    assert outcome.code == 0, outcome
    assert "5 clients" in outcome.out
    if kind == "file":
        assert "hospital [/3]" in outcome.out
    if kind == "by_key":
        assert "site3" in outcome.out
    assert "total variation of two clients" in outcome.out
    again = cli_call("partition", ground.config, *sets, "--json", "--png", tmp_path / "not.png")
    assert again.code == 0, again
    summary = json.loads(again.out)
    expected = {"sizes", "label", "key"} | ({"cluster"} if kind == "cluster" else set())
    assert set(summary) == expected
    assert summary["sizes"]["clients"] == 5
    assert 0 <= summary["label"]["entropy"] <= 2
    assert not (tmp_path / "not.png").exists()


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl.gz", "json"])
def test_the_same_rows_are_the_same_data_in_every_format(
    ground: Ground, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"examples.{ending}"
    text = io.StringIO(newline="")
    if "csv" in ending:
        writer = csv.DictWriter(text, ["text", "label", "site", "unused"])
        writer.writeheader()
        writer.writerows(examples())
    else:
        text.writelines(json.dumps(row) + "\n" for row in examples())
    path.write_bytes(
        gzip.compress(text.getvalue().encode())
        if ending.endswith("gz")
        else text.getvalue().encode()
    )
    other = ground.chosen({"data": {"train": str(path)}})
    assert read_data(other).digest() == read_data(ground.chosen()).digest()


def test_files_in_a_configuration_are_found_beside_it(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ground.folder / "relative.toml"
    config.write_text(ground.config.read_text().replace(str(ground.data), ground.data.name))
    monkeypatch.chdir(tmp_path)
    assert cli_call("partition", config, "--png", "who.png").code == 0


@pytest.mark.parametrize("by_option", [False, True])
def test_a_home_folder_and_patterns_are_understood(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_option: bool
) -> None:
    """The rows are cut into three files in the user's home, where the model lies, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copytree(ground.model, tmp_path / "bert")
    rows = [json.dumps(row) for row in examples()]
    for place, part in enumerate((rows[:50], rows[50:90], rows[90:])):
        (tmp_path / f"part{place}.ndjson").write_text("\n".join(part))
    (tmp_path / "who.json").write_text('{"anna": [0, 1, 2, 3]}')
    fields = {
        "data": {"source": "files", "train": "~/part*.ndjson"},
        "model": {**ground.tree()["model"], "name": "~/bert"},
        "partition": {"kind": "file", "file": "~/who.json"},
    }
    (tmp_path / "home.toml").write_text(to_toml({**ground.tree(), **({} if by_option else fields)}))
    options = ["data.train=~/part*.ndjson", "model.name=~/bert"]
    options += ["partition.kind=file", "partition.file=~/who.json"]
    tree = arguments.tree(tmp_path / "home.toml", options if by_option else [])
    config = from_tree(tree)
    assert config.data.train == tmp_path / "part*.ndjson"
    assert config.model.name == str(tmp_path / "bert")
    assert config.partition.file == tmp_path / "who.json"
    assert read_data(config).digest() == read_data(ground.chosen()).digest()


@pytest.mark.usefixtures("no_figures")
def test_rows_held_out_of_a_users_partition_are_told(ground: Ground, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({f"c{k}": list(range(20 * k, 20 * k + 20)) for k in range(5)}))
    fields = ("partition.kind=file", f"partition.file={own}", "federation.rounds=1")
    sets = [part for field in fields for part in ("--set", field)]
    few = ("--methods", "lora,bitfit", "--jobs", "1")
    gone = 100 - sum(number < 100 for number in read_data(ground.chosen()).train.numbers)
    commands: list[tuple[str | Path, ...]] = [
        ("partition", ground.config, *sets, "--png", tmp_path / "who.png"),
        ("run", ground.config, *sets, "--runs", tmp_path / "one"),
        ("compare", ground.config, *sets, "--runs", tmp_path / "two", *few),
    ]
    for command in commands:
        outcome = cli_call(*command)
        assert outcome.code == 0, outcome
        assert outcome.out.count(f"{own}: {gone} of its 100 rows are held out of train") == 1


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("where", ["in the file", "by --set"])
def test_a_run_begun_in_one_folder_resumes_from_another(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Data and model are named as they are seen from the first folder."""
    config = ground.folder / "relative.toml"
    text = ground.config.read_text()
    config.write_text(
        text.replace(str(ground.data), ground.data.name).replace(
            str(ground.model), ground.model.name
        )
    )
    sets = (
        (f"data.train={ground.data.name}", f"model.name={ground.model.name}")
        if where == "by --set"
        else ()
    )
    options = [part for one in sets for part in ("--set", one)]
    monkeypatch.chdir(ground.folder)
    assert cli_call("run", "relative.toml", "--runs", tmp_path / "runs", *SHORT, *options).code == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny" / "checkpoints" / "000002.json").unlink()
    assert cli_call("resume", "runs/tiny").code == 0


@pytest.mark.usefixtures("no_figures")
def test_overwrite_begins_anew(ground: Ground, runs: Path) -> None:
    once = ("run", ground.config, "--runs", runs, *SHORT)
    assert cli_call(*once).code == 0
    theirs = runs / "tiny" / "notes.txt"
    theirs.touch()
    refused(cli_call(*once, "--overwrite"), "notes.txt", "not overwritten")
    assert theirs.exists()
    theirs.unlink()
    # Reports of runs with a fleet, and of other metrics, are ours, too.
    for name in ("devices.csv", "perplexity_over_time.png", "macro_f1_over_rounds.png"):
        (runs / "tiny" / "report" / name).touch()
    assert cli_call(*once, "--overwrite", "--set", "federation.rounds=1").code == 0
    assert not (runs / "tiny" / "report" / "devices.csv").exists()
    assert [row.round for row in evaluations(runs / "tiny")] == [1]
    assert not (runs / "tiny" / "checkpoints" / "000002.json").exists()


@pytest.mark.usefixtures("no_figures")
def test_per_client_scores_are_asked_of_the_clients(ground: Ground, runs: Path) -> None:
    assert (
        cli_call(
            "run", ground.config, "--runs", runs, *SHORT, "--set", "evaluation.per_client=true"
        ).code
        == 0
    )
    [row] = evaluations(runs / "tiny")
    assert row.clients_scored == 5
    assert row.client_mean is not None
    assert row.client_worst_tenth is not None
    assert 0 <= row.client_worst_tenth <= row.client_mean <= 1


def test_help_names_every_command() -> None:
    outcome = cli_call("--help")
    assert outcome.code == 0
    for command in (
        "run",
        "resume",
        "compare",
        "sweep",
        "tune",
        "methods",
        "advise",
        "partition",
        "export",
        "predict",
        "report",
    ):
        assert any(
            line.strip("│ ").startswith(f"{command} ") for line in outcome.out.splitlines()
        ), command


def test_a_run_that_learnt_nothing_says_so_and_ends_with_another_code(
    ground: Ground, runs: Path
) -> None:
    options = (
        "--set",
        "training.lr=1e30",
        "--set",
        "federation.rounds=1",
        "--set",
        "training.optimizer=sgd",
    )
    outcome = cli_call("run", ground.config, "--runs", runs, *options)
    assert outcome.code == 2
    assert "nothing was learnt" in outcome.err
    assert "diverged" in outcome.err
