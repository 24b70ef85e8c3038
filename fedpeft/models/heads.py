"""The head: what a classifier has on top of its base model, and what of it a checkpoint holds."""

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
"""How many names a line holds before it says ``...``."""


@final
@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a classifier, by names of parameters.

    ``outside``: parameters outside of the base model. ``lacking``: parameters that the checkpoint
    lacks, or has in another shape; they were drawn. ``rows``: the parameters of the last dense
    layer outside, which has a row for each label; empty where there is no such layer. ``resized``:
    whether the checkpoint has that layer for another number of labels. ``saved_by``: the class that
    saved the checkpoint, where it is not the model's own; a head in it is for another task.
    """

    outside: frozenset[str]
    lacking: frozenset[str]
    rows: frozenset[str]
    resized: bool
    saved_by: str = ""

    @property
    def head(self) -> frozenset[str]:
        """Return what every method trains in full."""
        return self.outside | self.lacking

    @property
    def has_rows(self) -> bool:
        """Return whether the checkpoint has a row for each of as many labels as the data."""
        return bool(self.rows) and self.kept_rows == self.rows

    @property
    def kept_rows(self) -> frozenset[str]:
        """Return those of the ``rows`` that are the checkpoint's own."""
        return self.rows - self.lacking

    def is_known(self, known: Collection[str], labels: Collection[str]) -> bool:
        """Return whether the checkpoint has all rows, trained for this task and these ``labels``.

        ``known``: the label names of its rows. Without ``labels``, as start and end of an answer
        have none, the task alone decides.
        """
        return self.has_rows and not self.saved_by and (not labels or same(known, labels))


def fit(
    model: nn.Module,
    report: Mapping[str, Any],
    name: str,
    *,
    saved_by: str = "",
    head_is_trained: bool = True,
) -> Fit:
    """Return how the checkpoint fits ``model``, by transformers' ``report`` on loading it.

    ``saved_by``: the class that saved the checkpoint, empty where it does not say. Families may
    call the heads of all tasks alike (ModernBERT), so the names of parameters do not tell whose
    head it is.

    Of the base model the checkpoint may lack a pooler alone. A larger gap raises BadInput: a frozen
    base with weights that nobody has trained is worth nothing. Without ``head_is_trained`` the
    output module is part of the base.
    """
    parameters = [key for key, _ in model.named_parameters()]
    outside = _outside(model, parameters) if head_is_trained else frozenset[str]()
    rows = _rows(model, outside)
    # 1. Shapes may differ in the rows for labels alone, which the data may have in another number.
    shapes: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
    for key, stored, expected in report["mismatched_keys"]:
        shapes[key] = (stored, expected)
    for key in sorted(shapes.keys() - rows):
        stored, expected = shapes[key]
        both = f"{_by_x(stored)} in its weights and {_by_x(expected)} by its configuration"
        why = f"{key!r} is {both}"
        raise BadInput(f"model.name = {name!r}: {why}; the two must be of one model")
    # 2. Of the base model nothing may be missing, except for the pooler.
    missing = set(report["missing_keys"])
    gaps: list[str] = []
    only_poolers = True
    for key in parameters:
        if key in missing and key not in outside:
            gaps.append(key)
            if not POOLER.search(key):
                only_poolers = False
    if not only_poolers:
        of_base = f"of the base model's {len(parameters) - len(outside)} parameters"
        why = f"the checkpoint lacks {len(gaps)} {of_base} ({some(gaps)})"
        raise BadInput(f"model.name = {name!r}: {why}; {_perhaps(report['unexpected_keys'])}")
    # 3. Buffers may be missing, too; only parameters are drawn and trained.
    lacking = frozenset(parameters).intersection(missing | shapes.keys())
    of_another_task = saved_by if saved_by != type(model).__name__ else ""
    return Fit(outside, lacking, rows, bool(rows & shapes.keys()), of_another_task)


def never_packed(model: Any, *, head_is_trained: bool) -> list[str]:
    """Return the modules whose dense layers keep their numbers: head, poolers, output embeddings.

    A pooler is trained where the checkpoint lacks it. Output embeddings may be tied to others.
    """
    parameters = [key for key, _ in model.named_parameters()]
    outside = _outside(model, parameters) if head_is_trained else frozenset[str]()
    output = model.get_output_embeddings()
    names: list[str] = []
    for name, module in model.named_modules():
        if f"{name}.weight" in outside or POOLER.search(f"{name}.") or module is output:
            names.append(name)
    return names


def notes(found: Fit, known: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Return notes for the user on a head; ``known``: the label names of the checkpoint's rows."""
    said = []
    if poolers := sorted(found.lacking - found.outside):
        said.append(f"the checkpoint lacks {some(poolers)}: drawn anew, and trained as the head is")
    if found.is_known(known, labels) and not labels:
        said.append("the checkpoint has an output module for this task: it is trained further")
    elif found.is_known(known, labels):
        said.append("the checkpoint's classifier knows the data's labels: it is trained further")
    elif found.kept_rows and found.saved_by:
        said.append(f"the checkpoint's output module is one of {found.saved_by}: drawn anew")
    elif found.resized and not labels:
        said.append("the checkpoint's output module has another number of outputs: drawn anew")
    elif found.kept_rows or found.resized:
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
    # Row k of the result is the row of labels[k]; weights are (labels, in), biases (labels,).
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


def _by_x(shape: Sequence[int]) -> str:
    """Return a shape for people.

    >>> _by_x((4, 384))
    '4x384'
    """
    return "x".join(map(str, shape))


def _outside(model: Any, parameters: Sequence[str]) -> frozenset[str]:
    """Return which of the ``parameters`` of ``model`` do not belong to its base model."""
    if model.base_model is not model:
        inside = f"{model.base_model_prefix}."
        return frozenset(key for key in parameters if not key.startswith(inside))
    # A model's own Python code may not name its base: then all but the last dense layer is base.
    return _rows(model, frozenset(parameters))


def _rows(model: nn.Module, among: frozenset[str]) -> frozenset[str]:
    """Return weight and bias of the last dense layer of ``model`` that is ``among`` these names."""
    last = ""
    # Modules come in the order of definition, in which the layer that gives the logits is last.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in among:
            last = name
    return among.intersection({f"{last}.weight", f"{last}.bias"})


def _perhaps(unexpected: Collection[str]) -> str:
    """Return why a checkpoint may lack parameters; ``unexpected``: names that it has instead."""
    if unexpected:
        instead = some(sorted(unexpected))
        return f"it has {instead} instead; a prefix before the names, such as 'module.', may be why"
    return "its file is not whole, or its names have a prefix, such as 'module.'"
