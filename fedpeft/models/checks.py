"""What can be wrong between a tokenizer and a model, found out before training."""

from typing import Any, Final

import torch
from torch import nn

from fedpeft.errors import BadInput
from fedpeft.models.causes import cause
from fedpeft.models.choice import ModelSection
from fedpeft.tasks import Task
from fedpeft.training.hardware import Hardware

ROLES: Final = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Special tokens that stand in texts; a family may name others, such as the place of an image."""
PADDING: Final = ("[PAD]", "<pad>", "<|pad|>")
"""Usual names of a padding token, for vocabularies that hold one and do not declare it."""


def settle_padding(tokenizer: Any, model: nn.Module, choice: ModelSection) -> tuple[str, ...]:
    """Name a padding token where the tokenizer has none, tell the model, and return what to say.

    The mask tells which tokens are padding. But heads of decoders read the last token that is not
    the padding token, so padding should be a token in which no text ends: best the end-of-text
    token, or a row of the embeddings that no token uses; else the beginning-of-text token, and at
    last the unknown token.
    """
    config: Any = model.config
    said: tuple[str, ...] = ()
    if tokenizer.pad_token_id is None and not _known_padding(tokenizer, model):
        token = tokenizer.bos_token or tokenizer.unk_token
        if token is None:
            why = "its tokenizer names no token that could fill up short texts"
            remedy = 'add "pad_token" to its tokenizer_config.json'
            raise BadInput(f"model.name = {choice.name!r}: {why}; {remedy}")
        tokenizer.pad_token = token
        said = (f"the tokenizer names no padding token: {token!r} is taken for it",)
    # Models of text and images read the configuration of their text part.
    for part in (config, config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    return said


def _known_padding(tokenizer: Any, model: nn.Module) -> bool:
    """Name a padding token in which no text ends, if one is known; return whether one is."""
    # 1. What the tokenizer declares as the end of a text.
    if tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        return True
    # 2. What the model's configuration names. One that was left as the family's default may hold
    # ids of another vocabulary.
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    for token_id in _named_by(model.config):
        if token_id in tokens:
            tokenizer.pad_token = tokens[token_id]
            return True
    # 3. A token with a usual name.
    for token in PADDING:
        if token in tokens.values():
            tokenizer.pad_token = token
            return True
    # 4. A new token, in a row beyond a vocabulary without gaps: it gets the first free row.
    rows = embedding_rows(model)
    if rows is not None and len(tokens) == max(tokens) + 1 < rows:
        tokenizer.add_special_tokens({"pad_token": PADDING[0]})
        return True
    return False


def _named_by(config: Any) -> list[int | None]:
    """Return the ids that a configuration gives to padding and to the end of a text."""
    text = config.get_text_config()
    ends = getattr(text, "eos_token_id", None)  # one id, a list of them (Llama 3), or None
    return [getattr(text, "pad_token_id", None), *(ends if isinstance(ends, list) else [ends])]


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


def embedding_rows(model: Any) -> int | None:
    """Return how many tokens have an embedding; None where there is no table of them."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # CANINE computes them from characters
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


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
