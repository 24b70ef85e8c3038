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
from fedpeft.models import Loaded
from fedpeft.models.gguf import located
from fedpeft.models.readme import readme
from fedpeft.mounting import oriented, unpack_layers
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

    ``name``: the base model's. ``adapter_config.json`` has the place where peft finds that on this
    machine, ``README.md`` says how to get and load it on any. The scale is inside B, so every alpha
    equals its rank. Ranks may differ, and a module of rank 0 is left out. peft 0.4 and later load
    the folder; where ranks differ (``rank_pattern``), 0.6 and later. What is trained beside
    factors, the head above all, is saved as whole modules, as peft does. Methods without factors
    (full, bitfit, sparse) and a folder that exists raise BadInput.
    """
    _check_mergeable(local)
    # 1. Which modules are saved whole, and which as factors.
    deltas = local.deltas()
    saved = saved_modules(loaded.model, loaded.base.head | _plain(local).keys())
    factors = _factors(deltas, saved)
    # 2. All tensors by peft's names. safetensors wants them contiguous.
    tensors = _saved_tensors(loaded.model, local, deltas, saved)
    for module, (B, A) in factors.items():
        tensors[f"{module}.lora_A.weight"] = A  # (r, in)
        tensors[f"{module}.lora_B.weight"] = B  # (out, r)
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        named[PREFIX + key] = tensor.detach().cpu().contiguous()
    # 3. The files.
    settings = _peft_settings(loaded.model, loaded.form.peft_type, factors, saved)
    settings["base_model_name_or_path"] = located(name)
    with _whole_or_nothing(folder) as temporary:
        config = json.dumps(settings, indent=2, sort_keys=True)
        (temporary / "adapter_config.json").write_text(config)
        (temporary / "adapter_model.safetensors").write_bytes(save(named, {"format": "pt"}))
        _configuration(loaded.model).save_pretrained(temporary / LABELS)
        _save_tokenizer(loaded.tokenizer, temporary)
        page = readme(name, loaded.form.auto_class)
        (temporary / "README.md").write_text(page, encoding="utf-8")


def merged(loaded: Loaded, local: LocalTask, folder: Path) -> None:
    """Write the model with everything that ``local`` has learnt merged in, for transformers.

    A folder that exists raises BadInput.
    """
    with _whole_or_nothing(folder) as temporary:
        merged_model: Any = merge(loaded.model, local)
        merged_model.config = _configuration(loaded.model)
        merged_model.save_pretrained(temporary)
        _save_tokenizer(loaded.tokenizer, temporary)


@torch.no_grad()
def merge(model: nn.Module, local: LocalTask) -> nn.Module:
    """Return a copy of ``model``, which has nothing mounted, with what ``local`` learnt merged in.

    A difference to a weight that several modules share raises BadInput: it belongs to one of them.
    """
    _check_mergeable(local)
    # In float32, as the differences are: a large model may be kept in bf16, or packed.
    merged_model = copy.deepcopy(model).float()
    unpack_layers(merged_model)
    # 1. Parameters of the model that were trained themselves.
    for name, tensor in _plain(local).items():
        merged_model.get_parameter(name).copy_(tensor)
    # 2. Adapters: W + difference.
    for name, delta in local.deltas().items():
        weight = merged_model.get_parameter(f"{name}.weight")
        if _num_holders(merged_model, weight) > 1:
            raise BadInput(
                f"layer {name!r} shares its weight with another module, so what was trained for it "
                "alone cannot be merged; export the adapter, without --merge"
            )
        difference = delta.dense()[0]  # (1, out, in) -> (out, in)
        weight.add_(oriented(merged_model, name, difference))
    return merged_model


def _check_mergeable(local: LocalTask) -> None:
    """Raise BadInput where something that was trained is no difference to a layer's matrix."""
    deltas = local.deltas()
    for name in local.trainable:
        module, colon, _ = name.partition(":")
        if colon and module not in deltas:
            raise BadInput(
                f"{name!r} was trained, which is no change of a layer's matrix: this run can "
                "neither be merged nor exported; `fedpeft predict` uses it from the run's folder"
            )


def _num_holders(model: nn.Module, weight: nn.Parameter) -> int:
    """Return how many modules have ``weight`` itself as their weight (tied embeddings: two)."""
    count = 0
    for module in model.modules():
        if module._parameters.get("weight") is weight:
            count += 1
    return count


