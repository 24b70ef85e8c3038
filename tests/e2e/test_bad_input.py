"""Bad input: one line on stderr that names field or file and the nearest valid choice, exit code 2, nothing half-written."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .builders import Ground, cli_call, refused, to_toml, write_llama


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
    "unknown key, none near": Wrong(
        ("federation.xyzzy=1",), ("'federation.xyzzy'", "rounds, clients_per_round")
    ),
    "section without keys": Wrong(("training=5",), ("training = 5",)),
    "name of the method mistyped": Wrong(
        ("method={nam='lora'}",),
        ("unknown key 'method.nam'", "did you mean 'name'"),
    ),
    "field of no method": Wrong(("method={rnk=4}",), ("'method.rnk'", "did you mean 'rank'")),
    "wrong value without a method's name": Wrong(
        ("method={rank=0}",),
        ("method.rank = 0: must be at least 1",),
    ),
    "number too small for a method": Wrong(
        ("method.rank=0",),
        ("method.rank = 0: must be at least 1",),
    ),
    "one of two types": Wrong(
        ("engine.stack=many",),
        ("engine.stack = 'many': input should be a valid integer or 'auto'",),
    ),
    "one of two types, too small": Wrong(("engine.stack=0",), ("engine.stack = 0", "1 or 'auto'")),
    "seed too large": Wrong((f"seed={2**70}",), (f"seed = {2**70}: must be at most {2**62}",)),
    "not below 1": Wrong(("model.dropout=1",), ("model.dropout = 1: must be less than 1",)),
    "number for a path": Wrong(("data.train=3",), ("data.train = 3: write a path in quotes",)),
    "section for a number": Wrong(("training.lr.x=3",), ("training.lr = {'x': 3}",)),
    "a word for a list": Wrong(("compare.methods=lora",), ("compare.methods = 'lora'", "list")),
    "a number for a list": Wrong(("compare.seeds=0",), ("compare.seeds = 0", "list")),
    "a word in a list of numbers": Wrong(
        ('compare.seeds=[0, "a"]',),
        ("compare.seeds[1] = 'a'", "integer"),
    ),
    "true in a list of numbers": Wrong(("compare.seeds=[0, true]",), ("compare.seeds[1] = true",)),
    "a negative number in a list": Wrong(
        ("compare.seeds=[-1]",),
        ("compare.seeds[0] = -1: must be at least 0",),
    ),
    "a number in a list of words": Wrong(
        ("compare.methods=[1]",),
        ("compare.methods[0] = 1", "string"),
    ),
    "a word for a section of sections": Wrong(
        ("compare.settings.lora=3",),
        ("compare.settings.lora = 3", "write compare.settings.lora.field=value"),
    ),
    "no finite number deep down": Wrong(
        ("compare.settings.lora.training.lr=nan",), ("compare.settings.lora.training.lr = nan",)
    ),
    "unknown method": Wrong(
        ("method.name=slorra",), ("method.name = 'slorra'", "did you mean 'slora'")
    ),
    "unknown method, none near": Wrong(
        ("method.name=zzzz",), ("method.name = 'zzzz'", "lora", "fedara", "bitfit")
    ),
    "method without its section": Wrong(("method=lora",), ("method = 'lora'",)),
    "method of a wrong type": Wrong(("method.name=[1]",), ("method.name = [1]",)),
    "unknown field of a method": Wrong(("method.rnk=4",), ("'method.rnk'", "did you mean 'rank'")),
    "field of another method": Wrong(
        ("method.name=lora", "method.density=0.1"), ("'method.density'", "rank")
    ),
    "assignment without value": Wrong(
        ("training.lr",), ("--set training.lr", "section.field=value")
    ),
    "number as a word": Wrong(("training.lr=fast",), ("training.lr = 'fast'", "number")),
    "a word for a section": Wrong(("training=5",), ("training = 5", "training.field=value")),
    "true for a number": Wrong(("training.lr=true",), ("training.lr = true", "no value")),
    "true for a whole number": Wrong(("federation.rounds=true",), ("federation.rounds = true",)),
    "more threads than a machine can have": Wrong(
        ("machine.threads=100000",), ("machine.threads = 100000", "at most")
    ),
    "no room for a word": Wrong(("model.max_length=2",), ("model.max_length = 2", "choose 3")),
    "a short name mistyped": Wrong(
        ("model.name=minillm",), ("model.name = 'minillm'", "did you mean 'minilm'")
    ),
    "number too small": Wrong(("federation.rounds=0",), ("federation.rounds = 0", "1")),
    "fraction of a round": Wrong(
        ("federation.rounds=1.5",), ("federation.rounds = 1.5", "integer")
    ),
    "negative rate": Wrong(("training.lr=-0.1",), ("training.lr = -0.1", "greater than 0")),
    "no number": Wrong(("training.lr=nan",), ("training.lr = nan",)),
    "no finite number": Wrong(("training.clip=inf",), ("training.clip = inf",)),
    "no finite number in a method": Wrong(("method.scale=inf",), ("method.scale = inf",)),
    "negative seed": Wrong(("seed=-1",), ("seed = -1", "0")),
    "unknown word": Wrong(
        ("partition.kind=dirichlett",), ("partition.kind = 'dirichlett'", "'dirichlet'")
    ),
    "unknown split": Wrong(
        ("evaluation.split=train",), ("evaluation.split = 'train'", "'validation' or 'test'")
    ),
    "unknown engine": Wrong(
        ("engine.kind=flwr",), ("engine.kind = 'flwr'", "'local', 'flower' or 'sites'")
    ),
    "wrong type in a method": Wrong(("method.rank=four",), ("method.rank = 'four'", "integer")),
    "rank above a layer's size": Wrong(
        ("method.rank=33",),
        (
            "method.rank = 33",
            "'bert.encoder.layer.0.attention.self.query' is 32 x 32",
            "from 1 to 32",
        ),
    ),
    "rank above a layer's size, fedara": Wrong(
        ("method.name=fedara", "method.rank=33"), ("method.rank = 33", "from 1 to 32")
    ),
    "rank above a layer's size, federa": Wrong(
        ("method.name=federa", "method.rank=33"), ("method.rank = 33", "from 1 to 32")
    ),
    "rank above a layer's size, ffa_lora": Wrong(
        ("method.name=ffa_lora", "method.rank=33"), ("method.rank = 33", "from 1 to 32")
    ),
    "rank above a layer's size, slora": Wrong(
        ("method.name=slora", "method.rank=33"), ("method.rank = 33", "from 1 to 32")
    ),
    "rank above the pre-classifier's size": Wrong(
        ("method.name=slora", "method.pre_classifier_rank=33"),
        ("method.pre_classifier_rank = 33", "'bert.pooler.dense' is 32 x 32", "from 1 to 32"),
    ),
    "targets that match nothing": Wrong(
        ("method.targets=qury",), ("method.targets = 'qury'", "did you mean 'query'")
    ),
    "targets that match the head only": Wrong(
        ("method.targets=classifier",), ("method.targets = 'classifier'", "query")
    ),
    "targets of another family": Wrong(("method.targets=q_proj|v_proj",), ("mean 'query|value'?",)),
    "targets of a wrong type": Wrong(("method.targets=3",), ("method.targets = 3: input",)),
    "targets of a wrong type, listed": Wrong(("method.targets=[3]",), ("method.targets = [3]:",)),
    "neither of two types": Wrong(("engine.stack=many",), ("engine.stack = 'many': input",)),
    "targets that are no pattern": Wrong(
        ("method.targets=(query",), ("method.targets = '(query'", "regular expression")
    ),
    "more clients than examples": Wrong(
        ("partition.clients=500",),
        ("partition.clients = 500", "144 examples", "at most 144 clients"),
    ),
    "more clients than examples, iid": Wrong(
        ("partition.kind=iid", "partition.clients=500"),
        ("partition.clients = 500", "at most 144 clients"),
    ),
    "more examples a client than there are": Wrong(
        ("partition.min_examples=100",), ("partition.min_examples = 100", "at most 28 each")
    ),
    "more clients a round than clients": Wrong(
        ("federation.clients_per_round=6",), ("federation.clients_per_round = 6", "at most 5")
    ),
    "natural clients without a key": Wrong(
        ("partition.kind=by_key",), ("partition.kind = 'by_key'", "data.key")
    ),
    "key that no column has": Wrong(
        ("partition.kind=by_key", "data.key=sites"), ('data.key = "sites"', "'site'")
    ),
    "partition without its file": Wrong(("partition.kind=file",), ("partition.file is missing",)),
    "more examples a client than there are, by quantity": Wrong(
        ("partition.kind=quantity", "partition.min_examples=100"),
        ("partition.min_examples = 100", "at most 28 each"),
    ),
    "no share that could be drawn": Wrong(
        ("partition.kind=label_skew", "partition.alpha=0.0001"),
        ("partition.alpha = 0.0001: must be a number from 0.001",),
    ),
    "more clusters than examples": Wrong(
        ("partition.kind=cluster", "partition.clusters=145"),
        ("partition.clusters = 145", "choose 1 to 144 clusters"),
    ),
    "more groups than keys": Wrong(
        ("partition.kind=by_key", "data.key=site", "partition.group=true", "partition.clients=6"),
        ("partition.clients = 6: train has 5 keys", "choose 1 to 5 clients"),
    ),
    "partitioner without its name": Wrong(
        ("partition.kind=flower",),
        ("partition.flower.name is missing", "'PathologicalPartitioner'"),
    ),
    "partitioner mistyped": Wrong(
        ("partition.kind=flower", "partition.flower.name=IidPartitoner"),
        ("partition.flower.name = 'IidPartitoner'", "did you mean 'IidPartitioner'"),
    ),
    "argument of a partitioner mistyped": Wrong(
        ("partition.kind=flower", "partition.flower={name='DirichletPartitioner', alfa=1}"),
        ("'partition.flower.alfa' of DirichletPartitioner", "did you mean 'alpha'"),
    ),
    "unknown device": Wrong(("machine.device=cud",), ("machine.device = 'cud'", "'cpu'")),
    "device that is not there": Wrong(
        ("machine.device=cuda:99",), ("machine.device = 'cuda:99'", "'cpu'")
    ),
    "device that holds nothing": Wrong(
        ("machine.device=meta",), ("machine.device = 'meta'", "'cpu'")
    ),
    "no such model folder": Wrong(
        ("model.name=./nowhere",), ("model.name = './nowhere'", "minilm")
    ),
    "texts longer than the model's positions": Wrong(
        ("model.max_length=33",), ("model.max_length = 33", "32 tokens")
    ),
    "missing text column": Wrong(
        ("data.text=txt",), ('data.text = "txt"', "examples.jsonl:1", "did you mean 'text'")
    ),
    "missing label column": Wrong(
        ("data.label=class",), ('data.label = "class"', "examples.jsonl:1", "'label'")
    ),
    "no such data file": Wrong(("data.train=examples.jsn",), ("examples.jsn", "no such file")),
    "data files that are not used": Wrong(("data.source=pydocs",), ("data.train", "'files'")),
    "name that is no folder's": Wrong(("name=",), ("name = ''",)),
    "name of the folder above": Wrong(("name=..",), ("name = '..'",)),
    "name of a folder elsewhere": Wrong(("name=../elsewhere",), ("name = '../elsewhere'",)),
    "more replies needed than clients asked": Wrong(
        ("federation.min_replies=3",),
        ("federation.min_replies = 3", "federation.clients_per_round = 2"),
    ),
    "a limit for updates that nobody sees": Wrong(
        ("federation.largest_update=1", 'wrap=[{name="secagg"}]'),
        ("federation.largest_update = 1", "secagg", "leave one of the two out"),
    ),
    "a limit for updates that are codes": Wrong(
        ("federation.largest_update=1", 'wrap=[{name="quantise"}]'),
        ("federation.largest_update = 1", "quantise", "leave one of the two out"),
    ),
    "a sum of more clients than there are": Wrong(
        ('wrap=[{name="secagg", smallest=12}]',),
        ("wrap[0].name = 'secagg' needs 12 replies", "federation.clients_per_round = 2"),
    ),
}


@pytest.mark.parametrize("wrong", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_do_not_work_are_refused_before_anything_is_written(
    ground: Ground, runs: Path, wrong: Wrong
) -> None:
    refused(cli_call("run", ground.config, "--runs", runs, *wrong.options()), *wrong.says)
    assert not runs.exists()


@pytest.mark.parametrize(
    "foreign", ["chapter1.tex", "model.safetensors"], ids=["thesis", "exported model"]
)
def test_overwrite_never_deletes_what_is_no_run(ground: Ground, runs: Path, foreign: str) -> None:
    """An exported model is the nearest to a run: it has a config.json too."""
    precious = runs / "mine" / foreign
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    if foreign == "model.safetensors":
        (runs / "mine" / "config.json").write_bytes((ground.model / "config.json").read_bytes())
    outcome = cli_call("run", ground.config, "--runs", runs, "--overwrite", "--set", "name=mine")
    assert precious.exists()
    refused(outcome, str(runs / "mine"))


def test_an_engine_that_is_not_installed_is_named_with_its_remedy(
    ground: Ground, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("fedpeft.engines.flower")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    for name in [name for name in sys.modules if name.startswith("flwr.")]:
        monkeypatch.setitem(sys.modules, name, None)
    outcome = cli_call("run", ground.config, "--runs", runs, "--set", "engine.kind=flower")
    refused(outcome, "engine.kind = 'flower'", "pip install 'fedpeft[flower]'")
    assert not runs.exists()


def test_a_run_folder_that_exists_is_refused_and_left_alone(ground: Ground, runs: Path) -> None:
    (runs / "tiny").mkdir(parents=True)
    (runs / "tiny" / "ledger.jsonl").write_text("mine")
    refused(
        cli_call("run", ground.config, "--runs", runs), str(runs / "tiny"), "exists", "--overwrite"
    )
    assert [path.name for path in (runs / "tiny").iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_a_place_where_no_run_folder_can_be_made_is_named(
    ground: Ground, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("mine")
    refused(
        cli_call("run", ground.config, "--runs", tmp_path / "file", *options),
        str(tmp_path / "file"),
    )
    assert (tmp_path / "file").read_text() == "mine"


COMPARISONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown method": (("--methods", "lora,fedarra"), ("compare.methods", "'fedarra'", "did you mean 'fedara'")),
    "unknown method in the settings": (("--set", "compare.settings.slorra.rank=3"), ("compare.settings.slorra",)),
    "unknown key in the settings": (
        ("--set", "compare.settings.lora.training.lrr=0.1"), ("'training.lrr'", "did you mean 'lr'")
    ),
    "unknown section in the settings": (
        ("--set", "compare.settings.lora.trainning.lr=0.1"),
        ("compare.settings.lora", "'trainning'", "did you mean 'training'"),
    ),
    "number for a section in the settings": (
        ("--set", "compare.settings.lora.training=0.1"),
        ("compare.settings.lora", "training = 0.1", "section"),
    ),
    "wrong value in the settings": (
        ("--set", "compare.settings.bitfit.training.lr=-1"),
        ("compare.settings.bitfit", "training.lr = -1"),
    ),
    "wrong value in the settings of the references' method": (
        ("--methods", "bitfit", "--set", 'compare.references=["centralised"]',
         "--set", "compare.settings.lora.training.lr=-1"),
        ("compare.settings.lora", "training.lr = -1"),
    ),
    "seed in the settings": (
        ("--set", "compare.settings.lora.seed=3"), ("compare.settings.lora.seed",)
    ),
    "method in the settings": (
        ("--set", "compare.settings.lora.method.name=full"),
        ("compare.settings.lora.method.name = 'full'",),
    ),
    "unknown method of the references": (
        ("--set", "compare.reference_method=lorra", "--set", 'compare.references=["centralised"]'),
        ("compare.reference_method", "'lorra'", "did you mean 'lora'"),
    ),
    "number too small for a method": (
        ("--set", "method={rank=0}"), ("method.rank = 0: must be at least 1",)
    ),
    "name of the method mistyped": (
        ("--set", "method={nam='lora'}"), ("'method.nam'", "did you mean 'name'")
    ),
    "unknown reference": (("--set", 'compare.references=["central"]'), ("compare.references", "'centralised'")),
    "seeds that are none": (("--seeds", "a,b"), ("compare.seeds", "a,b")),
    "rank above a layer's size": (("--methods", "lora", "--set", "compare.rank=33"), ("rank = 33", "from 1 to 32")),
    "targets that match nothing": (
        ("--methods", "lora", "--set", "compare.targets=qury"), ("targets = 'qury'", "did you mean 'query'")
    ),
    "no seeds": (("--set", "compare.seeds=[]"), ("compare.seeds = []", "at least one")),
    "no methods": (("--set", "compare.methods=[]"), ("compare.methods = []", "at least one")),
    "a method twice": (("--methods", "lora,lora"), ("compare.methods", "each once")),
    "target that is no accuracy": (("--target", "60"), ("target", "60", "0.6")),
    "no bandwidth": (("--bandwidth", "0"), ("bandwidth", "0")),
}  # fmt: skip


@pytest.mark.parametrize(("options", "says"), COMPARISONS.values(), ids=COMPARISONS)
def test_a_comparison_that_does_not_work_is_refused_before_its_first_run(
    ground: Ground, runs: Path, options: tuple[str, ...], says: tuple[str, ...]
) -> None:
    short = ("--set", "federation.rounds=1", "--set", "training.steps=1")
    refused(
        cli_call(
            "compare", ground.config, "--runs", runs, "--methods", "lora,bitfit", *short, *options
        ),
        *says,
    )
    assert not runs.exists()


def test_a_method_that_does_not_fit_the_model_is_refused_before_the_others_are_trained(
    ground: Ground, runs: Path, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "llama")
    options = (
        "--set",
        f"model.name={model}",
        "--set",
        "federation.rounds=1",
        "--set",
        "compare.targets=q_proj",
    )
    refused(
        cli_call("compare", ground.config, "--runs", runs, "--methods", "lora,bitfit", *options),
        "bitfit",
        "no biases",
    )
    assert not runs.exists()


def test_a_comparison_refuses_any_folder_that_exists(ground: Ground, runs: Path) -> None:
    (runs / "tiny-compare" / "bitfit-s0").mkdir(parents=True)
    refused(
        cli_call("compare", ground.config, "--runs", runs, "--methods", "lora,bitfit"),
        "bitfit-s0",
        "exists",
    )
    assert [path.name for path in (runs / "tiny-compare").iterdir()] == ["bitfit-s0"]


SWEEPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": ("training.lrr=0.1,0.2", ("'training.lrr'", "did you mean 'lr'")),
    "no values": ("training.lr=", ("training.lr", "training.lr=0.001,0.003")),
    "no key": ("0.001,0.003", ("0.001,0.003", "section.field=value")),
    "wrong value": ("training.lr=0.1,fast", ("training.lr = 'fast'",)),
    "what a sweep names itself": ("label=a,b", ("label", "settles")),
    "what a sweep is scored on": (
        "evaluation.split=test,validation",
        ("evaluation.split", "settles"),
    ),
    "values that would share a folder": (
        "model.name=a/b,a:b",
        ("'model.name=a/b'", "'model.name=a:b'"),
    ),
}


@pytest.mark.parametrize(("values", "says"), SWEEPS.values(), ids=SWEEPS)
def test_a_sweep_that_does_not_work_is_refused_before_its_first_run(
    ground: Ground, runs: Path, values: str, says: tuple[str, ...]
) -> None:
    refused(cli_call("sweep", ground.config, values, "--runs", runs), *says)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("method.nam=lora", "unknown key 'method.nam'; did you mean 'name'?"),
        ("method.rank=0", "method.rank = 0: must be at least 1"),
    ],
)
@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_method_that_is_not_named_is_checked_as_the_default_one(
    ground: Ground, runs: Path, tmp_path: Path, command: str, setting: str, says: str
) -> None:
    tree = ground.tree()
    del tree["method"]
    (tmp_path / "mine.toml").write_text(to_toml(tree))
    refused(cli_call(command, tmp_path / "mine.toml", "--runs", runs, "--set", setting), says)
    assert not runs.exists()


def test_a_sweep_of_a_field_that_a_method_lacks_names_it(ground: Ground, runs: Path) -> None:
    arguments = ("sweep", ground.config, "method.rank=2,4", "--methods", "lora,bitfit")
    refused(cli_call(*arguments, "--runs", runs), "bitfit: unknown key 'method.rank'")
    assert not runs.exists()


@pytest.mark.parametrize(
    "command",
    [("resume",), ("predict", "text"), ("export", "to"), ("report",)],
    ids=lambda c: str(c[0]),
)
def test_a_folder_without_a_run_is_named(
    runs: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *rest = command
    arguments: list[str | Path] = [tmp_path / "made"] if rest == ["to"] else list(rest)
    options: list[str | Path] = ["--to", tmp_path / "made"] if name == "report" else []
    refused(cli_call(name, runs / "none", *arguments, *options), str(runs / "none"))
    assert not (tmp_path / "made").exists()


def test_commands_that_are_called_wrongly_say_so_without_a_traceback() -> None:
    for arguments in (
        ("run",),
        ("rum",),
        ("run", "a.toml", "--sett", "x=1"),
        ("export", "only-one"),
    ):
        outcome = cli_call(*arguments)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert outcome.err.startswith("Usage: ")
