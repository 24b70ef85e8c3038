"""Named tensors as a safetensors file in memory, written and read without a copy more than needed.

The format is safetensors' own (https://huggingface.co/docs/safetensors): the length of a JSON
header in 8 bytes, the header with dtype, shape and place of every tensor, the tensors. Its library
copies every tensor twice on the way; 90 MB of parameters in every message of full fine-tuning make
that the larger part of a round.

Whoever sends a file may mean harm, so its header is not given to a JSON parser, which would build
whatever it is told to. It is read by one pattern that knows only what the library and ``buffers``
write: compact JSON without metadata, one tensor after another. So nothing nests, no number is long,
and memory and time are those of the tensors that are there.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fedpeft.errors import WireError
from fedpeft.types import Payload

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
HEADER: Final = 1 << 24
"""Bytes of a header at most."""
TENSORS: Final = 1 << 16
"""Tensors in a file at most; LoRA on a mixture of 128 experts in 48 layers has 36,864."""
NAME: Final = 512
"""Characters of a tensor's name at most, as JSON escapes them."""
DIMENSIONS: Final = 8
"""Dimensions of a tensor at most."""
EMPTY: Final = 1 << 16
"""What the other dimensions of an empty tensor multiply to at most.

No bytes stand behind them, but what is made to fit them takes memory: a factor of their rank.
"""

_NAMES: Final = {dtype: name for name, dtype in FORMATS.items()}
_LENGTH: Final = 8
_NUMBER: Final = r"(?:0|[1-9][0-9]{0,14})"
# The + takes all there is and never gives any back: no text makes the search longer than itself.
_TEXT: Final = rf"""[^"\\\x00-\x1f]{{0,{NAME}}}+"""
_TENSOR: Final = re.compile(
    rf"""
    "(?P<name> {_TEXT} (?: \\. {_TEXT} ){{0,{NAME}}}+ )":
    {{
    "dtype":"(?P<format> \w{{1,8}} )",
    "shape":\[ (?P<shape> (?: {_NUMBER} (?: ,{_NUMBER} ){{0,{DIMENSIONS - 1}}} )? ) \],
    "data_offsets":\[ (?P<start> {_NUMBER} ),(?P<stop> {_NUMBER} ) \]
    }}
    (?: ,(?=") | \Z )
    """.encode(),
    re.VERBOSE,
)
"""One tensor of a header, and the comma before the next one."""

with warnings.catch_warnings():
    # Torch warns, once in a process, that the memory is for reading only.
    warnings.simplefilter("ignore")
    torch.frombuffer(b" ", dtype=torch.uint8)


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its format, its shape, and its bytes ``start`` to ``stop`` of the file."""

    format: str
    shape: tuple[int, ...]
    start: int
    stop: int


def buffers(payload: Payload) -> list[memoryview]:
    """Return the pieces of the file that holds ``payload``, in order: its header, then the tensors.

    Equal names, shapes and dtypes give equal headers. The pieces may be views of the tensors' own
    memory. WireError for a dtype that the format lacks, and for what is beyond the bounds above,
    which no receiver would read.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in payload.items()}
    for name, tensor in tensors.items():
        _check_sendable(name, tensor)
    if len(tensors) > TENSORS:
        raise WireError(f"{len(tensors)} tensors cannot be sent at once; at most {TENSORS}")
    # The widest numbers first, so that every tensor begins at a multiple of their width.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    entries: dict[str, object] = {}
    data: list[memoryview] = []
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        if tensor.numel() > 0:
            data.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH)
    if len(header) > HEADER:
        raise WireError(f"a header of {len(header)} bytes cannot be sent; at most {HEADER}")
    return [memoryview(len(header).to_bytes(_LENGTH, "little") + header), *data]


def _check_sendable(name: str, tensor: Tensor) -> None:
    """Raise WireError for a tensor that no receiver would read."""
    if tensor.dtype not in _NAMES:
        raise WireError(
            f"tensor {name!r} is {tensor.dtype}, which cannot be sent; "
            f"choose from: {', '.join(FORMATS)}"
        )
    if len(json.dumps(name)) - len('""') > NAME:
        start = f"{name[:40]!r}..."
        raise WireError(f"tensor {start} cannot be sent: its name has over {NAME} characters")
    if fault := _fault(tensor.shape):
        raise WireError(f"tensor {name!r} cannot be sent: {fault}")


