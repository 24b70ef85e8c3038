"""A run on a base of 4 or 8 bits goes through the whole product; what is wrong with such settings is one line."""

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from fedpeft.experiment.build import build
from fedpeft.experiment.config import Config
from fedpeft.experiment.run import resume, start
from fedpeft.experiment.trained import Trained, open_run
from fedpeft.ledger import FILE, EvaluationRow
from fedpeft.ledger import read as ledger
from fedpeft.models import ModelSection, causes, load
from fedpeft.mounting import packed_layers, unpack_layers
from fedpeft.tasks import Classification
from fedpeft.training.hardware import Hardware
from tests.packed import kept

from . import zoo
from .builders import Ground, cli_call, examples, refused, write_gpt2
from .task_grounds import TASK_GROUNDS

TASK = Classification(("ant", "mole", "zebra"), 16)
CPU = Hardware("cpu", "fp32", "eager", 1)
TEXTS = [row["text"] for row in examples()[:12]]
METHODS: Mapping[str, Mapping[str, Any]] = {
    "federa": {"name": "federa", "rank": 3},
    "slora": {"name": "slora", "rank": 3, "stage1": 0.5},
    "fedara": {"name": "fedara", "rank": 4, "warmup": 0.0, "targets": "all-linear"},
}


@dataclass(frozen=True)
class Done:
    """A finished run: its settings and its folder."""

    config: Config
    folder: Path

    def scores(self, folder: Path | None = None) -> list[dict[str, float]]:
        rows = ledger((folder or self.folder) / FILE)
        return [dict(row.metrics) for row in rows if isinstance(row, EvaluationRow)]


def settings(bits: int, method: str, **model: Any) -> dict[str, Any]:
    return {
        "model": {"bits": bits, **model},
        "method": METHODS[method],
        "training": {"lr": 0.02, "steps": 4},
    }


