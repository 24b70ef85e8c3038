"""Adapters -> a folder that peft and transformers load; or the model with everything merged in."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import BadInput
from fedpeft.models import Loaded, locate
from fedpeft.mounting import oriented
from fedpeft.types import Delta, LocalTask
from fedpeft.wire.durable import sync

PREFIX = "base_model.model."
"""What peft puts before the names of the base model's modules."""

LABELS = "labels"
"""The folder, inside an adapter's, of the model's configuration, which knows the label names.

It is not beside the adapter: transformers takes a folder with a ``config.json`` for a whole model
and looks for its weights there.
"""

CLASSIFIERS = ("classifier", "score")
"""Endings of modules that peft reads from every adapter of task ``SEQ_CLS``, listed or not."""

MERGE = "write the merged model instead, with --merge"

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""(B, A) by module, (out, r) and (r, in)."""


def adapter(loaded: Loaded, local: LocalTask, name: str, folder: Path) -> None:
    """Write the adapters of ``local`` as a peft LoRA folder, with head, tokenizer and label names.

    ``name``: the base model's. The scale is inside B, so every alpha equals its rank; ranks may
    differ, and a module without any is left out. peft 0.4 and later load it; where ranks differ
    (``rank_pattern``), 0.6 and later. What is trained beside factors, the head above all, is saved
    by whole modules, as peft has it. Methods without factors (full, bitfit, sparse) and a folder
    that exists raise BadInput.
    """
    deltas = local.deltas()
    saved = saved_modules(loaded.model, loaded.base.head | _plain(local).keys())
    factors = _factors(deltas, saved)
    tensors = _saved_tensors(loaded.model, local, deltas, saved)
    for module, (B, A) in factors.items():
        tensors[f"{module}.lora_A.weight"] = A
        tensors[f"{module}.lora_B.weight"] = B
    named = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    settings = _peft_settings(loaded.model, loaded.form.peft_type, factors, saved)
    settings["base_model_name_or_path"] = locate(name)
    with _whole(folder) as place:
        (place / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
        (place / "adapter_model.safetensors").write_bytes(save(named, {"format": "pt"}))
        _configuration(loaded.model).save_pretrained(place / LABELS)
        _save_tokenizer(loaded.tokenizer, place)


def merged(loaded: Loaded, local: LocalTask, folder: Path) -> None:
    """Write the model with all that ``local`` has learnt merged in, as a transformers folder.

    A folder that exists raises BadInput.
    """
    with _whole(folder) as place:
        whole: Any = merge(loaded.model, local)
        whole.config = _configuration(loaded.model)
        whole.save_pretrained(place)
        _save_tokenizer(loaded.tokenizer, place)


@torch.no_grad()
def merge(model: nn.Module, local: LocalTask) -> nn.Module:
    """Return a copy of ``model``, with nothing mounted, that has what ``local`` learnt in it.

    A difference to a weight that several modules share raises BadInput: it belongs to one of them.
    """
    whole = copy.deepcopy(model)
    for name, tensor in _plain(local).items():
        whole.get_parameter(name).copy_(tensor)
    for name, delta in local.deltas().items():
        weight = whole.get_parameter(f"{name}.weight")
        holders = [part for part in whole.modules() if part._parameters.get("weight") is weight]
        if len(holders) > 1:
            raise BadInput(
                f"layer {name!r} shares its weight with another module, so what was trained for it "
                "alone cannot be merged; export the adapter, without --merge"
            )
        weight.add_(oriented(whole, name, delta.dense()[0]))
    return whole


def saved_modules(model: nn.Module, names: Set[str]) -> list[str]:
    """Return the modules that peft is to save whole so that the parameters ``names`` are saved.

    They are as large as can be with nothing else in them; a module that holds a named parameter
    beside others is saved with these. peft takes the list for endings of names and adds
    ``CLASSIFIERS`` to it, and then wants the values of every module that ends so: all of these are
    listed. A parameter that belongs to no module but the model raises BadInput.
    """
    chosen: list[str] = []
    for name, module in model.named_modules():
        parameters = {f"{name}.{part}" for part, _ in module.named_parameters()}
        if name and parameters and parameters <= names and not _inside(name, chosen):
            chosen.append(name)
    for parameter in sorted(names):
        home = parameter.rpartition(".")[0]
        if not home:
            raise BadInput(f"peft cannot save {parameter!r}; {MERGE}")
        if not _inside(home, chosen):
            chosen.append(home)
    endings = (*chosen, *CLASSIFIERS)
    ending: list[str] = []
    for name, _ in model.named_modules():  # a module comes before those inside it
        if name.endswith(endings) and not _inside(name, ending):
            ending.append(name)
    return ending


def refuse_existing(folder: Path) -> None:
    """Raise BadInput where ``folder`` exists already."""
    if folder.exists():
        raise BadInput(f"{folder}: exists; choose another folder")


def _factors(deltas: Mapping[str, Delta], saved: list[str]) -> Factors:
    """Return the factors of what is not in a module that is ``saved`` whole.

    A difference without factors, or no factors at all, raises BadInput.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    pairs = {module: delta.factors() for module, delta in deltas.items()}
    for module, pair in pairs.items():
        if pair is not None and not _inside(module, saved):
            B, A = pair
            factors[module] = (B[0], A[0])
    if not factors or None in pairs.values():
        raise BadInput(f"this run has no low-rank adapters to export; {MERGE}")
    return factors


