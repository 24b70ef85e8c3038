"""Whatever model a user names: it loads and fits, or one line says why not, before training."""

import builtins
import importlib.util
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    dynamic_module_utils,
)
from transformers.utils import import_utils

from fedpeft.errors import BadInput
from fedpeft.models import Loaded, ModelSection, causes, kernels, load, locate
from fedpeft.seeds import derive
from fedpeft.tasks import Classification, Tagging, Task, TaskSection, make_task
from fedpeft.training.hardware import Hardware, Machine, resolve

from . import zoo
from .builders import VOCABULARY, Ground, cli_call, refused
from .reading import SHORT, about, evaluations

pytestmark = pytest.mark.usefixtures("no_figures")

CPU = Hardware("cpu", "fp32", "eager", 1)
ANIMALS = ("ant", "mole", "zebra")
TASK = Classification(ANIMALS, 16)
SEED = 5


def opened(folder: Path, labels: tuple[str, ...] = ANIMALS, **choice: Any) -> Loaded:
    """Return what ``load`` makes of a folder."""
    section = ModelSection(str(folder), **{"max_length": 16, **choice})
    return load(section, Classification(labels, section.max_length), CPU, SEED)


def refusal(folder: Path, *needles: str, **choice: Any) -> BadInput:
    """Assert that a folder is refused in one line that holds ``needles``; return the error."""
    with pytest.raises(BadInput) as caught:
        opened(folder, **choice)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"model.name = {str(folder)!r}: ")
    for needle in needles:
        assert needle in line
    return caught.value


def sets(*assignments: str) -> list[str | Path]:
    """Return the options that set fields."""
    return [word for assignment in assignments for word in ("--set", assignment)]


def says(loaded: Loaded, texts: list[str], labels: tuple[str, ...] = ANIMALS) -> Tensor:
    """Return the logits of ``texts``, all in one batch."""
    task = Classification(labels, 16, tokenizer=loaded.tokenizer)
    examples = task.encode(task.unanswered(texts))
    with torch.no_grad():
        return task.logits(loaded.model, task.collate(examples, torch.device("cpu")))


# The head


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_head_is_the_output_module_and_is_drawn_as_transformers_does(
    tmp_path: Path,
    family: str,
) -> None:
    """Compared with transformers' own loading under the head's seed."""
    loaded = opened(zoo.write(tmp_path / family, family))
    _, head = zoo.FAMILIES[family]
    assert loaded.base.head == set(head)
    assert loaded.notes == ()
    torch.manual_seed(derive(SEED, "head"))
    folder, size = tmp_path / family, len(ANIMALS)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=size)
    for name, parameter in plain.named_parameters():
        assert torch.equal(loaded.base.parameters[name], parameter), name


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_a_head_that_knows_the_labels_goes_on_with_its_rows_in_their_order(
    tmp_path: Path,
    family: str,
) -> None:
    """By label names, the logits are those of the checkpoint itself."""
    theirs = ("zebra", "mole", "ant")
    folder = zoo.write_classifier(tmp_path / "tuned", family, theirs)
    loaded = opened(folder)
    assert loaded.base.head == set(zoo.FAMILIES[family][1])
    [note] = loaded.notes
    assert "trained further" in note
    text = "birds0 word1 fish1"
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = loaded.tokenizer([text], return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    expected = plain(input_ids=ids, attention_mask=mask).logits.detach()
    torch.testing.assert_close(says(loaded, [text])[:, [2, 1, 0]], expected)
    assert loaded.model.config.id2label == dict(enumerate(ANIMALS))  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("theirs", "needle"),
    [
        (("cold", "hot"), "2 labels (cold, hot)"),
        (("cold", "hot", "mild"), "3 labels (cold, hot, mild)"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), "3 labels (LABEL_0, LABEL_1, LABEL_2)"),
    ],
    ids=["another size", "other names", "no names"],
)
def test_rows_for_other_labels_are_drawn_as_if_there_were_none(
    tmp_path: Path, family: str, theirs: tuple[str, ...], needle: str
) -> None:
    """Compared with the same checkpoint without them; what else the head has is kept."""
    folder = zoo.write_classifier(tmp_path / "tuned", family, theirs)
    bare = zoo.copied(folder, tmp_path / "bare")
    head = zoo.FAMILIES[family][1]
    zoo.rename(bare, lambda name: None if name in head[-2:] else name)
    loaded, expected = opened(folder), opened(bare)
    [note] = loaded.notes
    assert needle in note
    assert "drawn anew" in note
    assert expected.notes == ()
    assert loaded.base.head == expected.base.head == set(head)
    for name, parameter in expected.base.parameters.items():
        assert torch.equal(loaded.base.parameters[name], parameter), name
    assert loaded.digest == expected.digest


