"""Load a classifier from a package, a folder or the hub: frozen, with its tokenizer and head."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from torch import nn

from fedpeft.models.checks import check_lengths, check_vocabulary, settle_padding, try_out
from fedpeft.models.choice import ModelSection
from fedpeft.models.heads import fit, notes, reorder, same
from fedpeft.models.source import find
from fedpeft.models.tokens import pad_on_the_left, spare_last_block
from fedpeft.mounting import describe
from fedpeft.seeds import derive
from fedpeft.tasks import ModelForm, Task
from fedpeft.training.hardware import Hardware, Kernels
from fedpeft.types import Base


@dataclass(frozen=True)
class Loaded:
    """A frozen model on its device, its tokenizer, the server's view of it, its weights' digest.

    ``form``: the kind of model that its task asked for. ``notes``: what a user should know before
    it is trained, a line each.
    """

    model: nn.Module
    tokenizer: Any
    base: Base
    digest: str
    form: ModelForm
    notes: tuple[str, ...] = ()


def kernels(choice: ModelSection, task: Task) -> Kernels:
    """Return the attention kernels that the chosen model has; every family has the first."""
    source = find(choice, task.form.auto_class)
    return ("eager", "sdpa") if source.supports_sdpa(source.configuration()) else ("eager",)


def load(choice: ModelSection, task: Task, hardware: Hardware, seed: int) -> Loaded:
    """Return the model for ``task``, every parameter frozen.

    What the checkpoint lacks of a head is drawn from ``seed``, whatever ran before. A classifier
    that knows the very names of its labels is kept, its rows put in their order; the rows of one
    that knows others are drawn anew. What does not load or does not fit raises BadInput.
    """
    labels = task.form.labels
    source = find(choice, task.form.auto_class)
    config = source.configuration()
    known = [name for _, name in sorted(config.id2label.items())]
    if labels:
        _set_labels(config, labels)
    _set_dropout(config, choice.dropout)
    draw = derive(seed, "head")
    model, report = source.weights(config, hardware.attention, draw)
    found = fit(model, report, choice.name)
    drawn = found.lacking
    if found.has_rows and same(known, labels):
        reorder(model, found.rows, known, labels)
    elif found.has_rows:
        model = source.redrawn(model, found.rows, draw)
        drawn |= found.rows
    tokenizer = source.tokenizer(config)
    said = (*notes(found, known, labels), *settle_padding(tokenizer, model, choice))
    check_vocabulary(tokenizer, model, choice)
    check_lengths(tokenizer, model, choice)
    model.requires_grad_(False)
    if task.form.reads == "summary":
        spare_last_block(model)
        pad_on_the_left(model)
    base = describe(model, found.head)
    digest = _digest(base, drawn)
    model = model.to(hardware.torch_device)
    try_out(task.with_tokenizer(tokenizer), model, hardware.torch_device, choice)
    return Loaded(model, tokenizer, base, digest, task.form, said)


def _set_labels(config: Any, labels: Sequence[str]) -> None:
    """Let a transformers configuration, and the text's part of it, know the names of the labels."""
    for part in (config, config.get_text_config()):
        part.id2label = dict(enumerate(labels))
        part.label2id = {label: number for number, label in enumerate(labels)}


def _set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability of a configuration, whatever the family calls it."""
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if re.search(r"dropout|pdrop", name) and isinstance(value, float):
                setattr(part, name, probability)


def _digest(base: Base, drawn: frozenset[str]) -> str:
    """Return a digest of the checkpoint's parameters, without what was ``drawn`` from the seed."""
    whole = blake2b(digest_size=16)
    for name in sorted(base.parameters.keys() - drawn):
        whole.update(name.encode())
        whole.update(base.parameters[name].contiguous().numpy().tobytes())
    return whole.hexdigest()
