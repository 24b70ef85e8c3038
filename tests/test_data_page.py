"""What docs/data.md shows is read as it says, and the configurations in experiments/data are sound."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedpeft.data import Dataset
from fedpeft.experiment.config import beside, from_tree
from fedpeft.experiment.reading import read_data
from fedpeft.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXPERIMENTS = sorted((ROOT / "experiments" / "data").glob("*.toml"))

REVIEWS = ("a delight", "a bore", "see it twice")
STARS = ("good", "bad", "good")
CRITICS = ("ann", "bob", "bob")


def chapters() -> dict[str, str]:
    """Return heading -> what stands below it."""
    _, *parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def shown(chapter: str, folder: Path) -> list[Dataset]:
    """Make the files that a chapter shows, run its Python, and read what its settings name."""
    read: list[Dataset] = []
    for language, info, content in BLOCK.findall(chapter):
        if info.startswith("file="):
            path = folder / info.removeprefix("file=")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        elif language == "python":
            exec(content, {})
        elif language == "toml" and info != "skip":
            tree: dict[str, Any] = tomllib.loads(content)
            # Few rows: all splits are those of train.
            if tree["data"]["source"] == "hub":
                tree["data"] |= {"validation_split": "train", "test_split": "train"}
            else:
                tree["data"] |= dict.fromkeys(("validation", "test"), tree["data"]["train"])
            read.append(read_data(from_tree(beside(tree, folder))))
        else:
            assert info == "skip", f"{language} {info}"
            from_tree(tomllib.loads(content))
    return read


@pytest.mark.parametrize("heading", chapters())
def test_the_examples_are_true(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if heading == "Labels":  # goes on with the first file
        shown(chapters()["JSON"], tmp_path)
    for dataset in shown(chapters()[heading], tmp_path):
        rows = dataset.train
        if heading == "CoNLL's columns":
            assert rows.columns["words"] == (
                ("Ada", "lives", "in", "London"),
                ("Good", "morning"),
                ("Bob", "left"),
            )
            assert TASKS["tagging"].names(dataset)[1:] == ("B-LOC", "I-LOC", "B-PER", "I-PER")
        elif heading == "A folder of texts":
            assert [text.rstrip("\n") for text in rows.texts] == sorted(REVIEWS)
            assert rows.labels == ("bad", "good", "good")
        else:
            assert (rows.texts, rows.labels, rows.keys) == (REVIEWS, STARS, CRITICS)
        if heading == "Labels":
            assert TASKS["classification"].names(dataset) == ("good", "fair", "bad")


def test_every_way_has_an_example() -> None:
    examples = [heading for heading, chapter in chapters().items() if "```toml" in chapter]
    assert examples == [
        "JSON",
        "CSV and TSV",
        "Parquet",
        "A folder of texts",
        "CoNLL's columns",
        "The hub",
        "Labels",
    ]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_sound(path: Path) -> None:
    """Its data need not be there: every field is checked, and where the data belong."""
    tree = tomllib.loads(path.read_text(encoding="utf-8"))
    if tree.get("task", {}).get("kind", "classification") not in TASKS:
        pytest.skip("a task that this version lacks")
    config = from_tree(beside(tree, path.parent))
    assert config.name == path.stem
    for file in (config.data.train, config.data.validation, config.data.test):
        assert file is None or file.resolve().parent == ROOT / "data" / path.stem
