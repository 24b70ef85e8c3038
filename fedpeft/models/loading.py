"""Load a model from a package, a folder or the hub: frozen, with its tokenizer and head."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import torch
from torch import nn

from fedpeft.models.checkpointing import checkpoint_blocks
from fedpeft.models.checks import check_lengths, check_vocabulary, try_out
from fedpeft.models.choice import ModelSection
from fedpeft.models.heads import fit, never_packed, notes, reorder
from fedpeft.models.padding import settle_padding
from fedpeft.models.quantising import (
    check_bits,
    check_unquantised,
    pack_layers,
    quantisation,
)
from fedpeft.models.source import Source, find
from fedpeft.models.tokens import pad_on_the_left, spare_last_block
from fedpeft.mounting import describe, keep_matrices_in, packed_layers
from fedpeft.seeds import derive
from fedpeft.tasks import ModelForm, Task
from fedpeft.training.hardware import Hardware, Kernels
from fedpeft.types import Base

LARGE: Final = 100_000_000
"""Parameters beyond which a model is large: of one that computes in bf16 there is then no float32
copy, and fewer tokens go through it together."""


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


def is_large_model(choice: ModelSection, task: Task) -> bool:
    """Return whether the chosen model has more than ``LARGE`` parameters."""
    source = find(choice, task.form.auto_class)
    return source.num_parameters(source.configuration()) > LARGE


def load(choice: ModelSection, task: Task, hardware: Hardware, seed: int) -> Loaded:
    """Return the model for ``task``, every parameter frozen.

    Parts of the head that the checkpoint lacks are drawn from ``seed`` alone. A classifier for the
    same label names is kept, with its rows in the data's order; of one for other names the rows are
    drawn anew. A head whose outputs have no names is kept. Of a head for another task the rows are
    drawn anew, whatever their names. A model that does not load or does not fit raises BadInput.
    """
    # 1. The configuration, with the data's labels in place of the checkpoint's.
    check_bits(choice)
    labels = task.form.labels
    source = find(choice, task.form.auto_class)
    config = source.configuration()
    check_unquantised(config, choice)
    known = [name for _, name in sorted(config.id2label.items())]
    saved_by = (config.architectures or [""])[0]
    if labels:
        _set_labels(config, labels)
    elif task.form.head_is_trained:
        _set_outputs(config, task.form.outputs)
    _configure_dropout(config, choice.dropout)
    # 2. Weights and head.
    draw = derive(seed, "head")
    is_large = hardware.precision == "bf16" and source.num_parameters(config) > LARGE
    packing = _packing(choice, source, config, task.form)
    model, report = source.weights(
        config,
        hardware.attention,
        draw,
        # What is packed is read in float32, so that its bits do not depend on the machine.
        as_stored=is_large and packing is None,
        quantisation=packing,
    )
    trained = task.form.head_is_trained
    head_fit = fit(model, report, choice.name, saved_by=saved_by, head_is_trained=trained)
    drawn = head_fit.lacking
    if not head_fit.is_known(known, labels):
        if head_fit.kept_rows:
            # Of as many labels, but other ones: what was trained for these means nothing here.
            model = source.redrawn(model, head_fit.rows, draw)
            drawn |= head_fit.rows
    elif labels:
        reorder(model, head_fit.rows, known, labels)
    _set_dropout(model, choice.dropout)
    if packing is not None:
        pack_layers(model, choice)
    # 3. The tokenizer, and whether the two belong together.
    tokenizer = source.tokenizer(config)
    said = (*notes(head_fit, known, labels), *settle_padding(tokenizer, model, choice))
    check_vocabulary(tokenizer, model, choice)
    check_lengths(tokenizer, model, choice)
    # 4. Freeze it. The digest comes before the move: it reads the checkpoint's bytes on the CPU.
    model.requires_grad_(False)
    digest = _digest(model, drawn)
    if is_large:
        keep_matrices_in(model, torch.bfloat16, head_fit.head)
    if choice.checkpointing:
        checkpoint_blocks(model, choice)
    if task.form.reads == "summary":
        spare_last_block(model)
        pad_on_the_left(model)
    base = describe(model, head_fit.head, without=_frozen_output(model, task.form))
    model = model.to(hardware.torch_device)
    try_out(task.with_tokenizer(tokenizer), model, hardware, choice)
    return Loaded(model, tokenizer, base, digest, task.form, said)


def _packing(choice: ModelSection, source: Source, config: Any, form: ModelForm) -> Any:
    """Return what transformers packs while it reads the weights; None for nothing."""
    if not choice.bits:
        return None
    whole = never_packed(source.outline(config), head_is_trained=form.head_is_trained)
    return quantisation(choice.bits, whole)


def _frozen_output(model: Any, form: ModelForm) -> nn.Module | None:
    """Return the output layer where it belongs to the frozen base; None where a task trains it."""
    if form.head_is_trained:
        return None
    # It may share its weight with the embeddings, and has a row for every token: as in peft it is
    # not adapted with all linear layers.
    layer: nn.Module | None = model.get_output_embeddings()
    return layer


def _set_labels(config: Any, labels: Sequence[str]) -> None:
    """Let a transformers configuration, and the text's part of it, know the names of the labels."""
    for part in (config, config.get_text_config()):
        part.id2label = dict(enumerate(labels))
        part.label2id = {label: index for index, label in enumerate(labels)}


def _set_outputs(config: Any, outputs: int) -> None:
    """Let a transformers configuration, and the text's part of it, know the number of outputs."""
    for part in (config, config.get_text_config()):
        part.num_labels = outputs


def _configure_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability of a configuration, whatever the family calls it."""
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            # BERT: hidden_dropout_prob; GPT-2: attn_pdrop. Fields with other values, such as a
            # flag, are no probabilities.
            if re.search(r"dropout|pdrop", name) and isinstance(value, float):
                setattr(part, name, probability)


def _set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout layer: some heads have one that no field names."""
    # The taggers of GPT-2, Llama and Qwen2 have 0.1 where the configuration says nothing.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def _digest(model: nn.Module, drawn: frozenset[str]) -> str:
    """Return a digest of the checkpoint's parameters, without what was ``drawn`` from the seed.

    Of their values in float32, whatever the number format in which they are stored; of packed
    matrices, of their bits.
    """
    hasher = blake2b(digest_size=16)
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() - drawn):
        hasher.update(name.encode())
        values = parameters[name].detach().float().contiguous()
        hasher.update(values.numpy().tobytes())
    for name, layer in sorted(packed_layers(model).items()):
        hasher.update(name.encode())
        for part in (layer.packed.codes, layer.packed.scales):
            hasher.update(part.contiguous().numpy().tobytes())
    return hasher.hexdigest()
