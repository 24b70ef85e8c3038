"""Tiny checkpoints of many families in folders, as a user would have them."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .builders import OWN_WORDS, VOCABULARY, write_tokenizer

LONG = 160
"""Tokens that these models take at most: more than eager attention is best for."""
WEIGHTS = "model.safetensors"

BERT: Mapping[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": LONG,
}
ROBERTA: Mapping[str, Any] = {**BERT, "max_position_embeddings": LONG + 1, "pad_token_id": 0}
LLAMA: Mapping[str, Any] = {
    **BERT,
    "num_key_value_heads": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
MARKS: Mapping[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def parts(*layers: str) -> tuple[str, ...]:
    """Return the names of the weights and biases of ``layers``."""
    return tuple(f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))


DENSE_AND_OUT = parts("classifier.dense", "classifier.out_proj")

FAMILIES: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "bert": (BERT, parts("classifier")),
    "roberta": (ROBERTA, DENSE_AND_OUT),
    "distilbert": (
        {
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": LONG,
        },
        parts("pre_classifier", "classifier"),
    ),
    "albert": ({**BERT, "embedding_size": 8}, parts("classifier")),
    "electra": ({**BERT, "embedding_size": 16}, DENSE_AND_OUT),
    "mpnet": (ROBERTA, DENSE_AND_OUT),
    "modernbert": (
        {**BERT, **MARKS, "cls_token_id": 2, "sep_token_id": 3},
        ("head.dense.weight", "head.norm.weight", *parts("classifier")),
    ),
    "deberta-v2": (
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        parts("pooler.dense", "classifier"),
    ),
    "xlnet": (
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "pad_token_id": 0},
        parts("sequence_summary.summary", "logits_proj"),
    ),
    "gpt2": (
        {**MARKS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LONG},
        ("score.weight",),
    ),
    "llama": (LLAMA, ("score.weight",)),
    "mistral": (LLAMA, ("score.weight",)),
    "qwen2": (LLAMA, ("score.weight",)),
    "t5": (
        {
            **MARKS,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        parts("classification_head.dense", "classification_head.out_proj"),
    ),
}
"""Configuration of a tiny one, and the names of its task's output module."""


def configuration(family: str, rows: int = len(VOCABULARY) + 8, **changes: Any) -> Any:
    """Return the configuration of a tiny model with ``rows`` embeddings."""
    settings, _ = FAMILIES[family]
    return AutoConfig.for_model(family, **{**settings, "vocab_size": rows, **changes})


def write(folder: Path, family: str, special: bool = True, **changes: Any) -> Path:
    """Save a base model without a head, as a pre-trained one comes, and a tokenizer."""
    return _write(folder, AutoModel.from_config, configuration(family, **changes), special)


def write_classifier(
    folder: Path,
    family: str,
    labels: tuple[str, ...],
    auto: Any = AutoModelForSequenceClassification,
    **changes: Any,
) -> Path:
    """Save a fine-tuned classifier that calls its labels so, in this order.

    ``auto``: the class of transformers for its task.
    """
    names = dict(enumerate(labels))
    rows = {name: row for row, name in names.items()}
    config = configuration(family, id2label=names, label2id=rows, **changes)
    return _write(folder, auto.from_config, config)


def _write(folder: Path, make: Callable[[Any], Any], config: Any, special: bool = True) -> Path:
    save(folder, make, config)
    write_tokenizer(folder, special)
    return folder


def save(folder: Path, make: Callable[[Any], Any], config: Any) -> None:
    """Save a model that ``make`` makes of ``config``, every parameter off its starting value."""
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(1)
        model = make(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder)


def rename(folder: Path, new: Callable[[str], str | None]) -> None:
    """Save the weights of ``folder`` under the names that ``new`` makes; None leaves one out."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        key = new(name)
        if key is not None:
            renamed[key] = tensor
    save_file(renamed, folder / WEIGHTS, {"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one out."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def write_sentencepiece(folder: Path, name: str, **pieces: Any) -> None:
    """Put a SentencePiece model of the examples' words in the place of the tokenizer."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    words = [word for own in OWN_WORDS.values() for word in own]
    sentences = [f"{one} {other}" for one in words for other in words]
    model = io.BytesIO()
    train: Any = sentencepiece.SentencePieceTrainer.train
    train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=48,
        hard_vocab_limit=False,
        minloglevel=2,
        **pieces,
    )
    (folder / name).write_bytes(model.getvalue())


def copied(folder: Path, to: Path) -> Path:
    """Return a copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(folder, to))
