"""Files that do not work (data, partitions, configurations, models) are refused in one line, before anything is written."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .builders import Ground, cli_call, examples, refused, to_toml, write_llama


def test_bitfit_needs_biases(ground: Ground, runs: Path, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama")
    options = ("--set", f"model.name={model}", "--set", "method.name=bitfit")
    refused(
        cli_call("run", ground.config, "--runs", runs, *options),
        "method.name = 'bitfit'",
        "no biases",
        "'lora'",
    )
    assert not runs.exists()


def test_a_folder_without_a_model_is_named(ground: Ground, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(
        cli_call("run", ground.config, "--runs", runs, "--set", f"model.name={tmp_path / 'empty'}"),
        "model.name",
        "empty",
    )
    assert not runs.exists()


def test_damaged_weights_are_named(ground: Ground, runs: Path, tmp_path: Path) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(ground.model, model)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    refused(
        cli_call("run", ground.config, "--runs", runs, "--set", f"model.name={model}"),
        "model.name",
        str(model),
    )
    assert not runs.exists()


def test_a_model_without_its_tokenizer_is_named(ground: Ground, runs: Path, tmp_path: Path) -> None:
    model = tmp_path / "silent"
    shutil.copytree(ground.model, model)
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(
        cli_call("run", ground.config, "--runs", runs, "--set", f"model.name={model}"),
        "model.name",
        str(model),
    )
    assert not runs.exists()


def test_texts_longer_than_the_tokenizer_allows_are_refused(
    ground: Ground, runs: Path, tmp_path: Path
) -> None:
    """RoBERTa counts its positions from 2: of 34 positions, 32 take tokens, and only its tokenizer says so."""
    model = tmp_path / "modest"
    shutil.copytree(ground.model, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 20}))
    options = ("--set", f"model.name={model}", "--set", "model.max_length=21")
    refused(
        cli_call("run", ground.config, "--runs", runs, *options),
        "model.max_length = 21",
        "20 tokens",
    )
    assert not runs.exists()


def _rows(number: int, line: str) -> bytes:
    """Return the data file with ``line`` at line ``number``, counted from 1."""
    lines = [json.dumps(row) for row in examples()]
    lines[number - 1] = line
    return "\n".join(lines).encode() + b"\n"


@dataclass(frozen=True)
class Broken:
    """A data file that must be refused, and what the refusal must say beside its name."""

    name: str
    content: Callable[[], bytes]
    says: tuple[str, ...]


FILES = {
    "bad JSON line": Broken(
        "x.jsonl", lambda: _rows(7, '{"text": "a", "label": '), ("x.jsonl:7", "not JSON")
    ),
    "line that is no object": Broken(
        "x.jsonl", lambda: _rows(3, "[1, 2]"), ("x.jsonl:3", "JSON object")
    ),
    "missing column": Broken(
        "x.jsonl",
        lambda: _rows(5, '{"text": "a", "lable": "fish"}'),
        ("x.jsonl:5", "'label'", "'lable'"),
    ),
    "label that is empty": Broken(
        "x.jsonl", lambda: _rows(5, '{"text": "a", "label": ""}'), ("x.jsonl:5", "empty")
    ),
    "no rows": Broken("x.jsonl", lambda: b"\n\n", ("x.jsonl", "no rows")),
    "unknown ending": Broken("x.xlsx", lambda: b"", ("x.xlsx", ".csv")),
    "damaged gzip": Broken(
        "x.jsonl.gz", lambda: gzip.compress(_rows(1, "{}"))[:100], ("x.jsonl.gz",)
    ),
    "not UTF-8": Broken("x.csv", lambda: b"text,label\nna\xefve,fish\n", ("x.csv:2", "UTF-8")),
    "ragged CSV": Broken("x.csv", lambda: b"text,label\na,fish\nb,c,d\n", ("x.csv:3", "3 fields")),
    "CSV without the column": Broken(
        "x.csv", lambda: b"text,lable\na,fish\n", ("x.csv:2", "'label'", "'lable'")
    ),
    "other delimiter": Broken(
        "x.csv",
        lambda: b"text;label\na;fish\n",
        ("x.csv:1", 'set data.delimiter = ";"'),
    ),
    "no header": Broken(
        "x.csv",
        lambda: b"one,fish\ntwo,fish\nthree,birds\n",
        ("x.csv:1", "not a header", "text,label"),
    ),
    "other shape of JSON": Broken(
        "x.json",
        lambda: b'{"text": {"0": "a"}, "label": {"0": "b"}}',
        ("x.json:1", "read are: an object a line"),
    ),
    "label that is no number": Broken(
        "x.csv", lambda: b"text,label\na,1.0\nb,0.0\nc,nan\n", ("x.csv:4", "'nan'", "whole numbers")
    ),
    "one label only": Broken(
        "x.csv", lambda: b"text,label\n" + 9 * b"a,fish\n", ("x.csv", "'fish'", "two or more")
    ),
}


@pytest.mark.parametrize("broken", FILES.values(), ids=FILES)
def test_a_data_file_that_does_not_work_is_refused_with_its_line(
    ground: Ground, runs: Path, tmp_path: Path, broken: Broken
) -> None:
    (tmp_path / broken.name).write_bytes(broken.content())
    options = ("--set", f"data.train={tmp_path / broken.name}")
    refused(cli_call("run", ground.config, "--runs", runs, *options), *broken.says)
    assert not runs.exists()


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_label_that_train_lacks_is_refused_with_its_line(
    ground: Ground, runs: Path, tmp_path: Path, split: str
) -> None:
    (tmp_path / "other.jsonl").write_bytes(_rows(9, '{"text": "a", "label": "fishes"}'))
    outcome = cli_call(
        "run", ground.config, "--runs", runs, "--set", f"data.{split}={tmp_path / 'other.jsonl'}"
    )
    refused(outcome, "other.jsonl:9", "'fishes'", "did you mean 'fish'")
    assert not runs.exists()


PARTITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty client": ('{"anna": [0, 1], "ben": []}', ("'ben'", "at least one row")),
    "row held twice": ('{"anna": [0, 1], "ben": [1]}', ("row 1", "'anna'", "'ben'")),
    "row that is not there": ('{"anna": [0, 9999]}', ("9999", "0 to 199")),
    "client named twice": ('{"anna": [0], "anna": [1]}', ("'anna'", "twice")),
    "no clients": ("{}", ("JSON object",)),
    "not JSON": ("{", ("not JSON",)),
}


@pytest.mark.parametrize(("content", "says"), PARTITIONS.values(), ids=PARTITIONS)
def test_a_partition_that_does_not_work_is_refused(
    ground: Ground, runs: Path, tmp_path: Path, content: str, says: tuple[str, ...]
) -> None:
    (tmp_path / "who.json").write_text(content)
    options = ("--set", "partition.kind=file", "--set", f"partition.file={tmp_path / 'who.json'}")
    refused(cli_call("run", ground.config, "--runs", runs, *options), "who.json", *says)
    assert not runs.exists()


def test_a_users_partition_has_no_test_rows_to_score_clients_on(
    ground: Ground, runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "who.json").write_text(json.dumps({"anna": [*range(50)], "ben": [*range(50, 100)]}))
    options = (
        *("--set", "partition.kind=file", "--set", f"partition.file={tmp_path / 'who.json'}"),
        *("--set", "evaluation.per_client=true"),
    )
    refused(cli_call("run", ground.config, "--runs", runs, *options), "evaluation.per_client")
    assert not runs.exists()


FIELDS = {
    "data.delimiter=ab": ("data.delimiter = 'ab'", "one character"),
    "data.train=~nobody-of-that-name/x.csv": ("~nobody-of-that-name", "no home folder"),
    "data.train=nothing/*.jsonl": ("nothing/*.jsonl", "no file matches this pattern"),
    "data.test=.": ("is a folder", "/*"),
}


@pytest.mark.parametrize(("option", "says"), FIELDS.items())
def test_a_field_that_names_no_file_is_refused(
    ground: Ground,
    runs: Path,
    option: str,
    says: tuple[str, ...],
) -> None:
    refused(cli_call("run", ground.config, "--runs", runs, "--set", option), *says)
    assert not runs.exists()


def test_a_configuration_that_is_not_there_is_refused_with_the_nearest(
    ground: Ground, runs: Path
) -> None:
    outcome = cli_call("run", ground.folder / "confg.toml", "--runs", runs)
    refused(
        outcome,
        str(ground.folder / "confg.toml"),
        "no such file",
        f"did you mean {str(ground.config)!r}",
    )
    assert not runs.exists()


CONFIGURATIONS = {
    "bad TOML": b"name = \n",
    "key twice": b"[training]\nlr = 1\nlr = 2\n",
    "not UTF-8": b'name = "\xff"\n',
}


@pytest.mark.parametrize("content", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_that_is_no_toml_is_refused(
    runs: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    refused(cli_call("run", tmp_path / "bad.toml", "--runs", runs), "bad.toml", "not a TOML file")
    assert not runs.exists()


def test_a_folder_is_no_configuration(ground: Ground, runs: Path) -> None:
    refused(cli_call("run", ground.folder, "--runs", runs), str(ground.folder))
    assert not runs.exists()


def test_files_as_source_need_a_file(ground: Ground, runs: Path, tmp_path: Path) -> None:
    tree: dict[str, Any] = {**ground.tree(), "data": {"source": "files"}}
    (tmp_path / "no-train.toml").write_text(to_toml(tree))
    refused(cli_call("run", tmp_path / "no-train.toml", "--runs", runs), "data.train is missing")
    assert not runs.exists()


def test_a_picture_that_cannot_be_written_is_named(ground: Ground, tmp_path: Path) -> None:
    for png in (tmp_path / "nowhere" / "who.png", tmp_path / "who.xyz"):
        refused(cli_call("partition", ground.config, "--png", png), str(png))
