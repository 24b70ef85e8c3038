"""Laws of sets that the package ``datasets`` loads: their rows are those of files, and what is wrong is told in a line."""

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, DatasetDict, Features, Sequence, Value

from fedpeft.data import Columns, Dataset, HubChoice, Rows, from_hub
from fedpeft.errors import BadInput
from fedpeft.experiment.config import from_tree
from fedpeft.experiment.config import read as read_toml
from fedpeft.experiment.reading import read_data
from fedpeft.tasks import TASKS

NAMES = ["neg", "pos"]
TEXTS = Columns(TASKS["classification"].schema, {"text": "x", "label": "y", "key": "who"})
FEATURES = Features(
    {
        "other": Value("int64"),
        "x": Value("string"),
        "y": ClassLabel(names=NAMES),
        "who": Value("int64"),
    }
)


def table(numbers: list[int]) -> Any:
    size = range(len(numbers))
    columns = {
        "other": list(size),
        "x": [f"text {number}" for number in size],
        "y": numbers,
        "who": [number % 2 for number in size],
    }
    return datasets.Dataset.from_dict(columns, FEATURES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two splits, once as ``save_to_disk`` writes it and once as files of Parquet."""
    folder = tmp_path_factory.mktemp("hub")
    both = DatasetDict({"train": table([0, 1] * 10), "test": table([1, 0, 1])})
    both.save_to_disk(folder / "saved")
    (folder / "files").mkdir()
    for split in both:
        both[split].to_parquet(folder / "files" / f"{split}-00000-of-00001.parquet")
    table([0, 1] * 10).save_to_disk(folder / "alone")
    return folder


def load(name: Path | str, test: str | None = "test", **changes: Any) -> Dataset:
    choice = HubChoice(str(name), None, "train", None, test)
    return from_hub(
        HubChoice(**{**choice.__dict__, **changes}), columns=TEXTS, validation_fraction=0.5
    )


@pytest.mark.parametrize("form", ["saved", "files"])
def test_numbers_of_classes_become_names(form: str, folder: Path) -> None:
    dataset = load(folder / form)
    assert dataset.test == Rows.of_texts(
        ("text 0", "text 1", "text 2"), ("pos", "neg", "pos"), ("0", "1", "0")
    )
    assert len(dataset.train) == len(dataset.validation) == 10
    assert dataset.labels == ("neg", "pos")
    assert dataset.name == f"{folder.name}/{form}"


def test_a_split_alone_is_train(folder: Path) -> None:
    dataset = load(folder / "alone", test=None)
    rows = len(dataset.train) + len(dataset.validation) + len(dataset.test)
    assert rows == 20


def test_lists_of_classes_become_tags(tmp_path: Path) -> None:
    tags = ["O", "B-PER", "I-PER"]
    features = Features(
        {"tokens": Sequence(Value("string")), "ner": Sequence(ClassLabel(names=tags))}
    )
    rows = {"tokens": [["Ada", "Lovelace", "left"], ["no"]], "ner": [[1, 2, 0], [0]]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    columns = Columns(TASKS["tagging"].schema, {"words": "tokens", "tags": "ner"})
    choice = HubChoice(str(tmp_path / "saved"), None, "train", "train", "train")
    assert from_hub(choice, columns=columns).train.columns == {
        "words": (("Ada", "Lovelace", "left"), ("no",)),
        "tags": (("B-PER", "I-PER", "O"), ("O",)),
    }


def test_the_configuration_names_set_splits_and_columns(folder: Path) -> None:
    """A folder's path starts at the folder of the configuration; other names stay as they are."""
    path = folder / "config.toml"
    path.write_text(
        '[data]\nsource = "hub"\nname = "saved"\ntest_split = "test"\nvalidation_split = "test"\n'
        'text = "x"\nlabel = "y"\nlabels = ["pos", "neg"]\n'
    )
    config = from_tree(read_toml(path))
    dataset = read_data(config)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (20, 3, 3)
    assert TASKS["classification"].names(dataset) == ("pos", "neg")
    assert from_tree({"data": {"source": "hub", "name": "a/b"}}).data.name == "a/b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": "trian"},
            "data.train_split = 'trian': {name} has 'train', 'test'; did you mean 'train'?",
        ),
        ({"test": "dev"}, "data.test_split = 'dev': {name} has 'train', 'test'"),
        ({"validation": "tes"}, "data.validation_split = 'tes': "),
    ],
)
def test_a_split_that_is_not_there_names_those_that_are(
    changes: dict[str, str], message: str, folder: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        load(folder / "saved", **changes)
    assert message.replace("{name}", str(folder / "saved")) in str(caught.value)


def test_a_column_that_is_not_there_names_the_nearest(folder: Path) -> None:
    columns = Columns(TEXTS.schema, {"text": "xx", "label": "y"})
    choice = HubChoice(str(folder / "saved"), None, "train", None, "test")
    with pytest.raises(BadInput) as caught:
        from_hub(choice, columns=columns)
    assert str(caught.value) == (
        f"data.text = \"xx\": {folder / 'saved'}, train: record 1 has no column 'xx'; "
        "its columns are 'other', 'x', 'y', 'who'; did you mean 'x'?"
    )


def test_a_row_without_a_class_is_refused(tmp_path: Path) -> None:
    table([0, -1]).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput, match=r"saved, train: record 2: the label in column 'y' must be"):
        load(tmp_path / "saved", test=None)


def test_without_a_network_the_remedy_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nobody/nothing", str(tmp_path / "empty"), "nothing"):
        with pytest.raises(BadInput) as caught:
            load(name)
        said = str(caught.value)
        assert said.startswith(f"data.name = {name!r}: cannot be loaded: ")
        assert said.endswith("name these in data.train with data.source = 'files'")
        assert "\n" not in said


def test_a_configuration_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"data\.config = 'large': cannot be loaded: .*large"):
        load(folder / "files", config="large")


def test_without_the_package_it_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        BadInput, match=r"needs datasets; get it with: pip install 'fedpeft\[data\]'"
    ):
        load("a/b")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"source": "hub"}, "data.name is missing: with data.source = 'hub', name the set"),
        (
            {"source": "hub", "name": "a", "train": "b"},
            "not used by data.source = 'hub'; did you mean 'files'",
        ),
        ({"source": "hub", "name": "a", "test": "b"}, "data.test"),
        ({"source": "files", "train": "b", "name": "a"}, "data.name = 'a' is not used by"),
        (
            {"name": "a"},
            "data.name = 'a' is not used by data.source = 'pydocs'; did you mean 'hub'?",
        ),
        ({"test_split": "test"}, "data.test_split = 'test' is not used"),
        ({"labels": ["a", "b"]}, "data.labels is not used by data.source = 'pydocs'"),
        ({"source": "files", "train": "b", "labels": []}, "data.labels = []: name all labels"),
        ({"source": "hup", "name": "a"}, "data.source = 'hup'"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        from_tree({"data": section})
    assert message in str(caught.value)