TAGS = ("O", "B-LOC", "I-LOC")
TAGGING = Tagging(TAGS, 16)
ANSWERING = make_task(TaskSection(kind="qa"), (), 16)


def opened_for(folder: Path, task: Task) -> Loaded:
    return load(ModelSection(str(folder), max_length=16), task, CPU, SEED)


def raw(model: Any, ids: Tensor) -> Any:
    """Return what a model says of ids without padding."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama", "t5"])
def test_a_tagger_that_knows_the_tags_goes_on_with_its_rows_in_their_order(
    tmp_path: Path, family: str
) -> None:
    theirs = ("I-LOC", "O", "B-LOC")
    folder = tmp_path / "tuned"
    zoo.write_classifier(folder, family, theirs, AutoModelForTokenClassification)
    loaded = opened_for(folder, TAGGING)
    [note] = loaded.notes
    assert "trained further" in note
    plain = AutoModelForTokenClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 9, 3]])
    ours, expected = raw(loaded.model, ids).logits, raw(plain, ids).logits
    torch.testing.assert_close(ours[..., [2, 0, 1]], expected)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize(
    ("theirs", "auto", "needle"),
    [
        (("O", "B-PER", "I-PER"), AutoModelForTokenClassification, "3 labels (O, B-PER, I-PER)"),
        (("O", "LOC"), AutoModelForTokenClassification, "2 labels (O, LOC)"),
        (TAGS, AutoModelForSequenceClassification, "ForSequenceClassification"),
    ],
    ids=["other names", "another size", "another task"],
)
def test_rows_for_other_tags_are_drawn_as_if_there_were_none(
    tmp_path: Path, family: str, theirs: tuple[str, ...], auto: Any, needle: str
) -> None:
    """The text classifiers of Llamas have no bias, their taggers one: of a row only a part is there."""
    folder = zoo.write_classifier(tmp_path / "tuned", family, theirs, auto)
    bare = zoo.copied(folder, tmp_path / "bare")
    last = zoo.parts("score" if family == "llama" else "classifier")
    zoo.rename(bare, lambda name: None if name in last else name)
    loaded, expected = opened_for(folder, TAGGING), opened_for(bare, TAGGING)
    [note] = loaded.notes
    assert needle in note
    assert "drawn anew" in note
    assert expected.notes == ()
    assert loaded.base.head == expected.base.head
    for name, parameter in expected.base.parameters.items():
        assert torch.equal(loaded.base.parameters[name], parameter), name
    assert loaded.digest == expected.digest


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama", "t5"])
def test_a_model_that_answers_questions_keeps_its_start_and_end(
    tmp_path: Path, family: str
) -> None:
    folder = tmp_path / "tuned"
    zoo.write_classifier(folder, family, ("LABEL_0", "LABEL_1"), AutoModelForQuestionAnswering)
    loaded = opened_for(folder, ANSWERING)
    [note] = loaded.notes
    assert "trained further" in note
    plain = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 3, 9, 3]])
    ours, expected = raw(loaded.model, ids), raw(plain, ids)
    torch.testing.assert_close(ours.start_logits, expected.start_logits)
    torch.testing.assert_close(ours.end_logits, expected.end_logits)


@pytest.mark.parametrize("labels", [("cold", "hot"), ("cold", "hot", "mild")])
def test_the_head_of_another_task_does_not_answer_questions(
    tmp_path: Path, labels: tuple[str, ...]
) -> None:
    """ModernBERT's heads are called alike in all tasks."""
    folder = zoo.write_classifier(tmp_path / "tuned", "modernbert", labels)
    kept = load_file(folder / zoo.WEIGHTS)["classifier.weight"]
    loaded = opened_for(folder, ANSWERING)
    [note] = loaded.notes
    assert "drawn anew" in note
    drawn = loaded.base.parameters["classifier.weight"]
    assert drawn.shape == (2, kept.shape[1])
    assert not torch.equal(drawn, kept[:2])


