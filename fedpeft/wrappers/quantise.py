"""Quantisation: messages of bf16, 8 or 4 bits a number (after QSGD, Alistarh et al. 2017)."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

import torch
from torch import Tensor, nn

from fedpeft.algebra.codes import (
    dequantised,
    from_halves,
    from_rows,
    in_halves,
    quantised,
    row_shape,
    to_rows,
)
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update
from fedpeft.wrappers.compressed import Code, Compressed, Read

LEVELS: Final[Mapping[str, int]] = {"int8": 127, "int4": 7}
"""The largest whole number of a code."""


@final
@dataclass(frozen=True)
class Quantise:
    """Write the numbers of replies, and of requests if asked to, in fewer bits.

    A row of a matrix is written as whole numbers and one scale; of one that is taller than wide, a
    column. Replies are differences to what was sent, and what rounding took from them is kept by
    the client and added to its next.
    """

    paper: ClassVar[str] = "after QSGD: Alistarh et al. 2017, arXiv 1610.02132"
    up: Literal["bf16", "int8", "int4"] = "int8"
    """What numbers of replies are written in. `int8` and `int4` round to the nearest of 255 or 15
    steps between the largest value of a row and its negative."""
    down: Literal["fp32", "bf16", "int8"] = "fp32"
    """What numbers of requests are written in. Clients then begin at rounded values; the server's
    own are not rounded, so nothing adds up."""
    feedback: bool = True
    """Whether what rounding took from a reply is added to the client's next. `false` where the
    server turns factors between rounds, as by an SVD."""

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with replies, and requests, in fewer bits."""
        upward: Code = Halved() if self.up == "bf16" else Rows(owner, self.up)
        compressed = Compressed(method, owner, upward, self.feedback)
        return compressed if self.down == "fp32" else Lowered(compressed, owner, self.down)


