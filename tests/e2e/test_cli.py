"""Every command does what its help says, on data so easy that learning must show."""

import csv
import gzip
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from fedpeft import checkpoint, cli, hardware
from fedpeft.assembly import assemble, read_data
from fedpeft.compare import plan
from fedpeft.config import merge
from fedpeft.ledger import ClientRow, EvaluationRow, Row, RunRow
from fedpeft.ledger import read as ledger
from fedpeft.methods import METHODS
from fedpeft.types import State

from .builders import LABELS, OWN_WORDS, Ground, Outcome, assert_same, cli_call, examples, refused

PNG = b"\x89PNG\r\n\x1a\n"
SHEETS = ("summary.csv", "runs.csv", "curves.csv")
FIGURES = ("accuracy_over_rounds.png", "accuracy_over_megabytes.png", "accuracy_over_time.png")
LEARNING = ("--set", "federation.clients_per_round=3", "--set", "training.steps=4", "--set", "training.batch_size=16")
SHORT = ("--set", "federation.rounds=2", "--set", "training.steps=1")

Finished = tuple[Path, Outcome]


@pytest.fixture(scope="module")
def trained(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run long enough to learn something, and what the command said."""
    runs = tmp_path_factory.mktemp("run") / "runs"
    outcome = cli_call("run", ground.config, "--runs", runs, "--set", "name=mine", *LEARNING)
    return runs / "mine", outcome


@pytest.fixture(scope="module")
def compared(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, tuple[str | Path, ...]]:
    """Two methods, two seeds and both references on gzipped CSV data; also the arguments, to be repeated."""
    place = tmp_path_factory.mktemp("compare")
    with gzip.open(place / "examples.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, ["label", "unused", "text", "site"])
        writer.writeheader()
        writer.writerows(examples())
    arguments = (
        *("compare", ground.config, "--runs", place / "runs", "--methods", "lora,fedara", "--seeds", "0,1", *SHORT),
        *("--set", f"data.train={place / 'examples.csv.gz'}", "--set", "evaluation.every=1", "--set", "compare.rank=4"),
        *("--set", 'compare.references=["centralised", "local-only"]'),
    )
    return place / "runs" / "tiny-compare", cli_call(*arguments), arguments


def rows_of(folder: Path) -> list[Row]:
    return ledger(folder / "ledger.jsonl")


def evaluations(folder: Path) -> list[EvaluationRow]:
    return [row for row in rows_of(folder) if isinstance(row, EvaluationRow)]


def about(folder: Path) -> RunRow:
    first = rows_of(folder)[0]
    assert isinstance(first, RunRow)
    return first


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_reported(folder: Path) -> None:
    """Assert that the CSV files have lines and the figures are figures."""
    for name in SHEETS:
        assert table(folder / name), name
    for name in FIGURES:
        assert (folder / name).read_bytes().startswith(PNG), name


def test_run_learns_what_the_majority_class_does_not_tell(trained: Finished) -> None:
    folder, outcome = trained
    assert outcome.code == 0, outcome
    assert [row.round for row in evaluations(folder)] == [3, 6]
    assert evaluations(folder)[-1].accuracy >= about(folder).majority + 0.2


def test_run_prints_its_table_and_writes_sheets_and_figures(trained: Finished) -> None:
    folder, outcome = trained
    assert "lora" in outcome.out
    assert "majority class" in outcome.out
    assert_reported(folder / "report")
    [line] = table(folder / "report" / "summary.csv")
    assert float(line["accuracy"]) == evaluations(folder)[-1].accuracy
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
    monkeypatch.setattr(cli, "out", Console(file=screen, force_terminal=True, width=120, color_system=None))
    assert cli_call("run", ground.config, "--runs", runs, *SHORT).code == 0
    for shown in ("tiny", "2/2", "accuracy 0.", "MB"):
        assert shown in screen.getvalue()


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
    assert resolved == {"device": "cpu", "precision": "fp32", "attention": "eager", "threads": 1}
    assert resolved.items() <= about(folder).resolved.items()


def test_resume_of_a_finished_run_changes_nothing(trained: Finished) -> None:
    folder, _ = trained
    files = [*folder.glob("checkpoints/*"), folder / "ledger.jsonl"]
    before = {path: path.read_bytes() for path in files}
    outcome = cli_call("resume", folder)
    assert outcome.code == 0, outcome
    assert "majority class" in outcome.out
    assert {path: path.read_bytes() for path in [*folder.glob("checkpoints/*"), folder / "ledger.jsonl"]} == before


def test_predict_labels_texts_with_what_was_learnt(trained: Finished) -> None:
    folder, _ = trained
    texts = [" ".join(OWN_WORDS[label] * 3) for label in LABELS]
    outcome = cli_call("predict", folder, *texts)
    assert outcome.code == 0, outcome
    lines = [line for line in outcome.out.splitlines() if any(word in line for own in OWN_WORDS.values() for word in own)]
    said = [line.split()[0] for line in lines if line.split()[0] in LABELS]
    assert len(said) == len(LABELS)
    assert sum(one == label for one, label in zip(said, LABELS, strict=True)) >= 3


def test_predict_takes_a_text_as_it_is(trained: Finished) -> None:
    folder, _ = trained
    outcome = cli_call("predict", folder, "[/bold] word1", "[red]word2[/red]", "")
    assert outcome.code == 0, outcome
    assert "[/bold] word1" in outcome.out
    assert "[red]word2[/red]" in outcome.out


def test_export_writes_a_peft_folder_with_tokenizer_and_label_names(trained: Finished, tmp_path: Path) -> None:
    folder, _ = trained
    made = tmp_path / "deep" / f"adapter{'-of-a-long-name' * 8}"
    outcome = cli_call("export", folder, made)
    assert (outcome.code, outcome.out) == (0, f"{made}\n")
    written = {path.name for path in made.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "config.json"} <= written
    names = json.loads((made / "config.json").read_text())["id2label"]
    assert tuple(names.values()) == LABELS


def test_export_merge_writes_a_whole_model(trained: Finished, ground: Ground, tmp_path: Path) -> None:
    folder, _ = trained
    assert cli_call("export", folder, tmp_path / "whole", "--merge").code == 0
    written = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written
    assert "adapter_config.json" not in written
    merged, base = load_file(tmp_path / "whole" / "model.safetensors"), load_file(ground.model / "model.safetensors")
    moved = [name for name, tensor in base.items() if not bool((merged[f"bert.{name}"] == tensor).all())]
    assert moved
    assert all("attention" in name and name.endswith(".weight") for name in moved)


def test_report_takes_a_folder_of_runs_and_reports_where_it_is_told(
    compared: tuple[Path, Outcome, tuple[str | Path, ...]], tmp_path: Path
) -> None:
    root, _, _ = compared
    outcome = cli_call("report", root, "--to", tmp_path / "there", "--target", "0.2", "--bandwidth", "5e5")
    assert outcome.code == 0, outcome
    assert_reported(tmp_path / "there")
    lines = table(tmp_path / "there" / "summary.csv")
    assert {line["method"] for line in lines} == {"lora", "fedara", "centralised", "local-only"}
    assert {(line["target"], line["bandwidth"]) for line in lines} == {("0.2", "500000.0")}


def test_compare_gives_every_method_and_reference_a_line_over_its_seeds(
    compared: tuple[Path, Outcome, tuple[str | Path, ...]],
) -> None:
    root, outcome, _ = compared
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    assert_reported(root / "report")
    lines = {line["method"]: line for line in table(root / "report" / "summary.csv")}
    assert lines.keys() == {"lora", "fedara", "centralised", "local-only"}
    for label, line in lines.items():
        assert label in outcome.out
        assert line["seeds"] == "2"
        each = [evaluations(root / f"{label}-s{seed}")[-1].accuracy for seed in (0, 1)]
        assert float(line["accuracy"]) == pytest.approx(sum(each) / 2)
        assert float(line["accuracy_spread"]) == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    for label in ("centralised", "local-only"):
        assert float(lines[label]["down_bytes"]) == float(lines[label]["up_bytes"]) == 0
    assert float(lines["fedara"]["up_bytes"]) > 0


def test_compare_trains_every_row_on_its_own_terms(compared: tuple[Path, Outcome, tuple[str | Path, ...]]) -> None:
    root, _, _ = compared
    federated, centralised, alone = (about(root / f"{label}-s1") for label in ("lora", "centralised", "local-only"))
    assert (federated.clients, federated.clients_per_round) == (5, 2)
    assert (centralised.clients, centralised.clients_per_round, centralised.reference) == (1, 1, True)
    assert (alone.clients, alone.reference) == (5, True)
    steps = [sum(row.steps for row in rows_of(root / f"{label}-s1") if isinstance(row, ClientRow)) for label in
             ("lora", "centralised")]  # fmt: skip
    assert steps[0] == steps[1]
    ranks = {json.loads((root / f"{label}-s0" / "config.json").read_text())["method"]["rank"] for label in ("lora", "fedara")}
    assert ranks == {4}


def test_the_centralised_row_plays_its_method_at_that_methods_own_settings(ground: Ground) -> None:
    rate = {"settings": {"lora": {"training": {"lr": 0.123}}}, "methods": ["lora"], "references": ["centralised"]}
    planned = {one.label: one.config for one in plan(merge(ground.tree(), {"compare": rate}))}
    assert planned["lora"].training.lr == planned["centralised"].training.lr == 0.123
    own = {"settings": {**rate["settings"], "centralised": {"training": {"lr": 0.5}}}}  # type: ignore[dict-item]
    again = {one.label: one.config for one in plan(merge(ground.tree(), {"compare": rate}, {"compare": own}))}
    assert again["centralised"].training.lr == 0.5


def test_the_runs_of_a_comparison_share_what_was_found_out_about_the_machine(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that falls the other way between two methods would compare bf16 with fp32."""
    fast = iter((True, False))
    monkeypatch.setattr(hardware, "_bf16_is_fast", lambda _: next(fast))
    config = ground.chosen({"machine": {"precision": "auto", "attention": "auto"}})
    first = assemble(config)
    assert first.hardware.precision == "bf16"
    assert assemble(replace(config, method={"name": "bitfit"}), like=first).hardware == first.hardware


def test_compare_resume_plays_what_is_missing_and_leaves_the_rest(
    compared: tuple[Path, Outcome, tuple[str | Path, ...]],
) -> None:
    root, _, arguments = compared
    runs = [root / f"{label}-s{seed}" for label in ("lora", "fedara", "centralised", "local-only") for seed in (0, 1)]
    before = {run: (run / "ledger.jsonl").read_bytes() for run in runs}
    states = {run: _last_state(run) for run in runs}
    shutil.rmtree(root / "fedara-s1")  # never begun
    (root / "lora-s1" / "checkpoints" / "000002.json").unlink()  # half done
    outcome = cli_call(*arguments, "--resume")
    assert outcome.code == 0, outcome
    for run in runs:
        assert_same(_last_state(run), states[run])
        if run.name not in ("fedara-s1", "lora-s1"):
            assert (run / "ledger.jsonl").read_bytes() == before[run]
    refused(cli_call(*arguments), "exists", "--overwrite")


def test_sweep_tries_every_value_with_every_method_on_validation(ground: Ground, runs: Path) -> None:
    outcome = cli_call("sweep", ground.config, "training.lr=0.001,0.02", "--methods", "lora,bitfit", "--runs", runs, *SHORT)
    assert outcome.code == 0, outcome
    root = runs / "tiny-sweep"
    assert_reported(root / "report")
    folders = sorted(path.parent for path in root.glob("*/ledger.jsonl"))
    found = [(about(folder).settings, evaluations(folder)) for folder in folders]
    tried = {(settings["method"]["name"], settings["training"]["lr"]) for settings, _ in found}  # type: ignore[index]
    assert tried == {(method, lr) for method in ("lora", "bitfit") for lr in (0.001, 0.02)}
    assert {row.split for _, rows in found for row in rows} == {"validation"}
    assert len(table(root / "report" / "summary.csv")) == 4


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


def test_partition_shows_who_holds_what_as_table_and_picture(ground: Ground, tmp_path: Path) -> None:
    outcome = cli_call("partition", ground.config, "--png", tmp_path / "who.png")
    assert outcome.code == 0, outcome
    assert (tmp_path / "who.png").read_bytes().startswith(PNG)
    lines = [line.split() for line in outcome.out.splitlines() if line.split()[:1] == ["client"] and len(line.split()) > 5]
    held = [int(line[2]) for line in lines if line[1].isdigit()]
    assert len(held) == 5
    assert sum(held) == len(read_data(ground.chosen().data).train)
    assert min(held) >= 8


@pytest.mark.parametrize("kind", ["iid", "shards", "by_key", "file"])
def test_partition_of_every_kind(ground: Ground, tmp_path: Path, kind: str) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({f"hospital [/{k}]": list(range(20 * k, 20 * k + 20)) for k in range(5)}))
    sets = ("--set", f"partition.kind={kind}", "--set", "data.key=site", "--set", f"partition.file={own}")
    outcome = cli_call("partition", ground.config, *sets, "--png", tmp_path / "who.png")
    assert outcome.code == 0, outcome
    assert "5 clients" in outcome.out
    if kind == "file":
        assert "hospital [/3]" in outcome.out
    if kind == "by_key":
        assert "site3" in outcome.out


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl.gz", "json"])
def test_the_same_rows_are_the_same_data_in_every_format(ground: Ground, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"examples.{ending}"
    text = io.StringIO(newline="")
    if "csv" in ending:
        writer = csv.DictWriter(text, ["text", "label", "site", "unused"])
        writer.writeheader()
        writer.writerows(examples())
    else:
        text.writelines(json.dumps(row) + "\n" for row in examples())
    path.write_bytes(gzip.compress(text.getvalue().encode()) if ending.endswith("gz") else text.getvalue().encode())
    choice = ground.chosen().data
    assert read_data(replace(choice, train=path)).digest() == read_data(choice).digest()


def test_files_in_a_configuration_are_found_beside_it(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ground.folder / "relative.toml"
    config.write_text(ground.config.read_text().replace(str(ground.data), ground.data.name))
    monkeypatch.chdir(tmp_path)
    assert cli_call("partition", config, "--png", "who.png").code == 0
    assert (tmp_path / "who.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_run_begun_in_one_folder_resumes_from_another(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and model are named as they are seen from the first folder."""
    config = ground.folder / "relative.toml"
    text = ground.config.read_text()
    config.write_text(text.replace(str(ground.data), ground.data.name).replace(str(ground.model), ground.model.name))
    monkeypatch.chdir(ground.folder)
    assert cli_call("run", "relative.toml", "--runs", tmp_path / "runs", *SHORT).code == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny" / "checkpoints" / "000002.json").unlink()
    outcome = cli_call("resume", "runs/tiny")
    assert outcome.code == 0, outcome


@pytest.mark.usefixtures("no_figures")
def test_overwrite_begins_anew(ground: Ground, runs: Path) -> None:
    once = ("run", ground.config, "--runs", runs, *SHORT)
    assert cli_call(*once).code == 0
    (runs / "tiny" / "left over").touch()
    assert cli_call(*once, "--overwrite", "--set", "federation.rounds=1").code == 0
    assert [row.round for row in evaluations(runs / "tiny")] == [1]
    assert not (runs / "tiny" / "left over").exists()
    assert not (runs / "tiny" / "checkpoints" / "000002.json").exists()


@pytest.mark.usefixtures("no_figures")
def test_per_client_scores_are_asked_of_the_clients(ground: Ground, runs: Path) -> None:
    assert cli_call("run", ground.config, "--runs", runs, *SHORT, "--set", "evaluation.per_client=true").code == 0
    [row] = evaluations(runs / "tiny")
    assert row.clients_scored == 5
    assert row.client_mean is not None
    assert row.client_worst_tenth is not None
    assert 0 <= row.client_worst_tenth <= row.client_mean <= 1


def test_help_names_every_command() -> None:
    outcome = cli_call("--help")
    assert outcome.code == 0
    for command in ("run", "resume", "compare", "sweep", "methods", "partition", "export", "predict", "report"):
        assert any(line.strip("│ ").startswith(f"{command} ") for line in outcome.out.splitlines()), command


def _last_state(run: Path) -> State:
    found = checkpoint.load(run / "checkpoints", json.loads(_last_manifest(run).read_text())["config"], pytest.fail)
    assert found is not None
    return found.state


def _last_manifest(run: Path) -> Path:
    return max((run / "checkpoints").glob("*.json"))