def test_a_head_without_names_goes_on_where_the_data_has_none_either(tmp_path: Path) -> None:
    names = ("LABEL_0", "LABEL_1", "LABEL_2")
    folder = zoo.write_classifier(tmp_path / "tuned", "bert", names)
    loaded = opened(folder, names)
    kept = AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
    assert torch.equal(loaded.base.parameters["classifier.weight"], kept)


def test_the_digest_tells_checkpoints_with_other_heads_apart_but_not_seeds(tmp_path: Path) -> None:
    """By it a run that goes on knows its model again: all that the checkpoint gave counts."""
    folder = zoo.write_classifier(tmp_path / "tuned", "bert", ANIMALS)
    other = zoo.copied(folder, tmp_path / "other")
    weights = load_file(other / zoo.WEIGHTS)
    weights["classifier.bias"] += 1
    save_file(weights, other / zoo.WEIGHTS, {"format": "pt"})
    assert opened(folder).digest != opened(other).digest
    bare = zoo.write(tmp_path / "bare", "bert")
    choice = ModelSection(str(bare), max_length=16)
    one, another = (load(choice, TASK, CPU, seed) for seed in (1, 2))
    assert one.digest == another.digest
    name = "classifier.weight"
    assert not torch.equal(one.base.parameters[name], another.base.parameters[name])


def test_a_run_says_what_becomes_of_the_checkpoints_head(
    ground: Ground,
    runs: Path,
    tmp_path: Path,
) -> None:
    model = zoo.write_classifier(tmp_path / "tuned", "bert", ("cold", "hot"))
    outcome = cli_call("run", ground.config, "--runs", runs, *SHORT, "--set", f"model.name={model}")
    assert outcome.code == 0, outcome
    [line] = [line for line in outcome.out.splitlines() if "model.name" in line]
    assert "drawn anew" in line


# What a checkpoint must hold


def test_a_checkpoint_whose_names_have_a_prefix_is_refused(
    ground: Ground,
    runs: Path,
    tmp_path: Path,
) -> None:
    folder = zoo.write(tmp_path / "wrapped", "bert")
    own = len(load_file(folder / zoo.WEIGHTS))
    zoo.rename(folder, lambda name: f"module.wrapped.{name}")
    count = f"{own} of the base model's {own} parameters"
    needles = (count, "bert.embeddings", "module.wrapped", "prefix")
    for method in ("full", "lora"):
        options = ("--set", f"model.name={folder}", "--set", f"method.name={method}")
        refused(cli_call("run", ground.config, "--runs", runs, *options), *needles)
    assert not runs.exists()


def test_a_checkpoint_without_some_blocks_is_refused(tmp_path: Path) -> None:
    folder = zoo.write(tmp_path / "half", "bert")
    names = load_file(folder / zoo.WEIGHTS)
    lost = [name for name in names if "layer.1." in name]
    zoo.rename(folder, lambda name: None if name in lost else name)
    count = f"{len(lost)} of the base model's {len(names)} parameters"
    refusal(folder, count, "bert.encoder.layer.1.", "prefix")


def test_a_checkpoint_without_a_pooler_is_said_and_the_pooler_trained(tmp_path: Path) -> None:
    """A checkpoint of a masked language model has none."""
    folder = zoo.write(tmp_path / "masked", "bert")
    zoo.rename(folder, lambda name: None if "pooler" in name else name)
    loaded = opened(folder)
    [note] = loaded.notes
    assert "bert.pooler.dense.weight" in note
    layers = ("bert.pooler.dense", "classifier")
    assert loaded.base.head == set(zoo.parts(*layers))


# Tokens


