"""Top-k sparsification: the largest differences go up, the others wait (Aji and Heafield 2017)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Gt, Le
from torch import Tensor

from fedpeft.algebra.codes import place_bits, places_as_bits, places_from_bits
from fedpeft.algebra.importance import pack, unpack
from fedpeft.types import Method, Payload
from fedpeft.wrappers.compressed import Compressed, Read


@final
@dataclass(frozen=True)
class TopK:
    """Send up the largest of each tensor's differences to what was sent, and their places.

    All others are kept by the client and added to its next. Requests stay whole.
    """

    paper: ClassVar[str] = (
        "Aji and Heafield 2017, arXiv 1704.05021; error feedback: Stich et al. 2018, "
        "arXiv 1809.07599"
    )
    density: Annotated[float, Gt(0), Le(1)] = 0.1
    """Share of each tensor that is sent, at least one number. A number takes 4 bytes, and its place
    some log2(1 / density) + 2 bits."""
    feedback: bool = True
    """Whether what was not sent is added to the client's next. `false` where the server turns
    factors between rounds, as by an SVD."""

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with replies of few numbers."""
        return Compressed(method, owner, Largest(owner, self.density), self.feedback)


@final
@dataclass(frozen=True)
class Largest:
    """A code of the largest numbers of every tensor and their places.

    ``<name>/top``: the numbers, (k,), places ascending. ``<owner>/places``: the places of all
    tensors, by names in order, 8 bits to a byte.
    """

    name: ClassVar[str] = "top_k"
    owner: str
    density: float

    @property
    def largest(self) -> float:
        """Return the largest number of float32."""
        return torch.finfo(torch.float32).max

    @property
    def differences_only(self) -> bool:
        """Return True: of numbers that are no differences, small ones matter as well."""
        return True

    def forms(self, values: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return k numbers for every tensor, and the bytes of all places."""
        forms: dict[str, Tensor] = {}
        bits = 0
        for name, shape in values.items():
            chosen = self._chosen(shape.numel())
            forms[f"{name}/top"] = torch.empty(chosen, device="meta")
            bits += place_bits(shape.numel(), chosen)
        places = torch.empty((bits + 7) // 8, dtype=torch.uint8, device="meta")
        return {**forms, f"{self.owner}/places": places}

    def encode(self, values: Payload) -> tuple[dict[str, Tensor], Read]:
        """Pick the largest of every client's numbers."""
        written: dict[str, Tensor] = {}
        places: dict[str, Tensor] = {}
        bits: list[Tensor] = []
        for name, stack in sorted(values.items()):
            flat = stack.reshape(len(stack), -1)  # (K, n)
            top = flat.abs().topk(self._chosen(flat.shape[1]), dim=1, sorted=False).indices
            places[name] = top.sort(dim=1).values
            written[f"{name}/top"] = flat.gather(1, places[name])
            bits.append(places_as_bits(places[name], flat.shape[1]))
        written[f"{self.owner}/places"] = pack(torch.cat(bits, dim=1))

        def read() -> dict[str, Tensor]:
            numbers: dict[str, Tensor] = {}
            for name, stack in values.items():
                flat = torch.zeros_like(stack).reshape(len(stack), -1)
                flat.scatter_(1, places[name], written[f"{name}/top"])
                numbers[name] = flat.view(stack.shape)
            return numbers

        return written, read

    def decode(self, written: Payload, values: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the numbers at their places, and 0 elsewhere."""
        packed = written[f"{self.owner}/places"]
        bits = unpack(packed, 8 * len(packed))
        numbers: dict[str, Tensor] = {}
        begin = 0
        for name in sorted(values):
            count = values[name].numel()
            chosen = self._chosen(count)
            end = begin + place_bits(count, chosen)
            places = places_from_bits(bits[begin:end], count, chosen)
            flat = torch.zeros(count)
            flat[places] = written[f"{name}/top"]
            numbers[name] = flat.view(values[name])
            begin = end
        return numbers

    def _chosen(self, count: int) -> int:
        """Return k, how many of so many numbers are sent."""
        return max(1, round(self.density * count))