def _peft_settings(
    model: nn.Module, task_type: str, factors: Factors, saved: list[str]
) -> dict[str, Any]:
    """Return what ``adapter_config.json`` says of the layers: what is not the default.

    A field that a peft does not know stops it, so defaults that newer ones have added are left out.
    """
    ranks = {module: len(A) for module, (_, A) in factors.items()}
    common = mode(ranks.values())
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "modules_to_save": saved,
        "r": common,
        "lora_alpha": common,
    }
    others = {module: rank for module, rank in ranks.items() if rank != common}
    if others:
        settings["rank_pattern"] = settings["alpha_pattern"] = others
    if any(isinstance(model.get_submodule(module), Conv1D) for module in ranks):
        settings["fan_in_fan_out"] = True
    return settings


@torch.no_grad()
def _saved_tensors(
    model: nn.Module,
    local: LocalTask,
    deltas: Mapping[str, Delta],
    saved: list[str],
) -> dict[str, Tensor]:
    """Return what the modules ``saved`` hold, by name: as trained, with differences merged in."""
    trained = _plain(local)
    tensors: dict[str, Tensor] = {}
    for module in saved:
        for part, tensor in model.get_submodule(module).state_dict().items():
            name = f"{module}.{part}"
            tensors[name] = trained.get(name, tensor)
    for module, delta in deltas.items():
        if _inside(module, saved):
            weight = f"{module}.weight"
            tensors[weight] = tensors[weight] + oriented(model, module, delta.dense()[0])
    return tensors


def _plain(local: LocalTask) -> dict[str, Tensor]:
    """Return what is trained of the model's own parameters, by name, without client axis."""
    return {name: tensor.detach()[0] for name, tensor in local.trainable.items() if ":" not in name}


def _inside(name: str, modules: list[str]) -> bool:
    """Return whether ``name`` is one of ``modules`` or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _configuration(model: nn.Module) -> Any:
    """Return the configuration from which transformers builds ``model`` as it is."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for name, module in model.named_modules():
        start = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and start is not None:
            # RoBERTa counts positions from there, whatever token its tokenizer pads with.
            config.pad_token_id = start
    return config


def _save_tokenizer(tokenizer: Any, place: Path) -> None:
    """Write a tokenizer; OSError where that fails, which its library calls an Exception."""
    try:
        tokenizer.save_pretrained(place)
    except Exception as error:
        raise OSError(str(error)) from error


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes ``folder`` once all of it is on the disk.

    Otherwise nothing is left. A folder that exists or cannot be written raises BadInput.
    """
    refuse_existing(folder)
    place = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
        yield place
        for path in [*place.rglob("*"), place]:
            sync(path)
        place.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        remedy = "make room, or choose another place"
        raise BadInput(f"{folder}: cannot be written ({why}); {remedy}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