def test_a_tokenizer_with_tokens_that_have_no_embedding_is_refused(
    ground: Ground,
    runs: Path,
    tmp_path: Path,
) -> None:
    folder = zoo.write(tmp_path / "grown", "bert", rows=len(VOCABULARY))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["new", "newer"])
    tokenizer.save_pretrained(folder)
    sizes = (f"{len(VOCABULARY) + 2} tokens", f"{len(VOCABULARY)} rows", "'new'")
    refused(cli_call("run", ground.config, "--runs", runs, "--set", f"model.name={folder}"), *sizes)
    assert not runs.exists()


def test_a_padding_token_that_has_no_embedding_is_refused(tmp_path: Path) -> None:
    folder = zoo.write(tmp_path / "padded", "gpt2", rows=len(VOCABULARY))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    refusal(folder, f"{len(VOCABULARY) + 1} tokens", f"{len(VOCABULARY)} rows", "'<pad>'")


def test_a_mark_that_stands_for_no_text_needs_no_embedding(tmp_path: Path) -> None:
    """Gemma 3 has one for images; a text that spells it is read as any other."""
    folder = zoo.write(tmp_path / "seeing", "gpt2", rows=len(VOCABULARY))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<img>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    zoo.edit(folder / "tokenizer_config.json", image_token="<img>")
    loaded = opened(folder)
    assert len(loaded.tokenizer) == len(VOCABULARY) + 1
    says(loaded, ["word1 <img> word2"])


NAMELESS: Mapping[str, tuple[str, int | None, int, str]] = {
    "by the configuration": ("zero", 2, 0, "[CLS]"),
    "by its usual name": ("[PAD]", None, 0, "[PAD]"),
    "in a row that is free": ("zero", None, 1, "[PAD]"),
    "as the unknown token": ("zero", None, 0, "[UNK]"),
}
"""What token 0 is called, the configuration's end of text, rows to spare, and what pads then."""


@pytest.mark.parametrize(("first", "end", "spare", "padding"), NAMELESS.values(), ids=NAMELESS)
def test_a_tokenizer_that_names_no_padding_gets_some_that_is_not_read(
    tmp_path: Path, first: str, end: int | None, spare: int, padding: str
) -> None:
    """Compared with the scores of the last hidden state of each text alone, computed here."""
    rows = len(VOCABULARY) + spare
    numbers: Mapping[str, Any] = {"eos_token_id": end, "pad_token_id": None, "rows": rows}
    folder = zoo.write(tmp_path / "nameless", "gpt2", special=False, **numbers)
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(words.replace("[PAD]", first))
    zoo.edit(folder / "tokenizer_config.json", eos_token=None)
    loaded = opened(folder)
    assert loaded.tokenizer.pad_token == padding
    assert len(loaded.notes) == (padding == "[UNK]")
    texts = ["birds0 word1", "fish1 word2 word3 word4 word5 word6"]
    model: Any = loaded.model
    for text, logits in zip(texts, says(loaded, texts), strict=True):
        ids = torch.tensor(loaded.tokenizer([text])["input_ids"])
        hidden = model.transformer(ids).last_hidden_state
        torch.testing.assert_close(logits, model.score(hidden[0, -1]), rtol=1e-4, atol=1e-6)


def test_a_tokenizer_that_names_no_token_at_all_is_refused(tmp_path: Path) -> None:
    numbers: Mapping[str, Any] = {
        "eos_token_id": None,
        "pad_token_id": None,
        "rows": len(VOCABULARY),
    }
    folder = zoo.write(tmp_path / "mute", "gpt2", special=False, **numbers)
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(words.replace("[PAD]", "zero"))
    zoo.edit(folder / "tokenizer_config.json", eos_token=None, unk_token=None)
    refusal(folder, "pad_token", "tokenizer_config.json")


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_padding_is_not_read(tmp_path: Path, family: str) -> None:
    """XLNet's head reads the last position, which in a batch padded on the right is padding."""
    loaded = opened(zoo.write(tmp_path / family, family))
    short, long = "birds0 word1", "fish1 word2 word3 word4 word5 word6"
    alone, together = says(loaded, [short]), says(loaded, [short, long])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_head_that_reads_the_end_of_text_finds_one_in_every_text(tmp_path: Path) -> None:
    """T5's wants equally many in each: long texts are cut, and some spell the mark."""
    folder = zoo.write(tmp_path / "t5", "t5")
    zoo.edit(folder / "tokenizer_config.json", eos_token="[SEP]")
    loaded = opened(folder)
    texts = ["word1 " * 50, "birds0", "fish1 [SEP] word2", ""]
    ids = loaded.tokenizer(texts, truncation=True, max_length=16)["input_ids"]
    end = loaded.model.config.eos_token_id  # type: ignore[union-attr]
    assert [row.count(end) for row in ids] == [1] * len(texts)
    assert max(map(len, ids)) == 16
    assert says(loaded, texts).shape == (len(texts), len(ANIMALS))


