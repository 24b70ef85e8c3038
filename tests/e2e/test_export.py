"""What is exported says the same without us: through peft as an adapter, through transformers as a whole model."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from fedpeft.algebra.lowrank import LowRank
from fedpeft.errors import BadInput
from fedpeft.experiment import run as runs
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.config import from_json, from_tree
from fedpeft.experiment.trained import Trained, open_run
from fedpeft.ledger import FILE, EvaluationRow
from fedpeft.ledger import read as ledger
from fedpeft.models import export
from fedpeft.mounting import mounted
from fedpeft.types import LocalTask

from .builders import (
    LABELS,
    POSITIONS,
    VOCABULARY,
    Ground,
    cli_call,
    examples,
    refused,
    write_gpt2,
    write_tokenizer,
)

TEXTS = [row["text"] for row in examples()[:12]] + [
    "fish0"
]  # of unequal lengths, so that padding matters
LOW_RANK: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 3, "scale": 2.0},
    "ffa_lora": {"name": "ffa_lora", "rank": 3, "scale": 2.0},
    "federa": {"name": "federa", "rank": 3, "scale": 0.5},
    "slora": {"name": "slora", "rank": 3, "pre_classifier_rank": 5, "scale": 2.0, "stage1": 0.5},
    "fedara": {
        "name": "fedara",
        "rank": 4,
        "scale": 2.0,
        "kept": 0.2,
        "warmup": 0.0,
        "targets": "all-linear",
    },
    "gpt2 lora": {"name": "lora", "rank": 3, "scale": 2.0, "targets": "all-linear"},
    "gpt2 federa": {"name": "federa", "rank": 3},
    "gpt2 slora": {"name": "slora", "rank": 3, "scale": 2.0, "stage1": 0.5},
    "distilbert lora": {"name": "lora", "rank": 3, "targets": "all-linear"},
    "roberta lora": {"name": "lora", "rank": 3, "targets": "all-linear"},
    "poolerless lora": {"name": "lora", "rank": 3, "targets": "all-linear"},
    "headed lora": {"name": "lora", "rank": 3, "targets": "all-linear"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "bitfit": {"name": "bitfit"},
    "sparse": {"name": "sparse"},
    "gpt2 sparse": {"name": "sparse"},
}


SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS + 2,
    "initializer_range": 0.2,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 64,
    "initializer_range": 0.2,
}
HEAD: dict[str, Any] = {"num_labels": len(LABELS)}
BASES: dict[str, Callable[[], Any]] = {
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**DISTILBERT)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
    "poolerless": lambda: BertModel(BertConfig(**SIZES), add_pooling_layer=False),
    "headed": lambda: BertForSequenceClassification(BertConfig(**SIZES, **HEAD)),
}
"""Models beside BERT and GPT-2: with a head of two modules; with a head of two inside one, and
positions counted from a token that is not the tokenizer's padding; with a pooler that the
checkpoint lacks; and with a head that it has.
"""
WAYS = ("peft", "auto peft", "transformers", "configuration", "pipeline")
PEFT_0_4 = {
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "r",
    "target_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
}
PEFT_0_6 = PEFT_0_4 | {"rank_pattern", "alpha_pattern"}
PEFT_0_13 = PEFT_0_6 | {
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "use_rslora",
    "use_dora",
    "layer_replication",
    "runtime_config",
}
"""The fields of LoraConfig in peft 0.4.0, 0.6.0 and 0.13.2, which refuse all others."""


@dataclass(frozen=True)
class Exported:
    """A trained run, its folder, and the logits of TEXTS: ours, the base model's (with the head as drawn)."""

    folder: Path
    trained: Trained
    ours: Tensor
    base: Tensor


