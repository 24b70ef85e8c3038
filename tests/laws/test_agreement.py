"""Server and client agree on what changes a client's work, wherever they keep their files."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpeft.experiment.agreement import agreement
from fedpeft.experiment.build import Federation, build
from tests.e2e.builders import Ground, write_ground


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """A tiny model, data and configuration."""
    return write_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def here(ground: Ground) -> Federation:
    """The federation as one machine builds it."""
    return build(ground.chosen())


def digest(here: Federation, *trees: Mapping[str, Any], ground: Ground) -> bytes:
    """Return what a machine with other settings agrees to, on the same texts and weights."""
    config = ground.chosen(*trees)
    return agreement(config, config.build_method(), here.dataset.labels, here.loaded.digest)


def test_the_same_model_in_another_folder_agrees_and_other_weights_do_not(
    ground: Ground, here: Federation, tmp_path: Path
) -> None:
    copy = shutil.copytree(ground.model, tmp_path / "copy")
    elsewhere = {"model": {"name": str(copy)}}
    assert build(ground.chosen(elsewhere)).worker.config == here.worker.config
    weights = load_file(copy / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] + torch.full_like(weights[name], 1e-3)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert build(ground.chosen(elsewhere)).worker.config != here.worker.config


def test_what_changes_no_work_of_a_client_is_not_agreed_on(
    ground: Ground, here: Federation
) -> None:
    """LoRA knows no rounds; a default is the same written or not."""
    same: list[dict[str, Any]] = [
        {"name": "another"},
        {"federation": {"clients_per_round": 1, "rounds": 60}},
        {"evaluation": {"every": 1}},
        {"engine": {"stack": 1}},
        {"machine": {"cache": 0}},
        {"method": {"scale": 1.0}},
    ]
    for tree in same:
        assert digest(here, tree, ground=ground) == here.worker.config, tree


def test_what_changes_the_work_of_a_client_is_agreed_on(ground: Ground, here: Federation) -> None:
    others: list[dict[str, Any]] = [
        {"method": {"rank": 5}},
        {"method": {"name": "ffa_lora", "rank": 4}},
        {"method": {"name": "fedara", "rank": 4}, "federation": {"rounds": 6}},
        {"method": {"name": "fedara", "rank": 4}, "federation": {"rounds": 7}},
        {"training": {"lr": 0.02}},
        {"training": {"steps": 3}},
        {"model": {"max_length": 15}},
        {"model": {"dropout": 0.1}},
        {"seed": 1},
    ]
    found = [digest(here, tree, ground=ground) for tree in others]
    assert len({here.worker.config, *found}) == len(others) + 1
    labels = here.dataset.labels
    config, method, weights = here.config, here.method, here.loaded.digest
    for other in (labels[::-1], (*labels, "snow"), labels[1:]):
        assert agreement(config, method, other, weights) != here.worker.config
