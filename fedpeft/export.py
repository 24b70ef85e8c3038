"""Adapters -> a folder that ``peft.PeftModel.from_pretrained`` loads; or the whole model with everything merged in."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.models import Loaded, locate
from fedpeft.mounting import oriented
from fedpeft.types import BadInput, LocalTask

PREFIX = "base_model.model."
"""What peft puts before the names of the base model's modules."""


def adapter(loaded: Loaded, local: LocalTask, name: str, folder: Path) -> None:
    """Write the mounted adapters of ``local`` as a peft LoRA folder, with the head, tokenizer and label names.

    The scale is inside B, so every alpha equals its rank; ranks may differ (rank_pattern), and a module without any is left
    out. ``name``: the base model's. Methods without factors (full, bitfit, sparse) raise BadInput: merge them instead.
    """
    found = {module: delta.factors() for module, delta in local.deltas().items()}
    factors = {module: pair for module, pair in found.items() if pair is not None}
    if not factors or len(factors) < len(found):
        raise BadInput("this run has no low-rank adapters to export; write the merged model instead, with --merge")
    model, tensors = loaded.model, {}
    for module, (B, A) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A[0]
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B[0]
    for parameter in loaded.base.head:
        tensors[PREFIX + parameter] = local.trainable[parameter][0]
    ranks = {module: A.shape[1] for module, (_, A) in factors.items()}
    config = LoraConfig(
        task_type="SEQ_CLS",
        base_model_name_or_path=locate(name),
        inference_mode=True,
        target_modules=sorted(ranks),
        modules_to_save=head_modules(model, loaded.base.head),
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        lora_dropout=0.0,
        fan_in_fan_out=isinstance(model.get_submodule(next(iter(ranks))), Conv1D),
    )
    with _whole(folder) as place:
        config.save_pretrained(str(place))
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, place / "adapter_model.safetensors"
        )
        _describe(loaded, place)


def merged(loaded: Loaded, local: LocalTask, folder: Path) -> None:
    """Write the whole model, with the differences and parameters of ``local`` merged in, as a transformers folder."""
    with _whole(folder) as place:
        model: Any = merge(loaded.model, local)
        model.save_pretrained(place)
        _describe(loaded, place)


@torch.no_grad()
def merge(model: nn.Module, local: LocalTask) -> nn.Module:
    """Return a copy of ``model``, on which nothing is mounted, with the differences and parameters of ``local`` in it."""
    whole = copy.deepcopy(model)
    for name, delta in local.deltas().items():
        whole.get_parameter(f"{name}.weight").add_(oriented(whole, name, delta.dense()[0]))
    for name, tensor in local.trainable.items():
        if ":" not in name:
            whole.get_parameter(name).copy_(tensor[0])
    return whole


def head_modules(model: nn.Module, head: frozenset[str]) -> list[str]:
    """Return the names of the largest modules all of whose parameters belong to the head."""
    chosen: list[str] = []
    for name, module in model.named_modules():
        parameters = [f"{name}.{part}" for part, _ in module.named_parameters()]
        inside = any(name.startswith(f"{other}.") for other in chosen)
        if name and parameters and not inside and head.issuperset(parameters):
            chosen.append(name)
    return chosen


def refuse_existing(folder: Path) -> None:
    """Raise BadInput where ``folder`` exists already."""
    if folder.exists():
        raise BadInput(f"{folder}: exists; choose another folder")


def _describe(loaded: Loaded, folder: Path) -> None:
    """Write the tokenizer, and the configuration that holds the label names."""
    config: Any = loaded.model.config
    config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes ``folder`` only when all went well; one that exists raises BadInput."""
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(folder.name + ".part")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
        place.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
