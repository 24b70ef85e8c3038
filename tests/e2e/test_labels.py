"""A list of labels goes through the whole product: outputs, files of a run, agreement, resume, prediction."""

import json
from pathlib import Path

from fedpeft.experiment.build import build
from fedpeft.experiment.run import resume, start
from fedpeft.experiment.trained import open_run

from .builders import LABELS, Ground

LISTED = ["winds", "snow", "trees", "fish", "birds"]
"""Those of the data in another order, and one that they lack."""


def test_a_list_of_labels_orders_the_outputs_of_a_run(ground: Ground, tmp_path: Path) -> None:
    short = {"federation": {"rounds": 2}, "training": {"steps": 1}}
    listed = build(ground.chosen({"data": {"labels": LISTED}}, short))
    plain = build(ground.chosen(short))
    assert list(listed.task.labels) == LISTED
    assert list(plain.task.labels) == sorted(LABELS)
    assert listed.worker.config != plain.worker.config

    run = tmp_path / "run"
    start(listed, run)
    assert json.loads((run / "labels.json").read_text()) == LISTED
    resume(run)
    trained = open_run(run)
    assert list(trained.task.labels) == LISTED
    assert trained.predict(["birds0 birds1 birds0"])[0].label in LISTED  # type: ignore[attr-defined]