@final
@dataclass(frozen=True)
class Halved:
    """A code of bfloat16."""

    name: ClassVar[str] = "quantise"

    @property
    def largest(self) -> float:
        """Return the largest number of bfloat16, which is somewhat below that of float32."""
        return torch.finfo(torch.bfloat16).max

    @property
    def differences_only(self) -> bool:
        """Return False."""
        return False

    def forms(self, values: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the same shapes in bfloat16."""
        forms: dict[str, Tensor] = {}
        for name, shape in values.items():
            forms[name] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return forms

    def encode(self, values: Payload) -> tuple[dict[str, Tensor], Read]:
        """Round to bfloat16."""
        written = {name: stack.to(torch.bfloat16) for name, stack in values.items()}
        return written, lambda: {name: half.float() for name, half in written.items()}

    def decode(self, written: Payload, values: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the numbers in float32."""
        return {name: written[name].float() for name in values}


@final
@dataclass(frozen=True)
class Rows:
    """A code of whole numbers, with one scale a row: all tensors in two, by names in order.

    ``<owner>/codes``: int8, (n,), or two to a byte. ``<owner>/largest``: of each row, float32.
    """

    name: ClassVar[str] = "quantise"
    owner: str
    kind: Literal["int8", "int4"]

    @property
    def largest(self) -> float:
        """Return the largest number of float32."""
        return torch.finfo(torch.float32).max

    @property
    def differences_only(self) -> bool:
        """Return False."""
        return False

    def forms(self, values: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return as many codes as there are numbers, and as many scales as there are rows."""
        numbers = sum(shape.numel() for shape in values.values())
        rows = sum(row_shape(shape)[0] for shape in values.values())
        if self.kind == "int4":
            codes = torch.empty((numbers + 1) // 2, dtype=torch.uint8, device="meta")
        else:
            codes = torch.empty(numbers, dtype=torch.int8, device="meta")
        largest = torch.empty(rows, device="meta")
        return {f"{self.owner}/codes": codes, f"{self.owner}/largest": largest}

    def encode(self, values: Payload) -> tuple[dict[str, Tensor], Read]:
        """Round every row to whole steps."""
        levels = LEVELS[self.kind]
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name in sorted(values):
            parts[name] = quantised(to_rows(values[name]), levels)
        codes = torch.cat([part.flatten(1) for part, _ in parts.values()], dim=1)  # (K, n)
        largest = torch.cat([scales for _, scales in parts.values()], dim=1)  # (K, rows)
        if self.kind == "int4":
            codes = in_halves(codes)

        def read() -> dict[str, Tensor]:
            numbers: dict[str, Tensor] = {}
            for name, (part, scales) in parts.items():
                rows = dequantised(part, scales, levels)
                numbers[name] = from_rows(rows, values[name].shape[1:])
            return numbers

        return {f"{self.owner}/codes": codes, f"{self.owner}/largest": largest}, read

    def decode(self, written: Payload, values: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the numbers, to half a step of their rows."""
        codes, largest = written[f"{self.owner}/codes"], written[f"{self.owner}/largest"]
        if self.kind == "int4":
            codes = from_halves(codes, sum(shape.numel() for shape in values.values()))
        numbers: dict[str, Tensor] = {}
        code, row = 0, 0  # where the next tensor begins
        for name in sorted(values):
            rows, length = row_shape(values[name])
            part = codes[code : code + rows * length].view(rows, length)
            scales = largest[row : row + rows]
            wide = dequantised(part, scales, LEVELS[self.kind])
            numbers[name] = from_rows(wide.unsqueeze(0), values[name])[0]
            code, row = code + rows * length, row + rows
        return numbers


@final
@dataclass(frozen=True)
class Lowered:
    """A method whose requests are written in fewer bits.

    A tensor travels as ``<name>/bf16``, or as ``<name>/int8`` and its scales in
    ``<owner>/largest``, by names in order.
    """

    paper: ClassVar[str] = Quantise.paper
    inner: Method
    owner: str
    kind: Literal["bf16", "int8"]

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does."""
        return self.inner.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends, rounded."""
        lowered: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        for name, tensor in self.inner.send(state, client).items():
            if tensor.dtype != torch.float32 or tensor.numel() == 0:
                lowered[name] = tensor
            elif self.kind == "bf16":
                lowered[f"{name}/bf16"] = tensor.to(torch.bfloat16)
            else:
                codes, largest = quantised(to_rows(tensor.unsqueeze(0)), LEVELS["int8"])
                lowered[f"{name}/int8"] = from_rows(codes, tensor.shape)[0]
                scales[f"{name}/int8"] = largest[0]
        if scales:
            in_order = [scales[name] for name in sorted(scales)]
            lowered[f"{self.owner}/largest"] = torch.cat(in_order)
        return lowered

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount as the method inside does, at the rounded values."""
        return self.inner.mount(model, self._raised(down), memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects."""
        one = {name: tensor.unsqueeze(0) for name, tensor in down.items()}
        return self.inner.expects(state, {n: t[0] for n, t in self._raised(one).items()})

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the method inside does: at the server's own values, which are not rounded."""
        return self.inner.receive(state, updates)

    def _raised(self, down: Payload) -> dict[str, Tensor]:
        """Return what was sent, (K, ...), in float32."""
        raised: dict[str, Tensor] = {}
        row = 0
        for name, tensor in sorted(down.items()):
            if name.endswith("/bf16"):
                raised[name.removesuffix("/bf16")] = tensor.float()
            elif name.endswith("/int8"):
                codes = to_rows(tensor)
                scales = down[f"{self.owner}/largest"][:, row : row + codes.shape[1]]
                rows = dequantised(codes, scales, LEVELS["int8"])
                raised[name.removesuffix("/int8")] = from_rows(rows, tensor.shape[1:])
                row += codes.shape[1]
            elif name != f"{self.owner}/largest":
                raised[name] = tensor
        return raised
