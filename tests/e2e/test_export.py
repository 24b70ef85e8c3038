"""What is exported says the same without us: through peft as an adapter, through transformers as a whole model."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from fedpeft import runs
from fedpeft.assembly import Assembly, assemble
from fedpeft.ledger import FILE, EvaluationRow
from fedpeft.ledger import read as ledger
from fedpeft.trained import Trained, open_run

from .builders import LABELS, Ground, cli_call, examples, refused, write_gpt2

TEXTS = [row["text"] for row in examples()[:12]] + ["fish0"]  # of unequal lengths, so that padding matters
LOW_RANK: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 3, "scale": 2.0},
    "ffa_lora": {"name": "ffa_lora", "rank": 3, "scale": 2.0},
    "federa": {"name": "federa", "rank": 3, "scale": 0.5},
    "slora": {"name": "slora", "rank": 3, "pre_classifier_rank": 5, "scale": 2.0, "stage1": 0.5},
    "fedara": {"name": "fedara", "rank": 4, "scale": 2.0, "kept": 0.2, "warmup": 0.0, "targets": "all-linear"},
    "gpt2 lora": {"name": "lora", "rank": 3, "scale": 2.0, "targets": "all-linear"},
    "gpt2 federa": {"name": "federa", "rank": 3},
    "gpt2 slora": {"name": "slora", "rank": 3, "scale": 2.0, "stage1": 0.5},
}
OTHERS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "bitfit": {"name": "bitfit"},
    "sparse": {"name": "sparse"},
    "gpt2 sparse": {"name": "sparse"},
}


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
    gpt2 = write_gpt2(place / "gpt2")
    found: dict[str, Exported] = {}
    assembly: Assembly | None = None
    for name, method in (LOW_RANK | OTHERS).items():
        model = {"name": str(gpt2 if name.startswith("gpt2") else ground.model)}
        config = ground.chosen({"model": model, "method": method, "training": {"lr": 0.02}, "evaluation": {"every": 6}})
        assembly = assemble(config, like=assembly)
        runs.start(assembly, place / "runs" / name)
        found[name] = _exported(place / "runs" / name)
    return found


@pytest.fixture(scope="module")
def elsewhere(exported: dict[str, Exported], ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    """The logits of everything exported, from one fresh process that does not know us."""
    place = tmp_path_factory.mktemp("elsewhere")
    models: dict[str, Any] = {}
    for name, one in exported.items():
        base = one.trained.config.model.name
        if name in LOW_RANK:
            one.trained.export(place / name)
            models[name] = {"adapter": str(place / name), "base": base, "labels": len(LABELS)}
        one.trained.export(place / f"{name} merged", merge=True)
        models[f"{name} merged"] = {"merged": str(place / f"{name} merged")}
    plan = {"models": models, "texts": TEXTS, "out": str(place / "logits.safetensors")}
    (place / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("peft_logits.py")
    subprocess.run([sys.executable, script, place / "plan.json"], check=True, cwd=place)
    return load_file(place / "logits.safetensors")


@pytest.mark.parametrize("name", LOW_RANK)
def test_peft_says_what_we_say_and_not_what_the_base_model_says(
    exported: dict[str, Exported], elsewhere: Mapping[str, Tensor], name: str
) -> None:
    one = exported[name]
    assert (elsewhere[name] - one.ours).abs().max() < 1e-5
    assert (elsewhere[name] - one.base).abs().max() > 1e-2


@pytest.mark.parametrize("name", LOW_RANK | OTHERS)
def test_a_merged_model_says_what_we_say_and_not_what_the_base_model_says(
    exported: dict[str, Exported], elsewhere: Mapping[str, Tensor], name: str
) -> None:
    one = exported[name]
    assert (elsewhere[f"{name} merged"] - one.ours).abs().max() < 1e-5
    assert (elsewhere[f"{name} merged"] - one.base).abs().max() > 1e-2


@pytest.mark.parametrize("name", LOW_RANK)
def test_the_adapters_alone_change_what_is_said(exported: dict[str, Exported], name: str) -> None:
    """With the trained head on the bare base model the logits are others: it is not the head that does it all."""
    one = exported[name]
    with one.trained.mounted() as local:
        head = {name: tensor for name, tensor in local.trainable.items() if ":" not in name}
    model = one.trained.loaded.model
    with torch.no_grad():
        batch = _batch(one.trained)
        bare = torch.func.functional_call(model, {key: tensor[0] for key, tensor in head.items()}, (), batch).logits
    assert (bare - one.ours).abs().max() > 1e-2


def test_slora_exports_mixed_ranks(exported: dict[str, Exported], tmp_path: Path) -> None:
    exported["slora"].trained.export(tmp_path / "slora")
    tensors = load_file(tmp_path / "slora" / "adapter_model.safetensors")
    ranks = {name: len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    assert ranks.pop("base_model.model.bert.pooler.dense.lora_A.weight") == 5
    assert set(ranks.values()) == {3}
    assert len(ranks) == 12


def test_fedara_exports_unequal_ranks_and_no_dead_module(exported: dict[str, Exported], tmp_path: Path) -> None:
    one = exported["fedara"]
    alive = {name.removesuffix(":alive"): int(mask.sum()) for name, mask in one.trained.state.server.items()}
    assert 0 in alive.values()
    assert len(set(alive.values())) >= 3, "the ranks that live must be unequal, or this shows nothing"
    one.trained.export(tmp_path / "fedara")
    tensors = load_file(tmp_path / "fedara" / "adapter_model.safetensors")
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith("lora_A.weight")
    }
    assert ranks == {module: rank for module, rank in alive.items() if rank}


def test_federa_exports_twice_its_rank_on_the_pretrained_base(exported: dict[str, Exported], tmp_path: Path) -> None:
    exported["federa"].trained.export(tmp_path / "federa")
    settings = json.loads((tmp_path / "federa" / "adapter_config.json").read_text())
    assert set(settings["rank_pattern"].values()) == {6}


@pytest.mark.parametrize("name", OTHERS)
def test_methods_without_factors_are_exported_merged_only(exported: dict[str, Exported], tmp_path: Path, name: str) -> None:
    refused(cli_call("export", exported[name].folder, tmp_path / "made"), "no low-rank adapters", "--merge")
    assert not [*tmp_path.iterdir()]


def test_a_reference_without_a_global_model_is_neither_exported_nor_asked(ground: Ground, tmp_path: Path) -> None:
    config = ground.chosen({"method": {"name": "local_only"}, "federation": {"rounds": 1}, "evaluation": {"limit": 8}})
    runs.start(assemble(config), tmp_path / "alone")
    for arguments in (("export", tmp_path / "alone", tmp_path / "made"), ("predict", tmp_path / "alone", "fish0")):
        refused(cli_call(*arguments), "'local_only'")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_exported_folder_holds_tokenizer_and_label_names(exported: dict[str, Exported], tmp_path: Path, merge: bool) -> None:
    exported["lora"].trained.export(tmp_path / "made", merge=merge)
    settings = json.loads((tmp_path / "made" / "config.json").read_text())
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


def test_exporting_leaves_the_model_as_it_was(exported: dict[str, Exported], tmp_path: Path) -> None:
    one = exported["slora"]
    one.trained.export(tmp_path / "adapter")
    one.trained.export(tmp_path / "whole", merge=True)
    assert torch.equal(_ours(one.trained), one.ours)
    assert torch.equal(_bare(one.trained), one.base)


def test_a_folder_that_exists_is_refused_and_left_alone(exported: dict[str, Exported], tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine")
    for options in ((), ("--merge",)):
        refused(cli_call("export", exported["lora"].folder, tmp_path / "made", *options), str(tmp_path / "made"), "exists")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["mine.txt"]


def test_an_opened_run_scores_what_its_ledger_says(exported: dict[str, Exported]) -> None:
    one = exported["fedara"]
    rows = [row for row in ledger(one.folder / FILE) if isinstance(row, EvaluationRow)]
    assembly = assemble(one.trained.config)
    said = one.trained.predict(assembly.dataset.test.texts)
    right = [label == there for (label, _), there in zip(said, assembly.dataset.test.labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(rows[-1].accuracy)


def test_an_empty_text_is_a_text_also_where_the_tokenizer_adds_nothing(exported: dict[str, Exported]) -> None:
    for name in ("lora", "gpt2 lora"):
        trained = exported[name].trained
        [alone, _] = trained.predict(["", "fish0 fish1"])
        [again] = trained.predict([""])
        assert alone[0] == again[0]
        assert alone[1] == pytest.approx(again[1], abs=1e-5)


def _exported(folder: Path) -> Exported:
    trained = open_run(folder)
    return Exported(folder, trained, _ours(trained), _bare(trained))


def _batch(trained: Trained) -> dict[str, Tensor]:
    examples = trained.task.encode(TEXTS, [LABELS[0]] * len(TEXTS))
    batch = dict(trained.task.collate(examples, trained.hardware.torch_device))
    del batch["labels"]
    return batch


@torch.no_grad()
def _ours(trained: Trained) -> Tensor:
    trained.loaded.model.eval()
    with trained.mounted():
        return trained.task.logits(trained.loaded.model, _batch(trained))


@torch.no_grad()
def _bare(trained: Trained) -> Tensor:
    trained.loaded.model.eval()
    return trained.task.logits(trained.loaded.model, _batch(trained))
