"""A base that is frozen in 4 or 8 bits: read so by transformers and bitsandbytes, then packed."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import BadInput
from fedpeft.models.causes import absent
from fedpeft.models.choice import ModelSection
from fedpeft.mounting import BLOCK, Packed, PackedLinear


def check_bits(choice: ModelSection) -> None:
    """Raise BadInput where a base of few bits is asked for and bitsandbytes is not installed."""
    if choice.bits and absent("bitsandbytes"):
        raise BadInput(
            f"model.bits = {choice.bits} needs bitsandbytes; "
            "get it with: pip install 'fedpeft[quant]'"
        )


def check_unquantised(config: Any, choice: ModelSection) -> None:
    """Raise BadInput for a checkpoint whose weights have been quantised already."""
    about = getattr(config, "quantization_config", None)
    if about:
        kind = dict(about).get("quant_method", "some method")
        raise BadInput(
            f"model.name = {choice.name!r}: its weights are quantised already ({kind}); give the "
            "model that they were made of, and model.bits = 4 or 8"
        )


def quantisation(bits: int, whole: Iterable[str]) -> Any:
    """Return what transformers is to do with dense layers but those in the modules ``whole``.

    4 bits are NF4 with a scale for every block, 8 bits absmax by row as in LLM.int8().
    """
    # Patterns from the first letter to the last: names alone would be taken for endings, too.
    patterns = [f"^{re.escape(name)}$" for name in whole]
    settings: Any = BitsAndBytesConfig  # untyped
    return settings(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=patterns,
    )


def pack_layers(model: Any, choice: ModelSection) -> None:
    """Put packed layers of ours in the place of those of bitsandbytes.

    A model in which there are none raises BadInput.
    """
    from bitsandbytes import nn as bitsandbytes_nn  # noqa: PLC0415  (optional)

    theirs: Any = bitsandbytes_nn  # does not say what it exports
    layers: dict[str, PackedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, theirs.Linear4bit):
            state = module.weight.quant_state
            if state is None or state.blocksize != BLOCK or state.nested:
                raise ValueError(f"bitsandbytes has packed {name!r} in another way")
            layers[name] = _layer(module, state.absmax, 4)
        elif isinstance(module, theirs.Linear8bitLt):
            layers[name] = _layer(module, module.weight.SCB, 8)
    if not layers:
        why = f"{choice.name} has no dense layers for that below its head"
        raise BadInput(f"model.bits = {choice.bits}: {why}; leave it out")
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for parameter in model.parameters():
        # As read it is a view of the checkpoint's file, which would stay in memory as a whole.
        parameter.data = parameter.data.clone()
    # From here on it is a model like any other, which may be moved.
    model.hf_quantizer.remove_quantization_config(model)


def _layer(module: Any, scales: torch.Tensor, bits: int) -> PackedLinear:
    """Return a layer of bitsandbytes as one of ours."""
    shape = torch.Size((module.out_features, module.in_features))
    codes = module.weight.detach().as_subclass(torch.Tensor)
    bias: nn.Parameter | None = module.bias
    is_conv1d = issubclass(module.source_cls, Conv1D)
    return PackedLinear(Packed(codes, scales, shape, bits), bias, is_conv1d=is_conv1d)
