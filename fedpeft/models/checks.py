"""What does not fit between a tokenizer and a model is refused before training."""

from typing import Any, Final

import torch
from torch import nn

from fedpeft.errors import BadInput
from fedpeft.models.causes import cause
from fedpeft.models.choice import ModelSection
from fedpeft.models.padding import embedding_rows
from fedpeft.tasks import Task
from fedpeft.training.hardware import Hardware

ROLES: Final = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Special tokens that stand in texts; a family may name others, such as the place of an image."""


def check_vocabulary(tokenizer: Any, model: nn.Module, choice: ModelSection) -> None:
    """Raise BadInput where the tokenizer has tokens beyond the rows of the embeddings.

    Special tokens that stand for no text, such as that of an image (Gemma 3), may be beyond: a text
    that spells one is then split like any other word.
    """
    rows = embedding_rows(model)
    if rows is None:
        return  # no table, so no token is beyond it
    token_ids = tokenizer.get_vocab()
    beyond: set[str] = set()
    for token, token_id in token_ids.items():
        if token_id >= rows:
            beyond.add(token)
    not_text: set[str] = set()
    for role, token in tokenizer.special_tokens_map.items():
        if role not in ROLES:
            not_text.add(token)
    if beyond and beyond <= not_text:
        tokenizer.split_special_tokens = True
    elif beyond:
        num_tokens = max(token_ids.values()) + 1
        sizes = f"its tokenizer has {num_tokens} tokens, its embeddings {rows} rows"
        first = min(beyond - not_text, key=token_ids.__getitem__)
        remedy = "resize the embeddings and save both, or take the tokenizer of the model"
        raise BadInput(f"model.name = {choice.name!r}: {sizes} ({first!r} has none); {remedy}")


def check_lengths(tokenizer: Any, model: nn.Module, choice: ModelSection) -> None:
    """Raise BadInput for a length above the model's, or without room beside special tokens."""
    longest = _longest(tokenizer, model)
    marks = tokenizer.num_special_tokens_to_add()
    asked = f"model.max_length = {choice.max_length}: {choice.name}"
    if choice.max_length > longest:
        raise BadInput(f"{asked} takes at most {longest} tokens")
    if choice.max_length <= marks:
        raise BadInput(f"{asked} adds {marks} marks of its own; choose {marks + 1} or more")
    tokenizer.model_max_length = choice.max_length  # an exported tokenizer cuts where training did


def try_out(
    task: Task,
    model: nn.Module,
    hardware: Hardware,
    choice: ModelSection,
) -> None:
    """Raise BadInput where the model does not fit the task, as two short texts show."""
    try:
        with torch.no_grad(), hardware.computing(model), hardware.autocast():
            why = task.trial(model, hardware.torch_device)
    except Exception as error:  # whatever the code of a family raises
        unread = f"it cannot read a text: {cause(error)}"
        raise BadInput(f"model.name = {choice.name!r}: {unread}") from error
    if why:
        raise BadInput(f"model.name = {choice.name!r}: {why}")


def _longest(tokenizer: Any, model: nn.Module) -> int:
    """Return how many tokens of a text the model takes, special tokens included."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    limit: int = tokenizer.model_max_length
    if positions is None or positions < 1:  # XLNet says -1: none
        return limit
    # RoBERTa counts positions from its padding index + 1: 514 rows take 512 tokens.
    for name, module in model.named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            positions -= module.padding_idx + 1
    return int(min(limit, positions))
