"""Named tensors as a safetensors file in memory, written and read without a copy more than needed.

The format is safetensors' own (https://huggingface.co/docs/safetensors): the length of a JSON header in 8 bytes, the header
with dtype, shape and place of every tensor, the tensors. Its library copies every tensor twice on the way; 90 MB of
parameters in every message of full fine-tuning make that the larger part of a round.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fedpeft.types import Payload, WireError

FORMATS: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in FORMATS.items()}
_LENGTH: Final = 8

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b" ", dtype=torch.uint8)  # torch warns, once in a process, that the memory is for reading only


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its format, its shape, and its bytes, counted from the start of the file."""

    format: str
    shape: tuple[int, ...]
    start: int
    stop: int


def buffers(payload: Payload) -> list[memoryview]:
    """Return the parts of the file that holds ``payload``, in order; equal names, shapes and dtypes give equal headers.

    The parts may be views of the tensors' own memory. WireError for a dtype that the format lacks.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in payload.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise WireError(f"tensor {name!r} is {tensor.dtype}, which cannot be sent; choose from: {', '.join(FORMATS)}")
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that every tensor is aligned
    about, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        about[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(about, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH)
    bytes_of = [tensors[name].reshape(-1).view(torch.uint8).numpy().data for name in order if tensors[name].numel()]
    return [memoryview(len(header).to_bytes(_LENGTH, "little") + header), *bytes_of]


def places(file: bytes | bytearray | memoryview) -> dict[str, Place]:
    """Return where every tensor is; a file that is none, or has bytes that belong to no tensor, raises WireError."""
    try:
        data = _LENGTH + int.from_bytes(file[:_LENGTH], "little")
        if len(file) < max(data, _LENGTH):
            raise ValueError(f"{len(file)} bytes are no header")
        header = json.loads(bytes(file[_LENGTH:data]))
        found = {name: _place(about, data) for name, about in header.items()}
        _check_cover(sorted(found.values(), key=lambda place: (place.start, place.stop)), data, len(file))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WireError(f"not a safetensors message: {error}") from error
    return found


def _place(about: Mapping[str, Any], data: int) -> Place:
    name, shape, (start, stop) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"shape {shape} or place {start} to {stop} is none")
    if stop - start != FORMATS[name].itemsize * math.prod(shape):
        raise ValueError(f"{start} to {stop} is no place for {name} of shape {shape}")
    return Place(name, shape, data + start, data + stop)


def _check_cover(found: Sequence[Place], data: int, end: int) -> None:
    """Raise ValueError unless the places follow each other from ``data`` to ``end``."""
    for place in found:
        if place.start != data:
            raise ValueError(f"a tensor begins at byte {place.start}, not at {data}")
        data = place.stop
    if data != end:
        raise ValueError(f"{end - data} bytes belong to no tensor")


def tensors(file: bytes, offset: int) -> dict[str, Tensor]:
    """Return the tensors of the file that begins at ``offset`` in ``file``, by name in order, as views of its memory.

    They are for reading: nobody may write to what was received. WireError as in ``places``.
    """
    found = places(memoryview(file)[offset:])
    return {
        name: torch.frombuffer(
            file, dtype=FORMATS[place.format], count=math.prod(place.shape), offset=offset + place.start
        ).view(place.shape)
        if place.stop > place.start
        else torch.empty(place.shape, dtype=FORMATS[place.format])
        for name, place in sorted(found.items())
    }
