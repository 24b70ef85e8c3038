"""Which token fills up short texts, where the tokenizer names none."""

from typing import Any, Final

from torch import nn

from fedpeft.errors import BadInput
from fedpeft.models.choice import ModelSection

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


def embedding_rows(model: Any) -> int | None:
    """Return how many tokens have an embedding; None where there is no table of them."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # CANINE computes them from characters
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None
