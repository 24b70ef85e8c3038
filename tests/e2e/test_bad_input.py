"""Bad input: one line on stderr that names field or file and the nearest valid choice, exit code 2, nothing half-written."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .builders import Ground, cli_call, examples, refused, to_toml, write_llama


@dataclass(frozen=True)
class Wrong:
    """Settings that must be refused, and what the refusal must say."""

    sets: tuple[str, ...]
    says: tuple[str, ...]

    def options(self) -> tuple[str, ...]:
        return tuple(part for one in self.sets for part in ("--set", one))


SETTINGS: dict[str, Wrong] = {
    "unknown section": Wrong(("trainning.lr=0.1",), ("'trainning'", "did you mean 'training'")),
    "unknown key": Wrong(("training.lrr=0.1",), ("'training.lrr'", "did you mean 'lr'")),
    "unknown key, none near": Wrong(("federation.xyzzy=1",), ("'federation.xyzzy'", "rounds, clients_per_round")),
    "section without keys": Wrong(("training=5",), ("training = 5",)),
    "unknown method": Wrong(("method.name=slorra",), ("method.name = 'slorra'", "did you mean 'slora'")),
    "unknown method, none near": Wrong(("method.name=zzzz",), ("method.name = 'zzzz'", "lora", "fedara", "bitfit")),
    "method without its section": Wrong(("method=lora",), ("method = 'lora'",)),
    "method of a wrong type": Wrong(("method.name=[1]",), ("method.name = [1]",)),
    "unknown field of a method": Wrong(("method.rnk=4",), ("'method.rnk'", "did you mean 'rank'")),
    "field of another method": Wrong(("method.name=lora", "method.density=0.1"), ("'method.density'", "rank")),
    "assignment without value": Wrong(("training.lr",), ("--set training.lr", "section.field=value")),
    "number as a word": Wrong(("training.lr=fast",), ("training.lr = 'fast'", "number")),
    "number too small": Wrong(("federation.rounds=0",), ("federation.rounds = 0", "1")),
    "fraction of a round": Wrong(("federation.rounds=1.5",), ("federation.rounds = 1.5", "integer")),
    "negative rate": Wrong(("training.lr=-0.1",), ("training.lr = -0.1", "greater than 0")),
    "no number": Wrong(("training.lr=nan",), ("training.lr = nan",)),
    "no finite number": Wrong(("training.clip=inf",), ("training.clip = inf",)),
    "no finite number in a method": Wrong(("method.scale=inf",), ("method.scale = inf",)),
    "negative seed": Wrong(("seed=-1",), ("seed = -1", "0")),
    "unknown word": Wrong(("partition.kind=dirichlett",), ("partition.kind = 'dirichlett'", "'dirichlet'")),
    "unknown split": Wrong(("evaluation.split=train",), ("evaluation.split = 'train'", "'validation' or 'test'")),
    "unknown engine": Wrong(("engine.kind=flwr",), ("engine.kind = 'flwr'", "'local' or 'flower'")),
    "wrong type in a method": Wrong(("method.rank=four",), ("method.rank = 'four'", "integer")),
    "rank above a layer's size": Wrong(
        ("method.rank=33",), ("method.rank = 33", "'bert.encoder.layer.0.attention.self.query' is 32 x 32", "from 1 to 32")
    ),
    "rank above a layer's size, fedara": Wrong(("method.name=fedara", "method.rank=33"), ("method.rank = 33", "from 1 to 32")),
    "rank above a layer's size, federa": Wrong(("method.name=federa", "method.rank=33"), ("method.rank = 33", "from 1 to 32")),
    "rank above a layer's size, ffa_lora": Wrong(
        ("method.name=ffa_lora", "method.rank=33"), ("method.rank = 33", "from 1 to 32")
    ),
    "rank above a layer's size, slora": Wrong(("method.name=slora", "method.rank=33"), ("method.rank = 33", "from 1 to 32")),
    "rank above the pre-classifier's size": Wrong(
        ("method.name=slora", "method.pre_classifier_rank=33"),
        ("method.pre_classifier_rank = 33", "'bert.pooler.dense' is 32 x 32", "from 1 to 32"),
    ),
    "targets that match nothing": Wrong(("method.targets=qury",), ("method.targets = 'qury'", "did you mean 'query'")),
    "targets that match the head only": Wrong(("method.targets=classifier",), ("method.targets = 'classifier'", "query")),
    "targets that are no pattern": Wrong(("method.targets=(query",), ("method.targets = '(query'", "regular expression")),
    "more clients than examples": Wrong(
        ("partition.clients=500",), ("partition.clients = 500", "144 examples", "at most 144 clients")
    ),
    "more clients than examples, iid": Wrong(
        ("partition.kind=iid", "partition.clients=500"), ("partition.clients = 500", "at most 144 clients")
    ),
    "more examples a client than there are": Wrong(
        ("partition.min_examples=100",), ("partition.min_examples = 100", "at most 28 each")
    ),
    "more clients a round than clients": Wrong(
        ("federation.clients_per_round=6",), ("federation.clients_per_round = 6", "at most 5")
    ),
    "natural clients without a key": Wrong(("partition.kind=by_key",), ("partition.kind = 'by_key'", "data.key")),
    "key that no column has": Wrong(("partition.kind=by_key", "data.key=sites"), ('data.key = "sites"', "'site'")),
    "partition without its file": Wrong(("partition.kind=file",), ("partition.file is missing",)),
    "unknown device": Wrong(("machine.device=cud",), ("machine.device = 'cud'", "'cpu'")),
    "device that is not there": Wrong(("machine.device=cuda:99",), ("machine.device = 'cuda:99'", "'cpu'")),
    "device that holds nothing": Wrong(("machine.device=meta",), ("machine.device = 'meta'", "'cpu'")),
    "no such model folder": Wrong(("model.name=./nowhere",), ("model.name = './nowhere'", "minilm")),
    "texts longer than the model's positions": Wrong(("model.max_length=33",), ("model.max_length = 33", "32 tokens")),
    "missing text column": Wrong(("data.text=txt",), ('data.text = "txt"', "examples.jsonl:1", "did you mean 'text'")),
    "missing label column": Wrong(("data.label=class",), ('data.label = "class"', "examples.jsonl:1", "'label'")),
    "no such data file": Wrong(("data.train=examples.jsn",), ("examples.jsn", "no such file")),
    "data files that are not used": Wrong(("data.source=pydocs",), ("data.train", "'files'")),
    "name that is no folder's": Wrong(("name=",), ("name = ''",)),
    "name of the folder above": Wrong(("name=..",), ("name = '..'",)),
    "name of a folder elsewhere": Wrong(("name=../elsewhere",), ("name = '../elsewhere'",)),
    "more replies needed than clients asked": Wrong(
        ("federation.min_replies=3",), ("federation.min_replies = 3", "federation.clients_per_round = 2")
    ),
}


@pytest.mark.parametrize("wrong", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_do_not_work_are_refused_before_anything_is_written(ground: Ground, runs: Path, wrong: Wrong) -> None:
    refused(cli_call("run", ground.config, "--runs", runs, *wrong.options()), *wrong.says)
    assert not runs.exists()


def test_overwrite_never_deletes_what_is_no_run(ground: Ground, runs: Path) -> None:
    precious = runs / "thesis" / "chapter1.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    outcome = cli_call("run", ground.config, "--runs", runs, "--overwrite", "--set", "name=thesis")
    assert precious.exists()
    refused(outcome, str(runs / "thesis"))


def test_bitfit_needs_biases(ground: Ground, runs: Path, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama")
    options = ("--set", f"model.name={model}", "--set", "method.name=bitfit")
    refused(cli_call("run", ground.config, "--runs", runs, *options), "method.name = 'bitfit'", "no biases", "'lora'")
    assert not runs.exists()


def test_a_folder_without_a_model_is_named(ground: Ground, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(cli_call("run", ground.config, "--runs", runs, "--set", f"model.name={tmp_path / 'empty'}"), "model.name", "empty")
    assert not runs.exists()


def test_damaged_weights_are_named(ground: Ground, runs: Path, tmp_path: Path) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(ground.model, model)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    refused(cli_call("run", ground.config, "--runs", runs, "--set", f"model.name={model}"), "model.name", str(model))
    assert not runs.exists()


def test_a_model_without_its_tokenizer_is_named(ground: Ground, runs: Path, tmp_path: Path) -> None:
    model = tmp_path / "silent"
    shutil.copytree(ground.model, model)
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(cli_call("run", ground.config, "--runs", runs, "--set", f"model.name={model}"), "model.name", str(model))
    assert not runs.exists()


def test_texts_longer_than_the_tokenizer_allows_are_refused(ground: Ground, runs: Path, tmp_path: Path) -> None:
    """RoBERTa counts its positions from 2: of 34 positions, 32 take tokens, and only its tokenizer says so."""
    model = tmp_path / "modest"
    shutil.copytree(ground.model, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 20}))
    options = ("--set", f"model.name={model}", "--set", "model.max_length=21")
    refused(cli_call("run", ground.config, "--runs", runs, *options), "model.max_length = 21", "20 tokens")
    assert not runs.exists()


def test_an_engine_that_is_not_installed_is_named_with_its_remedy(
    ground: Ground, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fedpeft.engines.flower", raising=False)
    monkeypatch.setitem(sys.modules, "flwr", None)
    for name in [name for name in sys.modules if name.startswith("flwr.")]:
        monkeypatch.setitem(sys.modules, name, None)
    outcome = cli_call("run", ground.config, "--runs", runs, "--set", "engine.kind=flower")
    refused(outcome, "engine.kind = 'flower'", "pip install 'fedpeft[flower]'")
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
    "bad JSON line": Broken("x.jsonl", lambda: _rows(7, '{"text": "a", "label": '), ("x.jsonl:7", "not JSON")),
    "line that is no object": Broken("x.jsonl", lambda: _rows(3, "[1, 2]"), ("x.jsonl:3", "JSON object")),
    "missing column": Broken(
        "x.jsonl", lambda: _rows(5, '{"text": "a", "lable": "fish"}'), ("x.jsonl:5", "'label'", "'lable'")
    ),
    "label that is empty": Broken("x.jsonl", lambda: _rows(5, '{"text": "a", "label": ""}'), ("x.jsonl:5", "empty")),
    "no rows": Broken("x.jsonl", lambda: b"\n\n", ("x.jsonl", "no rows")),
    "unknown ending": Broken("x.parquet", lambda: b"", ("x.parquet", ".csv")),
    "damaged gzip": Broken("x.jsonl.gz", lambda: gzip.compress(_rows(1, "{}"))[:100], ("x.jsonl.gz",)),
    "not UTF-8": Broken("x.csv", lambda: b"text,label\nna\xefve,fish\n", ("x.csv:2", "UTF-8")),
    "ragged CSV": Broken("x.csv", lambda: b"text,label\na,fish\nb,c,d\n", ("x.csv:3", "3 fields")),
    "CSV without the column": Broken("x.csv", lambda: b"text,lable\na,fish\n", ("x.csv:2", "'label'", "'lable'")),
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
def test_a_label_that_train_lacks_is_refused_with_its_line(ground: Ground, runs: Path, tmp_path: Path, split: str) -> None:
    (tmp_path / "other.jsonl").write_bytes(_rows(9, '{"text": "a", "label": "fishes"}'))
    outcome = cli_call("run", ground.config, "--runs", runs, "--set", f"data.{split}={tmp_path / 'other.jsonl'}")
    refused(outcome, "other.jsonl:9", "'fishes'", "did you mean 'fish'")
    assert not runs.exists()


PARTITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty client": ('{"anna": [0, 1], "ben": []}', ("'ben'", "at least one row")),
    "row held twice": ('{"anna": [0, 1], "ben": [1]}', ("row 1", "'anna'", "'ben'")),
    "row that is not there": ('{"anna": [0, 9999]}', ("9999", "0 to 143")),
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


def test_a_users_partition_has_no_test_rows_to_score_clients_on(ground: Ground, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "who.json").write_text(json.dumps({"anna": [*range(50)], "ben": [*range(50, 100)]}))
    options = (
        *("--set", "partition.kind=file", "--set", f"partition.file={tmp_path / 'who.json'}"),
        *("--set", "evaluation.per_client=true"),
    )
    refused(cli_call("run", ground.config, "--runs", runs, *options), "evaluation.per_client")
    assert not runs.exists()


def test_a_configuration_that_is_not_there_is_refused_with_the_nearest(ground: Ground, runs: Path) -> None:
    outcome = cli_call("run", ground.folder / "confg.toml", "--runs", runs)
    refused(outcome, str(ground.folder / "confg.toml"), "no such file", f"did you mean {str(ground.config)!r}")
    assert not runs.exists()


CONFIGURATIONS = {
    "bad TOML": b"name = \n",
    "key twice": b"[training]\nlr = 1\nlr = 2\n",
    "not UTF-8": b'name = "\xff"\n',
}


@pytest.mark.parametrize("content", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_that_is_no_toml_is_refused(runs: Path, tmp_path: Path, content: bytes) -> None:
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


def test_a_run_folder_that_exists_is_refused_and_left_alone(ground: Ground, runs: Path) -> None:
    (runs / "tiny").mkdir(parents=True)
    (runs / "tiny" / "ledger.jsonl").write_text("mine")
    refused(cli_call("run", ground.config, "--runs", runs), str(runs / "tiny"), "exists", "--overwrite")
    assert [path.name for path in (runs / "tiny").iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_a_place_where_no_run_folder_can_be_made_is_named(ground: Ground, tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("mine")
    refused(cli_call("run", ground.config, "--runs", tmp_path / "file", *options), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


COMPARISONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown method": (("--methods", "lora,fedarra"), ("compare.methods", "'fedarra'", "did you mean 'fedara'")),
    "unknown method in the settings": (("--set", "compare.settings.slorra.rank=3"), ("compare.settings.slorra",)),
    "unknown key in the settings": (
        ("--set", "compare.settings.lora.training.lrr=0.1"), ("'training.lrr'", "did you mean 'lr'")
    ),
    "unknown reference": (("--set", 'compare.references=["central"]'), ("compare.references", "'centralised'")),
    "seeds that are none": (("--seeds", "a,b"), ("compare.seeds", "a,b")),
    "rank above a layer's size": (("--methods", "lora", "--set", "compare.rank=33"), ("rank = 33", "from 1 to 32")),
    "targets that match nothing": (
        ("--methods", "lora", "--set", "compare.targets=qury"), ("targets = 'qury'", "did you mean 'query'")
    ),
    "target that is no accuracy": (("--target", "60"), ("target", "60", "0.6")),
    "no bandwidth": (("--bandwidth", "0"), ("bandwidth", "0")),
}  # fmt: skip


@pytest.mark.parametrize(("options", "says"), COMPARISONS.values(), ids=COMPARISONS)
def test_a_comparison_that_does_not_work_is_refused_before_its_first_run(
    ground: Ground, runs: Path, options: tuple[str, ...], says: tuple[str, ...]
) -> None:
    short = ("--set", "federation.rounds=1", "--set", "training.steps=1")
    refused(cli_call("compare", ground.config, "--runs", runs, "--methods", "lora,bitfit", *short, *options), *says)
    assert not runs.exists()


def test_a_method_that_does_not_fit_the_model_is_refused_before_the_others_are_trained(
    ground: Ground, runs: Path, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "llama")
    options = ("--set", f"model.name={model}", "--set", "federation.rounds=1", "--set", "compare.targets=q_proj")
    refused(cli_call("compare", ground.config, "--runs", runs, "--methods", "lora,bitfit", *options), "bitfit", "no biases")
    assert not runs.exists()


def test_a_comparison_refuses_any_folder_that_exists(ground: Ground, runs: Path) -> None:
    (runs / "tiny-compare" / "bitfit-s0").mkdir(parents=True)
    refused(cli_call("compare", ground.config, "--runs", runs, "--methods", "lora,bitfit"), "bitfit-s0", "exists")
    assert [path.name for path in (runs / "tiny-compare").iterdir()] == ["bitfit-s0"]


SWEEPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": ("training.lrr=0.1,0.2", ("'training.lrr'", "did you mean 'lr'")),
    "no values": ("training.lr=", ("training.lr", "training.lr=0.001,0.003")),
    "no key": ("0.001,0.003", ("0.001,0.003", "section.field=value")),
    "wrong value": ("training.lr=0.1,fast", ("training.lr = 'fast'",)),
}


@pytest.mark.parametrize(("values", "says"), SWEEPS.values(), ids=SWEEPS)
def test_a_sweep_that_does_not_work_is_refused_before_its_first_run(
    ground: Ground, runs: Path, values: str, says: tuple[str, ...]
) -> None:
    refused(cli_call("sweep", ground.config, values, "--runs", runs), *says)
    assert not runs.exists()


@pytest.mark.parametrize("command", [("resume",), ("predict", "text"), ("export", "to"), ("report",)], ids=lambda c: str(c[0]))
def test_a_folder_without_a_run_is_named(runs: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *rest = command
    arguments: list[str | Path] = [tmp_path / "made"] if rest == ["to"] else list(rest)
    options: list[str | Path] = ["--to", tmp_path / "made"] if name == "report" else []
    refused(cli_call(name, runs / "none", *arguments, *options), str(runs / "none"))
    assert not (tmp_path / "made").exists()


def test_a_picture_that_cannot_be_written_is_named(ground: Ground, tmp_path: Path) -> None:
    for png in (tmp_path / "nowhere" / "who.png", tmp_path / "who.xyz"):
        refused(cli_call("partition", ground.config, "--png", png), str(png))


def test_commands_that_are_called_wrongly_say_so_without_a_traceback() -> None:
    for arguments in (("run",), ("rum",), ("run", "a.toml", "--sett", "x=1"), ("export", "only-one")):
        outcome = cli_call(*arguments)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert outcome.err.startswith("Usage: ")