@pytest.fixture(scope="module")
def exported(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every method, trained until its adapters have moved."""
    place = tmp_path_factory.mktemp("export")
    bases = {"gpt2": write_gpt2(place / "gpt2")}
    for name, base in BASES.items():
        bases[name] = _written(place / name, base)
    found: dict[str, Exported] = {}
    assembly: Federation | None = None
    for name, method in (LOW_RANK | OTHERS).items():
        model = {"name": str(bases.get(name.partition(" ")[0], ground.model))}
        config = ground.chosen(
            {"model": model, "method": method, "training": {"lr": 0.02}, "evaluation": {"every": 6}}
        )
        assembly = build(config, reuse=assembly)
        runs.start(assembly, place / "runs" / name)
        found[name] = _exported(place / "runs" / name)
    return found


@dataclass(frozen=True)
class Elsewhere:
    """What one fresh process that does not know us makes of everything exported."""

    place: Path
    logits: Mapping[str, Tensor]
    labels: Mapping[str, list[str]]


@pytest.fixture(scope="module")
def elsewhere(exported: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """Export everything and ask a fresh process about it."""
    place = tmp_path_factory.mktemp("elsewhere")
    models: dict[str, Any] = {}
    for name, one in exported.items():
        base = one.trained.config.model.name
        if name in LOW_RANK:
            one.trained.export(place / name)
            models[name] = {"adapter": str(place / name), "base": base, "labels": len(LABELS)}
        one.trained.export(place / f"{name} merged", merge=True)
        models[f"{name} merged"] = {"merged": str(place / f"{name} merged")}
    out, said = place / "logits.safetensors", place / "said.json"
    plan = {"models": models, "texts": TEXTS, "out": str(out), "said": str(said)}
    (place / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("peft_logits.py")
    subprocess.run([sys.executable, script, place / "plan.json"], check=True, cwd=place)
    return Elsewhere(place, load_file(out), json.loads(said.read_text()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOW_RANK)
def test_an_adapter_says_what_we_say_and_not_what_the_base_model_says(
    exported: dict[str, Exported], elsewhere: Elsewhere, name: str, way: str
) -> None:
    """On a base model through peft, and by the ways in which the two libraries find that one."""
    one = exported[name]
    said = elsewhere.logits[f"{name}, {way}"]
    assert (said - one.ours).abs().max() < 1e-5
    assert (said - one.base).abs().max() > 1e-2


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_pipeline_with_an_adapter_says_our_label_names(
    exported: dict[str, Exported], elsewhere: Elsewhere, name: str
) -> None:
    assert elsewhere.labels[name] == [label for label, _ in exported[name].trained.predict(TEXTS)]


@pytest.mark.parametrize("name", LOW_RANK | OTHERS)
def test_a_merged_model_says_what_we_say_and_not_what_the_base_model_says(
    exported: dict[str, Exported], elsewhere: Elsewhere, name: str
) -> None:
    one = exported[name]
    said = elsewhere.logits[f"{name} merged"]
    assert (said - one.ours).abs().max() < 1e-5
    assert (said - one.base).abs().max() > 1e-2


@pytest.mark.parametrize("name", LOW_RANK)
def test_an_adapters_configuration_is_read_by_older_pefts(elsewhere: Elsewhere, name: str) -> None:
    """It holds what differs from the defaults and what every peft needs; 0.6 knows all of that.

    Where all ranks are one, 0.4 does.
    """
    settings = json.loads((elsewhere.place / name / "adapter_config.json").read_text())
    uneven = name in {"slora", "fedara"}
    assert ("rank_pattern" in settings) == uneven
    assert settings.keys() <= (PEFT_0_6 if uneven else PEFT_0_4) < PEFT_0_13
    needed = {"peft_type", "r", "lora_alpha"}
    unset: Any = LoraConfig()
    defaults = unset.to_dict()
    assert needed | {"task_type", "base_model_name_or_path", "target_modules"} <= settings.keys()
    for field in settings.keys() - needed:
        assert settings[field] != defaults[field], field


@pytest.mark.parametrize("name", LOW_RANK)
def test_the_adapters_alone_change_what_is_said(exported: dict[str, Exported], name: str) -> None:
    """With the trained head on the bare base model the logits are others: it is not the head that does it all."""
    one = exported[name]
    with one.trained.mounted() as local:
        head = {name: tensor for name, tensor in local.trainable.items() if ":" not in name}
    model = one.trained.loaded.model
    with torch.no_grad():
        batch = _batch(one.trained)
        bare = torch.func.functional_call(
            model, {key: tensor[0] for key, tensor in head.items()}, (), batch
        ).logits
    assert (bare - one.ours).abs().max() > 1e-2


def test_slora_exports_mixed_ranks(exported: dict[str, Exported], tmp_path: Path) -> None:
    exported["slora"].trained.export(tmp_path / "slora")
    tensors = load_file(tmp_path / "slora" / "adapter_model.safetensors")
    ranks = {
        name: len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")
    }
    assert ranks.pop("base_model.model.bert.pooler.dense.lora_A.weight") == 5
    assert set(ranks.values()) == {3}
    assert len(ranks) == 12


def test_fedara_exports_unequal_ranks_and_no_dead_module(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    one = exported["fedara"]
    alive = {
        name.removesuffix(":alive"): int(mask.sum())
        for name, mask in one.trained.state.server.items()
    }
    assert 0 in alive.values()
    assert len(set(alive.values())) >= 3, (
        "the ranks that live must be unequal, or this shows nothing"
    )
    one.trained.export(tmp_path / "fedara")
    tensors = load_file(tmp_path / "fedara" / "adapter_model.safetensors")
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith("lora_A.weight")
    }
    assert ranks == {module: rank for module, rank in alive.items() if rank}


def test_federa_exports_twice_its_rank_on_the_pretrained_base(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    exported["federa"].trained.export(tmp_path / "federa")
    settings = json.loads((tmp_path / "federa" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (6, 6)


@pytest.mark.parametrize("name", OTHERS)
def test_methods_without_factors_are_exported_merged_only(
    exported: dict[str, Exported], tmp_path: Path, name: str
) -> None:
    refused(
        cli_call("export", exported[name].folder, tmp_path / "made"),
        "no low-rank adapters",
        "--merge",
    )
    assert not [*tmp_path.iterdir()]


def test_a_reference_without_a_global_model_is_neither_exported_nor_asked(
    ground: Ground, tmp_path: Path
) -> None:
    config = ground.chosen(
        {"method": {"name": "local_only"}, "federation": {"rounds": 1}, "evaluation": {"limit": 8}}
    )
    runs.start(build(config), tmp_path / "alone")
    for arguments in (
        ("export", tmp_path / "alone", tmp_path / "made"),
        ("predict", tmp_path / "alone", "fish0"),
    ):
        refused(cli_call(*arguments), "'local_only'")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_exported_folder_holds_tokenizer_and_label_names(
    exported: dict[str, Exported], tmp_path: Path, merge: bool
) -> None:
    exported["lora"].trained.export(tmp_path / "made", merge=merge)
    place = tmp_path / "made" if merge else tmp_path / "made" / "labels"
    settings = json.loads((place / "config.json").read_text())
    assert settings["architectures"] == ["BertForSequenceClassification"]
    assert [settings["id2label"][str(number)] for number in range(4)] == list(LABELS)
    assert settings["label2id"] == {label: number for number, label in enumerate(LABELS)}
    load: Any = AutoTokenizer
    said = load.from_pretrained(tmp_path / "made")(TEXTS)["input_ids"]
    assert said == exported["lora"].trained.loaded.tokenizer(TEXTS)["input_ids"]


def test_an_exported_adapter_names_its_base_model_wherever_it_is_loaded(
    exported: dict[str, Exported], ground: Ground, tmp_path: Path
) -> None:
    exported["lora"].trained.export(tmp_path / "made")
    settings = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert Path(settings["base_model_name_or_path"]).is_absolute()
    assert Path(settings["base_model_name_or_path"]) == ground.model
    assert settings["task_type"] == "SEQ_CLS"
    assert str(ground.model) in (tmp_path / "made" / "README.md").read_text()


def test_exporting_leaves_the_model_as_it_was(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    """To the bit: the model is shared, and its weights and settings are everybody's."""
    one = exported["slora"]
    model: Any = one.trained.loaded.model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.config.to_dict()
    one.trained.export(tmp_path / "adapter")
    one.trained.export(tmp_path / "whole", merge=True)
    assert torch.equal(_ours(one.trained), one.ours)
    assert torch.equal(_bare(one.trained), one.base)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert model.config.to_dict() == settings


def test_exporting_touches_nothing_beside_what_it_makes(
    exported: dict[str, Exported],
    tmp_path: Path,
) -> None:
    (tmp_path / "made.part").mkdir()
    (tmp_path / "made.part" / "mine.txt").write_text("mine")
    exported["lora"].trained.export(tmp_path / "made")
    assert {path.name for path in tmp_path.iterdir()} == {"made", "made.part"}
    assert (tmp_path / "made.part" / "mine.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused_in_one_line(
    exported: dict[str, Exported],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("no folder")
    for options in ((), ("--merge",)):
        outcome = cli_call("export", exported["lora"].folder, tmp_path / "file" / "made", *options)
        refused(outcome, str(tmp_path / "file" / "made"), "cannot be written")


BESIDE = {
    "a layer norm": ["bert.embeddings.LayerNorm.weight"],
    "the bias of an adapted layer": ["bert.encoder.layer.0.attention.self.query.bias"],
    "its weight": ["bert.encoder.layer.0.attention.self.query.weight"],
    "two in one module": ["bert.pooler.dense.weight", "bert.pooler.dense.bias"],
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_a_method_trains_beside_factors_and_head_is_exported_too(
    exported: dict[str, Exported], tmp_path: Path, beside: list[str]
) -> None:
    """None of ours does; a third party's may."""
    trained = exported["lora"].trained
    loaded = trained.loaded
    moved: dict[str, nn.Parameter] = {}
    for name in beside:
        before = loaded.base.parameters[name]
        moved[name] = nn.Parameter(1.5 * before.unsqueeze(0) + 0.5)
    with trained.mounted() as local, mounted(loaded.model, moved):
        ours = trained.task.predict(loaded.model, _batch(trained))["logits"].detach()
    assert (ours - exported["lora"].ours).abs().max() > 1e-2
    both = replace(local, trainable={**local.trainable, **moved})
    export.adapter(loaded, both, trained.config.model.name, tmp_path / "made")
    config: Any = AutoConfig.from_pretrained(tmp_path / "made" / "labels")
    load: Any = AutoModelForSequenceClassification
    model: Any = load.from_pretrained(trained.config.model.name, config=config)
    theirs: Any = PeftModel.from_pretrained(model, tmp_path / "made")
    whole: Any = export.merge(loaded.model, both)
    for one in (theirs.eval(), whole):
        with torch.no_grad():
            assert (one(**_batch(trained)).logits - ours).abs().max() < 1e-5


def test_modules_saved_whole_are_few_and_hold_every_parameter_that_is_named() -> None:
    model = BertForSequenceClassification(BertConfig(**SIZES))
    head = {"classifier.weight", "classifier.bias"}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    saved = partial(export.saved_modules, model)
    assert saved(head) == ["classifier"]
    assert saved(head | pooler) == ["bert.pooler", "classifier"]
    assert saved({"classifier.bias"}) == ["classifier"], "saved whole or not at all"
    assert saved({"bert.pooler.dense.bias"}) == ["bert.pooler.dense", "classifier"]
    assert saved(set()) == ["classifier"], "peft wants it in any case"


def test_of_names_with_one_ending_peft_saves_all() -> None:
    """``classifier`` is the end of ``pre_classifier``, and peft asks for no dot before it."""
    names = ("pre_classifier", "classifier", "body")
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    saved = export.saved_modules(model, {"classifier.weight", "classifier.bias"})
    assert saved == ["pre_classifier", "classifier"]
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(BadInput, match="'scale'.*--merge"):
        export.saved_modules(model, {"scale"})


class Twins(nn.Module):
    """Two dense layers with one weight, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.twice = self.again = nn.Linear(4, 4)


def test_a_difference_to_a_weight_that_two_layers_share_is_not_merged() -> None:
    """Merged, it would act in both; a layer that has two names is another matter."""
    model = Twins()
    delta = LowRank(torch.ones(1, 1, 4), torch.ones(1, 4, 1), 1.0)
    before = model.first.weight.detach().clone()

    def moved(name: str) -> LocalTask:
        return LocalTask({}, lambda: ({}, {}), lambda: {name: delta})

    for name in ("first", "second"):
        with pytest.raises(BadInput, match=f"'{name}' shares its weight.*without --merge"):
            export.merge(model, moved(name))
    whole = export.merge(model, moved("twice"))
    assert torch.equal(whole.get_parameter("again.weight"), model.twice.weight + 1)
    assert torch.equal(model.first.weight, before)


def test_an_adapter_is_no_model_to_start_from_but_a_merged_one_is(
    exported: dict[str, Exported], ground: Ground, tmp_path: Path
) -> None:
    exported["lora"].trained.export(tmp_path / "adapter")
    exported["lora"].trained.export(tmp_path / "whole", merge=True)
    options = ("--runs", tmp_path / "runs", "--set", "federation.rounds=1")
    adapter, whole = (f"--set=model.name={tmp_path / name}" for name in ("adapter", "whole"))
    outcome = cli_call("run", ground.config, *options, adapter)
    refused(outcome, f"adapter of '{ground.model}'", "fedpeft export", "--merge")
    (tmp_path / "adapter" / "adapter_config.json").write_text("[")
    refused(cli_call("run", ground.config, *options, adapter), "adapter of another model")
    assert not (tmp_path / "runs").exists()
    outcome = cli_call("run", ground.config, *options, whole)
    assert (outcome.code, outcome.err) == (0, "")


def test_targets_as_in_peft_from_the_command_to_the_adapter(
    ground: Ground,
    tmp_path: Path,
) -> None:
    """A list, a list in a text, and a pattern: the same layers and bits, resumed and exported."""
    written = {"list": '["query", "value"]', "text": "query, value", "pattern": "query|value"}
    made: dict[str, Mapping[str, Tensor]] = {}
    for name, targets in written.items():
        options = [f"method.targets={targets}", f"name={name}", "federation.rounds=2"]
        settings = [f"--set={option}" for option in options]
        outcome = cli_call("run", ground.config, "--runs", tmp_path, *settings)
        assert (outcome.code, outcome.err) == (0, "")
        outcome = cli_call("resume", tmp_path / name)
        assert (outcome.code, outcome.err) == (0, "")
        outcome = cli_call("export", tmp_path / name, tmp_path / f"{name} adapter")
        assert (outcome.code, outcome.err) == (0, "")
        made[name] = load_file(tmp_path / f"{name} adapter" / "adapter_model.safetensors")
        settings = json.loads((tmp_path / f"{name} adapter" / "adapter_config.json").read_text())
        targeted = settings["target_modules"]
        assert {module.rpartition(".")[2] for module in targeted} == {"query", "value"}
        assert len(targeted) == 4
    for other in made.values():
        assert other.keys() == made["list"].keys()
        assert all(torch.equal(tensor, made["list"][key]) for key, tensor in other.items())


def test_a_list_of_targets_outlives_json() -> None:
    method = {"name": "lora", "targets": ["query", "value"]}
    config = from_tree({"method": method, "compare": {"targets": ["key"]}})
    again = from_json(config.to_json())
    assert again == config
    assert again.compare.targets == ("key",)
    assert again.build_method() == config.build_method()
    assert again.build_method().targets == ("query", "value")  # type: ignore[attr-defined]


def test_a_folder_that_exists_is_refused_and_left_alone(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine")
    for options in ((), ("--merge",)):
        refused(
            cli_call("export", exported["lora"].folder, tmp_path / "made", *options),
            str(tmp_path / "made"),
            "exists",
        )
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["mine.txt"]


def test_an_opened_run_scores_what_its_ledger_says(exported: dict[str, Exported]) -> None:
    one = exported["fedara"]
    rows = [row for row in ledger(one.folder / FILE) if isinstance(row, EvaluationRow)]
    assembly = build(one.trained.config)
    said = one.trained.predict(assembly.dataset.test.texts)
    right = [
        label == there for (label, _), there in zip(said, assembly.dataset.test.labels, strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(rows[-1].metrics["accuracy"])


def test_an_empty_text_is_a_text_also_where_the_tokenizer_adds_nothing(
    exported: dict[str, Exported],
) -> None:
    for name in ("lora", "gpt2 lora"):
        trained = exported[name].trained
        [alone, _] = trained.predict(["", "fish0 fish1"])
        [again] = trained.predict([""])
        assert alone[0] == again[0]
        assert alone[1] == pytest.approx(again[1], abs=1e-5)


def _written(folder: Path, build: Callable[[], Any]) -> Path:
    """Save a model whose weights are always the same, with its tokenizer."""
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        build().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _exported(folder: Path) -> Exported:
    trained = open_run(folder)
    return Exported(folder, trained, _ours(trained), _bare(trained))


def _batch(trained: Trained) -> dict[str, Tensor]:
    examples = trained.task.encode(trained.task.unanswered(TEXTS))
    batch = dict(trained.task.collate(examples, trained.hardware.torch_device))
    del batch["labels"]
    return batch


@torch.no_grad()
def _ours(trained: Trained) -> Tensor:
    trained.loaded.model.eval()
    with trained.mounted():
        return trained.task.predict(trained.loaded.model, _batch(trained))["logits"]


@torch.no_grad()
def _bare(trained: Trained) -> Tensor:
    trained.loaded.model.eval()
    return trained.task.predict(trained.loaded.model, _batch(trained))["logits"]
