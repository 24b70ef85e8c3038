"""The Python API: a dozen lines from data to a trained adapter, and the parts that the commands are made of."""

import subprocess
import sys
from pathlib import Path

import pytest

import fedpeft
from fedpeft import api
from fedpeft.errors import BadInput
from fedpeft.experiment import run as runs
from fedpeft.experiment.build import build
from fedpeft.experiment.recorder import Progress
from fedpeft.experiment.trained import open_run

from .builders import LABELS, Ground, assert_same

EXAMPLE = """\
from fedpeft import api

trained = api.train({
    "model": {"name": MODEL, "max_length": 16},
    "machine": {"precision": "fp32"},
    "data": {"source": "files", "train": DATA, "text": "text", "label": "label"},
    "partition": {"clients": 5},
    "federation": {"rounds": 8, "clients_per_round": 3},
    "training": {"steps": 4, "lr": 0.02},
    "method": {"name": "slora", "rank": 4},
}, RUN)
print(trained.predict(["fish0 word1", "trees1 word2"]))
trained.export(ADAPTER)
"""


def test_a_dozen_lines_lead_from_data_to_a_trained_adapter(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 12
    given = {"MODEL": str(ground.model), "DATA": str(ground.data), "RUN": str(tmp_path / "run")}
    exec(EXAMPLE, {**given, "ADAPTER": str(tmp_path / "adapter")})
    said = capsys.readouterr().out
    assert "Label(label='fish', " in said
    assert "Label(label='trees', " in said
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_parts_of_the_api_fit_together(ground: Ground, runs_folder: Path) -> None:
    config = ground.chosen({"federation": {"rounds": 3}, "evaluation": {"every": 2}})
    seen: list[Progress] = []
    state = runs.start(build(config), runs_folder, on_progress=seen.append)
    assert [progress.round for progress in seen] == [0, 1, 2, 3]
    assert [progress.score is None for progress in seen] == [True, True, False, False]
    assert [progress.bytes for progress in seen] == sorted(progress.bytes for progress in seen)
    opened = open_run(runs_folder)
    assert_same(opened.state, state)
    assert opened.config == config
    assert opened.task.labels == LABELS


def test_the_same_settings_give_the_same_bits(ground: Ground, tmp_path: Path) -> None:
    tree = {**ground.tree(), "federation": {"rounds": 2, "clients_per_round": 2}}
    assert_same(api.train(tree, tmp_path / "one").state, api.train(tree, tmp_path / "two").state)


def test_another_seed_gives_other_bits(ground: Ground, tmp_path: Path) -> None:
    tree = {**ground.tree(), "federation": {"rounds": 1, "clients_per_round": 2}}
    one, two = (
        api.train(tree, tmp_path / "one").state,
        api.train({**tree, "seed": 1}, tmp_path / "two").state,
    )
    assert all(bool((tensor != two.shared[name]).any()) for name, tensor in one.shared.items())


def test_training_refuses_a_folder_that_exists(ground: Ground, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists"):
        api.train(ground.tree(), tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "statement",
    ["import fedpeft", "import fedpeft; dir(fedpeft)", "import fedpeft.cli"],
)
def test_what_help_needs_is_imported_without_torch_or_transformers(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(*{{'torch', 'transformers'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


def test_the_names_of_the_api_can_be_had_from_the_package() -> None:
    assert fedpeft.__all__ == api.__all__
    for name in fedpeft.__all__:
        assert name in dir(fedpeft)
        assert getattr(fedpeft, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        _ = fedpeft.tarin


@pytest.fixture
def runs_folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def test_predict_takes_any_number_of_texts_but_no_lone_string(
    ground: Ground, runs_folder: Path
) -> None:
    short = {"federation": {"rounds": 1, "clients_per_round": 2}, "training": {"steps": 1}}
    trained = api.train({**ground.tree(), **short}, runs_folder)
    texts = [f"fish{number % 2} word{number % 50}" for number in range(150)]
    one_by_one = [label for text in texts[:70] for label, _ in trained.predict([text])]
    assert [label for label, _ in trained.predict(texts)][:70] == one_by_one
    assert trained.predict([]) == []
    with pytest.raises(TypeError, match="a list of texts"):
        trained.predict("fish0")
