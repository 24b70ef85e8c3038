"""The head: what a classifier has on top of its base model, and how much of it is known already."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from fedpeft.errors import BadInput

POOLER: Final = re.compile(r"(^|\.)pooler\.")
"""Parts of a base model that only classifiers use, so that checkpoints of other tasks lack them."""
SHOWN: Final = 3
"""Names that a line holds before it says ``...``."""


@final
@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a classifier, by names of parameters.

    ``outside``: what does not belong to the base model. ``lacking``: what the checkpoint lacks, or
    has in another shape, so that it was drawn. ``rows``: the parameters of the last dense layer
    outside, which has a row for each label; none where there is no such layer.
    ``resized``: whether the checkpoint has such a layer for another number of labels.
    """

    outside: frozenset[str]
    lacking: frozenset[str]
    rows: frozenset[str]
    resized: bool

    @property
    def head(self) -> frozenset[str]:
        """Return what every method trains in full."""
        return self.outside | self.lacking

    @property
    def has_rows(self) -> bool:
        """Return whether the checkpoint has a row for each of as many labels as the data."""
        return bool(self.rows) and not self.rows & self.lacking


def fit(model: nn.Module, report: Mapping[str, Any], name: str) -> Fit:
    """Return how the checkpoint fits ``model``, by transformers' ``report`` on loading it.

    Of the base model the checkpoint may lack a pooler. Else BadInput is raised: a frozen base with
    weights that nobody has trained is worth nothing.
    """
    own = [key for key, _ in model.named_parameters()]
    outside = _outside(model, own)
    rows = _rows(model, outside)
    shapes = {key: (tuple(there), tuple(here)) for key, there, here in report["mismatched_keys"]}
    for key in sorted(shapes.keys() - rows):
        there, here = ("x".join(map(str, shape)) for shape in shapes[key])
        why = f"{key!r} is {there} in its weights and {here} by its configuration"
        raise BadInput(f"model.name = {name!r}: {why}; the two must be of one model")
    missing = set(report["missing_keys"])
    gaps = [key for key in own if key in missing - outside]
    if not all(POOLER.search(key) for key in gaps):
        of_base = f"of the base model's {len(own) - len(outside)} parameters"
        why = f"the checkpoint lacks {len(gaps)} {of_base} ({some(gaps)})"
        raise BadInput(f"model.name = {name!r}: {why}; {_perhaps(report['unexpected_keys'])}")
    lacking = frozenset(own).intersection(missing | shapes.keys())
    return Fit(outside, lacking, rows, resized=bool(rows & shapes.keys()))


def notes(found: Fit, known: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Return what is to be said of a head; ``known``: the label names of the checkpoint's rows."""
    said = []
    if poolers := sorted(found.lacking - found.outside):
        said.append(f"the checkpoint lacks {some(poolers)}: drawn anew, and trained as the head is")
    if found.has_rows and same(known, labels):
        said.append("the checkpoint's classifier knows the data's labels: it is trained further")
    elif found.has_rows or found.resized:
        theirs = f"the checkpoint's classifier is for {len(known)} labels ({some(known)})"
        ours = f"the data has {len(labels)} ({some(labels)})"
        said.append(f"{theirs}, {ours}: its rows for labels are drawn anew")
    return tuple(said)


def same(known: Collection[str], labels: Collection[str]) -> bool:
    """Return whether the names are the same, in whatever order.

    ``LABEL_0``, which transformers puts where there is no name, says nothing: it is the same as
    ``LABEL_0`` alone, and a head that knows no names is not taken for one that knows the data's.
    """
    return sorted(known) == sorted(labels)


@torch.no_grad()
def reorder(
    model: nn.Module,
    rows: Iterable[str],
    known: Sequence[str],
    labels: Sequence[str],
) -> None:
    """Put the rows of the parameters ``rows`` from the order of ``known`` in that of ``labels``."""
    order = torch.tensor([known.index(label) for label in labels])
    for name in rows:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter[order])


def some(names: Collection[str]) -> str:
    """Return the first few of ``names``.

    >>> some(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    first = list(names)[:SHOWN]
    return ", ".join([*first, "..."] if len(names) > SHOWN else first)


def _outside(model: Any, own: Sequence[str]) -> frozenset[str]:
    """Return which of the parameters ``own`` of ``model`` do not belong to its base model."""
    if model.base_model is not model:
        inside = f"{model.base_model_prefix}."
        return frozenset(key for key in own if not key.startswith(inside))
    # Code that a model brings along need not name its base: all but the last dense layer is it.
    return _rows(model, frozenset(own))


def _rows(model: nn.Module, among: frozenset[str]) -> frozenset[str]:
    """Return the parameters of the last dense layer of ``model`` that are ``among`` the given."""
    last = ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in among:
            last = name
    return among.intersection({f"{last}.weight", f"{last}.bias"})


def _perhaps(unexpected: Collection[str]) -> str:
    """Return why a checkpoint may lack what it should have; ``unexpected``: what it has instead."""
    if unexpected:
        instead = some(sorted(unexpected))
        return f"it has {instead} instead; a prefix before the names, such as 'module.', may be why"
    return "its file is not whole, or its names have a prefix, such as 'module.'"
