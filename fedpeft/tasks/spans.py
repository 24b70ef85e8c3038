"""Possible answers as spans of a window: the best by the sum of their two logits."""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from fedpeft.tasks.answers import Place

N_BEST: Final = 20
"""Spans among which probability is shared out."""


class Span(NamedTuple):
    """A possible answer: its place in the context; ``score``: the sum of its two logits."""

    score: float
    place: Place


def best_spans(logits: Tensor, offsets: Tensor, longest: int) -> list[Span]:
    """Return the best spans of a window, at most ``N_BEST``, of at most ``longest`` tokens each.

    ``logits``: of start and end at each token of the context, (count, 2). ``offsets``: the
    characters that the token stands for, (count, 2).
    """
    if not len(offsets):
        return []
    starts, ends = logits.unbind(dim=1)  # (count,) each
    # (count, longest): row i, column k has the score of the span of k + 1 tokens from token i on.
    beyond = ends.new_full((longest - 1,), -torch.inf)  # spans cannot end behind the window
    scores = starts.unsqueeze(1) + torch.cat([ends, beyond]).unfold(0, longest, 1)
    best = scores.flatten().topk(min(N_BEST, scores.numel()))
    characters = offsets.tolist()
    spans: list[Span] = []
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if score == -torch.inf:
            break
        first, more = divmod(index, longest)
        spans.append(Span(score, Place(characters[first][0], characters[first + more][1])))
    return spans


def trimmed(context: str, place: Place) -> Place:
    """Return ``place`` without blanks at its ends: some tokens begin with one."""
    answer = context[place.start : place.end]
    start = place.start + len(answer) - len(answer.lstrip())
    return Place(start, start + len(answer.strip()))
