"""What can be wrong between a tokenizer and a model, found out before training."""

from typing import Any, Final

import torch
from torch import nn

from fedpeft.errors import BadInput
from fedpeft.models.causes import cause
from fedpeft.models.choice import ModelSection
from fedpeft.tasks import Task

ROLES: Final = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Special tokens that stand in texts; a family may name others, such as the place of an image."""
PADDING: Final = ("[PAD]", "<pad>", "<|pad|>")
"""What padding is called where a vocabulary has it and does not say so."""
TRIAL: Final = ("a", "some more words, so that the first text is padded")
"""Texts on which a model is tried."""


def settle_padding(tokenizer: Any, model: nn.Module, choice: ModelSection) -> tuple[str, ...]:
    """Name a padding token where the tokenizer has none, tell the model, and return what to say.

    A mask tells what is padding, but heads of decoders read the last token that is not the padding
    token. So it should be one that no text ends in: best the mark of the end, or a row of the
    embeddings that is nobody's; else the mark of the beginning, and at last the unknown token.
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
    for part in (config, config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    return said


def _known_padding(tokenizer: Any, model: nn.Module) -> bool:
    """Name a padding token that no text ends in, as far as one is known; say whether one is."""
    if tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        return True
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    # A configuration left as the family's default may hold numbers of another vocabulary.
    for number in _named_by(model.config):
        if number in tokens:
            tokenizer.pad_token = tokens[number]
            return True
    for token in PADDING:
        if token in tokens.values():
            tokenizer.pad_token = token
            return True
    rows = embedding_rows(model)
    if rows is not None and len(tokens) == max(tokens) + 1 < rows:
        tokenizer.add_special_tokens({"pad_token": PADDING[0]})
        return True
    return False


def _named_by(config: Any) -> list[int | None]:
    """Return the numbers that a configuration gives to padding and to the end of a text."""
    text = config.get_text_config()
    ends = getattr(text, "eos_token_id", None)
    return [getattr(text, "pad_token_id", None), *(ends if isinstance(ends, list) else [ends])]


def check_vocabulary(tokenizer: Any, model: nn.Module, choice: ModelSection) -> None:
    """Raise BadInput where the tokenizer has tokens beyond the rows of the embeddings.

    Marks that stand for no text, such as the place of an image (Gemma 3), may be beyond: text that
    spells one is then read letter by letter.
    """
    rows = embedding_rows(model)
    numbers = tokenizer.get_vocab()
    beyond = {token for token, number in numbers.items() if rows is not None and number >= rows}
    roles = tokenizer.special_tokens_map.items()
    marks = {mark for role, mark in roles if role not in ROLES}
    if beyond and beyond <= marks:
        tokenizer.split_special_tokens = True
    elif beyond:
        sizes = f"its tokenizer has {max(numbers.values()) + 1} tokens, its embeddings {rows} rows"
        first = min(beyond - marks, key=numbers.__getitem__)
        remedy = "resize the embeddings and save both, or take the tokenizer of the model"
        raise BadInput(f"model.name = {choice.name!r}: {sizes} ({first!r} has none); {remedy}")


def check_lengths(tokenizer: Any, model: nn.Module, choice: ModelSection) -> None:
    """Raise BadInput for texts longer than the model takes, or so short that all is marks."""
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
    device: torch.device,
    choice: ModelSection,
) -> None:
    """Raise BadInput where the model cannot tell the labels of two short texts."""
    texts = task.encode(task.unanswered(TRIAL))
    try:
        with torch.no_grad():
            outputs = task.predict(model, task.collate(texts, device))
    except Exception as error:  # whatever the code of a family raises
        why = f"it cannot read a text: {cause(error)}"
        raise BadInput(f"model.name = {choice.name!r}: {why}") from error
    for name, tensor in outputs.items():
        if len(tensor) != len(TRIAL) or tensor.shape[-1] != task.form.outputs:
            given = f"{tuple(tensor.shape)} {name}"
            why = f"it gives {given} for {len(TRIAL)} texts and {task.form.outputs} labels"
            raise BadInput(f"model.name = {choice.name!r}: {why}; choose a text classifier")


def embedding_rows(model: Any) -> int | None:
    """Return how many tokens have an embedding; None where there is no table of them."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # CANINE computes them from characters
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _longest(tokenizer: Any, model: nn.Module) -> int:
    """Return how many tokens of a text the model takes, marks included."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    limit: int = tokenizer.model_max_length
    if positions is None or positions < 1:  # XLNet says -1: none
        return limit
    for name, module in model.named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            positions -= module.padding_idx + 1  # RoBERTa counts positions from there
    return int(min(limit, positions))