def test_a_head_that_reads_the_end_of_text_without_one_is_refused(tmp_path: Path) -> None:
    folder = zoo.write(tmp_path / "t5", "t5", eos_token_id=100)
    refusal(folder, "cannot read a text", "<eos>")


def test_a_t5_trains_and_scores_one_client_at_a_time(
    ground: Ground,
    runs: Path,
    tmp_path: Path,
) -> None:
    model = zoo.write(tmp_path / "t5", "t5")
    options = ("--set", f"model.name={model}", "--set", "engine.stack=1")
    outcome = cli_call("run", ground.config, "--runs", runs, *SHORT, *options)
    assert outcome.code == 0, outcome
    assert evaluations(runs / "tiny")[-1].metrics["accuracy"] >= 0


def test_a_family_without_a_limit_takes_texts_of_any_length(tmp_path: Path) -> None:
    """XLNet's configuration says -1 positions."""
    folder = zoo.write(tmp_path / "xlnet", "xlnet")
    assert opened(folder, max_length=100_000).tokenizer.model_max_length == 100_000


# The attention kernel


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_kernels_of_a_family_are_those_that_transformers_builds(
    tmp_path: Path,
    family: str,
) -> None:
    folder = zoo.write(tmp_path / family, family)
    found = []
    for kernel in ("eager", "sdpa"):
        try:
            AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=kernel)
            found.append(kernel)
        except ValueError:
            pass
    assert list(kernels(ModelSection(str(folder)), TASK)) == found


def test_the_kernel_is_the_fastest_that_the_model_has() -> None:
    machine = Machine(device="cpu", precision="fp32")
    assert resolve(machine, 64).attention == "eager"
    assert resolve(machine, 140).attention == "sdpa"
    assert resolve(machine, 140, ("eager",)).attention == "eager"


@pytest.mark.parametrize("family", ["deberta-v2", "mpnet", "xlnet"])
def test_long_texts_train_on_families_without_the_fused_kernel(
    ground: Ground,
    runs: Path,
    tmp_path: Path,
    family: str,
) -> None:
    model = zoo.write(tmp_path / family, family)
    settings = (f"model.name={model}", "model.max_length=140", "method.targets=all-linear")
    command = ("run", ground.config, "--runs", runs, *SHORT, *sets(*settings))
    outcome = cli_call(*command, "--set", "machine.attention=sdpa")
    refused(outcome, "machine.attention = 'sdpa'", "'eager'")
    outcome = cli_call(*command, "--set", "machine.attention=auto")
    assert outcome.code == 0, outcome
    assert about(runs / "tiny").resolved["attention"] == "eager"


# SentencePiece


BERT_PIECES: Mapping[str, Any] = {
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "pad_piece": "[PAD]",
    "bos_piece": "[CLS]",
    "eos_piece": "[SEP]",
    "unk_piece": "[UNK]",
}
ALBERT_PIECES: Mapping[str, Any] = {
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": -1,
    "eos_id": -1,
    "control_symbols": "[CLS],[SEP],[MASK]",
}
PIECES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "deberta-v2": ("spm.model", BERT_PIECES),
    "albert": ("spiece.model", ALBERT_PIECES),
    "t5": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "xlm-roberta": ("sentencepiece.bpe.model", {}),
}


