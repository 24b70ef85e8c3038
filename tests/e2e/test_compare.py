"""Many runs from one configuration: comparisons with their references, sweeps, and reports on them."""

import csv
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.experiment.build import build
from fedpeft.experiment.compare import grid, plan
from fedpeft.experiment.config import from_tree, merge
from fedpeft.experiment.recorder import settings_digests
from fedpeft.federation import checkpoint
from fedpeft.ledger import ClientRow
from fedpeft.training import hardware
from fedpeft.types import State

from .builders import Ground, Outcome, assert_same, cli_call, examples, refused
from .reading import SHORT, about, assert_reported, evaluations, rows_of, table


@pytest.fixture(scope="module")
def compared(
    ground: Ground, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome, tuple[str | Path, ...]]:
    """Two methods, two seeds and both references on gzipped CSV data; also the arguments, to be repeated."""
    place = tmp_path_factory.mktemp("compare")
    with gzip.open(place / "examples.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, ["label", "unused", "text", "site"])
        writer.writeheader()
        writer.writerows(examples())
    arguments = (
        *(
            "compare",
            ground.config,
            "--runs",
            place / "runs",
            "--methods",
            "lora,fedara",
            "--seeds",
            "0,1",
            *SHORT,
        ),
        *(
            "--set",
            f"data.train={place / 'examples.csv.gz'}",
            "--set",
            "evaluation.every=1",
            "--set",
            "compare.rank=4",
        ),
        *("--set", 'compare.references=["centralised", "local-only"]'),
    )
    return place / "runs" / "tiny-compare", cli_call(*arguments), arguments


def test_report_takes_a_folder_of_runs_and_reports_where_it_is_told(
    compared: tuple[Path, Outcome, tuple[str | Path, ...]], tmp_path: Path
) -> None:
    root, _, _ = compared
    outcome = cli_call(
        "report", root, "--to", tmp_path / "there", "--target", "0.2", "--bandwidth", "5e5"
    )
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
        each = [evaluations(root / f"{label}-s{seed}")[-1].metrics["accuracy"] for seed in (0, 1)]
        assert float(line["accuracy"]) == pytest.approx(sum(each) / 2)
        assert float(line["accuracy_spread"]) == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    for label in ("centralised", "local-only"):
        assert float(lines[label]["down_bytes"]) == float(lines[label]["up_bytes"]) == 0
    assert float(lines["fedara"]["up_bytes"]) > 0


def test_compare_trains_every_row_on_its_own_terms(
    compared: tuple[Path, Outcome, tuple[str | Path, ...]],
) -> None:
    root, _, _ = compared
    federated, centralised, alone = (
        about(root / f"{label}-s1") for label in ("lora", "centralised", "local-only")
    )
    assert (federated.clients, federated.clients_per_round) == (5, 2)
    assert (centralised.clients, centralised.clients_per_round, centralised.reference) == (
        1,
        1,
        True,
    )
    assert (alone.clients, alone.reference) == (5, True)
    steps = []
    for label in ("lora", "centralised"):
        rows = [row for row in rows_of(root / f"{label}-s1") if isinstance(row, ClientRow)]
        steps.append(sum(row.measured.steps for row in rows))
    assert steps[0] == steps[1]
    ranks = {
        json.loads((root / f"{label}-s0" / "config.json").read_text())["method"]["rank"]
        for label in ("lora", "fedara")
    }
    assert ranks == {4}


def test_the_centralised_row_plays_its_method_at_that_methods_own_settings(ground: Ground) -> None:
    rate = {
        "settings": {"lora": {"training": {"lr": 0.123}}},
        "methods": ["lora"],
        "references": ["centralised"],
    }
    planned = {one.label: one.config for one in plan(merge(ground.tree(), {"compare": rate}))}
    assert planned["lora"].training.lr == planned["centralised"].training.lr == 0.123
    own = {"settings": {**rate["settings"], "centralised": {"training": {"lr": 0.5}}}}  # type: ignore[dict-item]
    again = {
        one.label: one.config
        for one in plan(merge(ground.tree(), {"compare": rate}, {"compare": own}))
    }
    assert again["centralised"].training.lr == 0.5


def test_the_centralised_row_has_one_optimizer_for_the_whole_run(ground: Ground) -> None:
    """Moments that began anew with every round would be a handicap that ordinary training does not have."""
    asked = {"compare": {"methods": ["lora"], "references": ["centralised", "local-only"]}}
    planned = {one.label: one.config.training for one in plan(merge(ground.tree(), asked))}
    kept = {label: training.keep_optimizer for label, training in planned.items()}
    assert kept == {"lora": False, "local-only": False, "centralised": True}
    assert planned["centralised"].steps == 4, "2 steps of 2 clients"
    anew = {"compare": {"settings": {"centralised": {"training": {"keep_optimizer": False}}}}}
    again = {one.label: one.config for one in plan(merge(ground.tree(), asked, anew))}
    assert not again["centralised"].training.keep_optimizer


def test_the_centralised_row_counts_the_clients_that_the_data_or_a_file_names(
    ground: Ground, tmp_path: Path
) -> None:
    """6 rounds of 2 of 3 clients are 4 epochs of all the data; of 20 clients it would be less than one."""
    (tmp_path / "who.json").write_text(json.dumps({name: [row] for row, name in enumerate("abc")}))
    epochs = {
        "training": {"steps": None},
        "compare": {"methods": ["lora"], "references": ["centralised"]},
    }
    for partition, rounds in (
        ({"kind": "by_key", "clients": None}, 6 * 2 / 5),
        ({"kind": "by_key", "clients": 2}, 6),
        ({"kind": "file", "clients": None, "file": str(tmp_path / "who.json")}, 4),
        ({"kind": "iid", "clients": 4}, 3),
        ({"kind": "iid", "clients": None}, 1),
    ):
        settings = {"data": {"key": "site"}, "partition": partition}
        planned = {one.label: one.config for one in plan(merge(ground.tree(), epochs, settings))}
        assert planned["centralised"].federation.rounds == round(rounds)


def test_the_runs_of_a_comparison_share_what_was_found_out_about_the_machine(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that falls the other way between two methods would compare bf16 with fp32."""
    fast = iter((True, False))
    monkeypatch.setattr(hardware, "_bf16_is_fast", lambda _: next(fast))
    config = ground.chosen({"machine": {"precision": "auto", "attention": "auto"}})
    first = build(config)
    assert first.hardware.precision == "bf16"
    assert build(replace(config, method={"name": "bitfit"}), reuse=first).hardware == first.hardware


def test_compare_resume_plays_what_is_missing_and_leaves_the_rest(
    compared: tuple[Path, Outcome, tuple[str | Path, ...]],
) -> None:
    root, _, arguments = compared
    runs = [
        root / f"{label}-s{seed}"
        for label in ("lora", "fedara", "centralised", "local-only")
        for seed in (0, 1)
    ]
    before = {run: (run / "ledger.jsonl").read_bytes() for run in runs}
    states = {run: _last_state(run) for run in runs}
    shutil.rmtree(root / "fedara-s1")  # never begun
    (root / "lora-s1" / "checkpoints" / "000002.json").unlink()  # half done
    (root / "lora-s1" / "checkpoints" / "000003.json").write_text("{")  # the latest, and damaged
    outcome = cli_call(*arguments, "--resume")
    assert outcome.code == 0, outcome
    assert "falling back to the one before" in outcome.out
    for run in runs:
        assert_same(_last_state(run), states[run])
        if run.name not in ("fedara-s1", "lora-s1"):
            assert (run / "ledger.jsonl").read_bytes() == before[run]
    refused(cli_call(*arguments), "exists", "--overwrite")


def test_compare_resume_takes_more_seeds_and_refuses_other_settings_before_anything_is_trained(
    ground: Ground, runs: Path
) -> None:
    arguments = ("compare", ground.config, "--runs", runs, "--methods", "bitfit, lora", *SHORT)
    assert cli_call(*arguments, "--seeds", "0").code == 0
    before = (runs / "tiny-compare" / "lora-s0" / "ledger.jsonl").read_bytes()
    assert cli_call(*arguments, "--seeds", "0,1", "--resume").code == 0
    assert (runs / "tiny-compare" / "lora-s0" / "ledger.jsonl").read_bytes() == before
    assert (runs / "tiny-compare" / "bitfit-s1" / "ledger.jsonl").exists()
    shutil.rmtree(runs / "tiny-compare" / "bitfit-s0")
    other = ("--set", "training.lr=0.02", "--resume")
    refused(cli_call(*arguments, "--seeds", "0", *other), "lora-s0", "other settings")
    assert not (runs / "tiny-compare" / "bitfit-s0").exists()


def test_the_majority_is_that_of_the_texts_that_are_scored(ground: Ground) -> None:
    whole = build(ground.chosen({"evaluation": {"limit": 10}}))
    commonest = whole.task.labels.index("birds")
    right = [int(example.labels) == commonest for example in whole.scored]
    assert whole.run_row().majority == pytest.approx(sum(right) / len(right))
    assert len(whole.scored) == 10


@pytest.mark.slow
def test_runs_side_by_side_end_in_the_same_bits_and_are_resumed_side_by_side(
    ground: Ground, runs: Path
) -> None:
    arguments = ("compare", ground.config, "--methods", "lora,bitfit", "--seeds", "0,1", *SHORT)
    assert cli_call(*arguments, "--runs", runs / "one").code == 0
    side_by_side = (*arguments, "--runs", runs / "other", "--jobs", "2")
    assert cli_call(*side_by_side).code == 0
    shutil.rmtree(runs / "other" / "tiny-compare" / "lora-s1")  # never begun
    (
        runs / "other" / "tiny-compare" / "bitfit-s0" / "checkpoints" / "000002.json"
    ).unlink()  # half done
    outcome = cli_call(*side_by_side, "--resume")
    assert outcome.code == 0, outcome
    for name in ("lora-s0", "lora-s1", "bitfit-s0", "bitfit-s1"):
        one, other = (runs / place / "tiny-compare" / name for place in ("one", "other"))
        assert_same(_last_state(one), _last_state(other))
        assert json.loads((other / "hardware.json").read_text())["threads"] == 1


@pytest.mark.slow
def test_what_fails_in_one_of_several_processes_is_told_in_one_line(
    ground: Ground, runs: Path
) -> None:
    arguments = ("compare", ground.config, "--methods", "lora,bitfit", "--runs", runs, *SHORT)
    assert cli_call(*arguments).code == 0
    last = runs / "tiny-compare" / "lora-s0" / "checkpoints"
    for path in last.glob("*.state"):
        path.write_bytes(b"")
    (last / "000002.json").unlink()
    (runs / "tiny-compare" / "bitfit-s0" / "checkpoints" / "000002.json").unlink()
    outcome = cli_call(*arguments, "--jobs", "2", "--resume")
    refused(outcome, "lora-s0", "every checkpoint is damaged")


def test_compare_takes_targets_rank_and_fields_from_the_method_of_the_file(ground: Ground) -> None:
    """What ``run`` would play; ``compare.targets`` and ``compare.rank`` go before it."""
    written = {
        "method": {"name": "slora", "targets": "value", "rank": 3, "density": 0.3},
        "compare": {"methods": ["lora", "slora"]},
    }
    tree = {**ground.tree(), **written}
    methods = {one.label: one.config.method for one in plan(tree)}
    assert methods["slora"] == written["method"]
    assert methods["lora"] == {"name": "lora", "targets": "value", "rank": 3}
    chosen = merge(tree, {"compare": {"targets": "query", "rank": 2}})
    methods = {one.label: one.config.method for one in plan(chosen)}
    assert methods["slora"] == {"name": "slora", "targets": "query", "rank": 2, "density": 0.3}
    paper = {
        one.label: one.config.method for one in plan(merge(tree, {"compare": {"recipe": "paper"}}))
    }
    assert paper == {"slora": written["method"], "lora": {"name": "lora"}}


def test_sweep_refuses_a_value_or_a_field_that_is_named_twice(ground: Ground, runs: Path) -> None:
    refused(
        cli_call("sweep", ground.config, "training.lr=1e-3,1e-3", "--runs", runs),
        "training.lr",
        "once",
    )
    refused(
        cli_call("sweep", ground.config, "training.lr=1e-3", "training.lr=1e-2", "--runs", runs),
        "training.lr",
        "twice",
    )
    assert not runs.exists()


def test_sweep_tries_every_value_with_every_method_on_validation(
    ground: Ground, runs: Path
) -> None:
    outcome = cli_call(
        "sweep",
        ground.config,
        "training.lr=0.001,0.02",
        "--methods",
        "lora,bitfit",
        "--runs",
        runs,
        *SHORT,
    )
    assert outcome.code == 0, outcome
    root = runs / "tiny-sweep"
    assert_reported(root / "report")
    folders = sorted(path.parent for path in root.glob("*/ledger.jsonl"))
    found = [(about(folder).settings, evaluations(folder)) for folder in folders]
    tried = {(settings["method"]["name"], settings["training"]["lr"]) for settings, _ in found}  # type: ignore[index]
    assert tried == {(method, lr) for method in ("lora", "bitfit") for lr in (0.001, 0.02)}
    assert {row.split for _, rows in found for row in rows} == {"validation"}
    assert len(table(root / "report" / "summary.csv")) == 4


def _last_state(run: Path) -> State:
    found = checkpoint.load(run / "checkpoints", settings_digests(run), pytest.fail)
    assert found is not None
    return found.state


def test_a_section_method_without_a_name_is_loras_and_common_in_a_comparison(
    ground: Ground,
) -> None:
    """As every other field that is not given, the name takes its default."""
    tree = {**ground.tree(), "method": {"rank": 3, "scale": 0.5}}
    assert from_tree(tree).method == {"name": "lora", "rank": 3, "scale": 0.5}
    compared = plan(merge(tree, {"compare": {"methods": ["lora", "fedara", "bitfit"]}}))
    methods = {one.label: one.config.method for one in compared}
    assert methods["lora"] == {"name": "lora", "targets": "query|value", "rank": 3, "scale": 0.5}
    assert methods["fedara"] == {"name": "fedara", "targets": "query|value", "rank": 3}
    assert methods["bitfit"] == {"name": "bitfit"}


def test_a_sweep_gives_every_run_one_folder_with_a_name_for_any_system(ground: Ground) -> None:
    values = {"model.name": ["a/b", "../c:d"], "method.targets": ["query|value", 'q*?"<>\\']}
    planned = grid(ground.tree(), values, methods=False)
    folders = [run.folder(Path("root")) for run in planned]
    assert len(set(folders)) == 4
    for folder in folders:
        assert folder.parent == Path("root")
        assert not set('\\/:*?"<>| ') & set(folder.name)
