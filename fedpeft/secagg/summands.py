"""Between tensors and the numbers that are summed: weighted, flattened, and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.algebra.averaging import Mean
from fedpeft.types import Payload


@final
@dataclass(frozen=True)
class Form:
    """Names, in order, with shapes and dtypes of what each client adds to a sum."""

    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]

    @property
    def numbers(self) -> int:
        """Return how many numbers one client adds, its weight included."""
        return sum(shape.numel() for shape in self.shapes.values()) + 1

    def mean(self, numbers: NDArray[np.float64]) -> Mean:
        """Return the mean whose sums are ``numbers``, as ``weighted`` has them."""
        flat_sums = torch.from_numpy(numbers)
        sums: dict[str, Tensor] = {}
        begin = 0
        for name, shape in self.shapes.items():
            end = begin + shape.numel()
            sums[name] = flat_sums[begin:end].view(shape)
            begin = end
        return Mean.of(sums, float(flat_sums[begin]), self.dtypes)


def form_of(contribution: Callable[[Payload], Payload], reply: Payload) -> Form:
    """Return the form of what ``contribution`` takes from a reply of the form ``reply``."""
    zeros: dict[str, Tensor] = {}
    for name, spec in reply.items():
        zeros[name] = torch.zeros(spec.shape, dtype=spec.dtype)
    added = sorted(contribution(zeros).items())
    return Form(
        {name: tensor.shape for name, tensor in added},
        {name: tensor.dtype for name, tensor in added},
    )


def joined(update: Payload) -> Tensor:
    """Return all numbers of ``update``, (n,), names in order.

    They are float32, or float64 where some of them are.

    >>> joined({"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(0.5)})
    tensor([0.5000, 1.0000, 2.0000])
    """
    parts = [torch.zeros(0)]  # float32: narrower types become it, and none gives it alone
    for _, tensor in sorted(update.items()):
        parts.append(tensor.flatten())
    return torch.cat(parts)


def weighted(numbers: Tensor, weight: float) -> NDArray[np.float64]:
    """Return ``numbers``, as ``joined`` has them, times their ``weight``, then the weight.

    >>> weighted(torch.tensor([0.5, 1.0, 2.0]), 4.0)
    array([2., 4., 8., 4.])
    """
    products = np.empty(len(numbers) + 1)
    products[-1] = weight
    # NumPy's products: torch would wake its threads for them, which takes longer.
    np.multiply(numbers.numpy(), weight, out=products[:-1], dtype=np.float64)
    return products


def is_within(numbers: Tensor, most: float) -> bool:
    """Return whether none of ``numbers``, as ``joined`` has them, is beyond ``most``, or no number.

    >>> is_within(torch.tensor([1.0, -20.0]), 16.0), is_within(torch.tensor([torch.nan]), 16.0)
    (False, False)
    """
    values = numbers.numpy()
    # As Python's floats: NumPy would round `most` to the dtype of the numbers.
    largest, smallest = float(values.max(initial=0)), float(values.min(initial=0))
    # A NaN makes both of them NaN, which is no smaller than anything.
    return largest <= most and -smallest <= most


def out_of_range(update: Payload, most: float) -> str:
    """Return what is larger than ``most``, or no number, in words; empty where nothing is.

    >>> out_of_range({"w": torch.tensor([1.0, -20.0])}, most=16.0)
    "tensor 'w' has the value -20, outside of wrap.range = 16 of secagg; declare a larger one"
    """
    for name, tensor in update.items():
        values = tensor.flatten().double()  # else `most` is rounded to the tensor's dtype
        beyond = values[~(values.abs() <= most)]  # NaN is no smaller than anything
        if beyond.numel():
            largest = beyond[beyond.abs().argmax()]
            return (
                f"tensor {name!r} has the value {float(largest):g}, outside of wrap.range = "
                f"{most:g} of secagg; declare a larger one"
            )
    return ""


def as_tensor(content: bytes) -> Tensor:
    """Return bytes as a tensor, (n,)."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's own bytes; the inverse of ``as_tensor``."""
    return tensor.contiguous().numpy().tobytes()


def as_table(contents: Sequence[bytes]) -> Tensor:
    """Return n > 0 contents of k bytes each as a tensor, (n, k).

    >>> as_table([b"ab", b"cd", b"ef"]).shape
    torch.Size([3, 2])
    """
    return as_tensor(b"".join(contents)).view(len(contents), -1)


def rows_of(table: Tensor) -> list[bytes]:
    """Return what the rows of a tensor hold; the inverse of ``as_table``.

    >>> rows_of(as_table([b"ab", b"cd", b"ef"]))
    [b'ab', b'cd', b'ef']
    """
    return [row.tobytes() for row in table.numpy()]