def write_pieces(folder: Path, family: str) -> Path:
    """Save a model with a SentencePiece model alone for a tokenizer, as some were published."""
    name, pieces = PIECES[family]
    if family == "t5":
        zoo.write(folder, family, eos_token_id=1)
    elif family == "xlm-roberta":  # a RoBERTa in all but its tokenizer
        zoo.write(folder, "roberta", pad_token_id=1)
        zoo.edit(folder / "config.json", model_type=family)
    else:
        zoo.write(folder, family)
    zoo.write_sentencepiece(folder, name, **pieces)
    return folder


@pytest.mark.parametrize("family", PIECES)
def test_a_sentencepiece_model_is_tokenizer_enough(tmp_path: Path, family: str) -> None:
    loaded = opened(write_pieces(tmp_path / family, family))
    text = "birds0 fish1 trees0"
    [ids] = loaded.tokenizer([text])["input_ids"]
    assert loaded.tokenizer.unk_token_id not in ids
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert says(loaded, [text]).shape == (1, len(ANIMALS))


def test_a_sentencepiece_model_without_its_package_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it were not installed: transformers looks it up in a table of its own."""
    folder = write_pieces(tmp_path / "pieces", "deberta-v2")
    _, words = import_utils.BACKENDS_MAPPING["sentencepiece"]
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "sentencepiece", (lambda: False, words))
    real = importlib.util.find_spec
    gone = "sentencepiece"
    monkeypatch.setattr(causes, "find_spec", lambda name: None if name == gone else real(name))
    line = str(refusal(folder, "SentencePiece"))
    assert line.endswith("pip install sentencepiece")


# Code that a model brings along

CONFIGURATION = """
from pathlib import Path
from transformers import BertConfig
Path({mark!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own-family"
"""
MODELLING = """
from transformers import BertForSequenceClassification
from .configuration_own import OwnConfig
class OwnClassifier(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that needs Python files of its own, which leave a mark when they run."""
    folder = zoo.write(tmp_path / "foreign", "bert")
    code = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForSequenceClassification": "modeling_own.OwnClassifier",
    }
    zoo.edit(folder / "config.json", model_type="own-family", auto_map=code)
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(mark=str(tmp_path / "ran")))
    (folder / "modeling_own.py").write_text(MODELLING)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def ask(_: str = "") -> str:
        pytest.fail("a question in the middle of a command")

    monkeypatch.setattr(builtins, "input", ask)
    return folder


def test_code_that_a_model_brings_along_is_never_run_unasked(
    ground: Ground,
    runs: Path,
    foreign: Path,
) -> None:
    outcome = cli_call("run", ground.config, "--runs", runs, "--set", f"model.name={foreign}")
    refused(outcome, "model.name", "model.trust_remote_code = true")
    assert not (foreign.parent / "ran").exists()
    assert not runs.exists()


def test_code_that_a_model_brings_along_runs_where_it_is_trusted(foreign: Path) -> None:
    trusted = ModelSection(str(foreign), trust_remote_code=True)
    assert kernels(trusted, TASK) == ("eager", "sdpa")
    loaded = opened(foreign, trust_remote_code=True)
    assert (foreign.parent / "ran").exists()
    assert type(loaded.model).__name__ == "OwnClassifier"
    assert loaded.base.head == {"classifier.weight", "classifier.bias"}


def test_a_family_that_transformers_knows_needs_no_code_of_its_own(foreign: Path) -> None:
    zoo.edit(foreign / "config.json", model_type="bert")
    assert type(opened(foreign).model).__name__ == "BertForSequenceClassification"
    assert not (foreign.parent / "ran").exists()


# The hub


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A hub to which no connection comes about, and a cache of its own; returns the attempts."""
    attempts: list[object] = []

    def connect(_: object, address: object) -> None:
        attempts.append(address)
        raise ConnectionRefusedError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", connect)
    return attempts


def test_a_hub_that_cannot_be_reached_is_tried_once(
    ground: Ground,
    runs: Path,
    unreachable: list[object],
) -> None:
    outcome = cli_call("run", ground.config, "--runs", runs, "--set", "model.name=some/model")
    refused(outcome, "model.name = 'some/model'", "http://127.0.0.1:9", "cannot be reached")
    refused(outcome, "folder", "'minilm'")
    assert len(unreachable) == 1
    assert not runs.exists()


def test_a_model_that_was_fetched_before_needs_no_hub(
    tmp_path: Path,
    unreachable: list[object],
) -> None:
    kept = tmp_path / "hub" / "models--some--model"
    zoo.write(kept / "snapshots" / "c0ffee", "bert")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("c0ffee")
    loaded = load(ModelSection("some/model", max_length=16), TASK, CPU, SEED)
    assert loaded.digest == opened(kept / "snapshots" / "c0ffee").digest
    assert len(unreachable) == 1


def test_names_are_folders_or_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert locate("~/mine") == str(tmp_path / "mine")
    assert locate("bert-base-uncased") == "bert-base-uncased"
    assert locate("microsoft/deberta-v3-base") == "microsoft/deberta-v3-base"
    for name in ("./mine", "~/yours", "models/of/mine"):
        with pytest.raises(BadInput, match="no such folder"):
            locate(name)


# Whatever the libraries say


@dataclass(frozen=True)
class Damage:
    """What is wrong with a folder, and what the line must hold."""

    do: Callable[[Path], object]
    says: tuple[str, ...]


def settings(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: zoo.edit(folder / "config.json", **changes)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def another_tokenizer(folder: Path) -> None:
    """As a newer version of tokenizers would write it."""
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "model": {**tree["model"], "type": "FutureLevel"}}))


def pickled(folder: Path) -> None:
    (folder / zoo.WEIGHTS).rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / zoo.WEIGHTS).unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