def places(file: bytes | bytearray | memoryview) -> dict[str, Place]:
    """Return where every tensor is.

    A file of another format, or with bytes that belong to no tensor, raises WireError.
    """
    try:
        data = _LENGTH + int.from_bytes(file[:_LENGTH], "little")
        if not _LENGTH <= data <= min(len(file), _LENGTH + HEADER):
            raise ValueError(f"{len(file)} bytes are no header")
        by_name = _entries(bytes(file[_LENGTH:data]), data)
        in_file = sorted(by_name.values(), key=lambda place: (place.start, place.stop))
        _check_cover(in_file, data, len(file))
    except ValueError as error:
        raise WireError(f"not a safetensors message: {error}") from error
    return by_name


def _entries(header: bytes, data: int) -> dict[str, Place]:
    """Return the places in ``header`` by name; the tensors begin at byte ``data`` of the file."""
    header = header.rstrip(b" ")
    if header[:1] + header[-1:] != b"{}":
        raise ValueError("its header is no JSON object")
    by_name: dict[str, Place] = {}
    position, end = len(b"{"), len(header) - len(b"}")
    while position < end:
        entry = _TENSOR.match(header, position, end)
        if entry is None:
            raise ValueError(f"no tensor is described at byte {position} of its header")
        name = str(json.loads(b'"' + entry["name"] + b'"'))
        if len(entry["name"]) > NAME:
            raise ValueError(f"a tensor's name is longer than {NAME} characters")
        if name in by_name:
            raise ValueError(f"two tensors are called {name!r}")
        if len(by_name) == TENSORS:
            raise ValueError(f"it has more than {TENSORS} tensors")
        by_name[name] = _place(entry, data)
        position = entry.end()
    return by_name


def _place(entry: re.Match[bytes], data: int) -> Place:
    """Return the place that an entry of the header describes; ValueError where it cannot be one."""
    name = entry["format"].decode()
    shape = tuple(int(size) for size in entry["shape"].split(b",") if size)
    start, stop = int(entry["start"]), int(entry["stop"])
    if name not in FORMATS:
        raise ValueError(f"{name!r} is no dtype; choose from: {', '.join(FORMATS)}")
    if stop - start != FORMATS[name].itemsize * math.prod(shape):
        raise ValueError(f"{start} to {stop} is no place for {name} of shape {shape}")
    if fault := _fault(shape):
        raise ValueError(fault)
    return Place(name, shape, data + start, data + stop)


def _fault(shape: Sequence[int]) -> str:
    """Return why a tensor of ``shape`` is refused, nothing if it is not."""
    if len(shape) > DIMENSIONS:
        return f"it has {len(shape)} dimensions, more than {DIMENSIONS}"
    others = math.prod(size for size in shape if size != 0)
    if 0 in shape and others > EMPTY:
        return f"it is empty, and its other sizes, {tuple(shape)}, multiply to more than {EMPTY}"
    return ""


def _check_cover(in_file: Sequence[Place], data: int, end: int) -> None:
    """Raise ValueError unless the places follow each other from ``data`` to ``end``."""
    for place in in_file:
        if place.start != data:
            raise ValueError(f"a tensor begins at byte {place.start}, not at {data}")
        data = place.stop
    if data != end:
        raise ValueError(f"{end - data} bytes belong to no tensor")


def tensors(file: bytes, offset: int) -> dict[str, Tensor]:
    """Return the tensors of the file that begins at ``offset`` in ``file``, in order of names.

    They are views of its memory and for reading: nobody may write to what was received. WireError
    as in ``places``, and for a truth value that is neither 0 nor 1.
    """
    views: dict[str, Tensor] = {}
    for name, place in sorted(places(memoryview(file)[offset:]).items()):
        dtype = FORMATS[place.format]
        if place.start == place.stop:
            views[name] = torch.empty(place.shape, dtype=dtype)
            continue
        count, start = math.prod(place.shape), offset + place.start
        flat = torch.frombuffer(file, dtype=dtype, count=count, offset=start)
        if dtype == torch.bool and flat.view(torch.uint8).max() > 1:
            raise WireError(f"tensor {name!r} holds a truth value that is neither 0 nor 1")
        views[name] = flat.view(place.shape)
    return views