@pytest.fixture(
    scope="module",
    params=[(4, "federa"), pytest.param((8, "fedara"), marks=pytest.mark.slow)],
    ids=str,
)
def done(
    request: pytest.FixtureRequest, ground: Ground, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    """A method on a base of 4 bits, and one on a base of 8."""
    bits, method = request.param
    config = ground.chosen(settings(bits, method))
    done = Done(config, tmp_path_factory.mktemp(f"bits{bits}") / "run")
    federation = build(config)
    before = kept(federation.loaded.model)
    assert packed_layers(federation.loaded.model)
    start(federation, done.folder)
    assert kept(federation.loaded.model) == before
    return done


def test_it_learns(done: Done) -> None:
    first, *_, last = done.scores()
    assert last["loss"] < 0.9 * first["loss"]


def test_it_resumes_to_the_same_bits(done: Done, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at_three(progress: Any) -> None:
        if progress.round == 3:
            raise Stop

    with pytest.raises(Stop):
        start(build(done.config), tmp_path / "run", on_progress=stop_at_three)
    resume(tmp_path / "run")
    assert done.scores(tmp_path / "run") == done.scores()


def test_it_predicts(done: Done) -> None:
    texts = ["fish0 fish1 fish0", "birds1 birds0 birds1"]
    outcome = cli_call("predict", done.folder, *texts)
    assert outcome.code == 0, outcome
    labels = [line.split()[0] for line in outcome.out.splitlines()[-2:]]
    assert labels == [label for label, *_ in open_run(done.folder).predict(texts)]
    assert labels[1] == "birds"


def our_logits(trained: Trained) -> Tensor:
    batch = batch_of(trained)
    with torch.no_grad(), trained.mounted():
        found: Tensor = trained.loaded.model(**batch).logits
    return found


def batch_of(trained: Trained) -> dict[str, Tensor]:
    made = trained.loaded.tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def test_the_adapter_says_the_same_in_peft_on_the_base_of_as_many_bits(
    done: Done, tmp_path: Path
) -> None:
    """With a base that transformers packs itself.

    Its layers of 8 bits unpack the matrix as ours do while they train; while they do not, they round their input to
    8 bits, too: with 127 steps to the largest number of a row, a product is off by about 1 %.
    """
    trained = open_run(done.folder)
    trained.export(tmp_path / "adapter")
    bits = done.config.model.bits
    auto: Any = AutoModelForSequenceClassification
    quantisation: Any = BitsAndBytesConfig
    base = auto.from_pretrained(
        done.config.model.name,
        num_labels=4,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype=torch.float32,
        quantization_config=quantisation(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["classifier", "pooler.dense"],
        ),
    )
    peft: Any = PeftModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to peft
        model = peft.from_pretrained(base, tmp_path / "adapter")
    due, batch = our_logits(trained), batch_of(trained)
    with torch.no_grad():
        for training in (True, False):
            found = model.train(training)(**batch).logits
            off = 0.03 * float(due.abs().max()) if bits == 8 and not training else 1e-5
            torch.testing.assert_close(found, due, rtol=1e-5, atol=off)


def test_what_is_merged_says_the_same_without_packing(done: Done, tmp_path: Path) -> None:
    trained = open_run(done.folder)
    trained.export(tmp_path / "merged", merge=True)
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        found = model(**batch_of(trained)).logits
    torch.testing.assert_close(found, our_logits(trained), rtol=1e-5, atol=1e-5)


def test_gpt2s_layers_are_packed_and_merged_the_way_round_it_stores_them(
    ground: Ground, tmp_path: Path
) -> None:
    """SLoRA, in its first stage: whole matrices are merged, and what it exports has no adapters yet."""
    write_gpt2(tmp_path / "gpt2")
    config = ground.chosen(
        settings(4, "slora", name=str(tmp_path / "gpt2")), {"federation": {"rounds": 2}}
    )
    start(build(config), tmp_path / "run")
    trained = open_run(tmp_path / "run")
    trained.export(tmp_path / "merged", merge=True)
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    with torch.no_grad():
        found = model(**batch_of(trained)).logits
    torch.testing.assert_close(found, our_logits(trained), rtol=1e-5, atol=1e-5)


def test_a_language_model_is_tuned_on_four_bits(ground: Ground, tmp_path: Path) -> None:
    row = TASK_GROUNDS["causal_lm"]
    tree = row.tree(tmp_path)
    short = {"federation": {"rounds": 2}, "evaluation": {"every": 1}, "training": {"lr": 0.02}}
    losses: list[list[float]] = []
    for checkpointing in (False, True):  # blocks that are computed once more unpack once more
        model = {"model": {"bits": 4, "checkpointing": checkpointing}}
        done = Done(ground.chosen(tree, short, model), tmp_path / f"run {checkpointing}")
        start(build(done.config), done.folder)
        losses.append([scores["loss"] for scores in done.scores()])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(open_run(done.folder).predict(list(row.texts))) == len(row.texts)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_computes_with_packed_layers(family: str, tmp_path: Path) -> None:
    """As with ordinary layers that hold the same matrices, and not as with the checkpoint's."""
    zoo.write(tmp_path / family, family)
    found: dict[str, Tensor] = {}
    for bits in (0, 4):
        choice = ModelSection(str(tmp_path / family), max_length=16, bits=bits)
        loaded = load(choice, TASK, CPU, seed=0)
        task = TASK.with_tokenizer(loaded.tokenizer)
        batch = task.collate(task.encode(task.unanswered(TEXTS[:2])), CPU.torch_device)
        assert bool(packed_layers(loaded.model)) == bool(bits)
        with torch.no_grad():
            found[f"{bits} bits"] = task.logits(loaded.model, batch)
            unpack_layers(loaded.model)
            found["unpacked"] = task.logits(loaded.model, batch)
    torch.testing.assert_close(found["4 bits"], found["unpacked"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["4 bits"], found["0 bits"], rtol=1e-5, atol=1e-6)


# What is refused


def test_bits_that_there_are_not(ground: Ground, runs: Path) -> None:
    call = ("run", ground.config, "--runs", runs, "--set")
    refused(cli_call(*call, "model.bits=5"), "model.bits = 5: input should be 0, 4 or 8")
    refused(cli_call(*call, "model.bits=true"), "model.bits = true")
    refused(cli_call(*call, "model.bit=4"), "did you mean 'bits'?")


def test_without_bitsandbytes(ground: Ground, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "bitsandbytes" else real(name, package)

    monkeypatch.setattr(causes, "find_spec", find_spec)
    call = ("run", ground.config, "--runs", runs, "--set", "model.bits=8")
    refused(cli_call(*call), "model.bits = 8 needs bitsandbytes", "pip install 'fedpeft[quant]'")


def test_full_fine_tuning(ground: Ground, runs: Path) -> None:
    call = ("run", ground.config, "--runs", runs, "--set", "model.bits=4")
    refused(cli_call(*call, "--set", "method={name='full'}"), "'full'", "model.bits")


def test_other_bits_are_other_weights(done: Done, ground: Ground) -> None:
    """So that a client with another base is not trained with."""
    ours = build(done.config)
    other = build(
        ground.chosen(
            settings(12 - done.config.model.bits, "federa"), {"method": done.config.method}
        )
    )
    full = build(ground.chosen(settings(0, "federa"), {"method": done.config.method}))
    digests = {one.worker.config for one in (ours, other, full)}
    assert len(digests) == 3
    assert len({one.loaded.digest for one in (ours, other, full)}) == 3
    assert build(done.config).worker.config == ours.worker.config