POINTER = "version https://git-lfs.github.com/spec/v1"
DAMAGES: Mapping[str, Damage] = {
    "no configuration": Damage(gone("config.json"), ("no config.json",)),
    "a configuration that is no JSON": Damage(text("config.json", "{"), ("configuration", "JSON")),
    "a family that is not known": Damage(settings(model_type="martian"), ("martian",)),
    "a family of another kind": Damage(settings(model_type="vit"), ("ViTConfig",)),
    "an activation that is not known": Damage(settings(hidden_act="gulu"), ("KeyError", "gulu")),
    "a setting of a wrong type": Damage(settings(hidden_size="big"), ("hidden_size", "'big'")),
    "heads that do not divide": Damage(settings(num_attention_heads=5), ("weights", "(5)")),
    "another width than the weights": Damage(settings(hidden_size=24), ("24 by", "16 in")),
    "no weights": Damage(gone(zoo.WEIGHTS), ("weights", zoo.WEIGHTS)),
    "empty weights": Damage(text(zoo.WEIGHTS, ""), ("weights", "header")),
    "weights left on a server": Damage(text(zoo.WEIGHTS, POINTER), ("weights", "header")),
    "weights that are no pickle": Damage(pickled, ("weights",)),
    "a tokenizer that is no JSON": Damage(text("tokenizer.json", "{"), ("tokenizer", "line 1")),
    "a tokenizer of another version": Damage(another_tokenizer, ("tokenizers", "ModelUntagged")),
    "a quantization that is not installed": Damage(
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("bitsandbytes",),
    ),
    "an adapter": Damage(adapter, ("adapter of 'some/base'", "--merge")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_whatever_fails_is_one_line_with_its_cause(tmp_path: Path, damage: Damage) -> None:
    folder = zoo.write(tmp_path / "model", "bert")
    damage.do(folder)
    refusal(folder, *damage.says)


def test_the_error_of_the_library_is_kept_for_those_who_ask(
    ground: Ground,
    runs: Path,
    tmp_path: Path,
) -> None:
    folder = zoo.write(tmp_path / "odd", "bert")
    another_tokenizer(folder)
    assert refusal(folder).__cause__ is not None
    command = ("run", ground.config, "--runs", runs, "--set", f"model.name={folder}")
    refused(cli_call(*command))
    outcome = cli_call(*command, "--debug")
    assert outcome.code == 2
    assert "ModelUntagged" in outcome.err.splitlines()[-1]
    assert outcome.err.count("Traceback") == 2
