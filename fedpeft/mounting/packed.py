"""Dense layers whose frozen matrix takes 4 or 8 bits a number, as bitsandbytes packs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

BLOCK: Final = 64
"""Numbers of a 4-bit matrix that share a scale."""


@final
@dataclass(frozen=True)
class Packed:
    """A matrix of a few bits a number, which nothing ever writes.

    ``shape``: (out, in). ``bits``: 4 (NF4: Dettmers et al. 2023, QLoRA, arXiv 2305.14314) or 8
    (absmax by row: Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339). ``codes``: uint8, two
    numbers in each, (out * in / 2, 1), or int8, (out, in). ``scales``: float32, one for every
    ``BLOCK`` numbers, or one a row, (out,).
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    bits: int

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in a number format: the one place where it is dequantised."""
        return _UNPACKED[self.bits](self, dtype)

    def float(self) -> Tensor:
        """Return the matrix in float32, as methods read it."""
        return self.unpacked(torch.float32)


def _nf4(packed: Packed, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit  # noqa: PLC0415  (optional)

    state: Any = QuantState  # its constructor is untyped
    about = state(packed.scales, shape=packed.shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed.codes, about)


def _int8(packed: Packed, dtype: torch.dtype) -> Tensor:
    # The largest of a row has the code 127. Codes are exact in bf16, too.
    return packed.codes.to(dtype).mul_(packed.scales.unsqueeze(1) * (1.0 / 127.0))


_UNPACKED: Mapping[int, Callable[[Packed, torch.dtype], Tensor]] = {4: _nf4, 8: _int8}


class _Product(torch.autograd.Function):
    """x W^T of a packed W: the backward pass unpacks W once more, so that no copy of it is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return functional.linear(x, packed.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.packed.unpacked(gradient.dtype), None


@final
class PackedLinear(nn.Module):
    """A dense layer, y = x W^T + bias, with a packed W.

    W is unpacked for every product, in the number format of the forward pass. The layers of
    bitsandbytes compute otherwise: those of 8 bits round x as well, and pick columns for the whole
    batch, so that a row's result would depend on the other rows; those of 4 bits change their own
    bias and packing in place. ``is_conv1d``: whether a checkpoint has this layer as a ``Conv1D``.
    """

    weight: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: Packed, bias: nn.Parameter | None, *, is_conv1d: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.bits = packed.bits
        self.is_conv1d = is_conv1d
        # Buffers, which move with the model and are no parameters. Families read the dtype of
        # ``weight`` where they compute.
        self.register_buffer("weight", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_parameter("bias", bias)

    @property
    def packed(self) -> Packed:
        """Return the matrix as it is kept."""
        shape = torch.Size((self.out_features, self.in_features))
        return Packed(self.weight, self.scales, shape, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias for x (..., in), in the number format of autocast or of x."""
        product = self.product(x)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T for x (..., in)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        run: Any = _Product.apply  # untyped
        product: Tensor = run(x.to(dtype), self.packed)
        return product

    def unpacked(self) -> nn.Module:
        """Return an ordinary layer with the same matrix and bias in float32, of its own kind."""
        matrix = self.packed.float()
        conv1d: Any = Conv1D  # its constructor is untyped
        layer: nn.Module
        with torch.device("meta"):  # nothing is drawn
            if self.is_conv1d:  # GPT-2 stores (in, out)
                layer = conv1d(self.out_features, self.in_features)
                matrix = matrix.t().contiguous()
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=False)
        layer.weight = nn.Parameter(matrix)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().float())
        return layer.requires_grad_(False)


def unpack_layers(model: nn.Module) -> None:
    """Put an ordinary layer in the place of every packed one of ``model``."""
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, layer.unpacked())


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the packed layers of ``model`` by name, one that stands in several places once."""
    layers: dict[str, PackedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            layers[name] = module
    return layers
