"""Tiny models of every family that is promised to work, made from their configurations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedpeft.federation.client import ClientData, Worker
from fedpeft.models import spare_last_block
from fedpeft.seeds import generator
from fedpeft.training.loop import Training
from fedpeft.types import Method
from tests.tiny import CONFIG, CPU, SEED, TASK, encoded, shaken

BERT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
COMMON: dict[str, Any] = {
    "max_position_embeddings": 24,
    "num_labels": 3,
    "attn_implementation": "eager",
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL: dict[str, Any] = {
    "vocab_size": 60,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 60,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 24,
    "num_labels": 3,
    "pad_token_id": 0,
}
GPT2_PLAIN: dict[str, Any] = {
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_implementation": "eager",
}


_LLAMA: Callable[[LlamaConfig], nn.Module] = (
    LlamaForSequenceClassification  # its __init__ is untyped
)


@dataclass(frozen=True)
class Family:
    """How to make one, its head, and how many dense layers ``attention`` and ``all-linear`` choose."""

    build: Callable[[], nn.Module]
    head: frozenset[str]
    attention: int
    linear: int


FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        lambda: BertForSequenceClassification(BertConfig(**BERT, **COMMON, **NO_DROPOUT)),
        frozenset({"classifier.weight", "classifier.bias"}),
        8,
        13,
    ),
    "roberta": Family(
        lambda: RobertaForSequenceClassification(RobertaConfig(**BERT, **COMMON, **NO_DROPOUT)),
        frozenset(
            f"classifier.{layer}.{part}"
            for layer in ("dense", "out_proj")
            for part in ("weight", "bias")
        ),
        8,
        12,
    ),
    "albert": Family(
        lambda: AlbertForSequenceClassification(
            AlbertConfig(
                **BERT, **COMMON, **NO_DROPOUT, embedding_size=8, classifier_dropout_prob=0.0
            )
        ),
        frozenset({"classifier.weight", "classifier.bias"}),
        4,
        8,
    ),
    "distilbert": Family(
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(**DISTIL, **COMMON, seq_classif_dropout=0.0)
        ),
        frozenset(
            f"{layer}.{part}"
            for layer in ("pre_classifier", "classifier")
            for part in ("weight", "bias")
        ),
        8,
        12,
    ),
    "gpt2": Family(
        lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, **GPT2_PLAIN)),
        frozenset({"score.weight"}),
        4,
        8,
    ),
    "llama": Family(
        lambda: _LLAMA(LlamaConfig(**BERT, **COMMON, num_key_value_heads=1, pad_token_id=0)),
        frozenset({"score.weight"}),
        8,
        14,
    ),
}


def family(name: str) -> nn.Module:
    """Return a frozen tiny model of a family."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return shaken(FAMILIES[name].build())


def says(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a model's logits."""
    call: Any = model
    with torch.no_grad():
        logits: Tensor = call(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def played(
    name: str, method: Method, sizes: Mapping[int, int], training: Training, **changes: Any
) -> Worker:
    """Return a worker on a tiny model of a family whose clients hold ``sizes`` random texts of 3 to 10 tokens."""
    held = {}
    for client, size in sizes.items():
        draw = generator(3, "played", client)
        lengths = torch.randint(3, 11, (size,), generator=draw).tolist()
        ids = [torch.randint(1, 60, (length,), generator=draw) for length in lengths]
        own = encoded(ids, torch.randint(0, 3, (size,), generator=draw).tolist())
        held[client] = ClientData(own, own)
    model = family(name)
    spare_last_block(model)
    whole = Worker(
        method=method,
        model=model,
        task=TASK,
        client_data=held,
        training=training,
        hardware=CPU,
        head=FAMILIES[name].head,
        seed=SEED,
        config=CONFIG,
    )
    return replace(whole, **changes)


def texts(count: int, length: int = 7) -> Tensor:
    """Return (count, length) random token ids."""
    return torch.randint(1, 60, (count, length), generator=generator(3, "texts"))
