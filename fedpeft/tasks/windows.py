"""Questions and contexts as windows of tokens: a long context becomes several that overlap."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fedpeft.errors import BadInput

STRIDE: Final = 128
"""Tokens that two neighbouring windows share where the settings say nothing."""
CHUNK: Final = 512
"""Rows that are tokenised at once: a tokenizer's own lists take a hundred bytes a token."""


class Window(NamedTuple):
    """A question with a part of its context, in tokens.

    ``row``: the index of the question. ``first``: the position of the first token of the context.
    ``offsets``: the characters of the context that each of its tokens stands for, (tokens, 2)
    int32, without the second. ``null``: the position that stands for no answer. ``segments``: the
    text that each token belongs to; None where the model makes no difference.
    """

    row: int
    ids: list[int]
    segments: list[int] | None
    first: int
    offsets: Tensor
    null: int


def room_of(tokenizer: Any, max_length: int) -> int:
    """Return how many tokens of ``max_length`` are left for a question and a context together."""
    return max_length - int(tokenizer.num_special_tokens_to_add(pair=True))


def windows(
    tokenizer: Any,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int,
    stride: int | None,
) -> list[Window]:
    """Return the windows of every question and its context, in their order.

    A window has at most ``max_length`` tokens, the whole question among them, and shares ``stride``
    tokens of the context with its neighbours, but no more than half of what the question leaves.
    A question that leaves nothing to the context is cut to half of the window.

    Where ``stride`` is None it is ``STRIDE``; if that is too much and a context needs several
    windows, BadInput is raised.
    """
    room = room_of(tokenizer, max_length)
    fitted = _fitted(tokenizer, [question.strip() for question in questions], room)
    # One call of the tokenizer has one overlap, so rows are grouped by theirs: mostly all in one.
    rows_by_overlap: dict[int, list[int]] = {}
    for row, (_, length) in enumerate(fitted):
        overlap = min(STRIDE if stride is None else stride, max(0, room - length) // 2)
        rows_by_overlap.setdefault(overlap, []).append(row)
    windows_of: dict[int, list[Window]] = {row: [] for row in range(len(questions))}
    for overlap, rows in rows_by_overlap.items():
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            pairs = [(fitted[row][0], contexts[row]) for row in chunk]
            for window in _tokenised(tokenizer, pairs, max_length, overlap):
                row = chunk[window.row]
                windows_of[row].append(window._replace(row=row))
        if stride is None and overlap < STRIDE:
            _check_single(windows_of, rows, max_length)
    in_order: list[Window] = []
    for row in range(len(questions)):
        in_order += windows_of[row]
    return in_order


def _fitted(tokenizer: Any, questions: Sequence[str], room: int) -> list[tuple[str, int]]:
    """Return (question, tokens of it), each question cut if it fills all of the ``room``."""
    if not questions:
        return []
    tokens = tokenizer(
        list(questions),
        add_special_tokens=False,
        truncation=True,
        max_length=room,
        return_offsets_mapping=True,
    )
    fitted: list[tuple[str, int]] = []
    for question, offsets in zip(questions, tokens["offset_mapping"], strict=True):
        length = len(offsets)
        if length < room:
            fitted.append((question, length))
        else:
            length = room // 2
            _, end = offsets[length - 1]
            fitted.append((question[:end], length))
    return fitted


def _tokenised(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int, overlap: int
) -> Iterator[Window]:
    """Yield the windows of (question, context) pairs; ``row`` is the index of the pair."""
    questions, contexts = map(list, zip(*pairs, strict=True))
    tokens = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    for number, row in enumerate(tokens["overflow_to_sample_mapping"]):
        ids = tokens["input_ids"][number]
        texts = tokens.sequence_ids(number)  # 0 question, 1 context, None marks of the model
        count = texts.count(1)
        first = texts.index(1) if count else len(ids)
        offsets = tokens["offset_mapping"][number][first : first + count]
        yield Window(
            row=row,
            # Two empty texts may have no token at all, but a model needs one position to read.
            ids=ids or [tokenizer.pad_token_id],
            segments=tokens["token_type_ids"][number]
            if ids and "token_type_ids" in tokens
            else None,
            first=first,
            offsets=torch.tensor(offsets, dtype=torch.int32).reshape(count, 2),
            null=_null(tokenizer, ids),
        )


def _null(tokenizer: Any, ids: Sequence[int]) -> int:
    """Return the position that stands for no answer: of the classification token, or of the first.

    Decoders have a token that begins a text instead, or none at all.
    """
    for special in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if special is not None and special in ids:
            return ids.index(special)
    return 0


def _check_single(
    windows_of: dict[int, list[Window]], rows: Sequence[int], max_length: int
) -> None:
    """Raise BadInput where one of ``rows`` has several windows."""
    for row in rows:
        if len(windows_of[row]) > 1:
            raise BadInput(
                f"model.max_length = {max_length}: a context of the data is longer, and windows of "
                f"that length cannot share {STRIDE} tokens; set task.stride = {max_length // 4}, "
                f"or a longer model.max_length, such as {3 * STRIDE}"
            )
