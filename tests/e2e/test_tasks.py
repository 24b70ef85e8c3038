"""Every task goes through the whole product: run, compare, sweep, resume, report, predict, export, Python."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from fedpeft.api import train
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.config import from_tree, merge
from fedpeft.experiment.run import resume, start
from fedpeft.experiment.trained import Trained, open_run
from fedpeft.ledger import FILE, EvaluationRow
from fedpeft.ledger import read as ledger
from fedpeft.training.evaluation import predictions

from .builders import Ground, cli_call, to_toml
from .task_grounds import TASK_GROUNDS

pytestmark = pytest.mark.usefixtures("no_figures")

LEARNING = {"training": {"lr": 0.02, "steps": 4}, "federation": {"rounds": 8}}


class Placed:
    """A task's data and settings in a folder, and a run of it."""

    def __init__(self, kind: str, ground: Ground, folder: Path) -> None:
        self.kind, self.folder, self.row = kind, folder, TASK_GROUNDS[kind]
        self.tree = merge(ground.tree(), self.row.tree(folder), LEARNING, {"name": kind})
        self.config = folder / "config.toml"
        self.config.write_text(to_toml(self.tree))
        self.run = folder / "runs" / kind
        start(self.federation(), self.run)

    def federation(self, *trees: dict[str, Any]) -> Federation:
        return build(from_tree(merge(self.tree, *trees)))

    def scores(self, folder: Path) -> list[dict[str, float]]:
        rows = [row for row in ledger(folder / FILE) if isinstance(row, EvaluationRow)]
        return [dict(row.metrics) for row in rows]


@pytest.fixture(scope="module", params=TASK_GROUNDS)
def placed(
    request: pytest.FixtureRequest, ground: Ground, tmp_path_factory: pytest.TempPathFactory
) -> Placed:
    """One task after the other, each with a finished run."""
    return Placed(request.param, ground, tmp_path_factory.mktemp(request.param))


def test_a_run_learns(placed: Placed) -> None:
    first, *_, last = placed.scores(placed.run)
    assert next(iter(last)) == placed.row.metric
    assert last["loss"] < 0.9 * first["loss"]


def test_compare_and_report_follow_its_metric(placed: Placed, tmp_path: Path) -> None:
    short = ("--set", "federation.rounds=2", "--set", "training.steps=1", "--runs", tmp_path)
    bound = "at most 1000" if placed.row.metric == "perplexity" else "50.0 %"
    target = ("--target", "1000" if placed.row.metric == "perplexity" else "0.5")
    done = cli_call("compare", placed.config, "--methods", "lora,fedara", *short, *target)
    assert done.code == 0, done
    assert f"{bound} (as asked)" in done.out
    summary = next(tmp_path.rglob("summary.csv")).read_text().splitlines()
    assert placed.row.metric in summary[0].split(",")
    assert len(summary) == 3


def test_sweep_scores_on_validation(placed: Placed, tmp_path: Path) -> None:
    short = ("--set", "federation.rounds=1", "--set", "training.steps=1", "--runs", tmp_path)
    done = cli_call("sweep", placed.config, "training.lr=0.01,0.02", *short)
    assert done.code == 0, done


def test_a_run_that_was_stopped_resumes_to_the_same_bits(placed: Placed, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at_three(progress: Any) -> None:
        if progress.round == 3:
            raise Stop

    with pytest.raises(Stop):
        start(placed.federation(), tmp_path / "run", on_progress=stop_at_three)
    resume(tmp_path / "run")
    assert placed.scores(tmp_path / "run") == placed.scores(placed.run)


def test_predict_prints_an_answer_to_every_text(placed: Placed) -> None:
    context = () if placed.row.context is None else ("--context", placed.row.context)
    done = cli_call("predict", placed.run, *placed.row.texts, *context)
    assert done.code == 0, done
    assert placed.row.answer in done.out.splitlines()[0]
    assert len(done.out.splitlines()) > len(placed.row.texts)


@pytest.mark.parametrize("merge_it", [False, True])
def test_what_is_exported_says_what_we_say(placed: Placed, tmp_path: Path, merge_it: bool) -> None:
    """In transformers, and in peft on a base model that knows nothing of us."""
    trained = open_run(placed.run)
    trained.export(tmp_path / "exported", merge=merge_it)
    auto: Any = getattr(transformers, placed.row.auto_class)
    if merge_it:
        model = auto.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    else:
        labels = trained.loaded.form.labels
        known = {"num_labels": len(labels)} if labels else {}
        base = auto.from_pretrained(
            placed.tree["model"]["name"], attn_implementation="eager", **known
        )
        peft: Any = PeftModel
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
            model = peft.from_pretrained(base, tmp_path / "exported")
    ours = _outputs(trained, placed, trained.loaded.model, mount=True)
    theirs = _outputs(trained, placed, model.eval(), mount=False)
    for one, other in zip(ours, theirs, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-5)


def _outputs(trained: Trained, placed: Placed, model: Any, *, mount: bool) -> list[Any]:
    """Return what ``model`` predicts for the texts of the task."""
    rows = trained.task.unanswered(placed.row.texts, placed.row.context)
    examples = trained.task.encode(rows)
    if not mount:
        return predictions(model, trained.task, examples, trained.hardware)
    with trained.mounted():
        return predictions(model, trained.task, examples, trained.hardware)


def test_python_trains_it(placed: Placed, tmp_path: Path) -> None:
    settings = merge(placed.tree, {"federation": {"rounds": 1}})
    trained = train(settings, tmp_path / "run")
    answers: Any = trained.predict(list(placed.row.texts), placed.row.context)
    assert [placed.row.answer in answer._fields for answer in answers] == [True] * len(answers)
    assert json.loads((tmp_path / "run" / "labels.json").read_text()) == list(trained.task.labels)