def saved_modules(model: nn.Module, names: Set[str]) -> list[str]:
    """Return the modules that peft must save whole so that the parameters ``names`` are saved.

    They are the largest modules with no other parameters in them. Where a named parameter lies
    beside others in its module, that module is saved with all of them. peft reads the list as
    endings of names, adds ``CLASSIFIERS`` to it, and then wants the values of every module whose
    name ends so: all of these are returned. A parameter of the model itself, outside of every
    module, raises BadInput.
    """
    # 1. The largest modules that hold nothing but named parameters; outer ones come first.
    chosen: list[str] = []
    for name, module in model.named_modules():
        parameters = {f"{name}.{part}" for part, _ in module.named_parameters()}
        if name and parameters and parameters <= names and not _inside(name, chosen):
            chosen.append(name)
    # 2. The modules of those that are left.
    for parameter in sorted(names):
        home = parameter.rpartition(".")[0]
        if not home:
            raise BadInput(f"peft cannot save {parameter!r}; {MERGE}")
        if not _inside(home, chosen):
            chosen.append(home)
    # 3. Every module that peft will look for.
    endings = (*chosen, *CLASSIFIERS)
    saved: list[str] = []
    for name, _ in model.named_modules():  # a module comes before those inside it
        if name.endswith(endings) and not _inside(name, saved):
            saved.append(name)
    return saved


def refuse_existing(folder: Path) -> None:
    """Raise BadInput where ``folder`` exists already."""
    if folder.exists():
        raise BadInput(f"{folder}: exists; choose another folder")


def _factors(deltas: Mapping[str, Delta], saved: list[str]) -> Factors:
    """Return the factors of all adapters outside of the modules that are ``saved`` whole.

    A difference without factors, or no factors at all, raises BadInput.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    without_factors = False
    for module, delta in deltas.items():
        pair = delta.factors()
        if pair is None:
            without_factors = True
        elif not _inside(module, saved):
            B, A = pair  # (1, out, r) and (1, r, in)
            factors[module] = (B[0], A[0])
    if without_factors or not factors:
        raise BadInput(f"this run has no low-rank adapters to export; {MERGE}")
    return factors


def _peft_settings(
    model: nn.Module, task_type: str, factors: Factors, saved: list[str]
) -> dict[str, Any]:
    """Return what ``adapter_config.json`` says of the layers, without fields left at defaults.

    A peft refuses fields that it does not know, so those that newer versions have added are absent.
    """
    ranks = {module: len(A) for module, (_, A) in factors.items()}
    # The commonest rank is the default, so that few modules need a line of their own.
    common = mode(ranks.values())
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "modules_to_save": saved,
        "r": common,
        "lora_alpha": common,  # alpha / r = 1: the scale is inside B
    }
    others = {module: rank for module, rank in ranks.items() if rank != common}
    if others:
        settings["rank_pattern"] = settings["alpha_pattern"] = others
    for module in ranks:
        if isinstance(model.get_submodule(module), Conv1D):  # GPT-2 stores (in, out)
            settings["fan_in_fan_out"] = True
    return settings


@torch.no_grad()
def _saved_tensors(
    model: nn.Module,
    local: LocalTask,
    deltas: Mapping[str, Delta],
    saved: list[str],
) -> dict[str, Tensor]:
    """Return the tensors of the modules ``saved``, by name: as trained, with adapters merged in."""
    trained = _plain(local)
    tensors: dict[str, Tensor] = {}
    for module in saved:
        for part, tensor in model.get_submodule(module).state_dict().items():
            name = f"{module}.{part}"
            tensors[name] = trained.get(name, tensor)
    # peft has no adapters inside of modules that it saves whole: they are merged into these.
    for module, delta in deltas.items():
        if _inside(module, saved):
            weight = f"{module}.weight"
            tensors[weight] = tensors[weight] + oriented(model, module, delta.dense()[0])
    return tensors


def _plain(local: LocalTask) -> dict[str, Tensor]:
    """Return the model's own parameters that were trained, by name, without client axis."""
    parameters: dict[str, Tensor] = {}
    for name, tensor in local.trainable.items():
        if ":" not in name:  # "module:A" and the like are factors
            parameters[name] = tensor.detach()[0]
    return parameters


def _inside(name: str, modules: list[str]) -> bool:
    """Return whether ``name`` is one of ``modules`` or inside one."""
    prefixes = tuple(f"{module}." for module in modules)
    return name in modules or name.startswith(prefixes)


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


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer; any error is an OSError (its library raises a bare Exception)."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise OSError(str(error)) from error


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into; at the end it is renamed to ``folder``.

    After an error nothing is left. A folder that exists or cannot be written raises BadInput.
    """
    refuse_existing(folder)
    # A neighbour of the same file system, which a rename needs; the id tells processes apart.
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        # First the contents, then the name: a crash leaves no folder that is only partly written.
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        remedy = "make room, or choose another place"
        raise BadInput(f"{folder}: cannot be written ({why}); {remedy}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
